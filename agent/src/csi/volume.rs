//! A CSI volume of a pod: from a PersistentVolume or inline; mounted, and kept as its driver wants it.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{CSIVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, Secret, SecretReference},
    storage::v1::{CSIDriver, CSIDriverSpec, VolumeAttachment},
};
use serde_json::json;

use super::{Driver, attachment_name, digest, driver::Can, expand, pod_volumes, record::Record, staging, unique_name};
use crate::{
    context::Context,
    grpc::proto::csi::{
        NodePublishVolumeRequest, NodeStageVolumeRequest, VolumeCapability,
        volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
    },
    pods::sandbox,
    tokens::{self, Wish},
    volumes::plain,
};

/// Longest wait for the attach/detach controller, as upstream.
const ATTACH: Duration = Duration::from_secs(120);

/// Where a volume comes from.
pub(super) enum From {
    Persistent { volume: Box<PersistentVolume>, claim: Box<PersistentVolumeClaim> },
    Inline(CSIVolumeSource),
}

/// A CSI volume as a pod asks for it.
pub(crate) struct Wanted {
    pub(super) ctx: Arc<Context>,
    pub(super) pod: Arc<Pod>,
    pub(super) from: From,
    /// Directory name: the PersistentVolume's, or the volume's in the pod.
    name: String,
    read_only: bool,
    pub(super) driver: String,
    pub(super) handle: String,
}

/// Mounted, and whether somebody has to look after it.
pub(crate) struct Mounted {
    pub(crate) path: PathBuf,
    pub(crate) keeper: Option<tokio::task::AbortHandle>,
}

impl Wanted {
    /// A claim's volume; `None` when it is not a CSI one.
    pub(crate) fn persistent(
        ctx: &Arc<Context>,
        pod: &Arc<Pod>,
        claim: PersistentVolumeClaim,
        volume: PersistentVolume,
        read_only: bool,
    ) -> Option<Self> {
        let source = volume.spec.as_ref()?.csi.as_ref()?;
        Some(Self {
            ctx: ctx.clone(),
            pod: pod.clone(),
            name: volume.metadata.name.clone().unwrap_or_default(),
            read_only,
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            from: From::Persistent { claim: Box::new(claim), volume: Box::new(volume) },
        })
    }

    /// A volume that lives as long as its pod.
    pub(crate) fn inline(ctx: &Arc<Context>, pod: &Arc<Pod>, name: &str, source: CSIVolumeSource) -> Self {
        Self {
            ctx: ctx.clone(),
            pod: pod.clone(),
            name: name.into(),
            read_only: source.read_only == Some(true),
            driver: source.driver.clone(),
            handle: format!("csi-{}", digest(&[sandbox::uid(pod), name])),
            from: From::Inline(source),
        }
    }

    fn is_inline(&self) -> bool {
        matches!(self.from, From::Inline(_))
    }

    fn dir(&self) -> PathBuf {
        pod_volumes(&self.ctx, sandbox::uid(&self.pod)).join(&self.name)
    }

    pub(super) fn target(&self) -> PathBuf {
        self.dir().join("mount")
    }

    pub(super) fn staging(&self) -> PathBuf {
        staging(&self.ctx, &self.driver, &self.handle)
    }

    /// Mounts it if that has not been done; the driver is not asked again for what it has done in this boot.
    pub(crate) async fn mount(self) -> Result<Mounted, String> {
        let dir = self.dir();
        let path = self.target();
        let done = Record::read(&dir).filter(Record::is_done);
        let object = match &done {
            // Also without an API server: what is mounted stays mounted.
            Some(_) if self.ctx.api.get().is_none() => None,
            _ => self.driver_object().await?,
        };
        let spec = object.unwrap_or_default();
        if done.is_none() {
            self.mount_anew(&spec, &dir).await?;
        }
        let keeper = expand::keep(self, spec);
        Ok(Mounted { path, keeper })
    }

