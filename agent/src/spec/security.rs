//! Who a container runs as and what it may do.

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, SecurityContext};
use serde_json::{Value, json};

use super::users::Users;

/// Capabilities of a container that asks for nothing.
const DEFAULT_CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

const ALL_CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The container's own security context.
fn own(c: &Container) -> SecurityContext {
    c.security_context.clone().unwrap_or_default()
}

/// Whether a container is privileged.
pub(crate) fn privileged(c: &Container) -> bool {
    own(c).privileged == Some(true)
}

/// The OCI `user` object and the user's home.
pub(crate) fn user(
    pod: &Pod,
    c: &Container,
    image_user: &str,
    users: &Users,
) -> Result<(Value, Option<String>), String> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.clone()).unwrap_or_default();
    let context = own(c);
    let uid = context.run_as_user.or(pod_context.run_as_user);
    let gid = context.run_as_group.or(pod_context.run_as_group);
    if context.run_as_non_root.or(pod_context.run_as_non_root) == Some(true) {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let pod_uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let place = format!("(pod: \"{name}_{namespace}({pod_uid})\", container: {})", c.name);
        let image_name = image_user.split(':').next().unwrap_or("");
        match uid {
            Some(0) => return Err(format!("container's runAsUser breaks non-root policy {place}")),
            Some(_) => {}
            None if image_name.is_empty() || image_name == "0" => {
                return Err(format!("container has runAsNonRoot and image will run as root {place}"));
            }
            None if image_name.parse::<u32>().is_err() => {
                return Err(format!(
                    "container has runAsNonRoot and image has non-numeric user ({image_name}), cannot verify user is \
                     non-root {place}"
                ));
            }
            None => {}
        }
    }
    let mut identity = match uid {
        Some(uid) => users.resolve_uid(u32::try_from(uid).map_err(|_| format!("runAsUser {uid} is out of range"))?),
        None => users.resolve(image_user)?,
    };
    if let Some(gid) = gid {
        identity.gid = u32::try_from(gid).map_err(|_| format!("runAsGroup {gid} is out of range"))?;
    }
    let mut groups: Vec<u32> = Vec::new();
    if pod_context.supplemental_groups_policy.as_deref() != Some("Strict") {
        groups.append(&mut identity.groups);
    }
    groups.extend(pod_context.supplemental_groups.iter().flatten().filter_map(|g| u32::try_from(*g).ok()));
    groups.extend(pod_context.fs_group.and_then(|g| u32::try_from(g).ok()));
    groups.push(identity.gid);
    groups.sort_unstable();
    groups.dedup();
    Ok((json!({"uid": identity.uid, "gid": identity.gid, "additionalGids": groups}), identity.home))
}

/// The OCI `capabilities` object.
pub(crate) fn capabilities(c: &Container) -> Value {
    let context = own(c);
    let change = context.capabilities.clone().unwrap_or_default();
    let plain = |name: &String| name.trim_start_matches("CAP_").to_ascii_uppercase();
    let (add, drop): (Vec<String>, Vec<String>) =
        (change.add.iter().flatten().map(plain).collect(), change.drop.iter().flatten().map(plain).collect());
    let mut set: Vec<String> = if context.privileged == Some(true) || add.iter().any(|a| a == "ALL") {
        ALL_CAPABILITIES.iter().map(ToString::to_string).collect()
    } else if drop.iter().any(|d| d == "ALL") {
        Vec::new()
    } else {
        DEFAULT_CAPABILITIES.iter().map(ToString::to_string).collect()
    };
    if context.privileged != Some(true) {
        set.retain(|s| !drop.contains(s));
    }
    for a in add.into_iter().filter(|a| a != "ALL") {
        if !set.contains(&a) {
            set.push(a);
        }
    }
    let set: Vec<String> = set.into_iter().map(|s| format!("CAP_{s}")).collect();
    json!({"bounding": set, "effective": set, "permitted": set, "inheritable": [], "ambient": []})
}

/// The OCI `seccomp` object; `None` is unconfined.
pub(crate) fn seccomp(pod: &Pod, c: &Container, default_on: bool, profiles: &Path) -> Result<Option<Value>, String> {
    if privileged(c) {
        return Ok(None);
    }
    let pod_profile =
        pod.spec.as_ref().and_then(|s| s.security_context.as_ref()).and_then(|s| s.seccomp_profile.clone());
    let profile = own(c).seccomp_profile.or(pod_profile);
    let runtime_default =
        || serde_json::to_value(isopod_runtime::seccomp::default_profile()).map(Some).map_err(|e| e.to_string());
    match profile.as_ref().map(|p| p.type_.as_str()) {
        None if default_on => runtime_default(),
        None | Some("Unconfined") => Ok(None),
        Some("RuntimeDefault") => runtime_default(),
        Some("Localhost") => {
            let name = profile.and_then(|p| p.localhost_profile).unwrap_or_default();
            if name.is_empty() || name.split('/').any(|p| p == "..") || name.starts_with('/') {
                return Err(format!("localhostProfile {name:?} must be a path below {}", profiles.display()));
            }
            let path = profiles.join(&name);
            let text = std::fs::read(&path)
                .map_err(|e| format!("cannot load seccomp profile {:?}: {e}", path.display().to_string()))?;
            serde_json::from_slice(&text)
                .map(Some)
                .map_err(|e| format!("cannot load seccomp profile {:?}: {e}", path.display().to_string()))
        }
        Some(other) => Err(format!("unknown seccomp profile type {other:?}")),
    }
}

