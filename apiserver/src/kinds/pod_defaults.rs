//! Defaults of pod specs that depend on other fields.

use isopod_api::field::Path;
use serde_json::{Value, json};

use crate::validation::{At, resources};

/// `spec` of a pod: everything a template gets, plus what only pods get.
pub(crate) fn pod(spec: &mut Value) {
    template(spec);
    if !spec.is_object() {
        return;
    }
    set(spec, "enableServiceLinks", json!(true));
    for list in ["initContainers", "containers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            requests_from_limits(&mut container["resources"]);
        }
    }
    if spec["hostNetwork"] == true {
        host_ports(spec);
    }
    pod_level(spec);
    drop_nulls(spec);
}

/// `spec` of a template.
pub(crate) fn template(spec: &mut Value) {
    if !spec.is_object() {
        return;
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            pull_policy(container, "imagePullPolicy", "image");
            for kind in ["limits", "requests"] {
                round_up(&mut container["resources"][kind]);
            }
            drop_nulls(&mut container["resources"]);
        }
    }
    remove_null_lists(spec);
    features_off(spec);
    for volume in spec["volumes"].as_array_mut().into_iter().flatten() {
        if volume["image"].is_object() {
            pull_policy(&mut volume["image"], "pullPolicy", "reference");
        }
        drop_nulls(volume);
    }
    // The deprecated alias mirrors serviceAccountName.
    let account = match (spec["serviceAccountName"].as_str(), spec["serviceAccount"].as_str()) {
        (Some(name), _) if !name.is_empty() => Some(name.to_owned()),
        (_, Some(name)) if !name.is_empty() => Some(name.to_owned()),
        _ => None,
    };
    if let (Some(account), Some(map)) = (account, spec.as_object_mut()) {
        map.insert("serviceAccountName".to_owned(), json!(account));
        map.insert("serviceAccount".to_owned(), json!(account));
    }
    drop_nulls(spec);
}

/// Fields of features that are off by default are not kept.
fn features_off(spec: &mut Value) {
    let remove = |v: Option<&mut Value>, field: &str| {
        if let Some(map) = v.and_then(Value::as_object_mut) {
            map.remove(field);
        }
    };
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            remove(container.get_mut("lifecycle"), "stopSignal");
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        for source in volume.pointer_mut("/projected/sources").and_then(Value::as_array_mut).into_iter().flatten() {
            remove(Some(&mut *source), "clusterTrustBundle");
            remove(Some(source), "podCertificate");
        }
    }
    remove(Some(spec), "schedulingGroup");
}

/// Removes the nulls that indexing left behind.
pub(crate) fn drop_nulls(v: &mut Value) {
    if let Some(map) = v.as_object_mut() {
        map.retain(|_, v| !v.is_null());
    }
}

fn remove_null_lists(spec: &mut Value) {
    if let Some(map) = spec.as_object_mut() {
        map.retain(|_, v| !v.is_null());
        for list in ["initContainers", "containers", "ephemeralContainers"] {
            for container in map.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                drop_nulls(container);
            }
        }
    }
}

/// Sets a field that is absent.
pub(crate) fn set(v: &mut Value, field: &str, value: Value) {
    if let Some(map) = v.as_object_mut()
        && map.get(field).is_none_or(Value::is_null)
    {
        map.insert(field.to_owned(), value);
    }
}

fn pull_policy(v: &mut Value, field: &str, image: &str) {
    if v[field].as_str().unwrap_or_default().is_empty() {
        let policy = if tag(v[image].as_str().unwrap_or_default()) == "latest" { "Always" } else { "IfNotPresent" };
        v[field] = json!(policy);
    }
}

/// The tag of an image reference: `latest` when there is neither tag nor digest.
fn tag(image: &str) -> &str {
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    let last = name.rsplit('/').next().unwrap_or(name);
    match (last.split_once(':'), digest) {
        (Some((_, tag)), _) => tag,
        (None, Some(_)) => "",
        (None, None) if image.is_empty() => "",
        (None, None) => "latest",
    }
}

/// Quantities finer than a thousandth are rounded up.
fn round_up(list: &mut Value) {
    for (_, value) in list.as_object_mut().into_iter().flatten() {
        let Some(quantity) = resources::quantity(value) else { continue };
        let rounded = quantity.round_up_milli();
        if rounded != quantity {
            *value = json!(rounded.to_string());
        }
    }
}

fn requests_from_limits(resources: &mut Value) {
    let Some(limits) = resources["limits"].as_object().cloned() else {
        return drop_nulls(resources);
    };
    let Some(map) = resources.as_object_mut() else { return };
    let requests = map.entry("requests").or_insert_with(|| json!({}));
    if requests.is_null() {
        *requests = json!({});
    }
    for (name, limit) in limits {
        set(requests, &name, limit);
    }
}

