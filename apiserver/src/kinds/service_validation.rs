//! Validation and warnings of Services.

use isopod_api::names;
use serde_json::{Value, json};

use crate::validation::{At, Errs, meta, net, same};

const ONLY_LOAD_BALANCER: &str = "may only be used when `type` is 'LoadBalancer'";

fn headless(spec: &At<'_>) -> bool {
    spec.get("clusterIPs").strings().first() == Some(&"None")
}

const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";
const TOPOLOGY_HINTS: &str = "service.kubernetes.io/topology-aware-hints";

/// A Service after allocation; what `old` had already is not judged again.
pub(crate) fn service(e: &mut Errs, obj: &Value, old: Option<&Value>) {
    let spec = At::field(obj, "spec");
    let annotations = At::field(obj, "metadata").get("annotations");
    let (mode, hints) = (annotations.key(TOPOLOGY_MODE), annotations.key(TOPOLOGY_HINTS));
    if mode.is_set() && hints.is_set() && mode.v != hints.v {
        e.invalid(&mode, &format!("must match annotations[{TOPOLOGY_HINTS}] when both are specified"));
    }
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
    load_balancer(e, obj, &spec, old);
    traffic_policies(e, &spec);
}

fn by_type(e: &mut Errs, spec: &At<'_>) {
    let kind = spec.get("type").s();
    let first = spec.get("clusterIPs").items().into_iter().next();
    match kind {
        "LoadBalancer" | "NodePort" => {
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
    if addresses_parse(e, &ips) {
        address_families(e, &ips, &list);
    }
}

/// Each of clusterIPs by itself.
fn addresses_parse(e: &mut Errs, ips: &At<'_>) -> bool {
    let mut good = true;
    for (i, own) in ips.items().into_iter().enumerate() {
        if i == 0 && own.s() == "None" {
            if ips.len() > 1 {
                good = false;
                e.invalid(ips, "'None' must be the first and only value");
            }
            continue;
        }
        good &= net::ip(e, &own);
    }
    if ips.len() > 2 {
        e.invalid(ips, "may only hold up to 2 values");
    }
    good
}

/// clusterIPs are of the families that ipFamilies says.
fn address_families(e: &mut Errs, ips: &At<'_>, families: &At<'_>) {
    let addresses = ips.strings();
    if addresses.len() > 1 {
        let six = addresses.iter().filter(|ip| ip.contains(':')).count();
        if six == 0 || six == addresses.len() {
            e.invalid(ips, "may specify no more than one IP for each IP family");
        }
    }
    if addresses.first() == Some(&"None") {
        return;
    }
    for (own, wanted) in ips.items().iter().zip(families.strings()) {
        let fits = !["IPv4", "IPv6"].contains(&wanted) || net::family(own.s()) == wanted;
        if !fits {
            let i = ips.items().iter().position(|at| at.path == own.path).unwrap_or_default();
            e.invalid(own, &format!("expected an {wanted} value as indicated by `ipFamilies[{i}]`"));
        }
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

fn source_ranges(e: &mut Errs, obj: &Value, spec: &At<'_>, old: Option<&Value>) {
    let is_lb = spec.get("type").s() == "LoadBalancer";
    let name = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let annotation = At::field(obj, "metadata").get("annotations").key(name);
    let ranges = spec.get("loadBalancerSourceRanges");
    if ranges.len() > 0 {
        // Upstream names the field like this.
        let at = At::new(spec.path.child("LoadBalancerSourceRanges"), ranges.v);
        if !is_lb {
            e.forbidden(&at, ONLY_LOAD_BALANCER);
        }
        for range in at.items() {
            for message in net::cidr_messages(range.s().trim()) {
                e.invalid_as(&range, range.s().trim(), &message);
            }
        }
    } else if annotation.is_set() {
        if !is_lb {
            e.forbidden(&annotation, ONLY_LOAD_BALANCER);
        }
        let unchanged = old.is_some_and(|old| &old["metadata"]["annotations"][name] == annotation.v);
        for range in
            annotation.s().split(',').map(str::trim).filter(|_| !unchanged && !annotation.s().trim().is_empty())
        {
            for message in net::cidr_messages(range) {
                e.invalid_as(&annotation, range, &message);
            }
        }
    }
}

fn load_balancer(e: &mut Errs, obj: &Value, spec: &At<'_>, old: Option<&Value>) {
    let is_lb = spec.get("type").s() == "LoadBalancer";
    source_ranges(e, obj, spec, old);
    let allocate = spec.get("allocateLoadBalancerNodePorts");
    if allocate.is_set() && !is_lb {
        e.forbidden(&allocate, ONLY_LOAD_BALANCER);
    }
    if is_lb && !allocate.is_set() {
        e.required(&At::field(obj, "allocateLoadBalancerNodePorts"), "");
    }
    let class = spec.get("loadBalancerClass");
    if class.is_set() {
        if !is_lb {
            e.forbidden(&class, ONLY_LOAD_BALANCER);
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
            e.required(&external, "");
        } else {
            e.one_of(&external, &["Cluster", "Local"]);
        }
    } else if !external.s().is_empty() {
        e.invalid(&external, "may only be set for externally-accessible services");
    }
    let health = spec.get("healthCheckNodePort");
    let needs_health = kind == "LoadBalancer" && external.s() == "Local";
    if needs_health {
        if health.int0() == 0 {
            e.required(&health, "");
        } else {
            e.port(&health);
        }
    } else if health.int0() != 0 {
        e.invalid(&health, "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'");
    }
    let internal = spec.get("internalTrafficPolicy");
    if matches!(kind, "NodePort" | "LoadBalancer" | "ClusterIP") && !internal.is_set() {
        e.required(&internal, "");
    }
    e.one_of_if_set(&internal, &["Cluster", "Local"]);
    e.one_of_if_set(&spec.get("trafficDistribution"), &["PreferClose", "PreferSameZone", "PreferSameNode"]);
}

/// What of the addresses and families may not change once set: all but a second one, which may come and go.
fn unchanged_addresses(e: &mut Errs, new: &Value, old: &Value) {
    let (spec, before) = (At::field(new, "spec"), At::field(old, "spec"));
    if [&spec, &before].iter().any(|s| s.get("type").s() == "ExternalName") {
        return;
    }
    let (was_headless, is_headless) = (headless(&before), headless(&spec));
    let policy = spec.get("ipFamilyPolicy");
    if !(was_headless && is_headless) {
        let what = [
            "primary clusterIP can not be unset",
            "must be set to 'SingleStack' when releasing the secondary clusterIP",
        ];
        kept(e, &spec.get("clusterIPs"), &before.get("clusterIPs"), &policy, &what);
    }
    if !was_headless && !is_headless {
        let what =
            ["primary ipFamily can not be unset", "must be set to 'SingleStack' when releasing the secondary ipFamily"];
        kept(e, &spec.get("ipFamilies"), &before.get("ipFamilies"), &policy, &what);
    }
}

/// The first of a list of one or two stays; the second may come, or go when the policy says so.
fn kept(e: &mut Errs, new: &At<'_>, old: &At<'_>, policy: &At<'_>, [unset, release]: &[&str; 2]) {
    let (now, was) = (new.strings(), old.strings());
    let at = |i: usize| At::new(new.path.index(i), new.v);
    if now.len() == was.len() {
        for i in (0..now.len()).filter(|i| now[*i] != was[*i]) {
            e.invalid(&at(i), "may not change once set");
        }
        return;
    }
    if was.len() > now.len() && now.is_empty() {
        e.invalid_as(&at(0), json!([]), unset);
    }
    if let (Some(first), Some(before)) = (now.first(), was.first())
        && first != before
    {
        e.invalid(&at(0), "may not change once set");
    }
    if was.len() > now.len() && now.len() == 1 && policy.s() != "SingleStack" {
        e.invalid(policy, release);
    }
}

/// What else may not change once set.
pub(crate) fn update(e: &mut Errs, new: &Value, old: &Value) {
    unchanged_addresses(e, new, old);
    let (spec, before) = (At::field(new, "spec"), At::field(old, "spec"));
    let (class, was) = (spec.get("loadBalancerClass"), before.get("loadBalancerClass"));
    let both = spec.get("type").s() == "LoadBalancer" && before.get("type").s() == "LoadBalancer";
    if both && !same(class.v, was.v) {
        e.invalid(&class, "may not change once set");
    }
    let checked = |s: &At<'_>| s.get("type").s() == "LoadBalancer" && s.get("externalTrafficPolicy").s() == "Local";
    let (health, was) = (spec.get("healthCheckNodePort"), before.get("healthCheckNodePort"));
    if checked(&spec) && checked(&before) && health.int0() != was.int0() {
        e.forbidden(&health, "field is immutable");
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
    if obj["metadata"]["annotations"].get(TOPOLOGY_HINTS).is_some() {
        out.push(format!("annotation {TOPOLOGY_HINTS} is deprecated, please use {TOPOLOGY_MODE} instead"));
    }
    if spec.get("type").s() != "ExternalName" && !headless(&spec) {
        out.extend(spec.get("clusterIPs").items().iter().filter_map(|at| net::ip_warning(&at.path, at.s())));
    }
    if spec.get("externalIPs").len() > 0 && spec.get("type").s() != "ExternalName" {
        out.push("spec.externalIPs is deprecated and may no longer be implemented in some clusters".to_owned());
    }
    if headless(&spec) && spec.get("type").s() == "ClusterIP" {
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
    out.extend(spec.get("externalIPs").items().iter().filter_map(|at| net::ip_warning(&at.path, at.s())));
    let address = spec.get("loadBalancerIP");
    out.extend(net::ip_warning(&address.path, address.s()));
    let ranges = spec.get("loadBalancerSourceRanges");
    out.extend(ranges.items().iter().filter_map(|at| net::cidr_warning(&at.path, at.s().trim())));
    let external = spec.get("type").s() == "ExternalName";
    if external && spec.get("externalIPs").len() > 0 {
        out.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if !external && !spec.get("externalName").s().is_empty() {
        out.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    if spec.get("trafficDistribution").s() == "PreferClose" {
        out.push("spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"".to_owned());
    }
    out
}
