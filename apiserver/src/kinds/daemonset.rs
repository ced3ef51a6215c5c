//! DaemonSets.

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
        selector,
        template::{always, labels_match, pod_template},
    },
};

/// `daemonsets`.
pub(crate) struct DaemonSet;

/// Counts changes of the template for clients of an API version that is gone.
const GENERATION: &str = "deprecated.daemonset.template.generation";

impl Strategy for DaemonSet {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
        if isopod_api::meta::annotation(obj, GENERATION).is_none() {
            isopod_api::meta::set_annotation(obj, GENERATION, "1");
        }
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if !cx.subresource.is_empty() {
            return;
        }
        let before = isopod_api::meta::annotation(old, GENERATION).and_then(|g| g.parse::<i64>().ok()).unwrap_or(1);
        let changed = new["spec"]["template"] != old["spec"]["template"];
        isopod_api::meta::set_annotation(new, GENERATION, &(before + i64::from(changed)).to_string());
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            let status = At::field(new, "status");
            for field in [
                "currentNumberScheduled",
                "numberMisscheduled",
                "desiredNumberScheduled",
                "numberReady",
                "observedGeneration",
                "updatedNumberScheduled",
                "numberAvailable",
                "numberUnavailable",
                "collisionCount",
            ] {
                e.non_negative(&status.get(field));
            }
            not_decremented(&mut e, &status.get("collisionCount"), &old["status"]["collisionCount"]);
            return e.0;
        }
        let at = At::field(new, "spec");
        // Upstream validates the new spec twice.
        spec(&mut e, &at);
        e.immutable(&at.get("selector"), &old["spec"]["selector"]);
        spec(&mut e, &at);
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), false)
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let (spec, status) = (&obj["spec"], &obj["status"]);
        let [names, images] = table::containers(&spec["template"]["spec"]);
        vec![
            table::name(obj),
            table::int(&status["desiredNumberScheduled"]),
            table::int(&status["currentNumberScheduled"]),
            table::int(&status["numberReady"]),
            table::int(&status["updatedNumberScheduled"]),
            table::int(&status["numberAvailable"]),
            json!(table::labels(&spec["template"]["spec"]["nodeSelector"])),
            table::age(obj, now),
            names,
            images,
            json!(table::selector(&spec["selector"])),
        ]
    }
}

fn spec(e: &mut Errs, at: &At<'_>) {
    let (selector_at, template) = (at.get("selector"), at.get("template"));
    selector::label_selector(e, &selector_at);
    let matched = selector::matches(selector_at.v, template.get("metadata.labels").v);
    if !selector_at.is_set() || matched == Some(false) {
        labels_match(e, &template, false);
    }
    if selector_at.is_set() && selector::is_empty(&selector_at) {
        e.invalid(&selector_at, "empty selector is invalid for daemonset");
    }
    pod_template(e, &template);
    always(e, &template, "DaemonSet");
    e.non_negative(&at.get("minReadySeconds"));
    e.non_negative(&at.get("revisionHistoryLimit"));
    let strategy = at.get("updateStrategy");
    let (kind, rolling) = (strategy.get("type"), strategy.get("rollingUpdate"));
    match kind.s() {
        "OnDelete" => {}
        "RollingUpdate" => rolling_update(e, &rolling),
        _ => {
            let bounds =
                json!({"MaxUnavailable": rolling.get("maxUnavailable").v, "MaxSurge": rolling.get("maxSurge").v});
            let shown = json!({"Type": kind.s(), "RollingUpdate": if rolling.is_set() { bounds } else { Value::Null }});
            e.unsupported_as(&strategy, shown, &["RollingUpdate", "OnDelete"]);
        }
    }
}

fn rolling_update(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return e.required(at, "");
    }
    let (unavailable, surge) = (at.get("maxUnavailable"), at.get("maxSurge"));
    positive_int_or_percent(e, &unavailable);
    positive_int_or_percent(e, &surge);
    at_most_100_percent(e, &unavailable);
    at_most_100_percent(e, &surge);
    let (u, s) = (int_or_percent_value(unavailable.v), int_or_percent_value(surge.v));
    if u > 0 && s > 0 {
        e.invalid(&surge, "may not be set when maxUnavailable is non-zero");
    } else if u == 0 && s == 0 {
        e.required(&unavailable, "cannot be 0 when maxSurge is 0");
    }
}
