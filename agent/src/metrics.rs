//! Counters and durations of this agent under the kubelet's names, for /metrics and /metrics/probes.
//!
//! What happens is counted where it happens ([`Metrics::count`], [`Metrics::observe`]); what is, is looked up when somebody
//! asks ([`render`]).

mod families;
pub(crate) mod process;

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use isopod_client::connect::Asked;
use parking_lot::Mutex;
use serde_json::Value;

use self::families::FAMILIES;
use crate::{
    certificates,
    context::Context,
    node::info,
    pods::{sandbox, start},
    server::exposition::Exposition,
    stats::disk,
};

/// Upper bounds of durations in seconds.
const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Labels of a sample.
type Labels = Vec<(&'static str, String)>;

#[derive(Debug, Clone)]
enum Cell {
    Count(u64),
    Level(f64),
    Spread { counts: [u64; BOUNDS.len()], all: u64, sum: f64 },
}

/// What has been counted.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    cells: Mutex<Cells>,
}

type Cells = BTreeMap<&'static str, BTreeMap<Labels, Cell>>;

/// The samples of a family; of one that is not in the table nobody would ever hear.
fn samples<'a>(cells: &'a mut Cells, family: &'static str) -> &'a mut BTreeMap<Labels, Cell> {
    debug_assert!(FAMILIES.iter().any(|(name, _)| *name == family), "{family} is no family");
    cells.entry(family).or_default()
}

fn owned<const N: usize>(labels: [(&'static str, &str); N]) -> Labels {
    labels.map(|(k, v)| (k, v.to_string())).to_vec()
}

impl Metrics {
    /// One more.
    pub(crate) fn count<const N: usize>(&self, family: &'static str, labels: [(&'static str, &str); N]) {
        let mut cells = self.cells.lock();
        let cell = samples(&mut cells, family).entry(owned(labels)).or_insert(Cell::Count(0));
        if let Cell::Count(n) = cell {
            *n += 1;
        }
    }

    /// Something happened just now.
    pub(crate) fn set_now(&self, family: &'static str) {
        self.set(family, std::time::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64()));
    }

    /// Something is so much.
    pub(crate) fn set(&self, family: &'static str, value: f64) {
        samples(&mut self.cells.lock(), family).insert(Labels::new(), Cell::Level(value));
    }

    /// Something that happens once took so long; later ones are not the first.
    pub(crate) fn first(&self, family: &'static str, took: Duration) {
        let mut cells = self.cells.lock();
        samples(&mut cells, family).entry(Labels::new()).or_insert(Cell::Level(took.as_secs_f64()));
    }

    /// Something is more (or less) than it was.
    pub(crate) fn add<const N: usize>(&self, family: &'static str, labels: [(&'static str, &str); N], by: f64) {
        let mut cells = self.cells.lock();
        let cell = samples(&mut cells, family).entry(owned(labels)).or_insert(Cell::Level(0.0));
        if let Cell::Level(n) = cell {
            *n += by;
        }
    }

    /// Something was done to a sandbox, a container or an image.
    pub(crate) fn operation(&self, what: &str, begun: Instant, good: bool) {
        let labels = [("operation_type", what)];
        self.count("kubelet_runtime_operations_total", labels);
        if !good {
            self.count("kubelet_runtime_operations_errors_total", labels);
        }
        self.observe("kubelet_runtime_operations_duration_seconds", labels, begun.elapsed());
    }

    /// Something took so long.
    pub(crate) fn observe<const N: usize>(
        &self,
        family: &'static str,
        labels: [(&'static str, &str); N],
        took: Duration,
    ) {
        let mut cells = self.cells.lock();
        let empty = Cell::Spread { counts: [0; BOUNDS.len()], all: 0, sum: 0.0 };
        let cell = samples(&mut cells, family).entry(owned(labels)).or_insert(empty);
        if let Cell::Spread { counts, all, sum } = cell {
            let seconds = took.as_secs_f64();
            for (count, _) in counts.iter_mut().zip(BOUNDS).filter(|(_, bound)| seconds <= *bound) {
                *count += 1;
            }
            *all += 1;
            *sum += seconds;
        }
    }

    /// The API server was asked something.
    pub(crate) fn asked(&self, a: &Asked<'_>) {
        let code = a.code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        let (host, method) = (("host", a.host), a.method.as_str());
        self.count("rest_client_requests_total", [("code", &code), host, ("method", method)]);
        self.observe("rest_client_request_duration_seconds", [host, ("verb", method)], a.took);
    }

    /// Drops the samples of a pod that is gone.
    pub(crate) fn forget_pod(&self, namespace: &str, pod: &str) {
        let of = |labels: &Labels, key: &str, value: &str| labels.iter().any(|(k, v)| *k == key && v == value);
        let mut cells = self.cells.lock();
        for (_, samples) in cells.iter_mut().filter(|(family, _)| family.starts_with("prober_")) {
            samples.retain(|l, _| !(of(l, "pod", pod) && of(l, "namespace", namespace)));
        }
    }

    fn write(&self, e: &mut Exposition, shown: impl Fn(&str) -> bool) {
        let cells = self.cells.lock();
        for (name, help) in FAMILIES.iter().filter(|(name, _)| shown(name)) {
            let Some(samples) = cells.get(name) else { continue };
            let kind = match samples.values().next() {
                Some(Cell::Spread { .. }) => "histogram",
                Some(Cell::Level(_)) => "gauge",
                _ => "counter",
            };
            e.begin(name, kind, help);
            for (labels, cell) in samples {
                let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (*k, v.as_str())).collect();
                sample(e, name, &labels, cell);
            }
        }
    }
}

