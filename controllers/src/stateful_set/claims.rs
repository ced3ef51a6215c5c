//! The claims of a StatefulSet's pods: how they are made, and who takes them along when going.
//!
//! `persistentVolumeClaimRetentionPolicy` is carried out by owner references and the garbage collector: a claim that goes
//! with the set is owned by the set, one that goes when its ordinal is scaled away by that last pod. Claims that another
//! controller owns are left alone. (KEP-1847)

use super::Goal;
use crate::context::Context;
use crate::ownership::owner_reference;
use isopod_client::objects::{HasMeta, is_not_found};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use std::sync::Arc;

/// The claims of ordinal `n`, as they are created.
pub(super) fn of(set: &StatefulSet, n: i32) -> Vec<PersistentVolumeClaim> {
    let spec = set.spec.clone().unwrap_or_default();
    let labels = spec.selector.match_labels.unwrap_or_default();
    let named = |mut claim: PersistentVolumeClaim| {
        claim.metadata.name = Some(format!("{}-{}-{n}", claim.name(), set.name()));
        claim.metadata.namespace = Some(set.namespace().to_owned());
        claim.metadata.labels.get_or_insert_default().extend(labels.clone());
        claim.metadata.owner_references = deletes(set, Event::Deleted).then(|| vec![owner_reference(set)]);
        claim.status = None;
        claim
    };
    spec.volume_claim_templates.into_iter().flatten().map(named).collect()
}

/// When claims may go.
enum Event {
    Deleted,
    Scaled,
}

fn deletes(set: &StatefulSet, event: Event) -> bool {
    let policy = set.spec.as_ref().and_then(|s| s.persistent_volume_claim_retention_policy.as_ref());
    let value = policy.and_then(|p| match event {
        Event::Deleted => p.when_deleted.as_deref(),
        Event::Scaled => p.when_scaled.as_deref(),
    });
    value == Some("Delete")
}

/// The owners that the claim of a pod should have; `None` where they are right already or not ours to set.
fn owners(set: &StatefulSet, scaled_away: bool, pod: &Pod, have: &[OwnerReference]) -> Option<Vec<OwnerReference>> {
    let ours = |o: &OwnerReference| match o.kind.as_str() {
        "StatefulSet" => o.name == set.name(),
        "Pod" => o.name == pod.name(),
        _ => false,
    };
    if have.iter().any(|o| o.controller == Some(true) && !ours(o)) {
        return None;
    }
    let wanted = if scaled_away && deletes(set, Event::Scaled) {
        Some(owner_reference(pod))
    } else if deletes(set, Event::Deleted) {
        Some(owner_reference(set))
    } else {
        None
    };
    let all: Vec<_> = have.iter().filter(|o| !ours(o)).cloned().chain(wanted).collect();
    (all != have).then_some(all)
}

/// Gives the claims of the set's pods the owners that its policy asks for; to be done before pods are deleted.
pub(super) async fn own(
    ctx: &Context,
    set: &StatefulSet,
    goal: &Goal,
    pods: &[(i32, Arc<Pod>)],
) -> Result<(), kube::Error> {
    let templates = set.spec.as_ref().and_then(|s| s.volume_claim_templates.as_ref());
    for (n, pod) in pods {
        let scaled_away = *n < goal.start || *n >= goal.start + goal.replicas;
        for template in templates.into_iter().flatten() {
            let name = format!("{}-{}-{n}", template.name(), set.name());
            let Some(claim) = ctx.caches.claims.get(set.namespace(), &name).filter(|c| !c.deleting()) else { continue };
            let have = claim.metadata.owner_references.as_deref().unwrap_or_default();
            let Some(owners) = owners(set, scaled_away, pod, have) else { continue };
            let mut new = (*claim).clone();
            new.metadata.owner_references = (!owners.is_empty()).then_some(owners);
            match ctx.objects.update(&*claim, &new, "").await {
                Err(error) if !is_not_found(&error) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(deleted: &str, scaled: &str) -> StatefulSet {
        let policy = json!({"whenDeleted": deleted, "whenScaled": scaled});
        serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "ns", "uid": "su"}, "spec": {
            "selector": {}, "template": {"spec": {"containers": []}}, "persistentVolumeClaimRetentionPolicy": policy,
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}]}}))
        .unwrap()
    }

    #[test]
    fn the_policy_becomes_an_owner() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "s-1", "uid": "pu"}})).unwrap();
        for (deleted, scaled, away, want) in [
            ("Retain", "Retain", false, ""),
            ("Retain", "Retain", true, ""),
            ("Delete", "Retain", false, "su"),
            ("Delete", "Retain", true, "su"),
            ("Retain", "Delete", false, ""),
            ("Retain", "Delete", true, "pu"),
            ("Delete", "Delete", false, "su"),
            ("Delete", "Delete", true, "pu"),
        ] {
            for before in [vec![], vec![owner_reference(&set("", ""))], vec![owner_reference(&pod)]] {
                let after = owners(&set(deleted, scaled), away, &pod, &before).unwrap_or_else(|| before.clone());
                let uids: Vec<_> = after.iter().map(|o| o.uid.as_str()).collect();
                assert_eq!(uids.join(","), want, "{deleted} {scaled} {away} {before:?}");
            }
        }
        let other: OwnerReference = serde_json::from_value(
            json!({"apiVersion": "v1", "kind": "X", "name": "x", "uid": "xu", "controller": true}),
        )
        .unwrap();
        assert_eq!(owners(&set("Delete", "Delete"), true, &pod, &[other]), None);
        assert_eq!(of(&set("Delete", "Retain"), 1)[0].metadata.owner_references.as_ref().unwrap()[0].uid, "su");
        assert_eq!(of(&set("Retain", "Delete"), 1)[0].metadata.owner_references, None);
    }
}
