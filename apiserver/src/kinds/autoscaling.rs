//! HorizontalPodAutoscalers (validated in their v2 form).

use isopod_api::{field::ErrorList, gvk::Gvk, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        convert::convert,
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, meta, resources},
};

/// `horizontalpodautoscalers`.
pub(crate) struct HorizontalPodAutoscaler;

const KIND: &str = "HorizontalPodAutoscaler";
const SOURCES: &[&str] = &["ContainerResource", "External", "Object", "Pods", "Resource"];

impl Strategy for HorizontalPodAutoscaler {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"desiredReplicas": 0, "currentMetrics": null});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            let mut e = Errs::new();
            let status = At::field(new, "status");
            e.non_negative(&status.get("currentReplicas"));
            e.non_negative(&status.get("desiredReplicas"));
            return e.0;
        }
        self.validate(cx, new)
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let target = &spec["scaleTargetRef"];
        vec![
            table::name(obj),
            json!(format!("{}/{}", text(&target["kind"]), text(&target["name"]))),
            json!(match obj["spec"].get("metrics") {
                Some(_) => targets(obj),
                // Columns are of what is stored, in whatever version it is asked for.
                None => targets(&stored(obj)),
            }),
            json!(spec["minReplicas"].as_i64().map_or("<unset>".to_owned(), |n| n.to_string())),
            table::int(&spec["maxReplicas"]),
            table::int(&obj["status"]["currentReplicas"]),
            table::age(obj, now),
        ]
    }
}

/// An object of version 1 as it is stored.
fn stored(obj: &Value) -> Value {
    let mut obj = obj.clone();
    obj["apiVersion"] = "autoscaling/v1".into();
    obj["kind"] = KIND.into();
    convert(obj, &Gvk::new("autoscaling", "v2", KIND))
}

fn targets(obj: &Value) -> String {
    let specs = obj["spec"]["metrics"].as_array();
    let Some(specs) = specs.filter(|s| !s.is_empty()) else { return "<none>".to_owned() };
    let statuses = obj["status"]["currentMetrics"].as_array();
    let mut out: Vec<String> = Vec::new();
    for (i, metric) in specs.iter().enumerate() {
        let key = source_key(metric["type"].as_str().unwrap_or_default());
        let target = &metric[key]["target"];
        let current = statuses.and_then(|s| s.get(i)).map_or(&Value::Null, |s| &s[key]["current"]);
        let prefix = match key {
            "resource" | "containerResource" => format!("{}: ", metric[key]["name"].as_str().unwrap_or_default()),
            _ => String::new(),
        };
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let percent = |v: &Value| v.as_i64().map(|n| format!("{n}%"));
        // What is shown of the current state is what the target is about.
        let (now, goal, mark) = match (key, target["averageValue"].is_null()) {
            ("resource" | "containerResource", true) => {
                let goal = percent(&target["averageUtilization"]).unwrap_or_else(|| "<auto>".to_owned());
                (percent(&current["averageUtilization"]), goal, "")
            }
            ("external" | "object", true) => (text(&current["value"]), text(&target["value"]).unwrap_or_default(), ""),
            (_, _) => {
                let mark = if matches!(key, "external" | "object") { " (avg)" } else { "" };
                (text(&current["averageValue"]), text(&target["averageValue"]).unwrap_or_default(), mark)
            }
        };
        let now = now.unwrap_or_else(|| "<unknown>".to_owned());
        out.push(format!("{prefix}{now}/{goal}{mark}"));
    }
    let more = out.len().saturating_sub(2);
    out.truncate(2);
    if more > 0 { format!("{} + {more} more...", out.join(", ")) } else { out.join(", ") }
}

fn source_key(kind: &str) -> &'static str {
    match kind {
        "ContainerResource" => "containerResource",
        "External" => "external",
        "Object" => "object",
        "Pods" => "pods",
        _ => "resource",
    }
}

