//! Killing processes at work: pods go on, services answer, nothing acknowledged is lost.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    process::{Command, Stdio},
};

use isopod_tests::{Cluster, Host, Net, eventually};

/// PIDs of pod processes (httpd), as the host sees them.
fn pod_pids(host: &Host) -> String {
    let mut pids: Vec<_> = host.must("pgrep -x httpd").split_whitespace().map(str::to_owned).collect();
    pids.sort();
    pids.join(" ")
}

fn restarts(c: &Cluster) -> String {
    c.k("get pods -l app=web -o jsonpath='{.items[*].status.containerStatuses[0].restartCount}'")
}

#[test]
fn agent_and_control_plane_die_and_nobody_notices() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.k("create deployment web --image=web:1 --replicas=3");
    c.k("expose deployment web --port=80 --target-port=8080");
    c.k("rollout status deployment/web --timeout=60s");
    let ip = c.get("service web")["spec"]["clusterIP"].as_str().unwrap().to_owned();
    eventually("service answers", || c.host.sh(&format!("curl -s -f -m 2 http://{ip}/")).ok());
    let (pids, before) = (pod_pids(&c.host), restarts(&c));
    // Requests go on during everything that follows; each failure is a line.
    let log = c.host.disk().join("load.log");
    let load_script = format!(
        "while [ ! -e /run/stop-load ]; do curl -s -f -m 5 -o /dev/null http://{ip}/ && echo ok || echo FAILED; done"
    );
    let mut load = c
        .host
        .command("sh")
        .args(["-c", &load_script])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    for component in ["apiserver", "scheduler", "controller-manager"] {
        c.host.must(&format!("kill -9 $(pgrep -f '^/isopod {component}')"));
        eventually(&format!("{component} is back"), || {
            c.host.sh(&format!("pgrep -f '^/isopod {component}'")).ok()?;
            c.kubectl("--request-timeout=5s get nodes").ok()
        });
    }
    c.kill_agent();
    c.up();
    c.k("scale deployment web --replicas=4");
    c.wait_field("deployment web", ".status.readyReplicas", |n| n == "4");
    c.host.must("touch /run/stop-load");
    load.wait().unwrap();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().count() > 20 && !text.contains("FAILED"), "{} requests, some failed", text.lines().count());
    let after = pod_pids(&c.host);
    assert!(pids.split(' ').all(|pid| after.split(' ').any(|p| p == pid)), "{pids} -> {after}");
    assert!(restarts(&c).starts_with(&before) || restarts(&c).split(' ').all(|n| n == "0"));
}

#[test]
fn every_acknowledged_create_survives_the_api_server() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.host.must(
        "cd /etc/isopod && sed -n 's/.*client-certificate-data: //p' kubeconfig | base64 -d > c.crt; \
         sed -n 's/.*client-key-data: //p' kubeconfig | base64 -d > c.key",
    );
    // Eight writers, each notes what was acknowledged with 201.
    let script = "cd /etc/isopod; n=$1; for i in $(seq 125); do \
        code=$(curl -s -o /dev/null -w '%{http_code}' --cacert pki/ca.crt --cert c.crt --key c.key -H 'Content-Type: application/json' \
        -d '{\"metadata\":{\"name\":\"cm-'$n-$i'\"}}' https://127.0.0.1:6443/api/v1/namespaces/default/configmaps); \
        [ \"$code\" = 201 ] && echo cm-$n-$i; done; true";
    let writers: Vec<_> = (0..8)
        .map(|n| {
            let mut command: Command = c.host.command("sh");
            command.args(["-c", script, "writer", &n.to_string()]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    eventually("some were written", || {
        let ran = c.kubectl("get configmaps -o name | wc -l");
        if ran.out.trim().parse::<u32>().is_ok_and(|n| n > 60) { Ok(()) } else { Err(ran) }
    });
    c.host.must("kill -9 $(pgrep -f '^/isopod apiserver')");
    let mut acknowledged = Vec::new();
    for writer in writers {
        let output = writer.wait_with_output().unwrap();
        acknowledged.extend(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned));
    }
    assert!(acknowledged.len() > 60);
    let stored = eventually("the API server is back", || c.kubectl("get configmaps -o name").ok());
    let stored: std::collections::BTreeSet<_> = stored.lines().filter_map(|l| l.strip_prefix("configmap/")).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|name| !stored.contains(name.as_str())).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
}
