//! StatefulSets.

use isopod_api::field::{Error, ErrorList};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pod_defaults;
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, at_most_100_percent, int_or_percent_value, pod_warnings, positive_int_or_percent, same,
        template::{for_replicas, selector_and_template},
    },
};

/// `statefulsets`.
pub(crate) struct StatefulSet;

impl Strategy for StatefulSet {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
        let spec = &mut obj["spec"];
        if !spec.is_object() {
            *spec = json!({});
        }
        let strategy = &mut spec["updateStrategy"];
        if strategy["type"].as_str().unwrap_or_default().is_empty() {
            strategy["type"] = json!("RollingUpdate");
            if strategy["rollingUpdate"].is_null() {
                strategy["rollingUpdate"] = json!({});
            }
        }
        if strategy["type"] == "RollingUpdate" && strategy["rollingUpdate"].is_object() {
            pod_defaults::set(&mut strategy["rollingUpdate"], "partition", json!(0));
        }
        pod_defaults::drop_nulls(strategy);
        // The feature is off by default.
        if let Some(rolling) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
            rolling.remove("maxUnavailable");
        }
        let retention = &mut spec["persistentVolumeClaimRetentionPolicy"];
        for field in ["whenDeleted", "whenScaled"] {
            if retention[field].as_str().unwrap_or_default().is_empty() {
                retention[field] = json!("Retain");
            }
        }
        for claim in spec["volumeClaimTemplates"].as_array_mut().into_iter().flatten() {
            pod_defaults::set(claim, "apiVersion", json!("v1"));
            pod_defaults::set(claim, "kind", json!("PersistentVolumeClaim"));
            if claim["status"].is_null() {
                claim["status"] = json!({});
            }
            pod_defaults::set(&mut claim["status"], "phase", json!("Pending"));
            pod_defaults::set(&mut claim["spec"], "volumeMode", json!("Filesystem"));
        }
        pod_defaults::drop_nulls(spec);
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"replicas": 0, "availableReplicas": 0});
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
            for field in ["replicas", "readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"] {
                e.non_negative(&status.get(field));
            }
            let replicas = status.get("replicas").int0();
            for field in ["readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"] {
                if status.get(field).int0() > replicas {
                    let at = status.get(field);
                    e.invalid_as(&at, at.int0(), "cannot be greater than status.replicas");
                }
            }
            return e.0;
        }
        let at = At::field(new, "spec");
        spec(&mut e, &at);
        let mutable = [
            "replicas",
            "ordinals",
            "template",
            "updateStrategy",
            "revisionHistoryLimit",
            "persistentVolumeClaimRetentionPolicy",
            "minReadySeconds",
        ];
        let strip = |v: &Value| {
            let mut v = v.clone();
            if let Some(map) = v.as_object_mut() {
                map.retain(|k, _| !mutable.contains(&k.as_str()));
            }
            v
        };
        if !same(&strip(&new["spec"]), &strip(&old["spec"])) {
            e.0.push(Error::forbidden(
                &at.path,
                "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
            ));
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut out = pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), false);
        if cx.subresource.is_empty() && obj["spec"]["revisionHistoryLimit"].as_i64().is_some_and(|n| n < 0) {
            out.push("spec.revisionHistoryLimit: a negative value retains all historical revisions; a value >= 0 is recommended".to_owned());
        }
        out
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let number = |v: &Value| v.as_i64().unwrap_or_default();
        let [names, images] = table::containers(&obj["spec"]["template"]["spec"]);
        let ready = format!("{}/{}", number(&obj["status"]["readyReplicas"]), number(&obj["spec"]["replicas"]));
        vec![table::name(obj), json!(ready), table::age(obj, now), names, images]
    }
}

fn spec(e: &mut Errs, at: &At<'_>) {
    let management = at.get("podManagementPolicy");
    match management.s() {
        "" => e.required(&management, ""),
        "OrderedReady" | "Parallel" => {}
        _ => e.invalid(&management, "must be 'OrderedReady' or 'Parallel'"),
    }
    update_strategy(e, &at.get("updateStrategy"));
    let retention = at.get("persistentVolumeClaimRetentionPolicy");
    if retention.is_set() {
        for field in ["whenDeleted", "whenScaled"] {
            e.one_of(&retention.get(field), &["Retain", "Delete"]);
        }
    }
    e.non_negative(&at.get("replicas"));
    e.non_negative(&at.get("minReadySeconds"));
    e.non_negative(&at.get("ordinals.start"));
    let service = at.get("serviceName");
    if !service.s().is_empty() {
        e.dns_label(&service);
    }
    selector_and_template(e, at, "statefulset");
    for_replicas(e, &At::new(at.path.clone(), &with_claims(at.v)));
}

/// The spec with each claim template as a volume of the pods, as the controller will make them: containers may mount them.
fn with_claims(spec: &Value) -> Value {
    let mut spec = spec.clone();
    let claims = spec["volumeClaimTemplates"].as_array().cloned().unwrap_or_default();
    let Some(pod) = spec.pointer_mut("/template/spec").filter(|pod| pod.is_object()) else { return spec };
    if pod["volumes"].is_null() {
        pod["volumes"] = json!([]);
    }
    if let Some(volumes) = pod["volumes"].as_array_mut() {
        for name in claims.iter().filter_map(|claim| claim["metadata"]["name"].as_str()) {
            if !volumes.iter().any(|volume| volume["name"] == name) {
                volumes.push(json!({"name": name, "persistentVolumeClaim": {"claimName": name}}));
            }
        }
    }
    spec
}

fn update_strategy(e: &mut Errs, at: &At<'_>) {
    let (kind, rolling) = (at.get("type"), at.get("rollingUpdate"));
    let internal = || match rolling.v {
        Value::Null => Value::Null,
        v => json!({"Partition": v["partition"].as_i64().unwrap_or_default(), "MaxUnavailable": v["maxUnavailable"]}),
    };
    match kind.s() {
        "" => e.required(at, ""),
        "OnDelete" => {
            if rolling.is_set() {
                e.invalid_as(&rolling, internal(), "only allowed for updateStrategy 'RollingUpdate'");
            }
        }
        "RollingUpdate" => {
            if rolling.is_set() {
                e.non_negative(&rolling.get("partition"));
                let unavailable = rolling.get("maxUnavailable");
                if unavailable.is_set() {
                    positive_int_or_percent(e, &unavailable);
                    if int_or_percent_value(unavailable.v) == 0 {
                        e.invalid(&unavailable, "cannot be 0");
                    }
                    at_most_100_percent(e, &unavailable);
                }
            }
        }
        _ => e.invalid_as(
            at,
            json!({"Type": kind.s(), "RollingUpdate": internal()}),
            "must be 'RollingUpdate' or 'OnDelete'",
        ),
    }
}
