//! The owner of an engine's state: sends transactions, hands events to the sinks, acknowledges.
//!
//! Transactions run side by side, but never two on one key: a batch that shares a key with one on its way waits for it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use tokio::sync::{
    mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    oneshot,
};

use super::{
    Client, EtcdConfig,
    base::{self, Base, Numbers},
    client::Pages,
    proto::{self, compare, request_op::Request, response_op::Response},
    watch::{Delivery, Watcher},
};
use crate::{Batch, Change, Entry, Error, Event, Expect, Revision, Sink, Tag};

type Reply = oneshot::Sender<Result<Revision, Error>>;

/// What the handle asks for.
pub(super) enum Command {
    /// Commit a batch.
    Commit {
        /// The batch.
        batch: Batch,
        /// Gets its revision.
        reply: Reply,
    },
    /// Stream live keys, and subscribe.
    Range {
        /// Prefix of the keys.
        prefix: Box<str>,
        /// Gets later events.
        sink: Option<Arc<dyn Sink>>,
        /// Gets the revision.
        head: mpsc::SyncSender<Result<Revision, Error>>,
        /// Gets the entries.
        entries: mpsc::SyncSender<Result<Entry, Error>>,
    },
    /// Wait until the sinks have seen what anybody has committed.
    Sync {
        /// Gets the revision.
        reply: Reply,
    },
}

/// What a task has brought home.
enum Done {
    Commit { batch: Batch, reply: Reply, outcome: Result<proto::TxnResponse, Error> },
    Sync { replies: Vec<Reply>, outcome: Result<i64, Error> },
}

/// A batch on its way: what its keys become, for the events that will tell of it.
struct Busy {
    change: Change,
    tag: Option<Tag>,
}

/// Who is waiting for the watch to get to a revision, and which keys are theirs.
struct Waiting {
    reply: Reply,
    keys: Vec<Box<str>>,
}

/// The state of the driver's thread.
pub(super) struct Driver {
    client: Rc<Client>,
    base: Base,
    sinks: Vec<(i64, Arc<dyn Sink>)>,
    watching: bool,
    /// etcd's revision the sinks have got to.
    delivered: i64,
    busy: HashMap<Box<str>, Busy>,
    queued: VecDeque<(Batch, Reply)>,
    running: usize,
    acknowledge: BTreeMap<i64, Vec<Waiting>>,
    syncing: bool,
    sync_next: Vec<Reply>,
    published: Arc<AtomicU64>,
    size: Arc<AtomicU64>,
    done: UnboundedSender<Done>,
    finished: Option<UnboundedReceiver<Done>>,
}

impl Driver {
    /// Connects and reads where the store stands.
    pub(super) async fn open(
        config: EtcdConfig,
        (published, size): (Arc<AtomicU64>, Arc<AtomicU64>),
    ) -> Result<Self, Error> {
        let client = Rc::new(Client::new(&config)?);
        let base = Base::read(&client).await?;
        let now = client.range(base::KEY.as_bytes(), b"", 0, 1, true).await?.header.map_or(0, |h| h.revision);
        published.store(base.numbers.ours(now), Ordering::Release);
        let (done, finished) = unbounded_channel();
        Ok(Self {
            client,
            base,
            sinks: Vec::new(),
            watching: false,
            delivered: now,
            busy: HashMap::new(),
            queued: VecDeque::new(),
            running: 0,
            acknowledge: BTreeMap::new(),
            syncing: false,
            sync_next: Vec::new(),
            published,
            size,
            done,
            finished: Some(finished),
        })
    }

