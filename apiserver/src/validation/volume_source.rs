//! Volume sources that a plugin or a driver serves, shared by pods and PersistentVolumes, and the checks of claims.

use std::sync::LazyLock;

use isopod_api::field::Path;
use regex::Regex;
use serde_json::json;

use super::{At, Errs, resources, selector};

/// Fields a source cannot be without.
const REQUIRED: &[(&str, &[&str])] = &[
    ("gitRepo", &["repository"]),
    ("gcePersistentDisk", &["pdName"]),
    ("awsElasticBlockStore", &["volumeID"]),
    ("nfs", &["server", "path"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("glusterfs", &["endpoints", "path"]),
    ("cinder", &["volumeID"]),
    ("azureFile", &["secretName", "shareName"]),
    ("vsphereVolume", &["volumePath"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("flexVolume", &["driver"]),
    ("local", &["path"]),
];

/// A source by name, of a pod or of a PersistentVolume (whose name is given).
pub(crate) fn plugin(e: &mut Errs, kind: &str, at: &At<'_>, volume: Option<&str>) {
    // Upstream has an older name for this one.
    let renamed = (kind == "gcePersistentDisk").then(|| {
        let path = at.path.to_string();
        At::new(Path::new(&path.replace("gcePersistentDisk", "persistentDisk")), at.v)
    });
    let at = renamed.as_ref().unwrap_or(at);
    let required = REQUIRED.iter().find(|(name, _)| *name == kind).map(|(_, fields)| *fields).unwrap_or_default();
    for field in required {
        let field = at.get(field);
        if field.s().is_empty() {
            e.required(&field, "");
        }
    }
    match kind {
        "gitRepo" => super::volume::descending_path(e, &at.get("directory")),
        "gcePersistentDisk" | "awsElasticBlockStore" => {
            let partition = at.get("partition");
            if !(0..=255).contains(&partition.int0()) {
                e.invalid(&partition, "must be between 1 and 255, inclusive");
            }
        }
        "nfs" => {
            let path = at.get("path");
            if !path.s().starts_with('/') {
                e.invalid_str(&path, "must be an absolute path");
            }
        }
        "csi" => {
            csi_driver_name(e, &at.get("driver"));
            let secret = at.get("nodePublishSecretRef");
            let name = secret.get("name");
            if secret.is_set() && name.s().is_empty() {
                e.required(&name, "");
            } else if secret.is_set() {
                // Upstream leaves the field of the reference out.
                e.dns_subdomain(&At::new(at.path.child("name"), name.v));
            }
        }
        "cephfs" | "rbd" => {
            if at.get("monitors").len() == 0 {
                e.required(&at.get("monitors"), "");
            }
            if kind == "rbd" && at.get("image").s().is_empty() {
                e.required(&at.get("image"), "");
            }
        }
        "local" if !at.get("path").s().is_empty() => super::volume::no_backsteps(e, &at.get("path")),
        "flocker" => flocker(e, at),
        "quobyte" => quobyte(e, at),
        "azureDisk" => azure_disk(e, at),
        "storageos" => {
            for (field, needed) in [("volumeName", true), ("volumeNamespace", false)] {
                let name = at.get(field);
                if !name.s().is_empty() {
                    e.dns_label(&name);
                } else if needed {
                    e.required(&name, "");
                }
            }
            named_secret(e, at, volume.is_some());
        }
        "cinder" => named_secret(e, at, volume.is_some()),
        "flexVolume" => {
            for (key, option) in at.get("options").entries() {
                let domain = format!(".{}", key.split_once('/').map_or(key, |k| k.0).to_lowercase());
                if [".kubernetes.io", ".k8s.io"].iter().any(|d| domain.ends_with(d)) {
                    e.invalid_as(&option, key, "kubernetes.io and k8s.io namespaces are reserved");
                }
            }
        }
        "fc" => {
            if at.get("targetWWNs").len() == 0 && at.get("wwids").len() == 0 {
                e.required(&at.get("targetWWNs"), "must specify either targetWWNs or wwids, but not both");
            } else if at.get("targetWWNs").len() > 0 && at.get("wwids").len() > 0 {
                e.invalid(&at.get("targetWWNs"), "targetWWNs and wwids can not be specified simultaneously");
            }
            let lun = at.get("lun");
            if at.get("targetWWNs").len() > 0 && !lun.is_set() {
                e.required(&lun, "lun is required if targetWWNs is specified");
            } else if at.get("targetWWNs").len() > 0 {
                unit_number(e, &lun);
            }
        }
        "iscsi" => iscsi(e, at, volume),
        _ => {}
    }
}

/// `secretRef` with a name, and a namespace when the volume is not a pod's own.
fn named_secret(e: &mut Errs, at: &At<'_>, namespaced: bool) {
    let secret = at.get("secretRef");
    for field in ["name", "namespace"].into_iter().take(if namespaced { 2 } else { 1 }) {
        if secret.is_set() && secret.get(field).s().is_empty() {
            e.required(&secret.get(field), "");
        }
    }
}

/// `lun`.
fn unit_number(e: &mut Errs, at: &At<'_>) {
    if !(0..=255).contains(&at.int0()) {
        e.invalid(at, "must be between 0 and 255, inclusive");
    }
}

fn flocker(e: &mut Errs, at: &At<'_>) {
    let (name, uuid) = (at.get("datasetName"), at.get("datasetUUID"));
    match (name.s().is_empty(), uuid.s().is_empty()) {
        (true, true) => e.required(at, "one of datasetName and datasetUUID is required"),
        (false, false) => {
            e.invalid_as(at, "resource", "datasetName and datasetUUID can not be specified simultaneously");
        }
        _ => {}
    }
    if name.s().contains('/') {
        e.invalid(&name, "must not contain '/'");
    }
}

fn quobyte(e: &mut Errs, at: &At<'_>) {
    const PAIRS: &str = "must be a host:port pair or multiple pairs separated by commas";
    let registry = at.get("registry");
    let is_pair =
        |text: &str| text.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':') || host.ends_with(']'));
    if registry.s().is_empty() {
        e.required(&registry, PAIRS);
    } else if at.get("tenant").s().len() >= 65 {
        e.required(&at.get("tenant"), "must be a UUID and may not exceed a length of 64 characters");
    } else {
        for _ in registry.s().split(',').filter(|pair| !is_pair(pair)) {
            e.invalid(&registry, PAIRS);
        }
    }
    if at.get("volume").s().is_empty() {
        e.required(&at.get("volume"), "");
    }
}

fn azure_disk(e: &mut Errs, at: &At<'_>) {
    e.one_of_if_set(&at.get("cachingMode"), &["None", "ReadOnly", "ReadWrite"]);
    let (kind, uri) = (at.get("kind"), at.get("diskURI"));
    e.one_of_if_set(&kind, &["Dedicated", "Managed", "Shared"]);
    let managed = kind.s() == "Managed";
    if managed && !uri.s().starts_with("/subscriptions/") {
        let form = "/subscriptions/{sub-id}/resourcegroups/{group-name}/providers/microsoft.compute/disks/{disk-id}";
        e.unsupported(&uri, &[form]);
    } else if kind.is_set() && !managed && !uri.s().starts_with("https://") {
        e.unsupported(&uri, &["https://{account-name}.blob.core.windows.net/{container-name}/{disk-name}.vhd"]);
    }
}

fn iscsi(e: &mut Errs, at: &At<'_>, volume: Option<&str>) {
    let (portal, initiator) = (at.get("targetPortal"), at.get("initiatorName"));
    if let Some(name) = volume.filter(|_| initiator.is_set()) {
        // Upstream's field begins with a small letter only here.
        long_portal(e, &At::new(at.path.child("targetportal"), portal.v), name, portal.s());
    }
    if !at.get("iqn").s().is_empty() {
        iscsi_name(e, &at.get("iqn"), volume.is_some());
    }
    unit_number(e, &at.get("lun"));
    let chap = at.get("chapAuthDiscovery").is_true() || at.get("chapAuthSession").is_true();
    if chap && !at.get("secretRef").is_set() {
        e.required(&at.get("secretRef"), "");
    }
    if volume.is_some() {
        let secret = at.get("secretRef");
        if secret.is_set() && secret.get("name").s().is_empty() {
            e.required(&secret.get("name"), "");
        }
    }
    if initiator.is_set() {
        iscsi_name(e, &At::new(at.path.child("initiatorname"), initiator.v), volume.is_some());
    }
}

/// An initiator's name is made of both; `at` is what is reported.
pub(crate) fn long_portal(e: &mut Errs, at: &At<'_>, volume: &str, portal: &str) {
    if volume.len() + 1 + portal.len() > 64 {
        e.invalid_str(at, "Total length of <volume name>:<iscsi.targetPortal> must be under 64 characters if iscsi.initiatorName is specified.");
    }
}

#[expect(clippy::expect_used, reason = "constants")]
static ISCSI_NAMES: LazyLock<[(&str, Regex); 3]> = LazyLock::new(|| {
    let pattern = |text: &str| Regex::new(text).expect("a pattern");
    [
        ("iqn", pattern(r"iqn\.[0-9]{4}-[0-9]{2}\.([[:alnum:].-]+)(:[^,;*&$|\s]+)$")),
        ("eui", pattern("^eui.[[:alnum:]]{16}$")),
        ("naa", pattern("^naa.[[:alnum:]]{32}$")),
    ]
});

fn iscsi_name(e: &mut Errs, at: &At<'_>, of_cluster: bool) {
    match ISCSI_NAMES.iter().find(|(prefix, _)| at.s().starts_with(prefix)) {
        Some((_, pattern)) if pattern.is_match(at.s()) => {}
        None if !of_cluster => e.invalid_str(at, "must be valid format starting with iqn, eui, or naa"),
        _ => e.invalid_str(at, "must be valid format"),
    }
}

/// A reference of a volume to a secret of any namespace.
pub(crate) fn secret_reference(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (name, namespace) = (at.get("name"), at.get("namespace"));
    if name.s().is_empty() {
        e.required(&name, "");
    } else {
        e.dns_subdomain(&name);
    }
    if namespace.s().is_empty() {
        e.required(&namespace, "");
    } else {
        e.dns_label(&namespace);
    }
}

/// A CSI driver's name.
pub(crate) fn csi_driver_name(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        e.required(at, "");
    }
    if at.s().len() > 63 {
        e.too_long(at, 63);
    }
    // Upstream says of a missing name that it is no name, too.
    for message in isopod_api::names::dns1123_subdomain(&at.s().to_lowercase()) {
        e.invalid_str(at, &message);
    }
}

/// `ephemeral`: a claim template.
pub(crate) fn ephemeral(e: &mut Errs, at: &At<'_>) {
    let template = at.get("volumeClaimTemplate");
    if !template.is_set() {
        return e.required(&template, "");
    }
    let metadata = template.get("metadata");
    super::meta::annotations(e, &metadata.get("annotations"));
    super::meta::labels(e, &metadata.get("labels"));
    // Upstream makes the fields' names of those of its struct.
    for (field, shown) in [
        ("name", "name"),
        ("generateName", "generateName"),
        ("namespace", "namespace"),
        ("uid", "uID"),
        ("resourceVersion", "resourceVersion"),
        ("generation", "generation"),
        ("creationTimestamp", "creationTimestamp"),
        ("deletionTimestamp", "deletionTimestamp"),
        ("ownerReferences", "ownerReferences"),
        ("finalizers", "finalizers"),
    ] {
        let own = metadata.get(field);
        if !own.s().is_empty() || own.len() > 0 || own.int0() != 0 {
            e.forbidden(&metadata.get(shown), "cannot be set");
        }
    }
    claim_spec(e, &template.get("spec"));
}

/// The spec of a PersistentVolumeClaim.
pub(crate) fn claim_spec(e: &mut Errs, spec: &At<'_>) {
    let modes = spec.get("accessModes");
    if modes.len() == 0 {
        e.required(&modes, "at least 1 access mode is required");
    }
    selector::label_selector(e, &spec.get("selector"));
    access_modes(e, &modes);
    let resources = spec.get("resources");
    let storage = resources.get("requests").key("storage");
    let shown = At::new(resources.path.key("storage"), storage.v);
    if storage.is_set() {
        if let Some(value) = resources::quantity(storage.v)
            && value.milli_value() <= 0
        {
            e.invalid_as(&shown, value.to_string(), "must be greater than zero");
        }
    } else {
        e.required(&shown, "");
    }
    let class = spec.get("storageClassName");
    if class.is_set() && !class.s().is_empty() {
        e.dns_subdomain(&class);
    }
    e.one_of_if_set(&spec.get("volumeMode"), &["Block", "Filesystem"]);
    let (source, reference) = (spec.get("dataSource"), spec.get("dataSourceRef"));
    data_source(e, &source, false);
    data_source(e, &reference, true);
    let alike = |field: &str| source.get(field).s() == reference.get(field).s();
    if source.is_set() && !reference.get("namespace").s().is_empty() {
        e.invalid_as(spec, json!({}), "may not be specified when dataSourceRef.namespace is specified");
    } else if source.is_set() && reference.is_set() && !["apiGroup", "kind", "name"].into_iter().all(alike) {
        e.invalid_as(spec, json!({}), "must match dataSourceRef");
    }
    let attributes = spec.get("volumeAttributesClassName");
    if attributes.is_set() && !attributes.s().is_empty() {
        e.dns_subdomain(&attributes);
    }
}

/// Access modes of a claim or volume.
pub(crate) fn access_modes(e: &mut Errs, modes: &At<'_>) {
    let known = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
    let mut once = false;
    let mut others = false;
    for mode in modes.items() {
        if !known.contains(&mode.s()) {
            e.unsupported_as(modes, mode.s(), &known);
        } else if mode.s() == "ReadWriteOncePod" {
            once = true;
        } else {
            others = true;
        }
    }
    if once && others {
        e.forbidden(modes, "may not use ReadWriteOncePod with other access modes");
    }
}

fn data_source(e: &mut Errs, at: &At<'_>, is_ref: bool) {
    if !at.is_set() {
        return;
    }
    let (name, kind, group) = (at.get("name"), at.get("kind"), at.get("apiGroup"));
    if name.s().is_empty() {
        e.required(&name, "");
    }
    if kind.s().is_empty() {
        e.required(&kind, "");
    }
    if group.s().is_empty() && kind.s() != "PersistentVolumeClaim" {
        e.invalid_as(at, kind.s(), "must be 'PersistentVolumeClaim' when referencing the default apiGroup");
    }
    if !group.s().is_empty() {
        e.dns_subdomain(&group);
    }
    let namespace = at.get("namespace");
    if is_ref && !namespace.s().is_empty() {
        e.dns_label(&namespace);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sources() {
        for (kind, source, want) in [
            ("iscsi", json!({"targetPortal": "p", "iqn": "x", "lun": 256}), "s.iqn s.lun"),
            ("iscsi", json!({"targetPortal": "p", "iqn": "iqn.2001-04.com.example:disk"}), ""),
            ("iscsi", json!({"targetPortal": "p", "iqn": "eui.12", "chapAuthSession": true}), "s.iqn s.secretRef"),
            ("fc", json!({"targetWWNs": ["a"]}), "s.lun"),
            ("nfs", json!({"server": "s"}), "s.path s.path"),
            ("csi", json!({"nodePublishSecretRef": {"name": "A"}}), "s.driver s.driver s.name"),
            ("rbd", json!({}), "s.monitors s.image"),
            ("flocker", json!({"datasetName": "a/b", "datasetUUID": "u"}), "s s.datasetName"),
            ("quobyte", json!({"registry": "a:1,b", "volume": "v"}), "s.registry"),
            ("azureDisk", json!({"diskName": "d", "diskURI": "x", "kind": "Managed"}), "s.diskURI"),
            ("flexVolume", json!({"driver": "d", "options": {"a.k8s.io/x": "y"}}), "s.options[a.k8s.io/x]"),
            ("gcePersistentDisk", json!({"pdName": "d", "partition": 256}), "s.partition"),
            ("local", json!({"path": "/a/../b"}), "s.path"),
            (
                "iscsi",
                json!({"targetPortal": "p", "iqn": "iqn.2001-04.com.example:disk", "initiatorName": "x"}),
                "s.initiatorname",
            ),
            ("fc", json!({"wwids": ["a"]}), ""),
        ] {
            let obj = json!({ "s": source });
            let mut e = Errs::new();
            plugin(&mut e, kind, &At::field(&obj, "s"), None);
            assert_eq!(e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join(" "), want, "{kind}");
        }
    }
}
