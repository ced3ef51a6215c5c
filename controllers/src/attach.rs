//! VolumeAttachments: one for each CSI volume and node that pods use together, none for any other.
//!
//! In: pods with a node, their claims, CSI volumes, CSIDrivers, what nodes say is still in use. Out: VolumeAttachments,
//! which the drivers' own attachers fulfil, and `status.volumesAttached` of the nodes, which their agents wait for.

use crate::context::Context;
use crate::pods;
use isopod_client::objects::{DeleteOptions, HasMeta, is_already_exists, is_not_found};
use isopod_client::{Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{AttachedVolume, Node, PersistentVolume, Pod};
use k8s_openapi::api::storage::v1::{VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "attachdetach-controller";
/// Somebody says that the machine is off: what it had can be taken from it.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Volume(String),
    Node(String),
}

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Work>>,
}

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let recorder = ctx.recorder.component(NAME);
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder, queue: Queue::new() });
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        if !pods::node(pod).is_empty() {
            c.volumes_of(pod).for_each(|v| c.queue.add(Work::Volume(v)));
        }
    });
    let c = controller.clone();
    ctx.caches.claims.subscribe(move |change| {
        let volume = change.object().spec.as_ref().and_then(|s| s.volume_name.clone());
        volume.into_iter().for_each(|v| c.queue.add(Work::Volume(v)));
    });
    let c = controller.clone();
    ctx.caches.volumes.subscribe(move |change| {
        if csi(change.object()).is_some() {
            c.queue.add(Work::Volume(change.object().name().to_owned()));
        }
    });
    let c = controller.clone();
    ctx.caches.csi_drivers.subscribe(move |change| {
        let name = change.object().name();
        let volumes = c.ctx.caches.volumes.list();
        let own = volumes.iter().filter(|v| csi(v).is_some_and(|(driver, _)| driver == name));
        own.for_each(|v| c.queue.add(Work::Volume(v.name().to_owned())));
    });
    let c = controller.clone();
    ctx.caches.attachments.subscribe(move |change| {
        let attachment = change.object();
        c.queue.add(Work::Node(attachment.spec.node_name.clone()));
        let volume = attachment.spec.source.persistent_volume_name.clone();
        volume.into_iter().for_each(|v| c.queue.add(Work::Volume(v)));
    });
    let c = controller.clone();
    ctx.caches.nodes.subscribe(move |change| {
        let same = matches!(change, isopod_client::Change::Updated(old, new) if said(old) == said(new));
        if !same {
            c.wake(change.object().name());
        }
    });
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(NAME, &queue, 1, &stop, move |work| {
        let controller = controller.clone();
        async move {
            match work {
                Work::Volume(name) => controller.sync_volume(&name).await,
                Work::Node(name) => controller.sync_node(&name).await,
            }
            .map(|()| None::<Duration>)
        }
    });
}

/// Driver and handle of a CSI volume.
fn csi(volume: &PersistentVolume) -> Option<(&str, &str)> {
    let source = volume.spec.as_ref()?.csi.as_ref()?;
    Some((&source.driver, &source.volume_handle))
}

fn attachment_name(driver: &str, handle: &str, node: &str) -> String {
    let mut hash = Sha256::new();
    [handle, driver, node].iter().for_each(|part| hash.update(part.as_bytes()));
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    format!("csi-{hex}")
}

fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

/// What of a node matters here.
fn said(node: &Node) -> (Vec<String>, bool, bool) {
    let in_use = node.status.as_ref().and_then(|s| s.volumes_in_use.clone()).unwrap_or_default();
    (in_use, out_of_service(node), node.status.as_ref().is_some_and(|s| s.volumes_attached.is_some()))
}

fn out_of_service(node: &Node) -> bool {
    node.spec.as_ref().is_some_and(|s| s.taints.iter().flatten().any(|t| t.key == OUT_OF_SERVICE))
}

/// Whether a node still has a volume mounted, as far as it says.
fn in_use(node: Option<&Node>, unique: &str) -> bool {
    let Some(node) = node.filter(|n| !out_of_service(n)) else { return false };
    node.status.iter().flat_map(|s| s.volumes_in_use.iter().flatten()).any(|v| v == unique)
}

/// What is to be done about one volume.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Nodes to attach it to.
    attach: Vec<String>,
    /// VolumeAttachments to delete.
    detach: Vec<String>,
    /// Nodes that wait for another one to let go of it.
    blocked: Vec<String>,
}

