//! What a Job's pods mean for it: what is finished, what failed, and what to start or stop now. Pure.

use super::indexes;
use crate::pods;
use isopod_client::objects::HasMeta;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The finalizer that keeps a pod until the Job has counted it.
pub(crate) const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
/// The label and annotation with a pod's index.
pub(crate) const INDEX: &str = "batch.kubernetes.io/job-completion-index";

const BACKOFF_FIRST: i64 = 10;
const BACKOFF_MAX: i64 = 600;

/// The next status and what to do with pods.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) status: JobStatus,
    /// Finished pods that are counted with this status: their finalizers go.
    pub(crate) release: Vec<Arc<Pod>>,
    pub(crate) delete: Vec<Arc<Pod>>,
    /// Pods to create: their index, or none.
    pub(crate) create: Vec<Option<i32>>,
    pub(crate) events: Vec<(&'static str, &'static str, String)>,
    pub(crate) again: Option<Duration>,
}

fn n(value: Option<i32>) -> i32 {
    value.unwrap_or(0)
}

fn some(value: i32) -> Option<i32> {
    (value != 0).then_some(value)
}

fn count(len: usize) -> i32 {
    i32::try_from(len).unwrap_or(i32::MAX)
}

/// A condition that holds.
pub(crate) fn holds<'a>(status: &'a JobStatus, kind: &str) -> Option<&'a JobCondition> {
    status.conditions.as_ref()?.iter().find(|c| c.type_ == kind && c.status == "True")
}

/// Complete or failed for good.
pub(crate) fn is_finished(status: &JobStatus) -> bool {
    holds(status, "Complete").is_some() || holds(status, "Failed").is_some()
}

fn set_condition(status: &mut JobStatus, kind: &str, value: &str, reason: &str, message: &str, now: Timestamp) -> bool {
    let conditions = status.conditions.get_or_insert_default();
    let old = conditions.iter_mut().find(|c| c.type_ == kind);
    if old.as_ref().is_some_and(|c| c.status == value && c.reason.as_deref() == Some(reason)) {
        return false;
    }
    if old.is_none() && value == "False" {
        if conditions.is_empty() {
            status.conditions = None;
        }
        return false;
    }
    let new = JobCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    };
    match old {
        Some(slot) => *slot = new,
        None => conditions.push(new),
    }
    true
}

/// The index of a pod of an indexed Job.
pub(crate) fn index_of(pod: &Pod) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok()
}

fn tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// A pod that is deleted before it succeeds counts as failed.
fn failed(pod: &Pod) -> bool {
    pods::phase(pod) == "Failed" || (pod.deleting() && pods::phase(pod) != "Succeeded" && pods::node(pod).is_empty())
}

/// What the pod failure policy says about a failed pod.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Count,
    Ignore,
    FailIndex,
    FailJob(String),
}

fn verdict(spec: &JobSpec, pod: &Pod) -> Verdict {
    let rules = spec.pod_failure_policy.as_ref().map(|p| p.rules.as_slice()).unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    for (number, rule) in rules.iter().enumerate() {
        let mut text = None;
        if let Some(codes) = &rule.on_exit_codes {
            let containers =
                status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
            for container in containers.filter(|c| codes.container_name.as_ref().is_none_or(|name| *name == c.name)) {
                let Some(ended) = container.state.as_ref().and_then(|s| s.terminated.as_ref()) else { continue };
                let listed = codes.values.contains(&ended.exit_code);
                if ended.exit_code != 0 && listed == (codes.operator == "In") {
                    text = Some(format!(
                        "Container {} for pod {}/{} failed with exit code {} matching {} rule at index {number}",
                        container.name,
                        pod.namespace(),
                        pod.name(),
                        ended.exit_code,
                        rule.action
                    ));
                    break;
                }
            }
        }
        for pattern in rule.on_pod_conditions.iter().flatten() {
            let wanted = pattern.status.as_deref().unwrap_or("True");
            if status.conditions.iter().flatten().any(|c| c.type_ == pattern.type_ && c.status == wanted) {
                text = Some(format!(
                    "Pod {}/{} has condition {} matching {} rule at index {number}",
                    pod.namespace(),
                    pod.name(),
                    pattern.type_,
                    rule.action
                ));
            }
        }
        if let Some(text) = text {
            return match rule.action.as_str() {
                "Ignore" => Verdict::Ignore,
                "FailJob" => Verdict::FailJob(text),
                "FailIndex" => Verdict::FailIndex,
                _ => Verdict::Count,
            };
        }
    }
    Verdict::Count
}

