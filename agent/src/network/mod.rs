//! The pod network: what the pods need of it.
//!
//! [`PodNetwork`] is the seam: a pod goes in, a pinned network namespace with addresses comes out. Host-network pods
//! never come here.

mod addresses;
mod bridge;
pub mod cni;
mod firewall;
mod gone;
mod leaving;
mod links;
mod namespace;
mod records;
mod rules;
mod shape;
#[cfg(test)]
mod tests;
mod watchman;

use std::{net::IpAddr, path::PathBuf};

use futures::future::BoxFuture;
use ipnet::IpNet;

pub use bridge::{BridgeNetwork, ForgetFlows, NetworkConfig};

/// Transport of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A `hostPort` of one container.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostPort {
    /// Address on the host; `None` is every address.
    pub host_ip: Option<IpAddr>,
    /// Port on the host.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// `kubernetes.io/{ingress,egress}-bandwidth`, bits per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress: Option<u64>,
    /// From the pod.
    pub egress: Option<u64>,
}

/// A pod that needs a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetworkRequest {
    /// Pod UID: the key.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Ports mapped from the host.
    pub host_ports: Vec<HostPort>,
    /// Traffic shaping.
    pub bandwidth: Bandwidth,
}

/// A pod's network.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodNetworkStatus {
    /// Pinned network namespace.
    pub netns: PathBuf,
    /// Addresses, the primary one first.
    pub ips: Vec<IpAddr>,
}

/// Why a pod's network could not be made or removed; the whole chain in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NetworkError(pub String);

/// The network of this node's pods.
pub trait PodNetwork: Send + Sync + 'static {
    /// Makes the pod's network or returns the one it has: idempotent by UID, also after a restart of the agent.
    fn setup(&self, pod: PodNetworkRequest) -> BoxFuture<'_, Result<PodNetworkStatus, NetworkError>>;

    /// Removes it; a pod that has none is no error.
    fn teardown<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>>;

    /// Called once after a start with the UIDs of the pods that live: removes everything else this agent ever made.
    fn reconcile<'a>(&'a self, known: &'a [String]) -> BoxFuture<'a, Result<(), NetworkError>>;

    /// The node's pod ranges, told once they are known and whenever they change. [`PodNetwork::setup`] fails with a
    /// clear message before.
    fn set_pod_cidr(&self, cidrs: Vec<IpNet>);

    /// Why pods cannot get a network now (the message of a not ready node), if so.
    fn not_ready(&self) -> Option<String>;

    /// Told whenever [`PodNetwork::not_ready`] may have another answer.
    fn changes(&self) -> tokio::sync::watch::Receiver<()>;
}
