//! The checks of the Pod Security Standards, with upstream's wording.

use std::fmt;

use isopod_api::text::quote;
use serde_json::Value;

use crate::admission::{list, text};

/// A standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Everything goes.
    Privileged,
    /// Known ways out are closed.
    Baseline,
    /// Hardened.
    Restricted,
}

impl Level {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "privileged" => Some(Self::Privileged),
            "baseline" => Some(Self::Baseline),
            "restricted" => Some(Self::Restricted),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Privileged => "privileged",
            Self::Baseline => "baseline",
            Self::Restricted => "restricted",
        }
    }
}

/// The version of a standard: `latest` or the minor of `v1.N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version(Option<u32>);

impl Version {
    pub(super) const LATEST: Self = Self(None);

    pub(super) fn parse(text: &str) -> Option<Self> {
        if text == "latest" {
            return Some(Self::LATEST);
        }
        let minor = text.strip_prefix("v1.")?;
        let plain = minor == "0" || (!minor.starts_with('0') && minor.bytes().all(|b| b.is_ascii_digit()));
        plain.then(|| minor.parse().ok().map(|minor| Self(Some(minor)))).flatten()
    }

    fn since(self, minor: u32) -> bool {
        self.0.is_none_or(|ours| ours >= minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("latest"),
            Some(minor) => write!(f, "v1.{minor}"),
        }
    }
}

/// A failed check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Violation {
    /// In a word.
    pub(super) reason: String,
    detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.detail.is_empty() { f.write_str(&self.reason) } else { write!(f, "{} ({})", self.reason, self.detail) }
    }
}

fn violation(reason: impl Into<String>, detail: impl Into<String>) -> Option<Violation> {
    Some(Violation { reason: reason.into(), detail: detail.into() })
}

type Check = fn(&Pod<'_>) -> Option<Violation>;

/// What checks look at.
struct Pod<'a> {
    spec: &'a Value,
    metadata: &'a Value,
    version: Version,
}

/// All violations of a level, in upstream's order: baseline checks, then restricted ones, each by their ids.
pub(super) fn evaluate(level: Level, version: Version, pod: &Value) -> Vec<Violation> {
    let pod = Pod { spec: &pod["spec"], metadata: &pod["metadata"], version };
    let baseline: [Check; 12] = [
        apparmor,
        capabilities_baseline,
        host_namespaces,
        host_path_volumes,
        host_ports,
        host_probes,
        privileged,
        proc_mount,
        selinux,
        seccomp_baseline,
        sysctls,
        windows_host_process,
    ];
    // Three baseline checks are replaced by stricter ones.
    let shared: [Check; 9] = [
        apparmor,
        host_namespaces,
        host_ports,
        host_probes,
        privileged,
        proc_mount,
        selinux,
        sysctls,
        windows_host_process,
    ];
    let restricted: [Check; 6] = [
        allow_privilege_escalation,
        capabilities_restricted,
        restricted_volumes,
        run_as_non_root,
        run_as_user,
        seccomp_restricted,
    ];
    match level {
        Level::Privileged => Vec::new(),
        Level::Baseline => baseline.iter().filter_map(|check| check(&pod)).collect(),
        Level::Restricted => shared.iter().chain(&restricted).filter_map(|check| check(&pod)).collect(),
    }
}

impl<'a> Pod<'a> {
    fn containers(&self) -> impl Iterator<Item = &'a Value> {
        let spec = self.spec;
        ["initContainers", "containers", "ephemeralContainers"].into_iter().flat_map(move |field| list(spec, field))
    }

    /// Names of the containers a predicate holds for.
    fn named(&self, mut bad: impl FnMut(&Value) -> bool) -> Vec<&'a str> {
        self.containers().filter(|container| bad(container)).map(|container| text(container, "name")).collect()
    }

    fn windows(&self) -> bool {
        self.version.since(25) && self.spec["os"]["name"] == "windows"
    }
}

fn joined<S: AsRef<str>>(items: &[S]) -> String {
    items.iter().map(|item| quote(item.as_ref())).collect::<Vec<_>>().join(", ")
}

/// `container "a"` or `containers "a", "b"`.
fn containers(names: &[&str]) -> String {
    format!("{} {}", plural("container", names.len()), joined(names))
}

fn plural(word: &str, count: usize) -> String {
    if count == 1 { word.to_owned() } else { format!("{word}s") }
}

fn unique(mut items: Vec<String>) -> Vec<String> {
    items.sort();
    items.dedup();
    items
}