fn sample(e: &mut Exposition, name: &str, labels: &[(&str, &str)], cell: &Cell) {
    match cell {
        Cell::Count(n) => e.sample(name, labels, Some(*n as f64)),
        Cell::Level(value) => e.sample(name, labels, Some(*value)),
        Cell::Spread { counts, all, sum } => {
            let bucket = format!("{name}_bucket");
            for (count, bound) in counts.iter().zip(BOUNDS) {
                let bound = bound.to_string();
                let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
                e.sample(&bucket, &labels, Some(*count as f64));
            }
            let labels_inf: Vec<_> = labels.iter().copied().chain([("le", "+Inf")]).collect();
            e.sample(&bucket, &labels_inf, Some(*all as f64));
            e.sample(&format!("{name}_sum"), labels, Some(*sum));
            e.sample(&format!("{name}_count"), labels, Some(*all as f64));
        }
    }
}

/// /metrics/probes.
pub(crate) fn probes(ctx: &Context) -> String {
    let mut e = Exposition::default();
    ctx.metrics.write(&mut e, |name| name.starts_with("prober_"));
    process::write(&mut e, true);
    e.finish()
}

fn cpus(ctx: &Context, e: &mut Exposition) {
    let (shared, own) = ctx.topology.counts();
    let name = "kubelet_cpu_manager_shared_pool_size_millicores";
    e.begin(name, "gauge", "The size of the shared CPU pool for non-guaranteed QoS pods, in millicores.");
    e.sample(name, &[], Some(shared as f64 * 1000.0));
    let name = "kubelet_cpu_manager_exclusive_cpu_allocation_count";
    e.begin(name, "gauge", "The total number of CPUs exclusively allocated to containers running on this node");
    e.sample(name, &[], Some(own as f64));
}

/// /metrics; `told` is what drivers say of volumes.
pub(crate) fn render(ctx: &Context, told: &HashMap<String, Vec<Value>>) -> String {
    let mut e = Exposition::default();
    pods(ctx, &mut e);
    if ctx.topology.gives_cpus() {
        cpus(ctx, &mut e);
    }
    e.begin("kubelet_node_name", "gauge", "The node's name. The count is always 1.");
    e.sample("kubelet_node_name", &[("node", &ctx.node_name)], Some(1.0));
    let info = info::system_info();
    let mut version = info.kubelet_version.trim_start_matches('v').split('.');
    let (major, minor) = (version.next().unwrap_or_default(), version.next().unwrap_or_default());
    e.begin("kubernetes_build_info", "gauge", "A metric with a constant '1' value labeled by version and platform.");
    let platform = format!("linux/{}", info.architecture);
    let labels =
        [("git_version", info.kubelet_version.as_str()), ("major", major), ("minor", minor), ("platform", &platform)];
    e.sample("kubernetes_build_info", &labels, Some(1.0));
    ctx.metrics.write(&mut e, |name| !name.starts_with("prober_"));
    claims(told, &mut e);
    for (of, left) in ["client", "server"].into_iter().zip(certificates::left(&ctx.config)) {
        let help = format!("Gauge of the TTL (time-to-live) of the Kubelet's {of} certificate, in seconds.");
        e.single(&format!("kubelet_certificate_manager_{of}_ttl_seconds"), "gauge", &help, left);
    }
    process::write(&mut e, false);
    e.finish()
}

/// Families about volumes that claims are bound to: name, field of the Summary, help.
const CLAIMS: [(&str, &str, &str); 6] = [
    ("kubelet_volume_stats_available_bytes", "availableBytes", "Number of available bytes in the volume"),
    ("kubelet_volume_stats_capacity_bytes", "capacityBytes", "Capacity in bytes of the volume"),
    ("kubelet_volume_stats_inodes", "inodes", "Maximum number of inodes in the volume"),
    ("kubelet_volume_stats_inodes_free", "inodesFree", "Number of free inodes in the volume"),
    ("kubelet_volume_stats_inodes_used", "inodesUsed", "Number of used inodes in the volume"),
    ("kubelet_volume_stats_used_bytes", "usedBytes", "Number of used bytes in the volume"),
];

