//! An answer as it goes out: header, the question as it came, records, EDNS. Written once, straight into its buffer.
//!
//! What does not fit is left out: additional records silently, any other sets the TC bit, so that the client asks again
//! over TCP.

use std::net::IpAddr;

use super::{
    CLASS_IN, kind,
    query::{Edns, HEADER, Malformed, Query},
};

/// Payload we send over UDP at most: passes every sane path unfragmented.
const UDP_MAX: usize = 1232;
const UDP_MIN: usize = 512;
/// An OPT record without options.
const OPT_LEN: usize = 11;
/// Pointers reach this far.
const POINTER_MAX: usize = 0x3fff;

const RESPONSE: u8 = 0x80;
const AUTHORITATIVE: u8 = 4;
const TRUNCATED: u8 = 2;
const RECURSION_AVAILABLE: u8 = 0x80;
const CHECKING_DISABLED: u8 = 0x10;

/// How long an answer over UDP to this query may be.
pub(crate) fn udp_limit(query: &Query) -> usize {
    query.edns.map_or(UDP_MIN, |e| usize::from(e.payload).clamp(UDP_MIN, UDP_MAX))
}

/// Appends labels, without the root's.
pub(crate) fn put_name<'a>(out: &mut Vec<u8>, labels: impl Iterator<Item = &'a str>) {
    for label in labels.filter(|l| !l.is_empty()) {
        let label = &label.as_bytes()[..label.len().min(63)];
        out.push(label.len() as u8);
        out.extend_from_slice(label);
    }
}

/// Appends an OPT record: what we take, and the upper bits of the response code.
fn put_edns(out: &mut Vec<u8>, client: Edns, code: u8) {
    out.push(0);
    out.extend_from_slice(&kind::OPT.to_be_bytes());
    out.extend_from_slice(&(UDP_MAX as u16).to_be_bytes());
    out.extend_from_slice(&[code >> 4, 0, u8::from(client.dnssec_ok) << 7, 0, 0, 0]);
}

/// Whose record it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Owner<'a> {
    /// The name asked for.
    Question,
    /// The name asked for without its first bytes, with another label in front.
    Suffix { label: Option<&'a str>, skip: usize },
    /// Another name.
    Name(&'a str),
}

/// Part of an answer a record belongs to, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Section {
    Answer,
    Authority,
    Additional,
}

/// An answer being written.
pub(crate) struct Reply<'a> {
    out: &'a mut Vec<u8>,
    query: &'a Query,
    limit: usize,
    counts: [u16; 3],
    full: bool,
}

impl<'a> Reply<'a> {
    /// Begins an answer of at most `limit` bytes; whatever the buffer held is gone.
    pub(crate) fn new(query: &'a Query, limit: usize, out: &'a mut Vec<u8>) -> Self {
        out.clear();
        out.resize(HEADER, 0);
        out[..2].copy_from_slice(&query.id.to_be_bytes());
        out[2] = RESPONSE | query.opcode << 3 | u8::from(query.recursion_desired);
        out[3] = RECURSION_AVAILABLE | if query.checking_disabled { CHECKING_DISABLED } else { 0 };
        out[5] = 1;
        put_question(query, out);
        let limit = limit.saturating_sub(if query.edns.is_some() { OPT_LEN } else { 0 });
        Self { out, query, limit, counts: [0; 3], full: false }
    }

    /// How many records a section has.
    pub(crate) fn count(&self, section: Section) -> u16 {
        self.counts[section as usize]
    }

