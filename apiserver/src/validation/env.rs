//! Environment variables and the selectors that fill them.

use isopod_api::names;

use super::{At, Errs};

/// Field paths of `fieldRef` in environment variables.
const ENV_FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// Field paths of `fieldRef` in downward API volumes.
pub(crate) const VOLUME_FIELDS: &[&str] =
    &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];

const CONVERTIBLE: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.serviceAccountName",
    "spec.schedulerName",
    "status.phase",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

const RESOURCE_FIELDS: &[&str] = &[
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];

/// `env`.
pub(crate) fn env(e: &mut Errs, list: &At<'_>) {
    for at in list.items() {
        let name = at.get("name");
        if name.s().is_empty() {
            e.required(&name, "");
        } else {
            e.messages(&name, names::env_var_name(name.s()));
        }
        value_from(e, &at);
    }
}

fn value_from(e: &mut Errs, var: &At<'_>) {
    let at = var.get("valueFrom");
    if !at.is_set() {
        return;
    }
    let mut sources = 0;
    for kind in ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"] {
        let source = at.get(kind);
        if !source.is_set() {
            continue;
        }
        sources += 1;
        match kind {
            "fieldRef" => field_ref(e, &source, ENV_FIELDS),
            "resourceFieldRef" => resource_field_ref(e, &source, false),
            "fileKeyRef" => file_key(e, &source),
            _ => key_selector(e, &source),
        }
    }
    if sources == 0 {
        e.invalid_as(
            &at,
            "",
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
        );
    } else if !var.get("value").s().is_empty() {
        e.invalid_as(&at, "", "may not be specified when `value` is not empty");
    } else if sources > 1 {
        e.invalid_as(&at, "", "may not have more than one field specified at a time");
    }
}

/// `fieldRef`; `allowed` are the paths without subscript.
pub(crate) fn field_ref(e: &mut Errs, at: &At<'_>, allowed: &[&str]) {
    let path = at.get("fieldPath");
    if at.get("apiVersion").s().is_empty() {
        return e.required(&at.get("apiVersion"), "");
    }
    if path.s().is_empty() {
        return e.required(&path, "");
    }
    let (base, subscript) = match path.s().strip_suffix("']").and_then(|p| p.split_once("['")) {
        Some((base, subscript)) => (base, Some(subscript)),
        None => (path.s(), None),
    };
    if at.get("apiVersion").s() != "v1" {
        let detail = format!("error converting fieldPath: unsupported pod version: {}", at.get("apiVersion").s());
        return e.invalid(&path, &detail);
    }
    if subscript.is_some() && !["metadata.annotations", "metadata.labels"].contains(&base) {
        let detail = format!("error converting fieldPath: field label does not support subscript: {}", path.s());
        return e.invalid(&path, &detail);
    }
    if !CONVERTIBLE.contains(&base) && base != "spec.host" {
        return e.invalid(&path, &format!("error converting fieldPath: field label not supported: {}", path.s()));
    }
    match (base, subscript) {
        ("metadata.annotations", Some(key)) => {
            let key = key.to_lowercase();
            for message in names::qualified_name(&key) {
                e.invalid_as(at, key.as_str(), &message);
            }
        }
        ("metadata.labels", Some(key)) => {
            for message in names::qualified_name(key) {
                e.invalid_as(at, key, &message);
            }
        }
        (_, None) if !allowed.contains(&base) => e.unsupported_as(&path, base, allowed),
        _ => {}
    }
}

/// `resourceFieldRef`; volumes need the container's name.
pub(crate) fn resource_field_ref(e: &mut Errs, at: &At<'_>, volume: bool) {
    let (container, resource) = (at.get("containerName"), at.get("resource"));
    if volume && container.s().is_empty() {
        e.required(&container, "");
    } else if resource.s().is_empty() {
        e.required(&resource, "");
    } else {
        let huge = ["limits.hugepages-", "requests.hugepages-"].iter().any(|p| resource.s().starts_with(p));
        if !RESOURCE_FIELDS.contains(&resource.s()) && !huge {
            e.unsupported(&resource, RESOURCE_FIELDS);
        }
    }
    divisor(e, at, resource.s());
}

fn divisor(e: &mut Errs, at: &At<'_>, resource: &str) {
    let value = at.get("divisor");
    let shown = value.s();
    if shown.is_empty() || shown == "0" {
        return;
    }
    const BYTES: &str = "1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei";
    let (allowed, what) = match resource.split_once('.').map(|r| r.1) {
        Some("cpu") => ("1m and 1", "cpu"),
        Some("memory") => (BYTES, "memory"),
        Some("ephemeral-storage") => (BYTES, "local ephemeral storage"),
        Some(page) if page.starts_with("hugepages-") => (BYTES, "hugepages"),
        _ => return,
    };
    if !allowed.split([',', ' ']).any(|known| known == shown && known != "and") {
        let detail = format!("only divisor's values {allowed} are supported with the {what} resource");
        e.invalid_as(&value, resource, &detail);
    }
}

