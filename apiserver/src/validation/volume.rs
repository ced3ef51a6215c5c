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
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
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

/// `volumes`; returns the valid ones by name. `pod` is the name of the pod, when it is one (and not a template).
pub(crate) fn volumes<'a>(e: &mut Errs, list: &At<'a>, pod: Option<&str>) -> Vec<(&'a str, At<'a>)> {
    let mut valid: Vec<(&str, At<'a>)> = Vec::new();
    let claim_of = |at: &At<'_>| pod.filter(|pod| !pod.is_empty()).map(|pod| format!("{pod}-{}", at.get("name").s()));
    let made: Vec<String> =
        list.items().iter().filter(|at| at.get("ephemeral").is_set()).filter_map(claim_of).collect();
    for at in list.items() {
        let mut own = Errs::new();
        source(&mut own, &at, pod.is_some());
        let name = at.get("name");
        if let Some(claim) = claim_of(&at).filter(|_| at.get("ephemeral").is_set() && !name.s().is_empty()) {
            for message in isopod_api::names::dns1123_subdomain(&claim) {
                own.invalid_str(&name, &format!("PVC name {claim:?}: {message}"));
            }
        }
        if name.s().is_empty() {
            own.required(&name, "");
        } else {
            own.dns_label(&name);
        }
        if valid.iter().any(|(n, _)| *n == name.s()) {
            own.duplicate(&name, name.s());
        }
        let claim = at.get("persistentVolumeClaim.claimName");
        if own.is_empty() {
            valid.push((name.s(), at));
        } else {
            e.0.extend(own.0);
        }
        if made.iter().any(|made| made == claim.s()) {
            e.invalid(&claim, "must not reference a PVC that gets created for an ephemeral volume");
        }
    }
    valid
}

/// A source beside another one; upstream misspells two of the fields.
pub(crate) fn second_source(e: &mut Errs, volume: &At<'_>, kind: &str) {
    let shown = match kind {
        "cephfs" => "cephFS",
        "downwardAPI" => "downwarAPI",
        kind => kind,
    };
    e.forbidden(&volume.get(shown), "may not specify more than 1 volume type");
}

fn source(e: &mut Errs, volume: &At<'_>, is_pod: bool) {
    let mut count = 0;
    for kind in SOURCES {
        let at = volume.get(kind);
        if !at.is_set() {
            continue;
        }
        count += 1;
        if count > 1 {
            second_source(e, volume, kind);
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
            "image" => {
                if is_pod && at.get("reference").s().is_empty() {
                    e.required(&at.get("reference"), "");
                }
                e.required_one_of(&at.get("pullPolicy"), &["Always", "IfNotPresent", "Never"]);
            }
            other => {
                volume_source::plugin(e, other, &at, None);
                if at.get("initiatorName").is_set() {
                    let name = volume.get("name");
                    volume_source::long_portal(e, &name, name.s(), at.get("targetPortal").s());
                }
            }
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
        let kinds = ["secret", "configMap", "downwardAPI", "serviceAccountToken"];
        let set: Vec<At<'_>> = kinds.iter().map(|kind| source.get(kind)).filter(At::is_set).collect();
        for own in &set {
            projection(e, at, own, &mut seen);
        }
        if set.len() > 1 {
            e.forbidden(&source, "may not specify more than 1 volume type per source");
        }
    }
}

/// One source of a projected volume; `seen` are the paths so far.
fn projection<'a>(e: &mut Errs, volume: &At<'_>, at: &At<'a>, seen: &mut BTreeSet<&'a str>) {
    let name = at.get("name");
    match at.path.to_string().rsplit('.').next() {
        Some("serviceAccountToken") => token(e, volume, at),
        Some("downwardAPI") => {
            for file in at.get("items").items() {
                downward_file(e, &file, at);
                let path = file.get("path").s();
                unique(e, volume, path, path, seen);
            }
        }
        _ => {
            if name.s().is_empty() {
                e.required(&name, "");
            }
            for item in at.get("items").items() {
                key_to_path(e, &item);
                unique(e, volume, item.get("path").s(), name.s(), seen);
            }
        }
    }
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
        let valid = volumes(&mut e, &At::field(&obj, "v"), None);
        assert_eq!(valid.len(), 1);
        let text: Vec<String> = e.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            ["v[1].name: Duplicate value: \"a\"", "v[2].hostPath: Forbidden: may not specify more than 1 volume type"]
        );
    }

    #[test]
    fn sources_together() {
        let claim = json!({"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1"}}}});
        let table = [
            (json!({"name": "a", "emptyDir": {}, "cephfs": {"monitors": ["m"]}}), "v[0].cephFS"),
            (
                json!({"name": "a", "gcePersistentDisk": {"partition": 300}}),
                "v[0].persistentDisk.pdName v[0].persistentDisk.partition",
            ),
            (json!({"name": "a", "image": {"pullPolicy": "Never"}}), "v[0].image.reference"),
            (json!({"name": "a", "ephemeral": {"volumeClaimTemplate": claim}}), ""),
            (
                json!({"name": "a", "ephemeral": {"volumeClaimTemplate": {"metadata": {"uid": "x", "name": "y"}, "spec": claim["spec"]}}}),
                "v[0].ephemeral.volumeClaimTemplate.metadata.name v[0].ephemeral.volumeClaimTemplate.metadata.uID",
            ),
            (
                json!({"name": "a", "projected": {"sources": [{"secret": {"name": "s"}, "configMap": {}}]}}),
                "v[0].projected.sources[0].configMap.name v[0].projected.sources[0]",
            ),
            (
                json!({"name": "a", "iscsi": {"targetPortal": "x".repeat(70), "iqn": "iqn.2001-04.com.example:d", "initiatorName": "eui.0123456789abcdef"}}),
                "v[0].name",
            ),
        ];
        for (volume, want) in table {
            let obj = json!({"v": [volume]});
            let mut e = Errs::new();
            volumes(&mut e, &At::field(&obj, "v"), Some("p"));
            assert_eq!(e.0.iter().map(|x| x.field.as_str()).collect::<Vec<_>>().join(" "), want, "{obj}");
        }
        let obj = json!({"v": [{"name": "a", "ephemeral": {"volumeClaimTemplate": claim}},
            {"name": "b", "persistentVolumeClaim": {"claimName": "p-a"}}]});
        let mut e = Errs::new();
        volumes(&mut e, &At::field(&obj, "v"), Some("p"));
        assert_eq!(e.0.len(), 1, "{:?}", e.0);
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
