//! Giving a pod's containers their processors and memory when this node takes it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{
    Managers, State, cpus,
    hints::{self, Hint, Hints, Mask, Policy},
    machine::{Cpus, Unit},
    memory::{self, Wanted},
};
use crate::{
    devices::Devices,
    metrics::Metrics,
    pods::sandbox,
    qos::{self, Qos},
    quantity,
};

/// Why a pod is refused: reason and message.
type Refusal = (&'static str, String);

fn unexpected(error: impl std::fmt::Display) -> Refusal {
    let text = format!("Pod was rejected: Allocate failed due to {error}, which is unexpected");
    ("UnexpectedAdmissionError", text)
}

/// What a container requests of a resource: whole units, and whether there is a rest.
fn request(c: &Container, name: &str) -> (u64, bool) {
    let r = c.resources.as_ref();
    let of = |l| quantity::get_millis(l, name).filter(|m| *m > 0);
    let milli = r.and_then(|r| of(r.requests.as_ref()).or_else(|| of(r.limits.as_ref()))).unwrap_or(0);
    (u64::try_from(milli / 1000).unwrap_or(0), milli % 1000 != 0)
}

/// What all of a pod needs when each container needs so much: init containers run one by one beside earlier sidecars.
fn whole_pod(spec: &PodSpec, need: impl Fn(&Container) -> u64) -> u64 {
    let (mut sidecars, mut peak) = (0, 0);
    for c in spec.init_containers.iter().flatten() {
        if qos::is_sidecar(c) {
            sidecars += need(c);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars + need(c));
        }
    }
    peak.max(sidecars + spec.containers.iter().map(need).sum::<u64>())
}

/// The pod's init containers before one that have ended by the time it starts.
fn ended_before<'a>(spec: &'a PodSpec, name: &str) -> Vec<&'a str> {
    let init = spec.init_containers.iter().flatten().take_while(|c| c.name != name);
    init.filter(|c| !qos::is_sidecar(c)).map(|c| c.name.as_str()).collect()
}

/// A pod on its way in.
struct Pass<'a> {
    managers: &'a Managers,
    uid: &'a str,
    pod: &'a Pod,
    spec: &'a PodSpec,
    devices: &'a Devices,
    state: State,
}

impl Managers {
    /// Gives a pod what it is to have for itself; what it has already stays. Nothing is given to one that is refused.
    pub(crate) fn admit(&self, pod: &Pod, devices: &Devices, metrics: &Metrics) -> Result<(), Refusal> {
        let Some(spec) = &pod.spec else { return Ok(()) };
        let devices_wanted = self.settings.topology != Policy::None && devices.lacks(pod);
        if !devices_wanted && !qos::all_containers(spec).any(|c| self.lacks(pod, spec, c)) {
            return Ok(());
        }
        let begun = std::time::Instant::now();
        metrics.count("kubelet_topology_manager_admission_requests_total", []);
        let result = {
            let mut state = self.state.lock();
            let mut pass = Pass { managers: self, uid: sandbox::uid(pod), pod, spec, devices, state: state.clone() };
            pass.run(metrics).map(|()| *state = pass.state)
        };
        metrics.observe("kubelet_topology_manager_admission_duration_ms", [], begun.elapsed() * 1000);
        match &result {
            Ok(()) => self.save(),
            Err(_) => metrics.count("kubelet_topology_manager_admission_errors_total", []),
        }
        result
    }

    /// Processors a container is to have for itself: whole ones of a guaranteed pod.
    fn own_cpus(&self, spec: &PodSpec, c: &Container) -> usize {
        if self.settings.cpu.is_none() || qos::class(spec) != Qos::Guaranteed || has_pod_resources(spec) {
            return 0;
        }
        match request(c, "cpu") {
            (count, false) => usize::try_from(count).unwrap_or(0),
            (_, true) => 0,
        }
    }

