//! /healthz, /livez, /readyz: verbose output, subpaths, exclusions.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::Response;

use super::{query::Query, respond};
use crate::endpoints::Body;

/// Checks of every endpoint, in upstream's order as far as they exist here.
const CHECKS: [&str; 6] = [
    "ping",
    "log",
    "etcd",
    "poststarthook/start-apiextensions-informers",
    "poststarthook/rbac/bootstrap-roles",
    "autoregister-completion",
];

/// What the server knows about its own state.
#[derive(Default)]
pub(crate) struct Health {
    /// The initial objects are written.
    pub(crate) bootstrapped: AtomicBool,
    /// The server is shutting down.
    pub(crate) stopping: AtomicBool,
}

impl Health {
    fn failing(&self, endpoint: &str, check: &str) -> bool {
        match check {
            "poststarthook/rbac/bootstrap-roles" => !self.bootstrapped.load(Ordering::Acquire),
            "shutdown" => endpoint == "readyz" && self.stopping.load(Ordering::Acquire),
            _ => false,
        }
    }

    /// Answers `/healthz...`; `None` when the path is not one of them.
    pub(crate) fn answer(&self, path: &str, query: &Query) -> Option<Response<Body>> {
        let path = path.trim_matches('/');
        let (endpoint, check) = path.split_once('/').unwrap_or((path, ""));
        if !matches!(endpoint, "healthz" | "livez" | "readyz") {
            return None;
        }
        let mut checks = CHECKS.to_vec();
        if endpoint == "readyz" {
            checks.push("shutdown");
        }
        if !check.is_empty() {
            if !checks.contains(&check) {
                return Some(respond::page_not_found());
            }
            return Some(match self.failing(endpoint, check) {
                true => respond::text(500, "internal server error: not finished\n"),
                false => respond::text(200, "ok"),
            });
        }
        Some(self.all(endpoint, &checks, query))
    }

    fn all(&self, endpoint: &str, checks: &[&str], query: &Query) -> Response<Body> {
        let excluded = query.all("exclude");
        let mut lines = String::new();
        let mut failed = Vec::new();
        for check in checks {
            if excluded.contains(check) {
                lines.push_str(&format!("[+]{check} excluded: ok\n"));
            } else if self.failing(endpoint, check) {
                failed.push(*check);
                lines.push_str(&format!("[-]{check} failed: reason withheld\n"));
            } else {
                lines.push_str(&format!("[+]{check} ok\n"));
            }
        }
        for unknown in excluded.iter().filter(|e| !checks.contains(e)) {
            lines.push_str(&format!("warn: some health checks cannot be excluded: no matches for {unknown:?}\n"));
        }
        if !failed.is_empty() {
            return respond::text(500, format!("{lines}{endpoint} check failed\n"));
        }
        match query.has("verbose") {
            true => respond::text(200, format!("{lines}{endpoint} check passed\n")),
            false => respond::text(200, Bytes::from_static(b"ok")),
        }
    }
}
