//! What the rest of the agent sees of its pods: the latest snapshot each worker published.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
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
    /// Pods of an earlier agent that are still to be taken over; `None` before it is known which.
    coming: watch::Sender<Option<HashSet<String>>>,
    changed: watch::Sender<()>,
}

impl Default for PodTable {
    fn default() -> Self {
        Self { pods: Arc::default(), coming: watch::channel(None).0, changed: watch::channel(()).0 }
    }
}

impl PodTable {
    /// Replaces a pod's snapshot.
    pub(crate) fn put(&self, uid: &str, snapshot: Snapshot) {
        self.pods.write().insert(uid.into(), Arc::new(snapshot));
        self.coming.send_if_modified(|coming| coming.as_mut().is_some_and(|uids| uids.remove(uid)));
        self.changed.send_replace(());
    }

    /// Which pods of an earlier agent will show up.
    pub(crate) fn expect(&self, uids: HashSet<String>) {
        self.coming.send_replace(Some(uids));
    }

    /// Waits until all pods of an earlier agent are here.
    pub(crate) async fn complete(&self) {
        let all = |coming: &Option<HashSet<String>>| coming.as_ref().is_some_and(HashSet::is_empty);
        // The table itself holds the sender.
        let _ = self.coming.subscribe().wait_for(all).await;
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

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::sync::mpsc;

    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            pod: Arc::default(),
            mirror_uid: None,
            containers: BTreeMap::new(),
            attempt: 0,
            netns: None,
            host_network: false,
            supervisor: None,
            worker: Teller::new(mpsc::unbounded_channel().0),
        }
    }

    #[test]
    fn it_is_complete_when_all_that_were_there_are_here() {
        let table = PodTable::default();
        table.put("new", snapshot());
        assert!(table.complete().now_or_never().is_none(), "what is on disk has not been read");
        table.expect(["a", "b"].map(str::to_owned).into());
        table.put("a", snapshot());
        assert!(table.complete().now_or_never().is_none());
        let waits = table.complete();
        table.put("b", snapshot());
        assert!(waits.now_or_never().is_some());
        table.expect(HashSet::new());
        assert!(table.complete().now_or_never().is_some());
    }
}
