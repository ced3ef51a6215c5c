//! The policies of the cluster and what this node's pods have of them in the kernel.
//!
//! Objects come in, the pods of this node they touch become dirty, [`Policies::flush`] compares what each of those has
//! with what it needs. Pods that the same policies are about share what those let through.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use isopod_api::selector::LabelSelector;

use super::{
    Direction,
    grants::Grants,
    objects::{Labels, Name, Peer, Pod, Policy, Ports, Rule},
};
use crate::nft::element::Element;

/// What a pod of this node has in the kernel.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Applied {
    addresses: Vec<IpAddr>,
    ingress: Option<Arc<Grants>>,
    egress: Option<Arc<Grants>>,
}

impl Applied {
    fn elements(&self, emit: &mut dyn FnMut(Element)) {
        for (direction, grants) in [(Direction::Ingress, &self.ingress), (Direction::Egress, &self.egress)] {
            for (address, grants) in self.addresses.iter().flat_map(|a| grants.iter().map(move |g| (a, g))) {
                grants.elements(direction, address, &self.addresses, emit);
            }
        }
    }
}

/// Everything that decides what a pod's policies of one direction come to.
type CacheKey = (Direction, Vec<Name>, Box<[(Box<str>, crate::model::objects::Protocol, u16)]>);

/// The model.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    node: Box<str>,
    policies: BTreeMap<Name, Arc<Policy>>,
    namespaces: HashMap<Arc<str>, Labels>,
    /// All pods, by namespace.
    pods: HashMap<Arc<str>, BTreeMap<Name, Arc<Pod>>>,
    /// Pods of this node.
    local: BTreeSet<Name>,
    /// Who has an address of this node: of a pod that goes and one that comes with the same, the last one told of.
    owners: HashMap<IpAddr, Name>,
    applied: HashMap<Name, Applied>,
    dirty: BTreeSet<Name>,
}

