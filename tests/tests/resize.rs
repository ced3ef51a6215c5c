//! In-place resize: cgroups, statuses, conditions, restarts where they are asked for, and waiting for room.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use isopod_tests::{Cluster, Net, eventually};
use serde_json::{Value, json};

fn pod(name: &str, containers: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": containers}})
}

fn container(name: &str, cpu: &str, memory: &str) -> Value {
    let amounts = json!({"cpu": cpu, "memory": memory});
    json!({"name": name, "image": "busybox:1", "command": ["sleep", "100000"], "resources": {"limits": amounts, "requests": amounts}})
}

/// The patch of one container's resources.
fn patch(c: &Cluster, pod: &str, name: &str, cpu: &str, memory: &str) {
    let amounts = json!({"cpu": cpu, "memory": memory});
    let patch =
        json!({"spec": {"containers": [{"name": name, "resources": {"limits": amounts, "requests": amounts}}]}});
    c.k(&format!("patch pod {pod} --subresource resize -p '{patch}'"));
}

/// Conditions of a resize: type, reason, message.
fn conditions(c: &Cluster, pod: &str) -> Vec<(String, String, String)> {
    let p = c.get(&format!("pod {pod}"));
    let all = p["status"]["conditions"].as_array().unwrap().clone();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let ours = all.iter().filter(|c| c["type"].as_str().unwrap().starts_with("PodResize"));
    ours.map(|c| (text(&c["type"]), text(&c["reason"]), text(&c["message"]))).collect()
}

/// Waits until a container has these limits and no resize is under way any more.
#[track_caller]
fn settled(c: &Cluster, pod: &str, index: usize, cpu: &str, memory: &str) {
    eventually(&format!("{pod} has {cpu} {memory}"), || {
        let p = c.get(&format!("pod {pod}"));
        let s = &p["status"]["containerStatuses"][index];
        let want = json!({"cpu": cpu, "memory": memory});
        let is =
            s["resources"]["limits"] == want && s["resources"]["requests"] == want && s["allocatedResources"] == want;
        if is && conditions(c, pod).is_empty() { Ok(()) } else { Err(p["status"].clone()) }
    });
}

