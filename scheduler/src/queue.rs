//! Pods that wait for a node: ready ones by priority then age, failed ones in back-off, hopeless ones parked until an
//! event that can help their reasons.

use crate::model::PodInfo;
use crate::plugins::Plugin;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// After this time a parked pod is tried again whatever happened.
const LONGEST_PARKED: Duration = Duration::from_secs(300);

/// What happened in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A node appeared, or changed its labels, taints or allocatable.
    Node,
    /// A bound pod is gone or became smaller.
    PodGone,
    /// A pod was bound or changed its labels.
    PodPlaced,
    /// A claim, volume or storage class changed.
    Storage,
}

/// Whether the event can help a pod that this plugin rejected.
fn helps(event: Event, plugin: Plugin) -> bool {
    match event {
        Event::Node => plugin != Plugin::SchedulingGates,
        Event::PodGone => matches!(
            plugin,
            Plugin::NodePorts | Plugin::NodeResourcesFit | Plugin::PodTopologySpread | Plugin::InterPodAffinity
        ),
        Event::PodPlaced => matches!(plugin, Plugin::PodTopologySpread | Plugin::InterPodAffinity),
        Event::Storage => plugin == Plugin::VolumeBinding,
    }
}

/// A pod in the queue.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    pub(crate) pod: Arc<PodInfo>,
    pub(crate) attempts: u32,
    plugins: BTreeSet<Plugin>,
    failed: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Active((Reverse<i64>, u64)),
    Backoff((Instant, u64)),
    Parked((Instant, u64)),
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    pods: HashMap<String, (Queued, Place)>,
    active: BTreeMap<(Reverse<i64>, u64), String>,
    backoff: BTreeMap<(Instant, u64), String>,
    /// By the time they were parked.
    parked: BTreeMap<(Instant, u64), String>,
    serial: u64,
}

fn changed(old: &PodInfo, new: &PodInfo) -> bool {
    old.gated != new.gated
        || old.labels != new.labels
        || old.requests != new.requests
        || old.tolerations != new.tolerations
        || old.node_selector != new.node_selector
        || old.priority != new.priority
}

impl Queued {
    fn ready_at(&self) -> Option<Instant> {
        let doubled = FIRST_BACKOFF.saturating_mul(1 << self.attempts.saturating_sub(1).min(10));
        self.failed.map(|at| at + doubled.min(MAX_BACKOFF))
    }
}

impl Waiting {
    /// A pod without a node appeared or changed.
    pub(crate) fn add(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let fresh = Queued { pod: pod.clone(), attempts: 0, plugins: BTreeSet::new(), failed: None };
        let queued = match self.take(&pod.uid) {
            None => fresh,
            Some((old, place)) => {
                let moved = changed(&old.pod, &pod);
                let queued = Queued { pod, ..old };
                // A change of status alone, such as our own condition, is no reason to try again.
                match place {
                    Place::Parked(slot) if !moved => return self.park_at(queued, slot),
                    _ => queued,
                }
            }
        };
        self.enqueue(queued, now);
    }

    fn enqueue(&mut self, mut queued: Queued, now: Instant) {
        if queued.pod.gated {
            queued.plugins = [Plugin::SchedulingGates].into();
            return self.park(queued, now);
        }
        self.serial += 1;
        let uid = queued.pod.uid.clone();
        let place = match queued.ready_at().filter(|at| *at > now) {
            Some(at) => {
                self.backoff.insert((at, self.serial), uid.clone());
                Place::Backoff((at, self.serial))
            }
            None => {
                let slot = (Reverse(queued.pod.priority), self.serial);
                self.active.insert(slot, uid.clone());
                Place::Active(slot)
            }
        };
        self.pods.insert(uid, (queued, place));
    }

    fn park(&mut self, queued: Queued, now: Instant) {
        self.serial += 1;
        self.park_at(queued, (now, self.serial));
    }

    fn park_at(&mut self, queued: Queued, slot: (Instant, u64)) {
        let uid = queued.pod.uid.clone();
        self.parked.insert(slot, uid.clone());
        self.pods.insert(uid, (queued, Place::Parked(slot)));
    }

    fn take(&mut self, uid: &str) -> Option<(Queued, Place)> {
        let (queued, place) = self.pods.remove(uid)?;
        match &place {
            Place::Active(slot) => self.active.remove(slot),
            Place::Backoff(slot) => self.backoff.remove(slot),
            Place::Parked(slot) => self.parked.remove(slot),
        };
        Some((queued, place))
    }

    /// The pod is gone, or has a node.
    pub(crate) fn remove(&mut self, uid: &str) {
        self.take(uid);
    }

