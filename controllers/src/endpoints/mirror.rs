//! EndpointSlices that mirror hand-written Endpoints, for Services without a selector.

use super::slices::{MANAGED_BY, SERVICE_NAME};
use super::{Key, key};
use crate::context::Context;
use crate::ownership::owner_reference;
use crate::written::Written;
use isopod_client::objects::{DeleteOptions, HasMeta, is_namespace_terminating};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::core::v1::{EndpointAddress, Endpoints};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::sync::Arc;
use std::time::Duration;

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const PER_SUBSET: usize = 1000;
const CATCH_UP: Duration = Duration::from_millis(10);

struct Controller {
    ctx: Arc<Context>,
    written: Written,
}

/// Subscribes the controller and starts its workers.
pub(super) fn start(ctx: &Arc<Context>) {
    let controller = Arc::new(Controller { ctx: ctx.clone(), written: Written::default() });
    let queue: Arc<Queue<Key>> = Queue::new();
    let q = queue.clone();
    ctx.caches.endpoints.subscribe(move |change| q.add(key(&**change.object())));
    let q = queue.clone();
    ctx.caches.services.subscribe(move |change| q.add(key(&**change.object())));
    let (q, c) = (queue.clone(), controller.clone());
    ctx.caches.slices.subscribe(move |change| super::wake_for_slice(&q, &c.written, MANAGER, change));
    spawn_workers("endpointslice-mirroring-controller", &queue, 5, &ctx.stop, move |key| {
        let controller = controller.clone();
        async move { controller.sync(key).await }
    });
}

impl Controller {
    async fn sync(&self, key: Key) -> Result<Option<Duration>, kube::Error> {
        let own = |s: &EndpointSlice| super::service_of(s, MANAGER) == Some(&key.1) && !s.deleting();
        let existing = self.ctx.caches.slices.select(&key.0, own);
        if !self.written.caught_up(&key, existing.iter().map(|s| &**s)) {
            return Ok(Some(CATCH_UP));
        }
        let service = self.ctx.caches.services.get(&key.0, &key.1);
        let without_selector = service.is_some_and(|service| {
            service.spec.as_ref().is_some_and(|spec| spec.selector.as_ref().is_none_or(|s| s.is_empty()))
        });
        let source = self.ctx.caches.endpoints.get(&key.0, &key.1).filter(|e| without_selector && wanted(e));
        let mut desired = source.map(|endpoints| plan(&endpoints)).unwrap_or_default();
        for slice in existing {
            let same = |d: &EndpointSlice| d.address_type == slice.address_type && d.ports == slice.ports;
            let Some(index) = desired.iter().position(same) else {
                let options = DeleteOptions::uid(slice.uid());
                self.ctx.objects.delete::<EndpointSlice>(&key.0, slice.name(), &options).await?;
                continue;
            };
            let want = desired.remove(index);
            let mut new = (*slice).clone();
            new.endpoints = want.endpoints;
            new.metadata.labels = want.metadata.labels;
            new.metadata.annotations = want.metadata.annotations;
            new.metadata.owner_references = want.metadata.owner_references;
            if let Some(written) = self.ctx.objects.update(&*slice, &new, "").await? {
                self.written.record(&key, &written);
            }
        }
        for slice in desired {
            match self.ctx.objects.create(&slice).await {
                Ok(written) => self.written.record(&key, &written),
                Err(error) if is_namespace_terminating(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

fn wanted(endpoints: &Endpoints) -> bool {
    let label = |key: &str| endpoints.metadata.labels.as_ref().is_some_and(|l| l.get(key).is_some_and(|v| v == "true"));
    let leader = endpoints.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(LEADER));
    !endpoints.deleting() && !label(SKIP) && !leader
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone(),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

/// One slice per subset and address family.
fn plan(endpoints: &Endpoints) -> Vec<EndpointSlice> {
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), endpoints.name().to_owned());
    labels.insert(MANAGED_BY.into(), MANAGER.into());
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.remove(LAST_APPLIED);
    let mut slices = Vec::new();
    for subset in endpoints.subsets.iter().flatten() {
        let convert = |p: &k8s_openapi::api::core::v1::EndpointPort| EndpointPort {
            name: Some(p.name.clone().unwrap_or_default()),
            port: Some(p.port),
            protocol: p.protocol.clone(),
            app_protocol: p.app_protocol.clone(),
        };
        let ports: Vec<EndpointPort> = subset.ports.iter().flatten().map(convert).collect();
        for family in ["IPv4", "IPv6"] {
            let of = |list: &Option<Vec<EndpointAddress>>, ready: bool| -> Vec<Endpoint> {
                let all = list.iter().flatten().filter(|a| a.ip.contains(':') == (family == "IPv6"));
                all.map(|a| endpoint(a, ready)).collect()
            };
            let mut list = of(&subset.addresses, true);
            list.extend(of(&subset.not_ready_addresses, false));
            list.truncate(PER_SUBSET);
            if list.is_empty() {
                continue;
            }
            slices.push(EndpointSlice {
                metadata: ObjectMeta {
                    generate_name: Some(format!("{}-", endpoints.name())),
                    namespace: Some(endpoints.namespace().to_owned()),
                    labels: Some(labels.clone()),
                    annotations: (!annotations.is_empty()).then(|| annotations.clone()),
                    owner_references: Some(vec![owner_reference(endpoints)]),
                    ..ObjectMeta::default()
                },
                address_type: family.to_owned(),
                endpoints: Some(list),
                ports: Some(ports.clone()),
            });
        }
    }
    slices
}
