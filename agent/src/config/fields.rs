//! Upstream's fields that isopod has no setting for: what may be written there all the same, and what to say to the rest.
//!
//! A field is here when there is one way it works, or when its wish is fulfilled whatever it says (nothing polls, so every
//! period is kept). Feature gates are fields of the same kind: one that is on can be asked for, one that is not can be
//! turned off.

use serde_json::Value;

use super::parse_duration;

/// What may be written.
enum Accepts {
    /// These values, as JSON.
    Only(&'static [&'static str]),
    /// Any duration.
    Period,
    /// Either word.
    Bool,
    /// Any number from here on.
    AtLeast(i64),
}
use Accepts::{AtLeast, Bool, Only, Period};

/// Name, what may be written, and how it is here.
const FIXED: &[(&str, Accepts, &str)] = &[
    ("cgroupRoot", Only(&["\"\"", "\"/\""]), "pods are below the group of the instance"),
    ("cgroupsPerQOS", Only(&["true"]), "every class and pod has a group"),
    ("configMapAndSecretChangeDetectionStrategy", Only(&["\"\"", "\"Watch\""]), "objects are watched"),
    ("containerLogMaxWorkers", AtLeast(1), "each pod's supervisor rotates its logs"),
    ("containerLogMonitorInterval", Period, "logs are rotated as they are written"),
    ("containerRuntimeEndpoint", Only(&["\"\""]), "the agent is its own runtime"),
    ("contentType", Only(&["\"\"", "\"application/json\""]), "the agent speaks JSON to the API server"),
    ("cpuManagerReconcilePeriod", Period, "CPU sets are written when they change"),
    ("enableContentionProfiling", Only(&["false"]), "there are no profiles"),
    ("enableControllerAttachDetach", Only(&["true"]), "the controllers attach volumes"),
    ("enableDebugFlagsHandler", Only(&["false"]), "the log level is set by ISOPOD_LOG"),
    ("enableProfilingHandler", Only(&["false"]), "there are no profiles"),
    ("fileCheckFrequency", Period, "the manifest directory is watched"),
    ("hairpinMode", Only(&["\"\"", "\"promiscuous-bridge\"", "\"hairpin-veth\""]), "pods reach themselves"),
    ("imageServiceEndpoint", Only(&["\"\""]), "the agent is its own image service"),
    ("iptablesDropBit", Only(&["15"]), "there are no iptables"),
    ("iptablesMasqueradeBit", Only(&["14"]), "there are no iptables"),
    ("kernelMemcgNotification", Bool, "the kernel tells of memory pressure by PSI"),
    ("kubeAPIBurst", Only(&["0"]), "requests are not held back"),
    ("kubeAPIQPS", Only(&["-1", "0"]), "requests are not held back"),
    ("kubeReservedCgroup", Only(&["\"\""]), "no limits are put on other groups"),
    ("kubeletCgroups", Only(&["\"\""]), "the agent stays in the group it is started in"),
    ("localStorageCapacityIsolation", Only(&["true"]), "ephemeral storage is accounted"),
    ("makeIPTablesUtilChains", Only(&["false"]), "there are no iptables"),
    ("podLogsDir", Only(&["\"\"", "\"/var/log/pods\""]), "logs are in var/log/pods below --root-dir"),
    ("qosReserved", Only(&["{}", "null"]), "classes reserve nothing"),
    ("readOnlyPort", Only(&["0"]), "everybody has to say who he is"),
    ("runOnce", Only(&["false"]), "the agent stays"),
    ("runtimeRequestTimeout", Period, "there is no runtime to wait for"),
    ("showHiddenMetricsForVersion", Only(&["\"\""]), "no metric is hidden"),
    ("singleProcessOOMKill", Only(&["true"]), "the kernel's own choice of one process is left alone"),
    ("syncFrequency", Period, "pods are looked at when something happens"),
    ("systemCgroups", Only(&["\"\""]), "the system's processes stay where they are"),
    ("systemReservedCgroup", Only(&["\"\""]), "no limits are put on other groups"),
    ("tlsCurvePreferences", Only(&["[]", "null"]), "the TLS library's curves are used"),
    ("tracing", Only(&["null"]), "no spans are exported"),
    (
        "volumePluginDir",
        Only(&["\"\"", "\"/usr/libexec/kubernetes/kubelet-plugins/volume/exec/\""]),
        "there are no FlexVolumes",
    ),
    ("volumeStatsAggPeriod", Period, "volumes are measured when somebody asks"),
];

