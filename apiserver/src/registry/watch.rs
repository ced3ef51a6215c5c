//! Watches: where they start, how they end, and the stream of frames in between.
//!
//! A watch is a cursor into its resource's ring. Frames come from the events, where they are built once per format for all
//! watchers. Nobody waits for a watcher: one that falls out of the ring ends with an Expired error and lists again.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Frame;
use isopod_api::{protobuf, status::Status};
use serde_json::{Value, json};
use tokio::{
    sync::futures::OwnedNotified,
    task::JoinHandle,
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;

use super::{Resource, Selection, decode, list};
use crate::{
    cache::{Cursor, Event, Object, Seat, Seen},
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
    /// Cancelled when the server stops; it wakes the watchers then.
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
    let seat = Seat::take(store, request.selection.topic(resource));
    let mut watching = Watching {
        deadline: Instant::now() + timeout,
        bookmark_at: bookmarks.then(|| Instant::now() + BOOKMARK_EVERY),
        cursor: None,
        after: 0,
        initial: VecDeque::new(),
        end_of_initial: None,
        first: true,
        ended: false,
        pending: None,
        changed: Box::pin(seat.changed().notified_owned()),
        timer: Box::pin(tokio::time::sleep_until(Instant::now() + timeout)),
        waiting: false,
        resource: Arc::clone(resource),
        seat,
        request,
    };
    watching.start(revision, initial, bookmarks).await?;
    Ok(watching.boxed())
}

/// The body of a watch. There may be tens of thousands that wait, so its size counts: what only some need is boxed.
struct Watching {
    resource: Arc<Resource>,
    seat: Seat,
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
    /// Events whose objects a webhook converts.
    pending: Option<Box<Pending>>,
    /// The next change.
    changed: Pin<Box<OwnedNotified>>,
    /// The time of the next bookmark or of the end.
    timer: Pin<Box<Sleep>>,
    /// There is nothing to send before one of the two.
    waiting: bool,
}

struct Pending {
    events: Vec<Arc<Event>>,
    prepared: JoinHandle<Result<(), Status>>,
}

impl hyper::body::Body for Watching {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let next = ready!(self.get_mut().poll_next(cx));
        Poll::Ready(next.map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// What a look at the ring found.
enum Look {
    Send(Bytes),
    End,
    /// Something has to be waited for.
    Again,
}

impl Watching {
    async fn start(&mut self, revision: Option<u64>, initial: Option<bool>, bookmarks: bool) -> Result<(), Status> {
        let prefix = self.request.selection.prefix.clone();
        let store = self.seat.store();
        if initial == Some(true)
            && let Some(wanted) = revision
        {
            list::wait_fresh(store, wanted).await?;
        }
        match (initial, revision) {
            (Some(true), _) | (None, None | Some(0)) => {
                let (snapshot, cursor) = store.snapshot(&prefix, None);
                self.resource.prepare(&snapshot.objects).await?;
                let selection = &self.request.selection;
                self.initial = snapshot.objects.into_iter().filter(|o| selection.matches(o)).collect();
                self.cursor = Some(cursor);
                self.end_of_initial = (initial == Some(true) && bookmarks).then_some(snapshot.revision);
            }
            (Some(false), None | Some(0)) => self.cursor = Some(store.snapshot("\u{10ffff}", None).1),
            (_, Some(revision)) => {
                self.cursor = store.cursor(revision).ok();
                self.after = revision;
            }
        }
        Ok(())
    }

    /// The next frames; `None` at the end.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Some(chunk) = self.initial_chunk() {
            return Poll::Ready(Some(chunk));
        }
        loop {
            if let Some(pending) = &mut self.pending {
                let prepared = ready!(Pin::new(&mut pending.prepared).poll(cx));
                let events = self.pending.take().map(|pending| pending.events).unwrap_or_default();
                if let Err(status) = prepared.unwrap_or_else(|error| Err(Status::internal(error))) {
                    return Poll::Ready(Some(self.error(&status)));
                }
                if let Some(chunk) = self.frames(&events) {
                    return Poll::Ready(Some(chunk));
                }
            }
            let mut due = false;
            if self.waiting && self.changed.as_mut().poll(cx).is_pending() {
                ready!(self.timer.as_mut().poll(cx));
                due = true;
            }
            match self.look(due) {
                Look::Send(chunk) => return Poll::Ready(Some(chunk)),
                Look::End => return Poll::Ready(None),
                Look::Again => {}
            }
        }
    }

    fn initial_chunk(&mut self) -> Option<Bytes> {
        let mut out = BytesMut::new();
        while out.len() < CHUNK
            && let Some(object) = self.initial.pop_front()
        {
            out.extend_from_slice(&self.frame(Seen::Added, &object));
        }
        if !out.is_empty() {
            return Some(out.freeze());
        }
        self.initial = VecDeque::new();
        self.end_of_initial.take().map(|revision| self.bookmark(revision, true))
    }

    /// Looks what there is to send; when there is nothing, a change or the timer has to be waited for.
    fn look(&mut self, due: bool) -> Look {
        // Registered before looking, so that no change falls in between.
        self.changed.set(self.seat.changed().notified_owned());
        self.changed.as_mut().enable();
        self.waiting = false;
        let custom = self.resource.custom.as_ref();
        if self.request.stop.is_cancelled() || custom.is_some_and(|c| c.gone.load(Ordering::Acquire)) {
            return Look::End;
        }
        let mut events = Vec::new();
        let position = self.cursor.as_mut().and_then(|cursor| self.seat.read(cursor, BURST, &mut events));
        let Some(position) = position else {
            let status = self.expired();
            return Look::Send(self.error(&status));
        };
        if self.resource.prepares() && !events.is_empty() {
            self.prepare(events);
            return Look::Again;
        }
        if !events.is_empty() {
            return self.frames(&events).map_or(Look::Again, Look::Send);
        }
        self.waiting = true;
        let now = Instant::now();
        if due && now >= self.deadline {
            return Look::End;
        }
        let bookmark = due && self.bookmark_at.is_some_and(|at| now >= at);
        if bookmark {
            self.bookmark_at = Some(now + BOOKMARK_EVERY);
        }
        let until = self.bookmark_at.map_or(self.deadline, |at| at.min(self.deadline));
        if self.timer.deadline() != until {
            self.timer.as_mut().reset(until);
        }
        if bookmark { Look::Send(self.bookmark(position, false)) } else { Look::Again }
    }

    /// Has the objects of events converted. In a task: bodies must be Sync, connections are not.
    fn prepare(&mut self, events: Vec<Arc<Event>>) {
        let mut objects = Vec::with_capacity(2 * events.len());
        for event in &events {
            objects.push(Arc::clone(&event.object));
            objects.extend(event.previous.clone());
        }
        let resource = Arc::clone(&self.resource);
        let prepared = tokio::spawn(async move { resource.prepare(&objects).await });
        self.pending = Some(Box::new(Pending { events, prepared }));
    }

    /// The frames of the events that are seen.
    fn frames(&mut self, events: &[Arc<Event>]) -> Option<Bytes> {
        let mut out = BytesMut::new();
        for event in events {
            if let Some(frame) = self.event(event) {
                if events.len() == 1 {
                    return Some(frame);
                }
                out.extend_from_slice(&frame);
            }
        }
        (!out.is_empty()).then(|| out.freeze())
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

    /// The frame of a stored object.
    fn frame(&mut self, seen: Seen, object: &Object) -> Bytes {
        let first = std::mem::take(&mut self.first);
        let rendering = self.request.rendering;
        if self.request.binary && !matches!(rendering.transform, Transform::Table(_)) {
            let sealed = |raw: Bytes| protobuf::seal(&rendering.kind(&self.resource), &raw);
            return binary_frame(seen.name(), render::message(&self.resource, object, rendering).map(sealed));
        }
        self.build(seen, object, first)
    }

    fn build(&self, seen: Seen, object: &Object, first: bool) -> Bytes {
        if self.request.binary {
            let value = render::value(&self.resource, object, self.request.rendering, first);
            return binary_frame(seen.name(), protobuf::encode(&value));
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

    /// The watch must start over.
    fn expired(&self) -> Status {
        Status::expired(match self.after {
            0 => "The resourceVersion for the provided watch is too old.".to_owned(),
            after => format!("too old resource version: {after} ({})", self.seat.store().oldest()),
        })
    }

    /// The last frame: what went wrong.
    fn error(&mut self, status: &Status) -> Bytes {
        self.ended = true;
        self.value_frame("ERROR", &status.to_value())
    }

    fn value_frame(&self, kind: &str, value: &Value) -> Bytes {
        match self.request.binary {
            true => binary_frame(kind, protobuf::encode(value)),
            false => envelope(kind, &serde_json::to_vec(value).unwrap_or_default()),
        }
    }
}

/// A protobuf frame: four bytes of length, then the event. An object that cannot be encoded becomes an ERROR.
fn binary_frame(kind: &str, object: Result<Vec<u8>, protobuf::Error>) -> Bytes {
    let event = match object {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_costs_less_than_a_kilobyte() {
        let bytes = size_of::<Watching>() + size_of::<OwnedNotified>() + size_of::<Sleep>();
        assert!(bytes < 640, "{bytes}");
    }
}
