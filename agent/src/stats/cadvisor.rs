//! /metrics/cadvisor: groups and links under the names dashboards ask for.

use std::{fs, path::Path, sync::Arc};

use super::{filesystems, interfaces, machine_usage, pod_net_dev};
use crate::{
    cgroups::{Moved, Processes, Usage},
    context::Context,
    node::info,
    pods::{sandbox, table::Snapshot},
    quantity,
    server::exposition::Exposition,
    topology::machine::{Topology, Unit},
};

/// One group with its labels: container, id, image, name, namespace, pod.
#[derive(Default)]
pub(crate) struct Group {
    pub(super) labels: [(&'static str, String); 6],
    pub(crate) usage: Usage,
    inside: Processes,
    /// Seconds that some and that all of its threads have waited: for processors, memory, disks.
    pressure: [Option<(f64, f64)>; 3],
    /// Threads that run and that wait for disks, smoothed.
    load: Option<(f64, f64)>,
    /// What its probes say: 1 is well, -1 is not, 0 is that it has none.
    health: Option<f64>,
    pub(super) moved: Moved,
    started: Option<f64>,
    /// Limits and requests as the spec has them: memory limit, cpu quota and its period, cpu shares.
    memory_limit: Option<i64>,
    cpu_quota: Option<i64>,
    cpu_period: Option<u64>,
    cpu_shares: Option<u64>,
}

impl Group {
    fn machine() -> Self {
        let pressure = RESOURCES.map(|resource| waited(super::machine_pressure(resource)));
        Self { pressure, ..Self::of(machine_usage()) }
    }

    fn of(usage: Usage) -> Self {
        Self { labels: labels("", "/", "", "", "", ""), usage, ..Self::default() }
    }

    /// One that is only asked for its numbers.
    pub(crate) fn read(ctx: &Context, group: &str) -> Self {
        let (inside, moved) = (ctx.cgroups.processes(group), ctx.cgroups.moved(group));
        let pressure = RESOURCES.map(|resource| waited(ctx.cgroups.pressure(group, resource)));
        let load = Some(ctx.stats.load(group, inside.tasks.running, inside.tasks.uninterruptible));
        Self { inside, moved, pressure, load, ..Self::of(ctx.cgroups.usage(group)) }
    }
}

/// What tasks can be short of.
const RESOURCES: [&str; 3] = ["cpu", "memory", "io"];

/// Totals of a PSI file, in seconds: some waited, all waited.
fn waited(text: Option<String>) -> Option<(f64, f64)> {
    let told = super::psi(text);
    let seconds = |of: &str| Some(told[of]["total"].as_f64()? / 1e9);
    Some((seconds("some")?, seconds("full")?))
}

fn some(g: &Group, resource: usize) -> Option<f64> {
    g.pressure[resource].map(|(some, _)| some)
}

fn full(g: &Group, resource: usize) -> Option<f64> {
    g.pressure[resource].map(|(_, full)| full)
}

fn labels(
    container: &str,
    id: &str,
    image: &str,
    name: &str,
    namespace: &str,
    pod: &str,
) -> [(&'static str, String); 6] {
    [("container", container), ("id", id), ("image", image), ("name", name), ("namespace", namespace), ("pod", pod)]
        .map(|(k, v)| (k, v.to_string()))
}

fn groups(ctx: &Context, s: &Snapshot) -> Vec<Group> {
    let pod = &s.pod;
    let Some(spec) = &pod.spec else { return Vec::new() };
    let (namespace, name) = (sandbox::namespace(pod), sandbox::name(pod));
    let group = ctx.cgroups.pod_group(crate::qos::class(spec), sandbox::uid(pod));
    let one = |container: &str, group: &str, image: &str, id: &str| Group {
        labels: labels(container, &format!("/{group}"), image, id, namespace, name),
        ..Group::read(ctx, group)
    };
    let mut all = vec![one("", &group, "", "")];
    let status = pod.status.as_ref();
    let told = |container: &str| {
        let lists = status.map(|s| [&s.container_statuses, &s.init_container_statuses]);
        lists.into_iter().flatten().flatten().flatten().find(|c| c.name == *container)
    };
    for (container, view) in s.containers.iter().filter(|(_, c)| c.running) {
        let c = crate::qos::all_containers(spec).find(|c| c.name == *container);
        let image = c.and_then(|c| c.image.clone()).unwrap_or_default();
        let limits = c.and_then(|c| c.resources.as_ref()?.limits.as_ref());
        let mut g = one(container, &format!("{group}/{}", view.id), &image, &view.id);
        g.memory_limit = quantity::get(limits, "memory");
        g.cpu_quota = quantity::get_millis(limits, "cpu").and_then(|m| crate::qos::quota(m, ctx.cfs_period()?));
        g.cpu_period = ctx.cfs_period().filter(|_| g.cpu_quota.is_some());
        let requests = c.and_then(|c| c.resources.as_ref()?.requests.as_ref()).or(limits);
        g.cpu_shares = Some(crate::qos::shares(quantity::get_millis(requests, "cpu").unwrap_or(0)));
        let told = told(container);
        let probed =
            c.is_some_and(|c| [&c.startup_probe, &c.readiness_probe, &c.liveness_probe].iter().any(|p| p.is_some()));
        g.health = Some(if !probed {
            0.0
        } else if told.is_some_and(|t| t.ready) {
            1.0
        } else {
            -1.0
        });
        let state = told.and_then(|t| t.state.as_ref()?.running.as_ref());
        g.started = state.and_then(|r| r.started_at.as_ref()).map(|t| t.0.as_second() as f64);
        all.push(g);
    }
    all
}

/// Reads one number.
pub(crate) type Get = fn(&Group) -> Option<f64>;

/// What is said of each group.
pub(crate) const FAMILIES: &[(&str, &str, &str, Get)] = &[
    ("container_cpu_load_average_10s", "gauge", "Value of container cpu load average over the last 10 seconds.", |g| {
        g.load.map(|(running, _)| (running * 1000.0).trunc())
    }),
    (
        "container_cpu_load_d_average_10s",
        "gauge",
        "Value of container cpu load.d average over the last 10 seconds.",
        |g| g.load.map(|(_, blocked)| (blocked * 1000.0).trunc()),
    ),
    ("container_cpu_system_seconds_total", "counter", "Cumulative system cpu time consumed in seconds.", |g| {
        seconds(g.usage.cpu_system_nanos)
    }),
    ("container_cpu_user_seconds_total", "counter", "Cumulative user cpu time consumed in seconds.", |g| {
        seconds(g.usage.cpu_user_nanos)
    }),
    ("container_cpu_cfs_periods_total", "counter", "Number of elapsed enforcement period intervals.", |g| {
        float(g.usage.cpu_periods)
    }),
    ("container_cpu_cfs_throttled_periods_total", "counter", "Number of throttled period intervals.", |g| {
        float(g.usage.cpu_throttled_periods)
    }),
    (
        "container_cpu_cfs_throttled_seconds_total",
        "counter",
        "Total time duration the container has been throttled.",
        |g| seconds(g.usage.cpu_throttled_nanos),
    ),
    ("container_file_descriptors", "gauge", "Number of open file descriptors for the container.", |g| {
        Some(g.inside.descriptors as f64)
    }),
    ("container_health_state", "gauge", "The result of the container's health check", |g| g.health),
    ("container_last_seen", "gauge", "Last time a container was seen by the exporter", |_| {
        std::time::UNIX_EPOCH.elapsed().ok().map(|now| now.as_secs() as f64)
    }),
    ("container_memory_cache", "gauge", "Number of bytes of page cache memory.", |g| float(g.usage.memory_cache)),
    ("container_memory_failcnt", "counter", "Number of memory usage hits limits.", |g| float(g.usage.memory_failures)),
    ("container_memory_kernel_usage", "gauge", "Size of kernel memory allocated in bytes.", |g| {
        float(g.usage.memory_kernel)
    }),
    ("container_memory_mapped_file", "gauge", "Size of memory mapped files in bytes.", |g| {
        float(g.usage.memory_mapped)
    }),
    ("container_memory_max_usage_bytes", "gauge", "Maximum memory usage recorded in bytes.", |g| {
        float(g.usage.memory_peak)
    }),
    ("container_memory_rss", "gauge", "Size of RSS in bytes.", |g| float(g.usage.memory_rss)),
    ("container_memory_swap", "gauge", "Container swap usage in bytes.", |g| float(g.usage.swap)),
    ("container_memory_total_active_file_bytes", "gauge", "Current total active file in bytes.", |g| {
        float(g.usage.active_file)
    }),
    ("container_memory_total_inactive_file_bytes", "gauge", "Current total inactive file in bytes.", |g| {
        float(g.usage.inactive_file)
    }),
    ("container_memory_usage_bytes", "gauge", "Current memory usage in bytes, including all memory.", |g| {
        float(g.usage.memory_usage)
    }),
    ("container_memory_working_set_bytes", "gauge", "Current working set in bytes.", |g| {
        float(g.usage.memory_working_set)
    }),
    ("container_oom_events_total", "counter", "Count of out of memory events observed for the container.", |g| {
        float(g.usage.oom_kills)
    }),
    (
        "container_pressure_cpu_stalled_seconds_total",
        "counter",
        "Total time duration no tasks in the container could make progress due to CPU congestion.",
        |g| full(g, 0),
    ),
    (
        "container_pressure_cpu_waiting_seconds_total",
        "counter",
        "Total time duration tasks in the container have waited due to CPU congestion.",
        |g| some(g, 0),
    ),
    (
        "container_pressure_io_stalled_seconds_total",
        "counter",
        "Total time duration no tasks in the container could make progress due to IO congestion.",
        |g| full(g, 2),
    ),
    (
        "container_pressure_io_waiting_seconds_total",
        "counter",
        "Total time duration tasks in the container have waited due to IO congestion.",
        |g| some(g, 2),
    ),
    (
        "container_pressure_memory_stalled_seconds_total",
        "counter",
        "Total time duration no tasks in the container could make progress due to memory congestion.",
        |g| full(g, 1),
    ),
    (
        "container_pressure_memory_waiting_seconds_total",
        "counter",
        "Total time duration tasks in the container have waited due to memory congestion.",
        |g| some(g, 1),
    ),
    ("container_processes", "gauge", "Number of processes running inside the container.", |g| {
        Some(g.inside.count as f64)
    }),
    ("container_sockets", "gauge", "Number of open sockets for the container.", |g| Some(g.inside.sockets as f64)),
    ("container_spec_cpu_period", "gauge", "CPU period of the container.", |g| g.cpu_period.map(|p| p as f64)),
    ("container_spec_cpu_quota", "gauge", "CPU quota of the container.", |g| g.cpu_quota.map(|q| q as f64)),
    ("container_spec_cpu_shares", "gauge", "CPU share of the container.", |g| float(g.cpu_shares)),
    ("container_spec_memory_limit_bytes", "gauge", "Memory limit for the container.", |g| {
        g.memory_limit.map(|l| l as f64)
    }),
    ("container_spec_memory_reservation_limit_bytes", "gauge", "Memory reservation limit for the container.", |g| {
        float(g.usage.memory_reserved)
    }),
    ("container_spec_memory_swap_limit_bytes", "gauge", "Memory swap limit for the container.", |g| {
        float(g.usage.memory_swap_limit)
    }),
    ("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.", |g| {
        g.started
    }),
    ("container_threads", "gauge", "Number of threads running inside the container", |g| float(g.inside.threads)),
    (
        "container_threads_max",
        "gauge",
        "Maximum number of threads allowed inside the container, infinity if value is zero",
        |g| float(g.inside.threads_max),
    ),
];

fn float(n: Option<u64>) -> Option<f64> {
    n.map(|n| n as f64)
}

fn seconds(nanos: Option<u64>) -> Option<f64> {
    nanos.map(|n| n as f64 / 1e9)
}

/// Column of /proc/PID/net/dev, name, help.
pub(crate) const LINKS: [(usize, &str, &str); 8] = [
    (0, "container_network_receive_bytes_total", "Cumulative count of bytes received"),
    (2, "container_network_receive_errors_total", "Cumulative count of errors encountered while receiving"),
    (3, "container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving"),
    (1, "container_network_receive_packets_total", "Cumulative count of packets received"),
    (8, "container_network_transmit_bytes_total", "Cumulative count of bytes transmitted"),
    (10, "container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting"),
    (11, "container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting"),
    (9, "container_network_transmit_packets_total", "Cumulative count of packets transmitted"),
];

fn machine(ctx: &Context, e: &mut Exposition) {
    let info = info::system_info();
    let ids =
        [("boot_id", info.boot_id.as_str()), ("machine_id", &info.machine_id), ("system_uuid", &info.system_uuid)];
    let mut gauge = |name: &str, help: &str, value: f64| {
        e.begin(name, "gauge", help);
        e.sample(name, &ids, Some(value));
    };
    gauge("machine_cpu_cores", "Number of logical CPU cores.", f64::from(ctx.machine.cpus));
    if let Ok(t) = Topology::read(Path::new("/sys")) {
        let count = |unit| t.count(unit) as f64;
        gauge("machine_cpu_physical_cores", "Number of physical CPU cores.", count(Unit::Core));
        gauge("machine_cpu_sockets", "Number of CPU sockets.", count(Unit::Socket));
    }
    // Only mainframes have them.
    gauge("machine_cpu_books", "Number of CPU books.", distinct("book_id"));
    gauge("machine_cpu_drawers", "Number of CPU drawers.", distinct("drawer_id"));
    gauge("machine_memory_bytes", "Amount of memory installed on the machine.", ctx.machine.memory as f64);
    gauge("machine_swap_bytes", "Amount of swap memory available on the machine.", info::meminfo("SwapTotal") as f64);
    let name = "machine_nvm_capacity";
    e.begin(name, "gauge", "NVM capacity value labeled by NVM mode (memory mode or app direct mode).");
    let labels: Vec<_> = ids.into_iter().chain([("mode", "app_direct_mode")]).collect();
    e.sample(name, &labels, Some(persistent_memory()));
    e.single(
        "machine_scrape_error",
        "gauge",
        "1 if there was an error while getting machine metrics, 0 otherwise.",
        Some(0.0),
    );
    let version =
        [("kernelVersion", info.kernel_version.as_str()), ("osVersion", &info.os_image), ("cadvisorVersion", "")];
    e.begin(
        "cadvisor_version_info",
        "gauge",
        "A metric with a constant '1' value labeled by kernel version and OS version.",
    );
    e.sample("cadvisor_version_info", &version, Some(1.0));
}

/// Different numbers in a file of every processor's topology.
fn distinct(file: &str) -> f64 {
    let cpus = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    let numbers = cpus.filter_map(|cpu| fs::read_to_string(cpu.path().join("topology").join(file)).ok());
    numbers.collect::<std::collections::BTreeSet<_>>().len() as f64
}

/// Bytes of memory that keeps its content: regions of the nvdimm bus.
fn persistent_memory() -> f64 {
    let all = fs::read_dir("/sys/bus/nd/devices").into_iter().flatten().flatten();
    let regions = all.filter(|d| d.file_name().to_string_lossy().starts_with("region"));
    let size = |d: fs::DirEntry| fs::read_to_string(d.path().join("size")).ok()?.trim().parse::<f64>().ok();
    regions.filter_map(size).sum()
}

/// The text.
pub(crate) async fn text(ctx: Arc<Context>) -> String {
    tokio::task::spawn_blocking(move || render(&ctx)).await.unwrap_or_default()
}

fn render(ctx: &Context) -> String {
    let mut e = Exposition::default();
    ctx.stats.forget_old();
    let mut pods = ctx.table.all();
    pods.retain(|s| s.containers.values().any(|c| c.running));
    let mut all = vec![Group::machine()];
    all.extend(pods.iter().flat_map(|s| groups(ctx, s)));
    let borrowed: Vec<[(&str, &str); 6]> =
        all.iter().map(|g| std::array::from_fn(|i| (g.labels[i].0, g.labels[i].1.as_str()))).collect();
    e.begin("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.");
    for (g, l) in all.iter().zip(&borrowed) {
        let labels: Vec<(&str, &str)> = [l[0], ("cpu", "total")].into_iter().chain(l[1..].iter().copied()).collect();
        e.sample("container_cpu_usage_seconds_total", &labels, seconds(g.usage.cpu_nanos));
    }
    for (name, kind, help, get) in FAMILIES {
        e.begin(name, kind, help);
        for (g, l) in all.iter().zip(&borrowed) {
            e.sample(name, l, get(g));
        }
    }
    faults(&all, &borrowed, &mut e);
    tasks(&all, &borrowed, &mut e);
    filesystems::write(&all, &mut e);
    links(ctx, &pods, &mut e);
    machine(ctx, &mut e);
    e.single(
        "container_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics, 0 otherwise",
        Some(0.0),
    );
    e.finish()
}

fn faults(all: &[Group], labels: &[[(&str, &str); 6]], e: &mut Exposition) {
    let name = "container_memory_failures_total";
    e.begin(name, "counter", "Cumulative count of memory allocation failures.");
    for (g, l) in all.iter().zip(labels) {
        for (kind, count) in [("pgfault", g.usage.page_faults), ("pgmajfault", g.usage.major_page_faults)] {
            let labels: Vec<_> = l.iter().copied().chain([("failure_type", kind), ("scope", "hierarchy")]).collect();
            e.sample(name, &labels, float(count));
        }
    }
}

/// Threads by what they do, and how many files each first process may open.
fn tasks(all: &[Group], labels: &[[(&str, &str); 6]], e: &mut Exposition) {
    // The first is the machine.
    let groups = || all.iter().zip(labels).skip(1);
    let name = "container_tasks_state";
    e.begin(name, "gauge", "Number of tasks in given state");
    for (g, l) in groups() {
        let t = g.inside.tasks;
        let states = [
            ("running", t.running),
            ("sleeping", t.sleeping),
            ("stopped", t.stopped),
            ("uninterruptible", t.uninterruptible),
        ];
        for (state, count) in states {
            let labels: Vec<_> = l.iter().copied().chain([("state", state)]).collect();
            e.sample(name, &labels, Some(count as f64));
        }
    }
    let name = "container_ulimits_soft";
    let help = "Soft ulimit values for the container root process. Unlimited if -1, except priority and nice";
    e.begin(name, "gauge", help);
    for (g, l) in groups().filter(|(g, _)| g.inside.count > 0) {
        let labels: Vec<_> = l.iter().copied().chain([("ulimit", "max_open_files")]).collect();
        e.sample(name, &labels, Some(g.inside.files_max.map_or(-1.0, |n| n as f64)));
    }
}

fn links(ctx: &Context, pods: &[Arc<Snapshot>], e: &mut Exposition) {
    let of_pod = |s: &Arc<Snapshot>| {
        let dev = pod_net_dev(ctx, sandbox::uid(&s.pod)).filter(|_| !s.host_network)?;
        let list = interfaces(&fs::read_to_string(dev).ok()?);
        Some((sandbox::namespace(&s.pod).to_string(), sandbox::name(&s.pod).to_string(), list))
    };
    let found: Vec<_> = pods.iter().filter_map(of_pod).collect();
    for (column, name, help) in LINKS {
        e.begin(name, "counter", help);
        for (namespace, pod, list) in &found {
            for (interface, numbers) in list {
                let labels =
                    [("container", ""), ("interface", interface.as_str()), ("namespace", namespace), ("pod", pod)];
                e.sample(name, &labels, Some(numbers[column] as f64));
            }
        }
    }
}
