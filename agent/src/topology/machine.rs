//! How processors and memory of the machine lie: from /sys, or from a directory like it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use isopod_runtime::cpu_list;

use super::hints::Mask;

/// Processors by their numbers.
pub(crate) type Cpus = BTreeSet<u32>;

/// Where a processor is. Each place is named by a number of its own: cores and caches by their first processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cpu {
    pub(crate) core: u32,
    pub(crate) cache: u32,
    pub(crate) node: u32,
    pub(crate) socket: u32,
}

/// Something that has processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Core,
    Cache,
    Node,
    Socket,
}

/// A NUMA node's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// Bytes of `memory` and of each `hugepages-SIZE`.
    pub(crate) memory: BTreeMap<String, u64>,
    /// Distance to each node, itself among them.
    pub(crate) distances: Vec<u64>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    pub(crate) cpus: BTreeMap<u32, Cpu>,
    pub(crate) nodes: BTreeMap<u32, Node>,
}

/// Processors of a list as the kernel writes it; an empty one is none.
pub(crate) fn parse(list: &str) -> Result<Cpus, String> {
    if list.trim().is_empty() {
        return Ok(Cpus::new());
    }
    let numbers = cpu_list::parse(list).map_err(|e| e.to_string())?;
    Ok(numbers.into_iter().filter_map(|n| u32::try_from(n).ok()).collect())
}

/// The list of some numbers: `0-2,8`.
pub(crate) fn list(numbers: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for n in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *n => *last = *n,
            _ => runs.push((*n, *n)),
        }
    }
    let one = |(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(one).collect::<Vec<_>>().join(",")
}

/// Name of huge pages of so many kilobytes, as resources are called.
pub(crate) fn huge_pages(kilobytes: u64) -> String {
    if kilobytes >= 1 << 20 {
        format!("hugepages-{}Gi", kilobytes >> 20)
    } else {
        format!("hugepages-{}Mi", kilobytes >> 10)
    }
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

fn first(path: &Path) -> Option<u32> {
    parse(&text(path)?).ok()?.first().copied()
}

impl Topology {
    /// Reads `devices/system` below `sys`.
    pub(crate) fn read(sys: &Path) -> Result<Self, String> {
        let system = sys.join("devices/system");
        let path = system.join("cpu/online");
        let online = text(&path).ok_or_else(|| format!("{} cannot be read", path.display()))?;
        let online = parse(&online)?;
        let mut nodes = BTreeMap::new();
        let mut node_of = BTreeMap::new();
        for entry in fs::read_dir(system.join("node")).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(id) = name.strip_prefix("node").and_then(|n| n.parse::<u32>().ok()) else { continue };
            let cpus = parse(&text(&entry.path().join("cpulist")).unwrap_or_default())?;
            node_of.extend(cpus.into_iter().map(|cpu| (cpu, id)));
            nodes.insert(id, node(&entry.path()));
        }
        if nodes.is_empty() {
            nodes.insert(0, Node::default());
        }
        let place = |cpu: u32| {
            let dir = system.join(format!("cpu/cpu{cpu}"));
            let socket = text(&dir.join("topology/physical_package_id")).and_then(|t| t.parse().ok()).unwrap_or(0);
            Cpu {
                core: first(&dir.join("topology/thread_siblings_list")).unwrap_or(cpu),
                cache: first(&dir.join("cache/index3/shared_cpu_list")).unwrap_or(u32::MAX - socket),
                node: node_of.get(&cpu).copied().unwrap_or(0),
                socket,
            }
        };
        Ok(Self { cpus: online.into_iter().map(|cpu| (cpu, place(cpu))).collect(), nodes })
    }

    /// All processors.
    pub(crate) fn all(&self) -> Cpus {
        self.cpus.keys().copied().collect()
    }

    /// Which of a kind a processor is part of.
    pub(crate) fn unit(&self, cpu: u32, unit: Unit) -> Option<u32> {
        let cpu = self.cpus.get(&cpu)?;
        Some(match unit {
            Unit::Core => cpu.core,
            Unit::Cache => cpu.cache,
            Unit::Node => cpu.node,
            Unit::Socket => cpu.socket,
        })
    }

    /// Those of some processors that are part of one unit.
    pub(crate) fn within(&self, cpus: &Cpus, unit: Unit, id: u32) -> Cpus {
        cpus.iter().copied().filter(|cpu| self.unit(*cpu, unit) == Some(id)).collect()
    }

    /// Those of some processors that are part of one of these nodes.
    pub(crate) fn near(&self, cpus: &Cpus, nodes: Mask) -> Cpus {
        cpus.iter().copied().filter(|cpu| self.cpus.get(cpu).is_some_and(|c| nodes.has(c.node))).collect()
    }

    /// The units of a kind that some processors are part of.
    pub(crate) fn units(&self, cpus: &Cpus, unit: Unit) -> BTreeSet<u32> {
        cpus.iter().filter_map(|cpu| self.unit(*cpu, unit)).collect()
    }

    /// How many of a kind the machine has.
    pub(crate) fn count(&self, unit: Unit) -> usize {
        self.units(&self.all(), unit).len().max(1)
    }

    /// Processors per unit, at least one.
    pub(crate) fn per(&self, unit: Unit) -> usize {
        (self.cpus.len() / self.count(unit)).max(1)
    }
}

