//! Keeps the node from running out of memory, disk and processes: unused images go first, then pods, one at a time.
//!
//! In: the machine's numbers, looked at when the kernel tells of memory pressure and otherwise every ten seconds. Out: the
//! node's pressure conditions, images removed, pods told to fail as `Evicted`. What is decided is decided in [`pressure`] and
//! [`ranking`].

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Pod;
use tokio_util::sync::CancellationToken;

use super::{
    images::Collector,
    info,
    pressure::{Monitor, Observations, Observed, Threshold},
    psi,
    ranking::{self, Candidate, Storage},
};
use crate::{
    context::Context,
    events::Kind,
    pods::table::Snapshot,
    qos,
    stats::{self, disk},
};

/// How often the machine's numbers are looked at when nothing else wakes this.
const EVERY: Duration = Duration::from_secs(10);
/// How long an evicted pod may take to end before the next one goes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long after a pod is gone its disk and memory are believed to be free: file systems free large files in the background.
const SETTLE: Duration = Duration::from_secs(1);

fn signed(v: u64) -> i64 {
    i64::try_from(v).unwrap_or(i64::MAX)
}

/// What the machine has left.
fn observe(ctx: &Context) -> Observations {
    let mut all = Observations::new();
    let memory = ctx.machine.memory;
    all.insert("memory.available", Observed { available: info::memory_available(), capacity: memory });
    let used = ctx.cgroups.usage(ctx.cgroups.root()).memory_working_set.map_or(0, signed);
    let allocatable = ctx.machine.allocatable.memory;
    all.insert("allocatableMemory.available", Observed { available: allocatable - used, capacity: allocatable });
    if let Some((size, free, inodes, inodes_free)) = info::disk(&ctx.config.paths.state()) {
        let space = Observed { available: signed(free), capacity: signed(size) };
        for signal in ["nodefs.available", "imagefs.available", "containerfs.available"] {
            all.insert(signal, space);
        }
        // Some file systems do not count inodes.
        if inodes > 0 {
            let files = Observed { available: signed(inodes_free), capacity: signed(inodes) };
            for signal in ["nodefs.inodesFree", "imagefs.inodesFree", "containerfs.inodesFree"] {
                all.insert(signal, files);
            }
        }
    }
    if let Some((most, now)) = stats::processes() {
        all.insert("pid.available", Observed { available: signed(most) - signed(now), capacity: signed(most) });
    }
    all
}

/// Runs until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut e = Eviction { monitor: Monitor::new(&ctx.config.kubelet), images: Collector::default(), going: None, ctx };
    let mut stalls = psi::memory();
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // All arms are cancel-safe: a tick or stall not seen now is seen in the next round.
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
            () = psi::next(&mut stalls) => {}
            // Whether another one has to go is seen at once.
            () = e.gone() => {}
        }
        e.round().await;
    }
}

struct Eviction {
    ctx: Arc<Context>,
    monitor: Monitor,
    images: Collector,
    going: Option<Going>,
}

/// A pod on its way out.
struct Going {
    uid: String,
    since: Instant,
    /// When it was noticed that it had given back all it had.
    gone: Option<Instant>,
}

impl Eviction {
    async fn round(&mut self) {
        let ctx = self.ctx.clone();
        self.forget_gone();
        let seen = observe(&ctx);
        let (pressure, act) = self.monitor.observe(&seen, Instant::now());
        ctx.pressure.send_if_modified(|now| std::mem::replace(now, pressure) != pressure);
        self.images.look(&ctx);
        self.images.by_thresholds(&ctx);
        self.storage_limits().await;
        let Some(first) = act.first().filter(|_| self.going.is_none()) else { return };
        let resource = first.resource();
        tracing::warn!(signal = first.signal, value = first.value, "the node is short of {resource}");
        let text = format!("Attempting to reclaim {resource}");
        ctx.events.node(&ctx.node_name, Kind::Warning, "EvictionThresholdMet", text);
        if matches!(resource, "ephemeral-storage" | "inodes") && self.images.all_unused(&ctx) > 0 {
            let again = observe(&ctx);
            if again.get(first.signal.as_str()).is_some_and(|o| o.available >= first.amount(o.capacity)) {
                return;
            }
        }
        self.evict(first, &seen).await;
    }

    /// Whoever is gone for long enough, or takes too long, is waited for no more.
    fn forget_gone(&mut self) {
        self.going.take_if(|g| match g.gone {
            Some(at) => at.elapsed() >= SETTLE,
            None => g.since.elapsed() >= PATIENCE,
        });
    }

