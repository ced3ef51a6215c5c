//! Services, endpoint slices and nodes as this crate needs them: parsed once at the edge, only valid values inside.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

use super::backends::Endpoints;

/// Label naming another proxy as the one in charge of a service.
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label of a slice naming its service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Annotation of a slice with the time of the change it reflects.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: u32 = 10_800;

/// Words that many objects share, each kept once: namespaces, names of ports.
#[derive(Default)]
pub(crate) struct Words(HashSet<Arc<str>>);

impl Words {
    fn get(&mut self, word: &str) -> Arc<str> {
        if let Some(known) = self.0.get(word) {
            return known.clone();
        }
        if self.0.len() == self.0.capacity() {
            // Those that nobody uses any more make room first.
            self.0.retain(|w| Arc::strong_count(w) > 1);
        }
        let new: Arc<str> = word.into();
        self.0.insert(new.clone());
        new
    }
}

/// Namespace and name of a service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct ServiceName {
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl ServiceName {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Transport protocol; the value is the IP protocol number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Protocol {
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

impl Protocol {
    pub(crate) fn parse(name: Option<&str>) -> Option<Self> {
        match name {
            None | Some("TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// As DNS SRV names spell it, without the underscore.
    pub(crate) fn lower(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// One port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServicePort {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    /// 0: none.
    pub(crate) node_port: u16,
}

/// Which endpoints a kind of traffic may reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Policy {
    Cluster,
    Local,
}

/// How a service is known to clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Has cluster addresses.
    Cluster,
    /// `clusterIP: None`.
    Headless,
    /// An alias for another DNS name.
    External(Box<str>),
}

/// A service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Service {
    pub(crate) name: ServiceName,
    pub(crate) kind: Kind,
    /// Whether this proxy is the one to serve it.
    pub(crate) ours: bool,
    pub(crate) cluster_ips: Box<[IpAddr]>,
    pub(crate) external_ips: Box<[IpAddr]>,
    pub(crate) balancer_ips: Box<[IpAddr]>,
    pub(crate) source_ranges: Box<[IpNet]>,
    pub(crate) ports: Box<[ServicePort]>,
    /// Seconds a client sticks to its endpoint.
    pub(crate) affinity: Option<u32>,
    pub(crate) external_policy: Policy,
    pub(crate) internal_policy: Policy,
    /// Port that tells load balancers whether this node has endpoints; 0: none.
    pub(crate) health_check_node_port: u16,
}

fn addresses(list: &Option<Vec<String>>) -> impl Iterator<Item = IpAddr> + '_ {
    list.iter().flatten().filter_map(|a| a.parse().ok())
}

fn policy(value: &Option<String>) -> Policy {
    if value.as_deref() == Some("Local") { Policy::Local } else { Policy::Cluster }
}

fn port_number(value: i32) -> u16 {
    u16::try_from(value).unwrap_or(0)
}

impl Service {
    /// Reads an API object; `None` when it has no name.
    pub(crate) fn parse(object: &core::Service, words: &mut Words) -> Option<Self> {
        let meta = &object.metadata;
        let name = ServiceName { namespace: words.get(meta.namespace.as_deref()?), name: meta.name.as_deref()?.into() };
        let spec = object.spec.as_ref()?;
        let mut cluster_ips: Vec<IpAddr> = addresses(&spec.cluster_ips).collect();
        if cluster_ips.is_empty() {
            cluster_ips.extend(spec.cluster_ip.iter().filter_map(|a| a.parse::<IpAddr>().ok()));
        }
        let kind = match (spec.type_.as_deref(), &spec.external_name) {
            (Some("ExternalName"), Some(target)) => Kind::External(target.as_str().into()),
            (Some("ExternalName"), None) => return None,
            _ if spec.cluster_ip.as_deref() == Some("None") => Kind::Headless,
            _ => Kind::Cluster,
        };
        let balancer = object.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
        let is_balancer = spec.type_.as_deref() == Some("LoadBalancer");
        let timeout = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
        Some(Self {
            ours: kind == Kind::Cluster && !meta.labels.as_ref().is_some_and(|l| l.contains_key(PROXY_NAME_LABEL)),
            name,
            kind,
            cluster_ips: cluster_ips.into(),
            external_ips: addresses(&spec.external_ips).collect(),
            balancer_ips: balancer
                .into_iter()
                .flatten()
                .filter(|i| is_balancer && i.ip_mode.as_deref() != Some("Proxy"))
                .filter_map(|i| i.ip.as_deref()?.parse().ok())
                .collect(),
            source_ranges: spec
                .load_balancer_source_ranges
                .iter()
                .flatten()
                .filter(|_| is_balancer)
                .filter_map(|r| r.trim().parse::<IpNet>().ok())
                .map(|r| r.trunc())
                .collect(),
            ports: spec.ports.iter().flatten().filter_map(|p| ServicePort::parse(p, words)).collect(),
            affinity: (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
                timeout
                    .and_then(|c| c.timeout_seconds)
                    .and_then(|t| u32::try_from(t).ok())
                    .filter(|t| *t > 0)
                    .unwrap_or(AFFINITY_TIMEOUT)
            }),
            external_policy: policy(&spec.external_traffic_policy),
            internal_policy: policy(&spec.internal_traffic_policy),
            health_check_node_port: spec.health_check_node_port.map_or(0, port_number),
        })
    }
}

impl ServicePort {
    fn parse(port: &core::ServicePort, words: &mut Words) -> Option<Self> {
        Some(Self {
            name: words.get(port.name.as_deref().unwrap_or_default()),
            protocol: Protocol::parse(port.protocol.as_deref())?,
            port: u16::try_from(port.port).ok()?,
            node_port: port.node_port.map_or(0, port_number),
        })
    }
}

/// One endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Endpoint {
    pub(crate) address: IpAddr,
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
    /// Whether it is on this node.
    pub(crate) here: bool,
    pub(crate) rare: Option<Arc<Rare>>,
}

