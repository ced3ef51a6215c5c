//! CPU, memory and topology managers: which processors and NUMA nodes a pod's containers have for themselves.
//!
//! In: the machine ([`machine`]), the configuration ([`settings`]), pods as they are admitted ([`admit`]). Out: refusals, the
//! processors and nodes of each container, what running containers share now ([`live`]). What was given is on disk before
//! a pod starts ([`checkpoint`]) and stays its own until it is over. The choices are pure: [`cpus`], [`memory`], [`hints`].

mod admit;
mod checkpoint;
mod cpus;
pub(crate) mod hints;
pub(crate) mod live;
pub(crate) mod machine;
mod memory;
pub(crate) mod settings;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) use self::memory::Block;
use self::{
    checkpoint::{Checkpoint, CpuState, MemoryState},
    cpus::Options,
    hints::Hint,
    machine::{Cpus, Topology, list},
    memory::{Blocks, Machine},
    settings::Settings,
};
use crate::config::KubeletConfiguration;

/// What has been given out.
#[derive(Debug, Clone, Default)]
struct State {
    /// Processors of all who have none for themselves.
    shared: Cpus,
    exclusive: BTreeMap<String, BTreeMap<String, Cpus>>,
    blocks: Blocks,
    /// Where devices are to come from, by pod and container.
    affinity: BTreeMap<String, BTreeMap<String, Hint>>,
}

/// The three managers.
pub(crate) struct Managers {
    topology: Topology,
    settings: Settings,
    /// Processors that no container has for itself.
    kept: Cpus,
    /// Memory with nothing given out.
    empty: Machine,
    dir: PathBuf,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

/// The files these managers keep, below the directory of plugins.
pub(crate) const FILES: [&str; 2] = [CpuState::FILE, MemoryState::FILE];

impl Managers {
    /// Looks at the machine and at what an earlier life gave out; what does not fit is for a person to settle.
    pub(crate) fn open(
        k: &KubeletConfiguration,
        dir: PathBuf,
        sys: &Path,
        left_out: impl Fn(&str) -> i64,
    ) -> Result<Self, String> {
        let settings = Settings::read(k)?;
        let busy = settings.cpu.is_some() || settings.memory || settings.topology != hints::Policy::None;
        let topology = if busy { Topology::read(sys)? } else { Topology::default() };
        Self::on(topology, settings, k, dir, left_out)
    }

    fn on(
        topology: Topology,
        settings: Settings,
        k: &KubeletConfiguration,
        dir: PathBuf,
        left_out: impl Fn(&str) -> i64,
    ) -> Result<Self, String> {
        settings.suit(&topology)?;
        let kept = settings.cpu.map(|_| settings::kept(k, &topology, left_out("cpu"))).transpose()?.unwrap_or_default();
        let mut empty = Machine::new();
        if settings.memory {
            let bytes = u64::try_from(left_out("memory") / 1000).unwrap_or(0);
            let reserved = settings::kept_memory(k, &topology, &[("memory".to_owned(), bytes)].into())?;
            empty = memory::empty(&topology, &reserved);
        }
        let mut managers =
            Self { topology, settings, kept, empty, dir, state: Mutex::default(), changed: watch::channel(()).0 };
        let state = managers.restore()?;
        managers.state = Mutex::new(state);
        managers.save();
        Ok(managers)
    }

    fn cpu_policy(&self) -> &'static str {
        if self.settings.cpu.is_some() { "static" } else { "none" }
    }

