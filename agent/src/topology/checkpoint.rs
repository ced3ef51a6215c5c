//! The files in which the managers remember, in upstream's own format: `cpu_manager_state` and `memory_manager_state`.
//!
//! Their checksum is FNV-1a over the text in which Go's spew prints the structure, so that a kubelet takes what isopod wrote
//! and the other way round.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::memory::{Block, Blocks, Machine, Node};
use crate::pods::state::write_atomically;

/// Processors by pod and container, as lists.
pub(crate) type Entries = BTreeMap<String, BTreeMap<String, String>>;

/// `cpu_manager_state`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CpuState {
    pub(crate) policy_name: String,
    pub(crate) default_cpu_set: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) entries: Entries,
    pub(super) checksum: u64,
}

/// `memory_manager_state`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct MemoryState {
    pub(crate) policy_name: String,
    pub(crate) machine_state: Machine,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) entries: Blocks,
    pub(super) checksum: u64,
}

fn hash(text: &str) -> u64 {
    let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    text.bytes().fold(0x811c_9dc5, step).into()
}

fn joined<T>(all: impl IntoIterator<Item = T>, print: impl Fn(T) -> String) -> String {
    all.into_iter().map(print).collect::<Vec<_>>().join(" ")
}

/// A file of this kind.
pub(crate) trait Checkpoint: Serialize + DeserializeOwned {
    /// Its name.
    const FILE: &'static str;
    /// What messages call its owner.
    const OWNER: &'static str;

    /// What the checksum is made of.
    fn printed(&self) -> String;
    /// The checksum's place.
    fn checksum(&mut self) -> &mut u64;
    /// The policy that wrote it.
    fn policy(&self) -> &str;

    /// Reads the file; `None` when there is none. One of another policy, or one that is damaged, is for a person to look at.
    fn load(dir: &Path, policy: &str) -> Result<Option<Self>, String> {
        let path = dir.join(Self::FILE);
        let Ok(text) = fs::read(&path) else { return Ok(None) };
        let read = || {
            let mut state: Self = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
            let said = *state.checksum();
            if said != 0 && said != hash(&state.printed()) {
                return Err("checkpoint is corrupted".to_owned());
            }
            if state.policy() != policy {
                let was = state.policy();
                return Err(format!("configured policy {policy:?} differs from state checkpoint policy {was:?}"));
            }
            Ok(state)
        };
        read().map(Some).map_err(|why| {
            format!(
                "could not restore state from checkpoint: {why}, please drain this node and delete the {} manager \
                 checkpoint file {path:?} before restarting Kubelet",
                Self::OWNER
            )
        })
    }

    /// Writes the file.
    fn save(mut self, dir: &Path) -> std::io::Result<()> {
        *self.checksum() = hash(&self.printed());
        fs::create_dir_all(dir)?;
        write_atomically(&dir.join(Self::FILE), &serde_json::to_vec(&self)?)
    }
}

impl Checkpoint for CpuState {
    const FILE: &'static str = "cpu_manager_state";
    const OWNER: &'static str = "CPU";

    fn printed(&self) -> String {
        let entries = joined(&self.entries, |(pod, all)| {
            format!("{pod}:map[{}]", joined(all, |(container, cpus)| format!("{container}:{cpus}")))
        });
        format!(
            "(*state.CPUManagerCheckpoint){{PolicyName:(string){} DefaultCPUSet:(string){} \
             Entries:(map[string]map[string]string)map[{entries}] Checksum:(checksum.Checksum)0}}",
            self.policy_name, self.default_cpu_set
        )
    }

    fn checksum(&mut self) -> &mut u64 {
        &mut self.checksum
    }

    fn policy(&self) -> &str {
        &self.policy_name
    }
}

fn numbers(list: &[u32]) -> String {
    format!("([]int)[{}]", joined(list, u32::to_string))
}

