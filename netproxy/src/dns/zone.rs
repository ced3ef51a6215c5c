//! The cluster's zone: names of services, their ports and their endpoints.
//!
//! `SERVICE.NAMESPACE.svc.ZONE`, `_PORT._PROTO.SERVICE.NAMESPACE.svc.ZONE`, `HOST.SERVICE.NAMESPACE.svc.ZONE`,
//! `A-B-C-D.NAMESPACE.pod.ZONE` and the reverse names of cluster addresses and headless endpoints.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use crate::model::objects::{Kind, Protocol, Service, ServiceName, Slice};

/// Version of the specification, answered at `dns-version`.
const VERSION: &str = "1.1.0";

/// One record of a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Record<'z> {
    Address(IpAddr),
    /// A port of the service, or of one of its hosts.
    Service {
        port: u16,
        host: Option<&'z str>,
    },
    Alias(&'z str),
    Text(&'static str),
}

/// A name that exists.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Node<'z, 'q> {
    /// Other names are below it.
    Inner,
    Version,
    Pod(IpAddr),
    /// A service, and the labels in front of its name.
    Service(Owner<'z>, &'q [&'q str]),
}

/// A service in the zone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'z> {
    pub(crate) name: &'z str,
    pub(crate) namespace: &'z str,
    entry: &'z Entry,
}

/// A named port: name, protocol, number.
type Port = (Arc<str>, Protocol, u16);

/// What an address is called: a service, or a host of it.
type Pointer = (ServiceName, Option<Box<str>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Host {
    /// Its own label: the pod's host name, or its address with dashes.
    label: Box<str>,
    address: IpAddr,
    /// Whether an earlier host has this address as well.
    again: bool,
    ports: Arc<[Port]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Cluster { addresses: Box<[IpAddr]>, ports: Box<[Port]> },
    Headless { hosts: Box<[Host]> },
    External { target: Box<str> },
}

/// Everything known. Names are kept in lower case, as Kubernetes has them.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    domain: String,
    namespaces: HashMap<Arc<str>, HashMap<Arc<str>, Entry>>,
    reverse: HashMap<IpAddr, Vec<Pointer>>,
    serial: u32,
    ready: bool,
}

fn dashed(address: &IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

/// The address a pod's name spells: `10-244-0-5`, `2001-db8--1`.
fn undashed(label: &str) -> Option<IpAddr> {
    label
        .replace('-', ".")
        .parse::<Ipv4Addr>()
        .map(IpAddr::from)
        .ok()
        .or_else(|| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::from).ok())
}

impl Zone {
    pub(crate) fn new(domain: &str) -> Self {
        Self { domain: domain.trim_matches('.').to_ascii_lowercase(), ..Self::default() }
    }

    pub(crate) fn domain(&self) -> &str {
        &self.domain
    }

    pub(crate) fn serial(&self) -> u32 {
        self.serial
    }

    /// Whether the API server's lists have been seen once.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(crate) fn set_ready(&mut self) {
        self.ready = true;
    }

    /// Takes over what the model knows of one service now.
    pub(crate) fn update<'a>(
        &mut self,
        name: &ServiceName,
        service: Option<&Service>,
        slices: impl Iterator<Item = &'a Slice>,
    ) {
        let entry = service.map(|service| match &service.kind {
            Kind::External(target) => Entry::External { target: target.trim_end_matches('.').into() },
            Kind::Headless => Entry::Headless { hosts: hosts(slices) },
            Kind::Cluster => Entry::Cluster {
                addresses: service.cluster_ips.clone(),
                ports: service.ports.iter().map(|p| (p.name.clone(), p.protocol, p.port)).collect(),
            },
        });
        let old = self.namespaces.get(&name.namespace).and_then(|n| n.get(&name.name));
        if old == entry.as_ref() {
            return;
        }
        self.serial = self.serial.wrapping_add(1);
        if let Some(old) = old.cloned() {
            self.forget(name, &old);
        }
        if let Some(entry) = entry {
            for (address, host) in pointers(&entry) {
                self.reverse.entry(address).or_insert_with(|| Vec::with_capacity(1)).push((name.clone(), host));
            }
            self.namespaces.entry(name.namespace.clone()).or_default().insert(name.name.clone(), entry);
        }
    }

    fn forget(&mut self, name: &ServiceName, old: &Entry) {
        for (address, host) in pointers(old) {
            if let Some(list) = self.reverse.get_mut(&address) {
                list.retain(|(n, h)| (n, h) != (name, &host));
                if list.is_empty() {
                    self.reverse.remove(&address);
                }
            }
        }
        if let Some(services) = self.namespaces.get_mut(&name.namespace) {
            services.remove(&name.name);
            if services.is_empty() {
                self.namespaces.remove(&name.namespace);
            }
        }
    }

    /// Names of an address; empty when none is known.
    pub(crate) fn names_of(&self, address: &IpAddr) -> Vec<String> {
        let list = self.reverse.get(address).map(Vec::as_slice).unwrap_or_default();
        let spell = |(name, host): &Pointer| match host {
            Some(host) => format!("{host}.{}", self.full(name)),
            None => self.full(name),
        };
        list.iter().map(spell).collect()
    }

    fn full(&self, name: &ServiceName) -> String {
        format!("{}.{}.svc.{}", name.name, name.namespace, self.domain)
    }

    /// Finds a name by the labels in front of the zone's own, in lower case; `None`: it does not exist.
    pub(crate) fn find<'z, 'q>(&'z self, labels: &'q [&'q str]) -> Option<Node<'z, 'q>> {
        match labels {
            [] | ["svc" | "pod"] => Some(Node::Inner),
            ["dns-version"] => Some(Node::Version),
            [namespace, "svc" | "pod"] => self.namespaces.get(*namespace).map(|_| Node::Inner),
            [label, _, "pod"] => undashed(label).map(Node::Pod),
            [rest @ .., service, namespace, "svc"] => {
                let (namespace, services) = self.namespaces.get_key_value(*namespace)?;
                let (name, entry) = services.get_key_value(*service)?;
                let owner = Owner { name, namespace, entry };
                owner.has(rest).then_some(if owner.is_inner(rest) { Node::Inner } else { Node::Service(owner, rest) })
            }
            _ => None,
        }
    }
}

