//! Between the version objects are stored in and the versions they are served in.
//!
//! Two resources have two versions: HorizontalPodAutoscaler (stored as autoscaling/v2) and Event (stored as core/v1).

use isopod_api::gvk::Gvk;
use serde_json::{Map, Value, json};

/// Converts an object between versions of its kind. Unknown pairs only change the apiVersion.
pub(crate) fn convert(mut obj: Value, to: &Gvk) -> Value {
    let from = Gvk::of(&obj);
    if from == *to {
        return obj;
    }
    match (&*from.group, &*from.version, &*to.group, &*to.version) {
        ("", "v1", "events.k8s.io", "v1") => event_to_new(&mut obj),
        ("events.k8s.io", "v1", "", "v1") => event_to_core(&mut obj),
        ("autoscaling", "v2", "autoscaling", "v1") => hpa_to_v1(&mut obj),
        ("autoscaling", "v1", "autoscaling", "v2") => hpa_to_v2(&mut obj),
        _ => {}
    }
    obj["apiVersion"] = to.api_version().into();
    obj
}

fn rename(map: &mut Map<String, Value>, pairs: &[(&str, &str)]) {
    for (from, to) in pairs {
        if let Some(value) = map.shift_remove(*from) {
            map.insert((*to).into(), value);
        }
    }
}

const EVENT_FIELDS: [(&str, &str); 6] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

fn event_to_new(obj: &mut Value) {
    if let Some(map) = obj.as_object_mut() {
        rename(map, &EVENT_FIELDS);
        rename(map, &[("reportingComponent", "reportingController")]);
    }
}

fn event_to_core(obj: &mut Value) {
    if let Some(map) = obj.as_object_mut() {
        rename(map, &EVENT_FIELDS.map(|(a, b)| (b, a)));
        rename(map, &[("reportingController", "reportingComponent")]);
    }
}

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const CURRENT: &str = "autoscaling.alpha.kubernetes.io/current-metrics";

fn is_cpu_utilization(metric: &Value) -> bool {
    metric["type"] == "Resource"
        && metric["resource"]["name"] == "cpu"
        && metric["resource"]["target"]["averageUtilization"].is_number()
}

fn hpa_to_v1(obj: &mut Value) {
    let mut notes = Vec::new();
    if let Some(spec) = obj.get_mut("spec").and_then(Value::as_object_mut) {
        let mut metrics = match spec.shift_remove("metrics") {
            Some(Value::Array(metrics)) => metrics,
            _ => Vec::new(),
        };
        if let Some(at) = metrics.iter().position(is_cpu_utilization) {
            let cpu = metrics.remove(at);
            let target = cpu["resource"]["target"]["averageUtilization"].clone();
            spec.insert("targetCPUUtilizationPercentage".into(), target);
        }
        if !metrics.is_empty() {
            notes.push((METRICS, Value::Array(metrics)));
        }
        if let Some(behavior) = spec.shift_remove("behavior") {
            notes.push((BEHAVIOR, behavior));
        }
    }
    if let Some(status) = obj.get_mut("status").and_then(Value::as_object_mut) {
        status.entry("currentReplicas").or_insert(json!(0));
        if let Some(conditions) =
            status.shift_remove("conditions").filter(|c| c.as_array().is_some_and(|a| !a.is_empty()))
        {
            notes.push((CONDITIONS, conditions));
        }
        if let Some(Value::Array(current)) = status.shift_remove("currentMetrics") {
            let cpu = current.iter().find(|m| m["resource"]["name"] == "cpu");
            if let Some(value) = cpu.map(|m| &m["resource"]["current"]["averageUtilization"]).filter(|v| v.is_number())
            {
                status.insert("currentCPUUtilizationPercentage".into(), value.clone());
            }
            if !current.is_empty() {
                notes.push((CURRENT, Value::Array(current)));
            }
        }
    }
    for (key, value) in notes {
        isopod_api::meta::set_annotation(obj, key, &value.to_string());
    }
}

fn hpa_to_v2(obj: &mut Value) {
    let mut take = |key: &str| {
        let text = isopod_api::meta::annotation(obj, key).map(str::to_owned)?;
        isopod_api::meta::remove_annotation(obj, key);
        serde_json::from_str::<Value>(&text).ok()
    };
    let (metrics, behavior, conditions, current) = (take(METRICS), take(BEHAVIOR), take(CONDITIONS), take(CURRENT));
    if let Some(spec) = obj.get_mut("spec").and_then(Value::as_object_mut) {
        let mut all = Vec::new();
        if let Some(percent) = spec.shift_remove("targetCPUUtilizationPercentage").filter(Value::is_number) {
            all.push(json!({"type": "Resource", "resource": {"name": "cpu",
                "target": {"type": "Utilization", "averageUtilization": percent}}}));
        }
        all.extend(metrics.and_then(|m| m.as_array().cloned()).unwrap_or_default());
        if !all.is_empty() {
            spec.insert("metrics".into(), all.into());
        }
        if let Some(behavior) = behavior {
            spec.insert("behavior".into(), behavior);
        }
    }
    if let Some(status) = obj.get_mut("status").and_then(Value::as_object_mut) {
        status.shift_remove("currentCPUUtilizationPercentage");
        for (key, value) in [("conditions", conditions), ("currentMetrics", current)] {
            if let Some(value) = value {
                status.insert(key.into(), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips() {
        let event = json!({"kind": "Event", "apiVersion": "events.k8s.io/v1", "metadata": {"name": "e"}, "note": "n",
            "regarding": {"name": "p"}, "reportingController": "c"});
        let core = convert(event.clone(), &Gvk::new("", "v1", "Event"));
        assert_eq!((&core["message"], &core["involvedObject"]["name"]), (&json!("n"), &json!("p")));
        assert_eq!(convert(core, &Gvk::new("events.k8s.io", "v1", "Event")), event);
        let hpa = json!({"kind": "HorizontalPodAutoscaler", "apiVersion": "autoscaling/v1", "metadata": {"name": "h"},
            "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 50}});
        let v2 = convert(hpa.clone(), &Gvk::new("autoscaling", "v2", "HorizontalPodAutoscaler"));
        assert_eq!(v2["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"], 50);
        assert_eq!(convert(v2, &Gvk::new("autoscaling", "v1", "HorizontalPodAutoscaler")), hpa);
    }
}
