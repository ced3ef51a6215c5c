//! `isopod agent`: the node agent, with the service proxy and DNS beside it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use isopod_agent::{KubeletConfiguration, Paths};
use isopod_netproxy::configuration::KubeProxyConfiguration;
use tokio_util::sync::CancellationToken;

use crate::{
    bootstrap,
    error::Usage,
    kubeconfig, lock, manifests,
    node::{Options, PodEncryption, Settings},
    pki, preflight,
};

/// Options of the agent.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    node: Options,
    /// kubeconfig of the node [default: etc/isopod/agent.conf]; without the file the agent runs static pods only.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// KubeletConfiguration [default: etc/isopod/config.yaml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// KubeProxyConfiguration [default: etc/isopod/proxy.yaml, if it is there]
    #[arg(long, value_name = "FILE")]
    proxy_config: Option<PathBuf>,
    /// Labels for the node, key=value.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    node_labels: Vec<String>,
}

/// A node ready to run.
pub(crate) struct Node {
    agent: isopod_agent::Config,
    proxy: isopod_netproxy::Config,
    kubeconfig: PathBuf,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    crate::logging::to_stderr();
    let settings = Settings::resolve(&paths.etc().join("cluster.yaml"), args.node)?;
    let lock = lock::take(&paths.run())?;
    let runtime = preflight::check(paths, &[("the agent", "--agent-port", settings.agent_port)])?;
    let mut node = Node::new(paths, &settings, runtime, args.config, args.kubeconfig, &args.node_labels)?;
    if let Some(path) = args.proxy_config {
        node.configure_proxy(&path)?;
    }
    let result = super::serve(2, |stop| async {
        // Fails only without a service manager to tell.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        node.run(stop).await
    });
    drop(lock);
    result
}

/// The agent's configuration; the defaults without a file.
pub(crate) fn configuration(path: &Path) -> Result<KubeletConfiguration> {
    KubeletConfiguration::load(path).map_err(|error| Usage(error.to_string()).into())
}

impl Node {
    /// Reads the agent's configuration and puts everything together.
    pub(crate) fn new(
        paths: &Paths,
        settings: &Settings,
        runtime_binary: PathBuf,
        config: Option<PathBuf>,
        kubeconfig: Option<PathBuf>,
        labels: &[String],
    ) -> Result<Self> {
        let config_path = config.unwrap_or_else(|| paths.config());
        let mut kubelet = configuration(&config_path)?;
        kubelet.port = settings.agent_port;
        let cluster_domain = kubelet.cluster_domain.clone();
        let cluster_dns = kubelet.cluster_dns.first().copied().or(settings.dns_ip());
        let cluster_dns =
            cluster_dns.ok_or_else(|| anyhow!("service CIDR {} has no room for DNS", settings.service_cidr))?;
        let labels: Result<BTreeMap<String, String>> = labels
            .iter()
            .map(|label| {
                let (key, value) = label
                    .split_once('=')
                    .ok_or_else(|| Usage(format!("--node-labels: \"{label}\" is not KEY=VALUE")))?;
                Ok((key.to_owned(), value.to_owned()))
            })
            .collect();
        let kubeconfig = kubeconfig.unwrap_or_else(|| paths.kubeconfig("agent"));
        let certificates = certificates(paths, settings, &kubeconfig)?;
        let resolv_conf = kubelet.resolv_conf.clone();
        let proxy = isopod_netproxy::Config::new(&settings.node_name, &paths.instance(), &paths.bridge());
        let lease = tokio::sync::watch::Sender::new(None);
        let mut node = Self {
            agent: isopod_agent::Config {
                paths: paths.clone(),
                node_name: settings.node_name.clone(),
                node_ip: Some(settings.node_ip),
                labels: labels?,
                kubeconfig: Some(kubeconfig.clone()),
                runtime_binary,
                kubelet,
                serving_cert: certificates.join("kubelet.crt"),
                serving_key: certificates.join("kubelet.key"),
                client_ca: certificates.join("ca.crt"),
                cluster_cidr: settings.pod_cidr,
                service_cidr: settings.service_cidr,
                forget_flows: Some(isopod_netproxy::forget_host_ports),
                loading: proxy.loading.subscribe(),
                lease: lease.clone(),
                own_image: Some(manifests::IMAGE.to_owned()),
            },
            proxy: isopod_netproxy::Config {
                node_ips: vec![settings.node_ip],
                cluster_cidrs: vec![settings.pod_cidr],
                service_cidrs: vec![settings.service_cidr],
                cluster_dns: Some(cluster_dns),
                cluster_domain,
                upstream_resolv_conf: resolv_conf,
                lease: lease.subscribe(),
                // Plugins make their own ways between nodes.
                node_routes: !isopod_agent::network::cni::is_configured(paths),
                wireguard: (settings.pod_encryption == PodEncryption::Wireguard).then(|| paths.wireguard_key()),
                // Where kube-proxy has them.
                healthz: Some((IpAddr::from([0, 0, 0, 0]), 10_256).into()),
                metrics: Some((IpAddr::from([127, 0, 0, 1]), 10_249).into()),
                ..proxy
            },
            kubeconfig,
        };
        let proxy_config = paths.etc().join("proxy.yaml");
        if proxy_config.exists() {
            node.configure_proxy(&proxy_config)?;
        }
        Ok(node)
    }

