//! How large values can be by their schemas, in the units of cost estimates: characters, bytes, items, entries.
//!
//! What has no limit of its own is limited by what fits into a request. Scalars and objects have no size.

use std::sync::LazyLock;

use serde_json::{Value, json};

use super::escape;

/// Largest request.
const REQUEST: u64 = 3 << 20;
/// Longest duration or time, with its quotes.
const TIME_MAX: u64 = 32;
/// A date, with its quotes.
const DATE: u64 = 12;

/// What every resource has, whatever its schema says.
static HEAD: LazyLock<Value> = LazyLock::new(|| {
    let text = json!({"type": "string"});
    json!({"type": "object", "properties": {"apiVersion": text, "kind": text,
        "metadata": {"type": "object", "properties": {"name": text, "generateName": text}}}})
});

/// The place of a value: a node of a schema, or a key, whose size nobody counts.
#[derive(Clone, Copy)]
pub(crate) enum Place<'s> {
    /// A value of a schema; of a whole resource?
    Value(&'s Value, bool),
    /// The key of a map.
    Key,
}

impl<'s> Place<'s> {
    /// The field with a name as expressions spell it.
    pub(super) fn field(self, name: &str) -> Option<Self> {
        let Place::Value(schema, resource) = self else { return None };
        if resource && HEAD["properties"].get(name).is_some() {
            return Place::Value(&HEAD, false).field(name);
        }
        let properties = schema["properties"].as_object()?;
        let (_, found) = properties.iter().find(|(own, _)| escape(own) == name)?;
        Self::below(found)
    }

    /// The items of a list, the values of a map.
    pub(super) fn element(self) -> Option<Self> {
        let Place::Value(schema, _) = self else { return None };
        Self::below(schema.get(if schema["type"] == "array" { "items" } else { "additionalProperties" })?)
    }

    /// The keys of a map.
    pub(super) fn key(self) -> Option<Self> {
        matches!(self, Place::Value(schema, _) if schema["additionalProperties"].is_object()).then_some(Place::Key)
    }

    fn below(schema: &'s Value) -> Option<Self> {
        smallest(schema)?;
        Some(Place::Value(schema, embedded(schema)))
    }

    /// The largest size of the value.
    pub(super) fn max(self) -> u64 {
        let Place::Value(schema, _) = self else { return 0 };
        let limit = |name: &str| Some(schema.get(name)?.as_i64()?.max(0).unsigned_abs());
        let characters = || limit("maxLength").map(|length| length.saturating_mul(4));
        if schema["x-kubernetes-int-or-string"] == true {
            return characters().unwrap_or(REQUEST - 2);
        }
        match (schema["type"].as_str().unwrap_or_default(), schema["format"].as_str().unwrap_or_default()) {
            ("array", _) => limit("maxItems").unwrap_or_else(|| fitting(&schema["items"], 1)),
            ("object", _) if schema["additionalProperties"].is_object() => {
                limit("maxProperties").unwrap_or_else(|| fitting(&schema["additionalProperties"], 6))
            }
            ("string", "byte") => limit("maxLength").unwrap_or(REQUEST - 2),
            ("string", "duration" | "date-time") => TIME_MAX,
            ("string", "date") => DATE,
            ("string", _) => characters().or_else(|| longest(schema)).unwrap_or(REQUEST - 2),
            _ => 0,
        }
    }
}

/// How often a node can be in one object when nothing above it limits that.
pub(crate) fn cardinality(schema: &Value) -> u64 {
    REQUEST / (smallest(schema).unwrap_or(2) + 1)
}

fn embedded(schema: &Value) -> bool {
    schema["x-kubernetes-embedded-resource"] == true
}

/// How many elements fit into a request, each with so many more bytes.
fn fitting(element: &Value, more: u64) -> u64 {
    (REQUEST - 2) / (smallest(element).unwrap_or(2) + more)
}

fn longest(schema: &Value) -> Option<u64> {
    let values = schema.get("enum")?.as_array().filter(|values| !values.is_empty())?;
    values.iter().filter_map(Value::as_str).map(|text| text.len() as u64).max()
}

/// The length of the shortest JSON a schema allows; `None` for what expressions do not see.
fn smallest(schema: &Value) -> Option<u64> {
    if schema["x-kubernetes-int-or-string"] == true {
        return Some(1);
    }
    match (schema["type"].as_str()?, schema["format"].as_str().unwrap_or_default()) {
        ("array", _) => smallest(schema.get("items")?).map(|_| 2),
        ("object", _) => match schema.get("additionalProperties").filter(|values| values.is_object()) {
            Some(values) => smallest(values).map(|_| 2),
            None => Some(2 + required(schema)),
        },
        ("string", "duration") => Some(3),
        ("string", "date") => Some(DATE),
        ("string", "date-time") => Some(21),
        ("string", _) => Some(2),
        ("boolean", _) => Some(4),
        ("number" | "integer", _) => Some(1),
        _ => None,
    }
}

/// The bytes of the properties that must be there and are not filled in.
fn required(schema: &Value) -> u64 {
    let names = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let own = if embedded(schema) { &HEAD["properties"] } else { &Value::Null };
    names
        .filter_map(|name| {
            let property = own.get(name).or_else(|| schema["properties"].get(name))?;
            let plain = property.get("default").is_none_or(Value::is_null);
            plain.then_some(name.len() as u64 + smallest(property)? + 4)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_limits_and_what_fits() {
        let schema = json!({"type": "object", "required": ["a", "list"], "properties": {
            "a": {"type": "string", "maxLength": 10}, "list": {"type": "array", "items": {"type": "integer"}},
            "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
            "few": {"type": "object", "maxProperties": 3, "additionalProperties": {"type": "string", "enum": ["ab", "abc"]}},
            "at": {"type": "string", "format": "date-time"}, "any": {"x-kubernetes-preserve-unknown-fields": true},
            "dash-ed": {"type": "string"}}});
        let root = Place::Value(&schema, true);
        let max = |path: &str| path.split('.').try_fold(root, |at, name| at.field(name)).map(Place::max);
        assert_eq!(max("a"), Some(40));
        assert_eq!(max("list"), Some((REQUEST - 2) / 2));
        assert_eq!(max("map"), Some((REQUEST - 2) / 10));
        assert_eq!((max("few"), max("at"), max("any")), (Some(3), Some(32), None));
        assert_eq!((max("dash__dash__ed"), max("dash-ed")), (Some(REQUEST - 2), None));
        assert_eq!(
            (max("kind"), max("metadata.name"), max("metadata.labels")),
            (max("metadata.name"), max("kind"), None)
        );
        assert_eq!(root.field("few").and_then(Place::element).map(Place::max), Some(3));
        assert_eq!(root.field("few").and_then(Place::key).map(Place::max), Some(0));
        assert_eq!(smallest(&schema), Some(2 + (1 + 2 + 4) + (4 + 2 + 4)));
        assert_eq!(cardinality(&json!({"type": "string"})), REQUEST / 3);
    }
}
