//! PATCH: the four kinds of patches, as edits of the read-modify-write loop.

use std::sync::Arc;

use isopod_api::{
    field::{Error, Path},
    gvk::{GroupKind, Gvk},
    patch, schema,
    status::Status,
    text::go_value,
    yaml,
};
use serde_json::Value;

use super::{
    Registry, Resource, Writer, managed,
    options::FieldValidation,
    scale, scale_owners,
    update::{Missing, Outcome, Rules, Target, Tracking},
};

/// The kinds of patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PatchKind {
    /// RFC 6902.
    Json,
    /// RFC 7386.
    Merge,
    /// Upstream's own, with merge keys and directives.
    Strategic,
    /// Server-side apply.
    Apply,
}

impl PatchKind {
    /// From the Content-Type.
    pub(crate) fn parse(content_type: Option<&str>, custom: bool) -> Result<Self, Status> {
        match content_type.unwrap_or("").split(';').next().unwrap_or("").trim() {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" if !custom => Ok(Self::Strategic),
            "application/apply-patch+yaml" => Ok(Self::Apply),
            _ => {
                let mut known = vec!["application/json-patch+json", "application/merge-patch+json"];
                if !custom {
                    known.push("application/strategic-merge-patch+json");
                }
                known.push("application/apply-patch+yaml");
                Err(Status::unsupported_media_type(format!(
                    "the body of the request was in an unknown format - accepted media types include: {}",
                    known.join(", ")
                )))
            }
        }
    }
}

/// A patch as it came. It is read when its object is there: that there is none is the first error.
struct Patch<'b> {
    kind: PatchKind,
    body: &'b [u8],
    validation: FieldValidation,
}

/// What a patch made of an object.
struct Patched {
    value: Value,
    /// Paths of keys the patch says twice.
    duplicates: Vec<String>,
    /// Other strict errors in the patch itself.
    strict: Vec<String>,
    /// The patch as an object; null for JSON patches.
    patch: Value,
}

impl<'b> Patch<'b> {
    fn applied(&self, mut current: Value, definition: Option<&schema::Definition>) -> Result<Patched, Status> {
        let lenient = self.validation == FieldValidation::Ignore;
        let undecodable = |e: String| match (self.kind, lenient) {
            (PatchKind::Strategic, _) | (PatchKind::Json, true) => Status::bad_request(e),
            (PatchKind::Merge, true) => Status::bad_request("Invalid JSON Patch"),
            _ => Status::bad_request(format!("error decoding patch: {e}")),
        };
        let value = &mut current;
        let (strict, duplicates, patch) = match self.kind {
            PatchKind::Json => (patch::json_patch(value, self.body, lenient)?, Vec::new(), Value::Null),
            PatchKind::Merge | PatchKind::Strategic => {
                let parsed = patch::parse_object(self.body).map_err(&undecodable)?;
                match (self.kind, definition, &parsed.value) {
                    (PatchKind::Merge, _, Value::Null) => return Err(Status::bad_request("Invalid JSON Patch")),
                    (PatchKind::Merge, ..) => patch::merge_patch(value, &parsed.value),
                    (_, Some(definition), Value::Object(_)) => {
                        patch::strategic_merge(definition, value, &parsed.value)?;
                    }
                    (_, Some(_), _) => {}
                    (_, None, _) => return Err(Status::internal("no schema")),
                }
                (Vec::new(), parsed.duplicates, parsed.value)
            }
            PatchKind::Apply => return Err(Status::internal("apply is not a plain patch")),
        };
        Ok(Patched { value: current, duplicates, strict, patch })
    }

    /// The patched object, decoded.
    fn apply(
        &self,
        resource: &Resource,
        gvk: &Gvk,
        current: &Value,
        warnings: &mut Vec<String>,
    ) -> Result<Value, Status> {
        let schema = resource.schema(gvk);
        let patched = self.applied(current.clone(), schema.definition())?;
        self.decode(resource, gvk, patched, warnings)
    }