    /// Memory a container is to have for itself.
    fn own_memory(&self, spec: &PodSpec, need: impl Fn(&str) -> u64, c: Option<&Container>) -> Wanted {
        if !self.settings.memory || qos::class(spec) != Qos::Guaranteed || has_pod_resources(spec) {
            return Wanted::new();
        }
        let of = |c: &Container| {
            let requests = c.resources.iter().flat_map(|r| r.requests.iter().chain(&r.limits)).flatten();
            requests.map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let names = match c {
            Some(c) => of(c),
            None => qos::all_containers(spec).flat_map(of).collect(),
        };
        let ours = names.into_iter().filter(|n| n == "memory" || n.starts_with("hugepages-"));
        ours.map(|name| (name.clone(), need(&name))).filter(|(_, size)| *size > 0).collect()
    }

    fn memory_of(&self, spec: &PodSpec, c: &Container) -> Wanted {
        self.own_memory(spec, |name| request(c, name).0, Some(c))
    }

    /// Whether a container is to have something that it does not have yet.
    fn lacks(&self, pod: &Pod, spec: &PodSpec, c: &Container) -> bool {
        let uid = sandbox::uid(pod);
        self.own_cpus(spec, c) > 0 && self.exclusive(uid, &c.name).is_empty()
            || !self.memory_of(spec, c).is_empty() && self.memory(uid, &c.name).is_empty()
    }
}

fn has_pod_resources(spec: &PodSpec) -> bool {
    spec.resources.as_ref().is_some_and(|r| r.requests.is_some() || r.limits.is_some())
}

impl Pass<'_> {
    fn run(&mut self, metrics: &Metrics) -> Result<(), Refusal> {
        let together = self.managers.settings.whole_pod.then(|| self.hint(None)).transpose()?;
        for c in qos::all_containers(self.spec) {
            let hint = together.map_or_else(|| self.hint(Some(c)), Ok)?;
            self.state.affinity.entry(self.uid.into()).or_default().insert(c.name.clone(), hint);
            self.give_cpus(c, hint.mask, metrics).map_err(|(reason, why)| match reason {
                "" => unexpected(why),
                reason => (reason, format!("Pod was rejected: {why}")),
            })?;
            self.give_memory(c, hint, metrics).map_err(unexpected)?;
        }
        Ok(())
    }

    /// Where all of a container, or of the pod, is to come from.
    fn hint(&self, c: Option<&Container>) -> Result<Hint, Refusal> {
        let m = self.managers;
        if m.settings.topology == Policy::None {
            return Ok(Hint::default());
        }
        let mut all: Vec<Hints> = Vec::new();
        all.extend(self.cpu_hints(c));
        all.extend(self.memory_hints(c));
        all.extend(self.devices.hints(self.pod, c, &m.topology));
        match m.settings.merger().merge(&m.topology, &all) {
            (hint, true) => Ok(hint),
            (_, false) => {
                let text = "Pod was rejected: Resources cannot be allocated with Topology locality";
                Err(("TopologyAffinityError", text.into()))
            }
        }
    }

    fn has_cpus(&self, c: &Container) -> Option<&Cpus> {
        self.state.exclusive.get(self.uid)?.get(&c.name)
    }

    fn cpu_hints(&self, c: Option<&Container>) -> Option<Hints> {
        let m = self.managers;
        let own = |c: &Container| m.own_cpus(self.spec, c) as u64;
        let wanted = c.map_or_else(|| whole_pod(self.spec, own), own);
        if wanted == 0 {
            return None;
        }
        let reusable = c.map(|c| self.reusable_cpus(c)).unwrap_or_default();
        let free = match c.and_then(|c| self.has_cpus(c)) {
            Some(own) => own.clone(),
            None => self.free().difference(&reusable).copied().collect(),
        };
        let t = &m.topology;
        let within = |cpus: &Cpus, mask: Mask| t.near(cpus, mask).len();
        let can = |mask: Mask| {
            let again = within(&reusable, mask);
            (again == reusable.len()).then(|| (again + within(&free, mask)) as u64)
        };
        let mut hints = hints::generate(t, wanted, |mask| within(&t.all(), mask) as u64, can);
        if m.settings.cpu.is_some_and(|o| o.by_socket) {
            self.align_by_socket(wanted, &mut hints);
        }
        Some(Some(hints))
    }

    /// Nodes of as few sockets as would do are as good as one node.
    fn align_by_socket(&self, wanted: u64, hints: &mut [Hint]) {
        let t = &self.managers.topology;
        let all = t.all();
        let sockets = |mask: Mask| t.units(&t.near(&all, mask), Unit::Socket).len();
        let least = usize::try_from(wanted).unwrap_or(usize::MAX).div_ceil(t.per(Unit::Socket));
        for h in hints.iter_mut().filter(|h| h.mask.is_some_and(|m| sockets(m) <= least)) {
            h.preferred = true;
        }
    }

    fn memory_hints(&self, c: Option<&Container>) -> Vec<Hints> {
        let m = self.managers;
        let wanted = match c {
            Some(c) => m.memory_of(self.spec, c),
            None => m.own_memory(self.spec, |name| whole_pod(self.spec, |c| request(c, name).0), None),
        };
        if wanted.is_empty() {
            return Vec::new();
        }
        if let Some(blocks) = c.and_then(|c| self.state.blocks.get(self.uid)?.get(&c.name)) {
            return memory::given(blocks).into_iter().map(|(_, hints)| hints).collect();
        }
        let machine = memory::account(&m.empty, &self.state.blocks);
        let earlier = c.map(|c| self.earlier_blocks(c)).unwrap_or_default();
        let again = |mask: Mask, name: &str| memory::reusable(&earlier, mask, name);
        memory::hints(&m.topology, &machine, &wanted, &again).into_values().map(Some).collect()
    }

    /// Processors that are shared now and may become somebody's own.
    fn free(&self) -> Cpus {
        self.state.shared.difference(&self.managers.kept).copied().collect()
    }

