//! Validators shared by the kinds.
//!
//! A validator walks an object with [`At`] (a value and the path to it; missing fields read as null) and reports into
//! [`Errs`]. Order of checks is the order clients see, so it follows upstream's. Nothing here changes an object or reads
//! other objects.

use isopod_api::field::{Error, ErrorList, Path};
use serde_json::Value;

pub(crate) mod conditions;
pub(crate) mod container;
pub(crate) mod env;
pub(crate) mod internal;
pub mod meta;
pub(crate) mod net;
pub(crate) mod pod_annotations;
pub(crate) mod pod_os;
pub(crate) mod pod_spec;
pub(crate) mod pod_update;
pub(crate) mod pod_warnings;
pub(crate) mod probe;
pub(crate) mod resources;
pub(crate) mod scheduling;
pub(crate) mod security;
pub(crate) mod selector;
pub(crate) mod template;
pub(crate) mod volume;
pub(crate) mod volume_source;

static NULL: Value = Value::Null;

/// `must be greater than or equal to 0`.
pub(crate) const NON_NEGATIVE: &str = "must be greater than or equal to 0";
/// `field is immutable`.
pub(crate) const IMMUTABLE: &str = "field is immutable";

/// A value inside an object and the path to it.
#[derive(Clone)]
pub(crate) struct At<'a> {
    pub(crate) path: Path,
    pub(crate) v: &'a Value,
}

impl<'a> At<'a> {
    /// A top-level field of `obj`.
    pub(crate) fn field(obj: &'a Value, name: &str) -> Self {
        At { path: Path::new(name), v: obj.get(name).unwrap_or(&NULL) }
    }

    /// A value at an explicit path.
    pub(crate) fn new(path: Path, v: &'a Value) -> Self {
        At { path, v }
    }

    /// A field, or null; `name` may be dotted.
    pub(crate) fn get(&self, name: &str) -> At<'a> {
        let (mut path, mut v) = (self.path.clone(), self.v);
        for part in name.split('.') {
            path = path.child(part);
            v = v.get(part).unwrap_or(&NULL);
        }
        At { path, v }
    }

    /// The value of a map's key (path with brackets).
    pub(crate) fn key(&self, key: &str) -> At<'a> {
        At { path: self.path.key(key), v: self.v.get(key).unwrap_or(&NULL) }
    }

    /// The items of a list.
    pub(crate) fn items(&self) -> Vec<At<'a>> {
        let list = self.v.as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().enumerate().map(|(i, v)| At { path: self.path.index(i), v }).collect()
    }

    /// The entries of a map in key order.
    pub(crate) fn entries(&self) -> Vec<(&'a str, At<'a>)> {
        let mut out: Vec<_> = match self.v.as_object() {
            Some(map) => map.iter().map(|(k, v)| (k.as_str(), At { path: self.path.key(k), v })).collect(),
            None => Vec::new(),
        };
        out.sort_by(|a, b| a.0.cmp(b.0));
        out
    }

    /// The string, or empty.
    pub(crate) fn s(&self) -> &'a str {
        self.v.as_str().unwrap_or_default()
    }

    /// The integer, if it is one.
    pub(crate) fn int(&self) -> Option<i64> {
        self.v.as_i64()
    }

    /// The integer, or 0.
    pub(crate) fn int0(&self) -> i64 {
        self.v.as_i64().unwrap_or_default()
    }

    /// True only for `true`.
    pub(crate) fn is_true(&self) -> bool {
        self.v.as_bool().unwrap_or_default()
    }

    /// Whether the field is present.
    pub(crate) fn is_set(&self) -> bool {
        !self.v.is_null()
    }

    /// Number of items or entries.
    pub(crate) fn len(&self) -> usize {
        match self.v {
            Value::Array(a) => a.len(),
            Value::Object(o) => o.len(),
            _ => 0,
        }
    }

    /// The strings of a list.
    pub(crate) fn strings(&self) -> Vec<&'a str> {
        self.v.as_array().map(|a| a.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
    }
}

