//! What the agent is told: its own [`Config`] and the `KubeletConfiguration` v1beta1 file people already know.
//!
//! Every upstream field is either honoured or refused by name; a word that upstream does not know is an error too.

mod access;
mod duration;
mod fields;
mod node;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use self::duration::go_duration;
pub use self::{
    access::{Anonymous, Authentication, Authorization, ReviewLife, Webhook, X509Authentication},
    duration::{format_duration, parse_duration},
    node::{Logging, MemorySwap, ReservedMemory, ShutdownByPriority, UserNamespaces},
};
use crate::{images::Verification, paths::Paths};

/// Everything the agent needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Layout on this machine.
    pub paths: Paths,
    /// The node's name.
    pub node_name: String,
    /// The node's address; found when not given.
    pub node_ip: Option<IpAddr>,
    /// Further labels at registration.
    pub labels: BTreeMap<String, String>,
    /// Kubeconfig of the API server. A file that does not exist yet means standalone until it appears.
    pub kubeconfig: Option<PathBuf>,
    /// The `isopod-runtime` executable.
    pub runtime_binary: PathBuf,
    /// The configuration file's content.
    pub kubelet: KubeletConfiguration,
    /// Serving certificate of port 10250, PEM; a missing one is self-signed by the server.
    pub serving_cert: PathBuf,
    /// Its key.
    pub serving_key: PathBuf,
    /// CA whose client certificates the server accepts.
    pub client_ca: PathBuf,
    /// Pod addresses of the whole cluster.
    pub cluster_cidr: ipnet::IpNet,
    /// Service addresses.
    pub service_cidr: ipnet::IpNet,
    /// Makes connection tracking forget the UDP flows of host ports whose pod comes or goes.
    pub forget_flows: Option<crate::network::ForgetFlows>,
    /// True while somebody in this process changes so much of nftables that nobody should listen.
    pub loading: tokio::sync::watch::Receiver<bool>,
    /// Told until when the node's lease holds.
    pub lease: tokio::sync::watch::Sender<Option<std::time::Instant>>,
    /// Name of the image to assemble from this executable, if any: the control plane's, and that of volumes' removers.
    pub own_image: Option<String>,
}

