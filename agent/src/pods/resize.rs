//! In-place resize: what a pod has been given of cpu and memory, and how it comes to have what it wants.
//!
//! The API's pod says what is wanted. What the pod has been allocated is remembered in its state and stands in for the
//! spec's resources everywhere else in the agent ([`Allocation::put`]). A change is judged ([`judge`]): it fits and is
//! allocated, waits for room (`Deferred`) or can never be (`Infeasible`). What is allocated is then carried to the cgroups
//! of running containers, or to their next instance where `resizePolicy` asks for a restart.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use isopod_runtime::supervisor::protocol::Op;
use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    manager, sandbox,
    worker::{Input, Worker},
};
use crate::{
    context::Context,
    events::Kind,
    qos::{self, Limits, Qos},
    quantity,
    runtime::Supervisor,
    spec::{self, field::Allocatable},
};

/// Pause before a resize that the kernel refused is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Resources allocated to a pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Allocation {
    containers: BTreeMap<String, ResourceRequirements>,
    pod: Option<ResourceRequirements>,
}

/// Where a resize stands, as conditions tell it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Resize {
    /// `PodResizePending`: reason and message.
    pub(crate) pending: Option<(String, String)>,
    /// `PodResizeInProgress`.
    pub(crate) in_progress: bool,
    /// Why it does not get on.
    pub(crate) error: Option<String>,
}

/// What becomes of a wish.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Fits,
    Deferred(String),
    Infeasible(String),
}

impl Allocation {
    /// What a spec asks for.
    pub(super) fn of(spec: &PodSpec) -> Self {
        let containers =
            qos::all_containers(spec).map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect();
        Self { containers, pod: spec.resources.clone() }
    }

    /// The pod with these resources in place of those it asks for.
    pub(super) fn put(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        let Some(spec) = &pod.spec else { return pod.clone() };
        if *self == Self::of(spec) {
            return pod.clone();
        }
        let mut pod = Pod::clone(pod);
        if let Some(spec) = &mut pod.spec {
            spec.resources.clone_from(&self.pod);
            for c in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
                if let Some(r) = self.containers.get(&c.name) {
                    c.resources = Some(r.clone());
                }
            }
        }
        Arc::new(pod)
    }

    /// Whether a spec asks for the same amounts.
    fn fits(&self, spec: &PodSpec) -> bool {
        let of = |c: &Container| self.containers.get(&c.name).cloned();
        same(self.pod.as_ref(), spec.resources.as_ref())
            && qos::all_containers(spec).all(|c| same(of(c).as_ref(), c.resources.as_ref()))
    }
}

fn amounts(r: Option<&ResourceRequirements>, resource: &str) -> [Option<i64>; 2] {
    let of = |l: Option<&BTreeMap<String, Quantity>>| quantity::get_millis(l, resource);
    [r.and_then(|r| of(r.requests.as_ref())), r.and_then(|r| of(r.limits.as_ref()))]
}

fn same(a: Option<&ResourceRequirements>, b: Option<&ResourceRequirements>) -> bool {
    ["cpu", "memory"].iter().all(|r| amounts(a, r) == amounts(b, r))
}

/// Whether the node can give what is wanted. `others` is what its other pods request: millicores and bytes.
fn judge(wanted: &PodSpec, allocated: &PodSpec, others: (i64, i64), node: Allocatable) -> Verdict {
    let of = |s: &PodSpec| (qos::pod_amount(s, "cpu").0, qos::pod_amount(s, "memory").0 / 1000);
    let ((cpu, memory), (cpu_now, memory_now)) = (of(wanted), of(allocated));
    let never = |what: &str, requested: i64, capacity: i64| {
        Verdict::Infeasible(format!(
            "Node didn't have enough capacity: {what}, requested: {requested}, capacity: {capacity}"
        ))
    };
    let later = |what: &str, requested: i64, used: i64, capacity: i64| {
        Verdict::Deferred(format!(
            "Node didn't have enough resource: {what}, requested: {requested}, used: {used}, capacity: {capacity}"
        ))
    };
    match () {
        () if memory > node.memory => never("memory", memory, node.memory),
        () if cpu > node.cpu_milli => never("cpu", cpu, node.cpu_milli),
        () if cpu > cpu_now && cpu + others.0 > node.cpu_milli => later("cpu", cpu, others.0, node.cpu_milli),
        () if memory > memory_now && memory + others.1 > node.memory => later("memory", memory, others.1, node.memory),
        () => Verdict::Fits,
    }
}

