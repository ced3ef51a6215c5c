//! The schema engine: what fields a kind has, and what upstream does to an object when it decodes, defaults and encodes it.
//!
//! ```text
//! bytes --json::parse / yaml::parse--> Value + duplicates
//!       --decode(def, &mut v, &dups)--> pruned, type-checked, normalised v + strict errors
//!       --default(def, &mut v)-------> with defaults, and with the zero values Go prints
//! ```
//!
//! - [`lookup`] finds the [`Definition`] of a built-in kind, [`definition`] one by its OpenAPI name; CRDs bring their own
//!   ([`crate::structural`]).
//! - [`decode`] removes unknown fields and nulls, checks types with upstream's messages, brings quantities and times into
//!   canonical form and drops what Go's `omitempty` drops. Its result lists the strict errors in upstream's order
//!   (`unknown field "spec.foo"`, `duplicate field "data.a"`); [`decode_failure`] and [`strict_failure`] make the 400.
//! - [`default`] applies constant and conditional defaults and then fills in the zero values that Go always prints
//!   (`status: {}`, `resources: {}`). [`fill`] does only the latter.
//! - [`seal`] is the last step before storing; [`crate::apply::update`] includes it.
//!
//! Definitions are parsed from an embedded table one by one, when first used.

pub mod decode;
mod defaults;
mod go_order;
mod go_time;
pub mod json;
mod restore;
mod rows;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock, OnceLock},
};

pub use decode::{DecodeError, decode, prune};
pub use defaults::{default, fill, seal};
pub use go_order::{go_order, sort_all};
pub use restore::restore_error;
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use crate::{gvk::Gvk, status::Status};

/// Reads a time of RFC 3339; the error is Go's.
pub fn time(text: &str) -> Result<jiff::Timestamp, String> {
    go_time::parse(text, go_time::TIME)
}

/// A type of a value.
#[derive(Debug, Clone, PartialEq)]
pub enum Type {
    /// Anything; kept as it is.
    Any,
    /// A string.
    String,
    /// Base64 text.
    Bytes,
    /// A boolean.
    Bool,
    /// 32-bit integer.
    Int32,
    /// 64-bit integer.
    Int64,
    /// A float.
    Double,
    /// `500m`.
    Quantity,
    /// `metav1.Time`.
    Time,
    /// `metav1.MicroTime`.
    MicroTime,
    /// Integer or string.
    IntOrString,
    /// A struct.
    Object(DefRef),
    /// A map with string keys.
    Map(Box<MapType>),
    /// A list.
    List(Box<ListType>),
}

/// Map values and how apply treats the map.
#[derive(Debug, Clone, PartialEq)]
pub struct MapType {
    /// Type of the values.
    pub value: Type,
    /// Owned as a whole.
    pub atomic: bool,
}

/// List items and how apply treats the list.
#[derive(Debug, Clone, PartialEq)]
pub struct ListType {
    /// Type of the items.
    pub item: Type,
    /// Atomic, set or map.
    pub kind: ListKind,
}

/// `x-kubernetes-list-type`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListKind {
    /// Owned as a whole.
    Atomic,
    /// Distinct scalars.
    Set,
    /// Objects told apart by these keys.
    Map(Box<[String]>),
}

/// A reference to a struct type.
#[derive(Debug, Clone)]
pub enum DefRef {
    /// A built-in one, by name: lets definitions refer to themselves.
    Builtin(&'static str),
    /// One that belongs to a CRD.
    Own(Arc<Definition>),
}

impl PartialEq for DefRef {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.get(), other.get())
    }
}

static UNKNOWN: LazyLock<Definition> = LazyLock::new(|| Definition { opaque: true, ..Definition::default() });

impl DefRef {
    /// The definition.
    pub fn get(&self) -> &Definition {
        match self {
            Self::Builtin(name) => definition(name).unwrap_or(&UNKNOWN),
            Self::Own(def) => def,
        }
    }
}

/// What Go does with a field's zero value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// A pointer with omitempty: zero is kept, absent stays absent.
    Pointer,
    /// A value with omitempty: zero is dropped.
    Drop,
    /// No omitempty: absent is printed as zero.
    Print,
    /// No omitempty and a nil: absent or empty is printed as `null`.
    Null,
}

/// One field of a struct.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// JSON name.
    pub name: Box<str>,
    /// Type.
    pub ty: Type,
    /// Constant default other than Go's zero.
    pub default: Option<Box<Value>>,
    /// The zero value's treatment.
    pub zero: Zero,
    /// Whether OpenAPI calls it required.
    pub required: bool,
    /// The struct or map is owned as a whole, whatever its type says (`Some(true)`), or is granular (`Some(false)`).
    pub atomic: Option<bool>,
    /// Strategic merge patch.
    pub patch: PatchStrategy,
    /// Merge key of strategic merge patch.
    pub merge_key: Option<Box<str>>,
    /// Allowed values, for documentation.
    pub enumeration: Option<Box<[String]>>,
}

