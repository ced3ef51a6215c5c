//! The cluster's zone: names of services, their ports and their endpoints.
//!
//! `SERVICE.NAMESPACE.svc.ZONE`, `_PORT._PROTO.SERVICE.NAMESPACE.svc.ZONE`, `HOST.SERVICE.NAMESPACE.svc.ZONE`,
//! `A-B-C-D.NAMESPACE.pod.ZONE` and the reverse names of cluster addresses and headless endpoints.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use crate::model::objects::{Kind, Protocol, Service, ServiceName, Slice};

/// Version of the specification, answered at `dns-version`.
const VERSION: &str = "1.1.0";

/// Data of one record.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Data {
    Address(IpAddr),
    Service { port: u16, target: String },
    Alias(String),
    Pointer(String),
    Text(&'static str),
}

/// What the zone says of a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Lookup {
    /// The name exists; these are its records of any type, and addresses of the names they mention.
    Found { records: Vec<Data>, extra: Vec<(String, IpAddr)> },
    /// The name does not exist.
    Absent,
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
                self.reverse.entry(address).or_default().push((name.clone(), host));
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

    /// Looks up the labels in front of the zone's own, in lower case.
    pub(crate) fn lookup(&self, labels: &[&str]) -> Lookup {
        let found = |records| Lookup::Found { records, extra: Vec::new() };
        match labels {
            [] | ["svc" | "pod"] => found(Vec::new()),
            ["dns-version"] => found(vec![Data::Text(VERSION)]),
            [namespace, "svc" | "pod"] => self.namespaces.get(*namespace).map_or(Lookup::Absent, |_| found(Vec::new())),
            [label, _, "pod"] => undashed(label).map_or(Lookup::Absent, |a| found(vec![Data::Address(a)])),
            [rest @ .., service, namespace, "svc"] => {
                let entry = self.namespaces.get(*namespace).and_then(|n| n.get(*service));
                entry
                    .and_then(|e| self.service(e, &ServiceName::new(namespace, service), rest))
                    .unwrap_or(Lookup::Absent)
            }
            _ => Lookup::Absent,
        }
    }

    fn service(&self, entry: &Entry, name: &ServiceName, rest: &[&str]) -> Option<Lookup> {
        let full = || self.full(name);
        let (mut records, mut extra) = (Vec::new(), Vec::new());
        match (entry, rest) {
            (Entry::External { target }, []) => records.push(Data::Alias(target.to_string())),
            (Entry::External { .. }, _) => return None,
            (Entry::Cluster { addresses, ports }, [] | [_, _]) => {
                let target = full();
                for (_, _, port) in ports.iter().filter(|p| matches(p, rest)) {
                    records.push(Data::Service { port: *port, target: target.clone() });
                }
                if rest.is_empty() {
                    records.extend(addresses.iter().map(|a| Data::Address(*a)));
                } else if records.is_empty() {
                    return None;
                }
                extra.extend(addresses.iter().map(|a| (target.clone(), *a)));
            }
            (Entry::Cluster { .. }, _) => return None,
            (Entry::Headless { hosts }, [label]) => {
                for host in hosts.iter().filter(|h| &*h.label == *label) {
                    records.push(Data::Address(host.address));
                    records.extend(
                        host.ports.iter().map(|p| Data::Service { port: p.2, target: format!("{label}.{}", full()) }),
                    );
                }
                if records.is_empty() {
                    return None;
                }
            }
            (Entry::Headless { hosts }, [] | [_, _]) => {
                for host in hosts {
                    let target = format!("{}.{}", host.label, full());
                    for (_, _, port) in host.ports.iter().filter(|p| matches(p, rest)) {
                        records.push(Data::Service { port: *port, target: target.clone() });
                        extra.push((target.clone(), host.address));
                    }
                    if rest.is_empty() {
                        records.push(Data::Address(host.address));
                    }
                }
                if records.is_empty() && !rest.is_empty() {
                    return None;
                }
            }
            (Entry::Headless { .. }, _) => return None,
        }
        records.sort();
        records.dedup();
        extra.sort();
        extra.dedup();
        Some(Lookup::Found { records, extra })
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

fn hosts<'a>(slices: impl Iterator<Item = &'a Slice>) -> Box<[Host]> {
    let mut hosts: Vec<Host> = Vec::new();
    for slice in slices {
        let ports: Arc<[Port]> = slice.ports.iter().map(|p| (p.name.clone(), p.protocol, p.port)).collect();
        for endpoint in slice.endpoints.iter().filter(|e| e.ready) {
            let label = endpoint.hostname.clone().unwrap_or_else(|| dashed(&endpoint.address).into());
            hosts.push(Host { label, address: endpoint.address, ports: ports.clone() });
        }
    }
    hosts.sort_by(|a, b| (a.address, &a.label).cmp(&(b.address, &b.label)));
    hosts.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{service, slice};

    fn zone() -> Zone {
        let mut zone = Zone::new("cluster.local.");
        let web = service("default", "web", &["10.96.0.9"], &[("http", 80, 0)]);
        zone.update(&web.name.clone(), Some(&web), [].into_iter());
        let mut db = service("prod", "db", &[], &[("sql", 5432, 0)]);
        db.kind = Kind::Headless;
        let mut endpoints = slice(&db.name, "sql", 5432, &[("10.244.0.7", "n1"), ("10.244.1.7", "n2")]);
        endpoints.endpoints[0].hostname = Some("db-0".into());
        zone.update(&db.name.clone(), Some(&db), [endpoints].iter());
        let mut out = service("prod", "out", &[], &[]);
        out.kind = Kind::External("example.com".into());
        zone.update(&out.name.clone(), Some(&out), [].into_iter());
        zone
    }

    fn records(zone: &Zone, labels: &[&str]) -> Option<Vec<Data>> {
        match zone.lookup(labels) {
            Lookup::Found { records, .. } => Some(records),
            Lookup::Absent => None,
        }
    }

    fn address(text: &str) -> Data {
        Data::Address(text.parse().unwrap())
    }

    fn srv(port: u16, target: &str) -> Data {
        Data::Service { port, target: target.into() }
    }

    #[test]
    fn names_of_the_specification() {
        let zone = zone();
        let web = "web.default.svc.cluster.local";
        let db = "db.prod.svc.cluster.local";
        let cases: &[(&[&str], Option<Vec<Data>>)] = &[
            (&["web", "default", "svc"], Some(vec![address("10.96.0.9"), srv(80, web)])),
            (&["_http", "_tcp", "web", "default", "svc"], Some(vec![srv(80, web)])),
            (&["_http", "_udp", "web", "default", "svc"], None),
            (&["x", "web", "default", "svc"], None),
            (&["none", "default", "svc"], None),
            (&["default", "svc"], Some(vec![])),
            (&["nowhere", "svc"], None),
            (&["dns-version"], Some(vec![Data::Text("1.1.0")])),
            (&["out", "prod", "svc"], Some(vec![Data::Alias("example.com".into())])),
            (&["db-0", "db", "prod", "svc"], Some(vec![address("10.244.0.7"), srv(5432, &format!("db-0.{db}"))])),
            (
                &["_sql", "_tcp", "db", "prod", "svc"],
                Some(vec![srv(5432, &format!("10-244-1-7.{db}")), srv(5432, &format!("db-0.{db}"))]),
            ),
            (&["10-244-0-9", "default", "pod"], Some(vec![address("10.244.0.9")])),
            (&["2001-db8--1", "default", "pod"], Some(vec![address("2001:db8::1")])),
            (&["web", "default", "pod"], None),
        ];
        for (labels, expected) in cases {
            assert_eq!(records(&zone, labels), *expected, "{labels:?}");
        }
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
        assert_eq!(zone.lookup(&["default", "svc"]), Lookup::Absent);
    }
}
