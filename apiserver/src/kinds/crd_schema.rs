//! The schemas of a CustomResourceDefinition: structural rules, list and map types, defaults, CEL rules.

use isopod_api::{
    field::{Error, Path},
    structural::Structural,
};
use serde_json::{Value, json};

use crate::{
    cel::Type,
    custom,
    validation::{At, Errs},
};

/// Where a node stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Property,
    Item,
    /// Inside allOf, anyOf, oneOf, not.
    Junctor,
}

/// Checks the schemas of all versions. A schema that all versions share is named once, as upstream does.
pub(super) fn check(e: &mut Errs, versions: &At<'_>) {
    let all = versions.items();
    let schema = |v: &At<'_>| v.v.pointer("/schema/openAPIV3Schema").cloned();
    let shared = all.first().map(schema).filter(|first| all.iter().all(|v| schema(v) == *first));
    if shared.flatten().is_some() {
        let at = At::new(
            Path::new("spec").child("validation").child("openAPIV3Schema"),
            all[0].get("schema.openAPIV3Schema").v,
        );
        return root(e, &at);
    }
    for version in &all {
        root(e, &version.get("schema.openAPIV3Schema"));
    }
}

fn root(e: &mut Errs, at: &At<'_>) {
    if at.is_set() {
        node(e, at, Place::Root);
        object_head(e, &at.get("properties"));
    }
}

/// apiVersion, kind and metadata are what they are everywhere; schemas may restrict names only.
fn object_head(e: &mut Errs, properties: &At<'_>) {
    for (name, kind) in [("kind", "string"), ("apiVersion", "string"), ("metadata", "object")] {
        let property = properties.key(name);
        if property.is_set() && property.get("type").s() != kind {
            e.invalid_str(&property.get("type"), &format!("must be {kind}"));
        }
    }
    let metadata = properties.key("metadata");
    if metadata.get("properties").entries().iter().any(|(name, _)| !["name", "generateName"].contains(name)) {
        let only = "must not specify anything other than name and generateName, but metadata is implicitly specified";
        e.forbidden(&metadata, only);
    }
}

fn node(e: &mut Errs, at: &At<'_>, place: Place) {
    let schema = at.v;
    let flag = |name: &str| schema[name] == true;
    let kind = schema["type"].as_str().unwrap_or_default();
    let int_or_string = flag("x-kubernetes-int-or-string");
    if place != Place::Junctor {
        if kind.is_empty() && !int_or_string && !flag("x-kubernetes-preserve-unknown-fields") {
            match place {
                Place::Root => e.required(&at.get("type"), "must not be empty at the root"),
                Place::Item => e.required(&at.get("type"), "must not be empty for specified array items"),
                _ => e.required(&at.get("type"), "must not be empty for specified object fields"),
            }
        }
        if !kind.is_empty() && !["object", "array", "string", "integer", "number", "boolean"].contains(&kind) {
            e.unsupported(&at.get("type"), &["array", "boolean", "integer", "number", "object", "string"]);
        }
        if place == Place::Root && !kind.is_empty() && kind != "object" {
            e.invalid(&at.get("type"), "must be object at the root");
        }
        if int_or_string && !kind.is_empty() {
            e.forbidden(&at.get("type"), "must be empty if x-kubernetes-int-or-string is true");
        }
        if flag("x-kubernetes-embedded-resource") && kind != "object" {
            e.invalid(&at.get("type"), "must be object if x-kubernetes-embedded-resource is true");
        }
    }
    if flag("uniqueItems") {
        e.forbidden(
            &at.get("uniqueItems"),
            "uniqueItems cannot be set to true since the runtime complexity becomes quadratic",
        );
    }
    if schema["additionalProperties"].is_object() && schema["properties"].as_object().is_some_and(|p| !p.is_empty()) {
        e.forbidden(&at.get("additionalProperties"), "additionalProperties and properties are mutual exclusive");
    }
    if schema["additionalProperties"] == false {
        e.forbidden(&at.get("additionalProperties"), "additionalProperties cannot be set to false");
    }
    for field in ["$ref", "definitions", "dependencies", "id", "additionalItems", "patternProperties"] {
        if schema.get(field).is_some_and(|v| !v.is_null()) {
            e.forbidden(&at.get(field), &format!("{field} is not supported"));
        }
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && regex::Regex::new(pattern).is_err()
    {
        e.invalid(&at.get("pattern"), "must be a valid regular expression, but isn't");
    }
    lists(e, at, kind);
    if let Some(default) = schema.get("default").filter(|d| !d.is_null()) {
        defaulted(e, at, default);
    }
    rules(e, at, place == Place::Root);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let place = if place == Place::Junctor { place } else { Place::Property };
        node(e, &At::new(at.get("properties").path.key(name), property), place);
    }
    if schema["items"].is_object() {
        node(e, &at.get("items"), if place == Place::Junctor { place } else { Place::Item });
    } else if kind == "array" && place != Place::Junctor {
        e.required(&at.get("items"), "must be specified");
    }
    if schema["additionalProperties"].is_object() {
        node(e, &at.get("additionalProperties"), if place == Place::Junctor { place } else { Place::Property });
    }
    for junctor in ["allOf", "anyOf", "oneOf"] {
        for below in at.get(junctor).items() {
            inside(e, &below);
        }
    }
    if schema["not"].is_object() {
        inside(e, &at.get("not"));
    }
}

