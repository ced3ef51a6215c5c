//! VolumeBinding: claims must exist, bound ones tie the pod to where their volume is, and those that wait for their first
//! consumer need a volume (or a provisioner) that fits the node.

use super::{Plugin, Reject};
use crate::cluster::NodeInfo;
use crate::model::{NodeTerm, node_terms};
use isopod_client::Cache;
use isopod_client::objects::HasMeta;
use isopod_client::quantity::value;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use std::sync::Arc;

/// The caches the plugin reads.
pub(crate) struct Storage {
    pub(crate) claims: Arc<Cache<PersistentVolumeClaim>>,
    pub(crate) volumes: Arc<Cache<PersistentVolume>>,
    pub(crate) classes: Arc<Cache<StorageClass>>,
}

/// A volume a waiting claim could take.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    pub(crate) volume: String,
    size: i64,
    terms: Option<Vec<NodeTerm>>,
}

/// A claim that waits for its first consumer.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) claim: String,
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) provisioned: bool,
}

/// What a pod's claims demand of its node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    bound: Vec<Vec<NodeTerm>>,
    pub(crate) waiting: Vec<Waiting>,
    lost: bool,
}

fn fits(terms: &[NodeTerm], node: &NodeInfo) -> bool {
    terms.iter().any(|term| term.matches(&node.name, &node.labels))
}

impl Needs {
    /// The demands of these claims; an error says why no node can do.
    pub(crate) fn new(storage: &Storage, namespace: &str, claims: &[String]) -> Result<Self, String> {
        let mut needs = Self::default();
        for name in claims {
            let Some(claim) = storage.claims.get(namespace, name) else {
                return Err(format!("persistentvolumeclaim \"{name}\" not found"));
            };
            if claim.deleting() {
                return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
            }
            if claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Lost") {
                return Err(format!(
                    "persistentvolumeclaim \"{name}\" bound to non-existent persistentvolume \"{}\"",
                    volume_of(&claim)
                ));
            }
            if volume_of(&claim).is_empty() {
                needs.add_unbound(storage, &claim)?;
            } else {
                needs.add_bound(storage, volume_of(&claim));
            }
        }
        Ok(needs)
    }

    fn add_bound(&mut self, storage: &Storage, volume: &str) {
        let Some(volume) = storage.volumes.get("", volume) else {
            self.lost = true;
            return;
        };
        if let Some(terms) = affinity(&volume) {
            self.bound.push(terms);
        }
    }

    fn add_unbound(&mut self, storage: &Storage, claim: &PersistentVolumeClaim) -> Result<(), String> {
        let name = claim.spec.as_ref().and_then(|s| s.storage_class_name.clone()).unwrap_or_default();
        let class = storage.classes.get("", &name);
        let waits = class.as_ref().is_some_and(|c| c.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"));
        if !waits {
            return Err("pod has unbound immediate PersistentVolumeClaims".to_owned());
        }
        let candidates = storage.volumes.list().into_iter().filter(|v| matches(v, claim, &name));
        let mut candidates: Vec<Candidate> = candidates
            .map(|v| Candidate { volume: v.name().to_owned(), size: capacity(&v), terms: affinity(&v) })
            .collect();
        candidates.sort_by(|a, b| (a.size, &a.volume).cmp(&(b.size, &b.volume)));
        let provisioner = class.map(|c| c.provisioner.clone()).unwrap_or_default();
        self.waiting.push(Waiting {
            claim: claim.name().to_owned(),
            candidates,
            provisioned: !provisioner.is_empty() && provisioner != "kubernetes.io/no-provisioner",
        });
        Ok(())
    }

    pub(crate) fn filter(&self, node: &NodeInfo) -> Result<(), Reject> {
        if self.lost {
            let reason = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)";
            return Err(Reject::hopeless(Plugin::VolumeBinding, reason));
        }
        if !self.bound.iter().all(|terms| fits(terms, node)) {
            let reason = "node(s) didn't match PersistentVolume's node affinity";
            return Err(Reject::hopeless(Plugin::VolumeBinding, reason));
        }
        if self.choose(node).is_none() {
            let reason = "node(s) didn't find available persistent volumes to bind";
            return Err(Reject::hopeless(Plugin::VolumeBinding, reason));
        }
        Ok(())
    }

    /// For each waiting claim its volume on this node, or `None` where it is to be provisioned.
    pub(crate) fn choose(&self, node: &NodeInfo) -> Option<Vec<(String, Option<String>)>> {
        let mut chosen: Vec<(String, Option<String>)> = Vec::new();
        for waiting in &self.waiting {
            let free = |c: &&Candidate| {
                c.terms.as_ref().is_none_or(|terms| fits(terms, node))
                    && !chosen.iter().any(|(_, volume)| volume.as_deref() == Some(&c.volume))
            };
            match waiting.candidates.iter().find(free) {
                Some(candidate) => chosen.push((waiting.claim.clone(), Some(candidate.volume.clone()))),
                None if waiting.provisioned => chosen.push((waiting.claim.clone(), None)),
                None => return None,
            }
        }
        Some(chosen)
    }
}

fn volume_of(claim: &PersistentVolumeClaim) -> &str {
    let bound = claim.metadata.annotations.as_ref().is_some_and(|a| a.contains_key("pv.kubernetes.io/bind-completed"));
    let volume = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
    if bound { volume } else { "" }
}

fn affinity(volume: &PersistentVolume) -> Option<Vec<NodeTerm>> {
    Some(node_terms(volume.spec.as_ref()?.node_affinity.as_ref()?.required.as_ref()?))
}

fn capacity(volume: &PersistentVolume) -> i64 {
    let storage = volume.spec.as_ref().and_then(|s| s.capacity.as_ref()?.get("storage"));
    storage.map(value).unwrap_or(0)
}

fn matches(volume: &PersistentVolume, claim: &PersistentVolumeClaim, class: &str) -> bool {
    let (Some(have), Some(want)) = (volume.spec.as_ref(), claim.spec.as_ref()) else { return false };
    let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
    let reserved_for_other = have
        .claim_ref
        .as_ref()
        .is_some_and(|r| r.name.as_deref() != Some(claim.name()) || r.namespace.as_deref() != Some(claim.namespace()));
    let modes = want.access_modes.iter().flatten().all(|m| have.access_modes.iter().flatten().any(|n| n == m));
    let size = want.resources.as_ref().and_then(|r| r.requests.as_ref()?.get("storage")).map(value).unwrap_or(0);
    let selector = want.selector.as_ref().map(isopod_client::select::Selector::new);
    let filesystem = "Filesystem".to_owned();
    !volume.deleting()
        && matches!(phase, "Available" | "Pending" | "Bound" | "")
        && (phase != "Bound" || have.claim_ref.is_some())
        && !reserved_for_other
        && have.storage_class_name.as_deref().unwrap_or_default() == class
        && modes
        && capacity(volume) >= size
        && have.volume_mode.as_ref().unwrap_or(&filesystem) == want.volume_mode.as_ref().unwrap_or(&filesystem)
        && selector.is_none_or(|s| s.matches_optional(volume.metadata.labels.as_ref()))
}
