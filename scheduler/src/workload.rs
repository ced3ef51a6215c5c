//! Which pods belong together when nobody says how to spread them: those of the same Services and the same controller.

use crate::model::PodInfo;
use isopod_client::Cache;
use isopod_client::select::Selector;
use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{ReplicationController, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// The caches that know workloads, holding selectors and little else.
pub(crate) struct Workloads {
    services: Arc<Cache<Service>>,
    replica_sets: Arc<Cache<ReplicaSet>>,
    replication_controllers: Arc<Cache<ReplicationController>>,
    stateful_sets: Arc<Cache<StatefulSet>>,
}

impl Workloads {
    pub(crate) fn start(client: &kube::Client, stop: &CancellationToken) -> Self {
        let all = Self {
            services: Cache::new(),
            replica_sets: Cache::new(),
            replication_controllers: Cache::new(),
            stateful_sets: Cache::new(),
        };
        all.services.trim(|s| s.status = None);
        all.replica_sets.trim(|s| {
            s.status = None;
            s.metadata.annotations = None;
            if let Some(spec) = s.spec.as_mut() {
                spec.template = None;
            }
        });
        all.replication_controllers.trim(|s| {
            s.status = None;
            if let Some(spec) = s.spec.as_mut() {
                spec.template = None;
            }
        });
        all.stateful_sets.trim(|s| {
            s.status = None;
            if let Some(spec) = s.spec.as_mut() {
                spec.template = Default::default();
                spec.volume_claim_templates = None;
            }
        });
        all.services.start_all(client.clone(), stop.clone());
        all.replica_sets.start_all(client.clone(), stop.clone());
        all.replication_controllers.start_all(client.clone(), stop.clone());
        all.stateful_sets.start_all(client.clone(), stop.clone());
        all
    }

    pub(crate) async fn synced(&self) {
        self.services.synced().await;
        self.replica_sets.synced().await;
        self.replication_controllers.synced().await;
        self.stateful_sets.synced().await;
    }

    /// Selects the pods that belong with this one; `None` when nothing does.
    pub(crate) fn selector(&self, pod: &PodInfo) -> Option<Selector> {
        let mut merged = LabelSelector::default();
        for service in self.services.in_namespace(&pod.namespace) {
            let labels = service.spec.as_ref().and_then(|s| s.selector.as_ref()).filter(|s| !s.is_empty());
            if let Some(labels) = labels.filter(|l| Selector::from_labels(*l).matches(&pod.labels)) {
                merged.match_labels.get_or_insert_default().extend(labels.clone());
            }
        }
        let owner = pod.owner.as_ref();
        let own = match owner.map(|(kind, name)| (kind.as_str(), name.as_str())) {
            Some(("ReplicaSet", name)) => {
                self.replica_sets.get(&pod.namespace, name).and_then(|s| Some(s.spec.as_ref()?.selector.clone()))
            }
            Some(("StatefulSet", name)) => {
                self.stateful_sets.get(&pod.namespace, name).and_then(|s| Some(s.spec.as_ref()?.selector.clone()))
            }
            Some(("ReplicationController", name)) => {
                let set = self.replication_controllers.get(&pod.namespace, name);
                set.and_then(|s| s.spec.as_ref()?.selector.clone())
                    .map(|labels| LabelSelector { match_labels: Some(labels), match_expressions: None })
            }
            _ => None,
        };
        if let Some(own) = own {
            merged.match_labels.get_or_insert_default().extend(own.match_labels.unwrap_or_default());
            merged.match_expressions.get_or_insert_default().extend(own.match_expressions.unwrap_or_default());
        }
        let selector = Selector::new(&merged);
        (!selector.is_everything()).then_some(selector)
    }
}
