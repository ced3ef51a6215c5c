//! ConfigMaps, Secrets and ServiceAccounts.

use base64::{Engine, engine::general_purpose::STANDARD};
use isopod_api::{field::ErrorList, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, same},
};

const MAX: usize = 1024 * 1024;
const IMMUTABLE_SET: &str = "field is immutable when `immutable` is set";

/// `configmaps`.
pub(crate) struct ConfigMap;
/// `secrets`.
pub(crate) struct Secret;
/// `serviceaccounts`.
pub(crate) struct ServiceAccount;

/// Length of a base64 value when decoded.
fn decoded_len(v: &Value) -> usize {
    v.as_str().map(|s| s.trim_end_matches('=').len() * 3 / 4).unwrap_or_default()
}

fn decoded(v: &Value) -> Vec<u8> {
    v.as_str().and_then(|s| STANDARD.decode(s).ok()).unwrap_or_default()
}

/// An immutable object may neither be unlocked nor changed.
fn immutable(e: &mut Errs, new: &Value, old: &Value, fields: &[&str]) {
    if old["immutable"] != true {
        return;
    }
    if new["immutable"] != true {
        e.forbidden(&At::field(new, "immutable"), IMMUTABLE_SET);
    }
    for field in fields {
        if !same(&new[*field], &old[*field]) {
            e.forbidden(&At::field(new, field), IMMUTABLE_SET);
        }
    }
}

impl Strategy for ConfigMap {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let (data, binary) = (At::field(obj, "data"), At::field(obj, "binaryData"));
        let mut total = 0;
        for (key, value) in data.entries() {
            for message in names::config_map_key(key) {
                e.invalid_as(&value, key, &message);
            }
            if binary.v.get(key).is_some() {
                e.invalid_as(&value, key, "duplicate of key present in binaryData");
            }
            total += value.s().len();
        }
        for (key, value) in binary.entries() {
            for message in names::config_map_key(key) {
                e.invalid_as(&value, key, &message);
            }
            total += decoded_len(value.v);
        }
        if total > MAX {
            e.too_long(&At::field(obj, "[]"), MAX);
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        immutable(&mut e, new, old, &["data", "binaryData"]);
        e.0.extend(self.validate(cx, new));
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let count = table::count(&obj["data"]) + table::count(&obj["binaryData"]);
        vec![table::name(obj), json!(count), table::age(obj, now)]
    }
}

impl Strategy for Secret {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let data = At::field(obj, "data");
        let mut total = 0;
        for (key, value) in data.entries() {
            for message in names::config_map_key(key) {
                e.invalid_as(&value, key, &message);
            }
            total += decoded_len(value.v);
        }
        if total > MAX {
            e.too_long(&data, MAX);
        }
        by_type(&mut e, obj, &data);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        e.immutable(&At::field(new, "type"), &old["type"]);
        immutable(&mut e, new, old, &["data"]);
        e.0.extend(self.validate(cx, new));
        e.0
    }

    fn prepare_for_update(&self, _cx: &Context<'_>, new: &mut Value, old: &Value) {
        if new["type"].as_str().unwrap_or_default().is_empty() {
            new["type"] = old["type"].clone();
        }
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        if obj["type"] != "kubernetes.io/tls" {
            return Vec::new();
        }
        let certificate = decoded(&obj["data"]["tls.crt"]);
        let key = decoded(&obj["data"]["tls.key"]);
        let pem = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("-----BEGIN ");
        if !pem(&certificate) {
            return vec!["tls: failed to find any PEM data in certificate input".to_owned()];
        }
        if !pem(&key) {
            return vec!["tls: failed to find any PEM data in key input".to_owned()];
        }
        Vec::new()
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("type", obj["type"].as_str().unwrap_or_default().to_owned())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["type"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::or(&obj["type"], ""), json!(table::count(&obj["data"])), table::age(obj, now)]
    }
}

fn by_type(e: &mut Errs, obj: &Value, data: &At<'_>) {
    let required = |e: &mut Errs, key: &str| {
        if data.v.get(key).is_none() {
            e.required(&data.key(key), "");
        }
    };
    match obj["type"].as_str().unwrap_or_default() {
        "kubernetes.io/service-account-token" => {
            let name = "kubernetes.io/service-account.name";
            let annotations = At::field(obj, "metadata").get("annotations");
            if annotations.key(name).s().is_empty() {
                e.required(&annotations.key(name), "");
            }
        }
        "kubernetes.io/dockercfg" => docker(e, data, ".dockercfg"),
        "kubernetes.io/dockerconfigjson" => docker(e, data, ".dockerconfigjson"),
        "kubernetes.io/basic-auth" if data.v.get("username").is_none() && data.v.get("password").is_none() => {
            required(e, "username");
            required(e, "password");
        }
        "kubernetes.io/ssh-auth" if decoded_len(data.key("ssh-privatekey").v) == 0 => {
            e.required(&data.key("ssh-privatekey"), "");
        }
        "kubernetes.io/tls" => {
            required(e, "tls.crt");
            required(e, "tls.key");
        }
        _ => {}
    }
}

fn docker(e: &mut Errs, data: &At<'_>, key: &str) {
    let at = data.key(key);
    if !at.is_set() {
        return e.required(&at, "");
    }
    let bytes = decoded(at.v);
    if let Err(message) = json_object(&bytes) {
        e.invalid_as(&at, "<secret contents redacted>", &message);
    }
}

/// Go's message when bytes are not a JSON object.
fn json_object(bytes: &[u8]) -> Result<(), String> {
    match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(_) | Value::Null) => Ok(()),
        Ok(other) => {
            let kind = match other {
                Value::String(_) => "string",
                Value::Number(_) => "number",
                Value::Bool(_) => "bool",
                _ => "array",
            };
            Err(format!("json: cannot unmarshal {kind} into Go value of type map[string]interface {{}}"))
        }
        Err(error) if error.is_eof() => Err("unexpected end of JSON input".to_owned()),
        Err(error) => {
            let c = bytes.get(error.column().saturating_sub(1)).map(|b| char::from(*b)).unwrap_or(' ');
            Err(format!("invalid character '{c}' looking for beginning of value"))
        }
    }
}

impl Strategy for ServiceAccount {
    fn warnings(&self, _cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let key = "kubernetes.io/enforce-mountable-secrets";
        let set = |obj: &Value| obj["metadata"]["annotations"].get(key).is_some();
        if set(obj) && !old.is_some_and(set) {
            return vec![format!(
                "metadata.annotations[{key}]: deprecated in v1.32+; prefer separate namespaces to isolate access to mounted secrets"
            )];
        }
        Vec::new()
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::age(obj, now)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_config() {
        assert_eq!(json_object(b"x"), Err("invalid character 'x' looking for beginning of value".to_owned()));
        assert_eq!(json_object(b"{}"), Ok(()));
        let array = "json: cannot unmarshal array into Go value of type map[string]interface {}";
        assert_eq!(json_object(b"[1]"), Err(array.to_owned()));
    }
}
