//! Pods.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{pod_defaults, pod_qos::qos_class, pod_table};
use crate::{
    registry::strategy::{Context, Strategy},
    validation::{At, Errs, container, net, pod_annotations, pod_spec::pod_spec, pod_update, pod_warnings},
};
use isopod_api::field::ErrorList;

/// `pods`.
pub(crate) struct Pod;

impl Strategy for Pod {
    fn default(&self, obj: &mut Value) {
        if let Some(spec) = obj.get_mut("spec") {
            pod_defaults::features_off(spec);
        }
        if let Some(conditions) = obj.pointer_mut("/status/conditions").and_then(Value::as_array_mut) {
            for condition in conditions {
                pod_defaults::set(condition, "lastProbeTime", Value::Null);
                pod_defaults::set(condition, "lastTransitionTime", Value::Null);
            }
        }
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        select_by_own_labels(obj);
        let mut status = json!({"phase": "Pending", "qosClass": qos_class(&obj["spec"])});
        if obj["spec"]["schedulingGates"].as_array().is_some_and(|g| !g.is_empty()) {
            status["conditions"] = json!([{
                "type": "PodScheduled", "status": "False", "lastProbeTime": null,
                "lastTransitionTime": isopod_api::meta::now(), "reason": "SchedulingGated",
                "message": "Scheduling is blocked due to non-empty scheduling gates",
            }]);
        }
        obj["status"] = status;
        pod_warnings::app_armor_fields(obj);
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        match cx.subresource {
            "" => {
                new["status"] = old["status"].clone();
                for field in ["priority", "preemptionPolicy"] {
                    let kept = old["spec"][field].clone();
                    pod_defaults::set(&mut new["spec"], field, kept);
                }
                pod_defaults::drop_nulls(&mut new["spec"]);
                ungated(new, old);
            }
            "ephemeralcontainers" => keep_all_but(new, old, &["ephemeralContainers"]),
            "resize" => sizes_only(new, old),
            "status" => {
                let spec = old["spec"].clone();
                new["spec"] = spec;
                if new["status"]["qosClass"].as_str().unwrap_or_default().is_empty() {
                    new["status"]["qosClass"] = old["status"]["qosClass"].clone();
                }
                pod_ips(new, old);
                observed(new, old);
            }
            _ => {}
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        metadata_and_spec(&mut e, obj, &spec);
        let ephemeral = spec.get("ephemeralContainers");
        if ephemeral.len() > 0 {
            e.forbidden(&ephemeral, "cannot be set on create");
        }
        if spec.get("schedulingGates").len() > 0 && !spec.get("nodeName").s().is_empty() {
            e.forbidden(&spec.get("nodeName"), "cannot be set until all schedulingGates have been cleared");
        }
        pod_annotations::agree(&mut e, &At::field(obj, "metadata").get("annotations"), &spec);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        let (spec, old_spec) = (At::field(new, "spec"), At::field(old, "spec"));
        match cx.subresource {
            "status" => pod_update::status(&mut e, new, old),
            // The endpoint has checked what a binding changes.
            "binding" => {}
            "ephemeralcontainers" => {
                metadata_and_spec(&mut e, new, &spec);
                if pod_update::is_mirror(old) {
                    return pod_update::refused("static pods do not support ephemeral containers");
                }
                pod_update::ephemeral(&mut e, &spec.get("ephemeralContainers"), &old_spec.get("ephemeralContainers"));
            }
            "resize" => {
                metadata_and_spec(&mut e, new, &spec);
                if let Some(why) = pod_update::resize(&mut e, &spec, &old_spec, old) {
                    return pod_update::refused(why);
                }
            }
            _ => {
                metadata_and_spec(&mut e, new, &spec);
                let annotations = |obj| At::field(obj, "metadata").get("annotations");
                pod_update::annotations(&mut e, &annotations(new), &annotations(old));
                pod_update::update(&mut e, &spec, &old_spec);
            }
        }
        e.0
    }

    fn warnings_before_create(&self, obj: &Value) -> Vec<String> {
        pod_warnings::app_armor_fields(&mut obj.clone())
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let status = At::field(obj, "status");
        match (cx.subresource, old) {
            (_, None) => pod_warnings::pod(obj),
            ("status", _) => ["podIPs", "hostIPs"]
                .iter()
                .flat_map(|list| status.get(list).items())
                .map(|item| item.get("ip"))
                .filter_map(|ip| net::ip_warning(&ip.path, ip.s()))
                .collect(),
            _ => Vec::new(),
        }
    }

    fn grace_period(&self, obj: &Value) -> Option<i64> {
        let finished = matches!(obj["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let unscheduled = obj["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
        if finished || unscheduled {
            return Some(0);
        }
        let seconds = obj["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
        Some(if seconds < 0 { 1 } else { seconds })
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let (spec, status) = (&obj["spec"], &obj["status"]);
        let ips: Vec<&str> =
            status["podIPs"].as_array().into_iter().flatten().filter_map(|ip| ip["ip"].as_str()).collect();
        vec![
            ("spec.nodeName", text(&spec["nodeName"])),
            ("spec.restartPolicy", text(&spec["restartPolicy"])),
            ("spec.schedulerName", text(&spec["schedulerName"])),
            ("spec.serviceAccountName", text(&spec["serviceAccountName"])),
            ("spec.hostNetwork", (spec["hostNetwork"] == true).to_string()),
            ("status.phase", text(&status["phase"])),
            ("status.podIP", ips.first().copied().unwrap_or_default().to_owned()),
            ("status.podIPs", ips.join(",")),
            ("status.nominatedNodeName", text(&status["nominatedNodeName"])),
        ]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.podIPs",
            "status.nominatedNodeName",
        ]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        pod_table::cells(obj, now)
    }

    fn row_conditions(&self, obj: &Value) -> Vec<Value> {
        let (reason, message) = match obj["status"]["phase"].as_str() {
            Some("Succeeded") => ("Succeeded", "The pod has completed successfully."),
            Some("Failed") => ("Failed", "The pod failed."),
            _ => return Vec::new(),
        };
        vec![json!({"type": "Completed", "status": "True", "reason": reason, "message": message})]
    }
}

fn metadata_and_spec(e: &mut Errs, obj: &Value, spec: &At<'_>) {
    pod_annotations::annotations(e, &At::field(obj, "metadata").get("annotations"), spec);
    pod_spec(e, spec, Some(isopod_api::meta::name(obj)));
    let nobody = spec.get("serviceAccountName").s().is_empty();
    for source in spec.get("volumes").items().iter().flat_map(|v| v.get("projected.sources").items()) {
        let token = source.get("serviceAccountToken");
        if nobody && token.is_set() {
            e.forbidden(&token, "must not be specified when serviceAccountName is not set");
        }
    }
    for container in ["containers", "initContainers"].iter().flat_map(|list| spec.get(list).items()) {
        container::trimmed_image(e, &container);
    }
}

/// Constraints that name labels of the pod itself (`matchLabelKeys`) get them into their selectors.
fn select_by_own_labels(obj: &mut Value) {
    let labels = obj["metadata"]["labels"].clone();
    let add = |term: &mut Value| {
        for (list, operator) in [("matchLabelKeys", "In"), ("mismatchLabelKeys", "NotIn")] {
            let keys: Vec<String> =
                term[list].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
            let Some(selector) = term.get_mut("labelSelector").and_then(Value::as_object_mut) else { return };
            let own = keys.iter().filter_map(|key| labels.get(key).map(|value| (key, value)));
            let more: Vec<Value> =
                own.map(|(key, value)| json!({"key": key, "operator": operator, "values": [value]})).collect();
            if more.is_empty() {
                continue;
            }
            match selector.get_mut("matchExpressions").and_then(Value::as_array_mut) {
                Some(expressions) => expressions.extend(more),
                None => drop(selector.insert("matchExpressions".to_owned(), Value::Array(more))),
            }
        }
    };
    let Some(spec) = obj.get_mut("spec") else { return };
    for kind in ["podAffinity", "podAntiAffinity"] {
        for (list, inner) in [
            ("requiredDuringSchedulingIgnoredDuringExecution", ""),
            ("preferredDuringSchedulingIgnoredDuringExecution", "/podAffinityTerm"),
        ] {
            let terms = spec.pointer_mut(&format!("/affinity/{kind}/{list}")).and_then(Value::as_array_mut);
            terms.into_iter().flatten().filter_map(|term| term.pointer_mut(inner)).for_each(add);
        }
    }
    let constraints = spec.get_mut("topologySpreadConstraints").and_then(Value::as_array_mut);
    constraints.into_iter().flatten().for_each(add);
}

/// The condition of a gated pod goes when its last gate goes.
fn ungated(new: &mut Value, old: &Value) {
    let gates = |pod: &Value| pod["spec"]["schedulingGates"].as_array().map(Vec::len).unwrap_or_default();
    if gates(old) == 0 || gates(new) > 0 {
        return;
    }
    if let Some(conditions) = new["status"]["conditions"].as_array_mut() {
        conditions.retain(|c| !(c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated"));
        if conditions.is_empty()
            && let Some(status) = new["status"].as_object_mut()
        {
            status.remove("conditions");
        }
    }
}

/// Takes everything but some fields of the spec from the stored pod.
fn keep_all_but(new: &mut Value, old: &Value, fields: &[&str]) {
    let mut kept = old.clone();
    for field in fields {
        let value = new["spec"][*field].clone();
        if let Some(spec) = kept["spec"].as_object_mut() {
            if value.is_null() {
                spec.remove(*field);
            } else {
                spec.insert((*field).to_owned(), value);
            }
        }
    }
    kept["metadata"]["resourceVersion"] = new["metadata"]["resourceVersion"].clone();
    if let Some(managed) = new["metadata"].get("managedFields") {
        kept["metadata"]["managedFields"] = managed.clone();
    }
    *new = kept;
}

/// A resize takes the resources of containers (and of the pod) and nothing else; containers that came, went or moved are
/// left to validation.
fn sizes_only(new: &mut Value, old: &Value) {
    let names = |pod: &Value, list: &str| -> Vec<Value> {
        pod["spec"][list].as_array().into_iter().flatten().map(|c| c["name"].clone()).collect()
    };
    let lists = ["containers", "initContainers"];
    if lists.iter().any(|list| names(new, list).len() != names(old, list).len()) {
        new["status"] = old["status"].clone();
        return;
    }
    let mut kept = old["spec"].clone();
    for list in lists {
        if names(new, list) != names(old, list) {
            kept[list] = new["spec"][list].clone();
            continue;
        }
        for (i, own) in kept[list].as_array_mut().into_iter().flatten().enumerate() {
            for field in ["resources", "resizePolicy"] {
                own[field] = new["spec"][list][i][field].clone();
            }
            pod_defaults::drop_nulls(own);
        }
    }
    kept["resources"] = new["spec"]["resources"].clone();
    for list in lists.iter().chain(&["resources"]).filter(|list| kept[**list].is_null()).collect::<Vec<_>>() {
        kept.as_object_mut().and_then(|spec| spec.remove(*list));
    }
    new["spec"] = kept;
    keep_all_but(new, old, &["containers", "initContainers", "resources"]);
}

/// Which generation the status is about does not go away because a client does not know the field.
fn observed(new: &mut Value, old: &Value) {
    const FIELD: &str = "observedGeneration";
    let keep = |new: &mut Value, old: &Value| {
        if new[FIELD].as_i64().unwrap_or_default() == 0 && old[FIELD].as_i64().unwrap_or_default() != 0 {
            new[FIELD] = old[FIELD].clone();
        }
        pod_defaults::drop_nulls(new);
    };
    let mut before: Vec<&Value> = old["status"]["conditions"].as_array().into_iter().flatten().collect();
    for condition in new["status"]["conditions"].as_array_mut().into_iter().flatten() {
        if let Some(i) = before.iter().position(|own| own["type"] == condition["type"])
            && let Some(kept) = before.remove(i)[FIELD].as_i64()
            && condition[FIELD].as_i64().unwrap_or_default() == 0
        {
            condition[FIELD] = json!(kept);
        }
    }
    if new["status"].is_object() {
        keep(&mut new["status"], &old["status"]);
    }
}

/// podIP and podIPs say the same.
fn pod_ips(new: &mut Value, old: &Value) {
    let first = new["status"]["podIPs"][0]["ip"].clone();
    let single = new["status"]["podIP"].clone();
    let Some(status) = new["status"].as_object_mut() else { return };
    if let (true, Some(ip)) = (first.is_null(), single.as_str()) {
        if old["status"]["podIP"] == single && !old["status"]["podIPs"].is_null() && status.get("podIPs").is_none() {
            status.remove("podIP");
        } else if !ip.is_empty() {
            status.insert("podIPs".to_owned(), json!([{ "ip": ip }]));
        }
    } else if !first.is_null() {
        status.insert("podIP".to_owned(), first);
    }
    status.retain(|_, v| !v.is_null());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_periods() {
        for (pod, want) in [
            (json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": 5}}), 5),
            (json!({"spec": {"terminationGracePeriodSeconds": 5}}), 0),
            (json!({"spec": {"nodeName": "n"}, "status": {"phase": "Failed"}}), 0),
            (json!({"spec": {"nodeName": "n", "terminationGracePeriodSeconds": -1}}), 1),
        ] {
            assert_eq!(Pod.grace_period(&pod), Some(want), "{pod}");
        }
    }

    #[test]
    fn own_labels_in_selectors() {
        let term = json!({"topologyKey": "z", "labelSelector": {}, "matchLabelKeys": ["v", "none"], "mismatchLabelKeys": ["w"]});
        let mut pod = json!({"metadata": {"labels": {"v": "1", "w": "2"}}, "spec": {
            "affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": term}]}},
            "topologySpreadConstraints": [{"matchLabelKeys": ["v"]}]}});
        select_by_own_labels(&mut pod);
        let selector = "/spec/affinity/podAffinity/preferredDuringSchedulingIgnoredDuringExecution/0/podAffinityTerm/labelSelector";
        assert_eq!(
            pod.pointer(selector).unwrap(),
            &json!({"matchExpressions": [{"key": "v", "operator": "In", "values": ["1"]}, {"key": "w", "operator": "NotIn", "values": ["2"]}]})
        );
        assert!(pod["spec"]["topologySpreadConstraints"][0].get("labelSelector").is_none());
    }

    #[test]
    fn addresses_agree() {
        let mut new = json!({"status": {"podIP": "10.0.0.1"}});
        pod_ips(&mut new, &json!({"status": {}}));
        assert_eq!(new["status"]["podIPs"], json!([{"ip": "10.0.0.1"}]));
    }
}
