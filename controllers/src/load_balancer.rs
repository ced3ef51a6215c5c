//! Addresses for Services of type LoadBalancer on machines without a cloud: those of the nodes.
//!
//! In: Services, nodes, endpoint slices (for external policy Local). Out: `status.loadBalancer`. Every node's proxy answers
//! on these addresses, so that any of them will do. One port of the nodes serves one Service: the oldest that wants it; the
//! others wait, and are told whom for. Services with a `loadBalancerClass`, and those whose addresses somebody else has
//! set, are left alone.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::context::{Context, Key, key};
use crate::endpoints::slices::SERVICE_NAME;
use isopod_client::objects::HasMeta;
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

const NAME: &str = "service-controller";
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Condition that says who gave the addresses.
const GIVEN: &str = "isopod.dev/NodeAddresses";
/// Ports that reach the nodes themselves: SSH, the API server, the agent, the proxy's health.
const RESERVED: [i32; 4] = [22, 6443, 10250, 10256];

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
}

/// A node that may stand for Services.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    name: String,
    addresses: Vec<IpAddr>,
}

/// What becomes of a Service.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    /// Not ours.
    Leave,
    Addresses(Vec<IpAddr>),
    /// No address, and why.
    Wait(String),
}

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder: ctx.recorder.component(NAME) });
    let queue: Arc<Queue<Key>> = Queue::new();
    let (c, q) = (ctx.clone(), queue.clone());
    let wake = Arc::new(move |wants: &dyn Fn(&Service) -> bool| {
        let services = c.caches.services.list();
        services.iter().filter(|s| is_ours(s) && wants(s)).for_each(|s| q.add(key(&**s)));
    });
    let (q, w) = (queue.clone(), wake.clone());
    ctx.caches.services.subscribe(move |change| {
        let service = change.object();
        q.add(key(&**service));
        let same = |a: &Service, b: &Service| is_ours(a) == is_ours(b) && ports(a).eq(ports(b));
        // Others may wait for a port of this one, or lose theirs to it.
        match change {
            Change::Updated(old, new) if same(old, new) || !(is_ours(old) || is_ours(new)) => {}
            Change::Updated(old, new) => w(&|other| rivals(other, old) || rivals(other, new)),
            _ if is_ours(service) => w(&|other| rivals(other, service)),
            Change::Added(_) | Change::Deleted(_) => {}
        }
    });
    ctx.caches.nodes.subscribe(move |change| {
        let same = matches!(change, Change::Updated(old, new) if place(old) == place(new));
        if !same {
            wake(&|_| true);
        }
    });
    let (c, q) = (controller.clone(), queue.clone());
    ctx.caches.slices.subscribe(move |change| {
        let slice = change.object();
        let Some(service) = slice.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)) else { return };
        let service = c.ctx.caches.services.get(slice.namespace(), service);
        if let Some(service) = service.filter(|s| is_balancer(s) && is_local(s)) {
            q.add(key(&*service));
        }
    });
    // One worker: who comes first is decided by what the others have.
    spawn_workers(NAME, &queue, 1, &ctx.stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
}

fn is_balancer(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|s| s.type_.as_deref() == Some("LoadBalancer")) && !service.deleting()
}

fn is_ours(service: &Service) -> bool {
    is_balancer(service) && service.spec.as_ref().is_some_and(|s| s.load_balancer_class.is_none())
}

fn is_local(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|s| s.external_traffic_policy.as_deref() == Some("Local"))
}

/// The node's addresses for clients, when it is ready: external ones, else those of the cluster.
fn place(node: &Node) -> Option<Place> {
    let status = node.status.as_ref()?;
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    let excluded = node.metadata.labels.as_ref().is_some_and(|l| l.contains_key(EXCLUDE));
    let of = |kind: &str| -> Vec<IpAddr> {
        let all = status.addresses.iter().flatten().filter(|a| a.type_ == kind);
        all.filter_map(|a| a.address.parse().ok()).collect()
    };
    let external = of("ExternalIP");
    let addresses = if external.is_empty() { of("InternalIP") } else { external };
    (ready && !excluded && !node.deleting()).then(|| Place { name: node.name().to_owned(), addresses })
}

/// Nodes that have a ready endpoint of the Service.
fn hosts(slices: &[Arc<EndpointSlice>], service: &Service) -> BTreeSet<String> {
    let own = |s: &&Arc<EndpointSlice>| {
        s.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)).map(String::as_str) == Some(service.name())
    };
    let endpoints = slices.iter().filter(own).flat_map(|s| s.endpoints.iter().flatten());
    let ready = endpoints.filter(|e| e.conditions.as_ref().is_none_or(|c| c.ready.unwrap_or(true)));
    ready.filter_map(|e| e.node_name.clone()).collect()
}

fn ports(service: &Service) -> impl Iterator<Item = (&str, i32)> {
    let ports = service.spec.iter().flat_map(|s| s.ports.iter().flatten());
    ports.map(|p| (p.protocol.as_deref().unwrap_or("TCP"), p.port))
}

