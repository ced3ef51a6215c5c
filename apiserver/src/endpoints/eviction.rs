//! `pods/eviction`: deletes a pod unless a PodDisruptionBudget forbids it now.
//!
//! A budget is charged before the pod is deleted: its status loses one allowed disruption and remembers the pod. Pods that
//! are finished, pending or going anyway need no budget; unready ones may not either.

use futures::future::BoxFuture;
use isopod_api::{
    gvk::{GroupResource, Gvr},
    meta,
    status::{Cause, Details, Status},
};
use serde_json::{Value, json};

use super::{Create, CreateRequest};
use crate::validation::selector;

/// Answers creates of evictions.
pub(crate) struct Eviction;

/// Pods a budget may remember before further evictions wait.
const MAX_DISRUPTED: usize = 2000;

fn gvr(group: &str, resource: &str) -> Gvr {
    Gvr { group: group.to_owned(), version: "v1".to_owned(), resource: resource.to_owned() }
}

impl Create for Eviction {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move { evict(request).await })
    }
}

async fn evict(request: CreateRequest<'_>) -> Result<Value, Status> {
    let body = &request.object;
    let name = request.name;
    if !meta::name(body).is_empty() && meta::name(body) != name {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    let pods = gvr("", "pods");
    let resource = GroupResource { group: String::new(), resource: "pods".to_owned() };
    let found = request.objects.get(&pods, request.namespace, name);
    let pod = found.ok_or_else(|| Status::not_found(&resource, name))?.value();
    let options = match &body["deleteOptions"] {
        Value::Null => json!({}),
        options => options.clone(),
    };
    let dry_run = request.dry_run || options["dryRun"].as_array().is_some_and(|d| !d.is_empty());
    if !ignores_budgets(&pod) {
        let budgets = matching(&request, &pod);
        match budgets.as_slice() {
            [] => {}
            [budget] if unready_may_go(&pod, budget) => {}
            [budget] => charge(&request, budget, name, dry_run).await?,
            _ => {
                return Err(Status::internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
        }
    }
    if !dry_run {
        target(&request, &pod).await?;
        request.objects.delete(&pods, request.namespace, name, options, request.user).await?;
    }
    Ok(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}))
}

fn ignores_budgets(pod: &Value) -> bool {
    matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed" | "Pending"))
        || meta::deletion_timestamp(pod).is_some()
}

/// Budgets of the namespace that select the pod. A null selector selects nothing.
fn matching(request: &CreateRequest<'_>, pod: &Value) -> Vec<Value> {
    let labels = &pod["metadata"]["labels"];
    request
        .objects
        .list(&gvr("policy", "poddisruptionbudgets"), request.namespace)
        .iter()
        .map(|o| o.value())
        .filter(|b| !b["spec"]["selector"].is_null() && selector::matches(&b["spec"]["selector"], labels) == Some(true))
        .collect()
}

/// An unready pod may go when the budget says so, or (by default) when enough others are healthy.
fn unready_may_go(pod: &Value, budget: &Value) -> bool {
    let ready = pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True");
    if ready {
        return false;
    }
    let status = &budget["status"];
    let number = |field: &str| status[field].as_i64().unwrap_or_default();
    let settled = number("observedGeneration") >= meta::generation(budget);
    let healthy = number("desiredHealthy") > 0 && number("currentHealthy") >= number("desiredHealthy");
    budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" || (settled && healthy)
}

async fn charge(request: &CreateRequest<'_>, budget: &Value, pod: &str, dry_run: bool) -> Result<(), Status> {
    let name = meta::name(budget).to_owned();
    if dry_run {
        let mut copy = budget.clone();
        return decrement(&mut copy, pod);
    }
    let resource = gvr("policy", "poddisruptionbudgets");
    let change = |budget: &mut Value| decrement(budget, pod);
    let user = crate::authn::UserInfo::system();
    request.objects.modify(&resource, request.namespace, &name, "status", &user, Box::new(change)).await.map(|_| ())
}

fn too_many(cause: String, seconds: u32) -> Status {
    let mut status =
        Status::too_many_requests("Cannot evict pod as it would violate the pod's disruption budget.", seconds);
    let cause = Cause { reason: "DisruptionBudget".to_owned(), message: cause, field: String::new() };
    let retry = status.details.take().map(|d| d.retry_after_seconds).unwrap_or_default();
    status.details = Some(Box::new(Details { causes: vec![cause], retry_after_seconds: retry, ..Details::default() }));
    status
}

/// Takes one disruption from a budget, or says why there is none.
fn decrement(budget: &mut Value, pod: &str) -> Result<(), Status> {
    let name = meta::name(budget).to_owned();
    let number = |field: &str| budget["status"][field].as_i64().unwrap_or_default();
    let (allowed, current, desired) =
        (number("disruptionsAllowed"), number("currentHealthy"), number("desiredHealthy"));
    let generation = meta::generation(budget);
    if number("observedGeneration") < generation {
        return Err(too_many(format!("The disruption budget {name} is still being processed by the server."), 10));
    }
    let resource = GroupResource { group: "policy".to_owned(), resource: "poddisruptionbudget".to_owned() };
    if allowed < 0 {
        return Err(Status::forbidden(&resource, &name, "pdb disruptions allowed is negative"));
    }
    if budget["status"]["disruptedPods"].as_object().is_some_and(|d| d.len() > MAX_DISRUPTED) {
        let message = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(Status::forbidden(&resource, &name, message));
    }
    if allowed == 0 {
        let failed = budget["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|c| c["type"] == "DisruptionAllowed" && c["status"] == "False" && c["reason"] == "SyncFailed");
        let cause = match failed {
            Some(condition) => format!(
                "The disruption budget {name} does not allow evicting pods currently because it failed sync: {}",
                condition["message"].as_str().unwrap_or_default()
            ),
            None if current <= desired => {
                format!("The disruption budget {name} needs {desired} healthy pods and has {current} currently")
            }
            None => format!("The disruption budget {name} does not allow evicting pods currently"),
        };
        return Err(too_many(cause, 0));
    }
    budget["status"]["disruptionsAllowed"] = json!(allowed - 1);
    if allowed == 1 {
        exhausted(budget, generation);
    }
    budget["status"]["disruptedPods"][pod] = json!(meta::now());
    Ok(())
}

fn exhausted(budget: &mut Value, generation: i64) {
    let condition = json!({"type": "DisruptionAllowed", "status": "False", "observedGeneration": generation,
        "lastTransitionTime": meta::now(), "reason": "InsufficientPods", "message": ""});
    if budget["status"]["conditions"].is_null() {
        budget["status"]["conditions"] = json!([]);
    }
    let Some(list) = budget["status"]["conditions"].as_array_mut() else { return };
    match list.iter_mut().find(|c| c["type"] == "DisruptionAllowed") {
        Some(found) => *found = condition,
        None => list.push(condition),
    }
}

/// The pod says why it goes.
async fn target(request: &CreateRequest<'_>, pod: &Value) -> Result<(), Status> {
    let condition = json!({"type": "DisruptionTarget", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": meta::now(), "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"});
    let change = |pod: &mut Value| {
        if pod["status"]["conditions"].is_null() {
            pod["status"]["conditions"] = json!([]);
        }
        if let Some(list) = pod["status"]["conditions"].as_array_mut() {
            list.retain(|c| c["type"] != "DisruptionTarget");
            list.push(condition.clone());
        }
        Ok(())
    };
    let user = crate::authn::UserInfo::system();
    let pods = gvr("", "pods");
    request
        .objects
        .modify(&pods, request.namespace, meta::name(pod), "status", &user, Box::new(change))
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(budget: Value) -> String {
        let mut budget = budget;
        match decrement(&mut budget, "p") {
            Ok(()) => budget["status"]["disruptionsAllowed"].to_string(),
            Err(status) => status.details.and_then(|d| d.causes.first().map(|c| c.message.clone())).unwrap_or_default(),
        }
    }

    #[test]
    fn budgets() {
        let budget = |status: Value| json!({"metadata": {"name": "b", "generation": 1}, "status": status});
        for (status, want) in [
            (json!({}), "The disruption budget b is still being processed by the server."),
            (
                json!({"observedGeneration": 1, "currentHealthy": 2, "desiredHealthy": 2}),
                "The disruption budget b needs 2 healthy pods and has 2 currently",
            ),
            (
                json!({"observedGeneration": 1, "currentHealthy": 2, "desiredHealthy": 1}),
                "The disruption budget b does not allow evicting pods currently",
            ),
            (json!({"observedGeneration": 1, "disruptionsAllowed": 2}), "1"),
        ] {
            assert_eq!(cause(budget(status)), want);
        }
    }

    #[test]
    fn the_last_disruption_sets_the_condition() {
        let mut budget = json!({"metadata": {"name": "b"}, "status": {"disruptionsAllowed": 1}});
        assert!(decrement(&mut budget, "p").is_ok());
        assert_eq!(budget["status"]["conditions"][0]["reason"], "InsufficientPods");
        assert!(budget["status"]["disruptedPods"]["p"].is_string());
    }

    #[test]
    fn unready_pods() {
        let pod = json!({"status": {"phase": "Running"}});
        let healthy = json!({"status": {"desiredHealthy": 1, "currentHealthy": 1}});
        assert!(unready_may_go(&pod, &healthy));
        assert!(!unready_may_go(&pod, &json!({"status": {"desiredHealthy": 2, "currentHealthy": 1}})));
        assert!(unready_may_go(&pod, &json!({"spec": {"unhealthyPodEvictionPolicy": "AlwaysAllow"}})));
    }
}
