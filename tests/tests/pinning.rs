//! CPU, memory and topology managers on this machine: CPUs of a container's own, what others share, restarts, refusals.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, fs};

use isopod_tests::{
    Cluster, Net, eventually,
    grpc::{
        Channel,
        proto::resources::{
            AllocatableResourcesRequest, GetPodResourcesRequest, pod_resources_lister_client::PodResourcesListerClient,
        },
    },
};
use serde_json::Value;

const CONFIGURATION: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                             clusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
                             evictionHard: {memory.available: 100Mi}\nsystemReserved: {cpu: 100m}\n\
                             cpuManagerPolicy: static\nmemoryManagerPolicy: Static\n\
                             topologyManagerPolicy: single-numa-node\n\
                             reservedMemory: [{numaNode: 0, limits: {memory: 100Mi}}]\n";

fn pod(name: &str, more: &str, resources: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  nodeName: one\n  \
         {more}\n  containers:\n  - name: c\n    image: busybox:1\n    command: [sleep, '100000']\n    resources: {resources}\n"
    )
}

/// A line of the first process's status.
fn status(c: &Cluster, pod: &str, key: &str) -> String {
    let ran = c.kubectl(&format!("exec {pod} -- grep {key} /proc/1/status"));
    ran.out.split_whitespace().nth(1).unwrap_or(&ran.err).to_owned()
}

#[track_caller]
fn runs_on(c: &Cluster, pod: &str, cpus: &str) {
    eventually(&format!("{pod} on CPUs {cpus}"), || {
        let is = status(c, pod, "Cpus_allowed_list");
        if is == cpus { Ok(()) } else { Err(is) }
    });
}

fn state(c: &Cluster, file: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(c.host.path(&format!("/var/lib/kubelet/{file}"))).unwrap()).unwrap()
}