/// The fields of `kubelet.config.k8s.io/v1beta1 KubeletConfiguration` that are honoured; the others are in `fields`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeletConfiguration {
    /// Directory (or file) of static pod manifests.
    pub static_pod_path: Option<PathBuf>,
    /// Static pod range of a standalone node.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<ipnet::IpNet>,
    /// Addresses of the cluster's DNS.
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    pub cluster_domain: String,
    /// Most pods on this node.
    pub max_pods: u32,
    /// Most pods per core, 0 is no limit.
    pub pods_per_core: u32,
    /// Port of the node API.
    pub port: u16,
    /// Its address.
    pub address: IpAddr,
    /// Whether the node API is served at all.
    pub enable_server: bool,
    /// exec, attach, logs and port-forward on the node API.
    pub enable_debugging_handlers: bool,
    /// Local health port, 0 is off.
    pub healthz_port: u16,
    /// Its address.
    pub healthz_bind_address: IpAddr,
    /// Hard eviction thresholds by signal.
    pub eviction_hard: BTreeMap<String, String>,
    /// Soft eviction thresholds by signal.
    pub eviction_soft: BTreeMap<String, String>,
    /// How long a soft threshold must hold, by signal.
    pub eviction_soft_grace_period: BTreeMap<String, String>,
    /// How long pressure must be gone before a condition turns.
    #[serde(with = "go_duration")]
    pub eviction_pressure_transition_period: Duration,
    /// Longest grace given to a softly evicted pod, seconds.
    pub eviction_max_pod_grace_period: i64,
    /// Least reclaimed by an eviction, by signal.
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    /// Taken from capacity for Kubernetes' own daemons.
    pub kube_reserved: BTreeMap<String, String>,
    /// Taken from capacity for the system.
    pub system_reserved: BTreeMap<String, String>,
    /// Which groups limits are put on: `pods` or nothing.
    pub enforce_node_allocatable: Vec<String>,
    /// Size at which a container's log is rotated.
    pub container_log_max_size: String,
    /// Log files kept per container.
    pub container_log_max_files: u32,
    /// Pulls per second, 0 is no limit.
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: i32,
    /// Burst of pulls.
    pub registry_burst: i32,
    /// Which images that are here already a pod needs credentials for: `NeverVerify`, `NeverVerifyPreloadedImages`,
    /// `NeverVerifyAllowlistedImages` or `AlwaysVerify`.
    pub image_pull_credentials_verification_policy: String,
    /// Preloaded images everybody may use, with `NeverVerifyAllowlistedImages`.
    pub preloaded_images_verification_allowlist: Vec<String>,
    /// One pull at a time.
    pub serialize_image_pulls: bool,
    /// Renew the node's client certificate before it ends. Unlike upstream this is so unless it is turned off.
    pub rotate_certificates: bool,
    /// Renew its serving certificate, too; the same holds.
    #[serde(rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: bool,
    /// Pulls at one time.
    pub max_parallel_image_pulls: Option<u32>,
    /// Events per second, 0 is no limit.
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: i32,
    /// Burst of events.
    pub event_burst: i32,
    /// Refuse to start on a machine with swap.
    pub fail_swap_on: bool,
    /// Refuse to start with cgroup v1.
    pub fail_cgroup_v1: bool,
    /// CPU limits are enforced by quota.
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    /// Period of the quota.
    #[serde(rename = "cpuCFSQuotaPeriod", with = "go_duration")]
    pub cpu_cfs_quota_period: Duration,
    /// PIDs per pod, -1 is no limit.
    pub pod_pids_limit: i64,
    /// Host resolver configuration pods inherit.
    pub resolv_conf: PathBuf,
    /// RuntimeDefault seccomp where a pod asks for none.
    pub seccomp_default: bool,
    /// Sysctls allowed beyond the safe set (`kernel.msg*`).
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Images told in the node's status, -1 is all.
    pub node_status_max_images: i32,
    /// Seconds of the node's lease.
    pub node_lease_duration_seconds: i32,
    /// How often a changed node status is written.
    #[serde(with = "go_duration")]
    pub node_status_update_frequency: Duration,
    /// How often an unchanged node status is written.
    #[serde(with = "go_duration")]
    pub node_status_report_frequency: Duration,
    /// Least age of an unused image before it is collected.
    #[serde(rename = "imageMinimumGCAge", with = "go_duration")]
    pub image_minimum_gc_age: Duration,
    /// Age at which an unused image is collected whatever the disk says, 0 is never.
    #[serde(rename = "imageMaximumGCAge", with = "go_duration")]
    pub image_maximum_gc_age: Duration,
    /// Disk use, percent, at which images are collected.
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: u8,
    /// Disk use, percent, down to which images are collected.
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: u8,
    /// Back-off of crashing containers.
    pub crash_loop_back_off: CrashLoopBackOff,
    /// Whether the node object is created by the agent.
    pub register_node: bool,
    /// Taints at registration.
    pub register_with_taints: Vec<k8s_openapi::api::core::v1::Taint>,
    /// `spec.providerID` at registration.
    #[serde(rename = "providerID")]
    pub provider_id: Option<String>,
    /// Idle time after which exec, attach and port-forward streams are closed.
    #[serde(with = "go_duration")]
    pub streaming_connection_idle_timeout: Duration,
    /// Serving certificate.
    pub tls_cert_file: Option<PathBuf>,
    /// Serving key.
    pub tls_private_key_file: Option<PathBuf>,
    /// Who may call the node API.
    pub authentication: Authentication,
    /// What callers may do.
    pub authorization: Authorization,
    /// Name of the cgroup driver: `cgroupfs` or `systemd`.
    pub cgroup_driver: String,
    /// Static pods from here, beside the directory's.
    #[serde(rename = "staticPodURL")]
    pub static_pod_url: Option<String>,
    /// Headers of the request for them.
    #[serde(rename = "staticPodURLHeader")]
    pub static_pod_url_header: BTreeMap<String, Vec<String>>,
    /// How often they are asked for.
    #[serde(with = "go_duration")]
    pub http_check_frequency: Duration,
    /// Cipher suites of the node API by their IANA names; empty is the library's choice.
    pub tls_cipher_suites: Vec<String>,
    /// `VersionTLS12` or `VersionTLS13`.
    pub tls_min_version: Option<String>,
    /// oom_score_adj of the agent itself.
    pub oom_score_adj: i32,
    /// Most files the agent opens.
    pub max_open_files: u64,
    /// Thresholds that are not said keep their default.
    pub merge_default_eviction_settings: bool,
    /// Refuse to start when kernel settings are not what upstream wants.
    pub protect_kernel_defaults: bool,
    /// Gates by name.
    pub feature_gates: BTreeMap<String, bool>,
    /// What containers may swap.
    pub memory_swap: MemorySwap,
    /// Whether /var/log can be read through the node API.
    pub enable_system_log_handler: bool,
    /// Whether logs of the node's services can be asked for by name.
    pub enable_system_log_query: bool,
    /// How long the node's shutdown waits for pods.
    #[serde(with = "go_duration")]
    pub shutdown_grace_period: Duration,
    /// How much of it is for critical pods.
    #[serde(with = "go_duration")]
    pub shutdown_grace_period_critical_pods: Duration,
    /// The same by priority.
    pub shutdown_grace_period_by_pod_priority: Vec<ShutdownByPriority>,
    /// How the agent logs.
    pub logging: Logging,
    /// User namespaces of pods.
    pub user_namespaces: UserNamespaces,
    /// `none` or `static`.
    pub cpu_manager_policy: String,
    /// Options of the policy.
    pub cpu_manager_policy_options: BTreeMap<String, String>,
    /// CPUs that no pod has for itself.
    #[serde(rename = "reservedSystemCPUs")]
    pub reserved_system_cpus: String,
    /// `None` or `Static`.
    pub memory_manager_policy: String,
    /// Memory of each NUMA node that is not for pods.
    pub reserved_memory: Vec<ReservedMemory>,
    /// `none`, `best-effort`, `restricted` or `single-numa-node`.
    pub topology_manager_policy: String,
    /// `container` or `pod`.
    pub topology_manager_scope: String,
    /// Options of the policy.
    pub topology_manager_policy_options: BTreeMap<String, String>,
    /// Where between request and limit memory is throttled (cgroup v2, gate MemoryQoS).
    pub memory_throttling_factor: f64,
    /// Whether requested memory is reserved (cgroup v2, gate MemoryQoS).
    pub memory_reservation_policy: String,
}

