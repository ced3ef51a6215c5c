//! The built-in pod network: a bridge, a link per pod, addresses from the node's ranges.
//!
//! Network namespaces with link, address and routes are made ahead in a small pool, so that a pod's setup is a record on
//! disk and a bind mount. What comes in: setup and teardown by pod, the node's ranges. What goes out: links,
//! namespaces, rules. Records on disk are the truth; whatever has no record is removed.

mod slots;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Instant,
};

use futures::future::BoxFuture;
use ipnet::IpNet;
use parking_lot::Mutex;
use rtnetlink::Handle;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use self::slots::{SLOT, Slot};
use super::{
    NetworkError, PodNetwork, PodNetworkRequest, PodNetworkStatus, addresses,
    addresses::Addresses,
    firewall,
    gone::Gone,
    leaving::Leaving,
    links, namespace,
    records::{Record, Records},
    rules, shape, watchman,
};
use crate::Paths;

/// Largest packet of pods where nothing tells it.
const MTU: u32 = 1500;
const WAITING: &str = "this node has no pod address range yet";

/// What the pod network has to know.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Where things lie and how links are called.
    pub paths: Paths,
    /// Pod addresses of the whole cluster.
    pub cluster_cidrs: Vec<IpNet>,
    /// Service addresses: routable from here, though nobody has them.
    pub service_cidrs: Vec<IpNet>,
    /// Address of the node: pods' packets are as large as those of its link.
    pub node_ip: Option<IpAddr>,
    /// Makes connection tracking forget the UDP flows of host ports whose pod comes or goes.
    pub forget_flows: Option<ForgetFlows>,
    /// True while somebody in this process changes so much of nftables that nobody should listen.
    pub loading: watch::Receiver<bool>,
}

/// Takes the pods' addresses and their host ports; returns how many flows were forgotten.
pub type ForgetFlows = fn(&[IpAddr], &[u16]) -> io::Result<usize>;

impl NetworkConfig {
    /// The default ranges.
    pub fn new(paths: Paths) -> Self {
        let net = |a: [u8; 4]| IpNet::new_assert(IpAddr::from(a), 16);
        Self {
            paths,
            cluster_cidrs: vec![net([10, 244, 0, 0])],
            service_cidrs: vec![net([10, 96, 0, 0])],
            node_ip: None,
            forget_flows: None,
            loading: watch::Sender::new(false).subscribe(),
        }
    }

    fn rules(&self, pods: Vec<IpNet>) -> rules::Settings {
        rules::Settings {
            table: self.table(),
            bridge: self.paths.bridge(),
            cluster: self.cluster_cidrs.clone(),
            services: self.service_cidrs.clone(),
            pods,
        }
    }

    fn table(&self) -> String {
        format!("{}-hostports", self.paths.instance())
    }

    fn netns_dir(&self) -> PathBuf {
        self.paths.run().join("netns")
    }

    fn records_dir(&self) -> PathBuf {
        self.paths.state().join("network")
    }
}

#[derive(Default)]
struct State {
    addresses: Addresses,
    records: HashMap<String, Record>,
    pool: Vec<Slot>,
    /// Links of slots that are being made.
    making: HashSet<String>,
    gone: Gone,
}

/// How far the node's ranges have been set up.
#[derive(Clone, PartialEq, Eq)]
enum Ranges {
    Unknown,
    Failed(String),
    Ready,
}

pub(super) struct Inner {
    config: NetworkConfig,
    handle: Handle,
    bridge: u32,
    mtu: u32,
    leaving: Leaving,
    records: Records,
    state: Mutex<State>,
    /// Held while nft runs, so that the last writer is the latest.
    rules: Mutex<()>,
    ranges: watch::Sender<Ranges>,
    /// Told when `ranges` was written.
    turned: watch::Sender<()>,
    wanted: watch::Sender<Vec<IpNet>>,
    filling: AtomicBool,
    counter: AtomicU64,
}

/// The pod network of one node.
#[derive(Clone)]
pub struct BridgeNetwork {
    inner: Arc<Inner>,
}

pub(super) fn chain(error: &dyn std::error::Error) -> NetworkError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    NetworkError(text)
}

macro_rules! from {
    ($($error:ty),*) => { $(impl From<$error> for NetworkError {
        fn from(error: $error) -> Self { chain(&error) }
    })* };
}

