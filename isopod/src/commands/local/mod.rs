//! Commands that ask the agent of this machine: they work without an API server.

pub(crate) mod exec;
pub(crate) mod images;
pub(crate) mod inspect;
pub(crate) mod logs;
pub(crate) mod ps;
pub(crate) mod top;
pub(crate) mod why;

use std::{
    future::Future,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use isopod_agent::Paths;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use serde_json::Value;

use crate::{error::Usage, node::Settings};

/// The agent of this machine, as a client.
pub(crate) struct Node {
    pub(crate) client: Client,
    pub(crate) name: String,
}

/// A pod as a person names it.
#[derive(clap::Args)]
pub(crate) struct PodName {
    /// NAME or NAMESPACE/NAME; the beginning of a name is enough when no other pod of this node begins so.
    pub(crate) pod: String,
    /// Namespace, when it is not said with the name.
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

/// Runs a question to its end.
pub(crate) fn ask<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start runtime")?;
    let result = runtime.block_on(work);
    // A read of the terminal that nobody waits for must not hold the process.
    runtime.shutdown_background();
    result
}

impl Node {
    /// With the identity this machine has: the cluster's administrator, the node itself, or that of a node alone.
    pub(crate) async fn connect(paths: &Paths) -> Result<Self> {
        let settings = Settings::resolve(&paths.etc().join("cluster.yaml"), crate::node::Options::default())?;
        let path = super::first_kubeconfig(paths, &["node", "admin", "agent"])?;
        let mut config = super::config(&path).await?;
        if config.tls_server_name.is_none() {
            config.cluster_url = format!("https://127.0.0.1:{}", settings.agent_port).parse().context("agent's URL")?;
            config.tls_server_name = Some(settings.node_name.clone());
        }
        let name = config.tls_server_name.clone().unwrap_or(settings.node_name);
        config.connect_timeout = Some(std::time::Duration::from_secs(5));
        Ok(Self { client: Client::try_from(config).with_context(|| path.display().to_string())?, name })
    }

    /// What the agent answers to a path.
    pub(crate) async fn get(&self, path: &str) -> Result<Value> {
        let request = http::Request::get(path).body(Vec::new()).context("request")?;
        let text = self.client.request_text(request).await;
        let text = text.with_context(|| format!("ask the agent of this machine for {path}: does it run?"))?;
        serde_json::from_str(&text).with_context(|| format!("the agent's answer to {path}"))
    }

    /// Every pod of this node.
    pub(crate) async fn pods(&self) -> Result<Vec<Value>> {
        Ok(self.get("/api/v1/pods").await?["items"].as_array().cloned().unwrap_or_default())
    }

    /// The pod that is meant; `None` when there is none on this node.
    pub(crate) async fn find(&self, wanted: &PodName) -> Result<Option<Value>> {
        choose(self.pods().await?, wanted)
    }

    /// The pod that is meant, or an error that says what there is.
    pub(crate) async fn pod(&self, wanted: &PodName) -> Result<Value> {
        let found = self.find(wanted).await?;
        found.ok_or_else(|| Usage(format!("no pod {:?} on node {} (see `isopod ps`)", wanted.pod, self.name)).into())
    }

    /// The pods of a pod's namespace, for logs and exec.
    pub(crate) fn api(&self, pod: &Value) -> Api<Pod> {
        Api::namespaced(self.client.clone(), text(&pod["metadata"]["namespace"]))
    }
}

/// Where a pod's files on this machine are.
pub(crate) struct Files {
    /// The UID it has here: that of a static pod is not its mirror's.
    pub(crate) uid: String,
    /// The flight record of its start.
    pub(crate) record: PathBuf,
    pub(crate) logs: PathBuf,
}

impl Files {
    pub(crate) fn of(paths: &Paths, pod: &Value) -> Self {
        let metadata = &pod["metadata"];
        let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
        let hash = text(&metadata["annotations"]["kubernetes.io/config.hash"]);
        let uid = if hash.is_empty() { text(&metadata["uid"]) } else { hash }.to_owned();
        let record = paths.starts().join(format!("{namespace}_{name}_{uid}.json"));
        Self { record, logs: paths.pod_logs(namespace, name, &uid), uid }
    }
}

/// A JSON file's content; null when it is not there or not whole.
pub(crate) fn read_json(path: &Path) -> Value {
    std::fs::read(path).ok().and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or(Value::Null)
}

/// A text that may not be there.
pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn choose(pods: Vec<Value>, wanted: &PodName) -> Result<Option<Value>> {
    let (namespace, name) = match wanted.pod.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (wanted.namespace.as_deref(), wanted.pod.as_str()),
    };
    let of = |p: &Value| (text(&p["metadata"]["namespace"]).to_owned(), text(&p["metadata"]["name"]).to_owned());
    let mut found: Vec<Value> =
        pods.into_iter().filter(|p| namespace.is_none_or(|n| of(p).0 == n) && of(p).1.starts_with(name)).collect();
    if let Some(at) = found.iter().position(|p| of(p).1 == name && (namespace.is_some() || of(p).0 == "default")) {
        return Ok(Some(found.swap_remove(at)));
    }
    let exact: Vec<usize> = (0..found.len()).filter(|i| of(&found[*i]).1 == name).collect();
    match (exact.as_slice(), found.len()) {
        ([one], _) => Ok(Some(found.swap_remove(*one))),
        (_, 0) => Ok(None),
        (_, 1) => Ok(found.pop()),
        _ => {
            let names: Vec<String> = found.iter().map(|p| format!("{}/{}", of(p).0, of(p).1)).collect();
            Err(Usage(format!("{:?} can be any of {}", wanted.pod, names.join(", "))).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_is_found_by_the_beginning_of_its_name() {
        let pods = || {
            [("default", "web-1"), ("default", "web-2"), ("kube-system", "dns"), ("a", "dup"), ("b", "dup")]
                .map(|(ns, n)| json!({"metadata": {"namespace": ns, "name": n}}))
                .to_vec()
        };
        let find = |pod: &str, namespace: Option<&str>| {
            let wanted = PodName { pod: pod.into(), namespace: namespace.map(Into::into) };
            choose(pods(), &wanted)
                .map(|p| p.map(|p| text(&p["metadata"]["name"]).to_owned()))
                .map_err(|e| e.to_string())
        };
        assert_eq!(find("web-1", None), Ok(Some("web-1".into())));
        assert_eq!(find("d", Some("kube-system")), Ok(Some("dns".into())));
        assert_eq!(find("kube-system/dns", None), Ok(Some("dns".into())));
        assert_eq!(find("none", None), Ok(None));
        assert_eq!(find("web", None), Err("\"web\" can be any of default/web-1, default/web-2".into()));
        assert_eq!(find("dup", None), Err("\"dup\" can be any of a/dup, b/dup".into()));
        assert_eq!(find("a/dup", None), Ok(Some("dup".into())));
    }
}
