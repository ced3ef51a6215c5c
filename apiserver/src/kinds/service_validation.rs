//! Validation and warnings of Services.

use isopod_api::names;
use serde_json::{Value, json};

use crate::validation::{At, Errs, meta, net, same};

fn headless(spec: &At<'_>) -> bool {
    spec.get("clusterIPs").strings().first() == Some(&"None")
}

/// A Service after allocation.
pub(crate) fn service(e: &mut Errs, obj: &Value) {
    let spec = At::field(obj, "spec");
    let kind = spec.get("type");
    let ports = spec.get("ports");
    if ports.len() == 0 && !headless(&spec) && kind.s() != "ExternalName" {
        e.required(&ports, "");
    }
    by_type(e, &spec);
    let mut seen = Vec::new();
    for port in ports.items() {
        service_port(e, &port, ports.len() > 1, &mut seen);
    }
    meta::labels(e, &spec.get("selector"));
    affinity(e, &spec);
    cluster_ips(e, &spec, false);
    for ip in spec.get("externalIPs").items() {
        if net::ip(e, &ip) {
            net::non_special_ip(e, &ip);
        }
    }
    e.required_one_of(&kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    if kind.s() == "ClusterIP" {
        for port in ports.items() {
            if port.get("nodePort").int0() != 0 {
                e.forbidden(&port.get("nodePort"), "may not be used when `type` is 'ClusterIP'");
            }
        }
    }
    duplicates(e, &ports);
    load_balancer(e, obj, &spec);
    traffic_policies(e, &spec);
}

fn by_type(e: &mut Errs, spec: &At<'_>) {
    let kind = spec.get("type").s();
    let first = spec.get("clusterIPs").items().into_iter().next();
    match kind {
        "LoadBalancer" | "NodePort" => {
            if kind == "LoadBalancer" {
                for port in spec.get("ports").items() {
                    if port.get("port").int0() == 10250 {
                        e.invalid_as(&port, 10250, "may not expose port 10250 externally since it is used by kubelet");
                    }
                }
            }
            if let Some(first) = first.filter(|f| f.s() == "None") {
                e.invalid(&first, &format!("may not be set to 'None' for {kind} services"));
            }
        }
        "ExternalName" => {
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                let at = spec.get(field);
                if at.len() > 0 || at.v.is_string() {
                    e.forbidden(&at, "may not be set for ExternalName services");
                }
            }
            let name = spec.get("externalName");
            let cname = name.s().strip_suffix('.').unwrap_or(name.s());
            if cname.is_empty() {
                e.required(&name, "");
            } else {
                for message in names::dns1123_subdomain(cname) {
                    e.invalid_as(&name, cname, &message);
                }
            }
        }
        _ => {}
    }
}

fn service_port<'a>(e: &mut Errs, at: &At<'a>, named: bool, seen: &mut Vec<&'a str>) {
    let name = at.get("name");
    if named && name.s().is_empty() {
        e.required(&name, "");
    } else if !name.s().is_empty() {
        e.dns_label(&name);
        if seen.contains(&name.s()) {
            e.duplicate(&name, name.s());
        } else {
            seen.push(name.s());
        }
    }
    e.port(&at.get("port"));
    e.required_one_of(&at.get("protocol"), &["SCTP", "TCP", "UDP"]);
    let target = at.get("targetPort");
    if target.is_set() {
        e.port_or_name(&target);
    }
    let app = at.get("appProtocol");
    if app.is_set() {
        e.qualified_name(&app);
    }
}

fn affinity(e: &mut Errs, spec: &At<'_>) {
    let (kind, config) = (spec.get("sessionAffinity"), spec.get("sessionAffinityConfig"));
    e.required_one_of(&kind, &["ClientIP", "None"]);
    if kind.s() == "ClientIP" {
        let seconds = config.get("clientIP.timeoutSeconds");
        if !config.is_set() {
            e.required(&config, "when session affinity type is ClientIP");
        } else if !config.get("clientIP").is_set() {
            e.required(&config.get("clientIP"), "when session affinity type is ClientIP");
        } else if !seconds.is_set() {
            e.required(&seconds, "when session affinity type is ClientIP");
        } else if !(1..=86400).contains(&seconds.int0()) {
            e.invalid(&seconds, "must be greater than 0 and less than 86400");
        }
    } else if kind.s() == "None" && config.is_set() {
        e.forbidden(&config, "must not be set when session affinity is None");
    }
}

