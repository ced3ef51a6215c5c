//! Addresses that an administrator set apart for Services: ConfigMap `kube-system/load-balancer`.
//!
//! In: the words under its key `addresses`, single addresses, ranges `FIRST-LAST` and CIDRs. Out: the address of a Service, the
//! same as long as it lasts. Pure but for the watch.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use isopod_client::reflect::Sink;
use k8s_openapi::api::core::v1::ConfigMap;
use parking_lot::Mutex;

/// The ConfigMap, and its key.
pub(super) const NAMESPACE: &str = "kube-system";
pub(super) const NAME: &str = "load-balancer";
const KEY: &str = "addresses";

/// Ranges of addresses, first and last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pool {
    ranges: Vec<(IpAddr, IpAddr)>,
}

/// What an address of a family is told by in a Service.
pub(super) fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn after(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => IpAddr::V4(u32::from(a).wrapping_add(1).into()),
        IpAddr::V6(a) => IpAddr::V6(u128::from(a).wrapping_add(1).into()),
    }
}

fn range(word: &str) -> Option<(IpAddr, IpAddr)> {
    if let Some((first, last)) = word.split_once('-') {
        let (first, last): (IpAddr, IpAddr) = (first.parse().ok()?, last.parse().ok()?);
        return (first.is_ipv4() == last.is_ipv4() && first <= last).then_some((first, last));
    }
    if let Ok(address) = word.parse() {
        return Some((address, address));
    }
    let net: IpNet = word.parse().ok()?;
    let (first, last) = (net.network(), net.broadcast());
    // The first address is the network's own, in IPv4 the last one is everybody's.
    Some(match last {
        IpAddr::V4(a) if net.prefix_len() < 31 => (after(first), IpAddr::V4((u32::from(a) - 1).into())),
        IpAddr::V6(_) if net.prefix_len() < 127 => (after(first), last),
        last => (first, last),
    })
}

impl Pool {
    /// What a ConfigMap says.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
        let one = |word: &str| {
            let usable = |(first, last): &(IpAddr, IpAddr)| {
                let out = |a: &IpAddr| a.is_unspecified() || a.is_loopback() || a.is_multicast();
                !out(first) && !out(last)
            };
            range(word).filter(usable).ok_or_else(|| {
                format!("ConfigMap {NAMESPACE}/{NAME}: \"{word}\" in {KEY} is no address, range FIRST-LAST or CIDR")
            })
        };
        Ok(Self { ranges: words.map(one).collect::<Result<_, _>>()? })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn contains(&self, address: &IpAddr) -> bool {
        self.ranges.iter().any(|(first, last)| (first..=last).contains(&address))
    }

    /// The address of one family for a Service that has some, or wants one, or takes any that is free.
    fn address(
        &self,
        of: &str,
        has: &[IpAddr],
        wish: Option<IpAddr>,
        taken: &HashSet<IpAddr>,
    ) -> Result<IpAddr, String> {
        let free = |a: &IpAddr| family(a) == of && self.contains(a) && !taken.contains(a);
        if let Some(wish) = wish.filter(|w| family(w) == of) {
            let why = if self.contains(&wish) { "belongs to another Service" } else { "is none of the pool's" };
            return if free(&wish) { Ok(wish) } else { Err(format!("{wish} {why}")) };
        }
        if let Some(address) = has.iter().find(|a| free(a)) {
            return Ok(*address);
        }
        let ranges = self.ranges.iter().filter(|(first, _)| family(first) == of);
        let all = ranges
            .flat_map(|(first, last)| std::iter::successors(Some(*first), move |a| (a < last).then(|| after(*a))));
        let mut all = all.filter(|a| !taken.contains(a));
        all.next().ok_or_else(|| format!("no {of} address of the pool is left"))
    }

    /// Whether a Service may keep what it has.
    pub(super) fn suits(&self, families: &[&str], has: &[IpAddr], wish: Option<IpAddr>) -> bool {
        let known = families.iter().filter(|of| self.ranges.iter().any(|(first, _)| family(first) == **of));
        !has.is_empty()
            && known.eq(has.iter().map(family).collect::<Vec<_>>().iter())
            && has.iter().all(|a| self.contains(a))
            && wish.is_none_or(|w| has.contains(&w))
    }

    /// Addresses of a Service, one for each of its families the pool has addresses of.
    pub(super) fn choose(
        &self,
        families: &[&str],
        has: &[IpAddr],
        wish: Option<IpAddr>,
        taken: &HashSet<IpAddr>,
    ) -> Result<Vec<IpAddr>, String> {
        let known = |of: &&&str| self.ranges.iter().any(|(first, _)| family(first) == **of);
        let chosen: Vec<&&str> = families.iter().filter(known).collect();
        if chosen.is_empty() {
            return Err(format!("the pool has no {} addresses", families.join(" or ")));
        }
        chosen.into_iter().map(|of| self.address(of, has, wish, taken)).collect()
    }
}

