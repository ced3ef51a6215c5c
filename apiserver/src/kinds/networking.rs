//! NetworkPolicies, IngressClasses, IPAddresses and ServiceCIDRs.

use std::net::IpAddr;

use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, IMMUTABLE, internal, net, selector},
};

/// `networkpolicies`.
pub(crate) struct NetworkPolicy;
/// `ingressclasses`.
pub(crate) struct IngressClass;
/// `ipaddresses`.
pub(crate) struct IpAddress;
/// `servicecidrs`.
pub(crate) struct ServiceCidr;

impl Strategy for NetworkPolicy {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        selector::label_selector(&mut e, &spec.get("podSelector"));
        for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
            for rule in spec.get(direction).items() {
                for port in rule.get("ports").items() {
                    policy_port(&mut e, &port);
                }
                for peer in rule.get(peers).items() {
                    policy_peer(&mut e, &peer);
                }
            }
        }
        let types = spec.get("policyTypes");
        if types.len() > 2 {
            e.invalid(&types, "may not specify more than two policyTypes");
        } else {
            for kind in types.items() {
                e.one_of(&kind, &["Ingress", "Egress"]);
            }
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        // Upstream validates the new policy twice.
        [self.validate(cx, new), self.validate(cx, new)].concat()
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let spec = At::field(obj, "spec");
        let mut out = Vec::new();
        for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
            for peer in spec.get(direction).items().iter().flat_map(|rule| rule.get(peers).items()) {
                let block = peer.get("ipBlock");
                let mut all = vec![block.get("cidr")];
                all.extend(block.get("except").items());
                out.extend(all.iter().filter_map(|at| net::cidr_warning(&at.path, at.s())));
            }
        }
        out
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), json!(table::selector(&obj["spec"]["podSelector"])), table::age(obj, now)]
    }
}

fn policy_port(e: &mut Errs, at: &At<'_>) {
    e.one_of_if_set(&at.get("protocol"), &["TCP", "UDP", "SCTP"]);
    let (port, end) = (at.get("port"), at.get("endPort"));
    if !port.is_set() {
        if end.is_set() {
            e.invalid(&end, "may not be specified when `port` is not specified");
        }
        return;
    }
    if port.v.is_string() && end.is_set() {
        e.invalid(&end, "may not be specified when `port` is non-numeric");
    }
    e.port_or_name(&port);
    if end.is_set() && !port.v.is_string() {
        if end.int0() < port.int0() {
            // Upstream shows the port, not the end.
            e.invalid_as(&end, port.int0(), "must be greater than or equal to `port`");
        }
        e.port(&end);
    }
}

fn policy_peer(e: &mut Errs, at: &At<'_>) {
    let (pods, namespaces, block) = (at.get("podSelector"), at.get("namespaceSelector"), at.get("ipBlock"));
    selector::label_selector(e, &pods);
    selector::label_selector(e, &namespaces);
    if block.is_set() {
        ip_block(e, &block);
        if pods.is_set() || namespaces.is_set() {
            e.forbidden(at, "may not specify both ipBlock and another peer");
        }
    } else if !pods.is_set() && !namespaces.is_set() {
        e.required(at, "must specify a peer");
    }
}

fn ip_block(e: &mut Errs, at: &At<'_>) {
    let cidr = at.get("cidr");
    if cidr.s().is_empty() {
        return e.required(&cidr, "");
    }
    net::cidr(e, &cidr);
    let outer: Option<ipnet::IpNet> = cidr.s().parse().ok();
    if outer.is_none() {
        return;
    }
    for except in at.get("except").items() {
        net::cidr(e, &except);
        let inner: Option<ipnet::IpNet> = except.s().parse().ok();
        if let (Some(outer), Some(inner)) = (outer, inner)
            && (!outer.contains(&inner.addr()) || outer.prefix_len() >= inner.prefix_len())
        {
            e.invalid(&except, "must be a strict subset of `cidr`");
        }
    }
}

impl Strategy for IngressClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let (controller, parameters) =
            (At::field(obj, "spec").get("controller"), At::field(obj, "spec").get("parameters"));
        if controller.s().len() > 250 {
            e.too_long(&controller, 250);
        }
        domain_path(&mut e, &controller);
        if parameters.is_set() {
            object_reference(&mut e, &parameters);
            let (scope, namespace) = (parameters.get("scope"), parameters.get("namespace"));
            match scope.s() {
                "" => e.required(&scope, ""),
                "Namespace" if !namespace.is_set() => {
                    e.required(&namespace, "`parameters.scope` is set to 'Namespace'")
                }
                "Namespace" => e.dns_label(&namespace),
                "Cluster" if namespace.is_set() => e.forbidden(&namespace, "`parameters.scope` is set to 'Cluster'"),
                "Cluster" => {}
                _ => e.unsupported(&scope, &["Cluster", "Namespace"]),
            }
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        e.immutable(&At::field(new, "spec").get("controller"), &old["spec"]["controller"]);
        e.0.extend(self.validate(cx, new));
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let parameters = &obj["spec"]["parameters"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let shown = match parameters {
            Value::Null => "<none>".to_owned(),
            p if text(&p["apiGroup"]).is_empty() => format!("{}/{}", text(&p["kind"]), text(&p["name"])),
            p => format!("{}.{}/{}", text(&p["kind"]), text(&p["apiGroup"]), text(&p["name"])),
        };
        vec![table::name(obj), table::or(&obj["spec"]["controller"], ""), json!(shown), table::age(obj, now)]
    }
}

