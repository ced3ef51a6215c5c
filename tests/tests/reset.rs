//! What `down` and `reset` leave behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, snapshot::Snapshot};

#[test]
fn reset_leaves_nothing() {
    let mut net = Net::new();
    let host = net.host("one");
    let before = Snapshot::take(&host);
    let mut c = Cluster::start(&host);
    c.k("create deployment web --image=web:1 --replicas=3");
    c.k("expose deployment web --port=80 --target-port=8080 --type=NodePort");
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n  - {name: c, image: 'web:1', \
         ports: [{containerPort: 8080, hostPort: 9090}], volumeMounts: [{name: m, mountPath: /m}]}\n  \
         volumes: [{name: m, emptyDir: {medium: Memory}}]\n",
    );
    c.k("rollout status deployment/web --timeout=60s");
    c.wait_ready("p");
    assert!(c.host.must("curl -s http://127.0.0.1:9090/").starts_with('p'));
    assert_eq!(c.isopod(&["reset"]).code, 64);
    let ran = c.isopod(&["reset", "--yes"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    c.wait_up();
    assert_eq!(before.diff(&Snapshot::take(&host)), Vec::<String>::new());
    let left =
        host.must("find /etc/isopod /var/lib/isopod /var/log/pods -type f 2>/dev/null | grep -v images/ || true");
    assert_eq!(left, "");
}

#[test]
fn down_keeps_the_data_and_up_goes_on() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.k("create configmap kept --from-literal=a=b");
    let ran = c.isopod(&["down"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    c.wait_up();
    assert_eq!(c.host.sh("pgrep isopod").code, 1);
    c.up();
    assert_eq!(c.get("configmap kept")["data"]["a"], "b");
}
