//! Volumes of a pod: names, one source each, and the sources every cluster has.

use std::collections::BTreeSet;

use super::{At, Errs, env, volume_source};

const MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";

/// Every volume source, in the order they are checked.
pub(crate) const SOURCES: &[&str] = &[
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
    "flocker",
    "downwardAPI",
    "fc",
    "flexVolume",
    "configMap",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "storageos",
    "projected",
    "scaleIO",
    "csi",
    "ephemeral",
    "image",
];

/// `volumes`; returns the valid ones by name.
pub(crate) fn volumes<'a>(e: &mut Errs, list: &At<'a>) -> Vec<(&'a str, At<'a>)> {
    let mut valid: Vec<(&str, At<'a>)> = Vec::new();
    for at in list.items() {
        let mut own = Errs::new();
        source(&mut own, &at);
        let name = at.get("name");
        if name.s().is_empty() {
            own.required(&name, "");
        } else {
            own.dns_label(&name);
        }
        if valid.iter().any(|(n, _)| *n == name.s()) {
            own.duplicate(&name, name.s());
        }
        if own.is_empty() {
            valid.push((name.s(), at));
        } else {
            e.0.extend(own.0);
        }
    }
    valid
}

fn source(e: &mut Errs, volume: &At<'_>) {
    let mut count = 0;
    for kind in SOURCES {
        let at = volume.get(kind);
        if !at.is_set() {
            continue;
        }
        count += 1;
        if count > 1 {
            e.forbidden(&at, "may not specify more than 1 volume type");
            continue;
        }
        match *kind {
            "emptyDir" => empty_dir(e, &at),
            "hostPath" => host_path(e, &at),
            "secret" => {
                if at.get("secretName").s().is_empty() {
                    e.required(&at.get("secretName"), "");
                }
                mode(e, &at.get("defaultMode"));
                items(e, &at);
            }
            "configMap" => {
                if at.get("name").s().is_empty() {
                    e.required(&at.get("name"), "");
                }
                mode(e, &at.get("defaultMode"));
                items(e, &at);
            }
            "downwardAPI" => {
                mode(e, &at.get("defaultMode"));
                for file in at.get("items").items() {
                    downward_file(e, &file, &at);
                }
            }
            "projected" => projected(e, &at),
            "persistentVolumeClaim" => {
                if at.get("claimName").s().is_empty() {
                    e.required(&at.get("claimName"), "");
                }
            }
            "ephemeral" => volume_source::ephemeral(e, &at),
            other => volume_source::plugin(e, other, &at),
        }
    }
    if count == 0 {
        e.required(volume, "must specify a volume type");
    }
}

fn empty_dir(e: &mut Errs, at: &At<'_>) {
    let limit = at.get("sizeLimit");
    if super::resources::quantity(limit.v).is_some_and(|q| q.milli_value() < 0) {
        e.forbidden(&limit, "SizeLimit field must be a valid resource quantity");
    }
}

pub(crate) fn host_path(e: &mut Errs, at: &At<'_>) {
    let path = at.get("path");
    if path.s().is_empty() {
        return e.required(&path, "");
    }
    no_backsteps(e, &path);
    e.one_of_if_set(
        &at.get("type"),
        &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"],
    );
}

pub(crate) fn mode(e: &mut Errs, at: &At<'_>) {
    if at.int().is_some_and(|m| !(0..=0o777).contains(&m)) {
        e.invalid(at, MODE);
    }
}

fn items(e: &mut Errs, at: &At<'_>) {
    for item in at.get("items").items() {
        key_to_path(e, &item);
    }
}

fn key_to_path(e: &mut Errs, at: &At<'_>) {
    let (key, path) = (at.get("key"), at.get("path"));
    if key.s().is_empty() {
        e.required(&key, "");
    }
    if path.s().is_empty() {
        e.required(&path, "");
    }
    local_path(e, &path);
    mode(e, &at.get("mode"));
}

/// A file of the downward API; its errors carry the volume's path, without index.
fn downward_file(e: &mut Errs, file: &At<'_>, volume: &At<'_>) {
    let here = At::new(volume.path.clone(), file.v);
    let path = here.get("path");
    if path.s().is_empty() {
        e.required(&path, "");
    }
    local_path(e, &path);
    let (field, resource) = (here.get("fieldRef"), here.get("resourceFieldRef"));
    if field.is_set() {
        env::field_ref(e, &field, env::VOLUME_FIELDS);
        if resource.is_set() {
            e.invalid_as(&here, "resource", "fieldRef and resourceFieldRef can not be specified simultaneously");
        }
    } else if resource.is_set() {
        env::resource_field_ref(e, &resource, true);
    } else {
        e.required(&here, "one of fieldRef and resourceFieldRef is required");
    }
    mode(e, &here.get("mode"));
}

fn projected(e: &mut Errs, at: &At<'_>) {
    mode(e, &at.get("defaultMode"));
    let mut seen = BTreeSet::new();
    for source in at.get("sources").items() {
        let mut count = 0;
        for kind in
            ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"]
        {
            let own = source.get(kind);
            if !own.is_set() {
                continue;
            }
            count += 1;
            if count > 1 {
                e.forbidden(&own, "may not specify more than 1 volume type per source");
                continue;
            }
            match kind {
                "secret" | "configMap" => {
                    let name = own.get("name");
                    if name.s().is_empty() {
                        e.required(&name, "");
                    }
                    for item in own.get("items").items() {
                        key_to_path(e, &item);
                        unique(e, at, item.get("path").s(), name.s(), &mut seen);
                    }
                }
                "downwardAPI" => {
                    for file in own.get("items").items() {
                        downward_file(e, &file, &own);
                        let path = file.get("path").s();
                        unique(e, at, path, path, &mut seen);
                    }
                }
                "serviceAccountToken" => token(e, at, &own),
                "clusterTrustBundle" => trust_bundle(e, &own),
                _ => pod_certificate(e, &own),
            }
        }
    }
}

fn trust_bundle(e: &mut Errs, at: &At<'_>) {
    let (name, signer, path) = (at.get("name"), at.get("signerName"), at.get("path"));
    match (name.is_set(), signer.is_set()) {
        (true, true) => e.invalid(at, "only one of name and signerName may be used"),
        (true, false) => {
            if name.s().is_empty() {
                e.required(&name, "must be a valid object name");
            }
            let labels = at.get("labelSelector");
            if labels.is_set() {
                e.invalid(&labels, "labelSelector must be unset if name is specified");
            }
        }
        (false, true) => {
            if signer.s().is_empty() {
                e.required(&signer, "must be a valid signer name");
            }
            super::net::signer_name(e, &signer);
        }
        (false, false) => e.required(at, "either name or signerName must be specified"),
    }
    if path.s().is_empty() {
        e.required(&path, "");
    }
    local_path(e, &path);
}

fn pod_certificate(e: &mut Errs, at: &At<'_>) {
    if at.get("signerName").s().is_empty() {
        e.required(&at.get("signerName"), "");
    }
    e.one_of(&at.get("keyType"), &["ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519", "RSA3072", "RSA4096"]);
}

/// No two files of a projected volume have the same path; the error shows whose they are.
fn unique<'a>(e: &mut Errs, volume: &At<'_>, path: &'a str, shown: &str, seen: &mut BTreeSet<&'a str>) {
    if !path.is_empty() && !seen.insert(path) {
        e.invalid_as(volume, shown, "conflicting duplicate paths");
    }
}

