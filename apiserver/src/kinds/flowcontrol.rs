//! FlowSchemas and PriorityLevelConfigurations.

use std::{collections::BTreeMap, sync::LazyLock};

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, internal, same},
};

/// `flowschemas`.
pub(crate) struct FlowSchema;
/// `prioritylevelconfigurations`.
pub(crate) struct PriorityLevel;

impl Strategy for FlowSchema {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        let (precedence, level) = (spec.get("matchingPrecedence"), spec.get("priorityLevelConfiguration.name"));
        if precedence.int0() <= 0 {
            e.invalid_as(&precedence, precedence.int0(), "must be a positive value");
        }
        if precedence.int0() > 10_000 {
            e.invalid(&precedence, "must not be greater than 10000");
        }
        if precedence.int0() == 1 && meta::name(obj) != "exempt" {
            e.invalid(&precedence, "only the schema named 'exempt' may have matchingPrecedence 1");
        }
        let method = spec.get("distinguisherMethod");
        if method.is_set() && !["ByNamespace", "ByUser"].contains(&method.get("type").s()) {
            // Upstream shows the whole method.
            let shown = internal::named("Distinguisher", method.v);
            e.unsupported_as(&method.get("type"), shown, &["ByNamespace", "ByUser"]);
        }
        if level.s().is_empty() {
            e.required(&level, "must reference a priority level");
        } else {
            e.dns_subdomain(&level);
        }
        for rule in spec.get("rules").items() {
            rule_checks(&mut e, &rule);
        }
        let name = meta::name(obj);
        if let Some(fixed) = MANDATORY_SCHEMAS.get(name)
            && !alike(&obj["spec"], fixed)
        {
            let shown = internal::named("FlowSchemaSpec", spec.v);
            e.invalid_as(&spec, shown, &format!("spec of '{name}' must equal the fixed value"));
        }
        conditions(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        status_or(self, cx, new)
    }

    fn row_rank(&self) -> Option<fn(&Value) -> i64> {
        Some(|schema| schema["spec"]["matchingPrecedence"].as_i64().unwrap_or_default())
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let dangling = obj["status"]["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == "Dangling");
        vec![
            table::name(obj),
            table::or(&spec["priorityLevelConfiguration"]["name"], ""),
            table::int(&spec["matchingPrecedence"]),
            table::or(&spec["distinguisherMethod"]["type"], "<none>"),
            table::age(obj, now),
            table::or(dangling.map_or(&Value::Null, |c| &c["status"]), "?"),
        ]
    }
}

/// The specs of one of the bootstrap data's tables that nobody may change.
fn mandatory(table: &str) -> BTreeMap<String, Value> {
    let data = crate::bootstrap::data();
    let rows = data[table].as_array().into_iter().flatten();
    rows.filter(|row| matches!(meta::name(row), "exempt" | "catch-all"))
        .map(|row| (meta::name(row).to_owned(), row["spec"].clone()))
        .collect()
}

static MANDATORY_SCHEMAS: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| mandatory("flowSchemas"));
static MANDATORY_LEVELS: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| mandatory("priorityLevelConfigurations"));

/// Equality where zero and absent are the same.
fn alike(a: &Value, b: &Value) -> bool {
    fn plain(v: &Value) -> Value {
        match v {
            Value::Object(map) => {
                let zero = |v: &Value| v.is_null() || v == &json!(0) || v == &json!(false);
                map.iter().filter(|(_, v)| !zero(v)).map(|(k, v)| (k.clone(), plain(v))).collect()
            }
            Value::Array(list) => list.iter().map(plain).collect(),
            other => other.clone(),
        }
    }
    same(&plain(a), &plain(b))
}

/// A write of the status is judged by its conditions alone.
fn status_or(strategy: &dyn Strategy, cx: &Context<'_>, new: &Value) -> ErrorList {
    if cx.subresource != "status" {
        return strategy.validate(cx, new);
    }
    let mut e = Errs::new();
    conditions(&mut e, new);
    e.0
}