fn apparmor(pod: &Pod<'_>) -> Option<Violation> {
    let mut setters = Vec::new();
    let mut values = Vec::new();
    let allowed = |profile: &Value| {
        let kind = &profile["type"];
        kind.is_null() || kind == "RuntimeDefault" || kind == "Localhost"
    };
    let profile = &pod.spec["securityContext"]["appArmorProfile"];
    if !allowed(profile) {
        setters.push("pod".to_owned());
        values.push(text(profile, "type").to_owned());
    }
    let bad = pod.named(|c| !allowed(&c["securityContext"]["appArmorProfile"]));
    if !bad.is_empty() {
        setters.push(containers(&bad));
        values.push("Unconfined".to_owned());
    }
    let prefix = "container.apparmor.security.beta.kubernetes.io/";
    let mut annotations = Vec::new();
    for (key, value) in pod.metadata["annotations"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        let fine = matches!(value, "" | "runtime/default") || value.starts_with("localhost/");
        if key.starts_with(prefix) && !fine {
            annotations.push(format!("{key}={}", quote(value)));
        }
    }
    if setters.is_empty() && annotations.is_empty() {
        return None;
    }
    let mut details = Vec::new();
    if !setters.is_empty() {
        details.push(format!(
            "{} must not set AppArmor profile type to {}",
            setters.join(" and "),
            joined(&unique(values))
        ));
    }
    if !annotations.is_empty() {
        details.push(format!("{} {}", plural("annotation", annotations.len()), annotations.join(", ")));
    }
    violation(plural("forbidden AppArmor profile", setters.len().max(annotations.len())), details.join("; "))
}

const BASELINE_CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Containers that add other capabilities than the allowed, and which.
fn added<'a>(pod: &Pod<'a>, allowed: &[&str]) -> (Vec<&'a str>, Vec<String>) {
    let mut capabilities = Vec::new();
    let names = pod.named(|container| {
        let added = list(&container["securityContext"]["capabilities"], "add").iter().filter_map(Value::as_str);
        let bad: Vec<String> = added.filter(|name| !allowed.contains(name)).map(str::to_owned).collect();
        let any = !bad.is_empty();
        capabilities.extend(bad);
        any
    });
    (names, unique(capabilities))
}

fn capabilities_baseline(pod: &Pod<'_>) -> Option<Violation> {
    let (names, capabilities) = added(pod, &BASELINE_CAPABILITIES);
    if names.is_empty() {
        return None;
    }
    let detail = format!(
        "{} must not include {} in securityContext.capabilities.add",
        containers(&names),
        joined(&capabilities)
    );
    violation("non-default capabilities", detail)
}

fn host_namespaces(pod: &Pod<'_>) -> Option<Violation> {
    let fields = ["hostNetwork", "hostPID", "hostIPC"];
    let set: Vec<String> =
        fields.iter().filter(|field| pod.spec[**field] == true).map(|field| format!("{field}=true")).collect();
    if set.is_empty() { None } else { violation("host namespaces", set.join(", ")) }
}

fn host_path_volumes(pod: &Pod<'_>) -> Option<Violation> {
    let names: Vec<&str> = list(pod.spec, "volumes")
        .iter()
        .filter(|volume| volume["hostPath"].is_object())
        .map(|volume| text(volume, "name"))
        .collect();
    if names.is_empty() {
        return None;
    }
    violation("hostPath volumes", format!("{} {}", plural("volume", names.len()), joined(&names)))
}

fn host_ports(pod: &Pod<'_>) -> Option<Violation> {
    let mut ports = std::collections::BTreeSet::new();
    let names = pod.named(|container| {
        let used: Vec<i64> =
            list(container, "ports").iter().filter_map(|port| port["hostPort"].as_i64()).filter(|p| *p != 0).collect();
        let any = !used.is_empty();
        ports.extend(used);
        any
    });
    if names.is_empty() {
        return None;
    }
    let text: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let verb = if names.len() == 1 { "uses" } else { "use" };
    let word = plural("hostPort", text.len());
    violation("hostPort", format!("{} {verb} {word} {}", containers(&names), text.join(", ")))
}

