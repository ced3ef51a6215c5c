//! Annotations of pods and templates that mean something.

use super::{At, Errs};

const MIRROR: &str = "kubernetes.io/config.mirror";
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

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

fn app_armor(e: &mut Errs, at: &At<'_>, container: &str, spec: &At<'_>) {
    let kinds = ["initContainers", "containers", "ephemeralContainers"];
    let known = kinds.iter().flat_map(|kind| spec.get(kind).items()).any(|c| c.get("name").s() == container);
    if !known {
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
    fn table() {
        let spec = json!({"spec": {"containers": [{"name": "c"}]}});
        for (key, value, want) in [
            (MIRROR, "x", "must set spec.nodeName if mirror pod annotation is set"),
            (DELETION_COST, "-7", ""),
            (DELETION_COST, "+7", "must be a 32bit integer"),
            ("container.apparmor.security.beta.kubernetes.io/c", "unconfined", ""),
            ("container.apparmor.security.beta.kubernetes.io/d", "unconfined", "container not found"),
            ("container.apparmor.security.beta.kubernetes.io/c", "x", "invalid AppArmor profile name: \"x\""),
        ] {
            let obj = json!({"annotations": {key: value}});
            let mut e = Errs::new();
            annotations(&mut e, &At::field(&obj, "annotations"), &At::field(&spec, "spec"));
            assert_eq!(e.0.iter().map(|x| x.detail.as_str()).collect::<Vec<_>>().join("; "), want, "{key}={value}");
        }
    }
}
