//! What the versions of a CustomResourceDefinition have besides schemas: subresources, columns, selectable fields; and
//! how they are converted.

use isopod_api::{field::Path, names};
use serde_json::Value;

use super::webhooks::client_config;
use crate::validation::{At, Errs};

const COLUMN_TYPES: [&str; 5] = ["boolean", "date", "integer", "number", "string"];
const COLUMN_FORMATS: [&str; 8] = ["byte", "date", "date-time", "double", "float", "int32", "int64", "password"];
const SELECTABLE_MAX: usize = 8;

/// Checks them in a definition's spec. What all versions share is named once, as upstream does.
pub(super) fn check(e: &mut Errs, spec: &At<'_>) {
    let preserve = spec.get("preserveUnknownFields");
    if preserve.is_true() {
        let instead =
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        e.invalid(&preserve, instead);
    }
    let versions = spec.get("versions").items();
    for (field, one) in [
        ("subresources", subresources as fn(&mut Errs, &At<'_>, &Value)),
        ("additionalPrinterColumns", columns),
        ("selectableFields", selectable),
    ] {
        let Some(first) = versions.first() else { return };
        let schema = |version: &At<'_>| version.v.pointer("/schema/openAPIV3Schema").cloned().unwrap_or_default();
        if versions.iter().all(|version| version.v.get(field) == first.v.get(field)) {
            let at = At::new(Path::new("spec").child(field), first.get(field).v);
            one(e, &at, &schema(first));
        } else {
            for version in &versions {
                one(e, &version.get(field), &schema(version));
            }
        }
    }
    conversion(e, &spec.get("conversion"));
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
        if parts[0].is_empty() && parts.get(1) == Some(&"metadata") {
            e.invalid(&path, "must not point to fields in metadata");
            continue;
        }
        match field_at(schema, &parts) {
            Err(why) => {
                e.invalid(&path, &format!("is an invalid path: {why}"));
                continue;
            }
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

fn conversion(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (strategy, webhook) = (at.get("strategy"), at.get("webhook"));
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
        let mut version = json!({"name": "v1", "schema": {"openAPIV3Schema": schema}});
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
        check(&mut e, &At::field(obj, "spec"));
        e.0.iter().map(|x| x.field.trim_start_matches("spec.").to_owned()).collect::<Vec<_>>().join(" ")
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
