//! Label selectors (`a in (x,y),!b`), `metav1.LabelSelector` values and field selectors (`spec.nodeName=n1`).
//!
//! - [`Requirements::parse`] reads a selector string, with upstream's error texts.
//! - [`LabelSelector::from_value`] reads the `matchLabels` / `matchExpressions` form.
//! - [`FieldSelector::parse`] reads a field selector.
//!
//! All of them answer `matches(&labels)` for anything that is [`Labels`].

mod fields;
mod parse;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

pub use fields::{FieldRequirement, FieldSelector};
use serde_json::{Map, Value};

use crate::{
    field::{self, Error, ErrorList, Path},
    names,
    text::quote,
};

/// A set of labels to match against.
pub trait Labels {
    /// The value of one label.
    fn get_label(&self, key: &str) -> Option<&str>;
}

impl Labels for BTreeMap<String, String> {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}
impl Labels for HashMap<String, String> {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}
impl Labels for Map<String, Value> {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }
}
impl Labels for Value {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }
}
impl<K: AsRef<str>, V: AsRef<str>> Labels for [(K, V)] {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.iter().find(|(k, _)| k.as_ref() == key).map(|(_, v)| v.as_ref())
    }
}
impl<K: AsRef<str>, V: AsRef<str>> Labels for Vec<(K, V)> {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.as_slice().get_label(key)
    }
}
impl<T: Labels + ?Sized> Labels for &T {
    fn get_label(&self, key: &str) -> Option<&str> {
        (**self).get_label(key)
    }
}
impl<T: Labels> Labels for Option<T> {
    fn get_label(&self, key: &str) -> Option<&str> {
        self.as_ref()?.get_label(key)
    }
}

/// Operators of a requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operator {
    /// `!a`.
    DoesNotExist,
    /// `a=x`.
    Equals,
    /// `a==x`.
    DoubleEquals,
    /// `a in (x)`.
    In,
    /// `a!=x`.
    NotEquals,
    /// `a notin (x)`.
    NotIn,
    /// `a`.
    Exists,
    /// `a>1`.
    Gt,
    /// `a<1`.
    Lt,
}

/// One condition on one label.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Requirement {
    /// Label key.
    pub key: String,
    /// Operator.
    pub operator: Operator,
    /// Values, sorted and distinct.
    pub values: Vec<String>,
}

/// A selector string that could not be parsed; Display is upstream's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

impl Requirement {
    /// Checks key, operator and values as upstream's `NewRequirement` does.
    pub fn new(key: &str, operator: Operator, mut values: Vec<String>, path: &Path) -> Result<Self, ErrorList> {
        values.sort();
        values.dedup();
        let mut errors = ErrorList::new();
        let invalid_key = names::qualified_name(key);
        if !invalid_key.is_empty() {
            errors.push(Error::invalid(&path.child("key"), key, invalid_key.join("; ")));
        }
        let at = path.child("values");
        let mut refuse = |detail: &str| errors.push(Error::invalid(&at, values.clone(), detail));
        match operator {
            Operator::In | Operator::NotIn if values.is_empty() => {
                refuse("for 'in', 'notin' operators, values set can't be empty");
            }
            Operator::Equals | Operator::DoubleEquals | Operator::NotEquals if values.len() != 1 => {
                refuse("exact-match compatibility requires one single value");
            }
            Operator::Exists | Operator::DoesNotExist if !values.is_empty() => {
                refuse("values set must be empty for exists and does not exist");
            }
            Operator::Gt | Operator::Lt if values.len() != 1 => {
                refuse("for 'Gt', 'Lt' operators, exactly one value is required");
            }
            Operator::Gt | Operator::Lt if values[0].parse::<i64>().is_err() => errors.push(Error::invalid(
                &at.index(0),
                &values[0],
                "for 'Gt', 'Lt' operators, the value must be an integer",
            )),
            _ => {}
        }
        for (i, value) in values.iter().enumerate() {
            let problems = names::label_value(value);
            if !problems.is_empty() {
                errors.push(Error::invalid(&at.index(i).key(key), value, problems.join("; ")));
            }
        }
        if errors.is_empty() { Ok(Self { key: key.to_owned(), operator, values }) } else { Err(errors) }
    }

    /// Whether the labels satisfy it.
    pub fn matches<L: Labels + ?Sized>(&self, labels: &L) -> bool {
        let value = labels.get_label(&self.key);
        let listed = |v: &str| self.values.iter().any(|x| x == v);
        match self.operator {
            Operator::In | Operator::Equals | Operator::DoubleEquals => value.is_some_and(listed),
            Operator::NotIn | Operator::NotEquals => !value.is_some_and(listed),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt | Operator::Lt => {
                let given = value.and_then(|v| v.parse::<i64>().ok());
                let bound = self.values.first().and_then(|v| v.parse::<i64>().ok());
                match (given, bound) {
                    (Some(given), Some(bound)) if self.operator == Operator::Gt => given > bound,
                    (Some(given), Some(bound)) => given < bound,
                    _ => false,
                }
            }
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = self.values.join(",");
        match self.operator {
            Operator::Exists => write!(f, "{}", self.key),
            Operator::DoesNotExist => write!(f, "!{}", self.key),
            Operator::Equals => write!(f, "{}={list}", self.key),
            Operator::DoubleEquals => write!(f, "{}=={list}", self.key),
            Operator::NotEquals => write!(f, "{}!={list}", self.key),
            Operator::In => write!(f, "{} in ({list})", self.key),
            Operator::NotIn => write!(f, "{} notin ({list})", self.key),
            Operator::Gt => write!(f, "{}>{list}", self.key),
            Operator::Lt => write!(f, "{}<{list}", self.key),
        }
    }
}

/// A conjunction of requirements, sorted by key; empty matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Requirements(pub Vec<Requirement>);

impl Requirements {
    /// Reads `labelSelector=`.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut requirements = parse::parse(text).map_err(ParseError)?;
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Self(requirements))
    }

    /// Whether it selects everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the labels satisfy all of it.
    pub fn matches<L: Labels + ?Sized>(&self, labels: &L) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }
}

