//! PATCH: the four kinds of patches, as edits of the read-modify-write loop.

use std::sync::Arc;

use isopod_api::{
    field::{Error, Path},
    gvk::{GroupKind, Gvk},
    patch, schema,
    status::Status,
};
use serde_json::Value;

use super::{
    Registry, Resource, Writer, decode, managed,
    options::FieldValidation,
    scale,
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

/// A parsed patch.
struct Patch<'b> {
    kind: PatchKind,
    body: &'b [u8],
    value: Value,
    duplicates: Vec<String>,
}

impl<'b> Patch<'b> {
    fn parse(kind: PatchKind, body: &'b [u8]) -> Result<Self, Status> {
        let mut patch = Self { kind, body, value: Value::Null, duplicates: Vec::new() };
        if kind != PatchKind::Apply {
            decode::check_depth(body).map_err(|e| Status::bad_request(format!("error decoding patch: {e}")))?;
        }
        match kind {
            PatchKind::Apply => {
                let failed = |e: String| Status::bad_request(format!("error decoding YAML: {e}"));
                let text = std::str::from_utf8(body).map_err(|e| failed(e.to_string()))?;
                patch.value = isopod_api::yaml::parse(text).map_err(|e| failed(e.to_string()))?;
            }
            // Parsed where it is applied.
            PatchKind::Json => {}
            PatchKind::Merge | PatchKind::Strategic => {
                let parsed = patch::parse_object(body)?;
                (patch.value, patch.duplicates) = (parsed.value, parsed.duplicates);
            }
        }
        Ok(patch)
    }

    /// The patched object, decoded.
    fn apply(
        &self,
        resource: &Resource,
        gvk: &Gvk,
        current: &Value,
        validation: FieldValidation,
        warnings: &mut Vec<String>,
    ) -> Result<Value, Status> {
        let mut new = current.clone();
        match self.kind {
            PatchKind::Json => patch::json_patch(&mut new, self.body)?,
            PatchKind::Merge => patch::merge_patch(&mut new, &self.value),
            PatchKind::Strategic => {
                let schema = resource.schema(gvk);
                let definition = schema.definition().ok_or_else(|| Status::internal("no schema"))?;
                patch::strategic_merge(definition, &mut new, &self.value)?;
            }
            PatchKind::Apply => return Err(Status::internal("apply is not a plain patch")),
        }
        decode_patched(resource, gvk, new, self, validation, warnings)
    }

    /// The patched object as upstream shows it in errors: what the patch touched went through Go maps, which are sorted.
    fn shown(&self, patched: &Value, definition: Option<&schema::Definition>) -> String {
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
            PatchKind::Merge => sort_merged(&mut shown, &self.value),
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

/// Decodes a patched object; failures are reported about the patch, as upstream does.
fn decode_patched(
    resource: &Resource,
    gvk: &Gvk,
    new: Value,
    patch: &Patch<'_>,
    validation: FieldValidation,
    warnings: &mut Vec<String>,
) -> Result<Value, Status> {
    let invalid = |value: &Value, detail: String| {
        let error = Error::invalid(&Path::new("patch"), patch.shown(value, schema::lookup(gvk)), detail);
        Status::invalid(&GroupKind::default(), "", vec![error])
    };
    let found = Gvk::of(&new);
    if found != *gvk {
        let detail = match schema::lookup(&found) {
            Some(other) => match schema::decode(other, &mut new.clone(), &[]) {
                Err(error) => error.to_string(),
                Ok(_) => format!("converting ({}.{}) to ({gvk}): unknown conversion", found.version, found.kind),
            },
            None => format!(
                "no kind \"{}\" is registered for version \"{}\" in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
                found.kind,
                found.api_version()
            ),
        };
        return Err(invalid(&new, detail));
    }
    let mut decoded = new.clone();
    let strict =
        resource.schema(gvk).decode(&mut decoded, &patch.duplicates).map_err(|e| invalid(&new, e.to_string()))?;
    match validation {
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
        let patch = Patch::parse(request.kind, request.body)?;
        let validation = writer.options.validation;
        if request.kind == PatchKind::Apply {
            return self.apply_patch(target, patch, writer).await;
        }
        let gvk = &target.resource.gvk;
        if target.subresource == "scale" {
            let edit = |current: &Value, warnings: &mut Vec<String>| {
                let resource = target.resource;
                let shown = scale::seen(resource, current);
                let scaled = patch.apply(resource, &scale::gvk(), &shown, validation, warnings)?;
                scale::put_back(resource, current, &scaled, target.name)
            };
            return self.update_object(target, &edit, Rules::PATCH, writer).await;
        }
        let edit = |current: &Value, warnings: &mut Vec<String>| {
            patch.apply(target.resource, gvk, current, validation, warnings)
        };
        self.update_object(target, &edit, Rules::PATCH, writer).await
    }

    async fn apply_patch(
        &self,
        target: Target<'_>,
        patch: Patch<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<Outcome, Status> {
        let resource: &Arc<Resource> = target.resource;
        let (manager, force) = (writer.options.manager.clone(), writer.options.force);
        let applied = check_applied(resource, target, patch.value)?;
        let edit = |current: &Value, _: &mut Vec<String>| {
            managed::apply(resource, current, &applied, &manager, force, target.subresource)
        };
        let missing = if target.subresource.is_empty() { Missing::Create } else { Missing::Fail };
        let rules = Rules { missing, tracking: Tracking::Done, from_current: true };
        self.update_object(target, &edit, rules, writer).await
    }
}

/// An applied configuration must say what it is.
fn check_applied(resource: &Resource, target: Target<'_>, mut applied: Value) -> Result<Value, Status> {
    if !applied.is_object() {
        let found = match &applied {
            Value::Array(_) => "array",
            Value::String(_) => "string",
            Value::Bool(_) => "bool",
            Value::Number(_) => "number",
            _ => "null",
        };
        return Err(Status::bad_request(format!(
            "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"
        )));
    }
    let found = Gvk::of(&applied);
    if found.kind != resource.gvk.kind || found.group != resource.gvk.group {
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
        let json_patch = Patch { kind: PatchKind::Json, body, value: Value::Null, duplicates: Vec::new() };
        let merge =
            Patch { kind: PatchKind::Merge, body: b"", value: json!({"data": {"c": "2"}}), duplicates: Vec::new() };
        for patch in [json_patch, merge] {
            let want = r#"{"data":{"c":"2","z":"1"},"kind":"K","rest":{"a":2,"b":1}}"#;
            assert_eq!(patch.shown(&object, None), want, "{:?}", patch.kind);
        }
    }
}
