//! The arithmetic of a Deployment: which ReplicaSet gets how many replicas now. Pure.
//!
//! Worked example: 10 replicas, maxSurge 3, maxUnavailable 2. The new set starts at 3 (13 pods in total), the old one
//! goes to 8; whenever new pods become available, the old set gives as many, and the new one takes what became free.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

/// The revision annotation of Deployments and their ReplicaSets.
pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Earlier revisions a ReplicaSet has had.
pub(crate) const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// The Deployment's replicas when the ReplicaSet was last scaled.
pub(crate) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
/// The most pods the Deployment may have.
pub(crate) const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// The label that keeps the pods of different templates apart.
pub(crate) const HASH: &str = "pod-template-hash";

/// A ReplicaSet as the plan sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Set {
    pub(crate) name: String,
    pub(crate) replicas: i32,
    pub(crate) available: i32,
    pub(crate) created: Option<Timestamp>,
    /// The annotation [`MAX`] (or [`DESIRED`]), for proportional scaling.
    pub(crate) max_replicas: Option<i32>,
    pub(crate) desired: Option<i32>,
}

/// What the plan needs of the Deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Goal {
    pub(crate) replicas: i32,
    pub(crate) rolling: bool,
    pub(crate) max_surge: i32,
    pub(crate) max_unavailable: i32,
}

/// Set this ReplicaSet to that many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    pub(crate) name: String,
    pub(crate) to: i32,
}

fn share(value: Option<&IntOrString>, total: i32, up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(n)) => *n,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent * i64::from(total);
            let n = if up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(n).unwrap_or(i32::MAX)
        }
    }
}

/// A count or percentage of `total`.
pub(crate) fn scaled(value: Option<&IntOrString>, total: i32, up: bool) -> i32 {
    share(value, total, up)
}

impl Goal {
    pub(crate) fn of(d: &Deployment) -> Self {
        let spec = d.spec.clone().unwrap_or_default();
        let replicas = spec.replicas.unwrap_or(1);
        let strategy = spec.strategy.unwrap_or_default();
        let rolling = strategy.type_.as_deref() != Some("Recreate");
        let (mut surge, mut unavailable) = (0, 0);
        if rolling {
            let quarter = IntOrString::String("25%".into());
            let rolling_update = strategy.rolling_update.unwrap_or_default();
            surge = share(Some(rolling_update.max_surge.as_ref().unwrap_or(&quarter)), replicas, true);
            unavailable = share(Some(rolling_update.max_unavailable.as_ref().unwrap_or(&quarter)), replicas, false);
            // Both zero would never make progress.
            if surge == 0 && unavailable == 0 {
                unavailable = 1;
            }
            unavailable = unavailable.min(replicas);
        }
        Self { replicas, rolling, max_surge: surge, max_unavailable: unavailable }
    }

    /// The most pods there may be.
    pub(crate) fn max_replicas(&self) -> i32 {
        self.replicas + self.max_surge
    }
}

impl Set {
    pub(crate) fn of(rs: &ReplicaSet) -> Self {
        let number = |key: &str| annotation(rs, key).and_then(|v| v.parse().ok());
        Self {
            name: rs.metadata.name.clone().unwrap_or_default(),
            replicas: rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1),
            available: rs.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0),
            created: rs.metadata.creation_timestamp.as_ref().map(|t| t.0),
            max_replicas: number(MAX),
            desired: number(DESIRED),
        }
    }
}

/// An annotation of a ReplicaSet.
pub(crate) fn annotation<'a>(rs: &'a ReplicaSet, key: &str) -> Option<&'a str> {
    rs.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn total<'a>(sets: impl IntoIterator<Item = &'a Set>) -> i32 {
    sets.into_iter().map(|s| s.replicas).sum()
}

/// How many replicas the new set may have now.
pub(crate) fn new_set_replicas(goal: &Goal, old: &[Set], new: i32) -> i32 {
    if !goal.rolling {
        return goal.replicas;
    }
    let room = goal.max_replicas() - (total(old) + new);
    if room <= 0 { new } else { new + room.min(goal.replicas - new).max(0) }
}

/// One step of a rolling update: first the new set, and only when that has nothing to do, the old ones.
pub(crate) fn rolling(goal: &Goal, new: &Set, old: &[Set]) -> Vec<Scale> {
    let to = if new.replicas > goal.replicas { goal.replicas } else { new_set_replicas(goal, old, new.replicas) };
    if to != new.replicas {
        return vec![Scale { name: new.name.clone(), to }];
    }
    let mut old = old.to_vec();
    old.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let before: Vec<i32> = old.iter().map(|s| s.replicas).collect();
    shrink_old(goal, new, &mut old);
    let changed = old.iter().zip(before).filter(|(set, before)| set.replicas != *before);
    changed.map(|(set, _)| Scale { name: set.name.clone(), to: set.replicas }).collect()
}

