//! What the node and its pods use: the Summary of /stats/summary and what metrics are made from.
//!
//! Nothing is measured on a clock: counters are read when somebody asks, and a rate is what has happened since the last
//! time somebody did.

pub(crate) mod cadvisor;
pub(crate) mod disk;
mod filesystems;

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use crate::{
    cgroups::Usage,
    context::Context,
    csi,
    node::info,
    pods::{exec, sandbox, table::Snapshot},
};

/// Kernel ticks per second in /proc.
const TICKS: u64 = 100;

/// How long a group nobody asks about is remembered.
const KEPT: Duration = Duration::from_secs(600);

/// The least time a rate is made of.
const LEAST: Duration = Duration::from_millis(100);

/// What earlier questions left for later ones.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    samples: Mutex<HashMap<String, Sample>>,
    loads: Mutex<HashMap<String, Load>>,
    disks: Mutex<disk::Memory>,
}

/// Smoothed numbers of threads that run, and of those that wait where no signal reaches them.
#[derive(Debug, Clone, Copy)]
struct Load {
    at: Instant,
    running: f64,
    blocked: f64,
}

/// How fast what was counted before loses its weight.
const DECAY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    nanos: u64,
    rate: Option<u64>,
}

impl Stats {
    /// Nanocores since the last question about `key`.
    pub(crate) fn rate(&self, key: &str, nanos: u64) -> Option<u64> {
        let mut samples = self.samples.lock();
        let now = Instant::now();
        let Some(last) = samples.get_mut(key) else {
            samples.insert(key.into(), Sample { at: now, nanos, rate: None });
            return None;
        };
        let passed = now - last.at;
        if passed >= LEAST {
            let rate = u128::from(nanos.saturating_sub(last.nanos)) * 1_000_000_000 / passed.as_nanos();
            *last = Sample { at: now, nanos, rate: u64::try_from(rate).ok() };
        }
        last.rate
    }

    /// The load of a group that has so many threads of either kind now: an average that forgets over ten seconds, of what
    /// the questions have seen.
    pub(crate) fn load(&self, key: &str, running: u64, blocked: u64) -> (f64, f64) {
        let (now, mut loads) = (Instant::now(), self.loads.lock());
        let (running, blocked) = (running as f64, blocked as f64);
        let load = loads.entry(key.into()).or_insert(Load { at: now, running, blocked });
        let old = (-(now - load.at).as_secs_f64() / DECAY.as_secs_f64()).exp();
        let smooth = |before: f64, n: f64| before * old + n * (1.0 - old);
        *load = Load { at: now, running: smooth(load.running, running), blocked: smooth(load.blocked, blocked) };
        (load.running, load.blocked)
    }

    /// What a tree uses, as of a moment ago.
    pub(crate) fn disk(&self, root: PathBuf) -> disk::Used {
        self.disks.lock().used(root)
    }

    /// Forgets groups nobody has asked about for long: those of pods that are gone.
    fn forget_old(&self) {
        self.samples.lock().retain(|_, s| s.at.elapsed() < KEPT);
        self.loads.lock().retain(|_, l| l.at.elapsed() < KEPT);
    }
}

