//! Warnings about pods and templates of pods: deprecated fields and values that do not mean what they seem to.

use std::collections::{BTreeMap, BTreeSet};

use isopod_api::{field::Path, meta, names, text::quote};
use serde_json::Value;

use super::{At, containers, net, resources};
use crate::registry::strategy::Context;

const DEPRECATED_NODE_LABELS: &[(&str, &str)] = &[
    ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
    ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
    (
        "failure-domain.beta.kubernetes.io/region",
        "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
    ),
    ("failure-domain.beta.kubernetes.io/zone", "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead"),
    ("beta.kubernetes.io/instance-type", "deprecated since v1.17; use \"node.kubernetes.io/instance-type\" instead"),
    ("app.kubernetes.io/created-by", "deprecated since v1.9"),
    ("scheduler.alpha.kubernetes.io/preferAvoidPods", "deprecated since v1.22; use Taints and Tolerations instead"),
    ("node-role.kubernetes.io/master", "use \"node-role.kubernetes.io/control-plane\" instead"),
];

/// Annotations that do nothing any more.
const DEPRECATED_ANNOTATIONS: &[(&str, &str)] = &[
    (
        "scheduler.alpha.kubernetes.io/critical-pod",
        "non-functional in v1.16+; use the \"priorityClassName\" field instead",
    ),
    ("security.alpha.kubernetes.io/sysctls", "non-functional in v1.11+; use the \"sysctls\" field instead"),
    ("security.alpha.kubernetes.io/unsafe-sysctls", "non-functional in v1.11+; use the \"sysctls\" field instead"),
];

/// Volume sources whose plugin is gone or going, as upstream's warnings name them.
pub(crate) const DEPRECATED_VOLUMES: &[(&str, &str, &str)] = &[
    ("photonPersistentDisk", "photonPersistentDisk", "deprecated in v1.11, non-functional in v1.16+"),
    ("gitRepo", "gitRepo", "deprecated in v1.11, and disabled by default in v1.33+"),
    ("scaleIO", "scaleIO", "deprecated in v1.16, non-functional in v1.22+"),
    ("flocker", "flocker", "deprecated in v1.22, non-functional in v1.25+"),
    ("storageos", "storageOS", "deprecated in v1.22, non-functional in v1.25+"),
    ("quobyte", "quobyte", "deprecated in v1.22, non-functional in v1.25+"),
    ("glusterfs", "glusterfs", "deprecated in v1.25, non-functional in v1.26+"),
    ("cephfs", "cephfs", "deprecated in v1.28, non-functional in v1.31+"),
    ("rbd", "rbd", "deprecated in v1.28, non-functional in v1.31+"),
];

const SECCOMP_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
const SECCOMP: &str = "container.seccomp.security.alpha.kubernetes.io/";
const SECCOMP_TEXT: &str = "non-functional in v1.27+; use the \"seccompProfile\" field instead";
const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";
const NULL_SELECTOR: &str = "a null labelSelector results in matching no pod";

/// Warnings of a workload with a pod template at `template`: of its name when it is new and its pods are named after it
/// in any form (`named`), of the template when that is new or has changed.
pub(crate) fn workload(
    cx: &Context<'_>,
    obj: &Value,
    old: Option<&Value>,
    template: &At<'_>,
    named: bool,
) -> Vec<String> {
    let mut out = Vec::new();
    let changed = |old: &Value| old["metadata"]["generation"] != obj["metadata"]["generation"];
    if cx.subresource == "status" || old.is_some_and(|old| !changed(old)) {
        return out;
    }
    if named && old.is_none() {
        long_name(&mut out, meta::name(obj), "Pod names and hostnames");
    }
    out.extend(warnings(&template.get("spec"), &template.get("metadata"), false));
    out
}

/// Warnings of a new pod.
pub(crate) fn pod(obj: &Value) -> Vec<String> {
    let mut out = Vec::new();
    long_name(&mut out, meta::name(obj), "the Pod's hostname");
    out.extend(warnings(&At::field(obj, "spec"), &At::field(obj, "metadata"), true));
    out
}

fn long_name(out: &mut Vec<String>, name: &str, used: &str) {
    let wrong = names::dns1123_label(name);
    if !wrong.is_empty() {
        let wrong = wrong.join(" ");
        out.push(format!(
            "metadata.name: this is used in {used}, which can result in surprising behavior; a DNS label is recommended: [{wrong}]"
        ));
    }
}

