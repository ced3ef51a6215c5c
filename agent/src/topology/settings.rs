//! What KubeletConfiguration says of the managers, checked against itself and the machine.

use std::collections::BTreeMap;

use super::{
    cpus::{self, Options},
    hints::{Merger, Policy},
    machine::{Cpus, Topology, Unit, parse},
    memory::Reserved,
};
use crate::{config::KubeletConfiguration, quantity};

/// Most NUMA nodes, unless `max-allowable-numa-nodes` allows more: sets of nodes double with each.
const MAX_NODES: usize = 8;
const CPU_ALPHA: &str = "CPUManagerPolicyAlphaOptions";
/// `distribute-cpus-across-cores` and `align-by-socket` need this gate.
const ALPHA: [&str; 2] = ["align-by-socket", "distribute-cpus-across-cores"];

/// The managers' settings.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Settings {
    /// Of the static CPU policy.
    pub(crate) cpu: Option<Options>,
    /// Whether the memory policy is Static.
    pub(crate) memory: bool,
    pub(crate) topology: Policy,
    pub(crate) whole_pod: bool,
    pub(crate) closest: bool,
    max_nodes: usize,
}

fn flag(name: &str, value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("bad value for option {name:?}: {value:?} is neither true nor false")),
    }
}

fn cpu_options(k: &KubeletConfiguration) -> Result<Options, String> {
    let mut o = Options::default();
    for (name, value) in &k.cpu_manager_policy_options {
        let field = match name.as_str() {
            "full-pcpus-only" => &mut o.full_cores,
            "distribute-cpus-across-numa" => &mut o.across_nodes,
            "align-by-socket" => &mut o.by_socket,
            "strict-cpu-reservation" => &mut o.strict,
            "distribute-cpus-across-cores" => &mut o.across_cores,
            "prefer-align-cpus-by-uncorecache" => &mut o.by_cache,
            _ => return Err(format!("cpuManagerPolicyOptions: unknown CPU Manager policy option: {name:?}")),
        };
        if ALPHA.contains(&name.as_str()) && k.feature_gates.get(CPU_ALPHA) != Some(&true) {
            return Err(format!("CPU Manager Policy Alpha-level Options not enabled, but option {name:?} provided"));
        }
        *field = flag(name, value)?;
    }
    for (other, name) in [(o.full_cores, "FullPhysicalCPUsOnly"), (o.across_nodes, "DistributeCPUsAcrossNUMA")] {
        if other && o.across_cores {
            let text = "can not be used at the same time";
            return Err(format!("static policy options {name} and DistributeCPUsAcrossCores {text}"));
        }
    }
    if o.by_cache && (o.across_cores || o.across_nodes) {
        return Err(
            "static policy option PreferAlignByUnCoreCache can not be used with one that distributes CPUs".into()
        );
    }
    Ok(o)
}

impl Settings {
    /// Reads them; the error names the field.
    pub(crate) fn read(k: &KubeletConfiguration) -> Result<Self, String> {
        let cpu = match k.cpu_manager_policy.as_str() {
            "none" if k.cpu_manager_policy_options.is_empty() => None,
            "none" => return Err("cpuManagerPolicyOptions: the none policy has no options".into()),
            "static" => Some(cpu_options(k)?),
            other => return Err(format!("cpuManagerPolicy {other:?}: want one of none, static")),
        };
        let memory = match k.memory_manager_policy.as_str() {
            "None" => false,
            "Static" => true,
            other => return Err(format!("memoryManagerPolicy {other:?}: want one of None, Static")),
        };
        let topology = match k.topology_manager_policy.as_str() {
            "none" => Policy::None,
            "best-effort" => Policy::BestEffort,
            "restricted" => Policy::Restricted,
            "single-numa-node" => Policy::SingleNumaNode,
            other => {
                let known = "none, best-effort, restricted, single-numa-node";
                return Err(format!("topologyManagerPolicy {other:?}: want one of {known}"));
            }
        };
        if topology == Policy::SingleNumaNode && cpu.is_some_and(|o| o.by_socket) {
            return Err("topologyManagerPolicy single-numa-node is incompatible with the CPUManager policy option \
                        align-by-socket"
                .into());
        }
        let whole_pod = match k.topology_manager_scope.as_str() {
            "container" => false,
            "pod" => true,
            other => return Err(format!("topologyManagerScope {other:?}: want one of container, pod")),
        };
        let (mut closest, mut max_nodes) = (false, MAX_NODES);
        for (name, value) in &k.topology_manager_policy_options {
            match name.as_str() {
                "prefer-closest-numa-nodes" => closest = flag(name, value)?,
                "max-allowable-numa-nodes" => {
                    let n = value.parse().ok().filter(|n| (MAX_NODES..=64).contains(n));
                    max_nodes =
                        n.ok_or_else(|| format!("bad value for option {name:?}: want a number from 8 to 64"))?;
                }
                _ => {
                    return Err(format!(
                        "topologyManagerPolicyOptions: unknown Topology Manager Policy option: {name:?}"
                    ));
                }
            }
        }
        reserved_cpus(k)?;
        reserved_memory(k)?;
        Ok(Self { cpu, memory, topology, whole_pod, closest, max_nodes })
    }

