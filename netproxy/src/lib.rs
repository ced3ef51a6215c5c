//! isopod netproxy: services, network policies and cluster DNS of one node.
//!
//! Services and endpoint slices come in through watches, one in-memory model follows them, nftables maps and DNS answers go
//! out. [`run`] is everything; [`cleanup`] removes what it left. Three parts: asynchronous watches and servers; one thread
//! that owns the model and the kernel's tables (`sync`); pure code between them (`model`, `nft::skeleton`, `nft::wire`).
//!
//! A normal stop leaves the rules in place: connections and new connections go on while the process restarts.

mod announce;
pub mod configuration;
mod conntrack;
mod dns;
mod health;
#[cfg(test)]
mod hosts;
pub mod inspect;
mod links;
mod metrics;
mod model;
mod monitor;
mod nft;
mod policy;
mod sync;
mod watch;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch as state};
use tokio_util::sync::CancellationToken;

pub use announce::Lease;
pub use conntrack::forget_host_ports;
pub use links::Error as LinkError;
pub use nft::kernel::Error as KernelError;

/// Inputs that may wait for the model's thread.
const QUEUE: usize = 4096;
/// Standard port of DNS.
const DNS_PORT: u16 = 53;

/// What the proxy has to know of its node and cluster.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this node.
    pub node_name: String,
    /// Addresses of this node.
    pub node_ips: Vec<IpAddr>,
    /// Name of the nftables table.
    pub table: String,
    /// Name of the pod bridge.
    pub bridge: String,
    /// Pod addresses of the whole cluster.
    pub cluster_cidrs: Vec<IpNet>,
    /// Links whose packets are pods' instead of those addresses; a `*` at the end stands for anything.
    pub pod_links: Option<String>,
    /// Whether packets of this node's ranges alone are pods' instead of all the cluster's.
    pub pods_of_node: bool,
    /// Bit of the mark of packets to be masqueraded.
    pub masquerade_bit: u8,
    /// Whether connections to services are masqueraded whoever makes them.
    pub masquerade_all: bool,
    /// Limits of connection tracking, as the names of `net.netfilter.nf_conntrack_*` and their values.
    pub conntrack: Vec<(&'static str, u64)>,
    /// Service addresses.
    pub service_cidrs: Vec<IpNet>,
    /// Address DNS is answered on; `None`: somebody else does it.
    pub cluster_dns: Option<IpAddr>,
    /// The cluster's domain.
    pub cluster_domain: String,
    /// Where the node's own name servers are listed.
    pub upstream_resolv_conf: PathBuf,
    /// Node addresses that accept node ports; empty: all.
    pub node_port_addresses: Vec<IpNet>,
    /// Whether 127.0.0.1 accepts node ports.
    pub localhost_node_ports: bool,
    /// Whether to keep routes to other nodes' pods.
    pub node_routes: bool,
    /// File of this node's private key, when packets between pods of different nodes go in WireGuard.
    pub wireguard: Option<PathBuf>,
    /// Until when this node's lease holds: so long it announces addresses of Services it was chosen for.
    pub lease: Lease,
    /// Where health is served.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Whether it is an error when those two cannot be served.
    pub addresses_must_bind: bool,
    /// Told true while much is being loaded: the kernel is slower when anybody listens to changes of nftables.
    pub loading: state::Sender<bool>,
}

impl Config {
    /// A node of a cluster with the default ranges.
    pub fn new(node_name: &str, table: &str, bridge: &str) -> Self {
        let net = |a: [u8; 4], len| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(a), len));
        Self {
            node_name: node_name.into(),
            node_ips: Vec::new(),
            table: table.into(),
            bridge: bridge.into(),
            cluster_cidrs: vec![net([10, 244, 0, 0], 16)],
            pod_links: None,
            pods_of_node: false,
            masquerade_bit: 14,
            masquerade_all: false,
            conntrack: Vec::new(),
            service_cidrs: vec![net([10, 96, 0, 0], 16)],
            cluster_dns: Some(IpAddr::from([10, 96, 0, 10])),
            cluster_domain: "cluster.local".into(),
            upstream_resolv_conf: "/etc/resolv.conf".into(),
            node_port_addresses: Vec::new(),
            localhost_node_ports: true,
            node_routes: true,
            wireguard: None,
            lease: state::Sender::new(None).subscribe(),
            healthz: None,
            metrics: None,
            addresses_must_bind: false,
            loading: state::Sender::new(false),
        }
    }

    fn settings(&self) -> nft::skeleton::Settings {
        nft::skeleton::Settings {
            table: self.table.clone(),
            cluster_cidrs: self.cluster_cidrs.clone(),
            pod_links: self.pod_links.clone(),
            masquerade_bit: self.masquerade_bit,
            masquerade_all: self.masquerade_all,
            dns: self.cluster_dns.into_iter().collect(),
            node_port_addresses: self.node_port_addresses.clone(),
            localhost_node_ports: self.localhost_node_ports,
        }
    }
}

