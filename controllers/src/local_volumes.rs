//! Volumes out of a node's own disk: the provisioner behind the StorageClass `local`.
//!
//! In: claims that the binder has marked for this provisioner, volumes it made, the pods that empty them. Out: a
//! PersistentVolume per claim, a directory of the node the scheduler chose; the node's agent makes the directory when the
//! first pod comes. When such a volume is released and its policy is Delete, a short pod on that node removes the directory
//! before the volume goes. A directory has no quota: the size asked for is not enforced.

use crate::context::Context;
use isopod_client::objects::{DeleteOptions, HasMeta, is_already_exists};
use isopod_client::{Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use serde_json::{Value, json};
use std::sync::Arc;

/// The provisioner's name, and the driver name in its volumes' annotation.
const PROVISIONER: &str = "isopod.dev/local";
/// The StorageClass that is made when there is none of this name.
const CLASS: &str = "local";
/// Label of a pod that removes a volume's directory: the volume.
const REMOVES: &str = "isopod.dev/removes-volume";
const NAMESPACE: &str = "kube-system";
const HOSTNAME: &str = "kubernetes.io/hostname";
/// Set on claims by the binder: who is to provision.
pub(crate) const ASKED: &str = "volume.kubernetes.io/storage-provisioner";
/// Set on claims by the scheduler: where.
pub(crate) const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Class,
    Claim(String, String),
    Volume(String),
}

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
}

/// Subscribes the controller and starts its workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder: ctx.recorder.component(PROVISIONER) });
    let queue: Arc<Queue<Work>> = Queue::new();
    queue.add(Work::Class);
    let q = queue.clone();
    ctx.caches.claims.subscribe(move |change| {
        let claim = change.object();
        if annotation(&**claim, ASKED) == PROVISIONER {
            q.add(Work::Claim(claim.namespace().to_owned(), claim.name().to_owned()));
        }
    });
    let q = queue.clone();
    ctx.caches.volumes.subscribe(move |change| {
        if annotation(&**change.object(), PROVISIONED_BY) == PROVISIONER {
            q.add(Work::Volume(change.object().name().to_owned()));
        }
    });
    let q = queue.clone();
    ctx.caches.pods.subscribe(move |change| {
        let labels = change.object().metadata.labels.as_ref();
        if let Some(volume) = labels.and_then(|l| l.get(REMOVES)) {
            q.add(Work::Volume(volume.clone()));
        }
    });
    spawn_workers("local-volume-provisioner", &queue, 2, &ctx.stop, move |work| {
        let controller = controller.clone();
        async move {
            match work {
                Work::Class => controller.ensure_class().await,
                Work::Claim(namespace, name) => controller.sync_claim(&namespace, &name).await,
                Work::Volume(name) => controller.sync_volume(&name).await,
            }
            .map(|()| None)
        }
    });
}

fn annotation<'a, K: HasMeta>(object: &'a K, key: &str) -> &'a str {
    object.object_meta().annotations.as_ref().and_then(|a| a.get(key)).map(String::as_str).unwrap_or_default()
}

/// The volume for a claim; an error says why there can be none.
fn volume(claim: &PersistentVolumeClaim, class: &StorageClass, node: &Node, base: &str) -> Result<Value, String> {
    let spec = claim.spec.as_ref().ok_or("the claim is empty")?;
    let modes = spec.access_modes.clone().unwrap_or_default();
    if modes.is_empty() || modes.iter().any(|m| m != "ReadWriteOnce" && m != "ReadWriteOncePod") {
        return Err("a directory of one node can be ReadWriteOnce or ReadWriteOncePod only".into());
    }
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err("a directory cannot be a block device: volumeMode must be Filesystem".into());
    }
    if spec.selector.is_some() {
        return Err("claim.Spec.Selector is not supported".into());
    }
    let asked = class.parameters.as_ref().and_then(|p| p.get("path"));
    let base = asked.map_or(base, String::as_str).trim_end_matches('/');
    if !base.starts_with('/') || base.split('/').any(|part| part == "..") {
        return Err(format!("parameter path of StorageClass {}: {base:?} is not an absolute path", class.name()));
    }
    let name = format!("pvc-{}", claim.uid());
    let size = spec.resources.as_ref().and_then(|r| r.requests.as_ref()?.get("storage").cloned());
    Ok(json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "capacity": {"storage": size}, "accessModes": modes, "volumeMode": "Filesystem",
            "storageClassName": class.name(),
            "persistentVolumeReclaimPolicy": class.reclaim_policy.as_deref().unwrap_or("Delete"),
            "mountOptions": class.mount_options,
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": claim.namespace(),
                "name": claim.name(), "uid": claim.uid(), "resourceVersion": claim.metadata.resource_version},
            "local": {"path": format!("{base}/{name}_{}_{}", claim.namespace(), claim.name())},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                {"key": HOSTNAME, "operator": "In", "values": [hostname(node)]}]}]}},
        },
    }))
}

