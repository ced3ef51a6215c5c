//! What a Deployment says about itself: counts and the conditions Available, Progressing and ReplicaFailure. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::time::Duration;

use super::plan::Goal;

fn some(n: i32) -> Option<i32> {
    (n != 0).then_some(n)
}

/// A condition of a status.
pub(crate) fn condition<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.as_ref()?.iter().find(|c| c.type_ == kind)
}

/// Puts a condition in place; times move only when the status (transition) or reason (update) does.
pub(crate) fn set_condition(
    status: &mut DeploymentStatus,
    kind: &str,
    value: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let old = condition(status, kind).cloned();
    if old.as_ref().is_some_and(|c| c.status == value && c.reason.as_deref() == Some(reason)) {
        return;
    }
    let same = old.filter(|c| c.status == value).and_then(|c| c.last_transition_time);
    let new = DeploymentCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(now)),
        last_transition_time: same.or(Some(Time(now))),
    };
    let conditions = status.conditions.get_or_insert_default();
    conditions.retain(|c| c.type_ != kind);
    conditions.push(new);
}

fn remove_condition(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = status.conditions.as_mut() {
        conditions.retain(|c| c.type_ != kind);
    }
}

fn sum(sets: &[&ReplicaSet], f: impl Fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> i32) -> i32 {
    sets.iter().filter_map(|rs| rs.status.as_ref()).map(f).sum()
}

/// Counts, Available, and what carries over.
pub(crate) fn counts(
    d: &Deployment,
    new: Option<&ReplicaSet>,
    all: &[&ReplicaSet],
    now: Timestamp,
) -> DeploymentStatus {
    let goal = Goal::of(d);
    let old = d.status.clone().unwrap_or_default();
    let spec_total: i32 = all.iter().map(|rs| rs.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)).sum();
    let available = sum(all, |s| s.available_replicas.unwrap_or(0));
    let mut status = DeploymentStatus {
        observed_generation: d.metadata.generation,
        replicas: some(sum(all, |s| s.replicas)),
        updated_replicas: some(new.map_or(0, |rs| sum(&[rs], |s| s.replicas))),
        ready_replicas: some(sum(all, |s| s.ready_replicas.unwrap_or(0))),
        available_replicas: some(available),
        unavailable_replicas: some((spec_total - available).max(0)),
        terminating_replicas: all
            .iter()
            .all(|rs| rs.status.as_ref().is_some_and(|s| s.terminating_replicas.is_some()))
            .then(|| sum(all, |s| s.terminating_replicas.unwrap_or(0))),
        collision_count: old.collision_count,
        conditions: old.conditions,
    };
    if available >= goal.replicas - goal.max_unavailable {
        let text = "Deployment has minimum availability.";
        set_condition(&mut status, "Available", "True", "MinimumReplicasAvailable", text, now);
    } else {
        let text = "Deployment does not have minimum availability.";
        set_condition(&mut status, "Available", "False", "MinimumReplicasUnavailable", text, now);
    }
    status
}

/// Every wanted pod is of the new template and available, and no other pod is left.
pub(crate) fn complete(d: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = Goal::of(d).replicas;
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation.unwrap_or(0) >= d.metadata.generation.unwrap_or(0)
}

fn progressing(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let n = |v: Option<i32>| v.unwrap_or(0);
    n(new.updated_replicas) > n(old.updated_replicas)
        || n(new.replicas) - n(new.updated_replicas) < n(old.replicas) - n(old.updated_replicas)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

/// The deadline, when one is set.
pub(crate) fn deadline(d: &Deployment) -> Option<i64> {
    let seconds = d.spec.as_ref()?.progress_deadline_seconds?;
    (seconds != i32::MAX).then_some(i64::from(seconds))
}

fn timed_out(d: &Deployment, status: &DeploymentStatus, now: Timestamp) -> bool {
    let Some(seconds) = deadline(d) else { return false };
    let Some(condition) = condition(status, "Progressing") else { return false };
    match condition.reason.as_deref() {
        Some("NewReplicaSetAvailable") => return false,
        Some("ProgressDeadlineExceeded") => return true,
        _ => {}
    }
    condition.last_update_time.as_ref().is_some_and(|t| t.0 + SignedDuration::from_secs(seconds) < now)
}

/// The whole status of a rollout.
pub(crate) fn rollout(
    d: &Deployment,
    new: Option<&ReplicaSet>,
    all: &[&ReplicaSet],
    now: Timestamp,
) -> DeploymentStatus {
    let mut status = counts(d, new, all, now);
    let old = d.status.clone().unwrap_or_default();
    let current = condition(&old, "Progressing").cloned();
    let settled = status.replicas == status.updated_replicas
        && current.as_ref().is_some_and(|c| c.reason.as_deref() == Some("NewReplicaSetAvailable"));
    if deadline(d).is_none() {
        remove_condition(&mut status, "Progressing");
    } else if !settled {
        let subject = match new {
            Some(rs) => format!("ReplicaSet \"{}\"", rs.metadata.name.as_deref().unwrap_or_default()),
            None => format!("Deployment \"{}\"", d.metadata.name.as_deref().unwrap_or_default()),
        };
        if complete(d, &status) {
            let text = format!("{subject} has successfully progressed.");
            set_condition(&mut status, "Progressing", "True", "NewReplicaSetAvailable", &text, now);
        } else if progressing(&old, &status) {
            let text = format!("{subject} is progressing.");
            // Progress restarts the deadline, also when nothing else about the condition changes.
            let since = current.filter(|c| c.status == "True").and_then(|c| c.last_transition_time);
            remove_condition(&mut status, "Progressing");
            set_condition(&mut status, "Progressing", "True", "ReplicaSetUpdated", &text, now);
            if let (Some(since), Some(c)) = (since, status.conditions.as_mut().and_then(|c| c.last_mut())) {
                c.last_transition_time = Some(since);
            }
        } else if timed_out(d, &status, now) {
            let text = format!("{subject} has timed out progressing.");
            set_condition(&mut status, "Progressing", "False", "ProgressDeadlineExceeded", &text, now);
        }
    }
    let failures = all.iter().filter_map(|rs| rs.status.as_ref()?.conditions.as_ref());
    let failure = failures.flatten().find(|c| c.type_ == "ReplicaFailure").cloned();
    match failure {
        Some(c) => {
            let (reason, message) = (c.reason.unwrap_or_default(), c.message.unwrap_or_default());
            set_condition(&mut status, "ReplicaFailure", &c.status, &reason, &message, now);
        }
        None => remove_condition(&mut status, "ReplicaFailure"),
    }
    status
}

/// When to look at the deadline again.
pub(crate) fn recheck(d: &Deployment, status: &DeploymentStatus, now: Timestamp) -> Option<Duration> {
    let seconds = deadline(d)?;
    let progressing = condition(status, "Progressing")?;
    if complete(d, status)
        || matches!(progressing.reason.as_deref(), Some("ProgressDeadlineExceeded" | "NewReplicaSetAvailable"))
    {
        return None;
    }
    let at = progressing.last_update_time.as_ref()?.0 + SignedDuration::from_secs(seconds + 1);
    Some(Duration::from_millis(u64::try_from(at.duration_since(now).as_millis()).unwrap_or(0).max(1000)))
}
