//! ValidatingAdmissionPolicy: expressions that must hold.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::status::Status;
use kube_cel::cel::Value as Cel;
use serde_json::json;

use super::{
    Hooks, Invocation, Refusal,
    compiled::{Policy, Validation},
    select,
};
use crate::{
    admission::{Plugin, Request, attributes},
    cel::{self, Failure, Scope},
};

/// Longest message an expression may make.
const MESSAGE_MAX: usize = 5 * 1024;
/// Longest value of an audit annotation.
const ANNOTATION_MAX: usize = 10 * 1024;

/// The plugin.
pub(in crate::admission) struct ValidatingAdmissionPolicy {
    hooks: Hooks,
}

impl Default for ValidatingAdmissionPolicy {
    fn default() -> Self {
        Self { hooks: Hooks::new(false) }
    }
}

/// What one evaluation says against a request.
struct Objection {
    /// Which expression.
    index: usize,
    message: String,
    reason: &'static str,
}

fn objection(index: usize, message: String) -> Objection {
    Objection { index, message, reason: "" }
}

/// Runs a policy's validations.
fn validate(policy: &Policy, scope: &Scope, budget: &mut u64) -> Vec<Objection> {
    let mut out = Vec::new();
    for (index, validation) in policy.validations.iter().enumerate() {
        match validation.expression.evaluate(scope, budget) {
            Ok(Cel::Bool(true)) => {}
            Ok(_) => {
                let message = message(validation, scope, budget);
                out.push(Objection { index, message, reason: validation.reason });
            }
            Err(Failure::Error(error)) if policy.fail => out.push(objection(index, error)),
            Err(Failure::Budget) if policy.fail => return vec![objection(0, cel::EXPENSIVE.to_owned())],
            Err(Failure::Budget) => return Vec::new(),
            Err(Failure::Error(_)) => {}
        }
    }
    out
}

fn message(validation: &Validation, scope: &Scope, budget: &mut u64) -> String {
    let computed = validation.message_expression.as_ref().and_then(|m| match m.evaluate(scope, budget) {
        Ok(Cel::String(text)) => {
            let text = text.trim().to_owned();
            Some(text).filter(|t| !t.is_empty() && t.len() <= MESSAGE_MAX && !t.contains('\n'))
        }
        _ => None,
    });
    let given = Some(&validation.message).filter(|m| !m.is_empty()).cloned();
    computed.or(given).unwrap_or_else(|| format!("failed expression: {}", validation.expression.text().trim()))
}

/// Values of a policy's audit annotations, and what is wrong with them.
fn annotate(policy: &Policy, scope: &Scope, budget: &mut u64) -> (Vec<(String, String)>, Vec<String>) {
    let (mut values, mut errors) = (Vec::new(), Vec::new());
    for (key, expression) in &policy.annotations {
        match expression.evaluate(scope, budget) {
            Ok(Cel::String(text)) if text.trim().is_empty() => {}
            Ok(Cel::String(text)) => {
                let text = text.trim();
                let end = (0..=text.len().min(ANNOTATION_MAX)).rev().find(|at| text.is_char_boundary(*at));
                values.push((key.clone(), text[..end.unwrap_or_default()].to_owned()));
            }
            Ok(Cel::Null) => {}
            Ok(other) => errors.push(format!(
                "valueExpression '{}' resulted in unsupported return type: {}. Return type must be either string or null.",
                expression.text(),
                other.type_of()
            )),
            Err(Failure::Error(error)) => errors.push(error),
            Err(Failure::Budget) => errors.push(cel::EXPENSIVE.to_owned()),
        }
    }
    (values, if policy.fail { errors } else { Vec::new() })
}

