//! Security contexts of pods and containers, sysctls, seccomp, AppArmor, Windows options.

use isopod_api::names;

use super::{At, Errs, internal::named};

const ID_RANGE: &str = "must be between 0 and 2147483647, inclusive";

pub(crate) fn id(e: &mut Errs, at: &At<'_>) {
    if at.int().is_some_and(|n| !(0..=2_147_483_647).contains(&n)) {
        e.invalid(at, ID_RANGE);
    }
}

/// `securityContext` of a container; `host_users` tells whether it shares the users of its host.
pub(crate) fn container(e: &mut Errs, at: &At<'_>, host_users: bool) {
    if !at.is_set() {
        return;
    }
    id(e, &at.get("runAsUser"));
    id(e, &at.get("runAsGroup"));
    let proc_mount = at.get("procMount");
    if proc_mount.is_set() && !["Default", "Unmasked"].contains(&proc_mount.s()) {
        e.unsupported(&proc_mount, &["Default", "Unmasked"]);
    }
    if proc_mount.s() == "Unmasked" && host_users {
        e.invalid(&proc_mount, "`hostUsers` must be false to use `Unmasked`");
    }
    seccomp(e, &at.get("seccompProfile"));
    let escalation = at.get("allowPrivilegeEscalation");
    if escalation.v.as_bool() == Some(false) {
        if at.get("privileged").is_true() {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            e.invalid_as(at, named("Security", at.v), detail);
        }
        if at.get("capabilities.add").strings().contains(&"CAP_SYS_ADMIN") {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            e.invalid_as(at, named("Security", at.v), detail);
        }
    }
    windows(e, &at.get("windowsOptions"));
    app_armor(e, &at.get("appArmorProfile"));
}

/// `securityContext` of a pod.
pub(crate) fn pod(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("securityContext");
    id(e, &at.get("fsGroup"));
    id(e, &at.get("runAsUser"));
    id(e, &at.get("runAsGroup"));
    for group in at.get("supplementalGroups").items() {
        id(e, &group);
    }
    if spec.get("hostPID").is_true() && spec.get("shareProcessNamespace").is_true() {
        e.invalid(
            &At::new(at.path.child("shareProcessNamespace"), spec.get("shareProcessNamespace").v),
            "ShareProcessNamespace and HostPID cannot both be enabled",
        );
    }
    sysctls(e, &at.get("sysctls"), spec);
    e.one_of_if_set(&at.get("fsGroupChangePolicy"), &["Always", "OnRootMismatch"]);
    seccomp(e, &at.get("seccompProfile"));
    windows(e, &at.get("windowsOptions"));
    app_armor(e, &at.get("appArmorProfile"));
    e.one_of_if_set(&at.get("supplementalGroupsPolicy"), &["Merge", "Strict"]);
    e.one_of_if_set(&at.get("seLinuxChangePolicy"), &["MountOption", "Recursive"]);
}

fn sysctls(e: &mut Errs, list: &At<'_>, spec: &At<'_>) {
    let mut seen = std::collections::BTreeSet::new();
    for at in list.items() {
        let name = at.get("name");
        if name.s().is_empty() {
            e.required(&name, "");
        } else if !is_sysctl(name.s()) {
            e.invalid(&name, "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$");
        } else if !seen.insert(name.s()) {
            e.duplicate(&name, name.s());
        }
        let dotted = name.s().replace('/', ".");
        let ipc = ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."].iter().any(|p| dotted.starts_with(p));
        if dotted.starts_with("net.") && spec.get("hostNetwork").is_true() {
            e.invalid(&name, "may not be specified when 'hostNetwork' is true");
        }
        if ipc && spec.get("hostIPC").is_true() {
            e.invalid(&name, "may not be specified when 'hostIPC' is true");
        }
    }
}

fn is_sysctl(name: &str) -> bool {
    name.len() <= 253
        && name.split(['.', '/']).all(|part| {
            let b = part.as_bytes();
            !b.is_empty()
                && [b.first(), b.last()].iter().flatten().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
                && b.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'_'))
        })
}

