//! JSON to protobuf.

use base64::Engine;
use serde_json::Number;

use super::{Error, Field, Kind, Message, Shape, node::Node, special};

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

/// The head of a length-delimited field of so many bytes.
pub(super) fn length(number: u32, bytes: usize, out: &mut Vec<u8>) {
    tag(number, 2, out);
    varint(bytes as u64, out);
}

/// A length-delimited field.
pub(crate) fn bytes(number: u32, data: &[u8], out: &mut Vec<u8>) {
    length(number, data.len(), out);
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

/// A length-delimited field of what `content` appends.
pub(super) fn nested(
    number: u32,
    out: &mut Vec<u8>,
    content: impl FnOnce(&mut Vec<u8>) -> Result<(), Error>,
) -> Result<(), Error> {
    tag(number, 2, out);
    let start = out.len();
    // Most contents are short: their length takes this byte, a longer one moves them on.
    out.push(0);
    content(out)?;
    let len = out.len() - start - 1;
    match u8::try_from(len) {
        Ok(short @ 0..0x80) => out[start] = short,
        _ => {
            let mut size = Vec::with_capacity(5);
            varint(len as u64, &mut size);
            out.splice(start..=start, size);
        }
    }
    Ok(())
}

/// All fields of a message, without length.
pub(super) fn message(of: &'static Message, node: &Node<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
    match of.special {
        Some(special) => special::write(special, of.name, node, out),
        None => of.fields().iter().try_for_each(|field| write_field(field, node, out)),
    }
}

fn write_field(field: &Field, parent: &Node<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
    if field.shape == Shape::Inline {
        let Kind::Message(of) = field.kind else { return Ok(()) };
        return nested(field.number, out, |out| message(of, parent, out));
    }
    let Some(node) = parent.get(field.name) else { return Ok(()) };
    match (field.shape, node) {
        (Shape::Repeated, Node::List(items)) => items.iter().try_for_each(|item| single(field, item, out)),
        (Shape::Map, Node::Object(members)) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by(|(a, _), (b, _)| a.cmp(b));
            let value = Field { number: 2, ..*field };
            members.into_iter().try_for_each(|(key, item)| {
                nested(field.number, out, |out| {
                    text(1, key, out);
                    single(&value, item, out)
                })
            })
        }
        (Shape::Repeated | Shape::Map, _) => Err(Error::Value(field.name.to_owned())),
        _ => single(field, node, out),
    }
}

fn single(field: &Field, node: &Node<'_>, out: &mut Vec<u8>) -> Result<(), Error> {
    let refuse = || Error::Value(field.name.to_owned());
    let number = field.number;
    match field.kind {
        Kind::String => text(number, node.text().ok_or_else(refuse)?, out),
        Kind::Int32 | Kind::Int64 => {
            integer(number, node.number().and_then(Number::as_i64).ok_or_else(refuse)?, out);
        }
        Kind::Bool => match node {
            Node::Bool(value) => integer(number, i64::from(*value), out),
            _ => return Err(refuse()),
        },
        Kind::Double => {
            let value = node.number().and_then(Number::as_f64).ok_or_else(refuse)?;
            tag(number, 1, out);
            out.extend_from_slice(&value.to_le_bytes());
        }
        Kind::Bytes => {
            let data = BASE64.decode(node.text().ok_or_else(refuse)?).map_err(|_| refuse())?;
            bytes(number, &data, out);
        }
        Kind::Message(of) => nested(number, out, |out| message(of, node, out))?,
    }
    Ok(())
}
