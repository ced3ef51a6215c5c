//! EndpointSlices of the Services with a selector.

use super::topology::{self, Zones};
use super::trigger::{self, Triggers};
use super::{Key, Port, TRIGGER_TIME, key};
use crate::context::Context;
use crate::ownership::owner_reference;
use crate::pods;
use crate::written::Written;
use isopod_client::objects::{DeleteOptions, HasMeta, is_namespace_terminating, is_not_found, message};
use isopod_client::{Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// The label that names a slice's Service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The label that names a slice's writer.
pub(super) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const PER_SLICE: usize = 100;
const CATCH_UP: Duration = Duration::from_millis(10);

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    queue: Arc<Queue<Key>>,
    triggers: Triggers,
    written: Written,
}

/// Starts the workers of the queue that is returned.
pub(super) fn start(ctx: &Arc<Context>) -> Arc<Queue<Key>> {
    let controller = Arc::new(Controller {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component("endpoint-slice-controller"),
        queue: Queue::new(),
        triggers: Triggers::default(),
        written: Written::default(),
    });
    let c = controller.clone();
    ctx.caches.slices.subscribe(move |change| super::wake_for_slice(&c.queue, &c.written, MANAGER, change));
    let c = controller.clone();
    ctx.caches.nodes.subscribe(move |change| {
        let same =
            matches!(change, isopod_client::Change::Updated(old, new) if topology::share(old) == topology::share(new));
        if !same {
            let services = c.ctx.caches.services.list();
            services.iter().filter(|s| topology::is_wanted(s)).for_each(|s| c.queue.add(key(&**s)));
        }
    });
    let queue = controller.queue.clone();
    spawn_workers("endpointslice-controller", &queue, 5, &ctx.stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
    queue
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let Some(service) = self.ctx.caches.services.get(&key.0, &key.1) else {
            self.triggers.forget(&key);
            return Ok(None);
        };
        let Some(selector) = super::selector(&service) else { return Ok(None) };
        if service.deleting() {
            return Ok(None);
        }
        let own = |s: &EndpointSlice| super::service_of(s, MANAGER) == Some(service.name()) && !s.deleting();
        let existing = self.ctx.caches.slices.select(&key.0, own);
        if !self.written.caught_up(&key, existing.iter().map(|s| &**s)) {
            return Ok(Some(CATCH_UP));
        }
        let pods = super::selected(&self.ctx, &service, selector);
        let zone = |node: &str| {
            let node = self.ctx.caches.nodes.get("", node)?;
            node.metadata.labels.as_ref()?.get("topology.kubernetes.io/zone").cloned()
        };
        let time = self.triggers.next(&key, &service, &pods).map(trigger::text);
        let existing: Vec<&EndpointSlice> = existing.iter().map(|s| &**s).collect();
        let zones = topology::is_wanted(&service).then(|| {
            let nodes = self.ctx.caches.nodes.list();
            topology::zones(nodes.iter().map(|n| &**n))
        });
        let plan = plan(&service, &pods, &existing, (&zone, zones.as_ref()), time.as_deref());
        self.apply(&key, &service, plan).await
    }

    async fn apply(&self, key: &Key, service: &Service, plan: Plan<'_>) -> Result<Option<Duration>, kube::Error> {
        let mut result = Ok(None);
        for slice in plan.delete {
            let options = DeleteOptions::uid(slice.uid());
            if let Err(error) = self.ctx.objects.delete::<EndpointSlice>(&key.0, slice.name(), &options).await {
                result = Err(error);
            }
        }
        for slice in plan.create {
            match self.ctx.objects.create(&slice).await {
                Ok(slice) => self.written.record(key, &slice),
                Err(error) if is_namespace_terminating(&error) => return Ok(None),
                Err(error) => result = Err(error),
            }
        }
        for (old, new) in plan.update {
            match self.ctx.objects.update(old, &new, "").await {
                Ok(Some(slice)) => self.written.record(key, &slice),
                Ok(None) => {}
                Err(error) if is_not_found(&error) => {}
                Err(error) => result = Err(error),
            }
        }
        if let Err(error) = &result {
            let text = format!(
                "Error updating Endpoint Slices for Service {}/{}: {}",
                service.namespace(),
                service.name(),
                message(error)
            );
            self.recorder.warning(service, "FailedToUpdateEndpointSlices", text);
        }
        result
    }
}

/// What to change.
#[derive(Debug, Default)]
struct Plan<'a> {
    create: Vec<EndpointSlice>,
    update: Vec<(&'a EndpointSlice, EndpointSlice)>,
    delete: Vec<&'a EndpointSlice>,
}

