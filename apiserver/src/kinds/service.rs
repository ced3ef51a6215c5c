//! Services: defaults, address families, allocation, table row. Validation is in `service_validation`.

use isopod_api::{
    field::{Error, ErrorList, Path},
    gvk::GroupKind,
    meta,
    status::Status,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{pod_defaults, service_validation as check};
use crate::{
    alloc::Session,
    registry::{
        strategy::{Context, Reservation, Strategy},
        table,
    },
    validation::{At, Errs},
};

/// `services`.
pub(crate) struct Service;

fn text<'a>(v: &'a Value, field: &str) -> &'a str {
    v[field].as_str().unwrap_or_default()
}

impl Strategy for Service {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"loadBalancer": {}});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
            patch_allocated(new, old);
            drop_type_dependent(new, old);
        }
    }

    fn reserve(&self, cx: &Context<'_>, new: &mut Value, old: Option<&Value>) -> Result<Reservation, Status> {
        if !cx.subresource.is_empty() {
            return Ok(None);
        }
        let Some(allocator) = cx.objects.services() else { return Ok(None) };
        families(new, old, allocator.family())?;
        let mut session = allocator.begin(cx.objects, old);
        let result = addresses(&mut session, new, old).and_then(|()| node_ports(&mut session, new));
        let held = session.finish();
        result?;
        Ok(Some(Box::new(held)))
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        check::service(&mut e, obj, None);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource == "status" {
            check::status(&mut e, new);
            return e.0;
        }
        check::update(&mut e, new, old);
        check::service(&mut e, new, Some(old));
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        if cx.subresource == "status" { Vec::new() } else { check::warnings(obj) }
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![
            ("spec.clusterIP", text(&obj["spec"], "clusterIP").to_owned()),
            ("spec.type", text(&obj["spec"], "type").to_owned()),
        ]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["spec.clusterIP", "spec.type"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        vec![
            table::name(obj),
            json!(text(spec, "type")),
            table::or(&spec["clusterIPs"][0], "<none>"),
            json!(external_ip(obj)),
            json!(ports(spec)),
            table::age(obj, now),
            json!(table::labels(&spec["selector"])),
        ]
    }
}

fn remove(v: &mut Value, field: &str) {
    if let Some(map) = v.as_object_mut() {
        map.remove(field);
    }
}

fn invalid(obj: &Value, errors: ErrorList) -> Status {
    let kind = GroupKind { group: String::new(), kind: "Service".to_owned() };
    Status::invalid(&kind, meta::name(obj), errors)
}

fn needs_address(spec: &Value) -> bool {
    matches!(text(spec, "type"), "ClusterIP" | "NodePort" | "LoadBalancer") && spec["clusterIPs"][0] != "None"
}

fn needs_node_port(spec: &Value) -> bool {
    match text(spec, "type") {
        "NodePort" => true,
        "LoadBalancer" => spec["allocateLoadBalancerNodePorts"] != false,
        _ => false,
    }
}

/// An update that leaves out allocated values keeps them.
fn patch_allocated(new: &mut Value, old: &Value) {
    let (before, spec) = (&old["spec"], &mut new["spec"]);
    // A client that knows only clusterIP changes both.
    if spec["clusterIPs"] == before["clusterIPs"] && text(spec, "clusterIP") != text(before, "clusterIP") {
        if text(spec, "clusterIP").is_empty() {
            remove(spec, "clusterIPs");
        } else if spec["clusterIPs"].as_array().is_some_and(|l| !l.is_empty()) {
            spec["clusterIPs"][0] = spec["clusterIP"].clone();
        }
    }
    if needs_address(before) && matches!(text(spec, "type"), "ClusterIP" | "NodePort" | "LoadBalancer") {
        if text(spec, "clusterIP").is_empty() && spec["clusterIPs"].as_array().is_none_or(Vec::is_empty) {
            spec["clusterIP"] = before["clusterIP"].clone();
            spec["clusterIPs"] = before["clusterIPs"].clone();
        } else if text(spec, "clusterIP").is_empty() {
            spec["clusterIP"] = spec["clusterIPs"][0].clone();
        } else if text(spec, "clusterIP") == text(before, "clusterIP")
            && spec["clusterIPs"].as_array().is_none_or(Vec::is_empty)
        {
            spec["clusterIPs"] = before["clusterIPs"].clone();
        }
    }
    if needs_node_port(before) && needs_node_port(spec) {
        let key = |p: &Value| (p["protocol"].clone(), p["port"].clone());
        let used: Vec<Value> = spec["ports"].as_array().into_iter().flatten().map(|p| p["nodePort"].clone()).collect();
        for port in spec["ports"].as_array_mut().into_iter().flatten() {
            if port["nodePort"].as_i64().unwrap_or_default() != 0 {
                continue;
            }
            let kept = before["ports"].as_array().into_iter().flatten().find(|p| key(p) == key(port));
            if let Some(kept) = kept
                && !used.contains(&kept["nodePort"])
            {
                port["nodePort"] = kept["nodePort"].clone();
            }
            pod_defaults::drop_nulls(port);
        }
    }
    if needs_health_check(before)
        && needs_health_check(spec)
        && spec["healthCheckNodePort"].as_i64().unwrap_or_default() == 0
    {
        spec["healthCheckNodePort"] = before["healthCheckNodePort"].clone();
    }
    pod_defaults::drop_nulls(spec);
}

