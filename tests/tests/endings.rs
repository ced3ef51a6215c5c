//! Hooks, probes, deadlines, sidecars and last words, on real pods; and what happens when a pod's supervisor dies.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{Cluster, Net, eventually};

const PODS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: live}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'touch /tmp/ok; sleep 2; rm /tmp/ok; sleep 1000']
    livenessProbe: {exec: {command: [cat, /tmp/ok]}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: slow}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox:1
    command: [sleep, '1000']
    startupProbe: {exec: {command: ['false']}, periodSeconds: 1, failureThreshold: 2}
---
apiVersion: v1
kind: Pod
metadata: {name: hooks}
spec:
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'trap "echo term >> /host/hooks; exit 0" TERM; while true; do sleep 0.1; done']
    lifecycle:
      postStart: {exec: {command: [sh, -c, 'echo post >> /host/hooks']}}
      preStop: {exec: {command: [sh, -c, 'sleep 0.3; echo pre >> /host/hooks']}}
    readinessProbe: {exec: {command: [grep, post, /host/hooks]}, periodSeconds: 1}
    volumeMounts: [{name: host, mountPath: /host}]
  volumes: [{name: host, hostPath: {path: /var/lib/hooks, type: DirectoryOrCreate}}]
---
apiVersion: v1
kind: Pod
metadata: {name: late}
spec:
  activeDeadlineSeconds: 2
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: 'busybox:1', command: [sleep, '1000']}
---
apiVersion: v1
kind: Pod
metadata: {name: words}
spec:
  restartPolicy: Never
  containers:
  - {name: c, image: 'busybox:1', command: [sh, -c, 'echo -n goodbye > /dev/termination-log; exit 4']}
  - {name: l, image: 'busybox:1', command: [sh, -c, 'echo from the log; exit 5'], terminationMessagePolicy: FallbackToLogsOnError}
---
apiVersion: v1
kind: Pod
metadata: {name: side}
spec:
  restartPolicy: Never
  initContainers:
  - name: s
    image: busybox:1
    restartPolicy: Always
    command: [sh, -c, 'trap "echo side-end >> /host/side; exit 0" TERM; echo side >> /host/side; while true; do sleep 0.1; done']
    startupProbe: {exec: {command: [grep, side, /host/side]}, periodSeconds: 1}
    volumeMounts: [{name: host, mountPath: /host}]
  - name: i
    image: busybox:1
    command: [sh, -c, 'echo init >> /host/side']
    volumeMounts: [{name: host, mountPath: /host}]
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'sleep 0.5; echo main >> /host/side']
    volumeMounts: [{name: host, mountPath: /host}]
  volumes: [{name: host, hostPath: {path: /var/lib/hooks, type: DirectoryOrCreate}}]
---
apiVersion: v1
kind: Pod
metadata: {name: again}
spec:
  restartPolicy: Never
  initContainers:
  - {name: i, image: 'busybox:1', command: [sh, -c, 'echo init >> /kept/again'], volumeMounts: [{name: kept, mountPath: /kept}]}
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'grep -c init /kept/again > /dev/termination-log; test $(grep -c init /kept/again) = 2 || exit 88']
    restartPolicy: Never
    restartPolicyRules: [{action: RestartAllContainers, exitCodes: {operator: In, values: [88]}}]
    volumeMounts: [{name: kept, mountPath: /kept}]
  - name: d
    image: busybox:1
    command: [sh, -c, 'until test $(grep -c init /kept/again) = 2; do sleep 0.1; done']
    lifecycle: {preStop: {exec: {command: [sh, -c, 'echo hook >> /kept/again']}}}
    volumeMounts: [{name: kept, mountPath: /kept}]
  volumes: [{name: kept, emptyDir: {}}]
"#;