fn hostname(node: &Node) -> &str {
    node.metadata.labels.as_ref().and_then(|l| l.get(HOSTNAME)).map_or(node.name(), String::as_str)
}

/// The host that a volume of ours is on.
fn host(volume: &PersistentVolume) -> Option<&str> {
    let required = volume.spec.as_ref()?.node_affinity.as_ref()?.required.as_ref()?;
    let expression = required.node_selector_terms.first()?.match_expressions.as_ref()?.first()?;
    expression.values.as_ref()?.first().map(String::as_str)
}

/// The pod that removes a volume's directory on a node: it sees the directory's parent and nothing else of the machine.
fn remover(volume: &PersistentVolume, node: &str, image: &str) -> Option<Value> {
    let path = &volume.spec.as_ref()?.local.as_ref()?.path;
    let (parent, directory) = path.rsplit_once('/')?;
    Some(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": remover_name(volume.name()), "namespace": NAMESPACE, "labels": {REMOVES: volume.name()}},
        "spec": {
            "nodeName": node, "restartPolicy": "Never", "tolerations": [{"operator": "Exists"}],
            "automountServiceAccountToken": false, "enableServiceLinks": false, "hostNetwork": true,
            "containers": [{
                "name": "remove", "image": image, "imagePullPolicy": "Never",
                "command": ["/isopod", "remove-volume", format!("/volumes/{directory}")],
                "securityContext": {"readOnlyRootFilesystem": true},
                "volumeMounts": [{"name": "volumes", "mountPath": "/volumes"}],
            }],
            "volumes": [{"name": "volumes", "hostPath": {"path": parent, "type": "DirectoryOrCreate"}}],
        },
    }))
}

fn remover_name(volume: &str) -> String {
    format!("remove-{volume}")
}

