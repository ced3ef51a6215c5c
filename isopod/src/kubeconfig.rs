//! kubeconfig files with embedded certificates.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;

use crate::pki::{self, Signed};

/// The text of a kubeconfig for one user of one cluster.
pub(crate) fn render(server: &str, ca_pem: &str, user: &str, identity: &Signed) -> Result<String> {
    let encode = |text: &str| STANDARD.encode(text);
    let value = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "isopod", "cluster": {"server": server, "certificate-authority-data": encode(ca_pem)}}],
        "users": [{"name": user, "user": {
            "client-certificate-data": encode(&identity.cert), "client-key-data": encode(&identity.key)}}],
        "contexts": [{"name": format!("{user}@isopod"), "context": {"cluster": "isopod", "user": user}}],
        "current-context": format!("{user}@isopod"),
    });
    serde_yaml_ng::to_string(&value).context("render kubeconfig")
}

/// The same for a server that is known by another name than its address.
pub(crate) fn render_named(server: &str, name: &str, ca_pem: &str, user: &str, identity: &Signed) -> Result<String> {
    let text = render(server, ca_pem, user, identity)?;
    let mut value: serde_json::Value = serde_yaml_ng::from_str(&text).context("render kubeconfig")?;
    value["clusters"][0]["cluster"]["tls-server-name"] = json!(name);
    serde_yaml_ng::to_string(&value).context("render kubeconfig")
}

/// Writes a kubeconfig readable by root only.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    pki::write_private(path, text.as_bytes())
}

/// Whether the file exists, parses and leads to `server`; a damaged one is replaced by its maker.
pub(crate) fn leads_to(path: &Path, server: &str) -> bool {
    let Ok(text) = fs::read_to_string(path) else { return false };
    serde_yaml_ng::from_str::<serde_json::Value>(&text)
        .is_ok_and(|value| value.pointer("/clusters/0/cluster/server").and_then(|s| s.as_str()) == Some(server))
}