from!(links::Error, namespace::Error, super::records::Error, rules::Error, addresses::Exhausted);

/// A locally administered address that stays the same for a name.
fn hardware_address(name: &str) -> [u8; 6] {
    let sum = Sha256::digest(name.as_bytes());
    [0x02, sum[0], sum[1], sum[2], sum[3], sum[4]]
}

fn open_handle() -> Result<Handle, NetworkError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|e| NetworkError(format!("open route socket: {e}")))?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Forwarding, and localhost as a source of forwarded traffic (host ports at 127.0.0.1; the guard rule keeps others out).
fn node_sysctls(bridge: &str) {
    namespace::sysctl("net/ipv4/ip_forward", "1");
    namespace::sysctl("net/ipv4/conf/all/route_localnet", "1");
    // Pods reach their neighbours through this node on purpose: no advice to go directly.
    namespace::sysctl("net/ipv4/conf/all/send_redirects", "0");
    namespace::sysctl(&format!("net/ipv4/conf/{bridge}/send_redirects"), "0");
    namespace::sysctl(&format!("net/ipv4/conf/{bridge}/rp_filter"), "0");
    namespace::sysctl(&format!("net/ipv6/conf/{bridge}/accept_dad"), "0");
}

impl BridgeNetwork {
    /// Makes the bridge and reads what an earlier process left. With ranges known from then, pods can start at once.
    ///
    /// # Errors
    /// When links cannot be made or state cannot be read.
    pub async fn start(config: NetworkConfig) -> Result<Self, NetworkError> {
        std::fs::create_dir_all(config.netns_dir())
            .map_err(|e| NetworkError(format!("create {}: {e}", config.netns_dir().display())))?;
        let records = Records::open(config.records_dir())?;
        let handle = open_handle()?;
        let name = config.paths.bridge();
        let mtu = match config.node_ip {
            Some(address) => links::mtu_at(&handle, address).await?.unwrap_or(MTU),
            None => MTU,
        };
        let bridge = links::ensure_bridge(&handle, &name, hardware_address(&config.paths.instance()), mtu).await?;
        node_sysctls(&name);
        let mut state = State::default();
        for record in records.load()? {
            record.ips.iter().for_each(|a| state.addresses.note(*a, &record.uid));
            state.records.insert(record.uid.clone(), record);
        }
        let known = records.ranges();
        let (wanted, mut told) = watch::channel(Vec::new());
        let inner = Arc::new(Inner {
            config,
            handle,
            bridge,
            mtu,
            leaving: Leaving::default(),
            records,
            state: Mutex::new(state),
            rules: Mutex::new(()),
            ranges: watch::Sender::new(Ranges::Unknown),
            turned: watch::Sender::new(()),
            wanted,
            filling: AtomicBool::new(false),
            counter: AtomicU64::new(0),
        });
        inner.remove_strays().await?;
        if !known.is_empty() {
            inner.configure(known).await;
        }
        // One task sets ranges up, one after the other; it ends with the network.
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            while told.changed().await.is_ok() {
                let ranges = told.borrow_and_update().clone();
                let Some(inner) = weak.upgrade() else { return };
                inner.configure(ranges).await;
            }
        });
        match watchman::open() {
            Ok(socket) => {
                let loading = inner.config.loading.clone();
                tokio::spawn(watchman::run(socket, Arc::downgrade(&inner), inner.config.table(), loading));
            }
            Err(error) => {
                tracing::warn!(%error, "it will not be noticed when somebody removes the pod network's rules")
            }
        }
        Ok(Self { inner })
    }

    /// Removes everything this network ever made. Needs no running agent; no pod may be left.
    ///
    /// # Errors
    /// What could not be removed; the rest is removed all the same.
    pub async fn cleanup_all(config: &NetworkConfig) -> Result<(), NetworkError> {
        let mut problems = Vec::new();
        let mut note = |result: Result<(), NetworkError>| problems.extend(result.err().map(|e| e.0));
        note(super::cni::CniNetwork::cleanup_all(&config.paths).await);
        for entry in std::fs::read_dir(config.netns_dir()).into_iter().flatten().flatten() {
            note(namespace::unpin(&entry.path()).map_err(Into::into));
        }
        let handle = open_handle()?;
        let name = config.paths.bridge();
        if let Some(bridge) = links::index(&handle, &name).await? {
            for port in links::ports(&handle, bridge).await? {
                note(links::delete(&handle, &port).await.map_err(Into::into));
            }
            note(links::delete(&handle, &name).await.map_err(Into::into));
        }
        let settings = config.rules(Vec::new());
        let removed = tokio::task::spawn_blocking(move || (firewall::leave(&settings), rules::remove(&settings.table)));
        if let Ok((left, removed)) = removed.await {
            note(left.map_err(|e| chain(&e)));
            note(removed.map_err(Into::into));
        }
        // The ranges stay: pods get addresses after the next start before the API server tells them again.
        let pods = config.records_dir().join("pods");
        match std::fs::remove_dir_all(&pods) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                note(Err(NetworkError(format!("remove {}: {e}", pods.display()))));
            }
            _ => {}
        }
        if problems.is_empty() { Ok(()) } else { Err(NetworkError(problems.join("; "))) }
    }
}

