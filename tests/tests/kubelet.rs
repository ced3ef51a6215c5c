//! What a kubelet does for volumes, probes and logs beyond the conformance sample: the rows of docs/KUBELET.md's table of
//! deliverables that no other test has.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{Cluster, Net, eventually, image::Image};
use serde_json::json;

const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 100Mi}\n\
                             containerLogMaxSize: 20Ki\ncontainerLogMaxFiles: 3\n";

fn pod(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n{spec}"
    )
}

/// A pod that sleeps with one volume of the host.
fn host_path(name: &str, path: &str, kind: &str, mount: &str) -> String {
    pod(
        name,
        &format!(
            "  containers:\n  - name: c\n    image: busybox:1\n    command: [sleep, '100000']\n    \
             volumeMounts: [{{name: v, mountPath: /v{mount}}}]\n  \
             volumes: [{{name: v, hostPath: {{path: {path}, type: '{kind}'}}}}]\n"
        ),
    )
}

/// Type, something that is of it, something that is not, what is said of that.
const TYPES: [(&str, &str, &str, &str); 6] = [
    ("Directory", "/var/lib/hp/dir", "/var/lib/hp/file", "is not a directory"),
    ("File", "/var/lib/hp/file", "/var/lib/hp/dir", "is not a file"),
    ("Socket", "/run/isopod/cri.sock", "/var/lib/hp/file", "is not a socket file"),
    ("CharDevice", "/var/lib/hp/char", "/var/lib/hp/block", "is not a character device"),
    ("BlockDevice", "/var/lib/hp/block", "/var/lib/hp/char", "is not a block device"),
    ("Directory", "/var/lib/hp/dir", "/var/lib/hp/none", "is not a directory"),
];

#[test]
fn volumes_of_the_host_are_what_was_asked_for() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.host.must(
        "mkdir -p /var/lib/hp/dir /var/lib/hp/shared /var/lib/hp/over/sub; cd /var/lib/hp; echo text > file; \
         mknod char c 1 3; mknod block b 7 0; mount -t tmpfs below over/sub; \
         mount --bind shared shared; mount --make-shared shared",
    );
    let mut yaml = String::new();
    for (n, (kind, right, wrong, _)) in TYPES.iter().enumerate() {
        yaml += &host_path(&format!("right-{n}"), right, kind, "");
        yaml += &host_path(&format!("wrong-{n}"), wrong, kind, "");
    }
    yaml += &host_path("makes-dir", "/var/lib/hp/new/dir", "DirectoryOrCreate", "");
    yaml += &host_path("makes-file", "/var/lib/hp/new-file", "FileOrCreate", "");
    yaml += &host_path("anything", "/var/lib/hp/whatever", "", "");
    yaml += &host_path("read-only", "/var/lib/hp/over", "", ", readOnly: true");
    yaml += &host_path("all-read-only", "/var/lib/hp/over", "", ", readOnly: true, recursiveReadOnly: Enabled");
    yaml += &host_path("hears", "/var/lib/hp/shared", "", ", mountPropagation: HostToContainer");
    yaml += &host_path("deaf", "/var/lib/hp/shared", "", "");
    let both = host_path("not-shared", "/var/lib/hp/dir", "", ", mountPropagation: Bidirectional");
    yaml += &both.replace("    command:", "    securityContext: {privileged: true}\n    command:");
    c.apply(&yaml);
    for (n, (_, _, wrong, why)) in TYPES.iter().enumerate() {
        c.wait_ready(&format!("right-{n}"));
        let want = format!("hostPath type check failed: {wrong} {why}");
        eventually(&want, || {
            let events = c.k(&format!("get events --field-selector involvedObject.name=wrong-{n},reason=FailedMount"));
            if events.contains(&want) { Ok(()) } else { Err(events) }
        });
    }
    for name in ["makes-dir", "makes-file", "anything", "read-only", "all-read-only", "hears", "deaf"] {
        c.wait_ready(name);
    }
    assert_eq!(c.host.must("stat -c %a /var/lib/hp/new/dir /var/lib/hp/new-file"), "755\n644\n");
    // Read-only, and read-only all the way down.
    assert_ne!(c.kubectl("exec read-only -- touch /v/x").code, 0);
    c.k("exec read-only -- touch /v/sub/x");
    let refused = c.kubectl("exec all-read-only -- touch /v/sub/y");
    assert!(refused.code != 0 && refused.err.contains("Read-only"), "{refused:?}");
    let told = ".status.containerStatuses[0].volumeMounts[0].recursiveReadOnly";
    c.wait_field("pod all-read-only", told, |v| v == "Enabled");
    // What one pod mounts, the host and those that listen see.
    c.apply(&pod(
        "mounts",
        "  containers:\n  - name: c\n    image: busybox:1\n    securityContext: {privileged: true}\n    \
         command: [sh, -c, 'mkdir -p /v/m && mount -t tmpfs inner /v/m && echo seen > /v/m/f; exec sleep 100000']\n    \
         volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]\n  \
         volumes: [{name: v, hostPath: {path: /var/lib/hp/shared}}]\n",
    ));
    eventually("the host sees it", || c.host.sh("cat /var/lib/hp/shared/m/f").ok());
    assert_eq!(c.k("exec hears -- cat /v/m/f").trim(), "seen");
    assert_ne!(c.kubectl("exec deaf -- cat /v/m/f").code, 0);
    let waiting = ".status.containerStatuses[0].state.waiting.message";
    c.wait_field("pod not-shared", waiting, |m| m.contains("is mounted on") && m.contains("not a shared mount"));
    // What a crash left of volumes goes when the agent comes back, mounts first.
    c.kill_agent();
    let orphan = "/var/lib/isopod/pods/11111111-2222-3333-4444-555555555555/volumes/kubernetes.io~empty-dir/v";
    c.host.must(&format!("mkdir -p {orphan} && mount -t tmpfs orphan {orphan} && echo data > {orphan}/f"));
    c.up();
    eventually("the orphan is gone", || {
        let ran = c.host.sh("grep orphan /proc/self/mountinfo; ls /var/lib/isopod/pods | grep 11111111");
        if ran.out.is_empty() { Ok(()) } else { Err(ran) }
    });
    c.k("delete pods --all --now");
    assert_eq!(c.host.must("cat /var/lib/hp/file /var/lib/hp/shared/m/f"), "text\nseen\n", "what is the host's stays");
    c.host.must("umount /var/lib/hp/shared/m /var/lib/hp/shared /var/lib/hp/over/sub");
}

