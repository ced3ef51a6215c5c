//! Broken pods and what is said of them.

use serde_json::json;

use super::*;

fn why(pod: Value, record: Value, events: Value) -> Cause {
    let mut pod = pod;
    pod["metadata"]["namespace"] = json!("d");
    pod["metadata"]["name"] = json!("p");
    let events = events.as_array().cloned().unwrap_or_default();
    of(&Facts { pod: &pod, record: &record, events: &events, last_words: &|_| vec!["boom".to_owned()] })
}

fn with(status: Value) -> Value {
    json!({"metadata": {}, "spec": {"containers": [{"name": "c", "resources": {"limits": {"memory": "16Mi"}}}]}, "status": status})
}

fn one(container: Value) -> Value {
    let mut c = container;
    c["name"] = json!("c");
    c["image"] = json!("r.example/app:1");
    with(json!({"phase": "Pending", "containerStatuses": [c]}))
}

#[test]
fn every_way_to_be_broken_has_its_words() {
    let none = Value::Null;
    let pull = json!([{"reason": "Failed", "message": "Failed to pull image \"r.example/app:1\": r.example/app:1: not found"},
        {"reason": "Failed", "message": "Error: ErrImagePull"}]);
    let cases = [
        (
            one(json!({"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}}})),
            none.clone(),
            pull,
            "the image of container c cannot be had: r.example/app:1",
            "typing error",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "ErrImagePull", "message": "pull access denied"}}})),
            none.clone(),
            none.clone(),
            "cannot be had",
            "imagePullSecrets",
        ),
        (
            one(
                json!({"state": {"waiting": {"reason": "ErrImagePull", "message": "error sending request: dns error"}}}),
            ),
            none.clone(),
            none.clone(),
            "cannot be had",
            "cannot be reached",
        ),
        (
            one(
                json!({"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}}, "restartCount": 3,
            "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}}),
            ),
            none.clone(),
            none.clone(),
            "container c does not stay up: it ended with exit code 1",
            "isopod logs d/p -c c --previous",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}},
            "lastState": {"terminated": {"exitCode": 0, "reason": "Completed"}}})),
            none.clone(),
            json!([{"reason": "FailedPostStartHook", "message": "PostStartHook failed",
                "involvedObject": {"fieldPath": "spec.containers{c}"}}]),
            "container c does not stay up: its postStart hook fails",
            "lifecycle.postStart",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}},
            "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}})),
            none.clone(),
            none.clone(),
            "killed for its use of memory: its limit is 16Mi",
            "raise resources.limits.memory",
        ),
        (
            one(
                json!({"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "configmap \"m\" not found"}}}),
            ),
            none.clone(),
            none.clone(),
            "cannot be configured: configmap \"m\" not found",
            "create the ConfigMap in namespace d",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "ContainerCreating"}}})),
            json!({"blocked": "MountVolume.SetUp failed for volume \"v\" : hostPath type check failed: /x is not a directory"}),
            none.clone(),
            "MountVolume.SetUp failed",
            "DirectoryOrCreate",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "ContainerCreating"}}})),
            json!({"blocked": "MountVolume.SetUp failed for volume \"v\" : mount failed: exit status 32\nMounting command: \
                mount\nMounting arguments: -t nfs 10.0.0.1:/x /v\nOutput: mount.nfs: access denied by server while mounting 10.0.0.1:/x"}),
            none.clone(),
            "MountVolume.SetUp failed",
            "have the server export it to this node",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "ContainerCreating"}}})),
            json!({"blocked": "MountVolume.SetUp failed for volume \"v\" : mount failed: exit status 32\nMounting command: \
                mount\nMounting arguments: -t nfs 10.0.0.1:/x /v\nOutput: mount: /v: unknown filesystem type 'nfs'."}),
            none.clone(),
            "MountVolume.SetUp failed",
            "nfs-common",
        ),
        (
            one(json!({"state": {"waiting": {"reason": "CreateContainerConfigError",
                "message": "the server of volume \"v\" does not answer"}}})),
            none.clone(),
            none.clone(),
            "container c cannot be configured: the server of volume",
            "port 2049",
        ),
        (
            one(json!({"state": {"running": {}}, "started": true, "ready": false})),
            none.clone(),
            json!([{"reason": "Unhealthy", "message": "Readiness probe failed: HTTP probe failed with statuscode: 500"}]),
            "does not pass its readiness probe",
            "by hand",
        ),
        (
            with(json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}],
            "containerStatuses": [{"name": "c", "state": {"waiting": {"reason": "PodInitializing"}}}]})),
            none.clone(),
            none.clone(),
            "init container i has been running",
            "isopod logs d/p -c i",
        ),
        (
            with(json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."})),
            none.clone(),
            none.clone(),
            "the pod failed: Evicted: The node was low",
            "request what the pod uses",
        ),
        (
            with(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "c", "state": {"running": {}}, "ready": true, "started": true}]})),
            none.clone(),
            none.clone(),
            "nothing: it has been running",
            "",
        ),
        (
            one(
                json!({"state": {"terminated": {"reason": "StartError", "exitCode": 128, "message": "exec /nope: no such file"}}}),
            ),
            none.clone(),
            none.clone(),
            "could not be started: exec /nope",
            "command, args",
        ),
    ];
    for (pod, record, events, want, todo) in cases {
        let got = why(pod, record, events);
        assert!(got.why.contains(want), "{got:?}");
        assert!(todo.is_empty() || got.todo.iter().any(|t| t.contains(todo)), "{todo}: {got:?}");
    }
}

#[test]
fn a_pod_that_ends_says_whom_it_waits_for() {
    let mut pod = with(json!({"phase": "Running", "containerStatuses": [{"name": "c", "state": {"running": {}}}]}));
    pod["metadata"] = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 5});
    let got = why(pod.clone(), Value::Null, Value::Null);
    assert_eq!(got.why, "it is being deleted and waits for c to end");
    pod["status"]["containerStatuses"] = json!([]);
    pod["metadata"]["finalizers"] = json!(["a/b"]);
    assert!(why(pod, Value::Null, Value::Null).why.contains("finalizers hold the object: a/b"));
}

#[test]
fn pods_without_a_node_or_without_an_object() {
    let pending = |message: &str| json!({"spec": {}, "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}});
    let got = unscheduled(&pending("0/1 nodes are available: 1 Insufficient cpu."));
    assert!(got.why.contains("Insufficient cpu") && got.todo[0].contains("lower the pod's requests"), "{got:?}");
    assert!(unscheduled(&json!({"spec": {"schedulingGates": [{"name": "g"}]}})).why.ends_with("gates: g"));
    let events = [json!({"reason": "FailedCreate", "message": "pods \"web-1\" is forbidden: exceeded quota: q",
        "involvedObject": {"kind": "ReplicaSet", "name": "web-5d4"}})];
    let got = never_made("web", &events).unwrap();
    assert!(
        got.why.starts_with("ReplicaSet web-5d4 cannot make it: pods") && got.todo[0].contains("ResourceQuota"),
        "{got:?}"
    );
    assert_eq!(never_made("other", &events), None);
}