/// Collects errors.
#[derive(Default)]
pub(crate) struct Errs(pub(crate) ErrorList);

impl Errs {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn required(&mut self, at: &At<'_>, detail: &str) {
        self.0.push(Error::required(&at.path, detail));
    }

    /// Invalid value, shown as it is.
    pub(crate) fn invalid(&mut self, at: &At<'_>, detail: &str) {
        self.0.push(Error::invalid(&at.path, at.v.clone(), detail));
    }

    /// Invalid string (a missing one is shown as `""`).
    pub(crate) fn invalid_str(&mut self, at: &At<'_>, detail: &str) {
        self.invalid_as(at, at.s(), detail);
    }

    /// Invalid value, shown as `value`.
    pub(crate) fn invalid_as(&mut self, at: &At<'_>, value: impl Into<Value>, detail: &str) {
        self.0.push(Error::invalid(&at.path, value.into(), detail));
    }

    /// A structure that does not fit together; its value is not shown.
    pub(crate) fn invalid_structure(&mut self, at: &At<'_>, detail: &str) {
        self.0.push(Error::invalid_without_value(&at.path, detail));
    }

    /// One invalid string per message.
    pub(crate) fn messages(&mut self, at: &At<'_>, messages: Vec<String>) {
        for message in messages {
            self.invalid_str(at, &message);
        }
    }

    pub(crate) fn unsupported(&mut self, at: &At<'_>, supported: &[&str]) {
        let value = if at.v.is_null() { Value::String(String::new()) } else { at.v.clone() };
        self.0.push(Error::not_supported(&at.path, value, supported));
    }

    pub(crate) fn unsupported_as(&mut self, at: &At<'_>, value: impl Into<Value>, supported: &[&str]) {
        self.0.push(Error::not_supported(&at.path, value.into(), supported));
    }

    pub(crate) fn forbidden(&mut self, at: &At<'_>, detail: &str) {
        self.0.push(Error::forbidden(&at.path, detail));
    }

    pub(crate) fn duplicate(&mut self, at: &At<'_>, value: impl Into<Value>) {
        self.0.push(Error::duplicate(&at.path, value.into()));
    }

    pub(crate) fn not_found(&mut self, at: &At<'_>, value: impl Into<Value>) {
        self.0.push(Error::not_found(&at.path, value.into()));
    }

    pub(crate) fn too_long(&mut self, at: &At<'_>, max: usize) {
        self.0.push(Error::too_long(&at.path, max));
    }

    pub(crate) fn too_many(&mut self, at: &At<'_>, actual: usize, max: usize) {
        self.0.push(Error::too_many(&at.path, actual, max));
    }

    /// A string that must be one of `supported`; empty is unsupported too.
    pub(crate) fn one_of(&mut self, at: &At<'_>, supported: &[&str]) {
        if !supported.contains(&at.s()) {
            self.unsupported(at, supported);
        }
    }

    /// A string that must be one of `supported` when present.
    pub(crate) fn one_of_if_set(&mut self, at: &At<'_>, supported: &[&str]) {
        if at.is_set() {
            self.one_of(at, supported);
        }
    }

    /// Like [`Self::one_of`], but empty is `Required value`.
    pub(crate) fn required_one_of(&mut self, at: &At<'_>, supported: &[&str]) {
        if at.s().is_empty() {
            self.required(at, "");
        } else {
            self.one_of(at, supported);
        }
    }

    /// An integer that must not be negative.
    pub(crate) fn non_negative(&mut self, at: &At<'_>) {
        if at.int().is_some_and(|n| n < 0) {
            self.invalid(at, NON_NEGATIVE);
        }
    }

    /// `field is immutable` unless `new` and `old` are equal.
    pub(crate) fn immutable(&mut self, new: &At<'_>, old: &Value) {
        if !same(new.v, old) {
            self.invalid(new, IMMUTABLE);
        }
    }

