//! Resource names, quantities and requirements.

use std::{cmp::Ordering, collections::BTreeMap};

use isopod_api::{names, quantity::Quantity};
use serde_json::Value;

use super::{At, Errs, NON_NEGATIVE};

const STANDARD: &[&str] = &[
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "storage",
    "requests.storage",
    "services.nodeports",
    "services.loadbalancers",
];

const INTEGERS: &[&str] = &[
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "services.nodeports",
    "services.loadbalancers",
];

/// The quantity of a value, if it is one.
pub(crate) fn quantity(v: &Value) -> Option<Quantity> {
    if v.is_null() { None } else { Quantity::from_json(v).ok() }
}

pub(crate) fn is_huge_page(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// Resources of the system: without a domain, or of kubernetes.io.
pub(crate) fn is_native(name: &str) -> bool {
    !name.contains('/') || name.contains("kubernetes.io/")
}

/// `example.com/gpu`.
pub(crate) fn is_extended(name: &str) -> bool {
    !is_native(name) && !name.starts_with("requests.") && names::qualified_name(&format!("requests.{name}")).is_empty()
}

/// Whether requests may be lower than limits.
pub(crate) fn overcommit_allowed(name: &str) -> bool {
    is_native(name) && !is_huge_page(name)
}

/// A resource name anywhere: qualified, standard when it has no domain.
pub(crate) fn resource_name(e: &mut Errs, at: &At<'_>, name: &str) {
    let messages = names::qualified_name(name);
    let broken = !messages.is_empty();
    for message in messages {
        e.invalid_as(at, name, &message);
    }
    if !broken
        && !name.contains('/')
        && !STANDARD.contains(&name)
        && !is_huge_page(name)
        && !name.starts_with("requests.hugepages-")
    {
        e.invalid_as(at, name, "must be a standard resource type or fully qualified");
    }
}

/// A resource name in a quota.
pub(crate) fn quota_resource_name(e: &mut Errs, at: &At<'_>, name: &str) {
    resource_name(e, at, name);
    if !name.contains('/') && !is_quota_resource(name) {
        e.invalid_as(at, name, "must be a standard resource for quota");
    }
}

/// What every cluster can limit.
pub(crate) fn is_quota_resource(name: &str) -> bool {
    name != "storage" && STANDARD.contains(&name) || is_huge_page(name) || name.starts_with("requests.hugepages-")
}

/// A resource name of a container.
pub(crate) fn container_resource_name(e: &mut Errs, at: &At<'_>, name: &str) {
    resource_name(e, at, name);
    if !name.contains('/') {
        if !["cpu", "memory", "ephemeral-storage"].contains(&name) && !is_huge_page(name) {
            e.invalid_as(at, name, "must be a standard resource for containers");
        }
    } else if !is_native(name) && !is_extended(name) {
        e.invalid_as(at, name, "doesn't follow extended resource name standard");
    }
}

/// A non-negative quantity, an integer where the resource is counted.
pub(crate) fn quantity_value(e: &mut Errs, at: &At<'_>, name: &str) {
    let Some(value) = quantity(at.v) else { return };
    non_negative_quantity(e, at);
    if (INTEGERS.contains(&name) || is_extended(name)) && value.milli_value() % 1000 != 0 {
        e.invalid_as(at, value.to_string(), "must be an integer");
    }
}

/// A quantity that is not negative when rounded up to a whole number, which is what is shown.
pub(crate) fn basic(e: &mut Errs, at: &At<'_>) {
    if let Some(value) = quantity(at.v).filter(|value| value.value() < 0) {
        e.invalid_as(at, value.value(), "must be a valid resource quantity");
    }
}

/// A quantity of at least zero.
pub(crate) fn non_negative_quantity(e: &mut Errs, at: &At<'_>) {
    if let Some(value) = quantity(at.v)
        && value.milli_value() < 0
    {
        e.invalid_as(at, value.to_string(), NON_NEGATIVE);
    }
}

/// `resources` of a container.
pub(crate) fn requirements(e: &mut Errs, at: &At<'_>, claims: &[&str]) {
    pair(e, at, container_resource_name);
    claim_names(e, &at.get("claims"), claims);
}

/// `claims` of a container; `known` are those of its pod.
fn claim_names(e: &mut Errs, list: &At<'_>, known: &[&str]) {
    let mut seen: Vec<String> = Vec::new();
    for claim in list.items() {
        let (name, request) = (claim.get("name").s(), claim.get("request"));
        if name.is_empty() {
            e.required(&claim, "");
            continue;
        }
        if seen.iter().any(|own| own == name) {
            e.duplicate(&claim, name);
        } else if request.s().is_empty() {
            for _ in seen.iter().filter(|own| own.split_once('/').is_some_and(|(claim, _)| claim == name)) {
                e.duplicate(&claim, name);
            }
            seen.push(name.to_owned());
        } else {
            e.dns_label(&request);
            let shown = format!("{name}/{}", request.s());
            if seen.contains(&shown) {
                e.duplicate(&claim, shown.clone());
            }
            seen.push(shown);
        }
        if !known.contains(&name) {
            let mut sorted = known.to_vec();
            sorted.sort_unstable();
            let mut error = isopod_api::field::Error::not_found(&claim.path, name);
            error.detail = match sorted[..] {
                [] => "must be one of the names in pod.spec.resourceClaims which is empty".to_owned(),
                _ => format!("must be one of the names in pod.spec.resourceClaims: {}", sorted.join(", ")),
            };
            e.0.push(error);
        }
    }
}

/// What a pod needs beside its containers; upstream reports it as if it were limits.
pub(crate) fn overhead(e: &mut Errs, at: &At<'_>, amounts: &Value) {
    for (name, value) in At::new(at.path.child("limits"), amounts).entries() {
        container_resource_name(e, &value, name);
        quantity_value(e, &value, name);
        huge_page(e, &value, name);
    }
}

fn pair(e: &mut Errs, at: &At<'_>, name_check: fn(&mut Errs, &At<'_>, &str)) {
    let (limits, requests) = (at.get("limits"), at.get("requests"));
    let mut huge = false;
    let mut cpu_or_memory = false;
    for (name, value) in limits.entries() {
        name_check(e, &value, name);
        quantity_value(e, &value, name);
        huge_page(e, &value, name);
        huge |= is_huge_page(name);
        cpu_or_memory |= name == "cpu" || name == "memory";
    }
    for (name, value) in requests.entries() {
        name_check(e, &value, name);
        quantity_value(e, &value, name);
        against_limit(e, &requests, &limits, name);
        huge_page(e, &value, name);
        huge |= is_huge_page(name);
        cpu_or_memory |= name == "cpu" || name == "memory";
    }
    if huge && !cpu_or_memory {
        e.forbidden(at, "HugePages require cpu or memory");
    }
}

