//! managedFields of every write: who owns which fields.

use isopod_api::meta;
use serde_json::Value;

use super::Resource;

/// Records an update by a manager. `old` is the stored object.
pub(super) fn track(_resource: &Resource, old: Option<&Value>, new: &mut Value, _manager: &str, _subresource: &str) {
    let managed = old.map(|o| meta::managed_fields(o).to_vec()).unwrap_or_default();
    meta::set(new, "managedFields", managed);
}

/// Server-side apply: the new object, with managedFields.
pub(super) fn apply(
    _resource: &Resource,
    _current: &Value,
    _applied: &Value,
    _manager: &str,
    _force: bool,
    _subresource: &str,
) -> Result<Value, isopod_api::status::Status> {
    Err(isopod_api::status::Status::unsupported_media_type("server-side apply"))
}
