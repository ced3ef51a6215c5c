//! Warnings about pod specs: deprecated fields and values that do not mean what they seem to.

use serde_json::Value;

use super::{At, resources};

const DEPRECATED_NODE_LABELS: &[(&str, &str)] = &[
    ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
    ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
    ),
    ("failure-domain.beta.kubernetes.io/zone", "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead"),
    ("beta.kubernetes.io/instance-type", "deprecated since v1.17; use \"node.kubernetes.io/instance-type\" instead"),
];

/// Volume sources whose plugin is gone or going.
const DEPRECATED_VOLUMES: &[(&str, &str)] = &[
    ("gitRepo", "deprecated in v1.11, and disabled by default in v1.33+"),
    ("scaleIO", "deprecated in v1.16, non-functional in v1.22+"),
    ("flocker", "deprecated in v1.22, non-functional in v1.25+"),
    ("storageos", "deprecated in v1.22, non-functional in v1.25+"),
    ("quobyte", "deprecated in v1.22, non-functional in v1.25+"),
    ("glusterfs", "deprecated in v1.25, non-functional in v1.26+"),
    ("cephfs", "deprecated in v1.28, non-functional in v1.31+"),
    ("rbd", "deprecated in v1.28, non-functional in v1.31+"),
];

/// Warnings for the spec at `spec` (with the metadata next to it).
pub(crate) fn warnings(spec: &At<'_>, metadata: &Value) -> Vec<String> {
    let mut out = Vec::new();
    for (key, at) in spec.get("nodeSelector").entries() {
        deprecated_label(&mut out, &at.path.to_string(), key);
    }
    let affinity = spec.get("affinity.nodeAffinity");
    for (i, term) in
        affinity.get("requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms").items().iter().enumerate()
    {
        for (j, expression) in term.get("matchExpressions").items().iter().enumerate() {
            let path = format!(
                "{}.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[{i}].matchExpressions[{j}].key",
                affinity.path
            );
            deprecated_label(&mut out, &path, expression.get("key").s());
        }
    }
    for (i, item) in spec.get("topologySpreadConstraints").items().iter().enumerate() {
        let path = format!("{}.topologySpreadConstraints[{i}].topologyKey", spec.path);
        deprecated_label(&mut out, &path, item.get("topologyKey").s());
    }
    host_aliases(&mut out, spec);
    for volume in spec.get("volumes").items() {
        for (source, text) in DEPRECATED_VOLUMES {
            if volume.get(source).is_set() {
                out.push(format!("{}: {text}", volume.get(source).path));
            }
        }
    }
    for (i, secret) in spec.get("imagePullSecrets").items().iter().enumerate() {
        if secret.get("name").s().is_empty() {
            out.push(format!("{}.imagePullSecrets[{i}].name: invalid empty name \"\"", spec.path));
        }
    }
    let overhead = spec.get("overhead");
    for (name, value) in overhead.entries() {
        fractional(&mut out, &value, name);
    }
    for list in ["initContainers", "containers"] {
        for container in spec.get(list).items() {
            container_warnings(&mut out, &container);
        }
    }
    duplicate_ports(&mut out, spec);
    if spec.get("terminationGracePeriodSeconds").int().is_some_and(|n| n < 0) {
        out.push(format!(
            "{}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1",
            spec.path
        ));
    }
    annotations(&mut out, spec, metadata);
    out
}

fn deprecated_label(out: &mut Vec<String>, path: &str, key: &str) {
    if let Some((_, text)) = DEPRECATED_NODE_LABELS.iter().find(|(k, _)| *k == key) {
        let path =
            if path.contains('[') && path.ends_with(']') { path.to_owned() } else { format!("{path}: {key} is") };
        out.push(if path.ends_with(" is") { format!("{path} {text}") } else { format!("{path}: {text}") });
    }
}

fn host_aliases(out: &mut Vec<String>, spec: &At<'_>) {
    let mut seen = std::collections::BTreeSet::new();
    for alias in spec.get("hostAliases").items() {
        let ip = alias.get("ip").s();
        if !seen.insert(ip) {
            out.push(format!("{}.ip: duplicate ip \"{ip}\"", alias.path));
        }
    }
}

fn container_warnings(out: &mut Vec<String>, at: &At<'_>) {
    for kind in ["limits", "requests"] {
        for (name, value) in at.get("resources").get(kind).entries() {
            fractional(out, &value, name);
        }
    }
    let mut seen: Vec<&str> = Vec::new();
    for var in at.get("env").items() {
        let name = var.get("name").s();
        let expands = var.get("value").s().contains(&format!("$({name})"));
        if seen.contains(&name) && !expands {
            out.push(format!(
                "{}: hides previous definition of \"{name}\", which may be dropped when using apply",
                var.path
            ));
        }
        seen.push(name);
    }
}

fn fractional(out: &mut Vec<String>, at: &At<'_>, name: &str) {
    if !["memory", "ephemeral-storage"].contains(&name) {
        return;
    }
    if let Some(value) = resources::quantity(at.v)
        && value.milli_value() % 1000 != 0
    {
        out.push(format!("{}: fractional byte value \"{value}\" is invalid, must be an integer", at.path));
    }
}

fn duplicate_ports(out: &mut Vec<String>, spec: &At<'_>) {
    let mut seen: Vec<(String, String)> = Vec::new();
    for container in spec.get("containers").items() {
        for port in container.get("ports").items() {
            let key = format!(
                "{}/{}/{}/{}",
                port.get("containerPort").int0(),
                port.get("protocol").s(),
                port.get("hostIP").s(),
                port.get("hostPort").int0()
            );
            let here = port.path.to_string();
            if let Some((_, first)) = seen.iter().find(|(k, _)| *k == key) {
                out.push(format!("{here}: duplicate port definition with {first}"));
            }
            seen.push((key, here));
        }
    }
}

fn annotations(out: &mut Vec<String>, spec: &At<'_>, metadata: &Value) {
    let Some(map) = metadata["annotations"].as_object() else { return };
    for key in map.keys() {
        if key == "seccomp.security.alpha.kubernetes.io/pod" {
            out.push(format!(
                "metadata.annotations[{key}]: non-functional in v1.27+; use the \"seccompProfile\" field instead"
            ));
        } else if let Some(container) = key.strip_prefix("container.apparmor.security.beta.kubernetes.io/") {
            let set = spec
                .get("containers")
                .items()
                .iter()
                .any(|c| c.get("name").s() == container && c.get("securityContext.appArmorProfile").is_set());
            if !set {
                out.push(format!(
                    "metadata.annotations[{key}]: deprecated since v1.30; use the \"appArmorProfile\" field instead"
                ));
            }
        } else if key == "scheduler.alpha.kubernetes.io/critical-pod" {
            out.push(format!(
                "metadata.annotations[{key}]: non-functional in v1.16+; use the \"priorityClassName\" field instead"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn hidden_environment() {
        let obj = json!({"spec": {"containers": [{"env": [{"name": "A"}, {"name": "A"}], "resources": {"limits": {"memory": "1.5"}}}]}});
        let got = warnings(&At::field(&obj, "spec"), &Value::Null);
        assert_eq!(
            got,
            [
                "spec.containers[0].resources.limits[memory]: fractional byte value \"1500m\" is invalid, must be an integer",
                "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply",
            ]
        );
    }
}
