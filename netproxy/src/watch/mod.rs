//! The watches: services, endpoint slices and nodes, each parsed at once and handed on small.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node, Service as ServiceObject},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt,
        utils::{Backoff, ResetTimerBackoff},
        watcher,
    },
};
use tokio::sync::{mpsc, watch};

use crate::{
    announce::Chosen,
    dns::{server::Server, upstream::Custom},
    links::wireguard,
    model::objects::{Place, Service, ServiceName, Slice, Words},
    sync::Input,
};

pub(crate) mod policy;

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What this crate keeps of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeInfo {
    pub(crate) pod_cidrs: Vec<IpNet>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) zone: Option<Box<str>>,
    /// Public key of a node that encrypts packets between pods.
    pub(crate) wireguard: Option<wireguard::Key>,
    /// Whether load balancers should send traffic here.
    pub(crate) eligible: bool,
}

/// All nodes by name.
pub(crate) type Nodes = HashMap<String, NodeInfo>;

/// Pauses between attempts to reach the API server: short, so that services follow it as soon as it is back. Asking a
/// machine that refuses costs a packet; the jitter keeps many nodes apart.
#[derive(Debug, Default)]
struct Pauses {
    failures: u32,
}

impl Pauses {
    const FIRST: Duration = Duration::from_millis(20);
    const LOCAL: Duration = Duration::from_millis(80);
    /// From here on it is no restart but an outage.
    const OUTAGE: u32 = 300;
    const LONGEST: Duration = Duration::from_secs(1);

    fn base(&self) -> Duration {
        let grown = Self::FIRST * 2u32.saturating_pow(self.failures.min(8));
        grown.min(if self.failures < Self::OUTAGE { Self::LOCAL } else { Self::LONGEST })
    }
}

/// How long what may not be read is left alone.
const DENIED: Duration = Duration::from_secs(30);

/// So long without trouble, and it is over. (Every attempt begins with a sign of life, which tells nothing.)
const CALM: Duration = Duration::from_secs(5);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = self.base();
        self.failures = self.failures.saturating_add(1);
        Some(pause.mul_f64(rand::random_range(0.75..1.25)))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// The events of a watch that never ends. A trouble is told once, and so is its end.
fn events<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + Unpin
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let kind = std::any::type_name::<K>().rsplit("::").next().unwrap_or_default();
    let mut trouble: Option<String> = None;
    watcher(api, config)
        .backoff(ResetTimerBackoff::new(Pauses::default(), CALM))
        .inspect(move |event| match event {
            Err(error) => {
                let text = crate::sync::Chain(error).to_string();
                tracing::debug!(kind, error = text, "watch interrupted");
                if trouble.is_none() {
                    tracing::info!(kind, error = text, "watch interrupted; trying until it is back");
                }
                trouble = Some(text);
            }
            // A list begins before it is known to succeed.
            Ok(watcher::Event::Init) => {}
            Ok(_) => {
                if trouble.take().is_some() {
                    tracing::info!(kind, "watch is back");
                }
            }
        })
        .boxed()
}

/// Watches services until the receiver is gone.
pub(crate) async fn services(client: Client, inputs: mpsc::Sender<Input>, mut chosen: Chosen) {
    let mut events = events(Api::<ServiceObject>::all(client), watcher::Config::default());
    let mut words = Words::default();
    while let Some(event) = events.next().await {
        if let Ok(event) = &event {
            chosen.see(event);
        }
        let input = match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => Input::ServicesBegin,
            Ok(watcher::Event::InitDone) => Input::ServicesEnd,
            Ok(watcher::Event::Delete(object)) => match service_name(&object) {
                Some(name) => Input::ServiceGone(name),
                None => continue,
            },
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                match (Service::parse(&object, &mut words), service_name(&object)) {
                    (Some(service), _) => Input::Service(Box::new(service)),
                    (None, Some(name)) => Input::ServiceGone(name),
                    (None, None) => continue,
                }
            }
        };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

fn service_name(object: &ServiceObject) -> Option<ServiceName> {
    Some(ServiceName::new(object.metadata.namespace.as_deref()?, object.metadata.name.as_deref()?))
}

/// Watches endpoint slices until the receiver is gone.
pub(crate) async fn slices(client: Client, own: String, inputs: mpsc::Sender<Input>) {
    let mut events = events(Api::<EndpointSlice>::all(client), watcher::Config::default());
    let mut words = Words::default();
    while let Some(event) = events.next().await {
        let gone = |object: &EndpointSlice| {
            let (namespace, name) = (object.metadata.namespace.as_deref()?, object.metadata.name.as_deref()?);
            Some(Input::SliceGone { namespace: namespace.into(), name: name.into() })
        };
        let input = match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => Some(Input::SlicesBegin),
            Ok(watcher::Event::InitDone) => Some(Input::SlicesEnd),
            Ok(watcher::Event::Delete(object)) => gone(&object),
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                Slice::parse(&object, &own, &mut words).map(|s| Input::Slice(Box::new(s))).or_else(|| gone(&object))
            }
        };
        let Some(input) = input else { continue };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

