//! Node selectors, affinity, tolerations, topology spread constraints, gates and claims.

use std::collections::BTreeSet;

use isopod_api::names;
use serde_json::{Value, json};

use super::{At, Errs, internal, meta, same, selector};

/// `affinity`.
pub(crate) fn affinity(e: &mut Errs, at: &At<'_>) {
    let node = at.get("nodeAffinity");
    if node.is_set() {
        node_selector(e, &node.get("requiredDuringSchedulingIgnoredDuringExecution"));
        for preferred in node.get("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(e, &preferred);
            node_selector_term(e, &preferred.get("preference"), false);
        }
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let own = at.get(kind);
        for term in own.get("requiredDuringSchedulingIgnoredDuringExecution").items() {
            pod_affinity_term(e, &term);
        }
        for preferred in own.get("preferredDuringSchedulingIgnoredDuringExecution").items() {
            weight(e, &preferred);
            pod_affinity_term(e, &preferred.get("podAffinityTerm"));
        }
    }
}

fn weight(e: &mut Errs, at: &At<'_>) {
    let weight = at.get("weight");
    if !(1..=100).contains(&weight.int0()) {
        e.invalid_as(&weight, weight.int0(), "must be in the range 1-100");
    }
}

/// A node selector with terms.
pub(crate) fn node_selector(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let terms = at.get("nodeSelectorTerms");
    if terms.len() == 0 {
        return e.required(&terms, "must have at least one node selector term");
    }
    for term in terms.items() {
        node_selector_term(e, &term, true);
    }
}

/// A term of a node selector; what is only preferred may name values no label can have.
fn node_selector_term(e: &mut Errs, at: &At<'_>, required: bool) {
    for expression in at.get("matchExpressions").items() {
        node_requirement(e, &expression, required);
    }
    for field in at.get("matchFields").items() {
        node_field(e, &field);
    }
}

fn node_requirement(e: &mut Errs, at: &At<'_>, required: bool) {
    let (operator, values) = (at.get("operator"), at.get("values"));
    match operator.s() {
        "In" | "NotIn" if values.len() == 0 => {
            e.required(&values, "must be specified when `operator` is 'In' or 'NotIn'")
        }
        "Exists" | "DoesNotExist" if values.len() > 0 => {
            e.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
        }
        "Gt" | "Lt" if values.len() != 1 => {
            e.required(&values, "must be specified single value when `operator` is 'Lt' or 'Gt'");
        }
        "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
        _ => e.invalid_str(&operator, "not a valid selector operator"),
    }
    let key = at.get("key");
    meta::label_key(e, &key, key.s());
    for value in values.items().iter().filter(|_| required) {
        e.messages(value, names::label_value(value.s()));
    }
}

fn node_field(e: &mut Errs, at: &At<'_>) {
    let (key, operator, values) = (at.get("key"), at.get("operator"), at.get("values"));
    match operator.s() {
        "In" | "NotIn" => {
            if values.len() != 1 {
                e.required(
                    &values,
                    "must be only one value when `operator` is 'In' or 'NotIn' for node field selector",
                );
            }
        }
        _ => e.invalid_str(&operator, "not a valid selector operator"),
    }
    if key.s() != "metadata.name" {
        return e.invalid_str(&key, "not a valid field selector key");
    }
    for value in values.items() {
        e.messages(&value, names::dns1123_subdomain(value.s()));
    }
}

fn pod_affinity_term(e: &mut Errs, at: &At<'_>) {
    selector::label_selector(e, &at.get("labelSelector"));
    selector::label_selector(e, &at.get("namespaceSelector"));
    for namespace in at.get("namespaces").items() {
        let list = at.get("namespace");
        for message in names::dns1123_label(namespace.s()) {
            e.invalid_as(&list, namespace.s(), &message);
        }
    }
    match_label_keys(e, at);
    let topology = at.get("topologyKey");
    if topology.s().is_empty() {
        e.required(&topology, "can not be empty");
    }
    meta::label_key(e, &topology, topology.s());
}

