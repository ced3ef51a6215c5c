//! A node short of memory and disk: conditions, who is turned away, who is evicted and with what words, which images go.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{Cluster, Net, eventually};
use serde_json::Value;

/// Memory is always short on this node.
const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 99%}\n";

/// Roomy on memory; the disk is short as far as unused images go.
const ROOMY: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                     clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\nevictionHard: {memory.available: 100Mi}\n\
                     imageMinimumGCAge: 8s\nimageGCHighThresholdPercent: 1\nimageGCLowThresholdPercent: 0\n";

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: greedy}
spec:
  terminationGracePeriodSeconds: 100
  tolerations: [{key: node.kubernetes.io/memory-pressure, operator: Exists}]
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'dd if=/dev/zero of=/dev/shm/f bs=1M count=20; sleep 1000']
    resources: {requests: {memory: 1Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: nothing-asked}
spec:
  nodeName: one
  containers: [{name: c, image: 'busybox:1', command: [sleep, '1000']}]
"#;

/// Each takes more than there is of one thing.
const GREEDY: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: writer}
spec:
  containers: [{name: c, image: 'busybox:1', command: [sh, -c, 'dd if=/dev/zero of=/f bs=1M count=600; sleep 1000']}]
---
apiVersion: v1
kind: Pod
metadata: {name: files}
spec:
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'n=0; while [ $n -lt 12000 ]; do : > /v/$n; n=$((n + 1)); done; sleep 1000']
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: forks}
spec:
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'n=0; while [ $n -lt 1000 ]; do sleep 1000 & n=$((n + 1)); done; wait']
---
apiVersion: v1
kind: Pod
metadata: {name: modest}
spec:
  containers: [{name: c, image: 'busybox:1', command: [sleep, '1000']}]
"#;

const WRITERS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: volume}
spec:
  terminationGracePeriodSeconds: 100
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'dd if=/dev/zero of=/v/f bs=1M count=3; sleep 1000']
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, emptyDir: {sizeLimit: 1Mi}}]
---
apiVersion: v1
kind: Pod
metadata: {name: layer}
spec:
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'dd if=/dev/zero of=/f bs=1M count=3; sleep 1000']
    resources: {limits: {ephemeral-storage: 1Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: modest}
spec:
  containers:
  - name: c
    image: busybox:1
    command: [sleep, '1000']
    resources: {limits: {ephemeral-storage: 10Mi}}
"#;

fn condition(c: &Cluster, object: &str, kind: &str) -> Value {
    let all = c.get(object)["status"]["conditions"].as_array().unwrap().clone();
    all.into_iter().find(|c| c["type"] == kind).unwrap_or_default()
}

#[test]
fn a_node_short_of_memory_sends_pods_away() {
    let mut net = Net::new();
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), CONFIGURATION).unwrap();
    let c = Cluster::start(&host);
    eventually("the node says so", || {
        let told = condition(&c, "node one", "MemoryPressure");
        if told["status"] == "True" && told["reason"] == "KubeletHasInsufficientMemory" { Ok(()) } else { Err(told) }
    });
    c.apply(PODS);
    c.wait_field("pod nothing-asked", ".status.reason", |r| r == "Evicted");
    let turned_away = c.get("pod nothing-asked")["status"].clone();
    assert_eq!(turned_away["phase"], "Failed");
    assert_eq!(turned_away["message"], "The node had condition: [MemoryPressure]. ");
    assert!(turned_away["containerStatuses"].is_null());

    c.wait_field("pod greedy", ".status.phase", |p| p == "Failed");
    let gone = c.get("pod greedy")["status"].clone();
    assert_eq!(gone["reason"], "Evicted");
    let text = gone["message"].as_str().unwrap();
    assert!(text.starts_with("The node was low on resource: memory. Threshold quantity: "), "{text}");
    assert_eq!(condition(&c, "pod greedy", "DisruptionTarget")["reason"], "TerminationByKubelet");
    eventually("it is told", || {
        let events = c.k("get events");
        if ["EvictionThresholdMet", "Evicted"].iter().all(|r| events.contains(r)) { Ok(()) } else { Err(events) }
    });
    // The control plane stays, whatever it uses.
    assert_eq!(c.k("get pods -n kube-system --field-selector status.phase=Running -o name").lines().count(), 3);
}