impl NodeInfo {
    pub(crate) fn parse(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let mut cidrs: Vec<&String> = spec.and_then(|s| s.pod_cidrs.as_ref()).into_iter().flatten().collect();
        if cidrs.is_empty() {
            cidrs.extend(spec.and_then(|s| s.pod_cidr.as_ref()));
        }
        let addresses = node.status.as_ref().and_then(|s| s.addresses.as_ref());
        let leaving = spec.and_then(|s| s.taints.as_ref()).into_iter().flatten().any(|t| t.key == TO_BE_DELETED);
        Self {
            pod_cidrs: cidrs.into_iter().filter_map(|c| c.parse().ok()).collect(),
            addresses: addresses
                .into_iter()
                .flatten()
                .filter(|a| a.type_ == "InternalIP")
                .filter_map(|a| a.address.parse().ok())
                .collect(),
            wireguard: node.metadata.annotations.as_ref().and_then(|a| wireguard::parse(a.get(wireguard::ANNOTATION)?)),
            zone: node.metadata.labels.as_ref().and_then(|l| l.get(ZONE_LABEL)).map(|z| z.as_str().into()),
            eligible: node.metadata.deletion_timestamp.is_none() && !leaving,
        }
    }
}

/// Waits for the pod ranges of a node.
pub(crate) async fn own_ranges(client: Client, own: &str) -> Vec<IpNet> {
    let mut events =
        events(Api::<Node>::all(client), watcher::Config::default().fields(&format!("metadata.name={own}")));
    while let Some(event) = events.next().await {
        let Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) = event else { continue };
        let ranges = NodeInfo::parse(&node).pod_cidrs;
        if !ranges.is_empty() {
            return ranges;
        }
        tracing::info!(node = own, "waiting for the node's pod ranges (detectLocalMode NodeCIDR)");
    }
    Vec::new()
}

/// Watches nodes: tells the model this node's place, and everyone the table of nodes.
pub(crate) async fn nodes(client: Client, own: String, inputs: mpsc::Sender<Input>, table: watch::Sender<Arc<Nodes>>) {
    let mut events = events(Api::<Node>::all(client), watcher::Config::default());
    let mut current = Nodes::new();
    let mut listing: Option<Nodes> = None;
    while let Some(event) = events.next().await {
        let before = current.get(&own).cloned();
        match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => listing = Some(Nodes::new()),
            Ok(watcher::Event::InitApply(node)) => {
                let info = NodeInfo::parse(&node);
                listing.get_or_insert_default().insert(node.metadata.name.unwrap_or_default(), info);
                continue;
            }
            Ok(watcher::Event::InitDone) => current = listing.take().unwrap_or_default(),
            Ok(watcher::Event::Apply(node)) => {
                let info = NodeInfo::parse(&node);
                let name = node.metadata.name.unwrap_or_default();
                if current.get(&name) == Some(&info) {
                    continue;
                }
                current.insert(name, info);
            }
            Ok(watcher::Event::Delete(node)) => {
                current.remove(node.metadata.name.as_deref().unwrap_or_default());
            }
        }
        table.send_replace(Arc::new(current.clone()));
        let after = current.get(&own);
        if after.is_some() && after.map(|n| &n.zone) != before.as_ref().map(|n| &n.zone) {
            let place = Place { node: own.as_str().into(), zone: after.and_then(|n| n.zone.clone()) };
            if inputs.send(Input::Place(place)).await.is_err() {
                return;
            }
        }
    }
}

/// Watches the ConfigMap that says who is asked for which names, until stopped.
pub(crate) async fn dns(client: Client, server: Arc<Server>) {
    let only = watcher::Config::default().fields("metadata.name=kube-dns");
    let mut events = events(Api::<ConfigMap>::namespaced(client, "kube-system"), only);
    let mut found = false;
    while let Some(event) = events.next().await {
        let data = match event {
            Ok(watcher::Event::Init) => {
                found = false;
                continue;
            }
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                found = true;
                object.data.unwrap_or_default()
            }
            Ok(watcher::Event::InitDone) if found => continue,
            Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => Default::default(),
            // A cluster whose roles do not know of it: rarely asked again.
            Err(error) if policy::is_denied(&error) => {
                tokio::time::sleep(DENIED).await;
                continue;
            }
            Err(_) => continue,
        };
        match Custom::parse(&data) {
            Ok(custom) => {
                if server.forwarder.upstream.set_custom(custom) {
                    server.forwarder.cache.clear();
                    tracing::info!("DNS asks the servers of ConfigMap kube-system/kube-dns");
                }
            }
            Err(error) => tracing::warn!(%error, "ConfigMap kube-system/kube-dns not used"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_short_through_a_restart_and_grow_in_an_outage() {
        let mut pauses = Pauses::default();
        let first: Vec<u128> = (0..4)
            .map(|_| {
                let base = pauses.base().as_millis();
                let pause = pauses.next().unwrap().as_millis();
                assert!(pause * 4 >= base * 3 - 4 && pause * 4 <= base * 5, "{pause} of {base}");
                base
            })
            .collect();
        assert_eq!(first, [20, 40, 80, 80]);
        pauses.nth(Pauses::OUTAGE as usize);
        assert_eq!(pauses.base(), Pauses::LONGEST);
        pauses.reset();
        assert_eq!(pauses.base(), Pauses::FIRST);
    }
}
