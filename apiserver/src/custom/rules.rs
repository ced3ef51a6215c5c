//! `x-kubernetes-validations`: CEL rules of a schema.
//!
//! Rules are compiled once per version into a tree that has only the schema's nodes with rules below them. The rules of
//! one object share a budget; when it is used up the object is refused. A rule broken by a value that has not changed is a
//! warning.

use std::collections::BTreeMap;

use isopod_api::{
    field::{Error, ErrorList, ErrorType, Path},
    text::quote,
};
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
    pub(super) fn check(&self, schema: &Value, obj: &Value, old: Option<&Value>) -> Verdict {
        let mut check = Check { budget: cel::BUDGET, over: false, verdict: Verdict::default() };
        let place = Place { schema, value: obj, old, above: None, at: &Path::nil(), root: true };
        self.node(&place, &mut check);
        check.verdict
    }

    fn node(&self, place: &Place<'_>, check: &mut Check) {
        if place.value.is_null() || check.over {
            return;
        }
        if !self.rules.is_empty() {
            self.judge(place, check);
        }
        let below = |schema, value, old, at: Path, rules: &Self, check: &mut Check| {
            rules.node(&Place { schema, value, old, above: Some(place), at: &at, root: false }, check);
        };
        match place.value {
            Value::Object(map) => {
                for (name, rules) in &self.properties {
                    if let Some(value) = map.get(name) {
                        let old = place.old.and_then(|o| o.get(name));
                        let schema = &place.schema["properties"][name.as_str()];
                        below(schema, value, old, place.at.child(name), rules, check);
                    }
                }
                if let Some(rules) = &self.additional {
                    for (name, value) in map {
                        let old = place.old.and_then(|o| o.get(name));
                        below(&place.schema["additionalProperties"], value, old, place.at.key(name), rules, check);
                    }
                }
            }
            Value::Array(items) => {
                let Some(rules) = &self.items else { return };
                for (i, item) in items.iter().enumerate() {
                    let before = correlated(place.schema, item, place.old);
                    below(&place.schema["items"], item, before, place.at.index(i), rules, check);
                }
            }
            _ => {}
        }
    }

    /// The rules of one node about its value.
    fn judge(&self, place: &Place<'_>, check: &mut Check) {
        if check.budget == 0 {
            return check.stop(place.untyped(place.at, cel::EXPENSIVE));
        }
        let mut scope = Scope::new();
        scope.set("self", cel::typed(place.schema, place.value, place.root));
        for rule in &self.rules {
            if !check.over {
                rule.judge(place, &mut scope, check);
            }
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

/// The longest message an expression may make.
const MESSAGE_MAX: usize = 5 * 1024;

/// What the rules say about an object.
#[derive(Default)]
pub(super) struct Verdict {
    /// What is wrong with it.
    pub(super) errors: ErrorList,
    /// What is wrong with values that have been there before: they are warned of.
    pub(super) warnings: Vec<String>,
}

/// One look at an object: what is left to spend, what was found.
struct Check {
    budget: u64,
    /// No rule is looked at any more.
    over: bool,
    verdict: Verdict,
}

impl Check {
    fn stop(&mut self, error: Error) {
        self.verdict.errors.push(error);
        self.over = true;
    }
}

/// A value under the rules of its node.
struct Place<'v> {
    schema: &'v Value,
    value: &'v Value,
    /// What it was, when that can be told.
    old: Option<&'v Value>,
    above: Option<&'v Place<'v>>,
    at: &'v Path,
    root: bool,
}

impl Place<'_> {
    /// Whether it has been like this before; what has no past of its own is judged by what it is part of.
    fn unchanged(&self) -> bool {
        match (self.old, self.above) {
            (Some(old), _) => old == self.value,
            (None, Some(above)) => above.unchanged(),
            (None, None) => false,
        }
    }

    /// An error that shows the type in place of the value, as those of the evaluation do.
    fn untyped(&self, path: &Path, detail: impl Into<String>) -> Error {
        Error::invalid(path, self.schema["type"].as_str().unwrap_or_default(), detail)
    }

    /// An error that shows a scalar.
    fn invalid(&self, path: &Path, detail: String) -> Error {
        match self.value {
            Value::Object(_) | Value::Array(_) => Error::invalid_without_value(path, detail),
            value => Error::invalid(path, value.clone(), detail),
        }
    }
}

impl Rule {
    fn judge(&self, place: &Place<'_>, scope: &mut Scope, check: &mut Check) {
        if self.transition {
            if place.old.is_none() && !self.optional_old {
                return;
            }
            let before = place.old.map(|o| cel::typed(place.schema, o, place.root));
            let before = if self.optional_old { cel::optional(before) } else { before.unwrap_or(Cel::Null) };
            scope.set("oldSelf", before);
        }
        match self.program.evaluate(scope, &mut check.budget) {
            Ok(Cel::Bool(true)) => return,
            Ok(_) => {}
            Err(Failure::Budget) => return check.stop(place.untyped(place.at, cel::EXPENSIVE)),
            Err(Failure::Error(error)) => {
                let over = error.starts_with(cel::OVER);
                check.verdict.errors.push(place.untyped(place.at, self.unevaluated(&error)));
                check.over |= over;
                return;
            }
        }
        let path = self.field_path.as_deref().map_or_else(|| place.at.clone(), |relative| extend(place.at, relative));
        let error = match self.detail(scope, &mut check.budget) {
            Ok(detail) => self.broken(place, &path, detail),
            Err(detail) => {
                check.over = true;
                place.untyped(&path, detail)
            }
        };
        if !self.transition && place.unchanged() {
            check.verdict.warnings.push(error.to_string());
        } else {
            check.verdict.errors.push(error);
        }
    }

