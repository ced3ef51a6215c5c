//! The bytes of nfnetlink messages: attributes written and read, element lists, batches.
//!
//! Only what this crate sends and receives; numbers are those of `linux/netfilter/nf_tables.h`.

use super::element::{Chain, Element, Family, Key, Map, Value};

pub(crate) const SUBSYS_NFTABLES: u16 = 10;
pub(crate) const SUBSYS_CTNETLINK: u16 = 1;
pub(crate) const MSG_GETCHAIN: u16 = 4;
pub(crate) const MSG_DELTABLE: u16 = 2;
pub(crate) const MSG_GETRULE: u16 = 7;
pub(crate) const MSG_DELSET: u16 = 11;
pub(crate) const MSG_NEWSETELEM: u16 = 12;
pub(crate) const MSG_GETSETELEM: u16 = 13;
pub(crate) const MSG_DELSETELEM: u16 = 14;
pub(crate) const MSG_NEWGEN: u16 = 15;
pub(crate) const MSG_GETGEN: u16 = 16;

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const NFT_GOTO: i32 = -4;
/// Bytes of element list per message; an attribute's length is 16 bits.
const LIST_MAX: usize = 60_000;

/// Attribute types of an element list message.
mod attr {
    pub(super) const LIST_TABLE: u16 = 1;
    pub(super) const LIST_SET: u16 = 2;
    pub(super) const LIST_ELEMENTS: u16 = 3;
    pub(super) const ELEMENT: u16 = 1;
    pub(super) const KEY: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const KEY_END: u16 = 10;
    pub(super) const VALUE: u16 = 1;
    pub(super) const VERDICT: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
    pub(super) const VERDICT_CHAIN: u16 = 2;
}

/// Appends an attribute.
pub(crate) fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Appends a zero-terminated string attribute.
pub(crate) fn put_string(out: &mut Vec<u8>, kind: u16, value: &str) {
    let len = u16::try_from(value.len() + 5).unwrap_or(u16::MAX);
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value.as_bytes());
    out.resize((out.len() + 1).next_multiple_of(4), 0);
}

/// Appends an attribute holding what `fill` writes.
pub(crate) fn nest(out: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let len = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
    out[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    out[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
}

/// Iterates over attributes: type without flags, and payload.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The payload of one attribute.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

/// A string attribute's text.
pub(crate) fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).unwrap_or_default()
}

/// Appends one message: headers, then what `fill` writes.
pub(crate) fn message(
    out: &mut Vec<u8>,
    (kind, flags, sequence): (u16, u16, u32),
    (family, resource): (u8, u16),
    fill: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[family, 0]);
    out.extend_from_slice(&resource.to_be_bytes());
    fill(out);
    let len = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&len.to_ne_bytes());
}

/// A received message.
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// Port of the socket that caused it, in notifications.
    pub(crate) port: u32,
    /// Attributes; for errors the code in the first four bytes.
    pub(crate) body: &'a [u8],
}

impl Received<'_> {
    /// The errno of an error message; 0 is an acknowledgement.
    pub(crate) fn errno(&self) -> i32 {
        self.body.first_chunk().map_or(0, |c| -i32::from_ne_bytes(*c))
    }
}

/// Splits a datagram into messages.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let len = usize::try_from(word(0)?).ok()?;
        let (kind, flags, sequence, port) = (half(4)?, half(6)?, word(8)?, word(12)?);
        let payload = bytes.get(16..len)?;
        let control = kind < 0x10;
        let body = if control { payload } else { payload.get(4..)? };
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Received { kind, flags, sequence, port, body })
    })
}

/// `SUBSYS << 8 | MSG`.
pub(crate) fn nft(kind: u16) -> u16 {
    SUBSYS_NFTABLES << 8 | kind
}

/// Appends an attribute that holds one value, of a length that is a multiple of four: most of what a load is.
fn put_value(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = value.len() as u16;
    let [a, b, c, d] = [len + 8, kind | NESTED, len + 4, attr::VALUE].map(u16::to_ne_bytes);
    out.extend_from_slice(&[a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]);
    out.extend_from_slice(value);
}

