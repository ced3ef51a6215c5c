//! Pods from their creation to Ready and from their deletion until they are gone. Runs on the host.

use std::{collections::BTreeSet, time::Instant};

use futures::{StreamExt, future::join_all, stream::BoxStream};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams},
};
use serde_json::{Value, json};

use crate::{row, times};

/// What a pod has besides its one container.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Probed,
    Volumes,
}

impl Kind {
    fn all() -> [(Self, &'static str); 3] {
        [(Self::Plain, ""), (Self::Probed, ", with a readiness probe"), (Self::Volumes, ", with 5 volumes")]
    }

    fn pod(self, name: &str) -> Pod {
        let mut container = json!({"name": "c", "image": "busybox:1", "imagePullPolicy": "IfNotPresent",
                                   "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"]});
        let mut volumes = json!([]);
        match self {
            Self::Plain => {}
            Self::Probed => container["readinessProbe"] = json!({"exec": {"command": ["true"]}, "periodSeconds": 1}),
            Self::Volumes => {
                volumes = json!([
                    {"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}},
                    {"name": "map", "configMap": {"name": "bench"}}, {"name": "secret", "secret": {"secretName": "bench"}},
                    {"name": "all", "projected": {"sources": [
                        {"configMap": {"name": "bench"}}, {"serviceAccountToken": {"path": "token"}},
                        {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}}]}}]);
                let mounts = volumes.as_array().unwrap().iter().map(|v| &v["name"]);
                let mounts =
                    mounts.map(|name| json!({"name": name, "mountPath": format!("/v/{}", name.as_str().unwrap())}));
                container["volumeMounts"] = Value::Array(mounts.collect());
            }
        }
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 10, "containers": [container], "volumes": volumes},
        }))
        .unwrap()
    }
}

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

type Events = BoxStream<'static, kube::Result<WatchEvent<Pod>>>;

async fn watch(pods: &Api<Pod>, params: &WatchParams) -> Events {
    let version = pods.list_metadata(&ListParams::default().limit(1)).await.unwrap().metadata.resource_version;
    pods.watch(params, &version.unwrap_or_default()).await.unwrap().boxed()
}

/// Until as many pods as wanted are what `fits` wants of an event.
async fn until(events: &mut Events, n: usize, fits: impl Fn(&WatchEvent<Pod>) -> Option<String>) {
    let mut seen = BTreeSet::new();
    while seen.len() < n {
        match events.next().await {
            Some(Ok(event)) => seen.extend(fits(&event)),
            Some(Err(error)) => panic!("the watch failed: {error}"),
            None => panic!("the watch ended with {} of {n} pods", seen.len()),
        }
    }
}

fn becomes_ready(event: &WatchEvent<Pod>) -> Option<String> {
    match event {
        WatchEvent::Added(pod) | WatchEvent::Modified(pod) if ready(pod) => pod.metadata.name.clone(),
        _ => None,
    }
}

fn goes(event: &WatchEvent<Pod>) -> Option<String> {
    match event {
        WatchEvent::Deleted(pod) => pod.metadata.name.clone(),
        _ => None,
    }
}

/// The objects that volumes are made of.
async fn content(client: &Client) {
    let object = |data: &str| json!({"metadata": {"name": "bench"}, data: {"key": "value"}});
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let secrets: Api<Secret> = Api::default_namespaced(client.clone());
    // Made already by an earlier part.
    let _ = maps.create(&PostParams::default(), &serde_json::from_value(object("data")).unwrap()).await;
    let _ = secrets.create(&PostParams::default(), &serde_json::from_value(object("stringData")).unwrap()).await;
}

/// Pods one after the other, and `at_once` of each kind together.
pub(crate) async fn run(client: Client, one_by_one: usize, at_once: &[usize]) {
    content(&client).await;
    let pods: Api<Pod> = Api::default_namespaced(client);
    for (kind, name) in Kind::all() {
        singly(&pods, kind, name, one_by_one).await;
    }
    for n in at_once {
        for (kind, name) in Kind::all() {
            together(&pods, kind, name, *n).await;
        }
    }
}

async fn singly(pods: &Api<Pod>, kind: Kind, what: &str, n: usize) {
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for n in 0..n {
        let name = format!("one-{n}");
        let params = WatchParams::default().fields(&format!("metadata.name={name}"));
        let mut events = watch(pods, &params).await;
        let started = Instant::now();
        pods.create(&PostParams::default(), &kind.pod(&name)).await.unwrap();
        until(&mut events, 1, becomes_ready).await;
        starts.push(started.elapsed());
        let started = Instant::now();
        pods.delete(&name, &DeleteParams::default()).await.unwrap();
        until(&mut events, 1, goes).await;
        ends.push(started.elapsed());
    }
    row(&format!("pod create -> Ready, one by one{what}"), &times(starts));
    row(&format!("pod delete -> gone, ends at SIGTERM{what}"), &times(ends));
}

async fn together(pods: &Api<Pod>, kind: Kind, what: &str, n: usize) {
    let mut events = watch(pods, &WatchParams::default()).await;
    let started = Instant::now();
    create(pods, kind, 0..n).await;
    until(&mut events, n, becomes_ready).await;
    row(&format!("{n} pods at once -> all Ready{what}"), &format!("{:.2} s", started.elapsed().as_secs_f64()));
    empty(pods, events, n, what).await;
}

async fn empty(pods: &Api<Pod>, mut events: Events, n: usize, what: &str) {
    let started = Instant::now();
    pods.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
    until(&mut events, n, goes).await;
    row(&format!("{n} pods deleted at once -> all gone{what}"), &format!("{:.2} s", started.elapsed().as_secs_f64()));
}

/// All pods go.
pub(crate) async fn delete(client: Client, n: usize) {
    let pods: Api<Pod> = Api::default_namespaced(client);
    let events = watch(&pods, &WatchParams::default()).await;
    empty(&pods, events, n, "").await;
}

async fn create(pods: &Api<Pod>, kind: Kind, numbers: std::ops::Range<usize>) {
    let creates = numbers.map(|i| {
        let pods = pods.clone();
        async move { pods.create(&PostParams::default(), &kind.pod(&format!("many-{i}"))).await.map(drop) }
    });
    join_all(creates).await.into_iter().collect::<Result<Vec<_>, _>>().unwrap();
}

/// More plain pods, fifty at a time: until there are so many.
pub(crate) async fn fill(client: Client, from: usize, to: usize) {
    let pods: Api<Pod> = Api::default_namespaced(client);
    for start in (from..to).step_by(50) {
        let end = to.min(start + 50);
        let mut events = watch(&pods, &WatchParams::default()).await;
        create(&pods, Kind::Plain, start..end).await;
        until(&mut events, end - start, becomes_ready).await;
    }
}