/// Gates of features that are here and cannot be turned off.
const GATES: &[&str] = &[
    "CPUManagerPolicyBetaOptions",
    "CPUManagerPolicyOptions",
    "ContainerRestartRules",
    "ContainerStopSignals",
    "DisableCPUQuotaWithExclusiveCPUs",
    "DynamicResourceAllocation",
    "GracefulNodeShutdown",
    "GracefulNodeShutdownBasedOnPodPriority",
    "HostnameOverride",
    "ImageMaximumGCAge",
    "ImageVolume",
    "InPlacePodVerticalScaling",
    "KubeletCrashLoopBackOffMax",
    "KubeletEnsureSecretPulledImages",
    "KubeletFineGrainedAuthz",
    "KubeletPSI",
    "LocalStorageCapacityIsolation",
    "MemoryManager",
    "NodeLogQuery",
    "NodeSwap",
    "PodLevelResources",
    "PodObservedGenerationTracking",
    "PodReadyToStartContainersCondition",
    "ProcMountType",
    "RecursiveReadOnlyMounts",
    "RelaxedEnvironmentVariableValidation",
    "RestartAllContainersOnContainerExits",
    "SeccompDefault",
    "SidecarContainers",
    "SupplementalGroupsPolicy",
    "TopologyManagerPolicyBetaOptions",
    "TopologyManagerPolicyOptions",
    "UserNamespacesSupport",
];

/// Gates of features that are here and are off unless asked for.
const OPTIONAL: &[&str] = &["CPUManagerPolicyAlphaOptions", "MemoryQoS", "TopologyManagerPolicyAlphaOptions"];

/// Whether the value of a field without a setting can stay; `None` for a field that is not of this kind.
pub(super) fn fixed(name: &str, value: &Value) -> Option<Result<(), String>> {
    let (_, accepts, here) = FIXED.iter().find(|(n, _, _)| *n == name)?;
    let fits = match accepts {
        Only(all) => all.iter().any(|v| serde_json::from_str::<Value>(v).is_ok_and(|v| v == *value)),
        Period => value.as_str().is_some_and(|t| parse_duration(t).is_some()),
        Bool => value.is_boolean(),
        AtLeast(least) => value.as_i64().is_some_and(|n| n >= *least),
    };
    let want = match accepts {
        Only(all) => format!("want {}", all.join(" or ")),
        Period => "want a duration".into(),
        Bool => "want true or false".into(),
        AtLeast(least) => format!("want a number from {least} on"),
    };
    Some(if fits {
        Ok(())
    } else {
        Err(format!(
            "field {name:?} of KubeletConfiguration: {value} is not supported by isopod ({here}): {want}, or remove it"
        ))
    })
}

