//! What the versions of a CustomResourceDefinition have besides schemas: subresources, columns, selectable fields; and
//! how they are converted.

use isopod_api::{field::Path, names};
use serde_json::Value;

use super::webhooks::client_config;
use crate::validation::{At, Errs};

const COLUMN_TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
const COLUMN_FORMATS: [&str; 8] = ["byte", "date", "date-time", "double", "float", "int32", "int64", "password"];
const SELECTABLE_MAX: usize = 8;

/// Parts of versions and what checks them.
type Part = (&'static str, fn(&mut Errs, &At<'_>, &Value));
const PARTS: [Part; 3] =
    [("subresources", subresources), ("additionalPrinterColumns", columns), ("selectableFields", selectable)];

fn schema_of(version: &At<'_>) -> Value {
    version.v.pointer("/schema/openAPIV3Schema").cloned().unwrap_or_default()
}

/// Whether all versions have the same `field`: upstream then names it once, beside the versions.
fn is_shared(versions: &[At<'_>], field: &str) -> bool {
    versions.first().is_some_and(|first| versions.iter().all(|version| version.v.get(field) == first.v.get(field)))
}

/// The schemas directly below one.
fn below(schema: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["items", "allOf", "anyOf", "oneOf"].into_iter().flat_map(|field| schema[field].as_array());
    let single = ["items", "not", "additionalProperties", "additionalItems"].into_iter().map(|field| &schema[field]);
    let named = ["properties", "patternProperties", "definitions", "dependencies"];
    let named = named.into_iter().flat_map(|field| schema[field].as_object()).flat_map(|map| map.values());
    lists.flatten().chain(single).chain(named).filter(|schema| schema.is_object())
}

fn has_default(schema: &Value) -> bool {
    !schema["default"].is_null() || below(schema).any(has_default)
}

/// Formats of strings that are checked; dashes do not matter.
const FORMATS: &[&str] = &[
    "bsonobjectid",
    "uri",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "cidr",
    "mac",
    "uuid",
    "uuid3",
    "uuid4",
    "uuid5",
    "isbn",
    "isbn10",
    "isbn13",
    "creditcard",
    "ssn",
    "hexcolor",
    "rgbcolor",
    "byte",
    "password",
    "date",
    "duration",
    "datetime",
    "quantity",
    "k8sshortname",
    "k8slongname",
];

/// Formats of a definition's schemas that nobody checks.
pub(super) fn unknown_formats(spec: &Value) -> Vec<&str> {
    fn collect<'a>(out: &mut Vec<&'a str>, schema: &'a Value) {
        let format = schema["format"].as_str().unwrap_or_default();
        let known = match schema["type"].as_str().unwrap_or_default() {
            "" | "string" => FORMATS.contains(&format.replace('-', "").as_str()),
            "integer" => matches!(format, "int32" | "int64"),
            "number" => matches!(format, "float" | "double"),
            _ => false,
        };
        if !format.is_empty() && !known && !out.contains(&format) {
            out.push(format);
        }
        below(schema).for_each(|schema| collect(out, schema));
    }
    let mut out = Vec::new();
    for version in spec["versions"].as_array().into_iter().flatten() {
        collect(&mut out, &version["schema"]["openAPIV3Schema"]);
    }
    out
}

fn has_status(version: &At<'_>) -> bool {
    version.get("subresources.status").is_set()
}

/// Whether a version had the same schema before.
fn unchanged(version: &At<'_>, old: &Value) -> bool {
    let same = |before: &Value| before["name"] == version.v["name"] && before.get("schema") == version.v.get("schema");
    old.as_array().is_some_and(|old| old.iter().any(same))
}

