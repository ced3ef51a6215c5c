//! CSI volumes: drivers that registered, volumes staged for this node and published for its pods.
//!
//! In: registrations ([`crate::plugins`]), volumes that pods ask for ([`volume`]). Out: calls to the drivers' sockets, the
//! CSINode ([`node`]), `status.volumesInUse`. What was mounted for whom is written beside it ([`record`]) before it is asked
//! for, so that a crash leaves nothing that nobody takes down.

mod driver;
mod expand;
pub(crate) mod node;
mod record;
mod release;
pub(crate) mod usage;
pub(crate) mod volume;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use k8s_openapi::api::core::v1::Node;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedMutexGuard, watch};

pub(crate) use self::{
    driver::Driver,
    release::{adopt, release},
};
use crate::context::Context;

type Turn = Weak<tokio::sync::Mutex<()>>;

/// Drivers, and volumes in use.
pub(crate) struct Csi {
    drivers: watch::Sender<BTreeMap<String, Arc<Driver>>>,
    in_use: watch::Sender<BTreeSet<String>>,
    attached: watch::Sender<BTreeSet<String>>,
    turns: Mutex<HashMap<(String, String), Turn>>,
}

impl Default for Csi {
    fn default() -> Self {
        Self {
            drivers: watch::channel(BTreeMap::new()).0,
            in_use: watch::channel(BTreeSet::new()).0,
            attached: watch::channel(BTreeSet::new()).0,
            turns: Mutex::default(),
        }
    }
}

/// A volume's name in `status.volumesInUse` and `status.volumesAttached`.
fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

/// Name of the VolumeAttachment of a volume and a node.
fn attachment_name(driver: &str, handle: &str, node: &str) -> String {
    format!("csi-{}", digest(&[handle, driver, node]))
}

fn digest(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|p| hash.update(p.as_bytes()));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Where volumes of all drivers are staged.
fn staging_root(ctx: &Context) -> PathBuf {
    ctx.config.paths.plugins_root().join("plugins/kubernetes.io/csi")
}

/// Where a volume is staged for the node.
fn staging(ctx: &Context, driver: &str, handle: &str) -> PathBuf {
    staging_root(ctx).join(driver).join(digest(&[handle])).join("globalmount")
}

/// The volumes published for pods.
fn pods_root(ctx: &Context) -> PathBuf {
    ctx.config.paths.plugins_root().join("pods")
}

/// The CSI volumes of a pod.
fn pod_volumes(ctx: &Context, uid: &str) -> PathBuf {
    pods_root(ctx).join(uid).join("volumes/kubernetes.io~csi")
}

impl Csi {
    /// Takes a driver that announced itself at `path`.
    pub(crate) async fn register(
        &self,
        ctx: &Arc<Context>,
        path: &Path,
        name: &str,
        endpoint: PathBuf,
        versions: &[String],
    ) -> Result<(), String> {
        let major = |v: &String| v.trim_start_matches('v').split('.').next().and_then(|m| m.parse::<u32>().ok());
        if !versions.iter().any(|v| major(v) == Some(1)) {
            return Err(format!(
                "CSI driver {name:?} supports none of the versions this node speaks (1.x): {versions:?}"
            ));
        }
        let driver = Arc::new(Driver::ask(name, path, endpoint).await?);
        self.drivers.send_modify(|all| {
            all.insert(name.into(), driver);
        });
        let (ctx, name) = (ctx.clone(), name.to_string());
        tokio::spawn(async move { release::unstage_orphans(&ctx, &name).await });
        Ok(())
    }

    /// The driver that announced itself at `path` has gone.
    pub(crate) fn deregister(&self, path: &Path) {
        self.drivers.send_if_modified(|all| {
            let before = all.len();
            all.retain(|_, d| d.registered != path);
            all.len() != before
        });
    }

    /// A driver by name.
    fn driver(&self, name: &str) -> Result<Arc<Driver>, String> {
        let found = self.drivers.borrow().get(name).cloned();
        found.ok_or_else(|| format!("driver name {name} not found in the list of registered CSI drivers"))
    }

    /// Tells of drivers that come and go.
    pub(crate) fn changes(&self) -> watch::Receiver<BTreeMap<String, Arc<Driver>>> {
        let mut changes = self.drivers.subscribe();
        changes.borrow_and_update();
        changes
    }

    /// Volumes for `status.volumesInUse`, and when they change.
    pub(crate) fn in_use(&self) -> watch::Receiver<BTreeSet<String>> {
        self.in_use.subscribe()
    }

    fn use_volume(&self, name: String, used: bool) {
        self.in_use.send_if_modified(|all| if used { all.insert(name) } else { all.remove(&name) });
    }

    /// The Node as it is now: what the attach/detach controller has attached to it.
    pub(crate) fn take_node(&self, node: &Node) {
        let list = node.status.as_ref().and_then(|s| s.volumes_attached.as_ref());
        let now: BTreeSet<String> = list.into_iter().flatten().map(|v| v.name.clone()).collect();
        self.attached.send_if_modified(|all| {
            let changed = *all != now;
            *all = now;
            changed
        });
    }

    /// Waits for one's turn with a volume: a driver is asked one thing of a volume at a time.
    async fn turn(&self, driver: &str, handle: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut all = self.turns.lock();
            all.retain(|_, t| t.strong_count() > 0);
            let key = (driver.to_string(), handle.to_string());
            let known = all.get(&key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let fresh = Arc::default();
                all.insert(key, Arc::downgrade(&fresh));
                fresh
            })
        };
        turn.lock_owned().await
    }
}
