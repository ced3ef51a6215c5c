//! The service proxy alone, fed by a synthetic API server, in a network namespace: `isopod proxy` with up to a million
//! endpoints.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use isopod_tests::feed::{Asked, Feed, Proxy, SERVICES, SLICES, ask_within, own_network, service, slice};

use crate::{row, times};

/// Services and endpoints of each.
const SIZES: [(usize, usize); 4] = [(1, 1), (1000, 10), (10_000, 10), (50_000, 20)];
const BACKEND: &str = "10.244.0.1";

fn vip(n: usize) -> String {
    format!("10.{}.{}.{}", 100 + n / 62_500, n / 250 % 250, n % 250 + 1)
}

pub(crate) fn run() {
    let isopod = isopod_tests::host::binaries().join("isopod");
    for (services, endpoints) in SIZES {
        // A namespace of its own for each: gone with its thread.
        std::thread::scope(|scope| {
            scope.spawn(|| one(services, endpoints, &isopod));
        });
    }
}

fn one(services: usize, endpoints: usize, isopod: &std::path::Path) {
    own_network();
    let listener = TcpListener::bind((BACKEND, 8080)).unwrap();
    std::thread::spawn(move || {
        listener.incoming().for_each(|s| drop(s.map(|s| std::io::Write::write_all(&mut &s, b"x"))))
    });
    let feed = Feed::start();
    for n in 0..services {
        feed.set(SERVICES, service(&format!("s{n}"), &vip(n)));
        let address = |e| {
            format!(
                "10.{}.{}.{}",
                200 + (n * endpoints + e) / 62_500 % 50,
                (n * endpoints + e) / 250 % 250,
                (n * endpoints + e) % 250 + 1
            )
        };
        let list = (0..endpoints).map(|e| if n == 0 { BACKEND.to_owned() } else { address(e) });
        feed.set(SLICES, slice(&format!("s{n}"), list.map(|a| (a, true)).take(if n == 0 { 1 } else { endpoints })));
    }
    let what = format!("proxy, {services} x {endpoints}");
    let dir = std::env::temp_dir().join(format!("isopod-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let started = Instant::now();
    let proxy = Proxy::start(&feed, &dir, isopod);
    let line = proxy.loaded();
    let all = started.elapsed();
    let value = |key: &str| line.split(key).nth(1).and_then(|r| r.split_whitespace().next()).unwrap_or("?").to_owned();
    row(
        &format!("{what}: full sync"),
        &format!(
            "{} ms for {} elements; {:.1} s with reading the API",
            value("millis="),
            value("added="),
            all.as_secs_f64()
        ),
    );
    let ticks = cpu(proxy.pid());
    row(&format!("{what}: CPU of reading and loading"), &format!("{} ms", ticks * 10));
    let one = changes(&feed, services);
    row(&format!("{what}: one change, API event to first connection"), &times(one));
    row(&format!("{what}: CPU of these 50 changes"), &format!("{} ms", (cpu(proxy.pid()) - ticks) * 10));
    for (kind, took) in kinds_of_changes(&feed, services) {
        row(&format!("{what}: {kind}, by the proxy's own metric"), &fine(took));
    }
    row(&format!("{what}: memory (PSS)"), &format!("{:.1} MiB", pss(proxy.pid()) as f64 / 1024.0));
    let to = |address: &str, port| format!("{address}:{port}").parse().unwrap();
    row(&format!("{what}: connections through service 0"), &connections(to(&vip(0), 80)));
    row(&format!("{what}: connections without the proxy"), &connections(to(BACKEND, 8080)));
    drop(proxy);
    let _ = std::fs::remove_dir_all(&dir);
}

/// Adds services one by one: from the event to the first connection.
fn changes(feed: &Feed, services: usize) -> Vec<Duration> {
    let one = |n: usize| {
        let name = format!("new-{n}");
        let address = vip(services + n);
        feed.set(SLICES, slice(&name, std::iter::once((BACKEND.to_owned(), true))));
        // The slice alone changes nothing; what it costs must not count.
        std::thread::sleep(Duration::from_millis(20));
        let started = Instant::now();
        feed.set(SERVICES, service(&name, &address));
        let to: SocketAddr = format!("{address}:80").parse().unwrap();
        while !matches!(ask_within(Duration::from_millis(1), to), Asked::Answer(_)) {
            assert!(started.elapsed() < Duration::from_secs(20), "{to} never answered");
        }
        started.elapsed()
    };
    (0..50).map(one).collect()
}

/// Seconds and number of the syncs of single changes, from the proxy's metrics.
fn partial_syncs() -> (f64, f64) {
    let mut stream = TcpStream::connect("127.0.0.1:10249").unwrap();
    std::io::Write::write_all(&mut stream, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let text = std::io::read_to_string(stream).unwrap();
    let value = |end: &str| {
        let name = format!("kubeproxy_sync_partial_proxy_rules_duration_seconds_{end}{{ip_family=\"IPv4\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&name)?.parse::<f64>().ok()).unwrap_or(f64::NAN)
    };
    (value("sum"), value("count"))
}

fn fine(mut all: Vec<Duration>) -> String {
    all.sort();
    let ms = |at: usize| all[at].as_secs_f64() * 1000.0;
    format!("p50 {:.2} ms, max {:.2} ms ({} runs)", ms(all.len() / 2), ms(all.len() - 1), all.len())
}

/// How long the proxy takes for each of 50 changes of a kind, one by one.
fn timed(mut change: impl FnMut(usize)) -> Vec<Duration> {
    let one = |n| {
        let before = partial_syncs();
        change(n);
        let started = Instant::now();
        loop {
            let after = partial_syncs();
            if after.1 > before.1 {
                return Duration::from_secs_f64((after.0 - before.0) / (after.1 - before.1));
            }
            assert!(started.elapsed() < Duration::from_secs(20), "change {n} was never synced");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    (0..50).map(one).collect()
}

fn kinds_of_changes(feed: &Feed, services: usize) -> [(&'static str, Vec<Duration>); 4] {
    let name = |n: usize| format!("kind-{n}");
    let ends = |n, count: u8| slice(&name(n), (1..=count).map(|e| (format!("10.244.0.{e}"), true)));
    timed(|n| feed.set(SLICES, ends(n, 1)));
    [
        ("a service more", timed(|n| feed.set(SERVICES, service(&name(n), &vip(services + 50 + n))))),
        ("an endpoint more", timed(|n| feed.set(SLICES, ends(n, 2)))),
        ("an endpoint less", timed(|n| feed.set(SLICES, ends(n, 1)))),
        ("a service less", timed(|n| feed.remove(SERVICES, "load", &name(n)))),
    ]
}

/// Connections one after the other: rate and latency.
fn connections(to: SocketAddr) -> String {
    let started = Instant::now();
    let mut all = Vec::new();
    while started.elapsed() < Duration::from_secs(2) {
        let one = Instant::now();
        let mut stream = TcpStream::connect(to).unwrap();
        all.push(one.elapsed());
        // The other end closes first: its port is always the same, ours would be used up.
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    }
    all.sort();
    let micros = |at: usize| all.get(at).map_or(f64::NAN, |d| d.as_secs_f64() * 1e6);
    let rate = all.len() as f64 / started.elapsed().as_secs_f64();
    format!("{rate:.0} per second, p50 {:.0} us, p99 {:.0} us", micros(all.len() / 2), micros(all.len() * 99 / 100))
}

fn cpu(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<u64> =
        stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2).map(|f| f.parse().unwrap()).collect();
    fields.iter().sum()
}

fn pss(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
