//! What an update of a pod may change: by the main resource, `resize`, `ephemeralcontainers` and `status`.

use isopod_api::field::{Error, ErrorList, Path};
use serde_json::{Map, Value, json};

use super::{At, Errs, internal, same, scheduling, security};
use crate::kinds::pod_qos;

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
    if old.get("schedulingGates").len() > 0 {
        gated(e, new, old);
    }
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
    scheduling::tolerations(e, new);
}

/// A gated pod may narrow where it runs.
fn gated(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let (selector, before) = (new.get("nodeSelector"), old.get("nodeSelector"));
    if before.entries().iter().any(|(key, value)| selector.v.get(key) != Some(value.v)) {
        let detail = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
        e.invalid_as(&selector, super::template::sorted(selector.v), detail);
    }
    scheduling::gated_affinity(e, &new.get("affinity.nodeAffinity"), &old.get("affinity.nodeAffinity"));
}

/// Annotations that say how a pod came about stay.
pub(crate) fn annotations(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let what = |key: &str| match key {
        "kubernetes.io/config.mirror" => Some("mirror pod annotation"),
        _ if key.starts_with("container.apparmor.security.beta.kubernetes.io/") => Some("AppArmor annotations"),
        _ => None,
    };
    for (key, before) in old.entries() {
        if let Some(what) = what(key).filter(|_| new.v.get(key) != Some(before.v)) {
            e.forbidden(&new.key(key), &format!("may not remove or update {what}"));
        }
    }
    for (key, _) in new.entries() {
        if let Some(what) = what(key).filter(|_| old.v.get(key).is_none()) {
            e.forbidden(&new.key(key), &format!("may not add {what}"));
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
        put(map, "nodeSelector", &old["nodeSelector"]);
        let mut affinity = new["affinity"].clone();
        if affinity.is_object() || !old["affinity"]["nodeAffinity"].is_null() {
            affinity["nodeAffinity"] = old["affinity"]["nodeAffinity"].clone();
        }
        if same(&without_nulls(&affinity), &old["affinity"]) {
            put(map, "affinity", &old["affinity"]);
        } else {
            put(map, "affinity", &without_nulls(&affinity));
        }
    }
    map.remove("serviceAccount");
    if let Some(account) = old.get("serviceAccount") {
        map.insert("serviceAccount".to_owned(), account.clone());
    }
    out
}

fn without_nulls(v: &Value) -> Value {
    match v {
        Value::Object(map) => map.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect(),
        other => other.clone(),
    }
}

fn put(map: &mut Map<String, Value>, field: &str, value: &Value) {
    if value.is_null() {
        map.remove(field);
    } else {
        map.insert(field.to_owned(), value.clone());
    }
}

/// Whether a pod stands for one of a node's own.
pub(crate) fn is_mirror(pod: &Value) -> bool {
    pod["metadata"]["annotations"].get("kubernetes.io/config.mirror").is_some()
}

/// The only error of a pod that cannot be changed this way at all.
pub(crate) fn refused(why: &str) -> ErrorList {
    vec![Error::forbidden(&Path::new("[]"), why)]
}

/// `pods/resize`: only cpu and memory of containers (and of the pod) and their resize policy.
pub(crate) fn resize(e: &mut Errs, new: &At<'_>, old: &At<'_>, old_pod: &Value) -> Option<&'static str> {
    if is_mirror(old_pod) {
        return Some("static pods cannot be resized");
    }
    if old.get("os.name").s() == "windows" {
        return Some("windows pods cannot be resized");
    }
    if pod_qos::qos_class(old.v) != pod_qos::qos_class(new.v) {
        // Upstream shows the class that the status has.
        let shown = old_pod["status"]["qosClass"].clone();
        e.invalid_as(new, shown, "Pod QOS Class may not change as a result of resizing");
    }
    let running = |status: &&Value| status.pointer("/state/running").is_some_and(|running| running.is_object());
    let first = old_pod["status"]["containerStatuses"].as_array().into_iter().flatten().find(running);
    if first.is_some_and(|status| status["resources"].is_null()) {
        e.forbidden(new, "Pod running on node without support for resize");
    }
    let mut munged = new.v.clone();
    pod_sizes(e, new, old, &mut munged);
    let known = e.0.len();
    for list in ["containers", "initContainers"] {
        same_containers(e, &new.get(list), &old.get(list), list);
    }
    if e.0.len() > known {
        return None;
    }
    for list in ["initContainers", "containers"] {
        for (after, before) in new.get(list).items().iter().zip(old.get(list).items()) {
            kept_resources(e, &after.get("resources"), &before.get("resources"), "resource");
        }
    }
    for (list, init) in [("containers", false), ("initContainers", true)] {
        for (i, (after, before)) in new.get(list).items().iter().zip(old.get(list).items()).enumerate() {
            let own = &mut munged[list][i];
            let changed = !same(own, before.v);
            without_sizes(own, before.v);
            if !same(own, before.v) {
                match init {
                    false => e.forbidden(new, ONLY_SIZES),
                    true => {
                        e.forbidden(after, "only cpu and memory resources for init or sidecar containers are mutable")
                    }
                }
            }
            let restarts =
                after.get("resizePolicy").items().iter().any(|p| p.get("restartPolicy").s() == "RestartContainer");
            if init && changed && restarts && after.get("restartPolicy").s() != "Always" {
                e.forbidden(
                    after,
                    "non-sidecar init containers with a resize policy of RestartContainer cannot be resized",
                );
            }
        }
    }
    if e.is_empty() && !same(&munged, old.v) {
        e.forbidden(new, ONLY_SIZES);
    }
    None
}

