//! Plugins: their registration, and the list of devices each keeps telling.

use std::{
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use tonic::{Request, Response, Status};

use super::{Device, Devices};
use crate::{
    context::Context,
    grpc::{
        Channel,
        proto::device::{
            DevicePluginOptions, Empty, RegisterRequest,
            device_plugin_client::DevicePluginClient,
            registration_server::{Registration, RegistrationServer},
        },
        words,
    },
    sources,
};

/// The one version of the API.
const API: &str = "v1beta1";
/// How long a plugin may take to listen after its registration, and to answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// First pause after a socket that refuses.
const PAUSE: Duration = Duration::from_millis(10);

/// The service on `kubelet.sock`.
pub(super) fn service(ctx: Arc<Context>) -> RegistrationServer<Registrar> {
    RegistrationServer::new(Registrar { ctx })
}

pub(super) struct Registrar {
    ctx: Arc<Context>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn register(&self, r: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let r = r.into_inner();
        let endpoint = Path::new(&r.endpoint);
        let plain = endpoint.components().count() == 1 && endpoint.file_name().is_some();
        if !plain {
            return Err(Status::invalid_argument(format!("endpoint {:?} is not a file name", r.endpoint)));
        }
        let path = self.ctx.devices.dir.join(endpoint);
        let done = register(&self.ctx, &r.resource_name, path, &[r.version], r.options);
        done.map(|()| Response::new(Empty {})).map_err(Status::invalid_argument)
    }
}

/// Takes a plugin for a resource, in place of one that had it before.
pub(crate) fn register(
    ctx: &Arc<Context>,
    resource: &str,
    endpoint: PathBuf,
    versions: &[String],
    options: Option<DevicePluginOptions>,
) -> Result<(), String> {
    if !versions.iter().any(|v| v == API) {
        return Err(format!(
            "requested API version {versions:?} is not supported by kubelet. Supported version is {API:?}"
        ));
    }
    let extended = resource.split_once('/').is_some_and(|(domain, name)| {
        !name.is_empty() && !domain.is_empty() && domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io")
    });
    if !extended {
        return Err(format!("the ResourceName {resource:?} is invalid"));
    }
    let generation = {
        let mut state = ctx.devices.state.lock();
        let r = state.resources.entry(resource.into()).or_default();
        r.generation += 1;
        r.endpoint = Some(endpoint.clone());
        r.generation
    };
    tracing::info!(resource, endpoint = %endpoint.display(), "device plugin registered");
    tokio::spawn(follow(ctx.clone(), resource.into(), endpoint, generation, options));
    Ok(())
}

/// Takes the plugin's lists until it ends; then none of its devices is given out.
async fn follow(
    ctx: Arc<Context>,
    resource: String,
    endpoint: PathBuf,
    generation: u64,
    options: Option<DevicePluginOptions>,
) {
    let devices = &ctx.devices;
    if let Err(error) = listen(devices, &resource, &endpoint, generation, options).await {
        tracing::warn!(resource, error, "device plugin");
    }
    tracing::info!(resource, "device plugin ended");
    devices.change(&resource, generation, |r| {
        r.endpoint = None;
        r.devices.values_mut().for_each(|d| d.healthy = false);
    });
}

impl Devices {
    /// Changes a resource unless another plugin has taken it.
    fn change(&self, resource: &str, generation: u64, change: impl FnOnce(&mut super::Resource)) -> bool {
        let own = {
            let mut state = self.state.lock();
            let r = state.resources.get_mut(resource).filter(|r| r.generation == generation);
            r.map(change).is_some()
        };
        if own {
            self.save();
        }
        own
    }
}

/// A plugin may register before it listens: its socket is waited for. One that is there and refuses is of an earlier life, or
/// about to listen: it is tried again, with growing pauses, because the kernel tells nobody of that.
async fn connect(endpoint: &Path, patience: Duration) -> Result<DevicePluginClient<Channel>, String> {
    let told = |e: io::Error| format!("{}: {e}", endpoint.display());
    let dir = endpoint.parent().unwrap_or(endpoint);
    // The watch comes first, so that a socket made meanwhile is not missed.
    let mut appeared = pin!(sources::directory_events(dir).map_err(told)?);
    let mut patience = pin!(tokio::time::sleep(patience));
    let mut pause = PAUSE;
    loop {
        let error = match Channel::unix(endpoint).await {
            Ok(channel) => return Ok(DevicePluginClient::new(channel)),
            Err(error) => error,
        };
        let refused = error.kind() == io::ErrorKind::ConnectionRefused;
        tokio::select! {
            () = &mut patience => return Err(told(error)),
            event = appeared.next() => if event.is_none() { return Err(told(error)) },
            () = tokio::time::sleep(pause), if refused => pause *= 2,
        }
    }
}

async fn listen(
    devices: &Devices,
    resource: &str,
    endpoint: &Path,
    generation: u64,
    options: Option<DevicePluginOptions>,
) -> Result<(), String> {
    let mut client = connect(endpoint, PATIENCE).await?;
    let options = match options {
        Some(o) => o,
        None => client.get_device_plugin_options(Empty {}).await.map_err(|s| words(&s))?.into_inner(),
    };
    let mut lists = client.list_and_watch(Empty {}).await.map_err(|s| words(&s))?.into_inner();
    while let Some(list) = lists.message().await.map_err(|s| words(&s))? {
        let own = devices.change(resource, generation, |r| {
            r.preferred = options.get_preferred_allocation_available;
            r.pre_start = options.pre_start_required;
            let device = |d: &crate::grpc::proto::device::Device| Device {
                healthy: d.health == "Healthy",
                nodes: d.topology.iter().flat_map(|t| t.nodes.iter().map(|n| n.id)).collect(),
            };
            r.devices = list.devices.iter().map(|d| (d.id.clone(), device(d))).collect();
        });
        if !own {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_plugin_that_listens_late_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("p.sock");
        let late = async {
            // What an earlier plugin left refuses; the new one takes its place.
            drop(UnixListener::bind(&socket).unwrap());
            tokio::task::yield_now().await;
            std::fs::remove_file(&socket).unwrap();
            UnixListener::bind(&socket).unwrap().accept().await.unwrap()
        };
        let (client, _) = tokio::join!(connect(&socket, PATIENCE), late);
        assert!(client.is_ok(), "{}", client.err().unwrap_or_default());
    }

    #[tokio::test]
    async fn nobody_is_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let error = connect(&dir.path().join("p.sock"), Duration::from_millis(20)).await.err().unwrap();
        assert!(error.ends_with("p.sock: No such file or directory (os error 2)"), "{error}");
    }
}
