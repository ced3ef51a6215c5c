//! What `down` and `reset` leave behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{
    Cluster, Net, eventually,
    snapshot::{Snapshot, converges},
};

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
    c.k("create deployment web --image=web:1 --replicas=2");
    c.k("rollout status deployment/web --timeout=60s");
    let ran = c.isopod(&["down"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    c.wait_up();
    assert_eq!(c.host.sh("pgrep isopod").code, 1);
    c.up();
    assert_eq!(c.get("configmap kept")["data"]["a"], "b");
    // What was stopped on purpose is not missed.
    let log = fs::read_to_string(c.host.path("/var/log/isopod/agent.log")).unwrap();
    assert!(log.contains("pod was stopped with its node") && !log.contains("cannot be joined"), "{log}");
    // Containers of the same pods start again, in new sandboxes.
    c.wait_field("deployment web", ".status.readyReplicas", |n| n == "2");
    eventually("both serve", || {
        let running = c.host.sh("pgrep -xc httpd").out;
        if running.trim() == "2" { Ok(()) } else { Err(running) }
    });
}

#[test]
fn thirty_pods_come_and_go_and_leave_nothing() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.k("create deployment first --image=web:1");
    c.k("rollout status deployment/first --timeout=60s");
    c.k("delete deployment first");
    c.k("wait --for=delete pod -l app=first --timeout=60s");
    let before = Snapshot::settled(&c.host);
    c.k("create deployment web --image=web:1 --replicas=30");
    c.k("rollout status deployment/web --timeout=60s");
    c.k("delete deployment web");
    c.k("wait --for=delete pod -l app=web --timeout=60s");
    converges(&c.host, &before);
    // Once more, and the agent dies in the midst of it, again and again.
    c.k("create deployment web --image=web:1 --replicas=30");
    for part in [0, 5, 20] {
        eventually("some run", || {
            let running = c.host.sh("pgrep -xc httpd").out;
            if running.trim().parse::<u32>().is_ok_and(|n| n >= part) { Ok(()) } else { Err(running) }
        });
        c.kill_agent();
        c.up();
    }
    c.k("rollout status deployment/web --timeout=60s");
    let restarts = c.k("get pods -l app=web -o jsonpath='{.items[*].status.containerStatuses[0].restartCount}'");
    assert_eq!(restarts, ["0"; 30].join(" "));
    assert_eq!(c.host.must("pgrep -xc httpd").trim(), "30");
    c.k("delete deployment web --wait=false");
    c.kill_agent();
    c.up();
    c.k("wait --for=delete pod -l app=web --timeout=60s");
    converges(&c.host, &before);
}
