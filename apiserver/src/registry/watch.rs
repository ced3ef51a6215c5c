//! Watches: where they start, how they end, and the stream of frames in between.
//!
//! A watch is a cursor into its resource's ring. Frames come from the events, where they are built once per format for all
//! watchers. Nobody waits for a watcher: one that falls out of the ring ends with an Expired error and lists again.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use isopod_api::{protobuf, status::Status};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Resource, Selection, decode, list};
use crate::{
    cache::{Cursor, Event, Object, ResourceCache, Seen},
    endpoints::Body,
    render::{self, Rendering},
    server::{negotiate::Transform, query::Query},
};

/// Annotation of the bookmark behind the initial events.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";
/// Time between bookmarks.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// Frames are gathered up to this size before they are sent.
const CHUNK: usize = 32 * 1024;
/// Events read at once.
const BURST: usize = 256;

/// A watch as it was asked for.
pub(crate) struct WatchRequest {
    /// Which objects.
    pub(crate) selection: Selection,
    /// In which form.
    pub(crate) rendering: Rendering,
    /// Frames are protobuf.
    pub(crate) binary: bool,
    /// Fires when the server stops.
    pub(crate) stop: CancellationToken,
}

/// Starts a watch.
pub(crate) async fn watch(resource: &Arc<Resource>, query: &Query, request: WatchRequest) -> Result<Body, Status> {
    let store = Arc::clone(resource.store.as_ref().ok_or_else(Status::no_route)?);
    list::check_options(query, true)?;
    let timeout = query.integer("timeoutSeconds").map_err(Status::bad_request)?;
    let revision = list::revision(query)?;
    let initial = query.get("sendInitialEvents").map(|_| query.flag("sendInitialEvents"));
    let bookmarks = query.flag("allowWatchBookmarks");
    let timeout = match timeout {
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds as u64),
        _ => Duration::from_secs(rand::random_range(1800..3600)),
    };
    let mut state = Stream {
        deadline: Instant::now() + timeout,
        bookmark_at: bookmarks.then(|| Instant::now() + BOOKMARK_EVERY),
        cursor: None,
        after: 0,
        initial: VecDeque::new(),
        end_of_initial: None,
        first: true,
        ended: false,
        gone: resource.custom.as_ref().map(|c| c.gone.clone()).unwrap_or_default(),
        resource: Arc::clone(resource),
        store,
        request,
    };
    state.start(revision, initial, bookmarks).await?;
    let frames = stream::unfold(state, |mut state| async move {
        let chunk = state.next().await?;
        Some((Ok(Frame::data(chunk)), state))
    });
    Ok(BodyExt::boxed(StreamBody::new(frames)))
}

struct Stream {
    resource: Arc<Resource>,
    store: Arc<ResourceCache>,
    request: WatchRequest,
    deadline: Instant,
    bookmark_at: Option<Instant>,
    cursor: Option<Cursor>,
    /// Events up to this revision are not wanted.
    after: u64,
    initial: VecDeque<Arc<Object>>,
    /// Revision of the bookmark that ends the initial events.
    end_of_initial: Option<u64>,
    /// Nothing has been sent yet (the first table has columns).
    first: bool,
    ended: bool,
    /// Fires when the resource is no longer served.
    gone: CancellationToken,
}

