//! Node lifecycle: turns what a node says about itself, or no longer says, into conditions, taints and unready pods.
//!
//! In: nodes, their leases, pods. Out: `NodeStatusUnknown` conditions for nodes that fell silent, taints for conditions,
//! `Ready=False` on the pods of nodes that are not ready. A node's next deadline is a timer, set again by every lease
//! renewal; nothing polls. Times are this process's own: clocks are never compared.

use crate::context::Context;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, PodCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NAME: &str = "node-lifecycle-controller";
/// How long a new node may take to report for the first time.
const STARTUP_GRACE: Duration = Duration::from_secs(60);

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<String>>,
    heard: Mutex<HashMap<String, Heard>>,
}

/// When a node was last heard of, and as what.
struct Heard {
    at: Instant,
    lease: Option<String>,
    ready: Option<String>,
    registered: bool,
    was_ready: bool,
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component("node-controller"),
        queue: Queue::new(),
        heard: Mutex::default(),
    });
    let c = controller.clone();
    ctx.caches.nodes.subscribe(move |change| c.node_changed(change));
    let c = controller.clone();
    ctx.caches.leases.subscribe(move |change| {
        let lease = change.object();
        if lease.namespace() != "kube-node-lease" || change.is_deleted() {
            return;
        }
        let renewed = lease.spec.as_ref().and_then(|s| s.renew_time.as_ref()).map(|t| t.0.to_string());
        let silent = c.hear(lease.name(), |heard| std::mem::replace(&mut heard.lease, renewed.clone()) != renewed);
        if silent {
            c.queue.add(lease.name().to_owned());
        }
    });
    let (c, q) = (ctx.clone(), controller.queue.clone());
    ctx.caches.pods.subscribe(move |change| {
        // A pod that says it is ready on a node that is lost has to be corrected.
        let node = crate::pods::node(change.object());
        let lost = c.caches.nodes.get("", node).is_some_and(|n| ready(&n).is_some_and(|r| r.status == "Unknown"));
        if lost && !change.is_deleted() && crate::pods::is_ready(change.object()) {
            q.add(node.to_owned());
        }
    });
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(NAME, &queue, 4, &stop, move |node| {
        let controller = controller.clone();
        async move { controller.sync(&node).await }
    });
}

