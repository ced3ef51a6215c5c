//! Memory that guaranteed containers have for themselves, by NUMA node: a pure account of blocks.
//!
//! A node serves containers that fit it alone, or containers of one and the same group of nodes, never both. What each
//! node has left follows from the blocks alone ([`account`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    hints::{Hint, Hints, Mask, generate},
    machine::Topology,
};

/// One resource of a node, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Table {
    pub(crate) total: u64,
    pub(crate) system_reserved: u64,
    pub(crate) allocatable: u64,
    pub(crate) reserved: u64,
    pub(crate) free: u64,
}

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Node {
    pub(crate) number_of_assignments: i64,
    pub(crate) memory_map: BTreeMap<String, Table>,
    /// The nodes it serves together with, itself among them.
    pub(crate) cells: Vec<u32>,
}

/// All nodes.
pub(crate) type Machine = BTreeMap<u32, Node>;

/// What a container has of a resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Block {
    pub(crate) numa_affinity: Vec<u32>,
    #[serde(rename = "type")]
    pub(crate) resource: String,
    pub(crate) size: u64,
}

/// By pod and container.
pub(crate) type Blocks = BTreeMap<String, BTreeMap<String, Vec<Block>>>;

/// What is wanted of each resource.
pub(crate) type Wanted = BTreeMap<String, u64>;

/// What the system keeps of each node.
pub(crate) type Reserved = BTreeMap<u32, BTreeMap<String, u64>>;

/// The machine with nothing given out.
pub(crate) fn empty(t: &Topology, reserved: &Reserved) -> Machine {
    let node = |(id, n): (&u32, &super::machine::Node)| {
        let huge: u64 = n.memory.iter().filter(|(name, _)| *name != "memory").map(|(_, bytes)| bytes).sum();
        let table = |(name, total): (&String, &u64)| {
            let system_reserved = reserved.get(id).and_then(|r| r.get(name)).copied().unwrap_or(0);
            // Huge pages are taken from what would else be ordinary memory.
            let other = if name == "memory" { huge } else { 0 };
            let allocatable = total.saturating_sub(system_reserved + other);
            (name.clone(), Table { total: *total, system_reserved, allocatable, reserved: 0, free: allocatable })
        };
        let memory_map = n.memory.iter().map(table).collect();
        (*id, Node { number_of_assignments: 0, memory_map, cells: vec![*id] })
    };
    t.nodes.iter().map(node).collect()
}

/// The machine with these blocks given out.
pub(crate) fn account(empty: &Machine, blocks: &Blocks) -> Machine {
    let mut machine = empty.clone();
    for b in blocks.values().flat_map(|p| p.values()).flatten() {
        let mut left = b.size;
        for id in &b.numa_affinity {
            let Some(node) = machine.get_mut(id) else { continue };
            node.number_of_assignments += 1;
            node.cells.clone_from(&b.numa_affinity);
            let Some(table) = node.memory_map.get_mut(&b.resource) else { continue };
            let part = left.min(table.free);
            table.free -= part;
            table.reserved += part;
            left -= part;
        }
    }
    machine
}

/// What nodes have of a resource together.
fn sum(machine: &Machine, mask: Mask, of: impl Fn(&Node) -> u64) -> u64 {
    mask.nodes().filter_map(|n| machine.get(&n)).map(of).sum()
}

/// Whether what these nodes serve lets them serve one more as this set.
fn compatible(machine: &Machine, mask: Mask) -> bool {
    let cells: Vec<u32> = mask.nodes().collect();
    cells.iter().filter_map(|n| machine.get(n)).all(|node| match cells.len() {
        1 => node.cells.len() <= 1,
        _ => node.number_of_assignments == 0 || node.cells == cells,
    })
}

