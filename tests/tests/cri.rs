//! The CRI socket: driven as crictl drives it, about the agent's own pods and about pods made over it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, time::Duration};

use isopod_tests::{
    Cluster, Net, eventually,
    grpc::{
        Channel,
        proto::cri::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient, *},
    },
    host::binaries,
};
use tokio::runtime::Runtime;
use tonic::Code;

/// Both clients and something to wait on them with.
struct Client {
    tokio: Runtime,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// One call, waited for.
macro_rules! call {
    ($c:expr, $service:ident, $method:ident, $request:expr) => {{
        let Client { tokio, $service, .. } = &mut $c;
        tokio.block_on($service.$method($request)).map(|r| r.into_inner())
    }};
}

impl Client {
    fn connect(c: &Cluster) -> Self {
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket = c.host.inside("/run/isopod/cri.sock");
        eventually("the CRI socket", || std::os::unix::net::UnixStream::connect(&socket).map(drop));
        let channel = tokio.block_on(Channel::connect(&socket));
        let runtime = RuntimeServiceClient::new(channel.clone());
        Self { tokio, runtime, images: ImageServiceClient::new(channel) }
    }

    fn status(&mut self, id: &str) -> ContainerStatus {
        let r = ContainerStatusRequest { container_id: id.into(), verbose: false };
        call!(*self, runtime, container_status, r).unwrap().status.unwrap()
    }

