//! Node IPAM: every node gets its part of the cluster's pod network, and keeps it.

use crate::context::Context;
use ipnet::IpNet;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

const NAME: &str = "node-ipam-controller";

/// Which node has which part.
#[derive(Debug, Default)]
struct Allocations {
    by_node: HashMap<String, IpNet>,
    /// Where the next search starts, so that a part is not reused at once.
    next: usize,
}

impl Allocations {
    /// The node's part: the one it has, or the next free one.
    fn allocate(&mut self, node: &str, cluster: IpNet, mask: u8) -> Option<IpNet> {
        if let Some(known) = self.by_node.get(node) {
            return Some(*known);
        }
        let bits = u32::from(mask.saturating_sub(cluster.prefix_len()));
        let count = 1usize.checked_shl(bits.min(24)).unwrap_or(1);
        for step in 0..count {
            let index = (self.next + step) % count;
            let part = nth(cluster, mask, index)?;
            if !self.by_node.values().any(|used| *used == part) {
                self.next = index + 1;
                self.by_node.insert(node.to_owned(), part);
                return Some(part);
            }
        }
        None
    }
}

/// The part with this number.
fn nth(cluster: IpNet, mask: u8, index: usize) -> Option<IpNet> {
    match cluster {
        IpNet::V4(net) => {
            let offset = u32::try_from(index).ok()?.checked_shl(32u32.checked_sub(u32::from(mask))?)?;
            let address = u32::from(net.network()).checked_add(offset)?;
            IpNet::new(std::net::Ipv4Addr::from(address).into(), mask).ok()
        }
        IpNet::V6(net) => {
            let offset = u128::try_from(index).ok()?.checked_shl(128u32.checked_sub(u32::from(mask))?)?;
            let address = u128::from(net.network()).checked_add(offset)?;
            IpNet::new(std::net::Ipv6Addr::from(address).into(), mask).ok()
        }
    }
}

fn cidr(node: &Node) -> Option<IpNet> {
    node.spec.as_ref()?.pod_cidr.as_ref()?.parse().ok()
}

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let allocations = Arc::new(Mutex::new(Allocations::default()));
    let queue: Arc<Queue<String>> = Queue::new();
    // First what is taken, then who needs something.
    for node in ctx.caches.nodes.list() {
        if let Some(part) = cidr(&node) {
            allocations.lock().by_node.insert(node.name().to_owned(), part);
        }
    }
    let (q, a) = (queue.clone(), allocations.clone());
    ctx.caches.nodes.subscribe(move |change| {
        let node = change.object();
        if change.is_deleted() {
            a.lock().by_node.remove(node.name());
        } else if let Some(part) = cidr(node) {
            a.lock().by_node.insert(node.name().to_owned(), part);
        } else {
            q.add(node.name().to_owned());
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |name| {
        let (ctx, allocations) = (context.clone(), allocations.clone());
        async move { sync(&ctx, &allocations, &name).await.map(|()| None) }
    });
}

async fn sync(ctx: &Context, allocations: &Mutex<Allocations>, name: &str) -> Result<(), kube::Error> {
    let Some(node) = ctx.caches.nodes.get("", name).filter(|node| cidr(node).is_none()) else { return Ok(()) };
    let part = allocations.lock().allocate(name, ctx.config.cluster_cidr, ctx.config.node_mask);
    let Some(part) = part else {
        let recorder = ctx.recorder.component("node-controller");
        recorder.normal(&*node, "CIDRNotAvailable", format!("Node {name} status is now: CIDRNotAvailable"));
        return Ok(());
    };
    let part = part.to_string();
    let patch = json!({"spec": {"podCIDR": part, "podCIDRs": [part]}});
    match ctx.objects.merge::<Node>("", name, "", &patch).await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_distinct_stable_and_run_out() {
        let cluster: IpNet = "10.244.0.0/22".parse().unwrap();
        let mut all = Allocations::default();
        let mut get = |node: &str| all.allocate(node, cluster, 24).map(|p| p.to_string());
        assert_eq!(get("a").as_deref(), Some("10.244.0.0/24"));
        assert_eq!(get("b").as_deref(), Some("10.244.1.0/24"));
        assert_eq!(get("a").as_deref(), Some("10.244.0.0/24"));
        assert_eq!(get("c").as_deref(), Some("10.244.2.0/24"));
        assert_eq!(get("d").as_deref(), Some("10.244.3.0/24"));
        assert_eq!(get("e"), None);
        all.by_node.remove("b");
        assert_eq!(all.allocate("e", cluster, 24).map(|p| p.to_string()).as_deref(), Some("10.244.1.0/24"));
        let six: IpNet = "fd00::/56".parse().unwrap();
        assert_eq!(nth(six, 64, 3).map(|p| p.to_string()).as_deref(), Some("fd00:0:0:3::/64"));
    }
}
