//! Definitions as OpenAPI schemas.

use serde_json::{Map, Value, json};

use super::{CrdPaths, Describe, Dialect};
use crate::schema::{self, FullField, RawDefinition};

/// The item or value type at the heart of `[]T` and `map[string]T`.
fn core_type(mut ty: &str) -> &str {
    while let Some(inner) = ty.strip_prefix("[]").or_else(|| ty.strip_prefix("map[string]")) {
        ty = inner;
    }
    ty
}

/// Definitions a definition mentions.
pub(super) fn references(name: &str) -> Vec<&'static str> {
    let Some(raw) = schema::raw(name) else { return Vec::new() };
    let mut out = Vec::new();
    for field in raw.fields.into_iter().flat_map(|fields| fields.into_values()) {
        let full = field.into_full();
        if let Some(def) = schema::definition(core_type(&full.ty)) {
            out.push(&*def.name);
        }
    }
    out
}

/// `integer(int32)` -> (`integer`, `int32`).
fn split(ty: &str) -> (&str, Option<&str>) {
    match ty.strip_suffix(')').and_then(|ty| ty.split_once('(')) {
        Some((ty, format)) => (ty, Some(format)),
        None => (ty, None),
    }
}

pub(super) fn reference(name: &str, dialect: Dialect) -> Value {
    match dialect {
        Dialect::V2 => json!({"$ref": format!("#/definitions/{name}")}),
        Dialect::V3 => json!({"$ref": format!("#/components/schemas/{name}")}),
    }
}

fn type_schema(ty: &str, dialect: Dialect, items: Option<&[String]>) -> Map<String, Value> {
    let mut out = Map::new();
    if let Some(item) = ty.strip_prefix("[]") {
        out.insert("type".into(), "array".into());
        out.insert("items".into(), inner_schema(item, dialect, items));
    } else if let Some(value) = ty.strip_prefix("map[string]") {
        out.insert("type".into(), "object".into());
        out.insert("additionalProperties".into(), inner_schema(value, dialect, items));
    } else if schema::definition(ty).is_some() {
        if let Value::Object(map) = reference(ty, dialect) {
            out = map;
        }
    } else {
        let (ty, format) = split(ty);
        if ty != "any" {
            out.insert("type".into(), ty.into());
        }
        if let Some(format) = format {
            out.insert("format".into(), format.into());
        }
    }
    out
}

fn inner_schema(ty: &str, dialect: Dialect, items: Option<&[String]>) -> Value {
    let mut out = type_schema(ty, dialect, None);
    if let Some(items) = items {
        out.insert("enum".into(), items.to_vec().into());
    }
    Value::Object(out)
}

fn field_schema(full: &FullField, required: bool, dialect: Dialect, description: Option<&str>) -> Value {
    let mut out = Map::new();
    if let Some(description) = description {
        out.insert("description".into(), description.into());
    }
    let mut ty = type_schema(&full.ty, dialect, full.item_enum.as_deref());
    if dialect == Dialect::V3 {
        if let Some(default) = &full.default {
            out.insert("default".into(), default.clone());
        }
        if let Some(target) = ty.shift_remove("$ref") {
            out.insert("allOf".into(), json!([{"$ref": target}]));
        }
        let _ = required;
    }
    out.extend(ty);
    if let Some(values) = &full.enumeration {
        out.insert("enum".into(), values.clone().into());
    }
    if !full.list_map_keys.is_empty() {
        out.insert("x-kubernetes-list-map-keys".into(), full.list_map_keys.clone().into());
    }
    for (key, value) in [
        ("x-kubernetes-list-type", &full.list_type),
        ("x-kubernetes-map-type", &full.map_type),
        ("x-kubernetes-patch-merge-key", &full.patch_merge_key),
        ("x-kubernetes-patch-strategy", &full.patch_strategy),
    ] {
        if let Some(value) = value {
            out.insert(key.into(), value.as_str().into());
        }
    }
    Value::Object(out)
}

