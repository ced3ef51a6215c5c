//! Counters and durations of this agent under the kubelet's names, for /metrics and /metrics/probes.
//!
//! What happens is counted where it happens ([`Metrics::count`], [`Metrics::observe`]); what is, is looked up when somebody
//! asks ([`render`]).

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::Value;

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

/// Every family: name and help. Those that begin with `prober_` are shown on /metrics/probes.
const FAMILIES: &[(&str, &str)] = &[
    (
        "dra_operations_duration_seconds",
        "Latency histogram in seconds for the duration of handling all ResourceClaims referenced by a pod when the pod starts or stops.",
    ),
    ("kubelet_certificate_manager_client_expiration_renew_errors", "Counter of certificate renewal errors."),
    ("kubelet_containers_per_pod_count", "The number of containers per pod."),
    ("kubelet_cpu_manager_pinning_errors_total", "The number of cpu core allocations which required pinning failed."),
    ("kubelet_cpu_manager_pinning_requests_total", "The number of cpu core allocations which required pinning."),
    ("kubelet_evictions", "Cumulative number of pod evictions by eviction signal"),
    ("kubelet_graceful_shutdown_end_time_seconds", "Last graceful shutdown end time since unix epoch in seconds"),
    ("kubelet_graceful_shutdown_start_time_seconds", "Last graceful shutdown start time since unix epoch in seconds"),
    ("kubelet_http_requests_duration_seconds", "Duration in seconds to serve http requests"),
    ("kubelet_http_requests_total", "Number of the http requests received since the server started"),
    ("kubelet_image_garbage_collected_total", "Total number of images garbage collected by the kubelet"),
    ("kubelet_image_volume_mounted_errors_total", "Number of failed image volume mounts."),
    ("kubelet_image_volume_mounted_succeed_total", "Number of successful image volume mounts."),
    ("kubelet_image_volume_requested_total", "Number of requested image volumes."),
    (
        "kubelet_memory_manager_pinning_errors_total",
        "The number of memory pages allocations which required pinning that failed.",
    ),
    ("kubelet_memory_manager_pinning_requests_total", "The number of memory pages allocations which required pinning."),
    (
        "kubelet_pod_start_duration_seconds",
        "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run",
    ),
    (
        "kubelet_pod_start_sli_duration_seconds",
        "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
    ),
    (
        "kubelet_pod_start_total_duration_seconds",
        "Duration in seconds to start a pod since creation, including time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
    ),
    ("kubelet_run_podsandbox_duration_seconds", "Duration in seconds of the run_podsandbox operations"),
    (
        "kubelet_sleep_action_terminated_early_total",
        "The number of times lifecycle sleep handler got terminated before it finishes",
    ),
    ("kubelet_started_containers_errors_total", "Cumulative number of errors when starting containers"),
    ("kubelet_started_containers_total", "Cumulative number of containers started"),
    ("kubelet_started_pods_errors_total", "Cumulative number of errors when starting pods"),
    ("kubelet_started_pods_total", "Cumulative number of pods started"),
    (
        "kubelet_started_user_namespaced_pods_errors_total",
        "Cumulative number of errors when starting pods with user namespaces. This metric will only be collected on Linux.",
    ),
    (
        "kubelet_started_user_namespaced_pods_total",
        "Cumulative number of pods with user namespaces started. This metric is only collected on Linux.",
    ),
    ("kubelet_terminated_containers_total", "Cumulative number of containers terminated"),
    ("kubelet_topology_manager_admission_duration_ms", "Duration in milliseconds to serve a pod admission request."),
    (
        "kubelet_topology_manager_admission_errors_total",
        "The number of admission request failures where resources could not be aligned.",
    ),
    (
        "kubelet_topology_manager_admission_requests_total",
        "The number of admission requests where resources have to be aligned.",
    ),
    ("prober_probe_duration_seconds", "Duration in seconds for a probe response."),
    ("prober_probe_total", "Cumulative number of a liveness, readiness or startup probe for a container by result."),
];

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
    cells: Mutex<BTreeMap<&'static str, BTreeMap<Labels, Cell>>>,
}