    pub(crate) fn add(
        &mut self,
        section: Section,
        owner: Owner<'_>,
        (kind, ttl): (u16, u32),
        data: impl FnOnce(&mut Vec<u8>),
    ) {
        if self.full {
            return;
        }
        let start = self.out.len();
        self.put_owner(owner);
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&CLASS_IN.to_be_bytes());
        self.out.extend_from_slice(&ttl.to_be_bytes());
        let at = self.out.len();
        self.out.extend_from_slice(&[0; 2]);
        data(self.out);
        let len = (self.out.len() - at - 2) as u16;
        self.out[at..at + 2].copy_from_slice(&len.to_be_bytes());
        if self.out.len() > self.limit {
            self.out.truncate(start);
            self.full = true;
            if section < Section::Additional {
                self.out[2] |= TRUNCATED;
            }
        } else {
            self.counts[section as usize] += 1;
        }
    }

    pub(crate) fn add_address(&mut self, section: Section, owner: Owner<'_>, ttl: u32, address: &IpAddr) {
        match address {
            IpAddr::V4(a) => self.add(section, owner, (kind::A, ttl), |out| out.extend_from_slice(&a.octets())),
            IpAddr::V6(a) => self.add(section, owner, (kind::AAAA, ttl), |out| out.extend_from_slice(&a.octets())),
        }
    }

    fn put_owner(&mut self, owner: Owner<'_>) {
        let pointer = |out: &mut Vec<u8>, skip: usize| {
            let at = (HEADER + skip).min(POINTER_MAX) as u16;
            out.extend_from_slice(&(0xc000 | at).to_be_bytes());
        };
        match owner {
            Owner::Question => pointer(self.out, 0),
            Owner::Suffix { label, skip } => {
                put_name(self.out, label.into_iter());
                pointer(self.out, skip);
            }
            Owner::Name(name) => {
                put_name(self.out, name.split('.'));
                self.out.push(0);
            }
        }
    }

    /// Completes header and EDNS.
    pub(crate) fn finish(self, code: u8, authoritative: bool) {
        if authoritative {
            self.out[2] |= AUTHORITATIVE;
        }
        self.out[3] |= code & 15;
        for (section, count) in self.counts.iter().enumerate() {
            self.out[6 + 2 * section..8 + 2 * section].copy_from_slice(&count.to_be_bytes());
        }
        end(self.query, code, self.out);
    }
}

fn put_question(query: &Query, out: &mut Vec<u8>) {
    out.extend_from_slice(query.name());
    out.extend_from_slice(&query.kind.to_be_bytes());
    out.extend_from_slice(&query.class.to_be_bytes());
}

/// Appends EDNS for clients that know it and counts it.
fn end(query: &Query, code: u8, out: &mut Vec<u8>) {
    if let Some(edns) = query.edns {
        put_edns(out, edns, code);
        let count = u16::from_be_bytes([out[10], out[11]]) + 1;
        out[10..12].copy_from_slice(&count.to_be_bytes());
    }
}

/// An answer with nothing but a code.
pub(crate) fn fail(query: &Query, code: u8, out: &mut Vec<u8>) {
    Reply::new(query, usize::MAX, out).finish(code, false);
}

/// The answer to what is no query; nothing for what must not be answered.
pub(crate) fn fail_malformed(what: Malformed, out: &mut Vec<u8>) {
    out.clear();
    if let Malformed::Answer { id, opcode, code } = what {
        out.resize(HEADER, 0);
        out[..2].copy_from_slice(&id.to_be_bytes());
        out[2] = RESPONSE | opcode << 3;
        out[3] = code;
    }
}

/// An answer somebody gave earlier, without EDNS, to a question that differs in upper and lower case at most; `ttls` are
/// the positions of its times to live, which are `age` seconds shorter now.
pub(crate) fn repeat(query: &Query, bytes: &[u8], ttls: &[u16], age: u32, limit: usize, out: &mut Vec<u8>) {
    let limit = limit.saturating_sub(if query.edns.is_some() { OPT_LEN } else { 0 });
    let question_end = HEADER + query.name().len() + 4;
    let whole = bytes.len() <= limit;
    out.clear();
    out.extend_from_slice(if whole { bytes } else { &bytes[..question_end.min(bytes.len())] });
    out[..2].copy_from_slice(&query.id.to_be_bytes());
    out[2] = RESPONSE | u8::from(query.recursion_desired);
    out[3] = RECURSION_AVAILABLE | bytes[3] & 0x2f | if query.checking_disabled { CHECKING_DISABLED } else { 0 };
    out[HEADER..HEADER + query.name().len()].copy_from_slice(query.name());
    if whole {
        for at in ttls.iter().map(|at| usize::from(*at)) {
            if let Some(field) = out.get_mut(at..at + 4).and_then(|f| <&mut [u8; 4]>::try_from(f).ok()) {
                *field = u32::from_be_bytes(*field).saturating_sub(age).to_be_bytes();
            }
        }
    } else {
        out[2] |= TRUNCATED;
        out[6..12].fill(0);
    }
    end(query, 0, out);
}
