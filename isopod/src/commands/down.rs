//! `isopod down`: stops the agent and every pod of this root; data stays.

use anyhow::{Context, Result};
use isopod_agent::Paths;

use crate::{lock, node::Settings};

pub(crate) fn run(paths: &Paths) -> Result<()> {
    crate::logging::to_stderr();
    stop_everything(paths)?;
    eprintln!("isopod: stopped. Data is in {}; `isopod up` starts again.", paths.state().display());
    Ok(())
}

/// Stops agent and pods and takes the kernel objects of this root away. Goes on after a failure; all are reported.
pub(super) fn stop_everything(paths: &Paths) -> Result<()> {
    if lock::stop_holder(&paths.run())? {
        eprintln!("isopod: agent stopped");
    }
    let _lock = lock::take(&paths.run())?;
    let settings = Settings::resolve(&paths.etc().join("cluster.yaml"), crate::node::Options::default())?;
    super::serve(2, |_| async {
        let network = isopod_agent::network::NetworkConfig {
            cluster_cidrs: vec![settings.pod_cidr],
            service_cidrs: vec![settings.service_cidr],
            ..isopod_agent::network::NetworkConfig::new(paths.clone())
        };
        let pods = isopod_agent::stop_all_pods(paths).await.context("stop pods");
        let network = isopod_agent::network::BridgeNetwork::cleanup_all(&network).await.context("remove pod network");
        let config = isopod_netproxy::Config {
            service_cidrs: vec![settings.service_cidr],
            cluster_cidrs: vec![settings.pod_cidr],
            cluster_dns: settings.dns_ip(),
            ..isopod_netproxy::Config::new(&settings.node_name, &paths.instance(), &paths.bridge())
        };
        let proxy = isopod_netproxy::cleanup(&config).await.context("remove service tables");
        pods.and(network).and(proxy)
    })
}
