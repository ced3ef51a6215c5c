//! Policies and bindings, compiled once per revision of their objects.

use std::{collections::BTreeMap, sync::Arc};

use isopod_api::{
    gvk::{Gvk, Gvr},
    selector::LabelSelector,
};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    admission::{
        conditions::{Conditions, Expression},
        list,
        matching::Matcher,
        revisions::Revisions,
        text,
    },
    cel::{self, Type, Variable, admission::Environments},
    objects::Objects,
};

/// One validation.
pub(super) struct Validation {
    pub(super) expression: Expression,
    pub(super) message: String,
    pub(super) message_expression: Option<Expression>,
    /// `Invalid` when the policy names none.
    pub(super) reason: &'static str,
}

/// How a mutation changes the object.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patch {
    /// Server-side apply without owners.
    ApplyConfiguration,
    /// RFC 6902.
    Json,
}

/// One mutation.
pub(super) struct Mutation {
    pub(super) patch: Patch,
    pub(super) expression: Expression,
}

/// A policy.
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) matcher: Matcher,
    /// Errors refuse the request.
    pub(super) fail: bool,
    pub(super) param_kind: Option<Gvk>,
    pub(super) conditions: Conditions,
    pub(super) variables: Arc<[Variable]>,
    pub(super) validations: Vec<Validation>,
    pub(super) annotations: Vec<(String, Expression)>,
    pub(super) mutations: Vec<Mutation>,
    /// `reinvocationPolicy: IfNeeded`.
    pub(super) reinvocable: bool,
}

impl Policy {
    fn new(value: &Value, mutating: bool) -> Self {
        let spec = &value["spec"];
        let environments = Environments::new(spec, mutating);
        let expressions = &environments.expressions;
        let validation = |v: &Value| Validation {
            expression: Expression::new(expressions, text(v, "expression"), &[Type::Bool]),
            message: text(v, "message").trim().to_owned(),
            message_expression: Some(text(v, "messageExpression"))
                .filter(|m| !m.is_empty())
                .map(|m| Expression::new(&environments.messages, m, &[Type::String])),
            reason: match text(v, "reason") {
                "Forbidden" => "Forbidden",
                "Unauthorized" => "Unauthorized",
                "RequestEntityTooLarge" => "RequestEntityTooLarge",
                _ => "Invalid",
            },
        };
        let annotation = |a: &Value| {
            let wanted = [Type::String, Type::Null];
            (text(a, "key").to_owned(), Expression::new(expressions, text(a, "valueExpression"), &wanted))
        };
        let mutation = |m: &Value| match text(m, "patchType") {
            "JSONPatch" => {
                let source = text(&m["jsonPatch"], "expression");
                let expression = Expression::new(expressions, source, &[cel::list_of_patches()]);
                Mutation { patch: Patch::Json, expression }
            }
            _ => {
                let source = text(&m["applyConfiguration"], "expression");
                Mutation {
                    patch: Patch::ApplyConfiguration,
                    expression: Expression::new(expressions, source, &[cel::object()]),
                }
            }
        };
        let kind = &spec["paramKind"];
        Self {
            name: isopod_api::meta::name(value).to_owned(),
            matcher: Matcher::of_policy(&spec["matchConstraints"]),
            fail: spec["failurePolicy"] != "Ignore",
            param_kind: kind.is_object().then(|| Gvk::from_api_version(text(kind, "apiVersion"), text(kind, "kind"))),
            conditions: Conditions::new(&environments.conditions, spec),
            validations: list(spec, "validations").iter().map(validation).collect(),
            annotations: list(spec, "auditAnnotations").iter().map(annotation).collect(),
            mutations: list(spec, "mutations").iter().map(mutation).collect(),
            reinvocable: spec["reinvocationPolicy"] == "IfNeeded",
            variables: environments.variables.into(),
        }
    }
}

/// Which params a binding means.
pub(super) struct ParamRef {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) selector: Result<LabelSelector, String>,
    /// No params refuse the request.
    pub(super) deny_missing: bool,
}

/// A binding.
pub(super) struct Binding {
    pub(super) name: String,
    policy: String,
    /// Absent: whatever the policy matches.
    pub(super) matcher: Option<Matcher>,
    pub(super) param: Option<ParamRef>,
    pub(super) actions: Vec<String>,
}

impl Binding {
    fn new(value: &Value) -> Self {
        let spec = &value["spec"];
        let param = |v: &Value| ParamRef {
            name: text(v, "name").to_owned(),
            namespace: text(v, "namespace").to_owned(),
            selector: LabelSelector::from_value(v.get("selector")).map_err(|e| e.to_string()),
            deny_missing: v["parameterNotFoundAction"] == "Deny",
        };
        Self {
            name: isopod_api::meta::name(value).to_owned(),
            policy: text(spec, "policyName").to_owned(),
            matcher: spec["matchResources"].is_object().then(|| Matcher::of_policy(&spec["matchResources"])),
            param: spec.get("paramRef").filter(|v| v.is_object()).map(param),
            actions: list(spec, "validationActions").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        }
    }
}

/// A policy with its bindings.
pub(super) struct Hook {
    pub(super) policy: Arc<Policy>,
    pub(super) bindings: Vec<Arc<Binding>>,
}

#[derive(Default)]
struct State {
    /// Generations of both resources this was made from.
    seen: Option<(u64, u64)>,
    policies: Revisions<Policy>,
    bindings: Revisions<Binding>,
    hooks: Arc<Vec<Hook>>,
}

/// All policies of one kind that are bound.
pub(super) struct Hooks {
    policies: Gvr,
    bindings: Gvr,
    mutating: bool,
    state: Mutex<State>,
}

impl Hooks {
    pub(super) fn new(mutating: bool) -> Self {
        let gvr = |resource| Gvr::new("admissionregistration.k8s.io", "v1", resource);
        let (policies, bindings) = match mutating {
            true => ("mutatingadmissionpolicies", "mutatingadmissionpolicybindings"),
            false => ("validatingadmissionpolicies", "validatingadmissionpolicybindings"),
        };
        Self { policies: gvr(policies), bindings: gvr(bindings), mutating, state: Mutex::default() }
    }

    /// The bound policies as they are now, in order of their names.
    pub(super) fn current(&self, objects: &dyn Objects) -> Arc<Vec<Hook>> {
        // Read before the objects: a change in between makes the next request look again.
        let now = (objects.generation(&self.policies), objects.generation(&self.bindings));
        let mut state = self.state.lock();
        if state.seen == Some(now) {
            return Arc::clone(&state.hooks);
        }
        let state = &mut *state;
        state.policies.refresh(&objects.list(&self.policies, ""), |v| Policy::new(v, self.mutating));
        state.bindings.refresh(&objects.list(&self.bindings, ""), Binding::new);
        let mut bound: BTreeMap<&str, Vec<Arc<Binding>>> = BTreeMap::new();
        for binding in state.bindings.values() {
            bound.entry(&binding.policy).or_default().push(Arc::clone(binding));
        }
        let hook = |policy: &Arc<Policy>| {
            let bindings = bound.remove(policy.name.as_str())?;
            Some(Hook { policy: Arc::clone(policy), bindings })
        };
        state.hooks = Arc::new(state.policies.values().filter_map(hook).collect());
        state.seen = Some(now);
        Arc::clone(&state.hooks)
    }
}
