//! A pod's volumes: made before its first container, kept up to date while it runs, removed after its last.
//!
//! In: the pod and its addresses. Out: a directory per volume and, per container, the bind mounts that show them.
//! Content volumes (configMap, secret, downwardAPI, projected) live in the run directory (a tmpfs on most machines), the
//! others in the pod's state directory.

pub(crate) mod atomic;
pub(crate) mod content;
mod image;
pub(crate) mod mounts;
pub(crate) mod nfs;
pub(crate) mod plain;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use k8s_openapi::api::core::v1::{Container, PersistentVolume, PersistentVolumeClaim, Pod, Volume, VolumeDevice};
use tokio::sync::watch;

use crate::{
    context::Context,
    csi::volume as csi,
    objects::{Held, ObjectRef},
    pods::sandbox,
    spec::{BindMount, expand::expand, field::Addresses},
};

/// Whose volumes are directories that the first pod's node makes.
const LOCAL_PROVISIONER: &str = "isopod.dev/local";

/// A volume that could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} failed for volume \"{volume}\" : {message}", if *.block { "MapVolume.SetUpDevice" } else { "MountVolume.SetUp" })]
pub(crate) struct VolumeError {
    pub(crate) volume: String,
    pub(crate) message: String,
    /// It is a device, not a tree.
    block: bool,
}

impl VolumeError {
    /// Reason of the event about it.
    pub(crate) fn reason(&self) -> &'static str {
        if self.block { "FailedMapVolume" } else { "FailedMount" }
    }
}

/// A volume ready to be shown to containers.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    /// A device for `volumeDevices`, not a tree for `volumeMounts`.
    block: bool,
    /// Its server may be away.
    remote: bool,
    /// Who looks after it while it is mounted.
    keeper: Option<tokio::task::AbortHandle>,
}

impl Ready {
    fn new(path: PathBuf, read_only: bool) -> Self {
        Self { path, read_only, block: false, remote: false, keeper: None }
    }

    fn remote(path: PathBuf, read_only: bool) -> Self {
        Self { remote: true, ..Self::new(path, read_only) }
    }
}

/// All volumes of a pod.
#[derive(Debug, Default)]
pub(crate) struct Mounted {
    volumes: BTreeMap<String, Ready>,
    keepers: Vec<tokio::task::AbortHandle>,
    /// Held while a server is asked for a part of a volume.
    asking: Arc<tokio::sync::Mutex<()>>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.keepers.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

fn directory(ctx: &Context, uid: &str, plugin: &str, name: &str) -> PathBuf {
    ctx.config.paths.pod(uid).join("volumes").join(plugin).join(name)
}

fn content_directory(ctx: &Context, uid: &str, v: &Volume) -> PathBuf {
    let plugin = if v.config_map.is_some() {
        "kubernetes.io~configmap"
    } else if v.secret.is_some() {
        "kubernetes.io~secret"
    } else if v.downward_api.is_some() {
        "kubernetes.io~downward-api"
    } else {
        "kubernetes.io~projected"
    };
    ctx.config.paths.run_pod(uid).join("volumes").join(plugin).join(&v.name)
}

/// Sets up every volume of a pod, all at once; content volumes follow their sources as long as the result lives.
pub(crate) async fn mount(
    ctx: &Arc<Context>,
    pods: watch::Receiver<Arc<Pod>>,
    addresses: watch::Receiver<Addresses>,
) -> Result<Mounted, VolumeError> {
    let pod = pods.borrow().clone();
    let namespace = pod.metadata.namespace.clone().unwrap_or_else(|| "default".into());
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.clone()).unwrap_or_default();
    let mut contents = Vec::new();
    let mut jobs = Vec::new();
    for v in &volumes {
        match content::sources(&namespace, v) {
            Some(sources) => contents.push(Content::new(ctx, &uid, v, sources)),
            None => jobs.push(plain_volume(ctx, &pods, &uid, v)),
        }
    }
    let plain = join_all(jobs);
    let first_addresses = addresses.borrow().clone();
    let filled = join_all(contents.iter_mut().map(|c| c.fill(ctx, &pod, &first_addresses)));
    let (plain, filled) = tokio::join!(plain, filled);
    let mut mounted = Mounted::default();
    for ready in plain {
        let (name, mut ready) = ready?;
        mounted.keepers.extend(ready.keeper.take());
        mounted.volumes.insert(name, ready);
    }
    filled.into_iter().collect::<Result<Vec<()>, _>>()?;
    for c in &contents {
        mounted.volumes.insert(c.name.clone(), Ready::new(c.target.clone(), true));
    }
    if !contents.is_empty() {
        mounted.keepers.push(tokio::spawn(keep(ctx.clone(), contents, pods, addresses)).abort_handle());
    }
    Ok(mounted)
}

