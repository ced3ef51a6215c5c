//! For people: the services of a node as a table, and what would become of a connection.
//!
//! Both are answered from the model, made anew from the API server's lists by the code that makes it for the kernel.
//! Nothing is asked of the running proxy and nothing is changed.

mod packet;
mod route;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod as PodObject, Service as ServiceObject},
    discovery::v1::EndpointSlice,
    networking::v1::NetworkPolicy,
};
use kube::{Api, Client, api::ListParams};
use serde::Serialize;

use crate::{
    dns::zone::Zone,
    model::{
        backends::Backends,
        objects::{Backend, Place, Policy as TrafficPolicy, Service, ServicePort, Slice, Words},
        plan::{Frontend, Pools, Reach},
        shadow::Shadow,
    },
    policy::{
        model::Policies,
        objects::{Pod, Policy, namespace},
    },
    watch::NodeInfo,
};

pub use packet::{PacketError, Probe};
pub use route::{TraceError, Traced};

/// One address or port at which a service is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// Namespace of the service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Name of the port, empty when it has none.
    pub port: String,
    /// `10.96.0.1:443/TCP`, `*:30080/TCP`.
    pub at: String,
    /// What kind of address that is and how clients are treated.
    pub via: String,
    /// Endpoints that answer, with the pod where it is known and `*` on this node.
    pub endpoints: Vec<String>,
}

/// The cluster's services, pods and policies at one moment, as one node sees them.
pub struct Snapshot {
    config: crate::Config,
    shadow: Shadow,
    /// As if every pod were this node's: both ends of a connection have a say, wherever they are.
    policies: Policies,
    zone: Zone,
    pods: Vec<Pod>,
    node: Option<NodeInfo>,
}

async fn all<K>(client: &Client) -> Result<Vec<K>, kube::Error>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    Ok(Api::<K>::all(client.clone()).list(&ListParams::default()).await?.items)
}

impl Snapshot {
    /// Lists everything.
    ///
    /// # Errors
    /// When the API server cannot be asked.
    pub async fn load(client: &Client, config: &crate::Config) -> Result<Self, kube::Error> {
        let nodes: Vec<Node> = all(client).await?;
        let node = nodes.iter().find(|n| n.metadata.name.as_deref() == Some(&config.node_name));
        let mut snapshot = Self::new(config, node.map(NodeInfo::parse));
        snapshot.load_services(all(client).await?, all(client).await?);
        snapshot.load_policies(all(client).await?, all(client).await?, all(client).await?);
        Ok(snapshot)
    }

    fn new(config: &crate::Config, node: Option<NodeInfo>) -> Self {
        let zone = node.as_ref().and_then(|n| n.zone.clone());
        Self {
            config: config.clone(),
            shadow: Shadow::new(Place { node: config.node_name.as_str().into(), zone }),
            policies: Policies::new(&config.node_name),
            zone: Zone::new(&config.cluster_domain),
            pods: Vec::new(),
            node,
        }
    }

    fn load_services(&mut self, services: Vec<ServiceObject>, slices: Vec<EndpointSlice>) {
        let own = self.config.node_name.clone();
        let mut words = Words::default();
        slices.iter().filter_map(|s| Slice::parse(s, &own, &mut words)).for_each(|s| self.shadow.set_slice(s));
        services.iter().filter_map(|s| Service::parse(s, &mut words)).for_each(|s| self.shadow.set_service(s));
        let names: Vec<_> = self.shadow.dirty().iter().cloned().collect();
        for name in names {
            let service = self.shadow.service(&name).cloned();
            self.zone.update(&name, service.as_deref(), self.shadow.slices(&name));
        }
        self.zone.set_ready();
        self.shadow.flush();
    }

    fn load_policies(&mut self, pods: Vec<PodObject>, spaces: Vec<Namespace>, policies: Vec<NetworkPolicy>) {
        self.pods = pods.iter().filter_map(Pod::parse).collect();
        spaces.iter().filter_map(namespace).for_each(|(name, labels)| self.policies.set_namespace(name, labels));
        for pod in &self.pods {
            self.policies.set_pod(Pod { node: self.config.node_name.as_str().into(), ..pod.clone() });
        }
        policies.iter().filter_map(Policy::parse).for_each(|p| self.policies.set_policy(p));
        self.policies.flush(&mut Vec::new(), &mut Vec::new());
    }

    /// Address and port, the pod's name, and `*` for pods of this node.
    fn spell(&self, backend: &Backend, names: &BTreeMap<std::net::IpAddr, &Pod>) -> String {
        match names.get(&backend.ip()) {
            Some(pod) if *pod.node == *self.config.node_name => format!("{backend} ({}*)", pod.name.name),
            Some(pod) => format!("{backend} ({})", pod.name.name),
            None => backend.to_string(),
        }
    }

    fn names(&self) -> BTreeMap<std::net::IpAddr, &Pod> {
        self.pods.iter().flat_map(|p| p.addresses.iter().map(move |a| (*a, p))).collect()
    }

    /// Every address and port that leads to a service, in order of names.
    pub fn services(&self) -> Vec<Row> {
        let names = self.names();
        let mut rows = Vec::new();
        self.shadow.visit(&mut |service, port, (frontend, reach, firewalled), pools, denied| {
            let chosen = reached(reach, pools);
            rows.push(Row {
                namespace: service.name.namespace.to_string(),
                name: service.name.name.to_string(),
                port: port.name.to_string(),
                at: at(&frontend),
                via: via(service, port, &frontend, reach, firewalled, denied),
                endpoints: chosen.iter().map(|b| self.spell(&b, &names)).collect(),
            });
        });
        rows
    }
}

/// The endpoints a frontend leads clients from outside to.
fn reached(reach: Reach, pools: &Pools) -> &Backends {
    match reach {
        Reach::Internal(TrafficPolicy::Local) | Reach::External(TrafficPolicy::Local) => &pools.local,
        _ => &pools.cluster,
    }
}

fn at(frontend: &Frontend) -> String {
    let protocol = frontend.protocol().lower().to_uppercase();
    match frontend {
        Frontend::Address(address, _, port) => format!("{}/{protocol}", std::net::SocketAddr::new(*address, *port)),
        Frontend::NodePort(family, _, port) => {
            format!("{}:{port}/{protocol}", if *family == crate::nft::element::Family::V4 { "*" } else { "[*]" })
        }
    }
}

fn via(
    service: &Service,
    port: &ServicePort,
    frontend: &Frontend,
    reach: Reach,
    firewalled: bool,
    denied: bool,
) -> String {
    let kind = match frontend {
        Frontend::NodePort(..) => "node port",
        Frontend::Address(a, ..) if service.cluster_ips.contains(a) => "cluster address",
        Frontend::Address(a, ..) if service.balancer_ips.contains(a) => "load balancer",
        Frontend::Address(..) => "external address",
    };
    let mut words = vec![kind.to_owned()];
    match reach {
        Reach::Internal(TrafficPolicy::Local) => words.push("endpoints of this node".into()),
        Reach::External(TrafficPolicy::Local) => words.push("endpoints of this node for clients outside".into()),
        _ => {}
    }
    if firewalled {
        let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
        words.push(format!("from {}", ranges.join(" ")));
    }
    words.extend(service.affinity.map(|seconds| format!("sticky for {seconds} s")));
    if denied {
        words.push(format!("port {} belongs to another service", port.port));
    }
    words.join(", ")
}
