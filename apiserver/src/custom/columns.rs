//! Table columns of custom resources: `additionalPrinterColumns`, or the age.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::path::JsonPath;
use crate::registry::{strategy::Column, table};

/// A column and where its value is.
#[derive(Debug)]
pub(crate) struct PrinterColumn {
    /// What the table says of it.
    pub(crate) column: Column,
    path: Option<JsonPath>,
}

const AGE: &str = "CreationTimestamp is a timestamp representing the server time when this object was created. It is not guaranteed to be set in happens-before order across separate operations. Clients may not set this value. It is represented in RFC3339 form and is in UTC.\n\nPopulated by the system. Read-only. Null for lists. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata";

/// The columns behind the name, from a version of a CRD.
pub(super) fn columns(version: &Value) -> Vec<PrinterColumn> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let own = version["additionalPrinterColumns"].as_array().filter(|c| !c.is_empty());
    let Some(own) = own else {
        let column = Column {
            name: "Age".into(),
            kind: "date".into(),
            format: String::new(),
            priority: 0,
            description: AGE.into(),
        };
        return vec![PrinterColumn { column, path: JsonPath::parse(".metadata.creationTimestamp") }];
    };
    let printer = |c: &Value| {
        let description = match text(&c["description"]) {
            empty if empty.is_empty() => {
                format!("Custom resource definition column (in JSONPath format): {}", text(&c["jsonPath"]))
            }
            given => given,
        };
        let column = Column {
            name: text(&c["name"]),
            kind: text(&c["type"]),
            format: text(&c["format"]),
            priority: c["priority"].as_i64().unwrap_or_default(),
            description,
        };
        PrinterColumn { column, path: JsonPath::parse(c["jsonPath"].as_str().unwrap_or_default()) }
    };
    own.iter().map(printer).collect()
}

impl PrinterColumn {
    /// The cell of an object.
    pub(super) fn cell(&self, obj: &Value, now: Timestamp) -> Value {
        let Some(path) = &self.path else { return Value::Null };
        let found = path.find(obj);
        let Some(value) = found.first() else { return Value::Null };
        match self.column.kind.as_str() {
            "integer" => match value {
                Value::Number(n) if n.is_i64() || n.is_u64() => (*value).clone(),
                Value::Number(n) => json!(n.as_f64().unwrap_or_default() as i64),
                _ => Value::Null,
            },
            "number" => {
                if value.is_number() {
                    (*value).clone()
                } else {
                    Value::Null
                }
            }
            "boolean" => {
                if value.is_boolean() {
                    (*value).clone()
                } else {
                    Value::Null
                }
            }
            "string" => {
                let texts: Vec<String> =
                    found.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
                json!(texts.join(" "))
            }
            "date" => match value.as_str() {
                Some(text) if text.parse::<Timestamp>().is_ok() => json!(table::since(value, now)),
                _ => json!("<invalid>"),
            },
            _ => Value::Null,
        }
    }
}
