//! Plugins that announce themselves by a socket in `var/lib/kubelet/plugins_registry`.
//!
//! In: sockets that appear and go. Out: CSI drivers, device plugins and drivers of claims known to those who use them. A plugin is asked who
//! it is, and told whether it was taken; one that does not answer yet is asked again while its socket is there.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    claims,
    context::Context,
    devices,
    grpc::{
        Channel,
        proto::registration::{InfoRequest, PluginInfo, RegistrationStatus, registration_client::RegistrationClient},
        words,
    },
    sources,
};

/// How long a plugin may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// First pause after a plugin that could not be registered ...
const PAUSE: Duration = Duration::from_millis(200);
/// ... and the longest.
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// A socket file: what replaces it under its name is another one.
type Identity = (u64, i64, i64);

/// Follows the registry until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let dir = ctx.config.paths.plugins_root().join("plugins_registry");
    let watched = fs::create_dir_all(&dir).and_then(|()| sources::directory_events(&dir));
    let mut changes = match watched {
        Ok(stream) => std::pin::pin!(stream),
        Err(error) => {
            tracing::error!(path = %dir.display(), %error, "plugins cannot register");
            return;
        }
    };
    let mut known: BTreeMap<PathBuf, (Identity, AbortHandle)> = BTreeMap::new();
    loop {
        let found = sockets(&dir);
        known.retain(|path, (identity, task)| {
            let stays = found.get(path) == Some(identity);
            if !stays {
                task.abort();
                forget(&ctx, path);
            }
            stays
        });
        for (path, identity) in found {
            known.entry(path.clone()).or_insert_with(|| {
                let task = tokio::spawn(register(ctx.clone(), path));
                (identity, task.abort_handle())
            });
        }
        // Both arms are cancel-safe: events stay in the stream.
        tokio::select! {
            () = stop.cancelled() => break,
            event = changes.next() => if event.is_none() { break },
        }
    }
    for (_, task) in known.values() {
        task.abort();
    }
}

fn sockets(dir: &Path) -> BTreeMap<PathBuf, Identity> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let sockets = entries.filter_map(|e| {
        let meta = e.metadata().ok().filter(|m| m.file_type().is_socket())?;
        Some((e.path(), (meta.ino(), meta.ctime(), meta.ctime_nsec())))
    });
    sockets.filter(|(path, _)| !path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."))).collect()
}

/// Asks until the plugin is taken.
async fn register(ctx: Arc<Context>, path: PathBuf) {
    let mut pause = PAUSE;
    loop {
        match tokio::time::timeout(PATIENCE, attempt(&ctx, &path)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::warn!(path = %path.display(), error, "plugin not registered"),
            Err(_) => tracing::warn!(path = %path.display(), "plugin does not answer"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn attempt(ctx: &Arc<Context>, path: &Path) -> Result<(), String> {
    let channel = Channel::unix(path).await.map_err(|e| e.to_string())?;
    let mut client = RegistrationClient::new(channel);
    let info = client.get_info(InfoRequest {}).await.map_err(|s| words(&s))?.into_inner();
    let taken = take(ctx, path, &info).await;
    let status =
        RegistrationStatus { plugin_registered: taken.is_ok(), error: taken.clone().err().unwrap_or_default() };
    client.notify_registration_status(status).await.map_err(|s| words(&s))?;
    taken.map(|()| tracing::info!(kind = info.r#type, name = info.name, "plugin registered"))
}

async fn take(ctx: &Arc<Context>, path: &Path, info: &PluginInfo) -> Result<(), String> {
    let endpoint = if info.endpoint.is_empty() { path.to_path_buf() } else { PathBuf::from(&info.endpoint) };
    match info.r#type.as_str() {
        "CSIPlugin" => ctx.csi.register(ctx, path, &info.name, endpoint, &info.supported_versions).await,
        "DRAPlugin" => {
            ctx.claims.register(path, &info.name, endpoint, &info.supported_versions)?;
            let ctx = ctx.clone();
            tokio::spawn(async move { claims::sweep(&ctx).await });
            Ok(())
        }
        "DevicePlugin" => devices::register(ctx, &info.name, endpoint, &info.supported_versions, None),
        other => Err(format!("no handler registered for plugin type: {other} at socket {}", path.display())),
    }
}

fn forget(ctx: &Arc<Context>, path: &Path) {
    ctx.csi.deregister(path);
    ctx.claims.deregister(path);
}