/// The keys of labels that go with the selector at `at`, which has got the pod's own values of them by now.
fn match_label_keys(e: &mut Errs, at: &At<'_>) {
    let (matching, other) = (at.get("matchLabelKeys"), at.get("mismatchLabelKeys"));
    label_keys(e, &matching, at);
    label_keys(e, &other, at);
    let selector = at.get("labelSelector");
    let mut seen: Vec<&str> = selector.get("matchLabels").entries().into_iter().map(|(key, _)| key).collect();
    for key in selector.get("matchExpressions").items().iter().map(|own| own.get("key").s()) {
        if let Some(i) = matching.strings().iter().rposition(|own| *own == key).filter(|_| seen.contains(&key)) {
            // Upstream leaves the list's name out.
            e.invalid_as(&At::new(at.path.index(i), at.v), key, "exists in both matchLabelKeys and labelSelector");
        }
        seen.push(key);
    }
    for key in matching.items().iter().filter(|key| other.strings().contains(&key.s())) {
        e.invalid(key, "exists in both matchLabelKeys and mismatchLabelKeys");
    }
}

/// Keys of labels that go with the selector at `at`.
fn label_keys(e: &mut Errs, keys: &At<'_>, at: &At<'_>) {
    if keys.len() > 0 && !at.get("labelSelector").is_set() {
        return e.forbidden(keys, "must not be specified when labelSelector is not set");
    }
    for key in keys.items() {
        meta::label_key(e, &key, key.s());
    }
}

