//! Volumes made of an image: its layers, stacked read-only.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{ImageVolumeSource, Pod};
use nix::mount::MsFlags;

use crate::{context::Context, events::Kind, pods::start};

/// Pulls the image if that is wanted and mounts it at `target`.
pub(super) async fn mount(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    source: &ImageVolumeSource,
    target: PathBuf,
) -> Result<PathBuf, String> {
    if super::mounts::is_mount(&target) {
        return Ok(target);
    }
    ctx.metrics.count("kubelet_image_volume_requested_total", []);
    let made = pulled_and_mounted(ctx, pod, source, target).await;
    let family = match made {
        Ok(_) => "kubelet_image_volume_mounted_succeed_total",
        Err(_) => "kubelet_image_volume_mounted_errors_total",
    };
    ctx.metrics.count(family, []);
    made
}

async fn pulled_and_mounted(
    ctx: &Arc<Context>,
    pod: &Arc<Pod>,
    source: &ImageVolumeSource,
    target: PathBuf,
) -> Result<PathBuf, String> {
    let image = source.reference.clone().filter(|r| !r.is_empty()).ok_or("the image volume has no reference")?;
    let secrets = start::pull_secrets(ctx, pod, &image).await;
    let (events, about, name) = (ctx.events.clone(), pod.clone(), image.clone());
    let begun = Arc::new(move || {
        events.pod(&about, Kind::Normal, "Pulling", format!("Pulling image {name:?}"));
    });
    let policy = start::pull_policy(&image, source.pull_policy.as_deref());
    let handle = ctx.images.ensure(&image, policy, secrets, begun).await.map_err(|e| format!("{}: {e}", e.reason()))?;
    fs::create_dir_all(&target).map_err(|e| format!("{}: {e}", target.display()))?;
    stack(&handle.layers, &target).map_err(|e| format!("mount image {image:?}: {e}"))?;
    Ok(target)
}

/// Mounts layers, uppermost first, as one read-only tree from which nothing can be executed.
fn stack(layers: &[PathBuf], target: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let none = None::<&str>;
    if let [one] = layers {
        // An overlay needs two layers.
        nix::mount::mount(Some(one), target, none, MsFlags::MS_BIND, none)?;
        return nix::mount::mount(none, target, none, flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none);
    }
    let lower: Vec<String> = layers.iter().map(|l| l.display().to_string()).collect();
    let data = format!("lowerdir={}", lower.join(":"));
    nix::mount::mount(Some("overlay"), target, Some("overlay"), flags, Some(data.as_str()))
}
