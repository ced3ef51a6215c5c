//! What the node says by itself: `isopod why` and its kin on broken pods, and kubectl against a node without an API server.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Stdio};

use isopod_tests::{Cluster, Net, eventually, host::binaries};

const BROKEN: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: good}
spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: 'busybox:1', command: [sh, -c, 'echo fine; exec sleep 100000']}]}
---
apiVersion: v1
kind: Pod
metadata: {name: never}
spec: {containers: [{name: c, image: 'nowhere.invalid/app:1', imagePullPolicy: Never}]}
---
apiVersion: v1
kind: Pod
metadata: {name: crash}
spec: {containers: [{name: c, image: 'busybox:1', command: [sh, -c, 'echo cannot find my database; exit 3']}]}
---
apiVersion: v1
kind: Pod
metadata: {name: unset}
spec: {containers: [{name: c, image: 'busybox:1', envFrom: [{configMapRef: {name: settings}}], command: [sleep, '100000']}]}
---
apiVersion: v1
kind: Pod
metadata: {name: unready}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox:1
    command: [sleep, '100000']
    readinessProbe: {exec: {command: [sh, -c, 'echo not yet; exit 1']}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: first}
spec:
  terminationGracePeriodSeconds: 1
  initContainers: [{name: wait, image: 'busybox:1', command: [sh, -c, 'echo waiting for db; sleep 100000']}]
  containers: [{name: c, image: 'busybox:1', command: [sleep, '100000']}]
---
apiVersion: v1
kind: Pod
metadata: {name: path}
spec:
  containers: [{name: c, image: 'busybox:1', command: [sleep, '100000'], volumeMounts: [{name: v, mountPath: /v}]}]
  volumes: [{name: v, hostPath: {path: /none/such, type: Directory}}]
---
apiVersion: v1
kind: Pod
metadata: {name: huge}
spec: {containers: [{name: c, image: 'busybox:1', resources: {requests: {cpu: '1000'}}}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: small}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: q, namespace: small}
spec: {hard: {pods: '0'}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: small}
spec:
  selector: {matchLabels: {a: b}}
  template:
    metadata: {labels: {a: b}}
    spec: {containers: [{name: c, image: 'busybox:1'}]}
"#;

#[test]
fn broken_pods_say_why() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(BROKEN);
    for (pod, wanted) in [
        ("good", &["why   nothing: it has been running and ready", "container c"][..]),
        ("never", &["cannot be had: nowhere.invalid/app:1", "imagePullPolicy is Never"]),
        (
            "crash",
            &["does not stay up: it ended with exit code 3", "cannot find my database", "isopod logs default/crash"],
        ),
        ("unset", &["configmap \"settings\" not found", "create the ConfigMap in namespace default"]),
        ("unready", &["does not pass its readiness probe", "not yet"]),
        ("first", &["init container wait has been running", "waiting for db"]),
        ("path", &["hostPath type check failed", "make the path on this node"]),
        ("huge", &["no node can take it", "Insufficient cpu", "lower the pod's requests"]),
        ("small/shop", &["exceeded quota", "ResourceQuota"]),
    ] {
        eventually(&format!("why {pod}"), || {
            let ran = c.isopod(&["why", pod]);
            if wanted.iter().all(|w| ran.out.contains(w)) { Ok(()) } else { Err(ran) }
        });
    }
    let ran = c.isopod(&["why", "nonsense"]);
    assert!(ran.code == 64 && ran.err.contains("no pod \"nonsense\""), "{ran:?}");
    let said = |args: &[&str]| c.isopod(args).ok().unwrap();
    let listed = said(&["ps"]);
    assert!(listed.lines().any(|l| l.contains("default") && l.contains("first") && l.contains("Init:0/1")), "{listed}");
    assert!(said(&["ps", "--containers"]).contains("waiting: CreateContainerConfigError"));
    assert_eq!(said(&["logs", "good"]), "fine\n");
    assert_eq!(said(&["exec", "good", "--", "cat", "/etc/hostname"]), "good\n");
    assert_eq!(c.isopod(&["exec", "good", "--", "sh", "-c", "exit 7"]).code, 7);
    assert!(said(&["images"]).contains("docker.io/library/busybox:1"));
    let top = said(&["top", "--once", "--delay", "0.3"]);
    assert!(top.starts_with("node one: cpu ") && top.contains("good"), "{top}");
    let all: serde_json::Value = serde_json::from_str(&said(&["inspect", "good", "--json"])).unwrap();
    let ip = c.get("pod good")["status"]["podIP"].clone();
    assert_eq!(all["network"]["addresses"][0], ip);
    assert!(all["cgroup"]["path"].as_str().unwrap().contains("besteffort/pod"), "{all}");
    let container = all["containers"].as_object().unwrap().values().next().unwrap();
    assert!(container["mounts"].as_array().unwrap().iter().any(|m| m.as_str().unwrap().starts_with("/proc ")), "{all}");
    // What was missing comes: the pod goes on by itself.
    c.k("create configmap settings --from-literal=a=b");
    c.wait_ready("unset");
}

