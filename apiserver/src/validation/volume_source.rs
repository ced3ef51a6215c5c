//! Volume sources that a plugin or a driver serves, shared by pods and PersistentVolumes, and the checks of claims.

use super::{At, Errs, resources, selector};

/// Fields a source cannot be without.
const REQUIRED: &[(&str, &[&str])] = &[
    ("gitRepo", &["repository"]),
    ("gcePersistentDisk", &["pdName"]),
    ("awsElasticBlockStore", &["volumeID"]),
    ("nfs", &["server", "path"]),
    ("iscsi", &["targetPortal", "iqn"]),
    ("glusterfs", &["endpoints", "path"]),
    ("rbd", &["image"]),
    ("cinder", &["volumeID"]),
    ("azureFile", &["secretName", "shareName"]),
    ("vsphereVolume", &["volumePath"]),
    ("photonPersistentDisk", &["pdID"]),
    ("portworxVolume", &["volumeID"]),
    ("azureDisk", &["diskName", "diskURI"]),
    ("scaleIO", &["gateway", "system", "volumeName"]),
    ("flexVolume", &["driver"]),
    ("csi", &["driver"]),
    ("local", &["path"]),
];

/// A source by name.
pub(crate) fn plugin(e: &mut Errs, kind: &str, at: &At<'_>) {
    let required = REQUIRED.iter().find(|(name, _)| *name == kind).map(|(_, fields)| *fields).unwrap_or_default();
    for field in required {
        let field = at.get(field);
        if field.s().is_empty() {
            e.required(&field, "");
        }
    }
    match kind {
        "nfs" => {
            let path = at.get("path");
            if !path.s().is_empty() && !path.s().starts_with('/') {
                e.invalid(&path, "must be an absolute path");
            }
        }
        "csi" => {
            let driver = at.get("driver");
            if !driver.s().is_empty() {
                csi_driver_name(e, &driver);
            }
            let secret = at.get("nodePublishSecretRef");
            if secret.is_set() && secret.get("name").s().is_empty() {
                e.required(&secret.get("name"), "");
            }
        }
        "cephfs" | "rbd" if at.get("monitors").len() == 0 => e.required(&at.get("monitors"), ""),
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
        "iscsi" => iscsi(e, at),
        "image" => e.one_of_if_set(&at.get("pullPolicy"), &["Always", "IfNotPresent", "Never"]),
        _ => {}
    }
}

/// `lun`.
fn unit_number(e: &mut Errs, at: &At<'_>) {
    if !(0..=255).contains(&at.int0()) {
        e.invalid(at, "must be between 0 and 255, inclusive");
    }
}

fn iscsi(e: &mut Errs, at: &At<'_>) {
    let iqn = at.get("iqn");
    let known = ["iqn", "eui", "naa"].iter().any(|prefix| iqn.s().starts_with(prefix));
    if !iqn.s().is_empty() && !known {
        e.invalid(&iqn, "must be valid format starting with iqn, eui, or naa");
    } else if !iqn.s().is_empty() && !is_iscsi_name(iqn.s()) {
        e.invalid(&iqn, "must be valid format");
    }
    unit_number(e, &at.get("lun"));
    let chap = at.get("chapAuthDiscovery").is_true() || at.get("chapAuthSession").is_true();
    if chap && !at.get("secretRef").is_set() {
        e.required(&at.get("secretRef"), "");
    }
}

/// `iqn.2001-04.com.example[:disk]`, `eui.` and 16 hexadecimal digits, `naa.` and 32 of them.
fn is_iscsi_name(name: &str) -> bool {
    let hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    if let Some(id) = name.strip_prefix("eui.") {
        return hex(id, 16);
    }
    if let Some(id) = name.strip_prefix("naa.") {
        return hex(id, 32);
    }
    let Some((date, authority)) = name.strip_prefix("iqn.").and_then(|rest| rest.split_once('.')) else { return false };
    let b = date.as_bytes();
    let dated = b.len() == 7 && b[4] == b'-' && b.iter().enumerate().all(|(i, c)| i == 4 || c.is_ascii_digit());
    dated && !authority.is_empty() && !authority.starts_with([':', '.'])
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
        return e.required(at, "");
    }
    if at.s().len() > 63 {
        e.too_long(at, 63);
    }
    for message in isopod_api::names::dns1123_subdomain(&at.s().to_lowercase()) {
        e.invalid(at, &message);
    }
}

/// `ephemeral`: a claim template.
pub(crate) fn ephemeral(e: &mut Errs, at: &At<'_>) {
    let template = at.get("volumeClaimTemplate");
    if !template.is_set() {
        return e.required(&template, "");
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
    data_source(e, &spec.get("dataSource"), false);
    data_source(e, &spec.get("dataSourceRef"), true);
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
            ("fc", json!({"wwids": ["a"]}), ""),
        ] {
            let obj = json!({ "s": source });
            let mut e = Errs::new();
            plugin(&mut e, kind, &At::field(&obj, "s"));
            assert_eq!(e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join(" "), want, "{kind}");
        }
    }
}