fn spec(e: &mut Errs, at: &At<'_>) {
    let (min, max) = (at.get("minReplicas"), at.get("maxReplicas"));
    if min.int().is_some_and(|n| n < 1) {
        e.invalid(&min, "must be greater than or equal to 1");
    }
    if max.int0() < 1 {
        e.required(&max, "must be set and greater than 0");
    }
    if min.int().is_some_and(|n| max.int0() < n) {
        e.invalid_as(&max, max.int0(), "must be greater than or equal to `minReplicas`");
    }
    target_reference(e, &at.get("scaleTargetRef"), true);
    let metrics = at.get("metrics");
    for metric in metrics.items() {
        self::metric(e, &metric);
    }
    let scales_to_zero = min.int() == Some(0);
    if scales_to_zero && !metrics.items().iter().any(|m| matches!(m.get("type").s(), "Object" | "External")) {
        e.forbidden(
            &metrics,
            "must specify at least one Object or External metric to support scaling to zero replicas",
        );
    }
    let behavior = at.get("behavior");
    for rules in ["scaleUp", "scaleDown"] {
        let rules = behavior.get(rules);
        if rules.is_set() {
            behavior_rules(e, &rules);
        }
    }
}

/// The one kind without an API group that scales.
const CORE: &str = "ReplicationController";

fn target_reference(e: &mut Errs, at: &At<'_>, need_group: bool) {
    for field in ["kind", "name"] {
        let field = at.get(field);
        if field.s().is_empty() {
            e.required(&field, "");
        } else {
            e.messages(&field, names::path_segment(field.s()));
        }
    }
    let version = at.get("apiVersion");
    match meta::group_version(version.s()) {
        Err(why) => e.invalid(&version, &why),
        Ok(("", _)) if need_group && at.get("kind").s() != CORE => {
            e.invalid_str(&version, "apiVersion must specify API group");
        }
        Ok(_) => {}
    }
}

fn metric(e: &mut Errs, at: &At<'_>) {
    let kind = at.get("type");
    if kind.s().is_empty() {
        e.required(&kind, "must specify a metric source type");
    }
    if !SOURCES.contains(&kind.s()) {
        e.unsupported(&kind, SOURCES);
    }
    let present: Vec<&str> = ["object", "external", "pods", "resource", "containerResource"]
        .into_iter()
        .filter(|f| at.get(f).is_set())
        .collect();
    if let Some(first) = present.first() {
        source(e, first, &at.get(first));
    }
    let expected = SOURCES.contains(&kind.s()).then(|| source_key(kind.s()));
    match expected.map(|field| at.get(field)) {
        // Upstream says so a second time.
        None => e.unsupported(&kind, SOURCES),
        Some(field) if !field.is_set() => e.required(&field, "must populate information for the given metric source"),
        Some(_) => {}
    }
    if present.len() != 1 {
        for other in present.into_iter().filter(|p| Some(*p) != expected) {
            e.forbidden(&at.get(other), "must populate the given metric source only");
        }
    }
}

fn source(e: &mut Errs, kind: &str, at: &At<'_>) {
    let target_at = at.get("target");
    match kind {
        "resource" | "containerResource" => {
            if at.get("name").s().is_empty() {
                e.required(&at.get("name"), "must specify a resource name");
            }
            if kind == "containerResource" {
                let container = at.get("container");
                match container.s() {
                    "" => e.required(&container, "must specify a container"),
                    _ => e.dns_label(&container),
                }
            }
            target(e, &target_at);
            let (utilization, value) = (target_at.get("averageUtilization"), target_at.get("averageValue"));
            if !utilization.is_set() && !value.is_set() {
                e.required(&utilization, "must set either a target raw value or a target utilization");
            }
            if utilization.is_set() && value.is_set() {
                e.forbidden(&value, "may not set both a target raw value and a target utilization");
            }
        }
        _ => {
            if kind == "object" {
                target_reference(e, &at.get("describedObject"), false);
            }
            let metric = at.get("metric");
            match metric.get("name").s() {
                "" => e.required(&metric.get("name"), "must specify a metric name"),
                name => e.messages(&metric.get("name"), names::path_segment(name)),
            }
            target(e, &target_at);
            let (value, average) = (target_at.get("value"), target_at.get("averageValue"));
            if kind == "pods" && !average.is_set() {
                e.required(&average, "must specify a positive target averageValue");
            } else if kind != "pods" && !value.is_set() && !average.is_set() {
                let shown = if kind == "external" {
                    "must set either a target value for metric or a per-pod target"
                } else {
                    "must set either a target value or averageValue"
                };
                e.required(&average, shown);
            }
            if kind == "external" && value.is_set() && average.is_set() {
                e.forbidden(&value, "may not set both a target value for metric and a per-pod target");
            }
        }
    }
}