impl Invocation {
    /// Evaluates; warnings and audit annotations go their way, what denies the request is returned.
    fn validate(&self, request: &mut Request<'_>) -> Result<Vec<Refusal>, Status> {
        let scope = self.scope(request)?;
        let (policy, binding) = (&self.policy, &self.binding);
        let objections = match policy.conditions.hold(&scope, policy.fail) {
            Ok(false) => return Ok(Vec::new()),
            Ok(true) => None,
            Err(error) => Some(vec![objection(0, error)]),
        };
        let mut budget = cel::BUDGET;
        let evaluated = objections.is_none();
        let objections = objections.unwrap_or_else(|| validate(policy, &scope, &mut budget));
        let refusal = |message: String, reason: &'static str| Refusal {
            policy: Arc::clone(policy),
            binding: Some(Arc::clone(binding)),
            message,
            reason: Some(reason).filter(|r| !r.is_empty()),
        };
        let mut refusals = Vec::new();
        for objection in objections {
            for action in &binding.actions {
                match action.as_str() {
                    "Deny" => refusals.push(refusal(objection.message.clone(), objection.reason)),
                    "Warn" => request.warnings.push(format!(
                        "Validation failed for ValidatingAdmissionPolicy '{}' with binding '{}': {}",
                        policy.name, binding.name, objection.message
                    )),
                    "Audit" => self.audit(request, &objection),
                    _ => {}
                }
            }
        }
        if evaluated {
            let (values, errors) = annotate(policy, &scope, &mut budget);
            for (key, value) in values {
                request.annotate(&format!("{}/{key}", policy.name), &value);
            }
            refusals.extend(errors.into_iter().map(|error| refusal(error, "")));
        }
        Ok(refusals)
    }

    fn audit(&self, request: &mut Request<'_>, objection: &Objection) {
        let failure = json!([{
            "message": objection.message,
            "policy": self.policy.name,
            "binding": self.binding.name,
            "expressionIndex": objection.index,
            "validationActions": self.binding.actions,
        }]);
        request.annotate("validation.policy.admission.k8s.io/validation_failure", &failure.to_string());
    }
}

/// The first refusal as a Status.
fn denied(request: &Request<'_>, refusal: &Refusal) -> Status {
    let policy = &refusal.policy.name;
    let message = match &refusal.binding {
        Some(binding) => format!(
            "ValidatingAdmissionPolicy '{policy}' with binding '{}' denied request: {}",
            binding.name, refusal.message
        ),
        None => format!("ValidatingAdmissionPolicy '{policy}' denied request: {}", refusal.message),
    };
    let mut status = request.forbidden(&message).cause("", message, "");
    let reason = refusal.reason.unwrap_or("Invalid");
    status.reason = reason.into();
    status.code = match reason {
        "Forbidden" => 403,
        "Unauthorized" => 401,
        "RequestEntityTooLarge" => 413,
        _ => 422,
    };
    status
}

impl ValidatingAdmissionPolicy {
    async fn run(&self, request: &mut Request<'_>) -> Result<(), Status> {
        let mut refusals = Vec::new();
        for selected in select(request, &self.hooks) {
            match selected {
                Ok(invocation) => {
                    attributes::prepare(request, &invocation.matched).await?;
                    refusals.extend(invocation.validate(request)?);
                }
                Err(refusal) if refusal.policy.fail => refusals.push(refusal),
                Err(_) => {}
            }
        }
        match refusals.first() {
            Some(first) => Err(denied(request, first)),
            None => Ok(()),
        }
    }
}

impl Plugin for ValidatingAdmissionPolicy {
    fn name(&self) -> &'static str {
        "ValidatingAdmissionPolicy"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(self.run(request))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::admission::testing::{Case, FakeObjects};