fn put_element(out: &mut Vec<u8>, element: &Element, with_value: bool) {
    nest(out, attr::ELEMENT, |e| {
        put_value(e, attr::KEY, element.key.bytes());
        match &element.value {
            Value::Until(end) => put_value(e, attr::KEY_END, end.bytes()),
            Value::Backend(to) if with_value => put_value(e, attr::DATA, to.bytes()),
            Value::Goto(chain) if with_value && element.map.is_numbered() => {
                put_value(e, attr::DATA, &chain.number().to_ne_bytes());
            }
            Value::Goto(chain) if with_value => nest(e, attr::DATA, |d| {
                nest(d, attr::VERDICT, |v| {
                    put(v, attr::VERDICT_CODE, &NFT_GOTO.to_be_bytes());
                    put_string(v, attr::VERDICT_CHAIN, &chain.to_string());
                });
            }),
            _ => {}
        }
    });
}

/// Whether elements are added, and where.
type Target = (bool, Family, Map);

/// Collects changes of elements and writes them as one transaction.
#[derive(Default)]
pub(crate) struct Batch {
    lists: Vec<(Target, Vec<Vec<u8>>)>,
    size: usize,
}

impl Batch {
    /// Deletes an element.
    pub(crate) fn remove(&mut self, element: &Element) {
        self.put(false, element);
    }

    /// Adds an element.
    pub(crate) fn add(&mut self, element: &Element) {
        self.put(true, element);
    }