    fn sh(&mut self, id: &str, script: &str) -> ExecSyncResponse {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        call!(*self, runtime, exec_sync, ExecSyncRequest { container_id: id.into(), cmd, timeout: 20 }).unwrap()
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap().trim()
}

#[test]
fn the_agents_own_pods_are_seen_and_not_taken_away() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: own, labels: {app: own}}\nspec:\n  containers:\n  - name: c\n    \
         image: busybox:1\n    command: [sh, -c, 'echo hello; trap exit TERM; sleep 1000 & wait']\n",
    );
    c.wait_ready("own");
    let mut k = Client::connect(&c);
    let version = call!(k, runtime, version, VersionRequest::default()).unwrap();
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("isopod", "v1"));
    let status = call!(k, runtime, status, StatusRequest { verbose: true }).unwrap();
    let conditions = status.status.unwrap().conditions;
    assert!(conditions.len() == 2 && conditions.iter().all(|c| c.status), "{conditions:?}");
    assert!(status.info["config"].contains("clusterDomain"));
    let handlers: Vec<&str> = status.runtime_handlers.iter().map(|h| h.name.as_str()).collect();
    assert_eq!(handlers, ["", "isopod", "runc"]);
    assert!(status.features.unwrap().supplemental_groups_policy);
    let linux = call!(k, runtime, runtime_config, RuntimeConfigRequest {}).unwrap().linux.unwrap();
    assert_eq!(linux.cgroup_driver(), CgroupDriver::Cgroupfs);
    // A kubelet tells the range of its pods: here the one they have.
    let range = |pod_cidr: &str| UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig { network_config: Some(NetworkConfig { pod_cidr: pod_cidr.into() }) }),
    };
    call!(k, runtime, update_runtime_config, range("10.244.0.0/24")).unwrap();
    let refused = call!(k, runtime, update_runtime_config, range("everything")).unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // Sandboxes and containers, by label and by the beginning of an id.
    let filter = PodSandboxFilter { label_selector: [("app".into(), "own".into())].into(), ..Default::default() };
    let list = call!(k, runtime, list_pod_sandbox, ListPodSandboxRequest { filter: Some(filter) }).unwrap().items;
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].metadata.as_ref().unwrap().name, "own");
    let r = PodSandboxStatusRequest { pod_sandbox_id: list[0].id[..13].into(), verbose: true };
    let sandbox = call!(k, runtime, pod_sandbox_status, r).unwrap();
    let ip = c.get("pod own")["status"]["podIP"].as_str().unwrap().to_owned();
    assert_eq!(sandbox.status.unwrap().network.unwrap().ip, ip);
    assert!(sandbox.info["info"].contains("netns"));
    let filter = ContainerFilter {
        pod_sandbox_id: list[0].id.clone(),
        state: Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() }),
        ..Default::default()
    };
    let found = call!(k, runtime, list_containers, ListContainersRequest { filter: Some(filter) }).unwrap().containers;
    assert_eq!(found.len(), 1);
    let id = found[0].id.clone();
    let status = k.status(&id);
    assert!(status.started_at > 0 && status.labels["io.kubernetes.container.name"] == "c");
    assert!(fs::read_to_string(c.host.path(&status.log_path)).unwrap().contains("stdout F hello"));
    // Its image is one of the list, under one id everywhere.
    let image = ImageSpec { image: "busybox:1".into(), ..Default::default() };
    let r = ImageStatusRequest { image: Some(image.clone()), verbose: true };
    let known = call!(k, images, image_status, r).unwrap().image.unwrap();
    assert_eq!((&known.id, &known.id), (&status.image_id, &found[0].image_id));
    let all = call!(k, images, list_images, ListImagesRequest::default()).unwrap().images;
    assert!(all.iter().any(|i| i.id == known.id && i.size > 0 && i.repo_tags[0].ends_with("/busybox:1")));
    let refused = call!(k, images, remove_image, RemoveImageRequest { image: Some(image) }).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let disk = call!(k, images, image_fs_info, ImageFsInfoRequest {}).unwrap();
    assert!(disk.image_filesystems[0].used_bytes.as_ref().unwrap().value > 100_000);
    // Commands, and what it uses.
    let ran = k.sh(&id, "echo out; echo err >&2; exit 3");
    assert_eq!((text(&ran.stdout), text(&ran.stderr), ran.exit_code), ("out", "err", 3));
    let r = ContainerStatsRequest { container_id: id.clone() };
    let stats = call!(k, runtime, container_stats, r).unwrap().stats.unwrap();
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
    let r = PodSandboxStatsRequest { pod_sandbox_id: list[0].id.clone() };
    let stats = call!(k, runtime, pod_sandbox_stats, r).unwrap().stats.unwrap().linux.unwrap();
    assert_eq!(stats.containers.len(), 1);
    assert_eq!(stats.network.unwrap().default_interface.unwrap().name, "eth0");
    listed_one_by_one(&mut k, &list[0].id, &id);
    // The agent runs it: it may be stopped (and comes back), not taken away.
    let r = RemovePodSandboxRequest { pod_sandbox_id: list[0].id.clone() };
    assert_eq!(call!(k, runtime, remove_pod_sandbox, r).unwrap_err().code(), Code::FailedPrecondition);
    let r = RemoveContainerRequest { container_id: id.clone() };
    assert_eq!(call!(k, runtime, remove_container, r).unwrap_err().code(), Code::FailedPrecondition);
    call!(k, runtime, stop_container, StopContainerRequest { container_id: id, timeout: 10 }).unwrap();
    c.wait_field("pod own", ".status.containerStatuses[0].restartCount", |n| n == "1");
    let r = ContainerStatusRequest { container_id: "0123".into(), verbose: false };
    assert_eq!(call!(k, runtime, container_status, r).unwrap_err().code(), Code::NotFound);
}

