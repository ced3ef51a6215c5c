//! Downward API: fields and resources of a pod as text.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::api::core::v1::{Pod, ResourceFieldSelector};

use crate::{qos, quantity};

/// Addresses that status fields show before any status is written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Addresses {
    pub(crate) pod: Vec<IpAddr>,
    pub(crate) host: Vec<IpAddr>,
}

/// What a container gets when it has no limit of its own.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Allocatable {
    pub(crate) cpu_milli: i64,
    pub(crate) memory: i64,
    pub(crate) storage: i64,
}

/// `fieldRef`.
pub(crate) fn field(pod: &Pod, addresses: &Addresses, path: &str) -> Result<String, String> {
    let m = &pod.metadata;
    let spec = pod.spec.as_ref();
    if let Some((base, key)) = subscript(path) {
        let map = match base {
            "metadata.labels" => &m.labels,
            "metadata.annotations" => &m.annotations,
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        return Ok(map.as_ref().and_then(|l| l.get(key)).cloned().unwrap_or_default());
    }
    let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let first = |ips: &[IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
    Ok(match path {
        "metadata.name" => m.name.clone().unwrap_or_default(),
        "metadata.namespace" => m.namespace.clone().unwrap_or_default(),
        "metadata.uid" => m.uid.clone().unwrap_or_default(),
        "metadata.labels" => format_map(m.labels.as_ref()),
        "metadata.annotations" => format_map(m.annotations.as_ref()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.hostIP" => first(&addresses.host),
        "status.hostIPs" => join(&addresses.host),
        "status.podIP" => first(&addresses.pod),
        "status.podIPs" => join(&addresses.pod),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

fn subscript(path: &str) -> Option<(&str, &str)> {
    path.strip_suffix("']")?.split_once("['")
}

fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines = map.into_iter().flatten().map(|(k, v)| format!("{k}={}", quote(v)));
    lines.collect::<Vec<_>>().join("\n")
}

/// Go's `%q`, for what labels and annotations hold.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// `resourceFieldRef`; `default_container` is the container it stands in.
pub(crate) fn resource(
    pod: &Pod,
    selector: &ResourceFieldSelector,
    default_container: &str,
    allocatable: Allocatable,
) -> Result<String, String> {
    let name = selector.container_name.as_deref().filter(|n| !n.is_empty()).unwrap_or(default_container);
    let spec = pod.spec.as_ref().ok_or("the pod has no spec")?;
    let container =
        qos::all_containers(spec).find(|c| c.name == name).ok_or_else(|| format!("container {name} not found"))?;
    let (list, resource) = selector
        .resource
        .split_once('.')
        .filter(|(l, _)| matches!(*l, "limits" | "requests"))
        .ok_or_else(|| format!("unsupported container resource : {}", selector.resource))?;
    let r = container.resources.as_ref();
    let limits = r.and_then(|r| r.limits.as_ref());
    let from = if list == "limits" { limits } else { r.and_then(|r| r.requests.as_ref()) };
    let known = quantity::get_millis(from, resource)
        .or_else(|| (list == "requests").then(|| quantity::get_millis(limits, resource)).flatten());
    let value = known.unwrap_or_else(|| match (list, resource) {
        ("limits", "cpu") => allocatable.cpu_milli,
        ("limits", "memory") => allocatable.memory.saturating_mul(1000),
        ("limits", "ephemeral-storage") => allocatable.storage.saturating_mul(1000),
        _ => 0,
    });
    let divisor = selector.divisor.as_ref().map(quantity::millis).filter(|d| *d > 0).unwrap_or(1000);
    Ok(((i128::from(value) + i128::from(divisor) - 1) / i128::from(divisor)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name":"p","namespace":"n","uid":"u","labels":{"b":"x\"y","a":"1"}},
            "spec": {"nodeName":"node","containers":[{"name":"c","resources":{"limits":{"cpu":"1500m"},"requests":{"memory":"1Mi"}}}]}}))
        .unwrap()
    }

    #[test]
    fn fields() {
        let a = Addresses { pod: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()], host: vec![] };
        for (path, want) in [
            ("metadata.name", "p"),
            ("metadata.labels", "a=\"1\"\nb=\"x\\\"y\""),
            ("metadata.labels['a']", "1"),
            ("metadata.annotations['none']", ""),
            ("spec.nodeName", "node"),
            ("status.podIP", "10.0.0.1"),
            ("status.podIPs", "10.0.0.1,fd00::1"),
        ] {
            assert_eq!(field(&pod(), &a, path).unwrap(), want, "{path}");
        }
        assert!(field(&pod(), &a, "status.phase").is_err());
    }

    #[test]
    fn resources_round_up_and_fall_back_to_the_node() {
        let node = Allocatable { cpu_milli: 2000, memory: 4096, storage: 0 };
        for (r, divisor, want) in [
            ("limits.cpu", "", "2"),
            ("limits.cpu", "1m", "1500"),
            ("requests.cpu", "1m", "1500"),
            ("limits.memory", "", "4096"),
            ("requests.memory", "1Ki", "1024"),
        ] {
            let s: ResourceFieldSelector = serde_json::from_value(if divisor.is_empty() {
                serde_json::json!({"resource": r})
            } else {
                serde_json::json!({"resource": r, "divisor": divisor})
            })
            .unwrap();
            assert_eq!(resource(&pod(), &s, "c", node).unwrap(), want, "{r} {divisor}");
        }
    }
}