struct View<'a> {
    spec: &'a JobSpec,
    indexed: bool,
    completions: i32,
    now: Timestamp,
}

/// The next step of a Job.
pub(crate) fn plan(job: &Job, owned: &[Arc<Pod>], now: Timestamp) -> Plan {
    let default = JobSpec::default();
    let spec = job.spec.as_ref().unwrap_or(&default);
    let indexed = spec.completion_mode.as_deref() == Some("Indexed");
    let view = View { spec, indexed, completions: spec.completions.unwrap_or(i32::MAX), now };
    let mut plan = Plan { status: job.status.clone().unwrap_or_default(), ..Plan::default() };
    let suspended = spec.suspend.unwrap_or(false);
    if is_finished(&plan.status) {
        plan.release = owned.iter().filter(|p| tracked(p)).cloned().collect();
        plan.delete = owned.iter().filter(|p| pods::is_active(p)).cloned().collect();
        return plan;
    }
    if plan.status.start_time.is_none() && !suspended {
        plan.status.start_time = Some(Time(now));
    }
    let fatal = count_finished(&view, &mut plan, owned);
    let active: Vec<Arc<Pod>> = owned.iter().filter(|p| pods::is_active(p) && !failed(p)).cloned().collect();
    let terminating = owned.iter().filter(|p| pods::is_terminating(p)).count();
    plan.status.ready = Some(count(active.iter().filter(|p| pods::is_ready(p)).count()));
    plan.status.terminating = Some(count(terminating));
    let uncounted = plan.status.uncounted_terminated_pods.clone().unwrap_or_default();
    let waiting = |list: &Option<Vec<String>>| count(list.as_ref().map_or(0, Vec::len));
    let succeeded = n(plan.status.succeeded) + waiting(&uncounted.succeeded);
    let failures = n(plan.status.failed) + waiting(&uncounted.failed);
    decide(&view, &mut plan, fatal, succeeded, failures, active.len());
    if holds(&plan.status, "FailureTarget").is_some() || holds(&plan.status, "SuccessCriteriaMet").is_some() {
        plan.delete = active;
        plan.status.active = None;
        plan.status.ready = Some(0);
        if terminating == 0 && plan.delete.is_empty() && uncounted == UncountedTerminatedPods::default() {
            finish(&mut plan, now);
        }
        return plan;
    }
    if suspended {
        if set_condition(&mut plan.status, "Suspended", "True", "JobSuspended", "Job suspended", now) {
            plan.events.push(("Normal", "Suspended", "Job suspended".into()));
        }
        plan.status.start_time = None;
        plan.delete = active;
        plan.status.active = None;
        plan.status.ready = Some(0);
        return plan;
    }
    if set_condition(&mut plan.status, "Suspended", "False", "JobResumed", "Job resumed", now) {
        plan.events.push(("Normal", "Resumed", "Job resumed".into()));
        plan.status.start_time = Some(Time(now));
    }
    scale(&view, &mut plan, owned, active, succeeded, failures);
    plan
}

