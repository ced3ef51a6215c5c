//! Sandboxes and containers made over the socket: held here and on disk, so that a restart of the agent takes them over.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use isopod_runtime::supervisor::protocol::{ContainerState as Running, ContainerStatus};
use k8s_openapi::api::core::v1::Pod;
use parking_lot::Mutex;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::{
    convert,
    view::{Container, Group, Sandbox},
};
use crate::{
    context::Context,
    grpc::proto::cri::{ContainerConfig, ContainerState, LinuxContainerUser, PodSandboxConfig},
    pods::{
        sandbox::{self, Live},
        state::{self, now, write_atomically},
    },
    runtime::RuntimeEvent,
    server::NetNs,
};

/// What is remembered of a sandbox beside its configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxNote {
    pub(super) handler: String,
    pub(super) created_at: i64,
    pub(super) ready: bool,
    pub(super) sandbox: state::Sandbox,
}

/// The same of a container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ContainerNote {
    pub(super) image_id: String,
    pub(super) image_ref: String,
    pub(super) created_at: i64,
    pub(super) started_at: i64,
    pub(super) finished_at: i64,
    pub(super) exit_code: i32,
    pub(super) reason: String,
    pub(super) bundle: PathBuf,
    pub(super) log_path: PathBuf,
    pub(super) stop_signal: i32,
    /// Of its first process: uid, gid, groups.
    pub(super) user: (i64, i64, Vec<i64>),
}

/// A container.
pub(super) struct MadeContainer {
    pub(super) config: ContainerConfig,
    pub(super) note: ContainerNote,
    pub(super) ended: watch::Sender<Option<i32>>,
}

/// A sandbox.
pub(super) struct Made {
    pub(super) config: PodSandboxConfig,
    pub(super) pod: Arc<Pod>,
    pub(super) note: SandboxNote,
    pub(super) live: Option<Live>,
    pub(super) containers: BTreeMap<String, MadeContainer>,
}

/// All of them.
pub(crate) struct Store {
    dir: PathBuf,
    made: Mutex<BTreeMap<String, Made>>,
    changed: watch::Sender<()>,
}

impl MadeContainer {
    pub(super) fn new(config: ContainerConfig, note: ContainerNote) -> Self {
        let ended = (note.finished_at > 0).then_some(note.exit_code);
        Self { config, note, ended: watch::channel(ended).0 }
    }

    pub(super) fn is_running(&self) -> bool {
        self.note.started_at > 0 && self.note.finished_at == 0
    }

    fn end(&mut self, code: i32, at: i64, reason: &str) {
        self.note.exit_code = code;
        self.note.finished_at = at.max(1);
        self.note.reason = reason.into();
        self.ended.send_replace(Some(code));
    }

    /// Takes what the supervisor says; whether that is news.
    fn take(&mut self, s: &ContainerStatus) -> bool {
        let before = (self.note.started_at, self.note.finished_at);
        self.note.started_at = s.started_at.unwrap_or(self.note.started_at);
        if let (Some(exit), Running::Exited, 0) = (&s.exit, s.state, self.note.finished_at) {
            let reason = match (exit.oom_killed, exit.code) {
                (true, _) => "OOMKilled",
                (false, 0) => "Completed",
                _ => "Error",
            };
            self.end(exit.code, exit.finished_at, reason);
        }
        before != (self.note.started_at, self.note.finished_at)
    }
}