    /// How hints are made one.
    pub(crate) fn merger(&self) -> Merger {
        Merger { policy: self.topology, closest: self.closest }
    }

    /// Whether the machine is one that these settings are possible on.
    pub(crate) fn suit(&self, t: &Topology) -> Result<(), String> {
        if self.topology != Policy::None && t.nodes.len() > self.max_nodes {
            return Err(format!(
                "topology manager: unsupported on machines with more than {} NUMA Nodes",
                self.max_nodes
            ));
        }
        if self.cpu.is_some_and(|o| o.by_socket) && t.count(Unit::Socket) > t.count(Unit::Node) {
            return Err(
                "Align by socket is not compatible with hardware where number of sockets are more than number \
                        of NUMA"
                    .into(),
            );
        }
        Ok(())
    }
}

/// `reservedSystemCPUs`.
pub(crate) fn reserved_cpus(k: &KubeletConfiguration) -> Result<Cpus, String> {
    parse(&k.reserved_system_cpus).map_err(|e| format!("reservedSystemCPUs {:?}: {e}", k.reserved_system_cpus))
}

/// Processors no container has for itself: those named, else as many as are reserved.
pub(crate) fn kept(k: &KubeletConfiguration, t: &Topology, reserved_milli: i64) -> Result<Cpus, String> {
    let named = reserved_cpus(k)?;
    if !named.is_empty() {
        let all = t.all();
        let strangers: Cpus = named.difference(&all).copied().collect();
        if !strangers.is_empty() {
            let text = super::machine::list(&strangers);
            return Err(format!("reservedSystemCPUs: this machine has no CPUs {text}"));
        }
        return Ok(named);
    }
    let count = usize::try_from(reserved_milli.max(0)).unwrap_or(0).div_ceil(1000);
    if count == 0 {
        return Err(
            "[cpumanager] the static policy requires systemreserved.cpu + kubereserved.cpu to be greater than zero"
                .into(),
        );
    }
    cpus::take(t, &t.all(), count, Options::default())
}

/// `reservedMemory`, in bytes.
fn reserved_memory(k: &KubeletConfiguration) -> Result<Reserved, String> {
    let mut all = Reserved::new();
    for r in &k.reserved_memory {
        let node = all.entry(r.numa_node).or_default();
        for (name, text) in &r.limits {
            if name != "memory" && !name.starts_with("hugepages-") {
                return Err(format!("reservedMemory: the limit {name:?} is neither memory nor hugepages"));
            }
            let bytes = quantity::milli(text).and_then(|m| u64::try_from(m / 1000).ok()).filter(|b| *b > 0);
            let bytes = bytes.ok_or_else(|| format!("reservedMemory: {text:?} is not a positive quantity"))?;
            if node.insert(name.clone(), bytes).is_some() {
                return Err(format!("reservedMemory: {name} of NUMA node {} is said twice", r.numa_node));
            }
        }
    }
    Ok(all)
}

fn shown(bytes: u64) -> String {
    let text = if bytes.is_multiple_of(1024) { format!("{}Ki", bytes / 1024) } else { bytes.to_string() };
    text.parse::<isopod_api::quantity::Quantity>().map_or(text, |q| q.to_string())
}

/// What the system keeps of each node. All nodes together keep as much as the node's allocatable leaves out.
pub(crate) fn kept_memory(
    k: &KubeletConfiguration,
    t: &Topology,
    left_out: &BTreeMap<String, u64>,
) -> Result<Reserved, String> {
    let reserved = reserved_memory(k)?;
    if let Some(node) = reserved.keys().find(|n| !t.nodes.contains_key(n)) {
        return Err(format!(
            "the reserved memory configuration references a NUMA node {node} that does not exist on this machine"
        ));
    }
    let mut totals: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    left_out.iter().for_each(|(name, bytes)| totals.entry(name).or_default().1 = *bytes);
    reserved.values().flatten().for_each(|(name, bytes)| totals.entry(name).or_default().0 += bytes);
    for (name, (said, want)) in totals {
        if said != want {
            let (said, want) = (shown(said), shown(want));
            return Err(format!(
                "the total amount {said:?} of type {name:?} is not equal to the value {want:?} determined by Node \
                 Allocatable feature"
            ));
        }
    }
    Ok(reserved)
}

