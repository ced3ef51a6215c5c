//! Jobs: defaults, generated selector and labels, table row. Validation is in `job_validation`.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{job_validation, pod_defaults};
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, pod_warnings},
};

/// `jobs`.
pub(crate) struct Job;

const UID_LABEL: &str = "batch.kubernetes.io/controller-uid";
const NAME_LABEL: &str = "batch.kubernetes.io/job-name";

impl Strategy for Job {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
        if obj["spec"]["manualSelector"] != true {
            generate_selector(obj);
        }
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        job_validation::create(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            job_validation::status(&mut e, new, old);
        } else {
            job_validation::update(&mut e, new, old);
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut out = pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), true);
        let spec = &obj["spec"];
        if cx.subresource.is_empty()
            && spec["completionMode"] == "Indexed"
            && spec["completions"].as_i64().unwrap_or_default() > 100_000
            && spec["parallelism"].as_i64().unwrap_or_default() > 10_000
        {
            out.push("In Indexed Jobs with a number of completions higher than 10^5 and a parallelism higher than 10^4, Kubernetes might not be able to track completedIndexes when a big number of indexes fail".to_owned());
        }
        out
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("status.successful", obj["status"]["succeeded"].as_i64().unwrap_or_default().to_string())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["status.successful"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let [names, images] = table::containers(&obj["spec"]["template"]["spec"]);
        vec![
            table::name(obj),
            json!(status_text(obj)),
            json!(completions(obj)),
            json!(duration(obj, now)),
            table::age(obj, now),
            names,
            images,
            json!(table::selector(&obj["spec"]["selector"])),
        ]
    }
}

/// Labels that are there already stay: validation tells whether they are right.
fn generate_selector(obj: &mut Value) {
    let (uid, name) = (meta::uid(obj).to_owned(), meta::name(obj).to_owned());
    if !obj["spec"]["template"].is_object() {
        return;
    }
    // Labels that were defaulted from the template's stay the same as the template's.
    let shared = obj["metadata"]["labels"] == obj["spec"]["template"]["metadata"]["labels"];
    let labels = &mut obj["spec"]["template"]["metadata"]["labels"];
    if labels.is_null() {
        *labels = json!({});
    }
    for (key, value) in [("controller-uid", &uid), (UID_LABEL, &uid), ("job-name", &name), (NAME_LABEL, &name)] {
        pod_defaults::set(labels, key, json!(value));
    }
    if shared {
        obj["metadata"]["labels"] = obj["spec"]["template"]["metadata"]["labels"].clone();
    }
    if obj["spec"]["selector"]["matchLabels"].is_null() {
        obj["spec"]["selector"]["matchLabels"] = json!({});
    }
    pod_defaults::set(&mut obj["spec"]["selector"]["matchLabels"], UID_LABEL, json!(uid));
}

fn status_text(obj: &Value) -> &'static str {
    let holds = |kind: &str| {
        obj["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == kind && c["status"] == "True")
    };
    if holds("Complete") {
        "Complete"
    } else if holds("Failed") {
        "Failed"
    } else if obj["metadata"].get("deletionTimestamp").is_some_and(|t| !t.is_null()) {
        "Terminating"
    } else if holds("Suspended") {
        "Suspended"
    } else if holds("FailureTarget") {
        "FailureTarget"
    } else if holds("SuccessCriteriaMet") {
        "SuccessCriteriaMet"
    } else {
        "Running"
    }
}

fn completions(obj: &Value) -> String {
    let done = obj["status"]["succeeded"].as_i64().unwrap_or_default();
    match (obj["spec"]["completions"].as_i64(), obj["spec"]["parallelism"].as_i64().unwrap_or_default()) {
        (Some(wanted), _) => format!("{done}/{wanted}"),
        (None, parallelism) if parallelism > 1 => format!("{done}/1 of {parallelism}"),
        _ => format!("{done}/1"),
    }
}

fn duration(obj: &Value, now: Timestamp) -> String {
    let Some(start) = table::timestamp(&obj["status"]["startTime"]) else { return String::new() };
    let end = table::timestamp(&obj["status"]["completionTime"]).unwrap_or(now);
    table::human_duration(end.duration_since(start).as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_selector() {
        let mut job = json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"metadata": {"labels": {"app": "a"}}}}});
        generate_selector(&mut job);
        assert_eq!(job["spec"]["selector"], json!({"matchLabels": {UID_LABEL: "u"}}));
        assert_eq!(job["spec"]["template"]["metadata"]["labels"]["job-name"], "j");
    }

    #[test]
    fn rows() {
        let job = json!({"spec": {"parallelism": 3}, "status": {"succeeded": 2, "conditions": [{"type": "Failed", "status": "True"}]}});
        assert_eq!((status_text(&job), completions(&job).as_str()), ("Failed", "2/1 of 3"));
    }
}