fn families(service: &Service) -> Vec<&'static str> {
    let spec = service.spec.as_ref();
    let named = spec.and_then(|s| s.ip_families.as_ref()).filter(|f| !f.is_empty());
    match named {
        Some(families) => families.iter().map(|f| if f == "IPv6" { "IPv6" } else { "IPv4" }).collect(),
        None => match spec.and_then(|s| s.cluster_ip.as_deref()) {
            Some(ip) if ip.contains(':') => vec!["IPv6"],
            _ => vec!["IPv4"],
        },
    }
}

fn endpoint(service: &Service, pod: &Pod, addresses: Vec<String>, zone: Option<String>) -> Endpoint {
    let serving = pods::is_ready(pod);
    let terminating = pod.deleting();
    let publish = service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses).unwrap_or(false);
    let node = pods::node(pod);
    let ready = publish || (serving && !terminating);
    Endpoint {
        addresses,
        hints: hints(service, node, zone.as_deref()).filter(|_| ready),
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: super::hostname(pod, service),
        node_name: (!node.is_empty()).then(|| node.to_owned()),
        target_ref: Some(super::reference(pod)),
        zone,
        ..Endpoint::default()
    }
}

/// Where traffic to an endpoint should come from, as `spec.trafficDistribution` wants it: from its own zone, or its node.
fn hints(service: &Service, node: &str, zone: Option<&str>) -> Option<EndpointHints> {
    if topology::is_wanted(service) {
        return None;
    }
    let same_node = match service.spec.as_ref()?.traffic_distribution.as_deref()? {
        "PreferSameZone" | "PreferClose" => false,
        "PreferSameNode" => true,
        _ => return None,
    };
    let for_zones = zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let for_nodes = (same_node && !node.is_empty()).then(|| vec![ForNode { name: node.to_owned() }]);
    (for_zones.is_some() || for_nodes.is_some()).then_some(EndpointHints { for_nodes, for_zones })
}

fn to_ports(ports: &[Port]) -> Vec<EndpointPort> {
    let convert = |p: &Port| EndpointPort {
        name: Some(p.name.clone()),
        port: Some(p.port),
        protocol: Some(p.protocol.clone()),
        app_protocol: p.app_protocol.clone(),
    };
    ports.iter().map(convert).collect()
}

fn from_ports(slice: &EndpointSlice) -> Vec<Port> {
    let convert = |p: &EndpointPort| Port {
        name: p.name.clone().unwrap_or_default(),
        port: p.port.unwrap_or(0),
        protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
        app_protocol: p.app_protocol.clone(),
    };
    let mut ports: Vec<Port> = slice.ports.iter().flatten().map(convert).collect();
    ports.sort();
    ports
}

/// The identity of an endpoint across updates.
fn identity(endpoint: &Endpoint) -> &str {
    endpoint.target_ref.as_ref().and_then(|r| r.uid.as_deref()).unwrap_or_default()
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = super::labels(service);
    labels.insert(SERVICE_NAME.into(), service.name().to_owned());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    labels
}

fn fresh(service: &Service, family: &str, ports: &[Port], endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name())),
            namespace: Some(service.namespace().to_owned()),
            labels: Some(labels(service)),
            owner_references: Some(vec![owner_reference(service)]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        endpoints: Some(endpoints),
        ports: Some(to_ports(ports)),
    }
}

fn stamp(slice: &mut EndpointSlice, time: Option<&str>) {
    if let Some(time) = time {
        slice.metadata.annotations.get_or_insert_default().insert(TRIGGER_TIME.to_owned(), time.to_owned());
    }
}

/// The zone of a node, and what zones carry where the Service has its endpoints shared out among them.
type Places<'p> = (&'p dyn Fn(&str) -> Option<String>, Option<&'p Zones>);

/// The changes that bring the slices in line with the pods.
fn plan<'a>(
    service: &Service,
    pods: &[Arc<Pod>],
    existing: &[&'a EndpointSlice],
    places: Places<'_>,
    time: Option<&str>,
) -> Plan<'a> {
    let mut plan = Plan::default();
    let families = families(service);
    plan.delete.extend(existing.iter().filter(|s| !families.contains(&s.address_type.as_str())));
    for family in families {
        let slices: Vec<&'a EndpointSlice> = existing.iter().copied().filter(|s| s.address_type == family).collect();
        plan_family(service, pods, family, &slices, places, &mut plan);
    }
    for slice in plan.create.iter_mut().chain(plan.update.iter_mut().map(|(_, new)| new)) {
        stamp(slice, time);
    }
    plan
}