    fn put(&mut self, add: bool, element: &Element) {
        let id = (add, element.family, element.map);
        let position = self.lists.iter().position(|(i, _)| *i == id).unwrap_or_else(|| {
            self.lists.push((id, vec![Vec::new()]));
            self.lists.len() - 1
        });
        let chunks = &mut self.lists[position].1;
        if chunks.last().is_none_or(|c| c.len() > LIST_MAX) {
            chunks.push(Vec::new());
        }
        if let Some(chunk) = chunks.last_mut() {
            let before = chunk.len();
            put_element(chunk, element, add);
            self.size += chunk.len() - before;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Bytes so far, about.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The transaction's bytes, removals first, and the sequence number of its last message, which asks for an answer.
    pub(crate) fn encode(mut self, table: &str) -> (Vec<u8>, u32) {
        self.lists.sort_by_key(|(id, _)| *id);
        let count: usize = self.lists.iter().map(|(_, chunks)| chunks.len()).sum();
        let last = u32::try_from(count).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(self.size + count * 80 + 64);
        message(&mut out, (BATCH_BEGIN, NLM_F_REQUEST, 0), (0, SUBSYS_NFTABLES), |_| {});
        let mut sequence = 0;
        for ((add, family, map), chunks) in self.lists {
            let (kind, flags) = if add { (MSG_NEWSETELEM, NLM_F_CREATE) } else { (MSG_DELSETELEM, 0) };
            for chunk in chunks {
                sequence += 1;
                let ack = if sequence == last { NLM_F_ACK } else { 0 };
                message(&mut out, (nft(kind), NLM_F_REQUEST | flags | ack, sequence), (family.number(), 0), |m| {
                    put_string(m, attr::LIST_TABLE, table);
                    put_string(m, attr::LIST_SET, map.name());
                    nest(m, attr::LIST_ELEMENTS, |l| l.extend_from_slice(&chunk));
                });
            }
        }
        message(&mut out, (BATCH_END, NLM_F_REQUEST, last + 1), (0, SUBSYS_NFTABLES), |_| {});
        (out, last)
    }
}

/// A transaction of one message.
pub(crate) fn single(kind: u16, family: Family, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut transaction = Transaction::begin();
    transaction.add(kind, 0, family, fill);
    transaction.end().0
}

/// A transaction of messages of any kind; each is answered.
pub(crate) struct Transaction {
    out: Vec<u8>,
    last: u32,
}

impl Transaction {
    pub(crate) fn begin() -> Self {
        let mut out = Vec::new();
        message(&mut out, (BATCH_BEGIN, NLM_F_REQUEST, 0), (0, SUBSYS_NFTABLES), |_| {});
        Self { out, last: 0 }
    }

    pub(crate) fn add(&mut self, kind: u16, flags: u16, family: Family, fill: impl FnOnce(&mut Vec<u8>)) {
        self.last += 1;
        let head = (nft(kind), NLM_F_REQUEST | NLM_F_ACK | flags, self.last);
        message(&mut self.out, head, (family.number(), 0), fill);
    }

    /// Its bytes, and the number of its last message.
    pub(crate) fn end(mut self) -> (Vec<u8>, u32) {
        message(&mut self.out, (BATCH_END, NLM_F_REQUEST, self.last + 1), (0, SUBSYS_NFTABLES), |_| {});
        (self.out, self.last)
    }
}

/// A request for all elements of a set or map.
pub(crate) fn dump_elements(table: &str, set: &str, family: Family) -> Vec<u8> {
    let mut out = Vec::new();
    message(&mut out, (nft(MSG_GETSETELEM), NLM_F_REQUEST | NLM_F_DUMP, 1), (family.number(), 0), |m| {
        put_string(m, attr::LIST_TABLE, table);
        put_string(m, attr::LIST_SET, set);
    });
    out
}

/// A change of the affinity map's elements, which the model does not hold.
pub(crate) fn delete_raw(table: &str, set: &str, family: Family, keys: &[Vec<u8>]) -> Vec<u8> {
    single(MSG_DELSETELEM, family, |m| {
        put_string(m, attr::LIST_TABLE, table);
        put_string(m, attr::LIST_SET, set);
        nest(m, attr::LIST_ELEMENTS, |l| {
            for key in keys {
                nest(l, attr::ELEMENT, |e| nest(e, attr::KEY, |k| put(k, attr::VALUE, key)));
            }
        });
    })
}

/// What a key of a dump leads to.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    None,
    Value(&'a [u8]),
    /// Goes to a chain of this name.
    Goto(&'a str),
    /// Another verdict.
    Verdict,
}

/// An element in a dump's message.
pub(crate) struct Raw<'a> {
    pub(crate) key: &'a [u8],
    /// The other end of a range.
    pub(crate) end: Option<&'a [u8]>,
    pub(crate) data: Data<'a>,
}

impl<'a> Raw<'a> {
    fn read(element: &'a [u8]) -> Option<Self> {
        let mut raw = Self { key: &[], end: None, data: Data::None };
        for (kind, nested) in attributes(element) {
            match kind {
                attr::KEY => raw.key = attribute(nested, attr::VALUE)?,
                attr::KEY_END => raw.end = attribute(nested, attr::VALUE),
                attr::DATA => {
                    raw.data = match attributes(nested).next()? {
                        (attr::VALUE, value) => Data::Value(value),
                        (attr::VERDICT, verdict) => goto(verdict).map_or(Data::Verdict, Data::Goto),
                        _ => Data::None,
                    }
                }
                _ => {}
            }
        }
        (!raw.key.is_empty()).then_some(raw)
    }

    /// As we write it.
    fn element(&self, family: Family, map: Map) -> Element {
        let value = match self.data {
            Data::Goto(chain) => chain.parse().map_or(Value::Foreign, Value::Goto),
            Data::Verdict => Value::Foreign,
            Data::Value(number) if map.is_numbered() => {
                let chain = number.first_chunk().and_then(|n| Chain::numbered(u32::from_ne_bytes(*n)));
                chain.map_or(Value::Foreign, Value::Goto)
            }
            Data::Value(to) => Value::Backend(Key::from_bytes(to)),
            Data::None => self.end.map_or(Value::Member, |end| Value::Until(Key::from_bytes(end))),
        };
        Element { family, map, key: Key::from_bytes(self.key), value }
    }
}

/// The chain a verdict goes to.
fn goto(verdict: &[u8]) -> Option<&str> {
    let goes = attribute(verdict, attr::VERDICT_CODE) == Some(&NFT_GOTO.to_be_bytes());
    attribute(verdict, attr::VERDICT_CHAIN).filter(|_| goes).map(text)
}

/// Every element in a dump's message, as it is there.
pub(crate) fn raw_elements(body: &[u8]) -> impl Iterator<Item = Raw<'_>> {
    let list = attribute(body, attr::LIST_ELEMENTS).unwrap_or_default();
    attributes(list).filter_map(|(_, element)| Raw::read(element))
}

/// The elements in a dump's message.
pub(crate) fn elements(family: Family, map: Map, body: &[u8]) -> impl Iterator<Item = Element> {
    raw_elements(body).map(move |raw| raw.element(family, map))
}