impl Store {
    /// Nothing yet; [`adopt`] reads what is there.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir, made: Mutex::default(), changed: watch::channel(()).0 }
    }

    /// Ids of sandboxes on disk: directories and groups under these names are not leftovers.
    pub(crate) fn on_disk(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Ids of images that containers were made of.
    pub(crate) fn images(&self) -> Vec<String> {
        let made = self.made.lock();
        made.values().flat_map(|m| m.containers.values().map(|c| c.note.image_id.clone())).collect()
    }

    /// Tells of every change.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Looks at or changes a sandbox, then tells everybody.
    pub(super) fn with<T>(&self, id: &str, f: impl FnOnce(&mut Made) -> T) -> Option<T> {
        let done = self.made.lock().get_mut(id).map(f);
        self.changed.send_replace(());
        done
    }

    /// The same with a container, whose note is written after.
    pub(super) fn with_container<T>(
        &self,
        sandbox: &str,
        id: &str,
        f: impl FnOnce(&mut MadeContainer) -> T,
    ) -> Option<T> {
        let done = self.with(sandbox, |m| {
            let c = m.containers.get_mut(id)?;
            let done = f(c);
            Some((done, c.note.clone()))
        });
        let (done, note) = done.flatten()?;
        self.save(&self.container_file(sandbox, id, "json"), &note);
        Some(done)
    }

    fn container_file(&self, sandbox: &str, id: &str, kind: &str) -> PathBuf {
        self.dir.join(sandbox).join("containers").join(format!("{id}.{kind}"))
    }

    fn save(&self, path: &Path, note: &impl Serialize) {
        let written = serde_json::to_vec(note).map_err(Into::into).and_then(|text| write_atomically(path, &text));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "not saved");
        }
    }

    /// Writes down that a sandbox will be: from here on it is found again.
    pub(super) fn begin(&self, id: &str, config: &PodSandboxConfig) -> std::io::Result<()> {
        let dir = self.dir.join(id);
        fs::create_dir_all(dir.join("containers"))?;
        write_atomically(&dir.join("config.pb"), &config.encode_to_vec())
    }

    /// A sandbox is there.
    pub(super) fn insert(&self, id: &str, made: Made) {
        self.save(&self.dir.join(id).join("sandbox.json"), &made.note);
        self.made.lock().insert(id.into(), made);
        self.changed.send_replace(());
    }

    /// Its state has changed.
    pub(super) fn save_sandbox(&self, id: &str) {
        if let Some(note) = self.with(id, |m| m.note.clone()) {
            self.save(&self.dir.join(id).join("sandbox.json"), &note);
        }
    }

    /// A container is there.
    pub(super) fn insert_container(&self, sandbox: &str, id: &str, c: MadeContainer) -> std::io::Result<()> {
        write_atomically(&self.container_file(sandbox, id, "pb"), &c.config.encode_to_vec())?;
        self.save(&self.container_file(sandbox, id, "json"), &c.note);
        self.with(sandbox, |m| m.containers.insert(id.into(), c));
        Ok(())
    }

    /// Forgets a container.
    pub(super) fn remove_container(&self, sandbox: &str, id: &str) {
        for kind in ["pb", "json"] {
            fs::remove_file(self.container_file(sandbox, id, kind)).ok();
        }
        self.with(sandbox, |m| m.containers.remove(id));
    }

    /// Forgets a sandbox.
    pub(super) fn remove(&self, id: &str) -> std::io::Result<()> {
        self.made.lock().remove(id);
        self.changed.send_replace(());
        match fs::remove_dir_all(self.dir.join(id)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// All of them as others see them.
    pub(super) fn groups(&self) -> Vec<Group> {
        self.made.lock().iter().map(|(id, m)| group(id, m)).collect()
    }

    fn exited(&self, sandbox: &str, status: &ContainerStatus) {
        self.with_container(sandbox, &status.id, |c| c.take(status));
    }

    /// Its supervisor is gone, and all that ran with it.
    fn lost(&self, sandbox: &str) {
        let running = self.with(sandbox, |m| {
            m.live = None;
            m.note.ready = false;
            m.containers.iter().filter(|(_, c)| c.is_running()).map(|(id, _)| id.clone()).collect::<Vec<_>>()
        });
        for id in running.unwrap_or_default() {
            self.with_container(sandbox, &id, |c| c.end(255, now(), "Unknown"));
        }
        self.save_sandbox(sandbox);
    }
}

fn group(id: &str, m: &Made) -> Group {
    let linux = m.config.linux.as_ref().and_then(|l| l.security_context.as_ref());
    let view = Sandbox {
        id: id.into(),
        metadata: m.config.metadata.clone().unwrap_or_default(),
        ready: m.note.ready,
        created_at: m.note.created_at,
        labels: m.config.labels.clone(),
        annotations: m.config.annotations.clone(),
        handler: m.note.handler.clone(),
        ips: if m.note.ready { m.note.sandbox.ips.clone() } else { Vec::new() },
        netns: m.note.sandbox.netns.clone().map_or(NetNs::Host, NetNs::Path),
        namespaces: linux.and_then(|s| s.namespace_options.clone()).unwrap_or_default(),
        cgroup: m.note.sandbox.cgroup.clone(),
        uid: id.into(),
    };
    let of = |(cid, c): (&String, &MadeContainer)| Container {
        id: cid.clone(),
        sandbox: id.into(),
        metadata: c.config.metadata.clone().unwrap_or_default(),
        image: c
            .config
            .image
            .as_ref()
            .map(|i| i.user_specified_image.clone())
            .filter(|i| !i.is_empty())
            .unwrap_or_else(|| c.config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default()),
        image_ref: c.note.image_ref.clone(),
        image_id: c.note.image_id.clone(),
        state: match (c.note.started_at, c.note.finished_at) {
            (_, 1..) => ContainerState::ContainerExited,
            (1.., _) => ContainerState::ContainerRunning,
            _ => ContainerState::ContainerCreated,
        },
        created_at: c.note.created_at,
        started_at: c.note.started_at,
        finished_at: c.note.finished_at,
        exit_code: c.note.exit_code,
        reason: c.note.reason.clone(),
        message: String::new(),
        labels: c.config.labels.clone(),
        annotations: c.config.annotations.clone(),
        mounts: c.config.mounts.clone(),
        log_path: c.note.log_path.clone(),
        bundle: c.note.bundle.clone(),
        cgroup: format!("{}/{cid}", m.note.sandbox.cgroup),
        tty: c.config.tty,
        user: Some(LinuxContainerUser {
            uid: c.note.user.0,
            gid: c.note.user.1,
            supplemental_groups: c.note.user.2.clone(),
        }),
        supervisor: m.live.as_ref().map(|l| l.supervisor.clone()),
        ended: c.ended.subscribe(),
        foreign: true,
    };
    let containers = m.containers.iter().map(of).collect();
    Group { sandbox: view, containers }
}

/// Takes in what a sandbox's supervisor tells.
pub(super) fn follow(ctx: &Arc<Context>, id: &str, mut events: mpsc::UnboundedReceiver<RuntimeEvent>) {
    let (ctx, id) = (ctx.clone(), id.to_string());
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            match event {
                RuntimeEvent::Exited(status) => ctx.cri.exited(&id, &status),
                RuntimeEvent::Lost => break,
            }
        }
        ctx.cri.lost(&id);
    });
}