#[test]
fn who_takes_all_of_disk_inodes_or_processes_goes() {
    let mut net = Net::new();
    let host = net.host("one");
    // A disk of its own. Room for 500 MB, 7,000 files and 500 processes beside what the node itself needs; other tests come
    // and go meanwhile, and their processes count too.
    host.must("mkdir -p /var/lib/isopod && mount -t tmpfs -o size=1g,nr_inodes=17000 disk /var/lib/isopod");
    let processes: u32 = host.must("cut -d ' ' -f 4 /proc/loadavg | cut -d / -f 2").trim().parse().unwrap();
    host.must(&format!("echo {} > /proc/sys/kernel/pid_max", processes + 1100));
    let config = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDNS: [10.96.0.10]\n\
                  clusterDomain: cluster.local\nimageGCHighThresholdPercent: 100\nevictionPressureTransitionPeriod: 1s\n\
                  evictionHard: {memory.available: 100Mi, nodefs.available: 400Mi, pid.available: '600'}\n\
                  evictionSoft: {nodefs.inodesFree: '8000'}\nevictionSoftGracePeriod: {nodefs.inodesFree: 1s}\n\
                  evictionMaxPodGracePeriod: 1\n";
    fs::write(host.path("/etc/isopod/config.yaml"), config).unwrap();
    let c = Cluster::start(&host);
    c.apply(GREEDY);
    for (pod, resource) in [("writer", "ephemeral-storage"), ("files", "inodes"), ("forks", "pids")] {
        c.wait_field(&format!("pod {pod}"), ".status.phase", |p| p == "Failed");
        let status = c.get(&format!("pod {pod}"))["status"].clone();
        let text = status["message"].as_str().unwrap();
        assert!(text.starts_with(&format!("The node was low on resource: {resource}. Threshold quantity: ")), "{text}");
        assert_eq!(status["reason"], "Evicted");
    }
    eventually("all is well again", || {
        let told = ["DiskPressure", "PIDPressure", "MemoryPressure"].map(|kind| condition(&c, "node one", kind));
        if told.iter().all(|t| t["status"] == "False") { Ok(()) } else { Err(Vec::from(told)) }
    });
    assert_eq!(c.get("pod modest")["status"]["phase"], "Running");
    c.k("run late --image=busybox:1 --restart=Never -- true");
    c.wait_field("pod late", ".status.phase", |p| p == "Succeeded");
}

#[test]
fn pods_keep_to_their_disk() {
    let mut net = Net::new();
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), ROOMY).unwrap();
    let c = Cluster::start(&host);
    c.apply(WRITERS);
    for (pod, want) in [
        ("volume", "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". "),
        ("layer", "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi. "),
    ] {
        c.wait_field(&format!("pod {pod}"), ".status.phase", |p| p == "Failed");
        let status = c.get(&format!("pod {pod}"))["status"].clone();
        assert_eq!((&status["reason"], status["message"].as_str().unwrap()), (&Value::from("Evicted"), want));
    }
    c.wait_ready("modest");

    // Of the images only those in use stay.
    eventually("web:1 is gone", || {
        let images = c.get("node one")["status"]["images"].to_string();
        let stay = ["isopod.local/isopod", "busybox:1"].iter().all(|i| images.contains(i));
        if !images.contains("web:1") && stay { Ok(()) } else { Err(images) }
    });
    // That is not enough: a disk all of which has to be free cannot be had.
    eventually("it is told", || {
        let events = c.k("get events -n default --field-selector reason=FreeDiskSpaceFailed,involvedObject.kind=Node");
        if events.contains("Failed to garbage collect required amount of images") { Ok(()) } else { Err(events) }
    });
}