fn printed_node((id, n): (&u32, &Node)) -> String {
    let tables = joined(&n.memory_map, |(name, t)| {
        format!(
            "{name}:<*>{{TotalMemSize:(uint64){} SystemReserved:(uint64){} Allocatable:(uint64){} Reserved:(uint64){} \
             Free:(uint64){}}}",
            t.total, t.system_reserved, t.allocatable, t.reserved, t.free
        )
    });
    format!(
        "{id}:<*>{{NumberOfAssignments:(int){} MemoryMap:(map[v1.ResourceName]*state.MemoryTable)map[{tables}] Cells:{}}}",
        n.number_of_assignments,
        numbers(&n.cells)
    )
}

fn printed_block(b: &Block) -> String {
    let Block { numa_affinity, resource, size } = b;
    format!("{{NUMAAffinity:{} Type:(v1.ResourceName){resource} Size:(uint64){size}}}", numbers(numa_affinity))
}

impl Checkpoint for MemoryState {
    const FILE: &'static str = "memory_manager_state";
    const OWNER: &'static str = "memory";

    fn printed(&self) -> String {
        let entries = joined(&self.entries, |(pod, all)| {
            let containers = joined(all, |(c, blocks)| format!("{c}:[{}]", joined(blocks, printed_block)));
            format!("{pod}:map[{containers}]")
        });
        format!(
            "(*state.MemoryManagerCheckpoint){{PolicyName:(string){} MachineState:(state.NUMANodeMap)map[{}] \
             Entries:(state.ContainerMemoryAssignments)map[{entries}] Checksum:(checksum.Checksum)0}}",
            self.policy_name,
            joined(&self.machine_state, printed_node)
        )
    }

    fn checksum(&mut self) -> &mut u64 {
        &mut self.checksum
    }

    fn policy(&self) -> &str {
        &self.policy_name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads_back<T: Checkpoint>(policy: &str, text: &str) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(T::FILE), text).unwrap();
        let state = T::load(dir.path(), policy).unwrap().unwrap();
        state.save(dir.path()).unwrap();
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(json(&fs::read_to_string(dir.path().join(T::FILE)).unwrap()), json(text));
    }

    /// Files that kubelets have written, with their checksums.
    #[test]
    fn what_a_kubelet_wrote_is_read_and_written_alike() {
        reads_back::<CpuState>("none", r#"{"policyName":"none","defaultCpuSet":"","checksum":1353318690}"#);
        reads_back::<CpuState>("static", r#"{"policyName":"static","defaultCpuSet":"0-1","checksum":1636926438}"#);
        reads_back::<CpuState>(
            "static",
            r#"{"policyName":"static","defaultCpuSet":"0-1,6-11","entries":{"4aec46af-22b7-4e26-babb-d15383ac9151":
            {"mysqld":"2-3"},"60008d73-6f6f-4467-96c5-cd0a1eeadf23":{"mysqld2":"4-5"}},"checksum":2764424633}"#,
        );
        reads_back::<MemoryState>(
            "static",
            r#"{"policyName":"static","machineState":{"0":{"numberOfAssignments":0,"memoryMap":{"memory":{"total":2048,
            "systemReserved":512,"allocatable":1536,"reserved":512,"free":1024}},"cells":[]}},
            "entries":{"pod":{"container1":[{"numaAffinity":[0],"type":"memory","size":512}]}},"checksum":4215593881}"#,
        );
    }

    #[test]
    fn another_policy_and_damage_are_for_a_person() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpu_manager_state");
        assert_eq!(CpuState::load(dir.path(), "static"), Ok(None));
        CpuState { policy_name: "none".into(), ..CpuState::default() }.save(dir.path()).unwrap();
        let error = CpuState::load(dir.path(), "static").unwrap_err();
        let want = format!(
            "could not restore state from checkpoint: configured policy \"static\" differs from state checkpoint policy \
             \"none\", please drain this node and delete the CPU manager checkpoint file {path:?} before restarting Kubelet"
        );
        assert_eq!(error, want);
        fs::write(&path, r#"{"policyName":"none","defaultCpuSet":"0","checksum":1353318690}"#).unwrap();
        assert!(CpuState::load(dir.path(), "none").unwrap_err().contains("checkpoint is corrupted"));
        fs::write(&path, r#"{"policyName":"no"#).unwrap();
        assert!(CpuState::load(dir.path(), "none").unwrap_err().contains("EOF"));
    }
}