/// Sets up a volume that has no content to follow, and says how long that took.
async fn plain_volume(
    ctx: &Arc<Context>,
    pods: &watch::Receiver<Arc<Pod>>,
    uid: &str,
    v: &Volume,
) -> Result<(String, Ready), VolumeError> {
    let begun = Instant::now();
    let pod = &pods.borrow().clone();
    let (mut block, mut plugin_name) = (false, plugin(v));
    let made = async {
        let claim = match (&v.persistent_volume_claim, &v.ephemeral) {
            (Some(c), _) => Some((c.claim_name.clone(), c.read_only == Some(true))),
            (_, Some(_)) => Some((format!("{}-{}", sandbox::name(pod), v.name), false)),
            _ => None,
        };
        let Some((name, read_only)) = claim else { return own_volume(ctx, pods, uid, v).await };
        let (claim, volume) = bound(ctx, pod, &name).await?;
        if let Some(spec) = &volume.spec {
            block = spec.volume_mode.as_deref() == Some("Block");
            plugin_name = plugin(spec);
        }
        claimed(ctx, pods, v, claim, volume, read_only).await
    }
    .await;
    let operation = if block { "map_volume" } else { "volume_mount" };
    took(ctx, operation, &plugin_name, begun, made.is_ok());
    let made = made.map_err(|message| VolumeError { volume: v.name.clone(), message, block })?;
    Ok((v.name.clone(), made))
}

fn took(ctx: &Context, operation: &str, plugin: &str, begun: Instant, good: bool) {
    let status = if good { "success" } else { "fail-unknown" };
    let labels = [("migrated", "false"), ("operation_name", operation), ("status", status), ("volume_plugin", plugin)];
    ctx.metrics.observe("storage_operation_duration_seconds", labels, begun.elapsed());
}

/// A volume that the pod's own spec describes.
async fn own_volume(
    ctx: &Arc<Context>,
    pods: &watch::Receiver<Arc<Pod>>,
    uid: &str,
    v: &Volume,
) -> Result<Ready, String> {
    let pod = &pods.borrow().clone();
    let writable = |path| Ready::new(path, false);
    Ok(if let Some(e) = &v.empty_dir {
        let target = directory(ctx, uid, "kubernetes.io~empty-dir", &v.name);
        plain::empty_dir(&target, e, pod)?;
        writable(target)
    } else if let Some(i) = &v.image {
        let target = directory(ctx, uid, "kubernetes.io~image", &v.name);
        Ready::new(image::mount(ctx, pod, i, target).await?, true)
    } else if let Some(h) = &v.host_path {
        writable(plain::host_path(h)?)
    } else if let Some(c) = &v.csi {
        mounted(csi::Wanted::inline(ctx, pod, &v.name, c.clone()), c.read_only == Some(true)).await?
    } else if let Some(n) = &v.nfs {
        let target = directory(ctx, uid, "kubernetes.io~nfs", &v.name);
        nfs::mount(&target, n, &[], pods.clone()).await?;
        Ready::remote(target, n.read_only == Some(true))
    } else {
        return Err(format!("no volume plugin matched: isopod has no {} volumes", kind_of(v)));
    })
}

/// The name of the plugin that a kubelet has for a volume, or for a PersistentVolume's spec.
pub(crate) fn plugin(volume: &impl serde::Serialize) -> String {
    let kind = match kind_of(volume).as_str() {
        "configMap" => "configmap".into(),
        "downwardAPI" => "downward-api".into(),
        "local" => "local-volume".into(),
        other => other.chars().fold(String::new(), |mut name, c| {
            if c.is_ascii_uppercase() {
                name.push('-');
            }
            name.push(c.to_ascii_lowercase());
            name
        }),
    };
    format!("kubernetes.io/{kind}")
}

