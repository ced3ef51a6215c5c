//! resource.k8s.io: DeviceClasses, ResourceClaims, their templates, ResourceSlices.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{dra_claims, dra_slices};
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, IMMUTABLE, internal, same},
};

/// `deviceclasses`.
pub(crate) struct DeviceClass;
/// `resourceclaims`.
pub(crate) struct ResourceClaim;
/// `resourceclaimtemplates`.
pub(crate) struct ResourceClaimTemplate;
/// `resourceslices`.
pub(crate) struct ResourceSlice;

impl Strategy for DeviceClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        dra_claims::class(&mut e, &At::field(obj, "spec"), &Value::Null);
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        dra_claims::class(&mut e, &At::field(new, "spec"), &old["spec"]);
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::age(obj, now)]
    }
}

impl Strategy for ResourceClaim {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let devices = At::field(obj, "spec").get("devices");
        dra_claims::admin_access(&mut e, cx, dra_claims::asks_admin_access(&devices).as_ref());
        dra_claims::claim(&mut e, &devices);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource.is_empty() {
            let spec = At::field(new, "spec");
            if !same(spec.v, &old["spec"]) {
                e.invalid_as(&spec, internal::named("DeviceClaimSpec", spec.v), IMMUTABLE);
            }
        } else {
            let had = At::field(old, "status");
            if dra_claims::has_admin_access(&had).is_none() {
                dra_claims::admin_access(&mut e, cx, dra_claims::has_admin_access(&At::field(new, "status")).as_ref());
            }
            dra_claims::status(&mut e, new, old);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let mut states = Vec::new();
        if meta::deletion_timestamp(obj).is_some() {
            states.push("deleted");
        }
        if obj["status"]["allocation"].is_null() {
            if meta::deletion_timestamp(obj).is_none() {
                states.push("pending");
            }
        } else {
            states.push("allocated");
            if table::count(&obj["status"]["reservedFor"]) > 0 {
                states.push("reserved");
            }
        }
        vec![table::name(obj), json!(states.join(",")), table::age(obj, now)]
    }
}

impl Strategy for ResourceClaimTemplate {
    fn validate(&self, cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let devices = At::field(obj, "spec").get("spec.devices");
        dra_claims::admin_access(&mut e, cx, dra_claims::asks_admin_access(&devices).as_ref());
        dra_claims::claim(&mut e, &devices);
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(new, "spec");
        if !same(spec.v, &old["spec"]) {
            let mut shown = spec.get("metadata").v.as_object().cloned().unwrap_or_default();
            shown.insert("Spec".to_owned(), internal::named("DeviceClaimSpec", spec.get("spec").v));
            e.invalid_as(&spec, shown, IMMUTABLE);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::age(obj, now)]
    }
}

impl Strategy for ResourceSlice {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        dra_slices::spec(&mut e, &At::field(obj, "spec"), &Value::Null);
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        dra_slices::spec(&mut e, &At::field(new, "spec"), &old["spec"]);
        e.0
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        let text = |field: &str| obj["spec"][field].as_str().unwrap_or_default().to_owned();
        vec![("spec.nodeName", text("nodeName")), ("spec.driver", text("driver"))]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["spec.nodeName", "spec.driver"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        vec![
            table::name(obj),
            table::or(&spec["nodeName"], "<unset>"),
            table::or(&spec["driver"], ""),
            table::or(&spec["pool"]["name"], ""),
            table::age(obj, now),
        ]
    }
}