const ONLY_SIZES: &str = "only cpu and memory resources are mutable";

/// Containers neither come, go nor move.
fn same_containers(e: &mut Errs, new: &At<'_>, old: &At<'_>, list: &str) {
    if new.len() != old.len() {
        return e.forbidden(new, &format!("{list} may not be added or removed on resize"));
    }
    for (after, before) in new.items().iter().zip(old.items()) {
        if after.get("name").s() != before.get("name").s() {
            e.forbidden(&after.get("name"), &format!("{list} may not be renamed or reordered on resize"));
        }
    }
}

/// The resources of the pod itself; `munged` gets the old sizes.
fn pod_sizes(e: &mut Errs, new: &At<'_>, old: &At<'_>, munged: &mut Value) {
    let (after, before) = (new.get("resources"), old.get("resources"));
    let any = |at: &At<'_>| at.get("requests").len() + at.get("limits").len() > 0;
    if !any(&after) && !any(&before) {
        return;
    }
    if before.is_set() && !after.is_set() {
        return e.forbidden(&after, "pod-level resources cannot be removed");
    }
    kept_resources(e, &after, &before, "pod-level resource");
    without_sizes(munged, old.v);
    if !same(&munged["resources"], before.v) {
        e.forbidden(new, "only cpu and memory resources are mutable at pod-level");
    }
}

/// What was requested or limited stays so, with whatever amount.
fn kept_resources(e: &mut Errs, new: &At<'_>, old: &At<'_>, what: &str) {
    for kind in ["requests", "limits"] {
        let (after, before) = (new.get(kind), old.get(kind));
        if before.entries().iter().any(|(name, _)| !after.key(name).is_set()) {
            e.forbidden(&after, &format!("{what} {kind} cannot be removed"));
        }
    }
}