    async fn mount_anew(&self, spec: &CSIDriverSpec, dir: &Path) -> Result<(), String> {
        self.check(spec)?;
        let attach = self.is_attached(spec);
        let mut record = Record {
            driver_name: self.driver.clone(),
            volume_handle: self.handle.clone(),
            name: self.name.clone(),
            claim: match &self.from {
                From::Persistent { claim, .. } => claim.metadata.name.clone().unwrap_or_default(),
                From::Inline(_) => String::new(),
            },
            node_name: self.ctx.node_name.to_string(),
            volume_lifecycle_mode: if self.is_inline() { "Ephemeral" } else { "Persistent" }.into(),
            ..Record::default()
        };
        let mut publish_context = HashMap::new();
        if attach {
            record.attachment = attachment_name(&self.driver, &self.handle, &self.ctx.node_name);
            publish_context = self.attached().await?;
        }
        let driver = self.ctx.csi.driver(&self.driver)?;
        let _turn = self.ctx.csi.turn(&self.driver, &self.handle).await;
        record.write(dir)?;
        if attach {
            self.ctx.csi.use_volume(unique_name(&self.driver, &self.handle), true);
        }
        let staged = driver.can(Can::StageUnstageVolume) && !self.is_inline();
        if staged {
            self.stage(&driver, &publish_context).await?;
        }
        self.publish(&driver, spec, publish_context, staged).await?;
        self.give_to_group(&driver, spec)?;
        if let Err(error) = expand::at_mount(self, &driver, staged).await {
            tracing::warn!(pod = sandbox::name(&self.pod), volume = self.name, error, "volume keeps its size");
        }
        record.finish(dir)
    }

    /// Whether somebody has to attach it to the node first.
    pub(super) fn is_attached(&self, spec: &CSIDriverSpec) -> bool {
        !self.is_inline() && spec.attach_required != Some(false)
    }

    fn check(&self, spec: &CSIDriverSpec) -> Result<(), String> {
        let mode = if self.is_inline() { "Ephemeral" } else { "Persistent" };
        let modes = spec.volume_lifecycle_modes.as_deref().unwrap_or_default();
        let allowed = if modes.is_empty() { !self.is_inline() } else { modes.iter().any(|m| m == mode) };
        if !allowed {
            return Err(format!(
                "volume mode {mode:?} not supported by driver {} (only supports {modes:?})",
                self.driver
            ));
        }
        Ok(())
    }

    /// Whether it is a device, for `volumeDevices`.
    pub(crate) fn is_block(&self) -> bool {
        let From::Persistent { volume, .. } = &self.from else { return false };
        volume.spec.as_ref().is_some_and(|s| s.volume_mode.as_deref() == Some("Block"))
    }

    async fn driver_object(&self) -> Result<Option<CSIDriverSpec>, String> {
        let client = self.ctx.api.wait().await.ok_or("there is no API server")?;
        let drivers: kube::Api<CSIDriver> = kube::Api::all(client);
        let found = drivers.get_opt(&self.driver).await.map_err(|e| e.to_string())?;
        Ok(found.map(|d| d.spec))
    }

    /// Waits until the controller has attached it; what it says about the attachment.
    pub(super) async fn attached(&self) -> Result<HashMap<String, String>, String> {
        let attachment = &attachment_name(&self.driver, &self.handle, &self.ctx.node_name);
        let name = unique_name(&self.driver, &self.handle);
        let client = self.ctx.api.wait().await.ok_or("there is no API server")?;
        let attachments: kube::Api<VolumeAttachment> = kube::Api::all(client);
        let mut told = self.ctx.csi.attached.subscribe();
        let wait = tokio::time::timeout(ATTACH, told.wait_for(|all| all.contains(&name)));
        let told = matches!(wait.await, Ok(Ok(_)));
        let found = attachments.get_opt(attachment).await.map_err(|e| e.to_string())?;
        let status = found.and_then(|a| a.status);
        match status {
            Some(s) if s.attached => Ok(s.attachment_metadata.unwrap_or_default().into_iter().collect()),
            Some(s) if s.attach_error.is_some() => {
                let why = s.attach_error.and_then(|e| e.message).unwrap_or_default();
                Err(format!("attachment {attachment} of volume {:?} failed: {why}", self.name))
            }
            _ if told => {
                Err(format!("volume attachment {attachment} says that volume {:?} is not attached", self.name))
            }
            _ => Err(format!("timed out waiting for volume {:?} to be attached ({attachment})", self.name)),
        }
    }

    async fn stage(&self, driver: &Driver, publish_context: &HashMap<String, String>) -> Result<(), String> {
        let From::Persistent { volume, .. } = &self.from else { return Ok(()) };
        let source = volume.spec.as_ref().and_then(|s| s.csi.as_ref()).ok_or("not a CSI volume")?;
        let path = self.staging();
        let dir = path.parent().unwrap_or(&path).to_path_buf();
        let mut record =
            Record { driver_name: self.driver.clone(), volume_handle: self.handle.clone(), ..Record::default() };
        if Record::read(&dir).is_some_and(|r| r.is_done()) {
            return Ok(());
        }
        record.write(&dir)?;
        std::fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let request = NodeStageVolumeRequest {
            volume_id: self.handle.clone(),
            publish_context: publish_context.clone(),
            staging_target_path: path.display().to_string(),
            volume_capability: Some(self.capability(driver)),
            secrets: self.secret(source.node_stage_secret_ref.as_ref()).await?,
            volume_context: source.volume_attributes.clone().unwrap_or_default().into_iter().collect(),
        };
        driver.stage(request).await?;
        record.finish(&dir)
    }

