//! Containers, init containers, ephemeral containers: what they share and what each kind may not have.

use std::collections::BTreeSet;

use isopod_api::{field::Path, names};

use super::{At, Errs, env, probe, resources, security};

/// What a container's checks need to know of its pod.
pub(crate) struct Pod<'a> {
    /// Names of the valid volumes.
    pub(crate) volumes: Vec<(&'a str, At<'a>)>,
    /// Names of the resource claims.
    pub(crate) claims: Vec<&'a str>,
    /// terminationGracePeriodSeconds.
    pub(crate) grace: i64,
    /// restartPolicy.
    pub(crate) restart_policy: &'a str,
    /// hostUsers, true when it is not said.
    pub(crate) host_users: bool,
}

/// `containers`.
pub(crate) fn containers(e: &mut Errs, list: &At<'_>, pod: &Pod<'_>) {
    if list.len() == 0 {
        return e.required(list, "");
    }
    let mut seen = BTreeSet::new();
    for at in list.items() {
        common(e, &at, pod);
        let name = at.get("name");
        if !seen.insert(name.s()) {
            e.duplicate(&name, name.s());
        }
        let lifecycle = at.get("lifecycle");
        if lifecycle.is_set() {
            probe::lifecycle(e, &lifecycle, pod.grace);
        }
        probe::probes(e, &at, pod.grace);
        restart_rules(e, &at, false);
    }
    host_port_conflicts(e, list);
}

/// When a container runs again; the rules of an init container without a policy are not looked at.
fn restart_rules(e: &mut Errs, at: &At<'_>, init: bool) {
    let (policy, rules) = (at.get("restartPolicy"), at.get("restartPolicyRules"));
    e.one_of_if_set(&policy, &["Always", "Never", "OnFailure"]);
    if rules.len() > 0 && !policy.is_set() {
        e.required(&policy, "must specify restartPolicy when restart rules are used");
        if init {
            return;
        }
    }
    if rules.len() > 20 {
        e.too_many(&rules, rules.len(), 20);
    }
    for rule in rules.items() {
        e.one_of(&rule.get("action"), &["Restart", "RestartAllContainers"]);
        let codes = rule.get("exitCodes");
        if codes.is_set() {
            e.one_of(&codes.get("operator"), &["In", "NotIn"]);
            if codes.get("values").len() > 255 {
                e.too_many(&codes.get("values"), codes.get("values").len(), 255);
            }
        } else {
            e.required(&codes, "must be specified");
        }
    }
}

/// `initContainers`; sidecars (restartPolicy Always) may have probes and lifecycle.
pub(crate) fn init_containers(e: &mut Errs, list: &At<'_>, regular: &At<'_>, pod: &Pod<'_>) {
    let mut seen: BTreeSet<&str> = regular.items().iter().map(|c| c.get("name").s()).collect();
    for at in list.items() {
        common(e, &at, pod);
        restart_rules(e, &at, true);
        let name = at.get("name");
        if !name.s().is_empty() && !seen.insert(name.s()) {
            e.duplicate(&name, name.s());
        }
        // Upstream looks at a list of this one alone.
        host_port_conflicts(e, &At::new(list.path.index(0), at.v));
        let sidecar = at.get("restartPolicy").s() == "Always";
        if sidecar {
            let lifecycle = at.get("lifecycle");
            if lifecycle.is_set() {
                probe::lifecycle(e, &lifecycle, pod.grace);
            }
            probe::probes(e, &at, pod.grace);
        } else {
            for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                let field = at.get(field);
                if field.is_set() {
                    e.forbidden(&field, "may not be set for init containers without restartPolicy=Always");
                }
            }
            for restart in at.get("resizePolicy").items().iter().map(|policy| policy.get("restartPolicy")) {
                if restart.s() == "RestartContainer" {
                    e.invalid(&restart, "must not be set to 'RestartContainer' for non-sidecar initContainers");
                }
            }
        }
    }
}