const PROBED: &str = "
  containers:
  - name: http
    image: web:1
    ports: [{name: web, containerPort: 8080}]
    livenessProbe: {httpGet: {path: /index.html, port: web, httpHeaders: [{name: X-Probe, value: '1'}]}, periodSeconds: 1, failureThreshold: 2}
    readinessProbe: {httpGet: {path: /index.html, port: 8080}, periodSeconds: 1, successThreshold: 2}
  - name: tcp
    image: busybox:1
    command: [sh, -c, 'mkdir /w; httpd -f -p 8081 -h /w & p=$!; trap \"kill $p\" USR1; while :; do sleep 1000 & wait $!; done']
    livenessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1, failureThreshold: 2}
  - name: slow
    image: busybox:1
    command: [sh, -c, 'sleep 3; touch /tmp/up; exec sleep 100000']
    startupProbe: {exec: {command: [cat, /tmp/up]}, periodSeconds: 1, failureThreshold: 30}
    livenessProbe: {exec: {command: [cat, /tmp/up]}, periodSeconds: 1, failureThreshold: 1}
  - name: dead
    image: busybox:1
    command: [sleep, '100000']
    livenessProbe: {grpc: {port: 9999}, initialDelaySeconds: 1, periodSeconds: 1, failureThreshold: 1}
";

const STOPPED: &str = "
  containers:
  - name: c
    image: stops:1
    command: [sh, -c, 'trap \"echo by USR1 > /host/stopped; exit 0\" USR1; while :; do sleep 0.2; done']
    volumeMounts: [{name: host, mountPath: /host}]
  volumes: [{name: host, hostPath: {path: /var/lib/stopped, type: DirectoryOrCreate}}]
";

#[test]
fn probes_signals_and_logs() {
    let mut net = Net::new();
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), CONFIGURATION).unwrap();
    Image::busybox("stops:1")
        .config("StopSignal", json!("SIGUSR1"))
        .save(&host.path("/var/lib/isopod/images").join("stops.tar"));
    let c = Cluster::start(&host);
    let talks = "  restartPolicy: Never\n  containers: [{name: c, image: 'busybox:1', \
                 command: [sh, -c, 'i=0; while [ $i -lt 4000 ]; do echo line $i of the log; i=$((i+1)); done']}]\n";
    c.apply(&[pod("probed", PROBED), pod("stopped", STOPPED), pod("talks", talks)].concat());
    let restarts = |container: &str| {
        let path = format!(".status.containerStatuses[?(@.name==\"{container}\")].restartCount");
        c.wait_field("pod probed", &path, |n| !n.is_empty()).parse::<u32>().unwrap()
    };
    let restarted = |container: &str| {
        eventually(&format!("{container} restarts"), || {
            Some(restarts(container)).filter(|n| *n == 0).map_or(Ok(()), Err)
        });
    };
    let says = |container: &str, what: &str| {
        eventually(what, || {
            let events = c.k("get events --field-selector involvedObject.name=probed");
            let line = events.lines().find(|l| l.contains(what) && l.contains("Unhealthy")).map(str::to_owned);
            line.ok_or((container.to_owned(), events))
        });
    };
    // No server answers gRPC there.
    restarted("dead");
    says("dead", "Liveness probe failed: timeout: failed to connect service");
    // A startup probe holds the liveness probe back.
    c.wait_field("pod probed", ".status.containerStatuses[?(@.name==\"slow\")].started", |s| s == "true");
    assert_eq!((restarts("slow"), restarts("http"), restarts("tcp")), (0, 0, 0));
    c.wait_field("pod probed", ".status.containerStatuses[?(@.name==\"http\")].ready", |s| s == "true");
    c.k("exec probed -c http -- rm /www/index.html");
    restarted("http");
    says("http", "Liveness probe failed: HTTP probe failed with statuscode: 404");
    c.k("exec probed -c tcp -- kill -USR1 1");
    restarted("tcp");
    says("tcp", "connection refused");
    assert_eq!(restarts("slow"), 0);
    // The image's own signal.
    c.wait_ready("stopped");
    c.k("delete pod stopped --timeout=30s");
    assert_eq!(fs::read_to_string(c.host.path("/var/lib/stopped/stopped")).unwrap(), "by USR1\n");
    // A log is cut into files of the configured size, of which so many are kept; reading goes across them.
    c.wait_field("pod talks", ".status.phase", |p| p == "Succeeded");
    let sizes = c.host.must("stat -c %s /var/log/pods/default_talks_*/c/*");
    let sizes: Vec<u64> = sizes.lines().map(|s| s.parse().unwrap()).collect();
    assert!((2..=3).contains(&sizes.len()) && sizes.iter().all(|s| *s <= 24 * 1024), "{sizes:?}");
    let log = c.k("logs talks");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(*lines.last().unwrap(), "line 3999 of the log");
    assert!(lines.len() < 4000 && c.k("logs talks --tail=1").trim() == "line 3999 of the log", "{}", lines.len());
}