/// Whether the container's policy asks for a restart for what has changed.
fn restarts(c: &Container, now: Option<&ResourceRequirements>) -> bool {
    ["cpu", "memory"].iter().any(|r| {
        amounts(now, r) != amounts(c.resources.as_ref(), r)
            && c.resize_policy
                .iter()
                .flatten()
                .any(|p| p.resource_name == **r && p.restart_policy == "RestartContainer")
    })
}

/// The roomier of two sets of limits.
fn roomier(a: Limits, b: Limits) -> Limits {
    let most = |a: Option<i64>, b: Option<i64>| a.zip(b).map(|(a, b)| a.max(b));
    Limits {
        cpu_shares: a.cpu_shares.max(b.cpu_shares),
        cpu_quota: most(a.cpu_quota, b.cpu_quota),
        memory: most(a.memory, b.memory),
        ..b
    }
}

/// A change of running containers' groups.
struct Change {
    ctx: Arc<Context>,
    group: String,
    supervisor: Supervisor,
    before: Limits,
    after: Limits,
    /// Container id, new resources as the API writes them, their kernel numbers.
    containers: Vec<(String, Value, Value)>,
}

impl Change {
    /// The pod's group first gets room, then its containers change, then it takes its final size.
    async fn run(self) -> (Vec<(String, Value)>, Result<(), String>) {
        let mut done = Vec::new();
        let result = self.apply(&mut done).await;
        (done, result)
    }

    async fn apply(&self, done: &mut Vec<(String, Value)>) -> Result<(), String> {
        self.ctx.cgroups.limit(&self.group, &roomier(self.before, self.after)).map_err(|e| e.to_string())?;
        for (id, resources, numbers) in &self.containers {
            self.room(&format!("{}/{id}", self.group), "container", numbers["memory"]["limit"].as_i64())?;
            let op = Op::Update { container: id.clone(), resources: numbers.clone() };
            self.supervisor.done(op).await.map_err(|e| e.to_string())?;
            done.push((id.clone(), resources.clone()));
        }
        self.room(&self.group, "pod", self.after.memory)?;
        self.ctx.cgroups.limit(&self.group, &self.after).map_err(|e| e.to_string())
    }

    /// A limit below what is in use would kill, not shrink.
    fn room(&self, group: &str, what: &str, limit: Option<i64>) -> Result<(), String> {
        let used = self.ctx.cgroups.usage(group).memory_working_set;
        match (limit, used) {
            (Some(limit), Some(used)) if i64::try_from(used).unwrap_or(i64::MAX) > limit => {
                Err(format!("attempting to set {what} memory limit ({limit}) below current usage ({used})"))
            }
            _ => Ok(()),
        }
    }
}

impl Worker {
    /// Takes a version of the pod as the API has it: resources stay those allocated.
    pub(super) fn take_pod(&mut self, wanted: Arc<Pod>) {
        let spec = wanted.spec.clone().unwrap_or_default();
        let allocated = self.state.allocated.get_or_insert_with(|| Allocation::of(&spec));
        self.pod = allocated.put(&wanted);
        self.desired = wanted;
        self.pods.send_replace(self.pod.clone());
    }

    /// Judges a wish for other resources and carries out what is allocated. When to come back, if by time.
    pub(super) fn resize(&mut self) -> Option<Instant> {
        if self.terminating || self.state.finished {
            return None;
        }
        let (wanted, allocated) = (self.desired.spec.clone()?, self.state.allocated.clone()?);
        if allocated.fits(&wanted) {
            if self.state.resize.pending.take().is_some() {
                self.dirty = true;
            }
        } else {
            self.consider(&wanted);
        }
        if self.state.resize.in_progress && !self.resizing {
            if let Some(at) = self.resize_again.filter(|at| *at > Instant::now()) {
                return Some(at);
            }
            self.actuate();
        }
        None
    }

