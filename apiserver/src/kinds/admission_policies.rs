//! Admission policies and their bindings.

use isopod_api::{field::ErrorList, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{expressions, webhooks};
use crate::{
    cel::{self, Type, admission::Environments},
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, conditions, meta, selector},
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

/// What can be mutated.
const MUTATED: &[&str] = &["*", "CONNECT", "CREATE", "UPDATE"];

/// `matchConstraints` of a policy, `matchResources` of a binding.
fn match_resources(e: &mut Errs, at: &At<'_>) {
    e.one_of_if_set(&at.get("matchPolicy"), &["Equivalent", "Exact"]);
    selector::label_selector(e, &at.get("namespaceSelector"));
    selector::label_selector(e, &at.get("objectSelector"));
    for rule in ["resourceRules", "excludeResourceRules"].iter().flat_map(|list| at.get(list).items()) {
        let mut seen = Vec::new();
        for name in rule.get("resourceNames").items() {
            e.messages(&name, names::path_segment(name.s()));
            if seen.contains(&name.s()) {
                e.duplicate(&name, name.s());
            }
            seen.push(name.s());
        }
        webhooks::rule_with_operations(e, &rule);
    }
}

fn param_kind(e: &mut Errs, at: &At<'_>) {
    let (version, kind) = (at.get("apiVersion"), at.get("kind"));
    match meta::group_version(version.s()) {
        _ if version.s().is_empty() => e.required(&version, ""),
        Err(why) => e.invalid(&version, &why),
        Ok((group, number)) => {
            let wrong = if group.is_empty() { Vec::new() } else { names::dns1123_subdomain(group) };
            if !wrong.is_empty() {
                e.invalid_as(&version, group, &wrong.join(","));
            }
            let wrong = names::dns1035_label(number);
            if number.is_empty() {
                e.invalid(&version, "version must be specified");
            } else if !wrong.is_empty() {
                e.invalid_as(&version, number, &wrong.join(","));
            }
        }
    }
    let wrong = names::dns1035_label(&kind.s().to_lowercase());
    if kind.s().is_empty() {
        e.required(&kind, "");
    } else if !wrong.is_empty() {
        e.invalid(&kind, &format!("may have mixed case, but should otherwise match: {}", wrong.join(",")));
    }
}

impl Strategy for AdmissionPolicy {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        if !self.mutating {
            obj["status"] = json!({});
        }
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        if cx.subresource != "status" {
            return self.validate(cx, new);
        }
        let mut e = Errs::new();
        status(&mut e, &At::field(new, "status"));
        e.0
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let at = At::field(obj, "spec");
        e.one_of_if_set(&at.get("failurePolicy"), &["Fail", "Ignore"]);
        let param = at.get("paramKind");
        if param.is_set() {
            param_kind(&mut e, &param);
        }
        let constraints = at.get("matchConstraints");
        if !constraints.is_set() {
            e.required(&constraints, "");
        } else {
            match_resources(&mut e, &constraints);
            if constraints.get("resourceRules").len() == 0 {
                e.required(&constraints.get("resourceRules"), "");
            }
            if self.mutating {
                mutated_operations(&mut e, &constraints);
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
            validations(&mut e, &at, isopod_api::meta::name(obj), &environments);
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

/// A selector as Go prints the structure.
fn selector_text(selector: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut labels: Vec<String> =
        selector["matchLabels"].as_object().into_iter().flatten().map(|(k, v)| format!("{k}: {},", text(v))).collect();
    labels.sort_unstable();
    let expressions = selector["matchExpressions"].as_array().into_iter().flatten().map(|expression| {
        let values: Vec<String> = expression["values"].as_array().into_iter().flatten().map(text).collect();
        let (key, operator) = (text(&expression["key"]), text(&expression["operator"]));
        format!("LabelSelectorRequirement{{Key:{key},Operator:{operator},Values:[{}],}},", values.join(" "))
    });
    format!(
        "&LabelSelector{{MatchLabels:map[string]string{{{}}},MatchExpressions:[]LabelSelectorRequirement{{{}}},}}",
        labels.concat(),
        expressions.collect::<String>()
    )
}

fn status(e: &mut Errs, at: &At<'_>) {
    for warning in at.get("typeChecking.expressionWarnings").items() {
        for field in ["warning", "fieldRef"] {
            if warning.get(field).s().trim().is_empty() {
                e.required(&warning.get(field), "");
            }
        }
    }
    conditions::conditions(e, &at.get("conditions"));
}

/// How many annotations of the audit event a policy may have, and how long the expression of one may be.
const ANNOTATIONS_MAX: usize = 20;
const ANNOTATION_MAX: usize = 5 * 1024;

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
        if !text.s().is_empty() && text.s().trim().is_empty() {
            e.invalid(&text, "message must be non-empty if specified");
        } else if text.s().trim().contains(['\n', '\r']) {
            e.invalid(&text, "message must not contain line breaks");
        }
        e.one_of_if_set(&at.get("reason"), &["Forbidden", "Invalid", "RequestEntityTooLarge"]);
    }
    if annotations.len() > ANNOTATIONS_MAX {
        e.invalid(&annotations, &format!("must not have more than {ANNOTATIONS_MAX} auditAnnotations"));
    }
    let mut seen = Vec::new();
    for at in annotations.items() {
        let (key, value) = (at.get("key"), at.get("valueExpression"));
        let full = format!("{policy}/{}", key.s());
        for message in names::qualified_name(&full) {
            e.invalid_as(&key, full.clone(), &message);
        }
        let wanted = [Type::String, Type::Null];
        if value.s().trim().len() > ANNOTATION_MAX {
            e.required(&value, &format!("must not exceed {ANNOTATION_MAX} bytes in length"));
        } else {
            expressions::required(e, &value, "valueExpression is not specified", &environments.expressions, &wanted);
        }
        if seen.contains(&key.s()) {
            e.duplicate(&key, key.s());
        }
        seen.push(key.s());
    }
}

/// Deletions cannot be mutated. Upstream does not say which rule is wrong.
fn mutated_operations(e: &mut Errs, at: &At<'_>) {
    let rules = at.get("resourceRules");
    let path = rules.path.child("operations");
    for operation in rules.items().iter().flat_map(|rule| rule.get("operations").items()) {
        e.one_of(&At::new(path.clone(), operation.v), MUTATED);
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
        let (field, other, wanted) = match kind.s() {
            "JSONPatch" => ("jsonPatch", "applyConfiguration", cel::list_of_patches()),
            "ApplyConfiguration" => ("applyConfiguration", "jsonPatch", cel::object()),
            _ => {
                e.unsupported(&kind, &["ApplyConfiguration", "JSONPatch"]);
                continue;
            }
        };
        let (own, other_at) = (at.get(field), at.get(other));
        if own.is_set() {
            expressions::trimmed(e, &own.get("expression"), &environments.expressions, &[wanted]);
        } else {
            e.required(&own, &format!("must be specified when patchType is {}", kind.s()));
        }
        if other_at.is_set() {
            let detail = format!("must not be specified when patchType is {}", kind.s());
            e.invalid_as(&other_at, format!("{{{other}}}"), &detail);
        }
    }
    e.required_one_of(&spec.get("reinvocationPolicy"), &["IfNeeded", "Never"]);
}

impl Strategy for AdmissionPolicyBinding {
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
        let resources = at.get("matchResources");
        // Upstream misspells the field.
        match_resources(&mut e, &At::new(at.path.child("matchResouces"), resources.v));
        if self.mutating {
            mutated_operations(&mut e, &resources);
        } else {
            actions(&mut e, &at.get("validationActions"));
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let param = &obj["spec"]["paramRef"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let shown = match (text(&param["name"]), text(&param["namespace"])) {
            (name, _) if name.is_empty() && param["selector"].is_null() => "<unset>".to_owned(),
            (name, _) if name.is_empty() => selector_text(&param["selector"]),
            (name, namespace) if namespace.is_empty() => format!("*/{name}"),
            (name, namespace) => format!("{namespace}/{name}"),
        };
        vec![table::name(obj), table::or(&obj["spec"]["policyName"], ""), json!(shown), table::age(obj, now)]
    }
}

fn param_ref(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (name, label, missing) = (at.get("name"), at.get("selector"), at.get("parameterNotFoundAction"));
    let both = !name.s().is_empty() && label.is_set();
    for at in [&name, &label] {
        if !at.s().is_empty() {
            e.messages(at, names::path_segment(at.s()));
        }
        selector::label_selector(e, at);
        if both {
            e.forbidden(at, "name and selector are mutually exclusive");
        }
    }
    if name.s().is_empty() && !label.is_set() {
        e.required(at, "one of name or selector must be specified");
    }
    if missing.s().is_empty() {
        e.required(&missing, "");
    } else {
        e.one_of(&missing, &["Deny", "Allow"]);
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
        }
        if seen.contains(&action.s()) {
            e.duplicate(&action, action.s());
        }
        seen.push(action.s());
    }
    if seen.contains(&"Deny") && seen.contains(&"Warn") {
        e.invalid(at, "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(check: impl Fn(&mut Errs)) -> String {
        let mut e = Errs::new();
        check(&mut e);
        e.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn parameters_in_a_row() {
        let shown = |param: Value| {
            let binding = json!({"metadata": {"name": "b"}, "spec": {"policyName": "p", "paramRef": param}});
            AdmissionPolicyBinding { mutating: false }.cells(&binding, Timestamp::UNIX_EPOCH)[2].clone()
        };
        assert_eq!(shown(Value::Null), "<unset>");
        assert_eq!(shown(json!({"name": "x"})), "*/x");
        assert_eq!(shown(json!({"name": "x", "namespace": "n"})), "n/x");
        let selector = json!({"matchLabels": {"b": "c", "a": "b"}, "matchExpressions": [{"key": "k", "operator": "In", "values": ["x", "y"]}]});
        let want = "&LabelSelector{MatchLabels:map[string]string{a: b,b: c,},MatchExpressions:[]LabelSelectorRequirement{LabelSelectorRequirement{Key:k,Operator:In,Values:[x y],},},}";
        assert_eq!(shown(json!({ "selector": selector })), want);
    }

    #[test]
    fn kinds_of_parameters() {
        for (version, kind, want) in [
            ("example.com/v1", "Foo", ""),
            ("v1", "ConfigMap", ""),
            ("", "", "p.apiVersion: Required value; p.kind: Required value"),
            ("a/b/c", "Foo", "p.apiVersion: Invalid value: \"a/b/c\": unexpected GroupVersion string: a/b/c"),
            ("a/", "Foo", "p.apiVersion: Invalid value: \"a/\": version must be specified"),
        ] {
            let kind = json!({"apiVersion": version, "kind": kind});
            assert_eq!(texts(|e| param_kind(e, &At::new(isopod_api::field::Path::new("p"), &kind))), want, "{version}");
        }
    }

    #[test]
    fn what_mutations_need() {
        let found = |operation: &str, mutation: Value| {
            let rule =
                json!({"operations": [operation], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]});
            let spec = json!({"matchConstraints": {"resourceRules": [rule]}, "mutations": [mutation]});
            let at = At::new(isopod_api::field::Path::new("s"), &spec);
            texts(|e| {
                mutated_operations(e, &at.get("matchConstraints"));
                mutations(e, &at, &Environments::new(&spec, true));
            })
        };
        let (patch, apply) = (json!({"expression": "[]"}), json!({"expression": "Object{}"}));
        let policy = "; s.reinvocationPolicy: Required value";
        for (mutation, want) in [
            (
                json!({"patchType": "JSONPatch", "jsonPatch": patch, "applyConfiguration": apply}),
                "s.mutations[0].applyConfiguration: Invalid value: \"{applyConfiguration}\": must not be specified when patchType is JSONPatch",
            ),
            (
                json!({"patchType": "ApplyConfiguration", "jsonPatch": patch}),
                "s.mutations[0].applyConfiguration: Required value: must be specified when patchType is ApplyConfiguration; s.mutations[0].jsonPatch: Invalid value: \"{jsonPatch}\": must not be specified when patchType is ApplyConfiguration",
            ),
            (
                json!({"patchType": "X", "jsonPatch": patch}),
                "s.mutations[0].patchType: Unsupported value: \"X\": supported values: \"ApplyConfiguration\", \"JSONPatch\"",
            ),
            (
                json!({"patchType": "JSONPatch", "jsonPatch": {"expression": " "}}),
                "s.mutations[0].jsonPatch.expression: Required value",
            ),
        ] {
            assert_eq!(found("UPDATE", mutation.clone()), format!("{want}{policy}"), "{mutation}");
        }
        let spec = json!({"variables": [{"name": "in", "expression": "1"}, {"name": " "}, {"name": "inn"}]});
        let names = |e: &mut Errs| {
            At::new(isopod_api::field::Path::nil(), &spec)
                .get("variables")
                .items()
                .iter()
                .for_each(|v| expressions::identifier(e, &v.get("name")))
        };
        let want = "variables[0].name: Invalid value: \"in\": must be a valid CEL identifier; variables[1].name: Required value: name is not specified";
        assert_eq!(texts(names), want);
        let deletes = "s.matchConstraints.resourceRules.operations: Unsupported value: \"DELETE\": supported values: \"*\", \"CONNECT\", \"CREATE\", \"UPDATE\"";
        let fine = json!({"patchType": "JSONPatch", "jsonPatch": patch});
        assert_eq!(found("DELETE", fine), format!("{deletes}{policy}"));
    }

    #[test]
    fn what_bindings_refer_to() {
        for (reference, want) in [
            (json!({"name": "a", "parameterNotFoundAction": "Deny"}), ""),
            (
                json!({"name": "a/b", "selector": {}, "parameterNotFoundAction": "X"}),
                "p.name: Invalid value: \"a/b\": may not contain '/'; p.name: Forbidden: name and selector are mutually exclusive; p.selector: Forbidden: name and selector are mutually exclusive; p.parameterNotFoundAction: Unsupported value: \"X\": supported values: \"Deny\", \"Allow\"",
            ),
        ] {
            let got = texts(|e| param_ref(e, &At::new(isopod_api::field::Path::new("p"), &reference)));
            assert_eq!(got, want, "{reference}");
        }
        let rules = json!({"resourceRules": [{"resourceNames": ["a", "a"], "operations": ["*"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]});
        let got = texts(|e| match_resources(e, &At::new(isopod_api::field::Path::new("m"), &rules)));
        assert_eq!(got, "m.resourceRules[0].resourceNames[1]: Duplicate value: \"a\"");
    }
}
