//! Validation of Jobs (and of the Job templates of CronJobs).

use isopod_api::{field::Path, names};
use serde_json::{Value, json};

use super::job_indexes;
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
        for condition in conditions.items() {
            e.qualified_name(&condition.get("type"));
            e.required_one_of(&condition.get("status"), &["False", "True", "Unknown"]);
        }
        let has_conditions = conditions.len() > 0;
        let bare = |detail: &str| isopod_api::field::Error::invalid_without_value(&at.path, detail);
        if codes.is_set() && has_conditions {
            e.0.push(bare("specifying both OnExitCodes and OnPodConditions is not supported"));
        }
        if !codes.is_set() && !has_conditions {
            e.0.push(bare("specifying one of OnExitCodes and OnPodConditions is required"));
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
        if !seen.insert(item.int0()) {
            e.duplicate(&item, item.int0());
        }
        if operator.s() == "In" && item.int0() == 0 {
            e.invalid(&item, "must not be 0 for the In operator");
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
            if n <= 0 {
                e.invalid(&count, "must be greater than 0");
            }
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
    template(e, &at, &before, old);
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

/// The template may only change its scheduling directives, and only while the Job has never run.
fn template(e: &mut Errs, at: &At<'_>, before: &At<'_>, old: &Value) {
    let mut compare = before.get("template").v.clone();
    let suspended = before.get("suspend").is_true();
    let started = !old["status"]["startTime"].is_null();
    if suspended && !started {
        let new = at.get("template.spec");
        for field in ["affinity", "nodeSelector", "tolerations", "schedulingGates"] {
            if let Some(map) = compare["spec"].as_object_mut() {
                map.remove(field);
                if new.get(field).is_set() {
                    map.insert(field.to_owned(), new.get(field).v.clone());
                }
            }
        }
        for field in ["labels", "annotations"] {
            let value = at.get("template.metadata").get(field).v.clone();
            if let Some(map) = compare["metadata"].as_object_mut() {
                map.remove(field);
                if !value.is_null() {
                    map.insert(field.to_owned(), value);
                }
            }
        }
    }
    let template = at.get("template");
    if !same(template.v, &compare) {
        e.invalid_as(&template, internal::pod_template(template.v), IMMUTABLE);
    }
}

/// A changed status.
pub(crate) fn status(e: &mut Errs, new: &Value, old: &Value) {
    let (at, before) = (At::field(new, "status"), At::field(old, "status"));
    for field in ["active", "succeeded", "failed", "ready", "terminating"] {
        e.non_negative(&at.get(field));
    }
    let holds = |status: &At<'_>, kind: &str| {
        status.get("conditions").items().iter().any(|c| c.get("type").s() == kind && c.get("status").s() == "True")
    };
    for kind in ["Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"] {
        if holds(&before, kind) && !holds(&at, kind) {
            let conditions = At::new(Path::clone(&at.get("conditions").path), at.get("conditions").v);
            e.invalid(&conditions, &format!("cannot disable the terminal {kind}=True condition"));
        }
    }
    if holds(&at, "Complete") && holds(&at, "Failed") {
        e.invalid(&at.get("conditions"), "cannot set Complete=True and Failed=true conditions");
    }
    if at.get("completionTime").is_set() && !holds(&at, "Complete") {
        e.invalid(&at.get("completionTime"), "cannot set completionTime when there is no Complete=True condition");
    }
}
