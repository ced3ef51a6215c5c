//! One file per subcommand.

pub(crate) mod agent;
pub(crate) mod apiserver;
pub(crate) mod controller_manager;
pub(crate) mod down;
pub(crate) mod join;
pub(crate) mod kubeconfig;
pub(crate) mod local;
pub(crate) mod proxy;
pub(crate) mod remove_volume;
pub(crate) mod reset;
pub(crate) mod scheduler;
pub(crate) mod services;
pub(crate) mod store;
pub(crate) mod token;
pub(crate) mod trace;
pub(crate) mod up;

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use isopod_agent::Paths;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs a component on a runtime of `threads` workers until it ends or SIGINT/SIGTERM asks it to.
pub(crate) fn serve<F>(threads: usize, component: impl FnOnce(CancellationToken) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()
        .context("start runtime")?;
    let result = runtime.block_on(async {
        let stop = CancellationToken::new();
        cancel_on_signal(&stop)?;
        tokio::spawn(forget_start());
        component(stop).await
    });
    // Blocking work left behind (a DNS look-up, say) must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// When this process has long started: half of the code that was mapped for it runs never again.
const STARTED: Duration = Duration::from_secs(20);

/// Has the kernel unmap the program's file once; what goes on running is mapped again.
async fn forget_start() {
    tokio::time::sleep(STARTED).await;
    if let Err(error) = isopod_runtime::forget_code() {
        tracing::debug!(%error, "code of the start stays mapped");
    }
}

/// Cancels the token at the first SIGINT or SIGTERM.
fn cancel_on_signal(stop: &CancellationToken) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let stop = stop.clone();
    tokio::spawn(async move {
        // Both arms are cancel-safe: a signal not yet received stays pending.
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
    });
    Ok(())
}

/// The kubeconfig with which this machine asks the API server: its administrator's where there is one, else the agent's.
pub(crate) fn cluster_identity(paths: &Paths) -> Result<PathBuf> {
    first_kubeconfig(paths, &["admin", "agent"])
}

/// The first kubeconfig of these names that exists.
pub(crate) fn first_kubeconfig(paths: &Paths, names: &[&str]) -> Result<PathBuf> {
    let found = names.iter().map(|n| paths.kubeconfig(n)).find(|p| p.exists());
    found.with_context(|| {
        let etc = paths.etc();
        format!(
            "no kubeconfig ({}) in {}: is a node set up here? (`isopod up`, `isopod join` or `isopod agent`)",
            names.join(", "),
            etc.display()
        )
    })
}

/// What a kubeconfig file says.
pub(crate) async fn config(path: &Path) -> Result<kube::Config> {
    let text = || format!("kubeconfig {}", path.display());
    let file = kube::config::Kubeconfig::read_from(path).with_context(text)?;
    kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await.with_context(text)
}

/// A client for the identity in a kubeconfig file.
pub(crate) async fn client(path: &Path) -> Result<kube::Client> {
    Ok(isopod_client::connect_file(path).await?)
}

/// Waits until the API server answers, so that no watch's back-off grows while it starts; `false` when told to stop.
pub(crate) async fn answers(client: &kube::Client, stop: &CancellationToken) -> bool {
    // Cancel-safe: asking has no effect.
    tokio::select! {
        () = stop.cancelled() => false,
        () = isopod_agent::wait_for_server(client) => true,
    }
}
