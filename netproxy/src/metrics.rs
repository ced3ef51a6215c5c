//! What the proxy counts, under kube-proxy's names.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Seconds: a change of one service is well under the first of kube-proxy's own buckets.
const SYNC_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096, 16.384];

/// All metrics; the registry writes them as text.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    pub(crate) sync: Histogram,
    pub(crate) full_sync: Histogram,
    pub(crate) service_changes: Counter,
    pub(crate) endpoint_changes: Counter,
    pub(crate) last_sync: Gauge,
    pub(crate) last_queued: Gauge,
    pub(crate) repairs: Counter,
    pub(crate) failures: Counter,
    pub(crate) dns_requests: Counter,
    pub(crate) dns_forwarded: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let sync = Histogram::new(SYNC_BUCKETS);
        let full_sync = Histogram::new(SYNC_BUCKETS);
        let (service_changes, endpoint_changes) = (Counter::default(), Counter::default());
        let (last_sync, last_queued) = (Gauge::default(), Gauge::default());
        let (repairs, failures) = (Counter::default(), Counter::default());
        let (dns_requests, dns_forwarded) = (Counter::default(), Counter::default());
        let name = |n: &str| format!("kubeproxy_sync_{n}");
        registry.register(name("proxy_rules_duration_seconds"), "Time of one sync", sync.clone());
        registry.register(name("full_proxy_rules_duration_seconds"), "Time of one full sync", full_sync.clone());
        registry.register(name("proxy_rules_service_changes"), "Service changes seen", service_changes.clone());
        registry.register(name("proxy_rules_endpoint_changes"), "Endpoint changes seen", endpoint_changes.clone());
        registry.register(name("proxy_rules_last_timestamp_seconds"), "When rules were last synced", last_sync.clone());
        registry.register(
            name("proxy_rules_last_queued_timestamp_seconds"),
            "When a sync was last asked for",
            last_queued.clone(),
        );
        registry.register("kubeproxy_table_repairs", "Repairs after others changed our table", repairs.clone());
        registry.register("kubeproxy_sync_failures", "Syncs the kernel refused", failures.clone());
        registry.register("coredns_dns_requests", "DNS queries received", dns_requests.clone());
        registry.register("coredns_forward_requests", "DNS queries sent upstream", dns_forwarded.clone());
        Self {
            registry,
            sync,
            full_sync,
            service_changes,
            endpoint_changes,
            last_sync,
            last_queued,
            repairs,
            failures,
            dns_requests,
            dns_forwarded,
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.registry);
        out
    }
}
