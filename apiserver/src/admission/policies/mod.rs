//! ValidatingAdmissionPolicy and MutatingAdmissionPolicy: policies, bindings, params.
//!
//! [`Hooks`] keeps the policies compiled, each until its object changes. [`select`] finds for one request which policies
//! apply through which bindings with which params; [`validating`] and [`mutating`] run them.

mod compiled;
mod mutating;
mod params;
mod typecheck;
mod validating;

use std::sync::Arc;

use isopod_api::status::Status;
use serde_json::Value;

use super::{Request, attributes, matching, matching::Matched};
use compiled::{Binding, Hooks, Policy};

pub(super) use mutating::MutatingAdmissionPolicy;
pub use typecheck::type_warnings;
pub(super) use validating::ValidatingAdmissionPolicy;

/// A policy that applies to a request.
struct Invocation {
    policy: Arc<Policy>,
    binding: Arc<Binding>,
    matched: Matched,
    param: Option<Arc<Value>>,
}

/// A policy that cannot be asked or said no.
struct Refusal {
    policy: Arc<Policy>,
    binding: Option<Arc<Binding>>,
    message: String,
    reason: Option<&'static str>,
}

/// The policies that apply to a request, and those that would but cannot.
fn select(request: &Request<'_>, hooks: &Hooks) -> Vec<Result<Invocation, Refusal>> {
    let mut out = Vec::new();
    if matching::exempt(request) || matching::review(request) {
        return out;
    }
    for hook in hooks.current(request.objects).iter() {
        let policy = &hook.policy;
        let refuse = |binding: Option<&Arc<Binding>>, error: &str| {
            let what = if binding.is_some() { "binding" } else { "policy" };
            let message = format!("failed to configure {what}: {error}");
            Refusal { policy: Arc::clone(policy), binding: binding.cloned(), message, reason: None }
        };
        let matched = match policy.matcher.matches(request) {
            Ok(Some(matched)) => matched,
            Ok(None) => continue,
            Err(status) => {
                out.push(Err(refuse(None, &status.message)));
                continue;
            }
        };
        let kind = match params::kind(request.objects, policy) {
            Ok(kind) => kind,
            Err(error) => {
                out.push(Err(refuse(None, &error)));
                continue;
            }
        };
        for binding in &hook.bindings {
            let applies = match &binding.matcher {
                Some(matcher) => matcher.matches(request).map_err(|status| status.message),
                None => Ok(Some(matched.clone())),
            };
            let params = match applies {
                Ok(Some(_)) => params::collect(request, kind.as_ref(), binding),
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            match params {
                Ok(params) => out.extend(params.into_iter().map(|param| {
                    let (policy, binding) = (Arc::clone(policy), Arc::clone(binding));
                    Ok(Invocation { policy, binding, matched: matched.clone(), param })
                })),
                Err(error) => out.push(Err(refuse(Some(binding), &error))),
            }
        }
    }
    out
}

impl Invocation {
    /// The values of an evaluation.
    fn scope(&self, request: &Request<'_>) -> Result<crate::cel::Scope, Status> {
        let namespace = attributes::namespace(request)?;
        let mut scope = attributes::scope(request, &self.matched, self.param.as_deref(), &namespace)?;
        scope.set_variables(&self.policy.variables);
        Ok(scope)
    }
}
