//! Endpoints, the older form: one object per Service, at most 1000 addresses.

use super::trigger::{self, Triggers};
use super::{Key, Port, TRIGGER_TIME, key};
use crate::context::Context;
use crate::pods;
use isopod_client::objects::{DeleteOptions, HasMeta, is_namespace_terminating, message};
use isopod_client::{Queue, Recorder, spawn_workers};
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MOST: usize = 1000;

struct Controller {
    ctx: Arc<Context>,
    recorder: Recorder,
    triggers: Triggers,
}

/// Starts the workers of the queue that is returned.
pub(super) fn start(ctx: &Arc<Context>) -> Arc<Queue<Key>> {
    let recorder = ctx.recorder.component("endpoint-controller");
    let controller = Arc::new(Controller { ctx: ctx.clone(), recorder, triggers: Triggers::default() });
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.endpoints.subscribe(move |change| q.add(key(&**change.object())));
    spawn_workers("endpoints-controller", &queue, 5, &ctx.stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
    queue
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let current = self.ctx.caches.endpoints.get(&key.0, &key.1);
        let Some(service) = self.ctx.caches.services.get(&key.0, &key.1) else {
            self.triggers.forget(&key);
            if let Some(current) = current.filter(|e| ours(e)) {
                let options = DeleteOptions::uid(current.uid());
                self.ctx.objects.delete::<Endpoints>(&key.0, &key.1, &options).await?;
            }
            return Ok(None);
        };
        let Some(selector) = super::selector(&service) else { return Ok(None) };
        let pods = super::selected(&self.ctx, &service, selector);
        let (subsets, truncated) = plan(&service, &pods);
        let mut new = current.as_deref().cloned().unwrap_or_else(|| Endpoints {
            metadata: ObjectMeta { name: Some(key.1.clone()), namespace: Some(key.0.clone()), ..ObjectMeta::default() },
            subsets: None,
        });
        new.metadata.labels = Some(labels(&service));
        if current.as_ref().is_some_and(|old| old.subsets.as_deref().unwrap_or_default() == subsets)
            && current.as_ref().is_some_and(|old| old.metadata.labels == new.metadata.labels)
        {
            return Ok(None);
        }
        new.subsets = Some(subsets);
        let annotations = new.metadata.annotations.get_or_insert_default();
        match self.triggers.next(&key, &service, &pods) {
            Some(time) => annotations.insert(TRIGGER_TIME.into(), trigger::text(time)),
            None => annotations.remove(TRIGGER_TIME),
        };
        if truncated {
            annotations.insert(OVER_CAPACITY.into(), "truncated".into());
        } else {
            annotations.remove(OVER_CAPACITY);
        }
        let (verb, result) = match &current {
            Some(old) => ("FailedToUpdateEndpoint", self.ctx.objects.update(&**old, &new, "").await.map(|_| ())),
            None => ("FailedToCreateEndpoint", self.ctx.objects.create(&new).await.map(|_| ())),
        };
        match result {
            Err(error) if is_namespace_terminating(&error) => Ok(None),
            Err(error) => {
                let text = format!("Failed to update endpoint {}/{}: {}", key.0, key.1, message(&error));
                self.recorder.warning(&new, verb, text);
                Err(error)
            }
            Ok(()) => Ok(None),
        }
    }
}

fn ours(endpoints: &Endpoints) -> bool {
    endpoints.metadata.labels.as_ref().and_then(|l| l.get(MANAGED_BY)).map(String::as_str) == Some(MANAGER)
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = super::labels(service);
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    labels
}

fn address(service: &Service, pod: &Pod, ip: &str) -> EndpointAddress {
    let node = pods::node(pod);
    EndpointAddress {
        ip: ip.to_owned(),
        hostname: super::hostname(pod, service),
        node_name: (!node.is_empty()).then(|| node.to_owned()),
        target_ref: Some(super::reference(pod)),
    }
}

#[derive(Clone, Default, PartialEq)]
struct Addresses {
    ready: BTreeMap<(String, String), EndpointAddress>,
    not_ready: BTreeMap<(String, String), EndpointAddress>,
}

/// Ports with the same addresses share a subset.
fn plan(service: &Service, pods: &[Arc<Pod>]) -> (Vec<EndpointSubset>, bool) {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|s| s.publish_not_ready_addresses).unwrap_or(false);
    let ipv6 = spec.and_then(|s| s.ip_families.as_ref()?.first()).is_some_and(|f| f == "IPv6");
    let portless = spec.is_some_and(|s| s.ports.as_ref().is_none_or(Vec::is_empty));
    let mut by_port: BTreeMap<Option<Port>, Addresses> = BTreeMap::new();
    let mut seen = 0;
    for pod in pods.iter().filter(|pod| super::eligible(pod, publish)) {
        let Some(ip) = super::addresses(pod).into_iter().find(|ip| ip.contains(':') == ipv6) else { continue };
        if seen >= MOST {
            return (pack(by_port), true);
        }
        seen += 1;
        let address = address(service, pod, ip);
        let ports = super::ports(service, pod).into_iter().map(Some);
        for port in ports.chain(portless.then_some(None)) {
            let group = by_port.entry(port).or_default();
            let side = if publish || pods::is_ready(pod) { &mut group.ready } else { &mut group.not_ready };
            side.insert((ip.to_owned(), pod.uid().to_owned()), address.clone());
        }
    }
    (pack(by_port), false)
}

fn pack(by_port: BTreeMap<Option<Port>, Addresses>) -> Vec<EndpointSubset> {
    let mut groups: Vec<(Addresses, Vec<EndpointPort>)> = Vec::new();
    for (port, addresses) in by_port {
        let port = port.map(|p| EndpointPort {
            name: (!p.name.is_empty()).then_some(p.name),
            port: p.port,
            protocol: Some(p.protocol),
            app_protocol: p.app_protocol,
        });
        match groups.iter_mut().find(|(known, _)| *known == addresses) {
            Some((_, ports)) => ports.extend(port),
            None => groups.push((addresses, port.into_iter().collect())),
        }
    }
    let list = |side: BTreeMap<_, EndpointAddress>| (!side.is_empty()).then(|| side.into_values().collect::<Vec<_>>());
    groups
        .into_iter()
        .map(|(addresses, ports)| EndpointSubset {
            addresses: list(addresses.ready),
            not_ready_addresses: list(addresses.not_ready),
            ports: (!ports.is_empty()).then_some(ports),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{pod, service};
    use super::*;
    use serde_json::json;

    #[test]
    fn ready_and_unready_are_told_apart() {
        let service = service(json!([{"name": "a", "port": 80, "targetPort": "http"}, {"name": "b", "port": 81}]));
        let pods = [pod("a", "10.0.0.2", true), pod("b", "10.0.0.1", false), pod("c", "10.0.0.1", true)];
        let (subsets, truncated) = plan(&service, &pods);
        assert!(!truncated);
        assert_eq!(subsets.len(), 1, "same addresses, one subset");
        let ips = |list: &Option<Vec<EndpointAddress>>| -> Vec<String> {
            list.iter().flatten().map(|a| a.ip.clone()).collect()
        };
        assert_eq!(ips(&subsets[0].addresses), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(ips(&subsets[0].not_ready_addresses), ["10.0.0.1"]);
        let ports: Vec<i32> = subsets[0].ports.iter().flatten().map(|p| p.port).collect();
        assert_eq!(ports, [8080, 81]);
    }
}