/// Takes cpu and memory of the resources at `new` from `old`.
fn without_sizes(new: &mut Value, old: &Value) {
    for kind in ["limits", "requests"] {
        for name in ["cpu", "memory"] {
            let before = &old["resources"][kind][name];
            if !before.is_null() {
                new["resources"][kind][name] = before.clone();
            } else if let Some(map) = new.pointer_mut(&format!("/resources/{kind}")).and_then(Value::as_object_mut) {
                map.remove(name);
            }
        }
        let own = new.get_mut("resources").and_then(Value::as_object_mut);
        if let Some(own) = own.filter(|own| own.get(kind).is_some_and(|map| *map == json!({}))) {
            own.remove(kind);
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
    for condition in after.get("conditions").items() {
        observed(e, &condition.get("observedGeneration"));
        let kind = condition.get("type").s();
        if !["PodScheduled", "Ready", "Initialized"].contains(&kind) {
            e.qualified_name(&At::new(condition.path.child("Type"), &condition.v["type"]));
        }
    }
    let nominated = after.get("nominatedNodeName");
    if !nominated.s().is_empty() && nominated.v != before.get("nominatedNodeName").v {
        e.dns_subdomain(&nominated);
        if !old["spec"]["nodeName"].as_str().unwrap_or_default().is_empty() {
            e.forbidden(&nominated, "may not be set on pods that are already bound to a node");
        }
    }
    observed(e, &after.get("observedGeneration"));
    e.immutable(&after.get("qosClass"), before.get("qosClass").v);
    for (list, specs) in STATUSES {
        no_restart(e, &after.get(list), &before.get(list), &old["spec"], specs);
    }
    claim_statuses(e, &after.get("resourceClaimStatuses"), &new["spec"]["resourceClaims"]);
    pod_ips(e, &after.get("podIPs"));
    let hosts = after.get("hostIPs");
    if let Some(first) = hosts.items().first().map(|first| first.get("ip"))
        && first.s() != after.get("hostIP").s()
    {
        e.invalid_str(&first, "must be equal to `hostIP`");
    }
    pod_ips(e, &hosts);
    for (list, _) in STATUSES {
        for user in after.get(list).items().iter().map(|status| status.get("user.linux")) {
            container_user(e, &user, new["spec"]["os"]["name"] == "windows");
        }
    }
    for (list, specs) in STATUSES {
        for status in after.get(list).items() {
            let spec = new["spec"][specs].as_array().into_iter().flatten().find(|c| c["name"] == status.v["name"]);
            allocated(e, &status.get("allocatedResourcesStatus"), spec, specs == "ephemeralContainers");
        }
    }
}

/// Statuses of containers and where the containers are.
const STATUSES: [(&str, &str); 3] = [
    ("containerStatuses", "containers"),
    ("initContainerStatuses", "initContainers"),
    ("ephemeralContainerStatuses", "ephemeralContainers"),
];

fn observed(e: &mut Errs, at: &At<'_>) {
    if at.int0() < 0 {
        e.invalid(at, "must be a non-negative integer");
    }
}

/// The user a container runs as.
fn container_user(e: &mut Errs, at: &At<'_>, windows: bool) {
    if at.is_set() && windows {
        return e.forbidden(at, "cannot be set for a windows pod");
    }
    security::id(e, &at.get("uid"));
    security::id(e, &at.get("gid"));
    for group in at.get("supplementalGroups").items() {
        security::id(e, &group);
    }
}

/// How devices of a container are.
fn allocated(e: &mut Errs, list: &At<'_>, container: Option<&Value>, ephemeral: bool) {
    if ephemeral && list.len() > 0 {
        return e.forbidden(list, "must not be specified in container status");
    }
    for at in list.items() {
        let name = at.get("name");
        if let Some(resources) = container.map(|container| &container["resources"]) {
            let (known, detail) = if name.s().starts_with("claim:") {
                let is_own = |claim: &Value| match (claim["name"].as_str(), claim["request"].as_str()) {
                    (Some(claim), None | Some("")) => name.s() == format!("claim:{claim}"),
                    (Some(claim), Some(request)) => name.s() == format!("claim:{claim}/{request}"),
                    _ => false,
                };
                (
                    resources["claims"].as_array().into_iter().flatten().any(is_own),
                    "must match one of the container's resource claims in a format 'claim:<claimName>/<request>' or 'claim:<claimName>' if request is empty",
                )
            } else {
                (!resources["requests"][name.s()].is_null(), "must match one of the container's resource requests")
            };
            if !known {
                e.invalid_str(&name, detail);
            }
        }
        let mut seen = Vec::new();
        for device in at.get("resources").items() {
            let id = device.get("resourceID");
            e.one_of(&device.get("health"), &["Healthy", "Unhealthy", "Unknown"]);
            if seen.contains(&id.s()) {
                e.duplicate(&id, id.s());
            }
            seen.push(id.s());
        }
    }
}

fn claim_statuses(e: &mut Errs, list: &At<'_>, claims: &Value) {
    let names: Vec<&str> = claims.as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    let mut seen = Vec::new();
    for status in list.items() {
        let (name, claim) = (status.get("name"), status.get("resourceClaimName"));
        if !names.contains(&name.s()) {
            e.invalid(&name, "must match the name of an entry in `spec.resourceClaims`");
        }
        if seen.contains(&name.s()) {
            e.duplicate(&name, name.s());
        }
        seen.push(name.s());
        if claim.is_set() {
            e.dns_subdomain(&claim);
        }
    }
}

/// One address per family.
fn pod_ips(e: &mut Errs, list: &At<'_>) {
    let mut seen: Vec<&str> = Vec::new();
    for at in list.items() {
        let ip = At::new(at.path.clone(), &at.v["ip"]);
        e.messages(&ip, super::net::ip_messages(ip.s()));
        seen.push(ip.s());
    }
    let six = seen.iter().filter(|ip| ip.contains(':')).count();
    if seen.len() > 2 || (seen.len() == 2 && six != 1) {
        let shown: Vec<Value> = seen.iter().map(|ip| json!({ "IP": ip })).collect();
        e.invalid_as(list, json!(shown), "may specify no more than one IP for each IP family");
    }
}

/// A container that has ended for good does not run again.
fn no_restart(e: &mut Errs, new: &At<'_>, old: &At<'_>, spec: &Value, list: &str) {
    fn all<'a>(v: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
        v[list].as_array().into_iter().flatten()
    }
    let ephemeral = list == "ephemeralContainers";
    let restarts_all = |c: &Value| all(c, "restartPolicyRules").any(|rule| rule["action"] == "RestartAllContainers");
    if !ephemeral && ["containers", "initContainers"].iter().any(|list| all(spec, list).any(restarts_all)) {
        return;
    }
    for before in old.items() {
        let (name, terminated) = (before.get("name").s(), before.get("state.terminated"));
        let code = terminated.get("exitCode").int0();
        let may = |container: &Value| {
            let ruled = all(container, "restartPolicyRules").any(|rule| {
                let named = all(&rule["exitCodes"], "values").any(|value| value.as_i64() == Some(code));
                named == (rule["exitCodes"]["operator"] == "In")
            });
            ruled
                || match container["restartPolicy"].as_str().or(spec["restartPolicy"].as_str()) {
                    Some("Never") => false,
                    Some("OnFailure") => code != 0,
                    _ => true,
                }
        };
        let may = !ephemeral && all(spec, list).find(|c| c["name"] == name).is_some_and(may);
        let runs = |after: &At<'_>| after.get("name").s() == name && !after.get("state.terminated").is_set();
        if terminated.is_set() && !may && new.items().iter().any(runs) {
            let state = before.get("state");
            e.forbidden(&state, "may not be transitioned to non-terminated state");
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn gated_pods_may_narrow() {
        let term = |keys: &[&str]| {
            let all: Vec<Value> = keys.iter().map(|k| json!({"key": k, "operator": "Exists"})).collect();
            json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": all}]}}})
        };
        let old = json!({"containers": [{"name": "c", "image": "a"}], "schedulingGates": [{"name": "g"}],
            "nodeSelector": {"a": "b"}, "affinity": term(&["x"])});
        for (field, value, want) in [
            ("nodeSelector", json!({"a": "b", "c": "d"}), ""),
            ("nodeSelector", json!({}), "spec.nodeSelector"),
            ("affinity", term(&["x", "y"]), ""),
            (
                "affinity",
                term(&["y"]),
                "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0]",
            ),
            ("schedulingGates", json!([{"name": "h"}]), "spec.schedulingGates[0].name"),
            ("affinity", json!({"podAffinity": {}}), "spec"),
        ] {
            let mut new = old.clone();
            new[field] = value.clone();
            if want == "spec" {
                new[field]["nodeAffinity"] = old[field]["nodeAffinity"].clone();
                new[field]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = json!([{}]);
            }
            let fields: Vec<String> =
                errors(new, old.clone()).iter().map(|x| x.split(": ").next().unwrap_or("").to_owned()).collect();
            assert_eq!(fields.join(" "), want, "{field} {value}");
        }
    }

    #[test]
    fn what_a_resize_may_change() {
        let old = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1", "x.io/g": "1"}}}],
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "1"}}}]});
        for (pointer, value, want) in [
            ("/containers/0/resources/requests/cpu", json!("2"), ""),
            ("/containers/0/resources/requests", json!({"x.io/g": "1"}), "resource requests cannot be removed"),
            ("/containers/0/resources/requests/x.io~1g", json!("2"), "only cpu and memory resources are mutable"),
            ("/initContainers/0/resources/requests/cpu", json!("2"), ""),
            (
                "/initContainers/0/resizePolicy",
                json!([{"restartPolicy": "RestartContainer"}]),
                "only cpu and memory resources for init or sidecar containers are mutable; non-sidecar init containers with a resize policy of RestartContainer cannot be resized",
            ),
            (
                "/resources",
                json!({"requests": {"hugepages-2Mi": "2Mi"}}),
                "only cpu and memory resources are mutable at pod-level",
            ),
            (
                "/containers/0/resources",
                json!({"requests": {"cpu": "1", "memory": "1", "x.io/g": "1"}, "limits": {"cpu": "1", "memory": "1"}}),
                "",
            ),
        ] {
            let mut new = old.clone();
            match new.pointer_mut(pointer) {
                Some(own) => *own = value,
                None => {
                    let (parent, field) = pointer.rsplit_once('/').unwrap();
                    new.pointer_mut(parent).unwrap()[field] = value;
                }
            }
            let (new, old) = (json!({ "spec": new }), json!({ "spec": old }));
            let mut e = Errs::new();
            assert_eq!(resize(&mut e, &At::field(&new, "spec"), &At::field(&old, "spec"), &json!({})), None);
            assert_eq!(e.0.iter().map(|x| x.detail.as_str()).collect::<Vec<_>>().join("; "), want, "{pointer}");
        }
        let mirror = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": "x"}}});
        let at = At::field(&old, "spec");
        assert_eq!(resize(&mut Errs::new(), &at, &at, &mirror), Some("static pods cannot be resized"));
    }

    #[test]
    fn what_a_status_may_say() {
        let old = json!({"spec": {"restartPolicy": "Never", "nodeName": "m", "containers": [{"name": "c"}]}, "status": {"qosClass": "Burstable",
            "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 1}}}]}});
        for (status, want) in [
            (json!({"qosClass": "Guaranteed"}), "status.qosClass"),
            (json!({"qosClass": "Burstable", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}), "status.podIPs"),
            (json!({"qosClass": "Burstable", "podIPs": [{"ip": "x"}]}), "status.podIPs[0]"),
            (
                json!({"qosClass": "Burstable", "hostIP": "10.0.0.2", "hostIPs": [{"ip": "10.0.0.1"}]}),
                "status.hostIPs[0].ip",
            ),
            (
                json!({"qosClass": "Burstable", "conditions": [{"type": "a b", "observedGeneration": -1}]}),
                "status.conditions[0].observedGeneration status.conditions[0].Type",
            ),
            (
                json!({"qosClass": "Burstable", "containerStatuses": [{"name": "c", "state": {"terminated": {}}, "user": {"linux": {"uid": -1}},
                    "allocatedResourcesStatus": [{"name": "x.io/g", "resources": [{"resourceID": "a", "health": "X"}]}]}]}),
                "status.containerStatuses[0].user.linux.uid status.containerStatuses[0].allocatedResourcesStatus[0].name status.containerStatuses[0].allocatedResourcesStatus[0].resources[0].health",
            ),
            (json!({"qosClass": "Burstable", "nominatedNodeName": "n"}), "status.nominatedNodeName"),
            (
                json!({"qosClass": "Burstable", "containerStatuses": [{"name": "c", "state": {"running": {}}}]}),
                "status.containerStatuses[0].state",
            ),
        ] {
            let mut new = old.clone();
            new["status"] = status.clone();
            let mut e = Errs::new();
            super::status(&mut e, &new, &old);
            let fields: Vec<String> = e.0.iter().map(|x| x.field.clone()).collect();
            assert_eq!(fields.join(" "), want, "{status}");
        }
    }
}
