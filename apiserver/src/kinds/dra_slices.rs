//! What is wrong with ResourceSlices.

use std::sync::LazyLock;

use isopod_api::names;
use regex::Regex;
use serde_json::Value;

use super::dra_claims::{binding, each, name, pool_name, qualified, set, taint};
use crate::validation::{At, Errs, internal, same, scheduling, volume_source::csi_driver_name as driver_name};

#[expect(clippy::expect_used, reason = "a constant")]
static VERSION: LazyLock<Regex> = LazyLock::new(|| {
    let pre = r"(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)";
    let text =
        format!(r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-{pre}(\.{pre})*)?(\+[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?$");
    Regex::new(&text).expect("a pattern")
});
/// Characters of a value.
const TEXT: usize = 64;
/// Attributes and capacities together.
const PROPERTIES: usize = 32;

/// `spec`, new or after a change.
pub(super) fn spec(e: &mut Errs, spec: &At<'_>, old: &Value) {
    let pool = spec.get("pool");
    driver_name(e, &spec.get("driver"));
    pool_name(e, &pool.get("name"));
    let (count, generation) = (pool.get("resourceSliceCount"), pool.get("generation"));
    if count.int0() <= 0 {
        e.invalid_as(&count, count.int0(), "must be greater than zero");
    }
    if generation.int0() < 0 {
        e.invalid(&generation, "must be greater than or equal to zero");
    }
    if !old.is_null() {
        e.immutable(&pool.get("name"), &old["pool"]["name"]);
        e.immutable(&spec.get("driver"), &old["driver"]);
        e.immutable(&spec.get("nodeName"), &old["nodeName"]);
    }
    placement(e, spec);
    let (devices, counters) = (spec.get("devices"), spec.get("sharedCounters"));
    if devices.is_set() && counters.is_set() {
        e.invalid_as(spec, "", "only one of `sharedCounters` or `devices` is allowed");
    }
    let advanced = devices.items().iter().any(|at| at.get("taints").len() + at.get("consumesCounters").len() > 0);
    let each_own = spec.get("perDeviceNodeSelection").is_true();
    set(e, &devices, if advanced { 64 } else { 128 }, name, |e, at| {
        let before = old["devices"].as_array().into_iter().flatten().find(|own| own["name"] == *at.get("name").v);
        device(e, at, before.unwrap_or(&Value::Null), each_own);
    });
    set(e, &counters, 8, name, |e, at| {
        label(e, &at.get("name"));
        counter_names(e, &at.get("counters"));
    });
}

fn label(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        e.required(at, "");
    } else {
        e.dns_label(at);
    }
}

fn counter_names(e: &mut Errs, at: &At<'_>) {
    if at.len() == 0 {
        return e.required(at, "");
    }
    if at.len() > 32 {
        return e.too_many(at, at.len(), 32);
    }
    for (key, _) in at.entries() {
        for message in names::dns1123_label(key) {
            e.invalid_as(at, key, &message);
        }
    }
}

/// Where devices are: the fields that are set, as upstream writes them; what is wrong inside them is said.
fn places(e: &mut Errs, at: &At<'_>, empty: &str) -> Vec<String> {
    let (node, selector, all) = (at.get("nodeName"), at.get("nodeSelector"), at.get("allNodes"));
    let mut set = Vec::new();
    if node.is_set() {
        if node.s().is_empty() {
            e.invalid(&node, empty);
        } else {
            set.push("`nodeName`".to_owned());
            e.dns_subdomain(&node);
        }
    }
    if selector.is_set() {
        set.push("`nodeSelector`".to_owned());
        scheduling::node_selector(e, &selector);
    }
    flag(e, &all, &mut set);
    set
}

fn flag(e: &mut Errs, at: &At<'_>, set: &mut Vec<String>) {
    if at.is_true() {
        set.push(format!("`{}`", at.path.to_string().rsplit('.').next().unwrap_or_default()));
    } else if at.is_set() {
        e.invalid(at, "must be either unset or set to true");
    }
}

fn placement(e: &mut Errs, spec: &At<'_>) {
    const ONE: &str = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
    let mut set = places(e, spec, "must be either unset or set to a non-empty string");
    let terms = spec.get("nodeSelector").get("nodeSelectorTerms");
    if spec.get("nodeSelector").is_set() && terms.len() != 1 {
        e.invalid(&terms, "must have exactly one node selector term");
    }
    flag(e, &spec.get("perDeviceNodeSelection"), &mut set);
    match set.len() {
        0 => e.required(spec, ONE),
        1 => {}
        _ => {
            e.invalid_as(spec, format!("{{{}}}", set.join(", ")), &format!("{ONE}, but multiple fields are set"));
        }
    }
}

fn device(e: &mut Errs, at: &At<'_>, old: &Value, each_own: bool) {
    let (attributes, capacity, taints) = (at.get("attributes"), at.get("capacity"), at.get("taints"));
    e.dns_label(&at.get("name"));
    let properties = attributes.len() + capacity.len();
    if properties > PROPERTIES {
        e.invalid_as(
            at,
            properties,
            &format!("the total number of attributes and capacities must not exceed {PROPERTIES}"),
        );
    }
    for (key, own) in attributes.entries() {
        qualified(e, &attributes, key);
        attribute(e, &own);
    }
    let shared = at.get("allowMultipleAllocations").is_true();
    if old.is_null() || !same(capacity.v, &old["capacity"]) {
        for (key, own) in capacity.entries() {
            qualified(e, &capacity, key);
            if !shared && own.get("requestPolicy").is_set() {
                e.forbidden(&own.get("requestPolicy"), "allowMultipleAllocations must be true");
            }
        }
    }
    if old.is_null() || !same(taints.v, &old["taints"]) {
        each(e, &taints, 16, taint);
    }
    set(
        e,
        &at.get("consumesCounters"),
        2,
        |own| own.get("counterSet").s().to_owned(),
        |e, own| {
            label(e, &own.get("counterSet"));
            counter_names(e, &own.get("counters"));
        },
    );
    own_placement(e, at, each_own);
    binding(e, at);
}

fn own_placement(e: &mut Errs, at: &At<'_>, each_own: bool) {
    const ONE: &str = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
    if !each_own {
        if ["nodeName", "nodeSelector", "allNodes"].iter().any(|field| at.get(field).is_set()) {
            e.invalid_as(at, Value::Null, "`nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec");
        }
        return;
    }
    let set = places(e, at, "must not be empty");
    match set.len() {
        0 => e.required(at, ONE),
        1 => {}
        _ => e.invalid_as(at, format!("{{{}}}", set.join(", ")), ONE),
    }
}

fn attribute(e: &mut Errs, at: &At<'_>) {
    let (text, version) = (at.get("string"), at.get("version"));
    if text.s().len() > TEXT {
        e.too_long(&text, TEXT);
    }
    if version.is_set() && !VERSION.is_match(version.s()) {
        e.invalid(&version, "must be a string compatible with semver.org spec 2.0.0");
    }
    if version.s().len() > TEXT {
        e.too_long(&version, TEXT);
    }
    match ["bool", "int", "string", "version"].iter().filter(|field| at.get(field).is_set()).count() {
        0 => e.invalid_as(at, "", "exactly one value must be specified"),
        1 => {}
        _ => e.invalid_as(at, internal::named("DeviceAttribute", at.v), "exactly one value must be specified"),
    }
}