/// Junctors may only restrict values, never change what is pruned or filled in.
fn inside(e: &mut Errs, at: &At<'_>) {
    for (field, message) in [
        ("description", "must be empty to be structural"),
        ("default", "must be undefined to be structural"),
        ("nullable", "must be false to be structural"),
    ] {
        if at.v.get(field).is_some_and(|v| !v.is_null() && *v != false && *v != "") {
            e.forbidden(&at.get(field), message);
        }
    }
    node(e, at, Place::Junctor);
}

fn lists(e: &mut Errs, at: &At<'_>, kind: &str) {
    let list = at.get("x-kubernetes-list-type");
    let keys = at.get("x-kubernetes-list-map-keys");
    if list.is_set() {
        if kind != "array" {
            e.invalid_as(&at.get("type"), kind, "must be array if x-kubernetes-list-type is specified");
        }
        e.one_of(&list, &["atomic", "map", "set"]);
    }
    if at.get("x-kubernetes-map-type").is_set() {
        if kind != "object" {
            e.invalid_as(&at.get("type"), kind, "must be object if x-kubernetes-map-type is specified");
        }
        e.one_of(&at.get("x-kubernetes-map-type"), &["atomic", "granular"]);
    }
    if list.s() != "map" {
        if keys.len() > 0 {
            e.forbidden(&keys, "must not be set if x-kubernetes-list-type is not map");
        }
        return;
    }
    if keys.len() == 0 {
        e.required(&keys, "must not be empty if x-kubernetes-list-type is map");
    }
    let items = at.get("items");
    if items.v["type"] != "object" {
        e.invalid_as(
            &items.get("type"),
            items.get("type").s(),
            "must be object if parent array's x-kubernetes-list-type is map",
        );
        return;
    }
    let required = items.get("required").strings();
    for key in keys.items() {
        let property = &items.v["properties"][key.s()];
        if property.is_null() {
            e.invalid(&key, "entries must all be names of item properties");
        } else if !required.contains(&key.s()) && property.get("default").is_none_or(Value::is_null) {
            let at = At::new(items.get("properties").path.key(key.s()), property).get("default");
            e.required(
                &at,
                "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
            );
        }
    }
}

/// A default must be what the schema would leave of it.
fn defaulted(e: &mut Errs, at: &At<'_>, default: &Value) {
    let here = at.get("default");
    let wrapped = Structural::new(Some(&json!({"type": "object", "properties": {"default": at.v}})));
    let mut pruned = json!({"default": default});
    let unknown = wrapped.decode(&mut pruned, &[]).is_ok_and(|strict| !strict.is_empty());
    if unknown {
        e.invalid_as(&here, default.clone(), "must not have unknown fields");
    }
    let parent = at.path.to_string();
    for mut error in wrapped.validate(&pruned, None) {
        error.field = format!("{parent}.{}", error.field);
        error.detail = error.detail.replace("default in body", &format!("{parent}.default in body"));
        e.0.push(error);
    }
}