/// The lists as streams (v1.36), and metrics under the names and labels that were announced.
fn listed_one_by_one(k: &mut Client, sandbox: &str, id: &str) {
    macro_rules! collected {
        ($service:ident, $method:ident, $request:expr) => {{
            let mut stream = call!(*k, $service, $method, $request).unwrap();
            k.tokio.block_on(async {
                let mut all = Vec::new();
                while let Some(item) = stream.message().await.unwrap() {
                    all.push(item);
                }
                all
            })
        }};
    }
    let all = collected!(runtime, stream_pod_sandboxes, StreamPodSandboxesRequest::default());
    let whole = call!(*k, runtime, list_pod_sandbox, ListPodSandboxRequest::default()).unwrap().items;
    assert_eq!((all.len(), whole.len()), (4, 4), "the control plane's three and ours");
    let filter = Some(ContainerFilter { pod_sandbox_id: sandbox.into(), ..Default::default() });
    let all = collected!(runtime, stream_containers, StreamContainersRequest { filter });
    assert_eq!(all.iter().map(|c| c.container.clone().unwrap().id).collect::<Vec<_>>(), [id]);
    let filter = Some(ContainerStatsFilter { id: id.into(), ..Default::default() });
    let all = collected!(runtime, stream_container_stats, StreamContainerStatsRequest { filter });
    assert!(all.len() == 1 && all[0].container_stats.as_ref().unwrap().memory.is_some());
    let filter = Some(PodSandboxStatsFilter { id: sandbox.into(), ..Default::default() });
    assert_eq!(collected!(runtime, stream_pod_sandbox_stats, StreamPodSandboxStatsRequest { filter }).len(), 1);
    let images = collected!(images, stream_images, StreamImagesRequest::default());
    assert_eq!(images.len(), call!(*k, images, list_images, ListImagesRequest::default()).unwrap().images.len());
    let announced = call!(*k, runtime, list_metric_descriptors, ListMetricDescriptorsRequest {}).unwrap().descriptors;
    let told = collected!(runtime, stream_pod_sandbox_metrics, StreamPodSandboxMetricsRequest {});
    let told: Vec<_> = told.into_iter().filter_map(|m| m.pod_sandbox_metrics).collect();
    let own = told.iter().find(|m| m.pod_sandbox_id == sandbox).unwrap();
    for m in own.metrics.iter().chain(&own.container_metrics[0].metrics) {
        let keys = &announced.iter().find(|d| d.name == m.name).unwrap().label_keys;
        assert_eq!(keys.len(), m.label_values.len(), "{m:?}");
    }
    let rss = own.container_metrics[0].metrics.iter().find(|m| m.name == "container_memory_rss").unwrap();
    assert!(rss.value.as_ref().unwrap().value > 0 && rss.label_values[0] == "c" && rss.label_values[5] == "own");
    assert!(own.metrics.iter().any(|m| m.name == "container_network_receive_bytes_total"));
    let r = CheckpointContainerRequest { container_id: id.into(), ..Default::default() };
    let refused = call!(*k, runtime, checkpoint_container, r).unwrap_err();
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::Unimplemented, "containers cannot be checkpointed on this node")
    );
}

fn sandbox_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            namespace: "over-cri".into(),
            uid: "u-1".into(),
            attempt: 0,
        }),
        hostname: "host-of-cri".into(),
        log_directory: format!("/var/log/pods/over-cri_{name}_u-1"),
        dns_config: Some(DnsConfig {
            servers: vec!["192.0.2.53".into()],
            searches: vec!["x.test".into()],
            options: vec![],
        }),
        labels: [("who".to_owned(), "test".to_owned())].into(),
        annotations: [("note".to_owned(), "kept".to_owned())].into(),
        linux: Some(LinuxPodSandboxConfig { cgroup_parent: "/over-cri/pod-1".into(), ..Default::default() }),
        ..Default::default()
    }
}

