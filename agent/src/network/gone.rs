//! Addresses of pods that are gone: which ones packets should be refused for, and which ones the kernel refuses now.
//!
//! Pure. The last ones to go are remembered, few enough that an address is forgotten long before its turn comes again:
//! giving out an address normally costs nothing.

use std::{
    collections::{HashSet, VecDeque},
    net::IpAddr,
};

/// Addresses remembered at most.
const MOST: usize = 64;

/// What to change in the kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) added: Vec<IpAddr>,
    pub(crate) removed: Vec<IpAddr>,
}

/// Addresses that were pods'.
#[derive(Debug, Default)]
pub(crate) struct Gone {
    wanted: VecDeque<IpAddr>,
    applied: HashSet<IpAddr>,
}

impl Gone {
    /// A pod leaves these.
    pub(crate) fn insert(&mut self, addresses: &[IpAddr]) {
        for address in addresses {
            self.wanted.retain(|a| a != address);
            self.wanted.push_back(*address);
        }
        let excess = self.wanted.len().saturating_sub(MOST);
        self.wanted.drain(..excess);
    }

    /// A pod gets these; true when the kernel has to be told first.
    pub(crate) fn remove(&mut self, addresses: &[IpAddr]) -> bool {
        self.wanted.retain(|a| !addresses.contains(a));
        addresses.iter().any(|a| self.applied.contains(a))
    }

    /// All of them: for a table that is written whole.
    pub(crate) fn all(&mut self) -> Vec<IpAddr> {
        self.applied = self.wanted.iter().copied().collect();
        self.wanted.iter().copied().collect()
    }

    /// What the kernel lacks, taken as done; [`Gone::fail`] takes it back.
    pub(crate) fn change(&mut self) -> Change {
        let added = self.wanted.iter().filter(|a| !self.applied.contains(a)).copied().collect::<Vec<_>>();
        let removed = self.applied.iter().filter(|a| !self.wanted.contains(a)).copied().collect::<Vec<_>>();
        self.applied.extend(&added);
        self.applied.retain(|a| !removed.contains(a));
        Change { added, removed }
    }

    /// The kernel refused a change.
    pub(crate) fn fail(&mut self, change: &Change) {
        self.applied.retain(|a| !change.added.contains(a));
        self.applied.extend(&change.removed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn addresses_rest_until_they_are_given_out_again() {
        let mut gone = Gone::default();
        gone.insert(&[at(1), at(2)]);
        assert_eq!(gone.change(), Change { added: vec![at(1), at(2)], removed: vec![] });
        assert_eq!(gone.change(), Change::default());
        assert!(!gone.remove(&[at(3)]), "never a pod's");
        assert!(gone.remove(&[at(1)]));
        let change = gone.change();
        assert_eq!(change, Change { added: vec![], removed: vec![at(1)] });
        gone.fail(&change);
        assert_eq!(gone.change().removed, [at(1)], "again after a failure");
    }

    #[test]
    fn only_the_last_ones_are_remembered() {
        let mut gone = Gone::default();
        (0..100).for_each(|n| gone.insert(&[at(n)]));
        assert_eq!(gone.all().len(), MOST);
        assert!(!gone.remove(&[at(1)]));
        assert!(gone.remove(&[at(99)]));
    }
}