/// Probes and hooks that name a host make the node talk to it.
fn host_probes(pod: &Pod<'_>) -> Option<Violation> {
    if !pod.version.since(34) {
        return None;
    }
    let mut hosts = Vec::new();
    let names = pod.named(|container| {
        let lifecycle = &container["lifecycle"];
        let handlers = [
            &container["livenessProbe"],
            &container["readinessProbe"],
            &container["startupProbe"],
            &lifecycle["postStart"],
            &lifecycle["preStop"],
        ];
        let named = handlers.iter().flat_map(|handler| [&handler["httpGet"]["host"], &handler["tcpSocket"]["host"]]);
        let found: Vec<String> =
            named.filter_map(Value::as_str).filter(|host| !host.is_empty()).map(str::to_owned).collect();
        let any = !found.is_empty();
        hosts.extend(found);
        any
    });
    if names.is_empty() {
        return None;
    }
    let verb = if names.len() == 1 { "uses" } else { "use" };
    let hosts = unique(hosts);
    let word = plural("host", hosts.len());
    violation(
        "probe or lifecycle host",
        format!("{} {verb} probe or lifecycle {word} {}", containers(&names), joined(&hosts)),
    )
}

fn privileged(pod: &Pod<'_>) -> Option<Violation> {
    let names = pod.named(|container| container["securityContext"]["privileged"] == true);
    if names.is_empty() {
        return None;
    }
    violation("privileged", format!("{} must not set securityContext.privileged=true", containers(&names)))
}

fn proc_mount(pod: &Pod<'_>) -> Option<Violation> {
    let mut kinds = Vec::new();
    let names = pod.named(|container| match container["securityContext"]["procMount"].as_str() {
        Some(kind) if kind != "Default" => {
            kinds.push(kind.to_owned());
            true
        }
        _ => false,
    });
    if names.is_empty() {
        return None;
    }
    let detail = format!("{} must not set securityContext.procMount to {}", containers(&names), joined(&unique(kinds)));
    violation("procMount", detail)
}

fn selinux(pod: &Pod<'_>) -> Option<Violation> {
    let (mut types, mut user, mut role) = (Vec::new(), false, false);
    let mut bad = |options: &Value| {
        let text = |field: &str| options[field].as_str().unwrap_or_default();
        let mut allowed = vec!["", "container_t", "container_init_t", "container_kvm_t"];
        if pod.version.since(31) {
            allowed.push("container_engine_t");
        }
        let kind = !allowed.contains(&text("type"));
        if kind {
            types.push(text("type").to_owned());
        }
        user |= !text("user").is_empty();
        role |= !text("role").is_empty();
        kind || !text("user").is_empty() || !text("role").is_empty()
    };
    let mut setters = Vec::new();
    if bad(&pod.spec["securityContext"]["seLinuxOptions"]) {
        setters.push("pod".to_owned());
    }
    let names = pod.named(|container| bad(&container["securityContext"]["seLinuxOptions"]));
    if !names.is_empty() {
        setters.push(containers(&names));
    }
    if setters.is_empty() {
        return None;
    }
    let mut data = Vec::new();
    let types = unique(types);
    if !types.is_empty() {
        data.push(format!("{} {}", plural("type", types.len()), joined(&types)));
    }
    if user {
        data.push("user may not be set".to_owned());
    }
    if role {
        data.push("role may not be set".to_owned());
    }

    violation(
        "seLinuxOptions",
        format!("{} set forbidden securityContext.seLinuxOptions: {}", setters.join(" and "), data.join("; ")),
    )
}

fn seccomp_type(context: &Value) -> Option<&str> {
    context["securityContext"]["seccompProfile"]["type"].as_str()
}

/// Who sets a seccomp type that is not allowed.
fn seccomp_setters(pod: &Pod<'_>) -> Option<Violation> {
    let allowed = ["RuntimeDefault", "Localhost"];
    let (mut setters, mut values) = (Vec::new(), Vec::new());
    if let Some(kind) = seccomp_type(pod.spec).filter(|kind| !allowed.contains(kind)) {
        setters.push("pod".to_owned());
        values.push(kind.to_owned());
    }
    let names = pod.named(|container| match seccomp_type(container).filter(|kind| !allowed.contains(kind)) {
        Some(kind) => {
            values.push(kind.to_owned());
            true
        }
        None => false,
    });
    if !names.is_empty() {
        setters.push(containers(&names));
    }
    if setters.is_empty() {
        return None;
    }
    let detail = format!(
        "{} must not set securityContext.seccompProfile.type to {}",
        setters.join(" and "),
        joined(&unique(values))
    );
    violation("seccompProfile", detail)
}

fn seccomp_baseline(pod: &Pod<'_>) -> Option<Violation> {
    seccomp_setters(pod)
}

fn seccomp_restricted(pod: &Pod<'_>) -> Option<Violation> {
    if pod.windows() {
        return None;
    }
    if let Some(found) = seccomp_setters(pod) {
        return Some(found);
    }
    if seccomp_type(pod.spec).is_some() {
        return None;
    }
    let names = pod.named(|container| seccomp_type(container).is_none());
    if names.is_empty() {
        return None;
    }
    let detail = format!(
        "pod or {} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\"",
        containers(&names)
    );
    violation("seccompProfile", detail)
}

