//! What is wrong with device claims, device classes and the status of a claim.

use std::collections::HashSet;

use isopod_api::{field::Path, gvk::Gvr, names};
use serde_json::Value;

use crate::{
    cel::{Environment, Type},
    registry::strategy::Context,
    validation::{
        At, Errs, IMMUTABLE, internal, meta, same, scheduling, volume_source::csi_driver_name as driver_name,
    },
};

const LIST: usize = 32;
const TEXT: usize = 10 * 1024;
const REFERENCE: &str =
    "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";

/// The label of namespaces whose claims may have access to devices that are in use.
const ADMIN_LABEL: &str = "resource.kubernetes.io/admin-access";

/// Whoever asks for admin access (`asked`: where) must be in a namespace that grants it.
pub(super) fn admin_access(e: &mut Errs, cx: &Context<'_>, asked: Option<&At<'_>>) {
    let Some(at) = asked else { return };
    let Some(namespace) = cx.objects.get(&Gvr::new("", "v1", "namespaces"), "", cx.namespace) else {
        let why =
            format!("could not retrieve namespace to verify admin access: namespaces {:?} not found", cx.namespace);
        return e.0.push(isopod_api::field::Error::internal(&at.path, why));
    };
    if namespace.value()["metadata"]["labels"][ADMIN_LABEL] != "true" {
        let label = format!("`{ADMIN_LABEL}: true`");
        e.forbidden(at, &format!("admin access to devices requires the {label} label on the containing namespace"));
    }
}

/// Where the requests of a claim ask for admin access first.
pub(super) fn asks_admin_access<'a>(devices: &At<'a>) -> Option<At<'a>> {
    // Upstream leaves `exactly` out, and reports claims and their templates alike.
    let requests = At::new(Path::new("spec").child("devices").child("requests"), devices.get("requests").v);
    let first = requests.items().into_iter().find(|at| at.get("exactly.adminAccess").is_true());
    first.map(|at| at.get("adminAccess"))
}

/// Where the results of an allocation have admin access first.
pub(super) fn has_admin_access<'a>(status: &At<'a>) -> Option<At<'a>> {
    let results = status.get("allocation.devices.results").items();
    results.into_iter().map(|at| at.get("adminAccess")).find(At::is_true)
}

/// Each item of a list that is not too long.
pub(super) fn each<'a>(e: &mut Errs, list: &At<'a>, max: usize, mut item: impl FnMut(&mut Errs, &At<'a>)) {
    if list.len() > max {
        return e.too_many(list, list.len(), max);
    }
    for at in list.items() {
        item(e, &at);
    }
}

