//! Devices of plugins: who has which, and what a container that has some needs.
//!
//! In: plugins that register ([`plugin`]), pods that ask for their resources ([`allocate`]). Out: the node's capacity, what
//! is put into containers ([`inject`]), the pod-resources API ([`resources`]). What was given to whom is on disk before a
//! container starts with it, so that it stays with its pod across restarts of the agent.

mod allocate;
mod cdi;
mod inject;
mod plugin;
mod resources;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{allocate::allocate, inject::Injection};
use crate::{context::Context, grpc::server, pods::state::write_atomically};

/// Version of the checkpoint.
const VERSION: u32 = 1;

/// One device as its plugin tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    healthy: bool,
    nodes: Vec<i64>,
}

/// A resource and its plugin.
#[derive(Debug, Default)]
struct Resource {
    /// Where the plugin listens; `None` while there is none.
    endpoint: Option<PathBuf>,
    /// Tells registrations of one resource apart.
    generation: u64,
    preferred: bool,
    pre_start: bool,
    devices: BTreeMap<String, Device>,
}

/// What a container was given of one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Given {
    devices: BTreeSet<String>,
    /// What the plugin said; empty until it has.
    injection: Option<Injection>,
}

/// Container -> resource -> what it was given.
type PodDevices = BTreeMap<String, BTreeMap<String, Given>>;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Checkpoint {
    version: u32,
    pods: BTreeMap<String, PodDevices>,
    /// Devices by resource.
    registered: BTreeMap<String, Vec<String>>,
}

#[derive(Debug, Default)]
struct State {
    resources: BTreeMap<String, Resource>,
    pods: BTreeMap<String, PodDevices>,
    /// Pods that are being given devices, or were refused them.
    pending: BTreeSet<String>,
}

/// All devices of this node.
pub(crate) struct Devices {
    dir: PathBuf,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

impl Devices {
    /// Reads what an earlier life gave to whom. Its plugins have to come again: until then their devices are there, in use
    /// or not, but none is given out.
    pub(crate) fn open(dir: PathBuf) -> Self {
        let mut state = State::default();
        let read = fs::read(dir.join(CHECKPOINT)).ok();
        match read.map(|text| serde_json::from_slice::<Checkpoint>(&text)) {
            Some(Ok(c)) if c.version == VERSION => {
                state.pods = c.pods;
                for (name, ids) in c.registered {
                    let gone = || Device { healthy: false, nodes: Vec::new() };
                    let devices = ids.into_iter().map(|id| (id, gone())).collect();
                    state.resources.insert(name, Resource { devices, ..Resource::default() });
                }
            }
            Some(Ok(c)) => tracing::warn!(version = c.version, "device checkpoint of another version is ignored"),
            Some(Err(error)) => tracing::warn!(%error, "device checkpoint cannot be read"),
            None => {}
        }
        Self { dir, state: Mutex::new(state), changed: watch::channel(()).0 }
    }

    /// Capacity and allocatable of every resource that ever had a plugin.
    pub(crate) fn amounts(&self) -> Vec<(String, usize, usize)> {
        let state = self.state.lock();
        let count = |r: &Resource| r.devices.values().filter(|d| d.healthy).count();
        state.resources.iter().map(|(name, r)| (name.clone(), r.devices.len(), count(r))).collect()
    }

    /// Tells of devices and allocations that change.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// A pod's devices are free again.
    pub(crate) fn release(&self, uid: &str) {
        let gone = {
            let mut state = self.state.lock();
            state.pending.remove(uid);
            state.pods.remove(uid).is_some()
        };
        if gone {
            self.save();
        }
    }

    /// After a start: only these pods have devices.
    pub(crate) fn retain(&self, known: &[String]) {
        let strangers = {
            let mut state = self.state.lock();
            let before = state.pods.len();
            state.pods.retain(|uid, _| known.contains(uid));
            state.pods.len() != before
        };
        if strangers {
            self.save();
        }
    }

    /// Writes the checkpoint and tells everybody.
    fn save(&self) {
        let checkpoint = {
            let state = self.state.lock();
            let ids = |r: &Resource| r.devices.keys().cloned().collect();
            Checkpoint {
                version: VERSION,
                pods: state.pods.clone(),
                registered: state.resources.iter().map(|(name, r)| (name.clone(), ids(r))).collect(),
            }
        };
        let written = fs::create_dir_all(&self.dir)
            .and_then(|()| serde_json::to_vec(&checkpoint).map_err(Into::into))
            .and_then(|text| write_atomically(&self.dir.join(CHECKPOINT), &text));
        if let Err(error) = written {
            tracing::error!(path = %self.dir.display(), %error, "device checkpoint not written");
        }
        self.changed.send_replace(());
    }
}

const CHECKPOINT: &str = "kubelet_internal_checkpoint";

/// Where plugins and the agent find each other.
pub(crate) fn directory(plugins_root: &Path) -> PathBuf {
    plugins_root.join("device-plugins")
}

/// Takes registrations and answers the pod-resources API until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let dir = &ctx.devices.dir;
    // Plugins notice that their socket is gone and come again, as they do for a kubelet.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name() != CHECKPOINT {
            fs::remove_file(entry.path()).ok();
        }
    }
    let registrations = server::listen(&dir.join("kubelet.sock"));
    let lister = server::listen(&ctx.config.paths.plugins_root().join("pod-resources/kubelet.sock"));
    let (registrations, lister) = match (registrations, lister) {
        (Ok(r), Ok(l)) => (r, l),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "device plugins cannot register");
            return;
        }
    };
    tokio::join!(
        server::serve(registrations, plugin::service(ctx.clone()), stop.clone()),
        server::serve(lister, resources::service(ctx.clone()), stop.clone()),
    );
}

pub(crate) use plugin::register;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_remembered_and_nothing_is_given_without_a_plugin() {
        let dir = tempfile::tempdir().unwrap();
        let d = Devices::open(dir.path().into());
        let device = |healthy| Device { healthy, nodes: vec![] };
        {
            let mut state = d.state.lock();
            let r = state.resources.entry("x/y".into()).or_default();
            r.devices = [("a".to_string(), device(true)), ("b".to_string(), device(false))].into();
            let given = Given { devices: ["a".to_string()].into(), injection: Some(Injection::default()) };
            state.pods.entry("u".into()).or_default().entry("c".into()).or_default().insert("x/y".into(), given);
        }
        d.save();
        assert_eq!(d.amounts(), [("x/y".to_string(), 2, 1)]);
        let again = Devices::open(dir.path().into());
        assert_eq!(again.amounts(), [("x/y".to_string(), 2, 0)]);
        assert_eq!(again.state.lock().pods, d.state.lock().pods);
        again.retain(&[]);
        assert!(Devices::open(dir.path().into()).state.lock().pods.is_empty());
        fs::write(dir.path().join(CHECKPOINT), b"{\"version\":1,").unwrap();
        assert!(Devices::open(dir.path().into()).amounts().is_empty());
    }
}