fn key_selector(e: &mut Errs, at: &At<'_>) {
    e.dns_subdomain(&at.get("name"));
    let key = at.get("key");
    if key.s().is_empty() {
        e.required(&key, "");
    } else {
        e.messages(&key, names::config_map_key(key.s()));
    }
}

/// Files of environment variables are in volumes of the pod that begin empty.
pub(crate) fn file_volumes(e: &mut Errs, spec: &At<'_>) {
    let volumes = spec.get("volumes").items();
    for var in super::containers(spec).iter().flat_map(|container| container.get("env").items()) {
        let file = var.get("valueFrom.fileKeyRef");
        let name = file.get("volumeName");
        // Of two of one name the second is meant.
        match volumes.iter().rfind(|volume| volume.get("name").s() == name.s()) {
            _ if !file.is_set() => {}
            None => e.not_found(&name, name.s()),
            Some(volume) if !volume.get("emptyDir").is_set() => {
                e.invalid_str(&name, "referenced volume must be of type emptyDir");
            }
            Some(_) => {}
        }
    }
}

fn file_key(e: &mut Errs, at: &At<'_>) {
    let (volume, path, key) = (at.get("volumeName"), at.get("path"), at.get("key"));
    if key.s().is_empty() {
        e.required(&key, "");
    } else {
        e.messages(&key, names::env_var_name(key.s()));
    }
    if volume.s().is_empty() {
        e.required(&volume, "");
    } else {
        e.dns_label(&volume);
    }
    if path.s().is_empty() {
        e.required(&path, "");
    } else {
        super::volume::no_backsteps(e, &path);
    }
}

/// `envFrom`.
pub(crate) fn env_from(e: &mut Errs, list: &At<'_>) {
    for at in list.items() {
        let prefix = at.get("prefix");
        if !prefix.s().is_empty() {
            e.messages(&prefix, names::env_var_name(prefix.s()));
        }
        let mut sources = 0;
        for kind in ["configMapRef", "secretRef"] {
            let source = at.get(kind);
            if source.is_set() {
                sources += 1;
                let name = source.get("name");
                if name.s().is_empty() {
                    e.required(&name, "");
                } else {
                    e.dns_subdomain(&name);
                }
            }
        }
        if sources == 0 {
            e.invalid_as(list, "", "must specify one of: `configMapRef` or `secretRef`");
        } else if sources > 1 {
            e.invalid_as(list, "", "may not have more than one field specified at a time");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(env_list: serde_json::Value) -> Vec<String> {
        let obj = json!({ "env": env_list });
        let mut e = Errs::new();
        env(&mut e, &At::field(&obj, "env"));
        e.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn sources() {
        assert!(errors(json!([{"name": "A", "value": "x"}])).is_empty());
        assert!(errors(json!([{"name": "A", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.labels['a']"}}}])).is_empty());
        assert_eq!(
            errors(
                json!([{"name": "A", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.phase"}}}])
            )[0],
            "env[0].valueFrom.fieldRef.fieldPath: Unsupported value: \"status.phase\": supported values: \"metadata.name\", \"metadata.namespace\", \"metadata.uid\", \"spec.nodeName\", \"spec.serviceAccountName\", \"status.hostIP\", \"status.hostIPs\", \"status.podIP\", \"status.podIPs\""
        );
        assert_eq!(errors(json!([{"name": "A", "valueFrom": {}}])).len(), 1);
        for (source, want) in [
            (
                json!({"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name['a']"}}),
                "env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"metadata.name['a']\": error converting fieldPath: field label does not support subscript: metadata.name['a']",
            ),
            (
                json!({"resourceFieldRef": {"resource": "limits.ephemeral-storage", "divisor": "2"}}),
                "env[0].valueFrom.resourceFieldRef.divisor: Invalid value: \"limits.ephemeral-storage\": only divisor's values 1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei are supported with the local ephemeral storage resource",
            ),
            (
                json!({"fileKeyRef": {"volumeName": "A", "path": "../x", "key": "K"}}),
                "env[0].valueFrom.fileKeyRef.volumeName: Invalid value: \"A\"",
            ),
        ] {
            let got = errors(json!([{"name": "A", "valueFrom": source}]));
            assert!(got[0].starts_with(want), "{got:?}");
        }
    }

    #[test]
    fn whole_objects() {
        let obj = json!({"envFrom": [{"configMapRef": {"name": ""}}, {"secretRef": {"name": "A"}}, {}]});
        let mut e = Errs::new();
        env_from(&mut e, &At::field(&obj, "envFrom"));
        let kinds: Vec<String> =
            e.0.iter().map(|x| x.to_string().split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            kinds,
            [
                "envFrom[0].configMapRef.name Required value",
                "envFrom[1].secretRef.name Invalid value",
                "envFrom Invalid value"
            ]
        );
    }
}
