//! The API server alone: writes, reads, watchers, and what it keeps in memory for them. Runs on its host.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{AsyncBufReadExt, AsyncReadExt, StreamExt, future::join_all, stream::FuturesUnordered};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Pod},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::Mutex;

use crate::{row, times};

const PODS: &str = "/api/v1/namespaces/default/pods";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const JSON: &str = "application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
/// How many clients ask at once.
const CLIENTS: [usize; 4] = [1, 16, 64, 128];

/// A client with a connection of its own: what an API server sees of that many programs.
async fn own_client() -> Client {
    Client::try_default().await.unwrap()
}

/// Resident memory of the API server in KiB.
fn resident() -> u64 {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok).map(|entry| entry.path());
    let own = processes.filter(|path| {
        let line = std::fs::read(path.join("cmdline")).unwrap_or_default();
        let mut words = line.split(|b| *b == 0);
        words.next().is_some_and(|program| program.ends_with(b"isopod")) && words.next() == Some(b"apiserver")
    });
    let size = |path: std::path::PathBuf| -> Option<u64> {
        let status = std::fs::read_to_string(path.join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()
    };
    own.filter_map(size).max().unwrap_or_default()
}

/// The rows of the API server: all of them, or one part (`creates`, `slices`, `stored`, `watched`).
pub(crate) async fn run(part: Option<&str>) {
    let wanted = |name: &str| part.is_none_or(|part| part == name);
    if wanted("creates") {
        creates().await;
    }
    if wanted("slices") {
        slices().await;
    }
    if wanted("stored") {
        stored().await;
    }
    if wanted("watched") {
        for watchers in [1_000, 10_000] {
            watched(watchers).await;
        }
    }
}

async fn stored() {
    let client = own_client().await;
    let before = resident();
    let mut made = 0;
    for total in [5_000, 50_000] {
        fill(&client, made, total).await;
        made = total;
        lists(total).await;
    }
    let full = resident();
    row("RSS of the API server at 50,000 pods", &format!("{:.1} MiB", full as f64 / 1024.0));
    let each = full.saturating_sub(before) as f64 * 1024.0 / made as f64;
    row("memory per stored pod", &format!("{each:.0} bytes"));
    gets().await;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()).await.unwrap();
}

async fn creates() {
    let data = "x".repeat(1024);
    for clients in CLIENTS {
        let each = if clients == 1 { 500 } else { 6_400 / clients };
        let ready = join_all((0..clients).map(|_| connected())).await;
        let started = Instant::now();
        let work = ready.into_iter().enumerate().map(|(c, client)| {
            let data = data.clone();
            tokio::spawn(async move {
                let maps: Api<ConfigMap> = Api::default_namespaced(client);
                for i in 0..each {
                    let map = json!({"metadata": {"name": format!("api-{clients}-{c}-{i}")}, "data": {"x": data}});
                    maps.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await.unwrap();
                }
            })
        });
        for result in join_all(work).await {
            result.unwrap();
        }
        let rate = (each * clients) as f64 / started.elapsed().as_secs_f64();
        row(&format!("durable 1 KiB creates, {clients} clients"), &format!("{rate:.0} per second"));
    }
    let maps: Api<ConfigMap> = Api::default_namespaced(own_client().await);
    maps.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
}

/// A pod as a Deployment makes them, gated so that nobody runs it.
fn pod(n: usize) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": format!("listed-{n}"), "labels": {"app": "listed", "shard": (n % 100).to_string()}},
        "spec": {"schedulingGates": [{"name": "bench/none"}], "containers": [{
            "name": "c", "image": "registry.example.com/team/service:1.2.3",
            "env": [{"name": "MODE", "value": "production"}, {"name": "REGION", "value": "north"}],
            "ports": [{"containerPort": 8080, "name": "http"}],
            "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
            "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}}}]},
    }))
    .unwrap()
}

async fn fill(client: &Client, from: usize, to: usize) {
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    make((from..to).map(|n| {
        let pods = pods.clone();
        async move { pods.create(&PostParams::default(), &pod(n)).await.map(drop) }
    }))
    .await;
}

/// Awaits creations, 64 at a time.
async fn make(all: impl Iterator<Item = impl Future<Output = kube::Result<()>>>) {
    let mut creating = FuturesUnordered::new();
    for one in all {
        creating.push(one);
        if creating.len() >= 64 {
            creating.next().await.unwrap().unwrap();
        }
    }
    while let Some(result) = creating.next().await {
        result.unwrap();
    }
}

/// One answer, read to its end and dropped; its size.
async fn read(client: &Client, uri: &str, accept: &str, buffer: &mut [u8]) -> usize {
    let request = http::Request::get(uri).header("accept", accept).body(Vec::new()).unwrap();
    let mut stream = std::pin::pin!(client.request_stream(request).await.unwrap());
    let mut size = 0;
    loop {
        match stream.read(buffer).await.unwrap() {
            0 => return size,
            n => size += n,
        }
    }
}

async fn lists(total: usize) {
    let client = own_client().await;
    let mut buffer = vec![0; 1 << 18];
    for (name, accept) in [("JSON", JSON), ("protobuf", PROTOBUF)] {
        let (mut all, mut size) = (Vec::new(), 0);
        for _ in 0..5 {
            let started = Instant::now();
            size = read(&client, PODS, accept, &mut buffer).await;
            all.push(started.elapsed());
        }
        row(&format!("list of {total} pods, {name} ({:.1} MB)", size as f64 / 1e6), &times(all));
    }
}