fn needs_health_check(spec: &Value) -> bool {
    text(spec, "type") == "LoadBalancer" && text(spec, "externalTrafficPolicy") == "Local"
}

/// When the type changes, what only the old type had is cleared unless it was changed on purpose.
fn drop_type_dependent(new: &mut Value, old: &Value) {
    let (before, spec) = (&old["spec"], &mut new["spec"]);
    if text(before, "type") != "ExternalName" && text(spec, "type") == "ExternalName" {
        for fields in [&["clusterIP", "clusterIPs"][..], &["ipFamilies"], &["ipFamilyPolicy"]] {
            if fields.iter().all(|field| spec[*field] == before[*field]) {
                fields.iter().for_each(|field| remove(spec, field));
            }
        }
    }
    let has_node_ports = |spec: &Value| matches!(text(spec, "type"), "NodePort" | "LoadBalancer");
    if has_node_ports(before) && !has_node_ports(spec) {
        let all = |v: &Value| -> Vec<i64> {
            v["ports"].as_array().into_iter().flatten().filter_map(|p| p["nodePort"].as_i64()).collect()
        };
        let known = all(before);
        // Ports may come and go with their numbers, but not with new ones.
        if all(spec).iter().all(|port| *port == 0 || known.contains(port)) {
            for port in spec["ports"].as_array_mut().into_iter().flatten() {
                remove(port, "nodePort");
            }
        }
    }
    if needs_health_check(before)
        && !needs_health_check(spec)
        && spec["healthCheckNodePort"] == before["healthCheckNodePort"]
    {
        remove(spec, "healthCheckNodePort");
    }
    if text(before, "type") == "LoadBalancer" && text(spec, "type") != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if spec[field] == before[field] {
                remove(spec, field);
            }
        }
    }
    if text(spec, "type") != "LoadBalancer" {
        new["status"]["loadBalancer"] = json!({});
    }
    let spec = &mut new["spec"];
    let external = |s: &Value| {
        matches!(text(s, "type"), "NodePort" | "LoadBalancer")
            || (text(s, "type") == "ClusterIP" && s["externalIPs"].as_array().is_some_and(|l| !l.is_empty()))
    };
    if external(before) && !external(spec) && spec["externalTrafficPolicy"] == before["externalTrafficPolicy"] {
        remove(spec, "externalTrafficPolicy");
    }
    pod_defaults::drop_nulls(spec);
}