/// What a volume is, as its manifest says it: the field beside those that every one has.
fn kind_of(volume: &impl serde::Serialize) -> String {
    const EVERY: [&str; 9] = [
        "name",
        "accessModes",
        "capacity",
        "claimRef",
        "mountOptions",
        "nodeAffinity",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "volumeMode",
    ];
    let fields = serde_json::to_value(volume).unwrap_or_default();
    let mut names = fields.as_object().into_iter().flatten().map(|(name, _)| name);
    names.find(|name| !EVERY.contains(&name.as_str())).cloned().unwrap_or_else(|| "such".into())
}

async fn mounted(volume: csi::Wanted, read_only: bool) -> Result<Ready, String> {
    let block = volume.is_block();
    let csi::Mounted { path, keeper } = volume.mount().await?;
    Ok(Ready { block, keeper, ..Ready::new(path, read_only) })
}

/// A claim by its name and the volume it is bound to.
async fn bound(ctx: &Context, pod: &Pod, name: &str) -> Result<(PersistentVolumeClaim, PersistentVolume), String> {
    let client = ctx.api.wait().await.ok_or("there is no API server")?;
    let claims: kube::Api<PersistentVolumeClaim> = kube::Api::namespaced(client.clone(), sandbox::namespace(pod));
    let claim = claims.get(name).await.map_err(|e| e.to_string())?;
    let bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|s| s.volume_name.clone()).filter(|_| bound);
    let volume = volume.ok_or_else(|| format!("PersistentVolumeClaim {name} is not bound"))?;
    let volumes: kube::Api<PersistentVolume> = kube::Api::all(client);
    let volume = volumes.get(&volume).await.map_err(|e| e.to_string())?;
    Ok((claim, volume))
}

/// The volume of a bound claim: local, hostPath, NFS and CSI ones.
async fn claimed(
    ctx: &Arc<Context>,
    pods: &watch::Receiver<Arc<Pod>>,
    v: &Volume,
    claim: PersistentVolumeClaim,
    object: PersistentVolume,
    read_only: bool,
) -> Result<Ready, String> {
    let pod = &pods.borrow().clone();
    let by = object.metadata.annotations.as_ref().and_then(|a| a.get("pv.kubernetes.io/provisioned-by"));
    let ours = by.is_some_and(|by| by == LOCAL_PROVISIONER);
    let spec = object.spec.clone().unwrap_or_default();
    if let Some(h) = &spec.host_path {
        return Ok(Ready::new(plain::host_path(h)?, read_only));
    }
    if let Some(n) = &spec.nfs {
        let target = directory(ctx, sandbox::uid(pod), "kubernetes.io~nfs", &v.name);
        nfs::mount(&target, n, spec.mount_options.as_deref().unwrap_or_default(), pods.clone()).await?;
        return Ok(Ready::remote(target, read_only || n.read_only == Some(true)));
    }
    let name = object.metadata.name.clone().unwrap_or_default();
    if let Some(wanted) = csi::Wanted::persistent(ctx, pod, claim, object, read_only) {
        return mounted(wanted, read_only).await;
    }
    let kind = kind_of(&spec);
    let local = spec.local.ok_or_else(|| format!("PersistentVolume {name}: isopod has no {kind} volumes"))?;
    if spec.volume_mode.as_deref() == Some("Block") {
        return Ok(Ready { block: true, ..Ready::new(plain::block_device(&local.path)?, read_only) });
    }
    Ok(Ready::new(plain::local(&local.path, ours, plain::fs_group(pod))?, read_only))
}

/// One content volume.
struct Content {
    name: String,
    plugin: String,
    target: PathBuf,
    sources: content::Sources,
    held: BTreeMap<ObjectRef, Held>,
    tokens: content::Tokens,
}

impl Content {
    fn new(ctx: &Context, uid: &str, v: &Volume, sources: content::Sources) -> Self {
        let held = content::references(&sources).map(|key| (key.clone(), ctx.objects.hold(key))).collect();
        let target = content_directory(ctx, uid, v);
        Self { name: v.name.clone(), plugin: plugin(v), target, sources, held, tokens: content::Tokens::new() }
    }

