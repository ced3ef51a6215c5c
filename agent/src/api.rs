//! The connection to the API server: there, not there yet, or never.

use std::path::{Path, PathBuf};

use futures::StreamExt;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Where everyone gets the client from; empty while the node stands alone.
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
        match std::fs::read(path) {
            Ok(text) if text != seen => match load(path).await {
                Ok(client) => {
                    seen = text;
                    sender.send_replace(Some(client));
                }
                Err(e) => tracing::warn!(path = %path.display(), error = %e, "kubeconfig is not usable"),
            },
            _ => {}
        }
        if changes.next().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

async fn load(path: &Path) -> Result<Client, String> {
    let kubeconfig = kube::config::Kubeconfig::read_from(path).map_err(|e| e.to_string())?;
    let options = kube::config::KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|e| e.to_string())?;
    // Watches end by the server's timeout; a request that hangs longer than this is a dead connection.
    config.read_timeout = Some(std::time::Duration::from_secs(330));
    Client::try_from(config).map_err(|e| e.to_string())
}

/// Whether a kube error is this HTTP code.
pub(crate) fn is_code(e: &kube::Error, code: u16) -> bool {
    matches!(e, kube::Error::Api(s) if s.code == code)
}
