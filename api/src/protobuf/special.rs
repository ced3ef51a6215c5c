//! Messages whose JSON is not an object of their fields: times, quantities, raw JSON, lists in disguise.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Error, message as lookup, node::Node, read, write};
use crate::{meta, quantity::Quantity};

const META: &str = "k8s.io.apimachinery.pkg.apis.meta.v1.";
const CRD: &str = "k8s.io.apiextensions_apiserver.pkg.apis.apiextensions.v1.";

/// The special messages.
#[derive(Debug, Clone, Copy)]
pub(super) enum Special {
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// Field 1 is JSON text.
    RawJson,
    /// Field 1, repeated, is the JSON list.
    StringList,
    SchemaOrArray,
    SchemaOrBool,
    SchemaOrStrings,
}

/// What is special about a message.
pub(super) fn special(name: &str) -> Option<Special> {
    if let Some(rest) = name.strip_prefix(META) {
        return match rest {
            "Time" => Some(Special::Time),
            "MicroTime" => Some(Special::MicroTime),
            "FieldsV1" => Some(Special::RawJson),
            "Verbs" => Some(Special::StringList),
            _ => None,
        };
    }
    if let Some(rest) = name.strip_prefix(CRD) {
        return match rest {
            "JSON" => Some(Special::RawJson),
            "JSONSchemaPropsOrArray" => Some(Special::SchemaOrArray),
            "JSONSchemaPropsOrBool" => Some(Special::SchemaOrBool),
            "JSONSchemaPropsOrStringArray" => Some(Special::SchemaOrStrings),
            _ => None,
        };
    }
    match name {
        "k8s.io.apimachinery.pkg.api.resource.Quantity" => Some(Special::Quantity),
        "k8s.io.apimachinery.pkg.util.intstr.IntOrString" => Some(Special::IntOrString),
        "k8s.io.apimachinery.pkg.runtime.RawExtension" => Some(Special::RawJson),
        name if name.ends_with(".ExtraValue") => Some(Special::StringList),
        _ => None,
    }
}

const SCHEMA: &str = "k8s.io.apiextensions_apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

fn schema(number: u32, node: &Node<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
    let of = lookup(SCHEMA).ok_or_else(|| Error::NoMessage(SCHEMA.into()))?;
    write::nested(number, out, |out| write::message(of, node, out))
}

fn texts(number: u32, items: &[Node<'_>], out: &mut Vec<u8>) {
    items.iter().for_each(|item| write::text(number, item.text().unwrap_or_default(), out));
}

/// Writes a special message.
pub(super) fn write(special: Special, name: &str, node: &Node<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
    let refuse = || Error::Value(name.to_owned());
    match (special, node) {
        (_, Node::Null) => {}
        (Special::Time | Special::MicroTime, Node::Text(text)) => {
            let time = meta::parse_time(text).ok_or_else(refuse)?;
            write::integer(1, time.as_second(), out);
            write::integer(2, i64::from(time.subsec_nanosecond()), out);
        }
        (Special::Quantity, Node::Text(text)) => {
            write::text(1, &text.trim().parse::<Quantity>().map_err(|_| refuse())?.to_string(), out);
        }
        (Special::Quantity, Node::Number(n)) => {
            write::text(1, &n.to_string().parse::<Quantity>().map_err(|_| refuse())?.to_string(), out);
        }
        (Special::IntOrString, Node::Text(text)) => {
            write::integer(1, 1, out);
            write::integer(2, 0, out);
            write::text(3, text, out);
        }
        (Special::IntOrString, Node::Number(n)) => {
            write::integer(1, 0, out);
            write::integer(2, n.as_i64().unwrap_or_default(), out);
            write::text(3, "", out);
        }
        (Special::RawJson, node) => {
            return write::nested(1, out, |out| serde_json::to_writer(out, node).map_err(|_| refuse()));
        }
        (Special::StringList, Node::List(items)) => texts(1, items, out),
        (Special::SchemaOrArray, Node::List(items)) => {
            return items.iter().try_for_each(|item| schema(2, item, out));
        }
        (Special::SchemaOrBool, Node::Bool(allows)) => write::integer(1, i64::from(*allows), out),
        (Special::SchemaOrBool, node) => {
            write::integer(1, 1, out);
            return schema(2, node, out);
        }
        (Special::SchemaOrStrings, Node::List(items)) => texts(2, items, out),
        (Special::SchemaOrArray | Special::SchemaOrStrings, node) => return schema(1, node, out),
        _ => return Err(refuse()),
    }
    Ok(())
}

/// Reads a special message.
pub(super) fn read(special: Special, name: &str, data: &[u8], depth: usize) -> Result<Value, Error> {
    let mut fields = Vec::new();
    for field in read::fields(data) {
        fields.push(field?);
    }
    let number = |n: u32| fields.iter().rev().find(|(f, _)| *f == n).map_or(0, |(_, wire)| wire.integer());
    let bytes = |n: u32| {
        fields.iter().filter_map(move |(f, wire)| match wire {
            read::Wire::Bytes(data) if *f == n => Some(*data),
            _ => None,
        })
    };
    let text = |data: &[u8]| String::from_utf8_lossy(data).into_owned();
    let refuse = || Error::Field(name.to_owned());
    let schemas = |n: u32| {
        let of = lookup(SCHEMA).ok_or_else(|| Error::NoMessage(SCHEMA.into()))?;
        bytes(n).map(|data| read::message(of, data, depth + 1)).collect::<Result<Vec<_>, _>>()
    };
    Ok(match special {
        Special::Time | Special::MicroTime => {
            // Go writes nothing for the zero time.
            if fields.is_empty() {
                return Ok(Value::Null);
            }
            let nanos = i32::try_from(number(2)).map_err(|_| refuse())?;
            let time = Timestamp::new(number(1), nanos).map_err(|_| refuse())?;
            if matches!(special, Special::Time) { meta::time(time) } else { meta::micro_time(time) }.into()
        }
        Special::Quantity => {
            bytes(1).next_back().map(text).filter(|t| !t.is_empty()).unwrap_or_else(|| "0".into()).into()
        }
        Special::IntOrString if number(1) == 1 => bytes(3).next_back().map(text).unwrap_or_default().into(),
        Special::IntOrString => number(2).into(),
        Special::RawJson => match bytes(1).next_back().filter(|data| !data.is_empty()) {
            Some(data) => serde_json::from_slice(data).map_err(|_| refuse())?,
            None => Value::Null,
        },
        Special::StringList => bytes(1).map(text).map(Value::from).collect(),
        Special::SchemaOrArray => match schemas(1)?.pop() {
            Some(schema) => schema,
            None => schemas(2)?.into(),
        },
        Special::SchemaOrBool => match schemas(2)?.pop() {
            Some(schema) => schema,
            None => json!(number(1) != 0),
        },
        Special::SchemaOrStrings => match schemas(1)?.pop() {
            Some(schema) => schema,
            None => bytes(2).map(text).map(Value::from).collect(),
        },
    })
}
