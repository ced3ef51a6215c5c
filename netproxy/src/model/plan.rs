//! Which endpoints a service's traffic may reach, and which map elements make the kernel do it.
//!
//! Worked example: service 10.96.0.9:80/tcp with endpoints A, B, C (C on this node) is one element in `services` going to
//! `pick_3` and three in `endpoints`, keyed (10.96.0.9, tcp, 80, 0..2). When B goes away C moves to index 1, index 2 is
//! deleted and the service element goes to `pick_2`: three elements whatever the number of endpoints. Endpoints of this
//! node have a second list from index `LOCAL_BASE` on, present only where a Local policy uses it.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::backends::Backends;
use super::objects::{Backend, Endpoint, Place, Policy, Protocol, Service, ServicePort, Slice};
use crate::nft::element::{Chain, Element, Family, Key, Map, Value};

/// First index of the endpoints of this node.
pub(crate) const LOCAL_BASE: u32 = 1 << 31;

/// Where clients find one port of a service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum Frontend {
    /// At an address.
    Address(IpAddr, Protocol, u16),
    /// At a port of every node.
    NodePort(Family, Protocol, u16),
}

impl Frontend {
    pub(crate) fn family(&self) -> Family {
        match self {
            Self::Address(a, ..) => Family::of(a),
            Self::NodePort(f, ..) => *f,
        }
    }

    pub(crate) fn protocol(&self) -> Protocol {
        match self {
            Self::Address(_, p, _) | Self::NodePort(_, p, _) => *p,
        }
    }

    pub(crate) fn key(&self) -> Key {
        match self {
            Self::Address(a, proto, port) => Key::EMPTY.address(a).protocol(*proto).port(*port),
            Self::NodePort(_, proto, port) => Key::EMPTY.protocol(*proto).port(*port),
        }
    }
}

/// How a frontend treats its clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reach {
    /// Cluster address.
    Internal(Policy),
    /// External address, balancer address or node port.
    External(Policy),
}

/// Usable endpoints of one port in one family, in the order of their indices.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Pools {
    /// Of the whole cluster.
    pub(crate) cluster: Backends,
    /// Of this node.
    pub(crate) local: Backends,
}

/// Every frontend of a port with how it treats clients; `firewalled` ones only let source ranges in.
pub(crate) fn frontends_of_port<'a>(
    service: &'a Service,
    port: &'a ServicePort,
) -> impl Iterator<Item = (Frontend, Reach, bool)> + 'a {
    let at = |a: &IpAddr| Frontend::Address(*a, port.protocol, port.port);
    let external = Reach::External(service.external_policy);
    let firewalled = !service.source_ranges.is_empty();
    let families = Family::ALL
        .into_iter()
        .filter(|f| port.node_port != 0 && service.cluster_ips.iter().any(|a| Family::of(a) == *f));
    let cluster = service.cluster_ips.iter().map(move |a| (at(a), Reach::Internal(service.internal_policy), false));
    let outside = service.external_ips.iter().map(move |a| (at(a), external, false));
    let balancer = service.balancer_ips.iter().map(move |a| (at(a), external, firewalled));
    let nodes = families.map(move |f| (Frontend::NodePort(f, port.protocol, port.node_port), external, false));
    cluster.chain(outside).chain(balancer).chain(nodes)
}

/// Every frontend of a service, once.
pub(crate) fn frontends(service: &Service) -> Vec<Frontend> {
    if !service.ours {
        return Vec::new();
    }
    let mut all: Vec<_> =
        service.ports.iter().flat_map(|p| frontends_of_port(service, p)).map(|(frontend, ..)| frontend).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Whether topology hints keep traffic for `place` away from an endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Anywhere,
    SameNode,
    SameZone,
}

impl Topology {
    /// Hints count only when every ready endpoint has them and some point here.
    fn choose(ready: impl Iterator<Item = Endpoint>, place: &Place) -> Self {
        let (mut all_nodes, mut some_node, mut all_zones, mut some_zone) = (true, false, true, false);
        for endpoint in ready {
            let rare = endpoint.rare.as_deref();
            all_nodes &= rare.is_some_and(|r| r.for_nodes.is_some());
            some_node |= Self::SameNode.allows(&endpoint, place);
            all_zones &= rare.is_some_and(|r| r.for_zones.is_some());
            some_zone |= Self::SameZone.allows(&endpoint, place);
        }
        match () {
            () if all_nodes && some_node => Self::SameNode,
            () if all_zones && some_zone => Self::SameZone,
            () => Self::Anywhere,
        }
    }

