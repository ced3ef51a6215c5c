//! PersistentVolumeClaims.

use std::cmp::Ordering;

use isopod_api::{
    field::{ErrorList, Path},
    meta,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    persistentvolume::{class, modes, phase},
    pod_defaults,
};
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, IMMUTABLE, internal, pod_warnings, resources, same, volume_source},
};

/// `persistentvolumeclaims`.
pub(crate) struct PersistentVolumeClaim;

/// Data of other namespaces is a feature that is off; who has a reference keeps it.
fn local_data(spec: &mut Value, old: Option<&Value>) {
    let elsewhere = spec["dataSourceRef"]["namespace"].as_str().is_some_and(|namespace| !namespace.is_empty());
    let kept = old.is_some_and(|old| !old["dataSourceRef"].is_null());
    if elsewhere && !kept {
        spec["dataSourceRef"] = Value::Null;
    }
}

/// Unknown data sources are dropped; the two fields say the same when one is missing.
fn data_sources(spec: &mut Value) {
    let known = |source: &Value| {
        let pair = (source["apiGroup"].as_str().unwrap_or_default(), source["kind"].as_str().unwrap_or_default());
        matches!(pair, ("", "PersistentVolumeClaim") | ("snapshot.storage.k8s.io", "VolumeSnapshot"))
    };
    if spec["dataSource"].is_object() && !known(&spec["dataSource"]) {
        spec["dataSource"] = Value::Null;
    }
    // The two data source fields say the same when one is missing.
    let plain = |v: &Value| {
        let mut v = v.clone();
        pod_defaults::set(&mut v, "apiGroup", Value::Null);
        v
    };
    match (spec["dataSource"].is_object(), spec["dataSourceRef"].is_object()) {
        (true, false) => spec["dataSourceRef"] = plain(&spec["dataSource"]),
        (false, true) if spec["dataSourceRef"]["namespace"].as_str().unwrap_or_default().is_empty() => {
            spec["dataSource"] = plain(&spec["dataSourceRef"]);
        }
        _ => {}
    }
    for field in ["dataSource", "dataSourceRef"] {
        if spec[field].is_object() && spec[field].get("apiGroup").is_none() {
            spec[field]["apiGroup"] = Value::Null;
        }
    }
    pod_defaults::drop_nulls(spec);
}

impl Strategy for PersistentVolumeClaim {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"phase": "Pending"});
        local_data(&mut obj["spec"], None);
        data_sources(&mut obj["spec"]);
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
            local_data(&mut new["spec"], Some(&old["spec"]));
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        volume_source::claim_spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            claim_status(&mut e, &At::field(new, "status"));
            return e.0;
        }
        e.0 = self.validate(cx, new);
        // Upstream validates the new spec twice.
        e.0.extend(self.validate(cx, new));
        claim_update(&mut e, new, old);
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let mut out = Vec::new();
        if cx.subresource.is_empty() {
            super::persistentvolume::beta_class(&mut out, obj);
            pod_warnings::claim(&mut out, &At::field(obj, "spec"));
        }
        out
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let bound = spec["volumeName"].as_str().is_some_and(|v| !v.is_empty());
        let (access, capacity) = if bound {
            (modes(&obj["status"]["accessModes"]), table::or(&obj["status"]["capacity"]["storage"], "0"))
        } else {
            (String::new(), json!(""))
        };
        vec![
            table::name(obj),
            phase(obj),
            table::or(&spec["volumeName"], ""),
            capacity,
            json!(access),
            class(obj),
            table::or(&spec["volumeAttributesClassName"], "<unset>"),
            table::age(obj, now),
            table::or(&spec["volumeMode"], "<unset>"),
        ]
    }
}

/// States of a growing claim.
const RESIZES: [&str; 5] = [
    "ControllerResizeInProgress",
    "ControllerResizeInfeasible",
    "NodeResizePending",
    "NodeResizeInProgress",
    "NodeResizeInfeasible",
];

fn claim_status(e: &mut Errs, status: &At<'_>) {
    for (_, value) in status.get("capacity").entries() {
        resources::basic(e, &value);
    }
    let resource = |e: &mut Errs, at: &At<'_>, name: &str| {
        let wrong = isopod_api::names::qualified_name(name);
        let unknown = wrong.is_empty() && resources::is_native(name) && name != "storage";
        if unknown {
            e.unsupported_as(at, name, &["storage"]);
        }
        let broken = unknown || !wrong.is_empty();
        for message in wrong {
            e.invalid_as(at, name, &message);
        }
        broken
    };
    let states = status.get("allocatedResourceStatuses");
    for (name, state) in states.entries() {
        resource(e, &states, name);
        if !RESIZES.contains(&state.s()) {
            let mut sorted = RESIZES;
            sorted.sort_unstable();
            e.unsupported_as(&states, name, &sorted);
        }
    }
    let allocated = status.get("allocatedResources");
    for (name, value) in allocated.entries() {
        if !resource(e, &allocated, name) {
            resources::basic(e, &value);
        }
    }
}

/// The annotation that named the class before there was a field.
const BETA_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