/// clusterIP, clusterIPs, ipFamilies and ipFamilyPolicy must agree.
pub(crate) fn cluster_ips(e: &mut Errs, spec: &At<'_>, updating: bool) {
    if spec.get("type").s() == "ExternalName" {
        return;
    }
    let (ip, ips) = (spec.get("clusterIP"), spec.get("clusterIPs"));
    let (list, policy) = (spec.get("ipFamilies"), spec.get("ipFamilyPolicy"));
    if let Some(first) = ips.items().into_iter().next() {
        if ip.s().is_empty() {
            e.invalid(&ips, "must be empty when `clusterIP` is not specified");
        } else if ip.s() != first.s() {
            e.invalid(&ips, "first value must match `clusterIP`");
        }
    } else if !ip.s().is_empty() && !updating {
        e.required(&ips, "");
    }
    let mut seen: Vec<&str> = Vec::new();
    for family in list.items() {
        if !["IPv4", "IPv6"].contains(&family.s()) {
            e.unsupported(&family, &["IPv4", "IPv6"]);
        } else if seen.contains(&family.s()) {
            e.duplicate(&family, family.s());
        }
        seen.push(family.s());
    }
    if policy.is_set() {
        e.one_of(&policy, &["PreferDualStack", "RequireDualStack", "SingleStack"]);
    }
    if list.len() == 2 && policy.is_set() && policy.s() == "SingleStack" && e.is_empty() {
        e.invalid(&policy, "must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified");
    } else if list.len() == 2 && !policy.is_set() && e.is_empty() {
        e.invalid_as(
            &policy,
            "SingleStack",
            "must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
        );
    }
    for (i, own) in ips.items().into_iter().enumerate() {
        if own.s() == "None" {
            if ips.len() > 1 {
                e.invalid(&own, "'None' must be the first and only value");
            }
            continue;
        }
        let messages = net::ip_messages(own.s());
        if !messages.is_empty() {
            e.messages(&own, messages);
            continue;
        }
        let family = net::family(own.s());
        if let Some(wanted) = list.strings().get(i)
            && *wanted != family
            && ["IPv4", "IPv6"].contains(wanted)
        {
            e.invalid(&own, &format!("expected an {wanted} value as indicated by `ipFamilies[{i}]`"));
        }
    }
    if ips.len() > 2 {
        e.invalid(&ips, "may only hold up to 2 values");
    }
}

fn duplicates(e: &mut Errs, ports: &At<'_>) {
    let (mut nodes, mut seen) = (Vec::new(), Vec::new());
    for port in ports.items() {
        let (node, protocol) = (port.get("nodePort"), port.get("protocol").s());
        if node.int0() == 0 {
            continue;
        }
        if nodes.contains(&(node.int0(), protocol)) {
            e.duplicate(&node, node.int0());
        }
        nodes.push((node.int0(), protocol));
    }
    for port in ports.items() {
        let key = (port.get("port").int0(), port.get("protocol").s());
        if seen.contains(&key) {
            e.duplicate(
                &port,
                json!({"Name": "", "Protocol": key.1, "AppProtocol": null, "Port": key.0, "TargetPort": 0, "NodePort": 0}),
            );
        }
        seen.push(key);
    }
}