    /// Resolves when the pod on its way out has given back all it had; never without one.
    async fn gone(&mut self) {
        let mut changes = self.ctx.table.changes();
        let Some(going) = &mut self.going else { return std::future::pending().await };
        while self.ctx.table.holds(&going.uid) {
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
        let at = *going.gone.get_or_insert_with(Instant::now);
        tokio::time::sleep_until((at + SETTLE).into()).await;
    }

    fn candidates(&self) -> Vec<Arc<Snapshot>> {
        let mut all = self.ctx.table.all();
        all.retain(|s| s.containers.values().any(|c| c.running) && !ranking::spared(&s.pod));
        all
    }

    async fn evict(&mut self, t: &Threshold, seen: &Observations) {
        let resource = t.resource();
        let (ctx, pods) = (self.ctx.clone(), self.candidates());
        let measured = tokio::task::spawn_blocking(move || {
            pods.into_iter().map(|s| (used(&ctx, &s, resource), s)).collect::<Vec<_>>()
        });
        let Ok(measured) = measured.await else { return };
        let candidates = measured.iter().filter_map(|(used, s)| {
            let spec = s.pod.spec.as_ref()?;
            let requested = if matches!(resource, "memory" | "ephemeral-storage") {
                qos::pod_amount(spec, resource).0 / 1000
            } else {
                0
            };
            Some(Candidate {
                uid: s.pod.metadata.uid.clone()?,
                used: used.iter().map(|(_, u)| u).sum(),
                requested,
                priority: spec.priority.unwrap_or(0),
            })
        });
        let order = ranking::rank(candidates.collect(), resource);
        let Some(first) = order.first() else {
            tracing::warn!("no pod can be evicted");
            return;
        };
        let chosen = measured.iter().find(|(_, s)| s.pod.metadata.uid.as_ref() == Some(&first.uid));
        let Some((used, s)) = chosen else { return };
        let o = seen.get(t.signal.as_str()).copied().unwrap_or_default();
        let text = ranking::message(&s.pod, resource, t.amount(o.capacity), o.available, used);
        let soft = t.grace.is_some().then_some(self.ctx.config.kubelet.eviction_max_pod_grace_period);
        let own = s.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        self.ctx.metrics.count("kubelet_evictions", [("eviction_signal", t.signal.as_str())]);
        self.send_away(s, text, soft.map_or(1, |most| own.min(most)));
    }

    fn send_away(&mut self, s: &Snapshot, message: String, grace: i64) {
        tracing::warn!(pod = s.pod.metadata.name, message, "evicting");
        self.ctx.events.pod(&s.pod, Kind::Warning, "Evicted", &message);
        s.worker.fail("Evicted", message, grace);
        let uid = s.pod.metadata.uid.clone();
        self.going = uid.map(|uid| Going { uid, since: Instant::now(), gone: None });
    }

    /// Pods that use more of the disk than they said they would.
    async fn storage_limits(&mut self) {
        let (ctx, mut pods) = (self.ctx.clone(), self.ctx.table.all());
        let running = |s: &Snapshot| s.containers.values().any(|c| c.running);
        pods.retain(|s| running(s) && ranking::limits_storage(&s.pod) && !is_static(&s.pod));
        if pods.is_empty() {
            return;
        }
        let measured = tokio::task::spawn_blocking(move || {
            pods.into_iter().map(|s| (stats::pod_disk(&ctx, &s), s)).collect::<Vec<_>>()
        });
        for (d, s) in measured.await.unwrap_or_default() {
            let of = |list: &[(String, disk::Used)]| {
                list.iter().map(|(n, u)| (n.clone(), signed(u.bytes))).collect::<Vec<_>>()
            };
            let (containers, volumes) = (of(&d.containers), of(&d.volumes));
            let used = Storage { containers: &containers, volumes: &volumes };
            if let Some(text) = ranking::over_storage(&s.pod, &used) {
                self.ctx.metrics.count("kubelet_evictions", [("eviction_signal", "ephemeralcontainerfs.limit")]);
                self.send_away(&s, text, 1);
            }
        }
    }
}

fn is_static(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(crate::sources::SOURCE))
}

/// What a pod uses of a resource, by container; what no container has for itself stands under an empty name.
fn used(ctx: &Context, s: &Snapshot, resource: &str) -> Vec<(String, i64)> {
    let Some(spec) = &s.pod.spec else { return Vec::new() };
    let group = ctx.cgroups.pod_group(qos::class(spec), s.pod.metadata.uid.as_deref().unwrap_or_default());
    let running = s.containers.iter().filter(|(_, c)| c.running);
    match resource {
        "memory" => running
            .map(|(name, c)| {
                let used = ctx.cgroups.usage(&format!("{group}/{}", c.id)).memory_working_set;
                (name.clone(), used.map_or(0, signed))
            })
            .collect(),
        "pids" => vec![(String::new(), ctx.cgroups.usage(&group).processes.map_or(0, signed))],
        _ => {
            let d = stats::pod_disk(ctx, s);
            let number = |u: disk::Used| signed(if resource == "inodes" { u.inodes } else { u.bytes });
            let volumes = d.volumes.into_iter().map(|(_, u)| (String::new(), number(u)));
            d.containers.into_iter().map(|(n, u)| (n, number(u))).chain(volumes).collect()
        }
    }
}

/// Why a node under pressure does not take a new pod: best-effort ones suffer first from a shortage of memory.
pub(crate) fn refuses(ctx: &Context, pod: &Pod) -> Option<(String, String)> {
    let pressure = *ctx.pressure.borrow();
    let spec = pod.spec.as_ref()?;
    if ranking::spared(pod) || pressure.names().is_empty() {
        return None;
    }
    let tolerates = spec.tolerations.iter().flatten().any(|t| {
        let key = t.key.as_deref().unwrap_or("");
        let effect = t.effect.as_deref().unwrap_or("");
        matches!(key, "" | "node.kubernetes.io/memory-pressure") && matches!(effect, "" | "NoSchedule")
    });
    let only_memory = pressure.names() == ["MemoryPressure"];
    if only_memory && (qos::class(spec) != qos::Qos::BestEffort || tolerates) {
        return None;
    }
    let text = format!("The node had condition: [{}]. ", pressure.names().join(" "));
    Some(("Evicted".into(), text))
}
