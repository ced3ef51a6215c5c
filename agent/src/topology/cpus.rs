//! Choosing processors for a container that has them for itself: a pure function of the machine and of what is free.
//!
//! Whole nodes or sockets first, then whole cores, then threads: of what is left the most used is taken first, so that whole
//! ones stay whole. Worked example: 2 sockets of 4 cores with 2 threads, all free, 10 wanted: socket 0 (8 threads), then
//! core 4 of socket 1 with both threads.

use super::machine::{Cpus, Topology, Unit};

/// `cpuManagerPolicyOptions`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Only whole cores are given.
    pub(crate) full_cores: bool,
    /// What does not fit one node is spread evenly.
    pub(crate) across_nodes: bool,
    /// Nodes of one socket are as good as one node.
    pub(crate) by_socket: bool,
    /// Reserved processors are not for shared containers either.
    pub(crate) strict: bool,
    /// Threads come from as many cores as there are.
    pub(crate) across_cores: bool,
    /// Whole caches, or parts of one, where that is possible.
    pub(crate) by_cache: bool,
}

struct Picker<'a> {
    topology: &'a Topology,
    free: Cpus,
    taken: Cpus,
    wanted: usize,
}

/// `count` of the free processors.
pub(crate) fn take(t: &Topology, free: &Cpus, count: usize, o: Options) -> Result<Cpus, String> {
    if free.len() < count {
        let free = free.len();
        return Err(format!("not enough cpus available to satisfy request: requested={count}, available={free}"));
    }
    if o.across_nodes {
        let group = if o.full_cores { t.per(Unit::Core) } else { 1 };
        if let Some(taken) = spread(t, free, count, group, o) {
            return Ok(taken);
        }
    }
    Ok(packed(t, free, count, o))
}

fn packed(topology: &Topology, free: &Cpus, wanted: usize, o: Options) -> Cpus {
    let mut p = Picker { topology, free: free.clone(), taken: Cpus::new(), wanted };
    for unit in p.outer() {
        p.take_whole(unit);
    }
    if o.by_cache {
        p.take_caches(o);
    }
    if !o.across_cores {
        p.take_whole(Unit::Core);
    }
    p.take_threads(o.across_cores);
    p.taken
}

impl Picker<'_> {
    /// The larger of nodes and sockets first.
    fn outer(&self) -> [Unit; 2] {
        if self.topology.count(Unit::Socket) >= self.topology.count(Unit::Node) {
            [Unit::Node, Unit::Socket]
        } else {
            [Unit::Socket, Unit::Node]
        }
    }

    fn left(&self) -> usize {
        self.wanted - self.taken.len()
    }

    fn take(&mut self, cpus: Cpus) {
        self.free.retain(|cpu| !cpus.contains(cpu));
        self.taken.extend(cpus);
    }

    /// Units with free processors, those with the fewest first within each larger unit.
    fn order(&self, unit: Unit) -> Vec<u32> {
        let mut parts = vec![self.free.clone()];
        let inner = [unit];
        let levels = self.outer().into_iter().take_while(|level| *level != unit).chain(inner);
        let mut ids = Vec::new();
        for level in levels {
            ids.clear();
            let mut next = Vec::new();
            for part in parts {
                let of = |id| (self.topology.within(&part, level, id), id);
                let mut units: Vec<(Cpus, u32)> = self.topology.units(&part, level).into_iter().map(of).collect();
                units.sort_by_key(|(cpus, id)| (cpus.len(), *id));
                for (cpus, id) in units {
                    ids.push(id);
                    next.push(cpus);
                }
            }
            parts = next;
        }
        ids
    }

    /// Units that are free as a whole, while at least so many are wanted.
    fn take_whole(&mut self, unit: Unit) {
        let all = self.topology.all();
        for id in self.order(unit) {
            let cpus = self.topology.within(&all, unit, id);
            if cpus.len() <= self.left() && cpus.is_subset(&self.free) {
                self.take(cpus);
            }
        }
    }

    /// Whole caches, then what is left from the first that has it.
    fn take_caches(&mut self, o: Options) {
        self.take_whole(Unit::Cache);
        for id in self.order(Unit::Cache) {
            if self.left() == 0 {
                return;
            }
            let mut free = self.topology.within(&self.free, Unit::Cache, id);
            if o.full_cores {
                let all = self.topology.all();
                let core = |cpu: u32| self.topology.unit(cpu, Unit::Core).unwrap_or(cpu);
                let whole = |cpu: u32| self.topology.within(&all, Unit::Core, core(cpu)).is_subset(&self.free);
                free.retain(|cpu| whole(*cpu));
            }
            if free.len() >= self.left() {
                let part = packed(self.topology, &free, self.left(), Options { by_cache: false, ..o });
                self.take(part);
            }
        }
    }

    fn take_threads(&mut self, across_cores: bool) {
        let cores: Vec<Vec<u32>> = self.order(Unit::Core).into_iter().map(|core| self.threads(core)).collect();
        let most = cores.iter().map(Vec::len).max().unwrap_or(0);
        let threads: Vec<u32> = if across_cores {
            (0..most).flat_map(|n| cores.iter().filter_map(move |core| core.get(n).copied())).collect()
        } else {
            cores.into_iter().flatten().collect()
        };
        let threads = threads.into_iter().take(self.left()).collect();
        self.take(threads);
    }

    fn threads(&self, core: u32) -> Vec<u32> {
        self.topology.within(&self.free, Unit::Core, core).into_iter().collect()
    }
}