fn seccomp(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (kind, local) = (at.get("type"), at.get("localhostProfile"));
    match kind.s() {
        "" => e.required(&kind, "type is required when seccompProfile is set"),
        "Localhost" | "RuntimeDefault" | "Unconfined" => {}
        _ => e.unsupported(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
    match (kind.s() == "Localhost", local.is_set()) {
        (true, false) => e.required(&local, "must be set when seccomp type is Localhost"),
        (true, true) => super::volume::descending_path(e, &local),
        // Upstream shows the whole profile.
        (false, true) => {
            e.invalid_as(&local, named("Profile", at.v), "can only be set when seccomp type is Localhost");
        }
        (false, false) => {}
    }
}

fn app_armor(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (kind, local) = (at.get("type"), at.get("localhostProfile"));
    match kind.s() {
        "Localhost" => {
            if local.s().trim() != local.s() {
                e.invalid(&local, "must not be padded with whitespace");
            } else if local.s().is_empty() {
                e.required(&local, "must be set when AppArmor type is Localhost");
            }
            if local.s().len() > 4095 {
                e.too_long(&local, 4095);
            }
        }
        "RuntimeDefault" | "Unconfined" => {
            if local.is_set() {
                e.invalid(&local, "can only be set when AppArmor type is Localhost");
            }
        }
        "" => e.required(&kind, "type is required when appArmorProfile is set"),
        _ => e.unsupported(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
}

const GMSA_SPEC_MAX: usize = 64 * 1024;

fn windows(e: &mut Errs, at: &At<'_>) {
    let name = at.get("gmsaCredentialSpecName");
    if name.is_set() {
        e.messages(&name, names::dns1123_subdomain(name.s()));
    }
    let spec = at.get("gmsaCredentialSpec");
    if spec.is_set() {
        if spec.s().is_empty() {
            e.invalid(&spec, "gmsaCredentialSpec cannot be an empty string");
        } else if spec.s().len() > GMSA_SPEC_MAX {
            e.invalid(&spec, "gmsaCredentialSpec size must be under 64 KiB");
        }
    }
    let user = at.get("runAsUserName");
    if user.is_set() {
        windows_user(e, &user);
    }
}

/// `user` or `DOMAIN\user`.
fn windows_user(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.invalid(at, "runAsUserName cannot be an empty string");
    }
    if at.s().chars().any(|c| (c as u32) < 0x20 || c as u32 == 0x7f) {
        return e.invalid(at, "runAsUserName cannot contain control characters");
    }
    let parts: Vec<&str> = at.s().split('\\').collect();
    let user = match parts[..] {
        [user] => user,
        [domain, user] => {
            if domain.len() >= 256 {
                e.invalid(at, "runAsUserName's Domain length must be under 256 characters");
            }
            if !is_windows_domain(domain) {
                e.invalid(at, "runAsUserName's Domain doesn't match the NetBios nor the DNS format");
            }
            user
        }
        _ => return e.invalid(at, "runAsUserName cannot contain more than one backslash"),
    };
    if user.is_empty() {
        e.invalid(at, "runAsUserName's User cannot be empty");
    } else if user.len() > 104 {
        e.invalid(at, "runAsUserName's User length must not be longer than 104 characters");
    }
    if !user.is_empty() && user.chars().all(|c| c == '.' || c == ' ') {
        e.invalid(at, "runAsUserName's User cannot contain only periods or spaces");
    }
    if user.chars().any(|c| "\"/\\:;|=,+*?<>@[]".contains(c)) {
        e.invalid(at, "runAsUserName's User cannot contain the following characters: \"/\\:;|=,+*?<>@[]");
    }
}

/// A NetBIOS name, or a DNS name of any case.
fn is_windows_domain(name: &str) -> bool {
    let short = (1..=15).contains(&name.len())
        && !name.starts_with('.')
        && !name.contains(['\\', '/', ':', '*', '?', '"', '<', '>', '|']);
    short || name.split('.').all(|label| names::dns1123_label(&label.to_lowercase()).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names() {
        for (name, ok) in
            [("net.core.somaxconn", true), ("kernel/shm_rmid_forced", true), ("Net.x", false), ("a..b", false)]
        {
            assert_eq!(is_sysctl(name), ok, "{name}");
        }
    }

    #[test]
    fn unmasked_proc_needs_own_users() {
        let obj = serde_json::json!({"s": {"procMount": "Unmasked"}});
        for (host_users, errors) in [(true, 1), (false, 0)] {
            let mut e = Errs::new();
            container(&mut e, &At::field(&obj, "s"), host_users);
            assert_eq!(e.0.len(), errors);
        }
    }

    #[test]
    fn windows_users() {
        for (user, want) in [
            ("", "runAsUserName cannot be an empty string"),
            ("DOMAIN\\bob", ""),
            ("a\\b\\c", "runAsUserName cannot contain more than one backslash"),
            ("...", "runAsUserName's User cannot contain only periods or spaces"),
        ] {
            let obj = serde_json::json!({ "u": user });
            let mut e = Errs::new();
            windows_user(&mut e, &At::field(&obj, "u"));
            assert_eq!(e.0.iter().map(|x| x.detail.as_str()).collect::<Vec<_>>().join("; "), want, "{user}");
        }
    }

    #[test]
    fn seccomp_profiles() {
        let obj = serde_json::json!({"s": {"runAsUser": -1, "seccompProfile": {"type": "Localhost"}, "privileged": true, "allowPrivilegeEscalation": false}});
        let mut e = Errs::new();
        container(&mut e, &At::field(&obj, "s"), true);
        let fields: Vec<String> =
            e.0.iter().map(|x| x.to_string().split(": ").next().unwrap_or("").to_owned()).collect();
        assert_eq!(fields, ["s.runAsUser", "s.seccompProfile.localhostProfile", "s"]);
    }
}
