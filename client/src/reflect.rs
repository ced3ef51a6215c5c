//! List, then watch, for ever: keeps a sink equal to one collection of the API server.
//!
//! In: a path. Out: calls on the sink, in the server's order. After a broken connection the watch resumes from the last
//! revision seen (bookmarks included); only when the server has forgotten that revision is the list read again.

use crate::objects::{List, is_expired};
use futures::{StreamExt, pin_mut};
use http::Request;
use kube::Client;
use kube::core::WatchEvent;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Where a reflected collection goes.
pub trait Sink<T>: Send + Sync {
    /// The whole collection, after a list.
    fn replace(&self, objects: Vec<T>);
    /// One object was added or changed.
    fn apply(&self, object: T);
    /// One object is gone.
    fn delete(&self, object: T);
    /// The resourceVersion of an object.
    fn revision(object: &T) -> Option<String>;
}

/// What to reflect.
#[derive(Clone, Debug)]
pub struct Source {
    /// The collection's path.
    pub path: String,
    /// Further query, such as `fieldSelector=...`; may be empty.
    pub query: String,
    /// Ask for metadata only.
    pub metadata_only: bool,
}

const PAGE: usize = 500;
const PARTIAL_LIST: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
const PARTIAL: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";
const RETRY_FIRST: Duration = Duration::from_millis(20);
/// Short: a control plane that comes back is followed at once.
const RETRY_MAX: Duration = Duration::from_millis(150);

/// Runs until `stop`.
pub async fn reflect<T, S>(client: Client, source: Source, sink: &S, stop: CancellationToken)
where
    T: Clone + DeserializeOwned + Send + 'static,
    S: Sink<T>,
{
    let work = async {
        let mut retry = RETRY_FIRST;
        loop {
            match list(&client, &source).await {
                Ok((objects, revision)) => {
                    sink.replace(objects);
                    retry = RETRY_FIRST;
                    follow(&client, &source, sink, revision).await;
                }
                Err(error) => {
                    tracing::debug!(path = source.path, %error, "list failed");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        }
    };
    tokio::select! {
        // Cancel-safe: a half-read stream is dropped together with everything it fed.
        () = work => {}
        () = stop.cancelled() => {}
    }
}

fn request(source: &Source, query: &str, accept: &str) -> Result<Request<Vec<u8>>, kube::Error> {
    let mut uri = format!("{}?{query}", source.path);
    if !source.query.is_empty() {
        uri.push('&');
        uri.push_str(&source.query);
    }
    let mut builder = Request::get(uri);
    if source.metadata_only {
        builder = builder.header(http::header::ACCEPT, accept);
    }
    builder.body(Vec::new()).map_err(kube::Error::HttpError)
}

async fn list<T: DeserializeOwned>(client: &Client, source: &Source) -> Result<(Vec<T>, String), kube::Error> {
    let mut objects = Vec::new();
    let mut token = String::new();
    loop {
        let query = if token.is_empty() {
            format!("limit={PAGE}")
        } else {
            format!("limit={PAGE}&continue={}", percent(&token))
        };
        let page: List<T> = match client.request(request(source, &query, PARTIAL_LIST)?).await {
            Err(error) if is_expired(&error) && !token.is_empty() => {
                token.clear();
                objects.clear();
                continue;
            }
            page => page?,
        };
        if objects.is_empty() {
            objects = page.items;
        } else {
            objects.extend(page.items);
        }
        if page.metadata.continue_.is_empty() {
            return Ok((objects, page.metadata.resource_version));
        }
        token = page.metadata.continue_;
    }
}

/// Watches from a revision until the server has forgotten it.
async fn follow<T, S>(client: &Client, source: &Source, sink: &S, mut revision: String)
where
    T: Clone + DeserializeOwned + Send + 'static,
    S: Sink<T>,
{
    let mut retry = RETRY_FIRST;
    loop {
        let timeout = rand::random_range(300..600);
        let query = format!("watch=true&allowWatchBookmarks=true&timeoutSeconds={timeout}&resourceVersion={revision}");
        let request = match request(source, &query, PARTIAL) {
            Ok(request) => request,
            Err(_) => return,
        };
        match client.request_events::<T>(request).await {
            Ok(events) => {
                let before = revision.clone();
                if !drain(events, sink, &mut revision).await {
                    return;
                }
                if revision != before {
                    retry = RETRY_FIRST;
                }
            }
            Err(error) if is_expired(&error) => return,
            Err(error) => tracing::debug!(path = source.path, %error, "watch failed"),
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
}

/// Feeds the sink until the stream ends; `false` when the list must be read again.
async fn drain<T, S, E>(events: E, sink: &S, revision: &mut String) -> bool
where
    T: Clone,
    S: Sink<T>,
    E: futures::Stream<Item = Result<WatchEvent<T>, kube::Error>>,
{
    pin_mut!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                remember::<T, S>(&object, revision);
                sink.apply(object);
            }
            Ok(WatchEvent::Deleted(object)) => {
                remember::<T, S>(&object, revision);
                sink.delete(object);
            }
            Ok(WatchEvent::Bookmark(mark)) => *revision = mark.metadata.resource_version,
            Ok(WatchEvent::Error(status)) => return status.code != 410,
            Err(error) => return !is_expired(&error),
        }
    }
    true
}

fn remember<T, S: Sink<T>>(object: &T, revision: &mut String) {
    if let Some(seen) = S::revision(object) {
        *revision = seen;
    }
}

/// Percent-encodes a query value.
pub fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}