/// Warnings of the spec of a pod or a template, with the metadata next to it.
fn warnings(spec: &At<'_>, metadata: &At<'_>, is_pod: bool) -> Vec<String> {
    let mut out = Vec::new();
    scheduling(&mut out, spec);
    let annotations = metadata.get("annotations");
    for (key, text) in DEPRECATED_ANNOTATIONS.iter().filter(|(key, _)| annotations.key(key).is_set()) {
        out.push(format!("{}: {text}", annotations.key(key).path));
    }
    for volume in spec.get("volumes").items() {
        for (_, shown, text) in DEPRECATED_VOLUMES.iter().filter(|(source, ..)| volume.get(source).is_set()) {
            out.push(format!("{}: {text}", volume.get(shown).path));
        }
        claim(&mut out, &volume.get("ephemeral.volumeClaimTemplate.spec"));
    }
    overlapping_paths(&mut out, &spec.get("volumes"));
    lists(&mut out, spec);
    for name in ["memory", "ephemeral-storage"] {
        fractional(&mut out, &spec.get("overhead").key(name));
    }
    if annotations.key(SECCOMP_POD).is_set() && !spec.get("securityContext.seccompProfile").is_set() {
        out.push(format!("{}: {SECCOMP_TEXT}", annotations.key(SECCOMP_POD).path));
    }
    for container in containers(spec) {
        container_annotations(&mut out, spec, &container, &annotations, is_pod);
        container_warnings(&mut out, &container);
    }
    ports(&mut out, spec);
    port_names(&mut out, spec);
    if spec.get("terminationGracePeriodSeconds").int().is_some_and(|n| n < 0) {
        out.push(format!(
            "{}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1",
            spec.path
        ));
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let own = spec.get("affinity").get(kind);
        let required = own.get("requiredDuringSchedulingIgnoredDuringExecution").items();
        let preferred = own.get("preferredDuringSchedulingIgnoredDuringExecution").items();
        for term in required.into_iter().chain(preferred.iter().map(|term| term.get("podAffinityTerm"))) {
            null_selector(&mut out, &term);
        }
    }
    let aliases = spec.get("hostAliases").items();
    for ip in spec.get("dnsConfig.nameservers").items().into_iter().chain(aliases.iter().map(|alias| alias.get("ip"))) {
        out.extend(net::ip_warning(&ip.path, ip.s()));
    }
    out
}

fn scheduling(out: &mut Vec<String>, spec: &At<'_>) {
    for (key, at) in spec.get("nodeSelector").entries() {
        if let Some(text) = deprecated_label(key) {
            out.push(format!("{}: {text}", at.path));
        }
    }
    let affinity = spec.get("affinity.nodeAffinity");
    for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms").items() {
        node_term(out, &term, false);
    }
    for preferred in affinity.get("preferredDuringSchedulingIgnoredDuringExecution").items() {
        node_term(out, &preferred.get("preference"), true);
    }
    for constraint in spec.get("topologySpreadConstraints").items() {
        let key = constraint.get("topologyKey");
        if let Some(text) = deprecated_label(key.s()) {
            out.push(format!("{}: {} is {text}", key.path, key.s()));
        }
        null_selector(out, &constraint);
    }
}

fn null_selector(out: &mut Vec<String>, term: &At<'_>) {
    let selector = term.get("labelSelector");
    if !selector.is_set() {
        out.push(format!("{}: {NULL_SELECTOR}", selector.path));
    }
}

/// What to use instead of a label of nodes, when there is something newer.
pub(crate) fn deprecated_label(key: &str) -> Option<&'static str> {
    DEPRECATED_NODE_LABELS.iter().find(|(label, _)| *label == key).map(|(_, text)| *text)
}

/// A term of a node selector; `values` tells whether values that no label can have are worth a warning (they are no errors).
pub(crate) fn node_term(out: &mut Vec<String>, term: &At<'_>, values: bool) {
    for expression in term.get("matchExpressions").items() {
        let key = expression.get("key");
        if let Some(text) = deprecated_label(key.s()) {
            out.push(format!("{}: {} is {text}", key.path, key.s()));
        }
        for value in expression.get("values").items().iter().filter(|_| values) {
            for message in names::label_value(value.s()) {
                out.push(format!("{}: {} is invalid, {message}", value.path, value.s()));
            }
        }
    }
}

/// The spec of a claim of storage.
pub(crate) fn claim(out: &mut Vec<String>, spec: &At<'_>) {
    for kind in ["requests", "limits"] {
        fractional(out, &spec.get("resources").get(kind).key("storage"));
    }
}

