//! The service proxy through crashes, other people's edits and storms of changes, under traffic.
//!
//! Each test has a network of its own with a synthetic API server; the proxy is `isopod proxy`. Sizes are of seconds; the
//! same with larger numbers: `ISOPOD_SERVICES=44000 ISOPOD_PODS=1000 cargo nextest run -p isopod-tests --test proxy`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use isopod_tests::{
    eventually,
    feed::{
        Asked, Backend, Feed, NODES, Proxy, SERVICES, SLICES, ask, ask_within, meanwhile, own_network, service, slice,
    },
    host::binaries,
};

fn size(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn vip(n: usize) -> String {
    format!("10.{}.{}.{}", 100 + n / 62_500, n / 250 % 250, n % 250 + 1)
}

fn to(n: usize) -> SocketAddr {
    format!("{}:80", vip(n)).parse().unwrap()
}

struct World {
    feed: Feed,
    dir: tempfile::TempDir,
}

impl World {
    /// Services whose endpoints nobody listens on, and service 0 with its own.
    fn new(services: usize, live: &[&str]) -> Self {
        own_network();
        let world = Self { feed: Feed::start(), dir: tempfile::tempdir().unwrap() };
        for n in 0..services {
            world.feed.set(SERVICES, service(&format!("s{n}"), &vip(n)));
            let silent = |e| (format!("10.244.{}.{}", 100 + n % 100, e + 1), true);
            match n {
                0 => world.feed.set(SLICES, slice("s0", live.iter().map(|a| ((*a).to_owned(), true)))),
                _ => world.feed.set(SLICES, slice(&format!("s{n}"), (0..5).map(silent))),
            }
        }
        world
    }

    fn proxy(&self) -> Proxy {
        Proxy::start(&self.feed, self.dir.path(), &binaries().join("isopod"))
    }
}

fn nft(words: &str) -> String {
    let output = Command::new("nft").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "nft {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn elements(map: &str) -> usize {
    // Its type has one as well.
    nft(&format!("list map ip isopod-proxy {map}")).matches(" : ").count() - 1
}

/// What clients saw: every answer is of one of `allowed`, and nothing failed.
#[track_caller]
fn all_well(seen: &[(Instant, Asked)], allowed: &[&str]) {
    assert!(seen.len() > 50, "only {} connections", seen.len());
    let mut bad = BTreeMap::<String, usize>::new();
    for (_, asked) in seen {
        if !matches!(asked, Asked::Answer(name) if allowed.contains(&name.as_str())) {
            *bad.entry(format!("{asked:?}")).or_default() += 1;
        }
    }
    assert!(bad.is_empty(), "of {} connections: {bad:?}", seen.len());
}

/// The proxy dies in the middle of loading, of changing, again and again: live backends are reached all the time, and in
/// the end everything is as it should be.
#[test]
fn crashes_harm_no_connection() {
    let services = size("ISOPOD_SERVICES", 1500);
    let live = ["10.244.0.1", "10.244.0.2"];
    let world = World::new(services, &live);
    let _backends = live.map(Backend::start);
    let first = world.proxy();
    first.loaded();
    eventually("service 0 answers", || match ask(to(0)) {
        Asked::Answer(_) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let clients = meanwhile(|| ask(to(0)));
    first.kill();
    for round in 0..6 {
        // Everything else changes while nobody looks, so that a new proxy has much to do when it is killed.
        for n in 1..services {
            let moved = |e| (format!("10.244.{}.{}", 100 + n % 100, e + 2 + round), true);
            world.feed.set(SLICES, slice(&format!("s{n}"), (0..5).map(moved)));
        }
        let proxy = world.proxy();
        // From before the first transaction to after the last one.
        std::thread::sleep(Duration::from_millis(150 * (round as u64 + 1)));
        proxy.kill();
    }
    let last = world.proxy();
    last.loaded();
    all_well(&clients(), &live);
    assert_eq!(elements("endpoints"), 5 * (services - 1) + live.len());
    assert_eq!(elements("services"), services);
}

/// Somebody flushes our table, or all of them: repaired within a second; connections that were open go on.
#[test]
fn a_flushed_table_is_back_within_a_second() {
    let live = ["10.244.0.1"];
    let services = size("ISOPOD_SERVICES", 300);
    let world = World::new(services, &live);
    let _backend = Backend::start(live[0]);
    let proxy = world.proxy();
    proxy.loaded();
    let echo = std::net::TcpListener::bind("10.244.0.9:8080").unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = echo.accept().unwrap();
        let mut copy = stream.try_clone().unwrap();
        let _ = std::io::copy(&mut stream, &mut copy);
    });
    world.feed.set(SERVICES, service("echo", "10.100.200.1"));
    world.feed.set(SLICES, slice("echo", [("10.244.0.9".to_owned(), true)].into_iter()));
    let mut open = eventually("the echo service is there", || {
        std::net::TcpStream::connect("10.100.200.1:80").map_err(|e| e.to_string())
    });
    open.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    for edit in [
        "flush table ip isopod-proxy",
        "flush map ip isopod-proxy services",
        "delete table ip isopod-proxy",
        "flush ruleset",
    ] {
        nft(edit);
        let flushed = Instant::now();
        eventually(edit, || match ask_within(Duration::from_millis(50), to(0)) {
            Asked::Answer(name) if name == live[0] => Ok(()),
            other => Err(format!("{other:?}")),
        });
        let took = flushed.elapsed();
        println!("{services} services, {edit}: repaired after {took:?}");
        assert!(took < Duration::from_secs(1), "{edit}: repaired after {took:?}");
        let mut back = [0; 4];
        std::io::Write::write_all(&mut open, b"ping").unwrap();
        std::io::Read::read_exact(&mut open, &mut back).unwrap_or_else(|e| panic!("{edit}: {e}"));
        eventually("all elements are back", || {
            let count = elements("services");
            if count == services + 1 { Ok(()) } else { Err(count.to_string()) }
        });
    }
}

/// A rolling update: each pod is replaced by another one, which serves before the old one stops. Nobody who connects
/// reaches one that is gone, or a pod of something else, or fails.
#[test]
fn a_rolling_update_loses_no_connection() {
    let pods = size("ISOPOD_PODS", 60);
    let address = |n: usize| format!("10.244.{}.{}", n / 250 + 1, n % 250 + 1);
    let world = World::new(50, &[]);
    let mut backends: BTreeMap<usize, Backend> = (0..pods).map(|n| (n, Backend::start(&address(n)))).collect();
    let publish = |ready: &BTreeSet<usize>| {
        world.feed.set(SLICES, slice("s0", ready.iter().map(|n| (address(*n), true))));
    };
    let mut ready: BTreeSet<usize> = (0..pods).collect();
    publish(&ready);
    let proxy = world.proxy();
    proxy.loaded();
    // When an endpoint left the slice: who connects a while later must not be led there.
    let left: Arc<Mutex<BTreeMap<String, Instant>>> = Arc::default();
    let clients: Vec<_> = (0..3).map(|_| meanwhile(|| ask(to(0)))).collect();
    const GRACE: Duration = Duration::from_millis(700);
    for n in 0..pods {
        backends.insert(pods + n, Backend::start(&address(pods + n)));
        ready.insert(pods + n);
        ready.remove(&n);
        publish(&ready);
        left.lock().unwrap().insert(address(n), Instant::now());
        // As pods do: it goes on serving for a moment.
        if n >= 10 {
            let gone = n - 10;
            let since = left.lock().unwrap()[&address(gone)];
            std::thread::sleep(GRACE.saturating_sub(since.elapsed()));
            backends.remove(&gone);
        }
    }
    std::thread::sleep(GRACE);
    let left = left.lock().unwrap();
    for stop in clients {
        let seen = stop();
        assert!(seen.len() > 100, "only {} connections", seen.len());
        for (when, asked) in seen {
            match asked {
                Asked::Answer(name) => {
                    let late = left.get(&name).is_some_and(|l| when > *l + GRACE);
                    assert!(!late, "{name} was asked after it had left");
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(elements("endpoints"), pods + 49 * 5);
}

/// A new proxy beside many services: what is in the kernel stays until it knows better, and connections go on.
#[test]
fn a_restart_with_many_services_is_not_noticed() {
    let services = size("ISOPOD_SERVICES", 3000);
    let live = ["10.244.0.1", "10.244.0.2", "10.244.0.3"];
    let world = World::new(services, &live);
    let _backends = live.map(Backend::start);
    world.proxy_once();
    let clients = meanwhile(|| ask(to(0)));
    let proxy = world.proxy();
    let line = proxy.loaded();
    assert!(line.contains("added=0 removed=0"), "{line}");
    all_well(&clients(), &live);
}

/// `detectLocalMode: NodeCIDR`: pods are those of the ranges the node gets, and until it has some nothing is loaded.
#[test]
fn pods_are_told_by_the_nodes_own_ranges() {
    let world = World::new(1, &[]);
    let file = world.dir.path().join("proxy.yaml");
    let text =
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\ndetectLocalMode: NodeCIDR\n";
    std::fs::write(&file, text).unwrap();
    let node = |spec: serde_json::Value| {
        world.feed.set(
            NODES,
            serde_json::json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "me"}, "spec": spec}),
        );
    };
    node(serde_json::json!({}));
    let more = ["--config", file.to_str().unwrap()];
    let proxy = Proxy::start_with(&world.feed, world.dir.path(), &binaries().join("isopod"), &more);
    eventually("it waits", || {
        let log = proxy.log();
        if log.contains("waiting for the node's pod ranges") { Ok(()) } else { Err(log) }
    });
    assert!(!proxy.log().contains("service rules loaded"));
    node(serde_json::json!({"podCIDRs": ["10.7.3.0/24"]}));
    proxy.loaded();
    let rules = nft("list chain ip isopod-proxy pick_1");
    assert!(rules.contains("ip saddr != 10.7.3.0/24 meta mark set"), "{rules}");
}

impl World {
    /// Starts a proxy, lets it load everything, and kills it.
    fn proxy_once(&self) {
        let proxy = self.proxy();
        proxy.loaded();
        eventually("service 0 answers", || match ask(to(0)) {
            Asked::Answer(_) => Ok(()),
            other => Err(format!("{other:?}")),
        });
        proxy.kill();
    }
}
