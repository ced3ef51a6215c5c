//! What a caller of the CRI says, in the words of a pod: the pieces that run pods know no others.

use k8s_openapi::api::core::v1::{Container as PodContainer, Pod};
use serde_json::{Map, Value, json};
use tonic::Status;

use crate::{
    grpc::proto::cri::{
        ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, MountPropagation, NamespaceMode,
        NamespaceOption, PodSandboxConfig, Protocol, SecurityProfile, SupplementalGroupsPolicy,
        security_profile::ProfileType,
    },
    spec::BindMount,
};

fn decode<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Status> {
    serde_json::from_value(value).map_err(|e| Status::invalid_argument(e.to_string()))
}

fn namespaces(config: &PodSandboxConfig) -> NamespaceOption {
    let linux = config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    linux.and_then(|s| s.namespace_options.clone()).unwrap_or_default()
}

/// A sandbox as a pod. Its id stands for the UID: one pod may have several sandboxes, the last of which lives.
pub(super) fn pod(id: &str, config: &PodSandboxConfig) -> Result<Pod, Status> {
    let meta = config.metadata.clone().unwrap_or_default();
    if meta.name.is_empty() || meta.namespace.is_empty() {
        return Err(Status::invalid_argument("the sandbox has no name or namespace"));
    }
    let ns = namespaces(config);
    if ns
        .userns_options
        .as_ref()
        .is_some_and(|u| u.mode() == NamespaceMode::Pod && !(u.uids.is_empty() && u.gids.is_empty()))
    {
        return Err(Status::unimplemented("user namespaces of sandboxes"));
    }
    let is = |mode: i32, of: NamespaceMode| mode == i32::from(of);
    let dns = config.dns_config.clone().unwrap_or_default();
    let options = dns.options.iter().map(|o| match o.split_once(':') {
        Some((name, value)) => json!({"name": name, "value": value}),
        None => json!({"name": o}),
    });
    let ports = config.port_mappings.iter().map(|p| {
        let protocol = match p.protocol() {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        };
        json!({"containerPort": p.container_port, "hostPort": p.host_port, "hostIP": p.host_ip, "protocol": protocol})
    });
    let sysctls = config.linux.iter().flat_map(|l| &l.sysctls).map(|(k, v)| json!({"name": k, "value": v}));
    // Containers come one by one and later: two stand for them, so that they share what a pod's containers share.
    let mut first = json!({"name": "first", "image": ""});
    first["ports"] = ports.collect();
    decode(json!({
        "metadata": {"name": meta.name, "namespace": meta.namespace, "uid": id,
            "labels": config.labels, "annotations": config.annotations},
        "spec": {
            "hostNetwork": is(ns.network, NamespaceMode::Node),
            "hostPID": is(ns.pid, NamespaceMode::Node),
            "hostIPC": is(ns.ipc, NamespaceMode::Node),
            "shareProcessNamespace": is(ns.pid, NamespaceMode::Pod),
            "hostname": config.hostname,
            "dnsPolicy": if config.dns_config.is_some() { "None" } else { "Default" },
            "dnsConfig": {"nameservers": dns.servers, "searches": dns.searches, "options": options.collect::<Vec<_>>()},
            "securityContext": {"sysctls": sysctls.collect::<Vec<_>>()},
            "containers": [first, {"name": "more", "image": ""}],
        },
    }))
}

/// Where the caller wants the sandbox's group.
pub(super) fn parent(config: &PodSandboxConfig) -> Option<&str> {
    let parent = config.linux.as_ref().map(|l| l.cgroup_parent.trim_matches('/'));
    parent.filter(|p| !p.is_empty())
}

fn seccomp(profile: Option<&SecurityProfile>) -> Value {
    match profile.map(|p| (p.profile_type(), &p.localhost_ref)) {
        Some((ProfileType::RuntimeDefault, _)) => json!({"type": "RuntimeDefault"}),
        Some((ProfileType::Localhost, path)) => json!({"type": "Localhost", "localhostProfile": path}),
        _ => json!({"type": "Unconfined"}),
    }
}

/// A word the caller has already expanded.
fn literal(words: &[String]) -> Vec<String> {
    words.iter().map(|w| w.replace("$(", "$$(")).collect()
}