/// Sysctls of a pod's own namespaces, with the version that allowed them.
const SYSCTLS: [(&str, u32); 12] = [
    ("kernel.shm_rmid_forced", 0),
    ("net.ipv4.ip_local_port_range", 0),
    ("net.ipv4.tcp_syncookies", 0),
    ("net.ipv4.ping_group_range", 0),
    ("net.ipv4.ip_unprivileged_port_start", 0),
    ("net.ipv4.ip_local_reserved_ports", 27),
    ("net.ipv4.tcp_keepalive_time", 29),
    ("net.ipv4.tcp_fin_timeout", 29),
    ("net.ipv4.tcp_keepalive_intvl", 29),
    ("net.ipv4.tcp_keepalive_probes", 29),
    ("net.ipv4.tcp_rmem", 32),
    ("net.ipv4.tcp_wmem", 32),
];

fn sysctls(pod: &Pod<'_>) -> Option<Violation> {
    let allowed = |name: &str| SYSCTLS.iter().any(|(known, since)| *known == name && pod.version.since(*since));
    let set = list(&pod.spec["securityContext"], "sysctls").iter().map(|sysctl| text(sysctl, "name"));
    let bad: Vec<&str> = set.filter(|name| !allowed(name)).collect();
    if bad.is_empty() { None } else { violation("forbidden sysctls", bad.join(", ")) }
}

fn windows_host_process(pod: &Pod<'_>) -> Option<Violation> {
    let is = |value: &Value| value["securityContext"]["windowsOptions"]["hostProcess"] == true;
    let mut setters = Vec::new();
    if is(pod.spec) {
        setters.push("pod".to_owned());
    }
    let names = pod.named(is);
    if !names.is_empty() {
        setters.push(containers(&names));
    }
    if setters.is_empty() {
        return None;
    }
    let detail = format!("{} must not set securityContext.windowsOptions.hostProcess=true", setters.join(" and "));
    violation("hostProcess", detail)
}

fn allow_privilege_escalation(pod: &Pod<'_>) -> Option<Violation> {
    if pod.windows() {
        return None;
    }
    let names = pod.named(|container| container["securityContext"]["allowPrivilegeEscalation"] != false);
    if names.is_empty() {
        return None;
    }
    let detail = format!("{} must set securityContext.allowPrivilegeEscalation=false", containers(&names));
    violation("allowPrivilegeEscalation != false", detail)
}

fn capabilities_restricted(pod: &Pod<'_>) -> Option<Violation> {
    if pod.windows() {
        return None;
    }
    let undropped =
        pod.named(|c| !list(&c["securityContext"]["capabilities"], "drop").iter().any(|name| name == "ALL"));
    let (adding, capabilities) = added(pod, &["NET_BIND_SERVICE"]);
    let mut details = Vec::new();
    if !undropped.is_empty() {
        details.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", containers(&undropped)));
    }
    if !adding.is_empty() {
        details.push(format!(
            "{} must not include {} in securityContext.capabilities.add",
            containers(&adding),
            joined(&capabilities)
        ));
    }
    if details.is_empty() { None } else { violation("unrestricted capabilities", details.join("; ")) }
}

const RESTRICTED_VOLUMES: [&str; 8] =
    ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];

fn restricted_volumes(pod: &Pod<'_>) -> Option<Violation> {
    let (mut names, mut kinds) = (Vec::new(), Vec::new());
    for volume in list(pod.spec, "volumes") {
        let keys = volume.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        let kind = keys.filter(|key| *key != "name").find(|key| volume[*key].is_object()).unwrap_or("emptyDir");
        let image = kind == "image" && pod.version.since(33);
        if !RESTRICTED_VOLUMES.contains(&kind) && !image {
            names.push(text(volume, "name"));
            kinds.push(kind.to_owned());
        }
    }
    if names.is_empty() {
        return None;
    }
    let kinds = unique(kinds);
    let verb = if names.len() == 1 { "uses" } else { "use" };
    let detail = format!(
        "{} {} {verb} restricted volume {} {}",
        plural("volume", names.len()),
        joined(&names),
        plural("type", kinds.len()),
        joined(&kinds)
    );
    violation("restricted volume types", detail)
}