    /// Also asked again for volumes whose driver wants that.
    pub(super) async fn publish(
        &self,
        driver: &Driver,
        spec: &CSIDriverSpec,
        publish_context: HashMap<String, String>,
        staged: bool,
    ) -> Result<(), String> {
        let (mut context, mut secrets) = match &self.from {
            From::Persistent { volume, .. } => {
                let source = volume.spec.as_ref().and_then(|s| s.csi.as_ref()).ok_or("not a CSI volume")?;
                (source.volume_attributes.clone(), self.secret(source.node_publish_secret_ref.as_ref()).await?)
            }
            From::Inline(source) => {
                let reference = source.node_publish_secret_ref.as_ref().map(|r| SecretReference {
                    name: Some(r.name.clone()),
                    namespace: Some(sandbox::namespace(&self.pod).into()),
                });
                (source.volume_attributes.clone(), self.secret(reference.as_ref()).await?)
            }
        };
        let context = context.get_or_insert_default();
        if spec.pod_info_on_mount == Some(true) {
            self.pod_info(context);
        }
        if let Some(text) = self.tokens(spec).await? {
            let key = "csi.storage.k8s.io/serviceAccount.tokens".to_string();
            match spec.service_account_token_in_secrets {
                Some(true) => _ = secrets.insert(key, text),
                _ => _ = context.insert(key, text),
            }
        }
        let target = self.target();
        // The driver makes the last directory; many want to find nothing there.
        let dir = self.dir();
        std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let request = NodePublishVolumeRequest {
            volume_id: self.handle.clone(),
            publish_context,
            staging_target_path: if staged { self.staging().display().to_string() } else { String::new() },
            target_path: target.display().to_string(),
            volume_capability: Some(self.capability(driver)),
            readonly: self.read_only,
            secrets,
            volume_context: std::mem::take(context).into_iter().collect(),
        };
        driver.publish(request).await
    }

    fn pod_info(&self, context: &mut BTreeMap<String, String>) {
        let account = self.pod.spec.as_ref().and_then(|s| s.service_account_name.clone()).unwrap_or_default();
        let all = [
            ("pod.name", sandbox::name(&self.pod)),
            ("pod.namespace", sandbox::namespace(&self.pod)),
            ("pod.uid", sandbox::uid(&self.pod)),
            ("serviceAccount.name", account.as_str()),
            ("ephemeral", if self.is_inline() { "true" } else { "false" }),
        ];
        context.extend(all.map(|(k, v)| (format!("csi.storage.k8s.io/{k}"), v.to_string())));
    }

    /// Tokens of the pod's service account, by audience, as the driver wants them.
    async fn tokens(&self, spec: &CSIDriverSpec) -> Result<Option<String>, String> {
        let Some(requests) = spec.token_requests.as_ref().filter(|r| !r.is_empty()) else { return Ok(None) };
        let mut all = serde_json::Map::new();
        for r in requests {
            let audience = Some(r.audience.clone()).filter(|a| !a.is_empty());
            let wish = Wish { audience, seconds: r.expiration_seconds.unwrap_or(3600) };
            let token = tokens::request(&self.ctx.api, &self.pod, &wish).await?;
            let value = json!({"token": token.text, "expirationTimestamp": token.expires.to_string()});
            all.insert(r.audience.clone(), value);
        }
        Ok(Some(serde_json::Value::Object(all).to_string()))
    }

    pub(super) async fn secret(&self, reference: Option<&SecretReference>) -> Result<HashMap<String, String>, String> {
        let Some(r) = reference else { return Ok(HashMap::new()) };
        let (namespace, name) = (r.namespace.clone().unwrap_or_default(), r.name.clone().unwrap_or_default());
        let client = self.ctx.api.wait().await.ok_or("there is no API server")?;
        let secrets: kube::Api<Secret> = kube::Api::namespaced(client, &namespace);
        let found = secrets.get(&name).await;
        let data = found.map_err(|e| format!("secret {namespace}/{name}: {e}"))?.data.unwrap_or_default();
        Ok(data.into_iter().map(|(k, v)| (k, String::from_utf8_lossy(&v.0).into_owned())).collect())
    }

