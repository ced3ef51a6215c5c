//! Which pod goes first when a node is short of something, and what it is told. Pure.

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::{qos, quantity};

/// A pod as a candidate: what it uses of the scarce resource.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) uid: String,
    pub(crate) used: i64,
    /// What it asked for: bytes for memory and storage, nothing for inodes and pids.
    pub(crate) requested: i64,
    pub(crate) priority: i32,
}

/// The order of eviction: those beyond their request, the less important, those furthest beyond. `pids` goes by importance
/// and number alone.
pub(crate) fn rank(mut all: Vec<Candidate>, resource: &str) -> Vec<Candidate> {
    if resource == "pids" {
        all.sort_by_key(|c| (c.priority, -c.used));
    } else {
        all.sort_by_key(|c| (c.used <= c.requested, c.priority, c.requested - c.used));
    }
    all
}

/// Whether a pod is never evicted: static ones and those critical to the node.
pub(crate) fn spared(pod: &Pod) -> bool {
    let is_static = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(crate::sources::SOURCE));
    is_static || pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0) >= 2_000_000_000
}

/// A container's request of a resource in whole units.
pub(crate) fn request(c: &Container, resource: &str) -> i64 {
    c.resources.as_ref().and_then(|r| quantity::get(r.requests.as_ref(), resource)).unwrap_or(0)
}

/// Bytes as the API writes quantities in messages: whole binary units where they fit.
pub(crate) fn amount(bytes: i64) -> String {
    for (power, unit) in [(4, "Ti"), (3, "Gi"), (2, "Mi"), (1, "Ki")] {
        let size = 1i64 << (10 * power);
        if bytes != 0 && bytes % size == 0 {
            return format!("{}{unit}", bytes / size);
        }
    }
    bytes.to_string()
}

/// The message of an eviction; `used` is by container.
pub(crate) fn message(pod: &Pod, resource: &str, threshold: i64, available: i64, used: &[(String, i64)]) -> String {
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        amount(threshold),
        // Kilobytes are near enough for what changes all the time.
        amount(available / 1024 * 1024)
    );
    let spec = pod.spec.as_ref();
    for c in
        spec.into_iter().flat_map(qos::all_containers).filter(|_| matches!(resource, "memory" | "ephemeral-storage"))
    {
        let request = request(c, resource);
        let Some((_, used)) = used.iter().find(|(name, used)| *name == c.name && *used > request) else { continue };
        text.push_str(&format!(
            "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
            c.name,
            amount(*used / 1024 * 1024),
            amount(request)
        ));
    }
    text
}

/// What a pod uses of its own storage limits: by container, by emptyDir, in sum.
pub(crate) struct Storage<'a> {
    pub(crate) containers: &'a [(String, i64)],
    pub(crate) volumes: &'a [(String, i64)],
}

/// Whether a pod has limits of storage at all.
pub(crate) fn limits_storage(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let volumes = spec.volumes.iter().flatten().any(|v| v.empty_dir.as_ref().is_some_and(|e| e.size_limit.is_some()));
    let limit =
        |c: &Container| c.resources.as_ref().is_some_and(|r| quantity::get(r.limits.as_ref(), STORAGE).is_some());
    volumes || qos::all_containers(spec).any(limit)
}

/// The resource's name.
pub(crate) const STORAGE: &str = "ephemeral-storage";

/// Why a pod is over a limit of its own, if so.
pub(crate) fn over_storage(pod: &Pod, used: &Storage<'_>) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let of = |list: &[(String, i64)], name: &str| list.iter().find(|(n, _)| n == name).map_or(0, |(_, u)| *u);
    for v in spec.volumes.iter().flatten() {
        let Some(limit) = v.empty_dir.as_ref().and_then(|e| e.size_limit.as_ref()) else { continue };
        if quantity::value(limit) > 0 && of(used.volumes, &v.name) > quantity::value(limit) {
            return Some(format!("Usage of EmptyDir volume {:?} exceeds the limit {:?}. ", v.name, limit.0));
        }
    }
    let limit = |c: &Container| c.resources.as_ref().and_then(|r| quantity::get(r.limits.as_ref(), STORAGE));
    let sum = |list: &[(String, i64)]| list.iter().map(|(_, u)| u).sum::<i64>();
    let all: Option<i64> = spec.containers.iter().map(limit).sum();
    if let Some(all) = all.filter(|all| *all > 0 && sum(used.containers) + sum(used.volumes) > *all) {
        let text = format!("Pod ephemeral local storage usage exceeds the total limit of containers {}. ", amount(all));
        return Some(text);
    }
    let mut containers = qos::all_containers(spec);
    containers.find_map(|c| {
        let limit = limit(c).filter(|l| *l > 0 && of(used.containers, &c.name) > *l)?;
        Some(format!("Container {} exceeded its local ephemeral storage limit \"{}\". ", c.name, amount(limit)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_greedy_and_unimportant_go_first() {
        let c = |uid: &str, used, requested, priority| Candidate { uid: uid.into(), used, requested, priority };
        let all = vec![
            c("modest", 90, 100, 0),
            c("important", 500, 100, 1000),
            c("little", 110, 100, 0),
            c("much", 200, 100, 0),
            c("modest-and-important", 90, 100, 5),
        ];
        let order = |r: &str| rank(all.clone(), r).into_iter().map(|c| c.uid).collect::<Vec<_>>();
        assert_eq!(order("memory"), ["much", "little", "important", "modest", "modest-and-important"]);
        assert_eq!(order("pids")[0], "much");
    }

    #[test]
    fn messages_are_upstreams() {
        let pod: Pod = serde_json::from_value(json!({"spec":{"containers":[
            {"name":"c","resources":{"requests":{"memory":"10Mi"}}},{"name":"d","resources":{"requests":{"memory":"1Gi"}}}]}}))
        .unwrap();
        let used = [("c".to_string(), 20 << 20), ("d".to_string(), 1 << 20)];
        assert_eq!(
            message(&pod, "memory", 100 << 20, (50 << 20) + 7, &used),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container c was using 20Mi, \
             request is 10Mi, has larger consumption of memory. "
        );
    }

    #[test]
    fn limits_of_storage() {
        let pod: Pod = serde_json::from_value(json!({"spec":{"volumes":[{"name":"v","emptyDir":{"sizeLimit":"1Mi"}}],"containers":[
            {"name":"c","resources":{"limits":{"ephemeral-storage":"10Mi"}}},{"name":"d","resources":{"limits":{"ephemeral-storage":"1Gi"}}}]}}))
        .unwrap();
        let mi = |n: i64| n << 20;
        let over = |c, d, v| {
            let containers = [("c".to_string(), mi(c)), ("d".to_string(), mi(d))];
            over_storage(&pod, &Storage { containers: &containers, volumes: &[("v".to_string(), mi(v))] })
        };
        assert_eq!(over(1, 1, 1), None);
        assert_eq!(over(1, 1, 2).unwrap(), "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". ");
        assert_eq!(over(11, 1, 1).unwrap(), "Container c exceeded its local ephemeral storage limit \"10Mi\". ");
        assert!(
            over(1, 2000, 1)
                .unwrap()
                .starts_with("Pod ephemeral local storage usage exceeds the total limit of containers 1034Mi")
        );
        assert!(limits_storage(&pod));
    }
}
