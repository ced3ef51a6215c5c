//! What the watches feed and the loop reads, behind one lock that is never held across an await.

use crate::cluster::Cluster;
use crate::model::PodInfo;
use crate::queue::{Event, Waiting};
use isopod_client::objects::HasMeta;
use isopod_client::reflect::Sink;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) cluster: Cluster,
    pub(crate) waiting: Waiting,
    /// Pods given a node by us and not yet seen bound, by UID.
    pub(crate) assumed: HashMap<String, Arc<PodInfo>>,
    known: HashSet<String>,
}

/// The state, its alarm clock, and whose pods these are.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) wake: Notify,
    scheduler: String,
    synced: watch::Sender<u8>,
}

const PODS: u8 = 1;
const NODES: u8 = 2;
const NAMESPACES: u8 = 4;

impl Shared {
    pub(crate) fn new(scheduler: &str) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            wake: Notify::new(),
            scheduler: scheduler.to_owned(),
            synced: watch::Sender::new(0),
        })
    }

    /// Waits until pods, nodes and namespaces were listed once.
    pub(crate) async fn synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as self.
        let _ = synced.wait_for(|bits| *bits == PODS | NODES | NAMESPACES).await;
    }

    fn mark(&self, bit: u8) {
        self.synced.send_modify(|bits| *bits |= bit);
    }

    /// Something happened that can help parked pods.
    pub(crate) fn event(&self, event: Event) {
        self.state.lock().waiting.wake(event, Instant::now());
        self.wake.notify_one();
    }

    fn set_pod(&self, pod: &Pod) {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            return self.drop_pod(pod.uid());
        }
        let info = PodInfo::new(pod);
        let mut state = self.state.lock();
        state.known.insert(info.uid.clone());
        if info.node.is_empty() {
            state.unbound(info, &self.scheduler);
        } else {
            state.bound(info);
        }
        drop(state);
        self.wake.notify_one();
    }

    /// A victim could not be removed: it stays, and who waits for its room tries again.
    pub(crate) fn spare(&self, victim: &Arc<PodInfo>) {
        {
            let mut state = self.state.lock();
            if let Some(node) = state.cluster.placement(&victim.uid).map(str::to_owned) {
                state.cluster.place(victim, &node);
                state.waiting.wake(Event::PodGone, Instant::now());
            }
        }
        self.wake.notify_one();
    }

    fn drop_pod(&self, uid: &str) {
        self.state.lock().forget(uid);
        self.wake.notify_one();
    }
}

impl State {
    fn unbound(&mut self, pod: Arc<PodInfo>, scheduler: &str) {
        // Its binding is on the way; what is known of it comes back bound.
        if self.assumed.contains_key(&pod.uid) {
            return;
        }
        if pod.scheduler != scheduler || pod.terminating {
            self.cluster.nominated.remove(&pod.uid);
            return self.waiting.remove(&pod.uid);
        }
        if pod.nominated.is_empty() {
            self.cluster.nominated.remove(&pod.uid);
        } else {
            self.cluster.nominated.insert(pod.uid.clone(), pod.clone());
        }
        self.waiting.add(pod, Instant::now());
    }

    fn bound(&mut self, pod: Arc<PodInfo>) {
        self.assumed.remove(&pod.uid);
        self.cluster.nominated.remove(&pod.uid);
        self.waiting.remove(&pod.uid);
        let before = self.cluster.placement(&pod.uid).map(str::to_owned);
        let node = pod.node.clone();
        let old = self.cluster.unplace(&pod.uid);
        self.cluster.place(&pod, &node);
        let now = Instant::now();
        match old {
            Some((old, _)) if before.as_deref() == Some(&node) => {
                if old.requests != pod.requests {
                    self.waiting.wake(Event::PodGone, now);
                }
                if old.labels != pod.labels || old.terminating != pod.terminating {
                    self.waiting.wake(Event::PodPlaced, now);
                }
            }
            _ => self.waiting.wake(Event::PodPlaced, now),
        }
    }

