//! Parts of the configuration about the node as a whole: swap, shutdown, logging, user namespaces, CPU and memory managers.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::KubeletConfiguration;

/// `memorySwap`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MemorySwap {
    /// `NoSwap` (also when empty) or `LimitedSwap`.
    pub swap_behavior: String,
}

/// One of `shutdownGracePeriodByPodPriority`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ShutdownByPriority {
    /// Pods of at least this priority.
    pub priority: i32,
    /// Get this long.
    pub shutdown_grace_period_seconds: i64,
}

/// `logging`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Logging {
    /// Only `text`.
    pub format: String,
    /// Lines are written at once, whatever this says.
    pub flush_frequency: serde_json::Value,
    /// 0 is the usual; more is said with ISOPOD_LOG.
    pub verbosity: u32,
    /// Per module; only empty.
    pub vmodule: Vec<serde_json::Value>,
    /// Of formats; without effect on text.
    pub options: serde_json::Value,
}

impl Default for Logging {
    fn default() -> Self {
        let options = serde_json::json!({});
        Self { format: "text".into(), flush_frequency: "5s".into(), verbosity: 0, vmodule: Vec::new(), options }
    }
}

/// `userNamespaces`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct UserNamespaces {
    /// Ids each pod gets, a multiple of 65536.
    pub ids_per_pod: i64,
}

impl Default for UserNamespaces {
    fn default() -> Self {
        Self { ids_per_pod: 65_536 }
    }
}

/// One of `reservedMemory`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ReservedMemory {
    /// Which NUMA node.
    pub numa_node: u32,
    /// Amounts by resource (`memory`, `hugepages-2Mi`).
    pub limits: BTreeMap<String, String>,
}

fn one_of(name: &str, value: &str, known: &[&str]) -> Result<(), String> {
    if known.contains(&value) { Ok(()) } else { Err(format!("{name} {value:?}: want one of {}", known.join(", "))) }
}

impl KubeletConfiguration {
    pub(super) fn check_node(&self) -> Result<(), String> {
        one_of("memorySwap.swapBehavior", &self.memory_swap.swap_behavior, &["", "NoSwap", "LimitedSwap"])?;
        one_of("memoryReservationPolicy", &self.memory_reservation_policy, &["None", "TieredReservation"])?;
        let quality = self.feature_gates.get("MemoryQoS") == Some(&true);
        let default = Self::default();
        let said = self.memory_reservation_policy != default.memory_reservation_policy
            || self.memory_throttling_factor != default.memory_throttling_factor;
        if said && !quality {
            return Err(
                "memoryThrottlingFactor and memoryReservationPolicy need featureGates: {MemoryQoS: true}".into()
            );
        }
        if !(self.memory_throttling_factor > 0.0 && self.memory_throttling_factor <= 1.0) {
            return Err("memoryThrottlingFactor must be greater than 0 and not greater than 1.0".into());
        }
        if !self.image_maximum_gc_age.is_zero() && self.image_maximum_gc_age <= self.image_minimum_gc_age {
            return Err("imageMaximumGCAge must be greater than imageMinimumGCAge".into());
        }
        for taint in &self.register_with_taints {
            one_of("registerWithTaints: effect", &taint.effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"])?;
            if taint.key.is_empty() {
                return Err("registerWithTaints: a taint has no key".into());
            }
        }
        one_of("tlsMinVersion", self.tls_min_version.as_deref().unwrap_or(""), &["", "VersionTLS12", "VersionTLS13"])?;
        crate::topology::settings::Settings::read(self)?;
        one_of("logging.format", &self.logging.format, &["text"])?;
        for group in &self.enforce_node_allocatable {
            one_of("enforceNodeAllocatable", group, &["pods", "none"])?;
        }
        if !self.logging.vmodule.is_empty() || self.logging.verbosity > 0 {
            return Err("logging: verbosity and vmodule are said with the variable ISOPOD_LOG".into());
        }
        let ids = self.user_namespaces.ids_per_pod;
        if ids < 65_536 || ids % 65_536 != 0 {
            return Err(format!("userNamespaces.idsPerPod {ids} is not a multiple of 65536"));
        }
        if let Some(url) = &self.static_pod_url
            && !(url.starts_with("http://") || url.starts_with("https://"))
        {
            return Err(format!("staticPodURL {url:?} is not an http or https URL"));
        }
        self.check_shutdown()
    }

    fn check_shutdown(&self) -> Result<(), String> {
        let (total, critical) = (self.shutdown_grace_period, self.shutdown_grace_period_critical_pods);
        if critical > total {
            return Err("shutdownGracePeriodCriticalPods cannot be greater than shutdownGracePeriod".into());
        }
        for (name, period) in [("shutdownGracePeriod", total), ("shutdownGracePeriodCriticalPods", critical)] {
            if period > Duration::ZERO && period < Duration::from_secs(1) {
                return Err(format!("{name} must be either zero or otherwise >= 1 sec"));
            }
        }
        let by_priority = &self.shutdown_grace_period_by_pod_priority;
        if !by_priority.is_empty() && (total > Duration::ZERO || critical > Duration::ZERO) {
            return Err("shutdownGracePeriodByPodPriority cannot be used together with shutdownGracePeriod".into());
        }
        match by_priority.iter().find(|p| p.shutdown_grace_period_seconds < 0) {
            Some(p) => Err(format!("shutdownGracePeriodByPodPriority: priority {} has a negative time", p.priority)),
            None => Ok(()),
        }
    }
}
