//! From a container's resources to the kernel's numbers, as OCI says them.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde_json::{Map, Value, json};

use crate::{
    qos::{self, Qos},
    quantity,
};

/// What of the node the numbers depend on.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Knobs {
    /// CFS period in microseconds when limits are enforced by quota.
    pub(crate) cfs_period: Option<u64>,
    /// cgroup v2 only: what may be swapped; `None` where the kernel keeps no account of it.
    pub(crate) swap: Option<Swap>,
    /// cgroup v2 only: memory QoS.
    pub(crate) throttling: Option<Throttling>,
    /// CPUs and NUMA nodes the container is held to.
    pub(crate) cpus: Option<String>,
    /// NUMA nodes its memory comes from.
    pub(crate) mems: Option<String>,
}

/// Swap of the node in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Swap {
    /// `LimitedSwap`.
    pub(crate) limited: bool,
    pub(crate) memory: i64,
    pub(crate) total: i64,
}

/// Memory QoS.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Throttling {
    /// Where between request and limit.
    pub(crate) factor: f64,
    /// `TieredReservation`: what is requested is kept from reclaim.
    pub(crate) reserve: bool,
    pub(crate) allocatable: i64,
}

const PAGE: i64 = 4096;

fn bytes(r: Option<&ResourceRequirements>, limit: bool) -> Option<i64> {
    let r = r?;
    let list = if limit { r.limits.as_ref() } else { r.requests.as_ref() };
    quantity::get_millis(list, "memory").map(|m| m / 1000).filter(|m| *m > 0)
}

/// The kernel numbers of a container's resources; devices only where `privileged` is said.
pub(crate) fn resources(pod: &Pod, c: &Container, knobs: &Knobs, privileged: Option<bool>) -> Value {
    let r = c.resources.as_ref();
    let limit = |n: &str| r.and_then(|r| quantity::get_millis(r.limits.as_ref(), n));
    let request = |n: &str| r.and_then(|r| quantity::get_millis(r.requests.as_ref(), n));
    let shares = qos::shares(request("cpu").or_else(|| limit("cpu")).unwrap_or(0));
    let mut cpu = json!({"shares": shares});
    if let Some((period, quota)) = knobs.cfs_period.and_then(|p| qos::quota(limit("cpu")?, p).map(|q| (p, q))) {
        cpu["quota"] = json!(quota);
        cpu["period"] = json!(period);
    }
    for (key, value) in [("cpus", &knobs.cpus), ("mems", &knobs.mems)] {
        if let Some(v) = value {
            cpu[key] = json!(v);
        }
    }
    let mut out = json!({"cpu": cpu});
    if let Some(allow) = privileged {
        out["devices"] = json!([{"allow": allow, "access": "rwm"}]);
    }
    if let Some(memory) = bytes(r, true) {
        out["memory"] = json!({"limit": memory});
    }
    let pages: Vec<Value> = huge_pages(r);
    if !pages.is_empty() {
        out["hugepageLimits"] = json!(pages);
    }
    let class = pod.spec.as_ref().map_or(Qos::BestEffort, qos::class);
    let mut unified = Map::new();
    if let Some(swap) = &knobs.swap {
        unified.insert("memory.swap.max".into(), json!(swap_max(pod, r, class, swap).to_string()));
    }
    if let Some(t) = &knobs.throttling {
        memory_qos(r, class, t, &mut unified);
    }
    if !unified.is_empty() {
        out["unified"] = Value::Object(unified);
    }
    out
}

/// `hugepages-2Mi` and its kin, named as the kernel does.
fn huge_pages(r: Option<&ResourceRequirements>) -> Vec<Value> {
    let limits = r.and_then(|r| r.limits.as_ref()).into_iter().flatten();
    limits
        .filter_map(|(name, q)| {
            let size = name.strip_prefix("hugepages-")?;
            let size = size.strip_suffix('i').map(|s| format!("{s}B"))?;
            Some(json!({"pageSize": size, "limit": quantity::value(q)}))
        })
        .collect()
}