    /// Sets what a KubeProxyConfiguration says of the proxy.
    fn configure_proxy(&mut self, path: &Path) -> Result<()> {
        let own = self.proxy.node_ips.clone();
        let outcome = KubeProxyConfiguration::load(path).and_then(|file| file.apply(&mut self.proxy, &own));
        outcome.map_err(|error| Usage(bootstrap::chain(&error).to_string()).into())
    }

    /// Runs agent and proxy until asked to stop; pods stay.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<()> {
        let proxy = tokio::spawn(run_proxy(self.proxy, self.kubeconfig, stop.clone()));
        let result = isopod_agent::run(self.agent, stop.clone()).await.context("agent");
        stop.cancel();
        let proxy = proxy.await.context("proxy task")?;
        result.and(proxy)
    }
}

/// Where the node's certificates are. A node that belongs to no cluster makes its own, and a kubeconfig for its administrator.
fn certificates(paths: &Paths, settings: &Settings, kubeconfig: &Path) -> Result<PathBuf> {
    let own = paths.kubeconfig("node");
    if paths.pki().join("kubelet.crt").exists() || kubeconfig.exists() {
        // It is a cluster's now, and its own authority is nobody's any more.
        let _ = std::fs::remove_file(own);
        return Ok(paths.pki());
    }
    let dir = paths.etc().join("node-pki");
    let (pki, admin) = pki::alone(&dir, &settings.node_name, &[settings.node_ip, IpAddr::from([127, 0, 0, 1])])?;
    let server = format!("https://127.0.0.1:{}", settings.agent_port);
    let text = kubeconfig::render_named(&server, &settings.node_name, &pki.ca.cert, "node-admin", &admin)?;
    kubeconfig::write(&own, &text)?;
    Ok(dir)
}

/// The proxy needs an identity to watch services with: on a node that has not joined anything yet it waits for one.
async fn run_proxy(config: isopod_netproxy::Config, kubeconfig: PathBuf, stop: CancellationToken) -> Result<()> {
    let wait = isopod_agent::wait_for_file(&kubeconfig);
    // Cancel-safe: nothing has been started yet.
    tokio::select! {
        () = stop.cancelled() => return Ok(()),
        result = wait => result.with_context(|| format!("wait for {}", kubeconfig.display()))?,
    }
    let mut pause = Duration::from_millis(200);
    loop {
        let client = super::client(&kubeconfig).await?;
        // For a while only: without an API server DNS still has something to say.
        let _ = tokio::time::timeout(Duration::from_secs(10), super::answers(&client, &stop)).await;
        match isopod_netproxy::run(client, config.clone(), stop.clone()).await {
            Ok(()) => return Ok(()),
            Err(_) if stop.is_cancelled() => return Ok(()),
            Err(error) => {
                tracing::error!(error = %bootstrap::chain(&error), "service proxy failed; starting it again");
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(30)),
                }
            }
        }
    }
}