/// `ephemeralContainers`; they must target a regular container and have no ports, probes, resources or lifecycle.
pub(crate) fn ephemeral_containers(e: &mut Errs, list: &At<'_>, spec: &At<'_>, pod: &Pod<'_>) {
    let all: BTreeSet<&str> =
        ["containers", "initContainers"].iter().flat_map(|l| spec.get(l).items()).map(|c| c.get("name").s()).collect();
    let mut seen = all.clone();
    for at in list.items() {
        common(e, &at, pod);
        trimmed_image(e, &at);
        let name = at.get("name");
        if !name.s().is_empty() && !seen.insert(name.s()) {
            e.duplicate(&name, name.s());
        }
        let target = at.get("targetContainerName");
        if !target.s().is_empty() && !all.contains(target.s()) {
            e.not_found(&target, target.s());
        }
        for field in [
            "ports",
            "resources",
            "resizePolicy",
            "restartPolicy",
            "restartPolicyRules",
            "livenessProbe",
            "readinessProbe",
            "startupProbe",
            "lifecycle",
        ] {
            let field_at = at.get(field);
            let empty =
                matches!(field, "ports" | "resizePolicy" | "restartPolicyRules" | "resources") && field_at.len() == 0;
            if field_at.is_set() && !empty {
                e.forbidden(&field_at, "cannot be set for an Ephemeral Container");
            }
        }
        for mount in at.get("volumeMounts").items() {
            for field in ["subPath", "subPathExpr"] {
                let sub = mount.get(field);
                if !sub.s().is_empty() {
                    e.forbidden(&sub, "cannot be set for an Ephemeral Container");
                }
            }
        }
    }
}

/// What only stored pods are checked for, not templates.
pub(crate) fn trimmed_image(e: &mut Errs, at: &At<'_>) {
    let image = at.get("image");
    if image.s().trim() != image.s() {
        e.invalid(&image, "must not have leading or trailing whitespace");
    }
}

/// In the host's network a pod's host ports are its container ports; templates may leave them out.
pub(crate) fn host_network_ports(e: &mut Errs, containers: &At<'_>, is_pod: bool) {
    for port in containers.items().iter().flat_map(|c| c.get("ports").items()) {
        let (host, own) = (port.get("hostPort"), port.get("containerPort"));
        if (is_pod || host.int0() != 0) && host.int0() != own.int0() {
            e.invalid_as(&host, host.int0(), "must match `containerPort` when `hostNetwork` is true");
        }
    }
}

fn common(e: &mut Errs, at: &At<'_>, pod: &Pod<'_>) {
    let name = at.get("name");
    if name.s().is_empty() {
        e.required(&name, "");
    } else {
        e.dns_label(&name);
    }
    let image = at.get("image");
    if image.s().is_empty() {
        e.required(&image, "");
    }
    e.required_one_of(&at.get("terminationMessagePolicy"), &["File", "FallbackToLogsOnError"]);
    ports(e, &at.get("ports"));
    env::env(e, &at.get("env"));
    env::env_from(e, &at.get("envFrom"));
    volume_mounts(e, at, pod);
    volume_devices(e, at, pod);
    e.required_one_of(&at.get("imagePullPolicy"), &["Always", "IfNotPresent", "Never"]);
    resources::requirements(e, &at.get("resources"), &pod.claims);
    resize_policy(e, &at.get("resizePolicy"), pod.restart_policy);
    security::container(e, &at.get("securityContext"), pod.host_users);
}

fn ports(e: &mut Errs, list: &At<'_>) {
    let mut seen = BTreeSet::new();
    for at in list.items() {
        let name = at.get("name");
        if !name.s().is_empty() {
            let messages = names::port_name(name.s());
            if messages.is_empty() && !seen.insert(name.s()) {
                e.duplicate(&name, name.s());
            }
            e.messages(&name, messages);
        }
        let port = at.get("containerPort");
        if port.int0() == 0 {
            e.required(&port, "");
        } else {
            e.port(&port);
        }
        let host = at.get("hostPort");
        if host.int0() != 0 {
            e.port(&host);
        }
        e.required_one_of(&at.get("protocol"), &["SCTP", "TCP", "UDP"]);
    }
}

/// Host ports must be unique by protocol, address and port over all containers of the list (or in one container).
fn host_port_conflicts(e: &mut Errs, at: &At<'_>) {
    let containers = if at.v.is_array() { at.items() } else { vec![at.clone()] };
    let mut seen = BTreeSet::new();
    for container in containers {
        for port in container.get("ports").items() {
            let host = port.get("hostPort");
            if host.int0() == 0 {
                continue;
            }
            let key = format!("{}/{}/{}", port.get("protocol").s(), port.get("hostIP").s(), host.int0());
            if !seen.insert(key.clone()) {
                e.duplicate(&host, key);
            }
        }
    }
}

