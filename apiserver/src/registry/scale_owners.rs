//! Who owns the replicas of an object, as managedFields of its Scale: what applies through `scale` meet and leave.

use isopod_api::{apply, meta, schema, status::Status};
use serde_json::{Value, json};

use super::{Resource, scale};

/// Server-side apply of a Scale; the object behind it, with managedFields.
pub(super) fn apply(
    resource: &Resource,
    current: &Value,
    applied: &Value,
    manager: &str,
    force: bool,
    name: &str,
) -> Result<Value, Status> {
    let (gvk, now) = (scale::gvk(), meta::now());
    let def = schema::lookup(&gvk).ok_or_else(|| Status::internal("the kind has no schema"))?;
    let request = apply::Request { def, gvk: &gvk, manager, subresource: "scale", has_status: true, now: &now };
    let path = path(resource);
    let mut shown = scale::seen(resource, current);
    meta::set(&mut shown, "managedFields", of_scale(meta::managed_fields(current), &path));
    let merged = apply::apply(&request, Some(&shown), applied, force)?;
    let mut new = scale::put_back(resource, current, &merged, name)?;
    let version = resource.gvk.api_version();
    let owners = of_object(meta::managed_fields(current), meta::managed_fields(&merged), &path, &version);
    meta::set(&mut new, "managedFields", owners);
    Ok(new)
}

/// Where the replicas are, in the words of fieldsV1.
fn path(resource: &Resource) -> Vec<String> {
    let text = resource.custom.as_ref().and_then(|c| c.version.scale.as_ref()).map(|paths| paths.spec_text.as_str());
    let text = text.unwrap_or(".spec.replicas");
    text.split('.').filter(|name| !name.is_empty()).map(|name| format!("f:{name}")).collect()
}

/// A set of just the field at `path`.
fn only(path: &[String]) -> Value {
    path.iter().rev().fold(json!({}), |inner, name| json!({name: inner}))
}

fn owns(entry: &Value, path: &[String]) -> bool {
    path.iter().try_fold(&entry["fieldsV1"], |at, name| at.get(name)).is_some()
}

/// Removes the field at `path` from a set, and what is empty then.
fn disown(set: &mut Value, path: &[String]) {
    let (Some((first, rest)), Some(map)) = (path.split_first(), set.as_object_mut()) else { return };
    if let Some(inner) = map.get_mut(first) {
        disown(inner, rest);
        if rest.is_empty() || inner.as_object().is_some_and(serde_json::Map::is_empty) {
            map.shift_remove(first);
        }
    }
}

/// The owners of an object's replicas as owners of its Scale's.
fn of_scale(entries: &[Value], path: &[String]) -> Vec<Value> {
    let scale = [String::from("f:spec"), String::from("f:replicas")];
    let owners = entries.iter().filter(|entry| owns(entry, path)).cloned();
    owners
        .map(|mut entry| {
            entry["apiVersion"] = scale::gvk().api_version().into();
            entry["fieldsV1"] = only(&scale);
            entry
        })
        .collect()
}

/// The owners of a Scale put back among those of its object.
fn of_object(entries: &[Value], scaled: &[Value], path: &[String], version: &str) -> Vec<Value> {
    let same = |a: &Value, b: &Value| ["manager", "operation", "subresource"].iter().all(|key| a[*key] == b[*key]);
    let scale = [String::from("f:spec"), String::from("f:replicas")];
    let mut new: Vec<&Value> = scaled.iter().filter(|entry| owns(entry, &scale)).collect();
    let mut all = Vec::new();
    for entry in entries {
        let mut entry = entry.clone();
        if owns(&entry, path) {
            match new.iter().position(|kept| same(kept, &entry)) {
                Some(at) => entry["time"] = new.remove(at)["time"].clone(),
                // Somebody else has them now.
                None => disown(&mut entry["fieldsV1"], path),
            }
        }
        if entry["fieldsV1"].as_object().is_some_and(|set| !set.is_empty()) {
            all.push(entry);
        }
    }
    for entry in new {
        let mut entry = entry.clone();
        entry["apiVersion"] = version.into();
        entry["fieldsV1"] = only(path);
        all.push(entry);
    }
    let rank = |e: &Value| ["operation", "time", "manager"].map(|key| e[key].as_str().unwrap_or_default().to_owned());
    all.sort_by_key(rank);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(manager: &str, version: &str, subresource: Option<&str>, fields: Value) -> Value {
        let mut entry = json!({"manager": manager, "operation": "Apply", "apiVersion": version,
            "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": fields});
        if let Some(subresource) = subresource {
            entry["subresource"] = subresource.into();
        }
        entry
    }

    #[test]
    fn replicas_change_hands() {
        let path = ["f:spec".to_owned(), "f:replicas".to_owned()];
        let whole = json!({"f:spec": {"f:replicas": {}, "f:paused": {}}});
        let entries = [entry("a", "apps/v1", None, whole), entry("b", "apps/v1", None, only(&path))];
        let seen = of_scale(&entries, &path);
        assert_eq!(seen.len(), 2);
        assert_eq!((&seen[0]["apiVersion"], &seen[0]["fieldsV1"]), (&json!("autoscaling/v1"), &only(&path)));
        let taken = [entry("c", "autoscaling/v1", Some("scale"), only(&path))];
        let owners = of_object(&entries, &taken, &path, "apps/v1");
        let paused = entry("a", "apps/v1", None, json!({"f:spec": {"f:paused": {}}}));
        assert_eq!(owners, [paused, entry("c", "apps/v1", Some("scale"), only(&path))]);
        assert_eq!(of_object(&entries, &seen, &path, "apps/v1"), entries, "who applies the same shares");
    }
}
