//! `x-kubernetes-validations`: CEL rules of a schema.
//!
//! Rules are parsed once per version into a tree that has only the schema's nodes with rules below them. kube-cel has no
//! runtime cost limit, so the work a rule may do is bounded beforehand: nested macros over large values are refused.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock},
};

use isopod_api::field::{Error, ErrorList, Path};
use kube_cel::{
    KubeCelExt,
    cel::{
        Context, IdedExpr, Value as Cel,
        objects::{Key, Map, OptionalValue},
        parser::Parser,
    },
};
use serde_json::Value;

/// Elements a rule may visit: the size of its value to the power of its nested macros.
const WORK_MAX: f64 = 2_000_000.0;
/// Longest rule.
const RULE_MAX: usize = 64 * 1024;

/// Functions and constants, once.
static ROOT: LazyLock<Context<'static>> = LazyLock::new(|| Context::default().with_all());

/// One rule.
struct Rule {
    text: String,
    program: IdedExpr,
    message: Option<String>,
    message_program: Option<IdedExpr>,
    reason: String,
    field_path: Option<String>,
    /// Uses oldSelf.
    transition: bool,
    optional_old: bool,
    /// Nested macros.
    depth: i32,
}

/// A schema node with rules, or with such nodes below it.
#[derive(Default)]
pub(crate) struct Rules {
    rules: Vec<Rule>,
    properties: BTreeMap<String, Rules>,
    items: Option<Box<Rules>>,
    additional: Option<Box<Rules>>,
}

/// Parses an expression; the error is upstream's line without its position.
pub(crate) fn parse(text: &str) -> Result<IdedExpr, String> {
    if text.len() > RULE_MAX {
        return Err("expression is too long".into());
    }
    Parser::default().enable_optional_syntax(true).parse(text).map_err(|e| e.to_string())
}

