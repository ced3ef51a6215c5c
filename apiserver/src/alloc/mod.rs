//! Allocation of cluster IPs and node ports.
//!
//! What is taken is what the stored Services say, plus what writes in flight hold ([`Held`]); nothing else is recorded, so
//! nothing can leak: a failed write drops its hold, a deleted Service stops counting, a restart starts from the cache. The
//! stored part is kept up to date by comparing the cache's objects by revision and parsing only what changed.

pub(crate) mod objects;
mod ranges;

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use isopod_api::{gvk::Gvr, meta};
use parking_lot::Mutex;
use serde_json::Value;

use crate::objects::Objects;

pub use ranges::{IpRange, PortRange};

/// Why something could not be allocated; texts as upstream's allocators say it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The address or port is in use.
    #[error("provided IP is already allocated")]
    AddressTaken,
    /// The address is outside the service CIDR.
    #[error("the provided network does not match the current range")]
    AddressOutside,
    /// The port is in use.
    #[error("provided port is already allocated")]
    PortTaken,
    /// The port is outside the range.
    #[error("provided port is not in the valid range. The range of valid ports is {0}-{1}")]
    PortOutside(u16, u16),
    /// Nothing is left.
    #[error("range is full")]
    Full,
}

/// Allocates for the Services of one API server.
pub struct ServiceAllocator {
    /// The configured range, tried first.
    addresses: Arc<IpRange>,
    ports: PortRange,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: Option<u64>,
    /// Addresses that have an object of their own, and the generation they were read at.
    claimed: (Option<u64>, HashSet<IpAddr>),
    /// Ranges of ServiceCIDR objects, and the generation they were read at.
    ranges: (Option<u64>, Vec<Arc<IpRange>>),
    stored: HashMap<(Box<str>, Box<str>), (u64, Taken)>,
    addresses: HashMap<IpAddr, u32>,
    /// A port may be used once per protocol.
    ports: HashMap<(u16, Box<str>), u32>,
}

#[derive(Default, Clone, PartialEq, Debug)]
struct Taken {
    addresses: Vec<IpAddr>,
    ports: Vec<(u16, Box<str>)>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Item {
    Address(IpAddr),
    Port(u16, Box<str>),
}

/// What a write in flight has taken; dropping it lets go.
pub struct Held {
    allocator: Arc<Mutex<HashSet<Item>>>,
    items: Vec<Item>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.allocator.lock();
        for item in &self.items {
            held.remove(item);
        }
    }
}

/// One write's allocations.
pub struct Session<'a> {
    allocator: &'a ServiceAllocator,
    /// Items the Service had before: they are its own.
    own: Taken,
    held: Held,
}

impl ServiceAllocator {
    /// An allocator for a service CIDR and a node port range (inclusive).
    pub fn new(cidr: IpNet, node_ports: (u16, u16)) -> Self {
        Self { addresses: Arc::new(IpRange::new(cidr)), ports: PortRange::new(node_ports), state: Mutex::default() }
    }

