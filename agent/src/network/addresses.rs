//! Which pod has which address. Pure: the records of the pods on disk are the truth, this is their index.
//!
//! Addresses are given out in turn, so that one that was just let go rests as long as possible.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

/// Why there is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no address left in {0}")]
pub(crate) struct Exhausted(pub(crate) IpNet);

/// The addresses of this node's ranges.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    ranges: Vec<IpNet>,
    last: HashMap<IpNet, u128>,
    taken: HashMap<IpAddr, String>,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u32::from(a).into(),
        IpAddr::V6(a) => a.into(),
    }
}

fn nth(range: &IpNet, offset: u128) -> IpAddr {
    match range {
        IpNet::V4(r) => Ipv4Addr::from(u32::from(r.network()).wrapping_add(offset as u32)).into(),
        IpNet::V6(r) => Ipv6Addr::from(u128::from(r.network()).wrapping_add(offset)).into(),
    }
}

/// The node's own address in a range: the first.
pub(crate) fn gateway(range: &IpNet) -> IpAddr {
    nth(range, 1)
}

/// First and last offset given to pods: not the network, the gateway, the broadcast address.
fn offsets(range: &IpNet) -> (u128, u128) {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let size = 1u128.checked_shl(bits).unwrap_or(u128::MAX);
    (2, size.saturating_sub(2))
}

impl Addresses {
    pub(crate) fn set_ranges(&mut self, ranges: Vec<IpNet>) {
        self.ranges = ranges;
    }

    pub(crate) fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }

    /// Notes an address that is in use.
    pub(crate) fn note(&mut self, address: IpAddr, owner: &str) {
        self.taken.insert(address, owner.into());
    }

    /// Hands addresses over to another owner.
    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        self.taken.values_mut().filter(|o| *o == from).for_each(|o| *o = to.into());
    }

    /// Lets all addresses of an owner go.
    pub(crate) fn release(&mut self, owner: &str) {
        self.taken.retain(|_, o| o != owner);
    }

    /// One address of every range, or none at all.
    pub(crate) fn allocate(&mut self, owner: &str) -> Result<Vec<IpAddr>, Exhausted> {
        let mut found = Vec::new();
        for range in self.ranges.clone() {
            match self.next(&range) {
                Some(address) => {
                    self.taken.insert(address, owner.into());
                    found.push(address);
                }
                None => {
                    found.iter().for_each(|a| drop(self.taken.remove(a)));
                    return Err(Exhausted(range));
                }
            }
        }
        Ok(found)
    }

    fn next(&mut self, range: &IpNet) -> Option<IpAddr> {
        let (first, last) = offsets(range);
        if first > last {
            return None;
        }
        let base = number(range.network());
        let highest = self.taken.keys().filter(|a| range.contains(*a)).map(|a| number(*a) - base).max();
        let start = self.last.get(range).copied().or(highest).map_or(first, |l| l + 1);
        // A range that is larger than what is taken has a free address within that many steps.
        let steps = (last - first + 1).min(self.taken.len() as u128 + 1);
        let count = last - first + 1;
        let offset = (0..steps)
            .map(|step| first + (start.max(first) - first + step) % count)
            .find(|offset| !self.taken.contains_key(&nth(range, *offset)))?;
        self.last.insert(*range, offset);
        Some(nth(range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(range: &str) -> Addresses {
        Addresses { ranges: vec![range.parse().unwrap()], ..Addresses::default() }
    }

    #[test]
    fn a_small_range_is_used_up_and_used_again() {
        let mut all = addresses("10.0.0.0/29");
        let got: Vec<String> = (0..5).map(|n| all.allocate(&n.to_string()).unwrap()[0].to_string()).collect();
        assert_eq!(got, ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert_eq!(all.allocate("x"), Err(Exhausted("10.0.0.0/29".parse().unwrap())));
        all.release("1");
        all.rename("3", "three");
        assert_eq!(all.allocate("x").unwrap(), ["10.0.0.3".parse::<IpAddr>().unwrap()]);
        all.release("three");
        assert_eq!(all.allocate("y").unwrap(), ["10.0.0.5".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_released_address_rests() {
        let mut all = addresses("10.0.0.0/24");
        all.allocate("a").unwrap();
        all.release("a");
        assert_eq!(all.allocate("b").unwrap()[0].to_string(), "10.0.0.3");
    }

    #[test]
    fn after_a_restart_it_goes_on_behind_what_is_taken() {
        let mut all = addresses("10.0.0.0/24");
        all.note("10.0.0.9".parse().unwrap(), "a");
        assert_eq!(all.allocate("b").unwrap()[0].to_string(), "10.0.0.10");
    }

    #[test]
    fn two_families_or_nothing() {
        let mut all = addresses("10.0.0.0/30");
        all.ranges.push("2001:db8::/64".parse().unwrap());
        assert_eq!(all.allocate("a").unwrap().len(), 2);
        assert!(all.allocate("b").is_err());
        assert_eq!(all.taken.len(), 2);
        assert_eq!(gateway(&all.ranges[1]).to_string(), "2001:db8::1");
    }
}