/// `crashLoopBackOff`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct CrashLoopBackOff {
    /// Longest wait between restarts.
    #[serde(with = "go_duration")]
    pub max_container_restart_period: Duration,
}

impl Default for CrashLoopBackOff {
    fn default() -> Self {
        Self { max_container_restart_period: Duration::from_secs(300) }
    }
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        let hard = [
            ("memory.available", "100Mi"),
            ("nodefs.available", "10%"),
            ("nodefs.inodesFree", "5%"),
            ("imagefs.available", "15%"),
            ("imagefs.inodesFree", "5%"),
        ];
        Self {
            static_pod_path: None,
            pod_cidr: None,
            cluster_dns: vec![IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10))],
            cluster_domain: "cluster.local".into(),
            max_pods: 110,
            pods_per_core: 0,
            port: 10250,
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            enable_server: true,
            enable_debugging_handlers: true,
            healthz_port: 10248,
            healthz_bind_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            eviction_hard: hard.map(|(k, v)| (k.into(), v.into())).into(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_pressure_transition_period: seconds(300),
            eviction_max_pod_grace_period: 0,
            eviction_minimum_reclaim: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            system_reserved: BTreeMap::new(),
            enforce_node_allocatable: vec!["pods".into()],
            container_log_max_size: "10Mi".into(),
            container_log_max_files: 5,
            rotate_certificates: true,
            server_tls_bootstrap: true,
            image_pull_credentials_verification_policy: "NeverVerifyPreloadedImages".into(),
            preloaded_images_verification_allowlist: Vec::new(),
            registry_pull_qps: 5,
            registry_burst: 10,
            serialize_image_pulls: false,
            max_parallel_image_pulls: None,
            event_record_qps: 50,
            event_burst: 100,
            fail_swap_on: false,
            fail_cgroup_v1: false,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            pod_pids_limit: -1,
            resolv_conf: "/etc/resolv.conf".into(),
            seccomp_default: false,
            allowed_unsafe_sysctls: Vec::new(),
            node_status_max_images: 50,
            node_lease_duration_seconds: 40,
            node_status_update_frequency: seconds(10),
            node_status_report_frequency: seconds(300),
            image_minimum_gc_age: seconds(120),
            image_maximum_gc_age: Duration::ZERO,
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            crash_loop_back_off: CrashLoopBackOff::default(),
            register_node: true,
            register_with_taints: Vec::new(),
            provider_id: None,
            streaming_connection_idle_timeout: seconds(4 * 3600),
            tls_cert_file: None,
            tls_private_key_file: None,
            authentication: Authentication::default(),
            authorization: Authorization::default(),
            cgroup_driver: "cgroupfs".into(),
            static_pod_url: None,
            static_pod_url_header: BTreeMap::new(),
            http_check_frequency: seconds(20),
            tls_cipher_suites: Vec::new(),
            tls_min_version: None,
            oom_score_adj: -999,
            max_open_files: 1_000_000,
            merge_default_eviction_settings: false,
            protect_kernel_defaults: false,
            feature_gates: BTreeMap::new(),
            memory_swap: MemorySwap::default(),
            enable_system_log_handler: true,
            enable_system_log_query: false,
            shutdown_grace_period: Duration::ZERO,
            shutdown_grace_period_critical_pods: Duration::ZERO,
            shutdown_grace_period_by_pod_priority: Vec::new(),
            logging: Logging::default(),
            user_namespaces: UserNamespaces::default(),
            cpu_manager_policy: "none".into(),
            cpu_manager_policy_options: BTreeMap::new(),
            reserved_system_cpus: String::new(),
            memory_manager_policy: "None".into(),
            reserved_memory: Vec::new(),
            topology_manager_policy: "none".into(),
            topology_manager_scope: "container".into(),
            topology_manager_policy_options: BTreeMap::new(),
            memory_throttling_factor: 0.9,
            memory_reservation_policy: "None".into(),
        }
    }
}

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It says something that is not understood or not supported.
    #[error("{path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What and where.
        message: String,
    },
}

