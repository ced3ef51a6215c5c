//! resource.k8s.io: DeviceClasses, ResourceClaims, their templates, ResourceSlices.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pod_defaults;
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, same, volume_source},
};

/// `deviceclasses`.
pub(crate) struct DeviceClass;
/// `resourceclaims`.
pub(crate) struct ResourceClaim;
/// `resourceclaimtemplates`.
pub(crate) struct ResourceClaimTemplate;
/// `resourceslices`.
pub(crate) struct ResourceSlice;

fn claim_defaults(devices: Option<&mut Value>) {
    let Some(requests) = devices.and_then(|d| d.get_mut("requests")).and_then(Value::as_array_mut) else { return };
    for request in requests {
        if let Some(exactly) = request.get_mut("exactly") {
            count_defaults(exactly);
        }
        for alternative in request.get_mut("firstAvailable").and_then(Value::as_array_mut).into_iter().flatten() {
            count_defaults(alternative);
        }
    }
}

fn count_defaults(v: &mut Value) {
    pod_defaults::set(v, "allocationMode", json!("ExactCount"));
    if v["allocationMode"] == "ExactCount" && v["count"].as_i64().unwrap_or_default() == 0 {
        v["count"] = json!(1);
    }
    pod_defaults::drop_nulls(v);
}

fn claim_spec(e: &mut Errs, devices: &At<'_>) {
    let requests = devices.get("requests");
    if requests.len() > 32 {
        e.too_many(&requests, requests.len(), 32);
    }
    let mut seen = Vec::new();
    for at in requests.items() {
        let (name, exactly, first) = (at.get("name"), at.get("exactly"), at.get("firstAvailable"));
        if name.s().is_empty() {
            e.required(&name, "");
        } else {
            e.dns_label(&name);
        }
        if seen.contains(&name.s()) {
            e.duplicate(&at, name.s());
        }
        seen.push(name.s());
        match (exactly.is_set(), first.len() > 0) {
            (false, false) => e.required(&at, "exactly one of `exactly` or `firstAvailable` is required"),
            (true, true) => {
                e.invalid(&at, "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set")
            }
            _ => {}
        }
        let each = if exactly.is_set() { vec![exactly] } else { first.items() };
        for own in each {
            let (class, mode, count) = (own.get("deviceClassName"), own.get("allocationMode"), own.get("count"));
            if class.s().is_empty() {
                e.required(&class, "");
            } else {
                e.dns_subdomain(&class);
            }
            match mode.s() {
                "All" if count.int0() != 0 => e.invalid(&count, "must not be specified when allocationMode is 'All'"),
                "ExactCount" if count.int0() <= 0 => e.invalid_as(&count, count.int0(), "must be greater than zero"),
                "All" | "ExactCount" => {}
                _ => e.unsupported(&mode, &["All", "ExactCount"]),
            }
        }
    }
}

impl Strategy for DeviceClass {
    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::age(obj, now)]
    }
}

impl Strategy for ResourceClaim {
    fn default(&self, obj: &mut Value) {
        claim_defaults(obj.pointer_mut("/spec/devices"));
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        claim_spec(&mut e, &At::field(obj, "spec").get("devices"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource.is_empty() {
            e.immutable(&At::field(new, "spec"), &old["spec"]);
        } else {
            let reserved = At::field(new, "status").get("reservedFor");
            if reserved.len() > 256 {
                e.too_many(&reserved, reserved.len(), 256);
            }
            let allocation = At::field(new, "status").get("allocation");
            let before = &old["status"]["allocation"];
            if allocation.is_set() && !before.is_null() && !same(allocation.v, before) {
                e.immutable(&allocation, before);
            }
            if !allocation.is_set() && reserved.len() > 0 {
                e.forbidden(&reserved, "may not be specified when `allocated` is not set");
            }
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
    fn default(&self, obj: &mut Value) {
        claim_defaults(obj.pointer_mut("/spec/spec/devices"));
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        claim_spec(&mut e, &At::field(obj, "spec").get("spec.devices"));
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        e.immutable(&At::field(new, "spec"), &old["spec"]);
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::age(obj, now)]
    }
}

impl Strategy for ResourceSlice {
    fn default(&self, obj: &mut Value) {
        let now = meta::now();
        for device in obj.pointer_mut("/spec/devices").and_then(Value::as_array_mut).into_iter().flatten() {
            for taint in device.get_mut("taints").and_then(Value::as_array_mut).into_iter().flatten() {
                pod_defaults::set(taint, "timeAdded", json!(now));
            }
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        volume_source::csi_driver_name(&mut e, &spec.get("driver"));
        let pool = spec.get("pool");
        if pool.get("name").s().is_empty() {
            e.required(&pool.get("name"), "");
        }
        if pool.get("resourceSliceCount").int0() <= 0 {
            e.invalid_as(
                &pool.get("resourceSliceCount"),
                pool.get("resourceSliceCount").int0(),
                "must be greater than zero",
            );
        }
        e.non_negative(&pool.get("generation"));
        let places = ["nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection"];
        let set = places
            .iter()
            .filter(|p| {
                let at = spec.get(p);
                at.is_true() || !at.s().is_empty() || at.len() > 0
            })
            .count();
        match set {
            0 => e.required(&spec, "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required"),
            1 => {}
            _ => e.invalid(&spec, "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required, but multiple fields are set"),
        }
        let devices = spec.get("devices");
        if devices.len() > 128 {
            e.too_many(&devices, devices.len(), 128);
        }
        let mut seen = Vec::new();
        for device in devices.items() {
            let name = device.get("name");
            e.dns_label(&name);
            if seen.contains(&name.s()) {
                e.duplicate(&device, name.s());
            }
            seen.push(name.s());
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        let spec = At::field(new, "spec");
        for field in ["driver", "nodeName"] {
            e.immutable(&spec.get(field), &old["spec"][field]);
        }
        e.immutable(&spec.get("pool.name"), &old["spec"]["pool"]["name"]);
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
