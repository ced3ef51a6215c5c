//! Validation errors that name a field: [`Path`], [`Error`], [`ErrorList`], with upstream's texts.
//!
//! `Error::invalid(&Path::new("spec").child("replicas"), -1, "must be ...")` displays as
//! `spec.replicas: Invalid value: -1: must be ...`.

use std::fmt;

use serde_json::Value;

use crate::text::quote;

/// Where in an object. Cheap enough to build on the error path only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Path(Option<String>);

impl Path {
    /// A path that starts at a field.
    pub fn new(name: &str) -> Self {
        Self(Some(name.to_owned()))
    }

    /// No path at all; displays `<nil>`.
    pub const fn nil() -> Self {
        Self(None)
    }

    /// A field of this.
    pub fn child(&self, name: &str) -> Self {
        match &self.0 {
            Some(path) if !path.is_empty() => Self(Some(format!("{path}.{name}"))),
            _ => Self::new(name),
        }
    }

    /// An element of this list.
    pub fn index(&self, index: usize) -> Self {
        Self(Some(format!("{}[{index}]", self.0.as_deref().unwrap_or_default())))
    }

    /// An entry of this map.
    pub fn key(&self, key: &str) -> Self {
        Self(Some(format!("{}[{key}]", self.0.as_deref().unwrap_or_default())))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("<nil>"))
    }
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorType {
    /// A referenced value does not exist.
    NotFound,
    /// A value is missing.
    Required,
    /// A value that must be unique is not.
    Duplicate,
    /// A malformed value.
    Invalid,
    /// A value outside an enumeration.
    NotSupported,
    /// A value that may not be set here.
    Forbidden,
    /// A value with too many bytes.
    TooLong,
    /// A list with too many items.
    TooMany,
    /// Our own failure.
    Internal,
    /// A value of the wrong type.
    TypeInvalid,
}

impl ErrorType {
    /// The reason in `details.causes`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::Internal => "InternalError",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }
}

impl fmt::Display for ErrorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        })
    }
}

/// What may be shown as the offending value.
pub trait BadValue {
    /// As JSON.
    fn into_bad(self) -> Value;
}

macro_rules! bad_value {
    ($($t:ty),*) => {$(
        impl BadValue for $t {
            fn into_bad(self) -> Value { Value::from(self) }
        }
    )*};
}
bad_value!(&str, String, i64, i32, u64, u32, u16, usize, f64, bool, Vec<String>, Vec<Value>);

impl BadValue for Value {
    fn into_bad(self) -> Value {
        self
    }
}
impl BadValue for &Value {
    fn into_bad(self) -> Value {
        self.clone()
    }
}
impl BadValue for &String {
    fn into_bad(self) -> Value {
        Value::from(self.as_str())
    }
}
impl BadValue for &[String] {
    fn into_bad(self) -> Value {
        Value::from(self.to_vec())
    }
}
impl<T: BadValue> BadValue for Option<T> {
    fn into_bad(self) -> Value {
        self.map_or(Value::Null, BadValue::into_bad)
    }
}

/// One problem with one field.
#[derive(Debug, Clone, PartialEq)]
pub struct Error {
    /// Kind of problem.
    pub kind: ErrorType,
    /// Where.
    pub field: String,
    /// The offending value; null displays as `null`.
    pub bad_value: Value,
    /// Explanation, may be empty.
    pub detail: String,
}

/// Marks an error whose value is not shown.
const OMITTED: &str = "\u{0}omitted";

/// All problems of an object, in the order found.
pub type ErrorList = Vec<Error>;

impl Error {
    fn new(kind: ErrorType, path: &Path, bad_value: Value, detail: impl Into<String>) -> Self {
        Self { kind, field: path.to_string(), bad_value, detail: detail.into() }
    }

