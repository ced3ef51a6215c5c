//! Between JSON and the values of expressions.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use kube_cel::cel::{
    Value as Cel,
    common::ast::IdedExpr,
    objects::{Key, Map, OptionalValue},
    parser::Parser,
};
use serde_json::Value;

use super::{
    functions::ROOT,
    lex::{RESERVED, WORDS},
};

/// A text.
pub(crate) fn string(text: &str) -> Cel {
    Cel::String(Arc::new(text.to_owned()))
}

/// A value whose schema is not known to expressions.
pub(crate) fn untyped(value: &Value) -> Cel {
    typed(&Value::Null, value, false)
}

static TIMESTAMP: LazyLock<Option<IdedExpr>> = LazyLock::new(|| Parser::default().parse("timestamp(self)").ok());
static DURATION: LazyLock<Option<IdedExpr>> = LazyLock::new(|| Parser::default().parse("duration(self)").ok());

fn converted(program: Option<&IdedExpr>, text: &str) -> Option<Cel> {
    let mut scope = ROOT.new_inner_scope();
    scope.add_variable_from_value("self", string(text));
    Cel::resolve(program?, &scope).ok()
}

fn formatted(format: Option<&str>, text: &str) -> Option<Cel> {
    match format? {
        "date-time" => converted(TIMESTAMP.as_ref(), text),
        "date" => converted(TIMESTAMP.as_ref(), &format!("{text}T00:00:00Z")),
        "duration" => converted(DURATION.as_ref(), text),
        "byte" => STANDARD.decode(text).ok().map(|b| Cel::Bytes(Arc::new(b))),
        _ => None,
    }
}

/// A value as expressions see it by its schema: only declared fields, formats as their types. Without a schema (null)
/// everything is as it is.
pub(crate) fn typed(schema: &Value, value: &Value, resource: bool) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(b) => Cel::Bool(*b),
        Value::Number(n) => match (schema["type"].as_str(), n.as_i64()) {
            (Some("number"), _) | (_, None) => Cel::Float(n.as_f64().unwrap_or_default()),
            (_, Some(i)) => Cel::Int(i),
        },
        Value::String(text) => formatted(schema["format"].as_str(), text).unwrap_or_else(|| string(text)),
        Value::Array(items) => {
            let schema = &schema["items"];
            Cel::List(Arc::new(items.iter().map(|i| typed(schema, i, false)).collect()))
        }
        Value::Object(map) => {
            let known = schema["properties"].as_object();
            let rest = schema.get("additionalProperties").filter(|v| v.is_object());
            let embedded = resource || schema["x-kubernetes-embedded-resource"] == true;
            let mut out = HashMap::with_capacity(map.len());
            let mut put = |name: &str, value: Cel| drop(out.insert(Key::from(name), value));
            for (name, value) in map {
                match known.and_then(|k| k.get(name)) {
                    Some(schema) if !(embedded && name == "metadata") => {
                        put(&escape(name), typed(schema, value, false));
                    }
                    _ if embedded && matches!(name.as_str(), "apiVersion" | "kind") => put(name, untyped(value)),
                    _ if embedded && name == "metadata" => put(name, names(value)),
                    _ => match rest {
                        Some(schema) => put(name, typed(schema, value, false)),
                        None if schema.is_null() => put(name, untyped(value)),
                        None => {}
                    },
                }
            }
            Cel::Map(Map { map: Arc::new(out) })
        }
    }
}

/// What rules see of metadata.
fn names(metadata: &Value) -> Cel {
    let fields = ["name", "generateName"].into_iter();
    let seen = fields.filter_map(|f| Some((Key::from(f), untyped(metadata.get(f)?)))).collect();
    Cel::Map(Map { map: Arc::new(seen) })
}

/// A value as JSON; members in order of their names.
pub(crate) fn json(value: &Cel) -> Result<Value, String> {
    Ok(match value {
        Cel::Null => Value::Null,
        Cel::Bool(b) => Value::Bool(*b),
        Cel::Int(i) => Value::from(*i),
        Cel::UInt(u) => Value::from(*u),
        Cel::Float(f) => Value::from(*f),
        Cel::String(text) => Value::from(text.as_str()),
        Cel::Bytes(bytes) => Value::from(STANDARD.encode(bytes.as_slice())),
        Cel::Timestamp(at) => Value::from(at.to_rfc3339().replace("+00:00", "Z")),
        Cel::Duration(span) => Value::from(format!("{}s", span.as_seconds_f64())),
        Cel::List(items) => items.iter().map(json).collect::<Result<Vec<_>, _>>()?.into(),
        Cel::Map(map) => {
            let mut members = Vec::with_capacity(map.map.len());
            for (key, value) in map.map.iter() {
                members.push((key.to_string(), json(value)?));
            }
            members.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(members.into_iter().collect())
        }
        Cel::Opaque(opaque) => match opaque.downcast_ref::<OptionalValue>() {
            Some(optional) => optional.value().map_or(Ok(Value::Null), json)?,
            None => return Err(format!("type {} has no JSON form", opaque.runtime_type_name())),
        },
        Cel::Function(name, _) => return Err(format!("function {name} has no JSON form")),
    })
}

/// A property's name as expressions write it.
pub(crate) fn escape(name: &str) -> String {
    if RESERVED.contains(&name) || WORDS.contains(&name) {
        return format!("__{name}__");
    }
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        match c {
            '_' if rest.starts_with("__") => {
                out.push_str("__underscores__");
                rest = &rest[2..];
                continue;
            }
            '.' => out.push_str("__dot__"),
            '-' => out.push_str("__dash__"),
            '/' => out.push_str("__slash__"),
            c => out.push(c),
        }
        rest = &rest[c.len_utf8()..];
    }
    out
}
