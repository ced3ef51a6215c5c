//! ClusterRole aggregation: roles with an aggregation rule get the rules of the roles it selects.

use crate::context::Context;
use isopod_client::objects::{HasMeta, is_not_found};
use isopod_client::select::Selector;
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use std::sync::Arc;

const NAME: &str = "clusterrole-aggregation-controller";

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queue: Arc<Queue<String>> = Queue::new();
    let (q, c) = (queue.clone(), ctx.clone());
    ctx.caches.cluster_roles.subscribe(move |change| {
        if change.object().aggregation_rule.is_some() {
            q.add(change.object().name().to_owned());
        }
        for role in c.caches.cluster_roles.list() {
            if role.aggregation_rule.is_some() {
                q.add(role.name().to_owned());
            }
        }
    });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name).await.map(|()| None) }
    });
}

/// The rules of the selected roles, in the order of their names, each rule once.
fn aggregate(role: &ClusterRole, all: &[Arc<ClusterRole>]) -> Vec<PolicyRule> {
    let rule = role.aggregation_rule.clone().unwrap_or_default();
    let mut rules: Vec<PolicyRule> = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for selector in rule.cluster_role_selectors.iter().flatten().map(Selector::new) {
        let hit =
            |r: &&Arc<ClusterRole>| r.name() != role.name() && selector.matches_optional(r.metadata.labels.as_ref());
        for source in all.iter().filter(hit) {
            if seen.contains(&source.name()) {
                continue;
            }
            seen.push(source.name());
            for rule in source.rules.iter().flatten() {
                if !rules.contains(rule) {
                    rules.push(rule.clone());
                }
            }
        }
    }
    rules
}

async fn sync(ctx: &Context, name: &str) -> Result<(), kube::Error> {
    let Some(role) = ctx.caches.cluster_roles.get("", name).filter(|r| r.aggregation_rule.is_some()) else {
        return Ok(());
    };
    let rules = aggregate(&role, &ctx.caches.cluster_roles.list());
    if role.rules.as_deref().unwrap_or_default() == rules {
        return Ok(());
    }
    let mut new = (*role).clone();
    new.rules = Some(rules);
    match ctx.objects.update(&*role, &new, "").await {
        Err(error) if !is_not_found(&error) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn role(name: &str, label: Option<&str>, resource: &str) -> Arc<ClusterRole> {
        let labels = label.map(|l| json!({l: "true"}));
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels},
                "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]}))
            .unwrap(),
        )
    }

    #[test]
    fn selected_roles_by_name_without_duplicates() {
        let sum: ClusterRole = serde_json::from_value(json!({"metadata": {"name": "sum", "labels": {"x": "true"}},
            "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"x": "true"}}]}}))
        .unwrap();
        let all = [
            role("a", Some("x"), "pods"),
            role("b", None, "nodes"),
            role("c", Some("x"), "pods"),
            role("d", Some("x"), "secrets"),
        ];
        let resources: Vec<String> =
            aggregate(&sum, &all).into_iter().flat_map(|r| r.resources.unwrap_or_default()).collect();
        assert_eq!(resources, ["pods", "secrets"]);
    }
}
