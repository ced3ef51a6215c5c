//! `isopod trace`: one connection followed through the model.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{Probe, Snapshot};
use crate::{
    dns::zone::Record,
    model::objects::Protocol,
    nft::{
        element::{Element, Family},
        trace::{Fate, Packet, Tracer},
    },
    policy::{Direction, objects::Pod},
};

/// Why there is nothing to trace.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TraceError {
    /// No such pod.
    #[error("no pod {0} with an address of its own (NAME, NAMESPACE/NAME, an address, or `node`)")]
    From(String),
    /// Not an address and port.
    #[error("\"{0}\" is no target: HOST:PORT or HOST:PORT/udp, HOST a service, a DNS name or an address")]
    Target(String),
    /// Cluster DNS does not know the name.
    #[error("cluster DNS has no address for {0}")]
    Name(String),
}

/// What would become of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Traced {
    /// What happens, one sentence per step.
    pub steps: Vec<(&'static str, String)>,
    /// Whether it reaches anyone.
    pub reaches: bool,
}

impl fmt::Display for Traced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|(what, text)| writeln!(f, "{what:<9}{text}"))
    }
}

/// `HOST:PORT[/PROTOCOL]`; the port may be a service port's name.
struct Target<'a> {
    host: &'a str,
    port: &'a str,
    protocol: Protocol,
}

impl<'a> Target<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, name)) => (rest, Protocol::parse(Some(&name.to_uppercase()))?),
            None => (text, Protocol::Tcp),
        };
        let (host, port) = rest.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty() && !port.is_empty()).then_some(Self { host, port, protocol })
    }
}

impl Snapshot {
    /// Follows a connection from a pod (or `node`) to `HOST:PORT`.
    ///
    /// # Errors
    /// When the pod or the target does not exist.
    pub fn trace(&self, from: &str, target: &str) -> Result<Traced, TraceError> {
        let mut out = Traced { steps: Vec::new(), reaches: false };
        let (pod, packet) = self.first_packet(from, target, &mut out)?;
        let who = match pod {
            Some(pod) => format!("pod {} at {} on node {}", pod.name, packet.from, pod.node),
            None => format!("this node, {}", packet.from),
        };
        out.steps.insert(0, ("from", who));
        self.follow(pod, &packet, &mut out);
        Ok(out)
    }

    /// The same connection, to be tried with a real packet.
    ///
    /// # Errors
    /// When the pod or the target does not exist.
    pub fn probe(&self, from: &str, target: &str) -> Result<Probe, TraceError> {
        let (pod, packet) = self.first_packet(from, target, &mut Traced { steps: Vec::new(), reaches: false })?;
        let Packet { from, to, protocol } = packet;
        let node = pod.map_or(&*self.config.node_name, |p| &*p.node).to_owned();
        let pod = pod.map(|p| (p.name.namespace.to_string(), p.name.name.to_string()));
        Ok(Probe { pod, node, from, to, protocol })
    }

    fn first_packet(&self, from: &str, target: &str, out: &mut Traced) -> Result<(Option<&Pod>, Packet), TraceError> {
        let wanted = Target::parse(target).ok_or_else(|| TraceError::Target(target.into()))?;
        let pod = self.source(from)?;
        let namespace = pod.map_or("default", |p| &p.name.namespace);
        let address = self.resolve(wanted.host, namespace, pod, out)?;
        let port = self.port(&wanted, address).ok_or_else(|| TraceError::Target(target.into()))?;
        let source = match pod {
            Some(pod) => pod.addresses.iter().find(|a| a.is_ipv4() == address.is_ipv4()).copied(),
            None => self.config.node_ips.iter().find(|a| a.is_ipv4() == address.is_ipv4()).copied(),
        };
        let source = source.ok_or_else(|| TraceError::From(format!("{from} of the family of {address}")))?;
        Ok((pod, Packet { from: source, to: SocketAddr::new(address, port), protocol: wanted.protocol }))
    }

    fn source(&self, from: &str) -> Result<Option<&Pod>, TraceError> {
        if from == "node" {
            return Ok(None);
        }
        let address: Option<IpAddr> = from.parse().ok();
        let (namespace, name) = from.split_once('/').unwrap_or(("default", from));
        let is = |p: &&Pod| match address {
            Some(address) => p.addresses.contains(&address),
            None => *p.name.namespace == *namespace && *p.name.name == *name,
        };
        self.pods.iter().find(is).map(Some).ok_or_else(|| TraceError::From(from.into()))
    }

    /// The address of a host, by the search path of a pod's namespace.
    fn resolve(&self, host: &str, namespace: &str, pod: Option<&Pod>, out: &mut Traced) -> Result<IpAddr, TraceError> {
        if let Ok(address) = host.parse() {
            return Ok(address);
        }
        let domain = self.zone.domain();
        let fits = |a: &IpAddr| pod.is_none_or(|p| p.addresses.iter().any(|own| own.is_ipv4() == a.is_ipv4()));
        let lower = host.trim_end_matches('.').to_ascii_lowercase();
        let lower = lower.strip_suffix(domain).map_or(lower.as_str(), |front| front.trim_end_matches('.'));
        for suffix in [format!(".{namespace}.svc"), ".svc".into(), String::new()] {
            let name = format!("{lower}{suffix}");
            let labels: Vec<&str> = name.split('.').collect();
            let Some(node) = self.zone.find(&labels) else { continue };
            let mut addresses: Vec<IpAddr> = Vec::new();
            node.records(&mut |r| addresses.extend(if let Record::Address(a) = r { Some(a) } else { None }));
            addresses.retain(fits);
            if let Some(first) = addresses.first() {
                let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                out.steps.push(("name", format!("{name}.{domain} is {}", list.join(", "))));
                return Ok(*first);
            }
        }
        Err(TraceError::Name(host.into()))
    }

