//! Which images nobody needs: their ages, and their end when the disk is full or they have been idle for too long.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::PodSpec;

use super::info;
use crate::{context::Context, events::Kind, images::ImageInfo};

/// Pause after a collection that did not free enough.
const PAUSE: Duration = Duration::from_secs(300);

/// When an image was first seen and last used.
#[derive(Debug, Clone, Copy)]
struct Age {
    seen: Instant,
    used: Option<Instant>,
}

/// Ages of images, as far as this life of the agent has seen them.
#[derive(Debug, Default)]
pub(super) struct Collector {
    ages: HashMap<String, Age>,
    failed: Option<Instant>,
}

/// Ids of images that containers of this node refer to.
fn needed(ctx: &Context, images: &[ImageInfo]) -> Vec<String> {
    let pods = ctx.table.all();
    let statuses = pods.iter().filter_map(|s| s.pod.status.as_ref()).flat_map(|s| {
        let lists = [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses];
        lists.into_iter().flatten().flatten().map(|c| c.image_id.as_str()).collect::<Vec<_>>()
    });
    let made = ctx.cri.images();
    let wanted: std::collections::HashSet<&str> = statuses.chain(made.iter().map(String::as_str)).collect();
    let own = ctx.config.own_image.as_deref();
    // What pods ask for counts before a container of it runs, and for volumes made of images.
    let asked: Vec<String> = pods.iter().filter_map(|s| s.pod.spec.as_ref()).flat_map(asked).collect();
    let means =
        |n: &String, asked: &String| n == asked || n.strip_suffix(asked).is_some_and(|rest| rest.ends_with('/'));
    let in_use = |i: &&ImageInfo| {
        let named =
            |n: &String| wanted.contains(n.as_str()) || Some(n.as_str()) == own || asked.iter().any(|a| means(n, a));
        wanted.contains(i.id.as_str()) || i.names.iter().any(named)
    };
    images.iter().filter(in_use).map(|i| i.id.clone()).collect()
}

/// References of a pod's spec, with a tag.
fn asked(spec: &PodSpec) -> Vec<String> {
    let containers = crate::qos::all_containers(spec).filter_map(|c| c.image.clone());
    let ephemeral = spec.ephemeral_containers.iter().flatten().filter_map(|c| c.image.clone());
    let volumes = spec.volumes.iter().flatten().filter_map(|v| v.image.as_ref()?.reference.clone());
    let tagged = |r: String| {
        let last = r.rsplit('/').next().unwrap_or_default();
        if last.contains([':', '@']) { r } else { format!("{r}:latest") }
    };
    containers.chain(ephemeral).chain(volumes).map(tagged).collect()
}

impl Collector {
    /// Takes note of what is there and what is in use.
    pub(super) fn look(&mut self, ctx: &Context) {
        let (images, now) = (ctx.images.list(), Instant::now());
        let needed = needed(ctx, &images);
        self.ages.retain(|id, _| images.iter().any(|i| i.id == *id));
        for i in &images {
            let age = self.ages.entry(i.id.clone()).or_insert(Age { seen: now, used: None });
            if needed.contains(&i.id) {
                age.used = Some(now);
            }
        }
        ctx.images.in_use(needed);
    }

    /// Unused images, the longest unused first. Those younger than the least age are left out.
    fn unused(&self, ctx: &Context, least: Duration) -> Vec<ImageInfo> {
        let images = ctx.images.list();
        let needed = needed(ctx, &images);
        let now = Instant::now();
        let mut list: Vec<(Age, ImageInfo)> = images
            .into_iter()
            .filter(|i| !needed.contains(&i.id))
            .filter_map(|i| Some((*self.ages.get(&i.id)?, i)))
            .filter(|(age, _)| now - age.seen >= least)
            .collect();
        list.sort_by_key(|(age, _)| (age.used, age.seen));
        list.into_iter().map(|(_, i)| i).collect()
    }

    /// Removes unused images until `bytes` are free; what was freed.
    fn free(&self, ctx: &Context, bytes: u64, least: Duration) -> u64 {
        let mut freed = 0;
        for i in self.unused(ctx, least) {
            if freed >= bytes {
                break;
            }
            match ctx.images.remove(&i.id) {
                Ok(n) => {
                    tracing::info!(image = i.names.first().unwrap_or(&i.id), bytes = n, "unused image removed");
                    ctx.metrics.count("kubelet_image_garbage_collected_total", [("reason", "space")]);
                    freed += n;
                }
                Err(error) => tracing::warn!(image = i.id, %error, "unused image stays"),
            }
        }
        freed
    }

    /// Frees what the configured thresholds ask for, and images idle beyond the greatest age.
    pub(super) fn by_thresholds(&mut self, ctx: &Context) {
        let k = &ctx.config.kubelet;
        if !k.image_maximum_gc_age.is_zero() {
            let idle = |id: &str| {
                self.ages.get(id).is_some_and(|a| a.used.unwrap_or(a.seen).elapsed() >= k.image_maximum_gc_age)
            };
            for i in self.unused(ctx, k.image_minimum_gc_age).into_iter().filter(|i| idle(&i.id)) {
                match ctx.images.remove(&i.id) {
                    Ok(bytes) => tracing::info!(
                        image = i.names.first().unwrap_or(&i.id),
                        bytes,
                        "image unused for too long removed"
                    ),
                    Err(error) => tracing::warn!(image = i.id, %error, "image stays"),
                }
            }
        }
        let Some((size, free, ..)) = info::disk(&ctx.config.paths.state()).filter(|d| d.0 > 0) else { return };
        let percent = 100 - free * 100 / size;
        if percent < u64::from(k.image_gc_high_threshold_percent) || self.failed.is_some_and(|at| at.elapsed() < PAUSE)
        {
            return;
        }
        let target = size / 100 * (100 - u64::from(k.image_gc_low_threshold_percent));
        let wanted = target.saturating_sub(free);
        let freed = self.free(ctx, wanted, k.image_minimum_gc_age);
        if freed < wanted && !self.unused(ctx, Duration::ZERO).is_empty() {
            // Some are too young yet.
            return;
        }
        self.failed = (freed < wanted).then(Instant::now);
        if freed < wanted {
            let text = format!(
                "Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found {freed} bytes eligible to free."
            );
            tracing::warn!(percent, "{text}");
            ctx.events.node(&ctx.node_name, Kind::Warning, "FreeDiskSpaceFailed", text);
        }
    }

    /// Removes every unused image that is not too young, for a disk that is short; what was freed.
    pub(super) fn all_unused(&self, ctx: &Context) -> u64 {
        self.free(ctx, u64::MAX, ctx.config.kubelet.image_minimum_gc_age)
    }
}
