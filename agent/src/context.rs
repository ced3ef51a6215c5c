//! What all parts of the agent share.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1::{Node, PodSpec};
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::{
    access::Access,
    api::Api,
    cgroups::Cgroups,
    claims::Claims,
    config::Config,
    cri,
    csi::Csi,
    devices::Devices,
    events::Recorder,
    images::{ImageService, Providers},
    metrics::Metrics,
    network::PodNetwork,
    node::pressure::Pressure,
    objects::Objects,
    pods::{table::PodTable, users::UserRanges},
    qos::{self, Limits},
    services::Services,
    spec::{
        field::Allocatable,
        files::Resolver,
        resources::{Knobs, Swap, Throttling},
    },
    stats::Stats,
    topology::Managers,
};

/// Facts of this machine that do not change while the agent runs.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) cpus: u32,
    pub(crate) memory: i64,
    pub(crate) swap: i64,
    pub(crate) allocatable: Allocatable,
    pub(crate) resolver: Resolver,
}

/// Shared services.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) node_name: Arc<str>,
    pub(crate) api: Api,
    pub(crate) images: Arc<dyn ImageService>,
    /// Programs that know credentials of pods by their service accounts.
    pub(crate) providers: Arc<Providers>,
    pub(crate) network: Arc<dyn PodNetwork>,
    pub(crate) objects: Objects,
    pub(crate) services: Services,
    pub(crate) events: Recorder,
    pub(crate) cgroups: Cgroups,
    pub(crate) machine: Machine,
    pub(crate) table: PodTable,
    pub(crate) stats: Stats,
    pub(crate) metrics: Metrics,
    pub(crate) access: Access,
    pub(crate) users: UserRanges,
    pub(crate) csi: Csi,
    /// What was made over the CRI socket.
    pub(crate) cri: cri::Store,
    pub(crate) devices: Devices,
    pub(crate) claims: Claims,
    /// Who has which CPUs and whose memory comes from where.
    pub(crate) topology: Managers,
    /// Whether the machine is going down.
    pub(crate) shutdown: watch::Sender<bool>,
    /// What the node is short of.
    pub(crate) pressure: watch::Sender<Pressure>,
    /// This machine's Node as last seen.
    pub(crate) node: RwLock<Option<Arc<Node>>>,
    /// Milli-CPUs requested by burstable pods, for their class's weight.
    pub(crate) burstable: RwLock<std::collections::HashMap<String, i64>>,
}

impl Context {
    /// CFS period in microseconds, when limits are enforced by quota.
    pub(crate) fn cfs_period(&self) -> Option<u64> {
        let k = &self.config.kubelet;
        k.cpu_cfs_quota.then(|| u64::try_from(k.cpu_cfs_quota_period.as_micros()).unwrap_or(100_000).max(1000))
    }

    /// What of the node a container's kernel numbers depend on.
    pub(crate) fn knobs(&self) -> Knobs {
        let k = &self.config.kubelet;
        let memory_v2 = self.cgroups.memory_is_v2();
        let swap = Swap {
            limited: k.memory_swap.swap_behavior == "LimitedSwap",
            memory: self.machine.memory,
            total: self.machine.swap,
        };
        let throttling = Throttling {
            factor: k.memory_throttling_factor,
            reserve: k.memory_reservation_policy == "TieredReservation",
            allocatable: self.machine.allocatable.memory,
        };
        let quality = k.feature_gates.get("MemoryQoS") == Some(&true);
        Knobs {
            cfs_period: self.cfs_period(),
            swap: Some(swap).filter(|s| memory_v2 && s.total > 0),
            throttling: Some(throttling).filter(|_| memory_v2 && quality),
            ..Knobs::default()
        }
    }

    /// The same, for one container: CPUs of its own are not held back by quota.
    pub(crate) fn knobs_of(&self, uid: &str, container: &str) -> Knobs {
        let knobs = self.knobs();
        let own = !self.topology.exclusive(uid, container).is_empty();
        Knobs {
            cfs_period: knobs.cfs_period.filter(|_| !own),
            cpus: self.topology.cpus_of(uid, container),
            mems: self.topology.nodes_of(uid, container),
            ..knobs
        }
    }

    /// The numbers of a pod's own group.
    pub(crate) fn pod_limits(&self, uid: &str, spec: &PodSpec) -> Limits {
        let period = self.cfs_period().filter(|_| !self.topology.pod_is_exclusive(uid));
        qos::pod_limits(spec, period, self.config.kubelet.pod_pids_limit)
    }

    /// Takes a pod's burstable request in or out of the class's weight.
    pub(crate) fn burstable_request(&self, uid: &str, milli: Option<i64>) {
        let total: i64 = {
            let mut all = self.burstable.write();
            match milli {
                Some(m) => all.insert(uid.into(), m),
                None => all.remove(uid),
            };
            all.values().sum()
        };
        self.cgroups.burstable_shares(total);
    }
}