/// apiGroup, kind and name of a reference to an object.
pub(crate) fn object_reference(e: &mut Errs, at: &At<'_>) {
    let group = at.get("apiGroup");
    if group.is_set() {
        e.dns_subdomain(&group);
    }
    for field in ["kind", "name"] {
        let at = at.get(field);
        if at.s().is_empty() {
            e.required(&at, &format!("{field} is required"));
        } else {
            e.messages(&at, isopod_api::names::path_segment(at.s()));
        }
    }
}

/// `example.com/path`.
pub(crate) fn domain_path(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.required(at, "");
    }
    let Some((domain, path)) = at.s().split_once('/').filter(|(domain, path)| !domain.is_empty() && !path.is_empty())
    else {
        return e.invalid(at, "must be a domain-prefixed path (such as \"acme.io/foo\")");
    };
    for message in isopod_api::names::dns1123_subdomain(domain) {
        e.invalid_as(at, domain, &message);
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "/-._~%!$&'()*+,;=:".contains(c);
    if !path.chars().all(allowed) {
        let message = "Invalid path (regex used for validation is '[A-Za-z0-9/\\-._~%!$&'()*+,;=:]+')";
        e.invalid_as(at, path, message);
    }
}

impl Strategy for IpAddress {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let parent = At::field(obj, "spec").get("parentRef");
        if !parent.is_set() {
            e.required(&parent, "");
            return e.0;
        }
        if !parent.get("group").s().is_empty() {
            e.dns_subdomain(&parent.get("group"));
        }
        for field in ["resource", "name", "namespace"] {
            let at = parent.get(field);
            if at.s().is_empty() {
                if field != "namespace" {
                    e.required(&at, "");
                }
            } else {
                e.messages(&at, isopod_api::names::path_segment(at.s()));
            }
        }
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        let parent = At::field(new, "spec").get("parentRef");
        // An empty group is none: addresses of earlier versions have one.
        let part = |v: &Value, field: &str| v[field].as_str().unwrap_or_default().to_owned();
        let before = &old["spec"]["parentRef"];
        if ["group", "resource", "namespace", "name"].iter().any(|f| part(parent.v, f) != part(before, f)) {
            e.invalid_as(&parent, internal::named("ParentRef", parent.v), IMMUTABLE);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let parent = &obj["spec"]["parentRef"];
        let text = |field: &str| parent[field].as_str().unwrap_or_default();
        let resource = if text("group").is_empty() {
            text("resource").to_owned()
        } else {
            format!("{}.{}", text("resource"), text("group"))
        };
        let shown = if text("namespace").is_empty() {
            format!("{resource}/{}", text("name"))
        } else {
            format!("{resource}/{}/{}", text("namespace"), text("name"))
        };
        // Upstream fills one more cell than there are columns.
        vec![table::name(obj), json!(shown), table::age(obj, now)]
    }
}

impl Strategy for ServiceCidr {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        cidr_list(&mut e, &At::field(obj, "spec").get("cidrs"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            return e.0;
        }
        let (cidrs, before) = (At::field(new, "spec").get("cidrs"), At::field(old, "spec").get("cidrs"));
        match (before.len(), cidrs.len()) {
            (was, is) if was == is => {
                for (own, old) in cidrs.items().iter().zip(before.items()) {
                    e.immutable(own, old.v);
                }
            }
            // A second family may come.
            (1, 2) => {
                e.immutable(&cidrs.items()[0], before.items()[0].v);
                cidr_list(&mut e, &cidrs);
            }
            _ => e.invalid(&cidrs, "field is immutable"),
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), json!(table::join(&obj["spec"]["cidrs"], ",")), table::age(obj, now)]
    }
}

fn cidr_list(e: &mut Errs, cidrs: &At<'_>) {
    if cidrs.len() == 0 {
        return e.required(cidrs, "at least one CIDR required");
    }
    if cidrs.len() > 2 {
        return e.invalid_as(cidrs, json!({"CIDRs": cidrs.v}), "may only hold up to 2 values");
    }
    for cidr in cidrs.items() {
        net::canonical_cidr(e, &cidr);
    }
    let parsed: Vec<(IpAddr, u8)> = cidrs.strings().iter().filter_map(|c| net::parse_cidr(c)).collect();
    if let [(a, _), (b, _)] = parsed[..]
        && a.is_ipv4() == b.is_ipv4()
    {
        e.invalid(cidrs, "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64");
    }
}