/// Like [`each`], and no two items may have the same key.
pub(super) fn set<'a>(
    e: &mut Errs,
    list: &At<'a>,
    max: usize,
    key: impl Fn(&At<'a>) -> String,
    item: impl FnMut(&mut Errs, &At<'a>),
) {
    each(e, list, max, item);
    if list.len() > max {
        return;
    }
    let mut seen = HashSet::new();
    for at in list.items() {
        let own = key(&at);
        if !seen.insert(own.clone()) {
            e.duplicate(&at, own);
        }
    }
}

/// The key of a list of strings.
pub(super) fn itself(at: &At<'_>) -> String {
    at.s().to_owned()
}

/// The key of a list of named things.
pub(super) fn name(at: &At<'_>) -> String {
    at.get("name").s().to_owned()
}

/// `spec.devices` of a claim.
pub(super) fn claim(e: &mut Errs, devices: &At<'_>) {
    let requests = devices.get("requests");
    let known = Requests::of(devices);
    set(e, &requests, LIST, name, request);
    each(e, &devices.get("constraints"), LIST, |e, at| {
        known.references(e, &at.get("requests"));
        let (one, other) = (at.get("matchAttribute"), at.get("distinctAttribute"));
        if one.is_set() {
            fully_qualified(e, &one);
        } else if other.is_set() {
            fully_qualified(e, &other);
        } else {
            e.required(
                at,
                "exactly one of \"matchAttribute\" or \"distinctAttribute\" is required, but multiple fields are set",
            );
        }
    });
    each(e, &devices.get("config"), LIST, |e, at| {
        known.references(e, &at.get("requests"));
        configuration(e, at);
    });
}

/// The requests of a claim, each with its alternatives.
pub(super) struct Requests<'a>(Vec<(&'a str, Vec<&'a str>)>);

impl<'a> Requests<'a> {
    pub(super) fn of(devices: &At<'a>) -> Self {
        let alternatives =
            |at: &At<'a>| at.get("firstAvailable").items().iter().map(|own| own.get("name").s()).collect();
        Self(devices.get("requests").items().iter().map(|at| (at.get("name").s(), alternatives(at))).collect())
    }

    fn references(&self, e: &mut Errs, list: &At<'_>) {
        set(e, list, LIST, itself, |e, at| self.reference(e, at));
    }

    fn reference(&self, e: &mut Errs, at: &At<'_>) {
        let parts: Vec<&str> = at.s().split('/').collect();
        if parts.len() > 2 {
            return e.invalid_str(at, REFERENCE);
        }
        for part in &parts {
            for message in names::dns1123_label(part) {
                e.invalid_as(at, *part, &message);
            }
        }
        let found =
            self.0.iter().any(|(name, own)| *name == parts[0] && parts.get(1).is_none_or(|sub| own.contains(sub)));
        if !found {
            e.invalid_str(at, REFERENCE);
        }
    }
}

fn request(e: &mut Errs, at: &At<'_>) {
    let (exactly, first) = (at.get("exactly"), at.get("firstAvailable"));
    e.dns_label(&at.get("name"));
    match (exactly.is_set(), first.len() > 0) {
        (false, false) => e.required(at, "exactly one of `exactly` or `firstAvailable` is required"),
        (true, true) => e.invalid_as(
            at,
            Value::Null,
            "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set",
        ),
        (true, false) => wanted(e, &exactly),
        (false, true) => set(e, &first, 8, name, |e, own| {
            e.dns_label(&own.get("name"));
            wanted(e, own);
        }),
    }
}

fn wanted(e: &mut Errs, at: &At<'_>) {
    let (class, mode, count) = (at.get("deviceClassName"), at.get("allocationMode"), at.get("count"));
    if class.s().is_empty() {
        e.required(&class, "");
    } else {
        e.dns_subdomain(&class);
    }
    selectors(e, &at.get("selectors"));
    match mode.s() {
        "All" if count.int0() != 0 => e.invalid(&count, "must not be specified when allocationMode is 'All'"),
        "ExactCount" if count.int0() <= 0 => e.invalid_as(&count, count.int0(), "must be greater than zero"),
        "All" | "ExactCount" => {}
        _ => e.unsupported(&mode, &["All", "ExactCount"]),
    }
    for own in at.get("tolerations").items() {
        toleration(e, &own);
    }
}

fn selectors(e: &mut Errs, list: &At<'_>) {
    each(e, list, LIST, |e, at| {
        let cel = at.get("cel");
        if !cel.is_set() {
            return e.required(&cel, "");
        }
        let text = cel.get("expression");
        if text.s().len() > TEXT {
            return e.too_long(&text, TEXT);
        }
        match environment().compile(text.s(), &[]) {
            Err(error) => e.invalid_str(&text, &error),
            Ok(program) if matches!(program.output, Type::Bool | Type::Dyn) => {}
            Ok(program) => {
                e.invalid_str(&text, &format!("must evaluate to bool or the unknown type, not {}", program.output));
            }
        }
    });
}

/// What a selector can name.
fn environment() -> Environment {
    let quantity = Type::named("kubernetes.Quantity");
    let device = Type::object(
        "kubernetes.DRADevice",
        [
            ("driver", Type::String),
            ("attributes", Type::map(Type::map(Type::Dyn))),
            ("capacity", Type::map(Type::map(quantity))),
            ("allowMultipleAllocations", Type::Bool),
        ],
    );
    Environment::default().with("device", device)
}

fn configuration(e: &mut Errs, at: &At<'_>) {
    let opaque = at.get("opaque");
    if !opaque.is_set() {
        return e.required(&opaque, "");
    }
    driver_name(e, &opaque.get("driver"));
    raw(e, &opaque.get("parameters"));
}

/// Any JSON object of a bounded size.
pub(super) fn raw(e: &mut Errs, at: &At<'_>) {
    if at.v.is_null() {
        e.required(at, "");
    } else if at.v.to_string().len() > TEXT {
        e.too_long(at, TEXT);
    } else if !at.v.is_object() {
        e.invalid_as(at, "<value omitted>", "must be a valid JSON object");
    }
}

/// `spec` of a class; what is as before was judged before.
pub(super) fn class(e: &mut Errs, spec: &At<'_>, old: &Value) {
    let before = |field: &str| !old[field].is_null() && same(spec.get(field).v, &old[field]);
    if !before("selectors") {
        selectors(e, &spec.get("selectors"));
    }
    if !before("config") {
        each(e, &spec.get("config"), LIST, configuration);
    }
    let extended = spec.get("extendedResourceName");
    if extended.is_set() && !is_extended(extended.s()) {
        e.invalid(&extended, "must be a valid extended resource name");
    }
}

fn is_extended(name: &str) -> bool {
    let own = name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.");
    own && names::qualified_name(&format!("requests.{name}")).is_empty()
}

/// `domain/identifier`, or an identifier alone.
pub(super) fn qualified(e: &mut Errs, at: &At<'_>, name: &str) {
    let identifier = |e: &mut Errs, id: &str| {
        if id.len() > 32 {
            e.too_long(at, 32);
        }
        for message in names::c_identifier(id) {
            e.invalid_as(at, id, &message);
        }
    };
    match name.split('/').collect::<Vec<_>>().as_slice() {
        [id] => identifier(e, id),
        [domain, id] => {
            if domain.is_empty() {
                e.invalid_as(at, "", "the domain must not be empty");
            } else {
                let text = Value::from(*domain);
                driver_name(e, &At::new(at.path.clone(), &text));
            }
            if id.is_empty() {
                e.invalid_as(at, "", "the name must not be empty");
            } else {
                identifier(e, id);
            }
        }
        _ => {}
    }
}

fn fully_qualified(e: &mut Errs, at: &At<'_>) {
    qualified(e, at, at.s());
    if !at.s().contains('/') {
        e.invalid_str(at, "a fully qualified name must be a domain and a name separated by a slash");
    }
}

/// The name of a pool.
pub(super) fn pool_name(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.required(at, "");
    }
    if at.s().len() > 253 {
        e.too_long(at, 253);
    }
    for part in at.s().split('/') {
        for message in names::dns1123_subdomain(part) {
            e.invalid_as(at, part, &message);
        }
    }
}

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "None"];