/// `tolerations`.
pub(crate) fn tolerations(e: &mut Errs, list: &At<'_>) {
    for at in list.items() {
        let (key, operator, value, effect) = (at.get("key"), at.get("operator"), at.get("value"), at.get("effect"));
        if !key.s().is_empty() {
            meta::label_key(e, &key, key.s());
        }
        if key.s().is_empty() && operator.s() != "Exists" {
            e.invalid_str(
                &operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if at.get("tolerationSeconds").is_set() && effect.s() != "NoExecute" {
            e.invalid_str(&effect, "effect must be 'NoExecute' when `tolerationSeconds` is set");
        }
        match operator.s() {
            "Equal" | "" => {
                let messages = names::label_value(value.s());
                if !messages.is_empty() {
                    e.invalid_as(&operator, value.s(), &messages.join(";"));
                }
            }
            "Exists" => {
                if !value.s().is_empty() {
                    e.invalid_as(&operator, value.s(), "value must be empty when `operator` is 'Exists'");
                }
            }
            "Lt" | "Gt" => e.unsupported(&operator, &["Equal", "Exists", "Lt", "Gt"]),
            _ => e.unsupported(&operator, &["Equal", "Exists"]),
        }
        if !effect.s().is_empty() {
            e.one_of(&effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        }
    }
}

/// `topologySpreadConstraints` of a pod or a template.
pub(crate) fn topology_spread(e: &mut Errs, list: &At<'_>) {
    let pair = |at: &At<'_>| (at.v["topologyKey"].clone(), at.v["whenUnsatisfiable"].clone());
    let all = list.items();
    for (i, at) in all.iter().enumerate() {
        let skew = at.get("maxSkew");
        if skew.int0() <= 0 {
            e.invalid_as(&skew, skew.int0(), "must be greater than zero");
        }
        let topology = at.get("topologyKey");
        if topology.s().is_empty() {
            e.required(&topology, "can not be empty");
        }
        let when = at.get("whenUnsatisfiable");
        e.one_of(&when, &["DoNotSchedule", "ScheduleAnyway"]);
        // Upstream names the first of two.
        if all[i + 1..].iter().any(|later| pair(later) == pair(at)) {
            e.duplicate(
                &At::new(at.path.child("{topologyKey, whenUnsatisfiable}"), at.v),
                format!("{{{}, {}}}", topology.s(), when.s()),
            );
        }
        let domains = at.get("minDomains");
        if let Some(n) = domains.int() {
            if n <= 0 {
                e.invalid(&domains, "must be greater than zero");
            }
            if when.s() != "DoNotSchedule" {
                let detail =
                    format!("can only use minDomains if whenUnsatisfiable={}, not {}", "DoNotSchedule", when.s());
                e.invalid(&domains, &detail);
            }
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            e.one_of_if_set(&at.get(policy), &["Honor", "Ignore"]);
        }
        match_label_keys(e, at);
        selector::label_selector(e, &at.get("labelSelector"));
    }
}

/// `schedulingGates`.
pub(crate) fn gates(e: &mut Errs, list: &At<'_>) {
    let mut seen = BTreeSet::new();
    for at in list.items() {
        // Upstream leaves the field out.
        let name = At::new(at.path.clone(), at.get("name").v);
        e.qualified_name(&name);
        if !seen.insert(name.s()) {
            e.duplicate(&name, name.s());
        }
    }
}

/// `resourceClaims`; returns their names.
pub(crate) fn claims<'a>(e: &mut Errs, list: &At<'a>) -> Vec<&'a str> {
    let mut seen: Vec<&str> = Vec::new();
    for at in list.items() {
        let name = at.get("name");
        if name.s().is_empty() {
            e.required(&name, "");
        } else if seen.contains(&name.s()) {
            e.duplicate(&name, name.s());
        } else {
            e.dns_label(&name);
            seen.push(name.s());
        }
        let (claim, template) = (at.get("resourceClaimName"), at.get("resourceClaimTemplateName"));
        match (claim.is_set(), template.is_set()) {
            (true, true) => {
                let detail = "at most one of `resourceClaimName` or `resourceClaimTemplateName` may be specified";
                e.invalid_as(&at, internal::named("Claim", at.v), detail);
            }
            (false, false) => {
                let detail = "must specify one of: `resourceClaimName`, `resourceClaimTemplateName`";
                e.invalid_as(&at, internal::named("Claim", at.v), detail);
            }
            (true, _) => e.dns_subdomain(&claim),
            (_, true) => e.dns_subdomain(&template),
        }
    }
    seen
}

/// `taints` of a node.
pub(crate) fn taints(e: &mut Errs, list: &At<'_>) {
    let mut seen = BTreeSet::new();
    for at in list.items() {
        let (key, value, effect) = (at.get("key"), at.get("value"), at.get("effect"));
        e.qualified_name(&key);
        let messages = names::label_value(value.s());
        if !messages.is_empty() {
            e.invalid_str(&value, &messages.join(";"));
        }
        e.required_one_of(&effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
        if !seen.insert((key.s(), effect.s())) {
            let shown =
                json!({"Key": key.s(), "Value": value.s(), "Effect": effect.s(), "TimeAdded": at.get("timeAdded").v});
            e.0.push({
                let mut error = isopod_api::field::Error::duplicate(&at.path, shown);
                error.detail = "taints must be unique by key and effect pair".to_owned();
                error
            });
        }
    }
}

/// Gates may only be removed.
pub(crate) fn gates_update(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let before: Vec<&str> = old.items().iter().map(|g| g.get("name").s()).collect();
    for at in new.items() {
        let name = at.get("name");
        if !before.contains(&name.s()) {
            let detail = format!("only deletion is allowed, but found new scheduling gate '{}'", name.s());
            e.forbidden(&name, &detail);
        }
    }
}

/// What a gated pod's required node affinity may become: more requirements in the terms it has, or the first terms.
pub(crate) fn gated_affinity(e: &mut Errs, new: &At<'_>, old: &At<'_>) {
    let path = "requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    let (terms, before) = (new.get(path), old.get(path));
    if before.len() == 0 {
        return;
    }
    let shown = |v: &Value| internal::named("NodeTerm", v);
    if terms.len() != before.len() {
        let all: Vec<Value> = terms.items().iter().map(|t| shown(t.v)).collect();
        let detail = "no additions/deletions to non-empty NodeSelectorTerms list are allowed";
        return e.invalid_as(&terms, if all.is_empty() { Value::Null } else { json!(all) }, detail);
    }
    let grows = |now: &At<'_>, was: &At<'_>| {
        let prefix = |field: &str| {
            let (now, was) = (now.get(field).items(), was.get(field).items());
            was.len() <= now.len() && was.iter().zip(&now).all(|(a, b)| same(a.v, b.v))
        };
        let empty = was.get("matchExpressions").len() + was.get("matchFields").len() == 0;
        (!empty || same(now.v, was.v)) && prefix("matchExpressions") && prefix("matchFields")
    };
    for (now, was) in terms.items().iter().zip(before.items()) {
        if !grows(now, &was) {
            e.invalid_as(now, shown(now.v), "only additions are allowed (no mutations or deletions)");
        }
    }
}