fn rules(e: &mut Errs, at: &At<'_>, root: bool) {
    for rule in at.get("x-kubernetes-validations").items() {
        let text = rule.get("rule");
        if text.s().trim().is_empty() {
            e.required(&text, "rule is not specified");
        } else if let Some(error) = uncompiled(at, &rule, root, text.s(), Type::Bool) {
            e.0.push(Error::invalid(&text.path, shown_rule(rule.v), error));
        }
        let message = rule.get("message");
        if message.is_set() && message.s().trim().is_empty() {
            e.invalid(&message, "message must be non-empty if specified");
        } else if message.s().trim().contains('\n') {
            e.invalid(&message, "message must not contain line breaks");
        } else if text.s().contains('\n') && !message.is_set() {
            e.required(&message, "message must be specified if rule contains line breaks");
        }
        let computed = rule.get("messageExpression");
        if computed.is_set()
            && let Some(error) = uncompiled(at, &rule, root, computed.s(), Type::String)
        {
            e.0.push(Error::invalid(&computed.path, shown_rule(rule.v), format!("messageExpression {error}")));
        }
        let reason = rule.get("reason");
        if reason.is_set() {
            e.one_of(
                &reason,
                &["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"],
            );
        }
        if rule.get("optionalOldSelf").is_true() && !custom::mentions(text.s(), "oldSelf") {
            e.invalid(
                &rule.get("optionalOldSelf"),
                "option optionalOldSelf is set to true, but the rule does not reference oldSelf",
            );
        }
    }
}

/// A rule as upstream's errors show it: the internal type, whose members have Go's names.
fn shown_rule(rule: &Value) -> Value {
    let text = |field: &str| rule[field].as_str().unwrap_or_default();
    json!({
        "Rule": text("rule"), "Message": text("message"), "MessageExpression": text("messageExpression"),
        "Reason": rule["reason"], "FieldPath": text("fieldPath"), "OptionalOldSelf": rule["optionalOldSelf"],
    })
}

/// Why an expression of a rule does not compile.
fn uncompiled(schema: &At<'_>, rule: &At<'_>, root: bool, text: &str, wanted: Type) -> Option<String> {
    let environment = custom::rule_environment(schema.v, root, rule.get("optionalOldSelf").is_true());
    let shown =
        if wanted == Type::Bool { "cel expression must evaluate to a bool" } else { "must evaluate to a string" };
    let error = environment.compile(text, &[wanted]).err()?;
    Some(if error.starts_with("must evaluate") { shown.to_owned() } else { error })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(schema: Value) -> Vec<String> {
        let versions = json!([{"name": "v1", "schema": {"openAPIV3Schema": schema}}]);
        let mut e = Errs::new();
        check(&mut e, &At::new(Path::new("spec").child("versions"), &versions));
        e.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn structural_rules() {
        let base = "spec.validation.openAPIV3Schema";
        for (schema, want) in [
            (
                json!({"type": "object", "properties": {"a": {}}}),
                format!("{base}.properties[a].type: Required value: must not be empty for specified object fields"),
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "array"}}}),
                format!("{base}.properties[a].items: Required value: must be specified"),
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                "items": {"type": "object", "properties": {"k": {"type": "string"}}}}}}),
                format!(
                    "{base}.properties[a].items.properties[k].default: Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property"
                ),
            ),
        ] {
            assert_eq!(messages(schema), [want]);
        }
        assert_eq!(
            messages(json!({"type": "object", "properties": {"a": {"type": "integer", "default": "x"}}})).len(),
            1
        );
        assert!(
            messages(json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.("}]}))[0]
                .contains("compilation failed")
        );
        assert!(
            messages(json!({"type": "object", "properties": {"a": {"type": "string", "default": "x"},
            "b": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]}}}))
            .is_empty()
        );
    }
}
