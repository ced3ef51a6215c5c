//! PersistentVolumes and PersistentVolumeClaims.

use std::cmp::Ordering;

use isopod_api::{
    field::{ErrorList, Path},
    meta,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pod_defaults;
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, IMMUTABLE, internal, resources, same, scheduling, template::sorted, volume, volume_source},
};

/// `persistentvolumes`.
pub(crate) struct PersistentVolume;
/// `persistentvolumeclaims`.
pub(crate) struct PersistentVolumeClaim;

/// Sources of a volume, in the order they are checked.
const SOURCES: &[&str] = &[
    "hostPath",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "glusterfs",
    "flocker",
    "nfs",
    "rbd",
    "quobyte",
    "cephfs",
    "iscsi",
    "cinder",
    "fc",
    "flexVolume",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "scaleIO",
    "local",
    "storageos",
    "csi",
];

fn modes(v: &Value) -> String {
    let short = |mode: &str| match mode {
        "ReadWriteOnce" => "RWO".to_owned(),
        "ReadOnlyMany" => "ROX".to_owned(),
        "ReadWriteMany" => "RWX".to_owned(),
        "ReadWriteOncePod" => "RWOP".to_owned(),
        other => other.to_owned(),
    };
    let mut seen: Vec<String> = Vec::new();
    for mode in ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"] {
        if v.as_array().into_iter().flatten().any(|m| m == mode) {
            seen.push(short(mode));
        }
    }
    seen.join(",")
}

fn phase(obj: &Value) -> Value {
    match meta::deletion_timestamp(obj) {
        Some(_) => json!("Terminating"),
        None => table::or(&obj["status"]["phase"], ""),
    }
}

/// The class: the old annotation counts first.
fn class(obj: &Value) -> Value {
    match meta::annotation(obj, "volume.beta.kubernetes.io/storage-class") {
        Some(class) => json!(class),
        None => table::or(&obj["spec"]["storageClassName"], ""),
    }
}

impl Strategy for PersistentVolume {
    fn default(&self, obj: &mut Value) {
        if obj["status"]["phase"].as_str().unwrap_or_default().is_empty() {
            obj["status"]["phase"] = json!("Pending");
        }
        if obj["spec"]["hostPath"].is_object() {
            pod_defaults::set(&mut obj["spec"]["hostPath"], "type", json!(""));
        }
        super::clean(obj, &["/spec", ""]);
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"phase": "Pending", "lastPhaseTransitionTime": meta::now()});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        } else if new["status"]["phase"] != old["status"]["phase"]
            && new["status"]["lastPhaseTransitionTime"] == old["status"]["lastPhaseTransitionTime"]
        {
            new["status"]["lastPhaseTransitionTime"] = json!(meta::now());
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        volume_spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            return ErrorList::new();
        }
        let mut e = Errs(self.validate(cx, new));
        let spec = At::field(new, "spec");
        let source = |v: &Value| SOURCES.iter().map(|s| v["spec"][*s].clone()).collect::<Vec<_>>();
        if !same(&json!(source(new)), &json!(source(old))) {
            let shown = |v: &Value| internal::named("VolumeSource", &v["spec"]);
            let diff = internal::diff(&shown(old), &shown(new));
            let detail = format!("spec.persistentvolumesource is immutable after creation\n{diff}");
            e.forbidden(&spec.get("persistentvolumesource"), &detail);
        }
        // Upstream names these two without their parent.
        e.immutable(&At::new(Path::new("volumeMode"), &new["spec"]["volumeMode"]), &old["spec"]["volumeMode"]);
        let affinity = &new["spec"]["nodeAffinity"];
        if !old["spec"]["nodeAffinity"].is_null() && !same(affinity, &old["spec"]["nodeAffinity"]) {
            let shown = if affinity.is_null() { Value::Null } else { internal::named("VolumeAffinity", affinity) };
            e.invalid_as(&At::new(Path::new("nodeAffinity"), affinity), shown, IMMUTABLE);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let claim = match &spec["claimRef"] {
            Value::Null => String::new(),
            claim => format!(
                "{}/{}",
                claim["namespace"].as_str().unwrap_or_default(),
                claim["name"].as_str().unwrap_or_default()
            ),
        };
        vec![
            table::name(obj),
            table::or(&spec["capacity"]["storage"], ""),
            json!(modes(&spec["accessModes"])),
            table::or(&spec["persistentVolumeReclaimPolicy"], ""),
            phase(obj),
            json!(claim),
            class(obj),
            table::or(&spec["volumeAttributesClassName"], "<unset>"),
            table::or(&obj["status"]["reason"], ""),
            table::age(obj, now),
            table::or(&spec["volumeMode"], "<unset>"),
        ]
    }
}

