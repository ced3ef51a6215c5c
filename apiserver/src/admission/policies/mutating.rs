//! MutatingAdmissionPolicy: expressions that say how an object is changed.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    apply, meta,
    patch::{self, PatchFailure},
    status::{Cause, Status},
};
use serde_json::Value;

use super::{
    Hooks, Invocation, Refusal,
    compiled::{Mutation, Patch},
    select,
};
use crate::{
    admission::{Plugin, Request, attributes},
    cel::{self, Failure, Scope},
};

/// The plugin.
pub(in crate::admission) struct MutatingAdmissionPolicy {
    hooks: Hooks,
}

impl Default for MutatingAdmissionPolicy {
    fn default() -> Self {
        Self { hooks: Hooks::new(true) }
    }
}

/// Why a mutation does not happen.
enum Failed {
    /// It counts by the failure policy.
    Policy(String),
    /// The request ends here.
    Request(Status),
}

impl Mutation {
    /// The value of the expression.
    fn evaluate(&self, scope: &Scope, budget: &mut u64) -> Result<Value, Failed> {
        match (self.expression.evaluate(scope, budget), self.expression.mismatch()) {
            (Ok(_), Some(mismatch)) => Err(Failed::Policy(format!("type mismatch: {mismatch}"))),
            (Ok(value), None) => cel::json(&value).map_err(Failed::Policy),
            (Err(Failure::Error(error)), _) => Err(Failed::Policy(error)),
            (Err(Failure::Budget), _) => Err(Failed::Policy(cel::EXPENSIVE.to_owned())),
        }
    }
}

impl Invocation {
    /// The object after one mutation, in the matched version.
    fn mutated(&self, request: &Request<'_>, mutation: &Mutation, budget: &mut u64) -> Result<Value, Failed> {
        let gvk = &self.matched.gvk;
        let scope = self.scope(request).map_err(Failed::Request)?;
        let mut found = mutation.evaluate(&scope, budget)?;
        let mut shown = request.shape.show(request.object, gvk).map_err(Failed::Request)?;
        match mutation.patch {
            Patch::Json => {
                let operations = found.as_array_mut().map(std::mem::take).unwrap_or_default();
                match patch::apply_operations(&mut shown, operations) {
                    Ok(()) => Ok(shown),
                    // A test that fails is not an error: the patch is just not meant.
                    Err(PatchFailure::Test) => request.shape.show(request.object, gvk).map_err(Failed::Request),
                    Err(PatchFailure::Operation(error)) => Err(Failed::Policy(format!("JSONPath: {error}"))),
                }
            }
            Patch::ApplyConfiguration => {
                let definition = request.shape.definition(gvk).ok_or_else(|| {
                    Failed::Request(Status::service_unavailable(format!("Resource kind {gvk} not found. There can be a delay between when CustomResourceDefinitions are created and when they are available.")))
                })?;
                found["kind"] = gvk.kind.as_str().into();
                found["apiVersion"] = gvk.api_version().into();
                apply::merge_unowned(definition, &shown, &found)
                    .map_err(|error| Failed::Policy(format!("error applying patch: {error}")))
            }
        }
    }

    /// Who is asked again, when it comes to that.
    fn key(&self) -> String {
        let param = self.param.as_deref().map(|p| (meta::namespace(p), meta::name(p)));
        format!("{}/{}/{param:?}", self.policy.name, self.binding.name)
    }

    async fn run(&self, request: &mut Request<'_>) -> Result<Vec<Refusal>, Status> {
        attributes::prepare(request, &self.matched).await?;
        let refusal = |message: String| Refusal {
            policy: Arc::clone(&self.policy),
            binding: Some(Arc::clone(&self.binding)),
            message,
            reason: Some("Invalid"),
        };
        let holds = self.policy.conditions.hold(&self.scope(request)?, true);
        match holds {
            Ok(true) => {}
            Ok(false) => return Ok(Vec::new()),
            Err(error) => return Ok(vec![refusal(error)]),
        }
        let again = request.reinvocation.again;
        let key = self.key();
        if !request.reinvocation.policies.asks(again, &key) || request.object.is_null() {
            return Ok(Vec::new());
        }
        let mut refusals = Vec::new();
        let mut budget = cel::BUDGET;
        let before = request.object.clone();
        for mutation in &self.policy.mutations {
            // The one before has made another object of it.
            attributes::prepare(request, &self.matched).await?;
            match self.mutated(request, mutation, &mut budget) {
                Ok(shown) => *request.object = request.shape.take(shown, request.object).await?,
                Err(Failed::Policy(error)) => refusals.push(refusal(error)),
                Err(Failed::Request(status)) => return Err(status),
            }
        }
        if *request.object != before {
            request.reinvocation.policies.changed();
            request.reinvocation.needed = true;
        }
        if self.policy.reinvocable {
            request.reinvocation.policies.asked(key);
        }
        Ok(refusals)
    }
}

/// All refusals as a Status.
fn denied(request: &Request<'_>, refusals: &[Refusal]) -> Status {
    let mut status = request.forbidden("admission request denied by policy");
    let message = |refusal: &Refusal| match &refusal.binding {
        Some(binding) => format!(
            "policy '{}' with binding '{}' denied request: {}",
            refusal.policy.name, binding.name, refusal.message
        ),
        None => format!("policy '{}' denied request: {}", refusal.policy.name, refusal.message),
    };
    if let Some(first) = refusals.first() {
        status.message = message(first);
        if let Some(reason) = first.reason {
            status.reason = reason.into();
        }
    }
    if let Some(details) = &mut status.details {
        details.causes.extend(refusals.iter().map(|r| Cause { message: message(r), ..Cause::default() }));
    }
    status
}

