//! Addresses of pods that are gone: which ones packets should be refused for, and which ones the kernel refuses now.
//!
//! Pure. An address is remembered for a while only, after which the kernel lets it go by itself, and only the last ones
//! are: giving out an address normally costs nothing.

use std::{
    collections::{HashSet, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

/// How long: everybody who knew the pod has been told by then.
pub(crate) const WHILE: Duration = Duration::from_secs(10);
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
    wanted: VecDeque<(Instant, IpAddr)>,
    applied: HashSet<IpAddr>,
}

impl Gone {
    /// A pod leaves these.
    pub(crate) fn insert(&mut self, addresses: &[IpAddr], now: Instant) {
        self.expire(now);
        self.wanted.retain(|(_, a)| !addresses.contains(a));
        self.wanted.extend(addresses.iter().map(|a| (now, *a)));
        let excess = self.wanted.len().saturating_sub(MOST);
        self.wanted.drain(..excess);
    }

    /// Forgets what the kernel has certainly forgotten: it began to count a moment later.
    fn expire(&mut self, now: Instant) {
        while let Some((since, address)) = self.wanted.front()
            && now.duration_since(*since) >= 2 * WHILE
        {
            self.applied.remove(address);
            self.wanted.pop_front();
        }
    }

    /// A pod gets these; true when the kernel has to be told first.
    pub(crate) fn remove(&mut self, addresses: &[IpAddr]) -> bool {
        self.wanted.retain(|(_, a)| !addresses.contains(a));
        addresses.iter().any(|a| self.applied.contains(a))
    }

    /// All of them: for a table that is written whole.
    pub(crate) fn all(&mut self, now: Instant) -> Vec<IpAddr> {
        self.expire(now);
        // The kernel counts anew.
        self.wanted.iter_mut().for_each(|(since, _)| *since = now);
        self.applied = self.wanted.iter().map(|(_, a)| *a).collect();
        self.wanted.iter().map(|(_, a)| *a).collect()
    }

    /// What the kernel lacks, taken as done; [`Gone::fail`] takes it back.
    pub(crate) fn change(&mut self) -> Change {
        let wanted: HashSet<IpAddr> = self.wanted.iter().map(|(_, a)| *a).collect();
        let added: Vec<IpAddr> = self.wanted.iter().map(|(_, a)| *a).filter(|a| !self.applied.contains(a)).collect();
        let removed: Vec<IpAddr> = self.applied.difference(&wanted).copied().collect();
        self.applied = wanted;
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
        let (mut gone, now) = (Gone::default(), Instant::now());
        gone.insert(&[at(1), at(2)], now);
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
    fn after_a_while_nothing_has_to_be_told() {
        let (mut gone, now) = (Gone::default(), Instant::now());
        gone.insert(&[at(1)], now);
        gone.change();
        gone.insert(&[at(2)], now + 2 * WHILE);
        assert_eq!(gone.change(), Change { added: vec![at(2)], removed: vec![] });
        assert!(!gone.remove(&[at(1)]), "the kernel let it go by itself");
    }

    #[test]
    fn only_the_last_ones_are_remembered() {
        let (mut gone, now) = (Gone::default(), Instant::now());
        (0..100).for_each(|n| gone.insert(&[at(n)], now));
        assert_eq!(gone.all(now).len(), MOST);
        assert!(!gone.remove(&[at(1)]));
        assert!(gone.remove(&[at(99)]));
    }
}
