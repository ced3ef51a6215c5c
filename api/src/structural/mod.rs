//! CustomResourceDefinitions in the schema engine: one version's `openAPIV3Schema`.
//!
//! ```text
//! Structural::new(schema)
//!   .decode(&mut obj, &dups)    metadata typed, unknown fields pruned and reported
//!   .default(&mut obj)          nulls of non-nullable fields dropped, defaults filled in
//!   .validate(&obj, old)        upstream's validation errors; what did not change since `old` is not judged again
//!   .definition()               for apply and managed fields
//! ```
//!
//! CEL rules (`x-kubernetes-validations`) are not evaluated here.

mod formats;
mod validate;

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::{
    field::{ErrorList, Path},
    schema::{self, DecodeError, DefRef, Definition, Field, ListKind, ListType, MapType, PatchStrategy, Type, Zero},
    text::quote,
};

const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// One version of a CRD.
#[derive(Debug, Clone)]
pub struct Structural {
    schema: Arc<Value>,
    definition: Arc<Definition>,
    /// Knows metadata, leaves everything else alone.
    envelope: Arc<Definition>,
    /// Whether there are lists whose items must differ.
    unique_lists: bool,
}

fn flag(schema: &Value, name: &str) -> bool {
    schema.get(name).and_then(Value::as_bool).unwrap_or_default()
}

fn preserves(schema: &Value) -> bool {
    flag(schema, "x-kubernetes-preserve-unknown-fields")
}

fn embedded(schema: &Value) -> bool {
    flag(schema, "x-kubernetes-embedded-resource")
}

fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties")?.as_object()
}

/// `additionalProperties` when it is a schema.
fn additional(schema: &Value) -> Option<&Value> {
    schema.get("additionalProperties").filter(|v| v.is_object())
}

fn field(name: &str, ty: Type, default: Option<&Value>, required: bool) -> Field {
    Field {
        name: name.into(),
        ty,
        default: default.map(|v| Box::new(v.clone())),
        zero: Zero::Pointer,
        required,
        atomic: None,
        patch: PatchStrategy::default(),
        merge_key: None,
        enumeration: None,
    }
}

fn type_of(schema: &Value) -> Type {
    let text = |key: &str| schema.get(key).and_then(Value::as_str);
    if flag(schema, "x-kubernetes-int-or-string") {
        return Type::IntOrString;
    }
    match text("type") {
        Some("string") => Type::String,
        Some("integer") => Type::Int64,
        Some("number") => Type::Double,
        Some("boolean") => Type::Bool,
        Some("array") => {
            let item = schema.get("items").map_or(Type::Any, type_of);
            let kind = match text("x-kubernetes-list-type") {
                Some("set") => ListKind::Set,
                Some("map") => {
                    let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
                    let keys = keys.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
                    ListKind::Map(keys.collect())
                }
                _ => ListKind::Atomic,
            };
            Type::List(Box::new(ListType { item, kind }))
        }
        Some("object") => {
            let atomic = text("x-kubernetes-map-type") == Some("atomic");
            if let Some(value) = additional(schema) {
                return Type::Map(Box::new(MapType { value: type_of(value), atomic }));
            }
            if properties(schema).is_none() && !embedded(schema) {
                let open = preserves(schema) || schema.get("additionalProperties") == Some(&Value::Bool(true));
                if open && !atomic {
                    return Type::Any;
                }
            }
            Type::Object(DefRef::Own(Arc::new(definition_of(schema, embedded(schema)))))
        }
        _ => Type::Any,
    }
}

fn definition_of(schema: &Value, resource: bool) -> Definition {
    let required: Vec<&str> = match schema.get("required").and_then(Value::as_array) {
        Some(names) => names.iter().filter_map(Value::as_str).collect(),
        None => Vec::new(),
    };
    let mut fields = Vec::new();
    for (name, property) in properties(schema).into_iter().flatten() {
        if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        fields.push(field(name, type_of(property), property.get("default"), required.contains(&name.as_str())));
    }
    if resource {
        fields.push(field("apiVersion", Type::String, None, false));
        fields.push(field("kind", Type::String, None, false));
        fields.push(field("metadata", Type::Object(DefRef::Builtin(OBJECT_META)), None, false));
    }
    fields.sort_by(|a, b| a.name.cmp(&b.name));
    Definition {
        fields,
        atomic: schema.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic"),
        opaque: preserves(schema),
        ..Definition::default()
    }
}

impl Structural {
    /// From `openAPIV3Schema`; without one everything is kept as it is.
    pub fn new(schema: Option<&Value>) -> Self {
        let open = || serde_json::json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let schema = schema.cloned().unwrap_or_else(open);
        let metadata = field("metadata", Type::Object(DefRef::Builtin(OBJECT_META)), None, false);
        let envelope = Definition { fields: vec![metadata], opaque: true, ..Definition::default() };
        Self {
            unique_lists: validate::has_unique_lists(&schema),
            definition: Arc::new(definition_of(&schema, true)),
            schema: Arc::new(schema),
            envelope: Arc::new(envelope),
        }
    }

