//! Tables and traces from objects as the API server lists them.

use serde_json::{Value, json};

use super::*;

fn from<T: serde::de::DeserializeOwned>(list: Value) -> Vec<T> {
    serde_json::from_value(list).unwrap()
}

fn snapshot() -> Snapshot {
    let config =
        crate::Config { node_ips: vec!["192.0.2.1".parse().unwrap()], ..crate::Config::new("one", "isopod", "isobr0") };
    let mut all = Snapshot::new(&config, None);
    let service = |name: &str, spec: Value| json!({ "metadata": { "namespace": "shop", "name": name }, "spec": spec });
    let services = json!([
        service(
            "web",
            json!({ "type": "NodePort", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"],
            "sessionAffinity": "ClientIP", "ports": [{ "name": "http", "port": 80, "nodePort": 30080 }] })
        ),
        service(
            "two",
            json!({ "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
            "ports": [{ "name": "http", "port": 80 }, { "name": "https", "port": 443 }] })
        ),
        service("empty", json!({ "clusterIP": "10.96.0.6", "clusterIPs": ["10.96.0.6"], "ports": [{ "port": 80 }] })),
    ]);
    let endpoint =
        |ip: &str, node: &str| json!({ "addresses": [ip], "nodeName": node, "conditions": { "ready": true } });
    let slices = json!([{ "metadata": { "namespace": "shop", "name": "web-1", "labels": {
        "kubernetes.io/service-name": "web" } }, "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080,
        "protocol": "TCP" }], "endpoints": [endpoint("10.244.0.2", "one"), endpoint("10.244.1.2", "two")] }]);
    let pod = |name: &str, ip: &str, node: &str, app: &str| {
        json!({ "metadata": { "namespace": "shop", "name": name, "labels": { "app": app } },
            "spec": { "nodeName": node, "containers": [] },
            "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }] } })
    };
    let pods = json!([
        pod("web-a", "10.244.0.2", "one", "web"),
        pod("web-b", "10.244.1.2", "two", "other"),
        pod("client", "10.244.0.9", "one", "client"),
    ]);
    let policies = json!([{ "metadata": { "namespace": "shop", "name": "closed" }, "spec": {
        "podSelector": { "matchLabels": { "app": "other" } }, "policyTypes": ["Ingress"] } }]);
    all.load_services(from(services), from(slices));
    all.load_policies(from(pods), from(json!([{ "metadata": { "name": "shop" } }])), from(policies));
    all
}

#[test]
fn services_read_as_a_table() {
    let rows = snapshot().services();
    let lines: Vec<String> = rows
        .iter()
        .map(|r| format!("{} {} {} [{}] {}", r.namespace, r.name, r.at, r.via, r.endpoints.join(" ")))
        .collect();
    assert_eq!(
        lines,
        [
            "shop empty 10.96.0.6:80/TCP [cluster address] ",
            "shop two 10.96.0.7:80/TCP [cluster address] ",
            "shop two 10.96.0.7:443/TCP [cluster address] ",
            "shop web 10.96.0.5:80/TCP [cluster address, sticky for 10800 s] 10.244.0.2:8080 (web-a*) 10.244.1.2:8080 (web-b)",
            "shop web *:30080/TCP [node port, sticky for 10800 s] 10.244.0.2:8080 (web-a*) 10.244.1.2:8080 (web-b)",
        ]
    );
}

#[test]
fn a_trace_tells_every_step() {
    let all = snapshot();
    let text = all.trace("shop/client", "web:http").unwrap().to_string();
    assert_eq!(
        text,
        "\
from     pod shop/client at 10.244.0.9 on node one
name     web.shop.svc.cluster.local is 10.96.0.5
to       10.96.0.5:80/TCP
service  shop/web port http: cluster address, sticky for 10800 s
nat      the destination becomes one of 2 endpoints, each as likely for a new client; the source stays
endpoint 10.244.1.2:8080 (web-b): DROPPED by policies on the way in (closed)
endpoint 10.244.0.2:8080 (web-a*): allowed, no policy is about it
reply    connection tracking turns answers back: the client sees 10.96.0.5:80
verdict  gets through to 1 of 2 endpoints, by chance
"
    );
    let verdict = |from: &str, to: &str| all.trace(from, to).unwrap().steps.pop().unwrap().1;
    assert!(verdict("shop/client", "empty:80").starts_with("refused"));
    assert!(verdict("shop/client", "10.96.0.5:81").starts_with("refused"));
    assert_eq!(verdict("10.244.0.9", "10.244.1.2:8080"), "does not get through");
    assert_eq!(verdict("node", "192.0.2.1:30080"), "gets through to 1 of 2 endpoints, by chance");
    assert!(!all.trace("shop/client", "10.244.1.2:1").unwrap().reaches);
    // As people type: the beginning of a name, the only port, a port's name.
    assert_eq!(all.trace("cli", "web").unwrap(), all.trace("shop/client", "web:http").unwrap());
    assert!(all.trace("web-b", "web").unwrap().steps[0].1.ends_with("on node two (seen from node one)"));
}

#[test]
fn many_endpoints_are_counted() {
    let step = |n: usize| ("endpoint", format!("e{n}"));
    let shown = |count: usize| {
        let mut steps: Vec<_> = (0..count).map(step).collect();
        steps.push(("verdict", "v".into()));
        Traced { steps, reaches: true }.to_string().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(shown(11).len(), 12);
    let many = shown(1000);
    assert_eq!(many.len(), 12);
    assert_eq!(many[10..], ["endpoint and 990 more: --json shows them all", "verdict  v"]);
}

#[test]
fn what_does_not_exist_is_said() {
    let all = snapshot();
    let error = |from: &str, to: &str| all.trace(from, to).unwrap_err().to_string();
    assert!(error("nobody", "web:80").starts_with("no pod nobody"));
    assert!(error("shop/client", "web:").contains("is no target"));
    assert!(error("shop/client", "10.244.1.2").contains("is no target"), "no service's address");
    assert_eq!(error("client", "two"), "which port of two? It has 80/tcp (http), 443/tcp (https)");
    assert_eq!(error("web", "web:80"), "\"web\" may be any of shop/web-a, shop/web-b: name one of them");
    assert!(error("shop/client", "web:80/icmp").contains("is no target"));
    assert!(error("shop/client", "nothing:80").contains("no address for nothing"));
}
