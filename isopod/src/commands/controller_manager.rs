//! `isopod controller-manager`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use ipnet::IpNet;

use crate::manifests;

/// Options of the controllers.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// kubeconfig of their identity.
    #[arg(long, value_name = "FILE")]
    kubeconfig: PathBuf,
    /// Addresses of pods, divided among nodes.
    #[arg(long, default_value = "10.244.0.0/16", value_name = "CIDR")]
    cluster_cidr: IpNet,
    /// Addresses of services.
    #[arg(long, default_value = "10.96.0.0/16", value_name = "CIDR")]
    service_cidr: IpNet,
    /// Prefix length of each node's pod addresses.
    #[arg(long, default_value_t = 24)]
    node_cidr_mask_size: u8,
    /// Directory with certificates under kubeadm's names.
    #[arg(long, default_value = "/etc/isopod/pki", value_name = "DIR")]
    pki: PathBuf,
    /// Act only while holding the lease: for several control-plane machines.
    #[arg(long)]
    leader_elect: bool,
    /// Directory, on every node, of the volumes of StorageClass `local`.
    #[arg(long, default_value = "/var/lib/isopod/volumes", value_name = "DIR")]
    local_volumes: String,
    /// How long a silent node counts as healthy, in seconds.
    #[arg(long, default_value_t = 50, value_name = "SECONDS")]
    node_monitor_grace_period: u64,
}

pub(crate) fn run(args: Args) -> Result<()> {
    crate::logging::to_stderr();
    let pki = |name: &str| args.pki.join(name);
    let config = isopod_controllers::Config {
        cluster_cidr: args.cluster_cidr,
        node_mask: args.node_cidr_mask_size,
        service_cidr: args.service_cidr,
        ca_cert: pki("ca.crt"),
        ca_key: pki("ca.key"),
        sa_key: pki("sa.key"),
        root_ca: pki("ca.crt"),
        leader_elect: args.leader_elect,
        node_grace: std::time::Duration::from_secs(args.node_monitor_grace_period),
        local_volumes: args.local_volumes,
        image: manifests::IMAGE.to_owned(),
        type_warnings: isopod_apiserver::type_warnings,
    };
    let kubeconfig = args.kubeconfig;
    super::serve(1, |stop| async move {
        let client = super::client(&kubeconfig).await?;
        if !super::answers(&client, &stop).await {
            return Ok(());
        }
        isopod_controllers::run(client, config, stop).await.context("controllers")
    })
}
