//! Rows of upstream's conformance suite that the sample leaves out, on two nodes: what is asked of proxies, host ports, owners,
//! quotas, classes, namespaces and nodes there and is not another test's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, process::Child};

use isopod_tests::{Cluster, Host, Net, eventually, host::binaries};
use serde_json::{Value, json};

const FOREVER: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// Answers every method with the method and `foo`.
const SERVER: &str = r#"use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalPort => 8080, Listen => 5, ReuseAddr => 1) or die $!;
while (my $c = $s->accept) {
    my ($m) = split / /, <$c>; while (<$c>) { last if /^\r?$/ }
    my $b = "$m foo";
    print $c "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: " . length($b) . "\r\nConnection: close\r\n\r\n",
        $m eq 'HEAD' ? '' : $b;
    close $c;
}
"#;

fn pod(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec.as_object_mut().unwrap().entry("terminationGracePeriodSeconds").or_insert(json!(1));
    for c in spec["containers"].as_array_mut().unwrap() {
        let c = c.as_object_mut().unwrap();
        c.entry("name").or_insert(json!("c"));
        c.entry("image").or_insert(json!("busybox:1"));
        if c["image"] == "busybox:1" {
            c.entry("command").or_insert(json!(["sh", "-c", FOREVER]));
        }
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec})
}

/// Waits until `kubectl WHAT` prints `want`.
#[track_caller]
fn prints(c: &Cluster, what: &str, want: &str) {
    eventually(what, || {
        let ran = c.kubectl(what);
        if ran.code == 0 && ran.out.trim() == want { Ok(()) } else { Err(ran) }
    });
}

#[track_caller]
fn field(c: &Cluster, what: &str, path: &str, want: &str) {
    prints(c, &format!("get {what} -o jsonpath='{{{path}}}'"), want);
}

#[track_caller]
fn apply(c: &Cluster, objects: &[Value]) {
    c.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string());
}

/// Two nodes; the second one's agent.
fn two_nodes(net: &mut Net) -> (Cluster, Host, Child) {
    let (one, two) = (net.host("one"), net.host("two"));
    let c = Cluster::start(&one);
    Cluster::install_images(&two);
    let join = c.isopod(&["token"]).ok().unwrap();
    let isopod = binaries().join("isopod");
    let isopod = isopod.to_str().unwrap();
    two.run(isopod, &["join", join.trim().strip_prefix("isopod join ").unwrap()]).ok().unwrap();
    let agent = two.spawn("agent.out", isopod, &["agent"]);
    field(&c, "node two", ".status.conditions[?(@.type==\"Ready\")].status", "True");
    (c, two, agent)
}

#[test]
fn rows_beside_the_sample() {
    let mut net = Net::new();
    let (c, two, mut agent) = two_nodes(&mut net);
    // What takes a while is begun first.
    begin(&c, &two);
    proxies(&c);
    host_ports(&c, &two);
    hosts_files(&c);
    own_slices(&c);
    daemons(&c);
    jobs(&c);
    quotas(&c);
    classes(&c);
    generations(&c);
    namespaces(&c);
    issuer(&c);
    drop(c);
    let _ = agent.kill();
    agent.wait().unwrap();
}

