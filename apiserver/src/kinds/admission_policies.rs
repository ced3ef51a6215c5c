//! Admission policies and their bindings.

use isopod_api::{field::ErrorList, meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{expressions, pod_defaults, webhooks};
use crate::{
    cel::{self, Type, admission::Environments},
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, selector},
};

/// `validatingadmissionpolicies` and `mutatingadmissionpolicies`.
pub(crate) struct AdmissionPolicy {
    /// Mutations instead of validations.
    pub(crate) mutating: bool,
}
/// `validatingadmissionpolicybindings` and `mutatingadmissionpolicybindings`.
pub(crate) struct AdmissionPolicyBinding {
    /// Bindings of mutating policies have no actions.
    pub(crate) mutating: bool,
}

fn match_defaults(v: &mut Value) {
    if !v.is_object() {
        return;
    }
    pod_defaults::set(v, "matchPolicy", json!("Equivalent"));
    pod_defaults::set(v, "namespaceSelector", json!({}));
    pod_defaults::set(v, "objectSelector", json!({}));
    for list in ["resourceRules", "excludeResourceRules"] {
        for rule in v[list].as_array_mut().into_iter().flatten() {
            pod_defaults::set(rule, "scope", json!("*"));
        }
    }
    pod_defaults::drop_nulls(v);
}

fn match_resources(e: &mut Errs, at: &At<'_>) {
    selector::label_selector(e, &at.get("namespaceSelector"));
    selector::label_selector(e, &at.get("objectSelector"));
    for list in ["resourceRules", "excludeResourceRules"] {
        for rule in at.get(list).items() {
            webhooks::rule_with_operations(e, &rule);
        }
    }
    e.one_of_if_set(&at.get("matchPolicy"), &["Equivalent", "Exact"]);
}

