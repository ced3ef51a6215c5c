//! Webhook configurations, understood once per revision of their objects.

use std::{sync::Arc, time::Duration};

use isopod_api::gvk::Gvr;
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    admission::{conditions::Conditions, list, matching::Matcher, revisions::Revisions, text},
    cel::admission::{Offers, environment},
    objects::Objects,
    webhook::Target,
};

/// One webhook.
pub(super) struct Webhook {
    pub(super) name: String,
    /// Tells it from all others.
    pub(super) key: String,
    pub(super) matcher: Matcher,
    pub(super) conditions: Conditions,
    /// Errors refuse the request.
    pub(super) fail: bool,
    /// It may do something that a dry run must not do.
    pub(super) side_effects: bool,
    pub(super) timeout: Duration,
    pub(super) target: Result<Arc<Target>, String>,
    /// `reinvocationPolicy: IfNeeded`.
    pub(super) reinvocable: bool,
    /// apiVersion of its AdmissionReviews.
    pub(super) review: &'static str,
    /// Of a MutatingWebhookConfiguration.
    pub(super) mutating: bool,
}

impl Webhook {
    fn new(configuration: &str, index: usize, value: &Value, mutating: bool) -> Self {
        let name = text(value, "name").to_owned();
        let versions = list(value, "admissionReviewVersions").iter().filter_map(Value::as_str);
        let review = versions.filter_map(|version| match version {
            "v1" => Some("admission.k8s.io/v1"),
            "v1beta1" => Some("admission.k8s.io/v1beta1"),
            _ => None,
        });
        Self {
            key: format!("{configuration}/{name}/{index}"),
            matcher: Matcher::of_webhook(value),
            conditions: Conditions::new(&environment(Offers { params: false, authorizer: true }), value),
            fail: value["failurePolicy"] != "Ignore",
            side_effects: !matches!(text(value, "sideEffects"), "None" | "NoneOnDryRun"),
            timeout: Duration::from_secs(value["timeoutSeconds"].as_u64().unwrap_or(10).clamp(1, 30)),
            target: Target::new(&value["clientConfig"]).map(Arc::new),
            reinvocable: value["reinvocationPolicy"] == "IfNeeded",
            review: review.into_iter().next().unwrap_or("admission.k8s.io/v1"),
            mutating,
            name,
        }
    }
}

#[derive(Default)]
struct State {
    /// Generation this was made from.
    seen: Option<u64>,
    configurations: Revisions<Vec<Arc<Webhook>>>,
    all: Arc<Vec<Arc<Webhook>>>,
}

/// All webhooks of one kind.
pub(super) struct Configured {
    gvr: Gvr,
    state: Mutex<State>,
}

impl Configured {
    pub(super) fn new(resource: &str) -> Self {
        Self { gvr: Gvr::new("admissionregistration.k8s.io", "v1", resource), state: Mutex::default() }
    }

    /// The webhooks as they are now, by the names of their configurations.
    pub(super) fn current(&self, objects: &dyn Objects) -> Arc<Vec<Arc<Webhook>>> {
        // Read before the objects: a change in between makes the next request look again.
        let now = objects.generation(&self.gvr);
        let mut state = self.state.lock();
        if state.seen == Some(now) {
            return Arc::clone(&state.all);
        }
        let mutating = self.gvr.resource == "mutatingwebhookconfigurations";
        state.configurations.refresh(&objects.list(&self.gvr, ""), |value| {
            let name = isopod_api::meta::name(value);
            let webhooks = list(value, "webhooks").iter().enumerate();
            webhooks.map(|(index, webhook)| Arc::new(Webhook::new(name, index, webhook, mutating))).collect()
        });
        state.all = Arc::new(state.configurations.values().flat_map(|all| all.iter().cloned()).collect());
        state.seen = Some(now);
        Arc::clone(&state.all)
    }
}