#[cfg(test)]
mod tests {
    use super::{super::machine::tests::machine, *};

    fn config(text: &str) -> Result<KubeletConfiguration, String> {
        KubeletConfiguration::parse(&format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}\n"
        ))
    }

    #[test]
    fn options_are_known_by_name() {
        let k = config(
            "cpuManagerPolicy: static\ncpuManagerPolicyOptions: {full-pcpus-only: 'true', strict-cpu-reservation: 'false'}\n\
             topologyManagerPolicy: restricted\ntopologyManagerScope: pod\nmemoryManagerPolicy: Static\n\
             topologyManagerPolicyOptions: {prefer-closest-numa-nodes: 'true', max-allowable-numa-nodes: '10'}\n\
             reservedSystemCPUs: 0,2-3",
        )
        .unwrap();
        let s = Settings::read(&k).unwrap();
        assert_eq!(s.cpu, Some(Options { full_cores: true, ..Options::default() }));
        assert!(s.memory && s.whole_pod && s.closest && s.max_nodes == 10 && s.topology == Policy::Restricted);
        for (text, want) in [
            ("cpuManagerPolicy: some", "cpuManagerPolicy \"some\": want one of none, static"),
            ("cpuManagerPolicyOptions: {full-pcpus-only: 'true'}", "the none policy has no options"),
            (
                "cpuManagerPolicy: static\ncpuManagerPolicyOptions: {x: 'true'}",
                "unknown CPU Manager policy option: \"x\"",
            ),
            ("cpuManagerPolicy: static\ncpuManagerPolicyOptions: {full-pcpus-only: 'yes'}", "bad value for option"),
            (
                "cpuManagerPolicy: static\ncpuManagerPolicyOptions: {align-by-socket: 'true'}",
                "Alpha-level Options not enabled, but option \"align-by-socket\" provided",
            ),
            (
                "featureGates: {CPUManagerPolicyAlphaOptions: true}\ncpuManagerPolicy: static\n\
                 cpuManagerPolicyOptions: {align-by-socket: 'true'}\ntopologyManagerPolicy: single-numa-node",
                "incompatible with the CPUManager policy option align-by-socket",
            ),
            ("topologyManagerPolicyOptions: {max-allowable-numa-nodes: '4'}", "want a number from 8 to 64"),
            ("topologyManagerPolicy: x", "topologyManagerPolicy \"x\""),
            ("reservedSystemCPUs: 3-1", "reservedSystemCPUs \"3-1\""),
            ("reservedMemory: [{numaNode: 0, limits: {memory: x}}]", "is not a positive quantity"),
            ("reservedMemory: [{numaNode: 0, limits: {cpu: '1'}}]", "neither memory nor hugepages"),
        ] {
            let error = config(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_reserved_fits_the_machine() {
        let t = machine(2, 1, 2, 1);
        let k = config("reservedSystemCPUs: 1,3").unwrap();
        assert_eq!(kept(&k, &t, 0).unwrap(), [1, 3].into());
        let none = config("").unwrap();
        assert_eq!(kept(&none, &t, 1200).unwrap(), [0, 1].into());
        assert!(kept(&none, &t, 0).unwrap_err().contains("greater than zero"));
        assert!(kept(&config("reservedSystemCPUs: 1,9").unwrap(), &t, 0).unwrap_err().ends_with("no CPUs 9"));
        let k =
            config("reservedMemory: [{numaNode: 0, limits: {memory: 1Gi}}, {numaNode: 1, limits: {memory: 100Mi}}]");
        let k = k.unwrap();
        let out = |memory: u64| [("memory".to_owned(), memory)].into();
        assert_eq!(kept_memory(&k, &t, &out(1124 << 20)).unwrap()[&1]["memory"], 100 << 20);
        assert_eq!(
            kept_memory(&k, &t, &out(1 << 30)).unwrap_err(),
            "the total amount \"1124Mi\" of type \"memory\" is not equal to the value \"1Gi\" determined by Node \
             Allocatable feature"
        );
        assert!(
            kept_memory(&k, &machine(1, 1, 2, 1), &out(1)).unwrap_err().contains("NUMA node 1 that does not exist")
        );
    }
}