    /// The first time, of which is said how long it took.
    async fn fill(&mut self, ctx: &Context, pod: &Pod, addresses: &Addresses) -> Result<(), VolumeError> {
        let begun = Instant::now();
        let done = self.refresh(ctx, pod, addresses).await;
        took(ctx, "volume_mount", &self.plugin, begun, done.is_ok());
        done
    }

    async fn refresh(&mut self, ctx: &Context, pod: &Pod, addresses: &Addresses) -> Result<(), VolumeError> {
        let error = |message: String| VolumeError { volume: self.name.clone(), message, block: false };
        let made = content::payload(ctx, pod, &self.sources, &self.held, &mut self.tokens, addresses).await;
        let payload = made.map_err(error)?;
        match atomic::write(&self.target, &payload, plain::fs_group(pod)) {
            Ok(_) => Ok(()),
            Err(e) => Err(error(e.to_string())),
        }
    }

    fn next_token(&self) -> Option<Instant> {
        self.tokens.values().map(|t| t.refresh).min()
    }
}

/// Refreshes content when a source, the pod or a token's age says so.
async fn keep(
    ctx: Arc<Context>,
    mut contents: Vec<Content>,
    mut pods: watch::Receiver<Arc<Pod>>,
    mut addresses: watch::Receiver<Addresses>,
) {
    let mut sources: Vec<_> = contents.iter().flat_map(|c| c.held.values()).map(Held::changes).collect();
    for s in &mut sources {
        s.borrow_and_update();
    }
    pods.borrow_and_update();
    addresses.borrow_and_update();
    let mut retry: Option<Duration> = None;
    loop {
        let token = contents.iter().filter_map(Content::next_token).min();
        let again = retry.map(|r| Instant::now() + r);
        let deadline = [token, again].into_iter().flatten().min();
        {
            let mut changes: FuturesUnordered<_> = sources.iter_mut().map(|s| s.changed()).collect();
            // All arms are cancel-safe: a missed change stays marked as unseen in its channel.
            tokio::select! {
                Some(Ok(())) = changes.next() => {}
                r = pods.changed() => if r.is_err() { return },
                r = addresses.changed() => if r.is_err() { return },
                () = sleep_until(deadline) => {}
            }
        }
        for s in &mut sources {
            s.borrow_and_update();
        }
        let pod = pods.borrow_and_update().clone();
        let at = addresses.borrow_and_update().clone();
        retry = None;
        for c in &mut contents {
            if let Err(error) = c.refresh(&ctx, &pod, &at).await {
                tracing::warn!(pod = pod.metadata.name, %error, "volume keeps its old content");
                retry = Some(Duration::from_secs(10));
            }
        }
    }
}

/// Sleeps until then; forever without a time.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The devices of a container's volumeDevices: place on the host, place in the container, whether it may only read.
pub(crate) fn container_devices(c: &Container, mounted: &Mounted) -> Result<Vec<(PathBuf, String, bool)>, String> {
    let one = |d: &VolumeDevice| {
        let ready = mounted.volumes.get(&d.name);
        let ready =
            ready.ok_or_else(|| format!("cannot find volume {:?} to pass into container {:?}", d.name, c.name))?;
        if !ready.block {
            return Err(format!("volume {} has volumeMode Filesystem, but is specified in volumeDevices", d.name));
        }
        Ok((ready.path.clone(), d.device_path.clone(), ready.read_only))
    };
    c.volume_devices.iter().flatten().map(one).collect()
}

