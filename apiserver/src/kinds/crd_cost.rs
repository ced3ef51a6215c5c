//! What the rules of a CustomResourceDefinition may cost by their estimates: each, and all of a schema together.

use isopod_api::field::{Error, Path};
use serde_json::Value;

use crate::validation::{At, Errs};

/// The most one expression may cost.
const RULE_MAX: u64 = 10_000_000;
/// The most all of a schema may cost.
const TOTAL_MAX: u64 = 100_000_000;
/// How many of the most expensive ones are named.
const NAMED: usize = 4;

/// The costs of one schema.
pub(super) struct Costs {
    unchanged: bool,
    total: u64,
    /// Those that matter, the most expensive first.
    expensive: Vec<(u64, Path)>,
}

impl Costs {
    /// None yet. What was accepted before may cost too much, but not all together.
    pub(super) fn new(unchanged: bool) -> Self {
        Self { unchanged, total: 0, expensive: Vec::new() }
    }

    /// Counts one expression.
    pub(super) fn add(&mut self, e: &mut Errs, path: &Path, what: &str, cost: u64) {
        if cost > RULE_MAX && !self.unchanged {
            e.0.push(Error::forbidden(path, exceeded(&format!("estimated {what} cost"), cost, RULE_MAX)));
        }
        self.total = self.total.saturating_add(cost);
        if cost >= TOTAL_MAX / 100 {
            let at = self.expensive.partition_point(|(other, _)| *other >= cost);
            self.expensive.insert(at, (cost, path.clone()));
            self.expensive.truncate(NAMED);
        }
    }

    /// Says whether they are too expensive together.
    pub(super) fn finish(self, e: &mut Errs, schema: &At<'_>) {
        if self.total <= TOTAL_MAX {
            return;
        }
        for (_, path) in &self.expensive {
            let contributed =
                "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema";
            e.0.push(Error::forbidden(path, contributed));
        }
        let what = "x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema";
        e.forbidden(schema, &exceeded(what, self.total, TOTAL_MAX));
    }
}

fn exceeded(what: &str, cost: u64, limit: u64) -> String {
    let factor = match cost as f64 / limit as f64 {
        factor if factor > 100.0 => "more than 100x".to_owned(),
        factor if factor < 1.5 => format!("{factor:.6}x"),
        factor => format!("{factor:.1}x"),
    };
    format!(
        "{what} exceeds budget by factor of {factor} (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)"
    )
}

/// How often what is inside a schema can be in one object.
pub(super) fn multiplied(cardinality: Option<u64>, schema: &Value) -> Option<u64> {
    let limit = |name: &str| Some(schema.get(name)?.as_i64()?.max(0).unsigned_abs());
    let times = match schema["type"].as_str() {
        Some("object") if schema.get("additionalProperties").is_some() => limit("maxProperties")?,
        Some("array") => limit("maxItems")?,
        _ => 1,
    };
    Some(cardinality?.saturating_mul(times))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn messages(schema: &Value, unchanged: bool) -> Vec<String> {
        let mut e = Errs::new();
        super::super::crd_schema::check(&mut e, &At::new(Path::new("s"), schema), false, unchanged);
        e.0.iter().map(ToString::to_string).collect()
    }

    fn rule(rule: &str, mut schema: Value) -> Value {
        schema["x-kubernetes-validations"] = json!([{ "rule": rule }]);
        json!({"type": "object", "properties": {"tags": schema}})
    }

    fn tags(max_length: Option<u64>, max_items: Option<u64>) -> Value {
        let mut schema = json!({"type": "array", "items": {"type": "string"}});
        if let Some(length) = max_length {
            schema["items"]["maxLength"] = length.into();
        }
        if let Some(items) = max_items {
            schema["maxItems"] = items.into();
        }
        rule("self.all(x, x.contains('gpu'))", schema)
    }

    /// Measured with upstream's validator.
    #[test]
    fn the_largest_accepted_lists() {
        for (length, items) in [(16, 909_090), (63, 333_333), (253, 94_339), (1024, 24_154)] {
            assert_eq!(messages(&tags(Some(length), Some(items)), false), [""; 0], "{length}");
            let refused = messages(&tags(Some(length), Some(items + 1)), false);
            assert!(
                refused[0].starts_with("s.properties[tags].x-kubernetes-validations[0].rule: Forbidden: estimated rule cost exceeds budget by factor of 1.0000"),
                "{refused:?}"
            );
            assert_eq!(refused.len(), 1, "{length}");
            assert_eq!(messages(&tags(Some(length), Some(items + 1)), true), [""; 0], "it was there before");
        }
    }

    #[test]
    fn without_limits() {
        let try_simpler = "exceeds budget by factor of more than 100x (try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared)";
        let path = "s.properties[tags].x-kubernetes-validations[0].rule: Forbidden:";
        assert_eq!(
            messages(&tags(None, None), false),
            [
                format!("{path} estimated rule cost {try_simpler}"),
                format!(
                    "{path} contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema"
                ),
                format!(
                    "s: Forbidden: x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema {try_simpler}"
                ),
            ]
        );
        let numbers = json!({"type": "array", "items": {"type": "integer"}});
        assert_eq!(messages(&rule("self.all(x, x == 5)", numbers.clone()), false), [""; 0]);
        let nested = json!({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}});
        assert_eq!(messages(&rule("self.all(y, y.all(x, x == 5))", nested), false).len(), 3);
        // A cheap rule that may run a million times.
        let mut items = json!({"type": "array", "items": {"type": "string"}});
        items["items"]["x-kubernetes-validations"] =
            json!([{"rule": "self != 'a' && self != 'b' && self != 'c' && self != 'd' && self != 'e'"}]);
        let many = messages(&json!({"type": "object", "properties": {"l": items.clone()}}), false);
        assert!(many[0].contains("estimated rule cost exceeds budget by factor of 1.048576x"), "{many:?}");
        items["maxItems"] = 10.into();
        assert_eq!(messages(&json!({"type": "object", "properties": {"l": items}}), false), [""; 0]);
    }

    #[test]
    fn messages_of_rules_count() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "x-kubernetes-validations":
            [{"rule": "self.a > 1", "messageExpression": "'a is ' + string(self.a)"}]});
        let found = messages(&schema, false);
        assert!(found[0].starts_with("s.x-kubernetes-validations[0].messageExpression: Forbidden: estimated messageExpression cost exceeds budget by factor of more than 100x"), "{found:?}");
        assert_eq!(found.len(), 3, "{found:?}");
    }
}