fn volume_mounts(e: &mut Errs, container: &At<'_>, pod: &Pod<'_>) {
    let list = container.get("volumeMounts");
    let devices = container.get("volumeDevices").items();
    let mut seen = BTreeSet::new();
    for at in list.items() {
        let (name, path) = (at.get("name"), at.get("mountPath"));
        if name.s().is_empty() {
            e.required(&name, "");
        }
        if !pod.volumes.iter().any(|(n, _)| *n == name.s()) {
            e.not_found(&name, name.s());
        }
        if path.s().is_empty() {
            e.required(&path, "");
        }
        if !seen.insert(path.s()) {
            e.invalid_str(&path, "must be unique");
        }
        if devices.iter().any(|d| d.get("name").s() == name.s()) {
            e.invalid(&name, "must not already exist in volumeDevices");
        }
        if devices.iter().any(|d| d.get("devicePath").s() == path.s()) {
            e.invalid(&path, "must not already exist as a path in volumeDevices");
        }
        mount_options(e, &list, &at, container);
    }
}

fn mount_options(e: &mut Errs, list: &At<'_>, at: &At<'_>, container: &At<'_>) {
    // Upstream leaves the index out of these four paths.
    let whole = |field: &str| At::new(Path::child(&list.path, field), at.get(field).v);
    let (sub, expr) = (at.get("subPath"), at.get("subPathExpr"));
    if !sub.s().is_empty() {
        super::volume::descending_path(e, &whole("subPath"));
    }
    if !expr.s().is_empty() {
        if !sub.s().is_empty() {
            e.invalid(&expr, "subPathExpr and subPath are mutually exclusive");
        }
        super::volume::descending_path(e, &whole("subPathExpr"));
    }
    let propagation = whole("mountPropagation");
    if propagation.is_set() {
        e.one_of(&propagation, &["Bidirectional", "HostToContainer", "None"]);
        if propagation.s() == "Bidirectional" && !container.get("securityContext.privileged").is_true() {
            e.forbidden(&propagation, "Bidirectional mount propagation is available only to privileged containers");
        }
    }
    let recursive = whole("recursiveReadOnly");
    if recursive.is_set() && recursive.s() != "Disabled" {
        if !["Enabled", "IfPossible"].contains(&recursive.s()) {
            return e.unsupported(&recursive, &["Disabled", "Enabled", "IfPossible"]);
        }
        if !at.get("readOnly").is_true() {
            e.forbidden(&recursive, "may only be specified when readOnly is true");
        }
        if propagation.is_set() && propagation.s() != "None" {
            e.forbidden(&recursive, "may only be specified when mountPropagation is None or not specified");
        }
    }
}

fn volume_devices(e: &mut Errs, container: &At<'_>, pod: &Pod<'_>) {
    let mounts = container.get("volumeMounts").items();
    let (mut paths, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for at in container.get("volumeDevices").items() {
        let (name, path) = (at.get("name"), at.get("devicePath"));
        let volume = pod.volumes.iter().find(|(n, _)| *n == name.s());
        if name.s().is_empty() {
            e.required(&name, "");
        }
        if !name.s().is_empty() && !seen.insert(name.s()) {
            e.invalid(&name, "must be unique");
        }
        let claim = volume.is_some_and(|(_, v)| v.get("persistentVolumeClaim").is_set() || v.get("ephemeral").is_set());
        if !claim && volume.is_some() {
            e.invalid(&name, "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode");
        }
        if volume.is_none() {
            e.not_found(&name, name.s());
        }
        if path.s().is_empty() {
            e.required(&path, "");
        }
        if paths.contains(path.s()) {
            e.invalid_str(&path, "must be unique");
        }
        if path.s().split('/').any(|p| p == "..") {
            e.invalid(&path, "can not contain backsteps ('..')");
        } else {
            paths.insert(path.s());
        }
        if mounts.iter().any(|m| m.get("name").s() == name.s()) {
            e.invalid(&name, "must not already exist in volumeMounts");
        }
        if mounts.iter().any(|m| m.get("mountPath").s() == path.s()) {
            e.invalid(&path, "must not already exist as a path in volumeMounts");
        }
    }
}

fn resize_policy<'a>(e: &mut Errs, list: &At<'a>, restart_policy: &str) {
    let mut seen = BTreeSet::new();
    for at in list.items() {
        let resource = at.get("resourceName");
        if !seen.insert(resource.s()) {
            e.duplicate(&at, resource.s());
        }
        // Upstream leaves index and field out of these.
        let here = |v: &At<'a>| At::new(list.path.clone(), v.v);
        e.required_one_of(&here(&resource), &["cpu", "memory"]);
        let restart = here(&at.get("restartPolicy"));
        e.required_one_of(&restart, &["NotRequired", "RestartContainer"]);
        if restart_policy == "Never" && restart.s() != "NotRequired" {
            e.invalid_str(&restart, "must be 'NotRequired' when pod `restartPolicy` is 'Never'");
        }
    }
}
