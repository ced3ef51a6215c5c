//! PersistentVolumes.

use isopod_api::{
    field::{ErrorList, Path},
    meta,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, IMMUTABLE, internal, pod_warnings, resources, same, scheduling, template::sorted, volume,
        volume_source,
    },
};

/// `persistentvolumes`.
pub(crate) struct PersistentVolume;

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

pub(super) fn modes(v: &Value) -> String {
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

pub(super) fn phase(obj: &Value) -> Value {
    match meta::deletion_timestamp(obj) {
        Some(_) => json!("Terminating"),
        None => table::or(&obj["status"]["phase"], ""),
    }
}

/// The class: the old annotation counts first.
pub(super) fn class(obj: &Value) -> Value {
    match meta::annotation(obj, "volume.beta.kubernetes.io/storage-class") {
        Some(class) => json!(class),
        None => table::or(&obj["spec"]["storageClassName"], ""),
    }
}

impl Strategy for PersistentVolume {
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
        volume_spec(&mut e, &At::field(obj, "spec"), Some(meta::name(obj)));
        mount_options(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            return ErrorList::new();
        }
        let mut e = Errs(self.validate(cx, new));
        let spec = At::field(new, "spec");
        // Upstream validates the new spec twice, its mount options once.
        volume_spec(&mut e, &spec, Some(meta::name(new)));
        let expansion = "controllerExpandSecretRef";
        let mut sources = new["spec"].clone();
        if sources["csi"].is_object() && old["spec"]["csi"].is_object() && old["spec"]["csi"][expansion].is_null() {
            sources["csi"][expansion] = Value::Null;
        }
        let source = |spec: &Value| SOURCES.iter().map(|s| spec[*s].clone()).collect::<Vec<_>>();
        if !same(&json!(source(&sources)), &json!(source(&old["spec"]))) {
            let shown = |spec: &Value| internal::named("VolumeSource", spec);
            let diff = internal::diff(&shown(&old["spec"]), &shown(&sources));
            let detail = format!("spec.persistentvolumesource is immutable after creation\n{diff}");
            e.forbidden(&spec.get("persistentvolumesource"), &detail);
        }
        // Upstream names these two without their parent.
        e.immutable(&At::new(Path::new("volumeMode"), &new["spec"]["volumeMode"]), &old["spec"]["volumeMode"]);
        let affinity = &new["spec"]["nodeAffinity"];
        if !old["spec"]["nodeAffinity"].is_null() && !same(affinity, &old["spec"]["nodeAffinity"]) {
            let shown = if affinity.is_null() { Value::Null } else { internal::named("VolumeAffinity", affinity) };
            let detail = format!("{IMMUTABLE}, except for updating from beta label to GA");
            e.invalid_as(&At::new(Path::new("nodeAffinity"), affinity), shown, &detail);
        }
        let class = spec.get("volumeAttributesClassName");
        if !class.is_set() && !old["spec"]["volumeAttributesClassName"].is_null() {
            e.forbidden(&class, "update from non-nil value to nil is forbidden");
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let mut out = Vec::new();
        if cx.subresource.is_empty() {
            volume_warnings(&mut out, obj);
        }
        out
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

/// The annotation that named the class of a volume or claim before there was a field.
pub(super) fn beta_class(out: &mut Vec<String>, obj: &Value) {
    let at = At::field(obj, "metadata").get("annotations").key("volume.beta.kubernetes.io/storage-class");
    if at.is_set() {
        out.push(format!("{}: deprecated since v1.8; use \"storageClassName\" attribute instead", at.path));
    }
}

/// Fields and annotations that something newer has come for.
fn volume_warnings(out: &mut Vec<String>, obj: &Value) {
    let (spec, annotations) = (At::field(obj, "spec"), At::field(obj, "metadata").get("annotations"));
    beta_class(out, obj);
    let options = annotations.key(MOUNT_OPTIONS);
    if options.is_set() {
        out.push(format!("{}: deprecated since v1.31; use \"mountOptions\" attribute instead", options.path));
    }
    let reclaim = spec.get("persistentVolumeReclaimPolicy");
    if reclaim.s() == "Recycle" {
        let instead = "Instead, the recommended approach is to use dynamic provisioning.";
        out.push(format!("{}: The Recycle reclaim policy is deprecated. {instead}", reclaim.path));
    }
    for term in spec.get("nodeAffinity.required.nodeSelectorTerms").items() {
        pod_warnings::node_term(out, &term, false);
    }
    for kind in ["cephfs", "photonPersistentDisk", "scaleIO", "storageos", "glusterfs", "rbd"] {
        let known = pod_warnings::DEPRECATED_VOLUMES.iter().find(|(source, ..)| *source == kind);
        if let Some((_, shown, text)) = known.filter(|_| spec.get(kind).is_set()) {
            out.push(format!("{}: {text}", spec.get(shown).path));
        }
    }
}

/// The spec of a PersistentVolume of that name, or (without) of a volume inside an attachment.
pub(crate) fn volume_spec(e: &mut Errs, spec: &At<'_>, name: Option<&str>) {
    let (access, capacity) = (spec.get("accessModes"), spec.get("capacity"));
    let inline = name.is_none();
    const CONTEXT: &str = "may not be specified in the context of inline volumes";
    let unwanted = |e: &mut Errs, at: &At<'_>| {
        if inline && (at.len() > 0 || !at.s().is_empty()) {
            e.forbidden(at, CONTEXT);
        }
    };
    unwanted(e, &spec.get("claimRef"));
    unwanted(e, &capacity);
    if inline && !spec.get("csi").is_set() {
        e.required(&spec.get("csi"), "has to be specified in the context of inline volumes");
    }
    if access.len() == 0 {
        e.required(&access, "");
    }
    volume_source::access_modes(e, &access);
    if !inline {
        capacities(e, &capacity);
    }
    let reclaim = spec.get("persistentVolumeReclaimPolicy");
    if inline && !matches!(reclaim.s(), "" | "Retain") {
        e.forbidden(&reclaim, "may only be Retain in the context of inline volumes");
    } else if !inline && !reclaim.s().is_empty() {
        e.one_of(&reclaim, &["Delete", "Recycle", "Retain"]);
    }
    let affinity = spec.get("nodeAffinity");
    if inline && affinity.is_set() {
        e.forbidden(&affinity, CONTEXT);
    } else if affinity.get("required").is_set() {
        scheduling::node_selector(e, &affinity.get("required"));
    } else if affinity.is_set() {
        e.required(&affinity.get("required"), "must specify required node constraints");
    }
    sources(e, spec, name);
    let root = |path: &str| path.starts_with('/') && path.split('/').all(|part| matches!(part, "" | "."));
    if root(spec.get("hostPath.path").s()) && reclaim.s() == "Recycle" {
        e.forbidden(&reclaim, "may not be 'recycle' for a hostPath mount of '/'");
    }
    let (class, mode) = (spec.get("storageClassName"), spec.get("volumeMode"));
    unwanted(e, &class);
    if !inline && !class.s().is_empty() {
        e.dns_subdomain(&class);
    }
    if inline && !matches!(mode.s(), "" | "Filesystem") {
        e.forbidden(&mode, "may not specify volumeMode other than Filesystem in the context of inline volumes");
    } else if !inline {
        e.one_of_if_set(&mode, &["Block", "Filesystem"]);
    }
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

fn capacities(e: &mut Errs, capacity: &At<'_>) {
    if capacity.len() == 0 {
        e.required(capacity, "");
    }
    if capacity.len() > 1 || capacity.v.get("storage").is_none() {
        let shown = if capacity.len() == 0 { Value::Null } else { sorted(capacity.v) };
        e.unsupported_as(capacity, shown, &["storage"]);
    }
    for (_, value) in capacity.entries() {
        resources::basic(e, &value);
        if let Some(quantity) = resources::quantity(value.v)
            && quantity.milli_value() <= 0
        {
            e.invalid_as(&value, quantity.to_string(), "must be greater than zero");
        }
    }
}

/// Sources whose mounts take options.
const MOUNTED: [&str; 13] = [
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "glusterfs",
    "nfs",
    "rbd",
    "quobyte",
    "iscsi",
    "cinder",
    "cephfs",
    "azureFile",
    "vsphereVolume",
    "azureDisk",
    "storageos",
];

const MOUNT_OPTIONS: &str = "volume.beta.kubernetes.io/mount-options";

fn mount_options(e: &mut Errs, obj: &Value) {
    let option = At::field(obj, "metadata").get("annotations");
    let spec = At::field(obj, "spec");
    let mounted = MOUNTED.iter().any(|kind| spec.get(kind).is_set()) || spec.get("csi").is_set();
    if option.key(MOUNT_OPTIONS).is_set() && !mounted {
        let at = At::new(option.path.child(MOUNT_OPTIONS), option.v);
        e.forbidden(&at, "may not specify mount options for this volume type");
    }
}

fn sources(e: &mut Errs, spec: &At<'_>, name: Option<&str>) {
    let mut count = 0;
    for kind in SOURCES {
        let at = spec.get(kind);
        if !at.is_set() {
            continue;
        }
        count += 1;
        // Upstream lets a flexVolume stand beside others.
        if count > 1 && *kind != "flexVolume" {
            volume::second_source(e, spec, kind);
            continue;
        }
        match *kind {
            "hostPath" => volume::host_path(e, &at),
            "local" => {
                volume_source::plugin(e, "local", &at, name);
                if !spec.get("nodeAffinity").is_set() || name.is_none() {
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
                volume_source::plugin(e, other, &at, Some(name.unwrap_or_default()));
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
        if endpoints.s().is_empty() {
            e.invalid(&endpoints, "if the endpointnamespace is set, it must be a valid namespace name");
        } else {
            e.dns_label(&endpoints);
        }
    }
}

/// Secrets a CSI volume may name.
const CSI_SECRETS: [&str; 4] =
    ["controllerPublishSecretRef", "controllerExpandSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"];

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(e: &Errs) -> String {
        e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn volumes_inside_attachments() {
        let csi = json!({"driver": "d.x", "volumeHandle": "h"});
        for (spec, want) in [
            (json!({"accessModes": ["ReadWriteOnce"], "csi": csi}), ""),
            (
                json!({"accessModes": ["ReadWriteOnce"], "csi": csi, "capacity": {"storage": "1"}, "storageClassName": "c",
                    "persistentVolumeReclaimPolicy": "Delete", "volumeMode": "Block"}),
                "s.capacity s.persistentVolumeReclaimPolicy s.storageClassName s.volumeMode",
            ),
            (json!({"accessModes": ["ReadWriteOnce"], "nfs": {"server": "s", "path": "/x"}}), "s.csi"),
        ] {
            let obj = json!({ "s": spec });
            let mut e = Errs::new();
            volume_spec(&mut e, &At::field(&obj, "s"), None);
            assert_eq!(fields(&e), want, "{obj}");
        }
    }
}