fn node(dir: &Path) -> Node {
    let mut memory = BTreeMap::new();
    let info = text(&dir.join("meminfo")).unwrap_or_default();
    let total = info.lines().find_map(|l| l.split_once("MemTotal:")).map(|(_, rest)| rest);
    let kilobytes = total.and_then(|t| t.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    memory.insert("memory".to_owned(), kilobytes * 1024);
    for entry in fs::read_dir(dir.join("hugepages")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let size = name.strip_prefix("hugepages-").and_then(|n| n.strip_suffix("kB")?.parse::<u64>().ok());
        let count = text(&entry.path().join("nr_hugepages")).and_then(|t| t.parse::<u64>().ok());
        if let (Some(size), Some(count)) = (size, count) {
            memory.insert(huge_pages(size), count * size * 1024);
        }
    }
    let distances = text(&dir.join("distance")).unwrap_or_default();
    Node { memory, distances: distances.split_whitespace().filter_map(|d| d.parse().ok()).collect() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine of `sockets` times `nodes` times `cores` times `threads`, numbered as most are: first threads first.
    pub(crate) fn machine(sockets: u32, nodes: u32, cores: u32, threads: u32) -> Topology {
        let all = sockets * nodes * cores;
        let place = |cpu: u32| {
            let core = cpu % all;
            Cpu { core, cache: core / cores * cores, node: core / cores, socket: core / cores / nodes }
        };
        let count = sockets * nodes;
        let distance = |a: u32, b: u32| if a == b { 10 } else { 10 + u64::from(a.abs_diff(b)) };
        let node = |id: u32| Node {
            memory: [("memory".to_owned(), 8 << 30), ("hugepages-2Mi".to_owned(), 1 << 30)].into(),
            distances: (0..count).map(|other| distance(id, other)).collect(),
        };
        Topology {
            cpus: (0..all * threads).map(|cpu| (cpu, place(cpu))).collect(),
            nodes: (0..count).map(|id| (id, node(id))).collect(),
        }
    }

    #[test]
    fn lists_read_back() {
        for text in ["0-2,8", "", "5", "0,2,4-6"] {
            assert_eq!(list(&parse(text).unwrap()), text);
        }
        assert!(parse("3-1").is_err());
    }

    #[test]
    fn a_machine_is_read_from_a_tree_like_sys() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: String, text: &str| {
            let path = dir.path().join("devices/system").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("cpu/online".into(), "0-3\n");
        for cpu in 0..4 {
            put(format!("cpu/cpu{cpu}/topology/thread_siblings_list"), ["0,2\n", "1,3\n"][cpu % 2]);
            put(format!("cpu/cpu{cpu}/topology/physical_package_id"), ["0\n", "1\n"][cpu % 2]);
        }
        for (node, cpus) in ["0,2", "1,3"].iter().enumerate() {
            put(format!("node/node{node}/cpulist"), cpus);
            put(format!("node/node{node}/meminfo"), "Node 0 MemTotal:       1024 kB\nNode 0 MemFree: 1 kB\n");
            put(format!("node/node{node}/hugepages/hugepages-2048kB/nr_hugepages"), "3\n");
            put(format!("node/node{node}/distance"), "10 21\n");
        }
        let t = Topology::read(dir.path()).unwrap();
        assert_eq!((t.count(Unit::Core), t.count(Unit::Socket), t.per(Unit::Core)), (2, 2, 2));
        assert_eq!(list(&t.within(&t.all(), Unit::Node, 1)), "1,3");
        assert_eq!(t.nodes[&1].memory["memory"], 1 << 20);
        assert_eq!((t.nodes[&1].memory["hugepages-2Mi"], &t.nodes[&1].distances[..]), (6 << 20, &[10, 21][..]));
        assert!(Topology::read(&dir.path().join("none")).unwrap_err().contains("cpu/online"));
    }

    #[test]
    fn this_machine_is_read() {
        let t = Topology::read(Path::new("/sys")).unwrap();
        assert!(!t.cpus.is_empty() && t.nodes.values().all(|n| n.memory["memory"] > 0));
    }
}
