//! The objects a cluster begins with, and the loops that keep some of them true.
//!
//! In: upstream's bootstrap policy as data, the configuration. Out: namespaces, RBAC, priority classes, flow control objects,
//! the `kubernetes` service with its endpoints. What is there already is reconciled, not replaced: rules and subjects that
//! are missing are added unless the object's `autoupdate` annotation says no; what an administrator has added stays.

mod aggregation;
mod objects;
mod rbac;

use std::{sync::Arc, time::Duration};

use isopod_api::{
    gvk::Gvr,
    status::{Status, reason},
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{Config, authn::UserInfo, objects::Objects};

/// How often the loops look at the cache's generations (two numbers; objects are only read when they have changed).
const LOOK: Duration = Duration::from_secs(2);

/// The bootstrap data.
pub(crate) fn data() -> Value {
    // Checked by a test; an empty policy is what a broken build would have.
    serde_json::from_str(include_str!("../../data/bootstrap-policy.json")).unwrap_or_default()
}

/// The rows of one of the data's tables.
fn rows<'a>(data: &'a Value, table: &str) -> impl Iterator<Item = &'a Value> {
    data[table].as_array().into_iter().flatten()
}

/// Writes the initial objects. Runs before the server answers `/readyz`, after the caches are loaded.
pub async fn run(config: &Config, objects: Arc<dyn Objects>) -> Result<(), Status> {
    let data = data();
    let objects = &*objects;
    objects::namespaces(objects, &data).await?;
    rbac::reconcile(objects, &data).await?;
    aggregation::reconcile(objects).await?;
    objects::classes(objects, &data).await?;
    objects::service(config, objects).await?;
    objects::config_maps(config, objects).await
}

/// Loops that go on while the server runs (RBAC aggregation, the `kubernetes` endpoints). Returns when `stop` fires.
pub async fn maintain(config: Arc<Config>, objects: Arc<dyn Objects>, stop: CancellationToken) {
    let watched = ["clusterroles", "endpoints", "endpointslices", "services"];
    let group = |resource| match resource {
        "clusterroles" => crate::authz::rbac::GROUP,
        "endpointslices" => "discovery.k8s.io",
        _ => "",
    };
    let watched = watched.map(|resource| Gvr::new(group(resource), "v1", resource));
    let mut seen = None;
    let mut tick = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        let now = watched.each_ref().map(|gvr| objects.generation(gvr));
        if seen == Some(now) {
            continue;
        }
        let result = async {
            aggregation::reconcile(&*objects).await?;
            objects::service(&config, &*objects).await
        };
        match result.await {
            // What was written is seen again once; then nothing changes and the generations stand still.
            Ok(()) => seen = Some(now),
            Err(error) => tracing::warn!(%error, "bootstrap objects"),
        }
    }
}

/// Creates an object; one that exists is left alone.
async fn ensure(objects: &dyn Objects, gvr: &Gvr, namespace: &str, object: Value) -> Result<(), Status> {
    if objects.get(gvr, namespace, isopod_api::meta::name(&object)).is_some() {
        return Ok(());
    }
    match objects.create(gvr, namespace, object).await {
        Err(status) if status.reason == reason::ALREADY_EXISTS => Ok(()),
        result => result.map(drop),
    }
}

/// Changes an object as the server itself.
async fn modify(
    objects: &dyn Objects,
    gvr: &Gvr,
    namespace: &str,
    name: &str,
    change: impl Fn(&mut Value) + Send + Sync,
) -> Result<(), Status> {
    let user = UserInfo::system();
    let change = Box::new(move |value: &mut Value| {
        change(value);
        Ok(())
    });
    objects.modify(gvr, namespace, name, "", &user, change).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_is_whole() {
        let data = data();
        let count = |field: &str| data[field].as_array().map_or(0, Vec::len);
        assert_eq!((count("clusterRoles"), count("clusterRoleBindings"), count("namespaces")), (69, 50, 4));
    }
}