    fn consider(&mut self, wanted: &PodSpec) {
        let now = self.pod.spec.clone().unwrap_or_default();
        let all = self.ctx.table.all();
        let of = |r: &str| manager::requested(&all, r) - qos::pod_amount(&now, r).0;
        let others = (of("cpu").max(0), (of("memory") / 1000).max(0));
        let pending =
            match self.pinned(wanted).unwrap_or_else(|| judge(wanted, &now, others, self.ctx.machine.allocatable)) {
                Verdict::Fits => {
                    let limits = self.limits.unwrap_or_else(|| self.ctx.pod_limits(self.uid(), &now));
                    self.limits = Some(limits);
                    self.state.allocated = Some(Allocation::of(wanted));
                    self.take_pod(self.desired.clone());
                    self.save_spec();
                    self.state.resize = Resize { in_progress: true, ..Resize::default() };
                    self.resize_again = None;
                    self.dirty = true;
                    self.tell_resize(Kind::Normal, "ResizeStarted", "Pod resize started: ");
                    return;
                }
                Verdict::Deferred(message) => {
                    self.wait_for_room();
                    ("Deferred".to_string(), message)
                }
                Verdict::Infeasible(message) => ("Infeasible".to_string(), message),
            };
        if self.state.resize.pending.as_ref() != Some(&pending) {
            let text = format!("Pod resize {}: ", pending.0);
            self.tell_resize(Kind::Warning, &format!("Resize{}", pending.0), &text);
            self.state.resize.pending = Some(pending);
            self.dirty = true;
        }
    }

    /// What is a guaranteed pod's own stays as it is.
    fn pinned(&self, wanted: &PodSpec) -> Option<Verdict> {
        let topology = &self.ctx.topology;
        let who = match () {
            () if qos::class(wanted) != Qos::Guaranteed => return None,
            () if topology.gives_cpus() => "CPU",
            () if topology.gives_memory() => "Memory",
            () => return None,
        };
        let text = format!("Resize is infeasible for Guaranteed Pods alongside {who} Manager static policy");
        Some(Verdict::Infeasible(text))
    }

    fn tell_resize(&self, kind: Kind, reason: &str, text: &str) {
        let spec = self.desired.spec.as_ref();
        let containers: Vec<Value> = spec
            .into_iter()
            .flat_map(qos::all_containers)
            .map(|c| json!({"name": c.name, "resources": c.resources.clone().unwrap_or_default()}))
            .collect();
        let what = json!({"containers": containers, "generation": self.desired.metadata.generation});
        self.ctx.events.pod(&self.pod, kind, reason, format!("{text}{what}"));
    }

    /// Comes back when something about the node's pods has changed.
    fn wait_for_room(&mut self) {
        if self.waits_for_room {
            return;
        }
        self.waits_for_room = true;
        let (mut changes, inputs) = (self.ctx.table.changes(), self.inputs.clone());
        tokio::spawn(async move {
            if changes.changed().await.is_ok() {
                let _ = inputs.send(Input::Room);
            }
        });
    }

