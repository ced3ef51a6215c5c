//! What an update of a pod may change: by the main resource, `resize`, `ephemeralcontainers` and `status`.

use isopod_api::field::Error;
use serde_json::{Map, Value};

use super::{At, Errs, internal, resources, same, scheduling};

const UPDATABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// The main resource.
pub(crate) fn update(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    if container_updates(e, &new.get("containers"), &old.get("containers"))
        || container_updates(e, &new.get("initContainers"), &old.get("initContainers"))
    {
        return;
    }
    if deadline(e, &new.get("activeDeadlineSeconds"), &old.get("activeDeadlineSeconds")) {
        return;
    }
    added_tolerations(e, &new.get("tolerations"), &old.get("tolerations"));
    scheduling::gates_update(e, &new.get("schedulingGates"), &old.get("schedulingGates"));
    let munged = munge(new.v, old.v);
    if !same(&munged, old.v) {
        let diff = internal::diff(&internal::pod_spec(old.v), &internal::pod_spec(&munged));
        e.0.push(Error::forbidden(&new.path, format!("{UPDATABLE}\n{diff}")));
    }
}

/// Whether the number of containers changed (nothing else is compared then).
fn container_updates(e: &mut Errs, new: &At<'_>, old: &At<'_>) -> bool {
    if new.len() != old.len() {
        e.forbidden(new, "pod updates may not add or remove containers");
        return true;
    }
    for at in new.items() {
        let image = at.get("image");
        if image.s().is_empty() {
            e.required(&image, "");
        }
        if !image.s().is_empty() && image.s().trim() != image.s() {
            e.invalid(&image, "must not have leading or trailing whitespace");
        }
    }
    false
}

fn deadline(e: &mut Errs, new: &At<'_>, old: &At<'_>) -> bool {
    match (new.int(), old.int()) {
        (Some(n), _) if !(0..=i64::from(i32::MAX)).contains(&n) => {
            e.invalid(new, "must be between 0 and 2147483647, inclusive");
            true
        }
        (Some(n), Some(o)) if o < n => {
            e.invalid(new, "must be less than or equal to previous value");
            true
        }
        (None, Some(_)) => {
            e.invalid(new, "must not update from a positive integer to nil value");
            false
        }
        _ => false,
    }
}

fn added_tolerations(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let plain = |v: &Value| {
        let mut v = v.clone();
        if let Some(map) = v.as_object_mut() {
            map.remove("tolerationSeconds");
        }
        v
    };
    for before in old.items() {
        if !new.items().iter().any(|after| same(&plain(after.v), &plain(before.v))) {
            return e.forbidden(new, "existing toleration can not be modified except its tolerationSeconds");
        }
    }
}

/// The new spec with every field that may change taken from the old one.
fn munge(new: &Value, old: &Value) -> Value {
    let mut out = new.clone();
    for list in ["containers", "initContainers"] {
        let images: Vec<Value> = old[list].as_array().into_iter().flatten().map(|c| c["image"].clone()).collect();
        for (container, image) in out[list].as_array_mut().into_iter().flatten().zip(images) {
            container["image"] = image;
        }
    }
    let Some(map) = out.as_object_mut() else { return out };
    for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        put(map, field, &old[field]);
    }
    let grace = "terminationGracePeriodSeconds";
    if old[grace].as_i64().is_some_and(|n| n < 0) && new[grace].as_i64() == Some(1) {
        put(map, grace, &old[grace]);
    }
    if old["schedulingGates"].as_array().is_some_and(|g| !g.is_empty()) {
        gated(map, new, old);
    }
    map.remove("serviceAccount");
    if let Some(account) = old.get("serviceAccount") {
        map.insert("serviceAccount".to_owned(), account.clone());
    }
    out
}

/// A gated pod may narrow where it runs: more of nodeSelector, a first required node affinity.
fn gated(map: &mut Map<String, Value>, new: &Value, old: &Value) {
    let narrower = old["nodeSelector"]
        .as_object()
        .is_none_or(|before| before.iter().all(|(k, v)| new["nodeSelector"].get(k) == Some(v)));
    if narrower {
        put(map, "nodeSelector", &old["nodeSelector"]);
    }
    let required = "/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    if old["affinity"].pointer(required).is_none() {
        let mut affinity = new["affinity"].clone();
        if let Some(node) = affinity.get_mut("nodeAffinity").and_then(Value::as_object_mut) {
            node.remove("requiredDuringSchedulingIgnoredDuringExecution");
        }
        if same(&affinity["nodeAffinity"], &old["affinity"]["nodeAffinity"]) {
            put(map, "affinity", &old["affinity"]);
        }
    }
}

fn put(map: &mut Map<String, Value>, field: &str, value: &Value) {
    if value.is_null() {
        map.remove(field);
    } else {
        map.insert(field.to_owned(), value.clone());
    }
}