fn against_limit(e: &mut Errs, requests: &At<'_>, limits: &At<'_>, name: &str) {
    let (request, limit) = (quantity(requests.key(name).v), quantity(limits.key(name).v));
    match (request, limit) {
        (Some(request), Some(limit)) => {
            let order = request.cmp(&limit);
            if !overcommit_allowed(name) && order != Ordering::Equal {
                e.invalid_as(requests, request.to_string(), &format!("must be equal to {name} limit of {limit}"));
            } else if order == Ordering::Greater {
                e.invalid_as(
                    requests,
                    request.to_string(),
                    &format!("must be less than or equal to {name} limit of {limit}"),
                );
            }
        }
        (Some(_), None) if !overcommit_allowed(name) => {
            e.required(limits, "Limit must be set for non overcommitable resources");
        }
        _ => {}
    }
}

fn huge_page(e: &mut Errs, at: &At<'_>, name: &str) {
    let (Some(size), Some(value)) =
        (name.strip_prefix("hugepages-").and_then(|s| s.parse::<Quantity>().ok()), quantity(at.v))
    else {
        return;
    };
    if size.value() > 0 && (value.value() <= 0 || value.value() % size.value() != 0) {
        let detail = format!("{value} is not positive integer multiple of {name}");
        e.invalid_as(at, value.to_string(), &detail);
    }
}

