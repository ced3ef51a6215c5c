//! Device plugins and the pod-resources API, with a plugin that speaks real gRPC on real sockets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, process::Child};

use isopod_tests::{
    Cluster, Net, eventually,
    grpc::{
        Channel,
        proto::resources::{
            AllocatableResourcesRequest, GetPodResourcesRequest, ListPodResourcesRequest,
            pod_resources_lister_client::PodResourcesListerClient,
        },
    },
    host::binaries,
};

const RESOURCE: &str = "mock.test/thing";

fn start(c: &Cluster, words: &[&str]) -> Child {
    let mut args = vec![RESOURCE];
    args.extend(words);
    c.host.spawn("device.log", binaries().join("mock-device").to_str().unwrap(), &args)
}

fn log(c: &Cluster) -> String {
    fs::read_to_string(c.host.path("/var/lib/device/log")).unwrap_or_default()
}

fn pod(name: &str, count: u32) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  nodeName: one\n  \
         containers:\n  - name: c\n    image: busybox:1\n    command: [sh, -c, 'trap exit TERM; sleep 1000 & wait']\n    \
         resources: {{limits: {{{RESOURCE}: {count}}}}}\n"
    )
}

/// The devices a pod was given.
#[track_caller]
fn given(c: &Cluster, pod: &str) -> String {
    c.k(&format!("exec {pod} -- sh -c 'echo $MOCK'")).trim().to_owned()
}

/// Waits until the node has so many devices, and so many it can give.
#[track_caller]
fn amounts(c: &Cluster, all: &str, usable: &str) {
    eventually("the node's devices", || {
        let status = c.get("node one")["status"].clone();
        let (has, can) = (status["capacity"][RESOURCE].clone(), status["allocatable"][RESOURCE].clone());
        if (&has, &can) == (&all.into(), &usable.into()) { Ok(()) } else { Err(format!("{has} {can}")) }
    });
}

#[test]
fn devices_are_given_to_containers_and_stay_theirs() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let mut plugin = start(&c, &["a", "b", "c", "pre", "prefer=b"]);
    amounts(&c, "3", "3");
    c.apply(&pod("first", 1));
    c.wait_ready("first");
    // The plugin's choice, and what it put into the container.
    assert_eq!(given(&c, "first"), "b");
    assert!(c.k("exec first -- sh -c 'echo hi > /dev/mock-b && ls -l /dev/mock-b'").starts_with("crw"));
    assert!(c.k("exec first -- ls /mock").contains("log"));
    assert!(c.kubectl("exec first -- touch /mock/x").err.contains("Read-only"));
    let said = log(&c);
    assert!(said.contains("PreferredAllocationRequest") && said.contains("allocation_size: 1"), "{said}");
    assert!(said.contains("PreStartContainerRequest { devices_ids: [\"b\"] }"), "{said}");
    // Two more are there, three are not.
    c.apply(&pod("greedy", 3));
    c.wait_field("pod greedy", ".status.reason", |r| r == "UnexpectedAdmissionError");
    let message = c.get("pod greedy")["status"]["message"].as_str().unwrap().to_owned();
    let want = format!(
        "Pod was rejected: Allocate failed due to requested number of devices unavailable for {RESOURCE}. \
         Requested: 3, Available: 2, which is unexpected"
    );
    assert_eq!(message, want);
    // A restart of the agent: the plugin comes again, the pod keeps its device, nobody else gets it.
    c.kill_agent();
    c.up();
    amounts(&c, "3", "3");
    c.wait_ready("first");
    c.k("delete pod greedy");
    c.apply(&pod("second", 2));
    c.wait_ready("second");
    assert_eq!(given(&c, "second"), "a,c");
    pod_resources(&c);
    // Restarted containers get the same again, without a word to the plugin's Allocate.
    let allocations = log(&c).matches("AllocateRequest { container_requests: [ContainerAllocate").count();
    c.kubectl("exec first -- kill 1");
    c.wait_field("pod first", ".status.containerStatuses[0].restartCount", |n| n == "1");
    c.wait_ready("first");
    assert_eq!(given(&c, "first"), "b");
    assert_eq!(log(&c).matches("AllocateRequest { container_requests: [ContainerAllocate").count(), allocations);
    // A broken device is not given out; freed ones are.
    fs::write(c.host.path("/var/lib/device/broken"), "c\n").unwrap();
    amounts(&c, "3", "2");
    c.k("delete pod second");
    c.apply(&pod("third", 1));
    c.wait_ready("third");
    assert_eq!(given(&c, "third"), "a");
    // A plugin's refusal is told; without a plugin nothing is given.
    c.k("delete pod third");
    fs::write(c.host.path("/var/lib/device/refuse"), "").unwrap();
    c.apply(&pod("refused", 1));
    c.wait_field("pod refused", ".status.message", |m| m.contains("code = Unknown desc = no devices today"));
    c.host.must("kill $(cat /var/lib/device/pid)");
    plugin.wait().unwrap();
    amounts(&c, "3", "0");
}

fn pod_resources(c: &Cluster) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = c.host.path("/var/lib/kubelet/pod-resources/kubelet.sock");
        let mut client = PodResourcesListerClient::new(Channel::connect(&socket).await);
        let list = client.list(ListPodResourcesRequest {}).await.unwrap().into_inner().pod_resources;
        let second = list.iter().find(|p| p.name == "second").unwrap();
        let ids: Vec<_> = second.containers[0].devices.iter().flat_map(|d| d.device_ids.clone()).collect();
        assert_eq!((second.namespace.as_str(), ids), ("default", vec!["a".to_owned(), "c".to_owned()]));
        assert_eq!(second.containers[0].devices[0].topology.as_ref().unwrap().nodes.len(), 1);
        let ask = |name: &str| GetPodResourcesRequest { pod_name: name.into(), pod_namespace: "default".into() };
        let first = client.get(ask("first")).await.unwrap().into_inner().pod_resources.unwrap();
        assert_eq!(first.containers[0].devices[0].device_ids, ["b"]);
        assert_eq!(client.get(ask("nobody")).await.unwrap_err().code(), tonic::Code::NotFound);
        let all = client.get_allocatable_resources(AllocatableResourcesRequest {}).await.unwrap().into_inner();
        assert_eq!(all.devices.len(), 3);
        assert!(!all.cpu_ids.is_empty());
    });
}
