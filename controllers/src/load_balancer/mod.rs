//! Addresses for Services of type LoadBalancer on machines without a cloud: those of the nodes, or those of a pool.
//!
//! In: Services, nodes and their leases, endpoint slices (for external policy Local), the pool's ConfigMap. Out:
//! `status.loadBalancer`, and of addresses of the pool, in a condition, the node that announces them (`elect`). Every node's
//! proxy answers on these addresses, so that any of them will do. One port of the nodes serves one Service: the oldest that
//! wants it; the others wait, and are told whom for. Services with a `loadBalancerClass`, and those whose addresses
//! somebody else has set, are left alone.

mod elect;
mod pool;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use self::elect::Leases;
use self::pool::{Pool, Pools, family};

use crate::context::{Context, Key, key};
use crate::endpoints::slices::SERVICE_NAME;
use isopod_api::announcement;
use isopod_client::objects::HasMeta;
use isopod_client::reflect::{Source, reflect};
use isopod_client::{Change, Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use parking_lot::Mutex;

const NAME: &str = "service-controller";
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Condition of a Service with addresses of the nodes. Those of a pool have [`announcement::CONDITION`].
const GIVEN: &str = "isopod.dev/NodeAddresses";
/// A lease is over a moment after its end.
const SETTLE: Duration = Duration::from_millis(10);
/// Ports that reach the nodes themselves: SSH, the API server, the agent, the proxy's health.
const RESERVED: [i32; 4] = [22, 6443, 10250, 10256];

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    pools: Arc<Pools>,
    leases: Leases,
    /// What was written last: the caches learn of it later.
    given: Mutex<HashMap<Key, Vec<IpAddr>>>,
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
    let queue: Arc<Queue<Key>> = Queue::new();
    let (c, q) = (ctx.clone(), queue.clone());
    let wake = Arc::new(move |wants: &dyn Fn(&Service) -> bool| {
        let services = c.caches.services.list();
        services.iter().filter(|s| is_ours(s) && wants(s)).for_each(|s| q.add(key(&**s)));
    });
    let w = wake.clone();
    let pools = Arc::new(Pools { now: Mutex::default(), changed: Box::new(move || w(&|_| true)) });
    let controller = Arc::new(Controller {
        ctx: ctx.clone(),
        recorder: ctx.recorder.component(NAME),
        pools: pools.clone(),
        leases: Leases::default(),
        given: Mutex::default(),
    });
    let source = Source {
        path: format!("/api/v1/namespaces/{}/configmaps", pool::NAMESPACE),
        query: format!("fieldSelector=metadata.name%3D{}", pool::NAME),
        metadata_only: false,
    };
    let (client, stop) = (ctx.objects.client().clone(), ctx.stop.clone());
    tokio::spawn(async move { reflect(client, source, &*pools, stop).await });
    let (q, w, c) = (queue.clone(), wake.clone(), controller.clone());
    ctx.caches.services.subscribe(move |change| {
        let service = change.object();
        q.add(key(&**service));
        if change.is_deleted() {
            c.given.lock().remove(&key(&**service));
        }
        // Others may wait for an address of this one.
        let had = match change {
            Change::Added(_) => false,
            Change::Updated(old, new) => is_ours(old) && (!is_ours(new) || ingress(old) != ingress(new)),
            Change::Deleted(old) => is_ours(old),
        };
        if had {
            w(&|other| ingress(other).is_empty());
        }
        let same = |a: &Service, b: &Service| is_ours(a) == is_ours(b) && ports(a).eq(ports(b));
        // Or for a port, or lose theirs to it.
        match change {
            Change::Updated(old, new) if same(old, new) || !(is_ours(old) || is_ours(new)) => {}
            Change::Updated(old, new) => w(&|other| rivals(other, old) || rivals(other, new)),
            _ if is_ours(service) => w(&|other| rivals(other, service)),
            Change::Added(_) | Change::Deleted(_) => {}
        }
    });
    let w = wake.clone();
    ctx.caches.nodes.subscribe(move |change| {
        let same = matches!(change, Change::Updated(old, new) if place(old) == place(new));
        if !same {
            w(&|_| true);
        }
    });
    let c = controller.clone();
    ctx.caches.leases.subscribe(move |change| {
        if c.leases.hear(change) {
            wake(&|service| announcer(service).is_none());
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

/// The node that announces a Service's addresses.
fn announcer(service: &Service) -> Option<&str> {
    let condition = conditions(service).find(|c| c.type_ == announcement::CONDITION)?;
    announcement::node(&condition.message).filter(|_| condition.status == "True")
}

fn conditions(service: &Service) -> impl Iterator<Item = &Condition> {
    service.status.iter().flat_map(|s| s.conditions.iter().flatten())
}

/// Whether a Service has an address that this controller did not give.
fn is_foreign(service: &Service, has: &[IpAddr], known: impl Fn(&IpAddr) -> bool) -> bool {
    is_named(service) || (!has.is_empty() && !has.iter().any(known) && !is_given(service))
}

/// Gives addresses of the pool.
fn plan_pool(service: &Service, has: &[IpAddr], pool: &Pool, taken: impl FnOnce() -> HashSet<IpAddr>) -> Plan {
    if !is_ours(service) || is_foreign(service, has, |a| pool.contains(a)) {
        return Plan::Leave;
    }
    let Some(spec) = &service.spec else { return Plan::Leave };
    let families: Vec<&str> = spec.ip_families.iter().flatten().map(String::as_str).collect();
    let wish = match spec.load_balancer_ip.as_deref().filter(|w| !w.is_empty()).map(|w| (w, w.parse())) {
        None => None,
        Some((_, Ok(address))) => Some(address),
        Some((text, Err(_))) => return Plan::Wait(format!("loadBalancerIP \"{text}\" is no address")),
    };
    let families = if families.is_empty() { &["IPv4"][..] } else { &families };
    if pool.suits(families, has, wish) {
        return Plan::Addresses(has.to_vec());
    }
    match pool.choose(families, has, wish, &taken()) {
        Ok(addresses) => Plan::Addresses(addresses),
        Err(why) => Plan::Wait(why),
    }
}

/// Gives the nodes' addresses.
fn plan(service: &Service, all: &[Arc<Service>], places: &[Place], local: &BTreeSet<String>) -> Plan {
    if !is_ours(service) {
        return Plan::Leave;
    }
    let has = ingress(service);
    // Somebody else gives addresses here; or no node is well at the moment, and none of them has changed its address.
    let foreign = is_foreign(service, &has, |a| places.iter().any(|p| p.addresses.contains(a)));
    if foreign || (!has.is_empty() && places.is_empty()) {
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
    let fits = |a: &IpAddr| families.is_empty() || families.contains(&family(a));
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
    conditions(service).any(|c| c.type_ == GIVEN || c.type_ == announcement::CONDITION)
}

/// Who stands for the addresses of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stands {
    /// Every node.
    Nodes,
    /// One node, if any can.
    Node(Option<String>),
}

impl Stands {
    fn condition(&self) -> Condition {
        let (type_, status, reason, message) = match self {
            Self::Nodes => (GIVEN, "True", "NodeAddresses", "Addresses of nodes stand for this Service".to_owned()),
            Self::Node(Some(node)) => (announcement::CONDITION, "True", "Elected", announcement::message(node)),
            Self::Node(None) => {
                let why = "no node can: none that is ready has endpoints that may be used".to_owned();
                (announcement::CONDITION, "False", "NoNode", why)
            }
        };
        Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: Time(jiff::Timestamp::now()),
            observed_generation: None,
        }
    }
}

/// The Service with these addresses; itself when it has them.
fn with_addresses(service: &Service, addresses: &[IpAddr], stands: &Stands) -> Service {
    let mut new = service.clone();
    let status = new.status.get_or_insert_default();
    if ingress(service) != addresses {
        let one = |a: &IpAddr| LoadBalancerIngress {
            ip: Some(a.to_string()),
            ip_mode: Some("VIP".to_owned()),
            ..LoadBalancerIngress::default()
        };
        let list: Vec<_> = addresses.iter().map(one).collect();
        status.load_balancer = Some(LoadBalancerStatus { ingress: (!list.is_empty()).then_some(list) });
    }
    let wanted = (!addresses.is_empty()).then(|| stands.condition());
    let mut all = status.conditions.take().unwrap_or_default();
    let present = wanted.as_ref().is_some_and(|w| all.iter().any(|c| (&c.type_, &c.message) == (&w.type_, &w.message)));
    if !present {
        all.retain(|c| c.type_ != GIVEN && c.type_ != announcement::CONDITION);
        all.extend(wanted);
    }
    status.conditions = (!all.is_empty()).then_some(all);
    new
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let service = self.ctx.caches.services.get(&key.0, &key.1).filter(|s| is_ours(s));
        let Some(service) = service else {
            self.given.lock().remove(&key);
            return Ok(None);
        };
        let mut places: Vec<Place> = self.ctx.caches.nodes.list().iter().filter_map(|n| place(n)).collect();
        places.sort_by(|a, b| a.name.cmp(&b.name));
        let local = match is_local(&service) {
            true => hosts(&self.ctx.caches.slices.in_namespace(&key.0), &service),
            false => BTreeSet::new(),
        };
        let all = self.ctx.caches.services.list();
        let Some(pool) = self.pools.now.lock().clone() else { return Ok(None) };
        let (plan, mut stands) = match &pool {
            Ok(pool) if pool.is_empty() => (plan(&service, &all, &places, &local), Stands::Nodes),
            Ok(pool) => {
                let others = || all.iter().filter(|o| is_ours(o) && self::key(&***o) != key);
                let taken = || others().flat_map(|o| self.addresses(o)).collect();
                (plan_pool(&service, &self.addresses(&service), pool, taken), Stands::Node(None))
            }
            // What a Service has, it keeps.
            Err(_) if !ingress(&service).is_empty() => return Ok(None),
            Err(why) => (Plan::Wait(why.clone()), Stands::Node(None)),
        };
        let addresses = match plan {
            Plan::Leave => return Ok(None),
            Plan::Addresses(list) => list,
            Plan::Wait(why) => {
                self.recorder.warning(&*service, "SyncLoadBalancerFailed", format!("No address: {why}"));
                Vec::new()
            }
        };
        let mut again = None;
        if let Stands::Node(node) = &mut stands
            && !addresses.is_empty()
        {
            let able = places.iter().map(|p| p.name.as_str()).filter(|n| !is_local(&service) || local.contains(*n));
            let able: Vec<(&str, Duration)> = able.filter_map(|n| Some((n, self.leases.left(n)?))).collect();
            let loads = || {
                let mut loads = HashMap::<&str, usize>::new();
                all.iter().filter_map(|s| announcer(s)).for_each(|node| *loads.entry(node).or_default() += 1);
                loads
            };
            if let Some((name, left)) = elect::choose(announcer(&service), &able, loads) {
                (*node, again) = (Some(name.to_owned()), Some(left + SETTLE));
            }
        }
        let new = with_addresses(&service, &addresses, &stands);
        if new == *service {
            return Ok(again);
        }
        let had = ingress(&service);
        if self.ctx.objects.update(&*service, &new, "status").await?.is_some() {
            self.given.lock().insert(key, addresses.clone());
            if !addresses.is_empty() && had != addresses {
                self.recorder.normal(&*service, "EnsuredLoadBalancer", "Ensured load balancer");
            }
            if let (Stands::Node(Some(node)), false) = (&stands, announcer(&service) == announcer(&new)) {
                self.recorder.normal(&*service, "NodeElected", format!("Node {node} announces its addresses"));
            }
        }
        Ok(again)
    }

    /// The addresses a Service has, also those the caches do not know yet.
    fn addresses(&self, service: &Service) -> Vec<IpAddr> {
        self.given.lock().get(&key(service)).cloned().unwrap_or_else(|| ingress(service))
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
        let moved = with_addresses(&other, &["198.51.100.1".parse().unwrap()], &Stands::Nodes);
        assert_eq!(of(&moved, &[], &none), addresses(&["192.0.2.1", "192.0.2.2"]));
        assert_eq!(plan(&moved, &[], &[], &none), Plan::Leave, "no node is well: wait");
        let mut named = moved;
        let given = named.status.as_mut().and_then(|s| s.load_balancer.as_mut()?.ingress.as_mut()).unwrap();
        given[0].hostname = Some("lb.example.com".to_owned());
        assert_eq!(of(&named, &[], &none), Plan::Leave, "somebody else's name");
    }

    #[test]
    fn addresses_of_the_pool_and_of_nodes_take_each_others_place() {
        let pool = Pool::parse("192.0.2.100-192.0.2.101").unwrap();
        let ip = |a: &str| -> IpAddr { a.parse().unwrap() };
        let of =
            |s: &Service, taken: &[&str]| plan_pool(s, &ingress(s), &pool, || taken.iter().map(|a| ip(a)).collect());
        let web = service("web", "2", json!({ "ports": [{ "port": 22 }] }), &[]);
        assert_eq!(of(&web, &["192.0.2.100"]), addresses(&["192.0.2.101"]), "any port: the address is its own");
        let with = |s: &Service, addresses: &[&str], stands: Stands| {
            let list: Vec<IpAddr> = addresses.iter().map(|a| ip(a)).collect();
            with_addresses(s, &list, &stands)
        };
        let on_nodes = with(&web, &["192.0.2.1", "192.0.2.2"], Stands::Nodes);
        assert_eq!(of(&on_nodes, &[]), addresses(&["192.0.2.100"]), "what was given before is replaced");
        let announced = with(&on_nodes, &["192.0.2.100"], Stands::Node(Some("a.b".into())));
        assert_eq!((announcer(&announced), conditions(&announced).count()), (Some("a.b"), 1));
        assert_eq!(with(&announced, &["192.0.2.100"], Stands::Node(Some("a.b".into()))), announced, "nothing to write");
        assert_eq!(announcer(&with(&announced, &["192.0.2.100"], Stands::Node(None))), None);
        let none = with(&announced, &[], Stands::Nodes);
        assert!(ingress(&none).is_empty() && !is_given(&none), "none, and no word of any");
        assert_eq!(with(&web, &[], Stands::Node(None)), *web);
        let again = plan(&announced, &[], &places(), &BTreeSet::new());
        assert_eq!(again, Plan::Wait("port 22/TCP is the nodes' own".into()), "the pool is gone");
        let foreign = service("m", "2", json!({}), &["203.0.113.7"]);
        assert_eq!(of(&foreign, &[]), Plan::Leave);
        let asks = |what: &str| of(&service("s", "2", json!({ "loadBalancerIP": what }), &[]), &["192.0.2.101"]);
        assert_eq!(asks("192.0.2.100"), addresses(&["192.0.2.100"]));
        assert_eq!(asks("192.0.2.101"), Plan::Wait("192.0.2.101 belongs to another Service".into()));
        assert_eq!(asks("x"), Plan::Wait("loadBalancerIP \"x\" is no address".into()));
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