fn owned<const N: usize>(labels: [(&'static str, &str); N]) -> Labels {
    labels.map(|(k, v)| (k, v.to_string())).to_vec()
}

impl Metrics {
    /// One more.
    pub(crate) fn count<const N: usize>(&self, family: &'static str, labels: [(&'static str, &str); N]) {
        let mut cells = self.cells.lock();
        let cell = cells.entry(family).or_default().entry(owned(labels)).or_insert(Cell::Count(0));
        if let Cell::Count(n) = cell {
            *n += 1;
        }
    }

    /// Something happened just now.
    pub(crate) fn set_now(&self, family: &'static str) {
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64());
        self.cells.lock().entry(family).or_default().insert(Labels::new(), Cell::Level(now));
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
        let cell = cells.entry(family).or_default().entry(owned(labels)).or_insert(empty);
        if let Cell::Spread { counts, all, sum } = cell {
            let seconds = took.as_secs_f64();
            for (count, _) in counts.iter_mut().zip(BOUNDS).filter(|(_, bound)| seconds <= *bound) {
                *count += 1;
            }
            *all += 1;
            *sum += seconds;
        }
    }

    /// Drops the samples of a pod that is gone.
    pub(crate) fn forget_pod(&self, namespace: &str, pod: &str) {
        let of = |labels: &Labels, key: &str, value: &str| labels.iter().any(|(k, v)| *k == key && v == value);
        for samples in self.cells.lock().values_mut() {
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
    process(&mut e, true);
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
    process(&mut e, false);
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

/// Volumes of the pods by their kind.
fn volumes(all: &[std::sync::Arc<crate::pods::table::Snapshot>], e: &mut Exposition) {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let specs = all.iter().filter_map(|s| s.pod.spec.as_ref()?.volumes.as_ref()).flatten();
    for v in specs.filter_map(|v| serde_json::to_value(v).ok()) {
        let kind = v.as_object().and_then(|o| o.keys().find(|k| *k != "name").cloned()).unwrap_or_default();
        *kinds.entry(kind).or_default() += 1;
    }
    e.begin("volume_manager_total_volumes", "gauge", "Number of volumes in Volume Manager");
    for (kind, count) in &kinds {
        let mut plugin = String::from("kubernetes.io/");
        for c in kind.trim_end_matches("Source").chars() {
            if c.is_ascii_uppercase() {
                plugin.push('-');
            }
            plugin.push(c.to_ascii_lowercase());
        }
        let labels = [("plugin_name", plugin.as_str()), ("state", "desired_state_of_world")];
        e.sample("volume_manager_total_volumes", &labels, Some(*count as f64));
    }
}

/// What every process tells; `brief` is when it began only.
fn process(e: &mut Exposition, brief: bool) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().skip(1).map(|f| f.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let at = |i: usize| fields.get(i).copied();
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = boot.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse::<f64>().ok());
    let started = at(18).zip(boot).map(|(ticks, boot)| boot + ticks / 100.0);
    e.single("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", started);
    if brief {
        return;
    }
    let cpu = at(10).zip(at(11)).map(|(u, s)| (u + s) / 100.0);
    e.single("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", cpu);
    e.single("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", at(19));
    let resident = at(20).map(|pages| pages * 4096.0);
    e.single("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident);
    let open = fs::read_dir("/proc/self/fd").ok().map(|d| d.count() as f64);
    let limit =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft as f64);
    e.single("process_max_fds", "gauge", "Maximum number of open file descriptors.", limit);
    e.single("process_open_fds", "gauge", "Number of open file descriptors.", open);
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
    fn every_process_has_begun() {
        let mut e = Exposition::default();
        process(&mut e, false);
        let text = e.finish();
        for name in [
            "process_start_time_seconds",
            "process_cpu_seconds_total",
            "process_resident_memory_bytes",
            "process_open_fds",
        ] {
            assert!(text.lines().any(|l| l.starts_with(&format!("{name} "))), "{name}: {text}");
        }
    }
}
