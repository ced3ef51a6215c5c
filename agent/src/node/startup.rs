//! How long a node's start takes, from the machine's on, by its parts.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;

use crate::{context::Context, metrics::process};

/// A start that goes on.
pub(super) struct Startup {
    /// Seconds from the machine's start to the agent's, and from there to the first try to register.
    before: Option<(f64, f64)>,
    begun: Instant,
    registered: Option<Instant>,
    ready: bool,
}

fn since_1970() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64())
}

impl Startup {
    /// The first try to register begins.
    pub(super) fn begin() -> Self {
        let before = process::began().map(|(boot, agent)| (agent - boot, since_1970() - agent));
        Self { before, begun: Instant::now(), registered: None, ready: false }
    }

    /// The API server knows the node.
    pub(super) fn registered(&mut self, ctx: &Context) {
        self.registered = Some(Instant::now());
        if let Some((machine, agent)) = self.before {
            ctx.metrics.set("kubelet_node_startup_pre_kubelet_duration_seconds", machine);
            ctx.metrics.set("kubelet_node_startup_pre_registration_duration_seconds", agent);
        }
        let took = self.begun.elapsed();
        ctx.metrics.set("kubelet_node_startup_registration_duration_seconds", took.as_secs_f64());
    }

    /// What the API server says of the node: the start is over when it is ready.
    pub(super) fn seen(&mut self, ctx: &Context, node: &Node) {
        let mut conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let ready = conditions.any(|c| c.type_ == "Ready" && c.status == "True");
        let (Some(registered), true, false) = (self.registered, ready, self.ready) else { return };
        self.ready = true;
        let after = registered.elapsed();
        ctx.metrics.set("kubelet_node_startup_post_registration_duration_seconds", after.as_secs_f64());
        let before = self.before.map_or(0.0, |(machine, agent)| machine + agent);
        let all = (registered - self.begun) + after + Duration::from_secs_f64(before.max(0.0));
        ctx.metrics.set("kubelet_node_startup_duration_seconds", all.as_secs_f64());
    }
}
