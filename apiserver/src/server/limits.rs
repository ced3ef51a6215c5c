//! Limits that keep the server answering: requests in flight, body size, time.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use isopod_api::status::Status;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::authn::UserInfo;

/// Largest request body.
const BODY_MAX: usize = 3 * 1024 * 1024;
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

/// Reads a request's body up to the limit.
pub(crate) async fn read_body(body: Incoming) -> Result<Bytes, Status> {
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Status::too_large(format!("limit is {BODY_MAX}"))),
        Err(error) => Err(Status::bad_request(format!("unable to read the request body: {error}"))),
    }
}