/// `x-kubernetes-patch-strategy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PatchStrategy {
    /// Lists are merged instead of replaced.
    pub merge: bool,
    /// `$retainKeys` is honoured.
    pub retain_keys: bool,
}

/// A struct type.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Definition {
    /// OpenAPI name, `io.k8s.api.core.v1.Pod`; empty for anonymous structs.
    pub name: Box<str>,
    /// Kinds it is, as `group/version/kind` (`v1/Pod`).
    pub gvks: Vec<String>,
    /// Fields, sorted by name.
    pub fields: Vec<Field>,
    /// Owned as a whole by apply.
    pub atomic: bool,
    /// Unknown fields are kept.
    pub opaque: bool,
    /// The type when this is not a struct at all (Quantity, Time, JSON, ...).
    pub scalar: Option<Type>,
}

impl Definition {
    /// A field by name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|f| (*f.name).cmp(name)).ok().map(|i| &self.fields[i])
    }

    /// The last part of the name: Go's type name.
    pub fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }

    /// Go's name with the package: `v1.PodSpec`.
    pub fn go_name(&self) -> &str {
        let mut parts = self.name.rmatch_indices('.');
        parts.next();
        parts.next().map_or(&*self.name, |(i, _)| &self.name[i + 1..])
    }
}

#[derive(Deserialize)]
struct RawTable {
    #[serde(borrow)]
    gvks: HashMap<&'static str, &'static str>,
    #[serde(borrow)]
    definitions: HashMap<&'static str, &'static RawValue>,
}

struct Slot {
    raw: &'static RawValue,
    parsed: OnceLock<Definition>,
}

struct Registry {
    gvks: HashMap<&'static str, &'static str>,
    definitions: HashMap<&'static str, Slot>,
}

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let table: RawTable =
        serde_json::from_str(include_str!("../../data/schema.json")).expect("the schema table is part of the program");
    let slot = |(name, raw)| (name, Slot { raw, parsed: OnceLock::new() });
    Registry { gvks: table.gvks, definitions: table.definitions.into_iter().map(slot).collect() }
});

/// A definition as the table has it: what OpenAPI publishes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RawDefinition {
    #[serde(default)]
    pub(crate) gvk: Vec<String>,
    #[serde(default)]
    pub(crate) map_type: Option<String>,
    #[serde(default)]
    pub(crate) required: Vec<String>,
    #[serde(default)]
    pub(crate) fields: Option<BTreeMap<String, RawField>>,
    #[serde(rename = "type", default)]
    pub(crate) kind: Option<String>,
}

/// A field as the table has it.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum RawField {
    Plain(String),
    Full(Box<FullField>),
}

