//! JSON to protobuf.

use base64::Engine;
use serde_json::Value;

use super::{Error, Field, Kind, Shape, message as lookup, special};

const BASE64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

pub(super) fn varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn tag(number: u32, wire: u32, out: &mut Vec<u8>) {
    varint(u64::from(number << 3 | wire), out);
}

/// A length-delimited field.
pub(crate) fn bytes(number: u32, data: &[u8], out: &mut Vec<u8>) {
    tag(number, 2, out);
    varint(data.len() as u64, out);
    out.extend_from_slice(data);
}

/// A string field.
pub(crate) fn text(number: u32, data: &str, out: &mut Vec<u8>) {
    bytes(number, data.as_bytes(), out);
}

/// A varint field; negative numbers take ten bytes, as in Go.
pub(crate) fn integer(number: u32, n: i64, out: &mut Vec<u8>) {
    tag(number, 0, out);
    varint(n as u64, out);
}

/// All fields of a message, without length.
pub(super) fn message(name: &'static str, value: &Value, out: &mut Vec<u8>) -> Result<(), Error> {
    if let Some(result) = special::write(name, value, out) {
        return result;
    }
    let fields = lookup(name).ok_or_else(|| Error::NoMessage(name.to_owned()))?;
    for field in fields {
        write_field(field, value, out)?;
    }
    Ok(())
}

fn write_field(field: &Field, parent: &Value, out: &mut Vec<u8>) -> Result<(), Error> {
    if field.shape == Shape::Inline {
        let Kind::Message(name) = field.kind else { return Ok(()) };
        let mut inner = Vec::new();
        message(name, parent, &mut inner)?;
        bytes(field.number, &inner, out);
        return Ok(());
    }
    let Some(value) = parent.get(field.name).filter(|v| !v.is_null()) else { return Ok(()) };
    let refuse = || Error::Value(field.name.to_owned());
    match field.shape {
        Shape::Repeated => {
            for item in value.as_array().ok_or_else(refuse)? {
                single(field, item, out)?;
            }
            Ok(())
        }
        Shape::Map => {
            let map = value.as_object().ok_or_else(refuse)?;
            let mut keys: Vec<_> = map.iter().collect();
            keys.sort_by_key(|(k, _)| k.as_str());
            for (key, item) in keys {
                let mut entry = Vec::new();
                text(1, key, &mut entry);
                single(&Field { number: 2, ..*field }, item, &mut entry)?;
                bytes(field.number, &entry, out);
            }
            Ok(())
        }
        _ => single(field, value, out),
    }
}

fn single(field: &Field, value: &Value, out: &mut Vec<u8>) -> Result<(), Error> {
    let refuse = || Error::Value(field.name.to_owned());
    let number = field.number;
    match field.kind {
        Kind::String => text(number, value.as_str().ok_or_else(refuse)?, out),
        Kind::Int32 | Kind::Int64 => integer(number, value.as_i64().ok_or_else(refuse)?, out),
        Kind::Bool => integer(number, i64::from(value.as_bool().ok_or_else(refuse)?), out),
        Kind::Double => {
            tag(number, 1, out);
            out.extend_from_slice(&value.as_f64().ok_or_else(refuse)?.to_le_bytes());
        }
        Kind::Bytes => {
            let data = BASE64.decode(value.as_str().ok_or_else(refuse)?).map_err(|_| refuse())?;
            bytes(number, &data, out);
        }
        Kind::Message(name) => {
            let mut inner = Vec::new();
            message(name, value, &mut inner)?;
            bytes(number, &inner, out);
        }
    }
    Ok(())
}