fn begin(c: &Cluster, two: &Host) {
    for host in [&c.host, two] {
        fs::write(host.path("/etc/isopod/serve.pl"), SERVER).unwrap();
    }
    let directory = |name: &str, path: &str| json!({"name": name, "hostPath": {"path": path}});
    let mounts: Vec<Value> = [("usr", "/usr"), ("lib", "/lib"), ("lib64", "/lib64"), ("scripts", "/scripts")]
        .map(|(name, path)| json!({"name": name, "mountPath": path}))
        .into();
    let port = |ip: &str, protocol: &str| json!([{"containerPort": 8080, "hostPort": 54323, "hostIP": ip, "protocol": protocol}]);
    let held = |name: &str, ports: Value| {
        let ready = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
        pod(
            name,
            json!({"nodeName": "two", "containers": [{"image": "web:1", "ports": ports, "readinessProbe": ready}]}),
        )
    };
    let template = |script: &str, more: Value| {
        let mut spec = pod("t", json!({"containers": [{"command": ["sh", "-c", script]}]}))["spec"].clone();
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let mut marks = template(
        "test -e /w/$JOB_COMPLETION_INDEX && exit 0; touch /w/$JOB_COMPLETION_INDEX; trap 'exit 1' TERM; sleep 100000 & wait",
        json!({"restartPolicy": "Never", "nodeName": "two", "volumes": [{"name": "w", "hostPath": {"path": "/var/lib/w", "type": "DirectoryOrCreate"}}]}),
    );
    marks["containers"][0]["volumeMounts"] = json!([{"name": "w", "mountPath": "/w"}]);
    marks["containers"][0]["readinessProbe"] =
        json!({"exec": {"command": ["sh", "-c", "cat /w/$JOB_COMPLETION_INDEX"]}, "periodSeconds": 1});
    let ignore =
        json!({"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]});
    apply(
        c,
        &[
            pod(
                "methods",
                json!({"volumes": [directory("usr", "/usr"), directory("lib", "/usr/lib"), directory("lib64", "/usr/lib64"),
            directory("scripts", "/etc/isopod")], "containers": [{"command": ["perl", "/scripts/serve.pl"], "volumeMounts": mounts,
            "ports": [{"containerPort": 8080}], "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}]}),
            ),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "methods"},
            "spec": {"selector": {"app": "methods"}, "ports": [{"port": 80, "targetPort": 8080}]}}),
            held("local", port("127.0.0.1", "TCP")),
            held("outer", port("10.88.0.2", "TCP")),
            held("udp", port("10.88.0.2", "UDP")),
            json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "evicted"}, "spec": {"completions": 2, "parallelism": 2,
            "completionMode": "Indexed", "backoffLimit": 0, "podFailurePolicy": ignore, "template": {"spec": marks}}}),
            json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "family"}, "spec": {"completions": 4, "parallelism": 2,
            "template": {"spec": template(FOREVER, json!({"restartPolicy": "Never"}))}}}),
            json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "everywhere"}, "spec": {
            "selector": {"matchLabels": {"app": "everywhere"}},
            "template": {"metadata": {"labels": {"app": "everywhere"}}, "spec": template(FOREVER, json!({}))}}}),
        ],
    );
}

/// Proxy, validate Proxy responses; validate ProxyWithPath responses; Kubectl, proxy socket.
fn proxies(c: &Cluster) {
    c.wait_ready("methods");
    let mut proxy = c.host.spawn(
        "proxy.out",
        "sh",
        &["-c", "KUBECONFIG=/etc/isopod/kubeconfig exec kubectl proxy --unix-socket=/run/api.sock"],
    );
    let curl = |how: &str, path: &str| {
        let url = format!("http://localhost/api/v1/namespaces/default/{path}");
        c.host.sh(&format!("curl -s -m 10 {how} --unix-socket /run/api.sock -w ' %{{http_code}}' '{url}'"))
    };
    for backend in ["pods/methods", "services/methods"] {
        eventually(backend, || {
            let ran = curl("", &format!("{backend}/proxy/"));
            if ran.out == "GET foo 200" { Ok(()) } else { Err(ran) }
        });
        for method in ["DELETE", "OPTIONS", "PATCH", "POST", "PUT"] {
            for path in [format!("proxy?method={method}"), format!("proxy/some/path/with/{method}")] {
                assert_eq!(
                    curl(&format!("-X {method}"), &format!("{backend}/{path}")).out,
                    format!("{method} foo 200")
                );
            }
        }
        assert_eq!(curl("-I -o /dev/null", &format!("{backend}/proxy/some/path")).out, " 200");
        for how in ["", "-I -o /dev/null"] {
            assert_eq!(curl(how, &format!("{backend}/proxy?a=b")).out, " 301");
        }
        let sent = curl("-I", &format!("{backend}/proxy?a=b")).out.to_lowercase();
        assert!(sent.contains(&format!("location: /api/v1/namespaces/default/{backend}/proxy/?a=b\r\n")), "{sent}");
    }
    let _ = proxy.kill();
    proxy.wait().unwrap();
}