/// The bind mounts of a container's volumeMounts; an error is the message of a CreateContainerConfigError.
pub(crate) async fn container_mounts(
    pod_dir: PathBuf,
    c: &Container,
    mounted: &Arc<Mounted>,
    env: &[(String, String)],
) -> Result<Vec<BindMount>, String> {
    let volumes = c.volume_mounts.iter().flatten().filter_map(|m| mounted.volumes.get_key_value(&m.name));
    let remote: Vec<(String, PathBuf)> =
        volumes.filter(|(_, v)| v.remote).map(|(name, v)| (name.clone(), v.path.clone())).collect();
    if remote.is_empty() {
        return binds(&pod_dir, c, &mounted.volumes, env);
    }
    // A supervisor that waits for a server is of no use to the pod's other containers either: it is asked before.
    let text = format!("the server of volume {:?} does not answer", remote[0].0);
    let (container, volumes, variables) = (c.clone(), mounted.volumes.clone(), env.to_vec());
    let made = async {
        // One after the other: threads that wait for a server must not become many.
        let turn = mounted.asking.clone().lock_owned().await;
        let work = move || {
            let _turn = turn;
            for (name, path) in &remote {
                rustix::fs::statfs(path).map_err(|e| format!("volume {name:?}: {e}"))?;
            }
            binds(&pod_dir, &container, &volumes, &variables)
        };
        nfs::aside(work, nfs::ANSWER).await
    };
    let made = tokio::time::timeout(nfs::ANSWER, made).await.ok().flatten();
    made.unwrap_or(Err(text))
}

fn binds(
    pod_dir: &Path,
    c: &Container,
    volumes: &BTreeMap<String, Ready>,
    env: &[(String, String)],
) -> Result<Vec<BindMount>, String> {
    let mut out = Vec::new();
    for (index, m) in c.volume_mounts.iter().flatten().enumerate() {
        let ready = volumes.get(&m.name);
        let ready =
            ready.ok_or_else(|| format!("cannot find volume {:?} to mount into container {:?}", m.name, c.name))?;
        if ready.block {
            return Err(format!("volume {} has volumeMode Block, but is specified in volumeMounts", m.name));
        }
        let sub = match (&m.sub_path, &m.sub_path_expr) {
            (_, Some(e)) if !e.is_empty() => {
                let lookup = |n: &str| env.iter().find(|(k, _)| k == n).map(|(_, v)| v.clone());
                let text = expand(e, lookup);
                if text.contains("$(") {
                    return Err(format!("missing value for an environment variable in subPathExpr {e:?}"));
                }
                Some(text)
            }
            (Some(s), _) if !s.is_empty() => Some(s.clone()),
            _ => None,
        };
        let source = match sub {
            None => ready.path.clone(),
            Some(sub) => {
                let place = pod_dir.join("volume-subpaths").join(&m.name).join(&c.name).join(index.to_string());
                mounts::bind_sub_path(&ready.path, &sub, &place, 0o755).map_err(|e| {
                    format!("failed to prepare subPath for volumeMount {:?} of container {:?}: {e}", m.name, c.name)
                })?
            }
        };
        let read_only = ready.read_only || m.read_only == Some(true);
        let propagation = match m.mount_propagation.as_deref() {
            Some("HostToContainer") => "rslave",
            Some("Bidirectional") => "rshared",
            _ => "rprivate",
        };
        if propagation != "rprivate" {
            mounts::propagates(&source, propagation)?;
        }
        out.push(BindMount {
            source,
            destination: if m.mount_path.starts_with('/') {
                m.mount_path.clone()
            } else {
                format!("/{}", m.mount_path)
            },
            read_only,
            recursive_read_only: read_only
                && matches!(m.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible")),
            propagation,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn volumes_are_called_as_a_kubelet_calls_them() {
        for (volume, want) in [
            (json!({"name": "v", "emptyDir": {}}), "kubernetes.io/empty-dir"),
            (json!({"name": "v", "configMap": {"name": "x"}}), "kubernetes.io/configmap"),
            (json!({"name": "v", "downwardAPI": {}}), "kubernetes.io/downward-api"),
            (json!({"name": "v", "hostPath": {"path": "/x"}}), "kubernetes.io/host-path"),
        ] {
            let volume: Volume = serde_json::from_value(volume).unwrap();
            assert_eq!(plugin(&volume), want);
        }
        let spec = json!({"volumeMode": "Block", "capacity": {"storage": "1Gi"}, "local": {"path": "/dev/x"}});
        assert_eq!(plugin(&spec), "kubernetes.io/local-volume");
    }

    #[test]
    fn devices_are_mapped_and_trees_mounted() {
        let error = |block| VolumeError { volume: "v".into(), message: "no".into(), block };
        assert_eq!((error(false).reason(), error(true).reason()), ("FailedMount", "FailedMapVolume"));
        assert_eq!(error(true).to_string(), "MapVolume.SetUpDevice failed for volume \"v\" : no");
    }
}
