//! What the API server is started with, and why it could not start.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;
use isopod_store::EtcdConfig;

/// Everything [`crate::run`] needs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// Address under which the `kubernetes` service is published.
    pub advertise: IpAddr,
    /// Serving certificate chain (PEM).
    pub tls_cert: PathBuf,
    /// Serving key (PEM).
    pub tls_key: PathBuf,
    /// CA bundle client certificates are verified with.
    pub client_ca: PathBuf,
    /// Key service account tokens are signed with (PEM).
    pub sa_key: PathBuf,
    /// Public key service account tokens are verified with (PEM).
    pub sa_pub: PathBuf,
    /// Issuer of service account tokens.
    pub issuer: String,
    /// Range of cluster IPs.
    pub service_cidr: IpNet,
    /// Range of node ports, both ends included.
    pub node_ports: (u16, u16),
    /// Where objects are kept.
    pub store: Store,
    /// CA the agents' serving certificates are verified with.
    pub kubelet_ca: PathBuf,
    /// Client certificate towards the agents.
    pub kubelet_client_cert: PathBuf,
    /// Its key.
    pub kubelet_client_key: PathBuf,
    /// CA of front proxies, published in kube-system/extension-apiserver-authentication.
    pub requestheader_ca: Option<PathBuf>,
    /// Client certificate and key towards extension servers (PEM).
    pub proxy_client: Option<(PathBuf, PathBuf)>,
    /// Static bearer tokens: CSV `token,user,uid,"group1,group2"`.
    pub token_file: Option<PathBuf>,
}

/// Where objects are kept.
#[derive(Debug, Clone)]
pub enum Store {
    /// In one SQLite file in this directory, for one server alone.
    Embedded(PathBuf),
    /// In etcd, for one server or several.
    Etcd(EtcdConfig),
}

/// Why the API server could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file has bad content.
    #[error("{path}: {reason}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The address is taken or not ours.
    #[error("cannot listen on {address}")]
    Bind {
        /// Address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// TLS set-up failed.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The store could not be opened.
    #[error("cannot open the store")]
    Store(#[from] isopod_store::Error),
    /// The initial objects could not be written.
    #[error("cannot write the initial objects: {0}")]
    Bootstrap(String),
    /// Anything else that stops the server.
    #[error("{0}")]
    Other(String),
}
