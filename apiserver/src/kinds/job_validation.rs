//! Validation of Jobs (and of the Job templates of CronJobs).

use isopod_api::names;
use serde_json::{Value, json};

use super::{job_indexes, pod_defaults};
use crate::validation::{
    At, Errs, IMMUTABLE, internal, meta, same, selector,
    template::{labels_match, pod_template, sorted},
};

/// A new Job.
pub(crate) fn create(e: &mut Errs, obj: &Value) {
    generated_selector(e, obj);
    job_spec(e, obj);
}

fn job_spec(e: &mut Errs, obj: &Value) {
    let at = At::field(obj, "spec");
    spec(e, &at);
    let indexed = at.get("completionMode").s() == "Indexed";
    if indexed && let Some(n) = at.get("completions").int().filter(|n| *n > 0) {
        let name = obj["metadata"]["name"].as_str().unwrap_or_default();
        let hostname = format!("{name}-{}", n - 1);
        let messages = names::dns1123_label(&hostname);
        if !messages.is_empty() {
            let detail =
                format!("will not able to create pod with invalid DNS label {hostname:?}: {}", messages.join(", "));
            e.invalid(&At::field(obj, "metadata").get("name"), &detail);
        }
    }
}

/// Without manualSelector the selector and the template's labels must be the generated ones.
fn generated_selector(e: &mut Errs, obj: &Value) {
    let at = At::field(obj, "spec");
    if at.get("manualSelector").is_true() || !at.get("selector").is_set() {
        return;
    }
    let uid = obj["metadata"]["uid"].as_str().unwrap_or_default();
    let name = obj["metadata"]["name"].as_str().unwrap_or_default();
    let labels = at.get("template.metadata.labels");
    for (label, value) in [
        ("batch.kubernetes.io/controller-uid", uid),
        ("batch.kubernetes.io/job-name", name),
        ("controller-uid", uid),
        ("job-name", name),
    ] {
        let got = labels.v.get(label).and_then(Value::as_str);
        if got.is_none_or(|got| got != value) && !(labels.v.get(label).is_none() && label.starts_with("batch.")) {
            let at = labels.key(label);
            match got {
                None => e.required(&at, &format!("must be '{value}'")),
                Some(_) => e.invalid_str(&at, &format!("must be '{value}'")),
            }
        }
    }
    let mut wanted = [
        json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}),
        json!({"matchLabels": {"controller-uid": uid}}),
    ]
    .into_iter();
    let selector_at = at.get("selector");
    if !wanted.any(|w| same(&w, selector_at.v)) {
        let mut shown = selector_at.v.clone();
        if let Some(map) = shown.get_mut("matchLabels") {
            *map = sorted(map);
        }
        e.invalid_as(&selector_at, shown, "`selector` not auto-generated");
    }
}

/// The spec without what only whole Jobs have.
fn template_spec(e: &mut Errs, at: &At<'_>) {
    let indexed = at.get("completionMode").s() == "Indexed";
    for field in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
    ] {
        e.non_negative(&at.get(field));
    }
    let per_index = at.get("backoffLimitPerIndex");
    if per_index.is_set() && !indexed {
        e.invalid(&per_index, "requires indexed completion mode");
    }
    let max_failed = at.get("maxFailedIndexes");
    if max_failed.is_set() {
        e.non_negative(&max_failed);
        if !per_index.is_set() {
            e.required(&per_index, "when maxFailedIndexes is specified");
        }
        if at.get("completions").int().is_some_and(|n| max_failed.int0() > n) {
            e.invalid(&max_failed, "must be less than or equal to completions");
        }
        if max_failed.int0() > 100_000 {
            e.invalid(&max_failed, "must be less than or equal to 100000");
        }
    }
    let manager = at.get("managedBy");
    if manager.is_set() {
        super::networking::domain_path(e, &manager);
        if manager.s().len() > 63 {
            e.too_long(&manager, 63);
        }
    }
    let mode = at.get("completionMode");
    if mode.is_set() {
        e.one_of(&mode, &["NonIndexed", "Indexed"]);
        if indexed {
            if !at.get("completions").is_set() {
                e.required(&at.get("completions"), &format!("when completion mode is {}", mode.s()));
            }
            if at.get("parallelism").int0() > 100_000 {
                e.invalid(
                    &at.get("parallelism"),
                    "must be less than or equal to 100000 when completion mode is Indexed",
                );
            }
            many_indexes(e, at);
        }
    }
    failure_policy(e, at);
    success_policy(e, at, indexed);
    let replacement = at.get("podReplacementPolicy");
    if replacement.is_set() {
        if at.get("podFailurePolicy").is_set() {
            if replacement.s() != "Failed" {
                e.unsupported(&replacement, &["Failed"]);
            }
        } else {
            e.one_of(&replacement, &["Failed", "TerminatingOrFailed"]);
        }
    }
}