/// Bytes a container may swap. With `LimitedSwap` a burstable one gets the share of swap that its request is of memory,
/// unless it requests all it may use or the node cannot do without the pod.
fn swap_max(pod: &Pod, r: Option<&ResourceRequirements>, class: Qos, swap: &Swap) -> i64 {
    let critical = pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0) >= 2_000_000_000;
    let request = bytes(r, false).or_else(|| bytes(r, true)).unwrap_or(0);
    if !swap.limited || class != Qos::Burstable || critical || bytes(r, true) == Some(request) || swap.memory <= 0 {
        return 0;
    }
    let share = i128::from(request) * i128::from(swap.total) / i128::from(swap.memory);
    i64::try_from(share).unwrap_or(0) / PAGE * PAGE
}

/// memory.high between request and limit; what is requested is protected when reservations are wanted.
fn memory_qos(r: Option<&ResourceRequirements>, class: Qos, t: &Throttling, out: &mut Map<String, Value>) {
    let (request, limit) = (bytes(r, false).or_else(|| bytes(r, true)).unwrap_or(0), bytes(r, true));
    if t.reserve && request > 0 {
        let file = if class == Qos::Guaranteed { "memory.min" } else { "memory.low" };
        out.insert(file.into(), json!(request.to_string()));
    }
    let most = limit.unwrap_or(t.allocatable);
    if class != Qos::Guaranteed && request < most {
        let high = request + ((most - request) as f64 * t.factor) as i64;
        out.insert("memory.high".into(), json!((high / PAGE * PAGE).to_string()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(resources: Value, knobs: &Knobs) -> Value {
        let pod: Pod =
            serde_json::from_value(json!({"spec":{"containers":[{"name":"c","resources":resources}]}})).unwrap();
        super::resources(&pod, &pod.spec.as_ref().unwrap().containers[0].clone(), knobs, None)
    }

    #[test]
    fn swap_follows_class_and_share() {
        let swap =
            |limited| Knobs { swap: Some(Swap { limited, memory: 8 << 30, total: 4 << 30 }), ..Knobs::default() };
        let max = |r: Value, limited| of(r, &swap(limited))["unified"]["memory.swap.max"].clone();
        let burstable = json!({"requests":{"memory":"2Gi"}});
        assert_eq!(max(burstable.clone(), true), json!((1i64 << 30).to_string()));
        assert_eq!(max(burstable.clone(), false), "0");
        assert_eq!(max(json!({}), true), "0");
        assert_eq!(max(json!({"requests":{"memory":"1Gi","cpu":"1"},"limits":{"memory":"1Gi"}}), true), "0");
        assert_eq!(max(json!({"limits":{"memory":"1Gi","cpu":"1"}}), true), "0");
        assert_eq!(of(burstable, &Knobs::default())["unified"], Value::Null);
    }

    #[test]
    fn memory_is_throttled_between_request_and_limit() {
        let t = |reserve| Knobs {
            throttling: Some(Throttling { factor: 0.9, reserve, allocatable: 1 << 30 }),
            ..Knobs::default()
        };
        let r = json!({"requests":{"memory":"100Mi"},"limits":{"memory":"200Mi"}});
        let all = of(r.clone(), &t(false))["unified"].clone();
        assert_eq!(all, json!({"memory.high": ((190i64 << 20) / 4096 * 4096).to_string()}));
        assert_eq!(of(r, &t(true))["unified"]["memory.low"], json!((100i64 << 20).to_string()));
        let whole = json!({"limits":{"memory":"100Mi","cpu":"1"}});
        assert_eq!(of(whole, &t(true))["unified"], json!({"memory.min": (100i64 << 20).to_string()}));
    }

    #[test]
    fn huge_pages_and_cpu_sets() {
        let knobs = Knobs { cfs_period: Some(100_000), cpus: Some("1".into()), ..Knobs::default() };
        let out = of(json!({"limits":{"cpu":"1","hugepages-2Mi":"4Mi"}}), &knobs);
        assert_eq!(out["cpu"], json!({"shares":1024,"quota":100_000,"period":100_000,"cpus":"1"}));
        assert_eq!(out["hugepageLimits"], json!([{"pageSize":"2MB","limit":4 << 20}]));
    }
}