impl<'z> Node<'z, '_> {
    /// Calls `see` with every record of the name.
    pub(crate) fn records(&self, see: &mut dyn FnMut(Record<'z>)) {
        match self {
            Self::Inner => {}
            Self::Version => see(Record::Text(VERSION)),
            Self::Pod(address) => see(Record::Address(*address)),
            Self::Service(owner, rest) => owner.records(rest, see),
        }
    }

    /// Calls `see` with the addresses of the names that service records mention: of a host, or of the service itself.
    pub(crate) fn targets(&self, see: &mut dyn FnMut(Option<&'z str>, IpAddr)) {
        let Self::Service(owner, rest) = self else { return };
        match owner.entry {
            Entry::Cluster { addresses, .. } => addresses.iter().for_each(|a| see(None, *a)),
            Entry::Headless { hosts } => {
                let host = if let [label] = *rest { of_label(hosts, label) } else { hosts };
                let named = |h: &&Host| h.ports.iter().any(|p| rest.len() < 2 || matches(p, rest));
                host.iter().filter(named).for_each(|h| see(Some(&h.label), h.address));
            }
            Entry::External { .. } => {}
        }
    }
}

/// The hosts of one label: they are in order of labels.
fn of_label<'a>(hosts: &'a [Host], label: &str) -> &'a [Host] {
    let start = hosts.partition_point(|h| &*h.label < label);
    let end = hosts.partition_point(|h| &*h.label <= label);
    &hosts[start..end]
}

/// The ports of a host that none before it under the same name has.
fn own_ports(hosts: &[Host], number: usize) -> impl Iterator<Item = &Port> {
    let host = &hosts[number];
    let earlier = move || hosts[..number].iter().rev().take_while(move |h| h.label == host.label);
    host.ports.iter().filter(move |p| !earlier().any(|h| h.ports.contains(p)))
}

impl<'z> Owner<'z> {
    fn all_ports(&self) -> impl Iterator<Item = &'z Port> {
        let (own, hosts): (&[Port], &[Host]) = match self.entry {
            Entry::Cluster { ports, .. } => (ports, &[]),
            Entry::Headless { hosts } => (&[], hosts),
            Entry::External { .. } => (&[], &[]),
        };
        own.iter().chain(hosts.iter().flat_map(|h| &*h.ports))
    }

    /// Whether the labels name a protocol of its ports, below which they are.
    fn is_inner(&self, rest: &[&str]) -> bool {
        matches!(rest, [label] if label.starts_with('_'))
    }

    /// Whether the service has a name with these labels in front.
    fn has(&self, rest: &[&str]) -> bool {
        match (self.entry, rest) {
            // The specification's own exception: a headless service without endpoints has no name.
            (Entry::Headless { hosts }, []) => !hosts.is_empty(),
            (_, []) => true,
            (_, [proto]) if self.is_inner(rest) => {
                let proto = proto.strip_prefix('_');
                self.all_ports().any(|(name, p, _)| !name.is_empty() && proto == Some(p.lower()))
            }
            (Entry::Headless { hosts }, [label]) => !of_label(hosts, label).is_empty(),
            (_, [_, _]) => self.all_ports().any(|p| matches(p, rest)),
            _ => false,
        }
    }

    fn records(&self, rest: &[&str], see: &mut dyn FnMut(Record<'z>)) {
        match (self.entry, rest) {
            (Entry::External { target }, _) => see(Record::Alias(target)),
            (Entry::Cluster { addresses, ports }, _) => {
                if rest.is_empty() {
                    addresses.iter().for_each(|a| see(Record::Address(*a)));
                }
                let ports = ports.iter().filter(|p| matches(p, rest));
                ports.for_each(|p| see(Record::Service { port: p.2, host: None }));
            }
            (Entry::Headless { hosts }, [label]) => {
                let hosts = of_label(hosts, label);
                for (number, host) in hosts.iter().enumerate() {
                    see(Record::Address(host.address));
                    own_ports(hosts, number).for_each(|p| see(Record::Service { port: p.2, host: Some(&host.label) }));
                }
            }
            (Entry::Headless { hosts }, _) => {
                for (number, host) in hosts.iter().enumerate() {
                    if rest.is_empty() && !host.again {
                        see(Record::Address(host.address));
                    }
                    let ports = own_ports(hosts, number).filter(|p| matches(p, rest));
                    ports.for_each(|p| see(Record::Service { port: p.2, host: Some(&host.label) }));
                }
            }
        }
    }
}