impl Policies {
    /// No policies on a node.
    pub(crate) fn new(node: &str) -> Self {
        Self { node: node.into(), ..Self::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.policies.is_empty() && self.applied.is_empty()
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    pub(crate) fn set_policy(&mut self, policy: Policy) {
        if self.policies.get(&policy.name).is_some_and(|p| **p == policy) {
            return;
        }
        self.touch_selected(&policy);
        if let Some(old) = self.policies.insert(policy.name.clone(), Arc::new(policy)) {
            self.touch_selected(&old);
        }
    }

    pub(crate) fn remove_policy(&mut self, name: &Name) {
        if let Some(old) = self.policies.remove(name) {
            self.touch_selected(&old);
        }
    }

    pub(crate) fn set_namespace(&mut self, name: Arc<str>, labels: Labels) {
        if self.namespaces.get(&name) != Some(&labels) {
            self.namespaces.insert(name, labels);
            self.touch_by_namespace();
        }
    }

    pub(crate) fn remove_namespace(&mut self, name: &str) {
        if self.namespaces.remove(name).is_some() {
            self.touch_by_namespace();
        }
    }

    pub(crate) fn set_pod(&mut self, pod: Pod) {
        let old = self.pod(&pod.name).cloned();
        if old.as_deref() == Some(&pod) {
            return;
        }
        if old.as_ref().is_some_and(|old| old.node != pod.node || old.addresses != pod.addresses) {
            self.remove_pod(&pod.name);
        } else if let Some(old) = &old {
            self.touch_friends(old);
        }
        let name = pod.name.clone();
        if pod.node == self.node {
            self.local.insert(name.clone());
            self.dirty.insert(name.clone());
            for address in &pod.addresses {
                let before = self.owners.insert(*address, name.clone());
                self.dirty.extend(before);
            }
        }
        self.pods.entry(name.namespace.clone()).or_default().insert(name, Arc::new(pod.clone()));
        self.touch_friends(&pod);
    }

    pub(crate) fn remove_pod(&mut self, name: &Name) {
        let Some(list) = self.pods.get_mut(&name.namespace) else { return };
        let Some(old) = list.remove(name) else { return };
        if list.is_empty() {
            self.pods.remove(&name.namespace);
        }
        self.touch_friends(&old);
        if self.local.remove(name) {
            self.dirty.insert(name.clone());
            for address in old.addresses.iter().filter(|a| self.owners.get(*a) == Some(name)).collect::<Vec<_>>() {
                self.owners.remove(address);
                let heir = self.local.iter().find(|n| self.pod(n).is_some_and(|p| p.addresses.contains(address)));
                if let Some(heir) = heir.cloned() {
                    self.dirty.insert(heir.clone());
                    self.owners.insert(*address, heir);
                }
            }
        }
    }

    /// Forgets what `keep` is false for: after a new list.
    pub(crate) fn retain_policies(&mut self, keep: impl Fn(&Name) -> bool) {
        let gone: Vec<_> = self.policies.keys().filter(|n| !keep(n)).cloned().collect();
        gone.iter().for_each(|name| self.remove_policy(name));
    }

    pub(crate) fn retain_pods(&mut self, keep: impl Fn(&Name) -> bool) {
        let gone: Vec<_> = self.pods.values().flat_map(BTreeMap::keys).filter(|n| !keep(n)).cloned().collect();
        gone.iter().for_each(|name| self.remove_pod(name));
    }

    pub(crate) fn retain_namespaces(&mut self, keep: impl Fn(&str) -> bool) {
        let gone: Vec<_> = self.namespaces.keys().filter(|n| !keep(n)).cloned().collect();
        gone.iter().for_each(|name| self.remove_namespace(name));
    }

    fn pod(&self, name: &Name) -> Option<&Arc<Pod>> {
        self.pods.get(&name.namespace)?.get(name)
    }

    fn selected<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Name> {
        let namespace = &policy.name.namespace;
        let own = self.local.range(Name::new(namespace, "")..).take_while(move |n| n.namespace == *namespace);
        own.filter(|n| self.pod(n).is_some_and(|p| policy.pods.matches(&p.labels)))
    }

    /// The policies that select a pod.
    fn selecting<'a, 'p>(&'a self, pod: &'p Pod) -> impl Iterator<Item = &'a Policy> + use<'a, 'p> {
        let namespace = &pod.name.namespace;
        let all = self.policies.range(Name::new(namespace, "")..).map(|(_, policy)| &**policy);
        let own = all.take_while(move |p| p.name.namespace == *namespace);
        own.filter(|p| p.pods.matches(&pod.labels))
    }

    fn touch_selected(&mut self, policy: &Policy) {
        let names: Vec<_> = self.selected(policy).cloned().collect();
        self.dirty.extend(names);
    }

    /// Marks the pods whose policies speak of another pod.
    fn touch_friends(&mut self, pod: &Pod) {
        let speaking: Vec<_> = self.policies.values().filter(|p| self.speaks_of(p, pod)).cloned().collect();
        speaking.iter().for_each(|policy| self.touch_selected(policy));
    }

    fn touch_by_namespace(&mut self) {
        let by_namespace = |p: &&Arc<Policy>| {
            rules(p)
                .flat_map(|r| r.peers.iter().flatten())
                .any(|peer| matches!(peer, Peer::Pods { namespaces: Some(_), .. }))
        };
        let speaking: Vec<_> = self.policies.values().filter(by_namespace).cloned().collect();
        speaking.iter().for_each(|policy| self.touch_selected(policy));
    }

    fn speaks_of(&self, policy: &Policy, pod: &Pod) -> bool {
        rules(policy).any(|rule| match &rule.peers {
            Some(peers) if peers.iter().any(|p| self.is_peer(policy, p, pod)) => true,
            // A port's name stands for a number of each pod's own.
            Some(peers) => peers.iter().any(|p| matches!(p, Peer::Block(_))) && has_names(rule),
            None => has_names(rule),
        })
    }

    fn is_peer(&self, policy: &Policy, peer: &Peer, pod: &Pod) -> bool {
        let Peer::Pods { namespaces, pods } = peer else { return false };
        self.namespace_fits(policy, namespaces.as_ref(), &pod.name.namespace) && pods.matches(&pod.labels)
    }

    fn namespace_fits(&self, policy: &Policy, selector: Option<&LabelSelector>, namespace: &Arc<str>) -> bool {
        match selector {
            None => policy.name.namespace == *namespace,
            Some(selector) => self.namespaces.get(namespace).is_some_and(|labels| selector.matches(labels)),
        }
    }

    fn peers<'a>(&'a self, policy: &'a Policy, peer: &'a Peer) -> impl Iterator<Item = &'a Pod> {
        let spaces = self.pods.iter().filter(move |(namespace, _)| match peer {
            Peer::Pods { namespaces, .. } => self.namespace_fits(policy, namespaces.as_ref(), namespace),
            Peer::Block(_) => true,
        });
        spaces.flat_map(|(_, pods)| pods.values()).map(Arc::as_ref).filter(move |pod| match peer {
            Peer::Pods { pods, .. } => pods.matches(&pod.labels),
            Peer::Block(nets) => pod.addresses.iter().any(|a| nets.iter().any(|n| n.contains(a))),
        })
    }

    /// What one rule lets through for `pod`.
    fn grant(&self, out: &mut Grants, direction: Direction, pod: &Pod, policy: &Policy, rule: &Rule) {
        let named: Vec<Ports> =
            rule.ports.iter().flatten().filter(|p| matches!(p, Ports::Named(..))).cloned().collect();
        // Ports of packets that come in are the pod's own: names mean its numbers.
        let own = |ports: &[Ports]| -> Vec<Ports> {
            let number = |p: &Ports| match p {
                Ports::Named(protocol, name) => {
                    pod.ports_named(name, *protocol).map(|n| Ports::Range(*protocol, n, n)).collect()
                }
                range => vec![range.clone()],
            };
            ports.iter().flat_map(number).collect()
        };
        let resolved = rule.ports.as_deref().map(|ports| match direction {
            Direction::Ingress => own(ports),
            Direction::Egress => ports.to_vec(),
        });
        let (ports, outward) = (resolved.as_deref(), direction == Direction::Egress && !named.is_empty());
        match &rule.peers {
            None => {
                out.allow_all(ports);
                if outward {
                    let everybody = self.pods.values().flat_map(BTreeMap::values).map(Arc::as_ref);
                    out.allow_pods(everybody, Some(&named));
                }
            }
            Some(peers) => peers.iter().for_each(|peer| match peer {
                Peer::Pods { .. } => out.allow_pods(self.peers(policy, peer), ports),
                Peer::Block(nets) => {
                    out.allow_nets(nets, ports);
                    if outward {
                        out.allow_pods(self.peers(policy, peer), Some(&named));
                    }
                }
            }),
        }
    }

    fn grants(
        &self,
        cache: &mut HashMap<CacheKey, Arc<Grants>>,
        direction: Direction,
        pod: &Pod,
    ) -> Option<Arc<Grants>> {
        let isolating: Vec<_> = self.selecting(pod).filter_map(|p| Some((p, direction.of(p)?))).collect();
        if isolating.is_empty() {
            return None;
        }
        let key = (direction, isolating.iter().map(|(p, _)| p.name.clone()).collect(), pod.ports.clone());
        if let Some(known) = cache.get(&key) {
            return Some(known.clone());
        }
        let mut grants = Grants::default();
        for (policy, rules) in isolating {
            rules.iter().for_each(|rule| self.grant(&mut grants, direction, pod, policy, rule));
        }
        let grants = Arc::new(grants.finish());
        cache.insert(key, grants.clone());
        Some(grants)
    }

    /// Brings the applied state up to date and adds what changes in the kernel.
    pub(crate) fn flush(&mut self, removed: &mut Vec<Element>, added: &mut Vec<Element>) {
        let mut cache = HashMap::new();
        for name in std::mem::take(&mut self.dirty) {
            let new = self.pod(&name).filter(|p| p.node == self.node).map(|pod| Applied {
                addresses: pod.addresses.iter().filter(|a| self.owners.get(*a) == Some(&name)).copied().collect(),
                ingress: self.grants(&mut cache, Direction::Ingress, pod),
                egress: self.grants(&mut cache, Direction::Egress, pod),
            });
            let new = new.filter(|n| n.ingress.is_some() || n.egress.is_some());
            let old = self.applied.remove(&name).unwrap_or_default();
            diff(&old, new.as_ref().unwrap_or(&Applied::default()), removed, added);
            if let Some(new) = new {
                self.applied.insert(name, new);
            }
        }
    }

    /// Every element that should be in the kernel.
    pub(crate) fn elements(&self, emit: &mut dyn FnMut(Element)) {
        self.applied.values().for_each(|a| a.elements(emit));
    }

    /// The policies about a pod in one direction; empty when it is not isolated.
    pub(crate) fn about(&self, pod: &Pod, direction: Direction) -> Vec<&Name> {
        self.selecting(pod).filter(|p| direction.of(p).is_some()).map(|p| &p.name).collect()
    }
}

impl Direction {
    fn of(self, policy: &Policy) -> Option<&[Rule]> {
        match self {
            Self::Ingress => policy.ingress.as_deref(),
            Self::Egress => policy.egress.as_deref(),
        }
    }
}

fn rules(policy: &Policy) -> impl Iterator<Item = &Rule> {
    policy.ingress.iter().flatten().chain(policy.egress.iter().flatten())
}

fn has_names(rule: &Rule) -> bool {
    rule.ports.iter().flatten().any(|p| matches!(p, Ports::Named(..)))
}

fn diff(old: &Applied, new: &Applied, removed: &mut Vec<Element>, added: &mut Vec<Element>) {
    if old == new {
        return;
    }
    let mut before = HashSet::new();
    old.elements(&mut |e| {
        before.insert(e);
    });
    new.elements(&mut |e| {
        if !before.remove(&e) {
            added.push(e);
        }
    });
    removed.extend(before);
}
