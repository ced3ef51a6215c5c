//! FlowSchemas and PriorityLevelConfigurations.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::pod_defaults;
use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs},
};

/// `flowschemas`.
pub(crate) struct FlowSchema;
/// `prioritylevelconfigurations`.
pub(crate) struct PriorityLevel;

impl Strategy for FlowSchema {
    fn default(&self, obj: &mut Value) {
        let spec = &mut obj["spec"];
        if spec.is_object() && spec["matchingPrecedence"].as_i64().unwrap_or_default() == 0 {
            spec["matchingPrecedence"] = json!(1000);
        }
        super::clean(obj, &["/spec", ""]);
    }

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
        let method = spec.get("distinguisherMethod.type");
        if spec.get("distinguisherMethod").is_set() {
            e.one_of(&method, &["ByNamespace", "ByUser"]);
        }
        if level.s().is_empty() {
            e.required(&level, "must reference a priority level");
        } else {
            e.dns_subdomain(&level);
        }
        for rule in spec.get("rules").items() {
            rule_checks(&mut e, &rule);
        }
        e.0
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

fn rule_checks(e: &mut Errs, at: &At<'_>) {
    let (subjects, resources, urls) = (at.get("subjects"), at.get("resourceRules"), at.get("nonResourceRules"));
    if subjects.len() == 0 {
        e.required(&subjects, "subjects must contain at least one value");
    }
    for subject in subjects.items() {
        let kind = subject.get("kind");
        let field = match kind.s() {
            "ServiceAccount" => "serviceAccount",
            "User" => "user",
            "Group" => "group",
            _ => {
                e.unsupported(&kind, &["Group", "ServiceAccount", "User"]);
                continue;
            }
        };
        let own = subject.get(field);
        if !own.is_set() {
            e.required(&own, &format!("{field} is required when subject kind is '{}'", kind.s()));
        } else if own.get("name").s().is_empty() {
            e.required(&own.get("name"), "");
        }
    }
    if resources.len() == 0 && urls.len() == 0 {
        e.required(at, "at least one of resourceRules and nonResourceRules has to be non-empty");
    }
    for rule in resources.items() {
        for (field, what) in [
            ("verbs", "verbs must contain at least one value"),
            ("apiGroups", "resource rules must supply at least one api group"),
            ("resources", "resource rules must supply at least one resource"),
        ] {
            if rule.get(field).len() == 0 {
                e.required(&rule.get(field), what);
            }
        }
        if rule.get("namespaces").len() == 0 && !rule.get("clusterScope").is_true() {
            e.required(
                &rule.get("namespaces"),
                "resource rules that are not cluster scoped must supply at least one namespace",
            );
        }
    }
}

impl Strategy for PriorityLevel {
    fn default(&self, obj: &mut Value) {
        for kind in ["exempt", "limited"] {
            let Some(own) = obj.pointer_mut(&format!("/spec/{kind}")).filter(|v| v.is_object()) else { continue };
            pod_defaults::set(own, "nominalConcurrencyShares", json!(if kind == "exempt" { 0 } else { 30 }));
            pod_defaults::set(own, "lendablePercent", json!(0));
            if let Some(queuing) = own.pointer_mut("/limitResponse/queuing").filter(|v| v.is_object()) {
                for (field, value) in [("handSize", 8), ("queues", 64), ("queueLengthLimit", 50)] {
                    if queuing[field].as_i64().unwrap_or_default() == 0 {
                        queuing[field] = json!(value);
                    }
                }
            }
        }
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        let (kind, exempt, limited) = (spec.get("type"), spec.get("exempt"), spec.get("limited"));
        match kind.s() {
            "Exempt" => {
                if limited.is_set() {
                    e.forbidden(&limited, "must be nil if the type is not Limited");
                }
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
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let own = if spec["limited"].is_object() { &spec["limited"] } else { &spec["exempt"] };
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

fn limits(e: &mut Errs, at: &At<'_>) {
    e.non_negative(&at.get("nominalConcurrencyShares"));
    let percent = at.get("lendablePercent");
    if percent.int().is_some_and(|n| !(0..=100).contains(&n)) {
        e.invalid(&percent, "must be between 0 and 100, inclusive");
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
            for field in ["queueLengthLimit", "queues", "handSize"] {
                if queuing.get(field).int0() <= 0 {
                    e.invalid_as(&queuing.get(field), queuing.get(field).int0(), "must be positive");
                }
            }
        }
        _ => e.unsupported(&kind, &["Queue", "Reject"]),
    }
}
