//! The connection to the API server: there, not there yet, or never.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures::StreamExt;
use kube::{
    Client,
    runtime::utils::{Backoff, ResetTimerBackoff},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Where everyone gets the client from; empty while the node stands alone and until its server has answered once, so that
/// nobody's back-off grows while a server starts.
#[derive(Clone)]
pub(crate) struct Api {
    client: watch::Receiver<Option<Client>>,
}

impl Api {
    /// Reads the kubeconfig at `path`, or waits in the background for it to appear.
    pub(crate) fn start(path: Option<PathBuf>, stop: CancellationToken) -> Self {
        let (sender, client) = watch::channel(None);
        if let Some(path) = path {
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = follow(&path, &sender) => {}
                }
            });
        }
        Self { client }
    }

    /// The client, when there is one.
    pub(crate) fn get(&self) -> Option<Client> {
        self.client.borrow().clone()
    }

    /// The client, once there is one.
    pub(crate) async fn wait(&self) -> Option<Client> {
        let mut client = self.client.clone();
        client.wait_for(Option::is_some).await.ok().and_then(|c| c.clone())
    }
}

/// Publishes a client whenever the file is there and has changed; never returns by itself.
async fn follow(path: &Path, sender: &watch::Sender<Option<Client>>) {
    let parent = path.parent().unwrap_or(Path::new("/")).to_path_buf();
    std::fs::create_dir_all(&parent).ok();
    let mut seen = Vec::new();
    let changes = crate::sources::directory_events(&parent);
    let mut changes = match changes {
        Ok(c) => c.boxed(),
        Err(e) => {
            tracing::warn!(error = %e, path = %parent.display(), "cannot watch for the kubeconfig");
            futures::stream::pending().boxed()
        }
    };
    loop {
        let text = std::fs::read(path).ok().filter(|text| *text != seen);
        let client = match &text {
            Some(_) => isopod_client::connect_file(path).await.map_err(|error| {
                tracing::warn!(path = %path.display(), %error, "kubeconfig is not usable");
            }),
            None => Err(()),
        };
        // Cancel-safe: asking a server whether it is there can begin anew.
        tokio::select! {
            client = async { match client {
                Ok(client) => { wait_for_server(&client).await; client }
                Err(_) => std::future::pending().await,
            } } => {
                seen = text.unwrap_or_default();
                sender.send_replace(Some(client));
            }
            change = changes.next() => if change.is_none() { changes = futures::stream::pending().boxed() },
        }
    }
}

/// Waits until the API server answers; what it then refuses is for those who ask. A server that is not there yet cannot
/// be watched, so it is tried again after a tenth of the time waited so far.
pub async fn wait_for_server(client: &Client) {
    let mut pause = Duration::from_millis(10);
    loop {
        let Ok(request) = http::Request::get("/readyz").body(Vec::new()) else { return };
        match client.request_text(request).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code < 500 => return,
            Err(error) => tracing::trace!(%error, "API server"),
        }
        tokio::time::sleep(pause).await;
        pause = pause.mul_f64(1.1).min(Duration::from_secs(2));
    }
}

/// What the API server said when it answered and refused; `None` while it cannot be reached.
pub(crate) fn refusal(e: &kube::Error) -> Option<String> {
    match e {
        kube::Error::Api(s) if s.code < 500 => Some(format!("{} ({} {})", s.message, s.code, s.reason)),
        _ => None,
    }
}

/// Pauses between attempts to watch: short, so that pods follow an API server as soon as it is back, and longer only when
/// it stays away. The jitter keeps many nodes apart.
#[derive(Debug, Default)]
struct Pauses {
    failures: u32,
}

const FIRST: Duration = Duration::from_millis(20);
const SHORT: Duration = Duration::from_millis(80);
const LONGEST: Duration = Duration::from_secs(1);
/// From this many failures on it is no restart but an outage.
const OUTAGE: u32 = 300;
/// So long without trouble, and it is over. (Every attempt begins with a sign of life, which tells nothing.)
const CALM: Duration = Duration::from_secs(5);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let grown = FIRST * 2u32.saturating_pow(self.failures.min(8));
        let pause = grown.min(if self.failures < OUTAGE { SHORT } else { LONGEST });
        self.failures = self.failures.saturating_add(1);
        Some(pause.mul_f64(rand::random_range(0.75..1.25)))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// How watches pause after a failure.
pub(crate) fn pauses() -> impl Backoff + 'static {
    ResetTimerBackoff::new(Pauses::default(), CALM)
}

/// Whether a kube error is this HTTP code.
pub(crate) fn is_code(e: &kube::Error, code: u16) -> bool {
    matches!(e, kube::Error::Api(s) if s.code == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_short_through_a_restart_and_grow_in_an_outage() {
        let mut pauses = Pauses::default();
        assert!(pauses.next().unwrap() <= FIRST.mul_f64(1.25));
        assert!(pauses.nth(20).unwrap() <= SHORT.mul_f64(1.25));
        assert!(pauses.nth(OUTAGE as usize).unwrap() >= LONGEST.mul_f64(0.75));
        pauses.reset();
        assert!(pauses.next().unwrap() <= FIRST.mul_f64(1.25));
    }
}