    fn allows(self, endpoint: &Endpoint, place: &Place) -> bool {
        let has = |list: Option<&[Box<str>]>, own: &str| list.is_some_and(|l| l.iter().any(|n| **n == *own));
        let rare = endpoint.rare.as_deref();
        match self {
            Self::Anywhere => true,
            Self::SameNode => has(rare.and_then(|r| r.for_nodes.as_deref()), &place.node),
            Self::SameZone => {
                place.zone.as_deref().is_some_and(|zone| has(rare.and_then(|r| r.for_zones.as_deref()), zone))
            }
        }
    }
}

/// The endpoints behind a port, with their own numbers of it.
fn behind<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    family: Family,
) -> impl Iterator<Item = (Endpoint, u16)> + Clone {
    let endpoints = slices.flat_map(move |slice| {
        let target = slice.ports.iter().find(|p| p.name == port.name && p.protocol == port.protocol);
        let port = target.map(|p| p.port);
        slice.endpoints.iter().filter_map(move |e| Some((e, port?)))
    });
    endpoints.filter(move |(e, _)| Family::of(&e.address) == family)
}

/// The endpoints of a port that still answer and get no new traffic: they leave, or hints point elsewhere.
pub(crate) fn spared<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    family: Family,
    pools: &Pools,
) -> Vec<Backend> {
    let serving = behind(port, slices, family).filter(|(e, _)| e.ready || e.serving);
    let all = serving.map(|(e, port)| Backend::new(e.address, port));
    all.filter(|b| !pools.cluster.contains(b) && !pools.local.contains(b)).collect()
}

/// The endpoints traffic for `port` may reach, sorted: ready ones, else those still serving while they terminate.
pub(crate) fn select<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    family: Family,
    place: &Place,
) -> Pools {
    let endpoints = behind(port, slices, family);
    let ready = |e: &Endpoint| e.ready;
    let leaving = |e: &Endpoint| !e.ready && e.serving && e.terminating;
    let topology = Topology::choose(endpoints.clone().map(|(e, _)| e).filter(|e| ready(e)), place);
    let collect = |keep: &dyn Fn(&Endpoint) -> bool| {
        let mut list: Vec<Backend> =
            endpoints.clone().filter(|(e, _)| keep(e)).map(|(e, port)| Backend::new(e.address, port)).collect();
        list.sort_unstable();
        list.dedup();
        list
    };
    let or = |first: Vec<Backend>, second: &dyn Fn(&Endpoint) -> bool| {
        if first.is_empty() { collect(second) } else { first }
    };
    let cluster = or(collect(&|e| ready(e) && topology.allows(e, place)), &leaving);
    let local = or(collect(&|e| ready(e) && e.here), &|e| leaving(e) && e.here);
    Pools { cluster: cluster.into_iter().collect(), local: local.into_iter().collect() }
}

/// How many ready endpoints are on this node; a pod of both families counts once.
pub(crate) fn ready_here<'a>(slices: impl Iterator<Item = &'a Slice>) -> usize {
    let mut seen = [const { BTreeSet::new() }; Family::ALL.len()];
    for endpoint in slices.flat_map(|s| s.endpoints.iter()).filter(|e| e.ready && e.here) {
        seen[Family::of(&endpoint.address).index()].insert(endpoint.address);
    }
    seen.iter().map(BTreeSet::len).max().unwrap_or(0)
}

/// Changes `pool` into `wanted` (sorted), moving as few endpoints as possible: the last one takes a removed one's place.
pub(crate) fn merge(pool: &mut Backends, wanted: &Backends) {
    if pool.is_empty() {
        pool.clone_from(wanted);
        return;
    }
    let wanted: Vec<Backend> = wanted.iter().collect();
    let mut list: Vec<Backend> = pool.iter().collect();
    let mut index = 0;
    while index < list.len() {
        if wanted.binary_search(&list[index]).is_ok() {
            index += 1;
        } else {
            list.swap_remove(index);
        }
    }
    let mut kept = list.clone();
    kept.sort_unstable();
    list.extend(wanted.into_iter().filter(|b| kept.binary_search(b).is_err()));
    *pool = list.into_iter().collect();
}

/// All pools of a service: port by port, both families.
pub(crate) fn pool_index(port: usize, family: Family) -> usize {
    port * Family::ALL.len() + family.index()
}