fn plan_family<'a>(
    service: &Service,
    pods: &[Arc<Pod>],
    family: &str,
    existing: &[&'a EndpointSlice],
    (zone, zones): Places<'_>,
    plan: &mut Plan<'a>,
) {
    let mut desired: BTreeMap<Vec<Port>, Vec<Endpoint>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| super::eligible(pod, true)) {
        let addresses: Vec<String> = super::addresses(pod)
            .into_iter()
            .filter(|ip| ip.contains(':') == (family == "IPv6"))
            .take(1)
            .map(str::to_owned)
            .collect();
        if addresses.is_empty() {
            continue;
        }
        let mut ports = super::ports(service, pod);
        ports.sort();
        desired.entry(ports).or_default().push(endpoint(service, pod, addresses, zone(pods::node(pod))));
    }
    if let Some(zones) = zones {
        topology::assign(desired.values_mut().flatten().collect(), zones);
    }
    let mut by_ports: HashMap<Vec<Port>, Vec<&'a EndpointSlice>> = HashMap::new();
    for slice in existing {
        by_ports.entry(from_ports(slice)).or_default().push(slice);
    }
    // A Service without endpoints keeps one empty slice, so that a reader can tell "none" from "not looked at yet".
    if desired.is_empty() {
        desired.insert(Vec::new(), Vec::new());
    }
    for (ports, endpoints) in desired {
        let slices = by_ports.remove(&ports).unwrap_or_default();
        plan_group(service, family, &ports, endpoints, slices, plan);
    }
    plan.delete.extend(by_ports.into_values().flatten());
}