/// `pods/resize`: only cpu and memory of containers (and of the pod) and their resize policy.
pub(crate) fn resize(e: &mut Errs, new: &At<'_>, old: &At<'_>, old_pod: &Value) {
    if old_pod["metadata"]["annotations"].get("kubernetes.io/config.mirror").is_some() {
        e.forbidden(&At::new(isopod_api::field::Path::nil(), new.v), "static pods cannot be resized");
    }
    let mut munged = new.v.clone();
    for list in ["containers", "initContainers"] {
        if new.get(list).len() != old.get(list).len() {
            let at = new.get(list);
            return e.forbidden(&at, "containers may not be added or removed on resize");
        }
        for (i, (after, before)) in new.get(list).items().iter().zip(old.get(list).items()).enumerate() {
            resized_resources(e, &after.get("resources"), &before.get("resources"));
            for field in ["resources", "resizePolicy"] {
                if let Some(map) = munged[list][i].as_object_mut() {
                    put(map, field, &before.v[field]);
                }
            }
        }
    }
    resized_resources(e, &new.get("resources"), &old.get("resources"));
    if let Some(map) = munged.as_object_mut() {
        put(map, "resources", &old.v["resources"]);
    }
    if !same(&munged, old.v) {
        e.forbidden(new, "only cpu and memory resources are mutable");
    }
    let (before, after) =
        (super::super::kinds::pod_qos::qos_class(old.v), super::super::kinds::pod_qos::qos_class(new.v));
    if before != after {
        let shown = At::new(isopod_api::field::Path::new("metadata"), new.v);
        e.invalid_as(&shown, after, "Pod QOS Class may not change as a result of resizing");
    }
}

fn resized_resources(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    for kind in ["limits", "requests"] {
        let (after, before) = (new.get(kind), old.get(kind));
        for (name, value) in before.entries() {
            let now = after.key(name);
            if ["cpu", "memory"].contains(&name) {
                if !now.is_set() {
                    e.forbidden(&after, &format!("resource {kind} cannot be removed"));
                }
            } else if resources::quantity(now.v) != resources::quantity(value.v) {
                e.forbidden(&after, "only cpu and memory resources are mutable");
            }
        }
        for (name, _) in after.entries() {
            if !["cpu", "memory"].contains(&name) && !before.key(name).is_set() {
                e.forbidden(&after, "only cpu and memory resources are mutable");
            }
        }
    }
}

/// `pods/ephemeralcontainers`: existing ones may neither change nor go.
pub(crate) fn ephemeral(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let by_name =
        |list: &At<'_>, name: &str| list.items().into_iter().find(|c| c.get("name").s() == name).map(|c| c.v.clone());
    for before in old.items() {
        let name = before.get("name").s();
        match by_name(new, name) {
            None => e.forbidden(new, &format!("existing ephemeral containers \"{name}\" may not be removed\n")),
            Some(after) if !same(&after, before.v) => {
                let diff = internal::diff(&internal::container(before.v), &internal::container(&after));
                e.forbidden(new, &format!("existing ephemeral containers \"{name}\" may not be changed\n{diff}"));
            }
            Some(_) => {}
        }
    }
}

/// `pods/status`: fields that only ever go one way.
pub(crate) fn status(e: &mut Errs, new: &Value, old: &Value) {
    let (after, before) = (At::field(new, "status"), At::field(old, "status"));
    let nominated = after.get("nominatedNodeName");
    if !nominated.s().is_empty() {
        e.dns_subdomain(&nominated);
    }
    if let Some(policy @ ("Never" | "OnFailure")) = old["spec"]["restartPolicy"].as_str() {
        no_restart(e, &after.get("containerStatuses"), &before.get("containerStatuses"), policy);
    }
    for (i, ip) in after.get("podIPs").items().into_iter().enumerate() {
        if i > 1 {
            break;
        }
        e.messages(&ip.get("ip"), super::net::ip_messages(ip.get("ip").s()));
    }
    if after.get("podIPs").len() > 2 {
        e.invalid(&after.get("podIPs"), "may specify no more than one IP for each IP family");
    }
    let names: Vec<&str> =
        new["spec"]["resourceClaims"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    for status in after.get("resourceClaimStatuses").items() {
        let name = status.get("name");
        if !names.contains(&name.s()) {
            e.invalid(&name, "must match the name of an entry in `spec.resourceClaims`");
        }
    }
}

fn no_restart(e: &mut Errs, new: &At<'_>, old: &At<'_>, policy: &str) {
    for before in old.items() {
        let terminated = before.get("state.terminated");
        if !terminated.is_set() || (policy == "OnFailure" && terminated.get("exitCode").int0() != 0) {
            continue;
        }
        for after in new.items() {
            if after.get("name").s() == before.get("name").s() && !after.get("state.terminated").is_set() {
                let state = after.get("state");
                e.forbidden(&state, "may not be transitioned to non-terminated state");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(new: Value, old: Value) -> Vec<String> {
        let (new, old) = (json!({ "spec": new }), json!({ "spec": old }));
        let mut e = Errs::new();
        update(&mut e, &At::field(&new, "spec"), &At::field(&old, "spec"));
        e.0.iter().map(|x| x.to_string().lines().next().unwrap_or("").to_owned()).collect()
    }

    #[test]
    fn only_some_fields_change() {
        let old = json!({"containers": [{"name": "c", "image": "a"}], "activeDeadlineSeconds": 10, "tolerations": [{"key": "x"}]});
        let mut new = old.clone();
        new["containers"][0]["image"] = json!("b");
        new["activeDeadlineSeconds"] = json!(5);
        new["tolerations"] = json!([{"key": "x"}, {"key": "y"}]);
        assert!(errors(new.clone(), old.clone()).is_empty());
        new["activeDeadlineSeconds"] = json!(50);
        assert_eq!(
            errors(new.clone(), old.clone()),
            ["spec.activeDeadlineSeconds: Invalid value: 50: must be less than or equal to previous value"]
        );
        new["activeDeadlineSeconds"] = json!(10);
        new["hostNetwork"] = json!(true);
        assert!(errors(new, old)[0].starts_with("spec: Forbidden: pod updates may not change fields other than"));
    }
}