/// Calls `emit` with every element the service needs, leaving out the frontends `denied` says belong to another one.
pub(crate) fn elements(service: &Service, pools: &[Pools], denied: &[Frontend], emit: &mut dyn FnMut(Element)) {
    if !service.ours {
        return;
    }
    for (number, port) in service.ports.iter().enumerate() {
        for (frontend, reach, firewalled) in frontends_of_port(service, port) {
            if denied.contains(&frontend) {
                continue;
            }
            let Some(pools) = pools.get(pool_index(number, frontend.family())) else { continue };
            let mut writer = Writer { frontend, emit };
            writer.route(reach, pools);
            if let Some(timeout) = service.affinity {
                writer.verdict(Map::Affine, Map::NodePortAffine, Chain::Remember(timeout));
            }
            if firewalled {
                writer.firewall(&service.source_ranges);
            }
        }
    }
}

fn count(list: &Backends) -> u32 {
    u32::try_from(list.len()).unwrap_or(LOCAL_BASE - 1).min(LOCAL_BASE - 1)
}

/// Emits the elements of one frontend; each map has a twin keyed without the address, for node ports.
struct Writer<'a> {
    frontend: Frontend,
    emit: &'a mut dyn FnMut(Element),
}

impl Writer<'_> {
    fn put(&mut self, map: Map, twin: Map, key: Key, value: Value) {
        let map = if matches!(self.frontend, Frontend::Address(..)) { map } else { twin };
        (self.emit)(Element { family: self.frontend.family(), map, key, value });
    }

    fn verdict(&mut self, map: Map, twin: Map, chain: Chain) {
        self.put(map, twin, self.frontend.key(), Value::Goto(chain));
    }

    fn refuse(&mut self, chain: Chain) {
        self.verdict(Map::Unavailable, Map::NodePortUnavailable, chain);
    }

    fn backends(&mut self, base: u32, list: &Backends) {
        for (backend, index) in list.iter().zip(base..) {
            let value = Value::Backend(Key::EMPTY.backend(&backend));
            self.put(Map::Endpoints, Map::NodePortEndpoints, self.frontend.key().index(index), value);
        }
    }

    /// Endpoints first, then what leads to them: a load takes several transactions.
    fn route(&mut self, reach: Reach, pools: &Pools) {
        let (cluster, local) = (count(&pools.cluster), count(&pools.local));
        let at_node = matches!(self.frontend, Frontend::NodePort(..));
        match reach {
            _ if cluster == 0 && local == 0 => self.refuse(Chain::Reject),
            Reach::Internal(Policy::Local) if local == 0 => self.refuse(Chain::Drop),
            Reach::Internal(Policy::Local) => {
                self.backends(LOCAL_BASE, &pools.local);
                self.verdict(Map::Services, Map::NodePorts, Chain::LocalPick(local));
            }
            Reach::Internal(Policy::Cluster) => {
                self.backends(0, &pools.cluster);
                self.verdict(Map::Services, Map::NodePorts, Chain::Pick(cluster));
            }
            Reach::External(Policy::Cluster) => {
                let pick = if at_node { Chain::NodePortPick(cluster) } else { Chain::MasqueradePick(cluster) };
                self.backends(0, &pools.cluster);
                self.verdict(Map::Services, Map::NodePorts, pick);
            }
            Reach::External(Policy::Local) => self.route_external_local(pools, at_node),
        }
    }

    fn route_external_local(&mut self, pools: &Pools, at_node: bool) {
        let (cluster, local) = (count(&pools.cluster), count(&pools.local));
        let (policy, any, own) = if at_node {
            (Chain::NodePortLocal, Chain::NodePortPick(cluster), Chain::NodePortLocalPick(local))
        } else {
            (Chain::ExternalLocal, Chain::Pick(cluster), Chain::LocalPick(local))
        };
        if cluster > 0 {
            self.backends(0, &pools.cluster);
            self.verdict(Map::ExternalCluster, Map::NodePortCluster, any);
        }
        if local > 0 {
            self.backends(LOCAL_BASE, &pools.local);
            self.verdict(Map::ExternalLocal, Map::NodePortLocal, own);
        } else {
            self.refuse(Chain::DropExternal);
        }
        self.verdict(Map::Services, Map::NodePorts, policy);
    }

    fn firewall(&mut self, ranges: &[IpNet]) {
        let key = self.frontend.key();
        self.put(Map::Firewall, Map::Firewall, key, Value::Member);
        for range in disjoint(ranges, self.frontend.family()) {
            let first = key.address(&range.network());
            let last = key.address(&range.broadcast());
            self.put(Map::Allowed, Map::Allowed, first, Value::Until(last));
        }
    }
}

/// The ranges of a family without those inside another: the kernel refuses overlapping elements.
fn disjoint(ranges: &[IpNet], family: Family) -> Vec<IpNet> {
    IpNet::aggregate(&ranges.iter().copied().filter(|r| Family::of(&r.addr()) == family).collect())
}
