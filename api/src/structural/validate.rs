//! Validation of a value against an OpenAPI schema, with upstream's messages.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Map, Value};

use super::{additional, flag, formats, properties};
use crate::field::{Error, ErrorList, Path};

/// Where a value is: the field path of the error, and the dotted name inside its text.
#[derive(Clone)]
struct Place {
    path: Path,
    name: String,
}

impl Place {
    fn child(&self, name: &str) -> Self {
        let dotted = if self.name.is_empty() { name.to_owned() } else { format!("{}.{name}", self.name) };
        Self { path: self.path.child(name), name: dotted }
    }

    fn index(&self, index: usize) -> Self {
        Self { path: self.path.index(index), name: format!("{}[{index}]", self.name) }
    }

    fn says(&self, text: &str) -> String {
        format!("{} in body {text}", self.name)
    }
}

pub(super) fn validate(schema: &Value, value: &Value, old: Option<&Value>) -> ErrorList {
    let mut errors = ErrorList::new();
    let root = Place { path: Path::nil(), name: String::new() };
    check(schema, value, old, &root, true, &mut errors);
    errors
}

/// Validates a member of an object; texts name what is below it only.
pub(super) fn validate_at(schema: &Value, value: &Value, old: Option<&Value>, member: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let place = Place { path: Path::new(member), name: String::new() };
    check(schema, value, old, &place, false, &mut errors);
    errors
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn number(schema: &Value, key: &str) -> Option<f64> {
    schema.get(key)?.as_f64()
}

fn count(schema: &Value, key: &str) -> Option<usize> {
    schema.get(key)?.as_u64().and_then(|n| usize::try_from(n).ok())
}

fn check(schema: &Value, value: &Value, old: Option<&Value>, at: &Place, root: bool, errors: &mut ErrorList) {
    if old == Some(value) && !root {
        return;
    }
    if value.is_null() && flag(schema, "nullable") {
        return;
    }
    if let Some(want) = schema.get("type").and_then(Value::as_str) {
        let got = type_name(value);
        let whole = value.as_f64().is_some_and(|n| n.fract() == 0.0);
        let fits =
            got == want || (want == "number" && got == "integer") || (want == "integer" && got == "number" && whole);
        if !fits {
            let text = at.says(&format!("must be of type {want}: \"{got}\""));
            errors.push(Error::type_invalid(&at.path, got, text));
            return;
        }
    } else if flag(schema, "x-kubernetes-int-or-string") && !matches!(type_name(value), "integer" | "string") {
        let got = type_name(value);
        let text = at.says(&format!("must be of type integer,string: \"{got}\""));
        errors.push(Error::type_invalid(&at.path, got, text));
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let shown: Vec<String> =
            allowed.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
        errors.push(Error::not_supported(&at.path, value, &shown));
    }
    match value {
        Value::String(text) => check_string(schema, text, at, errors),
        Value::Number(n) => check_number(schema, n.as_f64().unwrap_or_default(), value, at, errors),
        Value::Array(items) => check_array(schema, items, old, at, errors),
        Value::Object(map) => check_object(schema, map, old, at, errors),
        _ => {}
    }
    check_junctors(schema, value, at, errors);
}

fn check_string(schema: &Value, text: &str, at: &Place, errors: &mut ErrorList) {
    let length = text.chars().count();
    if let Some(max) = count(schema, "maxLength").filter(|max| length > *max) {
        errors.push(Error::too_long(&at.path, max));
    }
    if let Some(min) = count(schema, "minLength").filter(|min| length < *min) {
        errors.push(Error::invalid(&at.path, text, at.says(&format!("should be at least {min} chars long"))));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
        && !regex::Regex::new(pattern).is_ok_and(|r| r.is_match(text))
    {
        errors.push(Error::invalid(&at.path, text, at.says(&format!("should match '{pattern}'"))));
    }
    if let Some(format) = schema.get("format").and_then(Value::as_str)
        && !formats::matches(format, text)
    {
        let detail = at.says(&format!("must be of type {format}: \"{text}\""));
        errors.push(Error::type_invalid(&at.path, text, detail));
    }
}

fn check_number(schema: &Value, n: f64, value: &Value, at: &Place, errors: &mut ErrorList) {
    if let Some(format @ ("int32" | "int64")) = schema.get("format").and_then(Value::as_str) {
        let fits = value.as_i64().is_some_and(|n| format == "int64" || i32::try_from(n).is_ok());
        if !fits {
            let detail = format!("Checked value must be of type integer with format {format} in {}", at.name);
            errors.push(Error::invalid(&Path::nil(), "", detail));
        }
    }
    let mut refuse = |text: String| errors.push(Error::invalid(&at.path, value, at.says(&text)));
    if let Some(max) = number(schema, "maximum") {
        if flag(schema, "exclusiveMaximum") && n >= max {
            refuse(format!("should be less than {max}"));
        } else if n > max {
            refuse(format!("should be less than or equal to {max}"));
        }
    }
    if let Some(min) = number(schema, "minimum") {
        if flag(schema, "exclusiveMinimum") && n <= min {
            refuse(format!("should be greater than {min}"));
        } else if n < min {
            refuse(format!("should be greater than or equal to {min}"));
        }
    }
    if let Some(factor) = number(schema, "multipleOf").filter(|f| *f != 0.0)
        && (n / factor).fract() != 0.0
    {
        refuse(format!("should be a multiple of {factor}"));
    }
}

/// What makes an item of a `map` list unique.
fn list_key(schema: &Value, item: &Value) -> Option<Value> {
    let keys = schema.get("x-kubernetes-list-map-keys")?.as_array()?;
    let mut out = Map::new();
    for key in keys.iter().filter_map(Value::as_str) {
        if let Some(value) = item.get(key) {
            out.insert(key.to_owned(), value.clone());
        }
    }
    Some(Value::Object(out))
}

fn check_array(schema: &Value, items: &[Value], old: Option<&Value>, at: &Place, errors: &mut ErrorList) {
    if let Some(max) = count(schema, "maxItems").filter(|max| items.len() > *max) {
        errors.push(Error::too_many(&at.path, items.len(), max));
    }
    if let Some(min) = count(schema, "minItems").filter(|min| items.len() < *min) {
        let detail = at.says(&format!("should have at least {min} items"));
        errors.push(Error::invalid(&at.path, items.len(), detail));
    }
    if flag(schema, "uniqueItems") && items.iter().enumerate().any(|(i, v)| items[..i].contains(v)) {
        errors.push(Error::invalid(&at.path, "", at.says("shouldn't contain duplicates")));
    }
    let kind = schema.get("x-kubernetes-list-type").and_then(Value::as_str);
    let key = |item: &Value| match kind {
        Some("map") => list_key(schema, item).as_ref().map(canonical),
        Some("set") => Some(canonical(item)),
        _ => None,
    };
    let old_items = old.and_then(Value::as_array).into_iter().flatten();
    // Of items with the same key the first counts.
    let known: HashMap<String, &Value> = old_items.rev().filter_map(|item| Some((key(item)?, item))).collect();
    if let Some(item_schema) = schema.get("items") {
        for (i, item) in items.iter().enumerate() {
            let before = if known.is_empty() { None } else { key(item).and_then(|key| known.get(&key).copied()) };
            check(item_schema, item, before, &at.index(i), false, errors);
        }
    }
}

/// Whether a schema has lists whose items must differ.
pub(super) fn has_unique_lists(schema: &Value) -> bool {
    let list = schema.get("x-kubernetes-list-type").and_then(Value::as_str);
    let below =
        properties(schema).into_iter().flat_map(Map::values).chain(additional(schema)).chain(schema.get("items"));
    matches!(list, Some("set" | "map")) || below.into_iter().any(has_unique_lists)
}

/// Items that are in a `set` or, by their keys, in a `map` list twice.
pub(super) fn duplicates(schema: &Value, value: &Value, at: &Path, errors: &mut ErrorList) {
    match value {
        Value::Object(map) => {
            let known = properties(schema);
            for (name, value) in map {
                if let Some(schema) = known.and_then(|k| k.get(name)) {
                    duplicates(schema, value, &at.child(name), errors);
                } else if let Some(schema) = additional(schema) {
                    duplicates(schema, value, &at.key(name), errors);
                }
            }
        }
        Value::Array(items) => {
            let key = |item: &Value| match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
                Some("set") => Some(item.clone()),
                Some("map") => list_key(schema, item),
                _ => None,
            };
            let mut seen = HashSet::new();
            for (i, key) in items.iter().enumerate().filter_map(|(i, item)| Some((i, key(item)?))) {
                if !seen.insert(canonical(&key)) {
                    errors.push(Error::duplicate(&at.index(i), &key));
                }
            }
            if let Some(schema) = schema.get("items") {
                items.iter().enumerate().for_each(|(i, item)| duplicates(schema, item, &at.index(i), errors));
            }
        }
        _ => {}
    }
}

/// The same text for equal values, in whatever order their fields are.
fn canonical(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let fields: BTreeMap<&str, String> = map.iter().map(|(name, v)| (name.as_str(), canonical(v))).collect();
            format!("{fields:?}")
        }
        Value::Array(items) => format!("{:?}", items.iter().map(canonical).collect::<Vec<_>>()),
        scalar => scalar.to_string(),
    }
}

