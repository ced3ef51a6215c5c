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
    model::{objects::Protocol, plan::Frontend},
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
    /// Several pods of that name, or beginning so.
    #[error("\"{0}\" may be any of {1}: name one of them")]
    Several(String, String),
    /// Not an address and port.
    #[error("\"{0}\" is no target: HOST:PORT or HOST:PORT/udp, HOST a service, a DNS name or an address")]
    Target(String),
    /// A service, and the ports there are.
    #[error("which port of {0}? It has {1}")]
    Port(String, String),
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

/// Endpoints people are told of one by one.
const SHOWN: usize = 10;

impl fmt::Display for Traced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints = self.steps.iter().filter(|(what, _)| *what == "endpoint").count();
        let mut seen = 0;
        for (what, text) in &self.steps {
            seen += usize::from(*what == "endpoint");
            match (*what, seen) {
                ("endpoint", n) if n > SHOWN + 1 => {}
                ("endpoint", n) if n > SHOWN && endpoints > n => {
                    writeln!(f, "{what:<9}and {} more: --json shows them all", endpoints - SHOWN)?;
                }
                _ => writeln!(f, "{what:<9}{text}")?,
            }
        }
        Ok(())
    }
}

/// `HOST[:PORT][/PROTOCOL]`; the port may be a service port's name, and that of a service with only one may be left out.
struct Target<'a> {
    host: &'a str,
    port: &'a str,
    protocol: Option<Protocol>,
}