/// Whether a Service wants a port that another one, if that is ours, wants as well.
fn rivals(service: &Service, other: &Service) -> bool {
    is_ours(other) && ports(service).any(|port| ports(other).any(|p| p == port))
}

fn ingress(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let list = status.and_then(|l| l.ingress.as_ref()).into_iter().flatten();
    list.filter_map(|i| i.ip.as_deref()?.parse().ok()).collect()
}

/// Whether there is a name among the addresses: this controller never gives one.
fn is_named(service: &Service) -> bool {
    let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    status.and_then(|l| l.ingress.as_ref()).into_iter().flatten().any(|i| i.hostname.is_some())
}

/// Older Services come first.
fn age(service: &Service) -> (Option<jiff::Timestamp>, Key) {
    (service.metadata.creation_timestamp.as_ref().map(|t| t.0), key(service))
}

fn plan(service: &Service, all: &[Arc<Service>], places: &[Place], local: &BTreeSet<String>) -> Plan {
    if !is_ours(service) {
        return Plan::Leave;
    }
    let known = |a: &IpAddr| places.iter().any(|p| p.addresses.contains(a));
    let has = ingress(service);
    // Somebody else gives addresses here; or no node is well at the moment, and none of them has changed its address.
    let foreign = !has.iter().any(known) && !is_given(service);
    if is_named(service) || (!has.is_empty() && (foreign || places.is_empty())) {
        return Plan::Leave;
    }
    if let Some((protocol, port)) =
        ports(service).find(|(protocol, port)| *protocol == "TCP" && RESERVED.contains(port))
    {
        return Plan::Wait(format!("port {port}/{protocol} is the nodes' own"));
    }
    for (protocol, port) in ports(service) {
        let wants = |o: &&Arc<Service>| is_ours(o) && age(o) < age(service) && ports(o).any(|p| p == (protocol, port));
        if let Some(other) = all.iter().filter(wants).min_by_key(|o| age(o)) {
            let (namespace, name) = key(&**other);
            return Plan::Wait(format!("port {port}/{protocol} of the nodes belongs to Service {namespace}/{name}"));
        }
    }
    let families: Vec<&str> =
        service.spec.iter().flat_map(|s| s.ip_families.iter().flatten()).map(String::as_str).collect();
    let fits = |a: &IpAddr| families.is_empty() || families.contains(&if a.is_ipv4() { "IPv4" } else { "IPv6" });
    let chosen = places.iter().filter(|p| !is_local(service) || local.contains(&p.name));
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in chosen.flat_map(|p| &p.addresses).filter(|a| fits(a)) {
        if !addresses.contains(address) {
            addresses.push(*address);
        }
    }
    Plan::Addresses(addresses)
}

/// Whether the addresses are of this controller's giving. Tells a node's old address from somebody else's.
fn is_given(service: &Service) -> bool {
    service.status.iter().flat_map(|s| s.conditions.iter().flatten()).any(|c| c.type_ == GIVEN)
}

