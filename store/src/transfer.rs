//! Moving everything from one engine to another: every key keeps its revisions, and the counting goes on where it was.

use std::{path::Path, rc::Rc};

use crate::{
    Embedded, Engine, Entry, Error, EtcdConfig, Revision,
    etcd::{
        self, Client,
        proto::{self, compare, request_op::Request},
    },
};

/// Limits of one transaction, below etcd's defaults.
const OPS: usize = 100;
const BYTES: usize = 1 << 20;
const OTHERS: &str = "somebody else writes to this etcd";

/// What was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Keys.
    pub keys: usize,
    /// The last revision; the next commit gets the next one.
    pub revision: Revision,
}

/// Copies the store of a directory, which nobody may have open, into an empty etcd.
pub fn to_etcd(dir: &Path, config: &EtcdConfig) -> Result<Report, Error> {
    let store = Embedded::open(dir)?;
    let last = store.revision();
    let entries: Vec<Entry> = store.range("", None)?.collect::<Result<_, _>>()?;
    drop(store);
    let keys = entries.len();
    blocking(async {
        let client = Rc::new(Client::new(config)?);
        if client.pages("", 0, true).next().await?.is_some_and(|page| !page.is_empty()) {
            return Err(not_empty(config.endpoints.join(",")));
        }
        let mut at = 0;
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let mut size = 0;
            let fits = |entry: &&Entry| {
                size += entry.key.len() + entry.value.len();
                size <= BYTES
            };
            let count = rest.iter().take(OPS).take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            at = put(&client, Vec::new(), now.iter().map(|e| (&*e.key, etcd::moved(e)))).await?;
            rest = later;
        }
        // The numbers come last: with them the store is complete, without them it is refused as not empty.
        let now = client.range(etcd::KEY.as_bytes(), b"", 0, 1, true).await?.header.map_or(0, |h| h.revision);
        let absent = proto::Compare {
            result: compare::Result::Equal.into(),
            target: compare::Target::Create.into(),
            key: etcd::KEY.into(),
            target_union: Some(compare::TargetUnion::CreateRevision(0)),
        };
        let numbers = etcd::Numbers::after_move(last, now + 1);
        let end = put(&client, vec![absent], [(etcd::KEY, numbers.text().into())].into_iter()).await?;
        if (at > 0 && at != now) || end != now + 1 {
            return Err(Error::Write { reason: OTHERS.into() });
        }
        Ok(Report { keys, revision: last })
    })
}

/// Copies what is in etcd into a new store in a directory; nobody may be writing meanwhile.
pub fn to_embedded(config: &EtcdConfig, dir: &Path) -> Result<Report, Error> {
    let (revision, entries) = blocking(async {
        let client = Rc::new(Client::new(config)?);
        let numbers = etcd::Numbers::read(&client).await?;
        let mut pages = client.pages("", 0, false);
        let mut entries = Vec::new();
        while let Some(page) = pages.next().await? {
            entries.extend(page.iter().filter_map(|kv| numbers.entry(kv)));
        }
        Ok((numbers.ours(pages.revision), entries))
    })?;
    Embedded::import(dir, revision, &entries)?;
    Ok(Report { keys: entries.len(), revision })
}

fn not_empty(endpoint: String) -> Error {
    Error::Endpoint { endpoint, reason: "there are keys in it already; a move needs an empty etcd".into() }
}

async fn put<'a>(
    client: &Client,
    compare: Vec<proto::Compare>,
    pairs: impl Iterator<Item = (&'a str, bytes::Bytes)>,
) -> Result<i64, Error> {
    let success = pairs
        .map(|(key, value)| {
            let put = proto::PutRequest { key: bytes::Bytes::copy_from_slice(key.as_bytes()), value };
            proto::RequestOp { request: Some(Request::RequestPut(put)) }
        })
        .collect();
    let answer = client.txn(proto::TxnRequest { compare, success, failure: Vec::new() }).await?;
    match answer.succeeded {
        true => Ok(answer.header.map_or(0, |header| header.revision)),
        false => Err(Error::Write { reason: OTHERS.into() }),
    }
}

fn blocking<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::Write { reason: error.to_string() })?;
    runtime.block_on(work)
}