fn ready(node: &Node) -> Option<&NodeCondition> {
    condition(node, "Ready")
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

impl Controller {
    /// Notes a sign of life; says whether the node counted as lost until now.
    fn hear(&self, node: &str, changed: impl FnOnce(&mut Heard) -> bool) -> bool {
        let mut all = self.heard.lock();
        let fresh = || Heard { at: Instant::now(), lease: None, ready: None, registered: false, was_ready: false };
        let heard = all.entry(node.to_owned()).or_insert_with(fresh);
        let silent = heard.at.elapsed() >= self.ctx.config.node_grace;
        if changed(heard) {
            heard.at = Instant::now();
            return silent;
        }
        false
    }

    fn node_changed(&self, change: &Change<'_, Node>) {
        let node = change.object();
        if change.is_deleted() {
            self.heard.lock().remove(node.name());
            let text = format!("Node {0} event: Removing Node {0} from Controller", node.name());
            self.recorder.normal(&**node, "RemovingNode", text);
            return;
        }
        // What this controller writes itself is no sign of life.
        let own = ready(node).is_some_and(|r| r.reason.as_deref() == Some("NodeStatusUnknown"));
        let beat = ready(node).and_then(|r| r.last_heartbeat_time.as_ref()).map(|t| t.0.to_string());
        if !own {
            self.hear(node.name(), |heard| std::mem::replace(&mut heard.ready, beat.clone()) != beat);
        }
        self.queue.add(node.name().to_owned());
    }

    async fn sync(&self, name: &str) -> Result<Option<Duration>, kube::Error> {
        let Some(node) = self.ctx.caches.nodes.get("", name) else { return Ok(None) };
        let (silence, first) = {
            let mut all = self.heard.lock();
            let fresh = || Heard { at: Instant::now(), lease: None, ready: None, registered: false, was_ready: false };
            let heard = all.entry(name.to_owned()).or_insert_with(fresh);
            (heard.at.elapsed(), !std::mem::replace(&mut heard.registered, true))
        };
        if first {
            let text = format!("Node {name} event: Registered Node {name} in Controller");
            self.recorder.normal(&*node, "RegisteredNode", text);
        }
        let grace = if ready(&node).is_none() {
            STARTUP_GRACE.max(self.ctx.config.node_grace)
        } else {
            self.ctx.config.node_grace
        };
        let mut current = (*node).clone();
        if silence >= grace {
            lose(&mut current, Timestamp::now());
            if let Some(written) = self.write(&node, &current, "status").await? {
                current = written;
            }
        }
        let mut tainted = current.clone();
        let taints = taints(&current, Timestamp::now());
        tainted.spec.get_or_insert_default().taints = (!taints.is_empty()).then_some(taints);
        self.write(&current, &tainted, "").await?;
        self.follow_readiness(&current).await?;
        Ok((silence < grace).then(|| grace - silence + Duration::from_millis(10)))
    }

    async fn write(&self, old: &Node, new: &Node, sub: &str) -> Result<Option<Node>, kube::Error> {
        match self.ctx.objects.update(old, new, sub).await {
            Err(error) if is_not_found(&error) => Ok(None),
            result => result,
        }
    }

    /// Pods of a node that stops being ready, or is lost, are not ready either. One that has never been, because it has only
    /// just come, is left to say itself what its pods are.
    async fn follow_readiness(&self, node: &Node) -> Result<(), kube::Error> {
        let is_ready = ready(node).is_some_and(|r| r.status == "True");
        let was_ready = {
            let mut all = self.heard.lock();
            all.get_mut(node.name()).is_some_and(|heard| std::mem::replace(&mut heard.was_ready, is_ready))
        };
        let lost = ready(node).is_some_and(|r| r.status == "Unknown");
        if is_ready || !(was_ready || lost) {
            return Ok(());
        }
        if was_ready {
            let text = format!("Node {} status is now: NodeNotReady", node.name());
            self.recorder.normal(node, "NodeNotReady", text);
        }
        for pod in self.ctx.caches.pods.list().into_iter().filter(|pod| crate::pods::node(pod) == node.name()) {
            if let Some(new) = unready(&pod, Timestamp::now()) {
                match self.ctx.objects.update(&*pod, &new, "status").await {
                    Err(error) if !is_not_found(&error) => return Err(error),
                    _ => self.recorder.warning(&*pod, "NodeNotReady", "Node is not ready"),
                }
            }
        }
        Ok(())
    }
}

fn unready(pod: &Pod, now: Timestamp) -> Option<Pod> {
    let mut new = pod.clone();
    let conditions: &mut Vec<PodCondition> = new.status.as_mut()?.conditions.as_mut()?;
    let ready = conditions.iter_mut().find(|c| c.type_ == "Ready" && c.status == "True")?;
    ready.status = "False".to_owned();
    ready.last_transition_time = Some(Time(now));
    Some(new)
}

/// The node fell silent: nothing it said is known to hold.
fn lose(node: &mut Node, now: Timestamp) {
    let created = node.metadata.creation_timestamp.clone();
    let conditions = node.status.get_or_insert_default().conditions.get_or_insert_default();
    for kind in ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"] {
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            None => conditions.push(NodeCondition {
                type_: kind.to_owned(),
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusNeverUpdated".to_owned()),
                message: Some("Kubelet never posted node status.".to_owned()),
                last_heartbeat_time: created.clone(),
                last_transition_time: Some(Time(now)),
            }),
            Some(condition) if condition.status != "Unknown" => {
                condition.status = "Unknown".to_owned();
                condition.reason = Some("NodeStatusUnknown".to_owned());
                condition.message = Some("Kubelet stopped posting node status.".to_owned());
                condition.last_transition_time = Some(Time(now));
            }
            Some(_) => {}
        }
    }
}