/// Quota in microseconds and memory limit in bytes as the container sees them.
fn limits(c: &Cluster, pod: &str, container: &str) -> String {
    let script = "cd /sys/fs/cgroup; if [ -e cpu.max ]; then cut -d\" \" -f1 cpu.max; cat memory.max; \
                  else cat cpu/cpu.cfs_quota_us memory/memory.limit_in_bytes; fi";
    c.k(&format!("exec {pod} -c {container} -- sh -c '{script}'")).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn pods_grow_and_shrink_in_place() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    let mut restarting = container("c", "100m", "32Mi");
    restarting["resizePolicy"] = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    let mut full = container("c", "100m", "64Mi");
    full["command"] = json!(["sh", "-c", "dd if=/dev/zero of=/dev/shm/f bs=1M count=40; sleep 100000"]);
    full["readinessProbe"] =
        json!({"exec": {"command": ["sh", "-c", "[ $(stat -c %s /dev/shm/f) = 41943040 ]"]}, "periodSeconds": 1});
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        pod("grows", json!([container("a", "100m", "32Mi"), container("b", "200m", "64Mi")])),
        pod("restarts", json!([restarting])),
        pod("full", json!([full])),
        pod("equal", json!([container("c", "2m", "32Mi")])),
        pod("three", json!(["a", "b", "c"].map(|name| container(name, "30m", "32Mi")))),
    ]});
    c.apply(&list.to_string());
    for name in ["grows", "restarts", "full", "equal", "three"] {
        c.wait_ready(name);
    }
    let restarts = |pod: &str| c.get(&format!("pod {pod}"))["status"]["containerStatuses"][0]["restartCount"].clone();

    // More for one container, less for another, one after the other.
    patch(&c, "grows", "a", "150m", "48Mi");
    settled(&c, "grows", 0, "150m", "48Mi");
    assert_eq!(limits(&c, "grows", "a"), "15000 50331648");
    patch(&c, "grows", "b", "50m", "40Mi");
    settled(&c, "grows", 1, "50m", "40Mi");
    assert_eq!(limits(&c, "grows", "b"), "5000 41943040");
    assert_eq!(restarts("grows"), 0);
    let p = c.get("pod grows");
    assert_eq!(p["status"]["observedGeneration"], p["metadata"]["generation"]);

    // Amounts the kernel cannot tell apart are still shown as wanted.
    patch(&c, "equal", "c", "1m", "32Mi");
    settled(&c, "equal", 0, "1m", "32Mi");

    // Three containers at once, by patch: one more, one less, one of each.
    let wishes = [("a", "50m", "40Mi"), ("b", "20m", "24Mi"), ("c", "40m", "24Mi")];
    let resources = |(name, cpu, memory): (&str, &str, &str)| {
        let amounts = json!({"cpu": cpu, "memory": memory});
        json!({"name": name, "resources": {"limits": amounts, "requests": amounts}})
    };
    let wish = json!({"spec": {"containers": wishes.map(resources)}});
    c.k(&format!("patch pod three --subresource resize -p '{wish}'"));
    for (i, (_, cpu, memory)) in wishes.into_iter().enumerate() {
        settled(&c, "three", i, cpu, memory);
    }
    assert_eq!(limits(&c, "three", "b"), "2000 25165824");
    // Read and replaced by the subresource, which shows the pod as it is.
    let mut read: Value = serde_json::from_str(&c.k("get pod three --subresource resize -o json")).unwrap();
    assert_eq!(read, c.get("pod three"));
    let less = json!({"cpu": "25m", "memory": "24Mi"});
    read["spec"]["containers"][0]["resources"] = json!({"limits": less, "requests": less});
    std::fs::write(c.host.path("/var/lib/three.json"), read.to_string()).unwrap();
    c.k("replace --subresource resize -f /var/lib/three.json");
    settled(&c, "three", 0, "25m", "24Mi");
    assert_eq!(limits(&c, "three", "a"), "2500 25165824");
    assert_eq!(restarts("three"), 0);

    // cpu changes in place, memory by a restart.
    patch(&c, "restarts", "c", "120m", "32Mi");
    settled(&c, "restarts", 0, "120m", "32Mi");
    assert_eq!(restarts("restarts"), 0);
    patch(&c, "restarts", "c", "120m", "40Mi");
    settled(&c, "restarts", 0, "120m", "40Mi");
    assert_eq!(restarts("restarts"), 1);
    assert_eq!(limits(&c, "restarts", "c"), "12000 41943040");

    // What is in use cannot be taken away.
    patch(&c, "full", "c", "100m", "16Mi");
    eventually("the shrink fails", || {
        let all = conditions(&c, "full");
        let failed = all.iter().any(|(t, r, m)| {
            t == "PodResizeInProgress"
                && r == "Error"
                && m.starts_with("attempting to set container memory limit (16777216) below current usage")
        });
        if failed { Ok(()) } else { Err(all) }
    });
    assert_eq!(restarts("full"), 0);
    eventually("ResizeError", || {
        let events = c.k("get events --field-selector involvedObject.name=full,reason=ResizeError");
        if events.contains("below current usage") { Ok(()) } else { Err(events) }
    });

    // Never, and not yet.
    patch(&c, "grows", "a", "1000", "48Mi");
    eventually("a thousand cores are refused", || {
        let all = conditions(&c, "grows");
        let text = "Node didn't have enough capacity: cpu, requested: 1000050, capacity: ";
        let refused = all
            .iter()
            .any(|(t, r, m)| (t.as_str(), r.as_str()) == ("PodResizePending", "Infeasible") && m.starts_with(text));
        if refused { Ok(()) } else { Err(all) }
    });
    assert_eq!(limits(&c, "grows", "a"), "15000 50331648");
    patch(&c, "grows", "a", "150m", "48Mi");
    settled(&c, "grows", 0, "150m", "48Mi");
    c.k("delete pod restarts full equal three --timeout=30s");
    let milli = |v: &Value| match v.as_str().unwrap_or("0") {
        m if m.ends_with('m') => m.trim_end_matches('m').parse::<i64>().unwrap(),
        whole => whole.parse::<i64>().unwrap() * 1000,
    };
    let node = milli(&c.get("node one")["status"]["allocatable"]["cpu"]);
    let system: i64 = c.get("pods -n kube-system")["items"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|p| p["spec"]["containers"].as_array().unwrap())
        .map(|c| milli(&c["resources"]["requests"]["cpu"]))
        .sum();
    let most = format!("{}m", node - system - 100);
    c.apply(&pod("big", json!([container("c", "300m", "32Mi")])).to_string());
    c.wait_ready("big");
    patch(&c, "grows", "a", &most, "48Mi");
    eventually("there is no room yet", || {
        let all = conditions(&c, "grows");
        if all.iter().any(|(t, r, _)| (t.as_str(), r.as_str()) == ("PodResizePending", "Deferred")) {
            Ok(())
        } else {
            Err(all)
        }
    });
    c.k("delete pod big --wait=false");
    settled(&c, "grows", 0, &most, "48Mi");
    assert_eq!(restarts("grows"), 0);
    let events = c.k("get events --field-selector involvedObject.name=grows");
    for reason in ["ResizeStarted", "ResizeCompleted", "ResizeInfeasible", "ResizeDeferred"] {
        assert!(events.contains(reason), "{reason}: {events}");
    }
}