fn conditions(e: &mut Errs, obj: &Value) {
    let mut seen = Vec::new();
    for at in At::field(obj, "status").get("conditions").items() {
        let kind = at.get("type");
        if seen.contains(&kind.s()) {
            e.duplicate(&kind, kind.s());
        }
        seen.push(kind.s());
        if kind.s().is_empty() {
            e.required(&kind, "must not be empty");
        }
    }
}

fn rule_checks(e: &mut Errs, at: &At<'_>) {
    let (subjects, resources, urls) = (at.get("subjects"), at.get("resourceRules"), at.get("nonResourceRules"));
    if subjects.len() == 0 {
        e.required(&subjects, "subjects must contain at least one value");
    }
    for subject in subjects.items() {
        subject_checks(e, &subject);
    }
    if resources.len() == 0 && urls.len() == 0 {
        e.required(at, "at least one of resourceRules and nonResourceRules has to be non-empty");
    }
    for rule in resources.items() {
        resource_rule(e, &rule);
    }
    for rule in urls.items() {
        verbs(e, &rule.get("verbs"));
        let paths = rule.get("nonResourceURLs");
        if paths.len() == 0 {
            e.required(&paths, "nonResourceURLs must contain at least one value");
        } else if !alone(e, &paths, "non-resource URLs") {
            for path in paths.items() {
                url_path(e, &path);
            }
        }
    }
}

const SUBJECTS: [(&str, &str); 3] = [("ServiceAccount", "serviceAccount"), ("User", "user"), ("Group", "group")];

fn subject_checks(e: &mut Errs, at: &At<'_>) {
    let kind = at.get("kind");
    let Some((_, field)) = SUBJECTS.iter().find(|(known, _)| *known == kind.s()) else {
        return e.unsupported(&kind, &["Group", "ServiceAccount", "User"]);
    };
    let own = at.get(field);
    let name = own.get("name");
    if !own.is_set() {
        e.required(&own, &format!("{field} is required when subject kind is '{}'", kind.s()));
    } else if name.s().is_empty() {
        e.required(&name, "");
    } else if *field == "serviceAccount" && name.s() != "*" {
        e.dns_subdomain(&name);
    }
    if *field == "serviceAccount" && own.is_set() {
        let namespace = own.get("namespace");
        if namespace.s().is_empty() {
            e.required(&namespace, "must specify namespace for service account");
        } else {
            e.dns_label(&namespace);
        }
    }
    // The order upstream looks at the others in.
    let others: &[&str] = match *field {
        "serviceAccount" => &["user", "group"],
        "user" => &["serviceAccount", "group"],
        _ => &["serviceAccount", "user"],
    };
    for (wanted, other) in others.iter().filter_map(|f| SUBJECTS.iter().find(|(_, field)| field == f)) {
        if at.get(other).is_set() {
            e.forbidden(&at.get(other), &format!("{other} is forbidden when subject kind is not '{wanted}'"));
        }
    }
}

const VERBS: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "proxy", "update", "watch"];

/// Whether a list has the wildcard, which must then be alone in it.
fn alone(e: &mut Errs, list: &At<'_>, what: &str) -> bool {
    let wildcard = list.strings().contains(&"*");
    if wildcard && list.len() > 1 {
        e.invalid(list, &format!("if '*' is present, must not specify other {what}"));
    }
    wildcard
}

fn verbs(e: &mut Errs, at: &At<'_>) {
    if at.len() == 0 {
        e.required(at, "verbs must contain at least one value");
    } else if !alone(e, at, "verbs") && !at.strings().iter().all(|verb| VERBS.contains(verb)) {
        e.unsupported(at, VERBS);
    }
}

fn resource_rule(e: &mut Errs, rule: &At<'_>) {
    verbs(e, &rule.get("verbs"));
    for (field, missing, what) in [
        ("apiGroups", "resource rules must supply at least one api group", "api groups"),
        ("resources", "resource rules must supply at least one resource", "resources"),
    ] {
        let at = rule.get(field);
        if at.len() == 0 {
            e.required(&at, missing);
        } else {
            alone(e, &at, what);
        }
    }
    let namespaces = rule.get("namespaces");
    if namespaces.len() == 0 && !rule.get("clusterScope").is_true() {
        let missing = "resource rules that are not cluster scoped must supply at least one namespace";
        e.required(&namespaces, missing);
    } else if !alone(e, &namespaces, "namespaces") {
        for namespace in namespaces.items() {
            for message in isopod_api::names::dns1123_label(namespace.s()) {
                let detail = format!("each member of this list must be '*' or a DNS-1123 label; {message}");
                e.invalid_str(&namespace, &detail);
            }
        }
    }
}