/// Many indexes with a limit for each must say how many may fail, and not run too wide.
fn many_indexes(e: &mut Errs, at: &At<'_>) {
    let (wide, failed) = (at.get("parallelism"), at.get("maxFailedIndexes"));
    if !at.get("backoffLimitPerIndex").is_set() || at.get("completions").int0() <= 100_000 {
        return;
    }
    if !failed.is_set() {
        e.required(&failed, "must be specified when completions is above 100000");
    }
    let both = "when completions are above 100000 and used with backoff limit per index";
    for limited in [wide, failed] {
        if limited.int0() > 10_000 {
            e.invalid(&limited, &format!("must be less than or equal to 10000 {both}"));
        }
    }
}

/// A whole spec: the above, the selector and the template.
fn spec(e: &mut Errs, at: &At<'_>) {
    template_spec(e, at);
    let selector_at = at.get("selector");
    if !selector_at.is_set() {
        e.required(&selector_at, "");
    } else {
        selector::label_selector(e, &selector_at);
    }
    let template = at.get("template");
    let matched =
        selector_at.is_set() && selector::matches(selector_at.v, template.get("metadata.labels").v).unwrap_or(true);
    labels_match(e, &template, matched);
    template_and_policy(e, at);
}

fn template_and_policy(e: &mut Errs, at: &At<'_>) {
    let template = at.get("template");
    pod_template(e, &template);
    let policy = template.get("spec.restartPolicy");
    if !["OnFailure", "Never"].contains(&policy.s()) {
        if policy.s() == "Always" {
            e.required(&policy, "valid values: \"OnFailure\", \"Never\"");
        } else {
            e.unsupported(&policy, &["Never", "OnFailure"]);
        }
    } else if at.get("podFailurePolicy").is_set() && policy.s() != "Never" {
        e.invalid(&policy, "only \"Never\" is supported when podFailurePolicy is specified");
    }
}

/// `jobTemplate` of a CronJob.
pub(crate) fn cron_template(e: &mut Errs, at: &At<'_>) {
    let metadata = At::new(at.path.clone(), at.v.get("metadata").unwrap_or(&Value::Null));
    meta::labels(e, &metadata.get("labels"));
    meta::annotations(e, &metadata.get("annotations"));
    let spec = at.get("spec");
    template_spec(e, &spec);
    template_and_policy(e, &spec);
    let selector_at = spec.get("selector");
    if selector_at.is_set() {
        e.invalid(&selector_at, "`selector` will be auto-generated");
    }
    let manual = spec.get("manualSelector");
    if manual.is_true() {
        e.unsupported(&manual, &["nil", "false"]);
    }
}

fn failure_policy(e: &mut Errs, spec: &At<'_>) {
    let rules = spec.get("podFailurePolicy.rules");
    if rules.len() > 20 {
        e.too_many(&rules, rules.len(), 20);
    }
    let template = spec.get("template.spec");
    let containers: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|l| template.get(l).items())
        .map(|c| c.get("name").s())
        .collect();
    for at in rules.items() {
        let (action, codes, conditions) = (at.get("action"), at.get("onExitCodes"), at.get("onPodConditions"));
        match action.s() {
            "" => e.required(&action, "valid values: [\"Count\" \"FailIndex\" \"FailJob\" \"Ignore\"]"),
            "FailIndex" if !spec.get("backoffLimitPerIndex").is_set() => {
                e.invalid(&action, "requires the backoffLimitPerIndex to be set");
            }
            _ => e.one_of(&action, &["Count", "FailIndex", "FailJob", "Ignore"]),
        }
        if codes.is_set() {
            exit_codes(e, &codes, &containers);
        }
        if conditions.len() > 20 {
            e.too_many(&conditions, conditions.len(), 20);
        }
        for condition in conditions.items() {
            e.qualified_name(&condition.get("type"));
            e.required_one_of(&condition.get("status"), &["False", "True", "Unknown"]);
        }
        let has_conditions = conditions.len() > 0;
        if codes.is_set() && has_conditions {
            e.invalid_structure(&at, "specifying both OnExitCodes and OnPodConditions is not supported");
        }
        if !codes.is_set() && !has_conditions {
            e.invalid_structure(&at, "specifying one of OnExitCodes and OnPodConditions is required");
        }
    }
}