fn load_balancer(e: &mut Errs, obj: &Value, spec: &At<'_>) {
    let is_lb = spec.get("type").s() == "LoadBalancer";
    let only_lb = "may only be used when `type` is 'LoadBalancer'";
    let annotation = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let annotations = At::field(obj, "metadata").get("annotations");
    let from_annotation = annotations.v.get(annotation).and_then(Value::as_str);
    let ranges = spec.get("loadBalancerSourceRanges");
    if ranges.len() > 0 || from_annotation.is_some() {
        if !is_lb {
            let at = if ranges.len() > 0 { ranges.clone() } else { annotations.key(annotation) };
            e.forbidden(&at, only_lb);
        }
        if ranges.len() > 0 {
            for range in ranges.items() {
                if net::parse_cidr(range.s().trim()).is_none() {
                    e.invalid(&range, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
                }
            }
        } else if let Some(text) = from_annotation.filter(|t| !t.trim().is_empty())
            && text.split(',').any(|cidr| net::parse_cidr(cidr.trim()).is_none())
        {
            let at = annotations.key(annotation);
            e.invalid_as(&at, text, "must be a comma separated list of CIDRs e.g. 192.168.0.0/16,10.0.0.0/8");
        }
    }
    let allocate = spec.get("allocateLoadBalancerNodePorts");
    if allocate.is_set() && !is_lb {
        e.forbidden(&allocate, only_lb);
    }
    let class = spec.get("loadBalancerClass");
    if class.is_set() {
        if !is_lb {
            e.forbidden(&class, only_lb);
        } else {
            e.qualified_name(&class);
        }
    }
}

fn traffic_policies(e: &mut Errs, spec: &At<'_>) {
    let kind = spec.get("type").s();
    let external = spec.get("externalTrafficPolicy");
    let needs_external =
        matches!(kind, "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && spec.get("externalIPs").len() > 0);
    if needs_external {
        if external.s().is_empty() {
            e.required(&external, "ExternalTrafficPolicy must be set for NodePort and LoadBalancer services");
        } else {
            e.one_of(&external, &["Cluster", "Local"]);
        }
    } else if !external.s().is_empty() {
        e.invalid(&external, "may only be set for externally-accessible services");
    }
    let health = spec.get("healthCheckNodePort");
    let needs_health = kind == "LoadBalancer" && external.s() == "Local";
    if needs_health {
        if health.int0() < 0 {
            e.invalid(&health, "must be greater than or equal to 0");
        }
    } else if health.int0() != 0 {
        e.invalid(&health, "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'");
    }
    let internal = spec.get("internalTrafficPolicy");
    if matches!(kind, "NodePort" | "LoadBalancer" | "ClusterIP") && !internal.is_set() {
        e.required(&internal, "");
    }
    e.one_of_if_set(&internal, &["Cluster", "Local"]);
    e.one_of_if_set(&spec.get("trafficDistribution"), &["PreferClose", "PreferSameNode", "PreferSameZone"]);
}

/// The first address and family may not change once set.
pub(crate) fn unchanged_addresses(e: &mut Errs, new: &Value, old: &Value) {
    let (spec, before) = (At::field(new, "spec"), At::field(old, "spec"));
    let fixed = |s: &At<'_>| s.get("type").s() != "ExternalName";
    if fixed(&spec) && fixed(&before) {
        let (now, then) = (spec.get("clusterIPs"), before.get("clusterIPs"));
        let (first, was) = (now.strings().first().copied(), then.strings().first().copied());
        if let (Some(first), Some(was)) = (first, was)
            && first != was
        {
            let at = At::new(now.path.index(0), now.v);
            e.invalid(&at, "may not change once set");
        }
        let (families, were) = (spec.get("ipFamilies"), before.get("ipFamilies"));
        if e.is_empty()
            && families.len() > 0
            && were.len() > 0
            && families.strings()[0] != were.strings()[0]
            && first == was
        {
            let at = At::new(families.path.index(0), families.v);
            e.invalid(&at, "may not change once set");
        }
    }
}

/// What else may not change once set.
pub(crate) fn update(e: &mut Errs, new: &Value, old: &Value) {
    let (spec, before) = (At::field(new, "spec"), At::field(old, "spec"));
    let (class, was) = (spec.get("loadBalancerClass"), before.get("loadBalancerClass"));
    let both = spec.get("type").s() == "LoadBalancer" && before.get("type").s() == "LoadBalancer";
    if both && !same(class.v, was.v) {
        e.invalid(&class, "may not change once set");
    }
}

/// The load balancer's status.
pub(crate) fn status(e: &mut Errs, obj: &Value) {
    let ingress = At::field(obj, "status").get("loadBalancer.ingress");
    if obj["spec"]["type"] != "LoadBalancer" {
        if ingress.len() > 0 {
            e.forbidden(&ingress, "may only be used when `spec.type` is 'LoadBalancer'");
        }
        return;
    }
    for at in ingress.items() {
        let (ip, mode, hostname) = (at.get("ip"), at.get("ipMode"), at.get("hostname"));
        if !ip.s().is_empty() {
            net::ip(e, &ip);
        }
        if !ip.s().is_empty() && !mode.is_set() {
            e.required(&mode, "must be specified when `ip` is set");
        } else if ip.s().is_empty() && mode.is_set() {
            e.forbidden(&mode, "may not be specified when `ip` is not set");
        } else if mode.is_set() {
            e.one_of(&mode, &["Proxy", "VIP"]);
        }
        if !hostname.s().is_empty() {
            e.dns_subdomain(&hostname);
            if hostname.s().parse::<std::net::IpAddr>().is_ok() {
                e.invalid(&hostname, "must be a DNS name, not an IP address");
            }
        }
    }
}

/// Warnings of a Service.
pub(crate) fn warnings(obj: &Value) -> Vec<String> {
    let spec = At::field(obj, "spec");
    let mut out = Vec::new();
    if obj["metadata"]["annotations"].get("service.kubernetes.io/topology-aware-hints").is_some() {
        out.push("annotation service.kubernetes.io/topology-aware-hints is deprecated, please use service.kubernetes.io/topology-mode instead".to_owned());
    }
    if spec.get("externalIPs").len() > 0 && spec.get("type").s() != "ExternalName" {
        out.push("spec.externalIPs is deprecated and may no longer be implemented in some clusters".to_owned());
    }
    if spec.get("type").s() == "ExternalName" && spec.get("externalIPs").len() > 0 {
        out.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if spec.get("type").s() != "ClusterIP" && headless(&spec) && spec.get("type").s() != "ExternalName" {
        out.push("spec.clusterIP is ignored for headless services".to_owned());
    }
    if headless(&spec) {
        for field in ["loadBalancerIP", "externalIPs"] {
            let at = spec.get(field);
            if at.len() > 0 || !at.s().is_empty() {
                out.push(format!("spec.{field} is ignored for headless services"));
            }
        }
        if spec.get("sessionAffinity").s() != "None" && !spec.get("sessionAffinity").s().is_empty() {
            out.push("spec.SessionAffinity is ignored for headless services".to_owned());
        }
    }
    if spec.get("trafficDistribution").s() == "PreferClose" {
        out.push("spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"".to_owned());
    }
    out
}
