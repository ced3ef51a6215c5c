//! CEL: one way to compile and evaluate expressions for admission policies, webhooks and the rules of custom resources.
//!
//! An [`Environment`] says which variables there are. [`Environment::compile`] parses, checks types and lowers an
//! expression into a [`Program`]; its errors are upstream's texts. A [`Scope`] holds the values of one evaluation. What runs
//! is paid for in upstream's units; who shares a budget that is used up ends with [`Failure::Budget`]. No I/O, no clock.

pub(crate) mod admission;
mod authorizer;
mod check;
mod convert;
mod cost;
mod functions;
mod lazy;
mod lex;
mod lower;
mod names;
mod parse;
mod signatures;
mod sizes;
mod types;

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use kube_cel::cel::{Context, IdedExpr, ResolveResult, Value as Cel, objects::OptionalValue};

pub(crate) use authorizer::{authorizer, request_resource};
pub(crate) use convert::{escape, json, typed, untyped};
pub(crate) use lazy::Variable;
pub(crate) use sizes::{Place, cardinality};
pub(crate) use types::Type;

pub(crate) use functions::OVER;
use functions::{ROOT, explain, spend, with_budget};
use parse::Issue;

/// The variable that holds variables.
const VARIABLES: &str = "variables";
/// What the expressions of one policy, or the rules of one object, may cost together.
pub(crate) const BUDGET: u64 = 10_000_000;
/// The same for the match conditions of one policy or webhook.
pub(crate) const CONDITIONS_BUDGET: u64 = BUDGET / 4;
/// What is said when a budget is used up.
pub(crate) const EXPENSIVE: &str =
    "validation failed due to running out of cost budget, no further validation rules will be run";
/// What one expression may cost.
const CALL_LIMIT: u64 = BUDGET / 10;

/// What expressions can name.
#[derive(Clone, Default)]
pub(crate) struct Environment {
    variables: HashMap<String, Type>,
    mutation: bool,
}

impl Environment {
    /// With one more variable.
    pub(crate) fn with(mut self, name: &str, found: Type) -> Self {
        self.variables.insert(name.to_owned(), found);
        self
    }

    /// With the messages of mutations: `Object{...}` and `JSONPatch{...}`.
    pub(crate) fn with_mutations(mut self) -> Self {
        self.mutation = true;
        self
    }

    /// With one more of `variables`.
    pub(crate) fn with_member(mut self, name: &str, found: Type) -> Self {
        let mut fields = match self.variables.get(VARIABLES) {
            Some(Type::Object(object)) => object.fields.clone().unwrap_or_default(),
            _ => Default::default(),
        };
        fields.insert(name.to_owned(), found);
        let object = types::Object { name: "kubernetes.variables".into(), fields: Some(fields) };
        self.variables.insert(VARIABLES.into(), Type::Object(Arc::new(object)));
        self
    }

    fn lazy(&self) -> bool {
        self.variables.contains_key(VARIABLES)
    }

    fn variable(&self, name: &str) -> Option<Type> {
        self.variables.get(name).cloned()
    }

    fn message(&self, name: &str) -> Option<Type> {
        if !self.mutation {
            return None;
        }
        match name {
            "JSONPatch" => Some(json_patch()),
            "Object" => Some(object()),
            name if name.starts_with("Object.") => {
                Some(Type::Object(Arc::new(types::Object { name: name.to_owned(), fields: None })))
            }
            _ => None,
        }
    }

    /// What an expression over the values of a place can cost at most; [`Self::compile`]'s errors.
    pub(crate) fn cost(&self, text: &str, wanted: &[Type], own: Place<'_>) -> Result<u64, String> {
        let (parsed, checked) = self.checked(text, wanted)?;
        Ok(cost::estimate(&parsed.root, &checked, own))
    }

    /// Compiles an expression that must have one of the types `wanted`. The error is upstream's.
    pub(crate) fn compile(&self, text: &str, wanted: &[Type]) -> Result<Program, String> {
        let (parsed, checked) = self.checked(text, wanted)?;
        let mismatch = self.mutation.then(|| names::mismatches(&parsed.root)).flatten();
        let cost = lower::own_cost(&parsed.root);
        let expr = lower::lower(self, parsed.root);
        Ok(Program { text: text.to_owned(), expr, cost, output: checked.output, mismatch })
    }