/// Checks every version, but for what all of them share. `old` are the versions before.
pub(super) fn each(e: &mut Errs, spec: &At<'_>, old: &Value) {
    let list = spec.get("versions");
    let versions = list.items();
    for version in &versions {
        let schema = version.get("schema.openAPIV3Schema");
        if !schema.is_set() {
            e.required(&schema, "schemas are required");
        }
    }
    let preserve = spec.get("preserveUnknownFields");
    if preserve.is_true() && versions.iter().any(|version| has_default(&schema_of(version))) {
        e.invalid(&preserve, "must be false in order to use defaults in the schema");
    }
    let mut names_seen = Vec::new();
    for version in &versions {
        let name = version.get("name");
        let wrong = names::dns1035_label(name.s());
        if !wrong.is_empty() {
            e.invalid_str(&name, &wrong.join(","));
        }
        deprecation(e, version);
        if !is_shared(&versions, "schema") {
            let schema = version.get("schema.openAPIV3Schema");
            super::crd_schema::check(e, &schema, has_status(version), unchanged(version, old));
        }
        for (field, part) in PARTS.iter().filter(|(field, _)| !is_shared(&versions, field)) {
            part(e, &version.get(field), &schema_of(version));
        }
        names_seen.push(name.s());
    }
    let unique = names_seen.iter().enumerate().all(|(i, name)| !names_seen[..i].contains(name));
    if !unique {
        e.invalid_as(&list, internal(&versions), "must contain unique version names");
    }
    if versions.iter().filter(|version| version.get("storage").is_true()).count() != 1 {
        e.invalid_as(&list, internal(&versions), "must have exactly one version marked as storage version");
    }
    // Upstream's internal form has the name of the first version beside them, too.
    let wrong = names_seen.first().map(|name| names::dns1035_label(name)).unwrap_or_default();
    if !wrong.is_empty() && !names_seen[0].is_empty() {
        e.invalid_as(&spec.get("version"), names_seen[0], &wrong.join(","));
    }
}

/// Checks what all versions share.
pub(super) fn shared(e: &mut Errs, spec: &At<'_>, old: &Value) {
    let versions = spec.get("versions").items();
    let Some(first) = versions.first() else { return };
    if is_shared(&versions, "schema") {
        let path = Path::new("spec").child("validation").child("openAPIV3Schema");
        let at = At::new(path, first.get("schema.openAPIV3Schema").v);
        super::crd_schema::check(e, &at, versions.iter().any(has_status), unchanged(first, old));
    }
    for (field, part) in PARTS.iter().filter(|(field, _)| is_shared(&versions, field)) {
        let at = At::new(Path::new("spec").child(field), first.get(field).v);
        part(e, &at, &schema_of(first));
    }
}

