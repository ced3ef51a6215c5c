//! Patches until `isopod_api::patch` is there.

use isopod_api::{schema::Definition, status::Status};
use serde_json::Value;

pub(super) fn json_patch(_value: &mut Value, _patch: &Value) -> Result<(), Status> {
    Err(Status::unsupported_media_type("JSON patches are not there yet"))
}

pub(super) fn merge_patch(value: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = Value::Object(serde_json::Map::new());
    }
    let Value::Object(map) = value else { return };
    for (key, change) in patch {
        match change {
            Value::Null => drop(map.shift_remove(key)),
            change => merge_patch(map.entry(key.clone()).or_insert(Value::Null), change),
        }
    }
}

pub(super) fn strategic_merge(_definition: &Definition, _value: &mut Value, _patch: &Value) -> Result<(), Status> {
    Err(Status::unsupported_media_type("strategic merge patches are not there yet"))
}
