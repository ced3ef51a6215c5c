//! Protobuf <-> JSON of the built-in kinds (`application/vnd.kubernetes.protobuf`).
//!
//! - [`encode`] / [`decode`]: an object, status or list with the `k8s\0` envelope.
//! - [`List`]: what surrounds the items of a list whose messages are there already.
//! - [`watch_event`]: one frame's payload of a watch; the caller adds the length prefix.
//!
//! Driven by a table of messages: name -> fields with number, JSON name and type. A decoded object has everything Go's
//! encoder wrote, also zero values: run it through [`crate::schema::decode`] like any other input. Custom resources have
//! no protobuf form.

mod list;
mod node;
mod read;
mod special;
pub(crate) mod write;

use std::{
    collections::HashMap,
    sync::{LazyLock, OnceLock},
};

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::gvk::Gvk;
pub use list::List;
use node::Node;

/// What every message starts with.
pub const MAGIC: &[u8] = b"k8s\0";

/// Bytes that are not a message, or an object that has none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The envelope is missing.
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    NoMagic,
    /// The bytes end in the middle of something.
    #[error("unexpected EOF")]
    Truncated,
    /// A field has the wrong wire type or bad content.
    #[error("proto: wrong content for field {0}")]
    Field(String),
    /// The kind has no protobuf form.
    #[error("no protobuf message for {0}")]
    NoMessage(String),
    /// The value does not fit the field.
    #[error("cannot encode field {0}")]
    Value(String),
}

/// Type of a field.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    String,
    Int32,
    Int64,
    Bool,
    Double,
    Bytes,
    Message(&'static Message),
}

/// How often a field occurs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Single,
    Repeated,
    /// A map with string keys.
    Map,
    /// A message whose fields belong to the parent in JSON.
    Inline,
}

/// One field.
#[derive(Clone, Copy)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) shape: Shape,
}

/// One message of the table. Its fields are parsed when they are first needed.
pub(crate) struct Message {
    name: &'static str,
    special: Option<special::Special>,
    raw: &'static RawValue,
    parsed: OnceLock<Box<[Field]>>,
}

impl Message {
    /// The fields by number.
    pub(crate) fn fields(&'static self) -> &'static [Field] {
        self.parsed.get_or_init(|| parse(self.raw))
    }
}

#[derive(Deserialize)]
struct RawTable(#[serde(borrow)] HashMap<&'static str, &'static RawValue>);

static MESSAGES: LazyLock<HashMap<&'static str, Message>> = LazyLock::new(|| {
    let table: RawTable = serde_json::from_str(include_str!("../../data/protobuf.json"))
        .expect("the protobuf table is part of the program");
    let message = |(name, raw)| (name, Message { name, special: special::special(name), raw, parsed: OnceLock::new() });
    table.0.into_iter().map(message).collect()
});

fn kind(text: &'static str) -> Kind {
    match text {
        "string" => Kind::String,
        "int32" | "uint32" => Kind::Int32,
        "int64" | "uint64" => Kind::Int64,
        "bool" => Kind::Bool,
        "double" => Kind::Double,
        "bytes" => Kind::Bytes,
        name => Kind::Message(message(name).expect("the protobuf table is part of the program")),
    }
}

fn parse(raw: &'static RawValue) -> Box<[Field]> {
    let rows: Vec<Vec<&'static RawValue>> =
        serde_json::from_str(raw.get()).expect("the protobuf table is part of the program");
    let word = |cell: &&'static RawValue| cell.get().trim_matches('"');
    let mut fields: Vec<Field> = rows
        .iter()
        .filter_map(|row| {
            let (number, name, ty) = (row.first()?.get().parse().ok()?, word(row.get(1)?), word(row.get(2)?));
            let flag = row.get(3).map(word);
            let (ty, shape) = match (ty.strip_prefix("map "), flag) {
                (Some(value), _) => (value, Shape::Map),
                (None, Some("r")) => (ty, Shape::Repeated),
                (None, Some("i")) => (ty, Shape::Inline),
                (None, _) => (ty, Shape::Single),
            };
            Some(Field { number, name, kind: kind(ty), shape })
        })
        .collect();
    fields.sort_by_key(|f| f.number);
    fields.into()
}