fn scalar(kind: &str, dialect: Dialect) -> Map<String, Value> {
    let value = match (kind, dialect) {
        ("oneOf(string,number)", Dialect::V2) => json!({"type": "string"}),
        ("oneOf(string,number)", Dialect::V3) => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        ("any(int-or-string)", Dialect::V2) => json!({"type": "string", "format": "int-or-string"}),
        ("any(int-or-string)", Dialect::V3) => {
            json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]})
        }
        (kind, _) => Value::Object(type_schema(kind, dialect, None)),
    };
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// One built-in definition.
pub(super) fn definition(name: &str, dialect: Dialect, describe: Describe<'_>) -> Option<Value> {
    let RawDefinition { gvk, map_type, required, fields, kind } = schema::raw(name)?;
    let mut out = Map::new();
    if let Some(description) = describe(name, None) {
        out.insert("description".into(), description.into());
    }
    match (fields, kind) {
        (None, Some(kind)) => out.extend(scalar(&kind, dialect)),
        (fields, _) => {
            out.insert("type".into(), "object".into());
            if !required.is_empty() {
                out.insert("required".into(), required.clone().into());
            }
            let mut properties = Map::new();
            for (field, raw) in fields.unwrap_or_default() {
                let full = raw.into_full();
                let text = describe(name, Some(&field));
                let schema = field_schema(&full, required.contains(&field), dialect, text);
                properties.insert(field, schema);
            }
            if !properties.is_empty() {
                out.insert("properties".into(), Value::Object(properties));
            }
        }
    }
    if !gvk.is_empty() {
        let gvks = gvk.iter().filter_map(|text| {
            let (version, kind) = text.rsplit_once('/')?;
            let (group, version) = crate::gvk::split_api_version(version);
            Some(json!({"group": group, "kind": kind, "version": version}))
        });
        out.insert("x-kubernetes-group-version-kind".into(), gvks.collect());
    }
    if let Some(map_type) = map_type {
        out.insert("x-kubernetes-map-type".into(), map_type.into());
    }
    Some(Value::Object(out))
}

/// `x.example.com`/`v1`/`Thing` -> `com.example.x.v1.Thing`.
pub(super) fn custom_name(group: &str, version: &str, kind: &str) -> String {
    let mut parts: Vec<&str> = group.split('.').collect();
    parts.reverse();
    format!("{}.{version}.{kind}", parts.join("."))
}

/// Removes what v2 cannot say; old clients would refuse objects by it.
fn simplify(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    let nullable = map.shift_remove("nullable").is_some_and(|n| n == true);
    for key in ["allOf", "anyOf", "oneOf", "not"] {
        map.shift_remove(key);
    }
    if nullable || map.get("x-kubernetes-int-or-string").is_some_and(|v| v == true) {
        map.shift_remove("type");
        map.shift_remove("properties");
        map.shift_remove("items");
    }
    if map.get("x-kubernetes-preserve-unknown-fields").is_some_and(|v| v == true) {
        map.shift_remove("items");
        map.shift_remove("properties");
        map.shift_remove("type");
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(simplify);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(below) = map.get_mut(key) {
            simplify(below);
        }
    }
}

/// The schemas of a CRD's version: the kind and its list.
pub(super) fn custom(group: &str, version: &str, crd: &CrdPaths<'_>, dialect: Dialect) -> Vec<(String, Value)> {
    let gvk = |kind: &str| json!([{"group": group, "kind": kind, "version": version}]);
    let meta = |kind: &str| {
        let target = reference(&format!("io.k8s.apimachinery.pkg.apis.meta.v1.{kind}"), dialect);
        if dialect == Dialect::V3 { json!({"allOf": [target]}) } else { target }
    };
    let mut item =
        crd.schema.cloned().unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
    if dialect == Dialect::V2 {
        simplify(&mut item);
    }
    if let Value::Object(map) = &mut item {
        let properties = map.entry("properties").or_insert_with(|| Value::Object(Map::new()));
        properties["apiVersion"] = json!({"type": "string"});
        properties["kind"] = json!({"type": "string"});
        properties["metadata"] = meta("ObjectMeta");
        map.insert("x-kubernetes-group-version-kind".into(), gvk(crd.kind));
    }
    let name = custom_name(group, version, crd.kind);
    let list = json!({"type": "object", "required": ["items"], "properties": {
        "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": meta("ListMeta"),
        "items": {"type": "array", "items": reference(&name, dialect)}},
        "x-kubernetes-group-version-kind": gvk(crd.list_kind)});
    vec![(name, item), (custom_name(group, version, crd.list_kind), list)]
}
