//! What /metrics/cadvisor tells, over CRI: for a kubelet that has its numbers from the runtime.

use std::fs;

use super::view::{Container, Group, Sandbox};
use crate::{
    context::Context,
    grpc::proto::cri::{
        ContainerMetrics, Metric, MetricDescriptor, MetricType, NamespaceMode, PodSandboxMetrics, UInt64Value,
    },
    stats::{
        self,
        cadvisor::{self, FAMILIES, LINKS},
    },
};

/// Labels of what is told of a group, in their order.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];
/// Labels of what is told of a link.
const LINK_LABELS: [&str; 7] = ["container", "id", "image", "interface", "name", "namespace", "pod"];
/// CPU time as a whole has a further label, as it has with cadvisor.
const CPU: (&str, &str) = ("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.");
const CPU_LABELS: [&str; 7] = ["container", "cpu", "id", "image", "name", "namespace", "pod"];

/// Everything that is told, and its labels.
pub(super) fn descriptors() -> Vec<MetricDescriptor> {
    let one = |name: &str, help: &str, labels: &[&str]| MetricDescriptor {
        name: name.into(),
        help: help.into(),
        label_keys: labels.iter().map(ToString::to_string).collect(),
    };
    let groups = FAMILIES.iter().map(|(name, _, help, _)| one(name, help, &LABELS));
    let links = LINKS.iter().map(|(_, name, help)| one(name, help, &LINK_LABELS));
    [one(CPU.0, CPU.1, &CPU_LABELS)].into_iter().chain(groups).chain(links).collect()
}

/// Counters and gauges are whole numbers here: what is told in seconds is rounded down, as others do.
fn metric(name: &str, kind: &str, labels: Vec<String>, value: f64) -> Metric {
    let metric_type = if kind == "counter" { MetricType::Counter } else { MetricType::Gauge };
    let value = Some(UInt64Value { value: value.max(0.0) as u64 });
    Metric { name: name.into(), timestamp: 0, metric_type: metric_type.into(), label_values: labels, value }
}

/// A sandbox's and its containers'.
pub(super) fn sandbox(ctx: &Context, g: &Group) -> PodSandboxMetrics {
    let s = &g.sandbox;
    let mut metrics = group(ctx, &s.cgroup, [String::new(), String::new(), String::new()], s);
    metrics.extend(links(ctx, s));
    let running = g.containers.iter().filter(|c| c.running().is_ok());
    let of = |c: &Container| ContainerMetrics {
        container_id: c.id.clone(),
        metrics: group(ctx, &c.cgroup, [c.metadata.name.clone(), c.image.clone(), c.id.clone()], s),
    };
    PodSandboxMetrics { pod_sandbox_id: s.id.clone(), metrics, container_metrics: running.map(of).collect() }
}

fn group(ctx: &Context, cgroup: &str, [container, image, name]: [String; 3], s: &Sandbox) -> Vec<Metric> {
    let (namespace, pod) = (s.metadata.namespace.clone(), s.metadata.name.clone());
    let labels = vec![container, format!("/{}", cgroup.trim_start_matches('/')), image, name, namespace, pod];
    let group = cadvisor::Group::read(ctx, cgroup);
    let cpu = group.usage.cpu_nanos.map(|nanos| {
        let mut labels = labels.clone();
        labels.insert(1, "total".into());
        metric(CPU.0, "counter", labels, nanos as f64 / 1e9)
    });
    let told = |(name, kind, _, get): &(&str, &str, &str, cadvisor::Get)| {
        Some(metric(name, kind, labels.clone(), get(&group)?))
    };
    cpu.into_iter().chain(FAMILIES.iter().filter_map(told)).collect()
}

fn links(ctx: &Context, s: &Sandbox) -> Vec<Metric> {
    let host = s.namespaces.network == i32::from(NamespaceMode::Node);
    let dev = stats::pod_net_dev(ctx, &s.uid).filter(|_| !host);
    let Some(text) = dev.and_then(|dev| fs::read_to_string(dev).ok()) else { return Vec::new() };
    let (namespace, pod) = (&s.metadata.namespace, &s.metadata.name);
    let id = format!("/{}", s.cgroup.trim_start_matches('/'));
    let one = |(interface, numbers): (String, [u64; 16])| {
        let labels = ["", &id, "", &interface, "", namespace, pod].map(str::to_owned).to_vec();
        LINKS.map(|(column, name, _)| metric(name, "counter", labels.clone(), numbers[column] as f64))
    };
    stats::interfaces(&text).into_iter().flat_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_has_its_place() {
        let all = descriptors();
        assert!(all.iter().all(|d| d.label_keys.is_sorted()));
        let of = |name: &str| all.iter().find(|d| d.name == name).unwrap().label_keys.len();
        assert_eq!((of(CPU.0), of("container_memory_rss"), of("container_network_receive_bytes_total")), (7, 6, 7));
    }
}
