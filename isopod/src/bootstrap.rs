//! Everything a control plane on this machine needs on disk before the agent starts: certificates, kubeconfigs, the
//! agent's configuration, static manifests. Idempotent: what fits is kept.

use std::{fs, net::IpAddr};

use anyhow::{Context, Result};
use isopod_agent::Paths;

use crate::{
    kubeconfig, manifests,
    node::Settings,
    pki::{self, Purpose},
};

/// Identities of the components: kubeconfig file, user, groups.
const IDENTITIES: [(&str, &str, &[&str]); 3] = [
    ("admin", "kubernetes-admin", &["system:masters"]),
    ("scheduler", "system:kube-scheduler", &[]),
    ("controller-manager", "system:kube-controller-manager", &[]),
];

/// Certificates and kubeconfigs.
pub(crate) fn identities(paths: &Paths, settings: &Settings) -> Result<()> {
    let mut names: Vec<String> =
        ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"].map(str::to_owned).to_vec();
    names.push("kubernetes.default.svc.cluster.local".to_owned());
    names.push(settings.node_name.clone());
    let mut addresses: Vec<IpAddr> = vec![IpAddr::from([127, 0, 0, 1]), settings.node_ip];
    addresses.extend(settings.kubernetes_ip());
    addresses.dedup();
    let pki = pki::ensure(&paths.pki(), &names, &addresses)?;
    let server = local_server(settings);
    for (file, user, groups) in IDENTITIES {
        let path = paths.kubeconfig(file);
        if !kubeconfig::leads_to(&path, &server) {
            let identity = pki.ca.sign(user, groups, &Purpose::Client)?;
            kubeconfig::write(&path, &kubeconfig::render(&server, &pki.ca.cert, user, &identity)?)?;
        }
    }
    let user = format!("system:node:{}", settings.node_name);
    let agent = paths.kubeconfig("agent");
    let named = fs::read_to_string(&agent).is_ok_and(|text| text.contains(&format!("name: {user}\n")));
    if !named || !kubeconfig::leads_to(&agent, &server) {
        let identity = pki.ca.sign(&user, &["system:nodes"], &Purpose::Client)?;
        kubeconfig::write(&agent, &kubeconfig::render(&server, &pki.ca.cert, &user, &identity)?)?;
    }
    let serving = Purpose::Server {
        names: vec![settings.node_name.clone(), "localhost".to_owned()],
        addresses: vec![settings.node_ip, IpAddr::from([127, 0, 0, 1])],
    };
    pki.leaf("kubelet", &user, &["system:nodes"], serving)
}

/// Where components on this machine find the API server.
pub(crate) fn local_server(settings: &Settings) -> String {
    format!("https://127.0.0.1:{}", settings.api_port)
}

/// The agent's configuration file, unless the administrator has one there.
pub(crate) fn agent_configuration(paths: &Paths, settings: &Settings) -> Result<()> {
    let path = paths.config();
    if path.exists() {
        return Ok(());
    }
    let dns = settings.dns_ip().map_or(String::new(), |address| format!("clusterDNS: [{address}]\n"));
    let text = format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{dns}clusterDomain: cluster.local\n"
    );
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

/// The control plane's static pods.
pub(crate) fn manifests(paths: &Paths, settings: &Settings) -> Result<()> {
    let data = paths.state().join("server");
    let show = |path: std::path::PathBuf| path.display().to_string();
    manifests::write(
        &paths.manifests(),
        &[
            ("image", manifests::IMAGE.to_owned()),
            ("api_port", settings.api_port.to_string()),
            ("node_ip", settings.node_ip.to_string()),
            ("service_cidr", settings.service_cidr.to_string()),
            ("pod_cidr", settings.pod_cidr.to_string()),
            ("pki", show(paths.pki())),
            ("etc", show(paths.etc())),
            ("data", show(data)),
            ("volumes", show(paths.local_volumes())),
        ],
    )
}

/// An error with all its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
