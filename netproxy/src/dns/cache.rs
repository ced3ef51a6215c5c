//! Answers from upstream, kept as bytes until their time is over: a hit is a copy.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RData,
};
use parking_lot::Mutex;

use super::{
    query::{HEADER, Query, skip_name},
    reply::repeat,
};

/// Most answers kept.
const MAX: usize = 16_384;
/// Largest answer kept.
const SIZE_MAX: usize = 8192;
/// Longest an answer is kept.
const TTL_MAX: u32 = 3600;
/// Longest an answer without records and SOA is kept.
const TTL_NEGATIVE: u32 = 30;
/// How long it is remembered that upstream could not answer (RFC 2308, 7.1).
const TTL_FAILURE: u32 = 5;
/// A name's longest form, type and flags.
const KEY_MAX: usize = 255 + 3;

struct Entry {
    bytes: Box<[u8]>,
    /// Where the times to live are.
    ttls: Box<[u16]>,
    stored: Instant,
    lifetime: Duration,
}

/// The cache.
#[derive(Default)]
pub(crate) struct Cache {
    entries: Mutex<HashMap<Box<[u8]>, Entry>>,
}

/// What tells questions apart: the name in lower case, the type, what changes an answer.
fn key<'a>(query: &Query, room: &'a mut [u8; KEY_MAX]) -> &'a [u8] {
    let name = query.lower();
    room[..name.len()].copy_from_slice(name);
    room[name.len()..name.len() + 2].copy_from_slice(&query.kind.to_be_bytes());
    let dnssec = query.edns.is_some_and(|e| e.dnssec_ok);
    room[name.len() + 2] = u8::from(dnssec) | u8::from(query.checking_disabled) << 1;
    &room[..name.len() + 3]
}

/// Seconds an answer may be kept: the least of its records, or what the SOA says of names that do not exist.
fn lifetime(answer: &Message) -> u32 {
    let code = answer.metadata.response_code;
    if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return TTL_FAILURE;
    }
    let least = answer.answers.iter().map(|r| r.ttl).min();
    let soa = answer.authorities.iter().find_map(|r| match &r.data {
        RData::SOA(soa) => Some(soa.minimum.min(r.ttl)),
        _ => None,
    });
    // An alias whose target does not exist lives as long as both.
    let negative = soa.unwrap_or(TTL_NEGATIVE);
    let missing = code == ResponseCode::NXDomain || least.is_none();
    least.unwrap_or(negative).min(if missing { negative } else { TTL_MAX }).min(TTL_MAX)
}

/// Positions of the times to live in a message without EDNS.
fn ttl_positions(bytes: &[u8]) -> Option<Box<[u16]>> {
    let half = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let records = u32::from(half(6)?) + u32::from(half(8)?) + u32::from(half(10)?);
    let mut at = skip_name(bytes, HEADER)? + 4;
    let mut found = Vec::new();
    for _ in 0..records {
        at = skip_name(bytes, at)?;
        found.push(u16::try_from(at + 4).ok()?);
        at += 10 + usize::from(half(at + 8)?);
    }
    (at == bytes.len()).then(|| found.into())
}

impl Cache {
    /// Writes the answer, if there is one; false: there is none.
    pub(crate) fn answer(&self, query: &Query, limit: usize, out: &mut Vec<u8>) -> bool {
        let mut room = [0; KEY_MAX];
        let key = key(query, &mut room);
        let entries = self.entries.lock();
        let Some(entry) = entries.get(key) else { return false };
        let age = entry.stored.elapsed();
        if age >= entry.lifetime {
            return false;
        }
        repeat(query, &entry.bytes, &entry.ttls, u32::try_from(age.as_secs()).unwrap_or(u32::MAX), limit, out);
        true
    }

    /// Keeps an answer, whose bytes are without EDNS.
    pub(crate) fn store(&self, query: &Query, answer: &Message, bytes: &[u8]) {
        let lifetime = lifetime(answer);
        if lifetime == 0 || answer.metadata.truncation || bytes.len() > SIZE_MAX {
            return;
        }
        let Some(ttls) = ttl_positions(bytes) else { return };
        let lifetime = Duration::from_secs(lifetime.into());
        let entry = Entry { bytes: bytes.into(), ttls, stored: Instant::now(), lifetime };
        let mut room = [0; KEY_MAX];
        let key = key(query, &mut room);
        let mut entries = self.entries.lock();
        if entries.len() >= MAX {
            entries.retain(|_, e| e.stored.elapsed() < e.lifetime);
        }
        if entries.len() >= MAX {
            // Nothing has run out: drop some, in the map's own random order.
            let mut left = MAX / 8;
            entries.retain(|_, _| {
                left = left.saturating_sub(1);
                left == 0
            });
        }
        entries.insert(key.into(), entry);
    }

