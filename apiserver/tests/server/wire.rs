//! Just enough of protobuf's wire format to be somebody else's client.

/// A varint field.
pub(crate) fn number(field: u32, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(u64::from(field) << 3, &mut out);
    varint(value, &mut out);
    out
}

/// A string, bytes or message field.
pub(crate) fn bytes(field: u32, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(u64::from(field) << 3 | 2, &mut out);
    varint(value.len() as u64, &mut out);
    out.extend_from_slice(value);
    out
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// An object in Kubernetes' envelope.
pub(crate) fn sealed(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let kind = [bytes(1, api_version.as_bytes()), bytes(2, kind.as_bytes())].concat();
    [b"k8s\0".to_vec(), bytes(1, &kind), bytes(2, raw)].concat()
}

/// A message taken apart: its fields in order.
#[derive(Debug, Default)]
pub(crate) struct Message(Vec<(u32, Vec<u8>, u64)>);

impl Message {
    /// Reads one.
    pub(crate) fn read(mut data: &[u8]) -> Self {
        let mut fields = Vec::new();
        while !data.is_empty() {
            let key = take(&mut data);
            let field = (key >> 3) as u32;
            match key & 7 {
                0 => fields.push((field, Vec::new(), take(&mut data))),
                2 => {
                    let length = take(&mut data) as usize;
                    let (value, rest) = data.split_at(length);
                    fields.push((field, value.to_vec(), 0));
                    data = rest;
                }
                other => panic!("wire type {other}"),
            }
        }
        Self(fields)
    }

    /// The message in an envelope, and its kind.
    pub(crate) fn open(data: &[u8]) -> (String, Self) {
        let unknown = Self::read(data.strip_prefix(b"k8s\0").expect("the magic number"));
        let kind = unknown.message(1);
        (format!("{} {}", kind.text(1), kind.text(2)), unknown.message(2))
    }

    /// All values of a field.
    pub(crate) fn all(&self, field: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter(move |(f, ..)| *f == field).map(|(_, value, _)| value.as_slice())
    }

    /// A message field.
    pub(crate) fn message(&self, field: u32) -> Self {
        self.all(field).next().map(Self::read).unwrap_or_default()
    }

    /// A string field.
    pub(crate) fn text(&self, field: u32) -> String {
        String::from_utf8(self.all(field).next().unwrap_or_default().to_vec()).unwrap()
    }

    /// A number field.
    pub(crate) fn number(&self, field: u32) -> u64 {
        self.0.iter().find(|(f, ..)| *f == field).map_or(0, |(.., n)| *n)
    }
}

fn take(data: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = data.split_first().expect("a whole varint");
        *data = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}
