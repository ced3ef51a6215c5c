//! The engine against a real etcd on loopback.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::{strategy::Strategy, test_runner::TestRunner};

use super::*;
use crate::{
    Embedded, Event, Expect,
    testing::{Log, all, behaves_like_a_map, delete, put},
    transfer,
};

/// One etcd with an empty directory.
struct Server {
    child: Child,
    dir: tempfile::TempDir,
    ports: [u16; 2],
}

impl Server {
    fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (dir, ports) = (tempfile::tempdir().unwrap(), [free(), free()]);
        let child = Self::run(dir.path(), ports);
        let server = Self { child, dir, ports };
        server.wait();
        server
    }

    fn run(dir: &Path, [client, peer]: [u16; 2]) -> Child {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        Command::new("etcd")
            .args(["--name=one", "--log-level=error", "--data-dir"])
            .arg(dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Debian's etcd-server is installed")
    }

    /// Waits until it answers.
    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = Etcd::open(self.config()).map(drop) {
            assert!(Instant::now() < deadline, "etcd does not answer: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn again(&mut self) {
        self.child = Self::run(self.dir.path(), self.ports);
        self.wait();
    }

    fn config(&self) -> EtcdConfig {
        EtcdConfig { endpoints: vec![format!("http://127.0.0.1:{}", self.ports[0])], ..EtcdConfig::default() }
    }

    fn open(&self) -> Etcd {
        Etcd::open(self.config()).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn follow(store: &Etcd) -> Arc<Log> {
    let log = Arc::new(Log::default());
    assert_eq!(store.range("", Some(log.clone())).unwrap().filter(Result::is_err).count(), 0);
    log
}

#[test]
fn behaves_like_the_embedded_one() {
    let server = Server::start();
    // Compares, and batches that are all or nothing.
    let store = server.open();
    let first = store.submit(put("a", "1", Expect::Absent)).wait().unwrap();
    let again = store.submit(put("a", "2", Expect::Absent)).wait();
    assert!(matches!(again, Err(Error::Conflict { expected: 0, found, .. }) if found == first));
    let mut batch = put("b", "1", Expect::Absent);
    batch.ops.extend(put("c", "1", Expect::Revision(7)).ops);
    assert!(matches!(store.submit(batch).wait(), Err(Error::Conflict { index: 1, expected: 7, found: 0 })));
    let second = store.submit(put("a", "2", Expect::Revision(first))).wait().unwrap();
    assert!(store.submit(delete("a", Expect::Revision(first))).wait().is_err());
    assert_eq!((all(&store)[0].modified, &all(&store)[0].value[..]), (second, &b"2"[..]));
    store.submit(delete("a", Expect::Revision(second))).wait().unwrap();
    assert_eq!(all(&store), vec![]);
    assert!(store.revision() > second);
    // The model.
    let mut runner = TestRunner::new(proptest::test_runner::Config { cases: 12, ..Default::default() });
    let steps = proptest::collection::vec((0u8..6, 0u8..4, proptest::bool::ANY), 1..40);
    let round = std::sync::atomic::AtomicU64::new(0);
    let open = || Box::new(server.open()) as Box<dyn Engine>;
    let cases = steps.prop_map(|steps| (round.fetch_add(1, Ordering::Relaxed), steps));
    runner.run(&cases, |(round, steps)| behaves_like_a_map(&open, &format!("r{round}/"), steps)).unwrap();
}

#[test]
fn two_servers_see_each_other_in_order() {
    let server = Server::start();
    let (one, two) = (server.open(), server.open());
    let (seen_one, seen_two) = (follow(&one), follow(&two));
    // What a server has acknowledged, its own sink has seen; the other one's has after a sync.
    let pending: Vec<_> = (0..60)
        .flat_map(|i| {
            let from = |store: &Etcd, name: &str| store.submit(put(&format!("{name}{i}"), "v", Expect::Absent));
            [from(&one, "one"), from(&two, "two")]
        })
        .collect();
    let mut revisions: Vec<u64> = pending.into_iter().map(|p| p.wait().unwrap()).collect();
    for (store, log) in [(&one, &seen_one), (&two, &seen_two)] {
        let upto = store.sync().unwrap().wait().unwrap();
        assert!(upto >= *revisions.iter().max().unwrap());
        let log: Vec<(u64, String)> = log.0.lock().clone();
        assert!(log.is_sorted_by_key(|(revision, _)| *revision));
        assert_eq!(log.len(), 120);
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), 120);
    // Batches on one key keep their order, whoever has to wait for whom.
    let pending: Vec<_> = (0..20).map(|i| one.submit(put("same", &i.to_string(), Expect::Any))).collect();
    let order: Vec<u64> = pending.into_iter().map(|p| p.wait().unwrap()).collect();
    assert!(order.is_sorted());
    assert_eq!(crate::testing::under(&two, "same")[0].value, "19");
}

/// Hands its tag's number back, to see which events had one.
#[derive(Default)]
struct Tags(parking_lot::Mutex<Vec<Option<u32>>>);

impl Sink for Tags {
    fn apply(&self, events: Vec<Event>) {
        let number = |e: Event| e.tag.and_then(|t| t.downcast_ref::<u32>().copied());
        self.0.lock().extend(events.into_iter().map(number));
    }
}

#[test]
fn own_events_carry_their_tags() {
    let server = Server::start();
    let (one, two) = (server.open(), server.open());
    let tags = Arc::new(Tags::default());
    drop(one.range("", Some(tags.clone())).unwrap());
    let mut batch = put("a", "1", Expect::Any);
    batch.ops[0].tag = Some(Arc::new(7u32));
    one.submit(batch).wait().unwrap();
    two.submit(put("a", "2", Expect::Any)).wait().unwrap();
    one.sync().unwrap().wait().unwrap();
    assert_eq!(*tags.0.lock(), [Some(7), None]);
}

#[test]
fn a_server_that_comes_back_is_followed_again() {
    let mut server = Server::start();
    let (store, other) = (server.open(), server.open());
    let log = follow(&store);
    let before = store.submit(put("a", "1", Expect::Absent)).wait().unwrap();
    server.stop();
    assert!(matches!(store.submit(put("lost", "1", Expect::Any)).wait(), Err(Error::Write { .. })));
    assert!(store.sync().unwrap().wait().is_err());
    server.again();
    let after = other.submit(put("b", "1", Expect::Absent)).wait().unwrap();
    assert!(after > before);
    assert!(store.sync().unwrap().wait().unwrap() >= after);
    let keys: Vec<String> = log.0.lock().iter().map(|(_, key)| key.clone()).collect();
    assert_eq!(keys, ["a", "b"]);
}

#[test]
fn what_was_compacted_while_away_is_caught_up_with() {
    let server = Server::start();
    let store = server.open();
    for key in ["gone", "kept", "changed"] {
        store.submit(put(key, "1", Expect::Absent)).wait().unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let seen = tokio::task::LocalSet::new().block_on(&runtime, async {
        let client = Rc::new(Client::new(&server.config()).unwrap());
        let now = || async { client.range(KEY.as_bytes(), b"", 0, 1, true).await.unwrap().header.unwrap().revision };
        let (to, mut deliveries) = tokio::sync::mpsc::unbounded_channel();
        let watcher = watch::Watcher::new(Rc::clone(&client), now().await, to).await.unwrap();
        store.submit(delete("gone", Expect::Any)).await.unwrap();
        store.submit(put("changed", "2", Expect::Any)).await.unwrap();
        store.submit(put("changed", "3", Expect::Any)).await.unwrap();
        client.compact(now().await).await.unwrap();
        tokio::task::spawn_local(watcher.run());
        let missed = deliveries.recv().await.unwrap();
        assert_eq!(missed.upto, now().await);
        store.submit(put("after", "1", Expect::Any)).await.unwrap();
        missed.seen.into_iter().chain(deliveries.recv().await.unwrap().seen).collect::<Vec<_>>()
    });
    let keys: Vec<&str> = seen.iter().map(|seen| &*seen.key).collect();
    assert_eq!(keys, ["changed", "gone", "after"]);
    assert!(seen.is_sorted_by_key(|seen| seen.revision));
    assert_eq!(seen[0].change, crate::Change::Put("3".into()));
    assert!(matches!(seen[1].change, crate::Change::Delete));
}

#[test]
fn servers_agree_on_who_compacts() {
    let server = Server::start();
    let all: Vec<Etcd> = (0..3).map(|_| Etcd::start(server.config(), Duration::from_millis(30)).unwrap()).collect();
    let client = |revision| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            Client::new(&server.config()).unwrap().range(b"a", b"", revision, 1, false).await.map(drop)
        })
    };
    all[0].submit(put("a", "1", Expect::Any)).wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    // What is older than two rounds is forgotten; what is there is not.
    while !matches!(client(2), Err(error) if error.to_string().contains("compacted")) {
        assert!(Instant::now() < deadline);
        all[1].submit(put("b", "1", Expect::Any)).wait().unwrap();
    }
    assert_eq!(all_keys(&all[2]), ["a", "b"]);
    assert!(all[2].size() > 0);
}

