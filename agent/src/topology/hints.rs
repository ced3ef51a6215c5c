//! Which NUMA nodes what a container wants is to come from: hints of those who give it, made one.

use super::{cpus::combinations, machine::Topology};

/// Some NUMA nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mask(pub(crate) u64);

impl Mask {
    /// These nodes.
    pub(crate) fn of(nodes: impl IntoIterator<Item = u32>) -> Self {
        Self(nodes.into_iter().filter(|n| *n < 64).fold(0, |mask, n| mask | 1 << n))
    }

    /// Whether a node is among them.
    pub(crate) fn has(self, node: u32) -> bool {
        node < 64 && self.0 >> node & 1 == 1
    }

    /// How many.
    pub(crate) fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// One by one.
    pub(crate) fn nodes(self) -> impl Iterator<Item = u32> {
        (0..64).filter(move |n| self.has(*n))
    }

    /// Fewer, or as many but lower ones.
    fn narrower(self, other: Self) -> bool {
        (self.count(), self.0) < (other.count(), other.0)
    }
}

/// Nodes something can come from; `None` is any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) mask: Option<Mask>,
    pub(crate) preferred: bool,
}

/// What can be said of one resource: nothing, or every possibility (none is: there is not enough of it).
pub(crate) type Hints = Option<Vec<Hint>>;

/// `topologyManagerPolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Policy {
    #[default]
    None,
    BestEffort,
    Restricted,
    SingleNumaNode,
}

/// Every set of nodes, smaller ones first.
pub(crate) fn masks(t: &Topology) -> Vec<Mask> {
    let nodes: Vec<u32> = t.nodes.keys().copied().collect();
    (1..=nodes.len()).flat_map(|n| combinations(&nodes, n)).map(Mask::of).collect()
}

/// Hints for some of a resource. `whole` says how much a set of nodes has, `free` how much it could give now (`None`: it
/// cannot be this set). Preferred are sets as small as the smallest that would do on an empty machine.
pub(crate) fn generate(
    t: &Topology,
    wanted: u64,
    whole: impl Fn(Mask) -> u64,
    free: impl Fn(Mask) -> Option<u64>,
) -> Vec<Hint> {
    let all = masks(t);
    let least = all.iter().find(|m| whole(**m) >= wanted).map_or(t.nodes.len() as u32, |m| m.count());
    let fits = all.into_iter().filter(|m| free(*m).is_some_and(|free| free >= wanted));
    fits.map(|mask| Hint { mask: Some(mask), preferred: mask.count() == least }).collect()
}

/// How hints are made one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Merger {
    pub(crate) policy: Policy,
    /// `prefer-closest-numa-nodes`.
    pub(crate) closest: bool,
}

impl Merger {
    /// The best of all combinations of hints, and whether the policy takes it.
    pub(crate) fn merge(&self, t: &Topology, resources: &[Hints]) -> (Hint, bool) {
        let all = Mask::of(t.nodes.keys().copied());
        let single = self.policy == Policy::SingleNumaNode;
        let lists: Vec<Vec<Hint>> = resources
            .iter()
            .map(|hints| match hints {
                None => vec![Hint { mask: None, preferred: true }],
                Some(none) if none.is_empty() => vec![Hint { mask: None, preferred: false }],
                Some(list) => list.clone(),
            })
            .map(|list| if single { list.into_iter().filter(|h| is_single(*h)).collect() } else { list })
            .collect();
        let mut best: Option<Hint> = None;
        let target = nonpreferred_target(&lists);
        each(&lists, &mut Vec::new(), &mut |choice| {
            let hint = combine(all, choice);
            if hint.mask.is_some_and(|m| m.count() > 0) && best.is_none_or(|b| self.better(t, hint, b, target)) {
                best = Some(hint);
            }
        });
        let mut best = best.unwrap_or(Hint { mask: Some(all), preferred: false });
        if single && best.mask == Some(all) {
            best.mask = None;
        }
        let admitted = match self.policy {
            Policy::None | Policy::BestEffort => true,
            Policy::Restricted | Policy::SingleNumaNode => best.preferred,
        };
        (best, admitted)
    }

    /// Whether a combination is to take the place of the best so far.
    fn better(&self, t: &Topology, new: Hint, old: Hint, target: u32) -> bool {
        let (Some(a), Some(b)) = (new.mask, old.mask) else { return false };
        match (new.preferred, old.preferred) {
            (true, false) => true,
            (false, true) => false,
            (true, true) => self.fitter(t, a, b),
            // As near as can be to what would be preferred, and not above it.
            (false, false) => match (a.count(), b.count()) {
                (_, old) if old > target => self.fitter(t, a, b),
                (new, old) if new > target || new < old => false,
                (new, old) if new > old => true,
                _ => self.fitter(t, a, b),
            },
        }
    }

