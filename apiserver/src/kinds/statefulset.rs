//! StatefulSets.

use std::collections::BTreeSet;

use isopod_api::field::{Error, ErrorList};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, at_most_100_percent, int_or_percent_value, not_decremented, pod_warnings, positive_int_or_percent,
        same,
        template::{always, matching_labels, pod_template, selector_and_template, template_metadata},
        volume_source,
    },
};

/// `statefulsets`.
pub(crate) struct StatefulSet;

impl Strategy for StatefulSet {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
        // The feature is off by default.
        let rolling = obj.pointer_mut("/spec/updateStrategy/rollingUpdate").and_then(Value::as_object_mut);
        rolling.and_then(|rolling| rolling.remove("maxUnavailable"));
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"replicas": 0, "availableReplicas": 0});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"), &Leniency { new: true, template: true });
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            let status = At::field(new, "status");
            for field in ["replicas", "readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"] {
                e.non_negative(&status.get(field));
            }
            e.non_negative(&status.get("observedGeneration"));
            e.non_negative(&status.get("collisionCount"));
            let at_most = |e: &mut Errs, field: &str, limit: &str| {
                let at = status.get(field);
                if at.int0() > status.get(limit).int0() {
                    e.invalid_as(&at, at.int0(), &format!("cannot be greater than status.{limit}"));
                }
            };
            for field in ["readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas"] {
                at_most(&mut e, field, "replicas");
            }
            at_most(&mut e, "availableReplicas", "readyReplicas");
            not_decremented(&mut e, &status.get("collisionCount"), &old["status"]["collisionCount"]);
            return e.0;
        }
        let at = At::field(new, "spec");
        let valid = |spec_of: &Value| {
            let mut e = Errs::new();
            spec(&mut e, &At::field(spec_of, "spec"), &Leniency { new: false, template: true });
            e.is_empty()
        };
        // What is stored and wrong may stay so.
        spec(&mut e, &at, &Leniency { new: false, template: valid(old) });
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

/// What of a spec is looked at.
struct Leniency {
    /// What no update can change.
    new: bool,
    /// The template.
    template: bool,
}

fn spec(e: &mut Errs, at: &At<'_>, look_at: &Leniency) {
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
    for claim in at.get("volumeClaimTemplates").items().iter().filter(|_| look_at.new) {
        volume_source::claim_spec(e, &claim.get("spec"));
    }
    e.non_negative(&at.get("replicas"));
    e.non_negative(&at.get("minReadySeconds"));
    e.non_negative(&at.get("ordinals.start"));
    let service = at.get("serviceName");
    if look_at.new && !service.s().is_empty() {
        e.dns_label(&service);
    }
    selector_and_template(e, at, "statefulset");
    let template = at.get("template");
    if matching_labels(e, at, "") {
        let made = as_made(at.v);
        let made = At::new(template.path.clone(), &made);
        if look_at.template {
            pod_template(e, &made);
        }
        // Upstream looks at the metadata twice.
        template_metadata(e, &made);
    }
    always(e, &template, "StatefulSet");
}

/// The template as the controller makes pods of it: names of hosts are its own, each claim template is a volume, which
/// containers may mount.
fn as_made(spec: &Value) -> Value {
    let mut template = spec["template"].clone();
    let claims = spec["volumeClaimTemplates"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(pod) = template.get_mut("spec").and_then(Value::as_object_mut) else { return template };
    pod.remove("subdomain");
    pod.remove("hostname");
    let names: BTreeSet<&str> =
        claims.iter().map(|claim| claim["metadata"]["name"].as_str().unwrap_or_default()).collect();
    let made = names.iter().map(|name| json!({"name": name, "persistentVolumeClaim": {"claimName": name}}));
    let own = pod.remove("volumes").and_then(|v| v.as_array().cloned()).unwrap_or_default();
    let rest = own.into_iter().filter(|volume| !names.contains(volume["name"].as_str().unwrap_or_default()));
    let volumes = made.chain(rest).collect();
    pod.insert("volumes".to_owned(), volumes);
    template
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
