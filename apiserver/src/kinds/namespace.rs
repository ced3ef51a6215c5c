//! Namespaces.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, meta::finalizer_name},
};

/// `namespaces`.
pub(crate) struct Namespace;

impl Strategy for Namespace {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        let name = meta::name(obj).to_owned();
        meta::set_label(obj, "kubernetes.io/metadata.name", &name);
        obj["status"] = json!({"phase": "Active"});
        let finalizers = obj["spec"]["finalizers"].as_array().cloned().unwrap_or_default();
        if !finalizers.contains(&json!("kubernetes")) {
            let mut all = finalizers;
            all.push(json!("kubernetes"));
            obj["spec"]["finalizers"] = json!(all);
        }
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        match cx.subresource {
            "" => {
                new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
                new["status"] = old["status"].clone();
            }
            "status" => new["spec"] = old["spec"].clone(),
            "finalize" => new["status"] = old["status"].clone(),
            _ => {}
        }
        for path in ["/spec", ""] {
            super::clean(new, &[path]);
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let list = At::field(obj, "spec").get("finalizers");
        for finalizer in list.items() {
            // Upstream leaves the index out here.
            finalizer_name(&mut e, &At::new(list.path.clone(), finalizer.v));
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        let mut e = Errs::new();
        match cx.subresource {
            "" => e.0 = self.validate(cx, new),
            "finalize" => {
                for finalizer in At::field(new, "spec").get("finalizers").items() {
                    finalizer_name(&mut e, &finalizer);
                }
            }
            "status" => {
                let status = At::field(new, "status");
                let phase = At::new(status.path.child("Phase"), status.get("phase").v);
                if At::field(new, "metadata").get("deletionTimestamp").is_set() {
                    if phase.s() != "Terminating" {
                        e.invalid_str(&phase, "may only be 'Terminating' if `deletionTimestamp` is not empty");
                    }
                } else if phase.s() != "Active" {
                    e.invalid_str(&phase, "may only be 'Active' if `deletionTimestamp` is empty");
                }
            }
            _ => {}
        }
        e.0
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("status.phase", obj["status"]["phase"].as_str().unwrap_or_default().to_owned())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["status.phase"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::or(&obj["status"]["phase"], ""), table::age(obj, now)]
    }
}