/// The spec is immutable but for the bound volume's name (once), the class (once, from nothing), and for bound claims
/// what they ask of storage and the attributes class.
fn claim_update(e: &mut Errs, new: &Value, old: &Value) {
    let (spec, was) = (At::field(new, "spec"), At::field(old, "spec"));
    let bound = new["status"]["phase"] == "Bound";
    let (mut munged, mut before) = (spec.v.clone(), was.v.clone());
    let put = |spec: &mut Value, field: &str, value: &Value| {
        spec[field] = value.clone();
        pod_defaults::drop_nulls(spec);
    };
    if was.get("volumeName").s().is_empty() {
        put(&mut before, "volumeName", spec.get("volumeName").v);
    }
    let (class, beta) = (spec.get("storageClassName"), meta::annotation(old, BETA_CLASS));
    let first = class.is_set() && !was.get("storageClassName").is_set() && beta.is_none_or(|beta| beta == class.s());
    let moved = first && beta.is_some() && meta::annotation(new, BETA_CLASS).is_none_or(|own| Some(own) == beta);
    if first {
        put(&mut munged, "storageClassName", &Value::Null);
    }
    let annotation = meta::annotation(new, BETA_CLASS);
    if !moved && annotation.unwrap_or_default() != beta.unwrap_or_default() {
        let at = At::new(Path::new("metadata").child("annotations").child(BETA_CLASS), &Value::Null);
        e.invalid_as(&at, annotation.unwrap_or_default(), IMMUTABLE);
    }
    let storage = |claim: &At<'_>| claim.get("resources.requests").key("storage").v.clone();
    if bound && spec.get("resources.requests").is_set() {
        munged["resources"]["requests"]["storage"] = storage(&was);
    }
    let (attributes, had) = (spec.get("volumeAttributesClassName"), was.get("volumeAttributesClassName"));
    if bound && attributes.is_set() {
        put(&mut munged, "volumeAttributesClassName", had.v);
    }
    if !same(&munged, &before) {
        let diff = internal::diff(&internal::claim_spec(&before), &internal::claim_spec(&munged));
        let message =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        e.forbidden(&spec, &format!("{message}\n{diff}"));
    }
    let less = |a: &Value, b: &Value, or: Ordering| match (resources::quantity(a), resources::quantity(b)) {
        (Some(a), Some(b)) => matches!(a.cmp(&b), order if order == Ordering::Less || order == or),
        _ => false,
    };
    let held = &old["status"]["capacity"]["storage"];
    if less(&storage(&spec), &storage(&was), Ordering::Less) && less(&storage(&spec), held, Ordering::Equal) {
        e.forbidden(&spec.get("resources.requests.storage"), "field can not be less than status.capacity");
    }
    e.immutable(&At::new(Path::new("volumeMode"), spec.get("volumeMode").v), was.get("volumeMode").v);
    if had.is_set() && !attributes.is_set() {
        e.forbidden(&attributes, "update from non-nil value to nil is forbidden");
    } else if had.is_set() && attributes.s().is_empty() {
        e.forbidden(&attributes, "update from non-nil value to an empty string is forbidden");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(e: &Errs) -> String {
        e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_bound_claim_has_a_capacity() {
        let cells = |spec: Value, status: Value| {
            let claim = json!({"metadata": {"name": "c"}, "spec": spec, "status": status});
            PersistentVolumeClaim.cells(&claim, Timestamp::UNIX_EPOCH)[3].clone()
        };
        assert_eq!(cells(json!({}), json!({"capacity": {"storage": "1Gi"}})), "");
        assert_eq!(cells(json!({"volumeName": "v"}), json!({"capacity": {"storage": "1Gi"}})), "1Gi");
        assert_eq!(cells(json!({"volumeName": "v"}), json!({})), "0");
    }

    #[test]
    fn data_of_other_namespaces_goes() {
        let other = json!({"dataSourceRef": {"kind": "PersistentVolumeClaim", "name": "a", "namespace": "n"}});
        let kept = |old: Option<Value>| {
            let mut spec = other.clone();
            local_data(&mut spec, old.as_ref());
            spec["dataSourceRef"].is_object()
        };
        assert!(!kept(None) && !kept(Some(json!({}))));
        assert!(kept(Some(json!({"dataSourceRef": {"kind": "X"}}))));
    }

    #[test]
    fn claims_change_little() {
        let old = json!({"metadata": {}, "status": {"phase": "Bound", "capacity": {"storage": "2Gi"}},
            "spec": {"volumeName": "v", "resources": {"requests": {"storage": "2Gi"}}, "volumeAttributesClassName": "a"}});
        for (pointer, value, want) in [
            ("/spec/resources/requests/storage", json!("3Gi"), ""),
            ("/spec/resources/requests/storage", json!("1Gi"), "spec.resources.requests.storage"),
            ("/spec/volumeName", json!("w"), "spec"),
            ("/spec/volumeAttributesClassName", json!("b"), ""),
            ("/spec/volumeAttributesClassName", json!(""), "spec.volumeAttributesClassName"),
            ("/status/phase", json!("Pending"), ""),
            (
                "/metadata",
                json!({"annotations": {BETA_CLASS: "x"}}),
                "metadata.annotations.volume.beta.kubernetes.io/storage-class",
            ),
        ] {
            let mut new = old.clone();
            *new.pointer_mut(pointer).unwrap() = value.clone();
            let mut e = Errs::new();
            claim_update(&mut e, &new, &old);
            assert_eq!(fields(&e), want, "{pointer} {value}");
        }
    }

    #[test]
    fn states_of_growing_claims() {
        let obj = json!({"status": {"capacity": {"storage": "-1"}, "allocatedResourceStatuses": {"storage": "X", "cpu": "NodeResizePending"},
            "allocatedResources": {"storage": "-1"}}});
        let mut e = Errs::new();
        claim_status(&mut e, &At::field(&obj, "status"));
        assert_eq!(
            fields(&e),
            "status.capacity[storage] status.allocatedResourceStatuses status.allocatedResourceStatuses status.allocatedResources[storage]"
        );
    }
}