/// Every choice of `count` of some things, in order.
pub(super) fn combinations<T: Copy>(of: &[T], count: usize) -> Vec<Vec<T>> {
    match (count, of) {
        (0, _) => vec![Vec::new()],
        (_, []) => Vec::new(),
        (_, [first, rest @ ..]) => {
            let with = combinations(rest, count - 1).into_iter().map(|mut c| {
                c.insert(0, *first);
                c
            });
            with.chain(combinations(rest, count)).collect()
        }
    }
}

/// How unevenly nodes are left.
fn imbalance(left: impl Iterator<Item = usize> + Clone) -> f64 {
    let count = left.clone().count().max(1) as f64;
    let mean = left.clone().sum::<usize>() as f64 / count;
    let variance = left.map(|n| (n as f64 - mean).powi(2)).sum::<f64>() / count;
    // Two decimals tell enough, as upstream has it.
    (variance.sqrt() * 100.0).round() / 100.0
}

/// Evenly over the fewest nodes that can, in groups: the choice that leaves all nodes most alike.
fn spread(t: &Topology, free: &Cpus, count: usize, group: usize, o: Options) -> Option<Cpus> {
    if count == 0 || !count.is_multiple_of(group) {
        return None;
    }
    let picker = Picker { topology: t, free: free.clone(), taken: Cpus::new(), wanted: count };
    let nodes: Vec<(u32, usize)> =
        picker.order(Unit::Node).into_iter().map(|id| (id, t.within(free, Unit::Node, id).len())).collect();
    let groups = count.div_ceil(group);
    let least = groups.div_ceil(t.cpus.len().div_ceil(group).div_ceil(t.count(Unit::Node)));
    for n in least..=groups.min(nodes.len()) {
        let even = count / n / group * group;
        let Some((chosen, more)) = evenest(&nodes, n, count, even, group) else { continue };
        let mut taken = Cpus::new();
        let mut from = |id: u32, count: usize| {
            let left = t.within(&free.difference(&taken).copied().collect(), Unit::Node, id);
            taken.extend(packed(t, &left, count, o));
        };
        chosen.iter().for_each(|id| from(*id, even));
        more.iter().for_each(|id| from(*id, group));
        return (taken.len() == count).then_some(taken);
    }
    None
}

/// `n` nodes for `even` each, and those of them that give one group more.
fn evenest(nodes: &[(u32, usize)], n: usize, count: usize, even: usize, group: usize) -> Option<(Vec<u32>, Vec<u32>)> {
    let mut best: Option<(f64, Vec<u32>, Vec<u32>)> = None;
    for combo in combinations(nodes, n) {
        let in_groups: usize = combo.iter().map(|(_, free)| free / group * group).sum();
        if in_groups < count || combo.iter().any(|(_, free)| *free < even) {
            continue;
        }
        let ids: Vec<u32> = combo.iter().map(|(id, _)| *id).collect();
        let can: Vec<u32> = combo.iter().filter(|(_, free)| free - even >= group).map(|(id, _)| *id).collect();
        for more in combinations(&can, (count - even * n) / group) {
            let left = nodes.iter().map(|(id, free)| {
                let evenly = if ids.contains(id) { even } else { 0 };
                free - evenly - if more.contains(id) { group } else { 0 }
            });
            let score = imbalance(left);
            if best.as_ref().is_none_or(|(least, _, _)| score < *least) {
                best = Some((score, ids.clone(), more));
            }
        }
    }
    best.map(|(_, ids, more)| (ids, more))
}