    /// Serves commands until every handle is gone and everything asked for is done.
    pub(super) async fn run(mut self, mut commands: UnboundedReceiver<Command>, compact_every: Duration) {
        let Some(mut finished) = self.finished.take() else { return };
        let (deliver, mut deliveries) = unbounded_channel();
        tokio::task::spawn_local(compact(Rc::clone(&self.client), compact_every, Arc::clone(&self.size)));
        let mut open = true;
        while open || self.running > 0 || !self.queued.is_empty() {
            // Every arm only receives from a channel: what another arm wins over stays in it.
            tokio::select! {
                command = commands.recv(), if open => match command {
                    Some(Command::Commit { batch, reply }) => self.commit(batch, reply),
                    Some(Command::Range { prefix, sink, head, entries }) => {
                        let first = self.range(&prefix, sink, &deliver).await;
                        self.stream(first, &head, entries);
                    }
                    Some(Command::Sync { reply }) => {
                        self.sync_next.push(reply);
                        self.sync();
                    }
                    None => open = false,
                },
                Some(done) = finished.recv() => self.finish(done),
                Some(delivery) = deliveries.recv() => self.deliver(delivery),
            }
        }
        // Committed is committed, also when nobody will see the events any more.
        for (revision, waiting) in std::mem::take(&mut self.acknowledge) {
            for one in waiting {
                let _ = one.reply.send(Ok(self.base.numbers.ours(revision)));
            }
        }
    }

    fn commit(&mut self, batch: Batch, reply: Reply) {
        let waits = |op: &crate::Op| {
            self.busy.contains_key(&op.key)
                || self.queued.iter().any(|(other, _)| other.ops.iter().any(|o| o.key == op.key))
        };
        if batch.ops.iter().any(waits) {
            self.queued.push_back((batch, reply));
        } else {
            self.start(batch, reply);
        }
    }

    fn start(&mut self, batch: Batch, reply: Reply) {
        for op in &batch.ops {
            self.busy.insert(op.key.clone(), Busy { change: op.change.clone(), tag: op.tag.clone() });
        }
        let request = request(&self.base, &batch);
        let (client, done) = (Rc::clone(&self.client), self.done.clone());
        self.running += 1;
        tokio::task::spawn_local(async move {
            let outcome = client.txn(request).await;
            let _ = done.send(Done::Commit { batch, reply, outcome });
        });
    }

    /// Asks etcd for its revision, once for everybody who waits.
    fn sync(&mut self) {
        if self.syncing || self.sync_next.is_empty() {
            return;
        }
        self.syncing = true;
        self.running += 1;
        let replies = std::mem::take(&mut self.sync_next);
        let (client, done) = (Rc::clone(&self.client), self.done.clone());
        tokio::task::spawn_local(async move {
            let answer = client.range(base::KEY.as_bytes(), b"", 0, 1, true).await;
            let outcome = answer.map(|answer| answer.header.map_or(0, |header| header.revision));
            let _ = done.send(Done::Sync { replies, outcome });
        });
    }

    fn finish(&mut self, done: Done) {
        self.running -= 1;
        match done {
            Done::Commit { batch, reply, outcome } => {
                let outcome = outcome.and_then(|answer| match answer.succeeded {
                    true => Ok(answer.header.map_or(0, |header| header.revision)),
                    false => Err(self.conflict(&batch, &answer)),
                });
                let keys: Vec<Box<str>> = batch.ops.into_iter().map(|op| op.key).collect();
                match outcome {
                    Ok(revision) => self.wait(revision, Waiting { reply, keys }),
                    Err(error) => {
                        let _ = reply.send(Err(error));
                        self.release(&keys);
                    }
                }
            }
            Done::Sync { replies, outcome } => {
                self.syncing = false;
                for reply in replies {
                    match &outcome {
                        Ok(revision) => self.wait(*revision, Waiting { reply, keys: Vec::new() }),
                        Err(error) => drop(reply.send(Err(Error::Write { reason: error.to_string() }))),
                    }
                }
                self.sync();
            }
        }
    }

    /// Answers now or when the watch has got to the revision.
    fn wait(&mut self, revision: i64, waiting: Waiting) {
        if self.watching && revision > self.delivered {
            self.acknowledge.entry(revision).or_default().push(waiting);
            return;
        }
        let ours = self.base.numbers.ours(revision);
        self.published.fetch_max(ours, Ordering::AcqRel);
        let _ = waiting.reply.send(Ok(ours));
        self.release(&waiting.keys);
    }