fn lists(out: &mut Vec<String>, spec: &At<'_>) {
    for (list, field, what) in [("hostAliases", "ip", "ip"), ("imagePullSecrets", "name", "name")] {
        let mut seen = BTreeSet::new();
        for at in spec.get(list).items().iter().map(|item| item.get(field)) {
            if !seen.insert(at.s()) {
                out.push(format!("{}: duplicate {what} {}", at.path, quote(at.s())));
            }
        }
    }
    for at in spec.get("imagePullSecrets").items().iter().map(|item| item.get("name")) {
        if at.s().is_empty() {
            out.push(format!("{}: invalid empty name \"\"", at.path));
        }
    }
}

fn container_annotations(out: &mut Vec<String>, spec: &At<'_>, at: &At<'_>, annotations: &At<'_>, is_pod: bool) {
    let (name, context) = (at.get("name").s(), at.get("securityContext"));
    let seccomp = annotations.key(&format!("{SECCOMP}{name}"));
    if seccomp.is_set() && !context.get("seccompProfile").is_set() {
        out.push(format!("{}: {SECCOMP_TEXT}", seccomp.path));
    }
    let armor = annotations.key(&format!("{APP_ARMOR}{name}"));
    let of_pod = spec.get("securityContext.appArmorProfile").is_set();
    // A pod's own annotations become fields, with a warning, before this.
    if !is_pod && armor.is_set() && !of_pod && !context.get("appArmorProfile").is_set() {
        out.push(format!("{}: {APP_ARMOR_TEXT}", armor.path));
    }
}

/// Said of AppArmor's annotations.
pub(crate) const APP_ARMOR_TEXT: &str = "deprecated since v1.30; use the \"appArmorProfile\" field instead";

fn container_warnings(out: &mut Vec<String>, at: &At<'_>) {
    for name in ["memory", "ephemeral-storage"] {
        for kind in ["limits", "requests"] {
            fractional(out, &at.get("resources").get(kind).key(name));
        }
    }
    let mut seen: Vec<&str> = Vec::new();
    for var in at.get("env").items() {
        let (name, value) = (var.get("name").s(), var.get("value").s());
        let reference = format!("$({name})");
        let hides = var.get("valueFrom").is_set() || value == reference || !value.contains(&reference);
        if seen.contains(&name) && hides {
            out.push(format!(
                "{}: hides previous definition of {}, which may be dropped when using apply",
                var.path,
                quote(name)
            ));
        }
        seen.push(name);
    }
}

fn fractional(out: &mut Vec<String>, at: &At<'_>) {
    if let Some(value) = resources::quantity(at.v)
        && value.milli_value() % 1000 != 0
    {
        out.push(format!("{}: fractional byte value \"{value}\" is invalid, must be an integer", at.path));
    }
}

/// A port as upstream's `%+v` prints it.
fn shown_port(at: &At<'_>) -> String {
    format!(
        "{{Name:{} HostPort:{} ContainerPort:{} Protocol:{} HostIP:{}}}",
        at.get("name").s(),
        at.get("hostPort").int0(),
        at.get("containerPort").int0(),
        at.get("protocol").s(),
        at.get("hostIP").s()
    )
}

fn ports(out: &mut Vec<String>, spec: &At<'_>) {
    let mut seen: Vec<At<'_>> = Vec::new();
    for port in containers(spec).iter().flat_map(|container| container.get("ports").items()) {
        let (ip, host) = (port.get("hostIP").s(), port.get("hostPort").int0());
        if !ip.is_empty() && host == 0 {
            out.push(format!("{}: hostIP set without hostPort: {}", port.path, shown_port(&port)));
        }
        let same = |other: &&At<'_>| ["containerPort", "protocol"].iter().all(|f| other.get(f).v == port.get(f).v);
        for other in seen.iter().filter(same) {
            let (other_ip, other_host) = (other.get("hostIP").s(), other.get("hostPort").int0());
            let what = if ip == other_ip && host == other_host {
                "duplicate"
            } else if host == 0 || other_host == 0 {
                "overlapping"
            } else if host == other_host && ip.is_empty() != other_ip.is_empty() {
                "dangerously ambiguous"
            } else {
                continue;
            };
            out.push(format!("{}: {what} port definition with {}", port.path, other.path));
        }
        seen.push(port);
    }
}

