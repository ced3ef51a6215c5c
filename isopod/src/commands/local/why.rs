//! `isopod why POD`: what keeps a pod from running, in words, with what to do; and how long each phase of its start took.

use std::fs;

use anyhow::{Context, Result, bail};
use isopod_agent::Paths;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams};
use serde_json::Value;

use super::{Files, Node, PodName, ask, ps::since, read_json, text};
use cause::{Cause, Facts};

#[path = "cause.rs"]
pub(super) mod cause;

/// Options of `why`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pod: PodName,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let text = ask(async {
        let node = Node::connect(paths).await?;
        match node.find(&args.pod).await? {
            Some(pod) => here(paths, &node, &pod).await,
            None => elsewhere(paths, &args.pod).await,
        }
    })?;
    print!("{text}");
    Ok(())
}

/// A pod of this node.
async fn here(paths: &Paths, node: &Node, pod: &Value) -> Result<String> {
    let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
    let files = Files::of(paths, pod);
    let record = read_json(&files.record);
    let selector = format!("involvedObject.name={name}");
    let events = node.get(&format!("/api/v1/namespaces/{namespace}/events?fieldSelector={selector}")).await?;
    let events = events["items"].as_array().cloned().unwrap_or_default();
    let last_words = |container: &str| last_lines(&files.logs.join(container));
    let cause = cause::of(&Facts { pod, record: &record, events: &events, last_words: &last_words });
    Ok(render(namespace, name, pod, &cause, &record))
}

/// The newest log file's last lines, without the CRI prefix.
fn last_lines(dir: &std::path::Path) -> Vec<String> {
    let number = |p: &std::path::Path| p.file_stem()?.to_str()?.parse::<u32>().ok();
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let Some(newest) = files.filter(|p| number(p).is_some()).max_by_key(|p| number(p)) else { return Vec::new() };
    let content = fs::read(newest).unwrap_or_default();
    let tail = String::from_utf8_lossy(&content[content.len().saturating_sub(4096)..]).into_owned();
    let lines: Vec<&str> = tail.lines().collect();
    let start = lines.len().saturating_sub(3);
    lines[start..].iter().map(|l| l.splitn(4, ' ').nth(3).unwrap_or(l).to_owned()).collect()
}

/// The cause and what to do, a line each.
fn explain(cause: &Cause) -> String {
    let mut out = format!("why   {}\n", cause.why);
    out.extend(cause.more.iter().map(|line| format!("      {line}\n")));
    out.extend(cause.todo.iter().map(|line| format!("do    {line}\n")));
    out
}

fn render(namespace: &str, name: &str, pod: &Value, cause: &Cause, record: &Value) -> String {
    let (ready, status, restarts) = isopod_agent::server::pod_summary(pod);
    let seen = since(&pod["status"]["startTime"]);
    let mut out = format!("pod {namespace}/{name}: {status}, {ready} ready, {restarts} restarts, seen {seen} ago\n\n");
    out += &explain(cause);
    let phases = record["phases"].as_array().cloned().unwrap_or_default();
    if !phases.is_empty() {
        out += "\nstart";
        for p in &phases {
            let took = p["tookMs"].as_f64().map(|t| format!(", took {t:.1} ms")).unwrap_or_default();
            out +=
                &format!("\n      {:<24} after {:>9.1} ms{took}", text(&p["phase"]), p["atMs"].as_f64().unwrap_or(0.0));
        }
        out.push('\n');
    }
    out
}

/// A pod that this node does not have: what the API server says of it, or of who should have made it.
async fn elsewhere(paths: &Paths, wanted: &PodName) -> Result<String> {
    let Ok(kubeconfig) = crate::commands::cluster_identity(paths) else {
        bail!(crate::error::Usage(format!("no pod {:?} on this node (see `isopod ps`)", wanted.pod)));
    };
    let (namespace, name) = match wanted.pod.split_once('/') {
        Some((namespace, name)) => (namespace.to_owned(), name),
        None => (wanted.namespace.clone().unwrap_or_else(|| "default".into()), wanted.pod.as_str()),
    };
    let client = crate::commands::client(&kubeconfig).await?;
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(client.clone(), &namespace);
    let limit = std::time::Duration::from_secs(5);
    let list = tokio::time::timeout(limit, pods.list(&ListParams::default())).await;
    let list = list.context("the pod is not on this node, and the API server does not answer")?.context("list pods")?;
    let all: Vec<Value> = list.items.iter().filter_map(|p| serde_json::to_value(p).ok()).collect();
    let found = all
        .iter()
        .find(|p| p["metadata"]["name"] == name)
        .or_else(|| all.iter().find(|p| text(&p["metadata"]["name"]).starts_with(name)));
    let events: Api<Event> = Api::namespaced(client, &namespace);
    let told = events.list(&ListParams::default()).await.map(|l| l.items).unwrap_or_default();
    let told: Vec<Value> = told.iter().filter_map(|e| serde_json::to_value(e).ok()).collect();
    if let Some(pod) = found {
        if text(&pod["spec"]["nodeName"]).is_empty() {
            let cause = cause::unscheduled(pod);
            return Ok(render(&namespace, text(&pod["metadata"]["name"]), pod, &cause, &Value::Null));
        }
        let (node, name) = (text(&pod["spec"]["nodeName"]), text(&pod["metadata"]["name"]));
        return Ok(format!(
            "pod {namespace}/{name} is on node {node}: ask there with `isopod why {namespace}/{name}`\n"
        ));
    }
    match cause::never_made(name, &told) {
        Some(cause) => Ok(format!("pod {namespace}/{name}: does not exist\n\n{}", explain(&cause))),
        None => {
            bail!(crate::error::Usage(format!("no pod {name:?} in namespace {namespace}, and no event tells of one")))
        }
    }
}
