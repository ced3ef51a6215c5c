//! What the node tells about itself on port 10250, and whom: certificates through the API server, tokens of service accounts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;

use isopod_tests::{Cluster, Net, eventually};
use serde_json::Value;

const OBJECTS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: busy}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox:1
    command: [sh, -c, 'dd if=/dev/zero of=/v/f bs=1M count=5; while true; do :; done']
    resources: {limits: {cpu: 200m, memory: 64Mi}}
    readinessProbe: {exec: {command: ['true']}, periodSeconds: 1}
    volumeMounts: [{name: v, mountPath: /v}]
  volumes: [{name: v, emptyDir: {}}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: scraper}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: stranger}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: scraper}
rules: [{apiGroups: [''], resources: [nodes/metrics, nodes/stats], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: scraper}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scraper}
subjects: [{kind: ServiceAccount, name: scraper, namespace: default}]
"#;

/// Every family once, its samples behind it, each of them once and with a number.
#[track_caller]
fn well_formed(text: &str) {
    let (mut families, mut samples, mut family) = (HashSet::new(), HashSet::new(), "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            family = rest.split(' ').next().unwrap();
            assert!(families.insert(family), "{family} twice");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(series.starts_with(family) && samples.insert(series), "{line} under {family}, or twice");
            value.parse::<f64>().unwrap();
        }
    }
}

