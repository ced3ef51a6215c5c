//! Structural schemas: what a CustomResourceDefinition's schema must say outside of allOf, anyOf, oneOf and not, and what
//! it must not say inside of them.

use isopod_api::field::Path;
use regex::Regex;
use serde_json::{Value, json};

use crate::validation::{At, Errs};

/// Where a node stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Root,
    Item,
    Field,
}

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";
const EMBEDDED: &str = "x-kubernetes-embedded-resource";
const INT_OR_STRING: &str = "x-kubernetes-int-or-string";
/// Fields no schema may have; with one of them it is not looked at any further here.
pub(super) const UNSUPPORTED: [&str; 6] =
    ["id", "additionalItems", "patternProperties", "definitions", "dependencies", "$ref"];

/// What is not structural about a schema, sorted; `None` when it has parts that cannot be in any.
pub(super) fn check(at: &At<'_>) -> Option<Errs> {
    if unsupported(at.v) {
        return None;
    }
    let mut e = Errs::new();
    invariants(&mut e, at, Level::Root);
    for (path, below) in junctors(at) {
        complete(&mut e, &below, at.v, &at.path, &path);
    }
    e.0.sort_by_key(ToString::to_string);
    Some(e)
}

fn set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

fn unsupported(schema: &Value) -> bool {
    let Value::Object(map) = schema else { return false };
    let own = UNSUPPORTED.iter().any(|field| set(&schema[*field])) || set(&schema["$schema"]);
    let below = |name: &str, value: &Value| match name {
        "properties" => value.as_object().is_some_and(|map| map.values().any(unsupported)),
        "allOf" | "anyOf" | "oneOf" => value.as_array().is_some_and(|list| list.iter().any(unsupported)),
        "items" => value.is_array() || unsupported(value),
        "not" | "additionalProperties" => unsupported(value),
        _ => false,
    };
    own || schema[PRESERVE] == false || map.iter().any(|(name, value)| below(name, value))
}

fn invariants(e: &mut Errs, at: &At<'_>, level: Level) {
    let schema = at.v;
    let kind = schema["type"].as_str().unwrap_or_default();
    if kind == "array" && !schema["items"].is_object() {
        e.required(&at.get("items"), "must be specified");
    }
    if schema["items"].is_object() {
        invariants(e, &at.get("items"), Level::Item);
    }
    for (_, property) in at.get("properties").entries() {
        invariants(e, &property, Level::Field);
    }
    let additional = at.get("additionalProperties");
    if additional.is_set() {
        if level == Level::Root {
            e.forbidden(&additional, "must not be used at the root");
        }
        if additional.v.is_object() {
            invariants(e, &additional, Level::Field);
        }
    }
    extensions(e, at);
    values(e, at, true);
    types(e, at, level, kind);
    metadata(e, at, level);
}

fn extensions(e: &mut Errs, at: &At<'_>) {
    if at.v[INT_OR_STRING] == true {
        for other in [PRESERVE, EMBEDDED] {
            if at.v[other] == true {
                e.invalid(&at.get(other), "must be false if x-kubernetes-int-or-string is true");
            }
        }
    }
}

fn types(e: &mut Errs, at: &At<'_>, level: Level, kind: &str) {
    let flag = |name: &str| at.v[name] == true;
    let own = at.get("type");
    if flag(EMBEDDED) && kind != "object" {
        let must = "must be object if x-kubernetes-embedded-resource is true";
        if kind.is_empty() { e.required(&own, must) } else { e.invalid(&own, must) }
    } else if kind.is_empty() && !flag(INT_OR_STRING) && !flag(PRESERVE) {
        match level {
            Level::Root => e.required(&own, "must not be empty at the root"),
            Level::Item => e.required(&own, "must not be empty for specified array items"),
            Level::Field => e.required(&own, "must not be empty for specified object fields"),
        }
    }
    if flag(EMBEDDED) && set(&at.v["additionalProperties"]) {
        let must = "must not be used if x-kubernetes-embedded-resource is set";
        e.forbidden(&at.get("additionalProperties"), must);
    }
    if level == Level::Root && !kind.is_empty() && kind != "object" {
        e.invalid(&own, "must be object at the root");
    }
    if flag(EMBEDDED) && !flag(PRESERVE) && !set(&at.v["properties"]) {
        let must =
            "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields";
        e.required(&at.get("properties"), must);
    }
}