/// Versions as upstream's errors show them.
fn internal(versions: &[At<'_>]) -> Value {
    versions.iter().map(|version| super::crd_internal::version(version.v, |field| is_shared(versions, field))).collect()
}

fn deprecation(e: &mut Errs, version: &At<'_>) {
    let warning = version.get("deprecationWarning");
    if !warning.is_set() {
        return;
    }
    if !version.get("deprecated").is_true() {
        return e.invalid(&warning, "can only be set for deprecated versions");
    }
    if warning.s().len() > 256 {
        e.invalid(&warning, "must be <= 256 characters long");
    }
    if warning.s().is_empty() {
        e.invalid(&warning, "must not be an empty string");
    }
    if let Some((at, _)) = warning.s().char_indices().find(|(_, c)| c.is_control()) {
        e.invalid(
            &warning,
            &format!("must only contain printable UTF-8 characters; non-printable character found at index {at}"),
        );
    }
}

/// `.a.b`.
fn simple_path(e: &mut Errs, at: &At<'_>) -> bool {
    let detail = match at.s() {
        "" => "must not be empty",
        path if !path.starts_with('.') => "must be a simple json path starting with .",
        _ => return true,
    };
    e.invalid_str(at, detail);
    false
}

fn subresources(e: &mut Errs, at: &At<'_>, _schema: &Value) {
    let scale = at.get("scale");
    if !scale.is_set() {
        return;
    }
    for (field, root) in [("specReplicasPath", ".spec"), ("statusReplicasPath", ".status")] {
        let path = scale.get(field);
        if path.s().is_empty() {
            e.required(&path, "");
        } else if simple_path(e, &path) && !path.s().starts_with(&format!("{root}.")) {
            e.invalid(&path, &format!("should be a json path under {root}"));
        }
    }
    let labels = scale.get("labelSelectorPath");
    let rooted = [".spec.", ".status."].iter().any(|root| labels.s().starts_with(root));
    if !labels.s().is_empty() && simple_path(e, &labels) && !rooted {
        e.invalid(&labels, "should be a json path under either .spec or .status");
    }
}

fn columns(e: &mut Errs, list: &At<'_>, _schema: &Value) {
    for at in list.items() {
        let (name, kind, format) = (at.get("name"), at.get("type"), at.get("format"));
        if name.s().is_empty() {
            e.required(&name, "");
        }
        let one_of = format!("must be one of {}", COLUMN_TYPES.join(","));
        if kind.s().is_empty() {
            e.required(&kind, &one_of);
        } else if !COLUMN_TYPES.contains(&kind.s()) {
            e.invalid(&kind, &one_of);
        }
        if !format.s().is_empty() && !COLUMN_FORMATS.contains(&format.s()) {
            e.invalid(&format, &format!("must be one of {}", COLUMN_FORMATS.join(",")));
        }
        // Upstream names the field as its first version did.
        let path = At::new(at.path.child("JSONPath"), at.get("jsonPath").v);
        if path.s().is_empty() {
            e.required(&path, "");
        } else {
            simple_path(e, &path);
        }
    }
}

fn selectable(e: &mut Errs, list: &At<'_>, schema: &Value) {
    let mut seen = Vec::new();
    for at in list.items() {
        let path = at.get("jsonPath");
        if path.s().is_empty() {
            e.required(&path, "");
            continue;
        }
        let parts: Vec<&str> = path.s().split('.').collect();
        match field_at(schema, &parts) {
            Err(why) => {
                e.invalid(&path, &format!("is an invalid path: {why}"));
                continue;
            }
            Ok(_) if parts.get(1) == Some(&"metadata") => e.invalid(&path, "must not point to fields in metadata"),
            Ok(kind) if !["string", "boolean", "integer"].contains(&kind) => {
                let allowed = "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed.";
                e.invalid(&path, allowed);
            }
            Ok(_) => {}
        }
        if seen.contains(&path.s()) {
            e.duplicate(&path, path.s());
        }
        seen.push(path.s());
    }
    if seen.len() > SELECTABLE_MAX {
        e.too_many(list, seen.len(), SELECTABLE_MAX);
    }
}

/// The type of the property a path leads to.
fn field_at<'a>(schema: &'a Value, parts: &[&str]) -> Result<&'a str, String> {
    let [first, rest @ ..] = parts else { return Err("empty".to_owned()) };
    if !first.is_empty() {
        return Err(format!("expected . but got {first:?}"));
    }
    let mut at = schema;
    for part in rest {
        at = match at["properties"].get(part) {
            Some(property) => property,
            None => return Err("does not refer to a valid field".to_owned()),
        };
    }
    Ok(at["type"].as_str().unwrap_or_default())
}

pub(super) fn conversion(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("conversion");
    if !at.is_set() {
        return;
    }
    let (strategy, webhook) = (at.get("strategy"), at.get("webhook"));
    if strategy.s() != "None" && spec.get("preserveUnknownFields").is_true() {
        e.invalid_str(&strategy, "must be None if spec.preserveUnknownFields is true");
    }
    e.required_one_of(&strategy, &["None", "Webhook"]);
    // Upstream reports about its internal form, where the parts of `webhook` stand beside `strategy`.
    let client = At::new(at.path.child("webhookClientConfig"), webhook.get("clientConfig").v);
    let review = At::new(at.path.child("conversionReviewVersions"), webhook.get("conversionReviewVersions").v);
    if strategy.s() != "Webhook" {
        for part in [client, review] {
            if part.is_set() {
                e.forbidden(&part, "should not be set when strategy is not set to Webhook");
            }
        }
        return;
    }
    if client.is_set() {
        client_config(e, &client);
    } else {
        e.required(&client, "required when strategy is set to Webhook");
    }
    review_versions(e, &review);
}

