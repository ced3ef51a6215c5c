//! What the scheduler writes: bindings, the reasons for failures, evictions, claims' choices. Idempotent, decides nothing.

use crate::model::PodInfo;
use crate::plugins::volumes::Storage;
use http::Method;
use isopod_client::objects::{DeleteOptions, HasMeta};
use isopod_client::{Objects, Recorder};
use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolume, PersistentVolumeClaim, Pod};
use serde_json::{Value, json};
use std::time::Duration;

const BIND_TIMEOUT: Duration = Duration::from_secs(600);

/// Writes to the API server.
#[derive(Clone)]
pub(crate) struct Writer {
    pub(crate) objects: Objects,
    pub(crate) recorder: Recorder,
}

fn reference(pod: &PodInfo) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        namespace: Some(pod.namespace.clone()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        resource_version: (!pod.revision.is_empty()).then(|| pod.revision.clone()),
        field_path: None,
    }
}

fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

impl Writer {
    /// Gives a pod its node.
    pub(crate) async fn bind(&self, pod: &PodInfo, node: &str) -> Result<(), kube::Error> {
        let path = format!("/api/v1/namespaces/{}/pods/{}/binding", pod.namespace, pod.name);
        let body = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
            "target": {"kind": "Node", "name": node},
        });
        self.objects.post(&path, &body).await?;
        let note = format!("Successfully assigned {}/{} to {node}", pod.namespace, pod.name);
        self.recorder.send(reference(pod), "Normal", "Scheduled", "Binding", note);
        Ok(())
    }

    /// Says why a pod has no node, and which node was cleared for it.
    pub(crate) async fn failed(&self, pod: &PodInfo, reason: &str, message: &str, nominated: Option<&str>) {
        self.recorder.send(reference(pod), "Warning", "FailedScheduling", "Scheduling", message.to_owned());
        let told = pod.condition.as_ref().is_some_and(|(r, m)| r == reason && m == message);
        if told && nominated.is_none() {
            return;
        }
        let mut status = json!({"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": reason, "message": message,
            "lastProbeTime": null, "lastTransitionTime": now(),
        }]});
        if let Some(node) = nominated {
            status["nominatedNodeName"] = json!(node);
        }
        if let Err(error) = self.patch_status(pod, &status).await {
            tracing::debug!(pod = pod.name, namespace = pod.namespace, %error, "condition not written");
        }
    }

    async fn patch_status(&self, pod: &PodInfo, status: &Value) -> Result<(), kube::Error> {
        let path = format!("/api/v1/namespaces/{}/pods/{}/status", pod.namespace, pod.name);
        let patch = json!({"metadata": {"uid": pod.uid}, "status": status});
        let body = serde_json::to_vec(&patch).map_err(kube::Error::SerdeError)?;
        let kind = "application/strategic-merge-patch+json";
        self.objects.send::<Value>(Method::PATCH, &path, kind, body).await.map(|_| ())
    }

    /// Removes a pod to make room.
    pub(crate) async fn evict(&self, victim: &PodInfo, by: &PodInfo, node: &str) -> Result<(), kube::Error> {
        let message = format!("{}: preempting to accommodate a higher priority pod", by.scheduler);
        let condition = json!({"conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": message,
            "lastProbeTime": null, "lastTransitionTime": now(),
        }]});
        self.patch_status(victim, &condition).await?;
        self.objects.delete::<Pod>(&victim.namespace, &victim.name, &DeleteOptions::uid(&victim.uid)).await?;
        let note = format!("Preempted by pod {} on node {node}", by.uid);
        self.recorder.send(reference(victim), "Normal", "Preempted", "Preempting", note);
        Ok(())
    }

    /// Makes the claims of a pod take their volumes, and waits until they have.
    pub(crate) async fn bind_claims(
        &self,
        storage: &Storage,
        namespace: &str,
        node: &str,
        chosen: &[(String, Option<String>)],
    ) -> Result<(), kube::Error> {
        for (claim, volume) in chosen {
            match volume {
                Some(volume) => self.reserve(storage, namespace, claim, volume).await?,
                None => {
                    let patch = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": node}}});
                    self.objects.merge::<PersistentVolumeClaim>(namespace, claim, "", &patch).await?;
                }
            }
        }
        let mut seen = storage.claims.changes();
        let bound = |name: &str| {
            storage
                .claims
                .get(namespace, name)
                .is_some_and(|claim| claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound"))
        };
        let all = async {
            while !chosen.iter().all(|(claim, _)| bound(claim)) {
                if seen.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(BIND_TIMEOUT, all)
            .await
            .map_err(|_| kube::Error::Service(format!("claims of namespace {namespace} were not bound in time").into()))
    }

    async fn reserve(&self, storage: &Storage, namespace: &str, claim: &str, volume: &str) -> Result<(), kube::Error> {
        let uid = storage.claims.get(namespace, claim).map(|c| c.uid().to_owned()).unwrap_or_default();
        let patch = json!({
            "metadata": {"annotations": {"pv.kubernetes.io/bound-by-controller": "yes"}},
            "spec": {"claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "namespace": namespace, "name": claim, "uid": uid}},
        });
        self.objects.merge::<PersistentVolume>("", volume, "", &patch).await.map(|_| ())
    }
}
