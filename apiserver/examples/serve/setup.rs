//! What an API server on loopback needs: keys it makes itself, one token, a configuration.

use std::{error::Error, fs, net::SocketAddr, path::Path};

use isopod_apiserver::{Config, Store};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// Prepares a directory for a server on `port` that takes `token` from a member of system:masters.
pub(crate) fn config(dir: &Path, port: u16, token: &str) -> Result<Config, Box<dyn Error>> {
    fs::create_dir_all(dir)?;
    if !dir.join("ca.crt").exists() {
        make_keys(dir)?;
    }
    fs::write(dir.join("tokens.csv"), format!("{token},admin,admin,\"system:masters\"\n"))?;
    let path = |name: &str| dir.join(name);
    let bind: SocketAddr = ([127, 0, 0, 1], port).into();
    Ok(Config {
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
        store: Store::Embedded(path("data")),
        kubelet_ca: path("ca.crt"),
        kubelet_client_cert: path("apiserver.crt"),
        kubelet_client_key: path("apiserver.key"),
        requestheader_ca: None,
        proxy_client: None,
        token_file: Some(path("tokens.csv")),
    })
}

fn make_keys(dir: &Path) -> Result<(), Box<dyn Error>> {
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