/// A taint of a device.
pub(super) fn taint(e: &mut Errs, at: &At<'_>) {
    meta::label_key(e, &at.get("key"), at.get("key").s());
    e.messages(&at.get("value"), names::label_value(at.get("value").s()));
    e.required_one_of(&at.get("effect"), &EFFECTS);
}

fn toleration(e: &mut Errs, at: &At<'_>) {
    let (key, operator, value, effect) = (at.get("key"), at.get("operator"), at.get("value"), at.get("effect"));
    if !key.s().is_empty() {
        meta::label_key(e, &key, key.s());
    }
    match operator.s() {
        "Exists" if !value.s().is_empty() => e.invalid(&value, "must be empty for operator `Exists`"),
        "Exists" => {}
        "Equal" => e.messages(&value, names::label_value(value.s())),
        _ => e.required_one_of(&operator, &["Equal", "Exists"]),
    }
    if !effect.s().is_empty() {
        e.one_of(&effect, &EFFECTS);
    }
}

/// `status` of a claim after a change.
pub(super) fn status(e: &mut Errs, new: &Value, old: &Value) {
    let status = At::field(new, "status");
    let (reserved, allocation) = (status.get("reservedFor"), status.get("allocation"));
    set(
        e,
        &reserved,
        256,
        |at| at.get("uid").s().to_owned(),
        |e, at| {
            for field in ["resource", "name", "uid"] {
                if at.get(field).s().is_empty() {
                    e.required(&at.get(field), "");
                }
            }
        },
    );
    let allocated: Vec<String> = allocation.get("devices").get("results").items().iter().map(device_id).collect();
    set(e, &status.get("devices"), usize::MAX, device_id, |e, at| device_status(e, at, &allocated));
    if reserved.len() > 0 {
        let before = old["status"]["reservedFor"].as_array().map(Vec::as_slice).unwrap_or_default();
        if !allocation.is_set() {
            e.forbidden(&reserved, "may not be specified when `allocated` is not set");
        } else if !new["metadata"]["deletionTimestamp"].is_null()
            && reserved.items().iter().any(|at| !before.contains(at.v))
        {
            e.forbidden(
                &reserved,
                "new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set",
            );
        }
    }
    let before = &old["status"]["allocation"];
    if !allocation.is_set() {
        return;
    }
    if before.is_null() {
        allocation_result(e, &allocation, &Requests::of(&At::field(new, "spec").get("devices")));
    } else if !same(allocation.v, before) {
        e.invalid_as(&allocation, internal::named("DeviceAllocation", allocation.v), IMMUTABLE);
    }
}