/// apiVersion, kind and metadata are what they are everywhere; schemas may restrict names only.
fn metadata(e: &mut Errs, at: &At<'_>, level: Level) {
    let own = level == Level::Root || at.v[EMBEDDED] == true;
    let properties = at.get("properties");
    for name in ["kind", "apiVersion"] {
        let property = properties.key(name);
        if own && property.is_set() && property.v["type"] != "string" {
            e.invalid_str(&property.get("type"), "must be string");
        }
    }
    let metadata = properties.key("metadata");
    if !metadata.is_set() {
        return;
    }
    if own && metadata.v["type"] != "object" {
        e.invalid_str(&metadata.get("type"), "must be object");
    }
    if level != Level::Root {
        return;
    }
    let names = |map: &Value| {
        map.as_object().is_none_or(|map| map.keys().all(|key| ["name", "generateName"].contains(&key.as_str())))
    };
    let mut others = metadata.v.as_object().into_iter().flatten();
    let restrained = others.all(|(field, value)| match field.as_str() {
        "properties" => names(value),
        "type" | "default" => true,
        _ => !set(value) || *value == false,
    });
    if !restrained {
        let only = "must not specify anything other than name and generateName, but metadata is implicitly specified";
        e.forbidden(&metadata, only);
    }
}

/// The junctors of a schema and where they stand.
fn junctors<'a>(at: &At<'a>) -> Vec<(Path, At<'a>)> {
    let lists = ["allOf", "anyOf", "oneOf"].into_iter().flat_map(|name| at.get(name).items());
    let not = Some(at.get("not")).filter(|not| not.v.is_object());
    not.into_iter().chain(lists).map(|below| (below.path.clone(), below)).collect()
}

/// An integer or a string, as those who say so for other readers of the schema spell it.
fn int_or_string(any_of: &Value) -> bool {
    *any_of == json!([{"type": "integer"}, {"type": "string"}])
}

/// What restricts values: junctors and the pattern. `outer` schemas may have the two spellings of int-or-string.
fn values(e: &mut Errs, at: &At<'_>, outer: bool) {
    let spelled = outer && int_or_string(&at.v["anyOf"]);
    for (i, below) in at.get("anyOf").items().iter().enumerate() {
        if !(spelled && i < 2) {
            nested(e, below, false);
        }
    }
    for (i, below) in at.get("allOf").items().iter().enumerate() {
        nested(e, below, outer && i == 0 && int_or_string(&below.v["anyOf"]));
    }
    for below in at.get("oneOf").items() {
        nested(e, &below, false);
    }
    if at.v["not"].is_object() {
        nested(e, &at.get("not"), false);
    }
    let pattern = at.get("pattern");
    if let Some(error) = irregular(pattern.s()) {
        e.invalid(&pattern, &format!("must be a valid regular expression, but isn't: {error}"));
    }
}

/// Inside junctors nothing may change what is pruned or filled in.
fn nested(e: &mut Errs, at: &At<'_>, spelled: bool) {
    values(e, at, spelled);
    if at.v["items"].is_object() {
        nested(e, &at.get("items"), false);
    }
    for (_, property) in at.get("properties").entries() {
        nested(e, &property, false);
    }
    let flags = [(PRESERVE, "must be false to be structural"), (EMBEDDED, "must be false to be structural")];
    let fields = [
        ("type", "must be empty to be structural"),
        ("additionalProperties", "must be undefined to be structural"),
        ("default", "must be undefined to be structural"),
        ("title", "must be empty to be structural"),
        ("description", "must be empty to be structural"),
        ("nullable", "must be false to be structural"),
        (INT_OR_STRING, "must be false to be structural"),
        ("x-kubernetes-list-map-keys", "must be empty to be structural"),
        ("x-kubernetes-list-type", "must be undefined to be structural"),
        ("x-kubernetes-map-type", "must be undefined to be structural"),
        ("x-kubernetes-validations", "must be empty to be structural"),
    ];
    for (field, must) in fields.into_iter().chain(flags) {
        let bare = field == "additionalProperties" || field == "default";
        let value = &at.v[field];
        if if bare { !value.is_null() } else { set(value) && *value != false } {
            e.forbidden(&at.get(field), must);
        }
    }
    if at.v["properties"].get("metadata").is_some() {
        e.forbidden(&at.get("properties").key("metadata"), "must not be specified in a nested context");
    }
}

