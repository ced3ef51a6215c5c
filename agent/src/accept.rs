//! Taking connections: the one loop under every socket of the agent.

use std::{io, time::Duration};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long to wait when there are no descriptors left: some are closed meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes connections until `stop`, each answered in a task of its own. Those still open then come back; dropped, they end.
pub(crate) async fn connections<S, P, A, F>(
    accept: impl Fn() -> A,
    stop: &CancellationToken,
    answer: impl Fn(S) -> F,
) -> JoinSet<()>
where
    A: Future<Output = io::Result<(S, P)>>,
    F: Future<Output = ()> + Send + 'static,
{
    let mut open = JoinSet::new();
    loop {
        // Cancel-safe: accept loses no connection, and a join set keeps what is not reaped.
        let accepted = tokio::select! {
            accepted = accept() => accepted,
            Some(_) = open.join_next() => continue,
            () = stop.cancelled() => return open,
        };
        match accepted {
            Ok((stream, _)) => drop(open.spawn(answer(stream))),
            Err(error) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
