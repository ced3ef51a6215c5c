//! `isopod token`: prints the command that joins another machine.
//!
//! The token is self-contained: where the API server is, the CA to trust, and a bearer token of the service account
//! `kube-system/isopod-join`, which may do one thing: ask for a node's certificate.

use anyhow::{Context, Result, anyhow};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use isopod_agent::Paths;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
    rbac::v1::{ClusterRoleBinding, RoleRef, Subject},
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use serde::{Deserialize, Serialize};

use crate::node::{PodEncryption, Settings};

const ACCOUNT: &str = "isopod-join";

/// Options of `token`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long the token can be used, in hours.
    #[arg(long, default_value_t = 24)]
    hours: u32,
}

/// What a token carries.
#[derive(Serialize, Deserialize)]
pub(crate) struct Token {
    /// URL of the API server.
    pub(crate) server: String,
    /// The cluster's CA, PEM.
    pub(crate) ca: String,
    /// Bearer token.
    pub(crate) bearer: String,
    /// The cluster's network, for the node's settings.
    pub(crate) pod_cidr: ipnet::IpNet,
    /// The cluster's service addresses.
    pub(crate) service_cidr: ipnet::IpNet,
    /// What the cluster does to packets between nodes.
    #[serde(default)]
    pub(crate) pod_encryption: PodEncryption,
}

impl Token {
    pub(crate) fn encode(&self) -> Result<String> {
        Ok(URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).context("encode token")?))
    }

    pub(crate) fn decode(text: &str) -> Option<Self> {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text.trim()).ok()?).ok()
    }
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let settings = Settings::resolve(&paths.etc().join("cluster.yaml"), crate::node::Options::default())?;
    let ca_path = paths.pki().join("ca.crt");
    let ca = std::fs::read_to_string(&ca_path).with_context(|| {
        format!("no control plane here ({} is missing): run this where `isopod up` runs", ca_path.display())
    })?;
    super::serve(1, |_| async {
        let client = super::client(&paths.kubeconfig("admin")).await?;
        let bearer = bearer(client, args.hours).await?;
        let token = Token {
            server: format!("https://{}", std::net::SocketAddr::from((settings.node_ip, settings.api_port))),
            ca,
            bearer,
            pod_cidr: settings.pod_cidr,
            service_cidr: settings.service_cidr,
            pod_encryption: settings.pod_encryption,
        };
        println!("isopod join {}", token.encode()?);
        Ok(())
    })
}

/// Makes sure of the account and its rights, and asks for a token.
async fn bearer(client: kube::Client, hours: u32) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "kube-system");
    let metadata = || ObjectMeta { name: Some(ACCOUNT.to_owned()), ..ObjectMeta::default() };
    let account = ServiceAccount { metadata: metadata(), ..ServiceAccount::default() };
    exists(accounts.create(&PostParams::default(), &account).await).context("create service account")?;
    let roles = ["system:node-bootstrapper", "system:certificates.k8s.io:certificatesigningrequests:nodeclient"];
    for (suffix, role) in ["", "-approve"].into_iter().zip(roles) {
        let account = Subject {
            kind: "ServiceAccount".to_owned(),
            name: ACCOUNT.to_owned(),
            namespace: Some("kube-system".to_owned()),
            ..Subject::default()
        };
        bind(client.clone(), format!("{ACCOUNT}{suffix}"), role, account).await?;
    }
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            expiration_seconds: Some(i64::from(hours) * 3600),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let answer =
        accounts.create_token_request(ACCOUNT, &PostParams::default(), &request).await.context("request token")?;
    answer.status.and_then(|status| status.token).ok_or_else(|| anyhow!("the API server answered without a token"))
}

/// Nodes may have their own client certificates renewed.
pub(crate) async fn let_nodes_renew(client: kube::Client) -> Result<()> {
    let nodes = Subject {
        kind: "Group".to_owned(),
        name: "system:nodes".to_owned(),
        api_group: Some("rbac.authorization.k8s.io".to_owned()),
        ..Subject::default()
    };
    let role = "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient";
    bind(client, "isopod:node-autoapprove-certificate-rotation".to_owned(), role, nodes).await
}

async fn bind(client: kube::Client, name: String, role: &str, subject: Subject) -> Result<()> {
    let bindings: Api<ClusterRoleBinding> = Api::all(client);
    let binding = ClusterRoleBinding {
        metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
        role_ref: RoleRef {
            api_group: Some("rbac.authorization.k8s.io".to_owned()),
            kind: "ClusterRole".to_owned(),
            name: role.to_owned(),
        },
        subjects: Some(vec![subject]),
    };
    exists(bindings.create(&PostParams::default(), &binding).await).with_context(|| format!("bind role {role}"))
}

/// Creating what is already there is fine.
fn exists<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_being_typed() {
        let token = Token {
            server: "https://10.0.0.1:6443".to_owned(),
            ca: "PEM".to_owned(),
            bearer: "secret".to_owned(),
            pod_cidr: "10.244.0.0/16".parse().unwrap(),
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            pod_encryption: PodEncryption::default(),
        };
        let text = token.encode().unwrap();
        assert_eq!(Token::decode(&format!(" {text}\n")).unwrap().server, token.server);
        assert!(Token::decode(&text[1..]).is_none());
    }
}