    /// A DNS-1123 label.
    pub(crate) fn dns_label(&mut self, at: &At<'_>) {
        self.messages(at, isopod_api::names::dns1123_label(at.s()));
    }

    /// A DNS-1123 subdomain.
    pub(crate) fn dns_subdomain(&mut self, at: &At<'_>) {
        self.messages(at, isopod_api::names::dns1123_subdomain(at.s()));
    }

    /// A qualified name.
    pub(crate) fn qualified_name(&mut self, at: &At<'_>) {
        self.messages(at, isopod_api::names::qualified_name(at.s()));
    }

    /// A port number, 1 to 65535.
    pub(crate) fn port(&mut self, at: &At<'_>) {
        if !(1..=65535).contains(&at.int0()) {
            self.invalid_as(at, at.int0(), "must be between 1 and 65535, inclusive");
        }
    }

    /// A port number or a port name.
    pub(crate) fn port_or_name(&mut self, at: &At<'_>) {
        if at.v.is_string() { self.messages(at, isopod_api::names::port_name(at.s())) } else { self.port(at) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// All containers of a pod spec, init containers first.
pub(crate) fn containers<'a>(spec: &At<'a>) -> Vec<At<'a>> {
    ["initContainers", "containers", "ephemeralContainers"].iter().flat_map(|list| spec.get(list).items()).collect()
}

/// A count that only goes up.
pub(crate) fn not_decremented(e: &mut Errs, new: &At<'_>, old: &Value) {
    if old.as_i64().is_some_and(|before| new.int().is_none_or(|now| now < before)) {
        e.invalid_as(new, new.int0(), "cannot be decremented");
    }
}

/// Equality as Go's semantic DeepEqual sees it: null, absent, empty list and empty map are the same.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            x.iter().all(|(k, v)| same(v, y.get(k).unwrap_or(&NULL)))
                && y.iter().all(|(k, v)| x.contains_key(k) || same(&NULL, v))
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(a, b)| same(a, b)),
        (Value::Null, Value::Object(o)) | (Value::Object(o), Value::Null) => o.is_empty(),
        (Value::Null, Value::Array(o)) | (Value::Array(o), Value::Null) => o.is_empty(),
        _ => a == b,
    }
}

/// A non-negative integer or a percentage (`maxSurge`, `minAvailable`).
pub(crate) fn positive_int_or_percent(e: &mut Errs, at: &At<'_>) {
    match at.v {
        Value::String(s) if !is_percent(s) => e.invalid(
            at,
            "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
        ),
        Value::Number(_) => e.non_negative(at),
        _ => {}
    }
}

/// A percentage must not be over 100.
pub(crate) fn at_most_100_percent(e: &mut Errs, at: &At<'_>) {
    if percent(at.v).is_some_and(|p| p > 100) {
        e.invalid(at, "must not be greater than 100%");
    }
}

fn is_percent(s: &str) -> bool {
    s.strip_suffix('%').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The number of a percentage string.
pub(crate) fn percent(v: &Value) -> Option<i64> {
    v.as_str().filter(|s| is_percent(s)).and_then(|s| s.trim_end_matches('%').parse().ok())
}

/// The integer or percentage as a number, 0 when absent.
pub(crate) fn int_or_percent_value(v: &Value) -> i64 {
    v.as_i64().or_else(|| percent(v)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn absent_and_empty_are_the_same() {
        assert!(same(&json!({"a": {}, "b": [1]}), &json!({"b": [1], "c": null})));
        assert!(!same(&json!({"a": 1}), &json!({"a": 2})));
        assert!(!same(&json!({}), &json!({"a": false})));
    }

    #[test]
    fn percentages() {
        assert_eq!(percent(&json!("25%")), Some(25));
        assert_eq!(percent(&json!("%")), None);
        assert_eq!(percent(&json!(3)), None);
    }
}