/// Moves finished pods from "to be counted" to the counters; returns why the Job fails at once.
fn count_finished(view: &View<'_>, plan: &mut Plan, owned: &[Arc<Pod>]) -> Option<(&'static str, String)> {
    let status = &mut plan.status;
    let mut uncounted = status.uncounted_terminated_pods.take().unwrap_or_default();
    let mut good = uncounted.succeeded.take().unwrap_or_default();
    let mut bad = uncounted.failed.take().unwrap_or_default();
    let waiting = |uid: &String| owned.iter().any(|p| p.uid() == uid && tracked(p));
    let settle = |list: &mut Vec<String>| -> i32 {
        let before = list.len();
        list.retain(waiting);
        count(before - list.len())
    };
    status.failed = some(n(status.failed) + settle(&mut bad));
    let counted = settle(&mut good);
    if !view.indexed {
        status.succeeded = some(n(status.succeeded) + counted);
    }
    let mut done = indexes::parse(status.completed_indexes.as_deref().unwrap_or_default(), view.completions);
    let mut lost = indexes::parse(status.failed_indexes.as_deref().unwrap_or_default(), view.completions);
    let mut fatal = None;
    for pod in owned.iter().filter(|p| tracked(p)) {
        let uid = pod.uid().to_owned();
        if pods::phase(pod) == "Succeeded" {
            if view.indexed {
                // An index counts once, however many pods succeed at it.
                done.extend(index_of(pod).filter(|i| *i < view.completions));
            } else if !good.contains(&uid) {
                good.push(uid);
            }
            plan.release.push(pod.clone());
        } else if failed(pod) {
            match verdict(view.spec, pod) {
                Verdict::FailJob(text) => fatal = Some(("PodFailurePolicy", text)),
                Verdict::FailIndex => lost.extend(index_of(pod)),
                Verdict::Ignore => {
                    plan.release.push(pod.clone());
                    continue;
                }
                Verdict::Count => {}
            }
            if !bad.contains(&uid) {
                bad.push(uid);
            }
            plan.release.push(pod.clone());
        }
    }
    if view.indexed {
        lost.retain(|index| !done.contains(index));
        if let Some(limit) = view.spec.backoff_limit_per_index {
            for index in (0..view.completions.min(100_000)).filter(|i| !done.contains(i)) {
                let times = owned.iter().filter(|p| index_of(p) == Some(index) && failed(p)).count();
                if count(times) > limit {
                    lost.insert(index);
                }
            }
            status.failed_indexes = Some(indexes::render(&lost));
        }
        status.succeeded = some(count(done.len()));
        status.completed_indexes = (!done.is_empty()).then(|| indexes::render(&done));
    }
    // Also an empty one is shown, as upstream does.
    let list = |l: Vec<String>| (!l.is_empty()).then_some(l);
    status.uncounted_terminated_pods = Some(UncountedTerminatedPods { succeeded: list(good), failed: list(bad) });
    fatal
}