/// Whether a port answers to `[_name, _protocol]`; all ports answer to the service's own name.
fn matches((name, protocol, _): &Port, rest: &[&str]) -> bool {
    match rest {
        [] => true,
        [port, proto] => {
            port.strip_prefix('_') == Some(name)
                && proto.strip_prefix('_') == Some(protocol.lower())
                && !name.is_empty()
        }
        _ => false,
    }
}

fn pointers(entry: &Entry) -> Vec<(IpAddr, Option<Box<str>>)> {
    match entry {
        Entry::Cluster { addresses, .. } => addresses.iter().map(|a| (*a, None)).collect(),
        Entry::Headless { hosts } => hosts.iter().map(|h| (h.address, Some(h.label.clone()))).collect(),
        Entry::External { .. } => Vec::new(),
    }
}

/// The ready endpoints, in order of their labels; one that several slices have is one host with all their ports.
fn hosts<'a>(slices: impl Iterator<Item = &'a Slice>) -> Box<[Host]> {
    let mut hosts: Vec<Host> = Vec::new();
    for slice in slices {
        let ports: Arc<[Port]> = slice.ports.iter().map(|p| (p.name.clone(), p.protocol, p.port)).collect();
        for endpoint in slice.endpoints.iter().filter(|e| e.ready) {
            let label = endpoint
                .rare
                .as_ref()
                .and_then(|r| r.hostname.clone())
                .unwrap_or_else(|| dashed(&endpoint.address).into());
            hosts.push(Host { label, address: endpoint.address, again: false, ports: ports.clone() });
        }
    }
    hosts.sort_by(|a, b| (&a.label, a.address).cmp(&(&b.label, b.address)));
    hosts.dedup_by(|later, first| {
        let same = (&later.label, later.address) == (&first.label, first.address);
        if same && later.ports != first.ports {
            let more = later.ports.iter().filter(|p| !first.ports.contains(p));
            first.ports = first.ports.iter().chain(more).cloned().collect();
        }
        same
    });
    let mut known = HashSet::new();
    hosts.iter_mut().for_each(|h| h.again = !known.insert(h.address));
    hosts.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        objects::Rare,
        tests::{service, slice},
    };

    fn zone() -> Zone {
        let mut zone = Zone::new("cluster.local.");
        let web = service("default", "web", &["10.96.0.9"], &[("http", 80, 0)]);
        zone.update(&web.name.clone(), Some(&web), [].into_iter());
        let mut db = service("prod", "db", &[], &[("sql", 5432, 0)]);
        db.kind = Kind::Headless;
        let mut endpoints = slice(&db.name, "sql", 5432, &[("10.244.0.7", "n1"), ("10.244.1.7", "n2")]);
        endpoints.endpoints.edit(|n, e| e.rare = named("db-0").filter(|_| n == 0));
        zone.update(&db.name.clone(), Some(&db), [endpoints].iter());
        let mut out = service("prod", "out", &[], &[]);
        out.kind = Kind::External("example.com".into());
        zone.update(&out.name.clone(), Some(&out), [].into_iter());
        let mut empty = service("prod", "empty", &[], &[("sql", 5432, 0)]);
        empty.kind = Kind::Headless;
        zone.update(&empty.name.clone(), Some(&empty), [].into_iter());
        zone
    }

    fn records<'a>(zone: &'a Zone, labels: &'a [&'a str]) -> Option<Vec<Record<'a>>> {
        let node = zone.find(labels)?;
        let mut all = Vec::new();
        node.records(&mut |r| all.push(r));
        Some(all)
    }

    fn address(text: &str) -> Record<'_> {
        Record::Address(text.parse().unwrap())
    }

    fn srv(port: u16, host: Option<&str>) -> Record<'_> {
        Record::Service { port, host }
    }

    fn named(hostname: &str) -> Option<Arc<Rare>> {
        Some(Arc::new(Rare { hostname: Some(hostname.into()), ..Rare::default() }))
    }

    #[test]
    fn names_of_the_specification() {
        let zone = zone();
        let db_0 = Some("db-0");
        let cases: &[(&[&str], Option<Vec<Record<'_>>>)] = &[
            (&["web", "default", "svc"], Some(vec![address("10.96.0.9"), srv(80, None)])),
            (&["_http", "_tcp", "web", "default", "svc"], Some(vec![srv(80, None)])),
            (&["_tcp", "web", "default", "svc"], Some(vec![])),
            (&["_udp", "web", "default", "svc"], None),
            (&["_http", "_udp", "web", "default", "svc"], None),
            (&["_", "_tcp", "web", "default", "svc"], None),
            (&["x", "web", "default", "svc"], None),
            (&["none", "default", "svc"], None),
            (&["default", "svc"], Some(vec![])),
            (&["nowhere", "svc"], None),
            (&["dns-version"], Some(vec![Record::Text("1.1.0")])),
            (&["out", "prod", "svc"], Some(vec![Record::Alias("example.com")])),
            (&["x", "out", "prod", "svc"], None),
            (
                &["db", "prod", "svc"],
                Some(vec![
                    address("10.244.1.7"),
                    srv(5432, Some("10-244-1-7")),
                    address("10.244.0.7"),
                    srv(5432, db_0),
                ]),
            ),
            (&["db-0", "db", "prod", "svc"], Some(vec![address("10.244.0.7"), srv(5432, db_0)])),
            (&["db-1", "db", "prod", "svc"], None),
            (&["_sql", "_tcp", "db", "prod", "svc"], Some(vec![srv(5432, Some("10-244-1-7")), srv(5432, db_0)])),
            (&["empty", "prod", "svc"], None),
            (&["10-244-0-9", "default", "pod"], Some(vec![address("10.244.0.9")])),
            (&["2001-db8--1", "default", "pod"], Some(vec![address("2001:db8::1")])),
            (&["web", "default", "pod"], None),
        ];
        for (labels, expected) in cases {
            assert_eq!(records(&zone, labels), *expected, "{labels:?}");
        }
    }

    /// Several addresses of one host name, one endpoint in two slices, endpoints that are not ready.
    #[test]
    fn hosts_are_what_their_slices_say_together() {
        let name = ServiceName::new("prod", "db");
        let mut first = slice(&name, "sql", 5432, &[("10.244.0.7", "n1"), ("10.244.0.8", "n1"), ("10.244.0.9", "n1")]);
        first.endpoints.edit(|n, e| (e.rare, e.ready) = (named("db").filter(|_| n < 2), n < 2));
        let mut second = slice(&name, "web", 80, &[("10.244.0.7", "n1")]);
        second.endpoints.edit(|_, e| e.rare = named("db"));
        let mut headless = service("prod", "db", &[], &[]);
        headless.kind = Kind::Headless;
        let mut zone = Zone::new("cluster.local");
        zone.update(&name, Some(&headless), [first, second].iter());
        let both = [address("10.244.0.7"), srv(5432, Some("db")), srv(80, Some("db")), address("10.244.0.8")];
        let got = records(&zone, &["db", "db", "prod", "svc"]).unwrap();
        assert_eq!(got, both, "one service record for both addresses");
        assert_eq!(records(&zone, &["_web", "_tcp", "db", "prod", "svc"]).unwrap(), [srv(80, Some("db"))]);
        let mut targets = Vec::new();
        let labels = ["_web", "_tcp", "db", "prod", "svc"];
        zone.find(&labels).unwrap().targets(&mut |host, address| targets.push((host, address.to_string())));
        assert_eq!(targets, [(Some("db"), "10.244.0.7".to_owned())]);
    }

    #[test]
    fn reverse_names_follow_changes() {
        let mut zone = zone();
        let name = ServiceName::new("default", "web");
        let of = |z: &Zone, a: &str| z.names_of(&a.parse().unwrap());
        assert_eq!(of(&zone, "10.96.0.9"), ["web.default.svc.cluster.local"]);
        assert_eq!(of(&zone, "10.244.0.7"), ["db-0.db.prod.svc.cluster.local"]);
        zone.update(&name, None, [].into_iter());
        assert!(of(&zone, "10.96.0.9").is_empty());
        assert!(zone.find(&["default", "svc"]).is_none());
    }
}
