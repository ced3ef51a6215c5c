//! The QoS class of a pod.

use std::collections::BTreeMap;

use isopod_api::quantity::Quantity;
use serde_json::Value;

use crate::validation::resources::quantity;

/// `Guaranteed`, `Burstable` or `BestEffort`, from a pod's spec.
pub(crate) fn qos_class(spec: &Value) -> &'static str {
    if !spec["resources"].is_null() && (has(&spec["resources"]["requests"]) || has(&spec["resources"]["limits"])) {
        return of(std::slice::from_ref(&spec["resources"]));
    }
    let resources: Vec<Value> = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| spec[*list].as_array().into_iter().flatten())
        .map(|c| c["resources"].clone())
        .collect();
    of(&resources)
}

fn has(list: &Value) -> bool {
    list.as_object().is_some_and(|m| m.keys().any(|k| k == "cpu" || k == "memory"))
}

fn of(resources: &[Value]) -> &'static str {
    let (mut requests, mut limits): (BTreeMap<&str, Quantity>, BTreeMap<&str, Quantity>) = Default::default();
    let mut guaranteed = true;
    for own in resources {
        add(&mut requests, &own["requests"]);
        if add(&mut limits, &own["limits"]) != 2 {
            guaranteed = false;
        }
    }
    if requests.is_empty() && limits.is_empty() {
        return "BestEffort";
    }
    let equal = requests.iter().all(|(name, request)| limits.get(name).is_some_and(|limit| limit == request));
    if guaranteed && equal && requests.len() == limits.len() { "Guaranteed" } else { "Burstable" }
}

/// Adds positive cpu and memory; returns how many of the two there were.
fn add(sums: &mut BTreeMap<&str, Quantity>, list: &Value) -> usize {
    let mut seen = 0;
    for name in ["cpu", "memory"] {
        let Some(value) = quantity(&list[name]).filter(|q| q.milli_value() > 0) else { continue };
        seen += 1;
        match sums.get_mut(name) {
            Some(sum) => *sum = sum.add(&value),
            None => {
                sums.insert(name, value);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn classes() {
        let both = json!({"cpu": "1", "memory": "1Gi"});
        for (resources, class) in [
            (json!({}), "BestEffort"),
            (json!({"requests": {"cpu": "1"}}), "Burstable"),
            (json!({"requests": both, "limits": both}), "Guaranteed"),
            (json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": both}), "Burstable"),
            (json!({"requests": {"example.com/x": "1"}, "limits": {"example.com/x": "1"}}), "BestEffort"),
        ] {
            let spec = json!({"containers": [{"name": "c", "resources": resources}]});
            assert_eq!(qos_class(&spec), class, "{spec}");
        }
    }

    #[test]
    fn pod_level_resources_decide() {
        let spec = json!({"containers": [{"name": "c"}], "resources": {"requests": {"cpu": "1"}}});
        assert_eq!(qos_class(&spec), "Burstable");
    }
}