fn plan_group<'a>(
    service: &Service,
    family: &str,
    ports: &[Port],
    endpoints: Vec<Endpoint>,
    slices: Vec<&'a EndpointSlice>,
    plan: &mut Plan<'a>,
) {
    let mut wanted: BTreeMap<String, Endpoint> = endpoints.into_iter().map(|e| (identity(&e).to_owned(), e)).collect();
    let none_wanted = wanted.is_empty();
    // First what each slice keeps, then the rest into those that change anyway, then into the fullest with room.
    let mut kept: Vec<(&'a EndpointSlice, Vec<Endpoint>, bool)> = Vec::new();
    for slice in slices {
        let old = slice.endpoints.as_deref().unwrap_or_default();
        let keep: Vec<Endpoint> = old.iter().filter_map(|e| wanted.remove(identity(e))).collect();
        let changed = keep.as_slice() != old
            || slice.metadata.labels.as_ref() != Some(&labels(service))
            || slice.metadata.owner_references.as_ref() != Some(&vec![owner_reference(service)]);
        kept.push((slice, keep, changed));
    }
    let mut rest = wanted.into_values();
    kept.sort_by_key(|(_, keep, changed)| (!*changed, std::cmp::Reverse(keep.len())));
    for (_, keep, changed) in &mut kept {
        let room = PER_SLICE.saturating_sub(keep.len());
        let before = keep.len();
        keep.extend(rest.by_ref().take(room));
        *changed |= keep.len() != before;
    }
    let mut spare_empty = none_wanted;
    for (slice, keep, changed) in kept {
        if keep.is_empty() && !std::mem::take(&mut spare_empty) {
            plan.delete.push(slice);
        } else if changed {
            let mut new = slice.clone();
            new.metadata.labels = Some(labels(service));
            new.metadata.owner_references = Some(vec![owner_reference(service)]);
            new.endpoints = Some(keep);
            new.ports = Some(to_ports(ports));
            plan.update.push((slice, new));
        }
    }
    let rest: Vec<Endpoint> = rest.collect();
    if spare_empty {
        plan.create.push(fresh(service, family, ports, Vec::new()));
    }
    for chunk in rest.chunks(PER_SLICE) {
        plan.create.push(fresh(service, family, ports, chunk.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{pod, service};
    use super::*;
    use serde_json::json;

    fn make<'a>(pods: &[Arc<Pod>], existing: &[&'a EndpointSlice]) -> Plan<'a> {
        plan(&service(json!([{"port": 80, "targetPort": "http"}])), pods, existing, (&|_| Some("z".into()), None), None)
    }

    fn sizes(slices: &[EndpointSlice]) -> Vec<usize> {
        slices.iter().map(|s| s.endpoints.as_ref().map_or(0, Vec::len)).collect()
    }

    fn many(n: usize) -> Vec<Arc<Pod>> {
        (0..n).map(|i| pod(&format!("p{i:03}"), &format!("10.0.{}.{}", i / 250, i % 250 + 1), true)).collect()
    }

    #[test]
    fn a_hundred_per_slice_and_one_when_there_is_none() {
        assert_eq!(sizes(&make(&many(250), &[]).create), [100, 100, 50]);
        let empty = make(&[], &[]);
        assert_eq!(sizes(&empty.create), [0]);
        assert!(make(&[], &[&empty.create[0]]).create.is_empty());
    }

    #[test]
    fn nothing_to_do_for_what_is_right_already() {
        let slices = make(&many(250), &[]).create;
        let existing: Vec<&EndpointSlice> = slices.iter().collect();
        let plan = make(&many(250), &existing);
        assert!(plan.create.is_empty() && plan.update.is_empty() && plan.delete.is_empty(), "{plan:?}");
    }

    #[test]
    fn one_more_pod_changes_one_slice_and_a_readiness_change_only_its_own() {
        let slices = make(&many(150), &[]).create;
        let existing: Vec<&EndpointSlice> = slices.iter().collect();
        let plan = make(&many(151), &existing);
        assert_eq!((plan.create.len(), plan.update.len()), (0, 1));
        let mut pods = many(150);
        pods[0] = pod("p000", "10.0.0.1", false);
        let plan = make(&pods, &existing);
        assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
        let endpoints = plan.update[0].1.endpoints.as_ref().unwrap();
        let changed = endpoints.iter().find(|e| identity(e) == "p000").unwrap();
        assert_eq!(changed.conditions.as_ref().and_then(|c| c.ready), Some(false));
    }

    #[test]
    fn hints_follow_the_traffic_distribution() {
        let hints = |distribution: &str, ready: bool| {
            let mut service = service(json!([{"port": 80}]));
            service.spec.get_or_insert_default().traffic_distribution = Some(distribution.to_owned());
            let plan = plan(&service, &[pod("a", "10.0.0.1", ready)], &[], (&|_| Some("z".into()), None), None);
            let hints = plan.create[0].endpoints.as_ref().unwrap()[0].hints.clone();
            serde_json::to_value(hints).unwrap()
        };
        assert_eq!(hints("PreferSameZone", true), json!({"forZones": [{"name": "z"}]}));
        assert_eq!(hints("PreferClose", true), json!({"forZones": [{"name": "z"}]}));
        let node = json!({"forNodes": [{"name": "n1"}], "forZones": [{"name": "z"}]});
        assert_eq!(hints("PreferSameNode", true), node);
        assert_eq!(hints("PreferSameNode", false), json!(null));
    }

    #[test]
    fn terminating_pods_stay_with_their_conditions_and_finished_ones_go() {
        let mut terminating = (*pod("t", "10.0.0.1", true)).clone();
        terminating.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        let mut finished = (*pod("f", "10.0.0.2", false)).clone();
        finished.status.get_or_insert_default().phase = Some("Succeeded".into());
        let plan = make(&[Arc::new(terminating), Arc::new(finished)], &[]);
        let endpoints = plan.create[0].endpoints.as_ref().unwrap();
        assert_eq!(endpoints.len(), 1);
        let conditions = endpoints[0].conditions.as_ref().unwrap();
        assert_eq!(
            (conditions.ready, conditions.serving, conditions.terminating),
            (Some(false), Some(true), Some(true))
        );
        assert_eq!(endpoints[0].zone.as_deref(), Some("z"));
    }

    #[test]
    fn zones_have_their_share_of_the_endpoints() {
        let mut service = service(json!([{"port": 80}]));
        let mode = ("service.kubernetes.io/topology-mode".to_owned(), "Auto".to_owned());
        service.metadata.annotations = Some([mode].into());
        // It comes before the other way to say it.
        service.spec.get_or_insert_default().traffic_distribution = Some("PreferSameNode".into());
        let zones = Zones::from([("y".to_owned(), 2000), ("z".to_owned(), 2000)]);
        let pods: Vec<_> = (1..=4).map(|n| pod(&format!("p{n}"), &format!("10.0.0.{n}"), true)).collect();
        let made = plan(&service, &pods, &[], (&|_| Some("z".into()), Some(&zones)), None);
        let endpoints = made.create[0].endpoints.as_ref().unwrap();
        let hint = |e: &Endpoint| e.hints.as_ref().unwrap().for_zones.as_ref().unwrap()[0].name.clone();
        let mut hints: Vec<String> = endpoints.iter().map(hint).collect();
        hints.sort();
        assert_eq!(hints, ["y", "y", "z", "z"]);
        let again =
            plan(&service, &pods, &made.create.iter().collect::<Vec<_>>(), (&|_| Some("z".into()), Some(&zones)), None);
        assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
        let alone = plan(&service, &pods, &[], (&|_| Some("z".into()), Some(&Zones::new())), None);
        assert!(alone.create[0].endpoints.iter().flatten().all(|e| e.hints.is_none()));
    }
}