fn host_ports(spec: &mut Value) {
    for list in ["initContainers", "containers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            for port in container["ports"].as_array_mut().into_iter().flatten() {
                if port["hostPort"].as_i64().unwrap_or_default() == 0 {
                    port["hostPort"] = port["containerPort"].clone();
                }
            }
            drop_nulls(container);
        }
    }
    drop_nulls(spec);
}

/// Requests of the pod are what its containers request, or its limits; limits of huge pages are the containers'.
fn pod_level(spec: &mut Value) {
    let of = |spec: &Value, kind: &str| spec["resources"][kind].as_object().cloned().unwrap_or_default();
    let (mut requests, mut limits) = (of(spec, "requests"), of(spec, "limits"));
    if requests.is_empty() && limits.is_empty() {
        return;
    }
    let at = At::new(Path::nil(), spec);
    for (name, total) in resources::aggregate(&at, "limits") {
        if resources::is_huge_page(&name) && !requests.contains_key(&name) && !limits.contains_key(&name) {
            limits.insert(name, json!(total.to_string()));
        }
    }
    if limits.is_empty() {
        return;
    }
    for (name, total) in resources::aggregate(&at, "requests") {
        if ["cpu", "memory"].contains(&name.as_str()) && !requests.contains_key(&name) {
            requests.insert(name, json!(total.to_string()));
        }
    }
    for (name, limit) in &limits {
        let known = ["cpu", "memory"].contains(&name.as_str()) || resources::is_huge_page(name);
        if known && !requests.contains_key(name) {
            requests.insert(name.clone(), limit.clone());
        }
    }
    spec["resources"]["limits"] = json!(limits);
    if !requests.is_empty() {
        spec["resources"]["requests"] = json!(requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        for (image, want) in [
            ("nginx", "latest"),
            ("nginx:1", "1"),
            ("localhost:5000/nginx", "latest"),
            ("localhost:5000/nginx:latest", "latest"),
            ("nginx@sha256:abc", ""),
            ("nginx:2@sha256:abc", "2"),
        ] {
            assert_eq!(tag(image), want, "{image}");
        }
    }

    #[test]
    fn pods_only() {
        let mut spec = json!({"hostNetwork": true, "containers": [{"name": "c", "image": "a:1", "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1"}}}]});
        pod(&mut spec);
        let container = &spec["containers"][0];
        assert_eq!(container["ports"][0]["hostPort"], 80);
        assert_eq!(container["resources"]["requests"]["cpu"], "1");
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        assert_eq!(spec["enableServiceLinks"], true);
        let once = spec.clone();
        pod(&mut spec);
        assert_eq!(spec, once);
    }

    #[test]
    fn features_that_are_off() {
        let mut spec = json!({"schedulingGroup": {}, "containers": [{"name": "c", "lifecycle": {"stopSignal": "SIGINT"}}],
            "volumes": [{"name": "v", "projected": {"sources": [{"podCertificate": {}}, {"secret": {}}]}}]});
        features_off(&mut spec);
        let left = json!({"containers": [{"name": "c", "lifecycle": {}}],
            "volumes": [{"name": "v", "projected": {"sources": [{}, {"secret": {}}]}}]});
        assert_eq!(spec, left);
    }

    #[test]
    fn pod_level_requests() {
        let mut spec = json!({"containers": [{"name": "c", "image": "a:1", "resources": {"requests": {"cpu": "500m"}}}],
            "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}});
        pod(&mut spec);
        assert_eq!(spec["resources"]["requests"], json!({"cpu": "500m", "memory": "1Gi"}));
    }

    #[test]
    fn pod_level_resources_of_all_containers() {
        let of = |cpu: &str, pages: &str| json!({"requests": {"cpu": cpu}, "limits": {"hugepages-2Mi": pages}});
        let mut spec = json!({
            "initContainers": [
                {"name": "s", "image": "a:1", "restartPolicy": "Always", "resources": of("1", "2Mi")},
                {"name": "i", "image": "a:1", "resources": of("4", "4Mi")},
            ],
            "containers": [{"name": "c", "image": "a:1", "resources": of("2", "8Mi")}],
            "resources": {"limits": {"memory": "1Gi"}},
        });
        pod(&mut spec);
        let want = json!({"limits": {"hugepages-2Mi": "10Mi", "memory": "1Gi"},
            "requests": {"cpu": "5", "hugepages-2Mi": "10Mi", "memory": "1Gi"}});
        assert_eq!(spec["resources"], want);
    }
}