impl RawField {
    pub(crate) fn into_full(self) -> FullField {
        match self {
            Self::Plain(ty) => FullField { ty, ..FullField::default() },
            Self::Full(full) => *full,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct FullField {
    #[serde(rename = "type")]
    pub(crate) ty: String,
    pub(crate) default: Option<Value>,
    pub(crate) list_type: Option<String>,
    pub(crate) list_map_keys: Vec<String>,
    pub(crate) map_type: Option<String>,
    pub(crate) patch_strategy: Option<String>,
    pub(crate) patch_merge_key: Option<String>,
    #[serde(rename = "enum")]
    pub(crate) enumeration: Option<Vec<String>>,
    pub(crate) item_enum: Option<Vec<String>>,
    go: Option<String>,
}

/// A definition as the table has it.
pub(crate) fn raw(name: &str) -> Option<RawDefinition> {
    serde_json::from_str(REGISTRY.definitions.get(name)?.raw.get()).ok()
}

/// The one struct that has no fields; other types without them are open.
const EMPTY: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceSubresourceStatus";

fn parse_type(text: &str, full: &FullField) -> Type {
    if let Some(item) = text.strip_prefix("[]") {
        let kind = match full.list_type.as_deref() {
            Some("set") => ListKind::Set,
            Some("map") => ListKind::Map(full.list_map_keys.clone().into()),
            _ => ListKind::Atomic,
        };
        return Type::List(Box::new(ListType { item: parse_type(item, &FullField::default()), kind }));
    }
    if let Some(value) = text.strip_prefix("map[string]") {
        let atomic = full.map_type.as_deref() == Some("atomic");
        return Type::Map(Box::new(MapType { value: parse_type(value, &FullField::default()), atomic }));
    }
    match text {
        "string" => Type::String,
        "string(byte)" => Type::Bytes,
        "boolean" => Type::Bool,
        "integer(int32)" => Type::Int32,
        "integer(int64)" | "integer" => Type::Int64,
        "number(double)" | "number" => Type::Double,
        "io.k8s.apimachinery.pkg.api.resource.Quantity" => Type::Quantity,
        "io.k8s.apimachinery.pkg.apis.meta.v1.Time" => Type::Time,
        "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime" => Type::MicroTime,
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString" => Type::IntOrString,
        name => match REGISTRY.definitions.get_key_value(name) {
            Some((name, slot)) if *name == EMPTY || slot.raw.get().contains("\"fields\"") => {
                Type::Object(DefRef::Builtin(name))
            }
            _ => Type::Any,
        },
    }
}

fn zero_of(ty: &Type, full: &FullField, required: bool) -> Zero {
    match full.go.as_deref() {
        Some("value") => return Zero::Drop,
        Some("pointer") => return Zero::Pointer,
        Some("null") => return Zero::Null,
        Some("always") => return Zero::Print,
        _ => {}
    }
    let has_default = full.default.is_some();
    match ty {
        Type::Object(_) if has_default => Zero::Print,
        Type::Object(_) | Type::Any if required => Zero::Null,
        Type::Map(_) | Type::List(_) | Type::Bytes | Type::Time | Type::MicroTime if required => Zero::Null,
        Type::Map(_) | Type::List(_) | Type::Bytes | Type::String if !has_default => Zero::Drop,
        Type::IntOrString | Type::Quantity if required => Zero::Print,
        _ if has_default => Zero::Print,
        _ => Zero::Pointer,
    }
}

fn parse_definition(name: &str, raw: &RawValue) -> Definition {
    let raw: RawDefinition = serde_json::from_str(raw.get()).expect("the schema table is part of the program");
    let mut fields = Vec::new();
    for (field, raw_field) in raw.fields.into_iter().flatten() {
        let full = raw_field.into_full();
        let ty = parse_type(&full.ty, &full);
        let required = raw.required.contains(&field);
        let strategy = full.patch_strategy.as_deref().unwrap_or_default();
        let zero = zero_of(&ty, &full, required);
        let is_zero = |v: &Value| match v {
            Value::String(s) => s.is_empty(),
            Value::Object(o) => o.is_empty(),
            Value::Bool(b) => !b,
            Value::Number(n) => n.as_f64() == Some(0.0),
            _ => false,
        };
        fields.push(Field {
            name: field.into(),
            zero,
            required,
            atomic: full.map_type.as_deref().map(|t| t == "atomic"),
            patch: PatchStrategy { merge: strategy.contains("merge"), retain_keys: strategy.contains("retainKeys") },
            merge_key: full.patch_merge_key.map(Into::into),
            enumeration: full.enumeration.map(Into::into),
            default: full.default.filter(|v| !is_zero(v)).map(Box::new),
            ty,
        });
    }
    fields.sort_by(|a, b| a.name.cmp(&b.name));
    let scalar =
        (raw.kind.is_some() && fields.is_empty() && name != EMPTY).then(|| parse_type(name, &FullField::default()));
    Definition {
        name: name.into(),
        gvks: raw.gvk,
        opaque: scalar.is_some(),
        fields,
        atomic: raw.map_type.as_deref() == Some("atomic"),
        scalar,
    }
}

/// A built-in definition by its OpenAPI name.
pub fn definition(name: &str) -> Option<&'static Definition> {
    let (name, slot) = REGISTRY.definitions.get_key_value(name)?;
    Some(slot.parsed.get_or_init(|| parse_definition(name, slot.raw)))
}

/// The definition of a built-in kind.
pub fn lookup(gvk: &Gvk) -> Option<&'static Definition> {
    let key = format!("{}/{}", gvk.api_version(), gvk.kind);
    definition(REGISTRY.gvks.get(key.as_str())?)
}

/// Names of all built-in definitions, unsorted.
pub fn definition_names() -> impl Iterator<Item = &'static str> {
    REGISTRY.definitions.keys().copied()
}

/// The 400 for an object that could not be decoded into `kind`.
pub fn decode_failure(obj: &Value, kind: &str, error: &str) -> Status {
    let gvk = Gvk::of(obj);
    Status::bad_request(format!(
        "{} in version {} cannot be handled as a {kind}: {error}",
        gvk.kind,
        crate::text::quote(&gvk.version)
    ))
}

/// The 400 of `fieldValidation=Strict`.
pub fn strict_failure(obj: &Value, kind: &str, errors: &[String]) -> Status {
    decode_failure(obj, kind, &format!("strict decoding error: {}", errors.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_kinds_and_fields() {
        let pod = lookup(&Gvk::new("", "v1", "Pod")).unwrap();
        assert_eq!(pod.go_name(), "v1.Pod");
        let Type::Object(spec) = &pod.field("spec").unwrap().ty else { panic!("spec is an object") };
        let containers = spec.get().field("containers").unwrap();
        assert!(containers.patch.merge);
        assert_eq!(containers.merge_key.as_deref(), Some("name"));
        let Type::List(list) = &containers.ty else { panic!("containers is a list") };
        assert_eq!(list.kind, ListKind::Map(Box::new(["name".to_owned()])));
    }

    #[test]
    fn every_definition_parses() {
        for name in definition_names() {
            assert_eq!(&*definition(name).unwrap().name, name);
        }
    }
}