    fn fs_type(&self) -> &str {
        let found = match &self.from {
            From::Persistent { volume, .. } => {
                volume.spec.as_ref().and_then(|s| s.csi.as_ref()).and_then(|c| c.fs_type.as_deref())
            }
            From::Inline(source) => source.fs_type.as_deref(),
        };
        found.unwrap_or_default()
    }

    fn access_modes(&self) -> &[String] {
        let From::Persistent { volume, .. } = &self.from else { return &[] };
        volume.spec.as_ref().and_then(|s| s.access_modes.as_deref()).unwrap_or_default()
    }

    pub(super) fn capability(&self, driver: &Driver) -> VolumeCapability {
        let options = match &self.from {
            From::Persistent { volume, .. } => volume.spec.as_ref().and_then(|s| s.mount_options.clone()),
            From::Inline(_) => None,
        };
        let group = plain::fs_group(&self.pod).filter(|_| driver.can(Can::VolumeMountGroup));
        let first = self.access_modes().first().map_or("ReadWriteOnce", String::as_str);
        let tree = || MountVolume {
            fs_type: self.fs_type().into(),
            mount_flags: options.unwrap_or_default(),
            volume_mount_group: group.map(|g| g.to_string()).unwrap_or_default(),
        };
        VolumeCapability {
            access_mode: Some(AccessMode { mode: access_mode(first, driver.can(Can::SingleNodeMultiWriter)).into() }),
            access_type: Some(match self.is_block() {
                true => AccessType::Block(BlockVolume {}),
                false => AccessType::Mount(tree()),
            }),
        }
    }

    /// fsGroup, where the driver leaves that to the node.
    fn give_to_group(&self, driver: &Driver, spec: &CSIDriverSpec) -> Result<(), String> {
        let Some(gid) = plain::fs_group(&self.pod).filter(|_| !driver.can(Can::VolumeMountGroup)) else {
            return Ok(());
        };
        let policy = spec.fs_group_policy.as_deref().unwrap_or("ReadWriteOnceWithFSType");
        if self.read_only
            || self.is_block()
            || !group_applies(policy, self.fs_type(), self.is_inline(), self.access_modes())
        {
            return Ok(());
        }
        let target = self.target();
        let context = self.pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
        let change = context.and_then(|c| c.fs_group_change_policy.as_deref());
        let done = plain::own_with(&target, gid, change == Some("OnRootMismatch"));
        done.map_err(|e| format!("applyFSGroup failed for {}: {e}", target.display()))
    }
}

/// Whether the node gives a volume to the pod's group.
fn group_applies(policy: &str, fs_type: &str, inline: bool, modes: &[String]) -> bool {
    match policy {
        "None" => false,
        "File" => true,
        _ => !fs_type.is_empty() && (inline || modes.iter().any(|m| m == "ReadWriteOnce" || m == "ReadWriteOncePod")),
    }
}

/// A PersistentVolume's access mode as drivers know it.
fn access_mode(mode: &str, knows_single: bool) -> Mode {
    match (mode, knows_single) {
        ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
        ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
        ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
        ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
        _ => Mode::SingleNodeWriter,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_modes() {
        for (mode, knows, want) in [
            ("ReadWriteOnce", false, Mode::SingleNodeWriter),
            ("ReadWriteOnce", true, Mode::SingleNodeMultiWriter),
            ("ReadWriteOncePod", false, Mode::SingleNodeWriter),
            ("ReadWriteOncePod", true, Mode::SingleNodeSingleWriter),
            ("ReadOnlyMany", true, Mode::MultiNodeReaderOnly),
            ("ReadWriteMany", false, Mode::MultiNodeMultiWriter),
        ] {
            assert_eq!(access_mode(mode, knows), want, "{mode} {knows}");
        }
    }

    #[test]
    fn who_gives_a_volume_to_the_group() {
        let (once, many) = (["ReadWriteOnce".to_string()], ["ReadWriteMany".to_string()]);
        for (policy, fs, inline, modes, want) in [
            ("None", "ext4", false, &once[..], false),
            ("File", "", false, &many[..], true),
            ("ReadWriteOnceWithFSType", "ext4", false, &once[..], true),
            ("ReadWriteOnceWithFSType", "ext4", false, &many[..], false),
            ("ReadWriteOnceWithFSType", "", false, &once[..], false),
            ("ReadWriteOnceWithFSType", "ext4", true, &[], true),
        ] {
            assert_eq!(group_applies(policy, fs, inline, modes), want, "{policy} {fs:?} {inline} {modes:?}");
        }
    }
}
