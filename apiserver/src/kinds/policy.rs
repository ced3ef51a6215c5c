//! PodDisruptionBudgets.

use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, at_most_100_percent, conditions, positive_int_or_percent, selector},
};

/// `poddisruptionbudgets`.
pub(crate) struct PodDisruptionBudget;

impl Strategy for PodDisruptionBudget {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let at = At::field(obj, "spec");
        let (min, max) = (at.get("minAvailable"), at.get("maxUnavailable"));
        if min.is_set() && max.is_set() {
            let internal = json!({"MinAvailable": min.v, "Selector": at.get("selector").v, "MaxUnavailable": max.v,
                "UnhealthyPodEvictionPolicy": at.get("unhealthyPodEvictionPolicy").v});
            e.invalid_as(&at, internal, "minAvailable and maxUnavailable cannot be both set");
        }
        for value in [min, max] {
            positive_int_or_percent(&mut e, &value);
            at_most_100_percent(&mut e, &value);
        }
        selector::label_selector(&mut e, &at.get("selector"));
        e.one_of_if_set(&at.get("unhealthyPodEvictionPolicy"), &["AlwaysAllow", "IfHealthyBudget"]);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        if cx.subresource != "status" {
            return self.validate(cx, new);
        }
        let mut e = Errs::new();
        let status = At::field(new, "status");
        conditions::conditions(&mut e, &status.get("conditions"));
        for field in ["disruptionsAllowed", "currentHealthy", "desiredHealthy", "expectedPods"] {
            e.non_negative(&status.get(field));
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let value = |v: &Value| match v {
            Value::Null => json!("N/A"),
            Value::String(s) => json!(s),
            other => json!(other.to_string()),
        };
        vec![
            table::name(obj),
            value(&obj["spec"]["minAvailable"]),
            value(&obj["spec"]["maxUnavailable"]),
            table::int(&obj["status"]["disruptionsAllowed"]),
            table::age(obj, now),
        ]
    }
}
