//! NodeResourcesFit and NodeResourcesBalancedAllocation: room, and how evenly it is used.

use super::{Plugin, Reject};
use crate::cluster::NodeInfo;
use crate::model::PodInfo;
use std::borrow::Cow;

/// Whether what the pod asks for is free.
pub(crate) fn filter(pod: &PodInfo, node: &NodeInfo) -> Result<(), Reject> {
    let (want, have, used) = (&pod.requests, &node.allocatable, &node.requested);
    let mut reasons: Vec<Cow<'static, str>> = Vec::new();
    if i64::try_from(node.pods.len()).unwrap_or(i64::MAX) + 1 > have.pods {
        reasons.push("Too many pods".into());
    }
    if want.cpu > 0 && want.cpu > have.cpu - used.cpu {
        reasons.push("Insufficient cpu".into());
    }
    if want.memory > 0 && want.memory > have.memory - used.memory {
        reasons.push("Insufficient memory".into());
    }
    if want.ephemeral > 0 && want.ephemeral > have.ephemeral - used.ephemeral {
        reasons.push("Insufficient ephemeral-storage".into());
    }
    for (name, amount) in want.other.iter().filter(|(_, amount)| **amount > 0) {
        let free = have.other.get(name).unwrap_or(&0) - used.other.get(name).unwrap_or(&0);
        if *amount > free {
            reasons.push(format!("Insufficient {name}").into());
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    Err(Reject { plugin: Plugin::NodeResourcesFit, reasons, hopeless: false })
}

/// LeastAllocated over CPU and memory.
pub(crate) fn least_allocated(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let one = |have: i64, used: i64| (have > 0).then(|| if used > have { 0 } else { (have - used) * 100 / have });
    let cpu = one(node.allocatable.cpu, node.nonzero.0 + pod.nonzero.0);
    let memory = one(node.allocatable.memory, node.nonzero.1 + pod.nonzero.1);
    match (cpu, memory) {
        (Some(a), Some(b)) => (a + b) / 2,
        (Some(a), None) | (None, Some(a)) => a,
        (None, None) => 0,
    }
}

/// How much more evenly CPU and memory are used with the pod than without.
pub(crate) fn balance(pod: &PodInfo, node: &NodeInfo) -> i64 {
    if pod.requests.cpu == 0 && pod.requests.memory == 0 {
        return 0;
    }
    let with = base(node, node.requested.cpu + pod.requests.cpu, node.requested.memory + pod.requests.memory);
    let without = base(node, node.requested.cpu, node.requested.memory);
    50 + (50 + with - without) / 2
}

/// 100 when both are used to the same degree, 50 when one is full and the other empty.
fn base(node: &NodeInfo, cpu: i64, memory: i64) -> i64 {
    let fraction = |used: i64, have: i64| if have > 0 { (used as f64 / have as f64).min(1.0) } else { 0.0 };
    let deviation = (fraction(cpu, node.allocatable.cpu) - fraction(memory, node.allocatable.memory)).abs() / 2.0;
    ((1.0 - deviation) * 100.0) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Cluster;
    use crate::testing::{node, pod};
    use serde_json::json;

    #[test]
    fn least_allocated_and_balance() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("n", json!({"cpu": "4", "memory": "4Gi", "pods": "10"})));
        let want = |cpu: &str, memory: &str| {
            pod("p", json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}]}))
        };
        let node = &cluster.nodes[0];
        assert_eq!(least_allocated(&want("1", "2Gi"), node), (75 + 50) / 2);
        assert_eq!(least_allocated(&want("8", "2Gi"), node), 25);
        assert_eq!(balance(&want("2", "2Gi"), node), 75);
        assert_eq!(balance(&want("4", "1"), node), 50);
        assert_eq!(balance(&pod("p", json!({"containers": []})), node), 0);
    }

    #[test]
    fn every_shortage_is_named() {
        let mut cluster = Cluster::default();
        cluster.set_node(&node("n", json!({"cpu": "1", "memory": "1Gi", "pods": "0"})));
        let pod = pod(
            "p",
            json!({"containers": [{"name": "c", "resources":
            {"requests": {"cpu": "2", "memory": "2Gi", "example.com/gpu": "1"}}}]}),
        );
        let reject = filter(&pod, &cluster.nodes[0]).unwrap_err();
        assert_eq!(
            reject.reasons,
            ["Too many pods", "Insufficient cpu", "Insufficient memory", "Insufficient example.com/gpu"]
        );
    }
}