    /// The family of the service CIDR, `IPv4` or `IPv6`.
    pub fn family(&self) -> &'static str {
        self.addresses.family()
    }

    /// Begins the allocations of one write.
    pub fn begin(&self, objects: &dyn Objects, old: Option<&Value>) -> Session<'_> {
        self.refresh(objects);
        Session {
            allocator: self,
            own: old.map(taken).unwrap_or_default(),
            held: Held { allocator: self.shared(), items: Vec::new() },
        }
    }

    fn shared(&self) -> Arc<Mutex<HashSet<Item>>> {
        Arc::clone(self.ports.in_flight())
    }

    /// Reads which addresses have an object; those of stored Services are counted already.
    fn refresh_claims(&self, objects: &dyn Objects) {
        let gvr = Gvr::new("networking.k8s.io", "v1", "ipaddresses");
        let generation = objects.generation(&gvr);
        if self.state.lock().claimed.0 == Some(generation) {
            return;
        }
        let ours = |object: &crate::objects::Object| {
            object.labels.iter().any(|(key, value)| (&**key, &**value) == objects::MANAGED)
        };
        let list = objects.list(&gvr, "");
        let claimed =
            list.iter().filter(|object| !ours(object)).filter_map(|object| object.name.parse().ok()).collect();
        self.state.lock().claimed = (Some(generation), claimed);
    }

    /// Reads which ranges there are besides the configured one.
    fn refresh_ranges(&self, objects: &dyn Objects) {
        let gvr = Gvr::new("networking.k8s.io", "v1", "servicecidrs");
        let generation = objects.generation(&gvr);
        if self.state.lock().ranges.0 == Some(generation) {
            return;
        }
        let usable = objects.list(&gvr, "").into_iter().map(|object| object.value()).filter(usable);
        let cidrs = usable.flat_map(|cidr| cidr["spec"]["cidrs"].as_array().cloned().unwrap_or_default());
        let ranges = cidrs.filter_map(|cidr| cidr.as_str()?.parse().ok()).map(|cidr| Arc::new(IpRange::new(cidr)));
        let extra = ranges.filter(|range| range.family() == self.family() && *range != self.addresses).collect();
        self.state.lock().ranges = (Some(generation), extra);
    }

    /// Every range, the configured one first.
    fn ranges(&self) -> Vec<Arc<IpRange>> {
        let mut all = vec![Arc::clone(&self.addresses)];
        all.extend(self.state.lock().ranges.1.iter().cloned());
        all
    }

    fn refresh(&self, objects: &dyn Objects) {
        self.refresh_ranges(objects);
        self.refresh_claims(objects);
        let gvr = Gvr { group: String::new(), version: "v1".to_owned(), resource: "services".to_owned() };
        let generation = objects.generation(&gvr);
        if self.state.lock().generation == Some(generation) {
            return;
        }
        let list = objects.list(&gvr, "");
        let mut state = self.state.lock();
        let mut gone: HashSet<(Box<str>, Box<str>)> = state.stored.keys().cloned().collect();
        for object in &list {
            let key = (object.namespace.clone(), object.name.clone());
            gone.remove(&key);
            if state.stored.get(&key).is_some_and(|(revision, _)| *revision >= object.revision) {
                continue;
            }
            let now = taken(&object.value());
            state.forget(&key);
            state.remember(key, object.revision, now);
        }
        for key in gone {
            state.forget(&key);
        }
        // Most of a large cluster's Services may be gone.
        if state.stored.capacity() > 4 * state.stored.len() + 64 {
            state.stored.shrink_to_fit();
            state.addresses.shrink_to_fit();
            state.ports.shrink_to_fit();
        }
        state.generation = Some(generation);
    }
}

impl State {
    fn forget(&mut self, key: &(Box<str>, Box<str>)) {
        let Some((_, taken)) = self.stored.remove(key) else { return };
        for address in taken.addresses {
            decrement(&mut self.addresses, &address);
        }
        for port in taken.ports {
            decrement(&mut self.ports, &port);
        }
    }

    fn remember(&mut self, key: (Box<str>, Box<str>), revision: u64, taken: Taken) {
        for address in &taken.addresses {
            *self.addresses.entry(*address).or_default() += 1;
        }
        for port in &taken.ports {
            *self.ports.entry(port.clone()).or_default() += 1;
        }
        self.stored.insert(key, (revision, taken));
    }
}

/// Whether a ServiceCIDR may be allocated from. One that nobody has judged yet may.
fn usable(cidr: &Value) -> bool {
    let mut conditions = cidr["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.find(|condition| condition["type"] == "Ready");
    meta::deletion_timestamp(cidr).is_none() && ready.is_none_or(|condition| condition["status"] == "True")
}

fn decrement<K: std::hash::Hash + Eq>(map: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = map.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            map.remove(key);
        }
    }
}