    /// Lets batches go that waited for these keys.
    fn release(&mut self, keys: &[Box<str>]) {
        for key in keys {
            self.busy.remove(key);
        }
        if keys.is_empty() || self.queued.is_empty() {
            return;
        }
        let mut claimed: HashSet<Box<str>> = HashSet::new();
        for (batch, reply) in std::mem::take(&mut self.queued) {
            let free = batch.ops.iter().all(|op| !self.busy.contains_key(&op.key) && !claimed.contains(&op.key));
            if free {
                self.start(batch, reply);
            } else {
                claimed.extend(batch.ops.iter().map(|op| op.key.clone()));
                self.queued.push_back((batch, reply));
            }
        }
    }

    fn conflict(&self, batch: &Batch, answer: &proto::TxnResponse) -> Error {
        let found = |index: usize| match answer.responses.get(index).and_then(|r| r.response.as_ref()) {
            Some(Response::ResponseRange(range)) => {
                range.kvs.first().map_or(0, |kv| self.base.modified(&batch.ops[index].key, kv.mod_revision))
            }
            _ => 0,
        };
        let expected = |expect: Expect| match expect {
            Expect::Any => None,
            Expect::Absent => Some(0),
            Expect::Revision(revision) => Some(revision),
        };
        let all = batch.ops.iter().enumerate().filter_map(|(i, op)| Some((i, expected(op.expect)?, found(i))));
        let (index, expected, found) = all.into_iter().find(|(_, want, got)| want != got).unwrap_or_default();
        Error::Conflict { index, expected, found }
    }

    fn deliver(&mut self, delivery: Delivery) {
        let mut events: Vec<(i64, Event)> = Vec::with_capacity(delivery.seen.len());
        for seen in delivery.seen.into_iter().filter(|seen| base::is_ours(&seen.key)) {
            let created = self.base.written(&seen.key, seen.created);
            let busy = self.busy.get(&seen.key).filter(|busy| busy.change == seen.change);
            let (tag, revision) = (busy.and_then(|busy| busy.tag.clone()), self.base.numbers.ours(seen.revision));
            events.push((seen.revision, Event { revision, key: seen.key, change: seen.change, created, tag }));
        }
        for (from, sink) in &self.sinks {
            let own: Vec<Event> = events.iter().filter(|(at, _)| at > from).map(|(_, event)| event.clone()).collect();
            if !own.is_empty() {
                sink.apply(own);
            }
        }
        self.delivered = self.delivered.max(delivery.upto);
        self.published.fetch_max(self.base.numbers.ours(self.delivered), Ordering::AcqRel);
        while let Some(first) = self.acknowledge.first_entry().filter(|first| *first.key() <= self.delivered) {
            let (revision, waiting) = first.remove_entry();
            for one in waiting {
                self.wait(revision, one);
            }
        }
    }

    /// The first page of a range; from its revision on the sink sees every event.
    async fn range(
        &mut self,
        prefix: &str,
        sink: Option<Arc<dyn Sink>>,
        deliver: &UnboundedSender<Delivery>,
    ) -> Result<(Vec<proto::KeyValue>, Pages), Error> {
        let mut pages = self.client.pages(prefix, 0, false);
        let first = pages.next().await?.unwrap_or_default();
        let Some(sink) = sink else { return Ok((first, pages)) };
        if !self.watching {
            let watcher = Watcher::new(Rc::clone(&self.client), pages.revision, deliver.clone()).await?;
            tokio::task::spawn_local(watcher.run());
            self.watching = true;
            self.delivered = pages.revision;
        }
        self.published.fetch_max(self.base.numbers.ours(pages.revision), Ordering::AcqRel);
        self.sinks.push((pages.revision, sink));
        Ok((first, pages))
    }

    /// Hands out a range, page by page; the reader may be slow.
    fn stream(
        &self,
        first: Result<(Vec<proto::KeyValue>, Pages), Error>,
        head: &mpsc::SyncSender<Result<Revision, Error>>,
        entries: mpsc::SyncSender<Result<Entry, Error>>,
    ) {
        let numbers: Numbers = self.base.numbers;
        let (mut page, mut pages) = match first {
            Ok(first) => first,
            Err(error) => return drop(head.send(Err(error))),
        };
        let _ = head.send(Ok(numbers.ours(pages.revision)));
        tokio::task::spawn_local(async move {
            loop {
                let (to, own) = (entries.clone(), std::mem::take(&mut page));
                let send = move || own.iter().filter_map(|kv| numbers.entry(kv)).try_for_each(|e| to.send(Ok(e)));
                match tokio::task::spawn_blocking(send).await {
                    Ok(Ok(())) => {}
                    // The reader has enough.
                    _ => return,
                }
                page = match pages.next().await {
                    Ok(Some(next)) => next,
                    Ok(None) => return,
                    Err(error) => return drop(entries.send(Err(error))),
                };
            }
        });
    }
}

