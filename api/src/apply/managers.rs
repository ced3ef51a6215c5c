//! The entries of `metadata.managedFields`.

use serde_json::{Map, Value, json};

use super::set::Set;
use crate::meta;

/// Update entries kept one by one; older ones are merged.
const MAX_UPDATE_MANAGERS: usize = 10;
/// Name of the merged entries.
const ANCIENT: &str = "ancient-changes";

/// How a manager wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Operation {
    Apply,
    Update,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) manager: String,
    pub(super) operation: Operation,
    pub(super) api_version: String,
    pub(super) subresource: String,
    pub(super) time: String,
    pub(super) set: Set,
}

impl Entry {
    /// What tells entries apart; an applier is the same in every version.
    pub(super) fn identifier(&self) -> (&str, Operation, &str, &str) {
        let version = match self.operation {
            Operation::Apply => "",
            Operation::Update => self.api_version.as_str(),
        };
        (&self.manager, self.operation, version, &self.subresource)
    }

    fn decode(value: &Value) -> Option<Self> {
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match value.get("operation").and_then(Value::as_str)? {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        let set = match value.get("fieldsV1") {
            Some(fields) => Set::from_value(fields)?,
            None => Set::default(),
        };
        Some(Self {
            manager: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            set,
        })
    }

    fn encode(&self) -> Value {
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        let mut out = Map::new();
        for (key, text) in [
            ("manager", self.manager.as_str()),
            ("operation", operation),
            ("apiVersion", &self.api_version),
            ("time", &self.time),
        ] {
            if !text.is_empty() {
                out.insert(key.into(), text.into());
            }
        }
        out.insert("fieldsType".into(), json!("FieldsV1"));
        out.insert("fieldsV1".into(), self.set.to_value());
        if !self.subresource.is_empty() {
            out.insert("subresource".into(), self.subresource.as_str().into());
        }
        Value::Object(out)
    }
}

/// All entries of an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Managers(pub(super) Vec<Entry>);

impl Managers {
    /// From an object; `None` when an entry is malformed.
    pub(super) fn decode(obj: &Value) -> Option<Self> {
        meta::managed_fields(obj).iter().map(Entry::decode).collect::<Option<Vec<_>>>().map(Self)
    }

    /// Writes them into an object, in upstream's order.
    pub(super) fn encode(&self, obj: &mut Value) {
        let mut entries: Vec<&Entry> = self.0.iter().collect();
        entries.sort_by(|a, b| {
            (a.operation, &a.time, &a.manager, &a.api_version, &a.subresource).cmp(&(
                b.operation,
                &b.time,
                &b.manager,
                &b.api_version,
                &b.subresource,
            ))
        });
        let entries: Vec<Value> = entries.into_iter().map(Entry::encode).collect();
        meta::set(obj, "managedFields", entries);
    }

    /// Adds fields to the entry with `entry`'s identifier.
    pub(super) fn add(&mut self, entry: Entry, set: &Set) {
        match self.0.iter_mut().find(|e| e.identifier() == entry.identifier()) {
            Some(found) => {
                found.set = found.set.union(set);
                found.time = entry.time;
            }
            None => self.0.push(Entry { set: set.clone(), ..entry }),
        }
    }

    /// Replaces an applier's fields; returns its position and the fields it had.
    pub(super) fn replace_applier(&mut self, entry: Entry, set: Set) -> (usize, Option<Set>) {
        match self.0.iter().position(|e| e.identifier() == entry.identifier()) {
            Some(at) => {
                let last = std::mem::replace(&mut self.0[at], Entry { set, ..entry });
                (at, Some(last.set))
            }
            None => {
                self.0.push(Entry { set, ..entry });
                (self.0.len() - 1, None)
            }
        }
    }

    /// Merges the oldest update entries of each version into one when there are too many.
    pub(super) fn cap(&mut self) {
        let updaters = |all: &[Entry]| all.iter().filter(|e| e.operation == Operation::Update).count();
        while updaters(&self.0) > MAX_UPDATE_MANAGERS {
            let mut order: Vec<usize> =
                (0..self.0.len()).filter(|i| self.0[*i].operation == Operation::Update).collect();
            order.sort_by(|a, b| {
                let key = |i: &usize| (self.0[*i].time.clone(), self.0[*i].manager.clone());
                key(a).cmp(&key(b))
            });
            let pair = order.iter().enumerate().find_map(|(n, second)| {
                let version = &self.0[*second].api_version;
                let first = order[..n].iter().find(|first| self.0[**first].api_version == *version)?;
                Some((*first, *second))
            });
            let Some((first, second)) = pair else { return };
            let merged = self.0[first].set.union(&self.0[second].set);
            let time = self.0[second].time.clone();
            let bucket = &mut self.0[first];
            bucket.set = merged;
            bucket.time = time;
            bucket.manager = ANCIENT.into();
            bucket.subresource = String::new();
            self.0.remove(second);
        }
    }
}
