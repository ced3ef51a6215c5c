//! MutatingAdmissionWebhook: webhooks are asked one after the other, each sees what those before it made.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    patch::{self, PatchFailure},
    status::Status,
};
use serde_json::Value;

use super::{Matched, Verdict, Webhooks, configured::Webhook};
use crate::admission::{Plugin, Request, matching};

/// The plugin.
pub(in crate::admission) struct MutatingAdmissionWebhook(pub(in crate::admission) Arc<Webhooks>);

impl MutatingAdmissionWebhook {
    async fn run(&self, request: &mut Request<'_>) -> Result<(), Status> {
        let webhooks = self.0.mutating.current(request.objects);
        if webhooks.is_empty() || matching::exempt(request) {
            return Ok(());
        }
        let again = request.reinvocation.again;
        request.reinvocation.webhooks.start(again, request.object);
        for webhook in webhooks.iter() {
            let Some(matched) = webhook.wants(request).await? else { continue };
            if !request.reinvocation.webhooks.asks(again, &webhook.key) {
                continue;
            }
            let outcome = self.0.call(webhook, &matched, request).await;
            request.warnings.extend(outcome.warnings);
            match outcome.verdict {
                Ok(Verdict::Allowed(operations)) => {
                    if change(webhook, &matched, request, operations).await? {
                        request.reinvocation.webhooks.changed();
                        request.reinvocation.needed = true;
                    }
                }
                Ok(Verdict::Denied(status)) => return Err(status),
                Err(failure) => webhook.failed(failure)?,
            }
            if webhook.reinvocable {
                request.reinvocation.webhooks.asked(webhook.key.clone());
            }
        }
        request.reinvocation.webhooks.end(request.object);
        Ok(())
    }
}

/// Applies a webhook's patch; whether the object is another one then.
async fn change(
    webhook: &Webhook,
    matched: &Matched,
    request: &mut Request<'_>,
    operations: Vec<Value>,
) -> Result<bool, Status> {
    if operations.is_empty() {
        return Ok(false);
    }
    if request.object.is_null() {
        return Err(Status::internal(format!(
            "admission webhook \"{}\" attempted to modify the object, which is not supported for this operation",
            webhook.name
        )));
    }
    let mut shown = request.shape.show(request.object, &matched.gvk)?;
    patch::apply_operations(&mut shown, operations).map_err(|failure| match failure {
        PatchFailure::Test => Status::internal("testing value failed: test failed"),
        PatchFailure::Operation(error) => Status::internal(error),
    })?;
    let taken = request.shape.take(shown, request.object).await?;
    let changed = taken != *request.object;
    *request.object = taken;
    Ok(changed)
}

impl Plugin for MutatingAdmissionWebhook {
    fn name(&self) -> &'static str {
        "MutatingAdmissionWebhook"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(self.run(request))
    }
}
