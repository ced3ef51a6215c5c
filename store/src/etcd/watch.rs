//! The one watch of an engine: every event of etcd in order, across broken connections and compactions.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use tokio::sync::mpsc::UnboundedSender;

use super::{
    Client, base,
    proto::{self, event::Type},
};
use crate::{Change, Error};

/// Waiting times between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// An event with etcd's revisions.
pub(super) struct Seen {
    pub(super) revision: i64,
    pub(super) key: Box<str>,
    pub(super) change: Change,
    pub(super) created: i64,
}

/// Events that followed one another, and how far they bring whoever has seen them.
pub(super) struct Delivery {
    pub(super) seen: Vec<Seen>,
    pub(super) upto: i64,
}

/// What the watch knows: where it is, and which keys live (with the revision of their creation), so that it can tell what
/// it has missed when etcd has forgotten it.
pub(super) struct Watcher {
    client: Rc<Client>,
    at: i64,
    keys: BTreeMap<Box<str>, i64>,
    to: UnboundedSender<Delivery>,
}

impl Watcher {
    /// Notes which keys live at a revision.
    pub(super) async fn new(client: Rc<Client>, at: i64, to: UnboundedSender<Delivery>) -> Result<Self, Error> {
        let mut keys = BTreeMap::new();
        let mut pages = client.pages("", at, true);
        while let Some(page) = pages.next().await? {
            keys.extend(
                page.iter().filter_map(|kv| Some((std::str::from_utf8(&kv.key).ok()?.into(), kv.create_revision))),
            );
        }
        Ok(Self { client, at, keys, to })
    }

    /// Follows etcd until nobody listens any more.
    pub(super) async fn run(mut self) {
        let mut wait = BACKOFF.0;
        while !self.to.is_closed() {
            let before = self.at;
            match self.follow().await {
                Ok(()) => return,
                Err(error) => tracing::warn!(%error, revision = self.at, "the watch of etcd broke; trying again"),
            }
            self.client.drop_channel();
            wait = if self.at > before { BACKOFF.0 } else { (wait * 2).min(BACKOFF.1) };
            tokio::time::sleep(wait).await;
        }
    }

    /// One stream; `Ok` when nobody listens.
    async fn follow(&mut self) -> Result<(), Error> {
        let broken = |status: tonic::Status| Error::Write { reason: status.message().to_owned() };
        let mut stream = self.client.watch(self.at + 1).await?;
        while let Some(answer) = stream.message().await.map_err(broken)? {
            if answer.compact_revision > 0 {
                tracing::warn!(at = self.at, compacted = answer.compact_revision, "etcd forgot what was missed");
                let missed = self.catch_up().await?;
                return if self.hand_on(missed) { Err(Error::Write { reason: "caught up".into() }) } else { Ok(()) };
            }
            if answer.canceled {
                return Err(Error::Write { reason: format!("etcd ended the watch: {}", answer.cancel_reason) });
            }
            let seen: Vec<Seen> = answer.events.into_iter().filter_map(|event| self.seen(event)).collect();
            if !seen.is_empty() && !self.hand_on(seen) {
                return Ok(());
            }
        }
        Err(Error::Write { reason: "etcd closed the watch".into() })
    }

    fn hand_on(&mut self, seen: Vec<Seen>) -> bool {
        self.at = seen.last().map_or(self.at, |last| last.revision.max(self.at));
        self.to.send(Delivery { seen, upto: self.at }).is_ok()
    }

    fn seen(&mut self, event: proto::Event) -> Option<Seen> {
        let deleted = event.r#type() == Type::Delete;
        let kv = event.kv?;
        let key: Box<str> = String::from_utf8_lossy(&kv.key).into();
        if deleted {
            let created = self.keys.remove(&key).unwrap_or_default();
            return Some(Seen { revision: kv.mod_revision, key, change: Change::Delete, created });
        }
        self.keys.insert(key.clone(), kv.create_revision);
        let change = Change::Put(base::value(&kv.value).unwrap_or_default());
        Some(Seen { revision: kv.mod_revision, key, change, created: kv.create_revision })
    }

    /// What differs from the last known state, as events: changes in their order, then what is gone.
    async fn catch_up(&mut self) -> Result<Vec<Seen>, Error> {
        let client = Rc::clone(&self.client);
        let mut pages = client.pages("", 0, false);
        let mut alive = BTreeMap::new();
        let mut seen = Vec::new();
        while let Some(page) = pages.next().await? {
            for kv in page {
                let Ok(key) = std::str::from_utf8(&kv.key) else { continue };
                alive.insert(Box::from(key), kv.create_revision);
                if kv.mod_revision > self.at {
                    let change = Change::Put(base::value(&kv.value).unwrap_or_default());
                    seen.push(Seen { revision: kv.mod_revision, key: key.into(), change, created: kv.create_revision });
                }
            }
        }
        seen.sort_by_key(|s| s.revision);
        let revision = pages.revision;
        for (key, created) in std::mem::replace(&mut self.keys, alive) {
            if !self.keys.contains_key(&key) {
                seen.push(Seen { revision, key, change: Change::Delete, created });
            }
        }
        self.at = self.at.max(revision);
        Ok(seen)
    }
}