fn now() -> String {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// An object without the fields nobody knows.
fn object<const N: usize>(fields: [(&str, Value); N]) -> Value {
    let known = fields.into_iter().filter(|(_, v)| !v.is_null());
    Value::Object(known.map(|(k, v)| (k.to_string(), v)).collect::<Map<_, _>>())
}

/// How long tasks waited, from the text of a PSI file: totals in nanoseconds, shares in percent.
pub(crate) fn psi(text: Option<String>) -> Value {
    let Some(text) = text else { return Value::Null };
    let line = |kind: &str| {
        let words = text.lines().find_map(|l| l.strip_prefix(kind))?;
        let of = |key: &str| words.split_whitespace().find_map(|w| w.strip_prefix(key)?.parse::<f64>().ok());
        Some(json!({"total": of("total=")? as u64 * 1000, "avg10": of("avg10=")?, "avg60": of("avg60=")?,
            "avg300": of("avg300=")?}))
    };
    // For a whole machine "full" of the processor says nothing and older kernels leave it out.
    let none = || json!({"total": 0, "avg10": 0.0, "avg60": 0.0, "avg300": 0.0});
    line("some ").map_or(Value::Null, |some| json!({"full": line("full ").unwrap_or_else(none), "some": some}))
}

fn cpu(stats: &Stats, key: &str, time: &str, nanos: Option<u64>, pressure: Option<String>) -> Value {
    let rate = nanos.and_then(|n| stats.rate(key, n));
    object([
        ("time", json!(time)),
        ("usageNanoCores", json!(rate)),
        ("usageCoreNanoSeconds", json!(nanos)),
        ("psi", psi(pressure)),
    ])
}

fn io(time: &str, pressure: Option<String>) -> Value {
    object([("time", json!(time)), ("psi", psi(pressure))])
}

/// A PSI file of the whole machine.
fn machine_pressure(resource: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/pressure/{resource}")).ok()
}

fn memory(time: &str, u: &Usage, pressure: Option<String>) -> Value {
    let free = u.memory_limit.zip(u.memory_working_set).map(|(limit, used)| limit.saturating_sub(used));
    object([
        ("time", json!(time)),
        ("availableBytes", json!(free)),
        ("usageBytes", json!(u.memory_usage)),
        ("workingSetBytes", json!(u.memory_working_set)),
        ("rssBytes", json!(u.memory_rss)),
        ("pageFaults", json!(u.page_faults)),
        ("majorPageFaults", json!(u.major_page_faults)),
        ("psi", psi(pressure)),
    ])
}

/// Sizes of the file system that holds the agent's state, and `used` of it (all of it when not said).
fn file_system(ctx: &Context, time: &str, used: Option<disk::Used>) -> Value {
    let (size, free, inodes, inodes_free) = info::disk(&ctx.config.paths.state()).unwrap_or_default();
    let used =
        used.unwrap_or(disk::Used { bytes: size.saturating_sub(free), inodes: inodes.saturating_sub(inodes_free) });
    json!({"time": time, "availableBytes": free, "capacityBytes": size, "usedBytes": used.bytes,
        "inodesFree": inodes_free, "inodes": inodes, "inodesUsed": used.inodes})
}

/// Interfaces of a network namespace by its /proc/PID/net/dev, the loopback left out.
pub(crate) fn interfaces(text: &str) -> Vec<(String, [u64; 16])> {
    let line = |l: &str| {
        let (name, numbers) = l.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map_while(|n| n.parse().ok()).collect();
        Some((name.trim().to_string(), numbers.try_into().ok()?))
    };
    text.lines().skip(2).filter_map(line).filter(|(name, _): &(String, _)| name != "lo").collect()
}

fn network(time: &str, proc: &str, main: Option<&str>) -> Value {
    let list = interfaces(&fs::read_to_string(proc).unwrap_or_default());
    let one = |(name, n): &(String, [u64; 16])| json!({"name": name, "rxBytes": n[0], "rxErrors": n[2], "txBytes": n[8], "txErrors": n[10]});
    let first = list.iter().find(|(n, _)| main.is_none_or(|m| m == n)).or_else(|| list.first());
    let mut out = first.map_or_else(|| json!({}), one);
    out["time"] = json!(time);
    out["interfaces"] = list.iter().map(one).collect();
    out
}

/// The link a pod's network namespace shows, by a process in it.
pub(crate) fn pod_net_dev(ctx: &Context, uid: &str) -> Option<String> {
    let pid = fs::read_to_string(ctx.config.paths.run_pod(uid).join("supervisor.pid")).ok()?;
    Some(format!("/proc/{}/net/dev", pid.trim()))
}

/// Where a container's own files are: its writable layer and its logs.
fn places(ctx: &Context, pod: &Pod, container: &str, attempt: u32) -> (PathBuf, PathBuf) {
    let uid = sandbox::uid(pod);
    let bundle = exec::bundle(&ctx.config.paths, uid, container, attempt);
    let logs = ctx.config.paths.pod_logs(sandbox::namespace(pod), sandbox::name(pod), uid);
    (bundle.join("upper"), logs.join(container))
}

/// What a pod keeps on the node's disk: by container (layer and logs together) and by emptyDir that is not in memory.
pub(crate) struct PodDisk {
    pub(crate) containers: Vec<(String, disk::Used)>,
    pub(crate) volumes: Vec<(String, disk::Used)>,
}

/// Walks a pod's trees now.
pub(crate) fn pod_disk(ctx: &Context, s: &Snapshot) -> PodDisk {
    let containers = s.containers.iter().map(|(name, c)| {
        let (layer, logs) = places(ctx, &s.pod, name, c.attempt);
        let mut sum = disk::used(&layer);
        sum += disk::used(&logs);
        (name.clone(), sum)
    });
    let volumes = empty_dirs(ctx, &s.pod).into_iter().map(|(name, path)| (name, disk::used(&path)));
    PodDisk { containers: containers.collect(), volumes: volumes.collect() }
}

fn empty_dirs(ctx: &Context, pod: &Pod) -> Vec<(String, PathBuf)> {
    let dir = ctx.config.paths.pod(sandbox::uid(pod)).join("volumes/kubernetes.io~empty-dir");
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_ref()).into_iter().flatten();
    let on_disk =
        volumes.filter(|v| v.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or("").is_empty()));
    on_disk.map(|v| (v.name.clone(), dir.join(&v.name))).collect()
}

