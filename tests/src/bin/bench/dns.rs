//! Cluster DNS beside unbound, asked by dnsperf: all three in one network namespace, in turns.

use std::{
    fmt::Write,
    process::{Child, Command, Stdio},
    time::Duration,
};

use isopod_tests::{
    eventually,
    feed::{Feed, Proxy, SERVICES, own_network, service},
};

use crate::row;

const NAMES: usize = 1000;
const ROUNDS: usize = 3;
const OURS: &str = "10.96.0.10";
const PEER: &str = "10.96.0.11";

/// Ends with what it holds.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn run() {
    let isopod = isopod_tests::host::binaries().join("isopod");
    std::thread::scope(|scope| {
        scope.spawn(|| compare(&isopod));
    });
}

fn compare(isopod: &std::path::Path) {
    own_network();
    let dir = std::env::temp_dir().join(format!("isopod-bench-dns-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let feed = Feed::start();
    let mut data = String::new();
    let mut queries = String::new();
    for n in 0..NAMES {
        let (name, address) = (format!("s{n}"), format!("10.100.{}.{}", n / 250, n % 250 + 1));
        feed.set(SERVICES, service(&name, &address));
        let full = format!("{name}.load.svc.cluster.local");
        let _ = writeln!(data, "  local-data: \"{full}. 5 IN A {address}\"");
        let _ = writeln!(queries, "{full} A");
    }
    let proxy = Proxy::start(&feed, &dir, isopod);
    proxy.loaded();
    let queries_file = dir.join("queries");
    std::fs::write(&queries_file, queries).unwrap();
    let config = dir.join("unbound.conf");
    let text = format!(
        "server:\n  interface: {PEER}\n  access-control: 0.0.0.0/0 allow\n  num-threads: 2\n  so-reuseport: yes\n  chroot: \"\"\n  \
         username: \"\"\n  use-syslog: no\n  do-daemonize: no\n  pidfile: \"\"\n  local-zone: \"cluster.local.\" static\n{data}\
         remote-control:\n  control-enable: no\n"
    );
    std::fs::write(&config, text).unwrap();
    assert!(Command::new("ip").args(["addr", "add", &format!("{PEER}/32"), "dev", "lo"]).status().unwrap().success());
    let peer = Command::new("unbound").arg("-c").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let _peer = Daemon(peer.unwrap());
    let file = queries_file.display().to_string();
    for server in [OURS, PEER] {
        eventually(server, || ask(server, &file, 1).ok_or("no answer yet"));
    }
    let mut seen = [(OURS, "isopod", Vec::new()), (PEER, "unbound, 2 threads", Vec::new())];
    for _ in 0..ROUNDS {
        for (server, _, all) in &mut seen {
            all.extend(ask(server, &file, 3));
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    for (_, name, mut all) in seen {
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some((rate, latency)) = all.get(all.len() / 2) else { continue };
        row(
            &format!("DNS, {NAMES} names, dnsperf beside it: {name}"),
            &format!("{rate:.0} queries/s, mean latency {:.0} us (median of {} runs)", latency * 1e6, all.len()),
        );
    }
    drop(proxy);
    let _ = std::fs::remove_dir_all(&dir);
}

/// Queries per second and mean latency in seconds.
fn ask(server: &str, queries: &str, seconds: u32) -> Option<(f64, f64)> {
    let seconds = seconds.to_string();
    let output = Command::new("dnsperf")
        .args(["-s", server, "-d", queries, "-l", &seconds, "-c", "8", "-T", "1", "-q", "200"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = |key: &str| {
        let line = text.lines().map(str::trim).find_map(|l| l.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some((value("Queries per second:").filter(|q| *q > 0.0)?, value("Average Latency (s):")?))
}