/// Ports of several containers by one name: only the first is ever found.
fn port_names(out: &mut Vec<String>, spec: &At<'_>) {
    let mut first: BTreeMap<&str, At<'_>> = BTreeMap::new();
    for port in containers(spec).iter().flat_map(|container| container.get("ports").items()) {
        let name = port.get("name").s();
        if name.is_empty() {
            continue;
        }
        if let Some(other) = first.get(name) {
            let (shown, other) = (quote(name), &other.path);
            out.push(format!(
                "{}: duplicate port name {shown} with {other}, services and probes that select ports by name will use {other}",
                port.path
            ));
        } else {
            first.insert(name, port);
        }
    }
}

/// Files of one volume that are each other, or directories of each other.
fn overlapping_paths(out: &mut Vec<String>, volumes: &At<'_>) {
    let paths =
        |at: &At<'_>| -> Vec<String> { at.get("items").items().iter().map(|i| i.get("path").s().to_owned()).collect() };
    for volume in volumes.items() {
        let name = quote(volume.get("name").s());
        for (kind, field, shown) in [("configMap", "name", "ConfigMap"), ("secret", "secretName", "Secret")] {
            let own = volume.get(kind);
            overlap(
                out,
                &paths(&own),
                &format!("volume {name} ({shown} {}): overlapping paths", quote(own.get(field).s())),
            );
        }
        overlap(out, &paths(&volume.get("downwardAPI")), &format!("volume {name} (DownwardAPI): overlapping paths"));
        let mut all: BTreeSet<String> = BTreeSet::new();
        for source in volume.get("projected.sources").items() {
            if source.len() == 0 {
                out.push(format!("volume {name} (Projected) has no sources provided"));
                continue;
            }
            let [config, secret, downward, token] =
                ["configMap", "secret", "downwardAPI", "serviceAccountToken"].map(|kind| source.get(kind));
            let (own, shown) = if config.get("items").is_set() {
                (paths(&config), format!("ConfigMap {}", quote(config.get("name").s())))
            } else if secret.get("items").is_set() {
                (paths(&secret), format!("Secret {}", quote(secret.get("name").s())))
            } else if downward.get("items").is_set() {
                (paths(&downward), "DownwardAPI".to_owned())
            } else if token.is_set() {
                (vec![token.get("path").s().to_owned()], "ServiceAccountToken".to_owned())
            } else {
                continue;
            };
            let message = format!("volume {name} (Projected {shown}): overlapping paths");
            overlap(out, &own, &message);
            let unique: BTreeSet<String> = own.into_iter().collect();
            let mut together: Vec<String> = unique.iter().chain(&all).cloned().collect();
            together.sort_unstable();
            overlap(out, &together, &message);
            all.extend(unique);
        }
    }
}

fn overlap(out: &mut Vec<String>, paths: &[String], message: &str) {
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for path in paths {
        let path = path.trim_end_matches('/');
        // Upstream takes a name for a directory of any that begins like it.
        let begins = |other: &str| format!("{other}/").starts_with(path) || format!("{path}/").starts_with(other);
        let collision = seen.iter().find(|other| !path.is_empty() && !other.is_empty() && begins(other));
        if let Some(other) = collision {
            out.push(format!("{message}: {} with {}", quote(path), quote(other)));
        }
        seen.insert(path);
    }
}

