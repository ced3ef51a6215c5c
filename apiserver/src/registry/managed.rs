//! managedFields of every write: who owns which fields.

use isopod_api::{apply, gvk::Gvk, meta, schema, status::Status};
use serde_json::Value;

use super::{Resource, options::FieldValidation};

fn request<'a>(
    resource: &'a Resource,
    gvk: &'a Gvk,
    manager: &'a str,
    subresource: &'a str,
    now: &'a str,
) -> Option<apply::Request<'a>> {
    let schema = resource.schema(gvk);
    let def = schema.definition()?;
    Some(apply::Request { def, gvk, manager, subresource, has_status: resource.has_status(), now })
}

/// Records an update by a manager. `old` is the stored object.
pub(super) fn track(
    resource: &Resource,
    gvk: &Gvk,
    old: Option<&Value>,
    new: &mut Value,
    manager: &str,
    subresource: &str,
) {
    let now = meta::now();
    if let Some(request) = request(resource, gvk, manager, subresource, &now) {
        apply::update(&request, old, new);
    }
    if subresource == "scale" && resource.custom.is_some() {
        timeless(new, manager);
    }
    // A Scale of 0 has no replicas field that could be owned.
    if subresource == "scale" && new["spec"]["replicas"] == 0 {
        let mut entries = meta::managed_fields(new).to_vec();
        entries.retain(|e| e["subresource"] != "scale" || e["manager"] != manager);
        meta::set(new, "managedFields", entries);
    }
}

/// Upstream's scale of custom resources leaves no time with what it owns.
fn timeless(new: &mut Value, manager: &str) {
    let mut entries = meta::managed_fields(new).to_vec();
    for entry in entries.iter_mut().filter(|e| e["subresource"] == "scale" && e["manager"] == manager) {
        if let Some(map) = entry.as_object_mut() {
            map.shift_remove("time");
        }
    }
    entries.sort_by_key(|e| e["time"].as_str().is_some_and(|t| !t.is_empty()));
    meta::set(new, "managedFields", entries);
}

/// Server-side apply: the new object, decoded, with managedFields. `current` is null when there is none.
pub(super) fn apply(
    resource: &Resource,
    current: &Value,
    applied: &Value,
    manager: &str,
    force: bool,
    subresource: &str,
) -> Result<Value, Status> {
    let now = meta::now();
    let request = request(resource, &resource.gvk, manager, subresource, &now)
        .ok_or_else(|| Status::internal("the kind has no schema"))?;
    let live = Some(current).filter(|c| !c.is_null());
    let mut merged = apply::apply(&request, live, applied, force)?;
    for field in ["name", "namespace", "uid", "resourceVersion"] {
        let from = if field == "name" && live.is_none() { applied } else { current };
        if meta::text(&merged, field).is_empty() && !meta::text(from, field).is_empty() {
            meta::set(&mut merged, field, meta::text(from, field));
        }
    }
    if let Some(undeclared) = resource.custom.as_ref().and_then(|c| c.undeclared(&merged)) {
        return Err(Status::unknown(format!("failed to convert new object: {undeclared}")));
    }
    let parsed = schema::json::Parsed { value: merged, duplicates: Vec::new() };
    super::decode::typed(resource, &resource.gvk, parsed, Vec::new(), FieldValidation::Ignore, &mut Vec::new())
}
