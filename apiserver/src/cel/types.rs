//! Types of expressions.

use std::{collections::BTreeMap, fmt, sync::Arc};

use isopod_api::schema::{self, Definition};
use serde_json::Value;

/// A type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Type {
    /// Anything, known when it is evaluated.
    Dyn,
    /// What an expression with a reported error has; fits everywhere.
    Error,
    /// `null`.
    Null,
    /// `bool`.
    Bool,
    /// `int`.
    Int,
    /// `uint`.
    Uint,
    /// `double`.
    Double,
    /// `string`.
    String,
    /// `bytes`.
    Bytes,
    /// A point in time.
    Timestamp,
    /// A span of time.
    Duration,
    /// `list(T)`.
    List(Box<Type>),
    /// `map(K, V)`.
    Map(Box<Type>, Box<Type>),
    /// `optional_type(T)`.
    Optional(Box<Type>),
    /// The type of a type.
    Meta(Box<Type>),
    /// A type with nothing but functions, or with fields.
    Object(Arc<Object>),
    /// Stands for a type inside a function's signature.
    Param(char),
}

/// A type with a name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Object {
    /// Name.
    pub(crate) name: String,
    /// Fields; `None` when any field may be there.
    pub(crate) fields: Option<BTreeMap<String, Type>>,
}

impl Type {
    /// `list(item)`.
    pub(crate) fn list(item: Type) -> Self {
        Self::List(Box::new(item))
    }

    /// `map(string, value)`.
    pub(crate) fn map(value: Type) -> Self {
        Self::Map(Box::new(Self::String), Box::new(value))
    }

    /// A type with fields.
    pub(crate) fn object<const N: usize>(name: &str, fields: [(&str, Type); N]) -> Self {
        let fields = fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Self::Object(Arc::new(Object { name: name.to_owned(), fields: Some(fields) }))
    }

    /// A type only functions know.
    pub(crate) fn named(name: &str) -> Self {
        Self::Object(Arc::new(Object { name: name.to_owned(), fields: Some(BTreeMap::new()) }))
    }

    /// Whether nothing is known of it.
    pub(super) fn is_dyn(&self) -> bool {
        matches!(self, Self::Dyn | Self::Error)
    }

    /// As upstream's checker shows it in overloads.
    pub(super) fn brief(&self) -> String {
        match self {
            Self::Timestamp => "timestamp".into(),
            Self::Duration => "duration".into(),
            Self::Null => "null".into(),
            Self::List(item) => format!("list({})", item.brief()),
            Self::Map(key, value) => format!("map({}, {})", key.brief(), value.brief()),
            Self::Optional(inner) => format!("optional_type({})", inner.brief()),
            Self::Meta(inner) => format!("type({})", inner.brief()),
            other => other.to_string(),
        }
    }

    /// What the definition of a kind says, under a name for errors. What is inside of itself is anything.
    pub(crate) fn of_definition(definition: &Definition, name: &str) -> Self {
        Self::defined(definition, name, &mut Vec::new())
    }

    fn defined<'d>(definition: &'d Definition, name: &str, around: &mut Vec<&'d str>) -> Self {
        if let Some(scalar) = &definition.scalar {
            return Self::of_type(scalar, name, around);
        }
        let again = !definition.name.is_empty() && around.contains(&&*definition.name);
        if again || definition.opaque && definition.fields.is_empty() {
            return Self::Dyn;
        }
        around.push(&definition.name);
        let field = |field: &'d schema::Field, around: &mut _| {
            (super::escape(&field.name), Self::of_type(&field.ty, &format!("{name}.{}", field.name), around))
        };
        let fields = definition.fields.iter().map(|f| field(f, around)).collect();
        around.pop();
        Self::Object(Arc::new(Object { name: name.to_owned(), fields: Some(fields) }))
    }

    fn of_type<'d>(found: &'d schema::Type, name: &str, around: &mut Vec<&'d str>) -> Self {
        match found {
            schema::Type::Any | schema::Type::Quantity | schema::Type::IntOrString => Self::Dyn,
            schema::Type::String => Self::String,
            schema::Type::Bytes => Self::Bytes,
            schema::Type::Bool => Self::Bool,
            schema::Type::Int32 | schema::Type::Int64 => Self::Int,
            schema::Type::Double => Self::Double,
            schema::Type::Time | schema::Type::MicroTime => Self::Timestamp,
            schema::Type::Object(of) => Self::defined(of.get(), name, around),
            schema::Type::Map(map) => Self::map(Self::of_type(&map.value, &format!("{name}.@elem"), around)),
            schema::Type::List(list) => Self::list(Self::of_type(&list.item, &format!("{name}.@idx"), around)),
        }
    }

    /// The same with another type of a field.
    pub(crate) fn with_field(self, field: &str, found: Self) -> Self {
        match self {
            Self::Object(object) => {
                let mut fields = object.fields.clone().unwrap_or_default();
                fields.insert(field.to_owned(), found);
                Self::Object(Arc::new(Object { name: object.name.clone(), fields: Some(fields) }))
            }
            other => other,
        }
    }

    /// What a property's schema says.
    pub(crate) fn of_schema(schema: &Value, resource: bool) -> Self {
        if schema["x-kubernetes-int-or-string"] == true {
            return Self::Dyn;
        }
        match schema["type"].as_str().unwrap_or_default() {
            "boolean" => Self::Bool,
            "integer" => Self::Int,
            "number" => Self::Double,
            "string" => match schema["format"].as_str() {
                Some("date-time" | "date") => Self::Timestamp,
                Some("duration") => Self::Duration,
                Some("byte") => Self::Bytes,
                _ => Self::String,
            },
            "array" => Self::list(Self::of_schema(&schema["items"], false)),
            "object" => Self::of_object(schema, resource),
            _ => Self::Dyn,
        }
    }

    fn of_object(schema: &Value, resource: bool) -> Self {
        let embedded = resource || schema["x-kubernetes-embedded-resource"] == true;
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            return Self::map(Self::of_schema(values, false));
        }
        let open = schema["x-kubernetes-preserve-unknown-fields"] == true;
        let properties = schema["properties"].as_object();
        if open && properties.is_none_or(serde_json::Map::is_empty) && !embedded {
            return Self::Dyn;
        }
        let mut fields: BTreeMap<String, Type> = BTreeMap::new();
        for (name, property) in properties.into_iter().flatten() {
            fields.insert(super::escape(name), Self::of_schema(property, false));
        }
        if embedded {
            fields.insert("apiVersion".into(), Self::String);
            fields.insert("kind".into(), Self::String);
            let names = [("name", Self::String), ("generateName", Self::String)];
            fields.insert("metadata".into(), Self::object("object.metadata", names));
        }
        Self::Object(Arc::new(Object { name: "object".into(), fields: Some(fields) }))
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Dyn | Self::Param(_) => "dyn",
            Self::Error => "!error!",
            Self::Null => "null_type",
            Self::Bool => "bool",
            Self::Int => "int",
            Self::Uint => "uint",
            Self::Double => "double",
            Self::String => "string",
            Self::Bytes => "bytes",
            Self::Timestamp => "google.protobuf.Timestamp",
            Self::Duration => "google.protobuf.Duration",
            Self::List(item) => return write!(f, "list({item})"),
            Self::Map(key, value) => return write!(f, "map({key}, {value})"),
            Self::Optional(inner) => return write!(f, "optional_type({inner})"),
            Self::Meta(inner) => return write!(f, "type({inner})"),
            Self::Object(object) => return f.write_str(&object.name),
        };
        f.write_str(name)
    }
}