fn run_as_non_root(pod: &Pod<'_>) -> Option<Violation> {
    let of = |value: &Value| value["securityContext"]["runAsNonRoot"].as_bool();
    let mut setters = Vec::new();
    if of(pod.spec) == Some(false) {
        setters.push("pod".to_owned());
    }
    let explicit = pod.named(|container| of(container) == Some(false));
    if !explicit.is_empty() {
        setters.push(containers(&explicit));
    }
    if !setters.is_empty() {
        let detail = format!("{} must not set securityContext.runAsNonRoot=false", setters.join(" and "));
        return violation("runAsNonRoot != true", detail);
    }
    if of(pod.spec) == Some(true) {
        return None;
    }
    let implicit = pod.named(|container| of(container).is_none());
    if implicit.is_empty() {
        return None;
    }
    let detail = format!("pod or {} must set securityContext.runAsNonRoot=true", containers(&implicit));
    violation("runAsNonRoot != true", detail)
}

fn run_as_user(pod: &Pod<'_>) -> Option<Violation> {
    if !pod.version.since(23) {
        return None;
    }
    let root = |value: &Value| value["securityContext"]["runAsUser"] == 0;
    let mut setters = Vec::new();
    if root(pod.spec) {
        setters.push("pod".to_owned());
    }
    let names = pod.named(root);
    if !names.is_empty() {
        setters.push(containers(&names));
    }
    if setters.is_empty() {
        return None;
    }
    violation("runAsUser=0", format!("{} must not set runAsUser=0", setters.join(" and ")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn texts(level: Level, version: &str, pod: Value) -> Vec<String> {
        evaluate(level, Version::parse(version).unwrap(), &pod).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn baseline_violations_are_worded_as_upstream() {
        let pod = json!({"spec": {
            "hostPID": true, "hostIPC": true,
            "volumes": [{"name": "h", "hostPath": {"path": "/"}}],
            "securityContext": {"sysctls": [{"name": "kernel.msgmax"}], "seccompProfile": {"type": "Unconfined"}},
            "containers": [
                {"name": "a", "ports": [{"hostPort": 80}], "securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}},
                {"name": "b", "securityContext": {"privileged": true}},
                {"name": "c", "securityContext": {"privileged": true, "procMount": "Unmasked"}},
            ],
        }});
        assert_eq!(
            texts(Level::Baseline, "latest", pod),
            [
                "non-default capabilities (container \"a\" must not include \"SYS_ADMIN\" in securityContext.capabilities.add)",
                "host namespaces (hostPID=true, hostIPC=true)",
                "hostPath volumes (volume \"h\")",
                "hostPort (container \"a\" uses hostPort 80)",
                "privileged (containers \"b\", \"c\" must not set securityContext.privileged=true)",
                "procMount (container \"c\" must not set securityContext.procMount to \"Unmasked\")",
                "seccompProfile (pod must not set securityContext.seccompProfile.type to \"Unconfined\")",
                "forbidden sysctls (kernel.msgmax)",
            ]
        );
    }

    #[test]
    fn a_hardened_pod_is_restricted() {
        let mut pod = json!({"spec": {
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "t", "emptyDir": {}}],
            "containers": [{"name": "c", "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}}],
        }});
        assert!(texts(Level::Restricted, "latest", pod.clone()).is_empty());
        pod["spec"]["volumes"][0] = json!({"name": "t", "hostPath": {"path": "/"}});
        pod["spec"]["containers"][0]["securityContext"]["runAsUser"] = 0.into();
        pod["spec"]["containers"][0]["securityContext"]["runAsNonRoot"] = false.into();
        assert_eq!(
            texts(Level::Restricted, "latest", pod),
            [
                "restricted volume types (volume \"t\" uses restricted volume type \"hostPath\")",
                "runAsNonRoot != true (container \"c\" must not set securityContext.runAsNonRoot=false)",
                "runAsUser=0 (container \"c\" must not set runAsUser=0)",
            ]
        );
    }

    #[test]
    fn versions_decide_what_is_checked() {
        let probe =
            json!({"spec": {"containers": [{"name": "c", "livenessProbe": {"httpGet": {"host": "10.0.0.1"}}}]}});
        assert_eq!(texts(Level::Baseline, "v1.33", probe.clone()).len(), 0);
        assert_eq!(texts(Level::Baseline, "latest", probe).len(), 1);
        let sysctl = json!({"spec": {"securityContext": {"sysctls": [{"name": "net.ipv4.tcp_rmem"}]}}});
        assert_eq!(texts(Level::Baseline, "v1.31", sysctl.clone()).len(), 1);
        assert_eq!(texts(Level::Baseline, "v1.32", sysctl).len(), 0);
        assert_eq!((Version::parse("v1.01"), Version::parse("1.2"), Version::parse("v2.0")), (None, None, None));
    }
}
