//! `isopod join`: makes this machine a node of an existing cluster.
//!
//! Two certificates are asked for with CertificateSigningRequests, as kubelet's bootstrap does: the node's client identity
//! with the token's account, then the serving certificate with that identity. What is written is what `isopod agent`
//! needs; nothing is started.

use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use isopod_agent::{
    Paths,
    certificates::{self, Purpose},
};
use kube::{Client, Config, config::AuthInfo};

use super::token::Token;
use crate::{
    bootstrap,
    error::Usage,
    kubeconfig,
    node::{Options, Settings},
    pki::{self, Signed},
};

/// How long to wait for a certificate: an administrator may have to approve it.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(300);

/// Options of `join`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What `isopod token` printed.
    token: String,
    #[command(flatten)]
    node: Options,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    let token = Token::decode(&args.token)
        .ok_or_else(|| Usage("the token is damaged: copy the whole line that `isopod token` printed".to_owned()))?;
    let cluster = paths.etc().join("cluster.yaml");
    if paths.pki().join("ca.key").exists() {
        bail!("this root has a control plane of its own: `isopod reset --yes` first, or use another --root-dir");
    }
    let mut settings = Settings::resolve(&cluster, args.node)?;
    (settings.pod_cidr, settings.service_cidr) = (token.pod_cidr, token.service_cidr);
    settings.pod_encryption = token.pod_encryption;
    super::serve(1, |_| async {
        tokio::time::timeout(PATIENCE, join(paths, &settings, &token)).await.unwrap_or_else(|_| {
            bail!("no certificate after {} s: is the controller manager running?", PATIENCE.as_secs())
        })
    })?;
    settings.remember(&cluster)?;
    bootstrap::agent_configuration(paths, &settings)?;
    eprintln!("isopod: joined {} as node {}; start it with `isopod agent`", token.server, settings.node_name);
    Ok(())
}

async fn join(paths: &Paths, settings: &Settings, token: &Token) -> Result<()> {
    std::fs::create_dir_all(paths.pki()).with_context(|| format!("create {}", paths.pki().display()))?;
    pki::write_private(&paths.pki().join("ca.crt"), token.ca.as_bytes())?;
    let node = format!("system:node:{}", settings.node_name);
    let auth = AuthInfo { token: Some(token.bearer.clone().into()), ..AuthInfo::default() };
    let bootstrap = client(token, auth).await?;
    let identity = certificates::request(bootstrap, &settings.node_name, &Purpose::Client).await?;
    let identity = Signed { cert: identity.cert, key: identity.key };
    let path = paths.kubeconfig("agent");
    kubeconfig::write(&path, &kubeconfig::render(&token.server, &token.ca, &node, &identity)?)?;
    let own = super::client(&path).await?;
    let addresses = vec![settings.node_ip, IpAddr::from([127, 0, 0, 1])];
    let serving = Purpose::Serving(settings.node_name.clone(), addresses);
    let serving = certificates::request(own, &settings.node_name, &serving).await?;
    pki::write_private(&paths.pki().join("kubelet.key"), serving.key.as_bytes())?;
    pki::write_private(&paths.pki().join("kubelet.crt"), serving.cert.as_bytes())
}

async fn client(token: &Token, auth: AuthInfo) -> Result<Client> {
    let mut config = Config::new(token.server.parse().context("server URL in the token")?);
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(token.ca.as_bytes()).map_err(|e| anyhow!("CA in the token: {e}"))?;
    config.root_cert = Some(vec![pem.contents]);
    config.auth_info = auth;
    isopod_client::connect(config).context("client for the API server")
}
