//! CronJobs.

use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{cron, job_validation};
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, pod_warnings, same},
};

/// `cronjobs`.
pub(crate) struct CronJob;

impl Strategy for CronJob {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/jobTemplate/spec/template/spec");
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"), None);
        let name = At::field(obj, "metadata").get("name");
        if name.s().len() > 52 {
            e.invalid(&name, "must be no more than 52 characters");
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource != "status" {
            spec(&mut e, &At::field(new, "spec"), Some(&old["spec"]));
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut out =
            pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("jobTemplate.spec.template"), true);
        if old.is_some()
            && cx.subresource.is_empty()
            && obj["spec"]["schedule"].as_str().is_some_and(|s| s.contains("TZ"))
        {
            out.push("cannot use TZ or CRON_TZ in schedule, use timeZone field instead, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/#time-zones for more details".to_owned());
        }
        out
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let job_spec = &spec["jobTemplate"]["spec"];
        let [names, images] = table::containers(&job_spec["template"]["spec"]);
        let suspend = match spec["suspend"].as_bool() {
            Some(true) => "True",
            Some(false) => "False",
            None => "<unset>",
        };
        let last = match &obj["status"]["lastScheduleTime"] {
            Value::Null => "<none>".to_owned(),
            time => table::since(time, now),
        };
        vec![
            table::name(obj),
            table::or(&spec["schedule"], ""),
            table::or(&spec["timeZone"], "<none>"),
            json!(suspend),
            json!(table::count(&obj["status"]["active"])),
            json!(last),
            table::age(obj, now),
            names,
            images,
            json!(table::selector(&job_spec["selector"])),
        ]
    }
}

fn spec(e: &mut Errs, at: &At<'_>, old: Option<&Value>) {
    let (schedule, zone) = (at.get("schedule"), at.get("timeZone"));
    if schedule.s().is_empty() {
        e.required(&schedule, "");
    } else {
        if let Err(message) = cron::check(schedule.s()) {
            e.invalid(&schedule, &message);
        }
        // A schedule that names its zone may stay.
        let names_zone = |schedule: &str| schedule.contains("TZ");
        let named = old.is_some_and(|old| old["schedule"].as_str().is_some_and(names_zone));
        if names_zone(schedule.s()) && !named {
            e.invalid(&schedule, "cannot use TZ or CRON_TZ in schedule, use timeZone field instead");
        } else if names_zone(schedule.s()) && zone.is_set() {
            e.invalid(&schedule, "cannot use both timeZone field and TZ or CRON_TZ in schedule");
        }
    }
    e.non_negative(&at.get("startingDeadlineSeconds"));
    if old.is_none_or(|old| !same(&old["timeZone"], zone.v)) {
        time_zone(e, &zone);
    }
    e.one_of_if_set(&at.get("concurrencyPolicy"), &["Allow", "Forbid", "Replace"]);
    job_validation::cron_template(e, &at.get("jobTemplate"));
    e.non_negative(&at.get("successfulJobsHistoryLimit"));
    e.non_negative(&at.get("failedJobsHistoryLimit"));
}

fn time_zone(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    if at.s().is_empty() {
        return e.invalid(at, "timeZone must be nil or non-empty string");
    }
    let word = |part: &str| part.len() <= 14 && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c));
    let unknown = format!("unknown time zone {}", at.s());
    if at.s().split('/').any(|part| matches!(part, "" | "." | "..") || part.starts_with('-') || !word(part)) {
        return e.invalid(at, &unknown);
    }
    if at.s().eq_ignore_ascii_case("local") {
        e.invalid(at, "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones");
    }
    if at.s() != "Local" && jiff::tz::TimeZone::get(at.s()).is_err() {
        e.invalid(at, &unknown);
    }
}
