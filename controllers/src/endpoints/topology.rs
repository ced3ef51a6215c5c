//! Hints of Services with `service.kubernetes.io/topology-mode: Auto`: endpoints go to zones in proportion to the CPUs of
//! their nodes, as few as possible to another zone than their own.
//!
//! Worked example: zones a and b have 4 and 2 CPUs, the Service 3 endpoints, all in a. Zone a should have 2 of them and b 1:
//! the last one of a is for b. No hints at all when that cannot be done within a fifth more load than fair: with 2 endpoints
//! in zones of 9 and 1 CPUs, b could only have too many or none.

use std::collections::{BTreeMap, BTreeSet};

use isopod_client::quantity::milli;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, ForZone};

const MODE: &str = "service.kubernetes.io/topology-mode";
const OLD_MODE: &str = "service.kubernetes.io/topology-aware-hints";
const ZONE: &str = "topology.kubernetes.io/zone";
/// What more a zone may carry than its share.
const OVERLOAD: f64 = 0.2;
/// What fractions may be off.
const TINY: f64 = 1e-9;
/// Nodes that carry no load to speak of.
const CONTROL: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];

/// Thousandths of CPUs by zone; empty when some node does not tell.
pub(super) type Zones = BTreeMap<String, i64>;

/// Whether a Service asks for it.
pub(super) fn is_wanted(service: &Service) -> bool {
    let annotations = service.metadata.annotations.as_ref();
    let mode = annotations.and_then(|a| a.get(MODE).or_else(|| a.get(OLD_MODE)));
    mode.is_some_and(|m| m == "Auto" || m == "auto")
}

/// What a node adds: nothing when it does not count, `None` when nobody can tell.
pub(super) fn share(node: &Node) -> Option<(String, i64)> {
    let labels = node.metadata.labels.as_ref();
    let status = node.status.as_ref()?;
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    if !ready || labels.is_some_and(|l| CONTROL.iter().any(|c| l.contains_key(*c))) {
        return Some((String::new(), 0));
    }
    let zone = labels?.get(ZONE).filter(|z| !z.is_empty())?;
    let cpu = milli(status.allocatable.as_ref()?.get("cpu")?);
    (cpu > 0).then(|| (zone.clone(), cpu))
}

/// All nodes together.
pub(super) fn zones<'a>(nodes: impl Iterator<Item = &'a Node>) -> Zones {
    let mut all = Zones::new();
    for node in nodes {
        match share(node) {
            Some((zone, cpu)) if cpu > 0 => *all.entry(zone).or_default() += cpu,
            Some(_) => {}
            None => return Zones::new(),
        }
    }
    all
}

/// Gives the ready endpoints of one family their hints, or none of them.
pub(super) fn assign(mut endpoints: Vec<&mut Endpoint>, zones: &Zones) {
    endpoints.retain(|e| e.conditions.as_ref().is_some_and(|c| c.ready == Some(true)));
    let own: Option<Vec<&str>> = endpoints.iter().map(|e| e.zone.as_deref()).collect();
    let Some(chosen) = own.and_then(|own| allocate(&own, zones)) else { return };
    for (endpoint, name) in endpoints.into_iter().zip(chosen) {
        endpoint.hints = Some(EndpointHints { for_zones: Some(vec![ForZone { name }]), ..EndpointHints::default() });
    }
}