    fn checked(&self, text: &str, wanted: &[Type]) -> Result<(parse::Parsed, check::Checked), String> {
        let failed = |issues: &[Issue]| format!("compilation failed: {}", shown(text, issues));
        let parsed = parse::parse(text).map_err(|issues| failed(&issues))?;
        let checked = check::check(self, &parsed).map_err(|issues| failed(&issues))?;
        let output = &checked.output;
        let patches = || wanted[0] == list_of_patches() && open_list(output);
        if !(wanted.is_empty() || wanted.contains(output) || patches()) {
            let names: Vec<String> = wanted.iter().map(ToString::to_string).collect();
            return Err(match names.as_slice() {
                [one] => format!("must evaluate to {one} but got {output}"),
                many => format!("must evaluate to one of [{}] but got {output}", many.join(" ")),
            });
        }
        Ok((parsed, checked))
    }
}

/// `Object`.
pub(crate) fn object() -> Type {
    Type::Object(Arc::new(types::Object { name: "Object".into(), fields: None }))
}

fn json_patch() -> Type {
    let text = || Type::String;
    Type::object("JSONPatch", [("op", text()), ("path", text()), ("from", text()), ("value", Type::Dyn)])
}

/// `list(JSONPatch)`.
pub(crate) fn list_of_patches() -> Type {
    Type::list(json_patch())
}

/// `[]` fits every list.
fn open_list(found: &Type) -> bool {
    matches!(found, Type::List(item) if matches!(**item, Type::Param(_)))
}

/// Issues as upstream prints them.
fn shown(text: &str, issues: &[Issue]) -> String {
    let mut out = String::new();
    for issue in issues {
        let at = (0..=issue.at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        let start = text[..at].rfind('\n').map_or(0, |n| n + 1);
        let line = text[start..].split('\n').next().unwrap_or_default();
        let number = text[..start].matches('\n').count() + 1;
        let column = text[start..at].chars().count();
        let separator = if out.is_empty() { "" } else { "\n" };
        let dots = ".".repeat(column);
        let _ =
            write!(out, "{separator}ERROR: <input>:{number}:{}: {}\n | {line}\n | {dots}^", column + 1, issue.message);
    }
    out
}

/// A compiled expression.
pub(crate) struct Program {
    /// As it was written.
    pub(crate) text: String,
    /// Its type.
    pub(crate) output: Type,
    /// Messages of a mutation that are not where their names say.
    pub(crate) mismatch: Option<String>,
    expr: IdedExpr,
    /// Of what runs once.
    cost: u64,
}

/// Why there is no result.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The evaluation failed: upstream's words.
    Error(String),
    /// Nothing is left to pay for it.
    Budget,
}

impl Program {
    /// The result in a scope. `budget` is shared by the expressions of one object and goes down.
    pub(crate) fn evaluate(&self, scope: &Scope, budget: &mut u64) -> Result<Cel, Failure> {
        let limit = CALL_LIMIT.min(*budget);
        let (result, left) = with_budget(limit, || self.resolve(&scope.context));
        *budget -= limit - left.unwrap_or(0);
        match (left, result) {
            (None, _) if limit < CALL_LIMIT => Err(Failure::Budget),
            (None, _) => Err(Failure::Error(OVER.to_owned())),
            (_, Ok(value)) => Ok(value),
            (_, Err(error)) => Err(Failure::Error(explain(&error))),
        }
    }

    /// Runs it at the cost of whoever runs.
    fn resolve(&self, context: &Context<'_>) -> ResolveResult {
        spend(self.cost)?;
        Cel::resolve(&self.expr, context)
    }
}

/// The values of one evaluation.
pub(crate) struct Scope {
    context: Context<'static>,
}

impl Scope {
    /// No variables.
    pub(crate) fn new() -> Self {
        Self { context: ROOT.new_inner_scope() }
    }

    /// Sets a variable.
    pub(crate) fn set(&mut self, name: &str, value: Cel) {
        self.context.add_variable_from_value(name, value);
    }

    /// Sets `variables`.
    pub(crate) fn set_variables(&mut self, variables: &Arc<[Variable]>) {
        self.set(lazy::SLOT, Cel::Opaque(Arc::new(lazy::Lazy::new(Arc::clone(variables)))));
    }
}

/// An optional value.
pub(crate) fn optional(value: Option<Cel>) -> Cel {
    Cel::Opaque(Arc::new(value.map_or_else(OptionalValue::none, OptionalValue::of)))
}

#[cfg(test)]
mod tests;
