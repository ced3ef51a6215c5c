//! From any JSON value to an object of a definition: what Go's decoder followed by its encoder would leave.

use serde_json::{Map, Number, Value};

use super::{Definition, Field, Type, Zero, go_time, json};
use crate::{meta, quantity::Quantity};

/// A value of the wrong type; Display is upstream's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(pub String);

struct Decoder<'a> {
    duplicates: &'a [String],
    strict: Vec<String>,
    error: Option<String>,
    /// Path for strict errors.
    path: String,
    /// Field names and struct of type errors.
    fields: Vec<&'a str>,
    owner: &'a str,
}

/// Prunes, type-checks and normalises `value` in place. `duplicates` are the paths of duplicate keys the parser saw.
/// Returns the strict errors; the value is usable even then.
pub fn decode(def: &Definition, value: &mut Value, duplicates: &[String]) -> Result<Vec<String>, DecodeError> {
    let mut decoder =
        Decoder { duplicates, strict: Vec::new(), error: None, path: String::new(), fields: Vec::new(), owner: "" };
    let Value::Object(map) = value else {
        return Err(DecodeError(format!(
            "json: cannot unmarshal {} into Go value of type {}",
            json::kind(value),
            def.go_name()
        )));
    };
    decoder.object(def, map);
    match decoder.error {
        Some(error) => Err(DecodeError(error)),
        None => Ok(decoder.strict),
    }
}

/// Removes unknown fields and nulls; type errors drop the field silently. Returns the strict errors.
pub fn prune(def: &Definition, value: &mut Value) -> Vec<String> {
    let mut decoder = Decoder {
        duplicates: &[],
        strict: Vec::new(),
        error: None,
        path: String::new(),
        fields: Vec::new(),
        owner: "",
    };
    if let Value::Object(map) = value {
        decoder.object(def, map);
    }
    decoder.strict
}

fn go_type(ty: &Type) -> String {
    match ty {
        Type::Any => "interface {}".into(),
        Type::String => "string".into(),
        Type::Bytes => "[]uint8".into(),
        Type::Bool => "bool".into(),
        Type::Int32 => "int32".into(),
        Type::Int64 => "int64".into(),
        Type::Double => "float64".into(),
        Type::Quantity => "resource.Quantity".into(),
        Type::Time => "v1.Time".into(),
        Type::MicroTime => "v1.MicroTime".into(),
        Type::IntOrString => "intstr.IntOrString".into(),
        Type::Object(def) => def.get().go_name().to_owned(),
        Type::Map(map) => format!("map[string]{}", go_type(&map.value)),
        Type::List(list) => format!("[]{}", go_type(&list.item)),
    }
}