/// What a junctor talks of must be specified outside of it.
fn complete(e: &mut Errs, inner: &At<'_>, outer: &Value, path: &Path, inner_path: &Path) {
    let missing = |e: &mut Errs, path: &Path, inner: &Path| {
        e.required(&At::new(path.clone(), &Value::Null), &format!("because it is defined in {inner}"));
    };
    for (below_path, below) in junctors(inner) {
        complete(e, &below, outer, path, &below_path);
    }
    if inner.v["items"].is_object() {
        let below = inner.get("items");
        match &outer["items"] {
            items @ Value::Object(_) => complete(e, &below, items, &path.child("items"), &below.path),
            _ => missing(e, &path.child("items"), &inner_path.child("items")),
        }
    }
    for (name, below) in inner.get("properties").entries() {
        let path = path.child("properties").key(name);
        match outer["properties"].get(name) {
            Some(property) => complete(e, &below, property, &path, &below.path),
            None => missing(e, &path, &below.path),
        }
    }
}

/// Why a pattern is no regular expression, in Go's words as far as they are known.
fn irregular(pattern: &str) -> Option<String> {
    let error = Regex::new(pattern).err()?.to_string();
    let problem = error.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or("invalid syntax");
    let go = match problem {
        "unclosed group" => format!("missing closing ): `{pattern}`"),
        "unopened group" => format!("unexpected ): `{pattern}`"),
        "unclosed character class" => {
            format!("missing closing ]: `{}`", &pattern[pattern.find('[').unwrap_or_default()..])
        }
        "repetition operator missing expression" => {
            let at = pattern.find(['*', '+', '?']).unwrap_or_default();
            format!("missing argument to repetition operator: `{}`", pattern.get(at..=at).unwrap_or_default())
        }
        other => format!("{other}: `{pattern}`"),
    };
    Some(format!("error parsing regexp: {go}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(schema: Value) -> Vec<String> {
        let at = At::new(Path::new("s"), &schema);
        check(&at).map(|e| e.0.iter().map(ToString::to_string).collect()).unwrap_or_default()
    }

    fn property(a: Value) -> Value {
        json!({"type": "object", "properties": {"a": a}})
    }

    #[test]
    fn rules() {
        for (schema, want) in [
            (
                property(json!({})),
                "s.properties[a].type: Required value: must not be empty for specified object fields",
            ),
            (property(json!({"type": "array"})), "s.properties[a].items: Required value: must be specified"),
            (
                property(json!({"type": "object", EMBEDDED: true})),
                "s.properties[a].properties: Required value: must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields",
            ),
            (
                json!({"type": "object", "additionalProperties": {"type": "string"}}),
                "s.additionalProperties: Forbidden: must not be used at the root",
            ),
            (
                property(json!({"type": "object", "anyOf": [{"description": "x"}]})),
                "s.properties[a].anyOf[0].description: Forbidden: must be empty to be structural",
            ),
            (
                json!({"type": "object", "allOf": [{"properties": {"b": {"minimum": 1}}}]}),
                "s.properties[b]: Required value: because it is defined in s.allOf[0].properties[b]",
            ),
            (
                property(json!({"type": "string", "pattern": "("})),
                "s.properties[a].pattern: Invalid value: \"(\": must be a valid regular expression, but isn't: error parsing regexp: missing closing ): `(`",
            ),
            (
                json!({"type": "object", "properties": {"metadata": {"type": "object", "description": "x"}}}),
                "s.properties[metadata]: Forbidden: must not specify anything other than name and generateName, but metadata is implicitly specified",
            ),
        ] {
            assert_eq!(errors(schema.clone()), [want], "{schema}");
        }
    }

    #[test]
    fn structural() {
        let both = json!([{"type": "integer"}, {"type": "string"}]);
        for schema in [
            json!({"type": "object", PRESERVE: true}),
            property(json!({INT_OR_STRING: true, "anyOf": both})),
            property(json!({INT_OR_STRING: true, "allOf": [{"anyOf": both}, {"pattern": "x"}]})),
            json!({"type": "object", "properties": {"metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}}}),
            property(
                json!({"type": "object", "anyOf": [{"required": ["b"]}], "properties": {"b": {"type": "string"}}}),
            ),
        ] {
            assert_eq!(errors(schema.clone()), [""; 0], "{schema}");
        }
        assert!(check(&At::new(Path::new("s"), &property(json!({"$ref": "x"})))).is_none());
    }
}