    fn policy(extra: Value) -> Value {
        let mut spec = json!({"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [{"apiGroups": [""],
            "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}]}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key.as_str()] = value.clone();
        }
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": "p"}, "spec": spec})
    }

    fn binding(extra: Value) -> Value {
        let mut spec = json!({"policyName": "p", "validationActions": ["Deny"]});
        for (key, value) in extra.as_object().unwrap() {
            spec[key.as_str()] = value.clone();
        }
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": "b"}, "spec": spec})
    }

    async fn run(spec: Value, bound: Value, data: Value) -> (Result<(), Status>, Vec<String>) {
        let objects = FakeObjects::new([
            policy(spec),
            binding(bound),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}),
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "max", "namespace": "ns",
                "labels": {"limit": "x"}}, "data": {"n": "5"}}),
        ]);
        let mut case = Case::create(json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "c", "namespace": "ns"}, "data": data}));
        let result = case.run(&ValidatingAdmissionPolicy::default(), &objects).await;
        (result, case.warnings)
    }

    async fn denial(spec: Value, bound: Value, data: Value) -> Option<(String, String, u16)> {
        let prefix = "configmaps \"c\" is forbidden: ValidatingAdmissionPolicy 'p'";
        let status = run(spec, bound, data).await.0.err()?;
        assert_eq!(status.details.as_ref().unwrap().causes.len(), 1);
        let message = status.message.strip_prefix(prefix).unwrap_or(&status.message);
        Some((message.replace(" with binding 'b' denied request: ", ""), status.reason.to_string(), status.code))
    }

    #[tokio::test]
    async fn reasons_and_messages() {
        let data = || json!({"n": "7"});
        for (validation, want) in [
            (json!({"expression": "int(object.data.n) < 9"}), None),
            (
                json!({"expression": "int(object.data.n) < 5 "}),
                Some(("failed expression: int(object.data.n) < 5", "Invalid", 422)),
            ),
            (json!({"expression": "false", "message": "no", "reason": "Forbidden"}), Some(("no", "Forbidden", 403))),
            (
                json!({"expression": "false", "message": "no", "messageExpression": "'n is ' + object.data.n",
                    "reason": "RequestEntityTooLarge"}),
                Some(("n is 7", "RequestEntityTooLarge", 413)),
            ),
            (
                json!({"expression": "false", "message": "no", "messageExpression": "object.nope"}),
                Some(("no", "Invalid", 422)),
            ),
            (
                json!({"expression": "object.data.x == 'a'"}),
                Some(("expression 'object.data.x == 'a'' resulted in error: no such key: x", "Invalid", 422)),
            ),
            (
                json!({"expression": "object.data.all(a, object.data.all(b, namespaceObject.metadata.name == 'ns' && request.operation == 'CREATE' && !has(request.subResource)))"}),
                None,
            ),
        ] {
            let want = want.map(|(m, r, c): (&str, &str, u16)| (m.to_owned(), r.to_owned(), c));
            let found = denial(json!({"validations": [validation.clone()]}), json!({}), data()).await;
            assert_eq!(found, want, "{validation}");
        }
        let ignored = json!({"failurePolicy": "Ignore", "validations": [{"expression": "object.data.x == 'a'"}]});
        assert_eq!(denial(ignored, json!({}), data()).await, None);
    }

    #[tokio::test]
    async fn params_conditions_and_actions() {
        let spec = |extra: Value| {
            let mut spec = json!({"paramKind": {"apiVersion": "v1", "kind": "ConfigMap"},
                "validations": [{"expression": "int(object.data.n) <= int(params.data.n)", "message": "too big"}]});
            for (key, value) in extra.as_object().unwrap() {
                spec[key.as_str()] = value.clone();
            }
            spec
        };
        let by = |param: Value| json!({"paramRef": param});
        let big = || json!({"n": "7"});
        let too_big = Some(("too big".to_owned(), "Invalid".to_owned(), 422));
        let named = json!({"name": "max", "parameterNotFoundAction": "Deny"});
        let selected = json!({"selector": {"matchLabels": {"limit": "x"}}, "parameterNotFoundAction": "Deny"});
        for (param, data, want) in [
            (named.clone(), big(), too_big.clone()),
            (named.clone(), json!({"n": "3"}), None),
            (selected, big(), too_big.clone()),
            (json!({"name": "nope", "parameterNotFoundAction": "Allow"}), big(), None),
            (
                json!({"name": "nope", "parameterNotFoundAction": "Deny"}),
                big(),
                Some((
                    "failed to configure binding: no params found for policy binding with `Deny` parameterNotFoundAction"
                        .to_owned(),
                    "Invalid".to_owned(),
                    422,
                )),
            ),
        ] {
            assert_eq!(denial(spec(json!({})), by(param.clone()), data).await, want, "{param}");
        }
        let unknown = spec(json!({"paramKind": {"apiVersion": "x.io/v1", "kind": "Nope"}}));
        let want = "denied request: failed to configure policy: failed to find resource referenced by paramKind: 'x.io/v1, Kind=Nope'";
        assert_eq!(denial(unknown, by(named.clone()), big()).await.unwrap().0.trim(), want);
        let skipping = spec(json!({"matchConditions": [{"name": "c", "expression": "object.metadata.name != 'c'"}]}));
        assert_eq!(denial(skipping, by(named.clone()), big()).await, None);
        let broken = spec(json!({"matchConditions": [{"name": "c", "expression": "object.data.nope == ''"}]}));
        let found = denial(broken, by(named.clone()), big()).await.unwrap().0;
        assert_eq!(found, "expression 'object.data.nope == ''' resulted in error: no such key: nope");
        let mut warn = by(named);
        warn["validationActions"] = json!(["Warn", "Audit"]);
        let (result, warnings) = run(spec(json!({})), warn, big()).await;
        assert!(result.is_ok());
        assert_eq!(warnings, ["Validation failed for ValidatingAdmissionPolicy 'p' with binding 'b': too big"]);
    }
}