    /// Room that victims will leave is this pod's from now on, and they count as leaving: the next pod's cycle comes before
    /// the API server has heard of either. Returns the pod as it is now and the victims that are still to be told.
    pub(crate) fn promise(
        &mut self,
        pod: &Arc<PodInfo>,
        node: &str,
        victims: Vec<Arc<PodInfo>>,
    ) -> (Arc<PodInfo>, Vec<Arc<PodInfo>>) {
        let promised = Arc::new(PodInfo { nominated: node.to_owned(), ..(**pod).clone() });
        self.cluster.nominated.insert(pod.uid.clone(), promised.clone());
        let staying: Vec<_> = victims.into_iter().filter(|victim| !victim.terminating).collect();
        for victim in &staying {
            self.cluster.place(&Arc::new(PodInfo { terminating: true, ..(**victim).clone() }), node);
        }
        (promised, staying)
    }

    fn forget(&mut self, uid: &str) {
        self.known.remove(uid);
        self.assumed.remove(uid);
        self.cluster.nominated.remove(uid);
        self.waiting.remove(uid);
        if self.cluster.unplace(uid).is_some() {
            self.waiting.wake(Event::PodGone, Instant::now());
        }
    }
}

impl Sink<Pod> for Shared {
    fn replace(&self, pods: Vec<Pod>) {
        let present: HashSet<&str> = pods.iter().map(|pod| pod.uid()).collect();
        let gone: Vec<String> =
            self.state.lock().known.iter().filter(|uid| !present.contains(uid.as_str())).cloned().collect();
        for uid in gone {
            self.drop_pod(&uid);
        }
        for pod in &pods {
            self.set_pod(pod);
        }
        self.mark(PODS);
    }

    fn apply(&self, pod: Pod) {
        self.set_pod(&pod);
    }

    fn delete(&self, pod: Pod) {
        self.drop_pod(pod.uid());
    }

    fn revision(pod: &Pod) -> Option<String> {
        pod.metadata.resource_version.clone()
    }
}

impl Sink<Node> for Shared {
    fn replace(&self, nodes: Vec<Node>) {
        let present: HashSet<&str> = nodes.iter().map(HasMeta::name).collect();
        let mut state = self.state.lock();
        let known = state.cluster.nodes.iter().filter(|n| n.exists && !present.contains(n.name.as_str()));
        let gone: Vec<String> = known.map(|n| n.name.clone()).collect();
        for name in gone {
            state.cluster.remove_node(&name);
        }
        drop(state);
        for node in nodes {
            Sink::<Node>::apply(self, node);
        }
        self.mark(NODES);
    }

    fn apply(&self, node: Node) {
        let changed = self.state.lock().cluster.set_node(&node);
        if changed {
            self.event(Event::Node);
        }
    }

    fn delete(&self, node: Node) {
        self.state.lock().cluster.remove_node(node.name());
        self.event(Event::Node);
    }

    fn revision(node: &Node) -> Option<String> {
        node.metadata.resource_version.clone()
    }
}

impl Sink<Namespace> for Shared {
    fn replace(&self, namespaces: Vec<Namespace>) {
        let labels = |ns: Namespace| (ns.name().to_owned(), ns.metadata.labels.unwrap_or_default());
        self.state.lock().cluster.namespaces = namespaces.into_iter().map(labels).collect();
        self.mark(NAMESPACES);
    }

    fn apply(&self, namespace: Namespace) {
        let name = namespace.name().to_owned();
        let labels = namespace.metadata.labels.unwrap_or_default();
        let before = self.state.lock().cluster.namespaces.insert(name, labels.clone());
        if before.is_some_and(|old| old != labels) {
            self.event(Event::PodPlaced);
        }
    }

    fn delete(&self, namespace: Namespace) {
        self.state.lock().cluster.namespaces.remove(namespace.name());
    }

    fn revision(namespace: &Namespace) -> Option<String> {
        namespace.metadata.resource_version.clone()
    }
}