/// Scheduling, HostPort matching and HostIP and Protocol not-matching.
fn host_ports(c: &Cluster, two: &Host) {
    ["local", "outer", "udp"].iter().for_each(|pod| c.wait_ready(pod));
    for (how, pod) in [("--interface 10.88.0.2 http://127.0.0.1", "local"), ("http://10.88.0.2", "outer")] {
        eventually(&format!("{pod} answers on its address"), || {
            let ran = two.sh(&format!("curl -s -m 5 {how}:54323/"));
            if ran.out.trim() == pod { Ok(()) } else { Err(ran) }
        });
    }
}

/// Kubelet, managed etc hosts.
fn hosts_files(c: &Cluster) {
    let file = json!([{"name": "h", "hostPath": {"path": "/etc/hosts", "type": "File"}}]);
    let own = json!([{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "h", "mountPath": "/etc/hosts"}]}]);
    apply(
        c,
        &[
            pod("hosts", json!({"volumes": file, "containers": own})),
            pod("hosts-host", json!({"hostNetwork": true, "containers": [{"name": "a"}]})),
        ],
    );
    for (pod, container, managed) in [("hosts", "a", true), ("hosts", "b", false), ("hosts-host", "a", false)] {
        c.wait_ready(pod);
        let text = c.k(&format!("exec {pod} -c {container} -- cat /etc/hosts"));
        assert_eq!(text.contains("# Kubernetes-managed hosts file."), managed, "{pod} {container}: {text}");
    }
}

/// EndpointSlice, multiple IPs, multiple ports.
fn own_slices(c: &Cluster) {
    let ip = |pod: &str| c.get(&format!("pod {pod}"))["status"]["podIP"].clone();
    let slice = |port: &str, pod: &str| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("own-{port}"), "labels": {"kubernetes.io/service-name": "own",
            "endpointslice.kubernetes.io/managed-by": "example.com"}},
            "ports": [{"name": port, "port": 8080, "protocol": "TCP"}], "endpoints": [{"addresses": [ip(pod)]}]})
    };
    apply(
        c,
        &[
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "own"}, "spec": {"ports": [
            {"name": "first", "port": 3000}, {"name": "second", "port": 3001}]}}),
            slice("first", "local"),
            slice("second", "outer"),
        ],
    );
    for (port, pod) in [(3000, "local"), (3001, "outer")] {
        eventually(&format!("{pod} at port {port}"), || {
            let ran = c.kubectl(&format!("exec hosts -c a -- timeout 3 wget -q -O- http://own:{port}/"));
            if ran.out.trim() == pod { Ok(()) } else { Err(ran) }
        });
    }
}

/// The live pods of an app: their nodes and UIDs.
fn pods(c: &Cluster, selector: &str) -> BTreeMap<String, (String, String)> {
    let list = c.get(&format!("pods -l {selector}"));
    let live = list["items"].as_array().unwrap().iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null());
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    live.map(|p| (text(&p["spec"]["nodeName"]), (text(&p["metadata"]["name"]), text(&p["metadata"]["uid"])))).collect()
}

/// DaemonSet-FailedPodCreation, DaemonSet-Rollback.
fn daemons(c: &Cluster) {
    let whole = || {
        field(c, "ds everywhere", ".status.numberAvailable", "2");
        pods(c, "app=everywhere")
    };
    let (name, uid) = whole()["two"].clone();
    c.k(&format!("patch pod {name} --subresource=status -p '{{\"status\":{{\"phase\":\"Failed\"}}}}'"));
    eventually("another pod takes the place of one said to have failed", || {
        let now = pods(c, "app=everywhere");
        if now.get("two").is_some_and(|(_, now)| *now != uid) { Ok(()) } else { Err(now) }
    });
    let before = whole();
    c.k("set image ds/everywhere c=none:404");
    eventually("one pod is new", || {
        let now = pods(c, "app=everywhere");
        if now.len() == 2 && now != before { Ok(()) } else { Err(now) }
    });
    c.k("rollout undo ds/everywhere");
    c.k("rollout status ds/everywhere --timeout=60s");
    let after = whole();
    assert_eq!(after.values().filter(|pod| before.values().any(|b| b == *pod)).count(), 1, "{before:?} {after:?}");
}