fn shrink_old(goal: &Goal, new: &Set, old: &mut [Set]) {
    if total(&*old) == 0 {
        return;
    }
    let min_available = goal.replicas - goal.max_unavailable;
    let unavailable_new = new.replicas - new.available;
    let spare = total(&*old) + new.replicas - min_available - unavailable_new;
    if spare <= 0 {
        return;
    }
    // Pods that do not work anyway go first: they could block the rollout for ever.
    let mut cleaned = 0;
    for set in old.iter_mut() {
        let unhealthy = (set.replicas - set.available).max(0);
        let take = unhealthy.min(spare - cleaned);
        if take > 0 {
            set.replicas -= take;
            cleaned += take;
        }
    }
    let available = old.iter().map(|s| s.available).sum::<i32>() + new.available;
    let mut excess = available - min_available;
    for set in old.iter_mut() {
        let take = set.replicas.min(excess.max(0));
        set.replicas -= take;
        excess -= take;
    }
}

/// Recreate: the old sets go to nothing; the new one follows when no old pod is left.
pub(crate) fn recreate(old: &[Set]) -> Vec<Scale> {
    old.iter().filter(|s| s.replicas != 0).map(|s| Scale { name: s.name.clone(), to: 0 }).collect()
}

/// The replicas of the Deployment changed: spread the difference without moving the rollout.
pub(crate) fn rescale(goal: &Goal, new: Option<&Set>, old: &[Set]) -> Vec<Scale> {
    let active: Vec<&Set> = new.into_iter().chain(old).filter(|s| s.replicas > 0).collect();
    // At most one set is in use: it takes the whole number.
    let single = match active.as_slice() {
        [] => new.or_else(|| old.iter().max_by(|a, b| a.created.cmp(&b.created))),
        [one] => Some(*one),
        _ => None,
    };
    if let Some(set) = single {
        return if set.replicas == goal.replicas {
            Vec::new()
        } else {
            vec![Scale { name: set.name.clone(), to: goal.replicas }]
        };
    }
    if new.is_some_and(|n| saturated(goal, n)) {
        return recreate(old);
    }
    if goal.rolling { proportional(goal, active) } else { Vec::new() }
}

fn saturated(goal: &Goal, new: &Set) -> bool {
    new.replicas == goal.replicas && new.desired == Some(goal.replicas) && new.available == goal.replicas
}

fn proportional(goal: &Goal, mut sets: Vec<&Set>) -> Vec<Scale> {
    let allowed = if goal.replicas > 0 { goal.max_replicas() } else { 0 };
    let to_add = allowed - total(sets.iter().copied());
    // The larger sets bear more; among equals the newer when growing, the older when shrinking.
    sets.sort_by(|a, b| {
        let age = if to_add > 0 { b.created.cmp(&a.created) } else { a.created.cmp(&b.created) };
        b.replicas.cmp(&a.replicas).then(age)
    });
    let mut left = to_add;
    let mut result: Vec<(&Set, i32)> = Vec::new();
    for set in &sets {
        let mut part = 0;
        if left != 0 {
            let before = set.max_replicas.or(set.desired).unwrap_or(goal.replicas).max(1);
            let size = f64::from(set.replicas) * f64::from(allowed) / f64::from(before);
            // Rounds to a whole number well inside i32.
            part = (size.round() as i32) - set.replicas;
            part = if to_add > 0 { part.min(left).max(0) } else { part.max(left).min(0) };
        }
        left -= part;
        result.push((set, set.replicas + part));
    }
    if let Some(first) = result.first_mut() {
        first.1 = (first.1 + left).max(0);
    }
    result
        .into_iter()
        .filter(|(set, to)| set.replicas != *to || set.desired != Some(goal.replicas))
        .map(|(set, to)| Scale { name: set.name.clone(), to })
        .collect()
}

/// The template without the label that the controller adds.
fn bare(template: &PodTemplateSpec) -> Value {
    let mut value = serde_json::to_value(template).unwrap_or_default();
    if let Some(labels) = value.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.shift_remove(HASH);
        if labels.is_empty()
            && let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut)
        {
            meta.shift_remove("labels");
        }
    }
    if value.get("metadata").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty)
        && let Some(template) = value.as_object_mut()
    {
        template.shift_remove("metadata");
    }
    value
}

/// Whether two templates make the same pods.
pub(crate) fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    bare(a) == bare(b)
}

/// A short name for a template: FNV-1a of its canonical form and the collision count, in letters that make no words.
pub(crate) fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut hash = fnv(2_166_136_261, bare(template).to_string().as_bytes());
    if let Some(collisions) = collisions {
        hash = fnv(hash, &collisions.to_le_bytes());
    }
    safe_encode(&hash.to_string())
}

fn fnv(mut hash: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        hash = (hash ^ u32::from(*byte)).wrapping_mul(16_777_619);
    }
    hash
}

/// Hashes any text the way names of revisions are made.
pub(crate) fn short_hash(text: &str, collisions: Option<i32>) -> String {
    let mut hash = fnv(2_166_136_261, text.as_bytes());
    if let Some(collisions) = collisions {
        hash = fnv(hash, &collisions.to_le_bytes());
    }
    safe_encode(&hash.to_string())
}

