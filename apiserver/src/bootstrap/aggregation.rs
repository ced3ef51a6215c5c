//! Fills the rules of aggregated cluster roles (`admin`, `edit`, `view`) from the roles their selectors choose.

use std::collections::BTreeMap;

use isopod_api::{selector::LabelSelector, status::Status};
use serde_json::Value;

use super::modify;
use crate::{authz::rbac::gvr, objects::Objects};

/// Writes every aggregated role whose rules are not what they should be.
pub(super) async fn reconcile(objects: &dyn Objects) -> Result<(), Status> {
    let gvr = gvr("clusterroles");
    // Roles select aggregated roles in turn: each round carries rules one step further.
    for _ in 0..4 {
        let roles: Vec<Value> = objects.list(&gvr, "").iter().map(|role| role.value()).collect();
        let changes: Vec<(&str, Value)> = roles.iter().filter_map(|role| changed(role, &roles)).collect();
        if changes.is_empty() {
            return Ok(());
        }
        for (name, rules) in changes {
            modify(objects, &gvr, "", name, |role| role["rules"] = rules.clone()).await?;
        }
    }
    Ok(())
}

/// The name and new rules of an aggregated role that has to change.
fn changed<'a>(role: &'a Value, roles: &[Value]) -> Option<(&'a str, Value)> {
    let selectors = role["aggregationRule"]["clusterRoleSelectors"].as_array()?;
    let selectors: Vec<_> = selectors.iter().filter_map(|s| LabelSelector::from_value(Some(s)).ok()).collect();
    let name = isopod_api::meta::name(role);
    let mut rules: Vec<Value> = Vec::new();
    for other in roles.iter().filter(|other| isopod_api::meta::name(other) != name) {
        let labels: BTreeMap<String, String> = isopod_api::meta::labels_owned(other);
        if !selectors.iter().any(|selector| selector.matches(&labels)) {
            continue;
        }
        for rule in other["rules"].as_array().into_iter().flatten() {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    let current = role["rules"].as_array().map_or(&[][..], Vec::as_slice);
    (current != rules).then_some((name, Value::Array(rules)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selected_rules_are_collected_once() {
        let rule = json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]});
        let part = |name: &str| json!({"metadata": {"name": name, "labels": {"to": "view"}}, "rules": [rule]});
        let view = json!({"metadata": {"name": "view"}, "rules": null,
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"to": "view"}}]}});
        let roles = [part("a"), part("b"), view.clone()];
        assert_eq!(changed(&view, &roles), Some(("view", json!([rule]))));
        let mut done = view.clone();
        done["rules"] = json!([rule]);
        assert_eq!(changed(&done, &roles), None);
        assert_eq!(changed(&view, std::slice::from_ref(&view)), None, "nothing selected is no rules, however written");
    }
}
