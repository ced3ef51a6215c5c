//! Ingresses.

use isopod_api::{field::ErrorList, meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs},
};

/// `ingresses`.
pub(crate) struct Ingress;

impl Strategy for Ingress {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"loadBalancer": {}});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec_at = At::field(obj, "spec");
        spec(&mut e, &spec_at);
        let (class, name) = ("kubernetes.io/ingress.class", spec_at.get("ingressClassName"));
        if let Some(annotated) = meta::annotation(obj, class)
            && name.is_set()
            && name.s() != annotated
        {
            // Upstream leaves `metadata` out and takes the annotation for a child.
            let path = isopod_api::field::Path::new("annotations").child(class);
            let at = At::new(path, &Value::Null);
            e.invalid_as(&at, annotated, "must match `ingressClassName` when both are specified");
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            for ingress in At::field(new, "status").get("loadBalancer.ingress").items() {
                if !ingress.get("ip").s().is_empty() {
                    crate::validation::net::ip(&mut e, &ingress.get("ip"));
                }
                if !ingress.get("hostname").s().is_empty() {
                    e.dns_subdomain(&ingress.get("hostname"));
                    if ingress.get("hostname").s().parse::<std::net::IpAddr>().is_ok() {
                        e.invalid(&ingress.get("hostname"), "must be a DNS name, not an IP address");
                    }
                }
            }
        } else {
            spec(&mut e, &At::field(new, "spec"));
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let class = "kubernetes.io/ingress.class";
        if cx.subresource.is_empty() && old.is_none() && meta::annotation(obj, class).is_some() {
            return vec![format!("annotation {class:?} is deprecated, please use 'spec.ingressClassName' instead")];
        }
        Vec::new()
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let mut addresses: Vec<&str> = obj["status"]["loadBalancer"]["ingress"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|i| i["ip"].as_str().filter(|ip| !ip.is_empty()).or(i["hostname"].as_str()))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        let tls = spec["tls"].as_array().is_some_and(|t| !t.is_empty());
        vec![
            table::name(obj),
            table::or(&spec["ingressClassName"], "<none>"),
            json!(hosts(spec)),
            json!(addresses.join(",")),
            json!(if tls { "80, 443" } else { "80" }),
            table::age(obj, now),
        ]
    }
}

/// The first three hosts. Rules without one count once there are three.
fn hosts(spec: &Value) -> String {
    let rules = spec["rules"].as_array().map(Vec::as_slice).unwrap_or_default();
    let (mut shown, mut more) = (Vec::new(), false);
    for rule in rules {
        more |= shown.len() == HOSTS_SHOWN;
        if let Some(host) = rule["host"].as_str().filter(|host| !more && !host.is_empty()) {
            shown.push(host);
        }
    }
    match (shown.is_empty(), more) {
        (true, _) => "*".to_owned(),
        (_, true) => format!("{} + {} more...", shown.join(","), rules.len() - HOSTS_SHOWN),
        _ => shown.join(","),
    }
}

/// Hosts in a row.
const HOSTS_SHOWN: usize = 3;

fn spec(e: &mut Errs, at: &At<'_>) {
    let (rules, backend_at) = (at.get("rules"), at.get("defaultBackend"));
    if rules.len() == 0 && !backend_at.is_set() {
        e.invalid_as(at, rules.v.clone(), "either `defaultBackend` or `rules` must be specified");
    }
    if backend_at.is_set() {
        backend(e, &backend_at);
    }
    for rule in rules.items() {
        let host = rule.get("host");
        if !host.s().is_empty() {
            if host.s().parse::<std::net::IpAddr>().is_ok() {
                e.invalid(&host, "must be a DNS name, not an IP address");
            }
            if host.s().contains('*') {
                e.messages(&host, names::wildcard_dns1123_subdomain(host.s()));
            } else {
                e.dns_subdomain(&host);
            }
        }
        let http = rule.get("http");
        if http.is_set() {
            paths(e, &http.get("paths"));
        }
    }
    for tls in at.get("tls").items() {
        for host in tls.get("hosts").items() {
            if host.s().contains('*') {
                e.messages(&host, names::wildcard_dns1123_subdomain(host.s()));
            } else {
                e.dns_subdomain(&host);
            }
        }
        let secret = tls.get("secretName");
        if !secret.s().is_empty() {
            e.dns_subdomain(&secret);
        }
    }
    let class = at.get("ingressClassName");
    if class.is_set() {
        e.dns_subdomain(&class);
    }
}

fn paths(e: &mut Errs, list: &At<'_>) {
    if list.len() == 0 {
        e.required(list, "");
    }
    for at in list.items() {
        let (kind, path) = (at.get("pathType"), at.get("path"));
        if !kind.is_set() {
            e.required(&kind, "pathType must be specified");
            continue;
        }
        match kind.s() {
            "Exact" | "Prefix" => {
                if !path.s().starts_with('/') {
                    e.invalid_str(&path, "must be an absolute path");
                }
                for sequence in ["//", "/./", "/../", "%2f", "%2F"] {
                    if path.s().contains(sequence) {
                        e.invalid(&path, &format!("must not contain '{sequence}'"));
                    }
                }
                for suffix in ["/..", "/."] {
                    if path.s().ends_with(suffix) {
                        e.invalid(&path, &format!("cannot end with '{suffix}'"));
                    }
                }
            }
            "ImplementationSpecific" => {
                if !path.s().is_empty() && !path.s().starts_with('/') {
                    e.invalid(&path, "must be an absolute path");
                }
            }
            _ => e.unsupported(&kind, &["Exact", "ImplementationSpecific", "Prefix"]),
        }
        backend(e, &at.get("backend"));
    }
}

fn backend(e: &mut Errs, at: &At<'_>) {
    let (service, resource) = (at.get("service"), at.get("resource"));
    match (service.is_set(), resource.is_set()) {
        (true, true) => e.invalid_as(at, "", "cannot set both resource and service backends"),
        (_, true) => super::networking::object_reference(e, &resource),
        (true, _) => {
            let name = service.get("name");
            if name.s().is_empty() {
                e.required(&name, "");
            } else {
                e.dns_label(&name);
            }
            let (number, port_name) = (service.get("port.number"), service.get("port.name"));
            match (number.int0() != 0, !port_name.s().is_empty()) {
                (true, true) => e.invalid_as(at, "", "cannot set both port name & port number"),
                (true, false) => e.port(&number),
                (false, true) => e.messages(&port_name, names::port_name(port_name.s())),
                (false, false) => e.required(at, "port name or number is required"),
            }
        }
        _ => e.invalid_as(at, "", "resource or service backend is required"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_hosts_are_shown() {
        let shown = |all: &[&str]| {
            let rules: Vec<Value> = all.iter().map(|host| json!({ "host": host })).collect();
            hosts(&json!({ "rules": rules }))
        };
        assert_eq!(shown(&[]), "*");
        assert_eq!(shown(&["", "a"]), "a");
        assert_eq!(shown(&["a", "b", "c"]), "a,b,c");
        assert_eq!(shown(&["a", "b", "c", ""]), "a,b,c + 1 more...");
        assert_eq!(shown(&["", "a", "b", "c", "d"]), "a,b,c + 2 more...");
    }
}