/// The Service with these addresses.
fn with_addresses(service: &Service, addresses: &[IpAddr]) -> Service {
    let mut new = service.clone();
    let one = |a: &IpAddr| LoadBalancerIngress {
        ip: Some(a.to_string()),
        ip_mode: Some("VIP".to_owned()),
        ..LoadBalancerIngress::default()
    };
    let list: Vec<_> = addresses.iter().map(one).collect();
    let status = new.status.get_or_insert_default();
    status.load_balancer = Some(LoadBalancerStatus { ingress: (!list.is_empty()).then_some(list) });
    if !is_given(service) {
        status.conditions.get_or_insert_default().push(Condition {
            type_: GIVEN.to_owned(),
            status: "True".to_owned(),
            reason: "NodeAddresses".to_owned(),
            message: "Addresses of nodes stand for this Service".to_owned(),
            last_transition_time: Time(jiff::Timestamp::now()),
            observed_generation: None,
        });
    }
    new
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let service = self.ctx.caches.services.get(&key.0, &key.1).filter(|s| is_ours(s));
        let Some(service) = service else { return Ok(None) };
        let mut places: Vec<Place> = self.ctx.caches.nodes.list().iter().filter_map(|n| place(n)).collect();
        places.sort_by(|a, b| a.name.cmp(&b.name));
        let local = match is_local(&service) {
            true => hosts(&self.ctx.caches.slices.in_namespace(&key.0), &service),
            false => BTreeSet::new(),
        };
        let all = self.ctx.caches.services.list();
        let addresses = match plan(&service, &all, &places, &local) {
            Plan::Leave => return Ok(None),
            Plan::Addresses(list) => list,
            Plan::Wait(why) => {
                self.recorder.warning(&*service, "SyncLoadBalancerFailed", format!("No address: {why}"));
                Vec::new()
            }
        };
        if ingress(&service) == addresses {
            return Ok(None);
        }
        let new = with_addresses(&service, &addresses);
        if self.ctx.objects.update(&*service, &new, "status").await?.is_some() && !addresses.is_empty() {
            self.recorder.normal(&*service, "EnsuredLoadBalancer", "Ensured load balancer");
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(name: &str, created: &str, spec: serde_json::Value, ingress: &[&str]) -> Arc<Service> {
        let mut spec = spec;
        spec["type"] = json!("LoadBalancer");
        let ingress: Vec<_> = ingress.iter().map(|ip| json!({ "ip": ip })).collect();
        let object = json!({
            "metadata": { "namespace": "ns", "name": name, "creationTimestamp": format!("2026-01-0{created}T00:00:00Z") },
            "spec": spec, "status": { "loadBalancer": { "ingress": ingress } },
        });
        Arc::new(serde_json::from_value(object).unwrap())
    }

    fn places() -> Vec<Place> {
        [("a", "192.0.2.1"), ("b", "192.0.2.2"), ("b6", "2001:db8::2")]
            .map(|(name, ip)| Place { name: name.into(), addresses: vec![ip.parse().unwrap()] })
            .into()
    }

    fn addresses(list: &[&str]) -> Plan {
        Plan::Addresses(list.iter().map(|a| a.parse().unwrap()).collect())
    }

    #[test]
    fn services_get_the_nodes_addresses() {
        let none = BTreeSet::new();
        let v4 = json!({ "ports": [{ "port": 80 }], "ipFamilies": ["IPv4"] });
        let web = service("web", "2", v4.clone(), &[]);
        let of = |s: &Service, all: &[Arc<Service>], local: &BTreeSet<String>| plan(s, all, &places(), local);
        assert_eq!(of(&web, &[], &none), addresses(&["192.0.2.1", "192.0.2.2"]));
        let six = service("six", "2", json!({ "ports": [{ "port": 80 }], "ipFamilies": ["IPv6"] }), &[]);
        assert_eq!(of(&six, &[], &none), addresses(&["2001:db8::2"]));
        let local = service("l", "2", json!({ "ports": [{ "port": 80 }], "externalTrafficPolicy": "Local" }), &[]);
        assert_eq!(of(&local, &[], &BTreeSet::from(["b".to_owned()])), addresses(&["192.0.2.2"]));
        assert_eq!(of(&local, &[], &none), addresses(&[]));
        let class = service("c", "2", json!({ "ports": [{ "port": 80 }], "loadBalancerClass": "x/y" }), &[]);
        assert_eq!(of(&class, &[], &none), Plan::Leave);
        let other = service("m", "2", v4, &["203.0.113.7"]);
        assert_eq!(of(&other, &[], &none), Plan::Leave);
        // A node's address that was ours once and is nobody's now is replaced.
        let moved = with_addresses(&other, &["198.51.100.1".parse().unwrap()]);
        assert_eq!(of(&moved, &[], &none), addresses(&["192.0.2.1", "192.0.2.2"]));
        assert_eq!(plan(&moved, &[], &[], &none), Plan::Leave, "no node is well: wait");
        let mut named = moved;
        let given = named.status.as_mut().and_then(|s| s.load_balancer.as_mut()?.ingress.as_mut()).unwrap();
        given[0].hostname = Some("lb.example.com".to_owned());
        assert_eq!(of(&named, &[], &none), Plan::Leave, "somebody else's name");
    }

    #[test]
    fn the_oldest_has_the_port() {
        let none = BTreeSet::new();
        let ports = |n: i32, p: &str| json!({ "ports": [{ "port": n, "protocol": p }] });
        let all = [
            service("old", "1", ports(80, "TCP"), &["192.0.2.1"]),
            service("young", "2", ports(80, "TCP"), &[]),
            service("udp", "3", ports(80, "UDP"), &[]),
            service("ssh", "1", ports(22, "TCP"), &[]),
        ];
        let of = |n: usize| plan(&all[n], &all, &places(), &none);
        assert!(matches!(of(0), Plan::Addresses(_)));
        assert_eq!(of(1), Plan::Wait("port 80/TCP of the nodes belongs to Service ns/old".into()));
        assert!(matches!(of(2), Plan::Addresses(_)));
        assert_eq!(of(3), Plan::Wait("port 22/TCP is the nodes' own".into()));
    }

    #[test]
    fn only_ready_nodes_stand_for_services() {
        let node = |status: &str, extra: serde_json::Value| -> Option<Place> {
            let object = json!({
                "metadata": { "name": "n", "labels": extra },
                "status": { "conditions": [{ "type": "Ready", "status": status }], "addresses": [
                    { "type": "Hostname", "address": "n" }, { "type": "InternalIP", "address": "192.0.2.1" }] },
            });
            place(&serde_json::from_value(object).unwrap())
        };
        assert_eq!(node("True", json!({})).unwrap().addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(node("Unknown", json!({})), None);
        assert_eq!(node("True", json!({ EXCLUDE: "" })), None);
    }
}
