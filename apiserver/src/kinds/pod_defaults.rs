//! What is done to pod specs after the schema's defaults.

use serde_json::Value;

/// Fields of features that are off by default are not kept in the spec of a pod or template.
pub(crate) fn features_off(spec: &mut Value) {
    let remove = |v: Option<&mut Value>, field: &str| {
        if let Some(map) = v.and_then(Value::as_object_mut) {
            map.remove(field);
        }
    };
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let signals = container.pointer("/lifecycle/stopSignal").is_some_and(|signal| !signal.is_null());
            remove(container.get_mut("lifecycle"), "stopSignal");
            let empty = |lifecycle: &Value| lifecycle.as_object().is_some_and(serde_json::Map::is_empty);
            if signals && container.get("lifecycle").is_some_and(empty) {
                remove(Some(container), "lifecycle");
            }
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

/// Sets a field that is absent.
pub(crate) fn set(v: &mut Value, field: &str, value: Value) {
    if let Some(map) = v.as_object_mut()
        && map.get(field).is_none_or(Value::is_null)
    {
        map.insert(field.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn features_that_are_off() {
        let mut spec = json!({"schedulingGroup": {}, "containers": [{"name": "c", "lifecycle": {"stopSignal": "SIGINT"}}, {"lifecycle": {}},
            {"lifecycle": {"stopSignal": "SIGINT", "preStop": {}}}], "volumes": [{"name": "v", "projected": {"sources": [{"podCertificate": {}}, {"secret": {}}]}}]});
        features_off(&mut spec);
        let left = json!({"containers": [{"name": "c"}, {"lifecycle": {}}, {"lifecycle": {"preStop": {}}}],
            "volumes": [{"name": "v", "projected": {"sources": [{}, {"secret": {}}]}}]});
        assert_eq!(spec, left);
    }
}