/// A path, which may end in `/*`.
fn url_path(e: &mut Errs, at: &At<'_>) {
    let path = at.s();
    let stars = path.matches('*').count();
    let detail = match path {
        "" => "must not be empty",
        "/" => return,
        _ if !path.starts_with('/') => "must start with slash",
        _ if path.contains(' ') => "must not contain white-space",
        _ if path.contains("//") => "must not contain double slash",
        _ if stars > 1 || (stars == 1 && !path.ends_with("/*")) => "wildcard can only do suffix matching",
        _ => return,
    };
    e.invalid_str(at, detail);
}

impl Strategy for PriorityLevel {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        let (kind, exempt, limited) = (spec.get("type"), spec.get("exempt"), spec.get("limited"));
        let name = meta::name(obj);
        if (name == "exempt") != (kind.s() == "Exempt") {
            e.invalid_str(&kind, "type must be 'Exempt' if and only if name is 'exempt'");
        }
        match kind.s() {
            "Exempt" => {
                if limited.is_set() {
                    e.forbidden(&limited, "must be nil if the type is not Limited");
                }
                shares(&mut e, &exempt);
            }
            "Limited" => {
                if exempt.is_set() {
                    e.forbidden(&exempt, "must be nil if the type is Limited");
                }
                if !limited.is_set() {
                    e.required(&limited, "must not be empty when type is Limited");
                } else {
                    limits(&mut e, &limited);
                }
            }
            _ => e.unsupported(&kind, &["Exempt", "Limited"]),
        }
        fixed_level(&mut e, &spec, name);
        conditions(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        status_or(self, cx, new)
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let own = &spec["limited"];
        let number = |v: &Value| v.as_i64().map_or(json!("<none>"), |n| json!(n));
        let queuing = &own["limitResponse"]["queuing"];
        vec![
            table::name(obj),
            table::or(&spec["type"], ""),
            number(&own["nominalConcurrencyShares"]),
            number(&queuing["queues"]),
            number(&queuing["handSize"]),
            number(&queuing["queueLengthLimit"]),
            table::age(obj, now),
        ]
    }
}

/// The mandatory levels stay as they are, but for what the exempt one lends.
fn fixed_level(e: &mut Errs, spec: &At<'_>, name: &str) {
    let Some(fixed) = MANDATORY_LEVELS.get(name) else { return };
    let (mut own, mut fixed) = (spec.v.clone(), fixed.clone());
    let mut except = "";
    if name == "exempt" {
        own["exempt"] = Value::Null;
        fixed["exempt"] = Value::Null;
        except = " except the 'spec.exempt' field";
    }
    if !alike(&own, &fixed) {
        let shown = internal::named("LevelSpec", spec.v);
        e.invalid_as(spec, shown, &format!("spec of '{name}'{except} must equal the fixed value"));
    }
}

/// nominalConcurrencyShares and lendablePercent.
fn shares(e: &mut Errs, at: &At<'_>) {
    let (shares, percent) = (at.get("nominalConcurrencyShares"), at.get("lendablePercent"));
    if shares.int().is_some_and(|n| n < 0) {
        e.invalid(&shares, "must be a non-negative integer");
    }
    if percent.int().is_some_and(|n| !(0..=100).contains(&n)) {
        e.invalid(&percent, "must be between 0 and 100, inclusive");
    }
}

fn limits(e: &mut Errs, at: &At<'_>) {
    shares(e, at);
    let borrowing = at.get("borrowingLimitPercent");
    if borrowing.int().is_some_and(|n| n < 0) {
        e.invalid(&borrowing, "if specified, must be a non-negative integer");
    }
    let response = at.get("limitResponse");
    let (kind, queuing) = (response.get("type"), response.get("queuing"));
    match kind.s() {
        "Reject" => {
            if queuing.is_set() {
                e.forbidden(&queuing, "must be nil if limited.limitResponse.type is not Limited");
            }
        }
        "Queue" => {
            if !queuing.is_set() {
                return e.required(&queuing, "must not be empty if limited.limitResponse.type is Limited");
            }
            queues(e, &queuing);
        }
        _ => e.unsupported(&kind, &["Queue", "Reject"]),
    }
}

