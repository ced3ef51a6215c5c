//! `x-kubernetes-validations`: CEL rules of a schema.
//!
//! Rules are compiled once per version into a tree that has only the schema's nodes with rules below them. The rules of
//! one object share a budget; those that come when it is used up are refused.

use std::collections::BTreeMap;

use isopod_api::field::{Error, ErrorList, Path};
use kube_cel::cel::Value as Cel;
use serde_json::Value;

use crate::cel::{self, Environment, Failure, Program, Scope, Type};

/// One rule.
struct Rule {
    text: String,
    program: Program,
    message: Option<String>,
    message_program: Option<Program>,
    reason: String,
    field_path: Option<String>,
    /// Uses oldSelf.
    transition: bool,
    optional_old: bool,
}

/// A schema node with rules, or with such nodes below it.
#[derive(Default)]
pub(crate) struct Rules {
    rules: Vec<Rule>,
    properties: BTreeMap<String, Rules>,
    items: Option<Box<Rules>>,
    additional: Option<Box<Rules>>,
}

/// What the rules of a schema node of a type can name.
pub(crate) fn environment(own: &Type, optional_old: bool) -> Environment {
    let old = if optional_old { Type::Optional(Box::new(own.clone())) } else { own.clone() };
    Environment::default().with("self", own.clone()).with("oldSelf", old)
}

impl Rule {
    fn compile(own: &Type, spec: &Value) -> Option<Self> {
        let text = spec["rule"].as_str()?.to_owned();
        let optional_old = spec["optionalOldSelf"] == true;
        let environment = environment(own, optional_old);
        let program = match environment.compile(&text, &[Type::Bool]) {
            Ok(program) => program,
            Err(error) => {
                tracing::warn!(rule = text, error, "a stored rule does not compile");
                return None;
            }
        };
        let own = |key: &str| spec[key].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        Some(Self {
            transition: mentions(&text, "oldSelf"),
            program,
            message: own("message").map(|m| m.trim().to_owned()),
            message_program: own("messageExpression").and_then(|m| environment.compile(&m, &[Type::String]).ok()),
            reason: own("reason").unwrap_or_default(),
            field_path: own("fieldPath"),
            optional_old,
            text,
        })
    }
}

/// Whether a rule uses an identifier.
pub(crate) fn mentions(rule: &str, name: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    rule.match_indices(name).any(|(at, _)| {
        !rule[..at].ends_with(part) && !rule[at + name.len()..].starts_with(part) && !rule[..at].ends_with('.')
    })
}

impl Rules {
    /// The tree of a schema; `None` without rules.
    pub(super) fn compile(schema: &Value) -> Option<Self> {
        Self::compile_node(schema, true)
    }

    fn compile_node(schema: &Value, root: bool) -> Option<Self> {
        let below = |schema: &Value| Self::compile_node(schema, false);
        let rules = schema["x-kubernetes-validations"].as_array().map_or(&[][..], Vec::as_slice);
        let own = if rules.is_empty() { Type::Dyn } else { Type::of_schema(schema, root) };
        let properties = schema["properties"].as_object().into_iter().flatten();
        let node = Self {
            rules: rules.iter().filter_map(|rule| Rule::compile(&own, rule)).collect(),
            properties: properties.filter_map(|(k, v)| Some((k.clone(), below(v)?))).collect(),
            items: schema.get("items").and_then(below).map(Box::new),
            additional: schema.get("additionalProperties").and_then(below).map(Box::new),
        };
        let any =
            !node.rules.is_empty() || !node.properties.is_empty() || node.items.is_some() || node.additional.is_some();
        any.then_some(node)
    }

    /// What the rules say about an object.
    pub(super) fn check(&self, schema: &Value, obj: &Value, old: Option<&Value>) -> ErrorList {
        let mut errors = ErrorList::new();
        let mut check = Check { budget: cel::BUDGET, errors: &mut errors };
        self.node(schema, obj, old, &Path::nil(), true, &mut check);
        errors
    }

