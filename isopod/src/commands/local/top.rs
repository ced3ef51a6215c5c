//! `isopod top`: a live view of what the pods of this machine use and wait for.

use std::{
    collections::HashMap,
    io::{IsTerminal, Write, stdout},
    time::Duration,
};

use anyhow::{Context, Result};
use isopod_agent::Paths;
use serde_json::Value;

use super::{Node, ask, text};

/// Options of `top`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print once and end.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks.
    #[arg(short = 'd', long, default_value = "2", value_name = "SECONDS", value_parser = seconds)]
    delay: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || "want a number of seconds from 0.2 to 3600".to_owned();
    let n: f64 = text.parse().map_err(|_| wrong())?;
    if (0.2..=3600.0).contains(&n) { Ok(Duration::from_secs_f64(n)) } else { Err(wrong()) }
}

/// Bytes received and sent by a pod.
type Traffic = HashMap<String, (f64, f64)>;

pub(crate) fn run(paths: &Paths, args: &Args) -> Result<()> {
    let delay = args.delay;
    ask(async {
        let node = Node::connect(paths).await?;
        let mut before = traffic(&node.get("/stats/summary").await?);
        loop {
            // A rate needs two looks.
            tokio::time::sleep(delay).await;
            let summary = node.get("/stats/summary").await?;
            let page = page(&summary, &before, delay.as_secs_f64());
            before = traffic(&summary);
            let mut out = stdout();
            let clear = if args.once || !stdout().is_terminal() { "" } else { "\x1b[H\x1b[2J" };
            match out.write_all(format!("{clear}{page}").as_bytes()).and_then(|()| out.flush()) {
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                other => other.context("write")?,
            }
            if args.once {
                return Ok(());
            }
        }
    })
}

fn key(pod: &Value) -> String {
    text(&pod["podRef"]["uid"]).to_owned()
}

fn traffic(summary: &Value) -> Traffic {
    let pods = summary["pods"].as_array().into_iter().flatten();
    let of = |p: &Value, name: &str| p["network"][name].as_f64().unwrap_or(0.0);
    pods.map(|p| (key(p), (of(p, "rxBytes"), of(p, "txBytes")))).collect()
}

fn bytes(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.1}G", n / 1e9),
        n if n >= 1e6 => format!("{:.1}M", n / 1e6),
        n if n >= 1e3 => format!("{:.1}k", n / 1e3),
        n => format!("{n:.0}"),
    }
}

fn milli(stats: &Value) -> f64 {
    stats["cpu"]["usageNanoCores"].as_f64().unwrap_or(0.0) / 1e6
}

/// Share of the last ten seconds in which something waited for cpu, memory, io.
fn pressure(stats: &Value) -> [String; 3] {
    ["cpu", "memory", "io"].map(|r| {
        let some = stats[r]["psi"]["some"]["avg10"].as_f64();
        some.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}%"))
    })
}

fn page(summary: &Value, before: &Traffic, seconds: f64) -> String {
    let node = &summary["node"];
    let [cpu, memory, io] = pressure(node);
    let used = node["memory"]["workingSetBytes"].as_f64().unwrap_or(0.0);
    let mut pods: Vec<&Value> = summary["pods"].as_array().into_iter().flatten().collect();
    pods.sort_by(|a, b| milli(b).total_cmp(&milli(a)));
    let rows: Vec<[String; 9]> = pods
        .iter()
        .map(|p| {
            let (rx, tx) = before.get(&key(p)).copied().unwrap_or_default();
            let rate =
                |name: &str, old: f64| bytes((p["network"][name].as_f64().unwrap_or(old) - old).max(0.0) / seconds);
            let [cpu, memory, io] = pressure(p);
            [
                text(&p["podRef"]["namespace"]).to_owned(),
                text(&p["podRef"]["name"]).to_owned(),
                format!("{:.0}m", milli(p)),
                bytes(p["memory"]["workingSetBytes"].as_f64().unwrap_or(0.0)),
                cpu,
                memory,
                io,
                rate("rxBytes", rx),
                rate("txBytes", tx),
            ]
        })
        .collect();
    let head = format!(
        "node {}: cpu {:.0}m, memory {}, {} pods; waiting for cpu {cpu}, memory {memory}, io {io} of the last 10 s\n\n",
        text(&node["nodeName"]),
        milli(node),
        bytes(used),
        pods.len(),
    );
    let header = ["NAMESPACE", "POD", "CPU", "MEMORY", "WAIT-CPU", "WAIT-MEM", "WAIT-IO", "RX/s", "TX/s"];
    head + &crate::table::render(header, &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pause_is_a_number_of_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in ["NaN", "inf", "-1", "0", "x"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_busiest_is_first_and_rates_are_per_second() {
        let pod = |name: &str, cpu: u64, rx: u64| {
            json!({"podRef": {"name": name, "namespace": "d", "uid": name}, "network": {"rxBytes": rx, "txBytes": 0},
                "cpu": {"usageNanoCores": cpu * 1_000_000, "psi": {"some": {"avg10": 12.5}}}, "memory": {"workingSetBytes": 5_000_000}})
        };
        let summary = json!({"node": {"nodeName": "n"}, "pods": [pod("idle", 1, 0), pod("busy", 900, 3000)]});
        let before = Traffic::from([("busy".to_owned(), (1000.0, 0.0))]);
        let text = page(&summary, &before, 2.0);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[3].contains("busy") && lines[3].contains("900m") && lines[3].contains("1.0k"), "{text}");
        assert!(lines[3].contains("12.5%") && lines[4].contains("idle") && lines[4].contains("5.0M"), "{text}");
    }
}
