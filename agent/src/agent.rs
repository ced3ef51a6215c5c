//! Putting the agent together: [`run`], and what `isopod down` and `isopod reset` need of it.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Access,
    api::Api,
    certificates,
    cgroups::{CgroupError, Cgroups, Driver},
    claims::Claims,
    config::Config,
    context::Context,
    cri,
    csi::{self, Csi},
    devices::{self, Devices},
    events::Recorder,
    host::NodeHost,
    images::{ImageError, ImageService, LocalImages, Providers},
    machine,
    metrics::Metrics,
    network::{
        BridgeNetwork, NetworkConfig, PodNetwork,
        cni::{self, CniNetwork},
    },
    node,
    objects::Objects,
    paths::Paths,
    plugins,
    pods::{self, manager, table::PodTable, users::UserRanges},
    rate::Rate,
    runtime::{self, RuntimeEvent},
    server,
    services::Services,
    sources,
    stats::Stats,
    topology::{self, Managers},
    volumes::mounts,
};
use isopod_runtime::supervisor::protocol::{ContainerState, Op};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory of its own.
    #[error("cannot make {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The cgroup tree.
    #[error("cgroups cannot be used: {0}")]
    Cgroups(String),
    /// The image store.
    #[error("image store")]
    Images(#[from] ImageError),
    /// The node API.
    #[error("node API")]
    Server(#[from] server::Error),
    /// The pod network.
    #[error("pod network: {0}")]
    Network(String),
    /// The machine is not as the configuration wants it.
    #[error("{0}")]
    Machine(String),
    /// Something of a pod stays behind.
    #[error("{0}")]
    Leftovers(String),
}

impl From<CgroupError> for Error {
    fn from(e: CgroupError) -> Self {
        Self::Cgroups(e.to_string())
    }
}

/// Runs the agent until `stop`; pods keep running.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Error> {
    let network = network(&config).await?;
    run_on(config, network, stop).await
}

/// The same on a given network.
pub async fn run_on(config: Config, network: Arc<dyn PodNetwork>, stop: CancellationToken) -> Result<(), Error> {
    let paths = config.paths.clone();
    for dir in [paths.etc(), paths.state(), paths.pods(), paths.images(), paths.run_pods(), paths.logs()] {
        fs::create_dir_all(&dir).map_err(|source| Error::Directory { path: dir, source })?;
    }
    machine::check(&config.kubelet).map_err(Error::Machine)?;
    machine::settle(&config.kubelet);
    pods::record::prune(&paths.starts());
    let driver = Driver::named(&config.kubelet.cgroup_driver).unwrap_or(Driver::Cgroupfs);
    let cgroups = Cgroups::open(&paths.instance(), driver)?;
    let local =
        LocalImages::open(&paths.image_store(), paths.etc().join("certs.d"), paths.state().join("config.json"))?;
    let asked = paths.etc().join("credential-providers");
    let providers = Arc::new(Providers::load(&asked.with_extension("yaml"), asked)?);
    local.ask(providers.clone());
    if let Ok(verification) = config.kubelet.verification() {
        local.verify(verification);
    }
    local.limit_pulls(config.kubelet.parallel_pulls());
    let node_name: Arc<str> = config.node_name.as_str().into();
    let server = bind(&config).await?;
    let api = Api::start(config.kubeconfig.clone(), stop.clone());
    let machine = node::info::machine(&config);
    if config.kubelet.enforce_node_allocatable.iter().any(|g| g == "pods") {
        let reserved = |resource: &str| node::info::reserved(&config.kubelet, resource);
        let (milli, memory) =
            (i64::from(machine.cpus) * 1000 - reserved("cpu"), machine.memory - reserved("memory") / 1000);
        if let Err(error) = cgroups.enforce(milli, memory) {
            tracing::warn!(%error, "Failed to update Node Allocatable Limits");
        }
    }
    let left_out = |resource: &str| node::info::left_out(&config.kubelet, &machine, resource);
    let topology = Managers::open(&config.kubelet, paths.plugins_root(), Path::new("/sys"), left_out);
    let topology = topology.map_err(Error::Machine)?;
    let manifests = config.kubelet.static_pod_path.clone().unwrap_or_else(|| paths.manifests());
    load_images(&local, &config).await;
    let k = &config.kubelet;
    let events_rate = Rate::new(k.event_record_qps, k.event_burst);
    local.limit_rate(Rate::new(k.registry_pull_qps, k.registry_burst));
    let ctx = Arc::new(Context {
        objects: Objects::new(api.clone()),
        services: Services::start(api.clone(), stop.clone()),
        events: Recorder::start(api.clone(), node_name.clone(), events_rate, stop.clone()),
        node_name: node_name.clone(),
        images: Arc::new(local),
        table: PodTable::default(),
        stats: Stats::default(),
        metrics: Metrics::default(),
        csi: Csi::default(),
        cri: cri::Store::new(paths.state().join("cri")),
        claims: Claims::open(paths.plugins_root()),
        providers,
        devices: Devices::open(devices::directory(&paths.plugins_root())),
        access: Access::new(api.clone(), &node_name, &config.kubelet),
        topology,
        users: UserRanges::open(paths.pods(), config.kubelet.user_namespaces.ids_per_pod),
        shutdown: watch::channel(false).0,
        pressure: watch::channel(Default::default()).0,
        node: RwLock::default(),
        burstable: RwLock::default(),
        api,
        network,
        cgroups,
        machine,
        config,
    });
    let mut manifests = sources::files::start(manifests, node_name.clone(), ctx.objects.clone(), stop.clone());
    if let Some(url) = ctx.config.kubelet.static_pod_url.clone() {
        let k = &ctx.config.kubelet;
        let place =
            sources::url::Place { url, headers: k.static_pod_url_header.clone(), every: k.http_check_frequency };
        manifests = sources::url::join(manifests, place, node_name, stop.clone());
    }
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(manager::run(ctx.clone(), manifests, stop.clone()));
    let counter = Arc::downgrade(&ctx);
    isopod_client::connect::listen(move |asked| {
        if let Some(ctx) = counter.upgrade() {
            ctx.metrics.asked(asked);
        }
    });
    tasks.spawn(node::run(ctx.clone(), stop.clone()));
    tasks.spawn(plugins::run(ctx.clone(), stop.clone()));
    tasks.spawn(certificates::run(ctx.clone(), stop.clone()));
    tasks.spawn(cri::run(ctx.clone(), stop.clone()));
    tasks.spawn(devices::run(ctx.clone(), stop.clone()));
    tasks.spawn(topology::live::run(ctx.clone(), stop.clone()));
    tasks.spawn(csi::node::run(ctx.clone(), stop.clone()));
    tasks.spawn(node::eviction::run(ctx.clone(), stop.clone()));
    tasks.spawn(node::oom::run(ctx.clone(), stop.clone()));
    tasks.spawn(node::shutdown::run(ctx.clone(), stop.clone()));
    let k = &ctx.config.kubelet;
    if k.healthz_port > 0 {
        let address = SocketAddr::new(k.healthz_bind_address, k.healthz_port);
        tasks.spawn(server::health::serve(address, stop.clone()));
    }
    if let Some(bound) = server {
        let host = Arc::new(NodeHost { ctx: ctx.clone() });
        tasks.spawn(bound.serve(host, stop.clone()));
    }
    stop.cancelled().await;
    // What is not done in a moment is cut off: everything that matters is on disk.
    let finish = async { while tasks.join_next().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(3), finish).await.ok();
    Ok(())
}