    /// The number of a port: as it is, or a port's name of the service at that address.
    fn port(&self, target: &Target<'_>, address: IpAddr) -> Option<u16> {
        if let Ok(number) = target.port.parse() {
            return Some(number);
        }
        let mut found = None;
        self.shadow.visit(&mut |service, port, _, _, _| {
            if *port.name == *target.port && port.protocol == target.protocol && service.cluster_ips.contains(&address)
            {
                found = Some(port.port);
            }
        });
        found
    }

    fn follow(&self, pod: Option<&Pod>, packet: &Packet, out: &mut Traced) {
        let mut elements: Vec<Element> = Vec::new();
        self.shadow.elements(&mut |e| elements.push(e));
        self.policies.elements(&mut |e| elements.push(e));
        let mut own: Vec<IpAddr> = self.config.node_ips.clone();
        own.extend(self.node.iter().flat_map(|n| n.addresses.iter().copied()));
        let tracer = Tracer::new(Family::of(&packet.to.ip()), &elements, self.config.cluster_cidrs.clone(), own);
        let protocol = packet.protocol.lower().to_uppercase();
        out.steps.push(("to", format!("{}/{protocol}", packet.to)));
        if let Some(service) = self.service_at(packet) {
            out.steps.push(("service", service));
        }
        match tracer.trace(packet) {
            Fate::Refused => out.steps.push(("verdict", "refused at once: no endpoint, or no such port".into())),
            Fate::Dropped => out.steps.push(("verdict", "dropped: source not allowed, or no endpoint here".into())),
            Fate::Untouched => {
                out.steps.push(("nat", "none: no service has this address and port".into()));
                out.reaches = self.judge(&tracer, pod, packet, packet.to, out);
                self.conclude(usize::from(out.reaches), 1, out);
            }
            Fate::Sent { to, masqueraded } => self.choices(&tracer, pod, packet, &to, masqueraded, out),
        }
    }

    fn choices(
        &self,
        tracer: &Tracer,
        pod: Option<&Pod>,
        packet: &Packet,
        to: &BTreeSet<SocketAddr>,
        masqueraded: bool,
        out: &mut Traced,
    ) {
        let source = if masqueraded { "the source becomes this node's address" } else { "the source stays" };
        out.steps
            .push(("nat", format!("the destination becomes one of {} endpoints, each as likely; {source}", to.len())));
        let good = to.iter().filter(|t| self.judge(tracer, pod, packet, **t, out)).count();
        let back = format!("connection tracking turns answers back: the client sees {}", packet.to);
        out.steps.push(("reply", back));
        out.reaches = good > 0;
        self.conclude(good, to.len(), out);
    }

    fn conclude(&self, good: usize, all: usize, out: &mut Traced) {
        let text = match (good, all) {
            (0, _) => "does not get through".to_owned(),
            (1, 1) => "gets through".to_owned(),
            (good, all) if good == all => format!("gets through to all {all} endpoints"),
            (good, all) => format!("gets through to {good} of {all} endpoints, by chance"),
        };
        out.steps.push(("verdict", text));
    }

    fn service_at(&self, packet: &Packet) -> Option<String> {
        let mut found = None;
        let node = |a: &IpAddr| a.is_loopback() || self.config.node_ips.contains(a);
        self.shadow.visit(&mut |service, port, (frontend, reach, firewalled), _, denied| {
            let hit = match frontend {
                crate::model::plan::Frontend::Address(a, proto, number) => {
                    (a, proto, number) == (packet.to.ip(), packet.protocol, packet.to.port())
                }
                crate::model::plan::Frontend::NodePort(_, proto, number) => {
                    (proto, number) == (packet.protocol, packet.to.port()) && node(&packet.to.ip())
                }
            };
            if hit && !denied {
                let how = super::via(service, port, &frontend, reach, firewalled, denied);
                let name = if port.name.is_empty() { String::new() } else { format!(" port {}", port.name) };
                found = Some(format!("{}{name}: {how}", service.name));
            }
        });
        found
    }

    /// What policies say of a packet to one endpoint.
    fn judge(&self, tracer: &Tracer, pod: Option<&Pod>, packet: &Packet, to: SocketAddr, out: &mut Traced) -> bool {
        let names = self.names();
        let target = names.get(&to.ip()).copied();
        let here = |p: &Pod| *p.node == *self.config.node_name;
        // A node reaches its own pods and they reach it.
        let exempt = pod.is_none() && target.is_none_or(here)
            || target.is_none() && self.config.node_ips.contains(&to.ip()) && pod.is_none_or(here);
        let passes = exempt || tracer.permits(packet.from, to, packet.protocol);
        let list = |pod: Option<&Pod>, direction, none: &str| match pod {
            None => none.to_owned(),
            Some(pod) => match self.policies.about(pod, direction).as_slice() {
                [] => none.to_owned(),
                names => names.iter().map(|n| n.name.to_string()).collect::<Vec<_>>().join(", "),
            },
        };
        let (out_of, into) = (list(pod, Direction::Egress, "none"), list(target, Direction::Ingress, "none"));
        let verdict = match (passes, exempt) {
            (true, true) => "a node and its own pods always reach each other".to_owned(),
            (true, false) => format!("allowed (policies on the way out: {out_of}; on the way in: {into})"),
            (false, _) => format!("DROPPED (policies on the way out: {out_of}; on the way in: {into})"),
        };
        out.steps.push(("endpoint", format!("{}: {verdict}", self.spell(&to.into(), &names))));
        passes
    }
}