/// A claim that several pods use is told once.
fn claims(told: &HashMap<String, Vec<Value>>, e: &mut Exposition) {
    let claim = |v: &'_ Value| {
        let of = |key: &str| v["pvcRef"][key].as_str().map(str::to_owned);
        Some((of("namespace")?, of("name")?))
    };
    let all: BTreeMap<_, &Value> = told.values().flatten().filter_map(|v| Some((claim(v)?, v))).collect();
    for (family, field, help) in CLAIMS.iter().filter(|_| !all.is_empty()) {
        e.begin(family, "gauge", help);
        for ((namespace, name), v) in &all {
            e.sample(family, &[("namespace", namespace), ("persistentvolumeclaim", name)], v[field].as_f64());
        }
    }
}

fn pods(ctx: &Context, e: &mut Exposition) {
    let all = ctx.table.all();
    let running = all.iter().filter(|s| s.containers.values().any(|c| c.running)).count();
    e.single("kubelet_running_pods", "gauge", "Number of pods that have a running pod sandbox", Some(running as f64));
    e.begin("kubelet_running_containers", "gauge", "Number of containers currently running");
    let containers = |on: bool| all.iter().flat_map(|s| s.containers.values()).filter(|c| c.running == on).count();
    for (state, on) in [("running", true), ("exited", false)] {
        e.sample("kubelet_running_containers", &[("container_state", state)], Some(containers(on) as f64));
    }
    let is_static = |s: &crate::pods::table::Snapshot| {
        s.pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(crate::sources::SOURCE))
    };
    e.begin("kubelet_desired_pods", "gauge", "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.");
    for (label, want) in [("", false), ("true", true)] {
        let count = all.iter().filter(|s| is_static(s) == want).count();
        e.sample("kubelet_desired_pods", &[("static", label)], Some(count as f64));
    }
    let working = |s: &crate::pods::table::Snapshot| {
        let phase = s.pod.status.as_ref().and_then(|s| s.phase.as_deref());
        !matches!(phase, Some("Succeeded" | "Failed"))
    };
    let help = "The number of pods the kubelet considers active and which are being considered when admitting new pods. static is true if the pod is not from the apiserver.";
    e.begin("kubelet_active_pods", "gauge", help);
    for (label, want) in [("", false), ("true", true)] {
        let count = all.iter().filter(|s| is_static(s) == want && working(s)).count();
        e.sample("kubelet_active_pods", &[("static", label)], Some(count as f64));
    }
    let help = "Number of pods the kubelet is actually running, broken down by lifecycle phase, whether the pod is desired, orphaned, or runtime only (also orphaned), and whether the pod is static.";
    e.begin("kubelet_working_pods", "gauge", help);
    for (lifecycle, ending) in [("sync", false), ("terminating", true)] {
        for (label, want) in [("", false), ("true", true)] {
            let deleted = |s: &crate::pods::table::Snapshot| s.pod.metadata.deletion_timestamp.is_some();
            let count = all.iter().filter(|s| is_static(s) == want && working(s) && deleted(s) == ending).count();
            let labels = [("config", "desired"), ("lifecycle", lifecycle), ("static", label)];
            e.sample("kubelet_working_pods", &labels, Some(count as f64));
        }
    }
    let ephemeral =
        all.iter().filter_map(|s| s.pod.spec.as_ref()?.ephemeral_containers.as_ref()).map(Vec::len).sum::<usize>();
    let help = "Current number of ephemeral containers in pods managed by this kubelet.";
    e.single("kubelet_managed_ephemeral_containers", "gauge", help, Some(ephemeral as f64));
    let version = if ctx.cgroups.memory_is_v2() { 2.0 } else { 1.0 };
    e.single("kubelet_cgroup_version", "gauge", "cgroup version on the hosts.", Some(version));
    volumes(&all, e);
    logs(ctx, &all, e);
    let resizing = |s: &&std::sync::Arc<crate::pods::table::Snapshot>| {
        let conditions = s.pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "PodResizeInProgress")
    };
    let count = all.iter().filter(resizing).count();
    e.single("kubelet_pod_in_progress_resizes", "gauge", "Number of in-progress resizes for pods.", Some(count as f64));
    e.begin("dra_resource_claims_in_use", "gauge", "The number of ResourceClaims that are currently in use on the node, by driver name (driver_name label value) and across all drivers (special value <any> for driver_name).");
    for (driver, count) in ctx.claims.in_use() {
        e.sample("dra_resource_claims_in_use", &[("driver_name", &driver)], Some(count as f64));
    }
    let mirrors = all.iter().filter(|s| is_static(s) && s.mirror_uid.is_some()).count();
    e.single(
        "kubelet_mirror_pods",
        "gauge",
        "The number of mirror pods the kubelet will try to create (one per admitted static pod)",
        Some(mirrors as f64),
    );
}

