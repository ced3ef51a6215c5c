//! What the kernel holds for us, without asking it: every service's last applied state, and minimal deltas from it.
//!
//! Objects come in, the services they touch become dirty, [`Shadow::flush`] compares what each dirty service has with
//! what it needs. Elements are not stored: they are computed again from the small applied state, so memory follows the
//! number of services and endpoints, not of elements.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    objects::{Backend, Place, Policy, Protocol, Service, ServiceName, ServicePort, Slice},
    plan::{self, Frontend, Pools, Reach},
};
use crate::nft::element::{Chain, Element, Family, Key, Map, Value};

/// A change of the kernel's maps and of what depends on them.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) removed: Vec<Element>,
    pub(crate) added: Vec<Element>,
    /// UDP flows to forget.
    pub(crate) stale: Vec<StaleFlow>,
    /// Remembered clients to check: a frontend and the endpoints they may still stick to.
    pub(crate) affinity: HashMap<Frontend, HashSet<Backend>>,
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty() && self.stale.is_empty() && self.affinity.is_empty()
    }
}

/// UDP flows that would go on into nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct StaleFlow {
    pub(crate) frontend: Frontend,
    /// The endpoint that went away; `None`: flows begun before there was any endpoint, never translated.
    pub(crate) backend: Option<Backend>,
}

/// What a service has in the kernel.
#[derive(Debug, Default)]
struct Applied {
    service: Option<Arc<Service>>,
    pools: Vec<Pools>,
    denied: Vec<Frontend>,
    /// Endpoints of UDP ports that get no new traffic and still answer, by number of pool: their flows go on.
    spared: Box<[(usize, Backend)]>,
    /// Ready endpoints on this node.
    ready_here: usize,
}

impl Applied {
    fn elements(&self, emit: &mut dyn FnMut(Element)) {
        if let Some(service) = &self.service {
            plan::elements(service, &self.pools, &self.denied, emit);
        }
    }

    /// Elements other services may need as well.
    fn shared(&self) -> HashSet<(Map, IpAddr)> {
        let Some(service) = self.service.as_ref().filter(|s| s.ours) else { return HashSet::new() };
        let clusters = service.cluster_ips.iter().map(|a| (Map::ClusterIps, *a));
        let local = self.pools.iter().flat_map(|p| p.local.iter()).map(|b| (Map::Hairpin, b.ip()));
        clusters.chain(local).collect()
    }

    /// Numbers of the pools behind a frontend.
    fn behind(&self, frontend: &Frontend) -> impl Iterator<Item = usize> {
        let ports = self.service.iter().flat_map(|s| s.ports.iter().enumerate());
        let matches = |port: &ServicePort| match frontend {
            Frontend::Address(_, proto, p) => port.protocol == *proto && port.port == *p,
            Frontend::NodePort(_, proto, p) => port.protocol == *proto && port.node_port == *p,
        };
        ports.filter(move |(_, port)| matches(port)).map(|(n, _)| plan::pool_index(n, frontend.family()))
    }

    fn backends(&self, frontend: &Frontend) -> HashSet<Backend> {
        let pools = self.behind(frontend).filter_map(|n| self.pools.get(n));
        pools.flat_map(|p| p.cluster.iter().chain(p.local.iter())).collect()
    }

    /// Those that answer, whether or not they get new traffic.
    fn alive(&self, frontend: &Frontend) -> HashSet<Backend> {
        let mut all = self.backends(frontend);
        let spared = |n| self.spared.iter().filter(move |(number, _)| *number == n).map(|(_, b)| *b);
        all.extend(self.behind(frontend).flat_map(spared));
        all
    }

    /// Whether a policy Local, internal and external, finds no endpoint here though there are some.
    fn lacks_local(&self) -> (usize, usize) {
        let lacks = self.pools.iter().any(|p| p.local.is_empty() && !p.cluster.is_empty());
        let Some(service) = self.service.as_ref().filter(|s| s.ours && lacks) else { return (0, 0) };
        let is_local = |policy| usize::from(policy == Policy::Local);
        (is_local(service.internal_policy), is_local(service.external_policy))
    }

    /// The health check port and how many ready endpoints are here: while the last ones terminate they still get what
    /// comes, but load balancers are to send nothing more.
    fn health_check(&self) -> Option<(u16, usize)> {
        let service = self.service.as_ref().filter(|s| s.ours && s.external_policy == Policy::Local)?;
        (service.health_check_node_port != 0).then_some((service.health_check_node_port, self.ready_here))
    }

    fn frontends(&self) -> impl Iterator<Item = Frontend> + '_ {
        let all = self.service.iter().flat_map(|s| plan::frontends(s));
        all.filter(|f| !self.denied.contains(f))
    }
}