    fn node(&self, schema: &Value, value: &Value, old: Option<&Value>, at: &Path, root: bool, check: &mut Check<'_>) {
        if value.is_null() || check.budget == 0 {
            return;
        }
        if !self.rules.is_empty() {
            let mut judged = Judged { schema, value, old, at, root, scope: None };
            for rule in &self.rules {
                judged.by(rule, check);
            }
        }
        match value {
            Value::Object(map) => {
                for (name, below) in &self.properties {
                    if let Some(value) = map.get(name) {
                        let old = old.and_then(|o| o.get(name));
                        below.node(&schema["properties"][name.as_str()], value, old, &at.child(name), false, check);
                    }
                }
                if let Some(below) = &self.additional {
                    for (name, value) in map {
                        let old = old.and_then(|o| o.get(name));
                        below.node(&schema["additionalProperties"], value, old, &at.key(name), false, check);
                    }
                }
            }
            Value::Array(items) => {
                let Some(below) = &self.items else { return };
                for (i, item) in items.iter().enumerate() {
                    let before = correlated(schema, item, old);
                    below.node(&schema["items"], item, before, &at.index(i), false, check);
                }
            }
            _ => {}
        }
    }
}

/// The item of the old list that is the same by its keys; only map lists tell.
fn correlated<'o>(schema: &Value, item: &Value, old: Option<&'o Value>) -> Option<&'o Value> {
    if schema["x-kubernetes-list-type"] != "map" {
        return None;
    }
    let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"].as_array()?.iter().filter_map(Value::as_str).collect();
    old?.as_array()?.iter().find(|o| keys.iter().all(|k| o.get(k) == item.get(k)))
}

/// One look at an object: what is left to spend, what was found.
struct Check<'e> {
    budget: u64,
    errors: &'e mut ErrorList,
}

/// A value under the rules of its node.
struct Judged<'v> {
    schema: &'v Value,
    value: &'v Value,
    old: Option<&'v Value>,
    at: &'v Path,
    root: bool,
    scope: Option<Scope>,
}

impl Judged<'_> {
    fn by(&mut self, rule: &Rule, check: &mut Check<'_>) {
        if rule.transition && self.old.is_none() && !rule.optional_old {
            return;
        }
        // What did not change is not judged again.
        if check.budget == 0 || !rule.transition && self.old == Some(self.value) {
            return;
        }
        let (schema, root) = (self.schema, self.root);
        let scope = self.scope.get_or_insert_with(|| {
            let mut scope = Scope::new();
            scope.set("self", cel::typed(schema, self.value, root));
            scope
        });
        if rule.transition {
            let before = self.old.map(|o| cel::typed(schema, o, root));
            let before = if rule.optional_old { cel::optional(before) } else { before.unwrap_or(Cel::Null) };
            scope.set("oldSelf", before);
        }
        let failure = match rule.program.evaluate(scope, &mut check.budget) {
            Ok(Cel::Bool(true)) => return,
            Ok(_) => None,
            Err(failure) => Some(rule.unevaluated(&failure)),
        };
        if let Some(detail) = failure {
            return check.errors.push(invalid(self.at, self.value, false, detail));
        }
        let detail = rule.detail(scope, &mut check.budget);
        let (path, moved) = match &rule.field_path {
            Some(relative) => (extend(self.at, relative), true),
            None => (self.at.clone(), false),
        };
        check.errors.push(match rule.reason.as_str() {
            "FieldValueForbidden" => Error::forbidden(&path, detail),
            "FieldValueRequired" => Error::required(&path, detail),
            "FieldValueDuplicate" => {
                let mut error = Error::duplicate(&path, self.value.clone());
                error.detail = detail;
                error
            }
            _ => invalid(&path, self.value, moved, detail),
        });
    }
}

