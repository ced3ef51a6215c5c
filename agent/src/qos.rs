//! Quality-of-service classes and the numbers the kernel gets for a pod's resources.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, ResourceRequirements};

use crate::quantity;

/// `status.qosClass`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Qos {
    /// Limits equal requests for cpu and memory everywhere.
    Guaranteed,
    /// Anything between.
    Burstable,
    /// Nothing asked for.
    BestEffort,
}

impl Qos {
    /// As the API writes it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// All containers that run with the pod: regular ones and every init container.
pub(crate) fn all_containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers)
}

/// Whether an init container is a sidecar.
pub(crate) fn is_sidecar(c: &Container) -> bool {
    c.restart_policy.as_deref() == Some("Always")
}

/// The class of a pod.
pub(crate) fn class(spec: &PodSpec) -> Qos {
    let one = |r: Option<&ResourceRequirements>, name: &str| -> (i64, i64) {
        let of = |l| quantity::get_millis(l, name).unwrap_or(0);
        let (request, limit) = r.map_or((0, 0), |r| (of(r.requests.as_ref()), of(r.limits.as_ref())));
        // A limit without a request is a request too (defaulting does this for API pods, not for static ones).
        (if request == 0 { limit } else { request }, limit)
    };
    let resources: Vec<Option<&ResourceRequirements>> = match &spec.resources {
        Some(r) if r.requests.is_some() || r.limits.is_some() => vec![Some(r)],
        _ => all_containers(spec).map(|c| c.resources.as_ref()).collect(),
    };
    let (mut any, mut guaranteed) = (false, true);
    for r in resources {
        for name in ["cpu", "memory"] {
            let (request, limit) = one(r, name);
            any |= request > 0 || limit > 0;
            guaranteed &= limit > 0 && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// cpu.shares for a request.
pub(crate) fn shares(milli: i64) -> u64 {
    (milli.max(0) as u64 * 1024 / 1000).clamp(2, 262_144)
}

/// cgroup v2 weight for shares.
pub(crate) fn weight(shares: u64) -> u64 {
    if shares >= 262_144 { 10_000 } else { 1 + shares.saturating_sub(2) * 9999 / 262_142 }
}

/// CFS quota in microseconds for a limit; `None` without one.
pub(crate) fn quota(milli: i64, period_us: u64) -> Option<i64> {
    (milli > 0).then(|| (milli * period_us as i64 / 1000).max(1000))
}

/// One cgroup's numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// cpu.shares.
    pub(crate) cpu_shares: u64,
    /// CFS quota in microseconds.
    pub(crate) cpu_quota: Option<i64>,
    /// CFS period in microseconds.
    pub(crate) cpu_period: u64,
    /// Memory limit in bytes.
    pub(crate) memory: Option<i64>,
    /// Most processes.
    pub(crate) pids: Option<i64>,
}

/// A resource's amount over the pod: (request, limit); the limit is `None` when any container has none.
pub(crate) fn pod_amount(spec: &PodSpec, name: &str) -> (i64, Option<i64>) {
    let request = |c: &Container| {
        let r = c.resources.as_ref();
        r.and_then(|r| quantity::get_millis(r.requests.as_ref(), name))
            .or_else(|| r.and_then(|r| quantity::get_millis(r.limits.as_ref(), name)))
            .unwrap_or(0)
    };
    let limit = |c: &Container| c.resources.as_ref().and_then(|r| quantity::get_millis(r.limits.as_ref(), name));
    let overhead = quantity::get_millis(spec.overhead.as_ref(), name).unwrap_or(0);
    let mut total: i64 = spec.containers.iter().map(request).sum();
    let mut total_limit: Option<i64> = spec.containers.iter().map(limit).sum();
    // Sidecars add to everything after them; an ordinary init container runs beside the sidecars before it.
    let (mut sidecars, mut sidecar_limit, mut peak, mut peak_limit) = (0, Some(0), 0, Some(0));
    for c in spec.init_containers.iter().flatten() {
        let (r, l) = (request(c), limit(c));
        if is_sidecar(c) {
            sidecars += r;
            sidecar_limit = sidecar_limit.zip(l).map(|(a, b)| a + b);
            peak = peak.max(sidecars);
            peak_limit = peak_limit.zip(sidecar_limit).map(|(a, b)| a.max(b));
        } else {
            peak = peak.max(sidecars + r);
            peak_limit = peak_limit.zip(sidecar_limit.zip(l)).map(|(a, (b, c))| a.max(b + c));
        }
    }
    total += sidecars;
    total_limit = total_limit.zip(sidecar_limit).map(|(a, b)| a + b);
    let (mut request, mut limit) =
        (total.max(peak), total_limit.zip(peak_limit).map(|(a, b)| a.max(b)).map(|l| l + overhead));
    request += overhead;
    if let Some(r) = &spec.resources {
        if let Some(q) = quantity::get_millis(r.requests.as_ref(), name) {
            request = q + overhead;
        }
        if let Some(q) = quantity::get_millis(r.limits.as_ref(), name) {
            limit = Some(q + overhead);
        }
    }
    (request, limit)
}

/// The numbers of the pod's own cgroup.
pub(crate) fn pod_limits(spec: &PodSpec, cfs: Option<u64>, pids: i64) -> Limits {
    let (cpu, cpu_limit) = pod_amount(spec, "cpu");
    let (_, memory) = pod_amount(spec, "memory");
    Limits {
        cpu_shares: shares(cpu),
        cpu_quota: cfs.zip(cpu_limit).and_then(|(period, l)| quota(l, period)),
        cpu_period: cfs.unwrap_or(100_000),
        memory: memory.map(|m| m / 1000).filter(|m| *m > 0),
        pids: (pids > 0).then_some(pids),
    }
}

/// oom_score_adj of a container.
pub(crate) fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i32 {
    let Some(spec) = &pod.spec else { return 1000 };
    // Nobody has looked up the number of a static pod's class.
    if spec.priority_class_name.as_deref() == Some("system-node-critical") {
        return -997;
    }
    match class(spec) {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let of = |c: &Container| {
                let r = c.resources.as_ref();
                r.and_then(|r| quantity::get(r.requests.as_ref(), "memory"))
                    .or_else(|| r.and_then(|r| quantity::get(r.limits.as_ref(), "memory")))
                    .unwrap_or(0)
            };
            let mut request = of(container);
            let is_init = spec.init_containers.iter().flatten().any(|c| c.name == container.name);
            if is_init && is_sidecar(container) {
                request = request.max(spec.containers.iter().map(of).min().unwrap_or(0));
            }
            let score = 1000 - (1000 * request) / memory_capacity.max(1);
            score.clamp(3, 999) as i32
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: serde_json::Value) -> PodSpec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn classes() {
        let rr = |r: serde_json::Value| spec(serde_json::json!({"containers":[{"name":"c","resources":r}]}));
        for (r, want) in [
            (serde_json::json!({}), Qos::BestEffort),
            (serde_json::json!({"limits":{"cpu":"1","memory":"1Gi"}}), Qos::Guaranteed),
            (
                serde_json::json!({"requests":{"cpu":"1","memory":"1Gi"},"limits":{"cpu":"1","memory":"1Gi"}}),
                Qos::Guaranteed,
            ),
            (serde_json::json!({"requests":{"cpu":"1"}}), Qos::Burstable),
            (serde_json::json!({"limits":{"cpu":"1"}}), Qos::Burstable),
            (
                serde_json::json!({"requests":{"cpu":"1","memory":"1Gi"},"limits":{"cpu":"2","memory":"1Gi"}}),
                Qos::Burstable,
            ),
        ] {
            assert_eq!(class(&rr(r.clone())), want, "{r}");
        }
    }

    #[test]
    fn init_containers_peak_and_sidecars_add() {
        let s = spec(serde_json::json!({
            "initContainers": [
                {"name":"side","restartPolicy":"Always","resources":{"requests":{"cpu":"100m"},"limits":{"cpu":"100m"}}},
                {"name":"init","resources":{"requests":{"cpu":"900m"},"limits":{"cpu":"1"}}}],
            "containers": [{"name":"c","resources":{"requests":{"cpu":"200m"},"limits":{"cpu":"300m"}}}]}));
        assert_eq!(pod_amount(&s, "cpu"), (1000, Some(1100)));
        assert_eq!(pod_amount(&s, "memory"), (0, None));
    }

    #[test]
    fn kernel_numbers() {
        assert_eq!((shares(0), shares(100), shares(1_000_000)), (2, 102, 262_144));
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
        assert_eq!((quota(500, 100_000), quota(5, 100_000), quota(0, 100_000)), (Some(50_000), Some(1000), None));
    }
}