    /// Processors of init containers that have ended, less what others of the pod have taken over since.
    fn reusable_cpus(&self, c: &Container) -> Cpus {
        let Some(given) = self.state.exclusive.get(self.uid) else { return Cpus::new() };
        let ended = ended_before(self.spec, &c.name);
        let mut again: Cpus = ended.iter().filter_map(|name| given.get(*name)).flatten().copied().collect();
        for (_, cpus) in given.iter().filter(|(name, _)| !ended.contains(&name.as_str())) {
            again.retain(|cpu| !cpus.contains(cpu));
        }
        again
    }

    /// Gives processors; the error is a reason, empty for an unexpected one, and a text.
    fn give_cpus(
        &mut self,
        c: &Container,
        mask: Option<Mask>,
        metrics: &Metrics,
    ) -> Result<(), (&'static str, String)> {
        let m = self.managers;
        let count = m.own_cpus(self.spec, c);
        let Some(options) = m.settings.cpu.filter(|_| count > 0 && self.has_cpus(c).is_none()) else { return Ok(()) };
        metrics.count("kubelet_cpu_manager_pinning_requests_total", []);
        let given = self.choose_cpus(c, count, mask, options);
        let cpus = given.inspect_err(|_| metrics.count("kubelet_cpu_manager_pinning_errors_total", []))?;
        self.state.shared.retain(|cpu| !cpus.contains(cpu));
        self.state.exclusive.entry(self.uid.into()).or_default().insert(c.name.clone(), cpus);
        Ok(())
    }

    fn choose_cpus(
        &self,
        c: &Container,
        count: usize,
        mask: Option<Mask>,
        options: cpus::Options,
    ) -> Result<Cpus, (&'static str, String)> {
        let t = &self.managers.topology;
        let free: Cpus = self.free().union(&self.reusable_cpus(c)).copied().collect();
        let aligned = |reason: &str| ("SMTAlignmentError", format!("SMT Alignment Error: {reason}"));
        if options.full_cores {
            let per = t.per(Unit::Core);
            if !count.is_multiple_of(per) {
                return Err(aligned(&format!("requested {count} cpus not multiple cpus per core = {per}")));
            }
            let all = t.all();
            let whole = |core: &u32| t.within(&all, Unit::Core, *core).is_subset(&free);
            let there = t.units(&free, Unit::Core).iter().filter(|core| whole(core)).count() * per;
            if there < count {
                return Err(aligned(&format!(
                    "not enough free physical CPUs: available physical CPUs = {there}, requested CPUs = {count}, CPUs per \
                     core = {per}"
                )));
            }
        }
        let text = |why| ("", why);
        let near = mask.map(|mask| t.near(&free, mask)).unwrap_or_default();
        let mut taken = cpus::take(t, &near, near.len().min(count), options).map_err(text)?;
        let left: Cpus = free.difference(&taken).copied().collect();
        taken.extend(cpus::take(t, &left, count - taken.len(), options).map_err(text)?);
        Ok(taken)
    }

    fn earlier_blocks(&self, c: &Container) -> Vec<&Vec<memory::Block>> {
        let given = self.state.blocks.get(self.uid);
        ended_before(self.spec, &c.name).into_iter().filter_map(|name| given?.get(name)).collect()
    }

    fn give_memory(&mut self, c: &Container, hint: Hint, metrics: &Metrics) -> Result<(), String> {
        let m = self.managers;
        let wanted = m.memory_of(self.spec, c);
        if wanted.is_empty() || self.state.blocks.get(self.uid).is_some_and(|p| p.contains_key(&c.name)) {
            return Ok(());
        }
        metrics.count("kubelet_memory_manager_pinning_requests_total", []);
        let machine = memory::account(&m.empty, &self.state.blocks);
        let earlier = self.earlier_blocks(c);
        let again = |mask: Mask, name: &str| memory::reusable(&earlier, mask, name);
        let chosen = memory::choose(&m.topology, &machine, &wanted, hint, &again);
        let mask = chosen.inspect_err(|_| metrics.count("kubelet_memory_manager_pinning_errors_total", []))?;
        self.book(c, mask, wanted);
        Ok(())
    }

    /// Writes a container's blocks down. What it takes over from init containers is no longer theirs.
    fn book(&mut self, c: &Container, mask: Mask, wanted: Wanted) {
        let nodes: Vec<u32> = mask.nodes().collect();
        let ended = ended_before(self.spec, &c.name);
        let pod: &mut BTreeMap<String, Vec<memory::Block>> = self.state.blocks.entry(self.uid.into()).or_default();
        for (name, size) in &wanted {
            let mut left = *size;
            for init in &ended {
                let blocks = pod.get_mut(*init).into_iter().flatten();
                for block in blocks.filter(|b| b.resource == *name && b.numa_affinity == nodes) {
                    let part = left.min(block.size);
                    block.size -= part;
                    left -= part;
                }
            }
        }
        let block = |(resource, size)| memory::Block { numa_affinity: nodes.clone(), resource, size };
        pod.insert(c.name.clone(), wanted.into_iter().map(block).collect());
    }
}