fn target(e: &mut Errs, at: &At<'_>) {
    let kind = at.get("type");
    if kind.s().is_empty() {
        e.required(&kind, "must specify a metric target type");
    }
    if !["Utilization", "Value", "AverageValue"].contains(&kind.s()) {
        e.invalid_str(&kind, "must be either Utilization, Value, or AverageValue");
    }
    for field in ["value", "averageValue"] {
        let value = at.get(field);
        if let Some(quantity) = resources::quantity(value.v)
            && quantity.milli_value() <= 0
        {
            e.invalid_as(&value, quantity.to_string(), "must be positive");
        }
    }
    let utilization = at.get("averageUtilization");
    if utilization.int().is_some_and(|n| n < 1) {
        e.invalid(&utilization, "must be greater than 0");
    }
}

fn behavior_rules(e: &mut Errs, at: &At<'_>) {
    let (window, policies) = (at.get("stabilizationWindowSeconds"), at.get("policies"));
    match window.int() {
        Some(n) if n < 0 => e.invalid(&window, "must be greater than or equal to zero"),
        Some(n) if n > 3600 => e.invalid(&window, "must be less than or equal to 3600"),
        _ => {}
    }
    e.one_of_if_set(&at.get("selectPolicy"), &["Disabled", "Max", "Min"]);
    if policies.len() == 0 {
        e.required(&policies, "must specify at least one Policy");
    }
    for policy in policies.items() {
        e.one_of(&policy.get("type"), &["Percent", "Pods"]);
        for field in ["value", "periodSeconds"] {
            let field_at = policy.get(field);
            if field_at.int0() <= 0 {
                e.invalid_as(&field_at, field_at.int0(), "must be greater than zero");
            } else if field == "periodSeconds" && field_at.int0() > 1800 {
                e.invalid(&field_at, "must be less than or equal to 1800");
            }
        }
    }
    let tolerance = at.get("tolerance");
    if let Some(quantity) = resources::quantity(tolerance.v)
        && quantity.milli_value() < 0
    {
        e.invalid_as(&tolerance, quantity.to_string(), "must be greater than or equal to 0");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_of_what_is_stored() {
        let target = |target: Value| json!({"metric": {"name": "m"}, "target": target});
        let metrics = json!([
            {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}},
            {"type": "External", "external": target(json!({"type": "AverageValue", "averageValue": "3"}))},
            {"type": "Pods", "pods": target(json!({"type": "AverageValue", "averageValue": "1"}))}]);
        let current = json!([{"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 20}}}]);
        let v2 = json!({"apiVersion": "autoscaling/v2", "kind": KIND, "metadata": {"name": "h"},
            "spec": {"metrics": metrics}, "status": {"currentMetrics": current}});
        let v1 = convert(v2.clone(), &Gvk::new("autoscaling", "v1", KIND));
        let now = Timestamp::UNIX_EPOCH;
        let cells = HorizontalPodAutoscaler.cells(&v2, now);
        assert_eq!(cells[2], "cpu: 20%/50%, <unknown>/3 (avg) + 1 more...");
        assert_eq!(HorizontalPodAutoscaler.cells(&v1, now), cells);
    }

    #[test]
    fn what_is_shown_is_what_the_target_is_about() {
        let both = json!({"averageUtilization": 20, "averageValue": "5m"});
        let row = |key: &str, kind: &str, target: Value, current: Value| {
            targets(&json!({"spec": {"metrics": [{"type": kind, key: {"name": "cpu", "target": target}}]},
                "status": {"currentMetrics": [{"type": kind, key: {"name": "cpu", "current": current}}]}}))
        };
        assert_eq!(row("resource", "Resource", json!({"averageUtilization": 50}), both.clone()), "cpu: 20%/50%");
        assert_eq!(row("resource", "Resource", json!({"averageValue": "1"}), both), "cpu: 5m/1");
        let average = json!({"averageValue": "5m"});
        assert_eq!(
            row("resource", "Resource", json!({"averageUtilization": 50}), average.clone()),
            "cpu: <unknown>/50%"
        );
        assert_eq!(row("pods", "Pods", json!({"averageValue": "1"}), average.clone()), "5m/1");
        assert_eq!(row("external", "External", json!({"averageValue": "1"}), average), "5m/1 (avg)");
        assert_eq!(row("object", "Object", json!({"value": "1"}), json!({"value": "3"})), "3/1");
    }

    #[test]
    fn what_is_wrong_with_autoscalers() {
        let metric = |source: &str, value: Value| json!([{"type": source, source_key(source): value}]);
        let both = json!({"type": "Value", "value": "1", "averageValue": "1"});
        for (field, value, want) in [
            (
                "maxReplicas",
                json!(0),
                "maxReplicas Required, maxReplicas must be greater than or equal to `minReplicas`",
            ),
            ("minReplicas", json!(-1), "minReplicas must be greater than or equal to 1"),
            (
                "scaleTargetRef",
                json!({"kind": "Deployment", "name": "d", "apiVersion": "v1"}),
                "scaleTargetRef.apiVersion apiVersion must specify API group",
            ),
            ("scaleTargetRef", json!({"kind": "ReplicationController", "name": "d", "apiVersion": "v1"}), ""),
            (
                "scaleTargetRef",
                json!({"kind": "X", "name": "d", "apiVersion": "a/b/c"}),
                "scaleTargetRef.apiVersion unexpected GroupVersion string: a/b/c",
            ),
            (
                "metrics",
                json!([{}]),
                "metrics[0].type Required, metrics[0].type Unsupported, metrics[0].type Unsupported",
            ),
            ("metrics", json!([{"type": "Pods"}]), "metrics[0].pods Required"),
            (
                "metrics",
                metric("Resource", json!({"name": "cpu", "target": {"averageUtilization": 0, "averageValue": "0"}})),
                "metrics[0].resource.target.type Required, metrics[0].resource.target.type must be either Utilization, Value, or AverageValue, metrics[0].resource.target.averageValue must be positive, metrics[0].resource.target.averageUtilization must be greater than 0, metrics[0].resource.target.averageValue may not set both a target raw value and a target utilization",
            ),
            (
                "metrics",
                metric("External", json!({"metric": {"name": "a/b"}, "target": both})),
                "metrics[0].external.metric.name may not contain '/', metrics[0].external.target.value may not set both a target value for metric and a per-pod target",
            ),
            (
                "metrics",
                metric(
                    "Object",
                    json!({"metric": {"name": "m"}, "describedObject": {"kind": "Service", "name": "s", "apiVersion": "v1"}, "target": {"type": "Value"}}),
                ),
                "metrics[0].object.target.averageValue Required",
            ),
            (
                "metrics",
                metric(
                    "ContainerResource",
                    json!({"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 1}}),
                ),
                "metrics[0].containerResource.container Required",
            ),
            (
                "behavior",
                json!({"scaleUp": {"stabilizationWindowSeconds": 4000, "policies": [{"type": "Pods", "value": 0, "periodSeconds": 1801}], "tolerance": "-1"}}),
                "behavior.scaleUp.stabilizationWindowSeconds must be less than or equal to 3600, behavior.scaleUp.policies[0].value must be greater than zero, behavior.scaleUp.policies[0].periodSeconds must be less than or equal to 1800, behavior.scaleUp.tolerance must be greater than or equal to 0",
            ),
        ] {
            let mut obj = json!({"spec": {"minReplicas": 1, "maxReplicas": 3, "scaleTargetRef": {"kind": "Deployment", "name": "d", "apiVersion": "apps/v1"}}});
            obj["spec"][field] = value;
            let mut e = Errs::new();
            spec(&mut e, &At::field(&obj, "spec"));
            let shown = |e: &isopod_api::field::Error| {
                let text = if e.kind == isopod_api::field::ErrorType::Invalid
                    || e.kind == isopod_api::field::ErrorType::Forbidden
                {
                    e.detail.clone()
                } else {
                    format!("{:?}", e.kind).replace("NotSupported", "Unsupported")
                };
                format!("{} {text}", e.field.trim_start_matches("spec."))
            };
            let got: Vec<String> = e.0.iter().map(shown).collect();
            assert_eq!(got.join(", "), want, "{field}");
        }
    }
}