fn volume_spec(e: &mut Errs, spec: &At<'_>) {
    let (access, capacity) = (spec.get("accessModes"), spec.get("capacity"));
    if access.len() == 0 {
        e.required(&access, "");
    }
    volume_source::access_modes(e, &access);
    if capacity.len() == 0 {
        e.required(&capacity, "");
    }
    if capacity.len() > 1 || capacity.v.get("storage").is_none() {
        let shown = if capacity.len() == 0 { Value::Null } else { sorted(capacity.v) };
        e.unsupported_as(&capacity, shown, &["storage"]);
    }
    for (_, value) in capacity.entries() {
        if let Some(quantity) = resources::quantity(value.v)
            && quantity.milli_value() <= 0
        {
            e.invalid_as(&value, quantity.to_string(), "must be greater than zero");
        }
    }
    let reclaim = spec.get("persistentVolumeReclaimPolicy");
    if !reclaim.s().is_empty() {
        e.one_of(&reclaim, &["Delete", "Recycle", "Retain"]);
    }
    let affinity = spec.get("nodeAffinity");
    if affinity.is_set() {
        if affinity.get("required").is_set() {
            scheduling::node_selector(e, &affinity.get("required"));
        } else {
            e.required(&affinity.get("required"), "must specify required node constraints");
        }
    }
    sources(e, spec);
    let root = |path: &str| path.starts_with('/') && path.split('/').all(|part| matches!(part, "" | "."));
    if root(spec.get("hostPath.path").s()) && reclaim.s() == "Recycle" {
        e.forbidden(&reclaim, "may not be 'recycle' for a hostPath mount of '/'");
    }
    let class = spec.get("storageClassName");
    if !class.s().is_empty() {
        e.dns_subdomain(&class);
    }
    e.one_of_if_set(&spec.get("volumeMode"), &["Block", "Filesystem"]);
    let attributes = spec.get("volumeAttributesClassName");
    if attributes.is_set() {
        if attributes.s().is_empty() {
            e.required(&attributes, "an empty string is disallowed");
        } else {
            e.dns_subdomain(&attributes);
        }
        if !spec.get("csi").is_set() {
            e.required(&spec.get("csi"), "has to be specified when using volumeAttributesClassName");
        }
    }
}

fn sources(e: &mut Errs, spec: &At<'_>) {
    let mut count = 0;
    for kind in SOURCES {
        let at = spec.get(kind);
        if !at.is_set() {
            continue;
        }
        count += 1;
        if count > 1 {
            e.forbidden(&at, "may not specify more than 1 volume type");
            continue;
        }
        match *kind {
            "hostPath" => volume::host_path(e, &at),
            "local" => {
                volume_source::plugin(e, "local", &at);
                if !spec.get("nodeAffinity").is_set() {
                    e.required(&spec.get("nodeAffinity"), "Local volume requires node affinity");
                }
            }
            "csi" => {
                volume_source::csi_driver_name(e, &at.get("driver"));
                if at.get("volumeHandle").s().is_empty() {
                    e.required(&at.get("volumeHandle"), "");
                }
                for secret in CSI_SECRETS {
                    volume_source::secret_reference(e, &at.get(secret));
                }
            }
            other => {
                volume_source::plugin(e, other, &at);
                namespace_of(e, other, &at);
            }
        }
    }
    if count == 0 {
        e.required(spec, "must specify a volume type");
    }
}

