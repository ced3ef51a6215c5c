//! What the rest of the agent sees of its pods: the latest snapshot each worker published.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use tokio::sync::watch;

use super::worker::Teller;
use crate::runtime::Supervisor;

/// One container as clients of the node API need it.
#[derive(Debug, Clone)]
pub(crate) struct ContainerView {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) running: bool,
    pub(crate) tty: bool,
    /// Becomes true when this instance has ended.
    pub(crate) ended: watch::Receiver<bool>,
    /// Exit code once ended.
    pub(crate) exit_code: watch::Receiver<Option<i32>>,
    pub(crate) previous: Option<u32>,
}

/// One pod.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    /// Spec and current status.
    pub(crate) pod: Arc<Pod>,
    /// UID in the API of a static pod's mirror.
    pub(crate) mirror_uid: Option<String>,
    pub(crate) containers: BTreeMap<String, ContainerView>,
    /// How many sandboxes it had before this one.
    pub(crate) attempt: u32,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) host_network: bool,
    pub(crate) supervisor: Option<Supervisor>,
    /// The one who changes it.
    pub(crate) worker: Teller,
}

/// All pods by UID.
#[derive(Clone)]
pub(crate) struct PodTable {
    pods: Arc<RwLock<HashMap<String, Arc<Snapshot>>>>,
    changed: watch::Sender<()>,
}

impl Default for PodTable {
    fn default() -> Self {
        Self { pods: Arc::default(), changed: watch::channel(()).0 }
    }
}

impl PodTable {
    /// Replaces a pod's snapshot.
    pub(crate) fn put(&self, uid: &str, snapshot: Snapshot) {
        self.pods.write().insert(uid.into(), Arc::new(snapshot));
        self.changed.send_replace(());
    }

    /// Tells of every later change.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        let mut changes = self.changed.subscribe();
        changes.borrow_and_update();
        changes
    }

    /// Forgets a pod.
    pub(crate) fn remove(&self, uid: &str) {
        self.pods.write().remove(uid);
        self.changed.send_replace(());
    }

    /// Whether something of a pod runs, or is still there of one that ran.
    pub(crate) fn holds(&self, uid: &str) -> bool {
        let holds = |s: &Arc<Snapshot>| s.supervisor.is_some() || s.containers.values().any(|c| c.running);
        self.pods.read().get(uid).is_some_and(holds)
    }

    /// All snapshots.
    pub(crate) fn all(&self) -> Vec<Arc<Snapshot>> {
        self.pods.read().values().cloned().collect()
    }

    /// One pod by namespace and name; with a UID it has to be that one (or its mirror's).
    pub(crate) fn find(&self, namespace: &str, name: &str, uid: Option<&str>) -> Option<Arc<Snapshot>> {
        let pods = self.pods.read();
        let mut found = pods.values().filter(|s| {
            let m = &s.pod.metadata;
            m.namespace.as_deref() == Some(namespace)
                && m.name.as_deref() == Some(name)
                && uid.is_none_or(|u| m.uid.as_deref() == Some(u) || s.mirror_uid.as_deref() == Some(u))
        });
        let first = found.next()?;
        // An old pod of the same name may still be going away: prefer the one that has no end in sight.
        let second = found.next();
        Some(match second {
            Some(s) if first.pod.metadata.deletion_timestamp.is_some() => s.clone(),
            _ => first.clone(),
        })
    }
}