impl Strategy for AdmissionPolicy {
    fn default(&self, obj: &mut Value) {
        if !obj["spec"].is_object() {
            return super::clean(obj, &[""]);
        }
        pod_defaults::set(&mut obj["spec"], "failurePolicy", json!("Fail"));
        match_defaults(&mut obj["spec"]["matchConstraints"]);
        super::clean(obj, &["/spec", ""]);
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        if !self.mutating {
            obj["status"] = json!({});
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let at = At::field(obj, "spec");
        e.one_of_if_set(&at.get("failurePolicy"), &["Fail", "Ignore"]);
        let param = at.get("paramKind");
        if param.is_set() {
            for field in ["apiVersion", "kind"] {
                if param.get(field).s().is_empty() {
                    e.required(&param.get(field), "");
                }
            }
        }
        let constraints = at.get("matchConstraints");
        if !constraints.is_set() {
            e.required(&constraints, "");
        } else {
            match_resources(&mut e, &constraints);
            if constraints.get("resourceRules").len() == 0 {
                e.required(&constraints.get("resourceRules"), "");
            }
        }
        let environments = Environments::new(at.v, self.mutating);
        expressions::match_conditions(&mut e, &at.get("matchConditions"), &environments.conditions);
        let mut seen = Vec::new();
        for (variable, compiled) in at.get("variables").items().iter().zip(&environments.variables) {
            let (name, text) = (variable.get("name"), variable.get("expression"));
            expressions::identifier(&mut e, &name);
            if text.s().trim().is_empty() {
                e.required(&text, "expression is not specified");
            } else if let Err(error) = &compiled.program {
                e.invalid(&text, error);
            }
            if seen.contains(&compiled.name) {
                e.duplicate(&name, name.s());
            }
            seen.push(compiled.name.clone());
        }
        if self.mutating {
            mutations(&mut e, &at, &environments);
        } else {
            validations(&mut e, &at, meta::name(obj), &environments);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let param = match &spec["paramKind"] {
            Value::Null => "<unset>".to_owned(),
            kind => format!("{}/{}", text(&kind["apiVersion"]), text(&kind["kind"])),
        };
        let count = table::count(&spec[if self.mutating { "mutations" } else { "validations" }]);
        vec![table::name(obj), json!(count), json!(param), table::age(obj, now)]
    }
}

fn validations(e: &mut Errs, spec: &At<'_>, policy: &str, environments: &Environments) {
    let (list, annotations) = (spec.get("validations"), spec.get("auditAnnotations"));
    if list.len() == 0 && annotations.len() == 0 {
        for at in [&list, &annotations] {
            e.required(at, "validations or auditAnnotations must contain at least one item");
        }
        return;
    }
    for at in list.items() {
        let (text, message) = (at.get("expression"), at.get("messageExpression"));
        expressions::required(e, &text, "expression is not specified", &environments.expressions, &[Type::Bool]);
        if message.is_set() && message.s().trim().is_empty() {
            e.invalid(&message, "must be non-empty if specified");
        } else if message.is_set() {
            expressions::expression(e, &message, &environments.messages, &[Type::String]);
        }
        let text = at.get("message");
        if text.s().contains('\n') {
            e.invalid(&text, "message must not contain line breaks");
        }
        e.one_of_if_set(&at.get("reason"), &["Forbidden", "Invalid", "RequestEntityTooLarge"]);
    }
    let mut seen = Vec::new();
    for at in annotations.items() {
        let (key, value) = (at.get("key"), at.get("valueExpression"));
        let full = format!("{policy}/{}", key.s());
        for message in names::qualified_name(&full) {
            e.invalid_as(&key, full.clone(), &message);
        }
        if seen.contains(&key.s()) {
            e.duplicate(&key, key.s());
        }
        seen.push(key.s());
        let wanted = [Type::String, Type::Null];
        expressions::required(e, &value, "valueExpression is not specified", &environments.expressions, &wanted);
    }
}

fn mutations(e: &mut Errs, spec: &At<'_>, environments: &Environments) {
    let list = spec.get("mutations");
    if list.len() == 0 {
        e.required(&list, "mutations must contain at least one item");
    }
    for at in list.items() {
        let kind = at.get("patchType");
        if kind.s().is_empty() {
            e.required(&kind, "");
            continue;
        }
        e.one_of(&kind, &["ApplyConfiguration", "JSONPatch"]);
        let (field, wanted) = match kind.s() {
            "JSONPatch" => ("jsonPatch", cel::list_of_patches()),
            _ => ("applyConfiguration", cel::object()),
        };
        let text = at.get(field).get("expression");
        expressions::required(e, &text, "expression is not specified", &environments.expressions, &[wanted]);
    }
    e.required_one_of(&spec.get("reinvocationPolicy"), &["IfNeeded", "Never"]);
}

impl Strategy for AdmissionPolicyBinding {
    fn default(&self, obj: &mut Value) {
        match_defaults(&mut obj["spec"]["matchResources"]);
        super::clean(obj, &["/spec", ""]);
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let at = At::field(obj, "spec");
        let policy = at.get("policyName");
        if policy.s().is_empty() {
            e.required(&policy, "");
        } else {
            e.dns_subdomain(&policy);
        }
        param_ref(&mut e, &at.get("paramRef"));
        match_resources(&mut e, &at.get("matchResources"));
        if !self.mutating {
            actions(&mut e, &at.get("validationActions"));
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let param = &obj["spec"]["paramRef"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let shown = match (param, text(&param["namespace"])) {
            (Value::Null, _) => "<unset>".to_owned(),
            (p, _) if !p["selector"].is_null() => table::selector(&p["selector"]),
            (p, namespace) if namespace.is_empty() => text(&p["name"]),
            (p, namespace) => format!("{namespace}/{}", text(&p["name"])),
        };
        vec![table::name(obj), table::or(&obj["spec"]["policyName"], ""), json!(shown), table::age(obj, now)]
    }
}

fn param_ref(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (name, label, missing) = (at.get("name"), at.get("selector"), at.get("parameterNotFoundAction"));
    match (!name.s().is_empty(), label.is_set()) {
        (true, true) => {
            e.forbidden(&name, "name and selector are mutually exclusive");
            e.forbidden(&label, "name and selector are mutually exclusive");
        }
        (false, false) => e.required(at, "one of name or selector must be specified"),
        (true, false) => e.dns_subdomain(&name),
        (false, true) => selector::label_selector(e, &label),
    }
    if missing.s().is_empty() {
        e.required(&missing, "");
    } else {
        e.one_of(&missing, &["Allow", "Deny"]);
    }
}

fn actions(e: &mut Errs, at: &At<'_>) {
    if at.len() == 0 {
        return e.required(at, "at least one validation action is required");
    }
    let mut seen = Vec::new();
    for action in at.items() {
        if !["Audit", "Deny", "Warn"].contains(&action.s()) {
            e.unsupported(&action, &["Audit", "Deny", "Warn"]);
        } else if seen.contains(&action.s()) {
            e.duplicate(&action, action.s());
        }
        seen.push(action.s());
    }
    if seen.contains(&"Deny") && seen.contains(&"Warn") {
        e.invalid(at, "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)");
    }
}