/// Whether the feature gates ask for what is here.
pub(super) fn gates<'a>(wanted: impl IntoIterator<Item = (&'a String, &'a bool)>) -> Result<(), String> {
    for (name, on) in wanted.into_iter().filter(|(n, _)| !OPTIONAL.contains(&n.as_str())) {
        match (on, GATES.contains(&name.as_str())) {
            (true, false) => return Err(format!("featureGates: {name} cannot be turned on: isopod does not have it")),
            (false, true) => return Err(format!("featureGates: {name} cannot be turned off in isopod")),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::KubeletConfiguration;

    /// Every field of the v1.36 type.
    const UPSTREAM: &str = "enableServer staticPodPath podLogsDir syncFrequency fileCheckFrequency httpCheckFrequency \
        staticPodURL staticPodURLHeader address port readOnlyPort tlsCertFile tlsPrivateKeyFile tlsCipherSuites \
        tlsCurvePreferences tlsMinVersion rotateCertificates serverTLSBootstrap authentication authorization \
        registryPullQPS registryBurst imagePullCredentialsVerificationPolicy preloadedImagesVerificationAllowlist \
        eventRecordQPS eventBurst enableDebuggingHandlers enableContentionProfiling healthzPort healthzBindAddress \
        oomScoreAdj clusterDomain clusterDNS streamingConnectionIdleTimeout nodeStatusUpdateFrequency \
        nodeStatusReportFrequency nodeLeaseDurationSeconds imageMinimumGCAge imageMaximumGCAge \
        imageGCHighThresholdPercent imageGCLowThresholdPercent volumeStatsAggPeriod kubeletCgroups systemCgroups \
        cgroupRoot cgroupsPerQOS cgroupDriver cpuManagerPolicy singleProcessOOMKill cpuManagerPolicyOptions \
        cpuManagerReconcilePeriod memoryManagerPolicy topologyManagerPolicy topologyManagerScope \
        topologyManagerPolicyOptions qosReserved runtimeRequestTimeout hairpinMode maxPods podCIDR podPidsLimit \
        resolvConf runOnce cpuCFSQuota cpuCFSQuotaPeriod nodeStatusMaxImages maxOpenFiles contentType kubeAPIQPS \
        kubeAPIBurst serializeImagePulls maxParallelImagePulls evictionHard evictionSoft evictionSoftGracePeriod \
        evictionPressureTransitionPeriod evictionMaxPodGracePeriod evictionMinimumReclaim mergeDefaultEvictionSettings \
        podsPerCore enableControllerAttachDetach protectKernelDefaults makeIPTablesUtilChains iptablesMasqueradeBit \
        iptablesDropBit featureGates failSwapOn memorySwap containerLogMaxSize containerLogMaxFiles \
        containerLogMaxWorkers containerLogMonitorInterval configMapAndSecretChangeDetectionStrategy systemReserved \
        kubeReserved reservedSystemCPUs showHiddenMetricsForVersion systemReservedCgroup kubeReservedCgroup \
        enforceNodeAllocatable allowedUnsafeSysctls volumePluginDir providerID kernelMemcgNotification logging \
        enableSystemLogHandler enableSystemLogQuery shutdownGracePeriod shutdownGracePeriodCriticalPods \
        shutdownGracePeriodByPodPriority crashLoopBackOff reservedMemory enableProfilingHandler \
        enableDebugFlagsHandler seccompDefault memoryThrottlingFactor memoryReservationPolicy registerWithTaints \
        registerNode tracing localStorageCapacityIsolation containerRuntimeEndpoint imageServiceEndpoint failCgroupV1 \
        userNamespaces";

    #[test]
    fn every_upstream_field_is_known_by_name() {
        let own = serde_json::to_value(KubeletConfiguration::default()).unwrap();
        let parse = |field: &str, value: &str| {
            KubeletConfiguration::parse(&format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{field}: {value}\n"
            ))
        };
        for field in UPSTREAM.split_whitespace() {
            let fixed = super::FIXED.iter().any(|(n, _, _)| *n == field);
            assert_ne!(own.get(field).is_some(), fixed, "{field} is either a setting or fixed");
            // No field takes this: it is refused by its name, never overlooked.
            let error = parse(field, "[{nonsense: [1]}]").unwrap_err();
            assert!(error.contains(field) || own.get(field).is_some(), "{field}: {error}");
            assert!(!error.starts_with("unknown field"), "{field}: {error}");
        }
        for (name, _, _) in super::FIXED {
            assert!(UPSTREAM.split_whitespace().any(|f| f == *name), "{name} is no field of upstream's");
        }
        for field in own.as_object().unwrap().keys() {
            assert!(UPSTREAM.split_whitespace().any(|f| f == field), "{field} is no field of upstream's");
        }
        assert!(parse("maxPod", "3").unwrap_err().starts_with("unknown field"));
    }

    #[test]
    fn what_kubeadm_writes_is_taken() {
        let text = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
            authentication:\n  anonymous: {enabled: false}\n  webhook: {cacheTTL: 0s, enabled: true}\n\
            authorization:\n  mode: Webhook\n  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}\n\
            cgroupDriver: cgroupfs\nclusterDNS: [10.96.0.10]\nclusterDomain: cluster.local\n\
            containerRuntimeEndpoint: ''\ncpuManagerReconcilePeriod: 0s\ncrashLoopBackOff: {}\n\
            evictionPressureTransitionPeriod: 0s\nfileCheckFrequency: 0s\nhealthzBindAddress: 127.0.0.1\n\
            healthzPort: 10248\nhttpCheckFrequency: 0s\nimageMaximumGCAge: 0s\nimageMinimumGCAge: 0s\n\
            logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}\n\
            memorySwap: {}\nnodeStatusReportFrequency: 0s\nnodeStatusUpdateFrequency: 0s\nrotateCertificates: true\n\
            runtimeRequestTimeout: 0s\nshutdownGracePeriod: 0s\nshutdownGracePeriodCriticalPods: 0s\n\
            streamingConnectionIdleTimeout: 0s\nsyncFrequency: 0s\nvolumeStatsAggPeriod: 0s\n";
        let mut c = KubeletConfiguration::parse(text).unwrap();
        let default = KubeletConfiguration::default();
        assert_eq!(c.eviction_pressure_transition_period, default.eviction_pressure_transition_period);
        assert_eq!(c.authentication.webhook.cache_ttl, default.authentication.webhook.cache_ttl);
        c.logging = default.logging.clone();
        assert_eq!(c, default);
    }

    #[test]
    fn gates_and_fixed_fields_say_why() {
        let parse = |text: &str| {
            KubeletConfiguration::parse(&format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}\n"
            ))
        };
        assert!(parse("featureGates: {SidecarContainers: true, CheckpointContainer: false}").is_ok());
        for (text, want) in [
            ("featureGates: {SidecarContainers: false}", "SidecarContainers cannot be turned off"),
            ("featureGates: {Nonsense: true}", "Nonsense cannot be turned on"),
            ("readOnlyPort: 10255", "field \"readOnlyPort\" of KubeletConfiguration: 10255 is not supported"),
            ("syncFrequency: soon", "want a duration"),
            ("containerLogMaxWorkers: 0", "want a number from 1 on"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
