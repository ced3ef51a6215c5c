//! A query as it comes: one pass over its bytes, nothing allocated.

use super::OPCODE_QUERY;

/// Longest name on the wire.
const NAME_MAX: usize = 255;
/// Most labels a name of that length has, the root aside.
pub(crate) const LABELS_MAX: usize = NAME_MAX / 2;
pub(crate) const HEADER: usize = 12;
const DNSSEC_OK: u32 = 0x8000;

/// What a client says of itself by EDNS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Edns {
    /// Largest answer it takes over UDP.
    pub(crate) payload: u16,
    pub(crate) version: u8,
    pub(crate) dnssec_ok: bool,
}

/// A query with one question.
#[derive(Clone)]
pub(crate) struct Query {
    pub(crate) id: u16,
    pub(crate) opcode: u8,
    pub(crate) recursion_desired: bool,
    pub(crate) checking_disabled: bool,
    pub(crate) kind: u16,
    pub(crate) class: u16,
    pub(crate) edns: Option<Edns>,
    /// The name in lower case, labels with their lengths in front, the root's zero at the end.
    lower: [u8; NAME_MAX],
    /// The name as it came: answers repeat it so.
    name: [u8; NAME_MAX],
    len: usize,
}

/// What is wrong with bytes that are no query we understand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Malformed {
    /// Nothing to answer: not even a header, or itself an answer.
    Silent,
    /// To be answered with this code.
    Answer { id: u16, opcode: u8, code: u8 },
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The position after a name that may end in a pointer.
pub(crate) fn skip_name(bytes: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let len = usize::from(*bytes.get(at)?);
        match len {
            0 => return Some(at + 1),
            1..=63 => at += len + 1,
            192.. => return Some(at + 2),
            _ => return None,
        }
    }
}

impl Query {
    /// Reads a query.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Malformed::Silent)?;
        if header[2] & 0x80 != 0 {
            return Err(Malformed::Silent);
        }
        let (id, opcode) = (u16::from_be_bytes([header[0], header[1]]), header[2] >> 3 & 15);
        let answer = |code| Malformed::Answer { id, opcode, code };
        if opcode != OPCODE_QUERY {
            return Err(answer(super::NOT_IMPLEMENTED));
        }
        Self::body(bytes, id, opcode).ok_or(answer(super::FORMAT_ERROR))
    }

    fn body(bytes: &[u8], id: u16, opcode: u8) -> Option<Self> {
        let counts = [half(bytes, 4)?, half(bytes, 6)?, half(bytes, 8)?, half(bytes, 10)?];
        if counts[..3] != [1, 0, 0] {
            return None;
        }
        let mut query = Self {
            id,
            opcode,
            recursion_desired: bytes[2] & 1 != 0,
            checking_disabled: bytes[3] & 0x10 != 0,
            kind: 0,
            class: 0,
            edns: None,
            lower: [0; NAME_MAX],
            name: [0; NAME_MAX],
            len: 0,
        };
        let mut at = HEADER + query.take_name(&bytes[HEADER..])?;
        (query.kind, query.class) = (half(bytes, at)?, half(bytes, at + 2)?);
        at += 4;
        for _ in 0..counts[3] {
            at = skip_name(bytes, at)?;
            let (kind, class, len) = (half(bytes, at)?, half(bytes, at + 2)?, half(bytes, at + 8)?);
            if kind == super::kind::OPT {
                let extra = u32::from_be_bytes(*bytes.get(at + 4..)?.first_chunk()?);
                let edns = Edns { payload: class, version: (extra >> 16) as u8, dnssec_ok: extra & DNSSEC_OK != 0 };
                if query.edns.replace(edns).is_some() {
                    return None;
                }
            }
            at += 10 + usize::from(len);
            if at > bytes.len() {
                return None;
            }
        }
        Some(query)
    }

    /// Copies a name without pointers; its length.
    fn take_name(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        loop {
            let len = usize::from(*bytes.get(at)?);
            let end = at + 1 + len;
            if len > 63 || end > NAME_MAX {
                return None;
            }
            self.name[at..end].copy_from_slice(bytes.get(at..end)?);
            self.lower[at] = bytes[at];
            for (to, from) in self.lower[at + 1..end].iter_mut().zip(&bytes[at + 1..end]) {
                *to = from.to_ascii_lowercase();
            }
            at = end;
            if len == 0 {
                self.len = at;
                return Some(at);
            }
        }
    }

    /// The same client's query for another name.
    pub(crate) fn about(&self, name: &str) -> Option<Self> {
        let mut wire = Vec::with_capacity(name.len() + 2);
        super::reply::put_name(&mut wire, name.split('.'));
        wire.push(0);
        let mut query = self.clone();
        query.take_name(&wire)?;
        Some(query)
    }

    /// The name's bytes as they came.
    pub(crate) fn name(&self) -> &[u8] {
        &self.name[..self.len]
    }

    /// The name's bytes in lower case.
    pub(crate) fn lower(&self) -> &[u8] {
        &self.lower[..self.len]
    }

    /// The labels in lower case, without the root's; `None` when one is no text.
    pub(crate) fn labels<'a>(&'a self, into: &'a mut [&'a str; LABELS_MAX]) -> Option<&'a [&'a str]> {
        let (mut rest, mut count) = (self.lower(), 0);
        while let Some((len, tail)) = rest.split_first().filter(|(len, _)| **len > 0) {
            let (label, after) = tail.split_at_checked(usize::from(*len))?;
            *into.get_mut(count)? = std::str::from_utf8(label).ok()?;
            count += 1;
            rest = after;
        }
        Some(&into[..count])
    }
}