const ALONE: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: words}
data: {greeting: hello there}
---
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {token: s3cret}
---
apiVersion: v1
kind: Pod
metadata: {name: alone, labels: {app: alone}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'echo $GREETING; cat /k/token; echo; exec sleep 100000']
    env: [{name: GREETING, valueFrom: {configMapKeyRef: {name: words, key: greeting}}}]
    volumeMounts: [{name: k, mountPath: /k}]
  volumes: [{name: k, secret: {secretName: key}}]
"#;

#[test]
fn a_node_alone_answers_kubectl() {
    let mut net = Net::new();
    let host = net.host("one");
    Cluster::install_images(&host);
    fs::create_dir_all(host.path("/etc/isopod/manifests")).unwrap();
    fs::write(host.path("/etc/isopod/manifests/alone.yaml"), ALONE).unwrap();
    let config = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\npodCIDR: 10.244.9.0/24\n";
    fs::write(host.path("/etc/isopod/config.yaml"), config).unwrap();
    let isopod = binaries().join("isopod");
    let mut agent = host
        .command(isopod.to_str().unwrap())
        .args(["agent", "--node-name", "one"])
        .stdin(Stdio::null())
        .stderr(fs::File::create(host.disk().join("agent.out")).unwrap())
        .spawn()
        .unwrap();
    let k = |line: &str| host.sh(&format!("kubectl --kubeconfig /etc/isopod/node.conf {line}"));
    eventually("the pod runs", || {
        let ran = k("get pods");
        let runs = ran.out.lines().any(|l| l.starts_with("alone-one") && l.contains("1/1") && l.contains("Running"));
        if runs { Ok(()) } else { Err(ran) }
    });
    eventually("its words are there", || {
        let ran = k("logs alone-one");
        if ran.out == "hello there\ns3cret\n" { Ok(()) } else { Err(ran) }
    });
    assert_eq!(k("exec alone-one -- cat /k/token").ok().unwrap(), "s3cret");
    let told = k("describe pod alone-one").ok().unwrap();
    assert!(told.contains("Status:") && told.contains("Running") && told.contains("Container started"), "{told}");
    assert!(k("get pods -l app=alone -o name").ok().unwrap().contains("pod/alone-one"));
    assert!(k("get nodes -o name").ok().unwrap().contains("node/one"));
    let refused = k("delete pod alone-one");
    assert!(refused.code != 0 && refused.err.contains("read-only"), "{refused:?}");
    assert!(k("get deployments").code != 0);
    // Nobody else gets in.
    let code = host.must("curl -sk -m 20 -o /dev/null -w '%{http_code}' https://127.0.0.1:10250/api/v1/pods");
    assert_eq!(code, "401");
    let own = |args: &str| host.sh(&format!("{} {args}", isopod.display()));
    assert!(own("ps").ok().unwrap().contains("alone-one"));
    assert!(own("why alone").ok().unwrap().contains("nothing: it has been running"));
    assert!(own("logs alone").ok().unwrap().contains("hello there"));
    // The Secret changes with its file.
    fs::write(host.path("/etc/isopod/manifests/alone.yaml"), ALONE.replace("s3cret", "another")).unwrap();
    eventually("the new word is in the volume", || {
        let ran = own("exec alone -- cat /k/token");
        if ran.out == "another" { Ok(()) } else { Err(ran) }
    });
    fs::remove_file(host.path("/etc/isopod/manifests/alone.yaml")).unwrap();
    eventually("the pod is gone", || {
        let ran = own("ps");
        if ran.code == 0 && !ran.out.contains("alone") { Ok(()) } else { Err(ran) }
    });
    agent.kill().unwrap();
    agent.wait().unwrap();
}
