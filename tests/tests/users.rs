//! Pods with users of their own: root inside is nobody outside, and files keep the ids they have inside.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};

const OBJECTS: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: m}
data: {k: from the map}
---
apiVersion: v1
kind: Secret
metadata: {name: s}
stringData: {k: from the secret}
---
apiVersion: v1
kind: Pod
metadata: {name: own}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 77}
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'echo alive as $(id -u); touch /made /empty/made /host/made /memory/made; exec sleep 100000']
    volumeMounts:
    - {name: empty, mountPath: /empty}
    - {name: memory, mountPath: /memory}
    - {name: map, mountPath: /map}
    - {name: secret, mountPath: /secret}
    - {name: all, mountPath: /all}
    - {name: host, mountPath: /host}
    readinessProbe: {exec: {command: [cat, /host/made]}, periodSeconds: 1}
  - name: d
    image: busybox:1
    command: [sh, -c, 'nc -l -p 80 -e cat & exec sleep 100000']
    securityContext: {runAsUser: 1000}
    volumeMounts: [{name: empty, mountPath: /empty}]
  volumes:
  - {name: empty, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: map, configMap: {name: m}}
  - {name: secret, secret: {secretName: s, defaultMode: 0400}}
  - {name: all, projected: {sources: [{configMap: {name: m}}, {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}]}}
  - {name: host, hostPath: {path: /var/lib/shared, type: DirectoryOrCreate}}
---
apiVersion: v1
kind: Pod
metadata: {name: other}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: 'busybox:1', command: [sleep, '100000']}]
"#;

#[test]
fn root_inside_is_nobody_outside() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let features = c.get("node one")["status"]["runtimeHandlers"][0]["features"].clone();
    if features["userNamespaces"] != true {
        println!("this kernel cannot map ids on detached mounts: nothing to see");
        return;
    }
    c.apply(OBJECTS);
    c.wait_ready("own");
    c.wait_ready("other");
    let ask = |c: &Cluster, command: &str| c.k(&format!("exec own -c c -- sh -c '{command}'")).trim().to_owned();
    let x = |command: &str| ask(&c, command);
    assert_eq!(c.k("logs own -c c"), "alive as 0\n");
    let map: Vec<u64> = x("cat /proc/self/uid_map").split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert!(map[0] == 0 && map[1] >= 65_536 && map[2] == 65_536, "{map:?}");
    let other = c.k("exec other -- cat /proc/self/uid_map");
    assert_ne!(other.split_whitespace().nth(1).unwrap(), map[1].to_string());
    // Inside everything is root's, what is read-only for others can be read.
    for file in ["/made", "/empty/made", "/memory/made", "/host/made", "/bin/busybox", "/etc/hosts", "/map/k"] {
        assert_eq!(x(&format!("stat -L -c %u {file}")), "0", "{file}");
    }
    assert_eq!(x("stat -c %g /empty"), "77");
    assert_eq!(x("cat /map/k /secret/k /all/k /all/name"), "from the mapfrom the secretfrom the mapown");
    // Outside too on disk, but its processes are nobody's.
    assert_eq!(c.host.must("stat -c %u:%g /var/lib/shared/made").trim(), "0:0");
    let uid = c.get("pod own")["metadata"]["uid"].as_str().unwrap().to_owned();
    let made = format!("stat -c %u /var/lib/isopod/pods/{uid}/volumes/kubernetes.io~empty-dir/empty/made");
    assert_eq!(c.host.must(&made).trim(), "0");
    let note = c.host.must(&format!("cat /var/lib/isopod/pods/{uid}/userns"));
    assert!(note.contains(&format!("\"hostId\":{}", map[1])), "{note}");
    let pid = c.host.must(&format!(
        "for f in /run/isopod/pods/{uid}/containers/*/status.json; do grep -o '\"pid\":[0-9]*' $f | cut -d: -f2; done"
    ));
    for pid in pid.split_whitespace() {
        let line = c.host.must(&format!("grep ^Uid: /proc/{pid}/status"));
        let outside: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!((map[1]..map[1] + 65_536).contains(&outside), "{line}");
    }
    // A second container of the pod, of another user, shares the volume and may use a low port.
    assert_eq!(c.k("exec own -c d -- stat -c %u /empty/made").trim(), "0");
    assert_eq!(c.k("exec own -c d -- id -u").trim(), "1000");
    // What root of the machine may, it may not.
    assert!(x("echo 1 > /proc/sys/kernel/panic 2>&1 || echo refused").contains("refused"));
    // The agent comes again: the range stays.
    c.kill_agent();
    c.up();
    c.wait_ready("own");
    let now = ask(&c, "cat /proc/self/uid_map");
    assert_eq!(now.split_whitespace().nth(1).unwrap(), map[1].to_string());
    assert_eq!(c.get("pod own")["status"]["containerStatuses"][0]["restartCount"], 0);
    c.k("delete pod own other --wait=true");
    eventually("nothing is left", || {
        let ran = c.host.sh(&format!("ls -d /var/lib/isopod/pods/{uid}"));
        if ran.code != 0 { Ok(()) } else { Err(ran) }
    });
}