    fn memory_policy(&self) -> &'static str {
        if self.settings.memory { "Static" } else { "None" }
    }

    fn restore(&self) -> Result<State, String> {
        let mut state = State::default();
        let cpu = CpuState::load(&self.dir, self.cpu_policy())?;
        let memory = MemoryState::load(&self.dir, self.memory_policy())?;
        if let Some(options) = self.settings.cpu {
            match cpu {
                Some(file) => self.restore_cpus(&file, options, &mut state).map_err(|why| {
                    let path = self.dir.join(CpuState::FILE);
                    format!(
                        "start cpu manager error: static policy invalid state, please drain node and remove policy state \
                         file {path:?}: {why}"
                    )
                })?,
                None => state.shared = self.initial(options),
            }
        }
        if self.settings.memory
            && let Some(file) = memory
        {
            state.blocks = file.entries;
            self.check_memory(&file.machine_state, &state.blocks).map_err(|why| {
                let path = self.dir.join(MemoryState::FILE);
                format!(
                    "start memory manager error: static policy invalid state, please drain node and remove policy state \
                     file {path:?}: {why}"
                )
            })?;
        }
        Ok(state)
    }

    /// What is shared while nobody has anything for himself.
    fn initial(&self, o: Options) -> Cpus {
        let all = self.topology.all();
        if o.strict { all.difference(&self.kept).copied().collect() } else { all }
    }

    fn restore_cpus(&self, file: &CpuState, o: Options, state: &mut State) -> Result<(), String> {
        state.shared = machine::parse(&file.default_cpu_set)?;
        if state.shared.is_empty() {
            return Err("default cpuset cannot be empty".into());
        }
        let (kept, shared) = (list(&self.kept), list(&state.shared));
        if o.strict && !self.kept.is_disjoint(&state.shared) {
            return Err(format!("some of strictly reserved cpus: {kept:?} are present in defaultCpuSet: {shared:?}"));
        }
        if !o.strict && !self.kept.is_subset(&state.shared) {
            return Err(format!("not all reserved cpus: {kept:?} are present in defaultCpuSet: {shared:?}"));
        }
        let mut known = state.shared.clone();
        for (pod, containers) in &file.entries {
            for (container, text) in containers {
                let cpus = machine::parse(text)?;
                if !cpus.is_disjoint(&state.shared) {
                    return Err(format!(
                        "pod: {pod}, container: {container} cpuset: {text:?} overlaps with default cpuset {shared:?}"
                    ));
                }
                known.extend(&cpus);
                state.exclusive.entry(pod.clone()).or_default().insert(container.clone(), cpus);
            }
        }
        let mut there = self.topology.all();
        if o.strict {
            there.retain(|cpu| !self.kept.contains(cpu));
        }
        if known != there {
            let (there, known) = (list(&there), list(&known));
            return Err(format!("current set of available CPUs {there:?} doesn't match with CPUs in state {known:?}"));
        }
        Ok(())
    }

    /// The machine is still the one the blocks were given from. How a block lies on several nodes may differ.
    fn check_memory(&self, was: &Machine, blocks: &Blocks) -> Result<(), String> {
        let is = memory::account(&self.empty, blocks);
        let shape = |m: &Machine| {
            let table =
                |(name, t): (&String, &memory::Table)| (name.clone(), t.total, t.system_reserved, t.allocatable);
            m.iter().map(|(id, n)| (*id, n.memory_map.iter().map(table).collect::<Vec<_>>())).collect::<Vec<_>>()
        };
        let free = |m: &Machine| m.values().flat_map(|n| n.memory_map.values()).map(|t| t.free).sum::<u64>();
        if shape(&is) == shape(was) && free(&is) == free(was) {
            return Ok(());
        }
        Err("[memorymanager] the expected machine state is different from the real one".into())
    }

    /// Writes the files and tells everybody.
    fn save(&self) {
        let (cpu, memory) = {
            let state = self.state.lock();
            let mut cpu = CpuState { policy_name: self.cpu_policy().into(), ..CpuState::default() };
            cpu.default_cpu_set = list(&state.shared);
            let texts = |all: &BTreeMap<String, Cpus>| all.iter().map(|(c, cpus)| (c.clone(), list(cpus))).collect();
            cpu.entries = state.exclusive.iter().map(|(pod, all)| (pod.clone(), texts(all))).collect();
            let mut memory = MemoryState { policy_name: self.memory_policy().into(), ..MemoryState::default() };
            memory.machine_state = memory::account(&self.empty, &state.blocks);
            memory.entries.clone_from(&state.blocks);
            (cpu, memory)
        };
        for written in [cpu.save(&self.dir), memory.save(&self.dir)] {
            if let Err(error) = written {
                tracing::error!(path = %self.dir.display(), %error, "state of CPU and memory managers not written");
            }
        }
        self.changed.send_replace(());
    }

    /// Tells of everything that is given or comes back.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Whether containers are held to processors at all.
    pub(crate) fn gives_cpus(&self) -> bool {
        self.settings.cpu.is_some()
    }

    /// Whether memory is given out by node.
    pub(crate) fn gives_memory(&self) -> bool {
        self.settings.memory
    }

    /// A pod is over.
    pub(crate) fn release(&self, uid: &str) {
        let gone = {
            let mut state = self.state.lock();
            state.affinity.remove(uid);
            let cpus = state.exclusive.remove(uid);
            let blocks = state.blocks.remove(uid);
            for back in cpus.iter().flat_map(|c| c.values()) {
                state.shared.extend(back);
            }
            cpus.is_some() || blocks.is_some()
        };
        if gone {
            self.save();
        }
    }

    /// After a start: only these pods have anything.
    pub(crate) fn retain(&self, known: &[String]) {
        let all: Vec<String> = {
            let state = self.state.lock();
            state.exclusive.keys().chain(state.blocks.keys()).cloned().collect()
        };
        all.iter().filter(|uid| !known.contains(uid)).for_each(|uid| self.release(uid));
    }

    /// The processors a container is held to, if it is.
    pub(crate) fn cpus_of(&self, uid: &str, container: &str) -> Option<String> {
        self.settings.cpu?;
        let state = self.state.lock();
        let own = state.exclusive.get(uid).and_then(|p| p.get(container));
        Some(list(own.unwrap_or(&state.shared)))
    }

    /// The processors a container has for itself.
    pub(crate) fn exclusive(&self, uid: &str, container: &str) -> Cpus {
        let state = self.state.lock();
        state.exclusive.get(uid).and_then(|p| p.get(container)).cloned().unwrap_or_default()
    }

    /// Whether any container of the pod has processors for itself.
    pub(crate) fn pod_is_exclusive(&self, uid: &str) -> bool {
        self.state.lock().exclusive.contains_key(uid)
    }

    /// The memory a container has for itself.
    pub(crate) fn memory(&self, uid: &str, container: &str) -> Vec<Block> {
        let state = self.state.lock();
        state.blocks.get(uid).and_then(|p| p.get(container)).cloned().unwrap_or_default()
    }

    /// The NUMA nodes a container's memory comes from, if that is said.
    pub(crate) fn nodes_of(&self, uid: &str, container: &str) -> Option<String> {
        let nodes = self.memory(uid, container).into_iter().flat_map(|b| b.numa_affinity).collect();
        Some(list(&nodes)).filter(|l| !l.is_empty())
    }

    /// Where a container's devices are to come from.
    pub(crate) fn affinity(&self, uid: &str, container: &str) -> Option<hints::Mask> {
        self.state.lock().affinity.get(uid)?.get(container)?.mask
    }

    /// How many processors are shared, and how many are somebody's own.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.state.lock();
        let own: Cpus = state.exclusive.values().flat_map(|p| p.values()).flatten().copied().collect();
        (state.shared.len(), own.len())
    }

    /// What can be given: processors, and memory by node.
    pub(crate) fn allocatable(&self, cpus: u32) -> (Cpus, Vec<(u32, String, u64)>) {
        let all = if self.topology.cpus.is_empty() { (0..cpus).collect() } else { self.topology.all() };
        let tables = |(id, n): (&u32, &memory::Node)| {
            let id = *id;
            n.memory_map.iter().map(move |(name, t)| (id, name.clone(), t.allocatable)).collect::<Vec<_>>()
        };
        (all.difference(&self.kept).copied().collect(), self.empty.iter().flat_map(tables).collect())
    }
}
