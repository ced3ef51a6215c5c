//! Resources inside custom resources (`x-kubernetes-embedded-resource`): they have a version, a kind and metadata as any
//! object has, whether they are new or not.

use isopod_api::{field::Path, names};
use serde_json::Value;

use crate::validation::{At, Errs, meta};

/// Whether a schema has such resources below its root.
pub(super) fn any(schema: &Value) -> bool {
    let below = schema["properties"].as_object().into_iter().flatten().map(|(_, schema)| schema);
    let mut below = below.chain(schema.get("items")).chain(schema.get("additionalProperties"));
    below.any(|schema| is(schema) || any(schema))
}

fn is(schema: &Value) -> bool {
    schema["x-kubernetes-embedded-resource"] == true
}

/// What is wrong with the resources inside an object.
pub(super) fn inside(e: &mut Errs, schema: &Value, value: &Value, at: &Path) {
    let mut check = |schema: &Value, value: &Value, at: Path| {
        if is(schema) && value.is_object() {
            resource(e, &At::new(at.clone(), value));
        }
        inside(e, schema, value, &at);
    };
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                match (schema["properties"].get(name), schema.get("additionalProperties")) {
                    (Some(schema), _) => check(schema, value, at.child(name)),
                    (None, Some(schema)) => check(schema, value, at.key(name)),
                    (None, None) => {}
                }
            }
        }
        Value::Array(items) => {
            let Some(schema) = schema.get("items") else { return };
            for (i, item) in items.iter().enumerate() {
                check(schema, item, at.index(i));
            }
        }
        _ => {}
    }
}

fn resource(e: &mut Errs, at: &At<'_>) {
    let (version, kind, metadata) = (at.get("apiVersion"), at.get("kind"), at.get("metadata"));
    for field in [&version, &kind] {
        match field.v {
            Value::Null => e.required(field, ""),
            Value::String(text) if text.is_empty() => e.required(field, ""),
            Value::String(_) => {}
            _ => e.invalid(field, "must be a string"),
        }
    }
    if let Err(why) = meta::group_version(version.s()) {
        e.invalid(&version, &why);
    }
    let wrong = if kind.s().is_empty() { Vec::new() } else { names::dns1035_label(&kind.s().to_lowercase()) };
    if !wrong.is_empty() {
        e.invalid(&kind, &format!("may have mixed case, but should otherwise match: {}", wrong.join(",")));
    }
    if metadata.is_set() {
        meta::embedded(e, &metadata);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn resources_inside_others() {
        let one = json!({"type": "object", "x-kubernetes-embedded-resource": true});
        let schema = json!({"properties": {"spec": {"properties": {
            "one": one, "list": {"items": one}, "map": {"additionalProperties": one}}}}});
        assert!(any(&schema) && !any(&json!({"properties": {"spec": {"items": {"type": "string"}}}})));
        let found = |spec: Value| {
            let mut e = Errs::new();
            inside(&mut e, &schema, &json!({ "spec": spec }), &Path::nil());
            e.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let good = json!({"apiVersion": "a/v1", "kind": "Good", "metadata": {"labels": {"a": "b"}}});
        assert_eq!(found(json!({"one": good, "list": [good], "map": {"k": good}})), "");
        for (spec, want) in [
            (json!({"one": {}}), "spec.one.apiVersion: Required value; spec.one.kind: Required value"),
            (
                json!({"list": [{"apiVersion": "a/b/c", "kind": 1}]}),
                "spec.list[0].kind: Invalid value: 1: must be a string; spec.list[0].apiVersion: Invalid value: \"a/b/c\": unexpected GroupVersion string: a/b/c",
            ),
            (
                json!({"map": {"k": {"apiVersion": "v1", "kind": "K", "metadata": {"name": "a/b", "finalizers": [""]}}}}),
                "spec.map[k].metadata.name: Invalid value: \"a/b\": may not contain '/'; spec.map[k].metadata.finalizers: Invalid value: \"\": name part must be non-empty; spec.map[k].metadata.finalizers: Invalid value: \"\": name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')",
            ),
        ] {
            assert_eq!(found(spec.clone()), want, "{spec}");
        }
        assert!(
            found(json!({"one": {"apiVersion": "v1", "kind": "K_"}}))
                .contains("kind: Invalid value: \"K_\": may have mixed case")
        );
    }
}