/// Whether the Job has come to its end, and which.
fn decide(
    view: &View<'_>,
    plan: &mut Plan,
    fatal: Option<(&'static str, String)>,
    succeeded: i32,
    failures: i32,
    active: usize,
) {
    if holds(&plan.status, "FailureTarget").is_some() || holds(&plan.status, "SuccessCriteriaMet").is_some() {
        return;
    }
    let spec = view.spec;
    let mut fail = fatal;
    let limit = spec.backoff_limit.unwrap_or(6);
    if fail.is_none() && failures > limit {
        fail = Some(("BackoffLimitExceeded", "Job has reached the specified backoff limit".to_owned()));
    }
    if let (None, Some(deadline), Some(start)) = (&fail, spec.active_deadline_seconds, &plan.status.start_time)
        && !spec.suspend.unwrap_or(false)
    {
        let end = start.0 + SignedDuration::from_secs(deadline);
        if view.now >= end {
            fail = Some(("DeadlineExceeded", "Job was active longer than specified deadline".to_owned()));
        } else {
            let wait = u64::try_from(end.duration_since(view.now).as_millis()).unwrap_or(0) + 1;
            plan.again = Some(Duration::from_millis(wait));
        }
    }
    let lost = indexes::parse(plan.status.failed_indexes.as_deref().unwrap_or_default(), view.completions);
    if fail.is_none() && spec.max_failed_indexes.is_some_and(|max| count(lost.len()) > max) {
        let text = "Job has exceeded the specified maximal number of failed indexes".to_owned();
        fail = Some(("MaxFailedIndexesExceeded", text));
    }
    let all_indexes_over = view.indexed && !lost.is_empty() && succeeded + count(lost.len()) >= view.completions;
    if fail.is_none() && all_indexes_over {
        fail = Some(("FailedIndexes", "Job has failed indexes".to_owned()));
    }
    if let Some((reason, text)) = fail {
        set_condition(&mut plan.status, "FailureTarget", "True", reason, &text, view.now);
        return;
    }
    let complete = match spec.completions {
        None => succeeded > 0 && active == 0,
        Some(wanted) => succeeded >= wanted,
    };
    // Also when all have succeeded it is the policy that says so.
    if let Some(rule) = success_rule(view, &plan.status) {
        let text = format!("Matched rules at index {rule}");
        set_condition(&mut plan.status, "SuccessCriteriaMet", "True", "SuccessPolicy", &text, view.now);
    } else if complete {
        let text = "Reached expected number of succeeded pods";
        set_condition(&mut plan.status, "SuccessCriteriaMet", "True", "CompletionsReached", text, view.now);
    }
}

/// The first rule of the success policy that is met.
fn success_rule(view: &View<'_>, status: &JobStatus) -> Option<usize> {
    let policy = view.spec.success_policy.as_ref()?;
    let done = indexes::parse(status.completed_indexes.as_deref().unwrap_or_default(), view.completions);
    policy.rules.iter().position(|rule| {
        let wanted = rule.succeeded_indexes.as_ref().map(|text| indexes::parse(text, view.completions));
        let hit = wanted.as_ref().map_or(done.len(), |wanted| wanted.intersection(&done).count());
        match rule.succeeded_count {
            Some(least) => count(hit) >= least,
            None => wanted.is_some_and(|wanted| hit == wanted.len()),
        }
    })
}

/// All pods are accounted for: the end becomes official.
fn finish(plan: &mut Plan, now: Timestamp) {
    if let Some(target) = holds(&plan.status, "FailureTarget").cloned() {
        let (reason, text) = (target.reason.unwrap_or_default(), target.message.unwrap_or_default());
        set_condition(&mut plan.status, "Failed", "True", &reason, &text, now);
        let known = [
            "BackoffLimitExceeded",
            "DeadlineExceeded",
            "PodFailurePolicy",
            "FailedIndexes",
            "MaxFailedIndexesExceeded",
        ];
        if let Some(reason) = known.into_iter().find(|r| *r == reason) {
            plan.events.push(("Warning", reason, text));
        }
    } else if let Some(target) = holds(&plan.status, "SuccessCriteriaMet").cloned() {
        let (reason, text) = (target.reason.unwrap_or_default(), target.message.unwrap_or_default());
        set_condition(&mut plan.status, "Complete", "True", &reason, &text, now);
        plan.status.completion_time = Some(Time(now));
        plan.events.push(("Normal", "Completed", "Job completed".to_owned()));
    }
}

fn scale(view: &View<'_>, plan: &mut Plan, owned: &[Arc<Pod>], active: Vec<Arc<Pod>>, succeeded: i32, failures: i32) {
    let spec = view.spec;
    let parallelism = spec.parallelism.unwrap_or(1).max(0);
    let mut wanted = match spec.completions {
        None if succeeded > 0 => count(active.len()).min(parallelism),
        None => parallelism,
        Some(total) => parallelism.min((total - succeeded).max(0)),
    };
    // Replacements wait for the end of what they replace when they are asked to.
    if spec.pod_replacement_policy.as_deref() == Some("Failed") {
        wanted = (wanted - n(plan.status.terminating)).max(0);
    }
    let have = count(active.len());
    plan.status.active = some(have.min(wanted));
    if have > wanted {
        let mut sorted = active;
        sorted.sort_by(|a, b| pods::deletion_order(a, 0, b, 0, view.now));
        let kept = sorted.split_off(usize::try_from(have - wanted).unwrap_or(0));
        plan.status.ready = Some(count(kept.iter().filter(|p| pods::is_ready(p)).count()));
        plan.delete = sorted;
        return;
    }
    if have == wanted {
        return;
    }
    if let Some(wait) = backoff(view, owned, failures) {
        plan.again = Some(plan.again.map_or(wait, |a| a.min(wait)));
        return;
    }
    let missing = usize::try_from(wanted - have).unwrap_or(0).min(crate::pod_control::BURST);
    plan.create = if view.indexed {
        let mut taken: BTreeSet<i32> = active.iter().filter_map(|p| index_of(p)).collect();
        taken.extend(indexes::parse(plan.status.completed_indexes.as_deref().unwrap_or_default(), view.completions));
        taken.extend(indexes::parse(plan.status.failed_indexes.as_deref().unwrap_or_default(), view.completions));
        (0..view.completions).filter(|i| !taken.contains(i)).take(missing).map(Some).collect()
    } else {
        vec![None; missing]
    };
    plan.status.active = some(have + count(plan.create.len()));
}

/// How long to wait after the last failure: 10 s, doubled with each, at most ten minutes.
fn backoff(view: &View<'_>, owned: &[Arc<Pod>], failures: i32) -> Option<Duration> {
    let last = owned.iter().filter(|p| failed(p)).filter_map(|p| ended_at(p)).max()?;
    let last_success = owned.iter().filter(|p| pods::phase(p) == "Succeeded").filter_map(|p| ended_at(p)).max();
    if last_success.is_some_and(|at| at > last) || failures == 0 {
        return None;
    }
    let pause = (BACKOFF_FIRST << (failures - 1).clamp(0, 10)).min(BACKOFF_MAX);
    let until = last + SignedDuration::from_secs(pause);
    (until > view.now)
        .then(|| Duration::from_millis(u64::try_from(until.duration_since(view.now).as_millis()).unwrap_or(0) + 1))
}

fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref();
    let ends = statuses.into_iter().flatten().filter_map(|c| {
        let ended = c.state.as_ref()?.terminated.as_ref()?;
        ended.finished_at.as_ref().map(|t| t.0)
    });
    ends.max().or_else(|| pods::condition(pod, "Ready")?.last_transition_time.as_ref().map(|t| t.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn job(spec: serde_json::Value, status: serde_json::Value) -> Job {
        let mut spec = spec;
        spec["template"] = json!({});
        serde_json::from_value(json!({"metadata": {"name": "j", "namespace": "ns", "uid": "j"}, "spec": spec,
            "status": status}))
        .unwrap()
    }

    fn pod(name: &str, phase: &str, index: Option<i32>) -> Arc<Pod> {
        let mut pod = json!({"metadata": {"name": name, "namespace": "ns", "uid": name, "finalizers": [FINALIZER]},
            "spec": {"containers": [], "nodeName": "n"}, "status": {"phase": phase}});
        if let Some(index) = index {
            pod["metadata"]["annotations"] = json!({INDEX: index.to_string()});
        }
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn released(name: &str, phase: &str) -> Arc<Pod> {
        let mut pod = (*pod(name, phase, None)).clone();
        pod.metadata.finalizers = None;
        Arc::new(pod)
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn starts_what_is_missing() {
        let p = plan(&job(json!({"parallelism": 3, "completions": 5}), json!({})), &[pod("a", "Running", None)], now());
        assert_eq!((p.create.len(), p.delete.len(), p.status.active), (2, 0, Some(3)));
        let p = plan(&job(json!({"parallelism": 3, "completions": 5}), json!({"succeeded": 4})), &[], now());
        assert_eq!(p.create.len(), 1);
        let p = plan(&job(json!({"parallelism": 1, "completions": 1, "suspend": true}), json!({})), &[], now());
        assert!(p.create.is_empty() && holds(&p.status, "Suspended").is_some());
    }

    #[test]
    fn a_pod_is_counted_only_when_its_finalizer_is_gone() {
        let spec = json!({"parallelism": 1, "completions": 1});
        let p = plan(&job(spec.clone(), json!({})), &[pod("a", "Succeeded", None)], now());
        assert_eq!((p.release.len(), p.status.succeeded), (1, None));
        assert!(holds(&p.status, "SuccessCriteriaMet").is_some() && holds(&p.status, "Complete").is_none());
        let status = serde_json::to_value(&p.status).unwrap();
        let p = plan(&job(spec, status), &[released("a", "Succeeded")], now());
        assert_eq!(p.status.succeeded, Some(1));
        assert!(holds(&p.status, "Complete").is_some());
        assert!(p.status.completion_time.is_some());
    }

    #[test]
    fn failures_beyond_the_limit_end_it() {
        let spec = json!({"parallelism": 1, "completions": 1, "backoffLimit": 0});
        let p = plan(&job(spec.clone(), json!({})), &[pod("a", "Failed", None), pod("b", "Running", None)], now());
        assert_eq!(p.delete.len(), 1);
        assert_eq!(holds(&p.status, "FailureTarget").and_then(|c| c.reason.as_deref()), Some("BackoffLimitExceeded"));
        let status = serde_json::to_value(&p.status).unwrap();
        let p = plan(&job(spec, status), &[], now());
        assert!(holds(&p.status, "Failed").is_some());
        assert_eq!(p.status.failed, Some(1));
    }

    #[test]
    fn indexes_are_filled_and_counted_once() {
        let spec = json!({"parallelism": 3, "completions": 4, "completionMode": "Indexed"});
        let pods = [pod("a", "Succeeded", Some(0)), pod("b", "Running", Some(2))];
        let p = plan(&job(spec, json!({"completedIndexes": "3", "succeeded": 1})), &pods, now());
        assert_eq!(p.create, [Some(1)]);
        assert_eq!((p.status.completed_indexes.as_deref(), p.status.succeeded), (Some("0,3"), Some(2)));
    }

    #[test]
    fn the_success_policy_has_the_word_also_when_all_succeed() {
        let rules = json!([{"succeededIndexes": "2"}, {"succeededCount": 2}]);
        let pods = [pod("a", "Succeeded", Some(0)), pod("b", "Succeeded", Some(1)), pod("c", "Succeeded", Some(2))];
        for (succeeded, rule) in [(2, 1), (3, 0)] {
            let spec = json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed",
                "successPolicy": {"rules": rules}});
            let p = plan(&job(spec, json!({})), &pods[..succeeded], now());
            let met = holds(&p.status, "SuccessCriteriaMet").unwrap();
            assert_eq!(met.reason.as_deref(), Some("SuccessPolicy"));
            assert_eq!(met.message, Some(format!("Matched rules at index {rule}")));
        }
    }

    #[test]
    fn the_failure_policy_can_ignore_or_end_it() {
        let exit = |action: &str| {
            json!({"parallelism": 1, "completions": 1, "backoffLimit": 0, "podFailurePolicy": {"rules": [
                {"action": action, "onExitCodes": {"operator": "In", "values": [42]}}]}})
        };
        let mut failed = serde_json::to_value(&*pod("a", "Failed", None)).unwrap();
        failed["status"]["containerStatuses"] = json!([{"name": "c", "image": "i", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"terminated": {"exitCode": 42}}}]);
        let failed: Arc<Pod> = Arc::new(serde_json::from_value(failed).unwrap());
        let p = plan(&job(exit("Ignore"), json!({})), std::slice::from_ref(&failed), now());
        assert_eq!((p.create.len(), p.release.len(), p.status.failed), (1, 1, None));
        let p = plan(&job(exit("FailJob"), json!({})), std::slice::from_ref(&failed), now());
        assert_eq!(
            holds(&p.status, "FailureTarget").and_then(|c| c.message.as_deref()),
            Some("Container c for pod ns/a failed with exit code 42 matching FailJob rule at index 0")
        );
    }

    #[test]
    fn the_deadline_is_a_timer_and_then_the_end() {
        let spec = json!({"parallelism": 1, "completions": 1, "activeDeadlineSeconds": 30});
        let p = plan(&job(spec.clone(), json!({"startTime": "2025-12-31T23:59:50Z"})), &[], now());
        assert_eq!(p.again, Some(Duration::from_millis(20_001)));
        let p = plan(&job(spec, json!({"startTime": "2025-12-31T23:59:00Z"})), &[], now());
        assert_eq!(holds(&p.status, "FailureTarget").and_then(|c| c.reason.as_deref()), Some("DeadlineExceeded"));
    }
}
