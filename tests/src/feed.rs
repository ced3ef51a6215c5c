//! A synthetic API server: lists and watches of whatever it is told, over HTTP, on threads. And a service proxy fed by it.
//!
//! The calling thread gets a network namespace of its own; everything it starts afterwards lives there.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::eventually;

/// Path of Services.
pub const SERVICES: &str = "/api/v1/services";
/// Nodes.
pub const NODES: &str = "/api/v1/nodes";
/// Path of EndpointSlices.
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

#[derive(Default)]
struct State {
    /// By path, then by namespace and name: the object's JSON.
    objects: BTreeMap<String, BTreeMap<String, Arc<str>>>,
    /// What happened, in order; the number of an event is its revision.
    events: Vec<(String, Arc<str>)>,
}

/// The server.
#[derive(Clone)]
pub struct Feed {
    state: Arc<(Mutex<State>, Condvar)>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Feed {
    /// Serves on a port of 127.0.0.1, until the process ends.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let feed = Self { state: Arc::default(), address: listener.local_addr().unwrap() };
        let server = feed.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (server, stream) = (server.clone(), stream.unwrap());
                // A client that is gone ends its thread.
                std::thread::spawn(move || server.converse(stream));
            }
        });
        feed
    }

    /// Adds or changes an object.
    pub fn set(&self, path: &str, mut object: Value) {
        let mut state = self.state.0.lock().unwrap();
        let key = format!("{}/{}", object["metadata"]["namespace"], object["metadata"]["name"]);
        object["metadata"]["resourceVersion"] = json!((state.events.len() + 1).to_string());
        let text: Arc<str> = object.to_string().into();
        let old = state.objects.entry(path.into()).or_default().insert(key, text.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        state.events.push((path.into(), format!(r#"{{"type":"{kind}","object":{text}}}"#).into()));
        self.state.1.notify_all();
    }

    /// Removes an object.
    pub fn remove(&self, path: &str, namespace: &str, name: &str) {
        let mut state = self.state.0.lock().unwrap();
        let key = format!("{}/{}", json!(namespace), json!(name));
        let text = state.objects.get_mut(path).unwrap().remove(&key).unwrap();
        state.events.push((path.into(), format!(r#"{{"type":"DELETED","object":{text}}}"#).into()));
        self.state.1.notify_all();
    }

    fn converse(&self, stream: TcpStream) -> Option<()> {
        stream.set_nodelay(true).ok()?;
        let mut out = stream.try_clone().ok()?;
        let mut lines = BufReader::new(stream).lines();
        loop {
            let request = lines.next()?.ok()?;
            while !lines.next()?.ok()?.is_empty() {}
            let target = request.split_whitespace().nth(1)?.to_owned();
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            let value = |name: &str| query.split('&').find_map(|p| p.strip_prefix(name)?.strip_prefix('='));
            let number = |name: &str| value(name).and_then(|v| v.parse::<usize>().ok()).unwrap_or(0);
            if matches!(value("watch"), Some("true" | "1")) {
                return self.watch(&mut out, path, number("resourceVersion"));
            }
            let known = [SERVICES, SLICES, NODES, "/readyz"].contains(&path) || path.ends_with("s");
            let (code, body) = match known {
                true => ("200 OK", self.list(path, number("continue"), number("limit"))),
                false => ("404 Not Found", json!({"kind": "Status", "code": 404, "reason": "NotFound"}).to_string()),
            };
            write!(out, "HTTP/1.1 {code}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len())
                .ok()?;
            out.write_all(body.as_bytes()).ok()?;
        }
    }

    fn list(&self, path: &str, from: usize, limit: usize) -> String {
        let state = self.state.0.lock().unwrap();
        let empty = BTreeMap::new();
        let all = state.objects.get(path).unwrap_or(&empty);
        let limit = if limit == 0 { usize::MAX } else { limit };
        let items: Vec<&str> = all.values().skip(from).take(limit).map(|o| &**o).collect();
        let next = if from + items.len() < all.len() { (from + items.len()).to_string() } else { String::new() };
        let meta = json!({"resourceVersion": state.events.len().to_string(), "continue": next});
        format!(r#"{{"kind":"List","apiVersion":"v1","metadata":{meta},"items":[{}]}}"#, items.join(","))
    }

    fn watch(&self, out: &mut TcpStream, path: &str, mut from: usize) -> Option<()> {
        write!(out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n").ok()?;
        let (state, changed) = &*self.state;
        loop {
            let mut guard = state.lock().unwrap();
            while guard.events.len() <= from {
                guard = changed.wait(guard).unwrap();
            }
            let mut chunk = String::new();
            guard.events[from..].iter().filter(|(p, _)| p == path).for_each(|(_, e)| {
                chunk.push_str(e);
                chunk.push('\n');
            });
            from = guard.events.len();
            drop(guard);
            if !chunk.is_empty() {
                write!(out, "{:x}\r\n{chunk}\r\n", chunk.len()).ok()?;
            }
        }
    }
}

/// A service with one TCP port 80 to port 8080 of its endpoints.
pub fn service(name: &str, address: &str) -> Value {
    json!({"metadata": {"namespace": "load", "name": name},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
            "ports": [{"name": "web", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}})
}

/// The endpoints of a service: address, and whether it is ready.
pub fn slice(service: &str, endpoints: impl Iterator<Item = (String, bool)>) -> Value {
    let endpoints: Vec<Value> = endpoints
        .map(|(address, ready)| {
            json!({"addresses": [address], "nodeName": "other",
                "conditions": {"ready": ready, "serving": true, "terminating": !ready}})
        })
        .collect();
    json!({"metadata": {"namespace": "load", "name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}]})
}

/// Moves the calling thread into an empty network namespace with a loopback link that has all addresses of pods and
/// services on it.
pub fn own_network() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("tests of the data plane need root");
    for line in [
        "ip link set lo up",
        // Every address in there is this host's: backends listen on them, services are reached through a route.
        "ip route add local 10.244.0.0/16 dev lo",
        "ip addr add 192.0.2.1/32 dev lo",
        // Clients are pods: those outside are masqueraded, and with tens of thousands of connections a minute the kernel
        // gives them ports that the other end still has in TIME_WAIT.
        "ip route add 10.64.0.0/10 dev lo src 10.244.255.254",
    ] {
        let mut words = line.split_whitespace();
        assert!(Command::new(words.next().unwrap()).args(words).status().unwrap().success(), "{line}");
    }
}

/// `isopod proxy` fed by a [`Feed`].
pub struct Proxy {
    dir: PathBuf,
    child: Child,
}

impl Proxy {
    /// Starts it in the calling thread's network; `dir` is for its files.
    pub fn start(feed: &Feed, dir: &Path, isopod: &Path) -> Self {
        Self::start_with(feed, dir, isopod, &[])
    }

    /// The same with more options.
    pub fn start_with(feed: &Feed, dir: &Path, isopod: &Path, more: &[&str]) -> Self {
        let kubeconfig = dir.join("kubeconfig");
        let server = format!("http://{}", feed.address);
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
        std::fs::write(&kubeconfig, config.to_string()).unwrap();
        let log = std::fs::File::create(dir.join("proxy.log")).unwrap();
        let child = Command::new(isopod)
            .args(["proxy", "--hostname-override", "me", "--cluster-dns", "10.96.0.10", "--kubeconfig"])
            .arg(&kubeconfig)
            .args(more)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { dir: dir.into(), child }
    }

    /// What it said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("proxy.log")).unwrap()
    }

    /// Waits until it has loaded everything; the line that says so.
    pub fn loaded(&self) -> String {
        eventually("the proxy has loaded its rules", || {
            let log = self.log();
            log.lines().find(|l| l.contains("service rules loaded")).map(str::to_owned).ok_or(log)
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Killed before, or killed now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a connection went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Who answered.
    Answer(String),
    /// Nobody.
    Failed(std::io::ErrorKind),
}

/// Connects and reads who answers.
pub fn ask(to: SocketAddr) -> Asked {
    ask_within(Duration::from_secs(3), to)
}

/// As [`ask`], with less patience: a first packet that was lost is repeated after a second only.
pub fn ask_within(patience: Duration, to: SocketAddr) -> Asked {
    let read = || {
        let stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        std::io::read_to_string(stream)
    };
    match read() {
        Ok(name) => Asked::Answer(name),
        Err(error) => Asked::Failed(error.kind()),
    }
}

/// A server that says its own address to everybody, until dropped.
pub struct Backend {
    stop: Arc<std::sync::atomic::AtomicBool>,
    address: SocketAddr,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Backend {
    /// Listens on port 8080 of an address.
    pub fn start(address: &str) -> Self {
        let listener = TcpListener::bind((address, 8080)).unwrap();
        let (name, stop) = (address.to_owned(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                let _ = stream.and_then(|mut s| s.write_all(name.as_bytes()));
            }
        });
        Self { stop, address: (address.parse::<std::net::IpAddr>().unwrap(), 8080).into(), thread: Some(thread) }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Runs `body` again and again on a thread until the closure that is returned is called; that returns what it returned.
pub fn meanwhile<T: Send + 'static>(
    mut body: impl FnMut() -> T + Send + 'static,
) -> impl FnOnce() -> Vec<(Instant, T)> {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = stop.clone();
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        while !ended.load(std::sync::atomic::Ordering::SeqCst) {
            let started = Instant::now();
            all.push((started, body()));
        }
        all
    });
    move || {
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        thread.join().unwrap()
    }
}