impl MutatingAdmissionPolicy {
    async fn run(&self, request: &mut Request<'_>) -> Result<(), Status> {
        let selected = select(request, &self.hooks);
        if selected.is_empty() {
            return Ok(());
        }
        let again = request.reinvocation.again;
        request.reinvocation.policies.start(again, request.object);
        let mut refusals = Vec::new();
        for selected in selected {
            match selected {
                Ok(invocation) => {
                    let fail = invocation.policy.fail;
                    refusals.extend(invocation.run(request).await?.into_iter().filter(|_| fail));
                }
                Err(refusal) if refusal.policy.fail => refusals.push(refusal),
                Err(_) => {}
            }
        }
        request.reinvocation.policies.end(request.object);
        if refusals.is_empty() { Ok(()) } else { Err(denied(request, &refusals)) }
    }
}

impl Plugin for MutatingAdmissionPolicy {
    fn name(&self) -> &'static str {
        "MutatingAdmissionPolicy"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(self.run(request))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{FakeObjects, admit};

    async fn run(mutations: Value, extra: Value) -> Result<Value, Status> {
        let mut spec = json!({"failurePolicy": "Fail", "reinvocationPolicy": "Never", "mutations": mutations,
            "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"],
                "operations": ["CREATE"], "resources": ["pods"]}]}});
        for (key, value) in extra.as_object().unwrap() {
            spec[key.as_str()] = value.clone();
        }
        let objects = FakeObjects::new([
            json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy",
                "metadata": {"name": "p"}, "spec": spec}),
            json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding",
                "metadata": {"name": "b"}, "spec": {"policyName": "p"}}),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}}),
        ]);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": "ns",
            "labels": {"a": "1"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
        admit(&MutatingAdmissionPolicy::default(), &objects, pod).await
    }

    fn apply(expression: &str) -> Value {
        json!({"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": expression}})
    }

    fn json_patch(expression: &str) -> Value {
        json!({"patchType": "JSONPatch", "jsonPatch": {"expression": expression}})
    }

    #[tokio::test]
    async fn mutations_in_order() {
        let sidecar = "Object{spec: Object.spec{containers: [Object.spec.containers{name: 'side', image: 's'}]}}";
        let label = "[JSONPatch{op: 'add', path: '/metadata/labels/n', value: string(size(object.spec.containers))}]";
        let pod = run(json!([apply(sidecar), json_patch(label)]), json!({})).await.unwrap();
        assert_eq!(pod["spec"]["containers"].as_array().unwrap().len(), 2);
        assert_eq!(pod["metadata"]["labels"], json!({"a": "1", "n": "2"}));
        let unless = "[JSONPatch{op: 'add', path: '/metadata/labels/b', value: 'x'}, JSONPatch{op: 'test', path: '/metadata/labels/a', value: '2'}]";
        let pod = run(json!([json_patch(unless)]), json!({})).await.unwrap();
        assert_eq!(pod["metadata"]["labels"], json!({"a": "1"}), "a failed test takes everything back");
    }

    #[tokio::test]
    async fn refusals() {
        let atomic =
            apply("Object{spec: Object.spec{containers: [Object.spec.containers{name: 'c', command: ['x']}]}}");
        let status = run(json!([atomic.clone()]), json!({})).await.unwrap_err();
        let want = "policy 'p' with binding 'b' denied request: error applying patch: invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: .spec.containers[0].command";
        assert_eq!((status.message.as_str(), status.code, status.reason.to_string()), (want, 403, "Invalid".into()));
        assert!(run(json!([atomic]), json!({"failurePolicy": "Ignore"})).await.is_ok());
        let status = run(json!([json_patch("[JSONPatch{op: 'remove', path: '/spec/nope'}]")]), json!({})).await;
        assert!(status.unwrap_err().message.contains("JSONPath: "));
        for (mutation, name, wanted) in [
            (apply("Object{spec: Object.specx{hostname: 'h'}}"), "Object.specx", "Object.spec"),
            (
                apply(
                    "Object{spec: Object.spec{containers: object.spec.containers.map(c, Object.spec.container{name: c.name})}}",
                ),
                "Object.spec.container",
                "Object.spec.containers",
            ),
            (
                json_patch("[JSONPatch{op: 'add', path: '/spec/x', value: Object.spec.x{a: [Object.spec.x.b{}]}}]"),
                "Object.spec.x.b",
                "Object.spec.x.a",
            ),
        ] {
            let message = run(json!([mutation]), json!({})).await.unwrap_err().message;
            let want = format!(
                "policy 'p' with binding 'b' denied request: type mismatch: unexpected type name \"{name}\", expected \"{wanted}\", which matches field name path from root Object type"
            );
            assert_eq!(message, want);
        }
        let skipped = json!({"matchConditions": [{"name": "n", "expression": "object.metadata.name == 'y'"}]});
        let pod = run(json!([apply("Object{metadata: Object.metadata{labels: {'z': 'z'}}}")]), skipped).await.unwrap();
        assert_eq!(pod["metadata"]["labels"], json!({"a": "1"}));
    }
}