    /// Decodes a patched object; failures are reported about the patch, as upstream does.
    fn decode(
        &self,
        resource: &Resource,
        gvk: &Gvk,
        patched: Patched,
        warnings: &mut Vec<String>,
    ) -> Result<Value, Status> {
        let Patched { value: new, duplicates, mut strict, patch } = patched;
        let invalid = |value: &Value, detail: String| {
            let shown = match self.kind {
                PatchKind::Strategic => go_value(&patch),
                _ => self.shown(value, &patch, schema::lookup(gvk)),
            };
            let error = Error::invalid(&Path::new("patch"), shown, detail);
            Status::invalid(&GroupKind::default(), "", vec![error])
        };
        let found = Gvk::of(&new);
        if found != *gvk && self.kind != PatchKind::Strategic {
            return Err(invalid(&new, misfit(&found, gvk, &new)));
        }
        let mut decoded = new.clone();
        let schema = resource.schema(gvk);
        let unknown = schema.decode(&mut decoded, &duplicates);
        let mut unknown = unknown.map_err(|e| {
            let restored = schema.definition().filter(|_| self.kind == PatchKind::Strategic);
            let restored = restored.and_then(|definition| schema::restore_error(definition, &new));
            invalid(&new, restored.unwrap_or_else(|| e.to_string()))
        })?;
        if self.kind == PatchKind::Strategic {
            // It cannot make an object another one.
            (decoded["kind"], decoded["apiVersion"]) = (gvk.kind.as_str().into(), gvk.api_version().into());
            // What it says twice comes first, then what nobody knows, by name.
            unknown.sort_by_key(|error| (!error.starts_with("duplicate"), error.clone()));
        }
        strict.append(&mut unknown);
        match self.validation {
            FieldValidation::Strict if !strict.is_empty() => {
                Err(invalid(&new, format!("strict decoding error: {}", strict.join(", "))))
            }
            FieldValidation::Warn => {
                warnings.extend(strict);
                Ok(decoded)
            }
            _ => Ok(decoded),
        }
    }

    /// The patched object as upstream shows it in errors: what the patch touched went through Go maps, which are sorted.
    fn shown(&self, patched: &Value, patch: &Value, definition: Option<&schema::Definition>) -> String {
        let mut shown = patched.clone();
        match definition {
            Some(definition) => schema::go_order(definition, &mut shown),
            None => schema::sort_all(&mut shown),
        }
        sort_members(&mut shown);
        match self.kind {
            PatchKind::Json => {
                let operations: Value = serde_json::from_slice(self.body).unwrap_or_default();
                for operation in operations.as_array().into_iter().flatten() {
                    for pointer in [&operation["path"], &operation["from"]] {
                        sort_path(&mut shown, pointer.as_str().unwrap_or_default());
                    }
                }
            }
            PatchKind::Merge => sort_merged(&mut shown, patch),
            PatchKind::Strategic | PatchKind::Apply => {}
        }
        shown.to_string()
    }
}

fn sort_members(value: &mut Value) {
    if let Value::Object(map) = value {
        map.sort_keys();
    }
}

/// Sorts the containers a JSON pointer goes through.
fn sort_path(value: &mut Value, pointer: &str) {
    let mut at = value;
    let parents = pointer.rsplit_once('/').map_or("", |(parents, _)| parents);
    for token in parents.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        let next = match at {
            Value::Object(map) => map.get_mut(&token),
            Value::Array(items) => token.parse::<usize>().ok().and_then(|i| items.get_mut(i)),
            _ => None,
        };
        let Some(next) = next else { return };
        sort_members(next);
        at = next;
    }
}

/// Sorts the objects a merge patch merged into.
fn sort_merged(value: &mut Value, patch: &Value) {
    sort_members(value);
    for (key, patch) in patch.as_object().into_iter().flatten().filter(|(_, p)| p.is_object()) {
        if let Some(value) = value.get_mut(key) {
            sort_merged(value, patch);
        }
    }
}

/// Why an object of another kind is not one of `gvk`.
fn misfit(found: &Gvk, gvk: &Gvk, new: &Value) -> String {
    match schema::lookup(found) {
        Some(other) => match schema::decode(other, &mut new.clone(), &[]) {
            Err(error) => error.to_string(),
            Ok(_) => format!("converting ({}.{}) to ({gvk}): unknown conversion", found.version, found.kind),
        },
        None => format!(
            "no kind \"{}\" is registered for version \"{}\" in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
            found.kind,
            found.api_version()
        ),
    }
}