impl fmt::Display for Requirements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.0.iter().enumerate() {
            write!(f, "{}{requirement}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// A parsed `metav1.LabelSelector`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LabelSelector {
    /// No selector: matches nothing.
    Nothing,
    /// A conjunction; an empty one matches everything.
    All(Requirements),
}

impl LabelSelector {
    /// From `{matchLabels, matchExpressions}`; `None` and `null` match nothing, `{}` everything.
    pub fn from_value(value: Option<&Value>) -> Result<Self, ParseError> {
        let Some(selector) = value.filter(|v| !v.is_null()) else { return Ok(Self::Nothing) };
        let mut out = Vec::new();
        let nil = Path::nil();
        let refused = |errors: ErrorList| ParseError(field::aggregate(&errors));
        for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
            let value = value.as_str().unwrap_or_default().to_owned();
            out.push(Requirement::new(key, Operator::In, vec![value], &nil).map_err(refused)?);
        }
        for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
            let text = |field| expression.get(field).and_then(Value::as_str).unwrap_or_default();
            let operator = match text("operator") {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(ParseError(format!("{} is not a valid label selector operator", quote(other)))),
            };
            let values = expression.get("values").and_then(Value::as_array).into_iter().flatten();
            let values = values.map(|v| v.as_str().unwrap_or_default().to_owned()).collect();
            out.push(Requirement::new(text("key"), operator, values, &nil).map_err(refused)?);
        }
        out.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Self::All(Requirements(out)))
    }

    /// From a plain map of labels (`spec.selector` of Services and ReplicationControllers); `None` matches nothing.
    pub fn from_map(value: Option<&Value>) -> Self {
        let Some(map) = value.and_then(Value::as_object) else { return Self::Nothing };
        let mut out: Vec<_> = map
            .iter()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                operator: Operator::Equals,
                values: vec![value.as_str().unwrap_or_default().to_owned()],
            })
            .collect();
        out.sort_by(|a, b| a.key.cmp(&b.key));
        Self::All(Requirements(out))
    }

    /// Whether the labels satisfy it.
    pub fn matches<L: Labels + ?Sized>(&self, labels: &L) -> bool {
        match self {
            Self::Nothing => false,
            Self::All(requirements) => requirements.matches(labels),
        }
    }

    /// Whether it selects everything.
    pub fn is_everything(&self) -> bool {
        matches!(self, Self::All(requirements) if requirements.is_empty())
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => Ok(()),
            Self::All(requirements) => requirements.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn label_selector_value() {
        let selector = LabelSelector::from_value(Some(&json!({
            "matchLabels": {"app": "x"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["db"]}, {"key": "z", "operator": "Exists"}]
        })))
        .unwrap();
        assert!(selector.matches(&json!({"app": "x", "z": ""})));
        assert!(!selector.matches(&json!({"app": "x", "z": "", "tier": "db"})));
        assert!(!selector.matches(&json!({"app": "x"})));
        assert!(!LabelSelector::from_value(None).unwrap().matches(&json!({})));
        assert!(LabelSelector::from_value(Some(&json!({}))).unwrap().matches(&json!({})));
        assert_eq!(selector.to_string(), "app in (x),tier notin (db),z");
    }

    proptest! {
        #[test]
        fn printed_form_parses_to_the_same(keys in prop::collection::btree_set("[a-z]{1,5}", 0..4),
            values in prop::collection::vec("[a-z0-9]{0,3}", 1..4), op in 0..5_usize) {
            let op = [Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist, Operator::Equals][op];
            let values = match op {
                Operator::Exists | Operator::DoesNotExist => vec![],
                Operator::Equals => values[..1].to_vec(),
                _ => values,
            };
            // "in" and "notin" are keywords only after a key.
            let all: Vec<_> = keys.iter()
                .map(|k| Requirement::new(k, op, values.clone(), &Path::nil()).unwrap()).collect();
            let selector = Requirements(all);
            prop_assert_eq!(Requirements::parse(&selector.to_string()).unwrap(), selector);
        }

        #[test]
        fn parser_never_panics(s in "[a-c=!<>(),' \\\\in/.]{0,20}") {
            let _ = Requirements::parse(&s);
            let _ = FieldSelector::parse(&s);
        }
    }
}
