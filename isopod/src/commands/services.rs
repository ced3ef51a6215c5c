//! `isopod services`: what every service address and port leads to, as this node's proxy has it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use isopod_agent::Paths;
use isopod_netproxy::inspect::{Row, Snapshot};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};

use crate::{error::Usage, node::Settings};

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Every endpoint.
    Wide,
    /// For programs.
    Json,
}

/// Options of `services`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only services of this name, or whose name begins so: NAME or NAMESPACE/NAME.
    name: Option<String>,
    /// Only services of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Format; a table by default.
    #[arg(short, long)]
    output: Option<Output>,
}

/// Endpoints shown before the rest is only counted.
const SHOWN: usize = 3;

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let snapshot = snapshot(paths)?;
    let mut rows = snapshot.services();
    let (space, name) = match args.name.as_deref().unwrap_or_default().split_once('/') {
        Some((space, name)) => (Some(space), name),
        None => (args.namespace.as_deref(), args.name.as_deref().unwrap_or_default()),
    };
    rows.retain(|row| space.is_none_or(|s| s == row.namespace) && row.name.starts_with(name));
    if args.output == Some(Output::Json) {
        println!("{}", serde_json::to_string_pretty(&rows).context("write JSON")?);
        return Ok(());
    }
    if rows.is_empty() {
        eprintln!("isopod: no such service has an address");
        return Ok(());
    }
    let shown = if args.output == Some(Output::Wide) { usize::MAX } else { SHOWN };
    let lines: Vec<[String; 5]> = rows.iter().map(|row| line(row, shown)).collect();
    crate::table::print(["NAMESPACE", "NAME", "AT", "VIA", "ENDPOINTS"], &lines);
    Ok(())
}

fn line(row: &Row, shown: usize) -> [String; 5] {
    let mut endpoints = row.endpoints.iter().take(shown).cloned().collect::<Vec<_>>().join(", ");
    if row.endpoints.len() > shown {
        endpoints += &format!(" + {} more", row.endpoints.len() - shown);
    }
    if row.endpoints.is_empty() {
        endpoints = "<none>".to_owned();
    }
    [row.namespace.clone(), row.name.clone(), row.at.clone(), row.via.clone(), endpoints]
}

/// What the API server knows now, seen from this node.
pub(crate) fn snapshot(paths: &Paths) -> Result<Snapshot> {
    let settings = Settings::resolve(&paths.etc().join("cluster.yaml"), crate::node::Options::default())?;
    let config = isopod_netproxy::Config {
        node_ips: vec![settings.node_ip],
        cluster_cidrs: vec![settings.pod_cidr],
        service_cidrs: vec![settings.service_cidr],
        ..isopod_netproxy::Config::new(&settings.node_name, &paths.instance(), &paths.bridge())
    };
    asking(paths, async |client| Snapshot::load(&client, &config).await.context("ask the API server for services"))
}

/// The network namespace of a pod of this node, which is called `node`.
pub(crate) fn pod_netns(paths: &Paths, namespace: &str, name: &str, node: &str) -> Result<PathBuf> {
    let pod = asking(paths, async |client| {
        let pods: Api<Pod> = Api::namespaced(client, namespace);
        pods.get(name).await.with_context(|| format!("ask the API server for pod {namespace}/{name}"))
    })?;
    let path = paths.run().join("netns").join(pod.metadata.uid.unwrap_or_default());
    if !path.is_file() {
        let text =
            format!("--packet: pod {namespace}/{name} is on node {node}, and packets are sent on its own node only");
        return Err(Usage(text).into());
    }
    Ok(path)
}

/// Runs something that asks the API server.
fn asking<T>(paths: &Paths, body: impl AsyncFnOnce(Client) -> Result<T>) -> Result<T> {
    super::local::ask(async { body(super::client(&super::cluster_identity(paths)?).await?).await })
}