fn container_config(name: &str, image: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(ImageSpec { image: image.into(), ..Default::default() }),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        envs: vec![KeyValue { key: "GREETING".into(), value: "hi $(there)".into() }],
        mounts: vec![Mount {
            container_path: "/shared".into(),
            host_path: "/var/lib/shared".into(),
            readonly: true,
            ..Default::default()
        }],
        log_path: format!("{name}/0.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                cpu_shares: 300,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                run_as_user: Some(Int64Value { value: 1000 }),
                supplemental_groups: vec![77],
                no_new_privs: true,
                namespace_options: Some(NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

#[test]
fn pods_made_over_the_socket_live_and_die_by_it() {
    let mut net = Net::new();
    let mut c = Cluster::start(&net.host("one"));
    let mut k = Client::connect(&c);
    let mut events = call!(k, runtime, get_container_events, GetEventsRequest {}).unwrap();
    let config = sandbox_config("made");
    let r = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: "nobody".into() };
    assert_eq!(call!(k, runtime, run_pod_sandbox, r).unwrap_err().code(), Code::InvalidArgument);
    let r = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let sandbox = call!(k, runtime, run_pod_sandbox, r).unwrap().pod_sandbox_id;
    let r = PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone(), verbose: false };
    let status = call!(k, runtime, pod_sandbox_status, r.clone()).unwrap().status.unwrap();
    assert_eq!((status.state(), &status.annotations), (PodSandboxState::SandboxReady, &config.annotations));
    let ip = status.network.unwrap().ip;
    assert!(!ip.is_empty());
    // A container with all the trimmings.
    let make = |config: ContainerConfig| CreateContainerRequest {
        pod_sandbox_id: sandbox.clone(),
        config: Some(config),
        sandbox_config: None,
    };
    let missing = make(container_config("c", "nothing:1", "true"));
    assert_eq!(call!(k, runtime, create_container, missing).unwrap_err().code(), Code::NotFound);
    let script = "echo \"$GREETING\"; trap 'exit 7' TERM; sleep 1000 & wait";
    let id =
        call!(k, runtime, create_container, make(container_config("c", "busybox:1", script))).unwrap().container_id;
    assert_eq!(k.status(&id).state(), ContainerState::ContainerCreated);
    call!(k, runtime, start_container, StartContainerRequest { container_id: id.clone() }).unwrap();
    let running = k.status(&id);
    assert_eq!(running.state(), ContainerState::ContainerRunning);
    assert_eq!(running.user.unwrap().linux.unwrap().supplemental_groups, [0, 77]);
    let log = c.host.path(&running.log_path);
    eventually("its log", || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        if text.contains("stdout F hi $(there)") { Ok(()) } else { Err(text) }
    });
    let said = k.sh(&id, "id -u; hostname; cat /etc/resolv.conf; touch /shared/x; ls -d /shared; echo $GREETING");
    let out = text(&said.stdout).to_owned();
    for part in ["1000\n", "host-of-cri", "nameserver 192.0.2.53", "search x.test", "/shared", "hi $(there)"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert!(text(&said.stderr).contains("Read-only"), "{said:?}");
    let shares = format!("find /sys/fs/cgroup -path '*/over-cri/pod-1/*/{id}/cpu.shares' | head -n 1 | xargs cat");
    assert_eq!(c.host.must(&shares).trim(), "300");
    let linux = Some(LinuxContainerResources { cpu_shares: 500, ..Default::default() });
    let r = UpdateContainerResourcesRequest { container_id: id.clone(), linux, ..Default::default() };
    call!(k, runtime, update_container_resources, r).unwrap();
    assert_eq!(c.host.must(&shares).trim(), "500");
    let r = ExecSyncRequest { container_id: id.clone(), cmd: vec!["sleep".into(), "100".into()], timeout: 1 };
    assert_eq!(call!(k, runtime, exec_sync, r).unwrap_err().code(), Code::DeadlineExceeded);
    streams(&c, &mut k, &sandbox, &id);
    // A rotated log is written anew.
    fs::rename(&log, log.with_extension("log.1")).unwrap();
    call!(k, runtime, reopen_container_log, ReopenContainerLogRequest { container_id: id.clone() }).unwrap();
    assert!(log.exists());
    // The agent restarts: the container does not.
    c.kill_agent();
    c.up();
    let mut k = Client::connect(&c);
    let after = k.status(&id);
    assert_eq!((after.state(), after.started_at), (ContainerState::ContainerRunning, running.started_at));
    assert_eq!(k.sh(&id, "exit 4").exit_code, 4);
    // It ends as it was asked to, and everything goes.
    let r = StopContainerRequest { container_id: id.clone(), timeout: 20 };
    call!(k, runtime, stop_container, r).unwrap();
    let ended = k.status(&id);
    assert_eq!((ended.state(), ended.exit_code, ended.reason.as_str()), (ContainerState::ContainerExited, 7, "Error"));
    assert!(ended.finished_at > ended.started_at);
    call!(k, runtime, remove_container, RemoveContainerRequest { container_id: id.clone() }).unwrap();
    let second = make(container_config("second", "busybox:1", "sleep 1000"));
    let second = call!(k, runtime, create_container, second).unwrap().container_id;
    call!(k, runtime, start_container, StartContainerRequest { container_id: second.clone() }).unwrap();
    call!(k, runtime, stop_pod_sandbox, StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() }).unwrap();
    assert_eq!(k.status(&second).exit_code, 137);
    let stopped = call!(k, runtime, pod_sandbox_status, r_status(&sandbox)).unwrap().status.unwrap();
    assert_eq!(stopped.state(), PodSandboxState::SandboxNotready);
    for _ in 0..2 {
        let r = RemovePodSandboxRequest { pod_sandbox_id: sandbox.clone() };
        call!(k, runtime, remove_pod_sandbox, r).unwrap();
    }
    let gone = call!(k, runtime, pod_sandbox_status, r_status(&sandbox)).unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    let left = c.host.sh(&format!(
        "find /var/lib/isopod/pods /var/lib/isopod/cri /run/isopod /sys/fs/cgroup -name '*{sandbox}*'; ip netns 2>/dev/null | grep {sandbox}; true"
    ));
    assert_eq!(left.out, "");
    // What the first stream told until the agent went away.
    let kinds: Vec<ContainerEventType> = k.tokio.block_on(async {
        let mut kinds = Vec::new();
        while let Ok(Ok(Some(e))) = tokio::time::timeout(Duration::from_secs(5), events.message()).await {
            if e.container_id == id {
                kinds.push(e.container_event_type());
            }
        }
        kinds
    });
    assert_eq!(kinds, [ContainerEventType::ContainerCreatedEvent, ContainerEventType::ContainerStartedEvent]);
}

