//! The ranges to allocate from: which values exist and in which order free ones are tried.
//!
//! Both ranges keep a lower band for values people ask for by name; values nobody chose come from above it first, starting
//! at a random place so that a freed value is not reused at once.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;
use parking_lot::Mutex;

use super::Item;

/// Addresses of a service CIDR, without the network's and (IPv4) the broadcast address.
#[derive(PartialEq, Eq)]
pub struct IpRange {
    net: IpNet,
    size: u64,
    band: u64,
}

impl IpRange {
    /// The range of a CIDR; at most 2^20 addresses of a large one are used.
    pub fn new(net: IpNet) -> Self {
        let net = net.trunc();
        let bits = u32::from(net.max_prefix_len() - net.prefix_len());
        let all = 1u64 << bits.min(20);
        let reserved = if net.addr().is_ipv4() && bits <= 20 { 2 } else { 1 };
        let size = all.saturating_sub(reserved);
        let band = if size < 16 { 0 } else { (size / 16).clamp(16, 256).min(size) };
        Self { net, size, band }
    }

    /// `IPv4` or `IPv6`.
    pub fn family(&self) -> &'static str {
        if self.net.addr().is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// Whether an address may be allocated.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let broadcast = self.net.addr().is_ipv4() && ip == self.net.broadcast();
        self.net.contains(&ip) && ip != self.net.network() && !broadcast
    }

    fn at(&self, offset: u64) -> IpAddr {
        match self.net.network() {
            IpAddr::V4(v4) => Ipv4Addr::from(u32::from(v4).wrapping_add(offset as u32 + 1)).into(),
            IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6).wrapping_add(u128::from(offset) + 1)).into(),
        }
    }

    /// Every address, in the order to try.
    pub fn candidates(&self) -> impl Iterator<Item = IpAddr> + '_ {
        order(self.size, self.band).map(|offset| self.at(offset))
    }
}

/// Node ports, and the values of both ranges that writes in flight hold.
pub struct PortRange {
    low: u16,
    high: u16,
    in_flight: Arc<Mutex<HashSet<Item>>>,
}

impl PortRange {
    /// An inclusive range.
    pub fn new((low, high): (u16, u16)) -> Self {
        Self { low, high, in_flight: Arc::default() }
    }

    pub(super) fn in_flight(&self) -> &Arc<Mutex<HashSet<Item>>> {
        &self.in_flight
    }

    /// First and last port.
    pub fn bounds(&self) -> (u16, u16) {
        (self.low, self.high)
    }

    /// Whether a port is in the range.
    pub fn contains(&self, port: u16) -> bool {
        (self.low..=self.high).contains(&port)
    }

    /// Every port, in the order to try.
    pub fn candidates(&self) -> impl Iterator<Item = u16> + '_ {
        let size = u64::from(self.high.saturating_sub(self.low)) + 1;
        let band = if size < 16 { 0 } else { (size / 32).clamp(16, 128).min(size) };
        order(size, band).map(|offset| self.low + offset as u16)
    }
}

/// Offsets above the band from a random start, then the band's.
fn order(size: u64, band: u64) -> impl Iterator<Item = u64> {
    let upper = size - band;
    let start = if upper == 0 { 0 } else { rand::random_range(0..upper) };
    (0..upper).map(move |i| band + (start + i) % upper).chain(0..band)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offset_once_and_the_band_last() {
        let all: Vec<u64> = order(100, 16).collect();
        assert_eq!(all.len(), 100);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 100);
        assert_eq!(all[84..], (0..16).collect::<Vec<u64>>());
    }

    #[test]
    fn edges_are_reserved() {
        let range = IpRange::new("10.96.0.0/30".parse().expect("cidr"));
        let mut all: Vec<String> = range.candidates().map(|ip| ip.to_string()).collect();
        all.sort();
        assert_eq!(all, ["10.96.0.1", "10.96.0.2"]);
        assert!(!range.contains("10.96.0.3".parse().expect("ip")));
    }
}