/// A zone for each endpoint, given its own one; `None` when there is no fair way.
fn allocate(own: &[&str], zones: &Zones) -> Option<Vec<String>> {
    let total = zones.values().sum::<i64>() as f64;
    if zones.len() < 2 || own.len() < zones.len() {
        return None;
    }
    let desired = |zone: &str| zones.get(zone).map_or(0.0, |cpu| *cpu as f64 / total * own.len() as f64);
    let least: f64 = zones.keys().map(|z| (desired(z) / (1.0 + OVERLOAD)).ceil()).sum();
    if least > own.len() as f64 {
        return None;
    }
    let mut chosen: Vec<String> = own.iter().map(|z| (*z).to_owned()).collect();
    let names: BTreeSet<String> = zones.keys().cloned().chain(chosen.iter().cloned()).collect();
    loop {
        // How many each has too many; below zero: too few.
        let excess = |z: &String| chosen.iter().filter(|c| *c == z).count() as f64 - desired(z);
        let giver = names.iter().max_by(|a, b| excess(a).total_cmp(&excess(b)))?;
        let taker = names.iter().min_by(|a, b| excess(a).total_cmp(&excess(b)))?;
        if excess(giver) < 1.0 - TINY || excess(taker) > -TINY {
            return Some(chosen);
        }
        let place = chosen.iter().rposition(|c| c == giver)?;
        chosen[place] = taker.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn zones_of(list: &[(&str, i64)]) -> Zones {
        list.iter().map(|(name, cpu)| ((*name).to_owned(), *cpu)).collect()
    }

    #[test]
    fn endpoints_are_shared_out_by_cpus() {
        let equal = zones_of(&[("a", 4000), ("b", 4000), ("c", 4000)]);
        let by = |own: &[&str], zones: &Zones| allocate(own, zones).map(|z| z.join(""));
        assert_eq!(by(&["a", "b", "c"], &equal).as_deref(), Some("abc"));
        assert_eq!(by(&["a", "a", "a"], &equal).as_deref(), Some("acb"));
        assert_eq!(by(&["a", "a", "a", "a", "b", "c"], &equal).as_deref(), Some("aacbbc"));
        assert_eq!(by(&["a", "b", "c", "x", "x", "x"], &equal).as_deref(), Some("abccba"), "a zone without nodes");
        assert_eq!(by(&["a", "b", "c", "a"], &equal), None, "each would need two");
        assert_eq!(by(&["a", "b"], &equal), None, "fewer endpoints than zones");
        assert_eq!(by(&["a", "a"], &zones_of(&[("a", 4000)])), None, "one zone");
        assert_eq!(by(&["a", "a"], &zones_of(&[("a", 9000), ("b", 1000)])), None, "overload");
        assert_eq!(by(&["a", "a", "a"], &zones_of(&[("a", 4000), ("b", 2000)])).as_deref(), Some("aab"));
        assert_eq!(by(&["a", "a"], &Zones::new()), None);
    }

    #[test]
    fn nodes_that_do_not_tell_end_it() {
        let node = |labels: serde_json::Value, ready: &str, cpu: &str| -> Node {
            serde_json::from_value(json!({"metadata": {"name": "n", "labels": labels}, "status": {
                "allocatable": {"cpu": cpu}, "conditions": [{"type": "Ready", "status": ready}]}}))
            .unwrap()
        };
        let a = node(json!({ZONE: "a"}), "True", "2");
        let more = node(json!({ZONE: "a"}), "True", "500m");
        let down = node(json!({ZONE: "b"}), "False", "2");
        let control = node(json!({CONTROL[0]: ""}), "True", "2");
        let lost = node(json!({}), "True", "2");
        assert_eq!(zones([&a, &more, &down, &control].into_iter()), zones_of(&[("a", 2500)]));
        assert_eq!(zones([&a, &lost].into_iter()), Zones::new());
    }

    #[test]
    fn ready_endpoints_have_hints_or_none_has() {
        let endpoint = |zone: Option<&str>, ready: bool| -> Endpoint {
            serde_json::from_value(json!({"addresses": ["10.0.0.1"], "zone": zone, "conditions": {"ready": ready}}))
                .unwrap()
        };
        let zones = zones_of(&[("a", 1000), ("b", 1000)]);
        let mut list = [endpoint(Some("a"), true), endpoint(Some("b"), true), endpoint(Some("b"), false)];
        assign(list.iter_mut().collect(), &zones);
        let hints = |e: &Endpoint| e.hints.as_ref().map(|h| h.for_zones.as_ref().unwrap()[0].name.clone());
        assert_eq!(list.each_ref().map(hints), [Some("a".into()), Some("b".into()), None]);
        let mut list = [endpoint(Some("a"), true), endpoint(Some("b"), true), endpoint(None, true)];
        assign(list.iter_mut().collect(), &zones);
        assert_eq!(list.each_ref().map(hints), [None, None, None]);
    }
}
