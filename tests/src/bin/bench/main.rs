//! `make bench`: what isopod costs and how fast it is, beside real peers run in the same minute.
//!
//! Outside, this makes a virtual host and starts a cluster on it; inside the host (`bench inside ...`) it is a client of
//! the API server. Numbers are printed, never asserted.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run has nothing to say")]

mod inside;
mod memory;
mod runtime;

use std::time::Duration;

use isopod_tests::{Cluster, Net};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "inside") {
        inside::run(&args[1..]);
        return;
    }
    let mut net = Net::new();
    let host = net.host("bench");
    let mut cluster = Cluster::start(&host);
    let text = std::fs::read_to_string(host.disk().join("up.log")).unwrap();
    row("start: nothing to Ready", text.lines().find_map(|line| line.strip_prefix("Ready in ")).unwrap_or("?"));
    let ran = cluster.isopod(&["down"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    cluster.wait_up();
    cluster.up();
    let text = std::fs::read_to_string(host.disk().join("up.log")).unwrap();
    row("start: again, with its data", text.lines().find_map(|line| line.strip_prefix("Ready in ")).unwrap_or("?"));
    memory::idle(&cluster);
    memory::cpu(&cluster, Duration::from_secs(60));
    for what in ["pods-one-by-one", "pods-at-once", "creates", "lists", "services"] {
        inside(&cluster, what);
        if what == "pods-at-once" {
            memory::per_pod(&cluster);
            cluster.k("delete pods --all --now --wait=true");
        }
    }
    memory::after_load(&cluster);
    runtime::compare(&host);
}

/// One line of the result.
fn row(what: &str, value: &str) {
    println!("{what:<52} {value}");
}

fn inside(cluster: &Cluster, what: &str) {
    let own = std::env::current_exe().unwrap();
    let ran = cluster.host.sh(&format!("KUBECONFIG=/etc/isopod/kubeconfig {} inside {what}", own.display()));
    print!("{}", ran.out);
    if ran.code != 0 {
        row(what, &format!("failed: {}", ran.err.lines().last().unwrap_or_default()));
    }
}

/// The median and the largest of some times, in milliseconds.
fn times(mut all: Vec<Duration>) -> String {
    all.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    format!("p50 {:.1} ms, max {:.1} ms ({} runs)", ms(all[all.len() / 2]), ms(*all.last().unwrap()), all.len())
}
