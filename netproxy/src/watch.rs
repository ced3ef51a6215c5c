//! The watches: services, endpoint slices and nodes, each parsed at once and handed on small.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use futures::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::api::{
    core::v1::{Node, Service as ServiceObject},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::{mpsc, watch};

use crate::{
    model::objects::{Place, Service, ServiceName, Slice},
    sync::Input,
};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What this crate keeps of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeInfo {
    pub(crate) pod_cidrs: Vec<IpNet>,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) zone: Option<Box<str>>,
    /// Whether load balancers should send traffic here.
    pub(crate) eligible: bool,
}

/// All nodes by name.
pub(crate) type Nodes = HashMap<String, NodeInfo>;

fn events<K>(api: Api<K>) -> impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + Unpin
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let kind = std::any::type_name::<K>().rsplit("::").next().unwrap_or_default();
    let log = move |error: &watcher::Error| tracing::warn!(kind, %error, "watch interrupted; it begins again");
    watcher(api, watcher::Config::default()).default_backoff().inspect_err(log).boxed()
}

/// Watches services until the receiver is gone.
pub(crate) async fn services(client: Client, inputs: mpsc::Sender<Input>) {
    let mut events = events(Api::<ServiceObject>::all(client));
    while let Some(event) = events.next().await {
        let input = match event {
            Err(_) => continue,
            Ok(watcher::Event::Init) => Input::ServicesBegin,
            Ok(watcher::Event::InitDone) => Input::ServicesEnd,
            Ok(watcher::Event::Delete(object)) => match service_name(&object) {
                Some(name) => Input::ServiceGone(name),
                None => continue,
            },
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                match (Service::parse(&object), service_name(&object)) {
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
pub(crate) async fn slices(client: Client, inputs: mpsc::Sender<Input>) {
    let mut events = events(Api::<EndpointSlice>::all(client));
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
                Slice::parse(&object).map(|s| Input::Slice(Box::new(s))).or_else(|| gone(&object))
            }
        };
        let Some(input) = input else { continue };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

impl NodeInfo {
    fn parse(node: &Node) -> Self {
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
            zone: node.metadata.labels.as_ref().and_then(|l| l.get(ZONE_LABEL)).map(|z| z.as_str().into()),
            eligible: node.metadata.deletion_timestamp.is_none() && !leaving,
        }
    }
}

/// Watches nodes: tells the model this node's place, and everyone the table of nodes.
pub(crate) async fn nodes(client: Client, own: String, inputs: mpsc::Sender<Input>, table: watch::Sender<Arc<Nodes>>) {
    let mut events = events(Api::<Node>::all(client));
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