/// CPU time of the whole machine and of this process.
fn machine_cpu_nanos() -> Option<u64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let numbers: Vec<u64> = stat.lines().next()?.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|i| numbers.get(*i)).sum();
    Some(busy * (1_000_000_000 / TICKS))
}

/// The machine's memory in the words of a group's.
pub(crate) fn machine_usage() -> Usage {
    let of = |key: &str| u64::try_from(info::meminfo(key)).unwrap_or(0);
    let used = of("MemTotal").saturating_sub(of("MemFree"));
    let vm = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let event = |key: &str| vm.lines().find_map(|l| l.strip_prefix(key)?.trim().parse().ok());
    Usage {
        cpu_nanos: machine_cpu_nanos(),
        memory_usage: Some(used),
        memory_working_set: Some(used.saturating_sub(of("Inactive(file)"))),
        memory_rss: Some(of("AnonPages")),
        memory_limit: Some(of("MemTotal")),
        page_faults: event("pgfault "),
        major_page_faults: event("pgmajfault "),
        swap: Some(of("SwapTotal").saturating_sub(of("SwapFree"))),
        ..Usage::default()
    }
}

fn agent_usage() -> Usage {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().skip(1).map(|n| n.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    // After the state: ... minflt(7th) majflt(9th) utime(11th) stime(12th).
    let at = |i: usize| fields.get(i).copied();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kb = |key: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok())
            .map(|k| k * 1024)
    };
    Usage {
        cpu_nanos: at(10).zip(at(11)).map(|(u, s)| (u + s) * (1_000_000_000 / TICKS)),
        memory_usage: kb("VmRSS:"),
        memory_working_set: kb("VmRSS:"),
        memory_rss: kb("RssAnon:"),
        page_faults: at(6),
        major_page_faults: at(8),
        ..Usage::default()
    }
}

fn boot_time() -> Option<Timestamp> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    Timestamp::from_second(stat.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok())?).ok()
}

/// Most processes and processes now.
pub(crate) fn processes() -> Option<(u64, u64)> {
    let most = fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse().ok()?;
    let load = fs::read_to_string("/proc/loadavg").ok()?;
    let now = load.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    Some((most, now))
}