/// A message by name.
pub(crate) fn message(name: &str) -> Option<&'static Message> {
    MESSAGES.get(name)
}

/// The message of a kind.
fn message_of(gvk: &Gvk) -> Result<&'static Message, Error> {
    let found = crate::schema::lookup(gvk)
        .and_then(|def| message(&format!("k8s.io.{}", def.name.strip_prefix("io.k8s.")?.replace('-', "_"))));
    let meta = || message(&format!("k8s.io.apimachinery.pkg.apis.meta.v1.{}", gvk.kind));
    found.or_else(meta).ok_or_else(|| Error::NoMessage(gvk.to_string()))
}

/// Whether a kind has a protobuf form.
pub fn supported(gvk: &Gvk) -> bool {
    message_of(gvk).is_ok()
}

/// Encodes an object with its envelope.
pub fn encode(obj: &Value) -> Result<Vec<u8>, Error> {
    Ok(seal(&Gvk::of(obj), &encode_message(obj)?))
}

/// Encodes an object without its envelope, as lists have their items.
pub fn encode_message(obj: &Value) -> Result<Vec<u8>, Error> {
    encode_node(&obj.into())
}

/// The same of an object's JSON.
pub fn encode_json(json: &[u8]) -> Result<Vec<u8>, Error> {
    encode_node(&serde_json::from_slice(json).map_err(|error| Error::Value(error.to_string()))?)
}

fn encode_node(node: &Node<'_>) -> Result<Vec<u8>, Error> {
    let member = |name| node.get(name).and_then(Node::text).unwrap_or_default();
    let gvk = Gvk::from_api_version(member("apiVersion"), member("kind"));
    let mut raw = Vec::with_capacity(2048);
    write::message(message_of(&gvk)?, node, &mut raw)?;
    raw.shrink_to_fit();
    Ok(raw)
}

/// Puts a message into the envelope.
pub fn seal(gvk: &Gvk, raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(raw.len() + 64);
    out.extend_from_slice(MAGIC);
    write::bytes(1, &type_meta(gvk), &mut out);
    write::bytes(2, raw, &mut out);
    out.extend_from_slice(List::END);
    out
}

/// The envelope's TypeMeta.
fn type_meta(gvk: &Gvk) -> Vec<u8> {
    let mut out = Vec::new();
    write::text(1, &gvk.api_version(), &mut out);
    write::text(2, &gvk.kind, &mut out);
    out
}

