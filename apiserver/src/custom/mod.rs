//! Resources that CustomResourceDefinitions define.
//!
//! A [`Definition`] is one CRD compiled: its versions with their schemas, rules, columns and subresources. It is built when
//! the CRD changes and shared by every request. [`controller`] accepts names, publishes and removes; [`Served`] is the
//! table of what is served now, swapped as a whole.
//!
//! Objects are stored in the storage version. A request sees them in its own version: writes work on the served form and
//! convert on the way in and out. Stored bytes are sent as they are when they are in the served version and were written
//! after the schema last changed; everything else is converted, pruned and defaulted when it is read.

mod columns;
pub(crate) mod controller;
mod conversion;
mod definition;
mod documents;
mod embedded;
pub(crate) mod names;
mod path;
mod rules;
mod strategy;
mod table;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, atomic::AtomicBool},
};

use isopod_api::{gvk::Gvk, meta};
use serde_json::Value;

pub(crate) use conversion::Converter;
pub(crate) use definition::{Definition, Version};
pub(crate) use documents::{v2, v3, v3_index};
pub(crate) use rules::{environment as rule_environment, mentions};
pub(crate) use strategy::{Behaviour, STORED};
pub(crate) use table::{Publication, Served};

use crate::{cache::Object, registry::scale};

/// Where the definitions are.
pub(crate) fn gvr() -> isopod_api::gvk::Gvr {
    isopod_api::gvk::Gvr::new("apiextensions.k8s.io", "v1", "customresourcedefinitions")
}

/// What a served resource knows of its definition.
pub(crate) struct Custom {
    /// The whole CRD.
    pub(crate) definition: Arc<Definition>,
    /// The served version.
    pub(crate) version: Arc<Version>,
    /// What stored bytes in the served version start with.
    prefix: Box<[u8]>,
    /// Objects written at this revision or earlier may be older than the schema.
    since: u64,
    /// Tells renderings apart.
    pub(crate) format: u32,
    /// Set when this version is no longer served; its watchers are woken then.
    pub(crate) gone: AtomicBool,
}

impl Custom {
    /// A version as it is served from now on.
    pub(crate) fn new(definition: Arc<Definition>, version: Arc<Version>, since: u64) -> Self {
        let gvk = &version.gvk;
        let prefix = format!("{{\"kind\":\"{}\",\"apiVersion\":\"{}\",", gvk.kind, gvk.api_version());
        let mut hasher = DefaultHasher::new();
        (definition.hash, &gvk.version, since).hash(&mut hasher);
        let format = hasher.finish() as u32;
        Self { definition, version, prefix: prefix.into_bytes().into(), since, format, gone: AtomicBool::new(false) }
    }

    /// Whether an object's bytes can be sent as they are.
    pub(crate) fn fresh(&self, object: &Object) -> bool {
        object.revision > self.since && object.bytes.starts_with(&self.prefix)
    }

    /// An object in the served version.
    pub(crate) fn value(&self, object: &Object) -> Value {
        if let Some(form) = object.forms.get(self.format).filter(|_| self.foreign(object)) {
            return serde_json::from_slice(&form).unwrap_or_default();
        }
        let value = object.value();
        if self.fresh(object) { value } else { self.serve(value) }
    }

    fn serve(&self, mut value: Value) -> Value {
        if let Some(stored) = self.definition.version(&Gvk::of(&value).version) {
            stored.schema.default(&mut value);
        }
        value["apiVersion"] = self.version.gvk.api_version().into();
        self.version.settle(&mut value);
        value
    }

    /// An object of one of the versions in another one.
    pub(crate) fn in_version(&self, mut value: Value, gvk: &Gvk) -> Value {
        if let Some(version) = self.definition.version(&gvk.version).filter(|_| Gvk::of(&value) != *gvk) {
            value["apiVersion"] = gvk.api_version().into();
            version.settle(&mut value);
        }
        value
    }

    /// Whether an object is stored in another version than it would be now.
    pub(crate) fn outdated(&self, object: &Object) -> bool {
        let gvk = &self.definition.storage().gvk;
        let head = format!("{{\"kind\":\"{}\",\"apiVersion\":\"{}\",", gvk.kind, gvk.api_version());
        !object.bytes.starts_with(head.as_bytes())
    }

    /// The Scale of an object.
    pub(crate) fn scale(&self, obj: &Value) -> Value {
        let Some(paths) = &self.version.scale else { return Value::Null };
        let number = |path: &path::JsonPath| path.first(obj).and_then(Value::as_i64).unwrap_or(0);
        let selector = paths.selector.as_ref().and_then(|p| p.first(obj)).and_then(Value::as_str).unwrap_or_default();
        scale::assemble(obj, number(&paths.spec), number(&paths.status), selector)
    }

    /// Puts a changed Scale into its object.
    pub(crate) fn put_scale(&self, obj: &Value, scale: &Value) -> Value {
        let mut new = obj.clone();
        if let Some(paths) = &self.version.scale {
            paths.spec.set(&mut new, scale["spec"]["replicas"].as_i64().unwrap_or(0).into());
        }
        for (key, value) in [("name", meta::name(scale)), ("namespace", meta::namespace(scale))] {
            if !value.is_empty() {
                meta::set(&mut new, key, value);
            }
        }
        // A Scale without one is put unconditionally.
        if !meta::resource_version(scale).is_empty() {
            meta::set_resource_version(&mut new, meta::resource_version(scale));
        }
        if !meta::uid(scale).is_empty() {
            meta::set_uid(&mut new, meta::uid(scale));
        }
        new
    }

    /// The first field an object has that another version of the kind, named in its managedFields, does not know.
    pub(crate) fn undeclared(&self, obj: &Value) -> Option<String> {
        let own = self.version.gvk.api_version();
        for entry in meta::managed_fields(obj) {
            let other = entry["apiVersion"].as_str().filter(|v| *v != own);
            let Some(version) = other.and_then(|v| v.rsplit('/').next()).and_then(|v| self.definition.version(v))
            else {
                continue;
            };
            let strict = version.schema.decode(&mut obj.clone(), &[]).unwrap_or_default();
            if let Some(field) = strict.iter().find_map(|e| e.strip_prefix("unknown field \"")) {
                return Some(format!(".{}: field not declared in schema", field.trim_end_matches('"')));
            }
        }
        None
    }
}
