//! `isopod ps`: the pods of this machine.

use anyhow::{Context, Result};
use isopod_agent::{Paths, server::pod_summary};
use serde_json::Value;

use super::{Node, ask, text};

/// Options of `ps`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only pods of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Every container with its image, state and last exit.
    #[arg(short, long)]
    containers: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let mut pods = ask(async { Node::connect(paths).await?.pods().await })?;
    pods.retain(|p| args.namespace.as_ref().is_none_or(|n| p["metadata"]["namespace"] == n.as_str()));
    if args.json {
        println!("{}", serde_json::to_string_pretty(&pods).context("write JSON")?);
    } else if args.containers {
        let rows: Vec<[String; 6]> = pods.iter().flat_map(containers).collect();
        crate::table::print(["NAMESPACE", "POD", "CONTAINER", "STATE", "RESTARTS", "IMAGE"], &rows);
    } else {
        let rows: Vec<[String; 7]> = pods.iter().map(row).collect();
        crate::table::print(["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"], &rows);
    }
    Ok(())
}

fn row(p: &Value) -> [String; 7] {
    let (ready, status, restarts) = pod_summary(p);
    let ip = text(&p["status"]["podIP"]);
    [
        text(&p["metadata"]["namespace"]).into(),
        text(&p["metadata"]["name"]).into(),
        ready,
        status,
        restarts.to_string(),
        since(&p["status"]["startTime"]),
        if ip.is_empty() { "<none>".into() } else { ip.into() },
    ]
}

/// How long ago, in words as short as kubectl's.
pub(super) fn since(at: &Value) -> String {
    let Ok(at) = text(at).parse::<jiff::Timestamp>() else { return "<unknown>".into() };
    seconds((jiff::Timestamp::now().as_second() - at.as_second()).max(0))
}

/// A number of seconds.
pub(super) fn seconds(s: i64) -> String {
    match s {
        0..120 => format!("{s}s"),
        120..7200 => format!("{}m", s / 60),
        7200..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

fn containers(p: &Value) -> Vec<[String; 6]> {
    let lists = ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"];
    let all = lists.iter().flat_map(|l| p["status"][l].as_array().into_iter().flatten());
    all.map(|c| {
        [
            text(&p["metadata"]["namespace"]).into(),
            text(&p["metadata"]["name"]).into(),
            text(&c["name"]).into(),
            state(c),
            c["restartCount"].to_string(),
            text(&c["image"]).into(),
        ]
    })
    .collect()
}

/// A container's state in a few words.
pub(super) fn state(c: &Value) -> String {
    let s = &c["state"];
    if s["running"].is_object() {
        let ready = if c["ready"] == true { "" } else { ", not ready" };
        return format!("running {}{ready}", since(&s["running"]["startedAt"]));
    }
    if s["terminated"].is_object() {
        let t = &s["terminated"];
        return format!("ended {} ago: {} ({})", since(&t["finishedAt"]), text(&t["reason"]), t["exitCode"]);
    }
    format!("waiting: {}", text(&s["waiting"]["reason"]))
}