/// A container as one of a pod, and that pod: who its processes are stands partly there.
pub(super) fn container(pod: &Pod, config: &ContainerConfig) -> Result<(Pod, PodContainer), Status> {
    let meta = config.metadata.clone().unwrap_or_default();
    if meta.name.is_empty() {
        return Err(Status::invalid_argument("the container has no name"));
    }
    let none = LinuxContainerSecurityContext::default();
    let security = config.linux.as_ref().and_then(|l| l.security_context.as_ref()).unwrap_or(&none);
    if !security.run_as_username.is_empty() {
        return Err(Status::unimplemented("run_as_username: name the user in the image or by number"));
    }
    let capabilities = security.capabilities.clone().unwrap_or_default();
    let unmasked = config.linux.is_some() && security.masked_paths.is_empty() && !security.privileged;
    let mut context = Map::new();
    let mut set = |key: &str, value: Value| _ = context.insert(key.into(), value);
    set("privileged", json!(security.privileged));
    set("readOnlyRootFilesystem", json!(security.readonly_rootfs));
    set("allowPrivilegeEscalation", json!(!security.no_new_privs));
    set("capabilities", json!({"add": capabilities.add_capabilities, "drop": capabilities.drop_capabilities}));
    set("seccompProfile", seccomp(security.seccomp.as_ref()));
    set("procMount", json!(if unmasked { "Unmasked" } else { "Default" }));
    if let Some(uid) = &security.run_as_user {
        set("runAsUser", json!(uid.value));
    }
    if let Some(gid) = &security.run_as_group {
        set("runAsGroup", json!(gid.value));
    }
    let container = decode(json!({
        "name": meta.name,
        "image": config.image.as_ref().map(|i| i.image.as_str()).unwrap_or_default(),
        "command": literal(&config.command),
        "args": literal(&config.args),
        "workingDir": config.working_dir,
        "tty": config.tty, "stdin": config.stdin, "stdinOnce": config.stdin_once,
        "securityContext": context,
    }))?;
    let mut pod = pod.clone();
    let of_pod = pod.spec.get_or_insert_default().security_context.get_or_insert_default();
    of_pod.supplemental_groups = Some(security.supplemental_groups.clone());
    let strict = security.supplemental_groups_policy() == SupplementalGroupsPolicy::Strict;
    of_pod.supplemental_groups_policy = strict.then(|| "Strict".into());
    Ok((pod, container))
}

/// The variables a caller gives, which are as they shall be.
pub(super) fn variables(config: &ContainerConfig) -> Vec<(String, String)> {
    config.envs.iter().map(|e| (e.key.clone(), e.value.clone())).collect()
}

/// The caller's mounts. A directory of the host that is not there is made, as other runtimes do.
pub(super) fn mounts(config: &ContainerConfig) -> Result<Vec<BindMount>, Status> {
    let one = |m: &crate::grpc::proto::cri::Mount| {
        if m.image.as_ref().is_some_and(|i| !i.image.is_empty()) {
            return Err(Status::unimplemented("mounts of images"));
        }
        let source = std::path::PathBuf::from(&m.host_path);
        let failed = |e: std::io::Error| Status::invalid_argument(format!("mount {}: {e}", m.host_path));
        if !source.is_absolute() {
            return Err(Status::invalid_argument(format!("mount source {:?} is not absolute", m.host_path)));
        }
        if !source.exists() {
            std::fs::create_dir_all(&source).map_err(failed)?;
        }
        Ok(BindMount {
            source: source.canonicalize().map_err(failed)?,
            read_only: m.readonly,
            recursive_read_only: m.readonly && m.recursive_read_only,
            propagation: match m.propagation() {
                MountPropagation::PropagationPrivate => "rprivate",
                MountPropagation::PropagationHostToContainer => "rslave",
                MountPropagation::PropagationBidirectional => "rshared",
            },
            ..BindMount::file(Default::default(), m.container_path.clone())
        })
    };
    config.mounts.iter().map(one).collect()
}

/// Limits in the words of the OCI; what is not said stays as it is.
pub(super) fn resources(r: &LinuxContainerResources) -> Value {
    let said = |n: i64| (n != 0).then_some(n);
    let mut cpu = Map::new();
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            cpu.insert(key.into(), value);
        }
    };
    set("shares", said(r.cpu_shares).map(Value::from));
    set("quota", said(r.cpu_quota).map(Value::from));
    set("period", said(r.cpu_period).map(Value::from));
    set("cpus", Some(r.cpuset_cpus.clone()).filter(|c| !c.is_empty()).map(Value::from));
    set("mems", Some(r.cpuset_mems.clone()).filter(|c| !c.is_empty()).map(Value::from));
    let mut out = json!({"cpu": cpu});
    if let Some(limit) = said(r.memory_limit_in_bytes) {
        out["memory"] = json!({"limit": limit});
        if let Some(swap) = said(r.memory_swap_limit_in_bytes) {
            out["memory"]["swap"] = json!(swap);
        }
    }
    let huge = r.hugepage_limits.iter().map(|h| json!({"pageSize": h.page_size, "limit": h.limit}));
    let huge: Vec<Value> = huge.collect();
    if !huge.is_empty() {
        out["hugepageLimits"] = json!(huge);
    }
    if !r.unified.is_empty() {
        out["unified"] = json!(r.unified);
    }
    out
}