/// What a Service holds.
fn taken(service: &Value) -> Taken {
    let spec = &service["spec"];
    let addresses =
        spec["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str).filter_map(|s| s.parse().ok());
    let mut ports: Vec<(u16, Box<str>)> = Vec::new();
    for port in spec["ports"].as_array().into_iter().flatten() {
        if let Some(n) = port["nodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0) {
            ports.push((n, port["protocol"].as_str().unwrap_or("TCP").into()));
        }
    }
    if let Some(n) = spec["healthCheckNodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0) {
        ports.push((n, "TCP".into()));
    }
    Taken { addresses: addresses.collect(), ports }
}

impl Session<'_> {
    /// Takes a given address.
    pub fn address(&mut self, ip: IpAddr) -> Result<(), Error> {
        if self.own.addresses.contains(&ip) {
            return Ok(());
        }
        if !self.allocator.ranges().iter().any(|range| range.contains(ip)) {
            return Err(Error::AddressOutside);
        }
        self.take(Item::Address(ip)).then_some(()).ok_or(Error::AddressTaken)
    }

    /// Takes any address.
    pub fn any_address(&mut self) -> Result<IpAddr, Error> {
        let ranges = self.allocator.ranges();
        let mut free = ranges.iter().flat_map(|range| range.candidates());
        free.find(|ip| self.take(Item::Address(*ip))).ok_or(Error::Full)
    }

    /// Takes a given node port.
    pub fn port(&mut self, port: u16, protocol: &str) -> Result<(), Error> {
        let item = (port, Box::from(protocol));
        if self.own.ports.contains(&item) {
            return Ok(());
        }
        if !self.allocator.ports.contains(port) {
            let (low, high) = self.allocator.ports.bounds();
            return Err(Error::PortOutside(low, high));
        }
        self.take(Item::Port(item.0, item.1)).then_some(()).ok_or(Error::PortTaken)
    }

    /// Takes any node port that is free for all of `protocols`.
    pub fn any_port(&mut self, protocols: &[&str]) -> Result<u16, Error> {
        for port in self.allocator.ports.candidates() {
            let before = self.held.items.len();
            if protocols.iter().all(|p| self.take(Item::Port(port, Box::from(*p)))) {
                return Ok(port);
            }
            let mut held = self.held.allocator.lock();
            for item in self.held.items.drain(before..) {
                held.remove(&item);
            }
        }
        Err(Error::Full)
    }

    /// Ends the allocations; the answer is kept while the write is in flight.
    pub fn finish(self) -> Held {
        self.held
    }

    fn take(&mut self, item: Item) -> bool {
        // Lock order: stored state, then holds.
        let state = self.allocator.state.lock();
        let stored = match &item {
            Item::Address(ip) => state.addresses.contains_key(ip) || state.claimed.1.contains(ip),
            Item::Port(port, protocol) => state.ports.contains_key(&(*port, protocol.clone())),
        };
        if stored {
            return false;
        }
        let fresh = self.held.allocator.lock().insert(item.clone());
        if fresh {
            self.held.items.push(item);
        }
        fresh
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::FakeObjects;

    fn allocator() -> ServiceAllocator {
        ServiceAllocator::new("10.96.0.0/29".parse().expect("cidr"), (30000, 30003))
    }

    fn service(name: &str, ip: &str, node_port: u16) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "d"},
            "spec": {"clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP", "nodePort": node_port}]}})
    }

    #[test]
    fn more_ranges_are_used_when_the_first_is_full() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        let cidr = |name: &str, cidr: &str, ready: &str, ends: bool| {
            let mut object = json!({"metadata": {"name": name}, "spec": {"cidrs": [cidr]},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}});
            if ends {
                object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            objects.put_as("servicecidrs", object);
        };
        cidr("more", "10.97.0.0/30", "True", false);
        cidr("unready", "10.98.0.0/30", "False", false);
        cidr("ending", "10.99.0.0/30", "True", true);
        cidr("six", "fd00::/120", "True", false);
        let mut session = allocator.begin(&objects, None);
        let all: Vec<String> = std::iter::from_fn(|| session.any_address().ok()).map(|ip| ip.to_string()).collect();
        assert_eq!(all.len(), 8, "six of the first, then two: {all:?}");
        assert!(
            all[..6].iter().all(|ip| ip.starts_with("10.96.")) && all[6..].iter().all(|ip| ip.starts_with("10.97."))
        );
        drop(session.finish());
        let mut session = allocator.begin(&objects, None);
        assert_eq!(session.address("10.97.0.1".parse().expect("ip")), Ok(()));
        assert_eq!(session.address("10.98.0.1".parse().expect("ip")), Err(Error::AddressOutside));
        drop(session.finish());
        cidr("more", "10.97.0.0/30", "True", true);
        let mut session = allocator.begin(&objects, None);
        assert_eq!(session.address("10.97.0.1".parse().expect("ip")), Err(Error::AddressOutside));
    }

    #[test]
    fn holds_end_when_dropped() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        let mut first = allocator.begin(&objects, None);
        let ip: IpAddr = "10.96.0.3".parse().expect("ip");
        assert_eq!(first.address(ip), Ok(()));
        let held = first.finish();
        assert_eq!(allocator.begin(&objects, None).address(ip), Err(Error::AddressTaken));
        drop(held);
        assert_eq!(allocator.begin(&objects, None).address(ip), Ok(()));
    }

    #[test]
    fn stored_services_count() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        objects.put_as("services", service("a", "10.96.0.2", 30001));
        let mut session = allocator.begin(&objects, None);
        assert_eq!(session.address("10.96.0.2".parse().expect("ip")), Err(Error::AddressTaken));
        assert_eq!(session.port(30001, "TCP"), Err(Error::PortTaken));
        assert_eq!(session.port(30001, "UDP"), Ok(()));
        assert_eq!(session.port(80, "TCP"), Err(Error::PortOutside(30000, 30003)));
        assert_eq!(session.address("10.97.0.2".parse().expect("ip")), Err(Error::AddressOutside));
        drop(session);
        objects.remove("services", "d", "a");
        assert_eq!(allocator.begin(&objects, None).address("10.96.0.2".parse().expect("ip")), Ok(()));
    }

    #[test]
    fn addresses_others_claim_count() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        objects.put_as("ipaddresses", json!({"metadata": {"name": "10.96.0.2"}}));
        let (key, value) = objects::MANAGED;
        objects.put_as("ipaddresses", json!({"metadata": {"name": "10.96.0.3", "labels": {key: value}}}));
        let mut session = allocator.begin(&objects, None);
        assert_eq!(session.address("10.96.0.2".parse().expect("ip")), Err(Error::AddressTaken));
        assert_eq!(session.address("10.96.0.3".parse().expect("ip")), Ok(()));
    }

    #[test]
    fn ranges_run_out() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        let mut session = allocator.begin(&objects, None);
        let got: HashSet<IpAddr> = (0..6).filter_map(|_| session.any_address().ok()).collect();
        assert_eq!(got.len(), 6);
        assert_eq!(session.any_address(), Err(Error::Full));
        assert!((0..4).all(|_| session.any_port(&["TCP"]).is_ok()));
        assert_eq!(session.any_port(&["TCP"]), Err(Error::Full));
    }

    #[test]
    fn own_items_are_kept() {
        let (allocator, objects) = (allocator(), FakeObjects::default());
        let old = service("a", "10.96.0.2", 30001);
        objects.put_as("services", old.clone());
        let mut session = allocator.begin(&objects, Some(&old));
        assert_eq!(session.address("10.96.0.2".parse().expect("ip")), Ok(()));
        assert_eq!(session.port(30001, "TCP"), Ok(()));
    }
}
