//! `status.typeChecking` of ValidatingAdmissionPolicies: what their expressions get wrong about the kinds they name.
//!
//! Who runs the controllers brings the function that checks, which knows expressions and types; here is only when it is
//! asked, and what becomes of its answer.

use crate::context::Context;
use isopod_client::objects::is_not_found;
use isopod_client::reflect::{Sink, Source, reflect};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

const NAME: &str = "validatingadmissionpolicy-status";
const POLICIES: &str = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// The warnings about a policy, when there are these CustomResourceDefinitions.
pub type TypeWarnings = fn(policy: &Value, definitions: &[Value]) -> Vec<Value>;

/// What is followed of a policy.
#[derive(Clone, Deserialize)]
struct Policy {
    metadata: ObjectMeta,
}

struct Changed(Arc<Queue<String>>);

impl Sink<Policy> for Changed {
    fn replace(&self, policies: Vec<Policy>) {
        policies.into_iter().for_each(|policy| self.apply(policy));
    }
    fn apply(&self, policy: Policy) {
        self.0.add(policy.metadata.name.unwrap_or_default());
    }
    fn delete(&self, _: Policy) {}
    fn revision(policy: &Policy) -> Option<String> {
        policy.metadata.resource_version.clone()
    }
}

/// Follows the policies and starts the worker.
pub(crate) fn start(ctx: &Arc<Context>, warnings: TypeWarnings) {
    let queue: Arc<Queue<String>> = Queue::new();
    let source = Source { path: POLICIES.into(), query: String::new(), metadata_only: true };
    let (client, sink, stop) = (ctx.objects.client().clone(), Changed(queue.clone()), ctx.stop.clone());
    tokio::spawn(async move { reflect::<Policy, _>(client, source, &sink, stop).await });
    let context = ctx.clone();
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |name| {
        let ctx = context.clone();
        async move { sync(&ctx, &name, warnings).await.map(|()| None) }
    });
}

/// The generation that was not looked at yet.
fn unseen(policy: &Value) -> Option<i64> {
    let generation = policy["metadata"]["generation"].as_i64()?;
    (generation > policy["status"]["observedGeneration"].as_i64().unwrap_or(0)).then_some(generation)
}

async fn sync(ctx: &Context, name: &str, warnings: TypeWarnings) -> Result<(), kube::Error> {
    let path = format!("{POLICIES}/{name}");
    let policy: Value = match ctx.objects.get_path(&path).await {
        Err(error) if is_not_found(&error) => return Ok(()),
        policy => policy?,
    };
    let Some(generation) = unseen(&policy) else { return Ok(()) };
    let definitions: Value = ctx.objects.get_path(DEFINITIONS).await?;
    let definitions = definitions["items"].as_array().map_or(&[][..], Vec::as_slice);
    let found = warnings(&policy, definitions);
    let checked = if found.is_empty() { json!({}) } else { json!({ "expressionWarnings": found }) };
    let status = json!({"status": {"observedGeneration": generation, "typeChecking": checked}});
    match ctx.objects.merge_path::<Value>(&format!("{path}/status?fieldManager={NAME}"), &status).await {
        Err(error) if is_not_found(&error) => Ok(()),
        written => written.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_generation_is_looked_at_once() {
        let policy = |generation: i64, observed: Value| json!({"metadata": {"generation": generation}, "status": {"observedGeneration": observed}});
        assert_eq!(unseen(&policy(1, Value::Null)), Some(1));
        assert_eq!(unseen(&policy(2, 1.into())), Some(2));
        assert_eq!(unseen(&policy(2, 2.into())), None);
    }
}
