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
        decode_patched(resource, gvk, new, &self.duplicates, validation, warnings)
    }
}

/// Decodes a patched object; failures are reported about the patch, as upstream does.
fn decode_patched(
    resource: &Resource,
    gvk: &Gvk,
    new: Value,
    duplicates: &[String],
    validation: FieldValidation,
    warnings: &mut Vec<String>,
) -> Result<Value, Status> {
    let invalid = |value: &Value, detail: String| {
        let error = Error::invalid(&Path::new("patch"), go_json(value), detail);
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
    let strict = resource.schema(gvk).decode(&mut decoded, duplicates).map_err(|e| invalid(&new, e.to_string()))?;
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

/// An object as Go prints a map: members sorted at the top, metadata in struct order.
fn go_json(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut members: Vec<_> = map.iter().collect();
            members.sort_by(|a, b| a.0.cmp(b.0));
            let sorted: serde_json::Map<_, _> = members.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            Value::Object(sorted).to_string()
        }
        other => other.to_string(),
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