async fn bind(config: &Config) -> Result<Option<server::Bound>, Error> {
    let k = &config.kubelet;
    let cert = k.tls_cert_file.clone().unwrap_or_else(|| config.serving_cert.clone());
    let key = k.tls_private_key_file.clone().unwrap_or_else(|| config.serving_key.clone());
    let client_ca = k.authentication.x509.client_ca_file.clone().unwrap_or_else(|| config.client_ca.clone());
    if !k.enable_server {
        return Ok(None);
    }
    if !cert.exists() || !client_ca.exists() {
        tracing::warn!(cert = %cert.display(), "no serving certificate: the node API is off");
        return Ok(None);
    }
    let bind = SocketAddr::new(k.address, k.port);
    let only_tls13 = k.tls_min_version.as_deref() == Some("VersionTLS13");
    let cipher_suites = k.tls_cipher_suites.clone();
    let wanted = server::Config { bind, cert, key, client_ca, only_tls13, cipher_suites };
    Ok(Some(server::Bound::new(&wanted).await?))
}

async fn load_images(local: &LocalImages, config: &Config) {
    let dir = config.paths.images();
    let archives = async {
        if let Err(error) = local.load_archives(&dir).await {
            tracing::warn!(%error, "image archives");
        }
    };
    let own = async {
        let Some(name) = &config.own_image else { return };
        match std::env::current_exe() {
            Ok(path) => {
                if let Err(error) = local.assemble(name, &path, "isopod").await {
                    tracing::error!(%error, image = name, "isopod's own image cannot be assembled");
                }
            }
            Err(error) => tracing::error!(%error, "the path of this executable"),
        }
    };
    tokio::join!(archives, own);
}

/// Resolves when the file is there.
pub async fn wait_for_file(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let mut events = std::pin::pin!(sources::directory_events(parent)?);
    while !path.exists() {
        if events.next().await.is_none() {
            return Err(io::Error::other("the directory cannot be watched any more"));
        }
    }
    Ok(())
}

