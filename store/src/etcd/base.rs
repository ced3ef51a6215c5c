//! How etcd's revisions and values map to ours.
//!
//! A fresh etcd counts on its own: ours are etcd's. After a move from another engine the counting goes on where that one
//! stopped: with the last revision 900 there, and etcd at 40 when everything was copied, the next commit is etcd's 41 and
//! our 901. Copied keys keep their old revisions in their values until they are written again.

use std::{collections::HashMap, rc::Rc};

use bytes::{BufMut, Bytes, BytesMut};

use super::{Client, proto};
use crate::{Entry, Error, Revision};

/// Key of the numbers below; outside of everything Kubernetes stores.
pub(crate) const KEY: &str = "isopod/base";
/// Where the servers agree on who compacts; the name upstream's servers use, too.
pub(super) const COMPACT_KEY: &str = "compact_rev_key";

const PLAIN: u8 = 0;
const MOVED: u8 = 1;
const MOVED_HEAD: usize = 17;

/// A key as it was moved here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    created: Revision,
    modified: Revision,
    /// etcd's revision.
    at: i64,
}

/// The two numbers of a move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// Ours minus etcd's.
    offset: i64,
    /// etcd's last revision of the move.
    until: i64,
}

impl Numbers {
    /// After a move that ended at `until`, with `last` as the last revision of the other engine.
    pub(crate) fn after_move(last: Revision, until: i64) -> Self {
        Self { offset: i64::try_from(last).unwrap_or(i64::MAX) - until, until }
    }

    /// As etcd has them; a store nobody has moved into it has none.
    pub(crate) async fn read(client: &Client) -> Result<Self, Error> {
        let answer = client.range(KEY.as_bytes(), b"", 0, 1, false).await?;
        let Some(stored) = answer.kvs.first() else { return Ok(Self::default()) };
        let text = String::from_utf8_lossy(&stored.value);
        let mut numbers = text.split(' ').map(str::parse::<i64>);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(offset)), Some(Ok(until))) => Ok(Self { offset, until }),
            _ => Err(Error::Write { reason: format!("etcd's key {KEY:?} has foreign content {text:?}") }),
        }
    }

    /// As they are stored.
    pub(crate) fn text(self) -> String {
        format!("{} {}", self.offset, self.until)
    }

    /// Our number of one of etcd's revisions.
    pub(crate) fn ours(self, revision: i64) -> Revision {
        u64::try_from(revision + self.offset).unwrap_or(0)
    }

    /// A stored key and its value; none for what is not ours.
    pub(crate) fn entry(self, kv: &proto::KeyValue) -> Option<Entry> {
        let key = std::str::from_utf8(&kv.key).ok().filter(|key| is_ours(key))?;
        let (created, modified) =
            head(&kv.value).unwrap_or((self.ours(kv.create_revision), self.ours(kv.mod_revision)));
        Some(Entry { key: key.into(), value: value(&kv.value)?, created, modified })
    }
}

/// The numbers, and the keys nobody has written since the move.
#[derive(Debug, Default)]
pub(super) struct Base {
    pub(super) numbers: Numbers,
    moved: HashMap<Box<str>, Moved>,
}

impl Base {
    /// Reads the numbers, and the moved keys if there are any.
    pub(super) async fn read(client: &Rc<Client>) -> Result<Self, Error> {
        let numbers = Numbers::read(client).await?;
        let mut base = Self { numbers, moved: HashMap::new() };
        if numbers == Numbers::default() {
            return Ok(base);
        }
        let mut pages = client.pages("", 0, false);
        while let Some(page) = pages.next().await? {
            for kv in page.iter().filter(|kv| kv.mod_revision <= numbers.until) {
                if let (Some((created, modified)), Ok(key)) = (head(&kv.value), std::str::from_utf8(&kv.key)) {
                    base.moved.insert(key.into(), Moved { created, modified, at: kv.mod_revision });
                }
            }
        }
        Ok(base)
    }

    /// etcd's revision a key must have been changed at for ours; 0 (never) when there is none.
    pub(super) fn theirs(&self, key: &str, revision: Revision) -> i64 {
        let plain = i64::try_from(revision).unwrap_or(i64::MAX) - self.numbers.offset;
        if plain > self.numbers.until {
            return plain;
        }
        self.moved.get(key).filter(|moved| moved.modified == revision).map_or(0, |moved| moved.at)
    }

    /// Our number of the revision a key was changed at.
    pub(super) fn modified(&self, key: &str, revision: i64) -> Revision {
        match self.moved.get(key) {
            Some(moved) if moved.at == revision => moved.modified,
            _ => self.numbers.ours(revision),
        }
    }

    /// Our number of the revision a key was made at, as an event of it shows it; the key is no longer as it was moved.
    pub(super) fn written(&mut self, key: &str, created: i64) -> Revision {
        self.moved.remove(key).map_or(self.numbers.ours(created), |moved| moved.created)
    }
}

/// Whether a key is of the store's users, not of the store.
pub(super) fn is_ours(key: &str) -> bool {
    key != KEY && key != COMPACT_KEY
}

/// A value as it is stored.
pub(super) fn plain(value: &Bytes) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + value.len());
    out.put_u8(PLAIN);
    out.extend_from_slice(value);
    out.freeze()
}

/// A value that comes from another engine.
pub(crate) fn moved(entry: &Entry) -> Bytes {
    let mut out = BytesMut::with_capacity(MOVED_HEAD + entry.value.len());
    out.put_u8(MOVED);
    out.put_u64(entry.created);
    out.put_u64(entry.modified);
    out.extend_from_slice(&entry.value);
    out.freeze()
}

/// What is behind the mark; none when there is no mark of ours.
pub(super) fn value(stored: &Bytes) -> Option<Bytes> {
    match stored.first() {
        Some(&PLAIN) => Some(stored.slice(1..)),
        Some(&MOVED) if stored.len() >= MOVED_HEAD => Some(stored.slice(MOVED_HEAD..)),
        _ => None,
    }
}

/// Creation and last change before a move.
fn head(stored: &Bytes) -> Option<(Revision, Revision)> {
    let number = |at: usize| stored.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    if stored.first() == Some(&MOVED) { number(1).zip(number(9)) } else { None }
}
