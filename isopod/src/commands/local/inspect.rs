//! `isopod inspect`: everything this machine has of a pod: spec and status, supervisor, processes, cgroup with its numbers,
//! mounts, network namespace, elements of the nftables.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};
use isopod_agent::Paths;
use serde_json::{Map, Value, json};

use super::{Files, Node, PodName, ask, read_json, text};

/// Options of `inspect`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pod: PodName,
    /// Print JSON instead of YAML.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let pod = ask(async { Node::connect(paths).await?.pod(&args.pod).await })?;
    let told = report(paths, pod);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&told).context("write JSON")?);
    } else {
        print!("{}", serde_yaml_ng::to_string(&told).context("write YAML")?);
    }
    Ok(())
}

fn report(paths: &Paths, pod: Value) -> Value {
    let files = Files::of(paths, &pod);
    let run = paths.run_pod(&files.uid);
    let config = read_json(&run.join("pod.json"));
    let supervisor = fs::read_to_string(run.join("supervisor.pid")).unwrap_or_default().trim().to_owned();
    let group = text(&config["cgroup"]).to_owned();
    let ips: Vec<String> =
        pod["status"]["podIPs"].as_array().into_iter().flatten().map(|ip| text(&ip["ip"]).to_owned()).collect();
    json!({
        "name": pod["metadata"]["name"],
        "directories": {"state": paths.pod(&files.uid), "run": run, "logs": files.logs},
        "supervisor": {"pid": supervisor, "config": config.clone()},
        "containers": containers(&run),
        "cgroup": {"path": group, "numbers": cgroup(&group)},
        "network": {"namespace": config["netns"], "addresses": ips, "nftables": nftables(&ips)},
        "start": read_json(&files.record),
        "spec": pod["spec"],
        "status": pod["status"],
    })
}

fn containers(run: &Path) -> Value {
    let mut all = Map::new();
    for entry in fs::read_dir(run.join("containers")).into_iter().flatten().flatten() {
        let mut status = read_json(&entry.path().join("status.json"));
        if let Some(pid) = status["pid"].as_i64() {
            let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            status["mounts"] = table.lines().filter_map(mount).collect();
        }
        all.insert(entry.file_name().to_string_lossy().into_owned(), status);
    }
    Value::Object(all)
}

/// A line of mountinfo: place, type, source, options.
fn mount(line: &str) -> Option<Value> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<&str> = left.split(' ').collect();
    let right: Vec<&str> = right.split(' ').collect();
    Some(json!(format!(
        "{} {} from {}{} ({})",
        left.get(4)?,
        right.first()?,
        right.get(1)?,
        left.get(3)?,
        left.get(5)?
    )))
}

/// Numbers people look for, from whichever hierarchy has them.
fn cgroup(group: &str) -> Value {
    const FILES: [&str; 14] = [
        "cpu.shares",
        "cpu.cfs_quota_us",
        "cpu.weight",
        "cpu.max",
        "cpuset.cpus",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.max",
        "memory.current",
        "memory.high",
        "pids.max",
        "pids.current",
        "cpu.pressure",
        "memory.pressure",
    ];
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places: Vec<&str> =
        table.lines().filter(|l| l.contains(" - cgroup")).filter_map(|l| l.split(' ').nth(4)).collect();
    let mut all = Map::new();
    for file in FILES {
        let found = places.iter().find_map(|p| fs::read_to_string(Path::new(p).join(group).join(file)).ok());
        if let Some(value) = found {
            all.insert(file.into(), json!(value.trim()));
        }
    }
    Value::Object(all)
}

/// Lines of the ruleset with one of the pod's addresses.
fn nftables(ips: &[String]) -> Value {
    if ips.is_empty() {
        return json!([]);
    }
    match Command::new("nft").args(["list", "ruleset"]).output() {
        Ok(out) => matching(&String::from_utf8_lossy(&out.stdout), ips),
        Err(e) => json!(format!("nft cannot be run: {e}")),
    }
}

fn matching(ruleset: &str, ips: &[String]) -> Value {
    let word = |line: &str, ip: &str| {
        line.match_indices(ip).any(|(at, _)| {
            let next = line[at + ip.len()..].chars().next();
            let before = line[..at].chars().next_back();
            !next.is_some_and(|c| c.is_ascii_digit()) && !before.is_some_and(|c| c.is_ascii_digit() || c == '.')
        })
    };
    let (mut table, mut object, mut found) = (String::new(), String::new(), Vec::new());
    for line in ruleset.lines() {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix("table ").and_then(|t| t.strip_suffix(" {")) {
            table = name.to_owned();
        } else if let Some(name) = trimmed.strip_suffix(" {") {
            object = name.to_owned();
        }
        for element in trimmed.trim_start_matches("elements = {").split(", ") {
            if ips.iter().any(|ip| word(element, ip)) {
                found.push(json!(format!("{table}: {object}: {}", element.trim_end_matches([',', '}', ' ']).trim())));
            }
        }
    }
    Value::Array(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_of_an_address_are_found() {
        let text = "table ip isopod {\n\tmap endpoints {\n\t\telements = { 10.96.0.1 . tcp : 10.244.0.5 . 80, 10.244.0.55 : 1 }\n\t}\n\tset gone {\n\t\telements = { 10.244.0.5,\n\t\t\t10.1.1.1 }\n\t}\n}\n";
        let found = matching(text, &["10.244.0.5".to_owned()]);
        assert_eq!(
            found,
            json!(["ip isopod: map endpoints: 10.96.0.1 . tcp : 10.244.0.5 . 80", "ip isopod: set gone: 10.244.0.5"])
        );
    }

    #[test]
    fn mounts_are_one_line_each() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line).unwrap(), "/mnt2 ext3 from /dev/root/mnt1 (rw,noatime)");
    }
}
