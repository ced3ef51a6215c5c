//! The objects a cluster begins with, and the loops that keep some of them true.
//!
//! In: upstream's bootstrap policy as data, the configuration. Out: namespaces, RBAC, priority classes, flow control objects,
//! the `kubernetes` service with its endpoints. What is there already is reconciled, not replaced: rules and subjects that
//! are missing are added unless the object's `autoupdate` annotation says no; what an administrator has added stays.

mod addresses;
mod aggregation;
mod apiservices;
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

/// When a failed write is tried again.
const RETRY: Duration = Duration::from_secs(1);

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
    apiservices::builtin(objects).await?;
    objects::service(config, objects).await?;
    objects::config_maps(config, objects).await
}

/// Something that is kept true while the server runs.
enum Duty {
    /// Aggregated cluster roles have the rules they select.
    Roles,
    /// The `kubernetes` service and its endpoints lead to this server.
    Kubernetes(Arc<Config>),
    /// Custom resources have APIServices.
    CustomGroups(apiservices::Custom),
    /// Cluster IPs have IPAddresses.
    Addresses(addresses::Addresses),
}

impl Duty {
    /// What may break it.
    fn watched(&self) -> Vec<Gvr> {
        match self {
            Self::Roles => vec![crate::authz::rbac::gvr("clusterroles")],
            Self::Kubernetes(_) => [("", "endpoints"), ("discovery.k8s.io", "endpointslices"), ("", "services")]
                .map(|(group, resource)| Gvr::new(group, "v1", resource))
                .into(),
            Self::CustomGroups(_) => apiservices::Custom::watched().into(),
            Self::Addresses(_) => addresses::Addresses::watched().into(),
        }
    }

    async fn look(&mut self, objects: &dyn Objects) -> Result<(), Status> {
        match self {
            Self::Roles => aggregation::reconcile(objects).await,
            Self::Kubernetes(config) => objects::service(config, objects).await,
            Self::CustomGroups(custom) => custom.follow(objects).await,
            Self::Addresses(addresses) => addresses.follow(objects).await,
        }
    }

    /// Looks at once and after every change. What a look writes wakes it once more, to find nothing.
    async fn follow(mut self, objects: Arc<dyn Objects>, stop: CancellationToken) {
        let watched = self.watched();
        loop {
            // Before looking, so that no change falls in between.
            let changed = objects.changed(&watched);
            let look = self.look(&*objects).await;
            let failed =
                look.inspect_err(|error| tracing::warn!(%error, first = %watched[0].resource, "upkeep")).is_err();
            // Every arm only waits.
            tokio::select! {
                () = changed => {}
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY), if failed => {}
            }
        }
    }
}

/// Keeps aggregated cluster roles, the `kubernetes` service, APIServices and IPAddresses true. Returns when `stop` fires.
pub async fn maintain(config: Arc<Config>, objects: Arc<dyn Objects>, stop: CancellationToken) {
    let duties = [
        Duty::Roles,
        Duty::Kubernetes(config),
        Duty::CustomGroups(apiservices::Custom::default()),
        Duty::Addresses(addresses::Addresses::default()),
    ];
    futures::future::join_all(duties.map(|duty| duty.follow(Arc::clone(&objects), stop.clone()))).await;
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