    /// Brings running containers to what is allocated.
    fn actuate(&mut self) {
        let (Some(spec), Some(live)) = (self.pod.spec.clone(), self.live.clone()) else { return };
        let mut containers = Vec::new();
        let mut waits = false;
        for c in qos::all_containers(&spec) {
            let Some(record) = self.state.containers.get_mut(&c.name) else { continue };
            waits |= record.again;
            let Some(i) = record.current.as_ref().filter(|i| i.running()) else { continue };
            let now = i.resources.clone().and_then(|r| serde_json::from_value(r).ok());
            if same(now.as_ref(), c.resources.as_ref()) {
                continue;
            }
            if restarts(c, now.as_ref()) {
                record.again = true;
                waits = true;
                let text = format!("Container {} resize requires restart", c.name);
                self.stop_one(&c.name, Some(spec.termination_grace_period_seconds.unwrap_or(30)), text, Vec::new());
            } else {
                let written = serde_json::to_value(c.resources.clone().unwrap_or_default()).unwrap_or_default();
                containers.push((
                    i.id.clone(),
                    written,
                    spec::resources::resources(
                        &self.pod,
                        c,
                        &self.ctx.knobs_of(sandbox::uid(&self.pod), &c.name),
                        None,
                    ),
                ));
            }
        }
        let after = self.ctx.pod_limits(self.uid(), &spec);
        let before = self.limits.unwrap_or(after);
        if containers.is_empty() && before == after {
            if !waits {
                self.resized_all();
            }
            return;
        }
        self.resizing = true;
        let change = Change {
            ctx: self.ctx.clone(),
            group: live.sandbox.cgroup,
            supervisor: live.supervisor,
            before,
            after,
            containers,
        };
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let (done, result) = change.run().await;
            let _ = inputs.send(Input::Resized { done, result: result.map(|()| after) });
        });
    }

    /// What a change came to.
    pub(super) fn resized(&mut self, done: Vec<(String, Value)>, result: Result<Limits, String>) {
        self.resizing = false;
        self.dirty = true;
        for (id, resources) in done {
            if let Some((_, i)) = self.state.by_id(&id) {
                i.resources = Some(resources);
            }
        }
        match result {
            Ok(limits) => {
                self.limits = Some(limits);
                self.state.resize.error = None;
                if let Some(spec) = self.pod.spec.as_ref().filter(|s| qos::class(s) == Qos::Burstable) {
                    self.ctx.burstable_request(self.uid(), Some(qos::pod_amount(spec, "cpu").0));
                }
            }
            Err(error) => {
                tracing::info!(pod = sandbox::name(&self.pod), error, "not resized");
                if self.state.resize.error.as_ref() != Some(&error) {
                    self.ctx.events.pod(&self.pod, Kind::Warning, "ResizeError", format!("Pod resize error: {error}"));
                }
                self.state.resize.error = Some(error);
                self.resize_again = Some(Instant::now() + AGAIN);
            }
        }
    }

    fn resized_all(&mut self) {
        self.state.resize = Resize { pending: self.state.resize.pending.take(), ..Resize::default() };
        self.dirty = true;
        self.tell_resize(Kind::Normal, "ResizeCompleted", "Pod resize completed: ");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cpu: &str, memory: &str) -> PodSpec {
        serde_json::from_value(
            json!({"containers":[{"name":"c","resources":{"requests":{"cpu":cpu,"memory":memory}}}]}),
        )
        .unwrap()
    }

    #[test]
    fn wishes_are_judged() {
        let node = Allocatable { cpu_milli: 1000, memory: 1 << 30, storage: 0 };
        let now = spec("100m", "64Mi");
        for (wanted, others, want) in [
            (spec("200m", "64Mi"), (0, 0), Verdict::Fits),
            (
                spec("2", "64Mi"),
                (0, 0),
                Verdict::Infeasible("Node didn't have enough capacity: cpu, requested: 2000, capacity: 1000".into()),
            ),
            (
                spec("600m", "64Mi"),
                (500, 0),
                Verdict::Deferred(
                    "Node didn't have enough resource: cpu, requested: 600, used: 500, capacity: 1000".into(),
                ),
            ),
            // Less is always possible, also on a node that is over its measure.
            (spec("50m", "32Mi"), (5000, 1 << 40), Verdict::Fits),
        ] {
            assert_eq!(judge(&wanted, &now, others, node), want, "{wanted:?}");
        }
    }

    #[test]
    fn an_allocation_stands_in_for_the_spec() {
        let old = Allocation::of(&spec("100m", "64Mi"));
        let wanted = Arc::new(Pod { spec: Some(spec("200m", "64Mi")), ..Pod::default() });
        let put = old.put(&wanted);
        assert_eq!(put.spec, Some(spec("100m", "64Mi")));
        assert!(!old.fits(wanted.spec.as_ref().unwrap()));
        assert!(old.fits(&spec("0.1", "65536Ki")));
    }

    #[test]
    fn only_what_changed_asks_for_a_restart() {
        let c: Container = serde_json::from_value(json!({"name":"c","resources":{"requests":{"cpu":"2","memory":"1Gi"}},
            "resizePolicy":[{"resourceName":"cpu","restartPolicy":"NotRequired"},{"resourceName":"memory","restartPolicy":"RestartContainer"}]}))
        .unwrap();
        let now = |cpu: &str, memory: &str| spec(cpu, memory).containers[0].resources.clone();
        assert!(!restarts(&c, now("1", "1Gi").as_ref()));
        assert!(restarts(&c, now("2", "2Gi").as_ref()));
    }

    #[test]
    fn a_group_never_gets_narrower_before_its_children() {
        let l = |quota, memory| Limits { cpu_shares: 2, cpu_quota: quota, cpu_period: 1, memory, pids: None };
        assert_eq!(roomier(l(Some(1), None), l(Some(2), Some(3))), l(Some(2), None));
    }
}
