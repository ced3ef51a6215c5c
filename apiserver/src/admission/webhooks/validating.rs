//! ValidatingAdmissionWebhook: all webhooks are asked at once.

use std::sync::Arc;

use futures::future::{BoxFuture, join_all};
use isopod_api::status::Status;

use super::{Verdict, Webhooks};
use crate::admission::{Plugin, Request, matching};

/// The plugin.
pub(in crate::admission) struct ValidatingAdmissionWebhook(pub(in crate::admission) Arc<Webhooks>);

impl ValidatingAdmissionWebhook {
    async fn run(&self, request: &mut Request<'_>) -> Result<(), Status> {
        if matching::exempt(request) {
            return Ok(());
        }
        let webhooks = self.0.validating.current(request.objects);
        let mut asked = Vec::new();
        for webhook in webhooks.iter() {
            if let Some(matched) = webhook.wants(request).await? {
                asked.push((webhook, matched));
            }
        }
        let shared = &*request;
        let calls = asked.iter().map(|(webhook, matched)| self.0.call(webhook, matched, shared));
        let outcomes = join_all(calls).await;
        let mut refused = None;
        for ((webhook, _), outcome) in asked.iter().zip(outcomes) {
            request.warnings.extend(outcome.warnings);
            let result = match outcome.verdict {
                Ok(Verdict::Allowed(_)) => Ok(()),
                Ok(Verdict::Denied(status)) => Err(status),
                Err(failure) => webhook.failed(failure),
            };
            refused = refused.or(result.err());
        }
        refused.map_or(Ok(()), Err)
    }
}

impl Plugin for ValidatingAdmissionWebhook {
    fn name(&self) -> &'static str {
        "ValidatingAdmissionWebhook"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(self.run(request))
    }
}
