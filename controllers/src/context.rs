//! What every controller gets: the verbs, the recorder, the configuration, and one shared cache per kind.

use crate::Config;
use isopod_client::objects::HasMeta;
use isopod_client::{Cache, Objects, Recorder};
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController, ResourceQuota,
    Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass, VolumeAttachment, VolumeAttributesClass};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Which object: namespace and name.
pub(crate) type Key = (String, String);

/// The key of an object.
pub(crate) fn key<T: HasMeta>(object: &T) -> Key {
    (object.namespace().to_owned(), object.name().to_owned())
}

/// Declares the caches once: the struct, how they are made, started and waited for.
macro_rules! caches {
    ($($cache:ident: $kind:ty),* $(,)?) => {
        /// One cache per kind, each fed by one watch, shared by all controllers.
        pub(crate) struct Caches {
            $(pub(crate) $cache: Arc<Cache<$kind>>,)*
        }

        impl Caches {
            fn new() -> Self {
                let caches = Self { $($cache: Cache::new(),)* };
                // Images are most of a node's status, and no controller reads them.
                caches.nodes.trim(|node| {
                    if let Some(status) = node.status.as_mut() {
                        status.images = None;
                    }
                });
                caches
            }

            fn start(&self, client: &kube::Client, stop: &CancellationToken) {
                $(self.$cache.start_all(client.clone(), stop.clone());)*
            }

            async fn synced(&self) {
                $(self.$cache.synced().await;)*
            }
        }
    };
}

caches! {
    pods: Pod,
    nodes: Node,
    namespaces: Namespace,
    services: Service,
    endpoints: Endpoints,
    slices: EndpointSlice,
    accounts: ServiceAccount,
    replica_sets: ReplicaSet,
    replication_controllers: ReplicationController,
    deployments: Deployment,
    daemon_sets: DaemonSet,
    stateful_sets: StatefulSet,
    revisions: ControllerRevision,
    jobs: Job,
    cron_jobs: CronJob,
    budgets: PodDisruptionBudget,
    quotas: ResourceQuota,
    service_cidrs: ServiceCIDR,
    claims: PersistentVolumeClaim,
    volumes: PersistentVolume,
    storage_classes: StorageClass,
    attributes_classes: VolumeAttributesClass,
    csi_drivers: CSIDriver,
    attachments: VolumeAttachment,
    signing_requests: CertificateSigningRequest,
    cluster_roles: ClusterRole,
    autoscalers: HorizontalPodAutoscaler,
    leases: Lease,
}

/// What every controller gets.
pub(crate) struct Context {
    pub(crate) objects: Objects,
    pub(crate) recorder: Recorder,
    pub(crate) caches: Caches,
    pub(crate) config: Config,
    pub(crate) stop: CancellationToken,
}

impl Context {
    pub(crate) fn new(objects: Objects, recorder: Recorder, config: Config, stop: CancellationToken) -> Self {
        Self { objects, recorder, caches: Caches::new(), config, stop }
    }

    /// Starts the watches; to be called once every subscriber is in place.
    pub(crate) fn start_caches(&self) {
        self.caches.start(self.objects.client(), &self.stop);
    }

    /// Waits until every cache has its first list.
    pub(crate) async fn synced(&self) {
        self.caches.synced().await;
    }
}
