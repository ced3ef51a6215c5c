//! Static pods need no API server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Stdio};

use isopod_tests::{Cluster, Net, eventually, host::binaries};

const MANIFEST: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: alone}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
                        - {name: c, image: 'busybox:1', command: [sh, -c, 'echo here; exec sleep 100000']}\n";

#[test]
fn a_static_pod_runs_alone_and_ends_with_its_file() {
    let mut net = Net::new();
    let host = net.host("one");
    Cluster::install_images(&host);
    Cluster::stand_alone(&host);
    fs::write(host.path("/etc/isopod/manifests/alone.yaml"), MANIFEST).unwrap();
    let log = fs::File::create(host.disk().join("agent.out")).unwrap();
    let mut agent = host
        .command(binaries().join("isopod").to_str().unwrap())
        .arg("agent")
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let running = || host.sh("pgrep -f 'sleep 10000[0]'");
    eventually("the pod runs", || running().ok());
    eventually("its log is there", || host.sh("cat /var/log/pods/default_alone-one_*/c/0.log | grep here").ok());
    fs::remove_file(host.path("/etc/isopod/manifests/alone.yaml")).unwrap();
    eventually("the pod is gone", || if running().code == 1 { Ok(()) } else { Err(running()) });
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn mirror_pods_follow_static_pods() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    fs::write(c.host.path("/etc/isopod/manifests/alone.yaml"), MANIFEST).unwrap();
    c.wait_ready("alone-one");
    let pod = c.get("pod alone-one");
    assert_eq!(pod["metadata"]["annotations"]["kubernetes.io/config.source"], "file");
    assert_eq!(pod["metadata"]["ownerReferences"][0]["kind"], "Node");
    assert!(c.k("logs alone-one").contains("here"));
    let system = c.k("get pods -n kube-system");
    for name in ["kube-apiserver-one", "kube-scheduler-one", "kube-controller-manager-one"] {
        assert!(system.contains(name), "{system}");
    }
    fs::remove_file(c.host.path("/etc/isopod/manifests/alone.yaml")).unwrap();
    eventually("the mirror pod is gone", || {
        let ran = c.kubectl("get pod alone-one");
        if ran.err.contains("NotFound") { Ok(()) } else { Err(ran) }
    });
}

/// Its end cannot be told to anybody, and must not wait for that.
#[test]
fn the_api_servers_manifest_goes_and_comes_back() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let gone = |c: &Cluster| {
        c.host.must("mkdir -p /root/aside && mv /etc/isopod/manifests/kube-apiserver.yaml /root/aside/");
        eventually("the API server has ended", || {
            let ran = c.host.sh("pgrep -f '^/isopod apiserver'");
            if ran.code == 1 { Ok(()) } else { Err(ran) }
        });
    };
    let back = |c: &Cluster| {
        c.host.must("mv /root/aside/kube-apiserver.yaml /etc/isopod/manifests/");
        eventually("it answers again", || c.kubectl("--request-timeout=5s get --raw /readyz").ok());
    };
    gone(&c);
    back(&c);
    gone(&c);
    c.kill_agent();
    c.start_agent();
    back(&c);
}