fn exit_codes(e: &mut Errs, at: &At<'_>, containers: &[&str]) {
    let operator = at.get("operator");
    if operator.s().is_empty() {
        e.required(&operator, "valid values: [\"In\" \"NotIn\"]");
    } else {
        e.one_of(&operator, &["In", "NotIn"]);
    }
    let container = at.get("containerName");
    if container.is_set() && !containers.contains(&container.s()) {
        e.invalid(&container, "must be one of the container or initContainer names in the pod template");
    }
    let values = at.get("values");
    let numbers: Vec<i64> = values.items().iter().map(At::int0).collect();
    if numbers.is_empty() {
        e.invalid_as(&values, json!(numbers), "at least one value is required");
    } else if numbers.len() > 255 {
        e.too_many(&values, numbers.len(), 255);
    }
    let mut seen = std::collections::BTreeSet::new();
    for item in values.items() {
        if operator.s() == "In" && item.int0() == 0 {
            e.invalid(&item, "must not be 0 for the In operator");
        }
        if !seen.insert(item.int0()) {
            e.duplicate(&item, item.int0());
        }
    }
    if !numbers.is_sorted() {
        e.invalid(&values, "must be ordered");
    }
}

fn success_policy(e: &mut Errs, spec: &At<'_>, indexed: bool) {
    let at = spec.get("successPolicy");
    if !at.is_set() {
        return;
    }
    let rules = at.get("rules");
    if !indexed {
        let shown: Vec<Value> = rules
            .items()
            .iter()
            .map(|r| json!({"SucceededIndexes": r.get("succeededIndexes").v, "SucceededCount": r.get("succeededCount").v}))
            .collect();
        e.invalid_as(&at, json!({"Rules": shown}), "requires indexed completion mode");
        return;
    }
    if rules.len() == 0 {
        e.required(&rules, "at least one rules must be specified when the successPolicy is specified");
    }
    if rules.len() > 20 {
        e.too_many(&rules, rules.len(), 20);
    }
    for rule in rules.items() {
        let (indexes, count) = (rule.get("succeededIndexes"), rule.get("succeededCount"));
        if !indexes.is_set() && !count.is_set() {
            e.required(&rule, "at least one of succeededCount or succeededIndexes must be specified");
        }
        let mut named = None;
        if indexes.is_set() {
            match job_indexes::count(indexes.s(), spec.get("completions").int0()) {
                Ok(total) => named = Some(total),
                Err(why) => e.invalid(&indexes, &format!("error parsing succeededIndexes: {why}")),
            }
        }
        if let Some(n) = count.int() {
            e.non_negative(&count);
            if spec.get("completions").int().is_some_and(|c| n > c) {
                let detail = format!(
                    "must be less than or equal to {} (the number of specified completions)",
                    spec.get("completions").int0()
                );
                e.invalid(&count, &detail);
            }
            if let Some(total) = named.filter(|total| n > *total) {
                let detail = format!(
                    "must be less than or equal to {total} (the number of indexes in the specified succeededIndexes field)"
                );
                e.invalid(&count, &detail);
            }
        }
    }
}

/// A changed Job.
pub(crate) fn update(e: &mut Errs, new: &Value, old: &Value) {
    let (at, before) = (At::field(new, "spec"), At::field(old, "spec"));
    job_spec(e, new);
    // Upstream validates the spec twice on updates.
    spec(e, &at);
    completions(e, &at, &before);
    e.immutable(&at.get("selector"), before.get("selector").v);
    template(e, new, old);
    e.immutable(&at.get("completionMode"), before.get("completionMode").v);
    policy(e, &at.get("podFailurePolicy"), before.get("podFailurePolicy").v, "JobFailurePolicy");
    e.immutable(&at.get("backoffLimitPerIndex"), before.get("backoffLimitPerIndex").v);
    e.immutable(&at.get("managedBy"), before.get("managedBy").v);
    policy(e, &at.get("successPolicy"), before.get("successPolicy").v, "JobSuccessPolicy");
}