impl Stream {
    async fn start(&mut self, revision: Option<u64>, initial: Option<bool>, bookmarks: bool) -> Result<(), Status> {
        let prefix = self.request.selection.prefix.clone();
        if initial == Some(true)
            && let Some(wanted) = revision
        {
            list::wait_fresh(&self.store, wanted).await?;
        }
        match (initial, revision) {
            (Some(true), _) | (None, None | Some(0)) => {
                let (snapshot, cursor) = self.store.snapshot(&prefix, None);
                self.resource.prepare(&snapshot.objects).await?;
                let selection = &self.request.selection;
                self.initial = snapshot.objects.into_iter().filter(|o| selection.matches(o)).collect();
                self.cursor = Some(cursor);
                self.end_of_initial = (initial == Some(true) && bookmarks).then_some(snapshot.revision);
            }
            (Some(false), None | Some(0)) => self.cursor = Some(self.store.snapshot("\u{10ffff}", None).1),
            (_, Some(revision)) => {
                self.after = revision;
                self.cursor = self.store.cursor(revision).ok();
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let mut out = BytesMut::new();
        while out.len() < CHUNK
            && let Some(object) = self.initial.pop_front()
        {
            out.extend_from_slice(&self.frame(Seen::Added, &object));
        }
        if !out.is_empty() {
            return Some(out.freeze());
        }
        if let Some(revision) = self.end_of_initial.take() {
            return Some(self.bookmark(revision, true));
        }
        self.follow().await
    }

    async fn follow(&mut self) -> Option<Bytes> {
        let store = Arc::clone(&self.store);
        loop {
            let changed = store.changed();
            tokio::pin!(changed);
            // Register before looking, so that no change falls in between.
            changed.as_mut().enable();
            let mut events = Vec::new();
            let position = match &mut self.cursor {
                Some(cursor) => store.read(cursor, BURST, &mut events),
                None => None,
            };
            let Some(position) = position else {
                self.ended = true;
                return Some(self.expired(&store));
            };
            if let Err(status) = self.prepare(&events).await {
                self.ended = true;
                return Some(self.value_frame("ERROR", &status.to_value()));
            }
            let mut out = BytesMut::new();
            for event in &events {
                if let Some(frame) = self.event(event) {
                    out.extend_from_slice(&frame);
                }
            }
            if !out.is_empty() {
                return Some(out.freeze());
            }
            if !events.is_empty() {
                continue;
            }
            let bookmark_at = self.bookmark_at.unwrap_or(self.deadline);
            // Every arm only waits: dropping the others loses nothing.
            tokio::select! {
                () = changed => {}
                () = self.request.stop.cancelled() => return None,
                () = self.gone.cancelled() => return None,
                () = tokio::time::sleep_until(self.deadline.min(bookmark_at)) => {
                    if Instant::now() >= self.deadline {
                        return None;
                    }
                    self.bookmark_at = Some(Instant::now() + BOOKMARK_EVERY);
                    return Some(self.bookmark(position, false));
                }
            }
        }
    }

    /// Has the objects of events converted when only a webhook can. In a task: bodies must be Sync, connections are not.
    async fn prepare(&self, events: &[Arc<Event>]) -> Result<(), Status> {
        if !self.resource.prepares() || events.is_empty() {
            return Ok(());
        }
        let mut objects = Vec::with_capacity(2 * events.len());
        for event in events {
            objects.push(Arc::clone(&event.object));
            objects.extend(event.previous.clone());
        }
        let resource = Arc::clone(&self.resource);
        let preparing = tokio::spawn(async move { resource.prepare(&objects).await });
        preparing.await.unwrap_or_else(|error| Err(Status::internal(error)))
    }

    /// How the watcher sees an event, as a frame; `None` when it does not.
    fn event(&mut self, event: &Arc<Event>) -> Option<Bytes> {
        if event.revision <= self.after {
            return None;
        }
        let selection = &self.request.selection;
        let now = !event.deleted && selection.matches(&event.object);
        let before = event.previous.as_ref().is_some_and(|p| selection.matches(p));
        let seen = match (before, now) {
            (false, true) => Seen::Added,
            (true, true) => Seen::Modified,
            (true, false) => Seen::Deleted,
            (false, false) => return None,
        };
        // An object that only left the selection is shown as it was, at the revision of the change.
        let left = seen == Seen::Deleted && !event.deleted;
        if self.first && matches!(self.request.rendering.transform, Transform::Table(_)) {
            return Some(self.frame(seen, &event.object));
        }
        let format = self.request.rendering.id()
            | (seen as u32) << 8
            | u32::from(left) << 10
            | u32::from(self.request.binary) << 31
            | self.resource.format();
        Some(event.frame(format, || match (&event.previous, left) {
            (Some(previous), true) => self.build(seen, &previous.at_revision(event.revision), false),
            _ => self.build(seen, &event.object, false),
        }))
    }

    fn frame(&mut self, seen: Seen, object: &Object) -> Bytes {
        let first = std::mem::take(&mut self.first);
        self.build(seen, object, first)
    }

    fn build(&self, seen: Seen, object: &Object, first: bool) -> Bytes {
        if self.request.binary {
            return binary_frame(seen.name(), &render::value(&self.resource, object, self.request.rendering, first));
        }
        let body = render::one(&self.resource, object, self.request.rendering, first);
        envelope(seen.name(), &body)
    }

    fn bookmark(&mut self, revision: u64, initial_end: bool) -> Bytes {
        let mut object = json!({"kind": self.resource.gvk.kind, "apiVersion": self.resource.gvk.api_version()});
        object["metadata"] = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            object["metadata"]["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        decode::complete_empty(&self.resource, &mut object);
        self.value_frame("BOOKMARK", &render::bookmark(object, self.request.rendering))
    }

    /// An ERROR event that says the watch must start over.
    fn expired(&self, store: &ResourceCache) -> Bytes {
        let message = match self.after {
            0 => "The resourceVersion for the provided watch is too old.".to_owned(),
            after => format!("too old resource version: {after} ({})", store.oldest()),
        };
        self.value_frame("ERROR", &Status::expired(message).to_value())
    }

    fn value_frame(&self, kind: &str, value: &Value) -> Bytes {
        match self.request.binary {
            true => binary_frame(kind, value),
            false => envelope(kind, &serde_json::to_vec(value).unwrap_or_default()),
        }
    }
}

/// A protobuf frame: four bytes of length, then the event. An object that cannot be encoded becomes an ERROR.
fn binary_frame(kind: &str, value: &Value) -> Bytes {
    let event = match protobuf::encode(value) {
        Ok(object) => protobuf::watch_event(kind, &object),
        Err(error) => {
            let status = Status::internal(format!("unable to encode watch object: {error}")).to_value();
            protobuf::watch_event("ERROR", &protobuf::encode(&status).unwrap_or_default())
        }
    };
    let mut out = BytesMut::with_capacity(event.len() + 4);
    out.put_u32(event.len() as u32);
    out.extend_from_slice(&event);
    out.freeze()
}

fn envelope(kind: &str, object: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(object.len() + 40);
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    out.extend_from_slice(object);
    out.extend_from_slice(b"}\n");
    out.freeze()
}