/// `have`: attachments by node; `busy`: nodes that still use it; `alone`: only one node may have it.
fn plan(wanted: &BTreeSet<String>, have: &BTreeMap<String, String>, busy: &BTreeSet<String>, alone: bool) -> Plan {
    let mut plan = Plan::default();
    for (node, attachment) in have {
        if !wanted.contains(node) && !busy.contains(node) {
            plan.detach.push(attachment.clone());
        }
    }
    let mut held = !have.is_empty();
    for node in wanted.iter().filter(|n| !have.contains_key(*n)) {
        if alone && held {
            plan.blocked.push(node.clone());
        } else {
            plan.attach.push(node.clone());
            held = true;
        }
    }
    plan
}

impl Controller {
    /// Names of the volumes bound to a pod's claims.
    fn volumes_of(&self, pod: &Pod) -> impl Iterator<Item = String> {
        let claims: Vec<String> = crate::volumes::claims_of(pod).collect();
        let bound =
            |name: String| self.ctx.caches.claims.get(pod.namespace(), &name)?.spec.as_ref()?.volume_name.clone();
        claims.into_iter().filter_map(bound).collect::<Vec<_>>().into_iter()
    }

    fn wake(&self, node: &str) {
        self.queue.add(Work::Node(node.to_owned()));
        for attachment in self.ctx.caches.attachments.list().iter().filter(|a| a.spec.node_name == node) {
            let volume = attachment.spec.source.persistent_volume_name.clone();
            volume.into_iter().for_each(|v| self.queue.add(Work::Volume(v)));
        }
    }

