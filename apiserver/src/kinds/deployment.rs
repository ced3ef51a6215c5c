//! Deployments.

use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, at_most_100_percent, int_or_percent_value, not_decremented, pod_warnings, positive_int_or_percent,
        template::{for_replicas, selector_and_template},
    },
};

/// `deployments`.
pub(crate) struct Deployment;

impl Strategy for Deployment {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            status(&mut e, &At::field(new, "status"), &At::field(old, "status"));
            return e.0;
        }
        let at = At::field(new, "spec");
        spec(&mut e, &at);
        e.immutable(&at.get("selector"), &old["spec"]["selector"]);
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), true)
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let (spec, status) = (&obj["spec"], &obj["status"]);
        let number = |v: &Value| v.as_i64().unwrap_or_default();
        let [names, images] = table::containers(&spec["template"]["spec"]);
        vec![
            table::name(obj),
            json!(format!("{}/{}", number(&status["readyReplicas"]), number(&spec["replicas"]))),
            table::int(&status["updatedReplicas"]),
            table::int(&status["availableReplicas"]),
            table::age(obj, now),
            names,
            images,
            json!(table::selector(&spec["selector"])),
        ]
    }
}

fn spec(e: &mut Errs, at: &At<'_>) {
    e.non_negative(&at.get("replicas"));
    selector_and_template(e, at, "deployment");
    for_replicas(e, at);
    strategy(e, &at.get("strategy"));
    e.non_negative(&at.get("minReadySeconds"));
    e.non_negative(&at.get("revisionHistoryLimit"));
    let deadline = at.get("progressDeadlineSeconds");
    if let Some(seconds) = deadline.int() {
        e.non_negative(&deadline);
        if seconds <= at.get("minReadySeconds").int0() {
            e.invalid(&deadline, "must be greater than minReadySeconds");
        }
    }
}

fn strategy(e: &mut Errs, at: &At<'_>) {
    let (kind, rolling) = (at.get("type"), at.get("rollingUpdate"));
    match kind.s() {
        "Recreate" => {
            if rolling.is_set() {
                e.forbidden(&rolling, "may not be specified when strategy `type` is 'Recreate'");
            }
        }
        "RollingUpdate" => {
            if !rolling.is_set() {
                return e.required(&rolling, "this should be defaulted and never be nil");
            }
            let (unavailable, surge) = (rolling.get("maxUnavailable"), rolling.get("maxSurge"));
            positive_int_or_percent(e, &unavailable);
            positive_int_or_percent(e, &surge);
            if int_or_percent_value(unavailable.v) == 0 && int_or_percent_value(surge.v) == 0 {
                e.invalid(&unavailable, "may not be 0 when `maxSurge` is 0");
            }
            at_most_100_percent(e, &unavailable);
        }
        _ => {
            e.unsupported_as(at, json!({"Type": kind.s(), "RollingUpdate": rolling.v}), &["Recreate", "RollingUpdate"])
        }
    }
}

fn status(e: &mut Errs, at: &At<'_>, old: &At<'_>) {
    for field in [
        "observedGeneration",
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
        "terminatingReplicas",
    ] {
        e.non_negative(&at.get(field));
    }
    e.non_negative(&at.get("collisionCount"));
    let n = |field: &str| at.get(field).int0();
    for (field, limit, detail) in [
        ("updatedReplicas", n("replicas"), "cannot be greater than status.replicas"),
        ("readyReplicas", n("replicas"), "cannot be greater than status.replicas"),
        ("availableReplicas", n("replicas"), "cannot be greater than status.replicas"),
        ("availableReplicas", n("readyReplicas"), "cannot be greater than readyReplicas"),
    ] {
        if n(field) > limit {
            e.invalid_as(&at.get(field), n(field), detail);
        }
    }
    not_decremented(e, &at.get("collisionCount"), old.get("collisionCount").v);
}