    /// A value is missing.
    pub fn required(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Required, path, Value::from(""), detail)
    }

    /// A malformed value.
    pub fn invalid(path: &Path, value: impl BadValue, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Invalid, path, value.into_bad(), detail)
    }

    /// A malformed structure: no value is shown.
    pub fn invalid_without_value(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Invalid, path, Value::from(OMITTED), detail)
    }

    /// A value outside an enumeration; the supported ones are listed in the order given.
    pub fn not_supported<S: AsRef<str>>(path: &Path, value: impl BadValue, supported: &[S]) -> Self {
        let detail = if supported.is_empty() {
            String::new()
        } else {
            let quoted: Vec<_> = supported.iter().map(|s| quote(s.as_ref())).collect();
            format!("supported values: {}", quoted.join(", "))
        };
        Self::new(ErrorType::NotSupported, path, value.into_bad(), detail)
    }

    /// A value that may not be set here.
    pub fn forbidden(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Forbidden, path, Value::from(""), detail)
    }

    /// A value that must be unique is not.
    pub fn duplicate(path: &Path, value: impl BadValue) -> Self {
        Self::new(ErrorType::Duplicate, path, value.into_bad(), "")
    }

    /// A value with more than `max` bytes.
    pub fn too_long(path: &Path, max: usize) -> Self {
        Self::new(ErrorType::TooLong, path, Value::from(""), format!("may not be more than {max} bytes"))
    }

    /// A list with more than `max` items.
    pub fn too_many(path: &Path, actual: usize, max: usize) -> Self {
        let items = if max == 1 { "item" } else { "items" };
        Self::new(ErrorType::TooMany, path, Value::from(actual), format!("must have at most {max} {items}"))
    }

    /// A value of the wrong type.
    pub fn type_invalid(path: &Path, value: impl BadValue, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::TypeInvalid, path, value.into_bad(), detail)
    }

    /// A referenced value does not exist.
    pub fn not_found(path: &Path, value: impl BadValue) -> Self {
        Self::new(ErrorType::NotFound, path, value.into_bad(), "")
    }

    /// Our own failure.
    pub fn internal(path: &Path, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Internal, path, Value::from(""), detail)
    }

    /// The text without the field.
    pub fn body(&self) -> String {
        use ErrorType::{Forbidden, Internal, Required, TooLong};
        let mut text = match (self.kind, &self.bad_value) {
            (Required | Forbidden | TooLong | Internal, _) => self.kind.to_string(),
            (kind, Value::String(s)) if s == OMITTED => kind.to_string(),
            (kind, Value::String(s)) => format!("{kind}: {}", quote(s)),
            (kind, value) => format!("{kind}: {value}"),
        };
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

impl std::error::Error for Error {}

/// The aggregate text of a list, as in `... is invalid: [a, b]`.
pub fn aggregate(errors: &[Error]) -> String {
    crate::text::aggregate(errors.iter().map(ToString::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn upstream_texts() {
        let spec = Path::new("spec");
        for (error, want) in [
            (Error::required(&spec.child("name"), ""), "spec.name: Required value"),
            (
                Error::invalid(&spec.child("replicas"), -1, "must be >= 0"),
                "spec.replicas: Invalid value: -1: must be >= 0",
            ),
            (Error::invalid(&spec.key("a"), Value::Null, "x"), "spec[a]: Invalid value: null: x"),
            (
                Error::not_supported(&Path::new("dryRun"), json!(["Some"]), &["All"]),
                "dryRun: Unsupported value: [\"Some\"]: supported values: \"All\"",
            ),
            (
                Error::duplicate(&spec.child("m").index(1), json!({"name": "x"})),
                "spec.m[1]: Duplicate value: {\"name\":\"x\"}",
            ),
            (Error::too_long(&spec, 3), "spec: Too long: may not be more than 3 bytes"),
            (Error::too_many(&spec, 5, 3), "spec: Too many: 5: must have at most 3 items"),
            (Error::invalid(&Path::nil(), "", "x"), "<nil>: Invalid value: \"\": x"),
        ] {
            assert_eq!(error.to_string(), want);
        }
    }
}