/// Ensure pod failure policy allows to ignore failure matching on the DisruptionTarget condition; Jobs, orphan pods,
/// re-adoption.
fn jobs(c: &Cluster) {
    field(c, "job evicted", ".status.ready", "2");
    for name in c.k("get pods -l job-name=evicted -o jsonpath='{.items[*].metadata.name}'").split_whitespace() {
        let eviction =
            json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": "default"}});
        fs::write(c.host.path("/etc/isopod/eviction.json"), eviction.to_string()).unwrap();
        let path = format!("/api/v1/namespaces/default/pods/{name}/eviction");
        c.k(&format!("create --raw {path} -f /etc/isopod/eviction.json"));
    }
    field(c, "job evicted", ".status.conditions[?(@.type==\"Complete\")].status", "True");

    field(c, "job family", ".status.ready", "2");
    let name = c.k("get pods -l job-name=family -o jsonpath='{.items[0].metadata.name}'");
    c.k(&format!(
        "patch pod {name} --type=json -p '[{{\"op\":\"remove\",\"path\":\"/metadata/ownerReferences\"}},\
         {{\"op\":\"remove\",\"path\":\"/metadata/finalizers\"}}]'"
    ));
    field(c, &format!("pod {name}"), ".metadata.ownerReferences[*].name", "family");
    field(c, &format!("pod {name}"), ".metadata.finalizers[*]", "batch.kubernetes.io/job-tracking");
    c.k(&format!("patch pod {name} --type=json -p '[{{\"op\":\"remove\",\"path\":\"/metadata/labels\"}}]'"));
    field(c, &format!("pod {name}"), ".metadata.ownerReferences", "");
    field(c, "job family", ".status.active", "2");
    c.k(&format!("delete job/family pod/{name} --wait=false"));
}

/// ResourceQuota, object count quota: configmap, secret, service; what is not counted by admission is counted at once.
fn quotas(c: &Cluster) {
    c.k("create namespace counted");
    field(c, "configmap kube-root-ca.crt -n counted", ".metadata.name", "kube-root-ca.crt");
    c.k("create quota q -n counted --hard=configmaps=9,secrets=9,services=9,resourcequotas=9,count/leases.coordination.k8s.io=9");
    let used = |names: &str, want: &str| {
        let paths: Vec<String> =
            names.split(' ').map(|n| format!("{{.status.used.{}}}", n.replace('.', "\\."))).collect();
        prints(c, &format!("get quota q -n counted -o jsonpath='{}'", paths.join(" ")), want);
    };
    used("configmaps secrets services resourcequotas", "1 0 0 1");
    c.k("create configmap x -n counted");
    c.k("create secret generic x -n counted");
    c.k("create service clusterip x -n counted --tcp=80");
    c.k("create quota r -n counted --hard=pods=1");
    used("configmaps secrets services resourcequotas", "2 1 1 2");
    c.k("delete configmap/x secret/x service/x quota/r -n counted");
    used("configmaps secrets services resourcequotas", "1 0 0 1");
    // What was there before its quota, and what admission cannot have counted.
    c.apply("apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {name: x, namespace: counted}\n");
    used("count/leases.coordination.k8s.io", "1");
    c.k("delete lease x -n counted");
    used("count/leases.coordination.k8s.io", "0");
}