impl Rule {
    /// Why the rule has no result.
    fn unevaluated(&self, failure: &Failure) -> String {
        let label = self.message.as_deref().unwrap_or(&self.text).trim();
        match failure {
            Failure::Budget => format!(
                "'operation cancelled: actual cost limit exceeded': no further validation rules will be run due to call cost exceeding limit for rule: {label}"
            ),
            Failure::Error(error) if error.starts_with("no such overload") => format!(
                "'{error}': call arguments did not match a supported operator, function or macro signature for rule: {label}"
            ),
            Failure::Error(error) => format!("{error} evaluating rule: {label}"),
        }
    }

    /// The message of a broken rule.
    fn detail(&self, scope: &Scope, budget: &mut u64) -> String {
        let computed = self.message_program.as_ref().and_then(|p| match p.evaluate(scope, budget) {
            Ok(Cel::String(text)) => Some(text.trim().to_owned()).filter(|t| !t.is_empty() && !t.contains('\n')),
            _ => None,
        });
        computed.or_else(|| self.message.clone()).unwrap_or_else(|| format!("failed rule: {}", self.text))
    }
}

/// Only scalars are shown.
fn invalid(path: &Path, value: &Value, moved: bool, detail: String) -> Error {
    match value {
        Value::Object(_) | Value::Array(_) => Error::invalid_without_value(path, detail),
        _ if moved => Error::invalid_without_value(path, detail),
        value => Error::invalid(path, value.clone(), detail),
    }
}

/// `.a.b['c']` below a path.
fn extend(at: &Path, relative: &str) -> Path {
    let mut path = at.clone();
    let mut rest = relative;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("['") {
            let Some((name, after)) = quoted.split_once("']") else { break };
            path = path.key(name);
            rest = after;
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            if end == 0 {
                break;
            }
            path = path.child(&rest[..end]);
            rest = &rest[end..];
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn errors(schema: &Value, new: Value, old: Option<Value>) -> Vec<String> {
        let rules = Rules::compile(schema).unwrap();
        rules.check(schema, &new, old.as_ref()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn rules_and_transitions() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "a": {"type": "integer", "x-kubernetes-validations": [{"rule": "self > 0", "message": "positive"}]},
            "im": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}]},
            "opt": {"type": "string", "x-kubernetes-validations": [
                {"rule": "oldSelf.hasValue() || self == 'first'", "optionalOldSelf": true}]},
            "max-x": {"type": "integer"}, "t": {"type": "string", "format": "date-time"}},
            "x-kubernetes-validations": [
                {"rule": "!has(self.max__dash__x) || self.a < self.max__dash__x", "message": "a too big", "fieldPath": ".a"},
                {"rule": "!has(self.t) || self.t > timestamp('2020-01-01T00:00:00Z')"}]}}});
        let at = |spec: Value| json!({"spec": spec});
        assert_eq!(errors(&schema, at(json!({"a": 0})), None), ["spec.a: Invalid value: 0: positive"]);
        assert_eq!(errors(&schema, at(json!({"a": 5, "max-x": 3})), None), ["spec.a: Invalid value: a too big"]);
        assert!(errors(&schema, at(json!({"im": "x"})), None).is_empty());
        assert_eq!(
            errors(&schema, at(json!({"im": "y"})), Some(at(json!({"im": "x"})))),
            ["spec.im: Invalid value: \"y\": failed rule: self == oldSelf"]
        );
        assert!(errors(&schema, at(json!({"a": 0})), Some(at(json!({"a": 0})))).is_empty(), "unchanged");
        assert_eq!(errors(&schema, at(json!({"opt": "z"})), None).len(), 1);
        assert!(errors(&schema, at(json!({"opt": "z"})), Some(at(json!({"opt": "first"})))).is_empty());
        assert_eq!(errors(&schema, at(json!({"t": "2019-01-01T00:00:00Z"})), None).len(), 1);
    }

    #[test]
    fn work_is_bounded() {
        let schema = json!({"type": "array", "items": {"type": "integer"},
            "x-kubernetes-validations": [{"rule": "self.all(x, self.all(y, self.all(z, true)))"}]});
        let big: Vec<i32> = (0..300).collect();
        assert!(errors(&schema, json!(big), None)[0].contains("cost"));
    }
}
