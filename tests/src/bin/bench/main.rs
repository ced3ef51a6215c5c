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
    let mut cluster = Cluster::start_installed(&host);
    let text = std::fs::read_to_string(host.disk().join("up.log")).unwrap();
    row("start: nothing to Ready", text.lines().find_map(|line| line.strip_prefix("Ready in ")).unwrap_or("?"));
    let ran = cluster.isopod(&["down"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    cluster.wait_up();
    cluster.up();
    let text = std::fs::read_to_string(host.disk().join("up.log")).unwrap();
    row("start: again, with its data", text.lines().find_map(|line| line.strip_prefix("Ready in ")).unwrap_or("?"));
    memory::all(&cluster, "idle");
    memory::cpu(&cluster, Duration::from_secs(60));
    inside(&cluster, &["pods-one-by-one"]);
    inside(&cluster, &["pods-at-once"]);
    memory::per_pod(&cluster);
    cluster.k("delete pods --all --now --wait=true");
    inside(&cluster, &["creates"]);
    inside(&cluster, &["lists"]);
    for total in ["1000", "10000"] {
        inside(&cluster, &["services", total]);
        full_sync(&mut cluster, total);
    }
    for collection in
        ["/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"]
    {
        cluster.k(&format!("delete --raw '{collection}?labelSelector=bench%3Dservice' > /dev/null"));
    }
    // What was freed is given back at once; what watches may still ask for, within 135 s.
    std::thread::sleep(Duration::from_secs(150));
    memory::all(&cluster, "150 s after load");
    runtime::compare(&host);
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

/// The median and the largest of some times, in milliseconds.
fn times(mut all: Vec<Duration>) -> String {
    all.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    format!("p50 {:.1} ms, max {:.1} ms ({} runs)", ms(all[all.len() / 2]), ms(*all.last().unwrap()), all.len())
}
