//! /metrics: what is counted, under upstream's names.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry as Metrics,
};

use super::request::RequestInfo;
use crate::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Request {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
    code: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Timed {
    verb: String,
    group: String,
    version: String,
    resource: String,
    subresource: String,
    scope: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    request_kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Stored {
    resource: String,
}

/// The server's counters.
pub(crate) struct Counters {
    registry: Metrics,
    requests: Family<Request, Counter>,
    durations: Family<Timed, Histogram>,
    inflight: Family<Kind, Gauge>,
    long_running: Family<Timed, Gauge>,
    objects: Family<Stored, Gauge>,
    size: Gauge,
}

impl Default for Counters {
    fn default() -> Self {
        let mut registry = Metrics::default();
        let requests = Family::default();
        let durations = Family::new_with_constructor(
            (|| Histogram::new([0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 60.0])) as fn() -> Histogram,
        );
        let inflight = Family::default();
        let long_running = Family::default();
        let objects = Family::default();
        let size = Gauge::default();
        registry.register("apiserver_request", "Requests by verb, resource and code", requests.clone());
        registry.register("apiserver_request_duration_seconds", "Time to answer", durations.clone());
        registry.register("apiserver_current_inflight_requests", "Requests in flight", inflight.clone());
        registry.register("apiserver_longrunning_requests", "Long-running requests", long_running.clone());
        registry.register("apiserver_storage_objects", "Stored objects", objects.clone());
        registry.register("apiserver_storage_size_bytes", "Size of the store's files", size.clone());
        Self { registry, requests, durations, inflight, long_running, objects, size }
    }
}

/// A request that is being counted as in flight; ends when dropped.
pub(crate) struct Running(Gauge);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn timed(info: &RequestInfo) -> Timed {
    let scope = match (info.resource_request, info.namespace.is_empty(), info.name.is_empty()) {
        (false, ..) => "",
        (true, _, false) => "resource",
        (true, false, true) => "namespace",
        (true, true, true) => "cluster",
    };
    let (resource, subresource) = (info.resource.clone(), info.subresource.clone());
    let verb = match info.resource_request {
        true => info.verb.to_uppercase(),
        false => info.verb.to_uppercase().chars().take(8).collect(),
    };
    Timed { verb, group: info.group.clone(), version: info.version.clone(), resource, subresource, scope }
}

impl Counters {
    /// A request starts.
    pub(crate) fn start(&self, info: &RequestInfo) -> Running {
        let gauge = if info.long_running() {
            self.long_running.get_or_create(&timed(info)).clone()
        } else {
            let request_kind = if matches!(&*info.verb, "get" | "list") { "readOnly" } else { "mutating" };
            self.inflight.get_or_create(&Kind { request_kind }).clone()
        };
        gauge.inc();
        Running(gauge)
    }

    /// A request has been answered. Only requests of known resources count, so that labels stay bounded.
    pub(crate) fn answered(&self, info: &RequestInfo, known: bool, code: u16, took: Duration) {
        let mut labels = timed(info);
        if !known {
            labels = Timed {
                group: String::new(),
                version: String::new(),
                resource: String::new(),
                subresource: String::new(),
                ..labels
            };
        }
        if !info.long_running() {
            self.durations.get_or_create(&labels).observe(took.as_secs_f64());
        }
        let Timed { verb, group, version, resource, subresource, scope } = labels;
        self.requests.get_or_create(&Request { verb, group, version, resource, subresource, scope, code }).inc();
    }

    /// The exposition.
    pub(crate) fn text(&self, registry: &Registry) -> String {
        for resource in &registry.resources() {
            if let Some(store) = &resource.store {
                let resource = resource.group_resource().to_string();
                self.objects.get_or_create(&Stored { resource }).set(store.len() as i64);
            }
        }
        self.size.set(registry.cache().engine().size() as i64);
        let mut out = String::new();
        if encode(&mut out, &self.registry).is_err() {
            out.clear();
        }
        out
    }
}