    fn fitter(&self, t: &Topology, a: Mask, b: Mask) -> bool {
        if !self.closest || a.count() != b.count() {
            return a.narrower(b);
        }
        let (near, far) = (distance(t, a), distance(t, b));
        near < far || near == far && a < b
    }
}

fn is_single(h: Hint) -> bool {
    h.preferred && h.mask.is_none_or(|m| m.count() == 1)
}

/// Sum of the distances of a set's nodes to one another: for sets of one size as good as the average.
fn distance(t: &Topology, mask: Mask) -> u64 {
    let between = |a: u32, b: u32| t.nodes.get(&a).and_then(|n| n.distances.get(b as usize)).copied().unwrap_or(0);
    mask.nodes().map(|a| mask.nodes().map(|b| between(a, b)).sum::<u64>()).sum()
}

/// The most that any resource needs at least.
fn nonpreferred_target(lists: &[Vec<Hint>]) -> u32 {
    let least = |list: &Vec<Hint>| list.iter().filter_map(|h| h.mask).map(Mask::count).min();
    lists.iter().filter_map(least).max().unwrap_or(0)
}

/// What a choice of one hint per resource comes to.
fn combine(all: Mask, choice: &[Hint]) -> Hint {
    let mut masks = choice.iter().filter_map(|h| h.mask);
    let common = choice.iter().filter_map(|h| h.mask).fold(all, |a, b| Mask(a.0 & b.0));
    let first = masks.next();
    let alike = masks.all(|m| Some(m) == first);
    Hint { mask: Some(common), preferred: alike && choice.iter().all(|h| h.preferred) }
}

fn each(lists: &[Vec<Hint>], chosen: &mut Vec<Hint>, visit: &mut impl FnMut(&[Hint])) {
    let Some(list) = lists.get(chosen.len()) else { return visit(chosen) };
    for hint in list {
        chosen.push(*hint);
        each(lists, chosen, visit);
        chosen.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::{super::machine::tests::machine, *};

    fn hint(mask: u64, preferred: bool) -> Hint {
        Hint { mask: Some(Mask(mask)), preferred }
    }

    #[test]
    fn hints_are_made_one() {
        let t = machine(2, 1, 4, 1);
        let (yes, no) = (true, false);
        let one = |mask| Some(vec![hint(mask, yes), hint(0b11, no)]);
        let either = || Some(vec![hint(1, yes), hint(2, yes), hint(3, no)]);
        use Policy::{BestEffort, Restricted, SingleNumaNode};
        for (policy, resources, want) in [
            (BestEffort, vec![], (hint(3, yes), true)),
            (BestEffort, vec![None, either()], (hint(1, yes), true)),
            (Restricted, vec![either(), one(2)], (hint(2, yes), true)),
            // Nothing in common but by one that is not preferred.
            (BestEffort, vec![one(1), one(2)], (hint(1, no), true)),
            (Restricted, vec![one(1), one(2)], (hint(1, no), false)),
            (SingleNumaNode, vec![one(1), one(2)], (Hint { mask: None, preferred: no }, false)),
            (SingleNumaNode, vec![either(), None], (hint(1, yes), true)),
            // Preferred, but not one node.
            (Restricted, vec![Some(vec![hint(3, yes)])], (hint(3, yes), true)),
            (SingleNumaNode, vec![Some(vec![hint(3, yes)])], (Hint { mask: None, preferred: no }, false)),
            // There is not enough.
            (Restricted, vec![Some(vec![]), either()], (hint(1, no), false)),
            (BestEffort, vec![Some(vec![]), either()], (hint(1, no), true)),
        ] {
            assert_eq!(Merger { policy, closest: false }.merge(&t, &resources), want, "{policy:?} {resources:?}");
        }
    }

    #[test]
    fn nearer_nodes_are_better_when_that_is_asked_for() {
        let t = machine(4, 1, 4, 1);
        let far_or_near = Some(vec![hint(0b1001, true), hint(0b1100, true)]);
        let merge =
            |closest| Merger { policy: Policy::Restricted, closest }.merge(&t, std::slice::from_ref(&far_or_near));
        assert_eq!(merge(true).0, hint(0b1100, true));
        assert_eq!(merge(false).0, hint(0b1001, true));
    }

    #[test]
    fn sets_as_small_as_possible_are_preferred() {
        let t = machine(2, 1, 4, 1);
        let free = |m: Mask| Some(m.nodes().map(|n| [1, 3][n as usize]).sum());
        let hints = generate(&t, 2, |m| u64::from(m.count()) * 4, free);
        assert_eq!(hints, [hint(2, true), hint(3, false)]);
        // More than a node has: both are as few as can be.
        assert_eq!(generate(&t, 4, |m| u64::from(m.count()) * 3, free), [hint(3, true)]);
    }
}
