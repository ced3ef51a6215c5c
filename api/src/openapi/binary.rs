//! The v2 document as upstream's clients ask for it: the protobuf form of OpenAPI 2.0 documents.
//!
//! Carries what those clients read, the definitions; the operations are in the JSON form only.

use serde_json::Value;

use crate::protobuf::write::{bytes, integer, text};

/// Encodes a v2 document given as JSON.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    text(1, "2.0", &mut out);
    let mut info = Vec::new();
    strings(&document["info"], &[("title", 1), ("version", 2)], &mut info);
    bytes(2, &info, &mut out);
    // Readers expect the message, also when there is nothing in it.
    bytes(8, b"", &mut out);
    bytes(9, &named_schemas(&document["definitions"]), &mut out);
    out
}

fn strings(value: &Value, fields: &[(&str, u32)], out: &mut Vec<u8>) {
    for (name, number) in fields {
        if let Some(found) = value[*name].as_str() {
            text(*number, found, out);
        }
    }
}

/// A map of schemas: repeated pairs of a name and a schema.
fn named_schemas(map: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in map.as_object().into_iter().flatten() {
        let mut pair = Vec::new();
        text(1, name, &mut pair);
        bytes(2, &schema(value), &mut pair);
        bytes(1, &pair, &mut out);
    }
    out
}

/// A value of any type, as the YAML text that JSON is.
fn any(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(2, &format!("{value}\n"), &mut out);
    out
}

fn schema(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    strings(value, &[("$ref", 1), ("format", 2), ("title", 3), ("description", 4)], &mut out);
    if let Some(default) = value.get("default") {
        bytes(5, &any(default), &mut out);
    }
    for name in value["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        text(19, name, &mut out);
    }
    for one in value["enum"].as_array().into_iter().flatten() {
        bytes(20, &any(one), &mut out);
    }
    match &value["additionalProperties"] {
        Value::Bool(open) => {
            let mut item = Vec::new();
            integer(2, i64::from(*open), &mut item);
            bytes(21, &item, &mut out);
        }
        inner @ Value::Object(_) => {
            let mut item = Vec::new();
            bytes(1, &schema(inner), &mut item);
            bytes(21, &item, &mut out);
        }
        _ => {}
    }
    if let Some(kind) = value["type"].as_str() {
        let mut item = Vec::new();
        text(1, kind, &mut item);
        bytes(22, &item, &mut out);
    }
    if value["items"].is_object() {
        let mut item = Vec::new();
        bytes(1, &schema(&value["items"]), &mut item);
        bytes(23, &item, &mut out);
    }
    if value["properties"].is_object() {
        bytes(25, &named_schemas(&value["properties"]), &mut out);
    }
    for (name, extension) in value.as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("x-")) {
        let mut pair = Vec::new();
        text(1, name, &mut pair);
        bytes(2, &any(extension), &mut pair);
        bytes(31, &pair, &mut out);
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn known_bytes() {
        let found = schema(&json!({"type": "array", "items": {"$ref": "#/d"}, "x-a": [1]}));
        assert_eq!(
            found,
            b"\xb2\x01\x07\n\x05array\xba\x01\x07\n\x05\n\x03#/d\xfa\x01\x0d\n\x03x-a\x12\x06\x12\x04[1]\n"
        );
        let open = schema(&json!({"additionalProperties": true}));
        assert_eq!(open, b"\xaa\x01\x02\x10\x01");
        let document = json!({"info": {"title": "K", "version": "v"}, "definitions": {"a": {"description": "d"}}});
        assert_eq!(encode(&document), b"\n\x032.0\x12\x06\n\x01K\x12\x01vB\x00J\x0a\n\x08\n\x01a\x12\x03\"\x01d");
    }
}
