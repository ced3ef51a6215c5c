//! One stored object: its JSON bytes and what selectors need.
//!
//! The stored form has an empty `resourceVersion`; the number is spliced in when the commit's revision is known. Metadata
//! comes right behind `kind` and `apiVersion` and starts with the identity, so the first `"resourceVersion":""` in the
//! bytes is the one of the object itself: quotes inside names would be escaped.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::registry::strategy::Strategy;

const PLACEHOLDER: &[u8] = b"\"resourceVersion\":\"\"";

/// Order of metadata's members, identity first.
const METADATA_ORDER: [&str; 14] = [
    "name",
    "generateName",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
];

/// A stored object at one revision. Immutable.
#[derive(Debug)]
pub struct Object {
    /// The whole object as JSON, including `kind`, `apiVersion` and `metadata.resourceVersion`.
    pub bytes: Bytes,
    /// Offset of the first member behind `kind` and `apiVersion`: lists leave those two out.
    pub body_offset: u16,
    /// Revision of the last change.
    pub revision: u64,
    /// Namespace or empty.
    pub namespace: Box<str>,
    /// Name.
    pub name: Box<str>,
    /// Labels in key order.
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// Values of the kind's field selectors.
    pub fields: Box<[(&'static str, Box<str>)]>,
    /// What a webhook made of it for other versions.
    pub(crate) forms: Forms,
}

/// The bytes of one object in other versions, by the format of the version.
#[derive(Debug, Default)]
pub(crate) struct Forms(Mutex<BTreeMap<u32, Bytes>>);

impl Forms {
    /// The object in a format.
    pub(crate) fn get(&self, format: u32) -> Option<Bytes> {
        self.0.lock().get(&format).cloned()
    }

    /// Keeps the object in a format.
    pub(crate) fn put(&self, format: u32, bytes: Bytes) {
        self.0.lock().insert(format, bytes);
    }

    /// The same forms, each changed.
    fn map(&self, change: impl Fn(&Bytes) -> Bytes) -> Self {
        Self(Mutex::new(self.0.lock().iter().map(|(format, bytes)| (*format, change(bytes))).collect()))
    }
}

impl Object {
    /// The object parsed. Costs a parse: keep derived data in a cache keyed by the resource's generation.
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or(Value::Null)
    }

    /// Value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.iter().find(|(k, _)| &**k == key).map(|(_, v)| &**v)
    }

    /// Value of a field selector's field.
    pub fn field(&self, path: &str) -> Option<&str> {
        match path {
            "metadata.name" => Some(&self.name),
            "metadata.namespace" => Some(&self.namespace),
            _ => self.fields.iter().find(|(k, _)| *k == path).map(|(_, v)| &**v),
        }
    }

    /// `namespace/name`, or the name alone in cluster scope: the key inside a resource.
    pub fn key(&self) -> Box<str> {
        key(&self.namespace, &self.name)
    }

    /// The object with another revision: what a deletion event shows.
    pub(crate) fn at_revision(&self, revision: u64) -> Object {
        let old = format!("\"resourceVersion\":\"{}\"", self.revision);
        let moved = |bytes: &Bytes| match find(bytes, old.as_bytes()) {
            Some(at) => splice(bytes, at, old.len(), revision),
            None => bytes.clone(),
        };
        Object {
            bytes: moved(&self.bytes),
            forms: self.forms.map(moved),
            body_offset: self.body_offset,
            revision,
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            labels: self.labels.clone(),
            fields: self.fields.clone(),
        }
    }
}

/// `namespace/name`, or the name alone in cluster scope.
pub(crate) fn key(namespace: &str, name: &str) -> Box<str> {
    if namespace.is_empty() { name.into() } else { format!("{namespace}/{name}").into() }
}

/// An object on its way into the store: everything but the revision.
pub(crate) struct Draft {
    /// The stored form.
    pub(crate) stored: Bytes,
    object: Object,
}

impl Draft {
    /// Serializes an object that is complete but for its resourceVersion.
    pub(crate) fn new(mut value: Value, strategy: &dyn Strategy) -> Self {
        let fields = strategy.fields(&value).into_iter().map(|(k, v)| (k, v.into())).collect();
        let (head, body_offset) = arrange(&mut value);
        let stored = Bytes::from(serde_json::to_vec(&value).unwrap_or_default());
        let body_offset = if strategy.whole_items() { 1 } else { body_offset };
        Self { object: head.into_object(stored.clone(), body_offset, fields), stored }
    }

    /// Reads the stored form back.
    pub(crate) fn load(stored: Bytes, strategy: &dyn Strategy) -> Result<Self, serde_json::Error> {
        let parsed: Stored<'_> = serde_json::from_slice(&stored)?;
        let body_offset = if strategy.whole_items() { 1 } else { head_len(&parsed.kind, &parsed.api_version) };
        let fields = if strategy.field_names().is_empty() {
            Box::default()
        } else {
            let value: Value = serde_json::from_slice(&stored)?;
            strategy.fields(&value).into_iter().map(|(k, v)| (k, v.into())).collect()
        };
        let object = parsed.metadata.into_object(stored.clone(), body_offset, fields);
        Ok(Self { stored, object })
    }