    fn broken(&self, place: &Place<'_>, path: &Path, detail: String) -> Error {
        match self.reason.as_str() {
            "FieldValueForbidden" => Error::forbidden(path, detail),
            "FieldValueRequired" => Error::required(path, detail),
            "FieldValueDuplicate" => {
                let mut error = place.invalid(path, String::new());
                error.kind = ErrorType::Duplicate;
                error
            }
            _ => place.invalid(path, detail),
        }
    }

    /// Why the rule has no result.
    fn unevaluated(&self, error: &str) -> String {
        let label = self.message.as_deref().unwrap_or(&self.text).trim();
        if error.starts_with("no such overload") {
            return format!(
                "'{error}': call arguments did not match a supported operator, function or macro signature for rule: {label}"
            );
        }
        if error.starts_with(cel::OVER) {
            return format!(
                "'{error}': no further validation rules will be run due to call cost exceeds limit for rule: {label}"
            );
        }
        format!("{error} evaluating rule: {label}")
    }

    /// The message of a broken rule; the error says why there is nothing left for others.
    fn detail(&self, scope: &Scope, budget: &mut u64) -> Result<String, String> {
        let given = || self.message.clone().unwrap_or_else(|| format!("failed rule: {}", self.text.trim()));
        let Some(program) = &self.message_program else { return Ok(given()) };
        Ok(match program.evaluate(scope, budget) {
            Ok(Cel::String(text)) => {
                let text = text.trim();
                let fits = !text.is_empty() && text.len() <= MESSAGE_MAX && !text.contains('\n');
                if fits { text.to_owned() } else { given() }
            }
            Err(Failure::Budget) => {
                return Err("messageExpression evaluation failed due to running out of cost budget, no further validation rules will be run".into());
            }
            Err(Failure::Error(error)) if error.starts_with(cel::OVER) => {
                return Err(format!(
                    "no further validation rules will be run due to call cost exceeds limit for messageExpression: {}",
                    quote(&program.text)
                ));
            }
            _ => given(),
        })
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
        rules.check(schema, &new, old.as_ref()).errors.iter().map(ToString::to_string).collect()
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
        let label = "self.all(x, self.all(y, self.all(z, true)))";
        let want = format!(
            "<nil>: Invalid value: \"array\": '{}': no further validation rules will be run due to call cost exceeds limit for rule: {label}",
            cel::OVER
        );
        assert_eq!(errors(&schema, json!(big), None), [want]);

        // 12 values at some 900,000 each are more than all rules of an object may cost.
        let item = json!({"type": "array", "items": {"type": "integer"},
            "x-kubernetes-validations": [{"rule": "self.all(x, self.all(y, x + y >= 0))"}]});
        let schema = json!({"type": "object", "properties": {"l": {"type": "array", "items": item}}});
        let row: Vec<i32> = (0..340).collect();
        let found = errors(&schema, json!({"l": vec![row; 20]}), None);
        assert_eq!(found.len(), 1);
        assert!(found[0].ends_with(&format!("]: Invalid value: \"array\": {}", cel::EXPENSIVE)), "{found:?}");
    }

    #[test]
    fn what_was_wrong_before_is_a_warning() {
        let rule = |rule: &str| json!([{"rule": rule, "message": "no"}]);
        let schema = json!({"type": "object", "properties": {
            "a": {"type": "integer", "x-kubernetes-validations": rule("self > 0")},
            "l": {"type": "array", "items": {"type": "string", "x-kubernetes-validations": rule("self != 'x'")}},
            "m": {"type": "object", "x-kubernetes-validations": rule("self.k == 'v'"), "additionalProperties": {"type": "string"}}}});
        let verdict = |new: Value, old: Value| {
            let verdict = Rules::compile(&schema).unwrap().check(&schema, &new, Some(&old));
            let errors: Vec<String> = verdict.errors.iter().map(ToString::to_string).collect();
            (errors, verdict.warnings)
        };
        let text = |text: &str| vec![text.to_owned()];
        let bad = "a: Invalid value: 0: no";
        assert_eq!(verdict(json!({"a": 0}), json!({"a": 0})), (vec![], text(bad)));
        assert_eq!(verdict(json!({"a": 0}), json!({"a": -1})), (text(bad), vec![]));
        let item = "l[0]: Invalid value: \"x\": no";
        assert_eq!(verdict(json!({"l": ["x"], "a": 1}), json!({"l": ["x"]})), (vec![], text(item)));
        assert_eq!(verdict(json!({"l": ["x", "y"]}), json!({"l": ["x"]})), (text(item), vec![]));
        // What cannot be told is an error, changed or not.
        let failed = text("m: Invalid value: \"object\": no such key: k evaluating rule: no");
        assert_eq!(verdict(json!({"m": {}}), json!({"m": {}})), (failed, vec![]));
    }
}