fn review_versions(e: &mut Errs, list: &At<'_>) {
    if list.len() == 0 {
        return e.required(list, "");
    }
    let mut seen = Vec::new();
    for at in list.items() {
        if seen.contains(&at.s()) {
            e.invalid(&at, "duplicate version");
            continue;
        }
        seen.push(at.s());
        e.messages(&at, names::dns1035_label(at.s()));
    }
    if !seen.iter().any(|version| ["v1", "v1beta1"].contains(version)) {
        e.invalid(list, "must include at least one of v1, v1beta1");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(mut more: Value) -> String {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "a": {"type": "string"}, "o": {"type": "object"}}}}});
        let mut version = json!({"name": "v1", "storage": true, "schema": {"openAPIV3Schema": schema}});
        if let Some(conversion) = more.as_object_mut().and_then(|m| m.remove("conversion")) {
            return errors(&json!({"spec": {"versions": [version], "conversion": conversion}}));
        }
        for (field, value) in more.as_object().into_iter().flatten() {
            version[field] = value.clone();
        }
        errors(&json!({"spec": {"versions": [version]}}))
    }

    fn errors(obj: &Value) -> String {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        each(&mut e, &spec, &Value::Null);
        shared(&mut e, &spec, &Value::Null);
        conversion(&mut e, &spec);
        e.0.iter().map(|x| x.field.trim_start_matches("spec.").to_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn formats_nobody_checks() {
        let schema = json!({"properties": {
            "a": {"type": "string", "format": "date-time"},
            "b": {"type": "integer", "format": "uint32"},
            "c": {"type": "array", "items": {"type": "string", "format": "foo"}},
            "d": {"type": "number", "format": "int32"},
            "e": {"type": "boolean", "format": "date"},
            "f": {"type": "object", "additionalProperties": {"type": "string", "format": "foo"}, "not": {"format": "k8s-short-name"}},
        }});
        let spec = json!({"versions": [{"schema": {"openAPIV3Schema": schema}}]});
        assert_eq!(unknown_formats(&spec), ["uint32", "foo", "int32", "date"]);
    }

    #[test]
    fn table() {
        for (more, want) in [
            (json!({}), ""),
            (json!({"subresources": {"status": {}}}), ""),
            (
                json!({"subresources": {"scale": {"specReplicasPath": "spec.x", "statusReplicasPath": ".foo.x"}}}),
                "subresources.scale.specReplicasPath subresources.scale.statusReplicasPath",
            ),
            (
                json!({"additionalPrinterColumns": [{"name": "", "type": "x", "jsonPath": "a"}]}),
                "additionalPrinterColumns[0].name additionalPrinterColumns[0].type additionalPrinterColumns[0].JSONPath",
            ),
            (json!({"additionalPrinterColumns": [{"name": "n", "type": "date", "jsonPath": ".a"}]}), ""),
            (
                json!({"selectableFields": [{"jsonPath": ".spec.a"}, {"jsonPath": ".spec.o"}, {"jsonPath": ".spec.x"},
                    {"jsonPath": ".metadata.name"}, {"jsonPath": ".spec.a"}]}),
                "selectableFields[1].jsonPath selectableFields[2].jsonPath selectableFields[3].jsonPath selectableFields[4].jsonPath",
            ),
            (json!({"conversion": {"strategy": "X"}}), "conversion.strategy"),
            (
                json!({"conversion": {"strategy": "Webhook"}}),
                "conversion.webhookClientConfig conversion.conversionReviewVersions",
            ),
            (
                json!({"conversion": {"strategy": "None", "webhook": {"conversionReviewVersions": ["v1"]}}}),
                "conversion.conversionReviewVersions",
            ),
            (
                json!({"conversion": {"strategy": "Webhook", "webhook": {"conversionReviewVersions": ["v9"],
                    "clientConfig": {"url": "https://example.com/x"}}}}),
                "conversion.conversionReviewVersions",
            ),
        ] {
            assert_eq!(fields(more.clone()), want, "{more}");
        }
    }
}
