//! Services as pods and the node see them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use isopod_tests::{Cluster, Net, eventually};

fn three_pods(c: &Cluster) {
    c.k("create deployment web --image=web:1 --replicas=3");
    c.k("expose deployment web --port=80 --target-port=8080 --type=NodePort");
    c.k("run client --image=busybox:1 -- sleep 100000");
    c.wait_ready("client");
    c.k("rollout status deployment/web --timeout=60s");
    endpoints(c, 3);
}

fn endpoints(c: &Cluster, n: usize) {
    c.wait_field("endpointslices -l kubernetes.io/service-name=web", ".items[*].endpoints[*].addresses[0]", |list| {
        list.split_whitespace().count() == n
    });
}

/// Who answered, counted.
fn answers(text: &str) -> BTreeMap<String, u32> {
    let mut count = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        *count.entry(line.trim().to_owned()).or_default() += 1;
    }
    count
}

#[test]
fn traffic_reaches_every_pod_from_everywhere() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    three_pods(&c);
    let service = c.get("service web");
    let ip = service["spec"]["clusterIP"].as_str().unwrap();
    let node_port = service["spec"]["ports"][0]["nodePort"].as_i64().unwrap();
    let from_pod =
        answers(&c.k(&format!("exec client -- sh -c 'for i in $(seq 90); do wget -q -O- http://{ip}/; done'")));
    assert_eq!(from_pod.len(), 3, "{from_pod:?}");
    assert!(from_pod.values().all(|n| *n >= 10), "{from_pod:?}");
    let loop_ = |url: &str| c.host.must(&format!("for i in $(seq 60); do curl -s -m 5 {url}; done"));
    let from_node = answers(&loop_(&format!("http://{ip}/")));
    assert_eq!(from_node.len(), 3, "{from_node:?}");
    for address in [c.host.address.as_str(), "127.0.0.1"] {
        let answered = answers(&loop_(&format!("http://{address}:{node_port}/")));
        assert_eq!(answered.len(), 3, "{address}: {answered:?}");
    }
    for name in ["web", "web.default", "web.default.svc.cluster.local"] {
        let by_name = c.k(&format!("exec client -- wget -q -O- http://{name}/"));
        assert!(by_name.starts_with("web-"), "{name}: {by_name}");
    }
    c.k("scale deployment web --replicas=1");
    endpoints(&c, 1);
    let started = Instant::now();
    eventually("one pod answers alone", || {
        let text = c.host.must(&format!("for i in $(seq 30); do curl -s -m 5 http://{ip}/; done"));
        if answers(&text).len() == 1 { Ok(()) } else { Err(text) }
    });
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_service_without_endpoints_refuses_at_once() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("create service clusterip empty --tcp=80:80");
    let ip = c.get("service empty")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    eventually("connection refused", || {
        let ran = c.host.sh(&format!("curl -s -m 5 http://{ip}/"));
        // 7: refused; 28 would be a timeout.
        if ran.code == 7 { Ok(()) } else { Err(ran) }
    });
}

#[test]
fn readiness_decides_who_gets_traffic() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 2\n  selector: {matchLabels: {app: web}}\n  \
         template:\n    metadata: {labels: {app: web}}\n    spec:\n      containers:\n      - name: web\n        image: web:1\n        \
         readinessProbe: {exec: {command: [test, '!', -e, /tmp/down]}, periodSeconds: 1, failureThreshold: 1}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n",
    );
    c.k("rollout status deployment/web --timeout=60s");
    let pods = c.k("get pods -l app=web -o jsonpath='{.items[*].metadata.name}'");
    let first = pods.split_whitespace().next().unwrap().to_owned();
    c.k(&format!("exec {first} -- touch /tmp/down"));
    c.wait_field(&format!("pod {first}"), ".status.containerStatuses[0].ready", |ready| ready == "false");
    let ip = c.get("service web")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    eventually("the unready pod gets nothing", || {
        let text = c.host.must(&format!("for i in $(seq 20); do curl -s -m 5 http://{ip}/; done"));
        if text.contains(&first) { Err(text) } else { Ok(()) }
    });
    c.k(&format!("exec {first} -- rm /tmp/down"));
    eventually("the pod is back", || {
        let text = c.host.must(&format!("for i in $(seq 20); do curl -s -m 5 http://{ip}/; done"));
        if text.contains(&first) { Ok(()) } else { Err(text) }
    });
    let events = c.k("get events --field-selector reason=Unhealthy");
    assert!(events.contains("Readiness probe failed"), "{events}");
}

#[test]
fn clients_stick_and_names_resolve_under_load() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: sticky}\nspec: {selector: {app: web}, sessionAffinity: ClientIP, \
         ports: [{port: 80, targetPort: 8080}]}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: mapped}\nspec:\n  containers: [{name: c, image: 'web:1', ports: \
         [{containerPort: 8080, hostPort: 8088}]}]\n",
    );
    three_pods(&c);
    c.wait_ready("mapped");
    let sticky = "exec client -- sh -c 'for i in $(seq 30); do wget -q -O- http://sticky/; done'";
    eventually("one pod answers one client", || {
        let text = c.k(sticky);
        let answered = answers(&text);
        if answered.len() == 1 && answered.values().all(|n| *n == 30) { Ok(()) } else { Err(text) }
    });
    let mapped = format!("http://{}:8088/", c.host.address);
    assert_eq!(c.host.must(&format!("curl -s -m 5 {mapped}")).trim(), "mapped");
    assert_eq!(c.host.must("curl -s -m 5 http://127.0.0.1:8088/").trim(), "mapped");
    assert_eq!(c.k(&format!("exec client -- wget -q -O- {mapped}")).trim(), "mapped");
    let load = answers(&c.k("exec client -- sh -c 'for i in $(seq 8); do (for j in $(seq 50); do \
         nslookup web.default.svc.cluster.local >/dev/null 2>&1 && echo ok || echo lost; done) & done; wait'"));
    assert_eq!(load, BTreeMap::from([("ok".to_owned(), 400)]));
}
