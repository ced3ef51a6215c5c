//! Which node announces the addresses of a Service: one that is ready and holds its lease.
//!
//! A node that falls silent gives its addresses up by itself when its own lease ends, and not before that another node is
//! chosen: never do two of them answer. Times are this process's own: clocks are never compared.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use isopod_client::Change;
use isopod_client::objects::HasMeta;
use k8s_openapi::api::coordination::v1::Lease;
use parking_lot::Mutex;

/// Node leases of other kinds are none.
const NAMESPACE: &str = "kube-node-lease";

/// A node's lease: as it was last renewed, and until when it holds.
struct Held {
    renewed: Option<jiff::Timestamp>,
    until: Instant,
}

/// Until when nodes may be counted on.
#[derive(Default)]
pub(super) struct Leases {
    held: Mutex<HashMap<String, Held>>,
}

impl Leases {
    /// Takes in a lease; whether it is of a node that was silent.
    pub(super) fn hear(&self, change: &Change<'_, Lease>) -> bool {
        let lease = change.object();
        if lease.namespace() != NAMESPACE {
            return false;
        }
        let mut all = self.held.lock();
        if change.is_deleted() {
            all.remove(lease.name());
            return false;
        }
        let spec = lease.spec.as_ref();
        let renewed = spec.and_then(|s| s.renew_time.as_ref()).map(|t| t.0);
        let seconds = spec.and_then(|s| s.lease_duration_seconds).and_then(|s| u64::try_from(s).ok()).unwrap_or(40);
        let before = all.get(lease.name());
        if before.is_some_and(|b| b.renewed == renewed) {
            return false;
        }
        let silent = before.is_none_or(|b| b.until <= Instant::now());
        all.insert(lease.name().to_owned(), Held { renewed, until: Instant::now() + Duration::from_secs(seconds) });
        silent
    }

    /// How long a node's lease holds from now.
    pub(super) fn left(&self, node: &str) -> Option<Duration> {
        let left = self.held.lock().get(node)?.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

/// Whoever announces now goes on if it can; else the node with least to announce. With it goes what is said of the node.
pub(super) fn choose<'a, 'b, T: Copy>(
    now: Option<&str>,
    able: &[(&'a str, T)],
    loads: impl FnOnce() -> HashMap<&'b str, usize>,
) -> Option<(&'a str, T)> {
    if let Some(stays) = able.iter().find(|(node, _)| Some(*node) == now) {
        return Some(*stays);
    }
    let loads = loads();
    able.iter().min_by_key(|(node, _)| (loads.get(node).copied().unwrap_or(0), *node)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_node_stays_until_it_cannot() {
        let load = || HashMap::from([("a", 1), ("c", 1)]);
        assert_eq!(choose(Some("a"), &[("a", ()), ("b", ())], load), Some(("a", ())));
        assert_eq!(choose(None, &[("a", ()), ("b", ()), ("c", ())], load), Some(("b", ())));
        assert_eq!(choose(Some("b"), &[("c", ()), ("a", ())], load), Some(("a", ())));
        assert_eq!(choose(Some("b"), &[] as &[(&str, ())], load), None);
    }

    #[test]
    fn only_a_renewed_lease_of_a_node_counts() {
        let lease = |namespace: &str, second: i64, seconds: i32| -> Arc<Lease> {
            let renewed = jiff::Timestamp::from_second(second).unwrap();
            Arc::new(
                serde_json::from_value(serde_json::json!({
                    "metadata": { "namespace": namespace, "name": "n" },
                    "spec": { "renewTime": renewed.to_string(), "leaseDurationSeconds": seconds },
                }))
                .unwrap(),
            )
        };
        let leases = Leases::default();
        assert!(!leases.hear(&Change::Added(&lease("kube-system", 1, 40))));
        assert!(leases.left("n").is_none());
        assert!(leases.hear(&Change::Added(&lease(NAMESPACE, 1, 0))));
        assert!(leases.left("n").is_none(), "it is over");
        assert!(!leases.hear(&Change::Added(&lease(NAMESPACE, 1, 40))), "the same again");
        assert!(leases.left("n").is_none());
        assert!(leases.hear(&Change::Added(&lease(NAMESPACE, 2, 40))));
        assert!(leases.left("n").unwrap() > Duration::from_secs(30));
        assert!(!leases.hear(&Change::Added(&lease(NAMESPACE, 3, 40))), "it was well");
        leases.hear(&Change::Deleted(&lease(NAMESPACE, 3, 40)));
        assert!(leases.left("n").is_none());
    }
}