/// What the logs of containers use of the disk.
fn logs(ctx: &Context, all: &[std::sync::Arc<crate::pods::table::Snapshot>], e: &mut Exposition) {
    let name = "kubelet_container_log_filesystem_used_bytes";
    e.begin(name, "gauge", "Bytes used by the container's logs on the filesystem.");
    for s in all {
        for (container, view) in &s.containers {
            let path = start::log_path(ctx, &s.pod, container, view.attempt);
            let Some(used) = path.parent().map(disk::used) else { continue };
            let labels = [
                ("container", container.as_str()),
                ("namespace", sandbox::namespace(&s.pod)),
                ("pod", sandbox::name(&s.pod)),
                ("uid", sandbox::uid(&s.pod)),
            ];
            e.sample(name, &labels, Some(used.bytes as f64));
        }
    }
}

/// Volumes of the pods by their kind: all, and those that are there. Containers are made when all of a pod's are.
fn volumes(all: &[std::sync::Arc<crate::pods::table::Snapshot>], e: &mut Exposition) {
    let name = "volume_manager_total_volumes";
    e.begin(name, "gauge", "Number of volumes in Volume Manager");
    for (state, mounted) in [("actual_state_of_world", true), ("desired_state_of_world", false)] {
        let mut plugins: BTreeMap<String, usize> = BTreeMap::new();
        let here = all.iter().filter(|s| !mounted || s.supervisor.is_some() && !s.containers.is_empty());
        for v in here.filter_map(|s| s.pod.spec.as_ref()?.volumes.as_ref()).flatten() {
            *plugins.entry(crate::volumes::plugin(v)).or_default() += 1;
        }
        for (plugin, count) in &plugins {
            e.sample(name, &[("plugin_name", plugin.as_str()), ("state", state)], Some(*count as f64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_durations() {
        let m = Metrics::default();
        m.count("kubelet_started_pods_total", []);
        m.count("kubelet_started_pods_total", []);
        m.observe("prober_probe_duration_seconds", [("pod", "p"), ("namespace", "n")], Duration::from_millis(200));
        let text = |probes: bool| {
            let mut e = Exposition::default();
            m.write(&mut e, |name| name.starts_with("prober_") == probes);
            e.finish()
        };
        assert!(text(false).ends_with("# TYPE kubelet_started_pods_total counter\nkubelet_started_pods_total 2\n"));
        let probes = text(true);
        for line in [
            "prober_probe_duration_seconds_bucket{pod=\"p\",namespace=\"n\",le=\"0.1\"} 0",
            "prober_probe_duration_seconds_bucket{pod=\"p\",namespace=\"n\",le=\"0.25\"} 1",
            "prober_probe_duration_seconds_bucket{pod=\"p\",namespace=\"n\",le=\"+Inf\"} 1",
            "prober_probe_duration_seconds_sum{pod=\"p\",namespace=\"n\"} 0.2",
        ] {
            assert!(probes.lines().any(|l| l == line), "{line}: {probes}");
        }
        m.forget_pod("n", "p");
        assert!(!text(true).contains("pod=\"p\""));
    }

    #[test]
    fn operations_are_counted_and_levels_go_both_ways() {
        let m = Metrics::default();
        m.operation("run_podsandbox", Instant::now(), true);
        m.operation("run_podsandbox", Instant::now(), false);
        let labels = [("path", "exec")];
        m.add("kubelet_http_inflight_requests", labels, 1.0);
        m.add("kubelet_http_inflight_requests", labels, -1.0);
        m.first("kubelet_first_network_pod_start_sli_duration_seconds", Duration::from_secs(2));
        m.first("kubelet_first_network_pod_start_sli_duration_seconds", Duration::from_secs(9));
        let mut e = Exposition::default();
        m.write(&mut e, |_| true);
        let text = e.finish();
        for line in [
            "kubelet_runtime_operations_total{operation_type=\"run_podsandbox\"} 2",
            "kubelet_runtime_operations_errors_total{operation_type=\"run_podsandbox\"} 1",
            "kubelet_runtime_operations_duration_seconds_count{operation_type=\"run_podsandbox\"} 2",
            "kubelet_http_inflight_requests{path=\"exec\"} 0",
            "kubelet_first_network_pod_start_sli_duration_seconds 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
    }

    #[test]
    fn families_are_in_order() {
        assert!(FAMILIES.is_sorted_by_key(|(name, _)| *name), "out of order");
    }
}