#[test]
fn hooks_probes_deadlines_and_last_words() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(PODS);
    let told = |file: &str| fs::read_to_string(c.host.path(&format!("/var/lib/hooks/{file}"))).unwrap_or_default();

    c.wait_field("pod words", ".status.phase", |phase| phase == "Failed");
    let words = c.get("pod words");
    let ended = |name: &str| {
        let all = words["status"]["containerStatuses"].as_array().unwrap();
        let one = all.iter().find(|s| s["name"] == name).unwrap();
        let t = &one["state"]["terminated"];
        (t["exitCode"].clone(), t["reason"].clone(), t["message"].clone())
    };
    assert_eq!(ended("c"), (4.into(), "Error".into(), "goodbye".into()));
    assert_eq!(ended("l"), (5.into(), "Error".into(), "from the log\n".into()));
    c.wait_field("pod words", ".status.podIP", |ip| ip.starts_with("10.244."));

    c.wait_ready("hooks");
    c.k("delete pod hooks --timeout=30s");
    assert_eq!(told("hooks"), "post\npre\nterm\n");

    c.wait_field("pod side", ".status.phase", |phase| phase == "Succeeded");
    assert_eq!(told("side"), "side\ninit\nmain\nside-end\n");

    // One container's end restarts all of the pod: from the init container, in the same sandbox, with the same volumes.
    c.wait_field("pod again", ".status.phase", |phase| phase == "Succeeded");
    let again = c.get("pod again")["status"].clone();
    for s in ["initContainerStatuses", "containerStatuses"].iter().flat_map(|l| again[l].as_array().unwrap()) {
        assert_eq!((&s["restartCount"], &s["state"]["terminated"]["exitCode"]), (&1.into(), &0.into()), "{s}");
    }
    assert_eq!(again["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 88);
    let conditions = again["conditions"].as_array().unwrap();
    assert!(conditions.iter().any(|c| c["type"] == "AllContainersRestarting" && c["reason"] == "PodCompleted"));

    c.wait_field("pod late", ".status.reason", |reason| reason == "DeadlineExceeded");
    let late = c.get("pod late");
    assert_eq!(late["status"]["phase"], "Failed");
    assert!(late["status"]["podIP"].as_str().unwrap().starts_with("10.244."));
    assert_eq!(late["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 137);

    for (pod, probe) in [("live", "liveness"), ("slow", "startup")] {
        c.wait_field(&format!("pod {pod}"), ".status.containerStatuses[0].restartCount", |n| {
            n.parse::<u32>().is_ok_and(|n| n >= 1)
        });
        let events = c.k(&format!("get events --field-selector involvedObject.name={pod}"));
        assert!(events.contains("Unhealthy") && events.contains(&format!("failed {probe} probe")), "{events}");
    }
}

#[test]
fn a_pod_survives_the_death_of_its_supervisor() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  terminationGracePeriodSeconds: 1\n  initContainers:\n  - {name: i, image: 'busybox:1', \
         command: [sh, -c, 'echo ran >> /host/init'], volumeMounts: [{name: host, mountPath: /host}]}\n  containers:\n  \
         - {name: c, image: 'busybox:1', command: [sleep, '54321']}\n  \
         volumes: [{name: host, hostPath: {path: /var/lib/death, type: DirectoryOrCreate}}]\n",
    );
    c.wait_ready("p");
    let before = c.get("pod p");
    let uid = before["metadata"]["uid"].as_str().unwrap();
    c.host.must(&format!("kill -9 $(cat /run/isopod/pods/{uid}/supervisor.pid)"));
    c.wait_field("pod p", ".status.containerStatuses[0].restartCount", |n| n == "1");
    c.wait_ready("p");
    let after = c.get("pod p");
    assert_eq!(after["status"]["podIP"], before["status"]["podIP"]);
    assert_eq!(fs::read_to_string(c.host.path("/var/lib/death/init")).unwrap(), "ran\nran\n");
    assert_eq!(c.host.must("pgrep -f 'sleep 5432[1]' | wc -l").trim(), "1");
    eventually("it is told", || {
        let events = c.k("get events --field-selector involvedObject.name=p");
        if events.contains("SandboxChanged") { Ok(()) } else { Err(events) }
    });
    // Nobody is there to see it: the next agent tells of a pod with another address.
    c.kill_agent();
    c.host.must(&format!("kill -9 $(cat /run/isopod/pods/{uid}/supervisor.pid)"));
    c.up();
    c.wait_field("pod p", ".status.containerStatuses[0].restartCount", |n| n == "2");
    let ip = c.get("pod p")["status"]["podIP"].as_str().unwrap().to_owned();
    assert_eq!(c.get("pod p")["status"]["podIPs"], serde_json::json!([{"ip": ip}]));
    c.k("delete pod p --timeout=30s");
    eventually("nothing is left", || {
        let ran =
            c.host.sh(&format!("find /var/lib/isopod/pods /run/isopod/pods /sys/fs/cgroup -name '*{uid}*' | grep ."));
        if ran.code == 1 { Ok(()) } else { Err(ran) }
    });
}

#[test]
fn a_successor_waits_for_what_is_still_held_here() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let pod = |n: u8| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}}}\nspec:\n  containers:\n  - name: c\n    image: web:1\n    \
             ports: [{{containerPort: 8080, hostPort: 8123}}]\n    env: [{{name: TEXT, value: p{n}}}]\n"
        )
    };
    c.apply(&pod(0));
    c.wait_ready("p0");
    // Gone from the API at once, while its processes and ports go in their own time.
    for n in 1..5 {
        c.k(&format!("delete pod p{} --grace-period=0 --force --wait=false", n - 1));
        c.apply(&pod(n));
        c.wait_ready(&format!("p{n}"));
    }
    let answer = c.host.must("curl -s --retry 5 --retry-connrefused http://10.88.0.1:8123/");
    assert!(!answer.is_empty());
    assert_eq!(c.k("get events --field-selector reason=NodePorts -o name"), "");
}