impl std::fmt::Debug for Query {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} type {}", String::from_utf8_lossy(self.lower()), self.kind)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use hickory_proto::{
        op::{Edns as PeerEdns, Message, MessageType, OpCode, Query as Question},
        rr::{Name, RecordType},
    };
    use proptest::prelude::*;

    use super::*;

    /// A query as another implementation writes it.
    pub(crate) fn ask(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
        message.edns = edns.map(|payload| {
            let mut edns = PeerEdns::new();
            edns.set_max_payload(payload);
            edns
        });
        message.to_vec().unwrap()
    }

    #[test]
    fn what_others_write_is_read() {
        let query = Query::parse(&ask("Web.Default.svc.cluster.local.", RecordType::A, Some(4096))).unwrap();
        let mut room = [""; LABELS_MAX];
        assert_eq!(query.labels(&mut room).unwrap(), ["web", "default", "svc", "cluster", "local"]);
        assert!(query.name().starts_with(b"\x03Web\x07Default"));
        assert_eq!((query.id, query.kind, query.class, query.recursion_desired), (7, 1, 1, true));
        assert_eq!(query.edns, Some(Edns { payload: 4096, version: 0, dnssec_ok: false }));
        let other = query.about("x.y").unwrap();
        assert_eq!(other.lower(), b"\x01x\x01y\0");
    }

    #[test]
    fn what_is_no_query_is_refused_by_its_code() {
        let good = ask("a.b.", RecordType::A, None);
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Query::parse(&bytes).err()
        };
        let answer = |opcode, code| Some(Malformed::Answer { id: 7, opcode, code });
        assert_eq!(with(2, 0x81), Some(Malformed::Silent), "an answer");
        assert_eq!(with(2, 4 << 3), answer(4, 4), "a notification");
        assert_eq!(with(5, 2), answer(0, 1), "two questions");
        assert_eq!(with(7, 1), answer(0, 1), "an answer in it");
        assert_eq!(with(11, 1), answer(0, 1), "a record that is not there");
        assert_eq!(with(12, 0xc0), answer(0, 1), "a pointer in the question");
        assert_eq!(Query::parse(&good[..11]).err(), Some(Malformed::Silent));
        for len in HEADER..good.len() {
            assert_eq!(Query::parse(&good[..len]).err(), answer(0, 1), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Query::parse(&bytes);
        }

        #[test]
        fn no_damage_makes_it_panic(at in 0..60usize, byte in any::<u8>()) {
            let mut bytes = ask("some.name.svc.cluster.local.", RecordType::SRV, Some(1232));
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(query) = Query::parse(&bytes) {
                let mut room = [""; LABELS_MAX];
                let _ = query.labels(&mut room);
            }
        }
    }
}