/// How many answers a second so many clients get, each on a connection of its own.
async fn rate(clients: usize, uri: &str, accept: &'static str) -> (f64, usize) {
    let ready = join_all((0..clients).map(|_| connected())).await;
    let started = Instant::now();
    let work = ready.into_iter().map(|client| {
        let uri = uri.to_owned();
        tokio::spawn(async move {
            let (mut n, mut size, mut buffer) = (0, 0, vec![0; 1 << 16]);
            while started.elapsed() < Duration::from_secs(4) {
                size = read(&client, &uri, accept, &mut buffer).await;
                n += 1;
            }
            (n, size)
        })
    });
    let done: Vec<(u32, usize)> = join_all(work).await.into_iter().map(Result::unwrap).collect();
    let n: u32 = done.iter().map(|(n, _)| n).sum();
    (f64::from(n) / started.elapsed().as_secs_f64(), done[0].1)
}

async fn gets() {
    for clients in CLIENTS {
        let (rate, _) = rate(clients, &format!("{PODS}/listed-7"), JSON).await;
        row(&format!("get of one object, {clients} clients, 50,000 pods there"), &format!("{rate:.0} per second"));
    }
}

/// Upstream's measure of lists: 5,000 EndpointSlices of 2.6 KB.
async fn slices() {
    let api: Api<EndpointSlice> = Api::default_namespaced(own_client().await);
    make((0..5_000).map(|n| {
        let endpoint = |i: usize| {
            json!({"addresses": [format!("10.{}.{}.{i}", n / 250, n % 250)], "nodeName": format!("node-{i}"),
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("listed-{n}-{i}")}})
        };
        let slice = json!({"metadata": {"name": format!("listed-{n}"), "labels": {"bench": "listed"}}, "addressType": "IPv4",
            "endpoints": (1..=11).map(endpoint).collect::<Vec<_>>(), "ports": [{"name": "http", "port": 80}]});
        let api = api.clone();
        async move { api.create(&PostParams::default(), &serde_json::from_value(slice).unwrap()).await.map(drop) }
    }))
    .await;
    for (name, accept) in [("JSON", JSON), ("protobuf", PROTOBUF)] {
        for clients in CLIENTS {
            let (rate, size) = rate(clients, SLICES, accept).await;
            let what = format!("list of 5,000 EndpointSlices, {name} ({:.1} MB), {clients} clients", size as f64 / 1e6);
            row(&what, &format!("{rate:.1} per second"));
        }
    }
    api.delete_collection(&DeleteParams::default(), &ListParams::default().labels("bench=listed")).await.unwrap();
}

/// Opens so many watches at once; this client speaks HTTP/1.1, so each has a connection.
async fn open(client: &Client, uri: &str, n: usize) -> Vec<impl futures::AsyncBufRead + use<>> {
    let request = |_| {
        let (client, request) = (client.clone(), http::Request::get(uri).body(Vec::new()).unwrap());
        async move { client.request_stream(request).await.unwrap() }
    };
    futures::stream::iter(0..n).map(request).buffer_unordered(200).collect().await
}

/// A client whose connection is there.
async fn connected() -> Client {
    let client = own_client().await;
    client.request_text(http::Request::get("/version").body(Vec::new()).unwrap()).await.unwrap();
    client
}

/// So many watchers of one ConfigMap: what an idle one costs, and when each hears of a change.
async fn watched(watchers: usize) {
    let client = own_client().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let name = format!("watched-{watchers}");
    let map = json!({"metadata": {"name": name}});
    let made = maps.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await.unwrap();
    let version = made.metadata.resource_version.unwrap();
    let uri = format!(
        "/api/v1/namespaces/default/configmaps?watch=true&fieldSelector=metadata.name%3D{name}&resourceVersion={version}"
    );
    let each = |from: u64| format!("{:.0} bytes", resident().saturating_sub(from) as f64 * 1024.0 / watchers as f64);
    let before = resident();
    let streams = if watchers == 1_000 {
        // Connections that have served a read: what a watch adds to them is the watcher's.
        let connected = join_all((0..watchers).map(|_| connected())).await;
        row(&format!("memory per idle connection, {watchers}"), &each(before));
        let before = resident();
        let opened = join_all(connected.iter().map(|client| open(client, &uri, 1))).await;
        row(&format!("memory per idle watcher beyond its connection, {watchers}"), &each(before));
        opened.into_iter().flatten().collect()
    } else {
        let opened = open(&client, &uri, watchers).await;
        row(&format!("memory per idle watcher with its connection, {watchers}"), &each(before));
        opened
    };
    let heard: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let mut tasks = Vec::new();
    for stream in streams {
        let heard = Arc::clone(&heard);
        tasks.push(tokio::spawn(async move {
            let stream = std::pin::pin!(stream);
            if let Some(Ok(line)) = stream.lines().next().await {
                assert!(line.contains("MODIFIED"), "{line}");
                heard.lock().await.push(Instant::now());
            }
        }));
    }
    let started = Instant::now();
    let change = json!({"data": {"a": "b"}});
    maps.patch(&name, &PatchParams::default(), &Patch::Merge(&change)).await.unwrap();
    let total = tasks.len();
    for task in tasks {
        task.await.unwrap();
    }
    let delays = heard.lock().await.iter().map(|at| at.duration_since(started)).collect();
    row(&format!("one change to {total} watchers"), &times(delays));
    maps.delete(&name, &DeleteParams::default()).await.unwrap();
}