/// Longest wait for pods to end by themselves.
const PATIENCE: Duration = Duration::from_secs(30);

/// Stops every pod of this root (for `isopod down`; no agent may run). Networks are the network's to remove.
pub async fn stop_all_pods(paths: &Paths) -> Result<(), Error> {
    let uids: Vec<String> = fs::read_dir(paths.run_pods())
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    join_all(uids.iter().map(|uid| stop_pod(paths, uid))).await;
    let trees = Cgroups::left(&paths.instance())?;
    let mut errors = Vec::new();
    for (cgroups, group) in trees.iter().flat_map(|tree| tree.pods().into_values().map(move |group| (tree, group))) {
        errors.extend(cgroups.end(&group).await.err().map(|e| e.to_string()));
    }
    for uid in &uids {
        for dir in [paths.run_pod(uid), paths.pod(uid).join("volume-subpaths")] {
            if let Err(e) = mounts::remove_tree(&dir) {
                errors.push(format!("{}: {e}", dir.display()));
            }
        }
    }
    let places = [paths.pods(), paths.plugins_root().join("pods"), paths.plugins_root().join("plugins/kubernetes.io")];
    errors.extend(places.iter().flat_map(|place| mounts::unmount_below(place)));
    errors.extend(trees.iter().filter_map(|tree| tree.remove_root().err()).map(|e| e.to_string()));
    if errors.is_empty() { Ok(()) } else { Err(Error::Leftovers(errors.join("; "))) }
}

async fn stop_pod(paths: &Paths, uid: &str) {
    let (events, mut exits) = mpsc::unbounded_channel();
    let Ok(supervisor) = runtime::connect(&paths.run_pod(uid), events) else { return };
    let text = fs::read(paths.pod(uid).join("pod.json")).ok();
    let pod = text.and_then(|t| serde_json::from_slice::<Pod>(&t).ok());
    let grace = pod.and_then(|p| p.spec?.termination_grace_period_seconds).unwrap_or(30);
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0)).min(PATIENCE);
    let listed = supervisor.subscribe().await.unwrap_or_default();
    let mut left: Vec<String> =
        listed.into_iter().filter(|c| c.state == ContainerState::Running).map(|c| c.id).collect();
    for id in &left {
        supervisor.kill(id, libc::SIGTERM, false).await.ok();
    }
    let ended = async {
        while !left.is_empty() {
            match exits.recv().await {
                Some(RuntimeEvent::Exited(status)) => left.retain(|id| *id != status.id),
                Some(RuntimeEvent::Lost) | None => return,
            }
        }
    };
    tokio::time::timeout(grace, ended).await.ok();
    tokio::time::timeout(Duration::from_secs(10), supervisor.done(Op::Shutdown)).await.ok();
}

/// Removes the mounts and cgroups that this root's agent may have left (for `isopod reset`, after [`stop_all_pods`]).
pub fn cleanup(paths: &Paths) -> Result<(), Error> {
    let mut errors = Vec::new();
    for dir in [
        paths.state(),
        paths.run(),
        paths.plugins_root().join("pods"),
        paths.plugins_root().join("plugins/kubernetes.io"),
    ] {
        let Ok(dir) = dir.canonicalize() else { continue };
        errors.extend(mounts::unmount_below(&dir));
    }
    node::shutdown::forget();
    for file in topology::FILES {
        fs::remove_file(paths.plugins_root().join(file)).ok();
    }
    let removed = Cgroups::left(&paths.instance()).and_then(|trees| trees.iter().try_for_each(Cgroups::remove_root));
    if let Err(e) = removed {
        errors.push(e.to_string());
    }
    if errors.is_empty() { Ok(()) } else { Err(Error::Leftovers(errors.join("; "))) }
}

async fn network(config: &Config) -> Result<Arc<dyn PodNetwork>, Error> {
    if cni::is_configured(&config.paths) {
        let network = CniNetwork::start(&config.paths).map_err(|e| Error::Network(e.to_string()))?;
        config.kubelet.pod_cidr.into_iter().for_each(|cidr| network.set_pod_cidr(vec![cidr]));
        return Ok(Arc::new(network));
    }
    let wanted = NetworkConfig {
        cluster_cidrs: vec![config.cluster_cidr],
        service_cidrs: vec![config.service_cidr],
        node_ip: config.node_ip,
        forget_flows: config.forget_flows,
        loading: config.loading.clone(),
        ..NetworkConfig::new(config.paths.clone())
    };
    let network = BridgeNetwork::start(wanted).await.map_err(|e| Error::Network(e.to_string()))?;
    if let Some(cidr) = config.kubelet.pod_cidr {
        network.set_pod_cidr(vec![cidr]);
    }
    Ok(Arc::new(network))
}
