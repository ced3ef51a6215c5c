//! What happens to containers that end, and to pods that go.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

#[test]
fn ends_are_told_apart() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: crash}\nspec:\n  containers:\n  - {name: c, image: 'busybox:1', command: [sh, -c, 'exit 3']}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: hungry}\nspec:\n  restartPolicy: Never\n  containers:\n  - name: c\n    image: busybox:1\n    \
         command: [sh, -c, 'a=x; while true; do a=$a$a; done']\n    resources: {limits: {memory: 32Mi}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: done}\nspec:\n  restartPolicy: Never\n  initContainers:\n  \
         - {name: i, image: 'busybox:1', command: [sh, -c, 'echo first > /shared/f'], volumeMounts: [{name: v, mountPath: /shared}]}\n  \
         containers:\n  - {name: c, image: 'busybox:1', command: [cat, /shared/f], volumeMounts: [{name: v, mountPath: /shared}]}\n  \
         volumes: [{name: v, emptyDir: {}}]\n",
    );
    c.wait_field("pod done", ".status.phase", |phase| phase == "Succeeded");
    assert_eq!(c.k("logs done").trim(), "first");
    c.wait_field("pod hungry", ".status.containerStatuses[0].state.terminated.reason", |r| r == "OOMKilled");
    c.wait_field("pod crash", ".status.containerStatuses[0].restartCount", |n| n.parse::<u32>().is_ok_and(|n| n >= 1));
    c.wait_field("pod crash", ".status.containerStatuses[0].state.waiting.reason", |r| r == "CrashLoopBackOff");
    assert_eq!(c.get("pod crash")["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 3);
    assert!(c.k("get pod crash").contains("CrashLoopBackOff"));
    assert!(c.k("get events").contains("BackOff"));
}

#[test]
fn the_killed_restart_and_the_deleted_are_replaced() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.k("create deployment web --image=web:1");
    c.k("rollout status deployment/web --timeout=60s");
    let name = c.k("get pods -l app=web -o jsonpath='{.items[0].metadata.name}'");
    c.kubectl(&format!("exec {name} -- kill -9 -1"));
    c.host.sh("kill -9 $(pgrep -x httpd)");
    c.wait_field(&format!("pod {name}"), ".status.containerStatuses[0].restartCount", |n| n == "1");
    c.wait_ready(&name);
    c.k(&format!("delete pod {name}"));
    eventually("another pod is there", || {
        let ran = c.kubectl("get pods -l app=web -o jsonpath='{.items[*].metadata.name}'");
        if ran.code == 0 && !ran.out.contains(&name) && !ran.out.is_empty() { Ok(()) } else { Err(ran) }
    });
    c.k("rollout status deployment/web --timeout=60s");
}

#[test]
fn configuration_reaches_containers() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {key: value}\n---\n\
         apiVersion: v1\nkind: Secret\nmetadata: {name: sec}\nstringData: {password: hidden}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {who: me}}\nspec:\n  containers:\n  - name: c\n    image: busybox:1\n    \
         command: [sleep, '100000']\n    resources: {limits: {cpu: 100m, memory: 64Mi}}\n    env:\n    - {name: A, value: one}\n    \
         - {name: B, value: $(A)-two}\n    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}\n    \
         - {name: CONF, valueFrom: {configMapKeyRef: {name: conf, key: key}}}\n    \
         - {name: MEM, valueFrom: {resourceFieldRef: {resource: limits.memory}}}\n    \
         envFrom: [{prefix: S_, secretRef: {name: sec}}]\n    volumeMounts:\n    - {name: conf, mountPath: /conf}\n    \
         - {name: all, mountPath: /all}\n  volumes:\n  - {name: conf, configMap: {name: conf}}\n  - name: all\n    projected:\n      sources:\n      \
         - {secret: {name: sec}}\n      - {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}\n",
    );
    c.wait_ready("p");
    let env = c.k("exec p -- env");
    for line in [
        "A=one",
        "B=one-two",
        "NODE=one",
        "CONF=value",
        "MEM=67108864",
        "S_password=hidden",
        "KUBERNETES_SERVICE_HOST=10.96.0.1",
    ] {
        assert!(env.lines().any(|l| l == line), "{line}: {env}");
    }
    assert_eq!(c.k("exec p -- cat /conf/key /all/password").trim(), "valuehidden");
    assert!(c.k("exec p -- cat /all/labels").contains("who=\"me\""));
    assert_eq!(c.k("exec p -- ls /var/run/secrets/kubernetes.io/serviceaccount").split_whitespace().count(), 3);
    c.k(r#"patch configmap conf -p '{"data":{"key":"changed"}}'"#);
    eventually("the file follows", || {
        let text = c.k("exec p -- cat /conf/key");
        if text == "changed" { Ok(()) } else { Err(text) }
    });
}