const MAX_QUEUES: i64 = 10_000_000;
/// Bits of the hash that deals a hand of queues.
const HASH_BITS: i64 = 60;

fn queues(e: &mut Errs, at: &At<'_>) {
    let (limit, queues, hand) = (at.get("queueLengthLimit"), at.get("queues"), at.get("handSize"));
    let positive = "must be positive";
    if limit.int0() <= 0 {
        e.invalid_as(&limit, limit.int0(), positive);
    }
    if queues.int0() <= 0 {
        e.invalid_as(&queues, queues.int0(), positive);
    } else if queues.int0() > MAX_QUEUES {
        e.invalid(&queues, &format!("must not be greater than {MAX_QUEUES}"));
    }
    let (deck, size) = (queues.int0(), hand.int0());
    if size <= 0 {
        e.invalid_as(&hand, size, positive);
    } else if size > deck {
        e.invalid(&hand, &format!("should not be greater than queues ({deck})"));
    } else if entropy(deck, size) > HASH_BITS {
        let detail = format!(
            "required entropy bits of deckSize {deck} and handSize {size} should not be greater than {HASH_BITS}"
        );
        e.invalid(&hand, &detail);
    }
}

/// Bits needed to deal `size` of `deck` cards.
fn entropy(deck: i64, size: i64) -> i64 {
    let bits: f64 = (0..size.min(HASH_BITS + 1)).map(|i| ((deck - i).max(1) as f64).log2()).sum();
    bits.ceil() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(e: Errs) -> String {
        e.0.iter().map(|x| x.field.clone()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_the_server_starts_with_is_valid() {
        for (name, spec) in MANDATORY_SCHEMAS.iter() {
            assert!(alike(spec, &MANDATORY_SCHEMAS[name]));
        }
        assert_eq!((MANDATORY_SCHEMAS.len(), MANDATORY_LEVELS.len()), (2, 2));
        let exempt = json!({"spec": {"type": "Exempt", "exempt": {"lendablePercent": 7}}});
        let mut e = Errs::new();
        fixed_level(&mut e, &At::field(&exempt, "spec"), "exempt");
        fixed_level(&mut e, &At::field(&exempt, "spec"), "catch-all");
        assert_eq!(fields(e), "spec");
    }

    #[test]
    fn rules() {
        for (rule, want) in [
            (json!({"subjects": [], "resourceRules": []}), "r.subjects r"),
            (
                json!({"subjects": [{"kind": "User", "user": {"name": "u"}, "group": {"name": "g"}}],
                    "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": ["/a/*", "a", "/*/b"]}]}),
                "r.subjects[0].group r.nonResourceRules[0].nonResourceURLs[1] r.nonResourceRules[0].nonResourceURLs[2]",
            ),
            (
                json!({"subjects": [{"kind": "ServiceAccount", "serviceAccount": {"name": "*"}}],
                    "resourceRules": [{"verbs": ["*", "get"], "apiGroups": ["*"], "resources": ["a"], "namespaces": ["A"]}]}),
                "r.subjects[0].serviceAccount.namespace r.resourceRules[0].verbs r.resourceRules[0].namespaces[0]",
            ),
        ] {
            let obj = json!({ "r": rule });
            let mut e = Errs::new();
            rule_checks(&mut e, &At::field(&obj, "r"));
            assert_eq!(fields(e), want);
        }
    }

    #[test]
    fn hands_of_queues() {
        for (deck, hand, want) in
            [(64, 8, ""), (4, 8, "q.handSize"), (1000, 10, "q.handSize"), (-1, 1, "q.queues q.handSize")]
        {
            let obj = json!({"q": {"queues": deck, "handSize": hand, "queueLengthLimit": 5}});
            let mut e = Errs::new();
            queues(&mut e, &At::field(&obj, "q"));
            assert_eq!(fields(e), want, "{deck} {hand}");
        }
    }
}