fn policy(e: &mut Errs, at: &At<'_>, before: &Value, shown: &str) {
    if !same(at.v, before) {
        let value = if at.is_set() { internal::named(shown, at.v) } else { Value::Null };
        e.invalid_as(at, value, IMMUTABLE);
    }
}

fn completions(e: &mut Errs, at: &At<'_>, before: &At<'_>) {
    let (new, old) = (at.get("completions"), before.get("completions"));
    if same(new.v, old.v) {
        return;
    }
    if at.get("completionMode").s() != "Indexed" {
        return e.invalid(&new, IMMUTABLE);
    }
    if !same(at.get("completions").v, at.get("parallelism").v) {
        e.invalid(&new, "can only be modified in tandem with spec.parallelism");
    }
}

/// The template may only change its scheduling directives and what containers ask for, and only while the Job is
/// suspended and has nothing running.
fn template(e: &mut Errs, new: &Value, old: &Value) {
    let at = At::field(new, "spec").get("template");
    let mut compare = old["spec"]["template"].clone();
    let status = &old["status"];
    let idle = status["startTime"].is_null() || holds(old, "Suspended", "True");
    if old["spec"]["suspend"] != true || !idle || status["active"].as_i64().unwrap_or_default() != 0 {
        if !same(at.v, &compare) {
            e.invalid_as(&at, internal::pod_template(at.v), IMMUTABLE);
        }
        return;
    }
    let spec = at.get("spec");
    for field in ["nodeSelector", "tolerations", "schedulingGates"] {
        compare["spec"][field] = spec.get(field).v.clone();
    }
    // Of the affinity only the part about nodes is free.
    compare["spec"]["affinity"]["nodeAffinity"] = spec.get("affinity.nodeAffinity").v.clone();
    pod_defaults::drop_nulls(&mut compare["spec"]["affinity"]);
    for list in ["containers", "initContainers"] {
        let own = spec.get(list).items();
        let same_number = compare["spec"][list].as_array().is_some_and(|before| before.len() == own.len());
        for (before, own) in compare["spec"][list].as_array_mut().into_iter().flatten().zip(own) {
            if same_number && before["name"] == own.v["name"] {
                before["resources"] = own.get("resources").v.clone();
            }
        }
    }
    if !same(spec.v, &compare["spec"]) {
        e.invalid_as(&spec, internal::pod_spec(spec.v), IMMUTABLE);
    }
}

