//! PersistentVolumes and claims: binds each claim to a volume that fits, follows reclaim policies, and keeps both from
//! going while they are in use.
//!
//! No provisioning here: claims of classes with a provisioner are marked for it and wait. Binding has two sides (the volume's claimRef, the
//! claim's volumeName); either may be written first, by an administrator, the scheduler or this controller, and the other
//! follows.

use crate::context::Context;
use crate::local_volumes::{ASKED, SELECTED_NODE};
use crate::pods;
use isopod_client::objects::{DeleteOptions, HasMeta, is_not_found};
use isopod_client::quantity::value;
use isopod_client::select::Selector;
use isopod_client::{Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeClaimStatus, Pod,
};
use std::sync::Arc;

const NAME: &str = "persistentvolume-binder-controller";
const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// The older name of the annotation that marks a claim for its provisioner; some drivers look for it only.
const ASKED_BEFORE: &str = "volume.beta.kubernetes.io/storage-provisioner";
const CLAIM_PROTECTION: &str = "kubernetes.io/pvc-protection";
const VOLUME_PROTECTION: &str = "kubernetes.io/pv-protection";
pub(crate) const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Work {
    Claim(String, String),
    Volume(String),
}

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Work>>,
}

/// Subscribes the controller and starts its worker. One worker: two claims must not take one volume.
pub(crate) fn start(ctx: &Arc<Context>) {
    let recorder = ctx.recorder.component("persistentvolume-controller");
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder, queue: Queue::new() });
    let c = controller.clone();
    ctx.caches.claims.subscribe(move |change| {
        let claim = change.object();
        c.queue.add(Work::Claim(claim.namespace().to_owned(), claim.name().to_owned()));
        if !volume_name(claim).is_empty() {
            c.queue.add(Work::Volume(volume_name(claim).to_owned()));
        }
    });
    let c = controller.clone();
    ctx.caches.volumes.subscribe(move |change| {
        let volume = change.object();
        c.queue.add(Work::Volume(volume.name().to_owned()));
        match claim_ref(volume) {
            Some((namespace, name)) => c.queue.add(Work::Claim(namespace.to_owned(), name.to_owned())),
            None => c.wake_pending(),
        }
    });
    let c = controller.clone();
    ctx.caches.storage_classes.subscribe(move |_| c.wake_pending());
    let c = controller.clone();
    ctx.caches.pods.subscribe(move |change| {
        let pod = change.object();
        let over = change.is_deleted() || pods::is_finished(pod);
        for name in claims_of(pod).filter(|_| over || pods::node(pod).is_empty()) {
            c.queue.add(Work::Claim(pod.namespace().to_owned(), name));
        }
    });
    let (queue, stop) = (controller.queue.clone(), ctx.stop.clone());
    spawn_workers(NAME, &queue, 1, &stop, move |work| {
        let controller = controller.clone();
        async move {
            match work {
                Work::Claim(namespace, name) => controller.sync_claim(&namespace, &name).await,
                Work::Volume(name) => controller.sync_volume(&name).await,
            }
            .map(|()| None)
        }
    });
}

fn volume_name(claim: &PersistentVolumeClaim) -> &str {
    claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default()
}

fn claim_ref(volume: &PersistentVolume) -> Option<(&str, &str)> {
    let reference = volume.spec.as_ref()?.claim_ref.as_ref()?;
    Some((reference.namespace.as_deref()?, reference.name.as_deref()?))
}

pub(crate) fn claims_of(pod: &Pod) -> impl Iterator<Item = String> + '_ {
    let volumes = pod.spec.as_ref().and_then(|s| s.volumes.as_ref());
    volumes.into_iter().flatten().filter_map(|v| {
        let named = v.persistent_volume_claim.as_ref().map(|c| c.claim_name.clone());
        named.or_else(|| v.ephemeral.as_ref().map(|_| format!("{}-{}", pod.name(), v.name)))
    })
}

fn class_of(claim: &PersistentVolumeClaim) -> &str {
    claim.spec.as_ref().and_then(|s| s.storage_class_name.as_deref()).unwrap_or_default()
}

