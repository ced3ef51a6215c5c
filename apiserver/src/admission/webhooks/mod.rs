//! MutatingAdmissionWebhook and ValidatingAdmissionWebhook.
//!
//! [`Configured`] keeps the webhooks of all configurations, understood once per revision. A [`Webhook`] decides whether it
//! is asked; [`review`] makes the question and reads the answer; the two plugins run them, one after the other or at once.

mod configured;
mod mutating;
mod review;
#[cfg(test)]
mod tests;
mod validating;

use std::sync::Arc;

use isopod_api::status::Status;
use serde_json::Value;

use super::{Request, attributes, matching::Matched};
use crate::webhook::Client;
use configured::{Configured, Webhook};
use review::{Answer, Verdict};

pub(super) use mutating::MutatingAdmissionWebhook;
pub(super) use validating::ValidatingAdmissionWebhook;

/// Both kinds of webhooks, and how they are called.
pub(super) struct Webhooks {
    mutating: Configured,
    validating: Configured,
    client: Arc<Client>,
}

impl Webhooks {
    /// Over a client.
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self {
            mutating: Configured::new("mutatingwebhookconfigurations"),
            validating: Configured::new("validatingwebhookconfigurations"),
            client,
        }
    }

    /// The outcome of one call.
    async fn call(&self, webhook: &Webhook, matched: &Matched, request: &Request<'_>) -> Outcome {
        match self.ask(webhook, matched, request).await {
            Ok(answer) => {
                for (key, value) in &answer.annotations {
                    request.annotate(&format!("{}/{key}", webhook.name), value);
                }
                Outcome { warnings: answer.warnings, verdict: Ok(answer.verdict) }
            }
            Err(failure) => Outcome { warnings: Vec::new(), verdict: Err(failure) },
        }
    }

    async fn ask(&self, webhook: &Webhook, matched: &Matched, request: &Request<'_>) -> Result<Answer, Failure> {
        if request.dry_run && webhook.side_effects {
            let message = format!("admission webhook \"{}\" does not support dry run", webhook.name);
            return Err(Failure::Request(Status::bad_request(message)));
        }
        let target = webhook.target.as_ref().map_err(|e| Failure::Call(format!("could not get REST client: {e}")))?;
        let (uid, question) = review::question(webhook, matched, request).map_err(Failure::Request)?;
        let answer = self.client.post(request.objects, target, &question, webhook.timeout).await;
        let answer = answer.map_err(|e| Failure::Call(format!("failed to call webhook: {e}")))?;
        review::answer(webhook, &uid, &answer)
            .map_err(|e| Failure::Call(format!("received invalid webhook response: {e}")))
    }
}

/// What became of a call.
struct Outcome {
    warnings: Vec<String>,
    verdict: Result<Verdict, Failure>,
}

/// Why there is no answer.
enum Failure {
    /// The webhook could not be asked: its failure policy decides.
    Call(String),
    /// The request ends here.
    Request(Status),
}

impl Webhook {
    /// The version in which this webhook is asked about a request; `None` when it is not.
    async fn wants(&self, request: &Request<'_>) -> Result<Option<Matched>, Status> {
        let Some(matched) = self.matcher.matches(request)? else { return Ok(None) };
        attributes::prepare(request, &matched).await?;
        if self.conditions.is_empty() {
            return Ok(Some(matched));
        }
        let scope = attributes::scope(request, &matched, None, &Value::Null)?;
        match self.conditions.hold(&scope, self.fail) {
            Ok(true) => Ok(Some(matched)),
            Ok(false) => Ok(None),
            Err(error) => Err(request.forbidden(error)),
        }
    }

    /// What a failed call means: nothing when the webhook may be missing.
    fn failed(&self, failure: Failure) -> Result<(), Status> {
        match failure {
            Failure::Request(status) => Err(status),
            Failure::Call(error) if self.fail => {
                tracing::warn!(webhook = self.name, error, "cannot call a webhook; the request is refused");
                Err(Status::internal(format!("failed calling webhook \"{}\": {error}", self.name)))
            }
            Failure::Call(error) => {
                tracing::warn!(webhook = self.name, error, "cannot call a webhook; going on without it");
                Ok(())
            }
        }
    }
}