    /// The object as it would be stored, without a revision: the answer to a dry run.
    pub(crate) fn finish_unstored(self) -> Object {
        let bytes = match find(&self.stored, PLACEHOLDER) {
            Some(at) => {
                let (before, after) = (&self.stored[..at], &self.stored[at + PLACEHOLDER.len()..]);
                // What is only observed has no creationTimestamp behind it.
                match after.strip_prefix(b",") {
                    Some(after) => [before, after].concat().into(),
                    None => [before.strip_suffix(b",").unwrap_or(before), after].concat().into(),
                }
            }
            None => self.stored,
        };
        Object { bytes, ..self.object }
    }

    /// The object at its revision.
    pub(crate) fn finish(self, revision: u64) -> Object {
        let bytes = match find(&self.stored, PLACEHOLDER) {
            Some(at) => splice(&self.stored, at, PLACEHOLDER.len(), revision),
            None => self.stored,
        };
        Object { bytes, revision, ..self.object }
    }
}

#[derive(Deserialize)]
struct Stored<'a> {
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow, rename = "apiVersion")]
    api_version: Cow<'a, str>,
    metadata: Head,
}

#[derive(Deserialize, Default)]
struct Head {
    #[serde(default)]
    name: Box<str>,
    #[serde(default)]
    namespace: Box<str>,
    #[serde(default)]
    labels: std::collections::BTreeMap<Box<str>, Box<str>>,
}

impl Head {
    fn into_object(self, bytes: Bytes, body_offset: u16, fields: Box<[(&'static str, Box<str>)]>) -> Object {
        Object {
            bytes,
            body_offset,
            revision: 0,
            namespace: self.namespace,
            name: self.name,
            labels: self.labels.into_iter().collect(),
            fields,
            forms: Forms::default(),
        }
    }
}

/// Puts the members into the stored order and empties the resourceVersion.
fn arrange(value: &mut Value) -> (Head, u16) {
    let Value::Object(old) = std::mem::take(value) else { return (Head::default(), 1) };
    let mut old = old;
    let mut new = Map::new();
    let mut offset = 1;
    for name in ["kind", "apiVersion"] {
        if let Some(member) = old.shift_remove(name) {
            offset += name.len() + 3 + member.as_str().map_or(0, |s| s.len() + 2) + 1;
            new.insert(name.into(), member);
        }
    }
    let mut head = Head::default();
    if let Some(Value::Object(mut metadata)) = old.shift_remove("metadata") {
        metadata.insert("resourceVersion".into(), "".into());
        let text = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default().into();
        head.name = text("name");
        head.namespace = text("namespace");
        if let Some(Value::Object(labels)) = metadata.get("labels") {
            head.labels =
                labels.iter().map(|(k, v)| (k.as_str().into(), v.as_str().unwrap_or_default().into())).collect();
        }
        let mut ordered = Map::new();
        for name in METADATA_ORDER {
            if let Some(member) = metadata.shift_remove(name) {
                ordered.insert(name.into(), member);
            }
        }
        ordered.extend(metadata);
        new.insert("metadata".into(), ordered.into());
    }
    new.extend(old);
    *value = new.into();
    (head, offset as u16)
}

fn head_len(kind: &str, api_version: &str) -> u16 {
    (1 + "\"kind\":\"\",".len() + kind.len() + "\"apiVersion\":\"\",".len() + api_version.len()) as u16
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    // Metadata's identity is at the start: never search a whole large object.
    let end = haystack.len().min(4096);
    haystack[..end].windows(needle.len()).position(|w| w == needle)
}

fn splice(bytes: &[u8], at: usize, len: usize, revision: u64) -> Bytes {
    let number = format!("\"resourceVersion\":\"{revision}\"");
    let mut out = Vec::with_capacity(bytes.len() - len + number.len());
    out.extend_from_slice(&bytes[..at]);
    out.extend_from_slice(number.as_bytes());
    out.extend_from_slice(&bytes[at + len..]);
    Bytes::from(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::strategy::Generic;

    fn tricky() -> Value {
        json!({"metadata": {"labels": {"resourceVersion": ""}, "name": "a", "namespace": "n", "resourceVersion": "5"},
            "data": {"x": "\"resourceVersion\":\"\""}, "apiVersion": "v1", "kind": "ConfigMap"})
    }

    #[test]
    fn the_revision_lands_in_metadata() {
        let object = Draft::new(tricky(), &Generic).finish(42);
        let mut expected = tricky();
        expected["metadata"]["resourceVersion"] = "42".into();
        assert_eq!(object.value(), expected);
        assert_eq!(object.at_revision(77).value()["metadata"]["resourceVersion"], "77");
    }

    #[test]
    fn items_leave_out_kind_and_version() {
        let object = Draft::new(tricky(), &Generic).finish(42);
        assert!(object.bytes[object.body_offset as usize..].starts_with(b"\"metadata\":{\"name\":\"a\""));
    }

    #[test]
    fn loading_gives_the_same_object() {
        let draft = Draft::new(tricky(), &Generic);
        let stored = draft.stored.clone();
        let (one, two) = (draft.finish(9), Draft::load(stored, &Generic).unwrap().finish(9));
        assert_eq!((&one.bytes, &one.labels, &one.name), (&two.bytes, &two.labels, &two.name));
        assert_eq!((&one.namespace, one.body_offset), (&two.namespace, two.body_offset));
    }
}
