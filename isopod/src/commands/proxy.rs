//! `isopod proxy`: the service proxy alone, in kube-proxy's place beside any kubelet.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use isopod_agent::Paths;
use isopod_netproxy::{Config, configuration::KubeProxyConfiguration};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};

use crate::error::Usage;

/// Options of the proxy.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// KubeProxyConfiguration.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// kubeconfig of the proxy's identity [default: clientConnection.kubeconfig of the configuration]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The node's name [default: hostnameOverride of the configuration, else the host name]
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,
    /// Answer cluster DNS at this address [default: somebody else does]
    #[arg(long, value_name = "ADDRESS")]
    cluster_dns: Option<IpAddr>,
    /// The cluster's DNS domain.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Addresses of all services, whose reverse names are answered.
    #[arg(long, value_name = "CIDR", default_value = "10.96.0.0/16")]
    service_cidr: IpNet,
    /// The servers to ask for all other names.
    #[arg(long, value_name = "FILE", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// Remove what a proxy left in the kernel, and do no more.
    #[arg(long)]
    cleanup: bool,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    crate::logging::to_stderr();
    let file = args.config.as_deref().map(load).transpose()?;
    let named = args.hostname_override.clone().or_else(|| file.as_ref().and_then(KubeProxyConfiguration::node_name));
    let name = match named {
        Some(name) => name,
        None => nix::unistd::gethostname().context("host name")?.to_string_lossy().to_lowercase(),
    };
    let mut config = Config {
        cluster_dns: args.cluster_dns,
        cluster_domain: args.cluster_domain,
        service_cidrs: vec![args.service_cidr],
        upstream_resolv_conf: args.resolv_conf,
        node_routes: false,
        // Where kube-proxy has them.
        healthz: Some((IpAddr::from([0, 0, 0, 0]), 10_256).into()),
        metrics: Some((IpAddr::from([127, 0, 0, 1]), 10_249).into()),
        ..Config::new(&name, &format!("{}-proxy", paths.instance()), &paths.bridge())
    };
    if args.cleanup {
        return super::serve(1, |_| async { isopod_netproxy::cleanup(&config).await.context("remove service tables") });
    }
    let kubeconfig = args.kubeconfig.or_else(|| file.as_ref().and_then(KubeProxyConfiguration::kubeconfig));
    let kubeconfig =
        kubeconfig.ok_or_else(|| Usage("--kubeconfig or clientConnection.kubeconfig is needed".to_owned()))?;
    if let Some(score) = file.as_ref().map(KubeProxyConfiguration::oom_score_adj)
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        tracing::warn!(score, %error, "oomScoreAdj not set");
    }
    super::serve(2, |stop| async move {
        let client = super::client(&kubeconfig).await?;
        if !super::answers(&client, &stop).await {
            return Ok(());
        }
        let own = addresses(&client, &name).await;
        config.node_ips = own.clone();
        if let Some(file) = &file {
            file.apply(&mut config, &own)?;
        }
        isopod_netproxy::run(client, config, stop).await.context("service proxy")
    })
}

fn load(path: &Path) -> Result<KubeProxyConfiguration> {
    KubeProxyConfiguration::load(path).map_err(|error| Usage(crate::bootstrap::chain(&error).to_string()).into())
}

/// The node's addresses as its object has them; none while there is no such object.
async fn addresses(client: &Client, name: &str) -> Vec<IpAddr> {
    let node = match Api::<Node>::all(client.clone()).get(name).await {
        Ok(node) => node,
        Err(error) => {
            tracing::warn!(node = name, %error, "the node's addresses are not known");
            return Vec::new();
        }
    };
    let all = node.status.and_then(|s| s.addresses).unwrap_or_default();
    all.iter().filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect()
}