fn token(e: &mut Errs, volume: &At<'_>, at: &At<'_>) {
    let seconds = at.get("expirationSeconds");
    if seconds.int0() < 600 {
        e.invalid(&seconds, "may not specify a duration less than 10 minutes");
    }
    if seconds.int0() > 1 << 32 {
        e.invalid(&seconds, "may not specify a duration larger than 2^32 seconds");
    }
    let path = At::new(volume.path.child("path"), at.get("path").v);
    if path.s().is_empty() {
        e.required(&path, "");
    } else {
        local_path(e, &path);
    }
}

pub(crate) fn no_backsteps(e: &mut Errs, at: &At<'_>) {
    if at.s().split('/').any(|part| part == "..") {
        e.invalid(at, "must not contain '..'");
    }
}

/// A relative path without `..`.
pub(crate) fn descending_path(e: &mut Errs, at: &At<'_>) {
    if at.s().starts_with('/') {
        e.invalid(at, "must be a relative path");
    }
    no_backsteps(e, at);
}

/// A relative path without `..` that does not begin with two dots either.
pub(crate) fn local_path(e: &mut Errs, at: &At<'_>) {
    descending_path(e, at);
    if at.s().starts_with("..") && !at.s().starts_with("../") {
        e.invalid(at, "must not start with '..'");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_valid_volumes_can_be_mounted() {
        let obj = json!({"v": [{"name": "a", "emptyDir": {}}, {"name": "a", "emptyDir": {}}, {"name": "b", "emptyDir": {}, "hostPath": {"path": "/x"}}]});
        let mut e = Errs::new();
        let valid = volumes(&mut e, &At::field(&obj, "v"));
        assert_eq!(valid.len(), 1);
        let text: Vec<String> = e.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            ["v[1].name: Duplicate value: \"a\"", "v[2].hostPath: Forbidden: may not specify more than 1 volume type"]
        );
    }

    #[test]
    fn paths() {
        for (path, errors) in [("a/b", 0), ("/a", 1), ("a/../b", 1), ("..a", 1), ("../a", 1), ("..", 2)] {
            let obj = json!({ "p": path });
            let mut e = Errs::new();
            local_path(&mut e, &At::field(&obj, "p"));
            assert_eq!(e.0.len(), errors, "{path}");
        }
    }
}