impl KubeletConfiguration {
    /// Reads the file at `path`; an absent file is the default configuration.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                Self::parse(&text).map_err(|message| ConfigError::Invalid { path: path.to_path_buf(), message })
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_path_buf(), source }),
        }
    }

    /// Parses the file's text (YAML or JSON).
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut value: serde_json::Value = serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?;
        let Some(map) = value.as_object_mut() else { return Err("not a KubeletConfiguration".into()) };
        for (key, want) in [("apiVersion", "kubelet.config.k8s.io/v1beta1"), ("kind", "KubeletConfiguration")] {
            match map.remove(key) {
                Some(serde_json::Value::String(s)) if s == want => {}
                Some(other) => return Err(format!("{key} is {other}, want {want:?}")),
                None => return Err(format!("{key} is missing, want {want:?}")),
            }
        }
        let default = serde_json::to_value(Self::default()).map_err(|e| e.to_string())?;
        let mut wrong = None;
        map.retain(|key, value| match fields::fixed(key, value) {
            Some(fits) => {
                wrong = wrong.take().or(fits.err());
                false
            }
            None => {
                if default.get(key).is_none() {
                    wrong.get_or_insert_with(|| format!("unknown field {key:?} in KubeletConfiguration"));
                }
                // What is empty or no time at all means the default, as upstream has it.
                !(value.is_null() || value == "" || value == "0s" && key != "imageMaximumGCAge")
            }
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let update_only =
            map.contains_key("nodeStatusUpdateFrequency") && !map.contains_key("nodeStatusReportFrequency");
        let merges = map.get("mergeDefaultEvictionSettings").is_some_and(|v| v == true);
        let mut parsed: Self = from_fields(map, &default)?;
        if update_only {
            parsed.node_status_report_frequency = parsed.node_status_update_frequency;
        }
        if merges {
            for (signal, amount) in Self::default().eviction_hard {
                parsed.eviction_hard.entry(signal).or_insert(amount);
            }
        }
        if parsed.authentication.webhook.cache_ttl.is_zero() {
            parsed.authentication.webhook.cache_ttl = Webhook::default().cache_ttl;
        }
        parsed.authorization.webhook.fill();
        parsed.check()?;
        Ok(parsed)
    }

    /// Whether pods have to show credentials for images that are here already.
    pub(crate) fn verification(&self) -> Result<Verification, String> {
        let list = &self.preloaded_images_verification_allowlist;
        match self.image_pull_credentials_verification_policy.as_str() {
            "NeverVerifyAllowlistedImages" => Ok(Verification::NotAllowed(list.clone())),
            _ if !list.is_empty() => Err("preloadedImagesVerificationAllowlist needs \
                 imagePullCredentialsVerificationPolicy NeverVerifyAllowlistedImages"
                .into()),
            "NeverVerify" => Ok(Verification::Never),
            "NeverVerifyPreloadedImages" => Ok(Verification::NotPreloaded),
            "AlwaysVerify" => Ok(Verification::Always),
            other => Err(format!("imagePullCredentialsVerificationPolicy {other:?} is unknown")),
        }
    }

    /// Most images pulled at one time, if that is limited.
    pub(crate) fn parallel_pulls(&self) -> Option<usize> {
        let most = self.max_parallel_image_pulls.and_then(|n| usize::try_from(n).ok());
        if self.serialize_image_pulls { Some(1) } else { most }
    }

    fn check(&self) -> Result<(), String> {
        if crate::cgroups::Driver::named(&self.cgroup_driver).is_none() {
            return Err(format!("cgroupDriver {:?}: want \"cgroupfs\" or \"systemd\"", self.cgroup_driver));
        }
        if !matches!(self.authorization.mode.as_str(), "Webhook" | "AlwaysAllow") {
            return Err(format!("authorization.mode {:?}: want Webhook or AlwaysAllow", self.authorization.mode));
        }
        self.verification()?;
        fields::gates(&self.feature_gates)?;
        self.check_node()?;
        if self.max_parallel_image_pulls == Some(0) {
            return Err("maxParallelImagePulls must be a positive number".into());
        }
        if self.serialize_image_pulls && self.max_parallel_image_pulls.is_some_and(|n| n > 1) {
            return Err("maxParallelImagePulls cannot be larger than 1 unless serializeImagePulls is false".into());
        }
        if self.container_log_max_files < 2 {
            return Err("containerLogMaxFiles must be greater than 1".into());
        }
        let quantities = self.kube_reserved.iter().chain(&self.system_reserved);
        for (name, q) in quantities {
            isopod_quantity(q).ok_or_else(|| format!("reserved {name}: {q:?} is not a quantity"))?;
        }
        isopod_quantity(&self.container_log_max_size)
            .ok_or_else(|| format!("containerLogMaxSize {:?} is not a quantity", self.container_log_max_size))?;
        let graceless = self.eviction_soft.keys().find(|s| !self.eviction_soft_grace_period.contains_key(*s));
        if let Some(signal) = graceless {
            return Err(format!("evictionSoft {signal:?} has no evictionSoftGracePeriod"));
        }
        for (signal, grace) in &self.eviction_soft_grace_period {
            parse_duration(grace)
                .ok_or_else(|| format!("evictionSoftGracePeriod {signal}: {grace:?} is not a duration"))?;
        }
        for (signal, v) in self.eviction_hard.iter().chain(&self.eviction_soft) {
            if !matches!(
                signal.as_str(),
                "memory.available"
                    | "nodefs.available"
                    | "nodefs.inodesFree"
                    | "imagefs.available"
                    | "imagefs.inodesFree"
                    | "containerfs.available"
                    | "containerfs.inodesFree"
                    | "allocatableMemory.available"
                    | "pid.available"
            ) {
                return Err(format!("unknown eviction signal {signal:?}"));
            }
            let percent = v.strip_suffix('%').and_then(|p| p.parse::<f64>().ok());
            if percent.is_none() && isopod_quantity(v).is_none() {
                return Err(format!("eviction threshold {signal}: {v:?} is neither a quantity nor a percentage"));
            }
        }
        Ok(())
    }
}