/// Where what is wanted could come from; `again` is what of it the pod's init containers leave.
pub(crate) fn hints(
    t: &Topology,
    machine: &Machine,
    wanted: &Wanted,
    again: &dyn Fn(Mask, &str) -> u64,
) -> BTreeMap<String, Vec<Hint>> {
    let table = |node: &Node, name: &str| node.memory_map.get(name).copied().unwrap_or_default();
    let fits = |mask: Mask, of: &dyn Fn(Mask, &str) -> u64| wanted.iter().all(|(name, size)| of(mask, name) >= *size);
    let allocatable = |mask: Mask, name: &str| sum(machine, mask, |n| table(n, name).allocatable);
    let free = |mask: Mask, name: &str| sum(machine, mask, |n| table(n, name).free) + again(mask, name);
    // A set has all that is wanted, or it is no possibility at all.
    let whole = |mask: Mask| u64::from(fits(mask, &allocatable));
    let can = |mask: Mask| Some(u64::from(fits(mask, &free))).filter(|_| whole(mask) == 1 && compatible(machine, mask));
    let hints = generate(t, 1, whole, can);
    wanted.keys().map(|name| (name.clone(), hints.clone())).collect()
}

/// Whether these nodes can give it.
fn satisfies(machine: &Machine, mask: Mask, wanted: &Wanted, again: &dyn Fn(Mask, &str) -> u64) -> bool {
    wanted.iter().all(|(name, size)| {
        let free = sum(machine, mask, |n| n.memory_map.get(name).map_or(0, |t| t.free));
        free + again(mask, name) >= *size
    })
}

/// The nodes that memory is taken from, given the hint all agreed on.
pub(crate) fn choose(
    t: &Topology,
    machine: &Machine,
    wanted: &Wanted,
    hint: Hint,
    again: &dyn Fn(Mask, &str) -> u64,
) -> Result<Mask, String> {
    let best = |all: Vec<Hint>| {
        let key = |h: &Hint| (!h.preferred, h.mask.map(|m| (m.count(), m.0)));
        all.into_iter().min_by_key(key)
    };
    let all = hints(t, machine, wanted, again).into_values().next().unwrap_or_default();
    let found = match hint.mask {
        None => {
            let text = "[memorymanager] failed to get the default NUMA affinity, no NUMA nodes with enough memory is available";
            let found = best(all).ok_or(text)?;
            if hint.preferred && !found.preferred {
                return Err("[memorymanager] failed to find the default preferred hint".into());
            }
            found
        }
        Some(mask) if satisfies(machine, mask, wanted, again) => hint,
        Some(mask) => {
            // More nodes, those of the hint among them.
            let wider = all.into_iter().filter(|h| h.mask.is_some_and(|m| m.0 & mask.0 == mask.0)).collect();
            let text = "[memorymanager] failed to find NUMA nodes to extend the current topology hint";
            let found = best(wider).ok_or(text)?;
            if hint.preferred && !found.preferred {
                return Err("[memorymanager] failed to find the extended preferred hint".into());
            }
            found
        }
    };
    let mask = found.mask.ok_or("[memorymanager] no NUMA node")?;
    if !compatible(machine, mask) {
        return Err("[memorymanager] preferred hint violates NUMA node allocation".into());
    }
    Ok(mask)
}

/// Hints for a container that has its blocks already.
pub(crate) fn given(blocks: &[Block]) -> Vec<(String, Hints)> {
    let hint = |b: &Block| Hint { mask: Some(Mask::of(b.numa_affinity.iter().copied())), preferred: true };
    blocks.iter().map(|b| (b.resource.clone(), Some(vec![hint(b)]))).collect()
}

/// What a pod's ended init containers leave on a set of nodes.
pub(crate) fn reusable(earlier: &[&Vec<Block>], mask: Mask, resource: &str) -> u64 {
    let nodes: Vec<u32> = mask.nodes().collect();
    let same = |b: &&Block| b.resource == resource && b.numa_affinity == nodes;
    earlier.iter().flat_map(|blocks| blocks.iter()).filter(same).map(|b| b.size).sum()
}

