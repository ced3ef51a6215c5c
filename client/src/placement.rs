//! What decides on which nodes a pod may be: node selectors, compiled, and tolerations.

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration};
use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

/// One expression of a node selector.
#[derive(Clone, Debug)]
pub struct NodeRule {
    key: String,
    operator: Operator,
    values: Vec<String>,
    number: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    Absent,
    Greater,
    Less,
    Unknown,
}

impl NodeRule {
    fn new(source: &NodeSelectorRequirement) -> Self {
        let values = source.values.clone().unwrap_or_default();
        let operator = match source.operator.as_str() {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::Absent,
            "Gt" => Operator::Greater,
            "Lt" => Operator::Less,
            _ => Operator::Unknown,
        };
        let number = values.first().and_then(|v| v.parse().ok());
        Self { key: source.key.clone(), operator, values, number }
    }

    fn holds(&self, actual: Option<&str>) -> bool {
        let among = |value: &str| self.values.iter().any(|v| v == value);
        match self.operator {
            Operator::In => actual.is_some_and(among),
            Operator::NotIn => !actual.is_some_and(among),
            Operator::Exists => actual.is_some(),
            Operator::Absent => actual.is_none(),
            Operator::Greater | Operator::Less => match (actual.and_then(|v| v.parse::<i64>().ok()), self.number) {
                (Some(a), Some(b)) => (a > b) == (self.operator == Operator::Greater) && a != b,
                _ => false,
            },
            Operator::Unknown => false,
        }
    }
}

/// One alternative of a node selector.
#[derive(Clone, Debug)]
pub struct NodeTerm {
    labels: Vec<NodeRule>,
    fields: Vec<NodeRule>,
}

impl NodeTerm {
    /// Compiles a term.
    pub fn new(source: &NodeSelectorTerm) -> Self {
        let rules = |list: &Option<Vec<NodeSelectorRequirement>>| list.iter().flatten().map(NodeRule::new).collect();
        Self { labels: rules(&source.match_expressions), fields: rules(&source.match_fields) }
    }

    /// An empty term matches nothing.
    pub fn matches(&self, name: &str, labels: &Labels) -> bool {
        if self.labels.is_empty() && self.fields.is_empty() {
            return false;
        }
        self.labels.iter().all(|rule| rule.holds(labels.get(&rule.key).map(String::as_str)))
            && self.fields.iter().all(|rule| rule.key == "metadata.name" && rule.holds(Some(name)))
    }

    /// The nodes this term names, when it names any.
    pub fn names(&self) -> Option<&[String]> {
        let rule = self.fields.iter().find(|r| r.key == "metadata.name" && r.operator == Operator::In)?;
        Some(&rule.values)
    }
}

/// Compiles the alternatives of a node selector.
pub fn node_terms(selector: &NodeSelector) -> Vec<NodeTerm> {
    selector.node_selector_terms.iter().map(NodeTerm::new).collect()
}

/// Whether a toleration covers a taint.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
                && !key.is_empty()
        }
        _ => false,
    }
}