#[test]
fn numbers_for_those_who_may_see_them() {
    let mut net = Net::new();
    let c = Cluster::start(&net.host("one"));
    c.apply(OBJECTS);
    c.wait_ready("busy");
    let raw = |path: &str| c.k(&format!("get --raw /api/v1/nodes/one/proxy/{path}"));
    let summary = || -> Value { serde_json::from_str(&raw("stats/summary")).unwrap() };
    let of_pod = |s: &Value| s["pods"].as_array().unwrap().iter().find(|p| p["podRef"]["name"] == "busy").cloned();

    // The second question knows what has happened since the first.
    summary();
    let busy = eventually("the pod's rate is known", || {
        let all = summary();
        let p = of_pod(&all).ok_or_else(|| all.clone())?;
        let cores = p["containers"][0]["cpu"]["usageNanoCores"].as_u64().unwrap_or(0);
        if (20_000_000..400_000_000).contains(&cores) { Ok(p) } else { Err(p) }
    });
    assert!(busy["containers"][0]["memory"]["workingSetBytes"].as_u64().unwrap() > 0);
    assert!(busy["containers"][0]["memory"]["availableBytes"].as_u64().unwrap() < 64 << 20);
    assert_eq!(busy["volume"][0]["name"], "v");
    assert!((5 << 20..8 << 20).contains(&busy["volume"][0]["usedBytes"].as_u64().unwrap()), "{busy}");
    assert!(busy["ephemeral-storage"]["usedBytes"].as_u64().unwrap() >= 5 << 20);
    assert_eq!(busy["network"]["name"], "eth0");
    let node = summary()["node"].clone();
    assert_eq!(node["nodeName"], "one");
    for field in ["cpu", "memory", "fs", "network", "runtime", "rlimit", "systemContainers"] {
        assert!(!node[field].is_null(), "{field}: {node}");
    }
    let brief: Value = serde_json::from_str(&raw("stats/summary?only_cpu_and_memory=true")).unwrap();
    assert!(brief["node"]["fs"].is_null() && of_pod(&brief).unwrap()["volume"].is_null());

    let resource = raw("metrics/resource");
    for series in [
        "container_cpu_usage_seconds_total{container=\"c\",namespace=\"default\",pod=\"busy\"} ",
        "pod_memory_working_set_bytes{namespace=\"default\",pod=\"busy\"} ",
        "node_cpu_usage_seconds_total ",
        "resource_scrape_error 0",
    ] {
        assert!(resource.contains(series), "{series}: {resource}");
    }
    let cadvisor = raw("metrics/cadvisor");
    for series in [
        "container_memory_rss{container=\"c\"",
        "container_network_receive_bytes_total{container=\"\",interface=\"eth0\"",
        "container_fs_writes_bytes_total{container=\"\",device=\"/dev/",
        "container_fs_limit_bytes{container=\"\",device=\"/dev/",
        "container_file_descriptors{container=\"c\"",
        "container_spec_cpu_shares{container=\"c\"",
        "container_spec_memory_reservation_limit_bytes{container=\"c\"",
        "container_cpu_load_average_10s{container=\"c\"",
        "container_cpu_load_d_average_10s{container=\"c\"",
        "container_ulimits_soft{container=\"c\"",
        "machine_cpu_cores{",
        "machine_cpu_books{",
        "machine_nvm_capacity{",
        "machine_scrape_error 0",
    ] {
        assert!(cadvisor.contains(series), "{series}: {cadvisor}");
    }
    // It computes all the time, and its probe says that it is well.
    let value = |series: &[&str]| -> f64 {
        let line = cadvisor.lines().find(|l| series.iter().all(|part| l.contains(part)));
        line.unwrap_or_else(|| panic!("{series:?}: {cadvisor}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert!(value(&["container_tasks_state{container=\"c\"", "state=\"running\""]) >= 1.0);
    assert_eq!(value(&["container_health_state{container=\"c\""]), 1.0);
    let metrics = raw("metrics");
    for series in [
        "kubelet_running_pods ",
        "kubelet_started_pods_total ",
        "kubelet_containers_per_pod_count_count ",
        "kubelet_certificate_manager_server_ttl_seconds ",
        "kubelet_pod_start_sli_duration_seconds_count ",
        "kubelet_http_requests_duration_seconds_count{",
        "kubelet_container_log_filesystem_used_bytes{container=\"c\",namespace=\"default\",pod=\"busy\"",
        "kubelet_node_name{node=\"one\"} 1",
        "kubelet_runtime_operations_total{operation_type=\"run_podsandbox\"} ",
        "kubelet_runtime_operations_duration_seconds_count{operation_type=\"create_container\"} ",
        "kubelet_runtime_operations_total{operation_type=\"start_container\"} ",
        "kubelet_runtime_operations_total{operation_type=\"exec_sync\"} ",
        "kubelet_pod_worker_duration_seconds_count{operation_type=\"create\"} ",
        "kubelet_pod_worker_duration_seconds_count{operation_type=\"sync\"} ",
        "kubelet_pod_worker_start_duration_seconds_count ",
        "kubelet_pod_status_sync_duration_seconds_count ",
        "kubelet_cgroup_manager_duration_seconds_count{operation_type=\"create\"} ",
        "kubelet_image_manager_ensure_image_requests_total{present_locally=\"true\",pull_policy=\"ifnotpresent\",pull_required=\"false\"} ",
        "kubelet_first_network_pod_start_sli_duration_seconds ",
        "kubelet_node_startup_pre_kubelet_duration_seconds ",
        "kubelet_node_startup_pre_registration_duration_seconds ",
        "kubelet_node_startup_registration_duration_seconds ",
        "kubelet_node_startup_post_registration_duration_seconds ",
        "kubelet_node_startup_duration_seconds ",
        "rest_client_requests_total{code=\"200\",host=\"",
        "rest_client_request_duration_seconds_count{host=\"",
        "kubelet_http_inflight_requests{long_running=\"false\",method=\"GET\",path=\"metrics\",server_type=\"readwrite\"} 1",
        "storage_operation_duration_seconds_count{migrated=\"false\",operation_name=\"volume_mount\",status=\"success\",volume_plugin=\"kubernetes.io/empty-dir\"} ",
        "volume_manager_total_volumes{plugin_name=\"kubernetes.io/empty-dir\",state=\"actual_state_of_world\"} 1",
        "process_start_time_seconds ",
    ] {
        assert!(metrics.contains(series), "{series}: {metrics}");
    }
    let probes = raw("metrics/probes");
    for text in [&resource, &cadvisor, &metrics, &probes] {
        well_formed(text);
    }
    assert!(probes.contains("prober_probe_total{container=\"c\",namespace=\"default\",pod=\"busy\","), "{probes}");
    assert!(raw("configz").contains("\"kubeletconfig\""));
    if std::path::Path::new("/proc/pressure/cpu").exists() {
        assert!(node["cpu"]["psi"]["some"]["total"].is_u64() && node["io"]["psi"]["some"].is_object(), "{node}");
        assert!(busy["cpu"]["psi"]["some"]["avg10"].is_f64(), "{busy}");
    }
    assert!(raw("runningpods/").contains("\"busy\""));
    assert!(raw("metrics/slis").contains("kubernetes_healthcheck{name=\"syncloop\",type=\"healthz\"} 1"));
    assert!(raw("logs/").contains("<a href=\"pods/\">"));
    assert!(raw("logs/isopod/agent.log").contains("node registered"));
    let refused = |path: &str| c.kubectl(&format!("create --raw /api/v1/nodes/one/proxy/{path} -f /dev/null")).err;
    // kubectl tells the code in words of its own.
    assert!(refused("checkpoint/default/none/c").contains("NotFound"));
    let here = refused("checkpoint/default/busy/c");
    assert!(!here.is_empty() && !here.contains("NotFound"), "{here}");
    assert!(raw("pods").contains("\"busy\""));

    // Tokens: the API server says whose they are and what they may.
    let ask = |account: &str, path: &str| {
        let token = c.k(&format!("create token {account}"));
        let header = format!("Authorization: Bearer {}", token.trim());
        c.host.must(&format!(
            "curl -sk -m 20 -o /dev/null -w '%{{http_code}}' -H '{header}' https://10.88.0.1:10250/{path}"
        ))
    };
    assert_eq!(ask("scraper", "metrics/resource"), "200");
    assert_eq!(ask("scraper", "stats/summary"), "200");
    assert_eq!(ask("scraper", "configz"), "403");
    assert_eq!(ask("stranger", "metrics/resource"), "403");
    let code = |more: &str| {
        c.host.must(&format!("curl -sk -m 20 -o /dev/null -w '%{{http_code}}' {more} https://10.88.0.1:10250/metrics"))
    };
    assert_eq!(code(""), "401");
    assert_eq!(code("-H 'Authorization: Bearer nonsense'"), "401");

    assert_eq!(c.host.must("curl -s -m 20 http://127.0.0.1:10248/healthz"), "ok");

    // What a node says when it comes, and when it is taken out of use.
    let told = |want: &[&str]| {
        eventually("the node's events", || {
            let events = c.k("get events --field-selector involvedObject.kind=Node");
            if want.iter().all(|r| events.contains(r)) { Ok(()) } else { Err(events) }
        });
    };
    told(&[
        "Starting",
        "NodeHasSufficientMemory",
        "NodeHasNoDiskPressure",
        "NodeHasSufficientPID",
        "NodeReady",
        "NodeAllocatableEnforced",
    ]);
    if metrics.contains("kubelet_cgroup_version 1") {
        told(&["CgroupV1"]);
    }
    c.k("cordon one");
    told(&["NodeNotSchedulable"]);
    c.k("uncordon one");
    told(&["NodeSchedulable"]);
}