/// A batch as a transaction; when its compares fail, the answer says where the keys are.
fn request(base: &Base, batch: &Batch) -> proto::TxnRequest {
    let mut out = proto::TxnRequest::default();
    for op in &batch.ops {
        let key = bytes::Bytes::copy_from_slice(op.key.as_bytes());
        let (target, revision) = match op.expect {
            Expect::Any => (None, 0),
            Expect::Absent => (Some(compare::Target::Create), 0),
            Expect::Revision(revision) => (Some(compare::Target::Mod), base.theirs(&op.key, revision)),
        };
        if let Some(target) = target {
            // A revision nobody can have been given is never the key's: absent keys compare as 0.
            let value = match target {
                compare::Target::Mod => compare::TargetUnion::ModRevision(if revision == 0 { -1 } else { revision }),
                _ => compare::TargetUnion::CreateRevision(0),
            };
            out.compare.push(proto::Compare {
                result: compare::Result::Equal.into(),
                target: target.into(),
                key: key.clone(),
                target_union: Some(value),
            });
        }
        let change = match &op.change {
            Change::Put(value) => {
                Request::RequestPut(proto::PutRequest { key: key.clone(), value: base::plain(value) })
            }
            Change::Delete => Request::RequestDeleteRange(proto::DeleteRangeRequest { key: key.clone() }),
        };
        let look = proto::RangeRequest { key, keys_only: true, ..Default::default() };
        out.success.push(proto::RequestOp { request: Some(change) });
        out.failure.push(proto::RequestOp { request: Some(Request::RequestRange(look)) });
    }
    out
}

/// Compacts what is older than one round. Servers agree through a key on who does it, also with servers of upstream.
async fn compact(client: Rc<Client>, every: Duration, size: Arc<AtomicU64>) {
    let (mut version, mut before) = (0, 0);
    loop {
        match client.size().await {
            Ok(bytes) => size.store(bytes, Ordering::Relaxed),
            Err(error) => tracing::debug!(%error, "size of etcd"),
        }
        tokio::time::sleep(every).await;
        match compact_once(&client, version, before).await {
            Ok((next, now)) => (version, before) = (next, now),
            Err(error) => tracing::warn!(%error, "cannot compact etcd"),
        }
    }
}

async fn compact_once(client: &Client, version: i64, revision: i64) -> Result<(i64, i64), Error> {
    let key = bytes::Bytes::from_static(base::COMPACT_KEY.as_bytes());
    let put = proto::PutRequest { key: key.clone(), value: revision.to_string().into() };
    let look = proto::RangeRequest { key: key.clone(), ..Default::default() };
    let answer = client
        .txn(proto::TxnRequest {
            compare: vec![proto::Compare {
                result: compare::Result::Equal.into(),
                target: compare::Target::Version.into(),
                key,
                target_union: Some(compare::TargetUnion::Version(version)),
            }],
            success: vec![proto::RequestOp { request: Some(Request::RequestPut(put)) }],
            failure: vec![proto::RequestOp { request: Some(Request::RequestRange(look)) }],
        })
        .await?;
    let now = answer.header.map_or(0, |header| header.revision);
    if !answer.succeeded {
        // Another server was first; its count is ours from now on.
        let count = match answer.responses.first().and_then(|r| r.response.as_ref()) {
            Some(Response::ResponseRange(range)) => range.kvs.first().map_or(0, |kv| kv.version),
            _ => 0,
        };
        return Ok((count, now));
    }
    if revision > 0 {
        client.compact(revision).await?;
    }
    Ok((version + 1, now))
}