/// Checks and completes clusterIP(s), ipFamilies and ipFamilyPolicy for a cluster of one family.
fn families(new: &mut Value, old: Option<&Value>, family: &str) -> Result<(), Status> {
    let (first, external) = (text(&new["spec"], "clusterIP").to_owned(), text(&new["spec"], "type") == "ExternalName");
    let none = new["spec"]["clusterIPs"].as_array().is_none_or(Vec::is_empty);
    if none && !first.is_empty() && (!external || old.is_none()) {
        new["spec"]["clusterIPs"] = json!([first]);
    }
    if external {
        return Ok(());
    }
    let mut e = Errs::new();
    check::cluster_ips(&mut e, &At::field(new, "spec"), old.is_some());
    if !e.is_empty() {
        return Err(invalid(new, e.0));
    }
    let spec = &mut new["spec"];
    let policy = text(spec, "ipFamilyPolicy").to_owned();
    let headless = spec["clusterIPs"][0] == "None";
    let selectorless = headless && spec["selector"].as_object().is_none_or(|s| s.is_empty());
    let known: Vec<String> =
        spec["ipFamilies"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    if policy == "RequireDualStack" && !selectorless && old.is_none_or(|o| text(&o["spec"], "ipFamilyPolicy") != policy)
    {
        let error = Error::invalid(
            &Path::new("spec").child("ipFamilyPolicy"),
            policy,
            "this cluster is not configured for dual-stack services",
        );
        return Err(invalid(new, vec![error]));
    }
    if !selectorless && let Some(i) = known.iter().position(|f| f != family) {
        let error = Error::invalid(
            &Path::new("spec").child("ipFamilies").index(i),
            known[i].clone(),
            "not configured on this cluster",
        );
        return Err(invalid(new, vec![error]));
    }
    if policy.is_empty() {
        spec["ipFamilyPolicy"] =
            json!(if selectorless && known.is_empty() { "RequireDualStack" } else { "SingleStack" });
    }
    if known.is_empty() {
        let other = if family == "IPv4" { "IPv6" } else { "IPv4" };
        let dual = text(spec, "ipFamilyPolicy") != "SingleStack" && selectorless;
        spec["ipFamilies"] = if dual { json!([family, other]) } else { json!([family]) };
    }
    Ok(())
}

fn addresses(session: &mut Session<'_>, new: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if !needs_address(&new["spec"]) {
        return Ok(());
    }
    let wanted: Vec<String> = new["spec"]["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    // An address that is there stays; validation refuses another one.
    let before = old.map(|old| &old["spec"]).filter(|spec| needs_address(spec)).map(|spec| &spec["clusterIPs"][0]);
    if before.is_some_and(|before| before.is_string() && wanted.first().map(String::as_str) != before.as_str()) {
        return Ok(());
    }
    let spec = &mut new["spec"];
    if wanted.is_empty() {
        let ip = session
            .any_address()
            .map_err(|error| Status::internal(format!("failed to allocate a serviceIP: {error}")))?;
        spec["clusterIP"] = json!(ip.to_string());
        spec["clusterIPs"] = json!([ip.to_string()]);
        return Ok(());
    }
    for ip in &wanted {
        let Ok(parsed) = ip.parse() else { continue };
        if let Err(error) = session.address(parsed) {
            let path = Path::new("spec").child("clusterIPs");
            let text = format!("failed to allocate IP {ip}: {error}");
            return Err(invalid(new, vec![Error::invalid(&path, json!(wanted), text)]));
        }
    }
    new["spec"]["clusterIP"] = json!(wanted[0]);
    Ok(())
}

fn node_ports(session: &mut Session<'_>, new: &mut Value) -> Result<(), Status> {
    let kind = text(&new["spec"], "type").to_owned();
    let wants = needs_node_port(&new["spec"]);
    let path = Path::new("spec").child("ports");
    if kind == "NodePort" || kind == "LoadBalancer" {
        let mut shared: Vec<(i64, u16, Vec<String>)> = Vec::new();
        let mut list = new["spec"]["ports"].as_array().cloned().unwrap_or_default();
        for (i, port) in list.iter_mut().enumerate() {
            let (number, protocol) = (port["port"].as_i64().unwrap_or_default(), text(port, "protocol").to_owned());
            let given = port["nodePort"].as_i64().unwrap_or_default();
            if given != 0 {
                let at = path.index(i).child("nodePort");
                let taken = u16::try_from(given).unwrap_or_default();
                session
                    .port(taken, &protocol)
                    .map_err(|error| invalid(new, vec![Error::invalid(&at, json!(given), error.to_string())]))?;
                shared.push((number, taken, vec![protocol]));
            } else if wants {
                // The same port of another protocol gets the same node port.
                let reuse = shared.iter_mut().find(|(n, _, protocols)| *n == number && !protocols.contains(&protocol));
                let chosen = match reuse {
                    Some((_, chosen, protocols)) if session.port(*chosen, &protocol).is_ok() => {
                        protocols.push(protocol.clone());
                        *chosen
                    }
                    _ => {
                        let chosen = session
                            .any_port(&[&protocol])
                            .map_err(|error| Status::internal(format!("failed to allocate a nodePort: {error}")))?;
                        shared.push((number, chosen, vec![protocol]));
                        chosen
                    }
                };
                port["nodePort"] = json!(chosen);
            }
        }
        if !list.is_empty() {
            new["spec"]["ports"] = json!(list);
        }
    }
    if needs_health_check(&new["spec"]) {
        health_check_port(session, new)?;
    }
    pod_defaults::drop_nulls(&mut new["spec"]);
    Ok(())
}

fn health_check_port(session: &mut Session<'_>, new: &mut Value) -> Result<(), Status> {
    let given = new["spec"]["healthCheckNodePort"].as_i64().unwrap_or_default();
    if given == 0 {
        let chosen = session
            .any_port(&["TCP"])
            .map_err(|error| Status::internal(format!("failed to allocate a HealthCheck NodePort : {error}")))?;
        new["spec"]["healthCheckNodePort"] = json!(chosen);
        return Ok(());
    }
    let port = u16::try_from(given).unwrap_or_default();
    session.port(port, "TCP").map_err(|error| {
        Status::internal(format!("failed to allocate requested HealthCheck NodePort {given}: {error}"))
    })
}

fn external_ip(obj: &Value) -> String {
    let spec = &obj["spec"];
    let external = table::join(&spec["externalIPs"], ",");
    match text(spec, "type") {
        "LoadBalancer" => {
            let mut ingress: Vec<&str> = obj["status"]["loadBalancer"]["ingress"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|i| i["ip"].as_str().filter(|ip| !ip.is_empty()).or(i["hostname"].as_str()))
                .collect();
            ingress.sort_unstable();
            ingress.dedup();
            let mut shown = ingress.join(",");
            if shown.len() > 16 {
                shown.truncate(13);
                shown.push_str("...");
            }
            match (shown.is_empty(), external.is_empty()) {
                (true, true) => "<pending>".to_owned(),
                (true, false) => external,
                (false, true) => shown,
                (false, false) => format!("{shown},{external}"),
            }
        }
        "ExternalName" => text(spec, "externalName").to_owned(),
        _ => table::or_none(external),
    }
}

fn ports(spec: &Value) -> String {
    let port = |p: &Value| {
        let (number, protocol) = (p["port"].as_i64().unwrap_or_default(), text(p, "protocol"));
        match p["nodePort"].as_i64().unwrap_or_default() {
            0 => format!("{number}/{protocol}"),
            node => format!("{number}:{node}/{protocol}"),
        }
    };
    table::or_none(spec["ports"].as_array().into_iter().flatten().map(port).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_new_type_drops() {
        let spec = |kind: &str, port: i64, address: &str| {
            json!({"spec": {"type": kind, "clusterIP": address, "clusterIPs": [address],
            "ipFamilies": ["IPv4"], "ports": [{"port": 80, "nodePort": port}], "allocateLoadBalancerNodePorts": true,
            "internalTrafficPolicy": "Cluster"}, "status": {"loadBalancer": {"ingress": [{"ip": "1.2.3.4"}]}}})
        };
        let old = spec("LoadBalancer", 30001, "10.0.0.1");
        for (new, absent, present) in [
            (
                spec("ClusterIP", 30001, "10.0.0.1"),
                &["/spec/ports/0/nodePort", "/spec/allocateLoadBalancerNodePorts", "/status/loadBalancer/ingress"][..],
                &["/spec/clusterIP"][..],
            ),
            (spec("ClusterIP", 30002, "10.0.0.1"), &[], &["/spec/ports/0/nodePort"]),
            (
                spec("ExternalName", 30001, "10.0.0.1"),
                &["/spec/clusterIP", "/spec/clusterIPs", "/spec/ipFamilies", "/spec/ports/0/nodePort"],
                &["/spec/internalTrafficPolicy"],
            ),
            (spec("ExternalName", 30001, "10.0.0.2"), &["/spec/ipFamilies"], &["/spec/clusterIP"]),
            (spec("LoadBalancer", 30001, "10.0.0.1"), &[], &["/spec/ports/0/nodePort", "/status/loadBalancer/ingress"]),
        ] {
            let mut new = new;
            drop_type_dependent(&mut new, &old);
            assert!(absent.iter().all(|pointer| new.pointer(pointer).is_none()), "{new}");
            assert!(present.iter().all(|pointer| new.pointer(pointer).is_some()), "{new}");
        }
    }
}