/// `resources` of a pod (cpu, memory, huge pages only), which bound the containers' sums.
pub(crate) fn pod_level(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("resources");
    if !at.is_set() {
        return;
    }
    if spec.get("os.name").s() == "windows" {
        return e.forbidden(&at, "may not be set for a windows pod");
    }
    if at.get("claims").is_set() {
        e.forbidden(&at.get("claims"), "claims may not be set for Resources at pod-level");
    }
    pair(e, &at, |e, at, name| {
        let before = e.0.len();
        resource_name(e, at, name);
        if e.0.len() == before && !["cpu", "memory"].contains(&name) && !is_huge_page(name) {
            e.unsupported_as(at, name, &["cpu", "hugepages-", "memory"]);
        }
    });
    for (kind, totals) in [("requests", aggregate(spec, "requests")), ("limits", aggregate(spec, "limits"))] {
        for (name, total) in totals {
            let own = at.get(kind).key(&name);
            let Some(value) = quantity(own.v) else { continue };
            if (kind == "requests" || is_huge_page(&name)) && total > value {
                let detail = format!("must be greater than or equal to aggregate container {kind} of {total}");
                e.invalid_as(&own, value.to_string(), &detail);
            }
        }
    }
    for (i, container) in spec.get("containers").items().into_iter().enumerate() {
        for (name, limit) in at.get("limits").entries() {
            // Upstream looks for containers below the pod's resources.
            let path = at.path.child("containers").index(i).key(name).child("limits");
            let value = At::new(path, container.get("resources.limits").key(name).v);
            let (Some(own), Some(limit_value)) = (quantity(value.v), quantity(limit.v)) else { continue };
            if own.cmp(&limit_value) == Ordering::Greater {
                let detail = format!("must be less than or equal to pod limits of {limit_value}");
                e.invalid_as(&value, own.to_string(), &detail);
            }
        }
    }
}

/// What the containers need at once: sidecars run beside all others, init containers one after another.
pub(crate) fn aggregate(spec: &At<'_>, kind: &str) -> BTreeMap<String, Quantity> {
    let of = |container: &At<'_>| -> BTreeMap<String, Quantity> {
        let own = container.get("resources").get(kind);
        own.entries().into_iter().filter_map(|(name, v)| Some((name.to_owned(), quantity(v.v)?))).collect()
    };
    let add = |total: &mut BTreeMap<String, Quantity>, more: &BTreeMap<String, Quantity>| {
        for (name, value) in more {
            let sum = total.get(name).map_or(*value, |t| t.add(value));
            total.insert(name.clone(), sum);
        }
    };
    let (mut total, mut sidecars, mut most) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::<String, Quantity>::new());
    for container in spec.get("containers").items() {
        add(&mut total, &of(&container));
    }
    for container in spec.get("initContainers").items() {
        let own = of(&container);
        let mut now = sidecars.clone();
        add(&mut now, &own);
        if container.get("restartPolicy").s() == "Always" {
            add(&mut total, &own);
            sidecars.clone_from(&now);
        }
        raise(&mut most, now);
    }
    raise(&mut total, most);
    total
}

fn raise(to: &mut BTreeMap<String, Quantity>, at_least: BTreeMap<String, Quantity>) {
    for (name, value) in at_least {
        if to.get(&name).is_none_or(|v| *v < value) {
            to.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(resources: Value) -> Vec<String> {
        let obj = json!({ "resources": resources });
        let mut e = Errs::new();
        requirements(&mut e, &At::field(&obj, "resources"), &[]);
        e.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn requests_and_limits() {
        assert!(errors(json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "1"}})).is_empty());
        assert_eq!(
            errors(json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}})),
            ["resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1"]
        );
        assert_eq!(
            errors(json!({"requests": {"example.com/gpu": "1"}})),
            ["resources.limits: Required value: Limit must be set for non overcommitable resources"]
        );
        assert_eq!(errors(json!({"limits": {"bogus": "1"}})).len(), 2);
        assert_eq!(
            errors(json!({"limits": {"cpu": "-1"}})),
            ["resources.limits[cpu]: Invalid value: \"-1\": must be greater than or equal to 0"]
        );
        assert_eq!(
            errors(json!({"limits": {"hugepages-2Mi": "2Mi"}, "requests": {"hugepages-2Mi": "2Mi"}})),
            ["resources: Forbidden: HugePages require cpu or memory"]
        );
    }

    #[test]
    fn names() {
        assert!(is_extended("example.com/gpu"));
        assert!(!is_extended("cpu"));
        assert!(overcommit_allowed("memory"));
        assert!(!overcommit_allowed("hugepages-2Mi"));
    }
}