    /// The kind as the engine sees it, for [`crate::apply`].
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// The schema it was made from.
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// Types metadata and removes unknown fields. Returns the strict errors.
    pub fn decode(&self, obj: &mut Value, duplicates: &[String]) -> Result<Vec<String>, DecodeError> {
        let mut strict: Vec<String> = duplicates.iter().map(|d| format!("duplicate field {}", quote(d))).collect();
        strict.retain(|d| !d.starts_with("duplicate field \"metadata."));
        strict.extend(schema::decode(&self.envelope, obj, duplicates)?);
        let mut unknown = Vec::new();
        prune(&self.schema, obj, true, "", &self.envelope, &mut unknown);
        unknown.sort();
        strict.extend(unknown.into_iter().map(|path| format!("unknown field {}", quote(&path))));
        Ok(strict)
    }

    /// Fills in defaults.
    pub fn default(&self, obj: &mut Value) {
        fill(&self.schema, obj, true);
    }

    /// Validates. With `old`, values that did not change are accepted as they are.
    pub fn validate(&self, obj: &Value, old: Option<&Value>) -> ErrorList {
        validate::validate(&self.schema, obj, old)
    }

    /// Items that are in a list twice where they may not be. Once they are, they may stay and others may join them.
    pub fn validate_lists(&self, obj: &Value, old: Option<&Value>) -> ErrorList {
        let of = |value: &Value| {
            let mut errors = ErrorList::new();
            if self.unique_lists {
                validate::duplicates(&self.schema, value, &Path::nil(), &mut errors);
            }
            errors
        };
        let errors = of(obj);
        if !errors.is_empty() && old.is_some_and(|old| !of(old).is_empty()) { ErrorList::new() } else { errors }
    }

    /// Validates nothing but status, as writes to its subresource do.
    pub fn validate_status(&self, obj: &Value, old: Option<&Value>) -> ErrorList {
        match (properties(&self.schema).and_then(|p| p.get("status")), obj.get("status")) {
            (Some(schema), Some(status)) => {
                validate::validate_at(schema, status, old.and_then(|o| o.get("status")), "status")
            }
            _ => ErrorList::new(),
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn prune(schema: &Value, value: &mut Value, root: bool, path: &str, envelope: &Definition, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            let resource = root || embedded(schema);
            if resource && !root {
                prune_metadata(map, path, envelope, unknown);
            }
            let known = properties(schema);
            let rest = additional(schema);
            let open = preserves(schema) || schema.get("additionalProperties") == Some(&Value::Bool(true));
            map.retain(|name, value| {
                if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
                    return true;
                }
                let here = join(path, name);
                match known.and_then(|k| k.get(name)).or(rest) {
                    Some(schema) => {
                        prune(schema, value, false, &here, envelope, unknown);
                        true
                    }
                    None if open => true,
                    None => {
                        unknown.push(here);
                        false
                    }
                }
            });
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (i, item) in items.iter_mut().enumerate() {
                    prune(schema, item, false, &format!("{path}[{i}]"), envelope, unknown);
                }
            }
        }
        _ => {}
    }
}

/// Metadata of an embedded resource is typed like any other.
fn prune_metadata(map: &mut Map<String, Value>, path: &str, envelope: &Definition, unknown: &mut Vec<String>) {
    let Some(metadata) = map.shift_remove("metadata") else { return };
    let mut wrapped = Value::Object(Map::new());
    wrapped["metadata"] = metadata;
    let errors = schema::prune(envelope, &mut wrapped);
    unknown.extend(errors.iter().filter_map(|e| {
        let inner = e.strip_prefix("unknown field \"")?.strip_suffix('"')?;
        Some(join(path, inner))
    }));
    if let Some(metadata) = wrapped.get_mut("metadata").map(Value::take).filter(|m| !m.is_null()) {
        map.insert("metadata".into(), metadata);
    }
}

fn fill(schema: &Value, value: &mut Value, root: bool) {
    match value {
        Value::Object(map) => {
            let resource = root || embedded(schema);
            let own = |name: &str| resource && matches!(name, "apiVersion" | "kind" | "metadata");
            let known = properties(schema);
            map.retain(|name, value| {
                let schema = known.and_then(|k| k.get(name));
                !value.is_null() || own(name) || schema.is_none_or(|s| flag(s, "nullable"))
            });
            for (name, property) in known.into_iter().flatten() {
                if let Some(default) = property.get("default").filter(|_| !own(name) && !map.contains_key(name)) {
                    map.insert(name.clone(), default.clone());
                }
            }
            let rest = additional(schema);
            for (name, value) in map.iter_mut().filter(|(name, _)| !own(name)) {
                if let Some(schema) = known.and_then(|k| k.get(name)).or(rest) {
                    if value.is_null()
                        && !flag(schema, "nullable")
                        && let Some(default) = schema.get("default")
                    {
                        *value = default.clone();
                    }
                    fill(schema, value, false);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                items.iter_mut().for_each(|item| fill(schema, item, false));
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
