//! Label and field selectors against a matcher that knows only what each operator means.

use std::collections::BTreeMap;

use isopod_api::selector::{FieldSelector, LabelSelector, Requirements};
use proptest::prelude::*;
use serde_json::{Value, json};

type Labels = BTreeMap<String, String>;

/// One requirement of a label selector.
#[derive(Debug, Clone)]
struct Term {
    key: String,
    operator: &'static str,
    values: Vec<String>,
}

impl Term {
    fn holds(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let number = || value.and_then(|v| v.parse::<i64>().ok());
        match self.operator {
            "" => value.is_some(),
            "!" => value.is_none(),
            "=" | "==" | "in" => value.is_some_and(|v| self.values.contains(v)),
            "!=" | "notin" => value.is_none_or(|v| !self.values.contains(v)),
            ">" => number().is_some_and(|n| n > self.values[0].parse().unwrap()),
            "<" => number().is_some_and(|n| n < self.values[0].parse().unwrap()),
            other => panic!("{other}"),
        }
    }

    /// As people write it, with blanks here and there.
    fn text(&self, blank: &str) -> String {
        let Self { key, operator, values } = self;
        match *operator {
            "" => format!("{blank}{key}{blank}"),
            "!" => format!("{blank}!{blank}{key}"),
            "in" | "notin" => format!("{key} {operator}{blank}({blank}{})", values.join(&format!("{blank},{blank}"))),
            _ => format!("{key}{blank}{operator}{blank}{}", values[0]),
        }
    }
}

fn key() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "tier", "in", "notin", "x.io/a", "A_b.c-d"]).prop_map(str::to_owned)
}

fn value() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "x", "y", "7", "10", "0", "a.b_c-D"]).prop_map(str::to_owned)
}

fn term() -> impl Strategy<Value = Term> {
    let operators = vec!["", "!", "=", "==", "!=", "in", "notin", ">", "<"];
    (key(), prop::sample::select(operators), prop::collection::btree_set(value(), 1..4), 0..20_i64).prop_map(
        |(key, operator, values, number)| {
            let mut values: Vec<String> = values.into_iter().collect();
            match operator {
                "" | "!" => values.clear(),
                ">" | "<" => values = vec![number.to_string()],
                "in" | "notin" => {}
                _ => values.truncate(1),
            }
            Term { key, operator, values }
        },
    )
}

fn labels() -> impl Strategy<Value = Labels> {
    prop::collection::btree_map(key(), value(), 0..5)
}

/// The same requirements as a LabelSelector object; `None` when it has no words for one of them.
fn object(terms: &[Term]) -> Option<Value> {
    let mut expressions = Vec::new();
    for term in terms {
        let operator = match term.operator {
            "" => "Exists",
            "!" => "DoesNotExist",
            "=" | "==" | "in" => "In",
            "!=" | "notin" => "NotIn",
            _ => return None,
        };
        expressions.push(json!({"key": term.key, "operator": operator, "values": term.values}));
    }
    Some(json!({"matchExpressions": expressions}))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn labels_are_selected(terms in prop::collection::vec(term(), 0..4), all in prop::collection::vec(labels(), 1..6),
        blank in prop::sample::select(vec!["", " ", "  \t"])) {
        // A bare "in" or "notin" is a key only where no operator can stand.
        let text = terms.iter().map(|t| t.text(blank)).collect::<Vec<_>>().join(",");
        let parsed = Requirements::parse(&text);
        let parsed = parsed.unwrap_or_else(|e| panic!("{text:?}: {e}"));
        let printed = parsed.to_string();
        let again = Requirements::parse(&printed).unwrap();
        prop_assert_eq!(&again, &parsed, "{} -> {}", text, printed);
        let object = object(&terms).map(|object| LabelSelector::from_value(Some(&object)).unwrap());
        for labels in &all {
            let want = terms.iter().all(|term| term.holds(labels));
            let value: Value = labels.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect();
            prop_assert_eq!(parsed.matches(&value), want, "{} on {:?}", text, labels);
            if let Some(object) = &object {
                prop_assert_eq!(object.matches(&value), want, "{:?} on {:?}", object, labels);
            }
        }
    }

    #[test]
    fn fields_are_selected(terms in prop::collection::vec(("[a-c]\\.[a-c]", any::<bool>(), "[x=,\\\\!a ]{0,4}"), 0..4),
        objects in prop::collection::vec(prop::collection::btree_map("[a-c]\\.[a-c]", "[x=,\\\\!a ]{0,2}", 0..6), 1..5)) {
        let escape = |value: &str| value.chars().fold(String::new(), |mut out, c| {
            if matches!(c, '\\' | ',' | '=') {
                out.push('\\');
            }
            out.push(c);
            out
        });
        let text = |(field, equal, value): &(String, bool, String)| {
            format!("{field}{}{}", if *equal { "=" } else { "!=" }, escape(value))
        };
        let text = terms.iter().map(text).collect::<Vec<_>>().join(",");
        let parsed = FieldSelector::parse(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        prop_assert_eq!(parsed.to_string(), text.as_str());
        for object in &objects {
            let want = terms.iter().all(|(field, equal, value)| {
                (object.get(field).map_or("", String::as_str) == value) == *equal
            });
            let got = parsed.matches_with(|field| object.get(field).cloned().unwrap_or_default());
            prop_assert_eq!(got, want, "{} on {:?}", text, object);
        }
    }
}
