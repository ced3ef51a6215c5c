//! Policies, pods and namespaces as this crate needs them: parsed once at the edge, only valid values inside.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use isopod_api::selector::LabelSelector;
use k8s_openapi::{
    api::{
        core::v1::{Namespace, Pod as PodObject},
        networking::v1 as networking,
    },
    apimachinery::pkg::{apis::meta::v1 as meta, util::intstr::IntOrString},
};

use crate::model::objects::{Protocol, ServiceName};

/// Labels of an object.
pub(crate) type Labels = BTreeMap<String, String>;

/// Namespace and name of a pod or a policy.
pub(crate) type Name = ServiceName;

/// A pod with an address of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Pod {
    pub(crate) name: Name,
    pub(crate) node: Box<str>,
    pub(crate) addresses: Box<[IpAddr]>,
    pub(crate) labels: Labels,
    /// Named ports of its containers.
    pub(crate) ports: Box<[(Box<str>, Protocol, u16)]>,
}

impl Pod {
    /// Reads an API object; `None` for pods no policy can be about: on the host's network, without address, ended.
    pub(crate) fn parse(object: &PodObject) -> Option<Self> {
        let (meta, spec, status) = (&object.metadata, object.spec.as_ref()?, object.status.as_ref()?);
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if spec.host_network == Some(true) || ended {
            return None;
        }
        let mut addresses: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
        if addresses.is_empty() {
            addresses.extend(status.pod_ip.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
        }
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let ports = containers.flat_map(|c| c.ports.iter().flatten()).filter_map(|p| {
            let number = u16::try_from(p.container_port).ok()?;
            Some((p.name.as_deref()?.into(), Protocol::parse(p.protocol.as_deref())?, number))
        });
        (!addresses.is_empty()).then_some(Self {
            name: Name::new(meta.namespace.as_deref()?, meta.name.as_deref()?),
            node: spec.node_name.as_deref()?.into(),
            addresses: addresses.into(),
            labels: meta.labels.clone().unwrap_or_default(),
            ports: ports.collect(),
        })
    }

    /// Numbers of the pod's ports of that name.
    pub(crate) fn ports_named(&self, name: &str, protocol: Protocol) -> impl Iterator<Item = u16> {
        self.ports.iter().filter(move |(n, p, _)| **n == *name && *p == protocol).map(|(.., number)| *number)
    }
}

/// Name and labels of a namespace.
pub(crate) fn namespace(object: &Namespace) -> Option<(Arc<str>, Labels)> {
    Some((object.metadata.name.as_deref()?.into(), object.metadata.labels.clone().unwrap_or_default()))
}

/// Whom a rule is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Peer {
    /// Pods of the namespaces selected, or of the policy's own.
    Pods { namespaces: Option<LabelSelector>, pods: LabelSelector },
    /// Addresses.
    Block(Box<[IpNet]>),
}

/// Ports a rule is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Ports {
    Range(Protocol, u16, u16),
    Named(Protocol, Box<str>),
}

/// What a policy lets through.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Rule {
    /// `None`: everybody.
    pub(crate) peers: Option<Box<[Peer]>>,
    /// `None`: every port of every protocol.
    pub(crate) ports: Option<Box<[Ports]>>,
}

/// A policy. A direction it says nothing about is left as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Policy {
    pub(crate) name: Name,
    pub(crate) pods: LabelSelector,
    pub(crate) ingress: Option<Box<[Rule]>>,
    pub(crate) egress: Option<Box<[Rule]>>,
}

/// A selector that cannot be read selects nothing.
fn selector(object: &meta::LabelSelector) -> LabelSelector {
    let value = serde_json::to_value(object).unwrap_or_default();
    LabelSelector::from_value(Some(&value)).unwrap_or(LabelSelector::Nothing)
}