/// A list of numbers as the kernel writes it.
fn list(cpus: &BTreeSet<u32>) -> String {
    let (first, last) = (cpus.first().unwrap(), cpus.last().unwrap());
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

#[test]
fn a_guaranteed_pod_has_cpus_and_memory_of_its_own() {
    // The smallest of these numbers is kept for the system; the next is given first where a core has one thread.
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap().trim().to_owned();
    let last: u32 = online.strip_prefix("0-").expect("CPUs without a gap").parse().unwrap();
    let mut net = Net::new();
    let host = net.host("one");
    fs::write(host.path("/etc/isopod/config.yaml"), CONFIGURATION).unwrap();
    let mut c = Cluster::start(&host);
    assert_eq!(state(&c, "cpu_manager_state")["defaultCpuSet"], online);
    c.apply(&pod("shared", "", "{}"));
    c.wait_ready("shared");
    runs_on(&c, "shared", &online);
    let amounts = "{cpu: 1, memory: 64Mi}";
    c.apply(&pod("own", "", &format!("{{limits: {amounts}, requests: {amounts}}}")));
    c.wait_ready("own");
    let own = status(&c, "own", "Cpus_allowed_list");
    let own: u32 = own.parse().expect("one CPU");
    assert!(own > 0 && own <= last);
    let rest: BTreeSet<u32> = (0..=last).filter(|cpu| *cpu != own).collect();
    let uid = c.get("pod own")["metadata"]["uid"].as_str().unwrap().to_owned();
    assert_eq!(state(&c, "cpu_manager_state")["entries"][&uid]["c"], own.to_string());
    let block = &state(&c, "memory_manager_state")["entries"][&uid]["c"][0];
    assert_eq!((&block["numaAffinity"][0], &block["size"]), (&0.into(), &(64 << 20).into()));
    assert_eq!(status(&c, "own", "Mems_allowed_list"), "0");
    // A running pod moves away; nothing holds the owner back.
    if rest.len() == 1 {
        runs_on(&c, "shared", &list(&rest));
    }
    let quota = "cd /sys/fs/cgroup; if [ -e cpu.max ]; then cat cpu.max; else cat cpu/cpu.cfs_quota_us; fi";
    let quota = c.k(&format!("exec own -- sh -c '{quota}'"));
    assert!(quota.starts_with("max") || quota.starts_with("-1"), "{quota}");
    pod_resources(&c, own, last);

    // More than is left on the one node, from a pod that the count of requests does not hold back.
    let amounts = format!("{{cpu: {last}, memory: 64Mi}}");
    let resources = format!("{{limits: {amounts}, requests: {amounts}}}");
    c.apply(&pod("more", "priorityClassName: system-node-critical", &resources));
    c.wait_field("pod more", ".status.reason", |r| r == "TopologyAffinityError");
    let message = c.get("pod more")["status"]["message"].as_str().unwrap().to_owned();
    assert_eq!(message, "Pod was rejected: Resources cannot be allocated with Topology locality");
    c.k("delete pod more");
    let patch = r#"{"spec":{"containers":[{"name":"c","resources":{"limits":{"memory":"65Mi"},"requests":{"memory":"65Mi"}}}]}}"#;
    c.k(&format!("patch pod own --subresource resize -p '{patch}'"));
    let path = ".status.conditions[?(@.type==\"PodResizePending\")].message";
    c.wait_field("pod own", path, |m| m.contains("alongside CPU Manager static policy"));

    // The agent comes back and knows.
    let before = state(&c, "cpu_manager_state");
    c.kill_agent();
    c.up();
    c.wait_ready("own");
    assert_eq!(state(&c, "cpu_manager_state"), before);
    assert_eq!(status(&c, "own", "Cpus_allowed_list"), own.to_string());
    assert_eq!(c.get("pod own")["status"]["containerStatuses"][0]["restartCount"], 0);
    let metrics = c.k("get --raw /api/v1/nodes/one/proxy/metrics");
    assert!(metrics.contains("\nkubelet_cpu_manager_exclusive_cpu_allocation_count 1\n"), "{metrics}");
    assert!(
        metrics.contains(&format!("\nkubelet_cpu_manager_shared_pool_size_millicores {}\n", last * 1000)),
        "{metrics}"
    );
    c.k("delete pod own");
    runs_on(&c, "shared", &online);
    assert_eq!(state(&c, "cpu_manager_state").get("entries"), None);

    // Another policy needs a person.
    c.kill_agent();
    fs::write(c.host.path("/etc/isopod/config.yaml"), CONFIGURATION.replace("static", "none")).unwrap();
    let ran = c.isopod(&["agent"]);
    let want = "configured policy \"none\" differs from state checkpoint policy \"static\", please drain this node and \
                delete the CPU manager checkpoint file";
    assert!(ran.code != 0 && format!("{}{}", ran.out, ran.err).contains(want), "{ran:?}");
}

fn pod_resources(c: &Cluster, own: u32, last: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let socket = c.host.path("/var/lib/kubelet/pod-resources/kubelet.sock");
        let mut client = PodResourcesListerClient::new(Channel::connect(&socket).await);
        let ask = |name: &str| GetPodResourcesRequest { pod_name: name.into(), pod_namespace: "default".into() };
        let of = client.get(ask("own")).await.unwrap().into_inner().pod_resources.unwrap().containers.remove(0);
        assert_eq!(of.cpu_ids, [i64::from(own)]);
        assert_eq!((of.memory[0].memory_type.as_str(), of.memory[0].size), ("memory", 64 << 20));
        let shared = client.get(ask("shared")).await.unwrap().into_inner().pod_resources.unwrap();
        assert!(shared.containers[0].cpu_ids.is_empty());
        let all = client.get_allocatable_resources(AllocatableResourcesRequest {}).await.unwrap().into_inner();
        assert_eq!(all.cpu_ids, (1..=i64::from(last)).collect::<Vec<_>>());
        assert!(all.memory.iter().any(|m| m.memory_type == "memory" && m.size > 64 << 20), "{:?}", all.memory);
    });
}