fn allocation_result(e: &mut Errs, at: &At<'_>, known: &Requests<'_>) {
    let devices = at.get("devices");
    each(e, &devices.get("results"), LIST, |e, at| {
        known.reference(e, &at.get("request"));
        device(e, at);
        binding(e, at);
        for own in at.get("tolerations").items() {
            toleration(e, &own);
        }
    });
    each(e, &devices.get("config"), 2 * LIST, |e, at| {
        e.required_one_of(&at.get("source"), &["FromClaim", "FromClass"]);
        known.references(e, &at.get("requests"));
        configuration(e, at);
    });
    if at.get("nodeSelector").is_set() {
        scheduling::node_selector(e, &at.get("nodeSelector"));
    }
}

fn device(e: &mut Errs, at: &At<'_>) {
    driver_name(e, &at.get("driver"));
    pool_name(e, &at.get("pool"));
    e.dns_label(&at.get("device"));
}

fn device_id(at: &At<'_>) -> String {
    let parts = [at.get("driver").s(), at.get("pool").s(), at.get("device").s(), at.get("shareID").s()];
    let shown = if parts[3].is_empty() { &parts[..3] } else { &parts[..] };
    shown.join("/")
}

fn device_status(e: &mut Errs, at: &At<'_>, allocated: &[String]) {
    device(e, at);
    let id = device_id(at);
    if !allocated.contains(&id) {
        e.invalid_as(at, id, "must be an allocated device in the claim");
    }
    let (conditions, network) = (at.get("conditions"), at.get("networkData"));
    if conditions.len() > 8 {
        e.too_many(&conditions, conditions.len(), 8);
    }
    crate::validation::conditions::conditions(e, &conditions);
    if at.get("data").is_set() {
        raw(e, &at.get("data"));
    }
    for (field, max) in [("interfaceName", 256), ("hardwareAddress", 128)] {
        if network.get(field).s().len() > max {
            e.too_long(&network.get(field), max);
        }
    }
    set(e, &network.get("ips"), 16, itself, |_, _| {});
}

/// What must hold before a Pod is bound: both lists or neither, and nothing in both.
pub(super) fn binding(e: &mut Errs, at: &At<'_>) {
    let (wanted, failed) = (at.get("bindingConditions"), at.get("bindingFailureConditions"));
    for list in [&wanted, &failed] {
        each(e, list, 4, |e, own| meta::label_key(e, own, own.s()));
    }
    let mut seen = HashSet::new();
    for own in wanted.items() {
        if !seen.insert(own.s()) {
            e.duplicate(&own, own.s());
        }
    }
    let mut again = HashSet::new();
    for own in failed.items() {
        if !again.insert(own.s()) {
            e.duplicate(&own, own.s());
        }
        if seen.contains(own.s()) {
            e.invalid(&own, "bindingFailureConditions must not overlap with bindingConditions");
        }
    }
    if wanted.len() == 0 && failed.len() > 0 {
        e.invalid(&wanted, "bindingConditions are required to use bindingFailureConditions");
    }
    if failed.len() == 0 && wanted.len() > 0 {
        e.invalid(&failed, "bindingFailureConditions are required to use bindingConditions");
    }
}