/// Go's zero of a type, as JSON.
pub(super) fn is_zero(v: &Value) -> bool {
    match v {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

fn keep(def: &Definition, field: &Field, value: &Value) -> bool {
    field.zero != Zero::Drop || !is_zero(value) || empty_counts(def, field, value)
}

/// Lists that are only defaulted when they are missing: an empty one stays empty, for validation to refuse.
fn empty_counts(def: &Definition, field: &Field, value: &Value) -> bool {
    value.is_array() && &*field.name == "policies" && def.name.ends_with(".HPAScalingRules")
}

impl<'a> Decoder<'a> {
    fn fail(&mut self, message: String) {
        self.error.get_or_insert(message);
    }

    /// A type error. `what` is `string`, `number 1.5`, ...
    fn mismatch(&mut self, what: &str, ty: &str) {
        let target = if self.owner.is_empty() {
            format!("Go value of type {ty}")
        } else {
            format!("Go struct field {}.{} of type {ty}", self.owner, self.fields.join("."))
        };
        self.fail(format!("json: cannot unmarshal {what} into {target}"));
    }

    fn object<'d: 'a>(&mut self, def: &'d Definition, map: &mut Map<String, Value>) {
        let len = self.path.len();
        let owner = self.owner;
        for (key, mut value) in std::mem::take(map) {
            if len > 0 {
                self.path.push('.');
            }
            self.path.push_str(&key);
            if let Some(field) = def.field(&key) {
                if self.duplicates.contains(&self.path) {
                    self.strict.push(format!("duplicate field {}", crate::text::quote(&self.path)));
                }
                self.fields.push(&field.name);
                self.owner = def.short_name();
                let ok = !value.is_null() && self.value(&field.ty, &mut value);
                self.owner = owner;
                self.fields.pop();
                if ok && keep(def, field, &value) {
                    map.insert(key, value);
                }
            } else if def.opaque {
                map.insert(key, value);
            } else {
                self.strict.push(format!("unknown field {}", crate::text::quote(&self.path)));
            }
            self.path.truncate(len);
        }
    }

    /// Whether the value is kept.
    fn value<'d: 'a>(&mut self, ty: &'d Type, value: &mut Value) -> bool {
        match (ty, &mut *value) {
            (Type::Any, _) | (Type::String, Value::String(_)) | (Type::Bool, Value::Bool(_)) => true,
            (Type::Double, Value::Number(_)) => true,
            (Type::Int32, Value::Number(n)) => self.integer(n, i64::from(i32::MIN)..=i64::from(i32::MAX), "int32"),
            (Type::Int64, Value::Number(n)) => self.integer(n, i64::MIN..=i64::MAX, "int64"),
            (Type::Bytes, Value::String(s)) => match base64_error(s) {
                None => true,
                Some(at) => {
                    self.fail(format!("illegal base64 data at input byte {at}"));
                    false
                }
            },
            (Type::Quantity, _) => match Quantity::from_json(value) {
                Ok(quantity) => {
                    *value = quantity.to_string().into();
                    true
                }
                Err(error) => {
                    self.fail(error.to_string());
                    false
                }
            },
            (Type::Time | Type::MicroTime, Value::String(s)) => {
                let micro = matches!(ty, Type::MicroTime);
                match go_time::parse(s, if micro { go_time::MICRO_TIME } else { go_time::TIME }) {
                    Ok(time) => {
                        *s = if micro { meta::micro_time(time) } else { meta::time(time) };
                        true
                    }
                    Err(error) => {
                        self.fail(error);
                        false
                    }
                }
            }
            (Type::IntOrString, Value::String(_)) => true,
            (Type::IntOrString, Value::Number(n)) => {
                let ok = n.as_i64().is_some_and(|n| i32::try_from(n).is_ok());
                if !ok {
                    self.fail(format!("json: cannot unmarshal number {n} into Go value of type int32"));
                }
                ok
            }
            (Type::Object(def), Value::Object(map)) => {
                self.object(def.get(), map);
                true
            }
            (Type::Map(map_type), Value::Object(map)) => {
                let len = self.path.len();
                for (key, mut value) in std::mem::take(map) {
                    self.path.push('.');
                    self.path.push_str(&key);
                    if self.duplicates.contains(&self.path) {
                        self.strict.push(format!("duplicate field {}", crate::text::quote(&self.path)));
                    }
                    if value.is_null() {
                        value = zero_value(&map_type.value);
                    }
                    if value.is_null() || self.value(&map_type.value, &mut value) {
                        map.insert(key, value);
                    }
                    self.path.truncate(len);
                }
                true
            }
            (Type::List(list), Value::Array(items)) => {
                let len = self.path.len();
                for (i, item) in items.iter_mut().enumerate() {
                    self.path.push_str(&format!("[{i}]"));
                    if item.is_null() {
                        *item = zero_value(&list.item);
                    }
                    if !item.is_null() {
                        self.value(&list.item, item);
                    }
                    self.path.truncate(len);
                }
                true
            }
            (Type::Time | Type::MicroTime, other) => {
                let what = json::kind(other);
                self.fail(format!("json: cannot unmarshal {what} into Go value of type string"));
                false
            }
            (Type::IntOrString, other) => {
                let what = json::kind(other);
                self.fail(format!("json: cannot unmarshal {what} into Go value of type int32"));
                false
            }
            (ty, other) => {
                let what = json::kind(other);
                self.mismatch(what, &go_type(ty));
                false
            }
        }
    }

    fn integer(&mut self, n: &Number, range: std::ops::RangeInclusive<i64>, ty: &str) -> bool {
        if n.as_i64().is_some_and(|n| range.contains(&n)) {
            return true;
        }
        self.mismatch(&format!("number {n}"), ty);
        false
    }
}

/// What `null` decodes to where the element has to exist.
fn zero_value(ty: &Type) -> Value {
    match ty {
        Type::String | Type::Bytes => "".into(),
        Type::Bool => false.into(),
        Type::Int32 | Type::Int64 | Type::Double | Type::IntOrString => 0.into(),
        Type::Quantity => "0".into(),
        Type::Object(_) => Value::Object(Map::new()),
        Type::Any | Type::Time | Type::MicroTime | Type::Map(_) | Type::List(_) => Value::Null,
    }
}

/// Index of the first byte Go's strict base64 decoder refuses.
fn base64_error(s: &str) -> Option<usize> {
    let symbols: Vec<(usize, u8)> = s.bytes().enumerate().filter(|(_, b)| !matches!(b, b'\r' | b'\n')).collect();
    let is_symbol = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
    for (i, quad) in symbols.chunks(4).enumerate() {
        let last = (i + 1) * 4 >= symbols.len();
        for (j, (at, b)) in quad.iter().enumerate() {
            if is_symbol(*b) {
                continue;
            }
            let padding = *b == b'=' && last && j >= 2 && quad[j..].iter().all(|(_, b)| *b == b'=');
            if !padding {
                return Some(*at);
            }
        }
        if quad.len() < 4 {
            return Some(s.len() - quad.len());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gvk::Gvk,
        schema::{json, lookup},
    };
    use serde_json::json;

    fn run(gvk: (&str, &str), text: &str) -> (Result<Vec<String>, DecodeError>, Value) {
        let def = lookup(&Gvk::from_api_version(gvk.0, gvk.1)).unwrap();
        let mut parsed = json::parse(text.as_bytes()).unwrap();
        (decode(def, &mut parsed.value, &parsed.duplicates), parsed.value)
    }

    #[test]
    fn strict_errors_in_order() {
        let (errors, value) = run(
            ("v1", "ConfigMap"),
            r#"{"metadata":{"name":"a","bogus":1},"data":{"a":"1","a":"2"},"unknown":{"x":1}}"#,
        );
        assert_eq!(
            errors.unwrap(),
            ["unknown field \"metadata.bogus\"", "duplicate field \"data.a\"", "unknown field \"unknown\""]
        );
        assert_eq!(value, json!({"metadata": {"name": "a"}, "data": {"a": "2"}}));
    }

    #[test]
    fn type_errors() {
        for (gvk, text, want) in [
            (
                ("apps/v1", "Deployment"),
                r#"{"spec":{"replicas":"x"}}"#,
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                ("v1", "ConfigMap"),
                r#"{"data":{"a":1}}"#,
                "json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
            ),
            (
                ("v1", "Pod"),
                r#"{"spec":{"containers":[{"env":[{"name":"a","value":1}]}]}}"#,
                "json: cannot unmarshal number into Go struct field EnvVar.spec.containers.env.value of type string",
            ),
            (("v1", "Secret"), r#"{"data":{"a":"*"}}"#, "illegal base64 data at input byte 0"),
            (
                ("v1", "Pod"),
                r#"{"spec":{"containers":{}}}"#,
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
        ] {
            assert_eq!(run(gvk, text).0.unwrap_err().to_string(), want);
        }
    }

    #[test]
    fn normalises() {
        let (_, value) = run(
            ("v1", "Pod"),
            r#"{"metadata":{"creationTimestamp":null,"labels":{},"deletionTimestamp":"2020-01-02T03:04:05.5+01:00"},
                "spec":{"hostNetwork":false,"automountServiceAccountToken":false,"nodeName":"",
                "containers":[{"name":"a","resources":{"limits":{"cpu":0.5}},"args":[]}]}}"#,
        );
        assert_eq!(
            value,
            json!({"metadata": {"deletionTimestamp": "2020-01-02T02:04:05Z"},
                "spec": {"automountServiceAccountToken": false,
                    "containers": [{"name": "a", "resources": {"limits": {"cpu": "500m"}}}]}})
        );
    }
}
