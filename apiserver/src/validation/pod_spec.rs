//! The spec of a pod, as part of a pod or of a template.

use isopod_api::names;

use super::{At, Errs, container, resources, scheduling, security, volume};

/// `spec` of a pod (whose name is given) or of a template.
pub(crate) fn pod_spec(e: &mut Errs, spec: &At<'_>, name: Option<&str>) {
    let volumes = volume::volumes(e, &spec.get("volumes"), name);
    let claims = scheduling::claims(e, &spec.get("resourceClaims"));
    let pod = container::Pod {
        volumes,
        claims,
        grace: spec.get("terminationGracePeriodSeconds").int0(),
        restart_policy: spec.get("restartPolicy").s(),
        host_users: spec.get("hostUsers").v.as_bool() != Some(false),
    };
    let regular = spec.get("containers");
    container::containers(e, &regular, &pod);
    container::init_containers(e, &spec.get("initContainers"), &regular, &pod);
    container::ephemeral_containers(e, &spec.get("ephemeralContainers"), spec, &pod);
    resources::pod_level(e, spec);
    if spec.get("hostNetwork").is_true() {
        container::host_network_ports(e, &regular, name.is_some());
    }
    e.required_one_of(&spec.get("restartPolicy"), &["Always", "OnFailure", "Never"]);
    e.required_one_of(&spec.get("dnsPolicy"), &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"]);
    super::meta::labels(e, &spec.get("nodeSelector"));
    security::pod(e, spec);
    scheduling::affinity(e, &spec.get("affinity"));
    dns_config(e, spec);
    for gate in spec.get("readinessGates").items() {
        e.qualified_name(&gate.get("conditionType"));
    }
    scheduling::gates(e, &spec.get("schedulingGates"));
    scheduling::topology_spread(e, &spec.get("topologySpreadConstraints"));
    super::pod_os::host_process(e, spec);
    host_users(e, spec);
    hostname_override(e, spec);
    names_and_limits(e, spec);
    let tolerations = spec.get("tolerations");
    scheduling::tolerations(e, &tolerations);
    host_aliases(e, &spec.get("hostAliases"));
    class_names(e, spec);
    if spec.get("preemptionPolicy").is_set() {
        e.required_one_of(&spec.get("preemptionPolicy"), &["PreemptLowerPriority", "Never"]);
    }
    resources::overhead(e, &spec.get("overhead"), spec.get("overhead").v);
    if spec.get("os").is_set() {
        super::pod_os::os(e, spec);
    }
    super::env::file_volumes(e, spec);
}

fn names_and_limits(e: &mut Errs, spec: &At<'_>) {
    for field in ["serviceAccountName", "nodeName"] {
        let at = spec.get(field);
        if !at.s().is_empty() {
            e.dns_subdomain(&at);
        }
    }
    let deadline = spec.get("activeDeadlineSeconds");
    if deadline.int().is_some_and(|n| !(1..=i64::from(i32::MAX)).contains(&n)) {
        e.invalid(&deadline, "must be between 1 and 2147483647, inclusive");
    }
    for field in ["hostname", "subdomain"] {
        let at = spec.get(field);
        if !at.s().is_empty() {
            e.dns_label(&at);
        }
    }
}

fn hostname_override(e: &mut Errs, spec: &At<'_>) {
    let hostname = spec.get("hostnameOverride");
    if !hostname.is_set() {
        return;
    }
    for field in ["setHostnameAsFQDN", "hostNetwork"] {
        if spec.get(field).is_true() {
            e.forbidden(&hostname, &format!("may not be specified when {field} is true"));
        }
    }
    if hostname.s().len() > 64 {
        e.too_long(&hostname, 64);
    }
    e.dns_subdomain(&hostname);
}

fn class_names(e: &mut Errs, spec: &At<'_>) {
    for field in ["priorityClassName", "runtimeClassName"] {
        let at = spec.get(field);
        if at.is_set() && !(field == "priorityClassName" && at.s().is_empty()) {
            e.dns_subdomain(&at);
        }
    }
}

fn host_users(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("hostUsers");
    if at.v.as_bool() != Some(false) {
        return;
    }
    // Upstream spells two of them like this.
    for (field, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
        if spec.get(field).is_true() {
            e.forbidden(&At::new(spec.path.child(shown), at.v), WITHOUT_HOST_USERS);
        }
    }
    for devices in super::containers(spec).iter().map(|container| container.get("volumeDevices")) {
        if devices.len() > 0 {
            e.forbidden(&devices, WITHOUT_HOST_USERS);
        }
    }
}

const WITHOUT_HOST_USERS: &str = "when `hostUsers` is false";

fn dns_config(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("dnsConfig");
    let servers = at.get("nameservers");
    if spec.get("dnsPolicy").s() == "None" {
        if !at.is_set() {
            return e.required(&at, "must provide `dnsConfig` when `dnsPolicy` is None");
        }
        if servers.len() == 0 {
            return e.required(&servers, "must provide at least one DNS nameserver when `dnsPolicy` is None");
        }
    }
    if !at.is_set() {
        return;
    }
    if servers.len() > 3 {
        e.invalid(&servers, "must not have more than 3 nameservers");
    }
    for server in servers.items() {
        e.messages(&server, super::net::ip_messages(server.s()));
    }
    let searches = at.get("searches");
    if searches.len() > 32 {
        e.invalid(&searches, "must not have more than 32 search paths");
    }
    let total: usize = searches.strings().iter().map(|s| s.len() + 1).sum();
    if total.saturating_sub(1) > 2048 {
        e.invalid(&searches, "must not have more than 2048 characters (including spaces) in the search list");
    }
    for search in searches.items() {
        let name = search.s().strip_suffix('.').unwrap_or(search.s());
        if search.s() == "." {
            continue;
        }
        for message in names::dns1123_subdomain_with_underscore(name) {
            e.invalid_as(&search, name, &message);
        }
    }
    for option in at.get("options").items() {
        if option.get("name").s().is_empty() {
            e.required(&option, "must not be empty");
        }
    }
}

fn host_aliases(e: &mut Errs, list: &At<'_>) {
    for at in list.items() {
        e.messages(&at.get("ip"), super::net::ip_messages(at.get("ip").s()));
        for hostname in at.get("hostnames").items() {
            e.dns_subdomain(&hostname);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn errors(spec: Value) -> Vec<String> {
        let obj = json!({ "spec": spec });
        let mut e = Errs::new();
        pod_spec(&mut e, &At::field(&obj, "spec"), Some("p"));
        e.0.iter().map(ToString::to_string).collect()
    }

    fn container() -> Value {
        json!({"name": "c", "image": "i", "terminationMessagePolicy": "File", "imagePullPolicy": "Always"})
    }

    fn spec(mut more: Value) -> Value {
        let mut spec = json!({"containers": [container()], "restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
            "terminationGracePeriodSeconds": 30});
        for (key, value) in more.as_object_mut().into_iter().flatten() {
            spec[key] = value.clone();
        }
        spec
    }

    #[test]
    fn table() {
        for (more, want) in [
            (json!({}), ""),
            (json!({"containers": []}), "spec.containers: Required value"),
            (
                json!({"restartPolicy": "X"}),
                "spec.restartPolicy: Unsupported value: \"X\": supported values: \"Always\", \"OnFailure\", \"Never\"",
            ),
            (
                json!({"dnsPolicy": "None"}),
                "spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None",
            ),
            (
                json!({"activeDeadlineSeconds": 0}),
                "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
            ),
            (json!({"hostUsers": false, "hostPID": true}), "spec.HostPID: Forbidden: when `hostUsers` is false"),
            (
                json!({"tolerations": [{"key": "a", "value": "b c"}, {"key": "a", "operator": "Lt", "value": "1"}]}),
                "spec.tolerations[0].operator: Invalid value: \"b c\": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')|spec.tolerations[1].operator: Unsupported value: \"Lt\": supported values: \"Equal\", \"Exists\", \"Lt\", \"Gt\"",
            ),
            (
                json!({"schedulingGates": [{"name": "a"}, {"name": "a"}]}),
                "spec.schedulingGates[1]: Duplicate value: \"a\"",
            ),
            (
                json!({"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule"},
                    {"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule", "matchLabelKeys": ["-"]}]}),
                "spec.topologySpreadConstraints[0].{topologyKey, whenUnsatisfiable}: Duplicate value: \"{z, DoNotSchedule}\"|spec.topologySpreadConstraints[1].matchLabelKeys: Forbidden: must not be specified when labelSelector is not set",
            ),
            (
                json!({"dnsConfig": {"options": [{"name": "a"}, {}]}}),
                "spec.dnsConfig.options[1]: Required value: must not be empty",
            ),
            (
                json!({"overhead": {"cpu": "-1"}}),
                "spec.overhead.limits[cpu]: Invalid value: \"-1\": must be greater than or equal to 0",
            ),
            (
                json!({"hostNetwork": true, "containers": [{"name": "c", "image": "i", "terminationMessagePolicy": "File",
                    "imagePullPolicy": "Always", "ports": [{"containerPort": 80, "hostPort": 81, "protocol": "TCP"}]}]}),
                "spec.containers[0].ports[0].hostPort: Invalid value: 81: must match `containerPort` when `hostNetwork` is true",
            ),
            (
                json!({"securityContext": {"windowsOptions": {"hostProcess": true}}}),
                "spec.hostNetwork: Invalid value: false: hostNetwork must be true if pod contains any hostProcess containers",
            ),
            (
                json!({"tolerations": [{"operator": "Equal"}]}),
                "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            ),
            (
                json!({"topologySpreadConstraints": [{"maxSkew": 0, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]}),
                "spec.topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero",
            ),
            (
                json!({"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "z",
                    "labelSelector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "Exists"}]},
                    "matchLabelKeys": ["a"]}]}}}),
                "spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0][0]: Invalid value: \"a\": exists in both matchLabelKeys and labelSelector",
            ),
            (
                json!({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 101,
                    "preference": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["a b"]}]}}]}}}),
                "spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight: Invalid value: 101: must be in the range 1-100",
            ),
            (
                json!({"os": {"name": "bsd"}}),
                "spec.os: Unsupported value: \"bsd\": supported values: \"linux\", \"windows\"",
            ),
            (
                json!({"containers": [{"name": "c", "image": "i", "terminationMessagePolicy": "File", "imagePullPolicy": "Always",
                    "resources": {"requests": {"hugepages-2Mi": "1Mi", "cpu": "1"}, "limits": {"hugepages-2Mi": "1Mi"}}}]}),
                "spec.containers[0].resources.limits[hugepages-2Mi]: Invalid value: \"1Mi\": 1Mi is not positive integer multiple of hugepages-2Mi|spec.containers[0].resources.requests[hugepages-2Mi]: Invalid value: \"1Mi\": 1Mi is not positive integer multiple of hugepages-2Mi",
            ),
            (json!({"initContainers": [container()]}), "spec.initContainers[0].name: Duplicate value: \"c\""),
        ] {
            assert_eq!(errors(spec(more.clone())).join("|"), want, "{more}");
        }
    }
}
