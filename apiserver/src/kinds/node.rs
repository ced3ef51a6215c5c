//! Nodes.

use isopod_api::field::{ErrorList, Path};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, net, resources, same, scheduling},
};

/// `nodes`.
pub(crate) struct Node;

impl Strategy for Node {
    fn default(&self, obj: &mut Value) {
        if !obj["spec"].is_object() {
            obj["spec"] = json!({});
        }
        let spec = &mut obj["spec"];
        // podCIDR is the first of podCIDRs.
        let single = spec["podCIDR"].as_str().unwrap_or_default().to_owned();
        let list = spec["podCIDRs"].as_array().map(Vec::len).unwrap_or_default();
        if !single.is_empty() && list == 0 {
            spec["podCIDRs"] = json!([single]);
        } else if single.is_empty() && list > 0 {
            spec["podCIDR"] = spec["podCIDRs"][0].clone();
        }
        let status = &mut obj["status"];
        if !status.is_object() {
            *status = json!({});
        }
        if status["allocatable"].is_null() && !status["capacity"].is_null() {
            status["allocatable"] = status["capacity"].clone();
        }
        if status["daemonEndpoints"]["kubeletEndpoint"]["Port"].is_null() {
            status["daemonEndpoints"]["kubeletEndpoint"]["Port"] = json!(0);
        }
        for field in [
            "machineID",
            "systemUUID",
            "bootID",
            "kernelVersion",
            "osImage",
            "containerRuntimeVersion",
            "kubeletVersion",
            "kubeProxyVersion",
            "operatingSystem",
            "architecture",
        ] {
            if status["nodeInfo"][field].is_null() {
                status["nodeInfo"][field] = json!("");
            }
        }
        super::clean(obj, &["/spec", "/status", ""]);
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        node(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource.is_empty() {
            // Upstream validates the whole new node first.
            node(&mut e, new);
        }
        update(&mut e, new, old);
        e.0
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("spec.unschedulable", (obj["spec"]["unschedulable"] == true).to_string())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["spec.unschedulable"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let info = &obj["status"]["nodeInfo"];
        let address = |kind: &str| {
            let list = obj["status"]["addresses"].as_array().into_iter().flatten();
            let found = list.filter(|a| a["type"] == kind).find_map(|a| a["address"].as_str());
            json!(found.unwrap_or("<none>"))
        };
        vec![
            table::name(obj),
            json!(status_text(obj)),
            json!(roles(obj)),
            table::age(obj, now),
            table::or(&info["kubeletVersion"], ""),
            address("InternalIP"),
            address("ExternalIP"),
            table::or(&info["osImage"], "<unknown>"),
            table::or(&info["kernelVersion"], "<unknown>"),
            table::or(&info["containerRuntimeVersion"], "<unknown>"),
        ]
    }
}

fn status_text(obj: &Value) -> String {
    let ready = obj["status"]["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == "Ready");
    let mut text = match ready {
        Some(c) if c["status"] == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if obj["spec"]["unschedulable"] == true {
        text.push_str(",SchedulingDisabled");
    }
    text
}

fn roles(obj: &Value) -> String {
    let labels = obj["metadata"]["labels"].as_object();
    let mut roles: Vec<&str> = labels
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| match k.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => Some(role),
            None if k == "kubernetes.io/role" => v.as_str().filter(|v| !v.is_empty()),
            _ => None,
        })
        .collect();
    roles.sort_unstable();
    roles.dedup();
    table::or_none(roles.join(","))
}

fn node(e: &mut Errs, obj: &Value) {
    let spec = At::field(obj, "spec");
    taints(e, &spec);
    quantities(e, obj);
    let cidrs = spec.get("podCIDRs");
    let mut valid = true;
    for cidr in cidrs.items() {
        valid &= net::cidr(e, &cidr);
    }
    if valid && cidrs.len() > 1 {
        let families: Vec<&str> = cidrs.strings().iter().map(|c| net::family(c)).collect();
        if cidrs.len() > 2 || families[0] == families[1] {
            e.invalid(&cidrs, "may specify no more than one CIDR for each IP family");
        }
        let mut seen = Vec::new();
        for cidr in cidrs.items() {
            if seen.contains(&cidr.s()) {
                e.duplicate(&cidr, cidr.s());
            }
            seen.push(cidr.s());
        }
    }
}

/// Upstream reports taints under metadata.
fn taints(e: &mut Errs, spec: &At<'_>) {
    scheduling::taints(e, &At::new(Path::new("metadata").child("taints"), spec.get("taints").v));
}

fn quantities(e: &mut Errs, obj: &Value) {
    for list in ["capacity", "allocatable"] {
        let at = At::field(obj, "status").get(list);
        for (name, value) in at.entries() {
            let shown = At::new(at.path.child(name), value.v);
            resources::quantity_value(e, &shown, name);
        }
    }
}

fn update(e: &mut Errs, new: &Value, old: &Value) {
    let (spec, before) = (At::field(new, "spec"), At::field(old, "spec"));
    quantities(e, new);
    let mut seen: Vec<&Value> = Vec::new();
    for address in At::field(new, "status").get("addresses").items() {
        if seen.contains(&address.v) {
            e.duplicate(&address, json!({"Type": address.get("type").s(), "Address": address.get("address").s()}));
        }
        seen.push(address.v);
    }
    let frozen = |what: &str| format!("node updates may not change {what} except from \"\" to valid");
    if !before.get("podCIDRs").strings().is_empty() && !same(spec.get("podCIDRs").v, before.get("podCIDRs").v) {
        e.forbidden(&spec.get("podCIDRs"), &frozen("podCIDR"));
    }
    if !before.get("providerID").s().is_empty() && spec.get("providerID").s() != before.get("providerID").s() {
        e.forbidden(&spec.get("providerID"), &frozen("providerID"));
    }
    taints(e, &spec);
}