/// VolumeAttributesClass, lifecycle: one that nobody uses goes, one in use waits.
fn classes(c: &Cluster) {
    let class = |name: &str| {
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttributesClass", "metadata": {"name": name},
            "driverName": "example.com", "parameters": {"a": "b"}})
    };
    apply(
        c,
        &[
            class("free"),
            class("taken"),
            json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "user"},
        "spec": {"storageClassName": "none", "volumeAttributesClassName": "taken", "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Mi"}}}}),
        ],
    );
    c.k("delete volumeattributesclass free --timeout=30s");
    c.k("delete volumeattributesclass taken --wait=false");
    field(c, "volumeattributesclass taken", ".metadata.finalizers[*]", "kubernetes.io/vac-protection");
    c.k("delete pvc user --timeout=30s");
    prints(c, "get volumeattributesclass --ignore-not-found -o name", "");
}

/// Pods Generation: many updates, graceful delete.
fn generations(c: &Cluster) {
    c.host.must(
        "export KUBECONFIG=/etc/isopod/kubeconfig; for i in $(seq 5000 -1 4990); do \
         kubectl patch pod hosts -p \"{\\\"spec\\\":{\\\"activeDeadlineSeconds\\\":$i}}\" > /dev/null || exit 1; done",
    );
    field(c, "pod hosts", ".metadata.generation", "12");
    field(c, "pod hosts", ".status.observedGeneration", "12");
    c.k("patch pod hosts --type=merge -p '{\"metadata\":{\"finalizers\":[\"example.com/f\"]}}'");
    c.k("delete pod hosts --wait=false");
    field(c, "pod hosts", ".metadata.generation", "13");
    c.k("patch pod hosts --type=merge -p '{\"metadata\":{\"finalizers\":null}}'");
}

/// Ordered Namespace Deletion.
fn namespaces(c: &Cluster) {
    c.k("create namespace ordered");
    field(c, "serviceaccount default -n ordered", ".metadata.name", "default");
    let mut held = pod("held", json!({"containers": [{}]}));
    held["metadata"]["namespace"] = json!("ordered");
    held["metadata"]["finalizers"] = json!(["example.com/f"]);
    apply(c, &[held]);
    field(c, "pod held -n ordered", ".status.phase", "Running");
    c.k("create configmap after -n ordered");
    c.k("delete namespace ordered --wait=false");
    field(c, "namespace ordered", ".status.conditions[?(@.type==\"NamespaceDeletionContentFailure\")].status", "False");
    c.wait_field("pod held -n ordered", ".metadata.deletionTimestamp", |t| !t.is_empty());
    c.k("get configmap after -n ordered");
    c.k("patch pod held -n ordered --type=merge -p '{\"metadata\":{\"finalizers\":[]}}'");
    prints(c, "get namespace ordered --ignore-not-found -o name", "");
}

/// OIDC Discovery (ServiceAccountIssuerDiscovery): a pod finds who has issued its token, and the keys.
fn issuer(c: &Cluster) {
    let token = "/var/run/secrets/kubernetes.io/serviceaccount/token";
    let claims = c.k(&format!(
        "exec outer -- sh -c 'cut -d. -f2 {token} | tr _- /+ | {{ cat; echo ==; }} | base64 -d 2> /dev/null || true'"
    ));
    c.k("create clusterrolebinding finds --clusterrole=system:service-account-issuer-discovery --serviceaccount=default:default");
    let bearer = c.k(&format!("exec outer -- cat {token}"));
    let read = |path: &str| {
        eventually(path, || {
            let curl = "curl -s -f --cacert /etc/isopod/pki/ca.crt";
            let ran =
                c.host.sh(&format!("{curl} -H 'Authorization: Bearer {}' https://10.88.0.1:6443{path}", bearer.trim()));
            if ran.code == 0 { Ok(serde_json::from_str::<Value>(&ran.out).unwrap()) } else { Err(ran) }
        })
    };
    let found = read("/.well-known/openid-configuration");
    let issuer = found["issuer"].as_str().unwrap();
    assert!(claims.contains(&format!("\"iss\":\"{issuer}\"")), "{issuer} {claims}");
    assert!(found["jwks_uri"].as_str().unwrap().ends_with("/openid/v1/jwks"), "{found}");
    assert_eq!(read("/openid/v1/jwks")["keys"][0]["use"], "sig");
}
