//! Objects that exist in every cluster: written at start, reconciled while running.

use std::sync::Arc;

use isopod_api::status::Status;
use tokio_util::sync::CancellationToken;

use crate::{Config, objects::Objects};

/// Writes the initial objects. Runs before the server answers `/readyz`, after the caches are loaded.
pub async fn run(_config: &Config, _objects: Arc<dyn Objects>) -> Result<(), Status> {
    Ok(())
}

/// Loops that go on while the server runs (RBAC aggregation, the `kubernetes` endpoints). Returns when `stop` fires.
pub async fn maintain(_config: Arc<Config>, _objects: Arc<dyn Objects>, stop: CancellationToken) {
    stop.cancelled().await;
}