/// The pool as the ConfigMap has it, once that is known; an error is what is wrong with it.
pub(super) struct Pools {
    pub(super) now: Mutex<Option<Result<Arc<Pool>, String>>>,
    /// Told of every change.
    pub(super) changed: Box<dyn Fn() + Send + Sync>,
}

impl Pools {
    fn set(&self, map: Option<&ConfigMap>) {
        let text = map.and_then(|m| m.data.as_ref()?.get(KEY)).map(String::as_str).unwrap_or_default();
        let new = Pool::parse(text).map(Arc::new);
        if let Err(error) = &new {
            tracing::warn!(error, "no addresses for Services");
        }
        *self.now.lock() = Some(new);
        (self.changed)();
    }
}

impl Sink<ConfigMap> for Pools {
    fn replace(&self, maps: Vec<ConfigMap>) {
        self.set(maps.first());
    }
    fn apply(&self, map: ConfigMap) {
        self.set(Some(&map));
    }
    fn delete(&self, _: ConfigMap) {
        self.set(None);
    }
    fn revision(map: &ConfigMap) -> Option<String> {
        map.metadata.resource_version.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_written_in_three_ways() {
        let pool = Pool::parse("192.0.2.7, 192.0.2.16/30\n 2001:db8::a-2001:db8::b ").unwrap();
        for (address, inside) in [
            ("192.0.2.7", true),
            ("192.0.2.8", false),
            ("192.0.2.16", false),
            ("192.0.2.17", true),
            ("192.0.2.18", true),
            ("192.0.2.19", false),
            ("2001:db8::b", true),
            ("2001:db8::c", false),
        ] {
            assert_eq!(pool.contains(&ip(address)), inside, "{address}");
        }
        assert!(Pool::parse(" ,\n").unwrap().is_empty());
        for bad in ["x", "192.0.2.9-192.0.2.1", "192.0.2.1-2001:db8::1", "192.0.2.0/33", "127.0.0.1", "ff02::1"] {
            let error = Pool::parse(&format!("192.0.2.1 {bad}")).unwrap_err();
            assert!(error.contains(&format!("\"{bad}\"")), "{error}");
        }
    }

    #[test]
    fn a_service_keeps_its_address_and_gets_the_one_it_asks_for() {
        let pool = Pool::parse("192.0.2.7-192.0.2.9 2001:db8::1").unwrap();
        let taken = HashSet::from([ip("192.0.2.7")]);
        let v4 = |has: &[&str], wish: Option<&str>| {
            let has: Vec<IpAddr> = has.iter().map(|a| ip(a)).collect();
            pool.choose(&["IPv4"], &has, wish.map(ip), &taken).map(|all| all[0].to_string())
        };
        assert_eq!(v4(&[], None).unwrap(), "192.0.2.8");
        assert_eq!(v4(&["192.0.2.9"], None).unwrap(), "192.0.2.9");
        assert_eq!(v4(&["192.0.2.7"], None).unwrap(), "192.0.2.8", "an older one has it");
        assert_eq!(v4(&["192.0.2.8"], Some("192.0.2.9")).unwrap(), "192.0.2.9");
        assert!(pool.suits(&["IPv4"], &[ip("192.0.2.9")], None));
        for (families, has, wish) in [
            (&["IPv4"][..], "192.0.2.1", None),
            (&["IPv6"], "192.0.2.9", None),
            (&["IPv4", "IPv6"], "192.0.2.9", None),
            (&["IPv4"], "192.0.2.9", Some("192.0.2.8")),
        ] {
            assert!(!pool.suits(families, &[ip(has)], wish.map(ip)), "{families:?} {has} {wish:?}");
        }
        assert_eq!(v4(&[], Some("192.0.2.7")).unwrap_err(), "192.0.2.7 belongs to another Service");
        assert_eq!(v4(&[], Some("192.0.2.1")).unwrap_err(), "192.0.2.1 is none of the pool's");
        let both = pool.choose(&["IPv6", "IPv4"], &[], None, &taken).unwrap();
        assert_eq!(both, [ip("2001:db8::1"), ip("192.0.2.8")]);
        let all = HashSet::from(["192.0.2.7", "192.0.2.8", "192.0.2.9"].map(ip));
        assert_eq!(pool.choose(&["IPv4"], &[], None, &all).unwrap_err(), "no IPv4 address of the pool is left");
        let six = Pool::parse("2001:db8::/64").unwrap();
        assert_eq!(six.choose(&["IPv4"], &[], None, &all).unwrap_err(), "the pool has no IPv4 addresses");
        assert_eq!(six.choose(&["IPv4", "IPv6"], &[], None, &all).unwrap(), [ip("2001:db8::1")], "what can be had");
    }
}