/// After a start: joins the sandboxes that still run, remembers those that do not.
pub(super) async fn adopt(ctx: &Arc<Context>) {
    for id in ctx.cri.on_disk() {
        let dir = ctx.cri.dir.join(&id);
        let Some((config, note, pod)) = read(&dir, &id) else {
            // It was being made when the agent died.
            tracing::info!(sandbox = id, "removing what is left of a sandbox");
            let (events, _) = mpsc::unbounded_channel();
            let supervisor = crate::runtime::connect(&ctx.config.paths.run_pod(&id), events).ok();
            super::lifecycle::clear(ctx, &id, supervisor.as_ref(), None).await.ok();
            ctx.cri.remove(&id).ok();
            continue;
        };
        let mut made = Made { config, pod: Arc::new(pod), note, live: None, containers: containers(&dir) };
        let (events, receiver) = mpsc::unbounded_channel();
        let mut statuses = Vec::new();
        if made.note.ready {
            match sandbox::join(ctx, &made.pod, &made.note.sandbox, events).await {
                Ok((live, list)) => (made.live, statuses) = (Some(live), list),
                Err(_) if sandbox::was_stopped(ctx, &id) => {}
                Err(error) => tracing::warn!(sandbox = id, error, "the sandbox's supervisor cannot be joined"),
            }
        }
        let joined = made.live.is_some();
        ctx.cri.insert(&id, made);
        for status in &statuses {
            ctx.cri.exited(&id, status);
        }
        match joined {
            true => follow(ctx, &id, receiver),
            false => ctx.cri.lost(&id),
        }
    }
}

fn read(dir: &Path, id: &str) -> Option<(PodSandboxConfig, SandboxNote, Pod)> {
    let config = PodSandboxConfig::decode(fs::read(dir.join("config.pb")).ok()?.as_slice()).ok()?;
    let note = serde_json::from_slice(&fs::read(dir.join("sandbox.json")).ok()?).ok()?;
    let pod = convert::pod(id, &config).ok()?;
    Some((config, note, pod))
}

fn containers(dir: &Path) -> BTreeMap<String, MadeContainer> {
    let entries = fs::read_dir(dir.join("containers")).into_iter().flatten().flatten();
    let one = |path: PathBuf| {
        let id = path.file_stem()?.to_str()?.to_string();
        let note = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let config = ContainerConfig::decode(fs::read(path.with_extension("pb")).ok()?.as_slice()).ok()?;
        Some((id, MadeContainer::new(config, note)))
    };
    entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")).filter_map(one).collect()
}