/// A PATCH request.
pub(crate) struct PatchRequest<'a> {
    /// What is patched.
    pub(crate) target: Target<'a>,
    /// Kind of patch.
    pub(crate) kind: PatchKind,
    /// Body.
    pub(crate) body: &'a [u8],
}

impl Registry {
    /// Patches an object (or its Scale).
    pub(crate) async fn patch_object(
        &self,
        request: PatchRequest<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<Outcome, Status> {
        let target = request.target;
        if request.kind == PatchKind::Apply {
            return self.apply_patch(target, request.body, writer).await;
        }
        let patch = Patch { kind: request.kind, body: request.body, validation: writer.options.validation };
        let gvk = &target.resource.gvk;
        if target.subresource == "scale" {
            let edit = |current: &Value, warnings: &mut Vec<String>| {
                let resource = target.resource;
                let shown = scale::seen(resource, current);
                let scaled = patch.apply(resource, &scale::gvk(), &shown, warnings)?;
                scale::put_back(resource, current, &scaled, target.name)
            };
            return self.update_object(target, &edit, Rules::PATCH, writer).await;
        }
        let edit = |current: &Value, warnings: &mut Vec<String>| patch.apply(target.resource, gvk, current, warnings);
        self.update_object(target, &edit, Rules::PATCH, writer).await
    }

    async fn apply_patch(&self, target: Target<'_>, body: &[u8], writer: &mut Writer<'_>) -> Result<Outcome, Status> {
        let resource: &Arc<Resource> = target.resource;
        let (manager, force) = (writer.options.manager.clone(), writer.options.force);
        let strict = writer.options.validation == FieldValidation::Strict;
        let failed = |e: String| Status::bad_request(format!("error decoding YAML: {e}"));
        let text = std::str::from_utf8(body).map_err(|e| failed(e.to_string()))?;
        let (applied, repeated) = yaml::parse_strict(text).map_err(|e| failed(e.to_string()))?;
        let scaled = target.subresource == "scale";
        let applied = check_applied(&if scaled { scale::gvk() } else { resource.gvk.clone() }, target, applied)?;
        let edit = |current: &Value, _: &mut Vec<String>| {
            let merged = match scaled {
                true => scale_owners::apply(resource, current, &applied, &manager, force, target.name)?,
                false => managed::apply(resource, current, &applied, &manager, force, target.subresource)?,
            };
            if strict && !repeated.is_empty() {
                return Err(Status::bad_request(format!(
                    "error strict decoding YAML: error converting YAML to JSON: yaml: unmarshal errors:\n  {}",
                    repeated.join("\n  ")
                )));
            }
            Ok(merged)
        };
        let missing = if target.subresource.is_empty() { Missing::Create } else { Missing::Fail };
        let rules = Rules { missing, tracking: Tracking::Done, from_current: true };
        self.update_object(target, &edit, rules, writer).await
    }
}

/// An applied configuration must say what it is.
fn check_applied(gvk: &Gvk, target: Target<'_>, mut applied: Value) -> Result<Value, Status> {
    if applied.is_null() {
        applied = Value::Object(serde_json::Map::new());
    }
    if !applied.is_object() {
        let found = match &applied {
            Value::Array(_) => "array",
            Value::String(_) => "string",
            Value::Bool(_) => "bool",
            _ => "number",
        };
        return Err(Status::bad_request(format!(
            "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"
        )));
    }
    let found = Gvk::of(&applied);
    if found.kind != gvk.kind || found.group != gvk.group {
        return Err(Status::bad_request(format!("invalid object type: {found}")));
    }
    if isopod_api::meta::name(&applied).is_empty() {
        isopod_api::meta::set_name(&mut applied, target.name);
    }
    Ok(applied)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_show_touched_objects_sorted() {
        let object = json!({"kind": "K", "data": {"z": "1", "c": "2"}, "rest": {"b": 1, "a": 2}});
        let body = br#"[{"op":"add","path":"/data/c","value":"2"}]"#;
        let merge = json!({"data": {"c": "2"}});
        for (kind, value) in [(PatchKind::Json, Value::Null), (PatchKind::Merge, merge)] {
            let patch = Patch { kind, body, validation: FieldValidation::Warn };
            let want = r#"{"data":{"c":"2","z":"1"},"kind":"K","rest":{"a":2,"b":1}}"#;
            assert_eq!(patch.shown(&object, &value, None), want, "{kind:?}");
        }
    }
}
