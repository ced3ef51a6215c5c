//! Fields of pods and of the node's configuration that no other test looks at, each seen to do what it says: one node, one
//! pod for each.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    time::{Duration, Instant},
};

use isopod_tests::{Cluster, Net, eventually, image::Image};
use serde_json::json;

const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 100Mi}\npodPidsLimit: 40\nenableSystemLogQuery: true\n\
                             kubeReserved: {cpu: 100m, memory: 64Mi}\nsystemReserved: {cpu: 50m}\n\
                             staticPodURL: 'http://127.0.0.1:8099/pod.json'\nstaticPodURLHeader: {X-Node: [one]}\n\
                             httpCheckFrequency: 1s\nimageMinimumGCAge: 1s\nimageMaximumGCAge: 10s\n";

/// Refuses to make directories.
const PROFILE: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;

/// One pod that runs to its end: name, pod's fields, command, container's fields.
fn brief(name: &str, spec: &str, command: &str, container: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  \
         terminationGracePeriodSeconds: 1\n{spec}  containers:\n  - name: c\n    image: member:1\n    \
         command: [sh, -c, '{command}']\n{container}"
    )
}

/// What a pod said before its good end.
#[track_caller]
fn said(c: &Cluster, pod: &str) -> String {
    c.wait_field(&format!("pod {pod}"), ".status.phase", |phase| phase == "Succeeded");
    c.k(&format!("logs {pod}")).trim().to_owned()
}

fn started(net: &mut Net) -> Cluster {
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), CONFIGURATION).unwrap();
    let profiles = host.path("/var/lib/isopod/seccomp/team");
    fs::create_dir_all(&profiles).unwrap();
    fs::write(profiles.join("no-directories.json"), PROFILE).unwrap();
    // The image says that its user is in one more group.
    let groups = b"root:x:0:\nnobody:x:65534:\nstaff:x:50:member\n";
    let users = b"root:x:0:0:root:/root:/bin/sh\nmember:x:1000:1000:member:/:/bin/sh\n";
    let image = Image::busybox("member:1").file("etc/group", 0o644, groups).file("etc/passwd", 0o644, users);
    image.save(&host.path("/var/lib/isopod/images/member.tar"));
    // In use from the first moment on, so that it stays.
    let keeper = brief("keeper", "", "exec sleep 100000", "");
    fs::create_dir_all(host.path("/etc/isopod/manifests")).unwrap();
    fs::write(host.path("/etc/isopod/manifests/keeper.yaml"), keeper).unwrap();
    Cluster::start(&host)
}