fn node(ctx: &Context, time: &str, brief: bool) -> Value {
    let stats = &ctx.stats;
    let u = machine_usage();
    let started = boot_time().map(|t| t.to_string());
    let own = |name: &str, key: &str, u: &Usage, group: Option<&str>| {
        let pressure = |resource: &str| group.and_then(|g| ctx.cgroups.pressure(g, resource));
        object([
            ("name", json!(name)),
            ("startTime", json!(started)),
            ("cpu", cpu(stats, key, time, u.cpu_nanos, pressure("cpu"))),
            ("memory", memory(time, u, pressure("memory"))),
        ])
    };
    let root = ctx.cgroups.root();
    let system = json!([
        own("kubelet", "/agent", &agent_usage(), None),
        own("pods", "/pods", &ctx.cgroups.usage(root), Some(root))
    ]);
    let mut node = object([
        ("nodeName", json!(ctx.node_name.as_ref())),
        ("systemContainers", system),
        ("startTime", json!(started)),
        ("cpu", cpu(stats, "/", time, u.cpu_nanos, machine_pressure("cpu"))),
        ("memory", memory(time, &u, machine_pressure("memory"))),
        ("io", io(time, machine_pressure("io"))),
        ("swap", json!({"time": time, "swapUsageBytes": u.swap, "swapAvailableBytes": info::meminfo("SwapFree")})),
    ]);
    if brief {
        return node;
    }
    node["network"] = network(time, "/proc/self/net/dev", None);
    node["fs"] = file_system(ctx, time, None);
    let images: u64 = ctx.images.list().iter().map(|i| i.size).sum();
    let images = file_system(ctx, time, Some(disk::Used { bytes: images, inodes: 0 }));
    let containers = file_system(ctx, time, Some(stats.disk(ctx.config.paths.pods())));
    node["runtime"] = json!({"imageFs": images, "containerFs": containers});
    if let Some((most, now)) = processes() {
        node["rlimit"] = json!({"time": time, "maxpid": most, "curproc": now});
    }
    node
}

fn swap(time: &str, u: &Usage) -> Value {
    let used = u.swap.unwrap_or(0);
    let available = u.swap_limit.map(|limit| limit.saturating_sub(used));
    object([("time", json!(time)), ("swapAvailableBytes", json!(available)), ("swapUsageBytes", json!(used))])
}

fn pod(ctx: &Context, s: &Snapshot, time: &str, brief: bool, mut volumes: Vec<Value>) -> Option<Value> {
    let (pod, stats) = (&s.pod, &ctx.stats);
    let uid = sandbox::uid(pod);
    let group = ctx.cgroups.pod_group(crate::qos::class(pod.spec.as_ref()?), uid);
    let status = pod.status.as_ref();
    let all = status.into_iter().flat_map(|s| {
        let lists = [&s.container_statuses, &s.init_container_statuses, &s.ephemeral_container_statuses];
        lists.into_iter().flatten().flatten().collect::<Vec<_>>()
    });
    let began: HashMap<&str, String> = all
        .filter_map(|c| Some((c.name.as_str(), c.state.as_ref()?.running.as_ref()?.started_at.as_ref()?.0.to_string())))
        .collect();
    let mut own = disk::Used::default();
    let mut containers = Vec::new();
    for (name, c) in s.containers.iter().filter(|(_, c)| c.running) {
        let group = format!("{group}/{}", c.id);
        let u = ctx.cgroups.usage(&group);
        let mut one = object([
            ("name", json!(name)),
            ("startTime", json!(began.get(name.as_str()))),
            ("cpu", cpu(stats, &group, time, u.cpu_nanos, ctx.cgroups.pressure(&group, "cpu"))),
            ("memory", memory(time, &u, ctx.cgroups.pressure(&group, "memory"))),
            ("io", io(time, ctx.cgroups.pressure(&group, "io"))),
            ("swap", swap(time, &u)),
        ]);
        if !brief {
            let (layer, logs) = places(ctx, pod, name, c.attempt);
            let layer = stats.disk(layer);
            let logs = stats.disk(logs);
            own += layer;
            own += logs;
            one["rootfs"] = file_system(ctx, time, Some(layer));
            one["logs"] = file_system(ctx, time, Some(logs));
        }
        containers.push(one);
    }
    let u = ctx.cgroups.usage(&group);
    let mut out = object([
        (
            "podRef",
            json!({"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": s.mirror_uid.as_deref().unwrap_or(uid)}),
        ),
        ("startTime", json!(status.and_then(|s| s.start_time.as_ref()).map(|t| t.0.to_string()))),
        ("containers", json!(containers)),
        ("cpu", cpu(stats, &group, time, u.cpu_nanos, ctx.cgroups.pressure(&group, "cpu"))),
        ("memory", memory(time, &u, ctx.cgroups.pressure(&group, "memory"))),
        ("io", io(time, ctx.cgroups.pressure(&group, "io"))),
        ("swap", swap(time, &u)),
        ("process_stats", json!({"process_count": u.processes.unwrap_or(0)})),
    ]);
    if brief {
        return Some(out);
    }
    if let (false, Some(dev)) = (s.host_network, pod_net_dev(ctx, uid)) {
        out["network"] = network(time, &dev, Some("eth0"));
    }
    for (name, path) in empty_dirs(ctx, pod) {
        let used = stats.disk(path);
        own += used;
        let mut v = file_system(ctx, time, Some(used));
        v["name"] = json!(name);
        volumes.push(v);
    }
    out["volume"] = json!(volumes);
    out["ephemeral-storage"] = file_system(ctx, time, Some(own));
    Some(out)
}