/// `net` without `hole`.
fn subtract(net: IpNet, hole: &IpNet, out: &mut Vec<IpNet>) {
    if hole.contains(&net) {
        return;
    }
    if !net.contains(hole) {
        out.push(net);
        return;
    }
    for half in net.subnets(net.prefix_len() + 1).into_iter().flatten() {
        subtract(half, hole, out);
    }
}

/// All of `nets` that is in none of `holes`.
pub(crate) fn without<'a>(nets: Vec<IpNet>, holes: impl IntoIterator<Item = &'a IpNet>) -> Vec<IpNet> {
    holes.into_iter().fold(nets, |nets, hole| {
        let mut rest = Vec::new();
        nets.into_iter().for_each(|net| subtract(net, hole, &mut rest));
        rest
    })
}

fn block(object: &networking::IPBlock) -> Option<Box<[IpNet]>> {
    let net = object.cidr.trim().parse::<IpNet>().ok()?.trunc();
    let holes: Vec<IpNet> =
        object.except.iter().flatten().filter_map(|e| e.trim().parse::<IpNet>().ok()).map(|e| e.trunc()).collect();
    Some(without(vec![net], &holes).into())
}

fn peer(object: &networking::NetworkPolicyPeer) -> Option<Peer> {
    if let Some(object) = &object.ip_block {
        return block(object).map(Peer::Block);
    }
    let everything = || selector(&meta::LabelSelector::default());
    Some(Peer::Pods {
        namespaces: object.namespace_selector.as_ref().map(selector),
        pods: object.pod_selector.as_ref().map_or_else(everything, selector),
    })
}

fn ports(object: &networking::NetworkPolicyPort) -> Option<Ports> {
    let protocol = Protocol::parse(object.protocol.as_deref())?;
    Some(match &object.port {
        None => Ports::Range(protocol, 0, u16::MAX),
        Some(IntOrString::String(name)) => Ports::Named(protocol, name.as_str().into()),
        Some(IntOrString::Int(first)) => {
            let first = u16::try_from(*first).ok()?;
            let last = object.end_port.map_or(Some(first), |last| u16::try_from(last).ok())?;
            (first <= last).then_some(Ports::Range(protocol, first, last))?
        }
    })
}

/// What cannot be read lets nothing through; what is absent or empty lets everything.
fn rule(peers: Option<&Vec<networking::NetworkPolicyPeer>>, list: Option<&Vec<networking::NetworkPolicyPort>>) -> Rule {
    Rule {
        peers: peers.filter(|l| !l.is_empty()).map(|l| l.iter().filter_map(peer).collect()),
        ports: list.filter(|l| !l.is_empty()).map(|l| l.iter().filter_map(ports).collect()),
    }
}

impl Policy {
    /// Reads an API object; `None` when it has no name.
    pub(crate) fn parse(object: &networking::NetworkPolicy) -> Option<Self> {
        let meta = &object.metadata;
        let spec = object.spec.as_ref()?;
        let named = |kind: &str| spec.policy_types.iter().flatten().any(|t| t == kind);
        let untyped = spec.policy_types.as_ref().is_none_or(Vec::is_empty);
        let ingress = spec.ingress.iter().flatten().map(|r| rule(r.from.as_ref(), r.ports.as_ref()));
        let egress = spec.egress.iter().flatten().map(|r| rule(r.to.as_ref(), r.ports.as_ref()));
        let value = serde_json::to_value(&spec.pod_selector).ok().filter(|v| !v.is_null());
        let pods = LabelSelector::from_value(Some(&value.unwrap_or_else(|| serde_json::json!({}))));
        Some(Self {
            name: Name::new(meta.namespace.as_deref()?, meta.name.as_deref()?),
            pods: pods.unwrap_or(LabelSelector::Nothing),
            ingress: (untyped || named("Ingress")).then(|| ingress.collect()),
            egress: (named("Egress") || untyped && spec.egress.as_ref().is_some_and(|l| !l.is_empty()))
                .then(|| egress.collect()),
        })
    }
}