/// The taints a node should have: those of others, and those its conditions call for.
fn taints(node: &Node, now: Timestamp) -> Vec<Taint> {
    const OWN: [&str; 7] = [
        "not-ready",
        "unreachable",
        "memory-pressure",
        "disk-pressure",
        "pid-pressure",
        "network-unavailable",
        "unschedulable",
    ];
    let spec = node.spec.clone().unwrap_or_default();
    let old = spec.taints.unwrap_or_default();
    let is = |kind: &str, status: &str| condition(node, kind).is_some_and(|c| c.status == status);
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    for (kind, taint) in [
        ("MemoryPressure", "memory-pressure"),
        ("DiskPressure", "disk-pressure"),
        ("PIDPressure", "pid-pressure"),
        ("NetworkUnavailable", "network-unavailable"),
    ] {
        if is(kind, "True") {
            wanted.push((taint, "NoSchedule"));
        }
    }
    if is("Ready", "False") {
        wanted.extend([("not-ready", "NoSchedule"), ("not-ready", "NoExecute")]);
    }
    if is("Ready", "Unknown") {
        wanted.extend([("unreachable", "NoSchedule"), ("unreachable", "NoExecute")]);
    }
    if spec.unschedulable.unwrap_or(false) {
        wanted.push(("unschedulable", "NoSchedule"));
    }
    let own = |taint: &Taint| {
        let name = taint.key.strip_prefix("node.kubernetes.io/");
        name.is_some_and(|name| OWN.contains(&name))
    };
    // A node that has not reported yet keeps the taint it was registered with.
    let unreported = ready(node).is_none();
    let keep = |t: &&Taint| {
        !own(t)
            || wanted.iter().any(|(name, effect)| t.key.ends_with(name) && t.effect == *effect)
            || (unreported && t.key.ends_with("/not-ready"))
    };
    let mut result: Vec<Taint> = old.iter().filter(keep).cloned().collect();
    for (name, effect) in wanted {
        let key = format!("node.kubernetes.io/{name}");
        if !result.iter().any(|t| t.key == key && t.effect == effect) {
            result.push(Taint { key, effect: effect.to_owned(), value: None, time_added: Some(Time(now)) });
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(ready: &str, spec: serde_json::Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec, "status": {"conditions": [
            {"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    fn render(node: &Node) -> Vec<String> {
        let short = |t: Taint| format!("{}:{}", t.key.rsplit('/').next().unwrap_or_default(), t.effect);
        taints(node, Timestamp::UNIX_EPOCH).into_iter().map(short).collect()
    }

    #[test]
    fn conditions_become_taints_and_others_taints_stay() {
        let own = json!({"key": "example.com/mine", "effect": "NoExecute"});
        for (ready, spec, want) in [
            ("True", json!({}), vec![]),
            ("False", json!({}), vec!["not-ready:NoSchedule", "not-ready:NoExecute"]),
            (
                "Unknown",
                json!({"taints": [own]}),
                vec!["mine:NoExecute", "unreachable:NoSchedule", "unreachable:NoExecute"],
            ),
            ("True", json!({"unschedulable": true}), vec!["unschedulable:NoSchedule"]),
            ("True", json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}), vec![]),
        ] {
            assert_eq!(render(&node(ready, spec.clone())), want, "{ready} {spec}");
        }
    }

    #[test]
    fn a_silent_node_is_unknown_in_everything() {
        let mut node = node("True", json!({}));
        lose(&mut node, Timestamp::UNIX_EPOCH);
        let conditions = node.status.as_ref().and_then(|s| s.conditions.clone()).unwrap();
        assert_eq!(conditions.len(), 4);
        assert!(conditions.iter().all(|c| c.status == "Unknown"));
        assert_eq!(conditions[0].message.as_deref(), Some("Kubelet stopped posting node status."));
        let before = node.clone();
        lose(&mut node, Timestamp::MAX);
        assert_eq!(node, before, "only once");
    }
}
