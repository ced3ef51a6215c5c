//! Whether this node takes a pod that was bound to it: the checks the scheduler cannot be trusted with.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};

use super::{manager, table::Snapshot};
use crate::{context::Context, qos, spec::security};

/// Why a pod is rejected: `status.reason` and `status.message`.
pub(super) type Refusal = (String, String);

/// Pods of this priority and above are critical to the node.
const CRITICAL: i32 = 2_000_000_000;

/// Why this node cannot take an API pod beside `others`, if so.
pub(super) fn admit(ctx: &Context, others: &[Arc<Snapshot>], pod: &Pod) -> Option<Refusal> {
    let spec = pod.spec.as_ref()?;
    if *ctx.shutdown.borrow() {
        let text = "Pod was rejected: Pod was rejected as the node is shutting down.";
        return Some(("NodeShutdown".into(), text.into()));
    }
    if let Some(name) = security::forbidden_sysctl(pod, &ctx.config.kubelet.allowed_unsafe_sysctls) {
        return Some(("SysctlForbidden".into(), format!("forbidden sysctl: {name:?} not allowlisted")));
    }
    if let Some(os) = spec.os.as_ref().filter(|os| os.name != "linux") {
        let text = format!("Failed to admit pod as the OS field doesn't match node OS: {:?}", os.name);
        return Some(("PodOSNotSupported".into(), text));
    }
    if let Some(refusal) = crate::node::eviction::refuses(ctx, pod) {
        return Some(refusal);
    }
    let node = ctx.node.read().clone();
    room(ctx, others, spec).or_else(|| ports(others, spec)).or_else(|| matches(node.as_deref()?, pod))
}

/// Room for what it requests; critical pods make room for themselves.
fn room(ctx: &Context, others: &[Arc<Snapshot>], spec: &PodSpec) -> Option<Refusal> {
    if spec.priority.unwrap_or(0) >= CRITICAL {
        return None;
    }
    let machine = &ctx.machine;
    let short = |resource: &str, requested: i64, used: i64, capacity: i64| {
        let message = format!(
            "Pod was rejected: Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        );
        Some((format!("OutOf{resource}"), message))
    };
    let pods = others.iter().filter(|s| manager::is_active(&s.pod)).count() as i64;
    let most = i64::from(crate::node::info::max_pods(&ctx.config.kubelet, machine.cpus));
    if pods + 1 > most {
        return short("pods", 1, pods, most);
    }
    let (cpu, _) = qos::pod_amount(spec, "cpu");
    let used = manager::requested(others, "cpu");
    if cpu > 0 && used + cpu > machine.allocatable.cpu_milli {
        return short("cpu", cpu, used, machine.allocatable.cpu_milli);
    }
    for (resource, capacity) in
        [("memory", machine.allocatable.memory), ("ephemeral-storage", machine.allocatable.storage)]
    {
        let wanted = qos::pod_amount(spec, resource).0 / 1000;
        let used = manager::requested(others, resource) / 1000;
        if wanted > 0 && used + wanted > capacity {
            return short(resource, wanted, used, capacity);
        }
    }
    None
}

/// (address, port, protocol) of a pod's host ports; an empty address is every one.
fn host_ports(spec: &PodSpec) -> Vec<(String, i32, String)> {
    let ports = qos::all_containers(spec).flat_map(|c| c.ports.iter().flatten());
    ports
        .filter_map(|p| {
            let port = p.host_port.filter(|p| *p > 0)?;
            let any = |ip: &String| !matches!(ip.as_str(), "" | "0.0.0.0" | "::");
            let ip = p.host_ip.clone().filter(any).unwrap_or_default();
            Some((ip, port, p.protocol.clone().unwrap_or_else(|| "TCP".into())))
        })
        .collect()
}

fn ports(others: &[Arc<Snapshot>], spec: &PodSpec) -> Option<Refusal> {
    let wanted = host_ports(spec);
    if wanted.is_empty() {
        return None;
    }
    let taken: Vec<_> = others
        .iter()
        .filter(|s| manager::is_active(&s.pod))
        .filter_map(|s| s.pod.spec.as_ref())
        .flat_map(host_ports)
        .collect();
    clash(&wanted, &taken).then(|| {
        let text =
            "Pod was rejected: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        ("NodePorts".into(), text.into())
    })
}

fn clash(wanted: &[(String, i32, String)], taken: &[(String, i32, String)]) -> bool {
    wanted.iter().any(|(ip, port, protocol)| {
        taken.iter().any(|(ip2, port2, protocol2)| {
            port == port2 && protocol == protocol2 && (ip == ip2 || ip.is_empty() || ip2.is_empty())
        })
    })
}

/// Whether the node is one the pod asked for.
fn matches(node: &Node, pod: &Pod) -> Option<Refusal> {
    let spec = pod.spec.as_ref()?;
    let labels = node.metadata.labels.clone().unwrap_or_default();
    let fits = spec.node_selector.iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    (!fits).then(|| {
        let text = "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        ("NodeAffinity".into(), text.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(ip: &str, port: i32, protocol: &str) -> (String, i32, String) {
        (ip.into(), port, protocol.into())
    }

    #[test]
    fn host_ports_clash_by_address_port_and_protocol() {
        for (a, b, want) in [
            (port("", 80, "TCP"), port("10.0.0.1", 80, "TCP"), true),
            (port("10.0.0.2", 80, "TCP"), port("10.0.0.1", 80, "TCP"), false),
            (port("", 80, "UDP"), port("", 80, "TCP"), false),
            (port("", 81, "TCP"), port("", 80, "TCP"), false),
        ] {
            assert_eq!(clash(std::slice::from_ref(&a), std::slice::from_ref(&b)), want, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_selector_has_to_match() {
        let of = |v: serde_json::Value| serde_json::from_value(v).unwrap();
        let node: Node = of(serde_json::json!({"metadata":{"labels":{"a":"b"}}}));
        let pod = |selector: serde_json::Value| -> Pod {
            serde_json::from_value(serde_json::json!({"spec":{"containers":[],"nodeSelector":selector}})).unwrap()
        };
        assert_eq!(matches(&node, &pod(serde_json::json!({"a":"b"}))), None);
        assert_eq!(matches(&node, &pod(serde_json::json!({"a":"c"}))).unwrap().0, "NodeAffinity");
    }
}