/// Sees a service, its port, a frontend with how it treats clients, the endpoints, and whether another service has it.
pub(crate) type Visitor<'a> = dyn FnMut(&Service, &ServicePort, (Frontend, Reach, bool), &Pools, bool) + 'a;

/// The model.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    place: Place,
    services: HashMap<ServiceName, Arc<Service>>,
    /// By service, in order of their own names: most have one.
    slices: HashMap<ServiceName, Vec<Slice>>,
    applied: HashMap<ServiceName, Applied>,
    owners: HashMap<Frontend, ServiceName>,
    waiting: HashMap<Frontend, Vec<ServiceName>>,
    shared: HashMap<(Map, IpAddr), u32>,
    dirty: HashSet<ServiceName>,
    /// Port and number of endpoints here.
    health_checks: BTreeMap<ServiceName, (u16, usize)>,
    without_local: (usize, usize),
}

impl Shadow {
    /// An empty model on a node.
    pub(crate) fn new(place: Place) -> Self {
        Self { place, ..Self::default() }
    }

    /// Tells where the node is. Everything is planned again when that changed.
    pub(crate) fn set_place(&mut self, place: Place) {
        if self.place != place {
            self.place = place;
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    pub(crate) fn set_service(&mut self, service: Service) {
        if self.services.get(&service.name).is_some_and(|s| **s == service) {
            return;
        }
        self.dirty.insert(service.name.clone());
        self.services.insert(service.name.clone(), Arc::new(service));
    }

    pub(crate) fn remove_service(&mut self, name: &ServiceName) {
        if self.services.remove(name).is_some() {
            self.dirty.insert(name.clone());
        }
    }

    pub(crate) fn set_slice(&mut self, slice: Slice) {
        let slices = self.slices.entry(slice.service.clone()).or_default();
        let place = slices.binary_search_by(|s| s.name.cmp(&slice.name));
        if place.is_ok_and(|at| slices[at] == slice) {
            return;
        }
        self.dirty.insert(slice.service.clone());
        match place {
            Ok(at) => slices[at] = slice,
            Err(at) => {
                slices.reserve_exact(1);
                slices.insert(at, slice);
            }
        }
    }

    pub(crate) fn remove_slice(&mut self, service: &ServiceName, name: &str) {
        let Some(slices) = self.slices.get_mut(service) else { return };
        if let Ok(at) = slices.binary_search_by(|s| (*s.name).cmp(name)) {
            slices.remove(at);
            self.dirty.insert(service.clone());
        }
        if slices.is_empty() {
            self.slices.remove(service);
        }
    }

    /// Forgets the services and slices for which `keep` is false: after a new list.
    pub(crate) fn retain_services(&mut self, keep: impl Fn(&ServiceName) -> bool) {
        let gone: Vec<_> = self.services.keys().filter(|n| !keep(n)).cloned().collect();
        gone.iter().for_each(|name| self.remove_service(name));
    }

    pub(crate) fn retain_slices(&mut self, keep: impl Fn(&str, &str) -> bool) {
        let gone: Vec<_> = self
            .slices
            .iter()
            .flat_map(|(service, slices)| slices.iter().map(move |s| (service.clone(), s.name.clone())))
            .filter(|(service, name)| !keep(&service.namespace, name))
            .collect();
        gone.iter().for_each(|(service, name)| self.remove_slice(service, name));
    }

    pub(crate) fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    pub(crate) fn slices(&self, name: &ServiceName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(name).into_iter().flatten()
    }

    pub(crate) fn dirty(&self) -> &HashSet<ServiceName> {
        &self.dirty
    }

    pub(crate) fn service_count(&self) -> usize {
        self.services.len()
    }

    /// Services with a health check port, with how many endpoints this node has for each.
    pub(crate) fn health_checks(&self) -> Vec<(u16, ServiceName, usize)> {
        self.health_checks.iter().map(|(name, (port, count))| (*port, name.clone(), *count)).collect()
    }

    /// How many services with policy Local, internal and external, have endpoints but none here.
    pub(crate) fn without_local(&self) -> (usize, usize) {
        self.without_local
    }

    /// Every frontend, in order of names.
    pub(crate) fn visit(&self, see: &mut Visitor<'_>) {
        let mut names: Vec<_> = self.applied.keys().collect();
        names.sort();
        for applied in names.into_iter().filter_map(|n| self.applied.get(n)) {
            let Some(service) = applied.service.as_ref().filter(|s| s.ours) else { continue };
            for (number, port) in service.ports.iter().enumerate() {
                for front in plan::frontends_of_port(service, port) {
                    let Some(pools) = applied.pools.get(plan::pool_index(number, front.0.family())) else { continue };
                    see(service, port, front, pools, applied.denied.contains(&front.0));
                }
            }
        }
    }

    /// Every element that should be in the kernel.
    pub(crate) fn elements(&self, emit: &mut dyn FnMut(Element)) {
        self.applied.values().for_each(|a| a.elements(emit));
        self.shared.keys().for_each(|(map, address)| emit(member(*map, address)));
    }

    /// Brings the applied state up to date and says what changes in the kernel.
    pub(crate) fn flush(&mut self) -> Delta {
        let mut delta = Delta::default();
        self.flush_into(Some(&mut delta));
        cancel_out(&mut delta);
        delta
    }

    /// Brings the applied state up to date when what the kernel has is not known anyway.
    pub(crate) fn catch_up(&mut self) {
        self.flush_into(None);
    }

    fn flush_into(&mut self, mut delta: Option<&mut Delta>) {
        // Removal first: what one service lets go another may wait for.
        while !self.dirty.is_empty() {
            let mut names: Vec<_> = std::mem::take(&mut self.dirty).into_iter().collect();
            names.sort_by(|a, b| (self.services.contains_key(a), a).cmp(&(self.services.contains_key(b), b)));
            names.iter().for_each(|name| self.flush_service(name, delta.as_deref_mut()));
        }
    }

    fn flush_service(&mut self, name: &ServiceName, mut delta: Option<&mut Delta>) {
        let old = self.applied.remove(name).unwrap_or_default();
        let new = self.replan(name, &old);
        self.share(&old, &new, delta.as_deref_mut());
        self.count(name, &old, &new);
        if let Some(delta) = delta {
            if old.service.is_none() {
                new.elements(&mut |e| delta.added.push(e));
            } else {
                diff(&old, &new, delta);
            }
            leftovers(&old, &new, delta);
        }
        if new.service.is_some() {
            self.applied.insert(name.clone(), new);
        }
    }

    /// Follows what is counted over all services.
    fn count(&mut self, name: &ServiceName, old: &Applied, new: &Applied) {
        let (before, after) = (old.lacks_local(), new.lacks_local());
        self.without_local.0 = self.without_local.0 + after.0 - before.0;
        self.without_local.1 = self.without_local.1 + after.1 - before.1;
        match new.health_check() {
            Some(check) => drop(self.health_checks.insert(name.clone(), check)),
            None => drop(self.health_checks.remove(name)),
        }
    }

    fn replan(&mut self, name: &ServiceName, old: &Applied) -> Applied {
        let service = self.services.get(name).cloned();
        let wanted = service.as_ref().map(|s| plan::frontends(s)).unwrap_or_default();
        let denied = self.claim(name, old, &wanted);
        let (mut pools, mut spared) = (Vec::new(), Vec::new());
        if let Some(service) = service.as_ref().filter(|s| s.ours) {
            let slices = self.slices(name);
            for port in &service.ports {
                for family in Family::ALL {
                    if !service.cluster_ips.iter().any(|a| Family::of(a) == family) {
                        pools.push(Pools::default());
                        continue;
                    }
                    let picked = plan::select(port, slices.clone(), family, &self.place);
                    let mut pool = old.pools_of(port.protocol, port.port, family).cloned().unwrap_or_default();
                    plan::merge(&mut pool.cluster, &picked.cluster);
                    plan::merge(&mut pool.local, &picked.local);
                    if port.protocol == Protocol::Udp {
                        let others = plan::spared(port, slices.clone(), family, &pool);
                        spared.extend(others.into_iter().map(|b| (pools.len(), b)));
                    }
                    pools.push(pool);
                }
            }
        }
        let ready_here = plan::ready_here(self.slices(name));
        Applied { service, pools, denied, spared: spared.into(), ready_here }
    }

    /// Takes the wanted frontends, lets go the old ones, and returns those another service holds.
    fn claim(&mut self, name: &ServiceName, old: &Applied, wanted: &[Frontend]) -> Vec<Frontend> {
        for frontend in old.service.iter().flat_map(|s| plan::frontends(s)) {
            if wanted.binary_search(&frontend).is_ok() {
                continue;
            }
            if let Some(waiters) = self.waiting.get_mut(&frontend) {
                waiters.retain(|w| w != name);
            }
            if self.owners.get(&frontend) == Some(name) {
                self.owners.remove(&frontend);
                self.dirty.extend(self.waiting.remove(&frontend).into_iter().flatten());
            }
        }
        let mut denied = Vec::new();
        for frontend in wanted {
            let owner = self.owners.entry(*frontend).or_insert_with(|| name.clone());
            if owner != name {
                tracing::warn!(service = %name, owner = %owner, ?frontend, "address and port belong to another service");
                denied.push(*frontend);
                let waiters = self.waiting.entry(*frontend).or_default();
                if !waiters.contains(name) {
                    waiters.push(name.clone());
                }
            }
        }
        denied
    }

    fn share(&mut self, old: &Applied, new: &Applied, mut delta: Option<&mut Delta>) {
        let (before, after) = (old.shared(), new.shared());
        for shared in after.difference(&before) {
            let users = self.shared.entry(*shared).or_default();
            *users += 1;
            if *users == 1 {
                delta.iter_mut().for_each(|d| d.added.push(member(shared.0, &shared.1)));
            }
        }
        for shared in before.difference(&after) {
            let Some(users) = self.shared.get_mut(shared) else { continue };
            *users -= 1;
            if *users == 0 {
                self.shared.remove(shared);
                delta.iter_mut().for_each(|d| d.removed.push(member(shared.0, &shared.1)));
            }
        }
    }
}

impl Applied {
    fn pools_of(&self, protocol: Protocol, port: u16, family: Family) -> Option<&Pools> {
        let service = self.service.as_ref()?;
        let number = service.ports.iter().position(|p| p.protocol == protocol && p.port == port)?;
        self.pools.get(plan::pool_index(number, family))
    }
}

/// The element of an address that services share: their own, or that of an endpoint that may be its own client.
fn member(map: Map, address: &IpAddr) -> Element {
    let key = Key::EMPTY.address(address);
    let key = if map == Map::Hairpin { key.address(address) } else { key };
    Element { family: Family::of(address), map, key, value: Value::Member }
}

fn diff(old: &Applied, new: &Applied, delta: &mut Delta) {
    let mut before = HashMap::new();
    old.elements(&mut |e| {
        before.insert(e.id(), e);
    });
    new.elements(&mut |e| match before.remove(&e.id()) {
        Some(same) if same == e => {}
        Some(other) => {
            delta.removed.push(other);
            delta.added.push(e);
        }
        None => delta.added.push(e),
    });
    delta.removed.extend(before.into_values());
}

/// A frontend that moved between services in one flush shows up removed and added; equal pairs are no change, and of an
/// element added and removed later only the last word counts.
pub(crate) fn cancel_out(delta: &mut Delta) {
    if delta.removed.is_empty() {
        return;
    }
    let added: HashSet<Element> = delta.added.iter().copied().collect();
    let both: HashSet<Element> = delta.removed.iter().filter(|e| added.contains(e)).copied().collect();
    if !both.is_empty() {
        delta.added.retain(|e| !both.contains(e));
        delta.removed.retain(|e| !both.contains(e));
    }
}

/// Collects what the datapath remembers and must forget: UDP flows and sticky clients of endpoints that went away.
fn leftovers(old: &Applied, new: &Applied, delta: &mut Delta) {
    let was_sticky = old.service.as_ref().is_some_and(|s| s.affinity.is_some());
    let is_sticky = new.service.as_ref().is_some_and(|s| s.affinity.is_some());
    for frontend in old.frontends().filter(|f| was_sticky || f.protocol() == Protocol::Udp) {
        let stays = new.frontends().any(|f| f == frontend);
        if frontend.protocol() == Protocol::Udp {
            let after = if stays { new.alive(&frontend) } else { HashSet::new() };
            let gone = &old.alive(&frontend) - &after;
            delta.stale.extend(gone.into_iter().map(|b| StaleFlow { frontend, backend: Some(b) }));
        }
        let policy = |a: &Applied| a.service.as_ref().map(|s| (s.external_policy, s.internal_policy));
        let after = if stays { new.backends(&frontend) } else { HashSet::new() };
        let lost = was_sticky && !old.backends(&frontend).is_subset(&after);
        if was_sticky && (!is_sticky || lost || policy(old) != policy(new)) {
            let keep = if is_sticky && policy(old) == policy(new) { after } else { HashSet::new() };
            delta.affinity.insert(frontend, keep);
        }
    }
    for frontend in new.frontends().filter(|f| f.protocol() == Protocol::Udp) {
        if old.backends(&frontend).is_empty() && !new.backends(&frontend).is_empty() {
            delta.stale.push(StaleFlow { frontend, backend: None });
        }
    }
}

/// The chains elements go to that are made when they are needed.
#[derive(Default)]
pub(crate) struct Needed {
    /// The largest number of endpoints any element picks from.
    pub(crate) picks: u32,
    /// The affinity timeouts in use.
    pub(crate) timeouts: Vec<u32>,
}

impl Needed {
    pub(crate) fn see(&mut self, element: &Element) {
        if let Value::Goto(chain) = element.value {
            self.see_chain(&chain);
        }
    }

    pub(crate) fn see_chain(&mut self, chain: &Chain) {
        match chain {
            Chain::Pick(n)
            | Chain::MasqueradePick(n)
            | Chain::LocalPick(n)
            | Chain::NodePortPick(n)
            | Chain::NodePortLocalPick(n) => self.picks = self.picks.max(*n),
            Chain::Remember(t) if !self.timeouts.contains(t) => self.timeouts.push(*t),
            _ => {}
        }
    }
}