/// `no_new_privs`.
pub(crate) fn no_new_privileges(c: &Container) -> bool {
    own(c).allow_privilege_escalation == Some(false)
}

/// Whether the root file system is read-only.
pub(crate) fn read_only_root(c: &Container) -> bool {
    own(c).read_only_root_filesystem == Some(true)
}

/// Paths hidden and paths made read-only.
pub(crate) fn paths(c: &Container) -> (Vec<&'static str>, Vec<&'static str>) {
    if privileged(c) || own(c).proc_mount.as_deref() == Some("Unmasked") {
        return (Vec::new(), Vec::new());
    }
    (
        vec![
            "/proc/asound",
            "/proc/acpi",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/sys/firmware",
            "/sys/devices/virtual/powercap",
        ],
        vec!["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    )
}

/// Sysctls a namespaced pod may set without being allowed by the node.
const SAFE_SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// The first sysctl the pod may not set here.
pub(crate) fn forbidden_sysctl(pod: &Pod, allowed: &[String]) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let sysctls = spec.security_context.as_ref()?.sysctls.as_ref()?;
    let permitted = |name: &str| {
        let name = name.replace('/', ".");
        let host = (name.starts_with("net.") && spec.host_network == Some(true))
            || (!name.starts_with("net.") && spec.host_ipc == Some(true));
        !host
            && (SAFE_SYSCTLS.contains(&name.as_str())
                || allowed.iter().any(|a| match a.strip_suffix('*') {
                    Some(prefix) => name.starts_with(prefix),
                    None => *a == name,
                }))
    };
    sysctls.iter().find(|s| !permitted(&s.name)).map(|s| s.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(pod_context: Value, context: Value) -> (Pod, Container) {
        let p: Pod = serde_json::from_value(json!({"metadata":{"name":"p","namespace":"n","uid":"u"},
            "spec":{"securityContext":pod_context,"containers":[{"name":"c","securityContext":context}]}}))
        .unwrap();
        let c = p.spec.as_ref().unwrap().containers[0].clone();
        (p, c)
    }

    #[test]
    fn users_and_groups() {
        let users = Users::parse("web:x:33:34::/:\n", "extra:x:50:web\n");
        for (pc, cc, image, want) in [
            (json!({}), json!({}), "", Ok(json!({"uid":0,"gid":0,"additionalGids":[0]}))),
            (json!({}), json!({}), "web", Ok(json!({"uid":33,"gid":34,"additionalGids":[34,50]}))),
            (
                json!({"runAsUser":33,"fsGroup":7,"supplementalGroups":[9]}),
                json!({"runAsGroup":5}),
                "",
                Ok(json!({"uid":33,"gid":5,"additionalGids":[5,7,9,50]})),
            ),
            (
                json!({"supplementalGroupsPolicy":"Strict"}),
                json!({}),
                "web",
                Ok(json!({"uid":33,"gid":34,"additionalGids":[34]})),
            ),
            (json!({"runAsNonRoot":true}), json!({}), "", Err("container has runAsNonRoot and image will run as root")),
            (json!({"runAsNonRoot":true}), json!({}), "web", Err("non-numeric user (web)")),
            (
                json!({"runAsNonRoot":true}),
                json!({"runAsUser":0}),
                "",
                Err("container's runAsUser breaks non-root policy"),
            ),
            (
                json!({"runAsNonRoot":true}),
                json!({"runAsNonRoot":false}),
                "",
                Ok(json!({"uid":0,"gid":0,"additionalGids":[0]})),
            ),
        ] {
            let (p, c) = pod(pc.clone(), cc.clone());
            match (user(&p, &c, image, &users), want) {
                (Ok((got, _)), Ok(want)) => assert_eq!(got, want, "{pc} {cc}"),
                (Err(got), Err(want)) => assert!(got.contains(want), "{got}"),
                (got, want) => panic!("{got:?} {want:?}"),
            }
        }
    }

    #[test]
    fn capability_sets() {
        let of = |v: Value| {
            let (_, c) = pod(json!({}), json!({"capabilities": v}));
            capabilities(&c)["bounding"].as_array().unwrap().len()
        };
        assert_eq!(of(json!({})), 14);
        assert_eq!(of(json!({"drop":["ALL"]})), 0);
        assert_eq!(of(json!({"drop":["ALL"],"add":["NET_ADMIN"]})), 1);
        assert_eq!(of(json!({"drop":["CHOWN"],"add":["CAP_SYS_TIME"]})), 14);
        assert_eq!(of(json!({"add":["ALL"],"drop":["SYS_ADMIN"]})), ALL_CAPABILITIES.len() - 1);
    }

    #[test]
    fn sysctls() {
        let of = |name: &str, allowed: &[String]| {
            let (p, _) = pod(json!({"sysctls":[{"name":name,"value":"1"}]}), json!({}));
            forbidden_sysctl(&p, allowed)
        };
        assert_eq!(of("net.ipv4.tcp_syncookies", &[]), None);
        assert_eq!(of("kernel.msgmax", &[]), Some("kernel.msgmax".into()));
        assert_eq!(of("kernel.msgmax", &["kernel.msg*".into()]), None);
    }
}