impl<'a> Target<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, name)) => (rest, Some(Protocol::parse(Some(&name.to_uppercase()))?)),
            None => (text, None),
        };
        let bare = rest.parse::<IpAddr>().is_ok() || rest.ends_with(']');
        let (host, port) = rest.rsplit_once(':').filter(|_| !bare).unwrap_or((rest, ""));
        let host = host.trim_start_matches('[').trim_end_matches(']');
        (!host.is_empty() && !rest.ends_with(':')).then_some(Self { host, port, protocol })
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
            Some(pod) if *pod.node != *self.config.node_name => {
                let place = format!("{} (seen from node {})", pod.node, self.config.node_name);
                format!("pod {} at {} on node {place}", pod.name, packet.from)
            }
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
        let (protocol, port) = self.port(&wanted, target, address)?;
        let source = match pod {
            Some(pod) => pod.addresses.iter().find(|a| a.is_ipv4() == address.is_ipv4()).copied(),
            None => self.config.node_ips.iter().find(|a| a.is_ipv4() == address.is_ipv4()).copied(),
        };
        let source = source.ok_or_else(|| TraceError::From(format!("{from} of the family of {address}")))?;
        Ok((pod, Packet { from: source, to: SocketAddr::new(address, port), protocol }))
    }

    /// A pod by its address, by its name, or by the beginning of its name when no other begins so.
    fn source(&self, from: &str) -> Result<Option<&Pod>, TraceError> {
        if from == "node" {
            return Ok(None);
        }
        if let Ok(address) = from.parse::<IpAddr>() {
            let has = |p: &&Pod| p.addresses.contains(&address);
            return self.pods.iter().find(has).map(Some).ok_or_else(|| TraceError::From(from.into()));
        }
        let (space, name) = from.split_once('/').map_or((None, from), |(space, name)| (Some(space), name));
        let inside = || self.pods.iter().filter(|p| space.is_none_or(|s| *p.name.namespace == *s));
        let mut found: Vec<&Pod> = inside().filter(|p| *p.name.name == *name).collect();
        if let [_, _, ..] = *found {
            // As kubectl has it, when it is not told where.
            found.sort_by_key(|p| *p.name.namespace != *"default");
            found.truncate(if *found[0].name.namespace == *"default" { 1 } else { found.len() });
        }
        if found.is_empty() {
            found = inside().filter(|p| p.name.name.starts_with(name)).collect();
        }
        match found.as_slice() {
            [] => Err(TraceError::From(from.into())),
            [one] => Ok(Some(one)),
            many => {
                let names = many.iter().take(SHOWN).map(|p| p.name.to_string()).collect::<Vec<_>>().join(", ");
                Err(TraceError::Several(from.into(), names))
            }
        }
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

    /// A port by its number, by its name in the service at that address, or the only one there is.
    fn port(&self, wanted: &Target<'_>, text: &str, address: IpAddr) -> Result<(Protocol, u16), TraceError> {
        if let Ok(number) = wanted.port.parse() {
            return Ok((wanted.protocol.unwrap_or(Protocol::Tcp), number));
        }
        let mut known = BTreeSet::new();
        self.shadow.visit(&mut |_, port, (frontend, ..), _, _| {
            if matches!(frontend, Frontend::Address(at, ..) if at == address) {
                known.insert((port.protocol, port.port, port.name.clone()));
            }
        });
        let fits = |(protocol, _, name): &&(Protocol, u16, _)| {
            wanted.protocol.is_none_or(|p| p == *protocol) && [name as &str, ""].contains(&wanted.port)
        };
        let fitting: Vec<_> = known.iter().filter(fits).collect();
        match fitting.as_slice() {
            [(protocol, number, _)] => Ok((*protocol, *number)),
            _ if known.is_empty() => Err(TraceError::Target(text.into())),
            _ => {
                let spell = |(protocol, number, name): &(Protocol, u16, std::sync::Arc<str>)| {
                    let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
                    format!("{number}/{}{name}", protocol.lower())
                };
                Err(TraceError::Port(wanted.host.into(), known.iter().map(spell).collect::<Vec<_>>().join(", ")))
            }
        }
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
                let (passes, text) = self.judge(&tracer, pod, packet, packet.to);
                out.steps.push(("endpoint", text));
                out.reaches = passes;
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
        let which = match to.len() {
            1 => "the only endpoint".to_owned(),
            count => format!("one of {count} endpoints, each as likely for a new client"),
        };
        out.steps.push(("nat", format!("the destination becomes {which}; {source}")));
        let (bad, good): (Vec<_>, Vec<_>) =
            to.iter().map(|t| self.judge(tracer, pod, packet, *t)).partition(|(passes, _)| !passes);
        let count = good.len();
        // What does not work is what people look for.
        out.steps.extend(bad.into_iter().chain(good).map(|(_, text)| ("endpoint", text)));
        let back = format!("connection tracking turns answers back: the client sees {}", packet.to);
        out.steps.push(("reply", back));
        out.reaches = count > 0;
        self.conclude(count, to.len(), out);
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
                Frontend::Address(a, proto, number) => {
                    (a, proto, number) == (packet.to.ip(), packet.protocol, packet.to.port())
                }
                Frontend::NodePort(_, proto, number) => {
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
    fn judge(&self, tracer: &Tracer, pod: Option<&Pod>, packet: &Packet, to: SocketAddr) -> (bool, String) {
        let names = self.names();
        let target = names.get(&to.ip()).copied();
        let here = |p: &Pod| *p.node == *self.config.node_name;
        // A node reaches its own pods and they reach it.
        let exempt = pod.is_none() && target.is_none_or(here)
            || target.is_none() && self.config.node_ips.contains(&to.ip()) && pod.is_none_or(here);
        let list = |pod: Option<&Pod>, direction, way: &str| {
            let about = pod.map(|pod| self.policies.about(pod, direction)).unwrap_or_default();
            let names = about.iter().map(|n| &*n.name).collect::<Vec<_>>().join(", ");
            (!names.is_empty()).then(|| format!("on the way {way} ({names})"))
        };
        let sides = [
            (Direction::Egress, list(pod, Direction::Egress, "out")),
            (Direction::Ingress, list(target, Direction::Ingress, "in")),
        ];
        let closed = |direction: &Direction| !tracer.permits(*direction, packet.from, to, packet.protocol);
        let words = |keep: &dyn Fn(&Direction) -> bool| {
            let words = sides.iter().filter(|(direction, _)| keep(direction)).filter_map(|(_, text)| text.clone());
            words.collect::<Vec<_>>().join(", ")
        };
        let dropped = words(&closed);
        let verdict = match words(&|_| true) {
            _ if exempt => "a node and its own pods always reach each other".to_owned(),
            _ if !dropped.is_empty() => format!("DROPPED by policies {dropped}"),
            none if none.is_empty() => "allowed, no policy is about it".to_owned(),
            all => format!("allowed by policies {all}"),
        };
        (exempt || dropped.is_empty(), format!("{}: {verdict}", self.spell(&to.into(), &names)))
    }
}