#[test]
fn containers_are_as_their_fields_say() {
    let mut net = Net::new();
    let c = started(&mut net);
    let ipc = "readlink /proc/self/ns/ipc";
    let user = |policy: &str| {
        format!(
            "  securityContext: {{runAsUser: 1000, supplementalGroups: [60], supplementalGroupsPolicy: {policy}}}\n"
        )
    };
    let missing = "  volumes:\n  - {name: v, projected: {sources: [{configMap: {name: missing, optional: true}}, \
                   {secret: {name: missing, optional: true}}, {configMap: {name: fixed}}]}}\n";
    let missing_too = "    volumeMounts: [{name: v, mountPath: /v}]\n    envFrom: [{configMapRef: {name: missing, optional: true}}]\n    \
                       env: [{name: A, valueFrom: {secretKeyRef: {name: missing, key: a, optional: true}}}]\n";
    let localhost =
        "    securityContext: {seccompProfile: {type: Localhost, localhostProfile: team/no-directories.json}}\n";
    let unmasked = "    securityContext: {procMount: Unmasked}\n";
    let covered = "grep -c \" /proc/\" /proc/mounts || true";
    c.k("create configmap fixed --from-literal=key=value");
    c.k("patch configmap fixed -p '{\"immutable\": true}'");
    let refused = c.kubectl("patch configmap fixed -p '{\"data\": {\"key\": \"other\"}}'");
    assert!(refused.err.contains("field is immutable when `immutable` is set"), "{refused:?}");
    c.apply(
        &[
            brief("ipc-of-host", "  hostIPC: true\n", ipc, ""),
            brief("ipc-of-its-own", "", ipc, ""),
            brief("merged", &user("Merge"), "id -G", ""),
            brief("strict", &user("Strict"), "id -G", ""),
            brief("optional", missing, "ls /v; echo A=$A", missing_too),
            brief("profile", "", "mkdir /x 2>&1; touch /y && echo yes", localhost),
            brief("no-profile", "", "mkdir /x && echo made", ""),
            brief("lost-profile", "", "true", &localhost.replace("team/", "nowhere/")),
            brief("covered", "", covered, ""),
            brief("uncovered", "  hostUsers: false\n", covered, unmasked),
            brief("root", "", "true", "    securityContext: {runAsNonRoot: true}\n"),
            brief("not-root", "", "id -u", "    securityContext: {runAsNonRoot: true, runAsUser: 7}\n"),
        ]
        .concat(),
    );
    let own = c.host.must("readlink /proc/self/ns/ipc");
    assert_eq!(said(&c, "ipc-of-host"), own.trim());
    assert_ne!(said(&c, "ipc-of-its-own"), own.trim());
    assert_eq!((&*said(&c, "merged"), &*said(&c, "strict")), ("1000 50 60", "1000 60"));
    assert_eq!(said(&c, "optional"), "key\nA=");
    assert_eq!(said(&c, "profile"), "mkdir: can't create directory '/x': Operation not supported\nyes");
    assert_eq!(said(&c, "no-profile"), "made");
    assert_eq!(said(&c, "uncovered"), "0");
    assert_ne!(said(&c, "covered"), "0");
    assert_eq!(said(&c, "not-root"), "7");
    let waiting = ".status.containerStatuses[0].state.waiting";
    c.wait_field("pod root", &format!("{waiting}.message"), |why| {
        why.starts_with("container has runAsNonRoot and image will run as root")
    });
    c.wait_field("pod lost-profile", &format!("{waiting}.message"), |why| why.contains("nowhere/no-directories.json"));
}