fn check_object(schema: &Value, map: &Map<String, Value>, old: Option<&Value>, at: &Place, errors: &mut ErrorList) {
    if let Some(max) = count(schema, "maxProperties").filter(|max| map.len() > *max) {
        errors.push(Error::too_many(&at.path, map.len(), max));
    }
    if let Some(min) = count(schema, "minProperties").filter(|min| map.len() < *min) {
        let detail = at.says(&format!("should have at least {min} properties"));
        errors.push(Error::invalid(&at.path, map.len(), detail));
    }
    for name in schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        if !map.contains_key(name) {
            errors.push(Error::required(&at.path.child(name), ""));
        }
    }
    let known = properties(schema);
    let rest = additional(schema);
    for (name, value) in map {
        if let Some(schema) = known.and_then(|k| k.get(name)).or(rest) {
            let before = old.and_then(|o| o.get(name));
            check(schema, value, before, &at.child(name), false, errors);
        }
    }
}

/// allOf, anyOf, oneOf and not.
fn check_junctors(schema: &Value, value: &Value, at: &Place, errors: &mut ErrorList) {
    let list = |key: &str| schema.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let failures = |schema: &Value| {
        let mut errors = ErrorList::new();
        check(schema, value, None, at, false, &mut errors);
        errors
    };
    let name = if at.name.is_empty() { "<nil>" } else { &at.name };
    let mut refuse = |text: &str| {
        let detail = format!("\"{name}\" {text}");
        errors.push(Error::invalid(&at.path, "", detail));
    };
    let any = list("anyOf");
    if !any.is_empty() && any.iter().all(|s| !failures(s).is_empty()) {
        refuse("must validate at least one schema (anyOf)");
    }
    let one = list("oneOf");
    if !one.is_empty() {
        match one.iter().filter(|s| failures(s).is_empty()).count() {
            1 => {}
            0 => refuse("must validate one and only one schema (oneOf). Found none valid"),
            n => refuse(&format!("must validate one and only one schema (oneOf). Found {n} valid alternatives")),
        }
    }
    let all = list("allOf");
    let broken: ErrorList = all.iter().flat_map(&failures).collect();
    if !broken.is_empty() {
        refuse("must validate all the schemas (allOf)");
    }
    if let Some(not) = schema.get("not")
        && failures(not).is_empty()
    {
        refuse("must not validate the schema (not)");
    }
    errors.extend(broken);
}