/// Volumes of the cluster may say in which namespace what they need is.
fn namespace_of(e: &mut Errs, kind: &str, at: &At<'_>) {
    let (secrets, endpoints) = (at.get("secretNamespace"), at.get("endpointsNamespace"));
    if kind == "azureFile" && secrets.is_set() && secrets.s().is_empty() {
        e.required(&secrets, "");
    }
    if kind == "glusterfs" && endpoints.is_set() {
        e.dns_label(&endpoints);
    }
}

/// Secrets a CSI volume may name.
const CSI_SECRETS: [&str; 5] = [
    "controllerPublishSecretRef",
    "controllerExpandSecretRef",
    "nodePublishSecretRef",
    "nodeExpandSecretRef",
    "nodeStageSecretRef",
];

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
    fn default(&self, obj: &mut Value) {
        if obj["status"]["phase"].as_str().unwrap_or_default().is_empty() {
            obj["status"]["phase"] = json!("Pending");
        }
        super::clean(obj, &["/spec", ""]);
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"phase": "Pending"});
        data_sources(&mut obj["spec"]);
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
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
            for (name, value) in At::field(new, "status").get("capacity").entries() {
                resources::quantity_value(&mut e, &value, name);
            }
            return e.0;
        }
        e.0 = self.validate(cx, new);
        claim_update(&mut e, &At::field(new, "spec"), &At::field(old, "spec"), old);
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let bound = spec["volumeName"].as_str().is_some_and(|v| !v.is_empty());
        let (access, capacity) = if bound {
            (modes(&obj["status"]["accessModes"]), table::or(&obj["status"]["capacity"]["storage"], ""))
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

/// The spec is immutable but for the bound volume's name (once), the requested size of a bound claim and the attributes
/// class.
fn claim_update(e: &mut Errs, spec: &At<'_>, old: &At<'_>, old_obj: &Value) {
    let bound = old_obj["status"]["phase"] == "Bound";
    let mut munged = spec.v.clone();
    if old.get("volumeName").s().is_empty()
        && let Some(map) = munged.as_object_mut()
    {
        map.remove("volumeName");
    }
    let (size, was) = (spec.get("resources.requests").key("storage"), old.get("resources.requests").key("storage"));
    if bound && !old.get("volumeName").s().is_empty() {
        munged["resources"]["requests"]["storage"] = was.v.clone();
    }
    for field in ["volumeAttributesClassName"] {
        if let Some(map) = munged.as_object_mut() {
            map.remove(field);
            if old.get(field).is_set() {
                map.insert(field.to_owned(), old.get(field).v.clone());
            }
        }
    }
    // Set once from nothing by the default class controller.
    if !old.get("storageClassName").is_set()
        && let Some(map) = munged.as_object_mut()
    {
        map.remove("storageClassName");
    }
    if !same(&munged, old.v) {
        // What may be set once is the same on both sides of the diff.
        let mut before = old.v.clone();
        for field in ["volumeName", "storageClassName"] {
            if !old.get(field).is_set() && spec.get(field).is_set() {
                before[field] = spec.get(field).v.clone();
                munged[field] = spec.get(field).v.clone();
            }
        }
        let diff = internal::diff(&internal::claim_spec(&before), &internal::claim_spec(&munged));
        let message =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        e.forbidden(spec, &format!("{message}\n{diff}"));
    }
    if let (Some(now), Some(then)) = (resources::quantity(size.v), resources::quantity(was.v))
        && now.cmp(&then) == Ordering::Less
        && resources::quantity(&old_obj["status"]["capacity"]["storage"])
            .is_none_or(|held| now.cmp(&held) != Ordering::Greater)
    {
        e.forbidden(&spec.get("resources.requests.storage"), "field can not be less than status.capacity");
    }
    e.immutable(&At::new(Path::new("volumeMode"), spec.get("volumeMode").v), old.get("volumeMode").v);
    let (class, before) = (spec.get("volumeAttributesClassName"), old.get("volumeAttributesClassName"));
    if before.is_set() && !class.is_set() {
        e.forbidden(&class, "update from non-nil value to nil is forbidden");
    }
}