/// Volumes whose drivers tell of them, by the UID of their pod.
type Told = HashMap<String, Vec<Value>>;

/// What drivers tell of the volumes of pods that run.
pub(crate) async fn volumes(ctx: &Context) -> Told {
    let mut all = ctx.table.all();
    all.retain(|s| s.containers.values().any(|c| c.running));
    let pods: Vec<&Pod> = all.iter().map(|s| &*s.pod).collect();
    csi::usage::of_pods(ctx, &pods).await
}

/// The Summary; `brief` leaves out all that has to do with disks and networks.
pub(crate) async fn summary(ctx: Arc<Context>, brief: bool) -> Value {
    let mut told = if brief { Told::new() } else { volumes(&ctx).await };
    let work = move || {
        let time = now();
        ctx.stats.forget_old();
        let mut all = ctx.table.all();
        all.retain(|s| s.containers.values().any(|c| c.running));
        all.sort_by_key(|s| (sandbox::namespace(&s.pod).to_string(), sandbox::name(&s.pod).to_string()));
        let mut volumes = |s: &Snapshot| told.remove(sandbox::uid(&s.pod)).unwrap_or_default();
        let pods: Vec<Value> = all.iter().filter_map(|s| pod(&ctx, s, &time, brief, volumes(s))).collect();
        json!({"node": node(&ctx, &time, brief), "pods": pods})
    };
    // Trees may be large and disks slow.
    tokio::task::spawn_blocking(work).await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_happened_since_the_last_question() {
        let s = Stats::default();
        assert_eq!(s.rate("g", 1000), None);
        s.samples.lock().get_mut("g").unwrap().at -= Duration::from_secs(10);
        let rate = s.rate("g", 1000 + 5_000_000_000).unwrap();
        assert!((499_000_000..=500_000_000).contains(&rate), "{rate}");
        // At once again: too short a time to say more.
        assert_eq!(s.rate("g", 9_000_000_000), Some(rate));
    }

    #[test]
    fn a_load_forgets_what_was() {
        let s = Stats::default();
        assert_eq!(s.load("g", 4, 1), (4.0, 1.0));
        s.loads.lock().get_mut("g").unwrap().at -= DECAY;
        let (running, blocked) = s.load("g", 0, 0);
        let left = (-1.0_f64).exp();
        assert!((running - 4.0 * left).abs() < 0.01 && (blocked - left).abs() < 0.01, "{running} {blocked}");
        s.loads.lock().get_mut("g").unwrap().at -= KEPT;
        s.forget_old();
        assert!(s.loads.lock().is_empty());
    }

    #[test]
    fn pressure_is_read_from_the_kernels_words() {
        let text =
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=2000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let all = psi(Some(text.into()));
        assert_eq!(all["some"], json!({"total": 2_000_000, "avg10": 1.5, "avg60": 0.25, "avg300": 0.0}));
        assert_eq!(all["full"]["total"], 7000);
        assert_eq!(psi(None), Value::Null);
        assert_eq!(psi(Some(text.lines().next().unwrap().into()))["full"]["total"], 0);
    }

    #[test]
    fn links_are_read_from_proc() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 90 2 1 0 0 0 0 0 70 3 4 0 0 0 0 0\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].0.as_str(), all[0].1[0], all[0].1[8], all[0].1[10]), ("eth0", 90, 70, 4));
    }

    #[test]
    fn this_machine_uses_something() {
        let (u, own) = (machine_usage(), agent_usage());
        assert!(u.cpu_nanos.unwrap() > 0 && u.memory_working_set.unwrap() <= u.memory_usage.unwrap());
        assert!(own.memory_rss.unwrap() <= own.memory_usage.unwrap() && own.cpu_nanos.is_some());
    }
}