/// Why the proxy could not run or clean up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's tables.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Links and routes.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The notification socket.
    #[error("listen for changes of nftables")]
    Monitor(#[source] std::io::Error),
    /// An address of health or metrics.
    #[error("serve health and metrics on {0}")]
    Address(SocketAddr, #[source] std::io::Error),
    /// The model's thread.
    #[error("start the service thread")]
    Thread(#[source] std::io::Error),
}

/// Runs until `stop`. The rules stay in place afterwards.
///
/// # Errors
/// Only when it cannot begin; later failures are logged, shown by the health check and tried again.
pub async fn run(client: kube::Client, config: Config, stop: CancellationToken) -> Result<(), Error> {
    let addresses = config.healthz.into_iter().chain(config.metrics);
    let listeners = health::bind(addresses, config.addresses_must_bind).await?;
    let metrics = Arc::new(metrics::Metrics::new());
    let zone = Arc::new(RwLock::new(dns::zone::Zone::new(&config.cluster_domain)));
    let (inputs, queue) = mpsc::channel(QUEUE);
    let (report_to, report) = state::channel(sync::Report::default());
    let (nodes_to, nodes) = state::channel(Arc::default());
    let place = model::objects::Place { node: config.node_name.as_str().into(), zone: None };
    let mut settings = config.settings();
    if config.pods_of_node {
        // Cancel-safe: it only waits.
        settings.cluster_cidrs = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            ranges = watch::own_ranges(client.clone(), &config.node_name) => ranges,
        };
    }
    let ears = monitor::open(config.loading.clone()).map_err(Error::Monitor)?;
    let tables = (settings, Some(ears.clone()));
    let core = sync::Sync::new(place, tables, zone.clone(), metrics.clone(), report_to);
    let thread =
        std::thread::Builder::new().name("netproxy".into()).spawn(move || core.run(queue)).map_err(Error::Thread)?;

    configuration::set_conntrack(&config.conntrack);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(monitor::run(ears, config.table.clone(), report.clone(), inputs.clone()));
    let (chosen, announced) = announce::Chosen::new(&config.node_name);
    tasks.spawn(announce::run(links::open()?, config.node_ips.clone(), announced, config.lease.clone()));
    tasks.spawn(watch::services(client.clone(), inputs.clone(), chosen));
    tasks.spawn(watch::slices(client.clone(), config.node_name.clone(), inputs.clone()));
    tasks.spawn(watch::policy::run(client.clone(), inputs.clone()));
    tasks.spawn(watch::nodes(client.clone(), config.node_name.clone(), inputs, nodes_to));
    if config.node_routes {
        let own = links::Own {
            name: config.node_name.clone(),
            addresses: config.node_ips.clone(),
            cluster: config.cluster_cidrs.clone(),
            bridge: config.bridge.clone(),
            wireguard: config.wireguard.clone(),
        };
        tasks.spawn(links::run(links::open()?, own, client.clone(), nodes.clone()));
    } else if config.wireguard.is_some() {
        tracing::warn!("packets between pods are not encrypted: their ways are those of CNI plugins");
    }
    let shown = configuration::shown(&config);
    let checks =
        health::Health { node: config.node_name.clone(), report, nodes, metrics: metrics.clone(), config: shown };
    tasks.spawn(health::run(checks, listeners, stop.clone()));
    if let Some(address) = config.cluster_dns {
        start_dns(client, &config, address, zone, metrics, &mut tasks, &stop).await;
    }
    stop.cancelled().await;
    tasks.shutdown().await;
    // Its senders are gone: it ends after what it is doing now.
    let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    Ok(())
}

async fn start_dns(
    client: kube::Client,
    config: &Config,
    address: IpAddr,
    zone: Arc<RwLock<dns::zone::Zone>>,
    metrics: Arc<metrics::Metrics>,
    tasks: &mut tokio::task::JoinSet<()>,
    stop: &CancellationToken,
) {
    let added = async { links::add_dns_address(&links::open()?, address).await };
    if let Err(error) = added.await {
        tracing::error!(error = %sync::Chain(&error), "cluster DNS address not set up");
    }
    match dns::server::bind(address, DNS_PORT) {
        Ok(sockets) => {
            let own_nets = config.cluster_cidrs.iter().chain(&config.service_cidrs).copied().collect();
            let upstream = dns::upstream::Upstream::new(config.upstream_resolv_conf.clone(), address);
            let forwarder = dns::forward::Forwarder::new(upstream);
            let server = Arc::new(dns::server::Server { zone, forwarder, own_nets, metrics });
            tasks.spawn(watch::dns(client, server.clone()));
            tasks.spawn(dns::server::serve(server, sockets, stop.clone()));
        }
        Err(error) => tracing::error!(%address, %error, "cluster DNS does not answer: its port cannot be opened"),
    }
}

/// Removes the tables, routes and addresses that [`run`] left. Needs no API server.
///
/// # Errors
/// The first thing that could not be removed; the rest is removed all the same.
pub async fn cleanup(config: &Config) -> Result<(), Error> {
    let settings = config.settings();
    let tables =
        tokio::task::spawn_blocking(move || nft::kernel::Kernel::open(settings, None).and_then(|k| k.destroy()));
    let tables = tables.await.unwrap_or(Ok(()));
    let handle = links::open()?;
    let routes = links::remove_routes(&handle, &config.cluster_cidrs, &config.bridge).await;
    let announced = announce::cleanup(&handle).await;
    let address = match config.cluster_dns {
        Some(address) => links::remove_dns_address(&handle, address).await,
        None => Ok(()),
    };
    tables?;
    routes?;
    announced?;
    address?;
    Ok(())
}