impl Rule {
    fn compile(spec: &Value) -> Option<Self> {
        let text = spec["rule"].as_str()?.to_owned();
        let program = match parse(&text) {
            Ok(program) => program,
            Err(error) => {
                tracing::warn!(rule = text, error, "a stored rule does not parse");
                return None;
            }
        };
        let own = |key: &str| spec[key].as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        Some(Self {
            transition: mentions(&text, "oldSelf"),
            depth: depth(&text),
            program,
            message: own("message").map(|m| m.trim().to_owned()),
            message_program: own("messageExpression").and_then(|m| parse(&m).ok()),
            reason: own("reason").unwrap_or_default(),
            field_path: own("fieldPath"),
            optional_old: spec["optionalOldSelf"] == true,
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

/// How deep macros are nested.
fn depth(rule: &str) -> i32 {
    const MACROS: [&str; 8] =
        [".all", ".exists", ".exists_one", ".map", ".filter", ".transformMap", ".transformList", ".existsOne"];
    let (mut open, mut most, mut now) = (Vec::new(), 0, 0);
    for (at, c) in rule.char_indices() {
        match c {
            '(' => {
                let looped = MACROS.iter().any(|m| rule[..at].trim_end().ends_with(m));
                open.push(looped);
                now += i32::from(looped);
                most = most.max(now);
            }
            ')' => now -= i32::from(open.pop().unwrap_or_default()),
            _ => {}
        }
    }
    most
}

impl Rules {
    /// The tree of a schema; `None` without rules.
    pub(super) fn compile(schema: &Value) -> Option<Self> {
        let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
        let properties = schema["properties"].as_object().into_iter().flatten();
        let node = Self {
            rules: rules.filter_map(Rule::compile).collect(),
            properties: properties.filter_map(|(k, v)| Some((k.clone(), Self::compile(v)?))).collect(),
            items: schema.get("items").and_then(Self::compile).map(Box::new),
            additional: schema.get("additionalProperties").and_then(Self::compile).map(Box::new),
        };
        let any =
            !node.rules.is_empty() || !node.properties.is_empty() || node.items.is_some() || node.additional.is_some();
        any.then_some(node)
    }

    /// What the rules say about an object.
    pub(super) fn check(&self, schema: &Value, obj: &Value, old: Option<&Value>) -> ErrorList {
        let mut errors = ErrorList::new();
        self.node(schema, obj, old, &Path::nil(), true, &mut errors);
        errors
    }

    fn node(&self, schema: &Value, value: &Value, old: Option<&Value>, at: &Path, root: bool, errors: &mut ErrorList) {
        if value.is_null() {
            return;
        }
        if !self.rules.is_empty() {
            let mut seen = None;
            let size = weight(value);
            for rule in &self.rules {
                rule.check(schema, value, old, at, (root, size), &mut seen, errors);
            }
        }
        match value {
            Value::Object(map) => {
                for (name, below) in &self.properties {
                    if let Some(value) = map.get(name) {
                        let old = old.and_then(|o| o.get(name));
                        below.node(&schema["properties"][name.as_str()], value, old, &at.child(name), false, errors);
                    }
                }
                if let Some(below) = &self.additional {
                    for (name, value) in map {
                        let old = old.and_then(|o| o.get(name));
                        below.node(&schema["additionalProperties"], value, old, &at.key(name), false, errors);
                    }
                }
            }
            Value::Array(items) => {
                let Some(below) = &self.items else { return };
                for (i, item) in items.iter().enumerate() {
                    let before = correlated(schema, item, old);
                    below.node(&schema["items"], item, before, &at.index(i), false, errors);
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

/// Elements of a value at any depth.
fn weight(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(weight).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(weight).sum::<usize>(),
        Value::String(text) => 1 + text.len() / 64,
        _ => 1,
    }
}

impl Rule {
    #[allow(clippy::too_many_arguments)]
    fn check(
        &self,
        schema: &Value,
        value: &Value,
        old: Option<&Value>,
        at: &Path,
        (root, size): (bool, usize),
        seen: &mut Option<Cel>,
        errors: &mut ErrorList,
    ) {
        if self.transition && old.is_none() && !self.optional_old {
            return;
        }
        // What did not change is not judged again.
        if !self.transition && old == Some(value) {
            return;
        }
        if (size as f64).powi(self.depth) > WORK_MAX {
            let detail = "call cost exceeds limit for rule: no further validation rules will be run due to call cost exceeding limit";
            errors.push(Error::invalid_without_value(at, format!("{detail}: {}", self.text)));
            return;
        }
        let own = seen.get_or_insert_with(|| to_cel(schema, value, root)).clone();
        let mut scope = ROOT.new_inner_scope();
        scope.add_variable_from_value("self", own);
        if self.transition {
            let before = old.map(|o| to_cel(schema, o, root));
            let before = match (self.optional_old, before) {
                (true, Some(before)) => Cel::Opaque(Arc::new(OptionalValue::of(before))),
                (true, None) => Cel::Opaque(Arc::new(OptionalValue::none())),
                (false, before) => before.unwrap_or(Cel::Null),
            };
            scope.add_variable_from_value("oldSelf", before);
        }
        let verdict = match Cel::resolve(&self.program, &scope) {
            Ok(Cel::Bool(true)) => return,
            Ok(_) => None,
            Err(error) => Some(format!("rule evaluation error: {error} evaluating rule: {}", self.label())),
        };
        let failed = verdict.is_some();
        let detail = verdict.unwrap_or_else(|| self.detail(&scope));
        let (path, moved) = match self.field_path.as_deref().filter(|_| !failed) {
            Some(relative) => (extend(at, relative), true),
            None => (at.clone(), false),
        };
        errors.push(match self.reason.as_str() {
            _ if failed => invalid(&path, value, moved, detail),
            "FieldValueForbidden" => Error::forbidden(&path, detail),
            "FieldValueRequired" => Error::required(&path, detail),
            "FieldValueDuplicate" => {
                let mut error = Error::duplicate(&path, value.clone());
                error.detail = detail;
                error
            }
            _ => invalid(&path, value, moved, detail),
        });
    }

    fn label(&self) -> &str {
        self.message.as_deref().unwrap_or(&self.text)
    }

    /// The message of a broken rule.
    fn detail(&self, scope: &Context<'_>) -> String {
        let computed = self.message_program.as_ref().and_then(|p| match Cel::resolve(p, scope) {
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

const RESERVED: [&str; 20] = [
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
];

/// A property's name as rules write it.
fn escape(name: &str) -> String {
    if RESERVED.contains(&name) || name == "while" {
        return format!("__{name}__");
    }
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        match c {
            '_' if rest.starts_with("__") => {
                out.push_str("__underscores__");
                rest = &rest[2..];
                continue;
            }
            '.' => out.push_str("__dot__"),
            '-' => out.push_str("__dash__"),
            '/' => out.push_str("__slash__"),
            c => out.push(c),
        }
        rest = &rest[c.len_utf8()..];
    }
    out
}

static TIMESTAMP: LazyLock<Option<IdedExpr>> = LazyLock::new(|| parse("timestamp(self)").ok());
static DURATION: LazyLock<Option<IdedExpr>> = LazyLock::new(|| parse("duration(self)").ok());

fn converted(program: Option<&IdedExpr>, text: &str) -> Option<Cel> {
    let mut scope = ROOT.new_inner_scope();
    scope.add_variable_from_value("self", Cel::String(Arc::new(text.to_owned())));
    Cel::resolve(program?, &scope).ok()
}

/// A value as rules of its schema see it: only declared fields, formats as their types.
fn to_cel(schema: &Value, value: &Value, resource: bool) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(b) => Cel::Bool(*b),
        Value::Number(n) => match (schema["type"].as_str(), n.as_i64()) {
            (Some("number"), _) | (_, None) => Cel::Float(n.as_f64().unwrap_or_default()),
            (_, Some(i)) => Cel::Int(i),
        },
        Value::String(text) => {
            let program = match schema["format"].as_str() {
                Some("date-time") => TIMESTAMP.as_ref(),
                Some("duration") => DURATION.as_ref(),
                Some("byte") => {
                    use base64::{Engine as _, engine::general_purpose::STANDARD};
                    return STANDARD
                        .decode(text)
                        .map_or_else(|_| Cel::String(Arc::new(text.clone())), |b| Cel::Bytes(Arc::new(b)));
                }
                Some("date") => {
                    let full = format!("{text}T00:00:00Z");
                    return converted(TIMESTAMP.as_ref(), &full).unwrap_or_else(|| Cel::String(Arc::new(text.clone())));
                }
                _ => None,
            };
            program.and_then(|p| converted(Some(p), text)).unwrap_or_else(|| Cel::String(Arc::new(text.clone())))
        }
        Value::Array(items) => {
            let schema = &schema["items"];
            Cel::List(Arc::new(items.iter().map(|i| to_cel(schema, i, false)).collect()))
        }
        Value::Object(map) => {
            let known = schema["properties"].as_object();
            let rest = schema.get("additionalProperties").filter(|v| v.is_object());
            let embedded = resource || schema["x-kubernetes-embedded-resource"] == true;
            let mut out = HashMap::with_capacity(map.len());
            let mut put = |name: String, value: Cel| drop(out.insert(Key::String(Arc::new(name)), value));
            for (name, value) in map {
                match known.and_then(|k| k.get(name)) {
                    Some(schema) if !(embedded && name == "metadata") => {
                        put(escape(name), to_cel(schema, value, false))
                    }
                    _ if embedded && matches!(name.as_str(), "apiVersion" | "kind") => {
                        put(name.clone(), to_cel(&Value::Null, value, false));
                    }
                    _ if embedded && name == "metadata" => {
                        let mut seen = serde_json::Map::new();
                        for field in ["name", "generateName"] {
                            if let Some(text) = value.get(field) {
                                seen.insert(field.to_owned(), text.clone());
                            }
                        }
                        put(name.clone(), to_cel(&Value::Null, &Value::Object(seen), false));
                    }
                    _ => {
                        if let Some(schema) = rest {
                            put(name.clone(), to_cel(schema, value, false));
                        } else if schema.is_null() {
                            put(name.clone(), to_cel(&Value::Null, value, false));
                        }
                    }
                }
            }
            Cel::Map(Map { map: Arc::new(out) })
        }
    }
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
        assert_eq!(depth("self.all(x, self.exists(y, x == y)) && self.all(z, z > (1))"), 2);
        let schema = json!({"type": "array", "items": {"type": "integer"},
            "x-kubernetes-validations": [{"rule": "self.all(x, self.all(y, self.all(z, true)))"}]});
        let big: Vec<i32> = (0..1000).collect();
        assert!(errors(&schema, json!(big), None)[0].contains("cost"));
    }
}
