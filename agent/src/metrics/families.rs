//! What is counted: names and help texts, as a kubelet's.

/// Every family, in the order in which it is shown. Those that begin with `prober_` are shown on /metrics/probes.
pub(super) const FAMILIES: &[(&str, &str)] = &[
    (
        "dra_operations_duration_seconds",
        "Latency histogram in seconds for the duration of handling all ResourceClaims referenced by a pod when the pod starts or stops.",
    ),
    ("kubelet_certificate_manager_client_expiration_renew_errors", "Counter of certificate renewal errors."),
    (
        "kubelet_cgroup_manager_duration_seconds",
        "Duration in seconds for cgroup manager operations. Broken down by method.",
    ),
    ("kubelet_containers_per_pod_count", "The number of containers per pod."),
    ("kubelet_cpu_manager_pinning_errors_total", "The number of cpu core allocations which required pinning failed."),
    ("kubelet_cpu_manager_pinning_requests_total", "The number of cpu core allocations which required pinning."),
    ("kubelet_evictions", "Cumulative number of pod evictions by eviction signal"),
    (
        "kubelet_first_network_pod_start_sli_duration_seconds",
        "Duration in seconds to start the first network pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
    ),
    ("kubelet_graceful_shutdown_end_time_seconds", "Last graceful shutdown end time since unix epoch in seconds"),
    ("kubelet_graceful_shutdown_start_time_seconds", "Last graceful shutdown start time since unix epoch in seconds"),
    ("kubelet_http_inflight_requests", "Number of the inflight http requests"),
    ("kubelet_http_requests_duration_seconds", "Duration in seconds to serve http requests"),
    ("kubelet_http_requests_total", "Number of the http requests received since the server started"),
    ("kubelet_image_garbage_collected_total", "Total number of images garbage collected by the kubelet"),
    ("kubelet_image_manager_ensure_image_requests_total", "Number of ensure-image requests processed by the kubelet."),
    ("kubelet_image_volume_mounted_errors_total", "Number of failed image volume mounts."),
    ("kubelet_image_volume_mounted_succeed_total", "Number of successful image volume mounts."),
    ("kubelet_image_volume_requested_total", "Number of requested image volumes."),
    (
        "kubelet_memory_manager_pinning_errors_total",
        "The number of memory pages allocations which required pinning that failed.",
    ),
    ("kubelet_memory_manager_pinning_requests_total", "The number of memory pages allocations which required pinning."),
    ("kubelet_node_startup_duration_seconds", "Duration in seconds of node startup in total."),
    (
        "kubelet_node_startup_post_registration_duration_seconds",
        "Duration in seconds of node startup after registration.",
    ),
    ("kubelet_node_startup_pre_kubelet_duration_seconds", "Duration in seconds of node startup before kubelet starts."),
    (
        "kubelet_node_startup_pre_registration_duration_seconds",
        "Duration in seconds of node startup before registration.",
    ),
    ("kubelet_node_startup_registration_duration_seconds", "Duration in seconds of node startup during registration."),
    (
        "kubelet_orphaned_runtime_pods_total",
        "Number of pods that have been detected in the container runtime without being already known to the pod worker. This typically indicates the kubelet was restarted while a pod was force deleted in the API or in the local configuration, which is unusual.",
    ),
    (
        "kubelet_pod_start_duration_seconds",
        "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run",
    ),
    (
        "kubelet_pod_start_sli_duration_seconds",
        "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
    ),
    (
        "kubelet_pod_start_total_duration_seconds",
        "Duration in seconds to start a pod since creation, including time to pull images and run init containers, measured from pod creation timestamp to when all its containers are reported as started and observed via watch",
    ),
    (
        "kubelet_pod_status_sync_duration_seconds",
        "Duration in seconds to sync a pod status update. Measures time from detection of a change to pod status until the API is successfully updated for that pod, even if multiple intevening changes to pod status occur.",
    ),
    (
        "kubelet_pod_worker_duration_seconds",
        "Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync",
    ),
    (
        "kubelet_pod_worker_start_duration_seconds",
        "Duration in seconds from kubelet seeing a pod to starting a worker.",
    ),
    (
        "kubelet_restarted_pods_total",
        "Number of pods that have been restarted because they were deleted and recreated with the same UID while the kubelet was watching them (common for static pods, extremely uncommon for API pods)",
    ),
    ("kubelet_run_podsandbox_duration_seconds", "Duration in seconds of the run_podsandbox operations"),
    (
        "kubelet_runtime_operations_duration_seconds",
        "Duration in seconds of runtime operations. Broken down by operation type.",
    ),
    ("kubelet_runtime_operations_errors_total", "Cumulative number of runtime operation errors by operation type."),
    ("kubelet_runtime_operations_total", "Cumulative number of runtime operations by operation type."),
    (
        "kubelet_sleep_action_terminated_early_total",
        "The number of times lifecycle sleep handler got terminated before it finishes",
    ),
    ("kubelet_started_containers_errors_total", "Cumulative number of errors when starting containers"),
    ("kubelet_started_containers_total", "Cumulative number of containers started"),
    ("kubelet_started_pods_errors_total", "Cumulative number of errors when starting pods"),
    ("kubelet_started_pods_total", "Cumulative number of pods started"),
    (
        "kubelet_started_user_namespaced_pods_errors_total",
        "Cumulative number of errors when starting pods with user namespaces. This metric will only be collected on Linux.",
    ),
    (
        "kubelet_started_user_namespaced_pods_total",
        "Cumulative number of pods with user namespaces started. This metric is only collected on Linux.",
    ),
    ("kubelet_terminated_containers_total", "Cumulative number of containers terminated"),
    ("kubelet_topology_manager_admission_duration_ms", "Duration in milliseconds to serve a pod admission request."),
    (
        "kubelet_topology_manager_admission_errors_total",
        "The number of admission request failures where resources could not be aligned.",
    ),
    (
        "kubelet_topology_manager_admission_requests_total",
        "The number of admission requests where resources have to be aligned.",
    ),
    (
        "kubelet_websocket_streaming_requests_total",
        "Total number of websocket streaming requests received by the kubelet, by subresource.",
    ),
    ("prober_probe_duration_seconds", "Duration in seconds for a probe response."),
    ("prober_probe_total", "Cumulative number of a liveness, readiness or startup probe for a container by result."),
    ("rest_client_request_duration_seconds", "Request latency in seconds. Broken down by verb, and host."),
    ("rest_client_requests_total", "Number of HTTP requests, partitioned by status code, method, and host."),
    ("storage_operation_duration_seconds", "Storage operation duration"),
];
