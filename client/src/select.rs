//! Label selectors, compiled once and matched often.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::collections::BTreeMap;

type Labels = BTreeMap<String, String>;

/// How one label must be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rule {
    Is(String, String),
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Absent(String),
}

/// A compiled selector; all its rules must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector {
    rules: Vec<Rule>,
    nothing: bool,
}

impl Selector {
    /// Compiles a `LabelSelector`; an empty one matches everything, an unusable one nothing.
    pub fn new(source: &LabelSelector) -> Self {
        let mut selector = Self::from_labels(source.match_labels.iter().flatten());
        for expression in source.match_expressions.iter().flatten() {
            let key = expression.key.clone();
            let values = expression.values.clone().unwrap_or_default();
            selector.rules.push(match expression.operator.as_str() {
                "In" => Rule::In(key, values),
                "NotIn" => Rule::NotIn(key, values),
                "Exists" => Rule::Exists(key),
                "DoesNotExist" => Rule::Absent(key),
                _ => return Self::nothing(),
            });
        }
        selector
    }

    /// `None` matches nothing, as in most of the API.
    pub fn optional(source: Option<&LabelSelector>) -> Self {
        source.map_or_else(Self::nothing, Self::new)
    }

    /// All of these labels.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let rules = labels.into_iter().map(|(key, value)| Rule::Is(key.clone(), value.clone())).collect();
        Self { rules, nothing: false }
    }

    /// Matches nothing.
    pub fn nothing() -> Self {
        Self { rules: Vec::new(), nothing: true }
    }

    /// Whether there is no rule (and so everything matches).
    pub fn is_everything(&self) -> bool {
        self.rules.is_empty() && !self.nothing
    }

    /// Whether these labels satisfy every rule.
    pub fn matches(&self, labels: &Labels) -> bool {
        !self.nothing && self.rules.iter().all(|rule| rule.holds(labels))
    }

    /// As [`Selector::matches`], for labels that may be absent.
    pub fn matches_optional(&self, labels: Option<&Labels>) -> bool {
        labels.map_or_else(|| self.matches(&Labels::new()), |labels| self.matches(labels))
    }
}

impl Rule {
    fn holds(&self, labels: &Labels) -> bool {
        match self {
            Rule::Is(key, value) => labels.get(key) == Some(value),
            Rule::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Rule::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Rule::Exists(key) => labels.contains_key(key),
            Rule::Absent(key) => !labels.contains_key(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;

    fn rule(key: &str, operator: &str, values: &[&str]) -> LabelSelector {
        LabelSelector {
            match_expressions: Some(vec![LabelSelectorRequirement {
                key: key.into(),
                operator: operator.into(),
                values: Some(values.iter().map(|v| (*v).to_owned()).collect()),
            }]),
            match_labels: None,
        }
    }

    #[test]
    fn table() {
        let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
        for (selector, want) in [
            (LabelSelector::default(), true),
            (rule("app", "In", &["web", "db"]), true),
            (rule("app", "In", &["db"]), false),
            (rule("app", "NotIn", &["db"]), true),
            (rule("tier", "NotIn", &["db"]), true),
            (rule("tier", "Exists", &[]), false),
            (rule("tier", "DoesNotExist", &[]), true),
            (rule("app", "Sideways", &[]), false),
        ] {
            assert_eq!(Selector::new(&selector).matches(&labels), want, "{selector:?}");
        }
        assert!(!Selector::optional(None).matches(&labels));
        assert!(Selector::new(&LabelSelector::default()).is_everything());
    }
}