#[cfg(test)]
impl BridgeNetwork {
    /// Whether the pool is full and nothing is being made.
    pub(super) fn is_idle(&self) -> bool {
        self.inner.filled()
    }
}

impl Inner {
    fn netns(&self, uid: &str) -> PathBuf {
        self.config.netns_dir().join(uid)
    }

    fn status(&self, record: &Record) -> PodNetworkStatus {
        PodNetworkStatus { netns: self.netns(&record.uid), ips: record.ips.clone() }
    }

    /// Sets up the node's side of its ranges; a failure is told by `not_ready` and by every setup.
    async fn configure(self: &Arc<Self>, ranges: Vec<IpNet>) {
        let unchanged = *self.state.lock().addresses.ranges() == *ranges && *self.ranges.borrow() == Ranges::Ready;
        if unchanged || ranges.is_empty() {
            return;
        }
        let outcome = match self.try_configure(&ranges).await {
            Ok(()) => Ranges::Ready,
            Err(error) => {
                tracing::error!(%error, ?ranges, "pod network not set up");
                Ranges::Failed(error.0)
            }
        };
        self.ranges.send_replace(outcome);
        self.turned.send_replace(());
        self.refill();
        self.look_after_rules().await;
    }

    async fn try_configure(self: &Arc<Self>, ranges: &[IpNet]) -> Result<(), NetworkError> {
        for range in ranges {
            let own = IpNet::new_assert(addresses::gateway(range), range.prefix_len());
            links::add_address(&self.handle, self.bridge, own).await?;
            if range.addr().is_ipv6() {
                namespace::sysctl("net/ipv6/conf/all/forwarding", "1");
            }
        }
        // Without a default route a service's address must still lead somewhere for it to be translated.
        for services in &self.config.service_cidrs {
            let same_family = |r: &&IpNet| r.addr().is_ipv4() == services.addr().is_ipv4();
            if let Some(range) = ranges.iter().find(same_family) {
                let source = addresses::gateway(range);
                links::add_route(&self.handle, self.bridge, *services, None, Some(source)).await?;
            }
        }
        let old = {
            let mut state = self.state.lock();
            state.addresses.set_ranges(ranges.to_vec());
            std::mem::take(&mut state.pool)
        };
        for slot in old {
            self.discard(slot).await;
        }
        self.records.save_ranges(ranges)?;
        self.write_rules().await
    }

    /// Somebody changed the node's firewall: our own table is written again if it is gone, and pods pass what there is of
    /// others.
    pub(super) async fn look_after_rules(self: &Arc<Self>) {
        if *self.ranges.borrow() != Ranges::Ready {
            return;
        }
        let settings = self.rule_settings();
        let there = tokio::task::spawn_blocking(move || firewall::pass(&settings)).await;
        match there.unwrap_or(Ok(true)) {
            Ok(true) => {}
            Ok(false) => match self.write_rules().await {
                Ok(()) => {
                    tracing::warn!(table = self.config.table(), "somebody removed our nftables table: written again");
                }
                Err(error) => tracing::error!(%error, "somebody removed our nftables table, and it cannot be written"),
            },
            Err(error) => tracing::warn!(error = %chain(&error), "pods may not pass somebody else's firewall"),
        }
    }