/// Replaces every byte by one of 27 letters and digits.
pub(crate) fn safe_encode(text: &str) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    text.bytes().map(|b| char::from(ALPHABET[usize::from(b) % ALPHABET.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(name: &str, replicas: i32, available: i32) -> Set {
        Set { name: name.into(), replicas, available, created: None, max_replicas: Some(13), desired: Some(10) }
    }

    fn goal(replicas: i32, max_surge: i32, max_unavailable: i32) -> Goal {
        Goal { replicas, rolling: true, max_surge, max_unavailable }
    }

    fn render(scales: &[Scale]) -> String {
        scales.iter().map(|s| format!("{}={}", s.name, s.to)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn rolling_update_steps() {
        for (goal, new, old, want) in [
            (goal(10, 3, 2), set("new", 0, 0), vec![set("old", 10, 10)], "new=3"),
            (goal(10, 3, 2), set("new", 3, 0), vec![set("old", 10, 10)], "old=8"),
            (goal(10, 3, 2), set("new", 3, 0), vec![set("old", 8, 8)], "new=5"),
            (goal(10, 3, 2), set("new", 5, 0), vec![set("old", 8, 8)], ""),
            (goal(10, 3, 2), set("new", 5, 5), vec![set("old", 8, 8)], "old=3"),
            (goal(10, 3, 2), set("new", 10, 10), vec![set("old", 3, 3)], "old=0"),
            (goal(10, 3, 2), set("new", 12, 12), vec![], "new=10"),
            // Broken old pods go first although nothing new is available.
            (goal(10, 0, 2), set("new", 2, 0), vec![set("old", 8, 2)], ""),
            (goal(3, 1, 0), set("new", 1, 0), vec![set("old", 3, 2)], ""),
            (goal(3, 1, 0), set("new", 1, 1), vec![set("old", 3, 2)], "old=2"),
            (goal(1, 1, 0), set("new", 1, 1), vec![set("old", 1, 1)], "old=0"),
        ] {
            assert_eq!(render(&rolling(&goal, &new, &old)), want, "{goal:?} {new:?} {old:?}");
        }
    }

    #[test]
    fn a_rollout_always_ends() {
        for (replicas, surge, unavailable) in [(10, 3, 2), (1, 1, 0), (5, 0, 1), (7, 7, 7)] {
            let goal = goal(replicas, surge, unavailable);
            let (mut new, mut old) = (set("new", 0, 0), set("old", replicas, replicas));
            for _ in 0..100 {
                for scale in rolling(&goal, &new, std::slice::from_ref(&old)) {
                    let set = if scale.name == "new" { &mut new } else { &mut old };
                    set.replicas = scale.to;
                    set.available = set.available.min(scale.to);
                }
                assert!(new.replicas + old.replicas <= goal.max_replicas());
                assert!(new.available + old.available >= replicas - unavailable);
                new.available = new.replicas;
            }
            assert_eq!((new.replicas, old.replicas), (replicas, 0), "{goal:?}");
        }
    }

    #[test]
    fn scaling_in_mid_rollout_is_proportional() {
        let mut goal = goal(20, 6, 4);
        assert_eq!(render(&rescale(&goal, Some(&set("new", 5, 5)), &[set("old", 8, 8)])), "old=16 new=10");
        assert_eq!(render(&rescale(&goal, Some(&set("new", 10, 10)), &[])), "new=20");
        goal.replicas = 0;
        assert_eq!(render(&rescale(&goal, Some(&set("new", 5, 5)), &[set("old", 8, 8)])), "old=0 new=0");
    }

    #[test]
    fn percentages_round_in_favour_of_progress() {
        let d: Deployment = serde_json::from_value(json!({"metadata": {}, "spec": {"replicas": 3, "selector": {},
            "template": {}, "strategy": {"type": "RollingUpdate", "rollingUpdate":
            {"maxSurge": "25%", "maxUnavailable": "25%"}}}}))
        .unwrap();
        assert_eq!(Goal::of(&d), goal(3, 1, 0));
    }

    #[test]
    fn the_hash_ignores_its_own_label_and_follows_the_template() {
        let template = |image: &str, hash: Option<&str>| -> PodTemplateSpec {
            serde_json::from_value(json!({"metadata": {"labels": {"a": "b", "pod-template-hash": hash}},
                "spec": {"containers": [{"name": "c", "image": image}]}}))
            .unwrap_or_else(|_| {
                serde_json::from_value(json!({"metadata": {"labels": {"a": "b"}},
                    "spec": {"containers": [{"name": "c", "image": image}]}}))
                .unwrap()
            })
        };
        let (plain, labelled) = (template("x", None), template("x", Some("h")));
        assert!(same_template(&plain, &labelled));
        assert_eq!(template_hash(&plain, None), template_hash(&labelled, None));
        assert_ne!(template_hash(&plain, None), template_hash(&template("y", None), None));
        assert_ne!(template_hash(&plain, None), template_hash(&plain, Some(1)));
        assert!(template_hash(&plain, None).len() <= 10);
    }
}