/// Decodes an object with its envelope.
pub fn decode(bytes: &[u8]) -> Result<Value, Error> {
    let body = bytes.strip_prefix(MAGIC).ok_or(Error::NoMagic)?;
    let (mut type_meta, mut raw) = (&b""[..], &b""[..]);
    for field in read::fields(body) {
        match field? {
            (1, read::Wire::Bytes(bytes)) => type_meta = bytes,
            (2, read::Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (mut api_version, mut kind) = (String::new(), String::new());
    for field in read::fields(type_meta) {
        match field? {
            (1, read::Wire::Bytes(bytes)) => api_version = String::from_utf8_lossy(bytes).into_owned(),
            (2, read::Wire::Bytes(bytes)) => kind = String::from_utf8_lossy(bytes).into_owned(),
            _ => {}
        }
    }
    let gvk = Gvk::from_api_version(&api_version, &kind);
    let mut out = serde_json::Map::new();
    out.insert("kind".into(), kind.into());
    out.insert("apiVersion".into(), api_version.into());
    read::message_into(message_of(&gvk)?, raw, &mut out)?;
    Ok(Value::Object(out))
}

/// The payload of one watch frame: the event's type and the encoded object (with its envelope).
pub fn watch_event(event: &str, object: &[u8]) -> Vec<u8> {
    let mut raw = Vec::with_capacity(object.len() + 8);
    write::bytes(1, object, &mut raw);
    let mut out = Vec::with_capacity(raw.len() + 16);
    write::text(1, event, &mut out);
    write::bytes(2, &raw, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn round_trip(obj: Value) {
        let bytes = encode(&obj).unwrap();
        let mut back = decode(&bytes).unwrap();
        let mut want = obj;
        let def = crate::schema::lookup(&Gvk::of(&want)).unwrap();
        crate::schema::decode(def, &mut want, &[]).unwrap();
        crate::schema::decode(def, &mut back, &[]).unwrap();
        crate::schema::fill(def, &mut want);
        crate::schema::fill(def, &mut back);
        assert_eq!(back, want);
    }

    #[test]
    fn objects_survive() {
        round_trip(json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "creationTimestamp": "2024-01-02T03:04:05Z", "generation": 3,
                "labels": {"a": "b", "c": ""},
                "managedFields": [{"manager": "m", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}}}]},
            "spec": {"nodeName": "n", "automountServiceAccountToken": false, "priority": -5,
                "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "s", "secret": {"secretName": "x"}}],
                "containers": [{"name": "c", "command": ["a", ""], "resources": {"limits": {"cpu": "500m"}},
                    "env": [{"name": "E", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "k"}}}],
                    "livenessProbe": {"httpGet": {"port": "http", "path": "/"}, "periodSeconds": 3},
                    "readinessProbe": {"tcpSocket": {"port": 80}}}],
                "ephemeralContainers": [{"name": "e", "image": "i", "targetContainerName": "c"}]}}));
        round_trip(
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"a": "AAEC", "b": ""}}),
        );
        round_trip(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"},
            "spec": {"renewTime": "2024-01-02T03:04:05.123456Z", "leaseDurationSeconds": 40}}));
        round_trip(json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": "c"},
            "data": {"spec": {"x": [1, 2]}}, "revision": 7}));
        round_trip(json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "metadata": {}, "spec": {"user": "u", "extra": {"scopes": ["a", "b"]}}}));
        round_trip(
            json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "x"},
            "spec": {"group": "g", "scope": "Namespaced", "names": {"kind": "X", "plural": "xs"}, "versions": [{"name": "v1",
                "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "default": {"a": 1},
                "additionalProperties": {"type": "string"}, "properties": {"l": {"type": "array", "items": {"type": "integer",
                "maximum": 2.5, "enum": [1, "x"]}}}, "x-kubernetes-list-map-keys": ["a"]}}}]}}),
        );
    }

    #[test]
    fn known_bytes() {
        let bytes =
            encode(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}}))
                .unwrap();
        assert_eq!(
            bytes,
            b"k8s\0\n\x0f\n\x02v1\x12\x09ConfigMap\x12\x0d\n\x03\n\x01a\x12\x06\n\x01k\x12\x01v\x1a\x00\"\x00"
        );
        assert_eq!(decode(b"{}").unwrap_err(), Error::NoMagic);
        assert_eq!(decode(b"k8s\0\x12\xff").unwrap_err(), Error::Truncated);
        assert!(encode(&json!({"apiVersion": "x.example.com/v1", "kind": "Thing"})).is_err());
    }

    #[test]
    fn lists_statuses_and_events() {
        round_trip(json!({"apiVersion": "v1", "kind": "ConfigMapList", "metadata": {"resourceVersion": "5"},
            "items": [{"metadata": {"name": "a"}}, {"metadata": {"name": "b"}}]}));
        let status = crate::status::Status::not_found(&crate::gvk::GroupResource::new("", "pods"), "a").to_value();
        let back = decode(&encode(&status).unwrap()).unwrap();
        assert_eq!((&back["code"], &back["details"]["name"]), (&json!(404), &json!("a")));
        let event = watch_event("ADDED", b"x");
        assert_eq!(event, b"\n\x05ADDED\x12\x03\n\x01x");
    }
}
