//! ImageLocality: nodes that have the images already are better, weighted by how common the images are.

use crate::cluster::{Cluster, NodeInfo};
use crate::model::PodInfo;

const MIN: i64 = 23 * 1024 * 1024;
const MAX_PER_CONTAINER: i64 = 1000 * 1024 * 1024;

/// 0 to 100 for the bytes that need not be fetched.
pub(crate) fn score(cluster: &Cluster, pod: &PodInfo, node: &NodeInfo) -> i64 {
    let total = cluster.len().max(1) as f64;
    let present: i64 = pod
        .images
        .iter()
        .filter_map(|image| {
            let size = *node.images.get(image)?;
            let spread = *cluster.image_nodes.get(image)? as f64 / total;
            Some((size as f64 * spread) as i64)
        })
        .sum();
    let max = MAX_PER_CONTAINER * i64::try_from(pod.images.len()).unwrap_or(1).max(1);
    100 * (present.clamp(MIN, max) - MIN) / (max - MIN)
}
