//! Nodes.

use isopod_api::{
    field::{ErrorList, Path},
    names,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, net, resources, scheduling},
};

/// `nodes`.
pub(crate) struct Node;

impl Strategy for Node {
    fn default(&self, obj: &mut Value) {
        // podCIDR is the first of podCIDRs.
        let first = obj.pointer("/spec/podCIDRs/0").cloned();
        if let Some(first) = first
            && obj["spec"]["podCIDR"].as_str().unwrap_or_default().is_empty()
        {
            obj["spec"]["podCIDR"] = first;
        }
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

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let spec = At::field(obj, "spec");
        let mut out = Vec::new();
        if spec.get("configSource").is_set() {
            out.push("spec.configSource: the feature is removed".to_owned());
        }
        if !spec.get("externalID").s().is_empty() {
            out.push("spec.externalID: this field is deprecated, and is unused by Kubernetes".to_owned());
        }
        out.extend(spec.get("podCIDRs").items().iter().filter_map(|at| net::cidr_warning(&at.path, at.s())));
        out
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
    features(e, obj);
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
    features(e, new);
    let mut seen: Vec<&Value> = Vec::new();
    for address in At::field(new, "status").get("addresses").items() {
        if seen.contains(&address.v) {
            e.duplicate(&address, json!({"Type": address.get("type").s(), "Address": address.get("address").s()}));
        }
        seen.push(address.v);
    }
    let frozen = |what: &str| format!("node updates may not change {what} except from \"\" to valid");
    let (cidrs, were) = (spec.get("podCIDRs"), before.get("podCIDRs"));
    let changed = match (cidrs.len(), were.len()) {
        (_, 0) => 0,
        (now, then) if now != then => 1,
        _ => cidrs.strings().iter().zip(were.strings()).filter(|(now, then)| *now != then).count(),
    };
    for _ in 0..changed {
        e.forbidden(&cidrs, &frozen("podCIDR"));
    }
    if !before.get("providerID").s().is_empty() && spec.get("providerID").s() != before.get("providerID").s() {
        e.forbidden(&spec.get("providerID"), &frozen("providerID"));
    }
    for (source, of_spec) in [
        (spec.get("configSource"), true),
        (At::field(new, "status").get("config.assigned"), false),
        (At::field(new, "status").get("config.active"), false),
        (At::field(new, "status").get("config.lastKnownGood"), false),
    ] {
        config_source(e, &source, of_spec);
    }
    taints(e, &spec);
    if spec.get("externalID").s() != before.get("externalID").s() {
        e.forbidden(&spec.get("externalID"), "may not be updated");
    }
}

/// Where kubelets once had their configuration from.
fn config_source(e: &mut Errs, source: &At<'_>, of_spec: bool) {
    if !source.is_set() {
        return;
    }
    let at = source.get("configMap");
    if !at.is_set() {
        return e.invalid_as(source, json!({"ConfigMap": null}), "exactly one reference subfield must be non-nil");
    }
    for field in ["uid", "resourceVersion"].map(|field| at.get(field)) {
        match (field.s().is_empty(), of_spec) {
            (true, false) => e.required(&field, ""),
            (false, true) => {
                let name = field.path.to_string();
                let name = name.rsplit('.').next().unwrap_or_default();
                e.forbidden(&field, &format!("{name} must not be set in spec"));
            }
            _ => {}
        }
    }
    let mut check = |field: &str, check: fn(&str) -> Vec<String>| {
        let field = at.get(field);
        if field.s().is_empty() {
            e.required(&field, "");
        } else {
            e.messages(&field, check(field.s()));
        }
    };
    check("namespace", names::dns1123_label);
    check("name", names::dns1123_subdomain);
    check("kubeletConfigKey", names::config_map_key);
}

/// What the kubelet says it can do: names in order.
fn features(e: &mut Errs, obj: &Value) {
    let list = At::field(obj, "status").get("declaredFeatures").items();
    for (i, at) in list.iter().enumerate() {
        let name = at.s();
        if name.len() > 253 {
            e.invalid(at, &format!("invalid feature name {name:?}: must be no more than 253 characters"));
        } else if !is_feature(name) {
            e.invalid(at, &format!("invalid feature name {name:?}: must start with an UpperCamelCase segment, with subsequent segments separated by '/' (e.g., MyFeature or MyFeature/mySubFeature), and contain only alphanumeric characters and slashes"));
        }
        match list.get(i + 1) {
            Some(next) if next.s() == name => e.duplicate(next, name),
            Some(next) if next.s() < name => e.invalid(next, "list must be sorted alphabetically"),
            _ => {}
        }
    }
}

/// `MyFeature`, or `MyFeature/aPartOfIt`.
fn is_feature(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.split('/').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}