#[cfg(test)]
mod tests {
    use super::{super::machine::tests::machine, *};

    const GB: u64 = 1 << 30;

    fn wanted(memory: u64) -> Wanted {
        [("memory".to_owned(), memory)].into()
    }

    fn block(nodes: &[u32], size: u64) -> Vec<Block> {
        vec![Block { numa_affinity: nodes.to_vec(), resource: "memory".into(), size }]
    }

    fn with(blocks: &[(&str, Vec<Block>)]) -> Machine {
        let reserved = [(0, [("memory".to_owned(), GB)].into())].into();
        let blocks = blocks.iter().map(|(pod, b)| ((*pod).to_owned(), [("c".to_owned(), b.clone())].into())).collect();
        // Nodes of 8 GiB, one of them huge pages: 6 GiB to give on the first, 7 GiB on the second.
        account(&empty(&machine(2, 1, 2, 1), &reserved), &blocks)
    }

    fn chosen(m: &Machine, size: u64, hint: Hint) -> Result<Vec<u32>, String> {
        choose(&machine(2, 1, 2, 1), m, &wanted(size), hint, &|_, _| 0).map(|m| m.nodes().collect())
    }

    #[test]
    fn blocks_are_accounted() {
        let m = with(&[("a", block(&[0], GB)), ("b", block(&[1], 3 * GB))]);
        let of = |n: u32| m[&n].memory_map["memory"];
        assert_eq!((of(0).allocatable, of(0).free, of(0).reserved), (6 * GB, 5 * GB, GB));
        assert_eq!((of(1).free, of(1).system_reserved), (4 * GB, 0));
        let m = with(&[("a", block(&[0, 1], 8 * GB))]);
        assert_eq!((m[&0].memory_map["memory"].free, m[&1].memory_map["memory"].free), (0, 5 * GB));
        assert_eq!((m[&1].cells.clone(), m[&1].number_of_assignments), (vec![0, 1], 1));
    }

    #[test]
    fn a_node_serves_alone_or_in_one_group() {
        let (any, first) = (Hint::default(), Hint { mask: Some(Mask(1)), preferred: true });
        let none = with(&[]);
        assert_eq!(chosen(&none, GB, any).unwrap(), [0]);
        assert_eq!(chosen(&none, 7 * GB, any).unwrap(), [1]);
        assert_eq!(chosen(&none, 12 * GB, any).unwrap(), [0, 1]);
        assert!(chosen(&none, 14 * GB, any).unwrap_err().contains("no NUMA nodes with enough memory"));
        let busy = with(&[("a", block(&[0], 5 * GB))]);
        assert_eq!(chosen(&busy, 2 * GB, any).unwrap(), [1]);
        // Both together cannot be while one serves alone.
        assert!(chosen(&busy, 8 * GB, any).is_err());
        assert!(chosen(&busy, 2 * GB, first).unwrap_err().contains("extend the current topology hint"));
        let group = with(&[("a", block(&[0, 1], 8 * GB))]);
        assert_eq!(chosen(&group, GB, any).unwrap(), [0, 1]);
        assert!(chosen(&group, GB, Hint { preferred: true, ..any }).unwrap_err().contains("default preferred hint"));
    }

    #[test]
    fn init_containers_leave_what_they_had() {
        let first = block(&[0], 4 * GB);
        let busy = with(&[("a", first.clone())]);
        let t = machine(2, 1, 2, 1);
        let again = |mask: Mask, name: &str| reusable(&[&first], mask, name);
        let hint = Hint { mask: Some(Mask(1)), preferred: true };
        assert_eq!(choose(&t, &busy, &wanted(5 * GB), hint, &again).unwrap(), Mask(1));
        assert!(choose(&t, &busy, &wanted(5 * GB), hint, &|_, _| 0).is_err());
    }
}
