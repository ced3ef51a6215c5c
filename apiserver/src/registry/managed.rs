//! managedFields of every write: who owns which fields.

use isopod_api::{apply, gvk::Gvk, meta, schema, status::Status};
use serde_json::Value;

use super::{Resource, options::FieldValidation};

fn request<'a>(
    resource: &Resource,
    gvk: &'a Gvk,
    manager: &'a str,
    subresource: &'a str,
    now: &'a str,
) -> Option<apply::Request<'a>> {
    let def = schema::lookup(gvk)?;
    Some(apply::Request { def, gvk, manager, subresource, has_status: resource.has_status(), now })
}

/// Records an update by a manager. `old` is the stored object.
pub(super) fn track(resource: &Resource, old: Option<&Value>, new: &mut Value, manager: &str, subresource: &str) {
    let now = meta::now();
    if let Some(request) = request(resource, &resource.storage, manager, subresource, &now) {
        apply::update(&request, old, new);
    }
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
    let merged = apply::apply(&request, live, applied, force)?;
    super::decode::typed(&resource.gvk, merged, &[], FieldValidation::Ignore, &mut Vec::new())
}
