//! Endpoints of Services: EndpointSlices and the older Endpoints, from the same model of Service and pods.
//!
//! In: Services with a selector, the pods it matches, their nodes' zones. Out: slices of at most 100 endpoints, changed as
//! little as possible, and one Endpoints object. No batching: a pod's readiness reaches both within one sync.

mod legacy;
mod mirror;
pub(crate) mod slices;
mod topology;
mod trigger;

use crate::context::{Context, Key, key};
use crate::pods;
use crate::written::Written;
use isopod_client::objects::HasMeta;
use isopod_client::{Change, Queue};
use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use slices::{MANAGED_BY, SERVICE_NAME};
use std::collections::BTreeMap;
use std::sync::Arc;

/// When the change that a slice reflects happened.
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Marks the endpoints of headless Services.
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";

type Labels = BTreeMap<String, String>;

/// Subscribes the controllers and starts their workers.
pub(crate) fn start(ctx: &Arc<Context>) {
    let queues = [slices::start(ctx), legacy::start(ctx)];
    let q = queues.clone();
    ctx.caches.services.subscribe(move |change| q.iter().for_each(|q| q.add(key(&**change.object()))));
    let c = ctx.clone();
    ctx.caches.pods.subscribe(move |change| wake_for_pod(&c, &queues, change));
    mirror::start(ctx);
}

/// A port of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) port: i32,
    pub(crate) protocol: String,
    pub(crate) app_protocol: Option<String>,
}

/// The selector of a Service whose endpoints are ours.
fn selector(service: &Service) -> Option<&Labels> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.selector.as_ref().filter(|s| !s.is_empty())
}

fn selects(selector: &Labels, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels.is_some_and(|labels| selector.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

/// Whether the Service has no address of its own.
pub(crate) fn is_headless(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.is_some_and(|s| s.type_.as_deref() != Some("ExternalName") && s.cluster_ip.as_deref() == Some("None"))
}

/// The pods a Service selects.
fn selected(ctx: &Context, service: &Service, selector: &Labels) -> Vec<Arc<Pod>> {
    ctx.caches.pods.select(service.namespace(), |pod| selects(selector, pod))
}

/// The pod an endpoint stands for.
fn reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        namespace: Some(pod.namespace().to_owned()),
        name: Some(pod.name().to_owned()),
        uid: Some(pod.uid().to_owned()),
        ..ObjectReference::default()
    }
}

/// The labels of what is published about a Service: its own, and whether it is headless.
fn labels(service: &Service) -> Labels {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS);
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels
}

/// Whether a pod can be an endpoint at all.
pub(crate) fn eligible(pod: &Pod, terminating_too: bool) -> bool {
    !pods::is_finished(pod) && !addresses(pod).is_empty() && (terminating_too || !pod.deleting())
}

/// The pod's addresses.
pub(crate) fn addresses(pod: &Pod) -> Vec<&str> {
    let Some(status) = pod.status.as_ref() else { return Vec::new() };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut all: Vec<&str> = all.filter(|ip| !ip.is_empty()).collect();
    if all.is_empty() {
        all.extend(status.pod_ip.as_deref().filter(|ip| !ip.is_empty()));
    }
    all
}

/// The host name under which a headless Service publishes a pod.
pub(crate) fn hostname(pod: &Pod, service: &Service) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.as_ref().filter(|h| !h.is_empty())?;
    (spec.subdomain.as_deref() == Some(service.name()) && pod.namespace() == service.namespace())
        .then(|| hostname.clone())
}

/// The ports of a pod behind a Service; ports the pod does not have are left out.
pub(crate) fn ports(service: &Service, pod: &Pod) -> Vec<Port> {
    let ports = service.spec.as_ref().and_then(|s| s.ports.as_ref());
    let resolve = |port: &ServicePort| {
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        Some(Port {
            name: port.name.clone().unwrap_or_default(),
            port: target_port(pod, port, &protocol)?,
            protocol,
            app_protocol: port.app_protocol.clone(),
        })
    };
    ports.into_iter().flatten().filter_map(resolve).collect()
}

fn target_port(pod: &Pod, port: &ServicePort, protocol: &str) -> Option<i32> {
    let name = match port.target_port.as_ref() {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) if name.is_empty() => return Some(port.port),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten());
    ports
        .filter(|p| p.name.as_ref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
        .map(|p| p.container_port)
        .next()
}

/// Whether an update of a pod can change what is published about it.
fn relevant(old: &Pod, new: &Pod) -> bool {
    old.deleting() != new.deleting()
        || old.metadata.labels != new.metadata.labels
        || addresses(old) != addresses(new)
        || pods::is_ready(old) != pods::is_ready(new)
        || pods::is_finished(old) != pods::is_finished(new)
        || pods::node(old) != pods::node(new)
        || old.spec.as_ref().map(|s| (&s.hostname, &s.subdomain))
            != new.spec.as_ref().map(|s| (&s.hostname, &s.subdomain))
}

/// Wakes the Services that a changed pod belongs to, or did.
fn wake_for_pod(ctx: &Context, queues: &[Arc<Queue<Key>>], change: &Change<'_, Pod>) {
    let (old, new) = match change {
        Change::Added(pod) | Change::Deleted(pod) => (None, *pod),
        Change::Updated(old, new) if relevant(old, new) => (Some(*old), *new),
        Change::Updated(..) => return,
    };
    let services = ctx.caches.services.select(new.namespace(), |service| {
        let selector = selector(service);
        selector.is_some_and(|s| selects(s, new) || old.is_some_and(|old| selects(s, old)))
    });
    for service in services {
        queues.iter().for_each(|queue| queue.add(key(&*service)));
    }
}

/// The Service of a slice that `manager` writes.
fn service_of<'a>(slice: &'a EndpointSlice, manager: &str) -> Option<&'a str> {
    let labels = slice.metadata.labels.as_ref()?;
    let managed = labels.get(MANAGED_BY).is_some_and(|m| m == manager);
    managed.then(|| labels.get(SERVICE_NAME))?.map(String::as_str)
}

/// Wakes the Service of a changed slice for the one that writes it.
fn wake_for_slice(queue: &Queue<Key>, written: &Written, manager: &str, change: &Change<'_, EndpointSlice>) {
    let slice = change.object();
    let Some(service) = service_of(slice, manager) else { return };
    let key = (slice.namespace().to_owned(), service.to_owned());
    if change.is_deleted() {
        written.gone(&key, slice.uid());
    }
    queue.add(key);
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;
    use serde_json::json;

    pub(crate) fn service(ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "s", "labels": {"tier": "front"}},
            "spec": {"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"], "selector": {"app": "web"}, "ports": ports},
        }))
        .unwrap()
    }

    pub(crate) fn pod(name: &str, ip: &str, ready: bool) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": "web"}},
                "spec": {"nodeName": "n1", "containers": [
                    {"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
                "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [
                    {"type": "Ready", "status": if ready { "True" } else { "False" }}]},
            }))
            .unwrap(),
        )
    }

    #[test]
    fn ports_resolve_by_number_and_name() {
        let pod = pod("a", "10.0.0.1", true);
        let numbers = |ports: serde_json::Value| -> Vec<i32> {
            super::ports(&service(ports), &pod).into_iter().map(|p| p.port).collect()
        };
        assert_eq!(numbers(json!([{"port": 80}])), [80]);
        assert_eq!(numbers(json!([{"port": 80, "targetPort": 81}])), [81]);
        assert_eq!(numbers(json!([{"port": 80, "targetPort": "http"}, {"port": 1, "targetPort": "none"}])), [8080]);
    }
}
