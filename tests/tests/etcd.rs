//! A cluster moves to etcd and two API servers share it: nothing is lost, and each sees at once what the other did.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, process::Child};

use isopod_tests::{Cluster, Host, Net, eventually};
use serde_json::Value;

/// Ends what it started.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn etcd(host: &Host) -> Running {
    let url = "http://127.0.0.1:2379";
    let args = ["--data-dir=/var/lib/isopod/etcd", "--listen-client-urls", url, "--advertise-client-urls", url];
    Running(host.spawn("etcd.log", "etcd", &args))
}

fn api_server(c: &Cluster, address: &str, port: &str) -> Running {
    let args = ["apiserver", "--store=etcd=http://127.0.0.1:2379", "--port", port, "--advertise-address", address];
    let program = isopod_tests::host::binaries().join("isopod");
    let child = Running(c.host.spawn(&format!("apiserver-{port}.log"), program.to_str().unwrap(), &args));
    eventually("the API server answers", || {
        c.kubectl(&format!("--server=https://127.0.0.1:{port} get --raw /readyz")).ok()
    });
    child
}

/// Names and resourceVersions of everything of some kinds.
fn versions(c: &Cluster, server: &str) -> Vec<String> {
    let text = c.k(&format!("{server} get configmaps,secrets,deployments,nodes,namespaces,clusterroles -A -o json"));
    let list: Value = serde_json::from_str(&text).unwrap();
    let meta = |item: &Value, field: &str| item["metadata"][field].as_str().unwrap_or_default().to_owned();
    let items = list["items"].as_array().unwrap().iter();
    items.map(|i| format!("{} {} {}", i["kind"], meta(i, "name"), meta(i, "resourceVersion"))).collect()
}

#[test]
fn a_cluster_moves_to_etcd_and_two_servers_share_it() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.k("create configmap before --from-literal=a=b");
    c.k("create deployment web --image=web:1");
    c.k("rollout status deployment/web --timeout=60s");
    let node = c.get("node one");
    let address = node["status"]["addresses"][0]["address"].as_str().unwrap();
    c.isopod(&["down"]);
    c.wait_up();
    let _etcd = etcd(&c.host);
    let moved = eventually("etcd is there", || {
        let ran = c.isopod(&["store", "move", "--from=/var/lib/isopod/server", "--to=etcd=http://127.0.0.1:2379"]);
        if ran.code == 0 { Ok(ran.out) } else { Err(ran.err) }
    });
    assert!(moved.contains("keys moved"), "{moved}");
    let again = c.isopod(&["store", "move", "--from=/var/lib/isopod/server", "--to=etcd=http://127.0.0.1:2379"]);
    assert!(again.code != 0 && again.err.contains("needs an empty etcd"), "{again:?}");

    let (one, two) = (api_server(&c, address, "7443"), api_server(&c, address, "7444"));
    let (a, b) = ("--server=https://127.0.0.1:7443", "--server=https://127.0.0.1:7444");
    assert_eq!(versions(&c, a), versions(&c, b));
    // What one has acknowledged, the other shows, whatever it is asked first.
    for i in 0..10 {
        let (from, to) = if i % 2 == 0 { (a, b) } else { (b, a) };
        c.k(&format!("{from} create configmap shared-{i} --from-literal=a={i}"));
        c.k(&format!("{to} patch configmap shared-{i} -p '{{\"data\":{{\"b\":\"c\"}}}}'"));
        assert_eq!(
            c.k(&format!("{from} get configmap shared-{i} -o jsonpath='{{.data.a}}{{.data.b}}'")),
            format!("{i}c")
        );
        c.k(&format!("{to} delete configmap shared-{i}"));
        assert!(c.kubectl(&format!("{from} get configmap shared-{i}")).err.contains("not found"));
    }
    // Services made on both at once get addresses and node ports of their own.
    c.host.must(&format!(
        "export KUBECONFIG=/etc/isopod/kubeconfig; for i in $(seq 12); do s={a}; [ $((i % 2)) = 0 ] && s={b}; \
         kubectl $s create service nodeport many-$i --tcp=80 > /dev/null & done; wait"
    ));
    let services: Value = serde_json::from_str(&c.k(&format!("{a} get services -o json"))).unwrap();
    let all = services["items"].as_array().unwrap();
    let unique = |path: &str| all.iter().filter_map(|s| s.pointer(path)).map(Value::to_string).collect::<BTreeSet<_>>();
    assert_eq!(all.len(), 13);
    assert_eq!(unique("/spec/clusterIP").len(), 13);
    assert_eq!(unique("/spec/ports/0/nodePort").len(), 12);
    // A watch on one hears of what the other does.
    let heard = c.host.must(&format!(
        "export KUBECONFIG=/etc/isopod/kubeconfig; kubectl {a} get configmaps -w -o name > /tmp/heard & pid=$!; \
         for i in $(seq 100); do grep -q before /tmp/heard && break; sleep 0.05; done; kubectl {b} create configmap news > /dev/null; \
         for i in $(seq 100); do grep -q news /tmp/heard && break; sleep 0.05; done; kill $pid; cat /tmp/heard; rm /tmp/heard"
    ));
    assert!(heard.contains("configmap/news"), "{heard}");
    assert_eq!(c.k(&format!("{a} get configmap before -o jsonpath='{{.data.a}}'")), "b");
    let known = versions(&c, a);
    drop((one, two));
    // And back: the cluster goes on where it was.
    c.host.must("rm -r /var/lib/isopod/server");
    let back = c.isopod(&["store", "move", "--from=etcd=http://127.0.0.1:2379", "--to=/var/lib/isopod/server"]);
    assert_eq!(back.code, 0, "{back:?}");
    c.up();
    let now = versions(&c, "");
    let kept = known.iter().filter(|line| now.contains(line)).count();
    assert!(kept * 10 > known.len() * 9, "{kept} of {} are as they were", known.len());
    c.k("rollout status deployment/web --timeout=60s");
}