fn all_keys(store: &Etcd) -> Vec<String> {
    all(store).into_iter().map(|entry| entry.key.into()).collect()
}

#[test]
fn moves_keep_every_revision() {
    let server = Server::start();
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Embedded::open(from.path()).unwrap();
    for i in 0..250 {
        store.submit(put(&format!("k{i:03}"), &"v".repeat(i), Expect::Absent)).wait().unwrap();
    }
    let changed = store.submit(put("k007", "new", Expect::Any)).wait().unwrap();
    let last = store.submit(delete("k008", Expect::Any)).wait().unwrap();
    let before = all(&store);
    drop(store);
    let moved = transfer::Report { keys: 249, revision: last };
    assert_eq!(transfer::to_etcd(from.path(), &server.config()).unwrap(), moved);
    let twice = transfer::to_etcd(from.path(), &server.config()).unwrap_err();
    assert!(twice.to_string().contains("needs an empty etcd"), "{twice}");

    let store = server.open();
    assert_eq!((store.revision(), all(&store)), (last, before.clone()));
    let log = follow(&store);
    // Compares go by the old revisions; the first commit gets the next one.
    let wrong = store.submit(put("k007", "x", Expect::Revision(changed - 1))).wait();
    assert!(matches!(wrong, Err(Error::Conflict { found, .. }) if found == changed));
    let next = store.submit(put("k007", "x", Expect::Revision(changed))).wait().unwrap();
    assert_eq!((next, log.0.lock().clone()), (last + 1, vec![(last + 1, "k007".to_owned())]));
    assert!(store.submit(put("k007", "y", Expect::Revision(changed))).wait().is_err());
    store.submit(put("k007", "y", Expect::Revision(next))).wait().unwrap();
    let (now, here) = (store.revision(), all(&store));
    drop(store);

    assert_eq!(transfer::to_embedded(&server.config(), to.path()).unwrap().revision, now);
    let store = Embedded::open(to.path()).unwrap();
    assert_eq!((store.revision(), all(&store)), (now, here));
    assert_eq!(store.submit(put("k009", "x", Expect::Any)).wait().unwrap(), now + 1);
}

#[test]
fn bad_addresses_are_named() {
    for (endpoint, want) in [
        ("127.0.0.1:2379", "must begin with http:// or https://"),
        ("http://127.0.0.1", "the port is missing"),
        ("http://127.0.0.1:1", "cannot reach etcd: http://127.0.0.1:1/: Connection refused"),
    ] {
        let error = Etcd::open(EtcdConfig { endpoints: vec![endpoint.into()], ..EtcdConfig::default() }).map(drop);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(want), "{endpoint}: {error}");
    }
}
