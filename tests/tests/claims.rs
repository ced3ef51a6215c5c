//! Resource claims, with a driver that speaks real gRPC. Who allocates them is not here: the test does it by hand.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use isopod_tests::{
    Cluster, Net, eventually,
    grpc::{
        Channel,
        proto::resources::{GetPodResourcesRequest, pod_resources_lister_client::PodResourcesListerClient},
    },
    host::binaries,
};
use serde_json::json;

const OBJECTS: &str = "
apiVersion: resource.k8s.io/v1
kind: ResourceClaim
metadata: {name: own}
spec: {devices: {requests: [{name: one, exactly: {deviceClassName: mock}}]}}
---
apiVersion: v1
kind: Pod
metadata: {name: user}
spec:
  nodeName: one
  terminationGracePeriodSeconds: 0
  resourceClaims: [{name: it, resourceClaimName: own}]
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'trap exit TERM; sleep 100000 & wait']
    resources: {claims: [{name: it}]}
  - {name: without, image: 'busybox:1', command: [sleep, '100000']}
";

fn log(c: &Cluster) -> String {
    fs::read_to_string(c.host.path("/var/lib/dra/log")).unwrap_or_default()
}

#[test]
fn claims_are_prepared_for_containers_and_undone() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let driver = || c.host.spawn("dra.log", binaries().join("mock-dra").to_str().unwrap(), &["mock.test"]);
    let mut plugin = driver();
    eventually("registration", || if log(&c).contains("registered true") { Ok(()) } else { Err(log(&c)) });
    c.apply(OBJECTS);
    let told = |c: &Cluster, words: &str| {
        eventually(words, || {
            let events = c.k("get events --field-selector involvedObject.name=user");
            if events.contains("FailedPrepareDynamicResources") && events.contains(words) {
                Ok(())
            } else {
                Err(events)
            }
        });
    };
    told(&c, "Failed to prepare dynamic resources: resource claim own is not allocated");
    // The driver refuses first.
    fs::write(c.host.path("/var/lib/dra/refuse"), "not today").unwrap();
    let uid = c.get("pod user")["metadata"]["uid"].clone();
    let result = json!({"request": "one", "driver": "mock.test", "pool": "pool", "device": "first"});
    let status = json!({"status": {"allocation": {"devices": {"results": [result]}},
        "reservedFor": [{"resource": "pods", "name": "user", "uid": uid}]}});
    c.k(&format!("patch resourceclaim own --subresource status --type merge -p '{status}'"));
    told(&c, "NodePrepareResources failed for claim default/own: not today");
    fs::remove_file(c.host.path("/var/lib/dra/refuse")).unwrap();
    c.wait_ready("user");
    assert_eq!(c.k("exec user -c c -- sh -c 'echo $CLAIM'").trim(), "own");
    assert_eq!(c.k("exec user -c without -- sh -c 'echo [$CLAIM]'").trim(), "[]");
    let file = fs::read_to_string(c.host.path("/var/lib/kubelet/dra_manager_state")).unwrap();
    assert!(file.contains(uid.as_str().unwrap()) && file.contains("mock.test/claim="), "{file}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = c.host.path("/var/lib/kubelet/pod-resources/kubelet.sock");
        let mut client = PodResourcesListerClient::new(Channel::connect(&socket).await);
        let ask = GetPodResourcesRequest { pod_name: "user".into(), pod_namespace: "default".into() };
        let pod = client.get(ask).await.unwrap().into_inner().pod_resources.unwrap();
        let of = &pod.containers[0].dynamic_resources[0];
        assert_eq!((of.claim_name.as_str(), of.claim_namespace.as_str()), ("own", "default"));
        let r = &of.claim_resources[0];
        assert_eq!(
            (r.driver_name.as_str(), r.pool_name.as_str(), r.device_name.as_str()),
            ("mock.test", "pool", "first")
        );
        assert!(r.cdi_devices[0].name.starts_with("mock.test/claim="));
        assert!(pod.containers[1].dynamic_resources.is_empty());
    });
    // Another life of the agent, a new instance of the container: the same devices, without asking.
    let asked = log(&c).matches("prepare default/own").count();
    c.kill_agent();
    c.up();
    eventually("exec", || c.kubectl("exec user -c c -- true").ok());
    // Its own end may come before its answer: everything of the container goes with the first process.
    c.kubectl("exec user -c c -- kill 1");
    c.wait_field("pod user", ".status.containerStatuses[0].restartCount", |n| n == "1");
    c.wait_ready("user");
    assert_eq!(c.k("exec user -c c -- sh -c 'echo $CLAIM'").trim(), "own");
    assert_eq!(log(&c).matches("prepare default/own").count(), asked);
    c.k("delete pod user");
    // With no grace the object goes at once; what is on the node follows.
    eventually("unprepared", || {
        let state = fs::read_to_string(c.host.path("/var/lib/kubelet/dra_manager_state")).unwrap();
        let undone = log(&c).ends_with("unprepare default/own\n") && !state.contains("ClaimName");
        if undone { Ok(()) } else { Err(log(&c) + &state) }
    });
    plugin.kill().unwrap();
    plugin.wait().unwrap();
}