    /// The most important pod that may be tried now.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Queued> {
        self.promote(now);
        let uid = self.active.values().next()?.clone();
        let (mut queued, _) = self.take(&uid)?;
        queued.attempts += 1;
        Some(queued)
    }

    fn promote(&mut self, now: Instant) {
        while let Some(((at, _), uid)) = self.backoff.first_key_value() {
            if *at > now {
                break;
            }
            let uid = uid.clone();
            if let Some((queued, _)) = self.take(&uid) {
                self.enqueue(queued, now);
            }
        }
        while let Some(((since, _), uid)) = self.parked.first_key_value() {
            if *since + LONGEST_PARKED > now {
                break;
            }
            let uid = uid.clone();
            if let Some((queued, _)) = self.take(&uid) {
                if queued.pod.gated {
                    self.park(queued, now);
                } else {
                    self.enqueue(queued, now);
                }
            }
        }
    }

    /// No node will do, for these plugins' reasons.
    pub(crate) fn unschedulable(&mut self, mut queued: Queued, plugins: BTreeSet<Plugin>, now: Instant) {
        queued.plugins = plugins;
        queued.failed = Some(now);
        self.park(queued, now);
    }

    /// Something failed that may work the next time.
    pub(crate) fn retry(&mut self, mut queued: Queued, now: Instant) {
        queued.failed = Some(now);
        self.enqueue(queued, now);
    }

    /// Moves the parked pods that the event can help.
    pub(crate) fn wake(&mut self, event: Event, now: Instant) {
        let helped = |uid: &&String| {
            // Without a plugin to blame (no nodes at all), anything may help.
            self.pods.get(*uid).is_some_and(|(q, _)| q.plugins.is_empty() || q.plugins.iter().any(|p| helps(event, *p)))
        };
        let uids: Vec<String> = self.parked.values().filter(helped).cloned().collect();
        for uid in uids {
            if let Some((queued, _)) = self.take(&uid) {
                self.enqueue(queued, now);
            }
        }
    }

    /// When the queue has something to do without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let backoff = self.backoff.keys().next().map(|(at, _)| *at);
        let parked = self.parked.keys().next().map(|(since, _)| *since + LONGEST_PARKED);
        backoff.into_iter().chain(parked).min()
    }

    /// Active, in back-off, parked.
    #[cfg(test)]
    pub(crate) fn sizes(&self) -> (usize, usize, usize) {
        (self.active.len(), self.backoff.len(), self.parked.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;
    use serde_json::json;

    #[test]
    fn priority_then_age() {
        let now = Instant::now();
        let mut queue = Waiting::default();
        queue.add(pod("old", json!({"containers": []})), now);
        queue.add(pod("young", json!({"containers": []})), now);
        queue.add(pod("urgent", json!({"containers": [], "priority": 5})), now);
        let order: Vec<String> = std::iter::from_fn(|| queue.pop(now)).map(|q| q.pod.name.clone()).collect();
        assert_eq!(order, ["urgent", "old", "young"]);
    }

    #[test]
    fn parked_pods_wake_for_what_helps_and_then_back_off() {
        let now = Instant::now();
        let mut queue = Waiting::default();
        queue.add(pod("p", json!({"containers": []})), now);
        let queued = queue.pop(now).unwrap();
        queue.unschedulable(queued, [Plugin::NodeResourcesFit].into(), now);
        queue.wake(Event::PodPlaced, now);
        assert_eq!(queue.sizes(), (0, 0, 1));
        queue.add(pod("p", json!({"containers": []})), now);
        assert_eq!(queue.sizes(), (0, 0, 1), "an update that changes nothing does not wake");
        queue.wake(Event::PodGone, now);
        assert_eq!(queue.sizes(), (0, 1, 0));
        assert_eq!(queue.deadline(), Some(now + FIRST_BACKOFF));
        assert!(queue.pop(now).is_none());
        let queued = queue.pop(now + FIRST_BACKOFF).unwrap();
        assert_eq!(queued.attempts, 2);
        let later = now + FIRST_BACKOFF;
        queue.unschedulable(queued, [Plugin::NodeAffinity].into(), later);
        queue.wake(Event::Node, later + MAX_BACKOFF);
        assert_eq!(queue.sizes(), (1, 0, 0), "its back-off is over");
    }

    #[test]
    fn gated_pods_wait_for_their_gates() {
        let now = Instant::now();
        let mut queue = Waiting::default();
        queue.add(pod("p", json!({"containers": [], "schedulingGates": [{"name": "g"}]})), now);
        queue.wake(Event::Node, now);
        assert!(queue.pop(now).is_none());
        queue.add(pod("p", json!({"containers": []})), now);
        assert!(queue.pop(now).is_some());
    }

    #[test]
    fn nothing_is_parked_for_ever() {
        let now = Instant::now();
        let mut queue = Waiting::default();
        queue.add(pod("p", json!({"containers": []})), now);
        let queued = queue.pop(now).unwrap();
        queue.unschedulable(queued, [Plugin::NodeName].into(), now);
        assert!(queue.pop(now + LONGEST_PARKED).is_some());
    }
}