fn phase(claim: &PersistentVolumeClaim) -> &str {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// Whether a volume could serve a claim.
fn fits(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let (Some(have), Some(want)) = (volume.spec.as_ref(), claim.spec.as_ref()) else { return false };
    let filesystem = "Filesystem".to_owned();
    let size = want.resources.as_ref().and_then(|r| r.requests.as_ref()?.get("storage")).map(value).unwrap_or(0);
    let selector = want.selector.as_ref().map(Selector::new);
    !volume.deleting()
        && have.storage_class_name.as_deref().unwrap_or_default() == class_of(claim)
        && want.access_modes.iter().flatten().all(|m| have.access_modes.iter().flatten().any(|h| h == m))
        && capacity(volume) >= size
        && have.volume_mode.as_ref().unwrap_or(&filesystem) == want.volume_mode.as_ref().unwrap_or(&filesystem)
        && selector.is_none_or(|s| s.matches_optional(volume.metadata.labels.as_ref()))
}

fn capacity(volume: &PersistentVolume) -> i64 {
    let storage = volume.spec.as_ref().and_then(|s| s.capacity.as_ref()?.get("storage"));
    storage.map(value).unwrap_or(0)
}

/// The volume for a claim: one that was reserved for it, or else the smallest free one.
fn choose(claim: &PersistentVolumeClaim, volumes: &[Arc<PersistentVolume>]) -> Option<Arc<PersistentVolume>> {
    let reserved = volumes.iter().find(|v| {
        let uid = v.spec.as_ref().and_then(|s| s.claim_ref.as_ref()?.uid.as_deref()).unwrap_or_default();
        claim_ref(v) == Some((claim.namespace(), claim.name())) && (uid.is_empty() || uid == claim.uid())
    });
    if let Some(reserved) = reserved {
        return Some(reserved.clone());
    }
    let free = volumes.iter().filter(|v| claim_ref(v).is_none() && fits(v, claim));
    let free = free.filter(|v| v.status.as_ref().and_then(|s| s.phase.as_deref()) != Some("Failed"));
    free.min_by_key(|v| (capacity(v), v.name().to_owned())).cloned()
}

impl Controller {
    fn wake_pending(&self) {
        for claim in self.ctx.caches.claims.list() {
            if phase(&claim) != "Bound" {
                self.queue.add(Work::Claim(claim.namespace().to_owned(), claim.name().to_owned()));
            }
        }
    }

    async fn write<K: isopod_client::objects::Object>(
        &self,
        old: &K,
        new: &K,
        sub: &str,
    ) -> Result<Option<K>, kube::Error> {
        match self.ctx.objects.update(old, new, sub).await {
            Err(error) if is_not_found(&error) => Ok(None),
            result => result,
        }
    }

    async fn sync_claim(&self, namespace: &str, name: &str) -> Result<(), kube::Error> {
        let Some(claim) = self.ctx.caches.claims.get(namespace, name) else { return Ok(()) };
        if claim.deleting() {
            return self.release_claim(&claim).await;
        }
        if volume_name(&claim).is_empty() {
            return self.find_volume(&claim).await;
        }
        let Some(volume) = self.ctx.caches.volumes.get("", volume_name(&claim)) else {
            if phase(&claim) == "Bound" {
                let mut new = (*claim).clone();
                new.status.get_or_insert_default().phase = Some("Lost".into());
                self.recorder.warning(
                    &*claim,
                    "ClaimLost",
                    "Bound claim has lost its PersistentVolume. Data on the volume is lost!",
                );
                self.write(&*claim, &new, "status").await?;
            }
            return Ok(());
        };
        match claim_ref(&volume) {
            None => self.bind(&claim, &volume).await,
            Some(held) if held == (namespace, name) => self.bind(&claim, &volume).await,
            Some(_) => {
                let text = format!("volume {:?} already bound to a different claim.", volume.name());
                self.recorder.warning(&*claim, "FailedBinding", text);
                Ok(())
            }
        }
    }

    /// A claim that is being deleted goes when no pod uses it.
    async fn release_claim(&self, claim: &PersistentVolumeClaim) -> Result<(), kube::Error> {
        let used = self
            .ctx
            .caches
            .pods
            .in_namespace(claim.namespace())
            .iter()
            .any(|pod| !pods::is_finished(pod) && claims_of(pod).any(|name| name == claim.name()));
        let mut new = claim.clone();
        let Some(finalizers) = new.metadata.finalizers.as_mut().filter(|_| !used) else { return Ok(()) };
        finalizers.retain(|f| f != CLAIM_PROTECTION);
        self.write(claim, &new, "").await.map(|_| ())
    }

    async fn find_volume(&self, claim: &PersistentVolumeClaim) -> Result<(), kube::Error> {
        let named = claim.spec.as_ref().is_some_and(|s| s.storage_class_name.is_some());
        if !named && let Some(class) = self.default_class() {
            let mut new = claim.clone();
            new.spec.get_or_insert_default().storage_class_name = Some(class);
            return self.write(claim, &new, "").await.map(|_| ());
        }
        let class = self.ctx.caches.storage_classes.get("", class_of(claim));
        let late = class.as_ref().is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"));
        let volumes = self.ctx.caches.volumes.list();
        if let Some(volume) = choose(claim, &volumes)
            && (!late || claim_ref(&volume).is_some())
        {
            return self.bind(claim, &volume).await;
        }
        if phase(claim).is_empty() {
            let mut new = claim.clone();
            new.status.get_or_insert_default().phase = Some("Pending".into());
            self.write(claim, &new, "status").await?;
        }
        let selected = claim.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(SELECTED_NODE));
        if late && !selected {
            let text = "waiting for first consumer to be created before binding";
            self.recorder.normal(claim, "WaitForFirstConsumer", text);
        } else if let Some(class) = class.filter(|c| c.provisioner != "kubernetes.io/no-provisioner") {
            let text = format!(
                "Waiting for a volume to be created either by the external provisioner '{}' or manually by \
                the system administrator. If volume creation is delayed, please verify that the provisioner is running \
                and correctly registered.",
                class.provisioner
            );
            self.recorder.normal(claim, "ExternalProvisioning", text);
            let mut new = claim.clone();
            new.metadata
                .annotations
                .get_or_insert_default()
                .extend([ASKED, ASKED_BEFORE].map(|key| (key.to_owned(), class.provisioner.clone())));
            self.write(claim, &new, "").await?;
        } else {
            let text = "no persistent volumes available for this claim and no storage class is set";
            self.recorder.normal(claim, "FailedBinding", text);
        }
        Ok(())
    }

    fn default_class(&self) -> Option<String> {
        let classes = self.ctx.caches.storage_classes.list();
        let marked = classes.iter().filter(|c| {
            c.metadata.annotations.as_ref().is_some_and(|a| a.get(DEFAULT_CLASS).is_some_and(|v| v == "true"))
        });
        let newest = marked.max_by_key(|c| c.metadata.creation_timestamp.as_ref().map(|t| t.0));
        newest.map(|c| c.name().to_owned())
    }

    /// Writes whatever of the four parts is missing: volume's reference and phase, claim's name and phase.
    async fn bind(&self, claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<(), kube::Error> {
        let mut new_volume = volume.clone();
        let spec = new_volume.spec.get_or_insert_default();
        let held = spec.claim_ref.as_ref().and_then(|r| r.uid.as_deref()).unwrap_or_default();
        if !held.is_empty() && held != claim.uid() {
            return Ok(());
        }
        if held.is_empty() {
            if spec.claim_ref.is_none() {
                new_volume
                    .metadata
                    .annotations
                    .get_or_insert_default()
                    .insert(BOUND_BY_CONTROLLER.into(), "yes".into());
            }
            spec.claim_ref = Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("PersistentVolumeClaim".into()),
                namespace: Some(claim.namespace().to_owned()),
                name: Some(claim.name().to_owned()),
                uid: Some(claim.uid().to_owned()),
                resource_version: claim.metadata.resource_version.clone(),
                field_path: None,
            });
        }
        let volume = self.write(volume, &new_volume, "").await?.unwrap_or(new_volume);
        self.set_volume_phase(&volume, "Bound").await?;
        let mut new = claim.clone();
        let spec = new.spec.get_or_insert_default();
        let chosen_here = spec.volume_name.as_deref().unwrap_or_default().is_empty();
        spec.volume_name = Some(volume.name().to_owned());
        let annotations = new.metadata.annotations.get_or_insert_default();
        annotations.insert(BIND_COMPLETED.into(), "yes".into());
        if chosen_here {
            annotations.insert(BOUND_BY_CONTROLLER.into(), "yes".into());
        }
        let claim = self.write(claim, &new, "").await?.unwrap_or(new);
        let mut bound = claim.clone();
        let old = bound.status.take().unwrap_or_default();
        // A claim that is bound already learns of a larger volume when the node has grown what is on it.
        let capacity = match (&old.phase, &old.capacity) {
            (Some(phase), Some(_)) if phase == "Bound" => old.capacity.clone(),
            _ => volume.spec.as_ref().and_then(|s| s.capacity.clone()),
        };
        bound.status = Some(PersistentVolumeClaimStatus {
            phase: Some("Bound".into()),
            access_modes: volume.spec.as_ref().and_then(|s| s.access_modes.clone()),
            capacity,
            ..old
        });
        self.write(&claim, &bound, "status").await.map(|_| ())
    }

    async fn set_volume_phase(&self, volume: &PersistentVolume, phase: &str) -> Result<(), kube::Error> {
        let mut new = volume.clone();
        new.status.get_or_insert_default().phase = Some(phase.to_owned());
        self.write(volume, &new, "status").await.map(|_| ())
    }

    async fn sync_volume(&self, name: &str) -> Result<(), kube::Error> {
        let Some(volume) = self.ctx.caches.volumes.get("", name) else { return Ok(()) };
        let held = claim_ref(&volume);
        let uid = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()?.uid.clone()).unwrap_or_default();
        let claim = match held {
            Some((namespace, claim)) => {
                self.ctx.caches.claims.get(namespace, claim).filter(|c| uid.is_empty() || c.uid() == uid)
            }
            None => None,
        };
        if volume.deleting() {
            let bound = claim.is_some();
            let mut new = (*volume).clone();
            let Some(finalizers) = new.metadata.finalizers.as_mut().filter(|_| !bound) else { return Ok(()) };
            finalizers.retain(|f| f != VOLUME_PROTECTION);
            return self.write(&*volume, &new, "").await.map(|_| ());
        }
        match (held, claim) {
            (None, _) => self.set_volume_phase(&volume, "Available").await,
            // Reserved by name only: available to that claim.
            (Some(_), None) if uid.is_empty() => self.set_volume_phase(&volume, "Available").await,
            (Some((namespace, claim)), None) => {
                if self
                    .ctx
                    .objects
                    .get::<PersistentVolumeClaim>(namespace, claim)
                    .await?
                    .is_some_and(|c| c.uid() == uid)
                {
                    return Ok(());
                }
                self.reclaim(&volume).await
            }
            (Some(_), Some(_)) => Ok(()),
        }
    }

    /// The claim is gone: the volume is kept, or deleted where that needs no driver.
    async fn reclaim(&self, volume: &PersistentVolume) -> Result<(), kube::Error> {
        self.set_volume_phase(volume, "Released").await?;
        let spec = volume.spec.clone().unwrap_or_default();
        let provisioned =
            volume.metadata.annotations.as_ref().is_some_and(|a| a.contains_key("pv.kubernetes.io/provisioned-by"));
        if spec.persistent_volume_reclaim_policy.as_deref() != Some("Delete") || provisioned || spec.csi.is_some() {
            return Ok(());
        }
        if spec.host_path.is_some() || spec.local.is_some() {
            let text = "error getting deleter volume plugin for volume: no deletable volume plugin matched";
            self.recorder.warning(volume, "VolumeFailedDelete", text);
            return self.set_volume_phase(volume, "Failed").await;
        }
        let options = DeleteOptions::uid(volume.uid());
        self.ctx.objects.delete::<PersistentVolume>("", volume.name(), &options).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn volume(name: &str, size: &str, claim: Option<&str>) -> Arc<PersistentVolume> {
        let claim = claim.map(|c| json!({"namespace": "ns", "name": c}));
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"capacity": {"storage": size},
                "accessModes": ["ReadWriteOnce"], "claimRef": claim}}))
            .unwrap(),
        )
    }

    #[test]
    fn the_smallest_that_fits_or_the_reserved_one() {
        let claim: PersistentVolumeClaim =
            serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "u"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}}))
            .unwrap();
        let mut volumes = vec![
            volume("small", "1Gi", None),
            volume("big", "8Gi", None),
            volume("fit", "3Gi", None),
            volume("taken", "2Gi", Some("other")),
        ];
        assert_eq!(choose(&claim, &volumes).map(|v| v.name().to_owned()).as_deref(), Some("fit"));
        volumes.push(volume("mine", "1Gi", Some("c")));
        assert_eq!(choose(&claim, &volumes).map(|v| v.name().to_owned()).as_deref(), Some("mine"));
    }
}
