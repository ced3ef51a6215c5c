//! The `scale` subresource: an autoscaling/v1 Scale seen through its object.

use isopod_api::{
    field::{Error, ErrorList, Path},
    gvk::{GroupKind, Gvk},
    meta, selector,
    status::Status,
};
use serde_json::{Value, json};

use super::Resource;

/// The kind of the subresource.
pub(crate) fn gvk() -> Gvk {
    Gvk::new("autoscaling", "v1", "Scale")
}

/// The Scale of an object of any resource.
pub(crate) fn seen(resource: &Resource, obj: &Value) -> Value {
    match &resource.custom {
        Some(custom) => custom.scale(obj),
        None => of(obj),
    }
}

/// Puts a changed Scale into an object of any resource.
pub(crate) fn put_back(resource: &Resource, obj: &Value, scale: &Value, name: &str) -> Result<Value, Status> {
    match &resource.custom {
        Some(custom) => Ok(custom.put_scale(obj, scale)),
        None => put(obj, scale, name),
    }
}

/// The Scale of an object.
pub(crate) fn of(obj: &Value) -> Value {
    let stateful = obj["kind"] == "StatefulSet";
    let selector = selector_text(&obj["spec"]["selector"], stateful);
    let number = |part: &str| obj[part]["replicas"].as_i64().unwrap_or(0);
    assemble(obj, number("spec"), number("status"), &selector)
}

/// A Scale of these numbers.
pub(crate) fn assemble(obj: &Value, wanted: i64, present: i64, selector: &str) -> Value {
    let text = |key: &str| obj["metadata"].get(key).cloned().filter(|v| !v.is_null());
    let mut metadata = serde_json::Map::new();
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = text(key) {
            metadata.insert(key.into(), value);
        }
    }
    let mut spec = json!({});
    if wanted != 0 {
        spec["replicas"] = wanted.into();
    }
    let mut status = json!({"replicas": present});
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status})
}

/// StatefulSets print equality as a set, as upstream does; the others as `key=value`.
fn selector_text(selector: &Value, stateful: bool) -> String {
    let Some(map) = selector.as_object() else { return String::new() };
    let expressions = map.get("matchExpressions").is_some_and(|e| e.as_array().is_some_and(|e| !e.is_empty()));
    let map = match map.get("matchLabels").and_then(Value::as_object) {
        Some(labels) if !expressions && !stateful => labels,
        _ => map,
    };
    if map.contains_key("matchLabels") || map.contains_key("matchExpressions") {
        return selector::LabelSelector::from_value(Some(selector)).map(|s| s.to_string()).unwrap_or_default();
    }
    // ReplicationControllers have the labels themselves.
    let mut pairs: Vec<_> = map.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
    pairs.sort();
    pairs.join(",")
}

/// Puts a changed Scale into its object.
pub(crate) fn put(obj: &Value, scale: &Value, name: &str) -> Result<Value, Status> {
    let replicas = scale["spec"]["replicas"].as_i64().unwrap_or(0);
    if replicas < 0 {
        let path = Path::new("spec").child("replicas");
        let error = Error::invalid(&path, replicas, "must be greater than or equal to 0");
        return Err(invalid(name, vec![error]));
    }
    let mut new = obj.clone();
    new["spec"]["replicas"] = replicas.into();
    for (key, value) in [("name", meta::name(scale)), ("namespace", meta::namespace(scale))] {
        if !value.is_empty() {
            meta::set(&mut new, key, value);
        }
    }
    meta::set_resource_version(&mut new, meta::resource_version(scale));
    if !meta::uid(scale).is_empty() {
        meta::set_uid(&mut new, meta::uid(scale));
    }
    Ok(new)
}

/// A 422 about a Scale.
pub(crate) fn invalid(name: &str, errors: ErrorList) -> Status {
    Status::invalid(&GroupKind::new("autoscaling", "Scale"), name, errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales() {
        let deployment = json!({"metadata": {"name": "d", "labels": {"a": "b"}, "resourceVersion": "7"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "a"}}}, "status": {"replicas": 2}});
        let scale = of(&deployment);
        assert_eq!(scale["status"], json!({"replicas": 2, "selector": "app=a"}));
        let mut changed = scale;
        changed["spec"] = json!({});
        assert_eq!(put(&deployment, &changed, "d").unwrap()["spec"]["replicas"], 0);
        changed["spec"] = json!({"replicas": -1});
        assert!(put(&deployment, &changed, "d").is_err());
    }
}
