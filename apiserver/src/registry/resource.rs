//! One served resource: what it is called, how it behaves, where its objects are.

use std::sync::Arc;

use isopod_api::{
    gvk::{GroupKind, GroupResource, Gvk, Gvr},
    resources,
    schema::{self, json},
    status::Status,
    structural,
};
use serde_json::Value;

use super::{convert::convert, strategy::Strategy};
use crate::{
    cache::{Draft, Object, ResourceCache},
    custom::{self, Custom},
};

/// How deep stored objects may nest: that of bodies, and what managedFields and admission add.
const STORED_DEPTH: usize = json::MAX_DEPTH + 15;

/// The behaviour of a resource: built in, or a definition's.
#[derive(Clone)]
pub(crate) enum Behaved {
    /// Of a built-in kind.
    BuiltIn(&'static dyn Strategy),
    /// Of a custom resource.
    Custom(Arc<custom::Behaviour>),
}

impl std::ops::Deref for Behaved {
    type Target = dyn Strategy;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::BuiltIn(strategy) => *strategy,
            Self::Custom(behaviour) => &**behaviour,
        }
    }
}

/// What bodies of a kind are checked against.
#[derive(Clone, Copy)]
pub(crate) enum Schema<'a> {
    /// A built-in kind.
    BuiltIn(&'static schema::Definition),
    /// A custom resource.
    Custom(&'a structural::Structural),
    /// Nothing is known.
    Open,
}

impl<'a> Schema<'a> {
    /// Types and prunes; returns the strict errors.
    pub(crate) fn decode(&self, value: &mut Value, duplicates: &[String]) -> Result<Vec<String>, schema::DecodeError> {
        match self {
            Self::BuiltIn(definition) => schema::decode(definition, value, duplicates),
            Self::Custom(structural) => structural.decode(value, duplicates),
            Self::Open => Ok(Vec::new()),
        }
    }

    /// Fills in defaults.
    pub(crate) fn default(&self, value: &mut Value) {
        match self {
            Self::BuiltIn(definition) => schema::default(definition, value),
            Self::Custom(structural) => structural.default(value),
            Self::Open => {}
        }
    }

    /// Fills in what is always printed.
    pub(crate) fn fill(&self, value: &mut Value) {
        if let Self::BuiltIn(definition) = self {
            schema::fill(definition, value);
        }
    }

    /// The engine's view.
    pub(crate) fn definition(&self) -> Option<&'a schema::Definition> {
        match self {
            Self::BuiltIn(definition) => Some(definition),
            Self::Custom(structural) => Some(structural.definition()),
            Self::Open => None,
        }
    }
}

/// A resource in one served version. Versions of one resource share the stored objects.
pub(crate) struct Resource {
    /// Names, verbs, subresources.
    pub(crate) info: resources::Resource,
    /// Group, version, resource.
    pub(crate) gvr: Gvr,
    /// Group, version, kind.
    pub(crate) gvk: Gvk,
    /// The kind objects are stored as; differs from `gvk` in versions that are converted.
    pub(crate) storage: Gvk,
    /// Behaviour (that of the stored version).
    pub(crate) strategy: Behaved,
    /// The stored objects; `None` for kinds that are only answered (reviews).
    pub(crate) store: Option<Arc<ResourceCache>>,
    /// The definition behind a custom resource.
    pub(crate) custom: Option<Custom>,
}

impl Resource {
    /// Group and resource.
    pub(crate) fn group_resource(&self) -> GroupResource {
        self.gvr.group_resource()
    }

    /// Group and kind.
    pub(crate) fn group_kind(&self) -> GroupKind {
        self.storage.group_kind()
    }

    /// What bodies of a kind of this resource are checked against.
    pub(crate) fn schema(&self, gvk: &Gvk) -> Schema<'_> {
        match &self.custom {
            Some(custom) if *gvk == self.gvk => Schema::Custom(&custom.version.schema),
            _ => schema::lookup(gvk).map_or(Schema::Open, Schema::BuiltIn),
        }
    }

    /// Kind of a list.
    pub(crate) fn list_kind(&self) -> String {
        match &self.custom {
            Some(custom) if !custom.definition.text("listKind").is_empty() => {
                custom.definition.text("listKind").to_owned()
            }
            _ => format!("{}List", self.gvk.kind),
        }
    }

    /// An object in the form writes work on: that of the stored version, for custom resources of the served one.
    pub(crate) fn value(&self, object: &Object) -> Value {
        match &self.custom {
            Some(custom) => custom.value(object),
            None => object.value(),
        }
    }

    /// An object in the served version.
    pub(crate) fn served_value(&self, object: &Object) -> Value {
        match &self.custom {
            Some(custom) => custom.value(object),
            None if self.converted() => convert(object.value(), &self.gvk),
            None => object.value(),
        }
    }

    /// Whether an object's bytes are not what clients of this version get.
    pub(crate) fn reshapes(&self, object: &Object) -> bool {
        match &self.custom {
            Some(custom) => !custom.fresh(object),
            None => self.converted(),
        }
    }

    /// The stored form of an object.
    pub(crate) async fn draft(&self, value: Value) -> Result<Draft, Status> {
        // Admission can nest deeper than a body may; what could not be read again is not stored.
        if json::depth(&value) > STORED_DEPTH {
            return Err(Status::bad_request(format!("the object nests deeper than {STORED_DEPTH} levels")));
        }
        match &self.custom {
            Some(custom) => custom.draft(value).await,
            None => Ok(Draft::new(value, &*self.strategy)),
        }
    }

    /// Makes sure that objects can be read in the served version: some are converted by a webhook.
    pub(crate) async fn prepare(&self, objects: &[Arc<Object>]) -> Result<(), Status> {
        match &self.custom {
            Some(custom) => custom.prepare(objects).await,
            None => Ok(()),
        }
    }

    /// Whether reading takes a webhook.
    pub(crate) fn prepares(&self) -> bool {
        self.custom.as_ref().is_some_and(|custom| custom.definition.conversion.is_some())
    }

    /// Tells renderings of versions of one stored object apart.
    pub(crate) fn format(&self) -> u32 {
        match &self.custom {
            Some(custom) => custom.format << 11,
            None => u32::from(self.converted()) << 11,
        }
    }

    /// Whether objects must be converted between the served and the stored version.
    pub(crate) fn converted(&self) -> bool {
        self.gvk != self.storage
    }

    /// Whether a verb is offered on the resource (or a subresource).
    pub(crate) fn offers(&self, subresource: &str, verb: &str) -> bool {
        if subresource.is_empty() {
            return self.info.has_verb(verb);
        }
        self.info.subresource(subresource).is_some_and(|s| s.verbs.iter().any(|v| v == verb))
    }

    /// Whether `status` is its own subresource.
    pub(crate) fn has_status(&self) -> bool {
        self.info.subresource("status").is_some()
    }
}