fn r_status(sandbox: &str) -> PodSandboxStatusRequest {
    PodSandboxStatusRequest { pod_sandbox_id: sandbox.into(), verbose: false }
}

/// exec and port-forward by their URLs, each good once.
fn streams(c: &Cluster, k: &mut Client, sandbox: &str, id: &str) {
    let client = binaries().join("stream-client");
    let client = client.to_str().unwrap();
    let r = ExecRequest {
        container_id: id.into(),
        cmd: ["sh", "-c", "read line; echo got $line; echo bad >&2; exit 5"].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let url = call!(*k, runtime, exec, r).unwrap().url;
    let out = c.host.run(client, &[&url, "v5.channel.k8s.io", "food\n"]).out;
    for part in ["1: got food", "2: bad", "3: {", "\"message\":\"5\""] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert!(c.host.run(client, &[&url, "v5.channel.k8s.io"]).out.contains("404"));
    let r = ExecRequest { container_id: id.into(), cmd: vec!["true".into()], ..Default::default() };
    assert_eq!(call!(*k, runtime, exec, r).unwrap_err().code(), Code::InvalidArgument);
    // A server in the sandbox, reached by forwarding to it.
    let serve = "(echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nforwarded' | nc -l -p 8000) > /dev/null 2>&1 &";
    assert_eq!(k.sh(id, serve).exit_code, 0);
    let r = PortForwardRequest { pod_sandbox_id: sandbox.into(), port: vec![8000] };
    let url = call!(*k, runtime, port_forward, r).unwrap().url;
    let out = c.host.run("timeout", &["10", client, &url, "v4.channel.k8s.io", "GET / HTTP/1.0\r\n\r\n"]).out;
    assert!(out.contains("forwarded"), "{out}");
}