/// What few endpoints have.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Rare {
    pub(crate) hostname: Option<Box<str>>,
    pub(crate) for_zones: Option<Box<[Box<str>]>>,
    pub(crate) for_nodes: Option<Box<[Box<str>]>>,
}

/// One port of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SlicePort {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// An endpoint slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Slice {
    pub(crate) service: ServiceName,
    pub(crate) name: Box<str>,
    pub(crate) ports: Box<[SlicePort]>,
    pub(crate) endpoints: Endpoints,
    /// When the change happened that it reflects.
    pub(crate) changed: Option<jiff::Timestamp>,
}

impl Slice {
    /// Reads an API object on the node `own`; `None` when it belongs to no service or carries names instead of addresses.
    pub(crate) fn parse(object: &discovery::EndpointSlice, own: &str, words: &mut Words) -> Option<Self> {
        let meta = &object.metadata;
        let service = meta.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        if object.address_type == "FQDN" {
            return None;
        }
        let ports = object.ports.iter().flatten().filter_map(|p| {
            Some(SlicePort {
                name: words.get(p.name.as_deref().unwrap_or_default()),
                protocol: Protocol::parse(p.protocol.as_deref())?,
                port: u16::try_from(p.port?).ok()?,
            })
        });
        Some(Self {
            ports: ports.collect(),
            service: ServiceName { namespace: words.get(meta.namespace.as_deref()?), name: service.as_str().into() },
            name: meta.name.as_deref()?.into(),
            endpoints: object.endpoints.iter().flatten().filter_map(|e| Endpoint::parse(e, own)).collect(),
            changed: meta.annotations.as_ref().and_then(|a| a.get(TRIGGER_TIME)?.parse().ok()),
        })
    }
}

impl Endpoint {
    fn parse(object: &discovery::Endpoint, own: &str) -> Option<Self> {
        let conditions = object.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        let hints = object.hints.as_ref();
        let rare = Rare {
            hostname: object.hostname.as_deref().filter(|h| !h.is_empty()).map(Into::into),
            for_zones: hints
                .and_then(|h| h.for_zones.as_ref())
                .map(|z| z.iter().map(|z| z.name.as_str().into()).collect()),
            for_nodes: hints
                .and_then(|h| h.for_nodes.as_ref())
                .map(|n| n.iter().map(|n| n.name.as_str().into()).collect()),
        };
        Some(Self {
            address: object.addresses.first()?.parse().ok()?,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            here: object.node_name.as_deref() == Some(own),
            rare: (rare != Rare::default()).then(|| Arc::new(rare)),
        })
    }
}

/// What the plan needs to know of the node it runs on.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Place {
    pub(crate) node: Box<str>,
    pub(crate) zone: Option<Box<str>>,
}

/// An address and port packets are sent to: smaller than a socket's, for there are many.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Backend {
    address: IpAddr,
    port: u16,
}

impl Backend {
    pub(crate) fn new(address: IpAddr, port: u16) -> Self {
        Self { address, port }
    }

    pub(crate) fn ip(&self) -> IpAddr {
        self.address
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for Backend {
    fn from(socket: SocketAddr) -> Self {
        Self::new(socket.ip(), socket.port())
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}