/// The signal of a number of the CRI's enum Signal, whose numbers are nobody else's.
pub(super) fn signal(number: i32) -> Option<&'static str> {
    const NAMES: [&str; 35] = [
        "", "ABRT", "ALRM", "BUS", "CHLD", "CHLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "ABRT", "KILL", "PIPE",
        "IO", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG",
        "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
    ];
    const REALTIME: [&str; 31] = [
        "RTMIN", "RTMIN+1", "RTMIN+2", "RTMIN+3", "RTMIN+4", "RTMIN+5", "RTMIN+6", "RTMIN+7", "RTMIN+8", "RTMIN+9",
        "RTMIN+10", "RTMIN+11", "RTMIN+12", "RTMIN+13", "RTMIN+14", "RTMIN+15", "RTMAX-14", "RTMAX-13", "RTMAX-12",
        "RTMAX-11", "RTMAX-10", "RTMAX-9", "RTMAX-8", "RTMAX-7", "RTMAX-6", "RTMAX-5", "RTMAX-4", "RTMAX-3", "RTMAX-2",
        "RTMAX-1", "RTMAX",
    ];
    let number = usize::try_from(number).ok()?;
    let name = NAMES.get(number).or_else(|| REALTIME.get(number.checked_sub(NAMES.len())?));
    name.copied().filter(|n| !n.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::proto::cri::{
        DnsConfig, Int64Value, LinuxContainerConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
        PodSandboxMetadata, PortMapping, UserNamespace,
    };

    #[test]
    fn a_sandbox_is_a_pod() {
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: "p".into(), namespace: "n".into(), ..Default::default() }),
            hostname: "h".into(),
            dns_config: Some(DnsConfig {
                servers: vec!["1.1.1.1".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            }),
            port_mappings: vec![PortMapping { container_port: 80, host_port: 8080, ..Default::default() }],
            ..Default::default()
        };
        let spec = pod("id", &config).unwrap().spec.unwrap();
        assert_eq!((spec.host_network, spec.share_process_namespace), (Some(false), Some(true)));
        assert_eq!(spec.dns_config.unwrap().options.unwrap()[0].value.as_deref(), Some("5"));
        assert_eq!(spec.containers[0].ports.as_ref().unwrap()[0].host_port, Some(8080));
        let options = NamespaceOption {
            userns_options: Some(UserNamespace { uids: vec![Default::default()], ..Default::default() }),
            ..Default::default()
        };
        let security = LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        config.linux = Some(LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() });
        assert_eq!(pod("id", &config).unwrap_err().code(), tonic::Code::Unimplemented);
        config.metadata = None;
        assert_eq!(pod("id", &config).unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn a_container_is_one_of_a_pod() {
        let mut config = ContainerConfig {
            metadata: Some(crate::grpc::proto::cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
            args: vec!["$(KEPT)".into()],
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    run_as_user: Some(Int64Value { value: 7 }),
                    supplemental_groups: vec![8],
                    no_new_privs: true,
                    masked_paths: vec!["/proc/kcore".into()],
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let (pod, c) = container(&Pod::default(), &config).unwrap();
        assert_eq!(c.args.unwrap(), ["$$(KEPT)"]);
        let context = c.security_context.unwrap();
        assert_eq!((context.run_as_user, context.allow_privilege_escalation), (Some(7), Some(false)));
        assert_eq!(context.proc_mount.as_deref(), Some("Default"));
        assert_eq!(pod.spec.unwrap().security_context.unwrap().supplemental_groups, Some(vec![8]));
        config.mounts = vec![crate::grpc::proto::cri::Mount { host_path: "tmp".into(), ..Default::default() }];
        assert!(mounts(&config).unwrap_err().message().contains("not absolute"));
    }

    #[test]
    fn numbers_of_signals() {
        for (number, name) in
            [(0, None), (13, Some("KILL")), (23, Some("TERM")), (34, Some("XFSZ")), (35, Some("RTMIN"))]
        {
            assert_eq!(signal(number), name, "{number}");
        }
        assert_eq!((signal(65), signal(66), signal(-1)), (Some("RTMAX"), None, None));
    }

    #[test]
    fn limits() {
        let r = LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 1 << 20, ..Default::default() };
        assert_eq!(resources(&r), json!({"cpu": {"shares": 512}, "memory": {"limit": 1 << 20}}));
    }
}