impl Controller {
    async fn create<K: isopod_client::objects::Object>(&self, object: Value) -> Result<bool, kube::Error> {
        let object: K = serde_json::from_value(object).map_err(|e| kube::Error::Service(e.into()))?;
        match self.ctx.objects.create(&object).await {
            Ok(_) => Ok(true),
            Err(error) if is_already_exists(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes the StorageClass unless there is one of its name; the default one where no other is.
    async fn ensure_class(&self) -> Result<(), kube::Error> {
        let classes = self.ctx.caches.storage_classes.list();
        if classes.iter().any(|c| c.name() == CLASS) {
            return Ok(());
        }
        let taken = classes.iter().any(|c| annotation(&**c, crate::volumes::DEFAULT_CLASS) == "true");
        let class = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": {"name": CLASS, "annotations": {crate::volumes::DEFAULT_CLASS: (!taken).to_string()}},
            "provisioner": PROVISIONER, "reclaimPolicy": "Delete", "volumeBindingMode": "WaitForFirstConsumer",
        });
        self.create::<StorageClass>(class).await.map(|_| ())
    }

    async fn sync_claim(&self, namespace: &str, name: &str) -> Result<(), kube::Error> {
        let Some(claim) = self.ctx.caches.claims.get(namespace, name) else { return Ok(()) };
        let bound = claim.spec.as_ref().is_some_and(|s| s.volume_name.as_deref().is_some_and(|v| !v.is_empty()));
        let node = annotation(&*claim, SELECTED_NODE);
        if claim.deleting() || bound || annotation(&*claim, ASKED) != PROVISIONER {
            return Ok(());
        }
        let class = claim.spec.as_ref().and_then(|s| s.storage_class_name.as_deref()).unwrap_or_default();
        let Some(class) = self.ctx.caches.storage_classes.get("", class) else { return Ok(()) };
        let planned = match self.ctx.caches.nodes.get("", node) {
            Some(node) => volume(&claim, &class, &node, &self.ctx.config.local_volumes),
            None if node.is_empty() => {
                Err("the node is not known: the class needs volumeBindingMode WaitForFirstConsumer".into())
            }
            None => Err(format!("node {node:?} not found")),
        };
        match planned {
            Ok(planned) => {
                let text = format!("External provisioner is provisioning volume for claim \"{namespace}/{name}\"");
                self.recorder.normal(&*claim, "Provisioning", text);
                if self.create::<PersistentVolume>(planned).await? {
                    let text = format!("Successfully provisioned volume pvc-{}", claim.uid());
                    self.recorder.normal(&*claim, "ProvisioningSucceeded", text);
                }
            }
            Err(why) => {
                let text = format!("failed to provision volume with StorageClass \"{}\": {why}", class.name());
                self.recorder.warning(&*claim, "ProvisioningFailed", text);
            }
        }
        Ok(())
    }

    /// Takes a released volume through its removal; what is left of a removal that is over goes too.
    async fn sync_volume(&self, name: &str) -> Result<(), kube::Error> {
        let pod = self.ctx.caches.pods.get(NAMESPACE, &remover_name(name));
        let Some(volume) = self.ctx.caches.volumes.get("", name) else {
            return self.discard(pod.as_deref()).await;
        };
        let spec = volume.spec.clone().unwrap_or_default();
        let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
        let delete = spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete");
        if phase != "Released" || !delete || volume.deleting() {
            return Ok(());
        }
        let nodes = self.ctx.caches.nodes.list();
        let node = nodes.iter().find(|node| host(&volume) == Some(hostname(node)));
        let done = pod.as_ref().and_then(|p| p.status.as_ref()?.phase.clone()).unwrap_or_default();
        let planned = node.and_then(|node| remover(&volume, node.name(), &self.ctx.config.image));
        match (planned, done.as_str()) {
            // The disk went with its node.
            (None, _) | (_, "Succeeded") => {
                let options = DeleteOptions::uid(volume.uid());
                self.ctx.objects.delete::<PersistentVolume>("", name, &options).await?;
                self.discard(pod.as_deref()).await
            }
            (_, "Failed") => {
                let text = format!("the pod {} that removes its directory has failed", remover_name(name));
                self.recorder.warning(&*volume, "VolumeFailedDelete", text.clone());
                self.discard(pod.as_deref()).await?;
                // Again after a back-off.
                Err(kube::Error::Service(text.into()))
            }
            (Some(planned), _) if pod.is_none() => self.create::<Pod>(planned).await.map(|_| ()),
            _ => Ok(()),
        }
    }

    async fn discard(&self, pod: Option<&Pod>) -> Result<(), kube::Error> {
        let Some(pod) = pod else { return Ok(()) };
        self.ctx.objects.delete::<Pod>(NAMESPACE, pod.name(), &DeleteOptions::uid(pod.uid())).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(spec: Value) -> PersistentVolumeClaim {
        let mut all = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({"metadata": {"name": "data", "namespace": "ns", "uid": "u1"}, "spec": all}))
            .unwrap()
    }

    fn class(parameters: Value) -> StorageClass {
        let class = json!({"metadata": {"name": "local"}, "provisioner": PROVISIONER, "parameters": parameters});
        serde_json::from_value(class).unwrap()
    }

    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {HOSTNAME: "host1"}}})).unwrap()
    }

    #[test]
    fn a_claim_becomes_a_directory_of_the_chosen_node() {
        let made = volume(&claim(json!({})), &class(Value::Null), &node(), "/var/lib/isopod/volumes").unwrap();
        assert_eq!(made["spec"]["local"]["path"], "/var/lib/isopod/volumes/pvc-u1_ns_data");
        assert_eq!(made["spec"]["persistentVolumeReclaimPolicy"], "Delete");
        let made: PersistentVolume = serde_json::from_value(made).unwrap();
        assert_eq!(host(&made), Some("host1"));
        let pod = remover(&made, "n1", "image").unwrap();
        assert_eq!(pod["spec"]["volumes"][0]["hostPath"]["path"], "/var/lib/isopod/volumes");
        assert_eq!(pod["spec"]["containers"][0]["command"][2], "/volumes/pvc-u1_ns_data");
        let elsewhere = volume(&claim(json!({})), &class(json!({"path": "/srv/"})), &node(), "/x").unwrap();
        assert_eq!(elsewhere["spec"]["local"]["path"], "/srv/pvc-u1_ns_data");
    }

    #[test]
    fn what_a_directory_cannot_be_is_refused() {
        for (spec, parameters, why) in [
            (json!({"accessModes": ["ReadWriteMany"]}), Value::Null, "ReadWriteOnce or"),
            (json!({"volumeMode": "Block"}), Value::Null, "block device"),
            (json!({"selector": {"matchLabels": {"a": "b"}}}), Value::Null, "Selector"),
            (json!({}), json!({"path": "srv"}), "\"srv\" is not an absolute path"),
            (json!({}), json!({"path": "/srv/../etc"}), "not an absolute path"),
        ] {
            let error = volume(&claim(spec), &class(parameters), &node(), "/v").unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