#[cfg(test)]
mod tests {
    use super::{
        super::machine::{list, parse, tests::machine},
        *,
    };

    #[test]
    fn processors_are_taken_by_the_shape_of_the_machine() {
        let plain = Options::default();
        let spread = Options { across_nodes: true, ..plain };
        let cores = Options { across_cores: true, ..plain };
        let caches = Options { by_cache: true, ..plain };
        // Sockets, nodes per socket, cores per node, threads; free; wanted; taken.
        for ((s, n, c, t), free, count, o, want) in [
            ((1, 1, 4, 2), "0-7", 1, plain, "0"),
            ((1, 1, 4, 2), "0-7", 2, plain, "0,4"),
            ((1, 1, 4, 2), "0-7", 3, plain, "0-1,4"),
            // A core that is already used is used up first.
            ((1, 1, 4, 2), "1-7", 1, plain, "4"),
            ((1, 1, 4, 2), "1-7", 2, plain, "1,5"),
            ((1, 1, 4, 2), "1-7", 3, plain, "1,4-5"),
            // Two sockets of four cores: one socket, and a core of the other.
            ((2, 1, 4, 2), "0-15", 8, plain, "0-3,8-11"),
            ((2, 1, 4, 2), "0-15", 10, plain, "0-4,8-12"),
            ((2, 1, 4, 2), "1-15", 8, plain, "4-7,12-15"),
            ((2, 1, 4, 2), "1-15", 2, plain, "1,9"),
            // Sockets of two nodes.
            ((2, 2, 2, 1), "0-7", 4, plain, "0-3"),
            ((2, 2, 2, 1), "1-7", 2, plain, "2-3"),
            ((2, 2, 2, 1), "1-7", 1, plain, "1"),
            // Evenly over nodes what one node does not have.
            ((2, 1, 4, 2), "0-15", 8, spread, "0-3,8-11"),
            ((2, 1, 4, 2), "0-15", 10, spread, "0-2,4-6,8-9,12-13"),
            ((4, 1, 4, 1), "0-15", 6, spread, "0-2,4-6"),
            ((4, 1, 4, 1), "1-15", 4, spread, "4-7"),
            // From as many cores as there are.
            ((1, 1, 4, 2), "0-7", 3, cores, "0-2"),
            ((1, 1, 4, 2), "0-7", 5, cores, "0-4"),
            // Parts of one cache.
            ((2, 1, 4, 1), "1-7", 3, caches, "1-3"),
            ((2, 1, 4, 1), "2-7", 3, caches, "4-6"),
        ] {
            let m = machine(s, n, c, t);
            let got = take(&m, &parse(free).unwrap(), count, o).unwrap();
            assert_eq!(list(&got), want, "{count} of {free} of {:?}, {o:?}", (s, n, c, t));
        }
        let error = take(&machine(1, 1, 2, 1), &parse("1").unwrap(), 2, plain).unwrap_err();
        assert_eq!(error, "not enough cpus available to satisfy request: requested=2, available=1");
    }

    #[test]
    fn groups_are_whole_cores() {
        let whole = Options { across_nodes: true, full_cores: true, ..Options::default() };
        let m = machine(2, 1, 4, 2);
        let got = take(&m, &m.all(), 12, whole).unwrap();
        for cpu in &got {
            let core = m.unit(*cpu, Unit::Core).unwrap();
            assert!(m.within(&m.all(), Unit::Core, core).is_subset(&got), "{}", list(&got));
        }
        assert_eq!(m.within(&got, Unit::Node, 0).len(), 6);
    }

    proptest::proptest! {
        #[test]
        fn what_is_taken_was_free_and_is_enough(s in 1u32..3, n in 1u32..3, c in 1u32..5, t in 1u32..3,
            skip in proptest::collection::btree_set(0u32..32, 0..8), part in 0usize..100, bits in 0u8..32) {
            let m = machine(s, n, c, t);
            let free: Cpus = m.all().difference(&skip).copied().collect();
            let count = free.len() * part / 100;
            let o = Options { full_cores: bits & 1 > 0, across_nodes: bits & 2 > 0, across_cores: bits & 4 > 0,
                by_cache: bits & 8 > 0, ..Options::default() };
            let got = take(&m, &free, count, o).unwrap();
            proptest::prop_assert!(got.len() == count && got.is_subset(&free), "{:?} of {:?}", got, free);
        }
    }
}
