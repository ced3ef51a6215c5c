//! Protobuf to JSON.

use base64::Engine;
use serde_json::{Map, Number, Value};

use super::{Error, Field, Kind, Message, Shape, special};

const BASE64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

/// How deep messages may nest.
const MAX_DEPTH: usize = 200;

/// A field as it is on the wire.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32,
    Bytes(&'a [u8]),
}

impl Wire<'_> {
    pub(super) fn integer(self) -> i64 {
        match self {
            Self::Varint(n) => n as i64,
            _ => 0,
        }
    }
}

fn varint(data: &mut &[u8]) -> Result<u64, Error> {
    let mut out = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = data.split_first().ok_or(Error::Truncated)?;
        *data = rest;
        out |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(out);
        }
    }
    Err(Error::Field("varint".into()))
}

fn take<'a>(data: &mut &'a [u8], len: usize) -> Result<&'a [u8], Error> {
    let (taken, rest) = data.split_at_checked(len).ok_or(Error::Truncated)?;
    *data = rest;
    Ok(taken)
}

/// The fields of a message in wire order.
pub(super) fn fields(mut data: &[u8]) -> impl Iterator<Item = Result<(u32, Wire<'_>), Error>> {
    let mut failed = false;
    std::iter::from_fn(move || {
        if data.is_empty() || failed {
            return None;
        }
        let result = field(&mut data);
        failed = result.is_err();
        Some(result)
    })
}

fn field<'a>(data: &mut &'a [u8]) -> Result<(u32, Wire<'a>), Error> {
    let tag = varint(data)?;
    let number = u32::try_from(tag >> 3).map_err(|_| Error::Field("tag".into()))?;
    let wire = match tag & 7 {
        0 => Wire::Varint(varint(data)?),
        1 => Wire::Fixed64(u64::from_le_bytes(take(data, 8)?.try_into().map_err(|_| Error::Truncated)?)),
        2 => {
            let len = usize::try_from(varint(data)?).map_err(|_| Error::Truncated)?;
            Wire::Bytes(take(data, len)?)
        }
        5 => {
            take(data, 4)?;
            Wire::Fixed32
        }
        _ => return Err(Error::Field(format!("{number}"))),
    };
    Ok((number, wire))
}

/// Reads a message's fields into an object.
pub(super) fn message_into(of: &'static Message, data: &[u8], out: &mut Map<String, Value>) -> Result<(), Error> {
    into(of, data, out, 0)
}

/// Reads a message into whatever JSON it has.
pub(super) fn message(of: &'static Message, data: &[u8], depth: usize) -> Result<Value, Error> {
    if let Some(special) = of.special {
        return special::read(special, of.name, data, depth);
    }
    let mut out = Map::new();
    into(of, data, &mut out, depth)?;
    Ok(Value::Object(out))
}

fn into(of: &'static Message, data: &[u8], out: &mut Map<String, Value>, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::Field(of.name.to_owned()));
    }
    let table = of.fields();
    for entry in fields(data) {
        let (number, wire) = entry?;
        let Ok(at) = table.binary_search_by_key(&number, |f| f.number) else { continue };
        read_field(&table[at], wire, out, depth)?;
    }
    Ok(())
}

fn read_field(field: &Field, wire: Wire<'_>, out: &mut Map<String, Value>, depth: usize) -> Result<(), Error> {
    match (field.shape, field.kind, wire) {
        (Shape::Inline, Kind::Message(of), Wire::Bytes(data)) => into(of, data, out, depth + 1),
        (Shape::Map, _, Wire::Bytes(data)) => {
            let mut key = String::new();
            let mut value = Value::Null;
            for entry in fields(data) {
                match entry? {
                    (1, Wire::Bytes(bytes)) => key = String::from_utf8_lossy(bytes).into_owned(),
                    (2, wire) => value = single(field, wire, depth)?,
                    _ => {}
                }
            }
            if value.is_null() {
                value = match field.kind {
                    Kind::String | Kind::Bytes => "".into(),
                    _ => Value::Null,
                };
            }
            let slot = out.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = slot {
                map.insert(key, value);
            }
            Ok(())
        }
        (Shape::Repeated, Kind::Int32 | Kind::Int64, Wire::Bytes(mut packed)) => {
            while !packed.is_empty() {
                let n = varint(&mut packed)?;
                push(out, field.name, (n as i64).into());
            }
            Ok(())
        }
        (Shape::Repeated, ..) => {
            let value = single(field, wire, depth)?;
            push(out, field.name, value);
            Ok(())
        }
        _ => {
            let value = single(field, wire, depth)?;
            out.insert(field.name.to_owned(), value);
            Ok(())
        }
    }
}

fn push(out: &mut Map<String, Value>, name: &str, value: Value) {
    if let Value::Array(items) = out.entry(name).or_insert_with(|| Value::Array(Vec::new())) {
        items.push(value);
    }
}

fn single(field: &Field, wire: Wire<'_>, depth: usize) -> Result<Value, Error> {
    Ok(match (field.kind, wire) {
        (Kind::String, Wire::Bytes(data)) => String::from_utf8_lossy(data).into_owned().into(),
        (Kind::Int32, Wire::Varint(n)) => (n as i32).into(),
        (Kind::Int64, Wire::Varint(n)) => (n as i64).into(),
        (Kind::Bool, Wire::Varint(n)) => (n != 0).into(),
        (Kind::Double, Wire::Fixed64(n)) => Number::from_f64(f64::from_bits(n)).map_or(Value::Null, Value::Number),
        (Kind::Bytes, Wire::Bytes(data)) => BASE64.encode(data).into(),
        (Kind::Message(of), Wire::Bytes(data)) => message(of, data, depth + 1)?,
        _ => return Err(Error::Field(field.name.to_owned())),
    })
}