    /// Writes the rules from the records as they are when nft's turn comes.
    async fn write_rules(self: &Arc<Self>) -> Result<(), NetworkError> {
        let inner = self.clone();
        let written = tokio::task::spawn_blocking(move || {
            let _turn = inner.rules.lock();
            let (records, gone) = {
                let mut state = inner.state.lock();
                (state.records.values().cloned().collect::<Vec<_>>(), state.gone.all(Instant::now()))
            };
            rules::apply(&inner.rule_settings(), &records, &gone)
        });
        Ok(written.await.map_err(|e| NetworkError(e.to_string()))??)
    }

    fn rule_settings(&self) -> rules::Settings {
        self.config.rules(self.state.lock().addresses.ranges().to_vec())
    }

    /// Tells the kernel which addresses are nobody's now. Many pods that go at once share one run of nft.
    async fn write_gone(self: &Arc<Self>) {
        let inner = self.clone();
        let written = tokio::task::spawn_blocking(move || {
            let _turn = inner.rules.lock();
            let change = inner.state.lock().gone.change();
            let done = rules::bury(&inner.rule_settings(), &change.added, &change.removed);
            if done.is_err() {
                inner.state.lock().gone.fail(&change);
            }
            done
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(error = %chain(&error), "packets to pods that are gone are not refused");
        }
    }

    async fn setup(self: &Arc<Self>, pod: PodNetworkRequest) -> Result<PodNetworkStatus, NetworkError> {
        let existing = self.state.lock().records.get(&pod.uid).cloned();
        if let Some(record) = existing {
            if namespace::is_pinned(&self.netns(&pod.uid)) && links::index(&self.handle, &record.link).await?.is_some()
            {
                return Ok(self.status(&record));
            }
            // A reboot, or a crash half way: begin anew.
            self.teardown(&pod.uid).await?;
        }
        self.ready()?;
        let ready = self.state.lock().pool.pop();
        let slot = match ready {
            Some(slot) => slot,
            None => self.prepare().await?,
        };
        self.refill();
        let record = Record {
            uid: pod.uid,
            namespace: pod.namespace,
            name: pod.name,
            link: slot.link.clone(),
            ips: slot.ips.clone(),
            host_ports: pod.host_ports,
            bandwidth: pod.bandwidth,
        };
        if let Err(error) = self.hand_over(&slot, &record) {
            self.discard(slot).await;
            // The record says what may be left; it goes when that is gone.
            return Err(error);
        }
        if let Err(error) = self.finish(&record).await {
            self.teardown(&record.uid).await?;
            return Err(error);
        }
        Ok(self.status(&record))
    }

    /// What only some pods have: limits of bandwidth, host ports.
    async fn finish(self: &Arc<Self>, record: &Record) -> Result<(), NetworkError> {
        if let Some(bits) = record.bandwidth.ingress {
            let link = links::need(&self.handle, &record.link).await?;
            shape::limit(&self.handle, link, &record.link, bits).await?;
        }
        if let Some(bits) = record.bandwidth.egress {
            let inside = namespace::enter(self.netns(&record.uid)).await?;
            let link = links::need(&inside, links::POD_LINK).await?;
            shape::limit(&inside, link, links::POD_LINK, bits).await?;
        }
        if record.host_ports.is_empty() {
            return Ok(());
        }
        self.write_rules().await?;
        self.forget_flows(record).await;
        Ok(())
    }

    /// A UDP client that goes on asking keeps its flow, and with it the way to whoever had the port before.
    async fn forget_flows(&self, record: &Record) {
        let ports = record.host_ports.iter().filter(|p| p.protocol == super::Protocol::Udp);
        let ports: Vec<u16> = ports.map(|p| p.host_port).collect();
        let Some(forget) = self.config.forget_flows.filter(|_| !ports.is_empty()) else { return };
        let ips = record.ips.clone();
        match tokio::task::spawn_blocking(move || forget(&ips, &ports)).await {
            Ok(Ok(count)) => tracing::debug!(uid = record.uid, count, "UDP flows of host ports forgotten"),
            Ok(Err(error)) => tracing::warn!(uid = record.uid, %error, "UDP flows of host ports not forgotten"),
            Err(_) => {}
        }
    }

    /// The record first, then the namespace under the pod's name.
    fn hand_over(&self, slot: &Slot, record: &Record) -> Result<(), NetworkError> {
        self.records.save(record)?;
        let path = self.netns(&record.uid);
        if let Err(error) = namespace::rename(&slot.path, &path) {
            let _ = namespace::unpin(&path);
            self.records.remove(&record.uid)?;
            return Err(error.into());
        }
        let mut state = self.state.lock();
        state.making.remove(&slot.link);
        state.addresses.rename(&slot.id, &record.uid);
        state.records.insert(record.uid.clone(), record.clone());
        Ok(())
    }

    async fn teardown(self: &Arc<Self>, uid: &str) -> Result<(), NetworkError> {
        let Some(record) = self.state.lock().records.get(uid).cloned() else {
            return Ok(namespace::unpin(&self.netns(uid))?);
        };
        self.state.lock().gone.insert(&record.ips, Instant::now());
        if record.host_ports.is_empty() {
            self.write_gone().await;
        } else {
            // Out of the rules before the address can be anyone else's.
            if let Some(kept) = self.state.lock().records.get_mut(uid) {
                kept.host_ports.clear();
            }
            self.write_rules().await?;
            self.forget_flows(&record).await;
        }
        self.remove(&self.netns(uid), &record.link).await?;
        for address in &record.ips {
            links::forget_neighbour(&self.handle, self.bridge, *address).await?;
        }
        self.records.remove(uid)?;
        let mut state = self.state.lock();
        state.records.remove(uid);
        state.addresses.release(uid);
        Ok(())
    }

    async fn reconcile(self: &Arc<Self>, known: &[String]) -> Result<(), NetworkError> {
        let unknown: Vec<String> =
            self.state.lock().records.keys().filter(|uid| !known.contains(uid)).cloned().collect();
        let mut problems = Vec::new();
        for uid in unknown {
            tracing::info!(uid, "removing the network of a pod that is gone");
            problems.extend(self.teardown(&uid).await.err());
        }
        problems.extend(self.remove_strays().await.err());
        if *self.ranges.borrow() == Ranges::Ready {
            problems.extend(self.write_rules().await.err());
        }
        match problems.into_iter().next() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Removes namespaces and links that neither a record nor the pool knows.
    async fn remove_strays(&self) -> Result<(), NetworkError> {
        let (names, links): (HashSet<String>, HashSet<String>) = {
            let state = self.state.lock();
            let names = state.records.keys().cloned().chain(state.pool.iter().map(|s| s.id.clone()));
            let links = state.records.values().map(|r| r.link.clone()).chain(state.pool.iter().map(|s| s.link.clone()));
            (names.collect(), links.chain(state.making.iter().cloned()).collect())
        };
        let making = !self.state.lock().making.is_empty();
        let dir = self.config.netns_dir();
        let entries = std::fs::read_dir(&dir).map_err(|e| NetworkError(format!("read {}: {e}", dir.display())))?;
        for path in entries.flatten().map(|e| e.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let busy = making && name.starts_with(SLOT);
            if !names.contains(&name) && !busy {
                namespace::unpin(&path)?;
            }
        }
        for link in links::ports(&self.handle, self.bridge).await? {
            let ours = link.starts_with(&self.config.paths.link_prefix());
            if ours && !links.contains(&link) && !self.state.lock().making.contains(&link) {
                links::delete(&self.handle, &link).await?;
            }
        }
        Ok(())
    }

    fn ready(&self) -> Result<(), NetworkError> {
        match &*self.ranges.borrow() {
            Ranges::Ready => Ok(()),
            Ranges::Unknown => Err(NetworkError(WAITING.into())),
            Ranges::Failed(why) => Err(NetworkError(why.clone())),
        }
    }
}

impl PodNetwork for BridgeNetwork {
    fn setup(&self, pod: PodNetworkRequest) -> BoxFuture<'_, Result<PodNetworkStatus, NetworkError>> {
        Box::pin(self.inner.setup(pod))
    }

    fn teardown<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>> {
        Box::pin(self.inner.teardown(uid))
    }

    fn reconcile<'a>(&'a self, known: &'a [String]) -> BoxFuture<'a, Result<(), NetworkError>> {
        Box::pin(self.inner.reconcile(known))
    }

    fn set_pod_cidr(&self, cidrs: Vec<IpNet>) {
        self.inner.wanted.send_replace(cidrs);
    }

    fn not_ready(&self) -> Option<String> {
        self.inner.ready().err().map(|e| e.0)
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.inner.turned.subscribe()
    }
}
