//! ReplicaSets and ReplicationControllers.

use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, pod_warnings, same,
        template::{always, for_replicas, labels_match, pod_template, selector_and_template},
    },
};

/// `replicasets`.
pub(crate) struct ReplicaSet;
/// `replicationcontrollers`.
pub(crate) struct ReplicationController;

fn cells(obj: &Value, now: Timestamp, selector: String) -> Vec<Value> {
    let (spec, status) = (&obj["spec"], &obj["status"]);
    let [names, images] = table::containers(&spec["template"]["spec"]);
    vec![
        table::name(obj),
        table::int(&spec["replicas"]),
        table::int(&status["replicas"]),
        table::int(&status["readyReplicas"]),
        table::age(obj, now),
        names,
        images,
        json!(selector),
    ]
}

fn status(e: &mut Errs, at: &At<'_>) {
    for field in [
        "replicas",
        "fullyLabeledReplicas",
        "readyReplicas",
        "availableReplicas",
        "observedGeneration",
        "terminatingReplicas",
    ] {
        e.non_negative(&at.get(field));
    }
    let n = |field: &str| at.get(field).int0();
    for (field, limit, what) in [
        ("fullyLabeledReplicas", n("replicas"), "status.replicas"),
        ("readyReplicas", n("replicas"), "status.replicas"),
        ("availableReplicas", n("replicas"), "status.replicas"),
        ("availableReplicas", n("readyReplicas"), "readyReplicas"),
    ] {
        if n(field) > limit {
            e.invalid_as(&at.get(field), n(field), &format!("cannot be greater than {what}"));
        }
    }
}

impl Strategy for ReplicaSet {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"replicas": 0});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        e.non_negative(&spec.get("replicas"));
        e.non_negative(&spec.get("minReadySeconds"));
        // Upstream's text is that of Deployments.
        selector_and_template(&mut e, &spec, "deployment");
        for_replicas(&mut e, &spec);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            let mut e = Errs::new();
            status(&mut e, &At::field(new, "status"));
            return e.0;
        }
        let mut e = Errs(self.validate(cx, new));
        e.immutable(&At::field(new, "spec").get("selector"), &old["spec"]["selector"]);
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), true)
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        cells(obj, now, table::selector(&obj["spec"]["selector"]))
    }
}

impl Strategy for ReplicationController {
    fn default(&self, obj: &mut Value) {
        super::template_defaults(obj, "/spec/template/spec");
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"replicas": 0});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        e.non_negative(&spec.get("minReadySeconds"));
        let selector = spec.get("selector");
        if selector.len() == 0 {
            e.required(&selector, "");
        }
        e.non_negative(&spec.get("replicas"));
        let template = spec.get("template");
        if !template.is_set() {
            e.required(&template, "");
            return e.0;
        }
        let labels = template.get("metadata.labels");
        if selector.len() > 0 && !selector.entries().iter().all(|(k, v)| same(labels.key(k).v, v.v)) {
            labels_match(&mut e, &template, false);
        }
        pod_template(&mut e, &template);
        always(&mut e, &template, "ReplicationController");
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            let mut e = Errs::new();
            status(&mut e, &At::field(new, "status"));
            return e.0;
        }
        // Upstream validates the new spec twice.
        [self.validate(cx, new), self.validate(cx, new)].concat()
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        pod_warnings::workload(cx, obj, old, &At::field(obj, "spec").get("template"), true)
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("status.replicas", obj["status"]["replicas"].as_i64().unwrap_or_default().to_string())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        cells(obj, now, table::labels(&obj["spec"]["selector"]))
    }
}
