//! Looking after a mounted volume: it grows when its PersistentVolume has grown, and is published again when its driver
//! wants that.
//!
//! That a volume has grown is told by a watch of that one object, which isopod's API server allows an agent. One that allows
//! only to get it is asked again, with growing pauses.

use std::{collections::HashMap, future::pending, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt;
use k8s_openapi::{
    api::{
        core::v1::{PersistentVolume, PersistentVolumeClaim},
        storage::v1::CSIDriverSpec,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{
    api::{Patch, PatchParams},
    runtime::watcher,
};
use serde_json::json;

use super::{
    Driver,
    driver::Can,
    volume::{From, Wanted},
};
use crate::{
    events::Kind,
    grpc::proto::csi::{CapacityRange, NodeExpandVolumeRequest},
    pods::sandbox,
    quantity,
};

/// First pause after a volume could not be watched or grown ...
const PAUSE: Duration = Duration::from_secs(1);
/// ... and the longest.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often a volume is published again for a driver that wants that.
const REPUBLISH: Duration = Duration::from_secs(60);

fn storage(list: Option<&std::collections::BTreeMap<String, Quantity>>) -> i64 {
    list.and_then(|l| l.get("storage")).map_or(0, quantity::value)
}

/// The size a volume has to grow to, if so: what the controller gave the volume and the claim does not have yet.
fn growth(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<(i64, Quantity)> {
    let capacity = volume.spec.as_ref()?.capacity.as_ref();
    let (want, have) = (storage(capacity), storage(claim.status.as_ref()?.capacity.as_ref()));
    let exact = capacity?.get("storage")?.clone();
    (have > 0 && want > have).then_some((want, exact))
}

/// Grows a volume that has grown behind the node while it was not mounted.
pub(super) async fn at_mount(w: &Wanted, driver: &Driver, staged: bool) -> Result<(), String> {
    let From::Persistent { volume, claim } = &w.from else { return Ok(()) };
    grow(w, driver, staged, volume, claim).await
}

async fn grow(
    w: &Wanted,
    driver: &Driver,
    staged: bool,
    volume: &PersistentVolume,
    claim: &PersistentVolumeClaim,
) -> Result<(), String> {
    let Some((want, exact)) = growth(volume, claim).filter(|_| driver.can(Can::ExpandVolume)) else { return Ok(()) };
    let source = volume.spec.as_ref().and_then(|s| s.csi.as_ref()).ok_or("not a CSI volume")?;
    let request = NodeExpandVolumeRequest {
        volume_id: w.handle.clone(),
        volume_path: w.target().display().to_string(),
        capacity_range: Some(CapacityRange { required_bytes: want, limit_bytes: 0 }),
        staging_target_path: if staged { w.staging().display().to_string() } else { String::new() },
        volume_capability: Some(w.capability(driver)),
        secrets: w.secret(source.node_expand_secret_ref.as_ref()).await?,
    };
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let events = &w.ctx.events;
    if let Err(error) = driver.expand(request).await {
        let text = format!("NodeExpandVolume.NodeExpandVolume failed for volume {name:?} : {error}");
        events.pod(&w.pod, Kind::Warning, "VolumeResizeFailed", text);
        return Err(error);
    }
    let text = format!("MountVolume.NodeExpandVolume succeeded for volume {name:?} {}", exact.0);
    events.pod(&w.pod, Kind::Normal, "FileSystemResizeSuccessful", text);
    tell(w, claim, &exact).await
}

/// The claim has the size now, and nothing of the change is pending.
async fn tell(w: &Wanted, claim: &PersistentVolumeClaim, size: &Quantity) -> Result<(), String> {
    let client = w.ctx.api.wait().await.ok_or("there is no API server")?;
    let claims: kube::Api<PersistentVolumeClaim> = kube::Api::namespaced(client, sandbox::namespace(&w.pod));
    let conditions = claim.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let left: Vec<_> = conditions
        .into_iter()
        .filter(|c| !matches!(c.type_.as_str(), "FileSystemResizePending" | "Resizing"))
        .collect();
    let status = json!({
        "capacity": {"storage": size.0},
        "conditions": left,
        "allocatedResourceStatuses": {"storage": null},
    });
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let patch = Patch::Merge(json!({"status": status}));
    claims.patch_status(name, &PatchParams::default(), &patch).await.map(|_| ()).map_err(|e| e.to_string())
}

/// A task for a volume that needs looking after.
pub(super) fn keep(w: Wanted, spec: CSIDriverSpec) -> Option<tokio::task::AbortHandle> {
    let again = spec.requires_republish == Some(true);
    let persistent = matches!(w.from, From::Persistent { .. });
    (again || persistent).then(|| tokio::spawn(follow(w, spec)).abort_handle())
}

async fn follow(w: Wanted, spec: CSIDriverSpec) {
    loop {
        // Until its driver is there (after a restart of the agent) there is nothing to do.
        let mut drivers = w.ctx.csi.drivers.subscribe();
        let driver = drivers.wait_for(|all| all.contains_key(&w.driver)).await;
        let Ok(Some(driver)) = driver.map(|all| all.get(&w.driver).cloned()) else { return };
        let another = drivers.wait_for(|all| all.get(&w.driver).is_none_or(|d| !Arc::ptr_eq(d, &driver)));
        // What is dropped half-way is begun again with the new driver: both are idempotent.
        tokio::select! {
            ended = another => if ended.is_err() { return },
            () = grow_when_told(&w, &driver) => {}
            () = republish(&w, &driver, &spec) => {}
        }
    }
}

/// Publishes a volume again for a driver that wants that; never ends.
async fn republish(w: &Wanted, driver: &Driver, spec: &CSIDriverSpec) {
    if spec.requires_republish != Some(true) {
        return pending().await;
    }
    loop {
        tokio::time::sleep(REPUBLISH).await;
        let _turn = w.ctx.csi.turn(&w.driver, &w.handle).await;
        let staged = driver.can(Can::StageUnstageVolume) && matches!(w.from, From::Persistent { .. });
        let context = if w.is_attached(spec) { w.attached().await } else { Ok(HashMap::new()) };
        let published = match context {
            Ok(context) => w.publish(driver, spec, context, staged).await,
            Err(error) => Err(error),
        };
        if let Err(error) = published {
            tracing::warn!(pod = sandbox::name(&w.pod), error, "volume not published again");
        }
    }
}

/// Grows a volume when its object says that it has; never ends.
async fn grow_when_told(w: &Wanted, driver: &Driver) {
    let From::Persistent { volume, .. } = &w.from else { return pending().await };
    let (true, Some(client)) = (driver.can(Can::ExpandVolume), w.ctx.api.wait().await) else { return pending().await };
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let volumes: kube::Api<PersistentVolume> = kube::Api::all(client);
    let mut changes = pin!(watcher::watch_object(volumes.clone(), name));
    let mut pause = PAUSE;
    loop {
        let done = match changes.next().await {
            Some(Ok(Some(now))) => look(w, driver, &now).await,
            Some(Ok(None)) => continue,
            // The server is away, or does not let this volume be watched.
            Some(Err(error)) => Err(error.to_string()),
            None => return pending().await,
        };
        let Err(mut error) = done else {
            pause = PAUSE;
            continue;
        };
        // As it is now, until it can be asked for and has the size it should have.
        loop {
            tracing::debug!(pod = sandbox::name(&w.pod), error, "volume may keep its size");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            match volumes.get(name).await {
                Ok(now) => match look(w, driver, &now).await {
                    Ok(()) => break,
                    Err(again) => error = again,
                },
                Err(again) => error = again.to_string(),
            }
        }
    }
}

async fn look(w: &Wanted, driver: &Driver, volume: &PersistentVolume) -> Result<(), String> {
    let From::Persistent { claim, .. } = &w.from else { return Ok(()) };
    let client = w.ctx.api.get().ok_or("there is no API server")?;
    let claims: kube::Api<PersistentVolumeClaim> = kube::Api::namespaced(client, sandbox::namespace(&w.pod));
    let claim = claims.get(claim.metadata.name.as_deref().unwrap_or_default()).await.map_err(|e| e.to_string())?;
    let _turn = w.ctx.csi.turn(&w.driver, &w.handle).await;
    grow(w, driver, driver.can(Can::StageUnstageVolume), volume, &claim).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_grows_when_it_is_larger_than_its_claim_knows() {
        let of = |volume: &str, claim: serde_json::Value| {
            let volume = serde_json::from_value(json!({"spec": {"capacity": {"storage": volume}}})).unwrap();
            let claim = serde_json::from_value(json!({"status": claim})).unwrap();
            growth(&volume, &claim).map(|(bytes, text)| (bytes, text.0))
        };
        assert_eq!(of("2Gi", json!({"capacity": {"storage": "1Gi"}})), Some((2 << 30, "2Gi".into())));
        assert_eq!(of("1Gi", json!({"capacity": {"storage": "1024Mi"}})), None);
        assert_eq!(of("1Gi", json!({})), None);
    }
}
