//! `matchConditions` of webhooks and policies.

use kube_cel::cel::Value as Cel;
use serde_json::Value;

use super::{list, text};
use crate::cel::{self, Environment, Failure, Program, Scope, Type};

/// An expression that may not compile.
pub(super) struct Expression(pub(super) Result<Program, (String, String)>);

impl Expression {
    /// Compiles a text.
    pub(super) fn new(environment: &Environment, text: &str, wanted: &[Type]) -> Self {
        Self(environment.compile(text, wanted).map_err(|error| (text.to_owned(), error)))
    }

    /// As it was written.
    pub(super) fn text(&self) -> &str {
        match &self.0 {
            Ok(program) => &program.text,
            Err((text, _)) => text,
        }
    }

    /// What a mutation gets wrong about the names of its messages.
    pub(super) fn mismatch(&self) -> Option<&str> {
        self.0.as_ref().ok()?.mismatch.as_deref()
    }

    /// The result, or upstream's words for why there is none.
    pub(super) fn evaluate(&self, scope: &Scope, budget: &mut u64) -> Result<Cel, Failure> {
        match &self.0 {
            Err((_, error)) => Err(Failure::Error(format!("compilation error: {error}"))),
            Ok(program) => program.evaluate(scope, budget).map_err(|failure| match failure {
                Failure::Error(error) => {
                    Failure::Error(format!("expression '{}' resulted in error: {error}", program.text))
                }
                Failure::Budget => Failure::Budget,
            }),
        }
    }
}

/// All conditions of one webhook or policy.
pub(super) struct Conditions(Vec<Expression>);

impl Conditions {
    /// Of a webhook or a policy's spec.
    pub(super) fn new(environment: &Environment, value: &Value) -> Self {
        let compile = |c: &Value| Expression::new(environment, text(c, "expression"), &[Type::Bool]);
        Self(list(value, "matchConditions").iter().map(compile).collect())
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of them hold. One that is false decides, whatever the others say; errors count by the failure policy.
    pub(super) fn hold(&self, scope: &Scope, fail: bool) -> Result<bool, String> {
        let mut budget = cel::CONDITIONS_BUDGET;
        let mut errors = Vec::new();
        for condition in &self.0 {
            match condition.evaluate(scope, &mut budget) {
                Ok(Cel::Bool(false)) => return Ok(false),
                Ok(_) => {}
                Err(Failure::Error(error)) => errors.push(error),
                Err(Failure::Budget) => {
                    errors = vec![cel::EXPENSIVE.to_owned()];
                    break;
                }
            }
        }
        match errors.as_slice() {
            [] => Ok(true),
            _ if !fail => Ok(false),
            [one] => Err(one.clone()),
            many => Err(format!("[{}]", many.join(", "))),
        }
    }
}
