//! Runs the API server alone on loopback, with keys it makes itself: for tests and measurements.
//!
//! `serve DIR PORT TOKEN [ETCD]` keeps everything in DIR, objects in etcd when its URL is given; TOKEN is a member of
//! system:masters.

use std::{error::Error, fs, net::SocketAddr, path::PathBuf};

use isopod_apiserver::{Config, EtcdConfig, Store};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio_util::sync::CancellationToken;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: serve DIR PORT TOKEN")?);
    let port: u16 = args.next().ok_or("usage: serve DIR PORT TOKEN")?.parse()?;
    let token = args.next().ok_or("usage: serve DIR PORT TOKEN")?;
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    fs::create_dir_all(&dir)?;
    if !dir.join("ca.crt").exists() {
        make_keys(&dir)?;
    }
    fs::write(dir.join("tokens.csv"), format!("{token},admin,admin,\"system:masters\"\n"))?;
    let path = |name: &str| dir.join(name);
    let bind: SocketAddr = ([127, 0, 0, 1], port).into();
    let config = Config {
        bind,
        // Endpoints may not be loopback addresses.
        advertise: [192, 0, 2, 1].into(),
        tls_cert: path("apiserver.crt"),
        tls_key: path("apiserver.key"),
        client_ca: path("ca.crt"),
        sa_key: path("sa.key"),
        sa_pub: path("sa.pub"),
        issuer: "https://kubernetes.default.svc.cluster.local".into(),
        service_cidr: "10.96.0.0/16".parse()?,
        node_ports: (30000, 32767),
        store: match args.next() {
            Some(url) => Store::Etcd(EtcdConfig { endpoints: vec![url], ..EtcdConfig::default() }),
            None => Store::Embedded(path("data")),
        },
        kubelet_ca: path("ca.crt"),
        kubelet_client_cert: path("apiserver.crt"),
        kubelet_client_key: path("apiserver.key"),
        requestheader_ca: None,
        proxy_client: None,
        token_file: Some(path("tokens.csv")),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let on_signal = stop.clone();
        tokio::spawn(async move {
            let _ = tokio::signal::ctrl_c().await;
            on_signal.cancel();
        });
        isopod_apiserver::run(config, stop).await
    })?;
    Ok(())
}

fn make_keys(dir: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "test");
    let ca_cert = ca.self_signed(&ca_key)?;
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate()?;
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "kubernetes".to_owned()];
    let cert = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    fs::write(dir.join("ca.crt"), ca_cert.pem())?;
    fs::write(dir.join("apiserver.crt"), cert.pem())?;
    fs::write(dir.join("apiserver.key"), key.serialize_pem())?;
    for (name, arguments) in [
        ("sa.key", vec!["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "sa.key"]),
        ("sa.pub", vec!["pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub"]),
    ] {
        let status = std::process::Command::new("openssl").args(arguments).current_dir(dir).status()?;
        if !status.success() {
            return Err(format!("openssl did not make {name}").into());
        }
    }
    Ok(())
}
