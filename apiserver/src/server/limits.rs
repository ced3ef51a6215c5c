//! Limits that keep the server answering: requests in flight, body size, time.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use isopod_api::status::Status;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::authn::UserInfo;

/// Largest request body.
const BODY_MAX: usize = 3 * 1024 * 1024;
/// What is read of a body that is too large or not wanted, at most.
const DRAIN_MAX: usize = 16 * BODY_MAX;
/// For how long.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Reads in flight.
const READS: usize = 400;
/// Writes in flight.
const WRITES: usize = 200;
/// How long a request waits for its turn.
const QUEUE_WAIT: Duration = Duration::from_secs(15);
/// How long a request that is not long-running may take.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Requests in flight, reads and writes apart, first come first served.
pub(crate) struct InFlight {
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
}

impl Default for InFlight {
    fn default() -> Self {
        Self { reads: Arc::new(Semaphore::new(READS)), writes: Arc::new(Semaphore::new(WRITES)) }
    }
}

impl InFlight {
    /// Waits for a place. The administrators' group is exempt, so that an overloaded server can be looked at.
    pub(crate) async fn enter(&self, user: &UserInfo, write: bool) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if user.in_group("system:masters") {
            return Ok(None);
        }
        let places = Arc::clone(if write { &self.writes } else { &self.reads });
        match tokio::time::timeout(QUEUE_WAIT, places.acquire_owned()).await {
            Ok(Ok(place)) => Ok(Some(place)),
            _ => Err(Status::too_many_requests("Too many requests, please try again later.", 1)),
        }
    }
}

/// Reads a request's body up to the limit; of a larger one the rest stays.
pub(super) async fn read_body(place: &mut Option<Incoming>) -> Result<Bytes, Status> {
    let Some(body) = place else { return Ok(Bytes::new()) };
    let broken = |error: hyper::Error| Status::bad_request(format!("unable to read the request body: {error}"));
    // Most bodies are one frame, which is not copied.
    let (mut first, mut all) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if first.len().max(all.len()) + data.len() > BODY_MAX {
            return Err(Status::too_large(format!("limit is {BODY_MAX}")));
        }
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        if all.is_empty() {
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&data);
    }
    *place = None;
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Reads on for a while what nobody wants, and tells whether that was all: a client that is still sending when the
/// connection ends never sees the answer, and no connection with an unread body can take another request.
pub(super) async fn drain(mut body: Incoming) -> bool {
    let reading = async {
        let mut left = DRAIN_MAX;
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return false;
            }
        }
        true
    };
    // Who is slower than that is cut off.
    tokio::time::timeout(DRAIN_TIME, reading).await.unwrap_or(false)
}
