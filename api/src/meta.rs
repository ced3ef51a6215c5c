//! Access to `metadata` of objects held as [`Value`], and the time stamps used in it.
//!
//! Getters never fail: a missing or ill-typed field reads as empty. Setters create `metadata` when needed; an empty value
//! removes the field, as upstream's `omitempty` does.

use std::{collections::BTreeMap, sync::LazyLock};

use jiff::Timestamp;
use serde_json::{Map, Value};

static EMPTY: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);

/// A string in `metadata`, `""` when missing.
pub fn text<'a>(obj: &'a Value, field: &str) -> &'a str {
    obj.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_str).unwrap_or_default()
}

fn map<'a>(obj: &'a Value, field: &str) -> &'a Map<String, Value> {
    obj.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_object).unwrap_or(&EMPTY)
}

fn list<'a>(obj: &'a Value, field: &str) -> &'a [Value] {
    obj.get("metadata").and_then(|m| m.get(field)).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// `apiVersion`.
pub fn api_version(obj: &Value) -> &str {
    obj.get("apiVersion").and_then(Value::as_str).unwrap_or_default()
}

/// `kind`.
pub fn kind(obj: &Value) -> &str {
    obj.get("kind").and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`.
pub fn name(obj: &Value) -> &str {
    text(obj, "name")
}

/// `metadata.generateName`.
pub fn generate_name(obj: &Value) -> &str {
    text(obj, "generateName")
}

/// `metadata.namespace`.
pub fn namespace(obj: &Value) -> &str {
    text(obj, "namespace")
}

/// `metadata.uid`.
pub fn uid(obj: &Value) -> &str {
    text(obj, "uid")
}

/// `metadata.resourceVersion`.
pub fn resource_version(obj: &Value) -> &str {
    text(obj, "resourceVersion")
}

/// `metadata.creationTimestamp`.
pub fn creation_timestamp(obj: &Value) -> &str {
    text(obj, "creationTimestamp")
}

/// `metadata.deletionTimestamp`, when set.
pub fn deletion_timestamp(obj: &Value) -> Option<&str> {
    Some(text(obj, "deletionTimestamp")).filter(|t| !t.is_empty())
}

/// `metadata.deletionGracePeriodSeconds`, when set.
pub fn deletion_grace_period(obj: &Value) -> Option<i64> {
    obj.get("metadata")?.get("deletionGracePeriodSeconds")?.as_i64()
}

/// `metadata.generation`, 0 when missing.
pub fn generation(obj: &Value) -> i64 {
    obj.get("metadata").and_then(|m| m.get("generation")).and_then(Value::as_i64).unwrap_or_default()
}

/// `metadata.labels`.
pub fn labels(obj: &Value) -> &Map<String, Value> {
    map(obj, "labels")
}

/// `metadata.labels` as owned strings.
pub fn labels_owned(obj: &Value) -> BTreeMap<String, String> {
    labels(obj).iter().map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect()
}

/// One label.
pub fn label<'a>(obj: &'a Value, key: &str) -> Option<&'a str> {
    labels(obj).get(key)?.as_str()
}

/// `metadata.annotations`.
pub fn annotations(obj: &Value) -> &Map<String, Value> {
    map(obj, "annotations")
}

/// One annotation.
pub fn annotation<'a>(obj: &'a Value, key: &str) -> Option<&'a str> {
    annotations(obj).get(key)?.as_str()
}

/// `metadata.finalizers`.
pub fn finalizers(obj: &Value) -> Vec<&str> {
    list(obj, "finalizers").iter().filter_map(Value::as_str).collect()
}

/// `metadata.ownerReferences`.
pub fn owner_references(obj: &Value) -> &[Value] {
    list(obj, "ownerReferences")
}

/// The owner reference with `controller: true`.
pub fn controller(obj: &Value) -> Option<&Value> {
    owner_references(obj).iter().find(|r| r.get("controller").and_then(Value::as_bool).unwrap_or_default())
}

/// `metadata.managedFields`.
pub fn managed_fields(obj: &Value) -> &[Value] {
    list(obj, "managedFields")
}

/// `metadata` for writing; created when missing or not an object. `obj` becomes an object if it is not.
pub fn metadata_mut(obj: &mut Value) -> &mut Map<String, Value> {
    object_mut(child_mut(object_mut(obj), "metadata"))
}

fn child_mut<'a>(map: &'a mut Map<String, Value>, key: &str) -> &'a mut Value {
    map.entry(key).or_insert(Value::Null)
}

fn object_mut(v: &mut Value) -> &mut Map<String, Value> {
    if !v.is_object() {
        *v = Value::Object(Map::new());
    }
    match v {
        Value::Object(map) => map,
        _ => unreachable!("just made an object"),
    }
}

/// Sets a field of `metadata`; `Null`, `""`, `[]` and `{}` remove it.
pub fn set(obj: &mut Value, field: &str, value: impl Into<Value>) {
    let value = value.into();
    let empty = match &value {
        Value::Null => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    };
    let metadata = metadata_mut(obj);
    if empty {
        metadata.shift_remove(field);
    } else {
        metadata.insert(field.to_owned(), value);
    }
}

/// Sets `metadata.name`.
pub fn set_name(obj: &mut Value, name: &str) {
    set(obj, "name", name);
}

/// Sets `metadata.namespace`.
pub fn set_namespace(obj: &mut Value, namespace: &str) {
    set(obj, "namespace", namespace);
}

/// Sets `metadata.uid`.
pub fn set_uid(obj: &mut Value, uid: &str) {
    set(obj, "uid", uid);
}

/// Sets `metadata.resourceVersion`.
pub fn set_resource_version(obj: &mut Value, revision: &str) {
    set(obj, "resourceVersion", revision);
}

/// Sets `metadata.generation`; 0 removes it.
pub fn set_generation(obj: &mut Value, generation: i64) {
    set(obj, "generation", if generation == 0 { Value::Null } else { generation.into() });
}

/// Sets `metadata.creationTimestamp`.
pub fn set_creation_timestamp(obj: &mut Value, time: &str) {
    set(obj, "creationTimestamp", time);
}

/// Sets or removes `metadata.deletionTimestamp`.
pub fn set_deletion_timestamp(obj: &mut Value, time: Option<&str>) {
    set(obj, "deletionTimestamp", time);
}

/// Sets `metadata.finalizers`.
pub fn set_finalizers(obj: &mut Value, finalizers: &[&str]) {
    set(obj, "finalizers", finalizers.to_vec());
}

/// Sets one label.
pub fn set_label(obj: &mut Value, key: &str, value: &str) {
    object_mut(child_mut(metadata_mut(obj), "labels")).insert(key.into(), value.into());
}

/// Sets one annotation.
pub fn set_annotation(obj: &mut Value, key: &str, value: &str) {
    object_mut(child_mut(metadata_mut(obj), "annotations")).insert(key.into(), value.into());
}

/// Removes one annotation, and `annotations` when it was the last.
pub fn remove_annotation(obj: &mut Value, key: &str) {
    let metadata = metadata_mut(obj);
    if let Some(Value::Object(map)) = metadata.get_mut("annotations") {
        map.shift_remove(key);
        if map.is_empty() {
            metadata.shift_remove("annotations");
        }
    }
}

/// A `metav1.Time`: RFC 3339, UTC, seconds.
pub fn time(t: Timestamp) -> String {
    t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A `metav1.MicroTime`: RFC 3339, UTC, microseconds.
pub fn micro_time(t: Timestamp) -> String {
    t.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// The present as `metav1.Time`.
pub fn now() -> String {
    time(Timestamp::now())
}

/// The present as `metav1.MicroTime`.
pub fn now_micro() -> String {
    micro_time(Timestamp::now())
}

/// Reads a time of either form.
pub fn parse_time(s: &str) -> Option<Timestamp> {
    s.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn set_removes_empty() {
        let mut v = json!({"metadata": {"name": "a", "labels": {"x": "y"}}});
        set_name(&mut v, "");
        set_label(&mut v, "z", "1");
        assert_eq!(v, json!({"metadata": {"labels": {"x": "y", "z": "1"}}}));
        let mut v = Value::Null;
        set_finalizers(&mut v, &["a"]);
        assert_eq!(v, json!({"metadata": {"finalizers": ["a"]}}));
    }

    #[test]
    fn times() {
        let t: Timestamp = "2024-01-02T03:04:05.123456789Z".parse().unwrap();
        assert_eq!(time(t), "2024-01-02T03:04:05Z");
        assert_eq!(micro_time(t), "2024-01-02T03:04:05.123456Z");
    }
}
