//! One stored object: its JSON bytes and what selectors need.

use bytes::Bytes;
use serde_json::Value;

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
}