    /// Forgets everything: it may come from servers that are not asked any more.
    pub(crate) fn clear(&self) {
        self.entries.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{
        Name, Record, RecordType,
        rdata::{A, CNAME, SOA},
    };

    use super::{super::query::tests::ask, *};

    fn record(name: &str, ttl: u32, data: RData) -> Record {
        Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
    }

    fn soa(ttl: u32, minimum: u32) -> Record {
        let name = || Name::from_ascii("example.com.").unwrap();
        record("example.com.", ttl, RData::SOA(SOA::new(name(), name(), 1, 2, 3, 4, minimum)))
    }

    fn reply(answers: Vec<Record>, authorities: Vec<Record>, code: ResponseCode) -> Message {
        let mut message = Message::from_vec(&ask("www.example.com.", RecordType::A, None)).unwrap().into_response();
        message.metadata.response_code = code;
        (message.answers, message.authorities) = (answers, authorities);
        message
    }

    #[test]
    fn answers_are_kept_as_long_as_they_say() {
        let a = |ttl| record("www.example.com.", ttl, RData::A(A::new(192, 0, 2, 7)));
        let alias = record("www.example.com.", 600, RData::CNAME(CNAME(Name::from_ascii("x.example.com.").unwrap())));
        let (ok, none) = (ResponseCode::NoError, ResponseCode::NXDomain);
        for (message, seconds) in [
            (reply(vec![a(60), a(20)], vec![], ok), 20),
            (reply(vec![a(100_000)], vec![], ok), TTL_MAX),
            (reply(vec![a(0)], vec![], ok), 0),
            (reply(vec![], vec![soa(900, 40)], none), 40),
            (reply(vec![], vec![soa(15, 40)], ok), 15),
            (reply(vec![], vec![], none), TTL_NEGATIVE),
            (reply(vec![alias], vec![soa(900, 40)], none), 40),
            (reply(vec![], vec![], ResponseCode::ServFail), TTL_FAILURE),
        ] {
            assert_eq!(lifetime(&message), seconds, "{message:?}");
        }
    }

    #[test]
    fn a_hit_is_the_same_answer_to_another_client() {
        let cache = Cache::default();
        let a = record("www.example.com.", 60, RData::A(A::new(192, 0, 2, 7)));
        let message = reply(vec![a], vec![soa(900, 40)], ResponseCode::NoError);
        let bytes = message.to_vec().unwrap();
        let query = Query::parse(&ask("www.example.com.", RecordType::A, None)).unwrap();
        let mut out = Vec::new();
        assert!(!cache.answer(&query, 512, &mut out));
        cache.store(&query, &message, &bytes);
        let mut other = ask("WWW.example.com.", RecordType::A, Some(1232));
        other[..2].copy_from_slice(&[1, 2]);
        let other = Query::parse(&other).unwrap();
        assert!(cache.answer(&other, 1232, &mut out));
        let said = Message::from_vec(&out).unwrap();
        assert_eq!((said.metadata.id, said.queries[0].name().to_ascii()), (0x0102, "WWW.example.com.".into()));
        assert_eq!((said.answers[0].ttl, said.authorities.len()), (60, 1));
        assert!(said.edns.is_some());
        // Too long for this client: to be asked again over TCP.
        assert!(cache.answer(&query, 60, &mut out));
        let cut = Message::from_vec(&out).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        let four = Query::parse(&ask("www.example.com.", RecordType::AAAA, None)).unwrap();
        assert!(!cache.answer(&four, 512, &mut out), "another type");
        cache.entries.lock().values_mut().for_each(|e| e.stored -= Duration::from_secs(25));
        assert!(cache.answer(&query, 512, &mut out));
        let said = Message::from_vec(&out).unwrap();
        assert_eq!((said.answers[0].ttl, said.authorities[0].ttl), (35, 875));
        cache.entries.lock().values_mut().for_each(|e| e.stored -= Duration::from_secs(40));
        assert!(!cache.answer(&query, 512, &mut out), "its time is over");
    }

    #[test]
    fn it_never_grows_beyond_its_size() {
        let cache = Cache::default();
        let a = record("www.example.com.", 60, RData::A(A::new(192, 0, 2, 7)));
        let message = reply(vec![a], vec![], ResponseCode::NoError);
        let bytes = message.to_vec().unwrap();
        for number in 0..MAX + 10 {
            let query = Query::parse(&ask(&format!("n{number}.example.com."), RecordType::A, None)).unwrap();
            cache.store(&query, &message, &bytes);
        }
        let count = cache.entries.lock().len();
        assert!(count <= MAX && count > MAX / 2, "{count}");
    }
}