#[test]
fn the_node_is_as_its_configuration_says() {
    let mut net = Net::new();
    let c = started(&mut net);
    let sleeper = |name: &str, spec: &str, container: &str| brief(name, spec, "exec sleep 100000", container);
    let resources = |text: &str| format!("    resources: {text}\n");
    c.apply(
        &[
            sleeper("asks-nothing", "", ""),
            sleeper("asks", "", &resources("{requests: {cpu: 30m, memory: 32Mi}}")),
            sleeper("has", "", &resources("{limits: {cpu: 50m, memory: 48Mi}}")),
            sleeper("together", "  resources: {limits: {cpu: 70m, memory: 56Mi}}\n", ""),
            sleeper("gated", "  schedulingGates: [{name: example.com/wait}]\n", ""),
            sleeper("sleeps", "", "    lifecycle: {preStop: {sleep: {seconds: 3}}}\n")
                .replace("Seconds: 1", "Seconds: 5"),
            brief("forks", "", "for n in $(seq 60); do sleep 100 & done; echo all", ""),
        ]
        .concat(),
    );
    // What is set aside is not given to pods.
    let node = c.get("node one")["status"].clone();
    let cpus = node["capacity"]["cpu"].as_str().unwrap().parse::<i64>().unwrap();
    assert_eq!(node["allocatable"]["cpu"], format!("{}m", cpus * 1000 - 150));
    let kib = |value: &serde_json::Value| value.as_str().unwrap().trim_end_matches("Ki").parse::<i64>().unwrap();
    let aside = kib(&node["capacity"]["memory"]) - kib(&node["allocatable"]["memory"]);
    assert_eq!(aside, (64 + 100) << 10);

    // Classes, their groups, who is killed first.
    for (pod, class, parent) in [
        ("asks-nothing", "BestEffort", "besteffort/"),
        ("asks", "Burstable", "burstable/"),
        ("has", "Guaranteed", ""),
        ("together", "Guaranteed", ""),
    ] {
        c.wait_ready(pod);
        let object = c.get(&format!("pod {pod}"));
        assert_eq!(object["status"]["qosClass"], class, "{pod}");
        let user = object["status"]["containerStatuses"][0]["user"]["linux"].clone();
        assert_eq!(user, json!({"uid": 0, "gid": 0, "supplementalGroups": [0]}), "{pod}");
        let group = format!("isopod/{parent}pod{}", object["metadata"]["uid"].as_str().unwrap());
        let number =
            |file: &str| c.host.must(&format!("cat $(find /sys/fs/cgroup -path '*/{group}/{file}' | head -n 1)"));
        assert_eq!(number("pids.max").trim(), "40", "{pod}");
        let memory = match pod {
            "has" => 48 << 20,
            "together" => 56 << 20,
            _ => continue,
        };
        let limit = number("memory.limit_in_bytes");
        assert_eq!(limit.trim(), memory.to_string(), "{pod}");
    }
    let score = |pod: &str| c.k(&format!("exec {pod} -- cat /proc/1/oom_score_adj")).trim().parse::<i64>().unwrap();
    assert_eq!(score("asks-nothing"), 1000);
    assert_eq!(score("asks"), 1000 - 1000 * (32 << 10) / kib(&node["capacity"]["memory"]));
    c.wait_field("pod forks", ".status.phase", |phase| phase == "Failed" || phase == "Succeeded");
    let text = c.k("logs forks");
    assert!(text.contains("can't fork") && !text.contains("all"), "{text}");

    // A gate holds a pod back until it is lifted.
    let gated = c.get("pod gated");
    assert_eq!(gated["status"]["conditions"][0]["reason"], "SchedulingGated", "{gated}");
    assert!(gated["spec"]["nodeName"].is_null());
    c.k("patch pod gated --type=json -p '[{\"op\": \"remove\", \"path\": \"/spec/schedulingGates\"}]'");
    c.wait_ready("gated");

    // The end waits for a hook that only sleeps.
    c.wait_ready("sleeps");
    let asked = Instant::now();
    c.k("delete pod sleeps");
    assert!(asked.elapsed() >= Duration::from_secs(3), "{:?}", asked.elapsed());

    // Pods from a URL come, change and go.
    let manifest = |text: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "far"}, "spec": {"terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": "member:1", "command": ["sh", "-c", format!("echo {text}; exec sleep 100000")]}]}})
    };
    let www = c.host.path("/var/lib/www");
    fs::create_dir_all(&www).unwrap();
    let serve = |text: &str| {
        fs::write(www.join("new"), manifest(text).to_string()).unwrap();
        fs::rename(www.join("new"), www.join("pod.json")).unwrap();
    };
    serve("first");
    let mut httpd =
        c.host.spawn("httpd.log", "busybox", &["httpd", "-f", "-p", "127.0.0.1:8099", "-h", "/var/lib/www"]);
    for text in ["first", "second"] {
        serve(text);
        eventually(text, || {
            let ran = c.kubectl("logs far-one");
            if ran.code == 0 && ran.out.trim() == text { Ok(()) } else { Err(ran) }
        });
    }
    fs::write(www.join("pod.json"), json!({"apiVersion": "v1", "kind": "PodList", "items": []}).to_string()).unwrap();
    eventually("the pod is gone", || {
        let ran = c.kubectl("get pod far-one");
        if ran.err.contains("NotFound") { Ok(()) } else { Err(ran) }
    });
    httpd.kill().unwrap();
    httpd.wait().unwrap();

    // Images that nobody has used for long go.
    eventually("an image is gone", || {
        let images = c.get("node one")["status"]["images"].to_string();
        if !images.contains("web:1") && images.contains("member:1") { Ok(()) } else { Err(images) }
    });

    // The machine's logs.
    fs::write(c.host.path("/var/log/demo.log"), "one line\nanother line\n").unwrap();
    assert_eq!(c.k("get --raw '/api/v1/nodes/one/proxy/logs/?query=demo'"), "one line\nanother line\n");
    let lease = c.get("lease one -n kube-node-lease");
    assert_eq!(lease["spec"]["holderIdentity"], "one");
}