    /// Pods that use a volume, by node.
    fn users(&self, volume: &PersistentVolume) -> BTreeMap<String, Vec<Arc<Pod>>> {
        let Some(claim) = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()) else { return BTreeMap::new() };
        let namespace = claim.namespace.as_deref().unwrap_or_default();
        let mut users: BTreeMap<String, Vec<Arc<Pod>>> = BTreeMap::new();
        for pod in self.ctx.caches.pods.in_namespace(namespace) {
            let node = pods::node(&pod);
            let uses = || crate::volumes::claims_of(&pod).any(|c| Some(&c) == claim.name.as_ref());
            if !node.is_empty() && !pods::is_finished(&pod) && uses() {
                users.entry(node.to_owned()).or_default().push(pod.clone());
            }
        }
        users
    }

    async fn sync_volume(&self, name: &str) -> Result<(), kube::Error> {
        let caches = &self.ctx.caches;
        let attachments = caches.attachments.list();
        let own = |a: &&Arc<VolumeAttachment>| a.spec.source.persistent_volume_name.as_deref() == Some(name);
        let have: BTreeMap<String, String> =
            attachments.iter().filter(own).map(|a| (a.spec.node_name.clone(), a.name().to_owned())).collect();
        let Some(volume) = caches.volumes.get("", name) else { return Ok(()) };
        let Some((driver, handle)) = csi(&volume) else { return Ok(()) };
        let object = caches.csi_drivers.get("", driver);
        let users = match object.is_some_and(|d| d.spec.attach_required == Some(false)) {
            true => BTreeMap::new(),
            false => self.users(&volume),
        };
        let unique = unique_name(driver, handle);
        let busy = have.keys().filter(|n| in_use(caches.nodes.get("", n).as_deref(), &unique)).cloned().collect();
        let modes = volume.spec.as_ref().and_then(|s| s.access_modes.as_deref()).unwrap_or_default();
        let alone = modes.iter().all(|m| m == "ReadWriteOnce" || m == "ReadWriteOncePod");
        let plan = plan(&users.keys().cloned().collect(), &have, &busy, alone);
        for attachment in &plan.detach {
            match self.ctx.objects.delete::<VolumeAttachment>("", attachment, &DeleteOptions::default()).await {
                Err(e) if !is_not_found(&e) => return Err(e),
                _ => tracing::info!(volume = name, attachment, "detaching"),
            }
        }
        for node in &plan.blocked {
            for pod in users.get(node).into_iter().flatten() {
                let holders: Vec<&str> = have.keys().map(String::as_str).collect();
                let text = format!(
                    "Multi-Attach error for volume {name:?} Volume is already used on node(s) {}",
                    holders.join(", ")
                );
                self.recorder.warning(&**pod, "FailedAttachVolume", text);
            }
        }
        for node in &plan.attach {
            self.attach(&volume, driver, handle, node).await?;
        }
        Ok(())
    }

    async fn attach(
        &self,
        volume: &PersistentVolume,
        driver: &str,
        handle: &str,
        node: &str,
    ) -> Result<(), kube::Error> {
        let attachment = VolumeAttachment {
            metadata: ObjectMeta { name: Some(attachment_name(driver, handle, node)), ..ObjectMeta::default() },
            spec: VolumeAttachmentSpec {
                attacher: driver.to_owned(),
                node_name: node.to_owned(),
                source: VolumeAttachmentSource {
                    persistent_volume_name: Some(volume.name().to_owned()),
                    ..VolumeAttachmentSource::default()
                },
            },
            status: None,
        };
        match self.ctx.objects.create(&attachment).await {
            Err(e) if is_already_exists(&e) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Tells a node what is attached to it, and its pods that it is.
    async fn sync_node(&self, name: &str) -> Result<(), kube::Error> {
        let Some(node) = self.ctx.caches.nodes.get("", name) else { return Ok(()) };
        let mut attached = Vec::new();
        for a in self.ctx.caches.attachments.list() {
            let done = a.spec.node_name == name && a.status.as_ref().is_some_and(|s| s.attached) && !a.deleting();
            let volume = a.spec.source.persistent_volume_name.as_deref().filter(|_| done);
            if let Some(volume) = volume.and_then(|v| self.ctx.caches.volumes.get("", v))
                && let Some((driver, handle)) = csi(&volume)
            {
                attached.push(AttachedVolume { name: unique_name(driver, handle), device_path: String::new() });
            }
        }
        attached.sort_by(|a, b| a.name.cmp(&b.name));
        let before = node.status.as_ref().and_then(|s| s.volumes_attached.clone()).unwrap_or_default();
        if attached == before {
            return Ok(());
        }
        let fresh: Vec<&AttachedVolume> = attached.iter().filter(|a| !before.contains(a)).collect();
        let list = (!attached.is_empty()).then_some(&attached);
        let patch = json!({"status": {"volumesAttached": list}});
        self.ctx.objects.merge::<Node>("", name, "status", &patch).await?;
        self.tell_pods(name, &fresh);
        Ok(())
    }

    fn tell_pods(&self, node: &str, fresh: &[&AttachedVolume]) {
        for volume in self.ctx.caches.volumes.list() {
            let Some((driver, handle)) = csi(&volume) else { continue };
            if !fresh.iter().any(|a| a.name == unique_name(driver, handle)) {
                continue;
            }
            for pod in self.users(&volume).remove(node).unwrap_or_default() {
                let text = format!("AttachVolume.Attach succeeded for volume {:?} ", volume.name());
                self.recorder.normal(&*pod, "SuccessfulAttachVolume", text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn have(nodes: &[&str]) -> BTreeMap<String, String> {
        nodes.iter().map(|n| ((*n).to_owned(), format!("va-{n}"))).collect()
    }

    #[test]
    fn attachments_follow_pods_and_wait_for_nodes() {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        for (wanted, has, busy, alone, attach, detach, blocked) in [
            (&["a"][..], &[][..], &[][..], true, &["a"][..], &[][..], &[][..]),
            (&["a"], &["a"], &["a"], true, &[], &[], &[]),
            (&[], &["a"], &["a"], true, &[], &[], &[]),
            (&[], &["a"], &[], true, &[], &["va-a"], &[]),
            (&["b"], &["a"], &["a"], true, &[], &[], &["b"]),
            (&["b"], &["a"], &["a"], false, &["b"], &[], &[]),
            (&["a", "b"], &[], &[], true, &["a"], &[], &["b"]),
            (&["a", "b"], &[], &[], false, &["a", "b"], &[], &[]),
        ] {
            let want = Plan { attach: list(attach), detach: list(detach), blocked: list(blocked) };
            assert_eq!(plan(&set(wanted), &have(has), &set(busy), alone), want, "{wanted:?} {has:?} {busy:?} {alone}");
        }
    }

    #[test]
    fn a_node_that_is_gone_or_off_uses_nothing() {
        let node = |taint: bool| -> Node {
            let taints = if taint { json!([{"key": OUT_OF_SERVICE, "effect": "NoExecute"}]) } else { json!([]) };
            serde_json::from_value(json!({"spec": {"taints": taints}, "status": {"volumesInUse": ["v"]}})).unwrap()
        };
        assert!(in_use(Some(&node(false)), "v"));
        assert!(!in_use(Some(&node(false)), "w"));
        assert!(!in_use(Some(&node(true)), "v"));
        assert!(!in_use(None, "v"));
    }
}