/// A pod's AppArmor annotations become fields of its containers, unless there are fields; returns what is said of that.
pub(crate) fn app_armor_fields(obj: &mut Value) -> Vec<String> {
    let mut out = Vec::new();
    if obj["spec"]["os"]["name"] == "windows" {
        return out;
    }
    let annotations = obj["metadata"]["annotations"].clone();
    let of_pod = obj["spec"]["securityContext"]["appArmorProfile"].clone();
    for list in ["initContainers", "containers"] {
        let items = obj["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in items.into_iter().flatten() {
            let key = format!("{APP_ARMOR}{}", container["name"].as_str().unwrap_or_default());
            let Some(annotation) = annotations[key.as_str()].as_str() else { continue };
            if container.pointer("/securityContext/appArmorProfile").is_some() {
                continue;
            }
            let field = match annotation {
                "unconfined" => Some(serde_json::json!({"type": "Unconfined"})),
                "runtime/default" => Some(serde_json::json!({"type": "RuntimeDefault"})),
                other => other
                    .strip_prefix("localhost/")
                    .filter(|name| !name.is_empty() && name.trim() == *name)
                    .map(|name| serde_json::json!({"type": "Localhost", "localhostProfile": name})),
            };
            let differs = field.as_ref().is_none_or(|field| *field != of_pod);
            if let Some(field) = field.filter(|field| *field != of_pod) {
                if container["securityContext"].is_null() {
                    container["securityContext"] = serde_json::json!({});
                }
                container["securityContext"]["appArmorProfile"] = field;
            }
            if differs {
                let path = Path::new("metadata").child("annotations").key(&key);
                out.push(format!("{path}: {APP_ARMOR_TEXT}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(spec: Value, annotations: Value) -> Vec<String> {
        pod(&json!({"metadata": {"name": "p", "annotations": annotations}, "spec": spec}))
    }

    #[test]
    fn table() {
        let ports = json!([{"containerPort": 80}, {"containerPort": 80, "hostPort": 80}, {"containerPort": 80, "hostPort": 80, "hostIP": "10.0.0.1"}]);
        for (spec, want) in [
            (
                json!({"containers": [{"env": [{"name": "A"}, {"name": "A"}], "resources": {"limits": {"memory": "1.5"}}}]}),
                vec![
                    "spec.containers[0].resources.limits[memory]: fractional byte value \"1500m\" is invalid, must be an integer",
                    "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply",
                ],
            ),
            (
                json!({"containers": [{"ports": [{"name": "m", "containerPort": 1}]}, {"ports": [{"name": "m", "containerPort": 2}]}],
                    "hostAliases": [{"ip": "2001:DB8::1"}], "dnsConfig": {"nameservers": ["10.0.0.1", "10.0.0.01"]}}),
                vec![
                    "spec.containers[1].ports[0]: duplicate port name \"m\" with spec.containers[0].ports[0], services and probes that select ports by name will use spec.containers[0].ports[0]",
                    "spec.dnsConfig.nameservers[1]: non-standard IP address \"10.0.0.01\" will be considered invalid in a future Kubernetes release: use \"10.0.0.1\"",
                    "spec.hostAliases[0].ip: IPv6 address \"2001:DB8::1\" should be in RFC 5952 canonical format (\"2001:db8::1\")",
                ],
            ),
            (
                json!({"containers": [{"ports": ports}]}),
                vec![
                    "spec.containers[0].ports[1]: overlapping port definition with spec.containers[0].ports[0]",
                    "spec.containers[0].ports[2]: overlapping port definition with spec.containers[0].ports[0]",
                    "spec.containers[0].ports[2]: dangerously ambiguous port definition with spec.containers[0].ports[1]",
                ],
            ),
            (
                json!({"topologySpreadConstraints": [{"topologyKey": "beta.kubernetes.io/os"}], "hostAliases": [{"ip": "1.1.1.1"}, {"ip": "1.1.1.1"}]}),
                vec![
                    "spec.topologySpreadConstraints[0].topologyKey: beta.kubernetes.io/os is deprecated since v1.14; use \"kubernetes.io/os\" instead",
                    "spec.topologySpreadConstraints[0].labelSelector: a null labelSelector results in matching no pod",
                    "spec.hostAliases[1].ip: duplicate ip \"1.1.1.1\"",
                ],
            ),
            (
                json!({"volumes": [{"name": "v", "configMap": {"name": "c", "items": [{"path": "a"}, {"path": "a/b"}, {"path": "a"}]}}]}),
                vec![
                    "volume \"v\" (ConfigMap \"c\"): overlapping paths: \"a/b\" with \"a\"",
                    "volume \"v\" (ConfigMap \"c\"): overlapping paths: \"a\" with \"a\"",
                ],
            ),
        ] {
            assert_eq!(of(spec.clone(), json!({})), want, "{spec}");
        }
    }

    #[test]
    fn names_that_are_no_labels() {
        let got = pod(&json!({"metadata": {"name": "a.b"}, "spec": {}}));
        let want = "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [must not contain dots]";
        assert_eq!(got, [want]);
    }

    #[test]
    fn annotations_become_fields() {
        let mut pod = json!({"metadata": {"annotations": {format!("{APP_ARMOR}a"): "unconfined", format!("{APP_ARMOR}b"): "localhost/x"}},
            "spec": {"securityContext": {"appArmorProfile": {"type": "Unconfined"}}, "containers": [{"name": "a"}, {"name": "b"}]}});
        let said = app_armor_fields(&mut pod);
        assert_eq!(said, [format!("metadata.annotations[{APP_ARMOR}b]: {APP_ARMOR_TEXT}")]);
        assert!(pod["spec"]["containers"][0].get("securityContext").is_none());
        assert_eq!(
            pod["spec"]["containers"][1]["securityContext"]["appArmorProfile"],
            json!({"type": "Localhost", "localhostProfile": "x"})
        );
    }
}