/// Whether a condition holds.
fn holds(obj: &Value, kind: &str, status: &str) -> bool {
    obj["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == kind && c["status"] == status)
}

/// Completed or failed for good.
fn finished(obj: &Value) -> bool {
    holds(obj, "Complete", "True") || holds(obj, "Failed", "True")
}

/// A changed status. What was wrong before may stay, unless what it depends on changes.
pub(crate) fn status(e: &mut Errs, new: &Value, old: &Value) {
    let (at, before) = (At::field(new, "status"), At::field(old, "status"));
    for field in ["active", "succeeded", "failed", "ready", "terminating"] {
        e.non_negative(&at.get(field));
    }
    uncounted_once(e, &at.get("uncountedTerminatedPods"));
    let is = |kind: &str| holds(new, kind, "True");
    let was = |kind: &str| holds(old, kind, "True");
    let turned = |kind: &str| is(kind) != was(kind);
    let changed = |field: &str| !same(at.get(field).v, before.get(field).v);
    let ends = finished(new) != finished(old);
    let conditions = at.get("conditions");
    let both = |e: &mut Errs, one: &str, other: &str| {
        if is(one) && is(other) {
            e.invalid_structure(&conditions, &format!("cannot set {one}=True and {other}=true conditions"));
        }
    };
    let needs = |e: &mut Errs, one: &str, other: &str| {
        if is(one) && !is(other) {
            let detail = format!("cannot set {one}=True condition without the {other}=true condition");
            e.invalid_structure(&conditions, &detail);
        }
    };
    if turned("Complete") || turned("Failed") {
        both(e, "Complete", "Failed");
    }
    if turned("Complete") || turned("FailureTarget") {
        both(e, "Complete", "FailureTarget");
    }
    completion_time(e, &at, is("Complete"), turned("Complete"), &changed);
    if turned("Failed") || changed("failedIndexes") {
        needs(e, "Failed", "FailureTarget");
    }
    if turned("Complete") || turned("SuccessCriteriaMet") {
        needs(e, "Complete", "SuccessCriteriaMet");
    }
    if finished(new) {
        at_the_end(e, &at, new, &|field| ends || changed(field));
    }
    status_indexes(e, &at, new, &changed);
    if finished(new) && (ends || changed("terminating")) && at.get("terminating").int0() > 0 {
        e.invalid(&at.get("terminating"), "terminating>0 is invalid for finished job");
    }
    let (ready, active) = (at.get("ready"), at.get("active"));
    if (changed("ready") || changed("active")) && ready.int().is_some_and(|n| n > active.int0()) {
        e.invalid(&ready, "cannot set more ready pods than active");
    }
    both(e, "SuccessCriteriaMet", "Failed");
    both(e, "SuccessCriteriaMet", "FailureTarget");
    if !new["spec"]["successPolicy"].is_null() && is("Complete") && !is("SuccessCriteriaMet") {
        let detail = "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True";
        e.invalid_structure(&conditions, detail);
    }
    for kind in ["Failed", "Complete", "FailureTarget"] {
        if was(kind) && !is(kind) {
            e.invalid_structure(&conditions, &format!("cannot disable the terminal {kind}=True condition"));
        }
    }
    counters(e, &at, &before, new, old);
    if was("SuccessCriteriaMet") && !is("SuccessCriteriaMet") {
        e.invalid_structure(&conditions, "cannot disable the SuccessCriteriaMet=True condition");
    }
    if was("Complete") && !was("SuccessCriteriaMet") && is("SuccessCriteriaMet") {
        let detail = "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions";
        e.invalid_structure(&conditions, detail);
    }
}

/// Each pod waits to be counted once.
fn uncounted_once(e: &mut Errs, at: &At<'_>) {
    let mut seen = std::collections::BTreeSet::new();
    for pod in ["succeeded", "failed"].iter().flat_map(|list| at.get(list).items()) {
        if pod.s().is_empty() {
            e.invalid_str(&pod, "must not be empty");
        } else if !seen.insert(pod.s()) {
            e.duplicate(&pod, pod.s());
        }
    }
}

/// A Job has a time of completion when it is complete, and it is not before its start.
fn completion_time(e: &mut Errs, status: &At<'_>, complete: bool, turned: bool, changed: &dyn Fn(&str) -> bool) {
    let at = status.get("completionTime");
    if turned || changed("completionTime") {
        if at.is_set() && !complete {
            e.invalid(&at, "cannot set completionTime when there is no Complete=True condition");
        }
        if complete && !at.is_set() {
            e.required(&at, "completionTime is required for Complete jobs");
        }
    }
    let time = |field: &str| status.get(field).s().parse::<jiff::Timestamp>().ok();
    if (changed("startTime") || changed("completionTime"))
        && let (Some(start), Some(end)) = (time("startTime"), time("completionTime"))
        && end < start
    {
        e.invalid(&at, "must be equal to or after `startTime`");
    }
}

/// What a finished Job may not have any more, or must have.
fn at_the_end(e: &mut Errs, status: &At<'_>, new: &Value, judged: &dyn Fn(&str) -> bool) {
    let (active, start) = (status.get("active"), status.get("startTime"));
    if judged("active") && active.int0() > 0 {
        e.invalid(&active, "active>0 is invalid for finished job");
    }
    let nothing_to_do = new["spec"]["suspend"] == true && new["spec"]["completions"] == 0;
    if judged("startTime") && !start.is_set() && !nothing_to_do {
        e.required(&start, "startTime is required for finished job");
    }
    let uncounted = status.get("uncountedTerminatedPods");
    if judged("uncountedTerminatedPods") && uncounted.get("succeeded").len() + uncounted.get("failed").len() > 0 {
        e.invalid_as(&uncounted, internal::named("Uncounted", uncounted.v), "must be empty for finished job");
    }
}

fn status_indexes(e: &mut Errs, status: &At<'_>, new: &Value, changed: &dyn Fn(&str) -> bool) {
    let (done, lost) = (status.get("completedIndexes"), status.get("failedIndexes"));
    let (new_done, new_lost) = (changed("completedIndexes"), changed("failedIndexes"));
    let spec = &new["spec"];
    let (completions, per_index) = (spec["completions"].as_i64(), !spec["backoffLimitPerIndex"].is_null());
    for (at, judged) in [(&done, new_done), (&lost, new_lost && per_index)] {
        if judged
            && let Some(completions) = completions
            && let Err(why) = job_indexes::count(at.s(), completions)
        {
            let field = at.path.to_string();
            e.invalid(at, &format!("error parsing {}: {why}", field.trim_start_matches("status.")));
        }
    }
    if new_done && !done.s().is_empty() && spec["completionMode"] != "Indexed" {
        e.invalid(&done, "cannot set non-empty completedIndexes when non-indexed completion mode");
    }
    if new_lost && lost.is_set() && !per_index {
        e.invalid(&lost, "cannot set non-null failedIndexes when backoffLimitPerIndex is null");
    }
    if (new_done || new_lost)
        && let Some(completions) = completions
        && let Some(index) = job_indexes::overlap(done.s(), lost.s(), completions)
    {
        e.invalid(&lost, &format!("failedIndexes and completedIndexes overlap at index: {index}"));
    }
}

/// What only grows, and what is set once.
fn counters(e: &mut Errs, at: &At<'_>, before: &At<'_>, new: &Value, old: &Value) {
    let spec = &new["spec"];
    let elastic = spec["completionMode"] == "Indexed" && same(&spec["completions"], &spec["parallelism"]);
    for (field, may_shrink) in [("failed", false), ("succeeded", elastic)] {
        if at.get(field).int0() < before.get(field).int0() && !may_shrink {
            e.invalid_as(&at.get(field), at.get(field).int0(), &format!("cannot decrease the {field} counter"));
        }
    }
    let end = at.get("completionTime");
    if end.is_set() && before.get("completionTime").is_set() {
        e.immutable(&end, before.get("completionTime").v);
    }
    let (start, had) = (at.get("startTime"), before.get("startTime"));
    let resumes = holds(old, "Suspended", "True") && holds(new, "Suspended", "False");
    if had.is_set() && !same(start.v, had.v) && spec["suspend"] != true && !resumes {
        e.invalid(&start, "field is immutable for unsuspended job once set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(e: &Errs) -> String {
        e.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    fn with(kinds: &[&str], rest: Value) -> Value {
        let mut status = rest;
        status["conditions"] = kinds.iter().map(|kind| json!({"type": kind, "status": "True"})).collect();
        status
    }

    #[test]
    fn statuses() {
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let ok = json!({"startTime": early, "completionTime": late});
        let complete = ["SuccessCriteriaMet", "Complete"];
        let started = json!({"startTime": early});
        for (spec, old, new, want) in [
            (json!({}), json!({}), with(&complete, ok.clone()), ""),
            (
                json!({}),
                json!({}),
                json!({"active": -1}),
                "status.active: Invalid value: -1: must be greater than or equal to 0",
            ),
            (
                json!({}),
                json!({}),
                json!({"uncountedTerminatedPods": {"succeeded": ["a", ""], "failed": ["a"]}}),
                "status.uncountedTerminatedPods.succeeded[1]: Invalid value: \"\": must not be empty; status.uncountedTerminatedPods.failed[0]: Duplicate value: \"a\"",
            ),
            (
                json!({}),
                json!({}),
                with(&["Complete"], started.clone()),
                "status.completionTime: Required value: completionTime is required for Complete jobs; status.conditions: Invalid value: cannot set Complete=True condition without the SuccessCriteriaMet=true condition",
            ),
            (
                json!({}),
                json!({}),
                with(&["Failed", "FailureTarget"], json!({"active": 1, "terminating": 1})),
                "status.active: Invalid value: 1: active>0 is invalid for finished job; status.startTime: Required value: startTime is required for finished job; status.terminating: Invalid value: 1: terminating>0 is invalid for finished job",
            ),
            (
                json!({}),
                json!({}),
                with(&["Failed"], started.clone()),
                "status.conditions: Invalid value: cannot set Failed=True condition without the FailureTarget=true condition",
            ),
            (
                json!({}),
                json!({}),
                with(
                    &complete,
                    json!({"startTime": late, "completionTime": early, "uncountedTerminatedPods": {"failed": ["a"]}}),
                ),
                "status.completionTime: Invalid value: \"2026-01-01T00:00:00Z\": must be equal to or after `startTime`; status.uncountedTerminatedPods: Invalid value: {\"Succeeded\":null,\"Failed\":[\"a\"]}: must be empty for finished job",
            ),
            (
                json!({}),
                json!({}),
                json!({"ready": 1}),
                "status.ready: Invalid value: 1: cannot set more ready pods than active",
            ),
            (
                json!({"completions": 3}),
                json!({}),
                json!({"completedIndexes": "7", "failedIndexes": "1"}),
                "status.completedIndexes: Invalid value: \"7\": error parsing completedIndexes: too large index: \"7\"; status.completedIndexes: Invalid value: \"7\": cannot set non-empty completedIndexes when non-indexed completion mode; status.failedIndexes: Invalid value: \"1\": cannot set non-null failedIndexes when backoffLimitPerIndex is null",
            ),
            (
                json!({"completions": 9, "completionMode": "Indexed", "backoffLimitPerIndex": 1}),
                json!({}),
                json!({"completedIndexes": "1,3-5", "failedIndexes": "2,4-6"}),
                "status.failedIndexes: Invalid value: \"2,4-6\": failedIndexes and completedIndexes overlap at index: 4",
            ),
            (
                json!({}),
                json!({"failed": 2, "succeeded": 1, "startTime": early}),
                json!({"failed": 1, "startTime": late}),
                "status.failed: Invalid value: 1: cannot decrease the failed counter; status.succeeded: Invalid value: 0: cannot decrease the succeeded counter; status.startTime: Invalid value: \"2026-01-02T00:00:00Z\": field is immutable for unsuspended job once set",
            ),
            (
                json!({}),
                with(&["SuccessCriteriaMet"], started.clone()),
                with(&["FailureTarget"], started.clone()),
                "status.conditions: Invalid value: cannot disable the SuccessCriteriaMet=True condition",
            ),
            (
                json!({}),
                with(&complete, ok.clone()),
                started.clone(),
                "status.conditions: Invalid value: cannot disable the terminal Complete=True condition; status.conditions: Invalid value: cannot disable the SuccessCriteriaMet=True condition",
            ),
        ] {
            let mut e = Errs::new();
            status(&mut e, &json!({"spec": spec, "status": new}), &json!({"spec": spec, "status": old}));
            assert_eq!(texts(&e), want, "{new}");
        }
    }

    #[test]
    fn templates_of_suspended_jobs() {
        let job =
            |suspend: bool, template: Value| json!({"spec": {"suspend": suspend, "template": {"spec": template}}});
        let one = json!({"containers": [{"name": "c", "image": "a"}]});
        let resources = json!({"containers": [{"name": "c", "image": "a", "resources": {"limits": {"cpu": "1"}}}]});
        let scheduled = json!({"containers": [{"name": "c", "image": "a"}], "nodeSelector": {"a": "b"},
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {}}}});
        let repelled = json!({"containers": [{"name": "c", "image": "a"}], "affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "k"}]}}});
        let image = json!({"containers": [{"name": "c", "image": "b"}]});
        for (suspend, new, want) in [
            (true, &resources, ""),
            (true, &scheduled, ""),
            (true, &repelled, "spec.template.spec"),
            (true, &image, "spec.template.spec"),
            (false, &resources, "spec.template"),
            (false, &scheduled, "spec.template"),
        ] {
            let mut e = Errs::new();
            template(&mut e, &job(suspend, new.clone()), &job(suspend, one.clone()));
            let fields: Vec<&str> = e.0.iter().map(|e| e.field.as_str()).collect();
            assert_eq!(fields.join(" "), want, "{suspend} {new}");
        }
    }
}
