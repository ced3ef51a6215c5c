//! Annotations of pods and templates that mean something.

use super::{At, Errs, containers, volume};

const MIRROR: &str = "kubernetes.io/config.mirror";
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";
const SECCOMP_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
const SECCOMP: &str = "container.seccomp.security.alpha.kubernetes.io/";

/// Checks the annotations of a pod (or template) with this spec.
pub(crate) fn annotations(e: &mut Errs, at: &At<'_>, spec: &At<'_>) {
    let mirror = at.key(MIRROR);
    if mirror.is_set() && spec.get("nodeName").s().is_empty() {
        e.invalid(&mirror, "must set spec.nodeName if mirror pod annotation is set");
    }
    let cost = at.key(DELETION_COST);
    if cost.is_set() && !is_cost(cost.s()) {
        e.invalid(&cost, "must be a 32bit integer");
    }
    for (key, profile) in at.entries().iter().filter(|(key, _)| *key == SECCOMP_POD || key.starts_with(SECCOMP)) {
        seccomp(e, &At::new(at.path.child(key), profile.v));
    }
    for (key, profile) in at.entries() {
        if let Some(container) = key.strip_prefix(APP_ARMOR) {
            app_armor(e, &profile, container, spec);
        }
    }
}

/// A number in its shortest form.
fn is_cost(text: &str) -> bool {
    text.parse::<i32>().is_ok_and(|n| n.to_string() == text)
}

fn seccomp(e: &mut Errs, at: &At<'_>) {
    match at.s().split_once('/') {
        _ if matches!(at.s(), "runtime/default" | "docker/default" | "unconfined") => {}
        Some(("localhost", path)) => {
            let path = serde_json::Value::from(path);
            volume::descending_path(e, &At::new(at.path.clone(), &path));
        }
        _ => e.invalid(at, "must be a valid seccomp profile"),
    }
}

/// Whoever sets both the old annotations and the fields says the same with them.
pub(crate) fn agree(e: &mut Errs, annotations: &At<'_>, spec: &At<'_>) {
    fn field<'a>(at: &At<'a>, kind: &str) -> Option<At<'a>> {
        Some(at.get("securityContext").get(kind)).filter(At::is_set)
    }
    let containers = containers(spec);
    if let Some(own) = field(spec, "seccompProfile") {
        same_profile(e, &own, &annotations.key(SECCOMP_POD), "seccomp");
    }
    for container in &containers {
        if let Some(own) = field(container, "seccompProfile") {
            same_profile(e, &own, &annotations.key(&format!("{SECCOMP}{}", container.get("name").s())), "seccomp");
        }
    }
    if spec.get("os.name").s() == "windows" {
        return;
    }
    for container in &containers {
        let annotation = annotations.key(&format!("{APP_ARMOR}{}", container.get("name").s()));
        if let Some(own) = field(container, "appArmorProfile").or_else(|| field(spec, "appArmorProfile")) {
            // Upstream names the container's field, also when it is the pod's that differs.
            let shown = At::new(container.get("securityContext.appArmorProfile").path, own.v);
            same_profile(e, &shown, &annotation, "apparmor");
        }
    }
}

fn same_profile(e: &mut Errs, at: &At<'_>, annotation: &At<'_>, what: &str) {
    if !annotation.is_set() {
        return;
    }
    let (kind, local) = (at.get("type"), at.get("localhostProfile"));
    let alike = match (kind.s(), annotation.s()) {
        ("Unconfined", text) => text == "unconfined",
        ("RuntimeDefault", text) => text == "runtime/default" || (what == "seccomp" && text == "docker/default"),
        ("Localhost", text) => match text.strip_prefix("localhost/") {
            Some(path) if path != local.s() || !local.is_set() => {
                return e.forbidden(&local, &format!("{what} profile in annotation and field must match"));
            }
            path => path.is_some(),
        },
        _ => true,
    };
    if !alike {
        e.forbidden(&kind, &format!("{what} type in annotation and field must match"));
    }
}

fn app_armor(e: &mut Errs, at: &At<'_>, container: &str, spec: &At<'_>) {
    if !containers(spec).iter().any(|c| c.get("name").s() == container) {
        e.invalid_as(at, container, "container not found");
    }
    let profile = at.s();
    if !matches!(profile, "" | "runtime/default" | "unconfined") && !profile.starts_with("localhost/") {
        e.invalid(at, &format!("invalid AppArmor profile name: {profile:?}"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_and_annotations() {
        let local = json!({"type": "Localhost", "localhostProfile": "a"});
        for (key, value, field, want) in [
            (SECCOMP_POD, "runtime/default", "seccompProfile", "s.securityContext.seccompProfile.type"),
            (SECCOMP_POD, "localhost/b", "seccompProfile", "s.securityContext.seccompProfile.localhostProfile"),
            (SECCOMP_POD, "localhost/a", "seccompProfile", ""),
            (
                "container.apparmor.security.beta.kubernetes.io/c",
                "unconfined",
                "appArmorProfile",
                "s.containers[0].securityContext.appArmorProfile.type",
            ),
        ] {
            let obj =
                json!({"a": {key: value}, "s": {"containers": [{"name": "c"}], "securityContext": {field: local}}});
            let mut e = Errs::new();
            agree(&mut e, &At::field(&obj, "a"), &At::field(&obj, "s"));
            assert_eq!(e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join("; "), want, "{key}={value}");
        }
    }

    #[test]
    fn table() {
        let spec = json!({"spec": {"containers": [{"name": "c"}]}});
        for (key, value, want) in [
            (MIRROR, "x", "must set spec.nodeName if mirror pod annotation is set"),
            (DELETION_COST, "-7", ""),
            (DELETION_COST, "+7", "must be a 32bit integer"),
            ("container.apparmor.security.beta.kubernetes.io/c", "unconfined", ""),
            ("container.apparmor.security.beta.kubernetes.io/d", "unconfined", "container not found"),
            ("container.apparmor.security.beta.kubernetes.io/c", "x", "invalid AppArmor profile name: \"x\""),
            (SECCOMP_POD, "x", "must be a valid seccomp profile"),
            (SECCOMP_POD, "localhost/../x", "must not contain '..'"),
            (SECCOMP_POD, "docker/default", ""),
        ] {
            let obj = json!({"annotations": {key: value}});
            let mut e = Errs::new();
            annotations(&mut e, &At::field(&obj, "annotations"), &At::field(&spec, "spec"));
            assert_eq!(e.0.iter().map(|x| x.detail.as_str()).collect::<Vec<_>>().join("; "), want, "{key}={value}");
        }
    }
}
