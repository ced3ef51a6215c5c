//! What the proxy counts, under kube-proxy's names. One sync programs both families: their series are equal.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Seconds: a change of one service is well under the first of kube-proxy's own buckets.
const SYNC_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096, 16.384];
/// From an endpoint's change to the kernel.
const PROGRAMMING_BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 60.0];

/// `ip_family`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ByFamily {
    ip_family: &'static str,
}

/// `ip_family` and `traffic_policy`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ByPolicy {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

/// `rcode`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ByCode {
    rcode: &'static str,
}

/// Response codes of DNS that are counted by their names.
const CODES: [&str; 6] = ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"];

const FAMILIES: [ByFamily; 2] = [ByFamily { ip_family: "IPv4" }, ByFamily { ip_family: "IPv6" }];

type Times = Family<ByFamily, Histogram, fn() -> Histogram>;
type Moments = Family<ByFamily, Gauge<f64, std::sync::atomic::AtomicU64>>;

/// All metrics; the registry writes them as text.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    sync: Times,
    full_sync: Times,
    partial_sync: Times,
    programming: Times,
    pub(crate) service_changes: Counter,
    pub(crate) endpoint_changes: Counter,
    pub(crate) services_pending: Gauge,
    pub(crate) endpoints_pending: Gauge,
    no_local: Family<ByPolicy, Gauge>,
    last_sync: Moments,
    last_queued: Moments,
    pub(crate) repairs: Counter,
    pub(crate) failures: Counter,
    dns_requests: Counter,
    dns_responses: Family<ByCode, Counter>,
    pub(crate) dns_cache_hits: Counter,
    pub(crate) dns_forwarded: Counter,
}

fn now() -> f64 {
    jiff::Timestamp::now().as_millisecond() as f64 / 1000.0
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::default();
        let times = || Times::new_with_constructor(|| Histogram::new(SYNC_BUCKETS));
        let all = Self {
            sync: times(),
            full_sync: times(),
            partial_sync: times(),
            programming: Times::new_with_constructor(|| Histogram::new(PROGRAMMING_BUCKETS)),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            services_pending: Gauge::default(),
            endpoints_pending: Gauge::default(),
            no_local: Family::default(),
            last_sync: Moments::default(),
            last_queued: Moments::default(),
            repairs: Counter::default(),
            failures: Counter::default(),
            dns_requests: Counter::default(),
            dns_responses: Family::default(),
            dns_cache_hits: Counter::default(),
            dns_forwarded: Counter::default(),
            registry: Registry::default(),
        };
        let rules = |n: &str| format!("kubeproxy_sync_proxy_rules_{n}");
        registry.register(rules("duration_seconds"), "Time of one sync", all.sync.clone());
        let full = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        registry.register(full, "Time of one sync of everything", all.full_sync.clone());
        let partial = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
        registry.register(partial, "Time of one sync of changes", all.partial_sync.clone());
        let programming = "kubeproxy_network_programming_duration_seconds";
        registry.register(programming, "From an endpoint's change to the kernel", all.programming.clone());
        registry.register(rules("service_changes"), "Service changes seen", all.service_changes.clone());
        registry.register(rules("endpoint_changes"), "Endpoint changes seen", all.endpoint_changes.clone());
        registry.register(rules("service_changes_pending"), "Changes not in the kernel", all.services_pending.clone());
        registry.register(
            rules("endpoint_changes_pending"),
            "Changes not in the kernel",
            all.endpoints_pending.clone(),
        );
        let none = "Services with policy Local and without endpoints here";
        registry.register(rules("no_local_endpoints_total"), none, all.no_local.clone());
        registry.register(rules("last_timestamp_seconds"), "When rules were last synced", all.last_sync.clone());
        let queued = rules("last_queued_timestamp_seconds");
        registry.register(queued, "When a sync was last asked for", all.last_queued.clone());
        registry.register("kubeproxy_table_repairs", "Repairs after others changed our table", all.repairs.clone());
        registry.register("kubeproxy_sync_failures", "Syncs the kernel refused", all.failures.clone());
        registry.register("coredns_dns_requests", "DNS queries received", all.dns_requests.clone());
        registry.register("coredns_dns_responses", "DNS answers by their code", all.dns_responses.clone());
        registry.register("coredns_cache_hits", "DNS answers remembered from upstream", all.dns_cache_hits.clone());
        registry.register("coredns_forward_requests", "DNS queries sent upstream", all.dns_forwarded.clone());
        Self { registry, ..all }
    }

    /// A sync begins.
    pub(crate) fn queued(&self) {
        for family in &FAMILIES {
            self.last_queued.get_or_create(family).set(now());
        }
    }

    /// A sync is done: of everything, or of what had changed.
    pub(crate) fn synced(&self, seconds: f64, full: bool) {
        for family in &FAMILIES {
            self.last_sync.get_or_create(family).set(now());
            self.sync.get_or_create(family).observe(seconds);
            let kind = if full { &self.full_sync } else { &self.partial_sync };
            kind.get_or_create(family).observe(seconds);
        }
        self.services_pending.set(0);
        self.endpoints_pending.set(0);
    }

    /// An endpoint's change is in the kernel, so many seconds after it happened.
    pub(crate) fn programmed(&self, seconds: f64) {
        FAMILIES.iter().for_each(|f| self.programming.get_or_create(f).observe(seconds));
    }

    /// DNS answers that were given, by code.
    pub(crate) fn answered(&self, codes: &[u64; 16]) {
        for (rcode, count) in CODES.into_iter().zip(codes).filter(|(_, count)| **count > 0) {
            self.dns_responses.get_or_create(&ByCode { rcode }).inc_by(*count);
        }
        self.dns_requests.inc_by(codes.iter().sum());
    }

    /// How many services with policy Local have no endpoint here.
    pub(crate) fn without_local(&self, internal: usize, external: usize) {
        for ByFamily { ip_family } in FAMILIES {
            for (traffic_policy, count) in [("internal", internal), ("external", external)] {
                let count = i64::try_from(count).unwrap_or(i64::MAX);
                self.no_local.get_or_create(&ByPolicy { ip_family, traffic_policy }).set(count);
            }
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every metric of the fact table that is kube-proxy's own, with its kind and labels.
    #[test]
    fn names_kinds_and_labels_are_those_of_the_facts() {
        let facts: serde_json::Value = serde_json::from_str(include_str!("../testdata/kube-proxy.json")).unwrap();
        let metrics = Metrics::new();
        metrics.queued();
        metrics.synced(0.1, true);
        metrics.synced(0.1, false);
        metrics.programmed(0.1);
        metrics.without_local(1, 1);
        let text = metrics.text();
        let known = facts["metrics"].as_object().unwrap();
        assert!(known.len() > 10);
        for (name, shape) in known {
            let kind = shape[0].as_str().unwrap();
            // A counter's own name is without the suffix of its series.
            let family = if kind == "counter" { name.strip_suffix("_total").unwrap() } else { name };
            assert!(text.contains(&format!("# TYPE {family} {kind}\n")), "{name}: {text}");
            let series =
                text.lines().find(|l| l.starts_with(name.as_str())).unwrap_or_else(|| panic!("{name}: {text}"));
            for label in shape[1].as_array().into_iter().flatten() {
                assert!(series.contains(&format!("{}=\"", label.as_str().unwrap())), "{series}");
            }
        }
    }
}