/// Reads the fields one by one first, so that an error tells which it is.
fn from_fields(
    map: &serde_json::Map<String, serde_json::Value>,
    default: &serde_json::Value,
) -> Result<KubeletConfiguration, String> {
    for (key, value) in map {
        let mut one = default.clone();
        one[key] = value.clone();
        serde_json::from_value::<KubeletConfiguration>(one).map_err(|e| format!("{key}: {e}"))?;
    }
    serde_json::from_value(serde_json::Value::Object(map.clone())).map_err(|e| e.to_string())
}

fn isopod_quantity(text: &str) -> Option<i128> {
    crate::quantity::milli(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    #[test]
    fn fields_are_honoured_or_refused_by_name() {
        let c = KubeletConfiguration::parse(&format!(
            "{HEAD}maxPods: 7\nclusterDNS: [10.0.0.9]\npodCIDR: 10.1.0.0/24\ncpuCFSQuotaPeriod: 50ms\n"
        ))
        .unwrap();
        assert_eq!(c.max_pods, 7);
        assert_eq!(c.cluster_dns, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(c.cpu_cfs_quota_period, Duration::from_millis(50));
        for (line, want) in [
            (
                "cgroupRoot: /x",
                "field \"cgroupRoot\" of KubeletConfiguration: \"/x\" is not supported by isopod (pods are below the \
                 group of the instance): want \"\" or \"/\", or remove it",
            ),
            ("maxpods: 3", "unknown field \"maxpods\" in KubeletConfiguration"),
            ("evictionHard: {foo: 1Gi}", "unknown eviction signal \"foo\""),
            (
                "evictionSoft: {memory.available: 1Gi}",
                "evictionSoft \"memory.available\" has no evictionSoftGracePeriod",
            ),
            ("imageMaximumGCAge: 1m", "imageMaximumGCAge must be greater than imageMinimumGCAge"),
            ("maxParallelImagePulls: 0", "maxParallelImagePulls must be a positive number"),
            (
                "imagePullCredentialsVerificationPolicy: Sometimes",
                "imagePullCredentialsVerificationPolicy \"Sometimes\" is unknown",
            ),
        ] {
            assert_eq!(KubeletConfiguration::parse(&format!("{HEAD}{line}\n")).unwrap_err(), want);
        }
        assert!(
            KubeletConfiguration::parse("kind: KubeletConfiguration\n").unwrap_err().contains("apiVersion is missing")
        );
    }
}
