//! Label selectors.

use super::{At, Errs, meta};

/// `metav1.LabelSelector`: expressions first have their operator and values checked, then key and values.
pub(crate) fn label_selector(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    meta::labels(e, &at.get("matchLabels"));
    for expression in at.get("matchExpressions").items() {
        requirement(e, &expression);
    }
}

fn requirement(e: &mut Errs, at: &At<'_>) {
    operator(e, at, false);
    let key = at.get("key");
    meta::label_key(e, &key, key.s());
    for value in at.get("values").items() {
        e.messages(&value, isopod_api::names::label_value(value.s()));
    }
}

fn operator(e: &mut Errs, at: &At<'_>, any: bool) {
    let (operator, values) = (at.get("operator"), at.get("values"));
    match operator.s() {
        "In" | "NotIn" => {
            if values.len() == 0 {
                e.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
            }
        }
        "Exists" | "DoesNotExist" => {
            if values.len() > 0 {
                e.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
        }
        _ if any => {}
        _ => e.invalid_str(&operator, "not a valid selector operator"),
    }
}

/// The `fieldSelector` or `labelSelector` of an access review. Who asks may know operators that we do not.
pub(crate) fn reviewed(e: &mut Errs, at: &At<'_>) {
    if !at.is_set() {
        return;
    }
    let (raw, requirements) = (at.get("rawSelector"), at.get("requirements"));
    if !raw.s().is_empty() && requirements.len() > 0 {
        e.invalid(&raw, "may not specified at the same time as requirements");
    }
    if raw.s().is_empty() && requirements.len() == 0 {
        let detail = format!("when {} is specified, requirements or rawSelector is required", at.path);
        e.required(&requirements, &detail);
    }
    let labels = at.path.to_string().ends_with("labelSelector");
    for requirement in requirements.items() {
        let key = requirement.get("key");
        if !labels && key.s().is_empty() {
            e.required(&key, "must be specified");
        }
        operator(e, &requirement, true);
        if labels {
            meta::label_key(e, &key, key.s());
            for value in requirement.get("values").items() {
                e.messages(&value, isopod_api::names::label_value(value.s()));
            }
        }
    }
}

/// Whether a selector selects everything (present, without requirements).
pub(crate) fn is_empty(at: &At<'_>) -> bool {
    at.get("matchLabels").len() == 0 && at.get("matchExpressions").len() == 0
}

/// Whether a selector of the object matches labels; `None` when it does not parse.
pub(crate) fn matches(selector: &serde_json::Value, labels: &serde_json::Value) -> Option<bool> {
    let get = |key: &str| labels.get(key).and_then(serde_json::Value::as_str);
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        if get(key) != value.as_str() {
            return Some(false);
        }
    }
    for expression in selector["matchExpressions"].as_array().unwrap_or(&Vec::new()) {
        let at = At::new(isopod_api::field::Path::nil(), expression);
        let (value, values) = (get(at.get("key").s()), at.get("values").strings());
        let hit = match at.get("operator").s() {
            "In" if !values.is_empty() => value.is_some_and(|v| values.contains(&v)),
            "NotIn" if !values.is_empty() => !value.is_some_and(|v| values.contains(&v)),
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            _ => return None,
        };
        if !hit {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_by_operator() {
        let obj = json!({"s": {"matchExpressions": [{"key": "a", "operator": "In"}, {"key": "b", "operator": "X"}]}});
        let mut e = Errs::new();
        label_selector(&mut e, &At::field(&obj, "s"));
        let text: Vec<String> = e.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "s.matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'",
                "s.matchExpressions[1].operator: Invalid value: \"X\": not a valid selector operator",
            ]
        );
    }

    #[test]
    fn matching() {
        let labels = json!({"app": "a", "tier": "x"});
        for (selector, want) in [
            (json!({"matchLabels": {"app": "a"}}), Some(true)),
            (json!({"matchLabels": {"app": "b"}}), Some(false)),
            (json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["y"]}]}), Some(true)),
            (json!({"matchExpressions": [{"key": "none", "operator": "Exists"}]}), Some(false)),
            (json!({"matchExpressions": [{"key": "none", "operator": "In"}]}), None),
        ] {
            assert_eq!(matches(&selector, &labels), want, "{selector}");
        }
    }
}
