//! `isopod apiserver`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use isopod_apiserver::Store;

use crate::error::Usage;

/// Options of the API server.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Address to listen on.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    bind_address: IpAddr,
    /// Port to listen on.
    #[arg(long, default_value_t = 6443)]
    port: u16,
    /// Address that other machines and pods reach this server by.
    #[arg(long)]
    advertise_address: IpAddr,
    /// Addresses of services.
    #[arg(long, default_value = "10.96.0.0/16", value_name = "CIDR")]
    service_cidr: IpNet,
    /// Node ports, FIRST-LAST.
    #[arg(long, default_value = "30000-32767")]
    service_node_port_range: String,
    /// Directory with certificates under kubeadm's names.
    #[arg(long, default_value = "/etc/isopod/pki", value_name = "DIR")]
    pki: PathBuf,
    /// Directory of the database.
    #[arg(long, default_value = "/var/lib/isopod/server", value_name = "DIR")]
    data_dir: PathBuf,
    /// Where objects are kept: embedded (in --data-dir) or etcd=URL[,URL...], with TLS by etcd/ca.crt and
    /// apiserver-etcd-client.{crt,key} of --pki.
    #[arg(long, default_value = "embedded", value_name = "STORE")]
    store: String,
    /// File with static tokens: token,user,uid,"group1,group2".
    #[arg(long, value_name = "FILE")]
    token_auth_file: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<()> {
    crate::logging::to_stderr();
    let range = || -> Option<(u16, u16)> {
        let (first, last) = args.service_node_port_range.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    let node_ports = range().filter(|(first, last)| first <= last).ok_or_else(|| {
        Usage(format!("--service-node-port-range: \"{}\" is not FIRST-LAST", args.service_node_port_range))
    })?;
    let pki = |name: &str| args.pki.join(name);
    let config = isopod_apiserver::Config {
        bind: SocketAddr::from((args.bind_address, args.port)),
        advertise: args.advertise_address,
        tls_cert: pki("apiserver.crt"),
        tls_key: pki("apiserver.key"),
        client_ca: pki("ca.crt"),
        sa_key: pki("sa.key"),
        sa_pub: pki("sa.pub"),
        issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
        service_cidr: args.service_cidr,
        node_ports,
        store: store(&args.store, &args.data_dir, &args.pki)?,
        kubelet_ca: pki("ca.crt"),
        kubelet_client_cert: pki("apiserver-kubelet-client.crt"),
        kubelet_client_key: pki("apiserver-kubelet-client.key"),
        requestheader_ca: Some(pki("front-proxy-ca.crt")),
        proxy_client: Some((pki("front-proxy-client.crt"), pki("front-proxy-client.key"))),
        token_file: args.token_auth_file,
    };
    super::serve(2, |stop| async { isopod_apiserver::run(config, stop).await.context("API server") })
}

/// `embedded`, or `etcd=` and the addresses of one etcd's members.
fn store(text: &str, dir: &Path, pki: &Path) -> Result<Store> {
    if text == "embedded" {
        return Ok(Store::Embedded(dir.to_owned()));
    }
    Ok(Store::Etcd(super::store::etcd(text, pki).map_err(|reason| Usage(format!("--store: {reason}")))?))
}
