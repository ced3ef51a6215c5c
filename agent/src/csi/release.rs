//! Taking volumes down: of a pod that has ended, of pods nobody knows, of nobody at all.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{pod_volumes, pods_root, record, record::Record, staging, staging_root, unique_name};
use crate::{
    context::Context,
    grpc::proto::csi::{NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest},
    volumes::mounts,
};

fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

/// Takes down all CSI volumes of a pod. Goes on after errors; all are told.
pub(crate) async fn release(ctx: &Context, uid: &str) -> Result<(), String> {
    let root = pods_root(ctx).join(uid);
    if !root.exists() {
        return Ok(());
    }
    let mut errors = Vec::new();
    for dir in directories(&pod_volumes(ctx, uid)) {
        if let Err(e) = release_one(ctx, &dir).await {
            errors.push(format!("volume {:?}: {e}", dir.file_name().unwrap_or_default()));
        }
    }
    if !errors.is_empty() {
        return Err(errors.join("; "));
    }
    if let Some(mount) = mounts::below(&root).first() {
        return Err(format!("{} is still mounted", mount.display()));
    }
    fs::remove_dir_all(&root).map_err(|e| format!("{}: {e}", root.display()))
}

async fn release_one(ctx: &Context, dir: &Path) -> Result<(), String> {
    let target = dir.join("mount");
    let failed = |e: std::io::Error| format!("{}: {e}", dir.display());
    let Some(record) = Record::read(dir) else {
        // Its driver was never asked.
        return record::remove(dir, "mount").map_err(failed);
    };
    let driver = ctx.csi.driver(&record.driver_name)?;
    let _turn = ctx.csi.turn(&record.driver_name, &record.volume_handle).await;
    let request = NodeUnpublishVolumeRequest {
        volume_id: record.volume_handle.clone(),
        target_path: target.display().to_string(),
    };
    driver.unpublish(request).await?;
    if mounts::is_mount(&target) {
        return Err(format!("the driver has left {} mounted", target.display()));
    }
    record::remove(dir, "mount").map_err(failed)?;
    if record.volume_lifecycle_mode != "Ephemeral" {
        unstage(ctx, &record.driver_name, &record.volume_handle).await?;
    }
    Ok(())
}

/// Every volume published for a pod of this node.
fn published(ctx: &Context) -> impl Iterator<Item = Record> + use<> {
    let pods = directories(&pods_root(ctx));
    let volumes = pods.into_iter().flat_map(|p| directories(&p.join("volumes/kubernetes.io~csi")));
    volumes.filter_map(|dir| Record::read(&dir))
}

/// Unstages a volume that no pod of this node uses any more. The caller has the volume's turn.
async fn unstage(ctx: &Context, driver: &str, handle: &str) -> Result<(), String> {
    if published(ctx).any(|r| r.driver_name == driver && r.volume_handle == handle) {
        return Ok(());
    }
    let path = staging(ctx, driver, handle);
    let dir = path.parent().unwrap_or(&path);
    if dir.exists() {
        let request =
            NodeUnstageVolumeRequest { volume_id: handle.into(), staging_target_path: path.display().to_string() };
        ctx.csi.driver(driver)?.unstage(request).await?;
        if mounts::is_mount(&path) {
            return Err(format!("the driver has left {} mounted", path.display()));
        }
        record::remove(dir, "globalmount").map_err(|e| format!("{}: {e}", dir.display()))?;
    }
    ctx.csi.use_volume(unique_name(driver, handle), false);
    Ok(())
}

/// Unstages what a crash between a volume's last pod and its unstaging has left.
pub(super) async fn unstage_orphans(ctx: &Context, driver: &str) {
    for dir in directories(&staging_root(ctx).join(driver)) {
        let Some(record) = Record::read(&dir) else { continue };
        let _turn = ctx.csi.turn(driver, &record.volume_handle).await;
        if let Err(error) = unstage(ctx, driver, &record.volume_handle).await {
            tracing::warn!(driver, volume = record.volume_handle, error, "volume stays staged");
        }
    }
}

/// After a start: volumes of pods that are `known` are in use; those of others go as soon as their drivers are there.
pub(crate) fn adopt(ctx: &Arc<Context>, known: &[String]) {
    for record in published(ctx).filter(|r| !r.attachment.is_empty()) {
        ctx.csi.use_volume(unique_name(&record.driver_name, &record.volume_handle), true);
    }
    for dir in directories(&pods_root(ctx)) {
        let uid = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !known.contains(&uid) {
            tokio::spawn(release_orphan(ctx.clone(), uid));
        }
    }
}

async fn release_orphan(ctx: Arc<Context>, uid: String) {
    let mut drivers = ctx.csi.changes();
    let mut pause = Duration::from_secs(1);
    loop {
        match release(&ctx, &uid).await {
            Ok(()) => {
                tracing::info!(uid, "removed the volumes of a pod nobody knows");
                return;
            }
            Err(error) => tracing::warn!(uid, error, "volumes of a pod nobody knows"),
        }
        // Cancel-safe: a change that is not seen stays marked.
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = drivers.changed() => if changed.is_err() { return },
        }
        pause = (pause * 2).min(Duration::from_secs(120));
    }
}
