//! What every controller gets: the verbs, the recorder, the configuration, and one shared cache per kind.

use crate::Config;
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
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::ClusterRole;
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass, VolumeAttachment};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// One cache per kind, each fed by one watch, shared by all controllers.
pub(crate) struct Caches {
    pub(crate) pods: Arc<Cache<Pod>>,
    pub(crate) nodes: Arc<Cache<Node>>,
    pub(crate) namespaces: Arc<Cache<Namespace>>,
    pub(crate) services: Arc<Cache<Service>>,
    pub(crate) endpoints: Arc<Cache<Endpoints>>,
    pub(crate) slices: Arc<Cache<EndpointSlice>>,
    pub(crate) accounts: Arc<Cache<ServiceAccount>>,
    pub(crate) replica_sets: Arc<Cache<ReplicaSet>>,
    pub(crate) replication_controllers: Arc<Cache<ReplicationController>>,
    pub(crate) deployments: Arc<Cache<Deployment>>,
    pub(crate) daemon_sets: Arc<Cache<DaemonSet>>,
    pub(crate) stateful_sets: Arc<Cache<StatefulSet>>,
    pub(crate) revisions: Arc<Cache<ControllerRevision>>,
    pub(crate) jobs: Arc<Cache<Job>>,
    pub(crate) cron_jobs: Arc<Cache<CronJob>>,
    pub(crate) budgets: Arc<Cache<PodDisruptionBudget>>,
    pub(crate) quotas: Arc<Cache<ResourceQuota>>,
    pub(crate) claims: Arc<Cache<PersistentVolumeClaim>>,
    pub(crate) volumes: Arc<Cache<PersistentVolume>>,
    pub(crate) storage_classes: Arc<Cache<StorageClass>>,
    pub(crate) csi_drivers: Arc<Cache<CSIDriver>>,
    pub(crate) attachments: Arc<Cache<VolumeAttachment>>,
    pub(crate) signing_requests: Arc<Cache<CertificateSigningRequest>>,
    pub(crate) cluster_roles: Arc<Cache<ClusterRole>>,
    pub(crate) autoscalers: Arc<Cache<HorizontalPodAutoscaler>>,
    pub(crate) leases: Arc<Cache<Lease>>,
}

impl Caches {
    fn new() -> Self {
        let caches = Self {
            pods: Cache::new(),
            nodes: Cache::new(),
            namespaces: Cache::new(),
            services: Cache::new(),
            endpoints: Cache::new(),
            slices: Cache::new(),
            accounts: Cache::new(),
            replica_sets: Cache::new(),
            replication_controllers: Cache::new(),
            deployments: Cache::new(),
            daemon_sets: Cache::new(),
            stateful_sets: Cache::new(),
            revisions: Cache::new(),
            jobs: Cache::new(),
            cron_jobs: Cache::new(),
            budgets: Cache::new(),
            quotas: Cache::new(),
            claims: Cache::new(),
            volumes: Cache::new(),
            storage_classes: Cache::new(),
            csi_drivers: Cache::new(),
            attachments: Cache::new(),
            signing_requests: Cache::new(),
            cluster_roles: Cache::new(),
            autoscalers: Cache::new(),
            leases: Cache::new(),
        };
        // Images are most of a node's status, and no controller reads them.
        caches.nodes.trim(|node| {
            if let Some(status) = node.status.as_mut() {
                status.images = None;
            }
        });
        caches
    }

    fn start(&self, client: &kube::Client, stop: &CancellationToken) {
        macro_rules! start {
            ($($cache:ident),*) => { $( self.$cache.start_all(client.clone(), stop.clone()); )* };
        }
        start!(
            pods,
            nodes,
            namespaces,
            services,
            endpoints,
            slices,
            accounts,
            replica_sets,
            replication_controllers,
            deployments,
            daemon_sets,
            stateful_sets,
            revisions,
            jobs,
            cron_jobs,
            budgets,
            quotas,
            claims,
            volumes,
            storage_classes,
            csi_drivers,
            attachments,
            signing_requests,
            cluster_roles,
            autoscalers,
            leases
        );
    }

    async fn synced(&self) {
        macro_rules! wait {
            ($($cache:ident),*) => { $( self.$cache.synced().await; )* };
        }
        wait!(
            pods,
            nodes,
            namespaces,
            services,
            endpoints,
            slices,
            accounts,
            replica_sets,
            replication_controllers,
            deployments,
            daemon_sets,
            stateful_sets,
            revisions,
            jobs,
            cron_jobs,
            budgets,
            quotas,
            claims,
            volumes,
            storage_classes,
            csi_drivers,
            attachments,
            signing_requests,
            cluster_roles,
            autoscalers,
            leases
        );
    }
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
