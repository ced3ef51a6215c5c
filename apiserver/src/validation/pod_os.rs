//! What a pod of one operating system may not have.

use super::{At, Errs, containers};

/// Fields of a pod's security context that only Linux has, in the order they are reported.
const LINUX_POD: &[&str] = &[
    "appArmorProfile",
    "seLinuxOptions",
    "/hostUsers",
    "/hostPID",
    "/hostIPC",
    "seccompProfile",
    "fsGroup",
    "fsGroupChangePolicy",
    "sysctls",
    "/shareProcessNamespace",
    "runAsUser",
    "runAsGroup",
    "supplementalGroups",
    "supplementalGroupsPolicy",
    "seLinuxChangePolicy",
];
/// The same of a container's.
const LINUX_CONTAINER: &[&str] = &[
    "appArmorProfile",
    "seLinuxOptions",
    "seccompProfile",
    "capabilities",
    "readOnlyRootFilesystem",
    "privileged",
    "allowPrivilegeEscalation",
    "procMount",
    "runAsUser",
    "runAsGroup",
];

/// `os` of a pod spec.
pub(crate) fn os(e: &mut Errs, spec: &At<'_>) {
    let name = spec.get("os.name");
    match name.s() {
        "" => e.required(&name, ""),
        "linux" => linux(e, spec),
        "windows" => windows(e, spec),
        // Upstream leaves the field out.
        _ => e.unsupported(&At::new(spec.get("os").path, name.v), &["linux", "windows"]),
    }
}

fn linux(e: &mut Errs, spec: &At<'_>) {
    let own = spec.get("securityContext.windowsOptions");
    for at in std::iter::once(own).chain(containers(spec).iter().map(|c| c.get("securityContext.windowsOptions"))) {
        if at.is_set() {
            e.forbidden(&at, "windows options cannot be set for a linux pod");
        }
    }
}

fn windows(e: &mut Errs, spec: &At<'_>) {
    let context = spec.get("securityContext");
    for field in LINUX_POD {
        let at = field.strip_prefix('/').map_or_else(|| context.get(field), |outer| spec.get(outer));
        // The host's namespaces are plain booleans; lists count when they have something.
        let set = match at.v {
            serde_json::Value::Array(list) => !list.is_empty(),
            serde_json::Value::Bool(value) if matches!(*field, "/hostPID" | "/hostIPC") => *value,
            _ => at.is_set(),
        };
        if set {
            e.forbidden(&at, "cannot be set for a windows pod");
        }
    }
    for container in containers(spec) {
        let context = container.get("securityContext");
        for at in LINUX_CONTAINER.iter().map(|field| context.get(field)).filter(At::is_set) {
            e.forbidden(&at, "cannot be set for a windows pod");
        }
    }
}

/// Containers that run as processes of a Windows host: all of a pod or none, in the host's network.
pub(crate) fn host_process(e: &mut Errs, spec: &At<'_>) {
    let field = "securityContext.windowsOptions.hostProcess";
    let pod = spec.get(field).v.as_bool();
    let (mut all, mut host) = (0, 0);
    for container in containers(spec) {
        all += 1;
        let own = container.get(field);
        if let (Some(pod), Some(value)) = (pod, own.v.as_bool())
            && pod != value
        {
            let detail = format!("pod hostProcess value must be identical if both are specified, was {pod}");
            e.invalid(&own, &detail);
        }
        host += usize::from(own.v.as_bool().or(pod) == Some(true));
    }
    if host == 0 {
        return;
    }
    if host != all {
        let detail = "If pod contains any hostProcess containers then all containers must be HostProcess containers";
        e.invalid_as(spec, "", detail);
    }
    let network = spec.get("hostNetwork");
    if !network.is_true() {
        e.invalid_as(&network, false, "hostNetwork must be true if pod contains any hostProcess containers");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_the_other_system() {
        for (spec, want) in [
            (json!({"os": {}}), "spec.os.name"),
            (json!({"os": {"name": "linux"}, "securityContext": {"runAsUser": 1}}), ""),
            (
                json!({"os": {"name": "linux"}, "containers": [{"securityContext": {"windowsOptions": {}}}]}),
                "spec.containers[0].securityContext.windowsOptions",
            ),
            (
                json!({"os": {"name": "windows"}, "hostPID": true, "hostIPC": false,
                    "securityContext": {"runAsUser": 1, "sysctls": []},
                    "containers": [{"securityContext": {"privileged": false}}]}),
                "spec.hostPID,spec.securityContext.runAsUser,spec.containers[0].securityContext.privileged",
            ),
        ] {
            let obj = json!({ "spec": spec });
            let mut e = Errs::new();
            os(&mut e, &At::field(&obj, "spec"));
            let fields: Vec<String> = e.0.iter().map(|x| x.field.clone()).collect();
            assert_eq!(fields.join(","), want);
        }
    }
}
