//! `make bench`: what isopod costs and how fast it is, beside real peers run in the same minute.
//!
//! Outside, this makes a virtual host and starts a cluster on it; inside the host (`bench inside ...`) it is a client of
//! the API server. Numbers are printed, never asserted. Arguments are the parts to run; without any, all run.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run has nothing to say")]

mod api;
mod dns;
mod inside;
mod memory;
mod node;
mod pods;
mod proxy;
mod pull;
mod runtime;

use std::time::Duration;

use isopod_tests::{Cluster, Host, Net};

/// The parts of the result, in their order.
const PARTS: [&str; 9] = ["dns", "proxy", "start", "pods", "node", "pull", "api", "services", "runtime"];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("inside") if args.get(1).is_some_and(|arg| arg == "runtime") => return runtime::run(&args[2..]),
        Some("inside") => return inside::run(&args[1..]),
        _ => {}
    }
    if let Some(unknown) = args.iter().find(|arg| !PARTS.contains(&arg.as_str())) {
        eprintln!("bench: no part {unknown:?}; there are {}", PARTS.join(", "));
        std::process::exit(64);
    }
    let wanted = |part: &str| args.is_empty() || args.iter().any(|arg| arg == part);
    if wanted("dns") {
        dns::run();
    }
    if wanted("proxy") {
        proxy::run();
    }
    if !PARTS[2..].iter().any(|part| wanted(part)) {
        return;
    }
    let mut net = Net::new();
    let host = net.host("bench");
    if PARTS[2..8].iter().any(|part| wanted(part)) {
        of_cluster(&host, &wanted);
    }
    if wanted("runtime") {
        runtime::compare(&host);
    }
}

/// What needs a cluster.
fn of_cluster(host: &Host, wanted: &dyn Fn(&str) -> bool) {
    std::fs::write(host.path("/etc/isopod/config.yaml"), node::CONFIGURATION).unwrap();
    let mut cluster = Cluster::start_installed(host);
    if wanted("start") {
        ready("start: nothing to Ready", host);
        let ran = cluster.isopod(&["down"]);
        assert_eq!(ran.code, 0, "{ran:?}");
        cluster.wait_up();
        cluster.up();
        ready("start: again, with its data", host);
        memory::cpu(&cluster, "idle", Duration::from_secs(60));
        memory::all(&cluster, "idle for a minute");
    }
    if wanted("pods") {
        inside(&cluster, &["pods"]);
    }
    if wanted("node") {
        node::run(&mut cluster);
    }
    if wanted("pull") {
        pull::run(&cluster);
    }
    if wanted("api") {
        inside(&cluster, &["api"]);
    }
    if wanted("services") {
        services(&mut cluster);
    }
}

/// How long the last `isopod up` took, by its own word.
fn ready(what: &str, host: &Host) {
    let text = std::fs::read_to_string(host.disk().join("up.log")).unwrap();
    row(what, text.lines().find_map(|line| line.strip_prefix("Ready in ")).unwrap_or("?"));
}

fn services(cluster: &mut Cluster) {
    for total in ["1000", "10000"] {
        inside(cluster, &["services", total]);
        full_sync(cluster, total);
    }
    for collection in
        ["/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"]
    {
        cluster.k(&format!("delete --raw '{collection}?labelSelector=bench%3Dservice' > /dev/null"));
    }
    // What was freed is given back at once; what watches may still ask for, within 135 s.
    std::thread::sleep(Duration::from_secs(150));
    memory::all(cluster, "150 s after load");
}

/// One line of the result.
fn row(what: &str, value: &str) {
    println!("{what:<52} {value}");
}

fn inside(cluster: &Cluster, what: &[&str]) {
    let own = std::env::current_exe().unwrap();
    let what = what.join(" ");
    let ran = cluster.host.sh(&format!("KUBECONFIG=/etc/isopod/kubeconfig {} inside {what}", own.display()));
    print!("{}", ran.out);
    if ran.code != 0 {
        let mut said = ran.err.lines().skip_while(|line| !line.contains("panicked")).skip(1);
        row(&what, &format!("failed: {}", said.next().unwrap_or(&ran.err)));
    }
}

/// The proxy starts with its table gone: what it says of loading everything.
fn full_sync(cluster: &mut Cluster, total: &str) {
    cluster.kill_agent();
    cluster.host.must("nft delete table ip isopod");
    let log = cluster.host.path("/var/log/isopod/agent.log");
    let before = std::fs::read_to_string(&log).unwrap().len();
    cluster.up();
    let said = isopod_tests::eventually("the proxy has loaded its rules", || {
        let text = std::fs::read_to_string(&log).unwrap();
        let line = text[before..].lines().find(|line| line.contains("service rules loaded")).map(str::to_owned);
        line.ok_or(text[before..].to_owned())
    });
    let value = |key: &str| {
        let rest = said.split(key).nth(1).unwrap_or_default();
        rest.split_whitespace().next().unwrap_or_default().to_owned()
    };
    row(
        &format!("proxy full sync at {total} x 10, empty table to loaded"),
        &format!("{} ms for {} elements", value("millis="), value("added=")),
    );
}

/// The median, the 99th percentile and the largest of some times, in milliseconds.
fn times(mut all: Vec<Duration>) -> String {
    all.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let at = |part: usize| ms(all[all.len() * part / 100]);
    format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms ({} runs)", at(50), at(99), ms(*all.last().unwrap()), all.len())
}
