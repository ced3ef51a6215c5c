//! Defaults as rows: in every struct of this type, this field gets this value when it is unset (or empty).

/// When a row applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// The field is absent or null.
    Unset,
    /// The field is absent or Go's zero.
    Empty,
}

/// One row. `path` is `field`, `struct.field` (only when the struct is there), `struct+.field` (which creates it) or
/// `list[].field`; `value` is JSON, or a bare word for a string.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) path: &'static str,
    pub(super) value: &'static str,
    pub(super) when: When,
}

const fn unset(path: &'static str, value: &'static str) -> Row {
    Row { path, value, when: When::Unset }
}

const fn empty(path: &'static str, value: &'static str) -> Row {
    Row { path, value, when: When::Empty }
}

const POD_SPEC: &[Row] = &[
    unset("dnsPolicy", "ClusterFirst"),
    unset("restartPolicy", "Always"),
    unset("securityContext", "{}"),
    unset("terminationGracePeriodSeconds", "30"),
    unset("schedulerName", "default-scheduler"),
];

const CONTAINER: &[Row] = &[
    empty("terminationMessagePath", "/dev/termination-log"),
    empty("terminationMessagePolicy", "File"),
    empty("ports[].protocol", "TCP"),
];

const PROBE: &[Row] = &[
    empty("timeoutSeconds", "1"),
    empty("periodSeconds", "10"),
    empty("successThreshold", "1"),
    empty("failureThreshold", "3"),
    unset("grpc.service", "\"\""),
];

const HTTP_GET: &[Row] = &[empty("path", "/"), empty("scheme", "HTTP")];

const VOLUME: &[Row] = &[
    unset("secret.defaultMode", "420"),
    unset("configMap.defaultMode", "420"),
    unset("downwardAPI.defaultMode", "420"),
    unset("projected.defaultMode", "420"),
    unset("projected.sources[].serviceAccountToken.expirationSeconds", "3600"),
    unset("hostPath.type", "\"\""),
    unset("azureDisk.cachingMode", "ReadWrite"),
    unset("azureDisk.kind", "Shared"),
    unset("azureDisk.fsType", "ext4"),
    unset("azureDisk.readOnly", "false"),
    unset("ephemeral.volumeClaimTemplate.spec.volumeMode", "Filesystem"),
];

const VOLUME_SOURCE: &[Row] = &[
    unset("hostPath.type", "\"\""),
    unset("azureDisk.cachingMode", "ReadWrite"),
    unset("azureDisk.kind", "Shared"),
    unset("azureDisk.fsType", "ext4"),
    unset("azureDisk.readOnly", "false"),
    unset("persistentVolumeReclaimPolicy", "Retain"),
    unset("volumeMode", "Filesystem"),
];

const WEBHOOK: &[Row] = &[
    unset("failurePolicy", "Fail"),
    unset("matchPolicy", "Equivalent"),
    unset("namespaceSelector", "{}"),
    unset("objectSelector", "{}"),
    unset("timeoutSeconds", "10"),
    unset("rules[].scope", "*"),
    unset("clientConfig.service.port", "443"),
];

const MUTATING_WEBHOOK: &[Row] = &[
    unset("failurePolicy", "Fail"),
    unset("matchPolicy", "Equivalent"),
    unset("namespaceSelector", "{}"),
    unset("objectSelector", "{}"),
    unset("timeoutSeconds", "10"),
    unset("reinvocationPolicy", "Never"),
    unset("rules[].scope", "*"),
    unset("clientConfig.service.port", "443"),
];

const MATCH_RESOURCES: &[Row] = &[
    unset("matchPolicy", "Equivalent"),
    unset("namespaceSelector", "{}"),
    unset("objectSelector", "{}"),
    unset("resourceRules[].scope", "*"),
    unset("excludeResourceRules[].scope", "*"),
];

const CSI_DRIVER: &[Row] = &[
    unset("attachRequired", "true"),
    unset("podInfoOnMount", "false"),
    unset("storageCapacity", "false"),
    unset("fsGroupPolicy", "ReadWriteOnceWithFSType"),
    empty("volumeLifecycleModes", "[\"Persistent\"]"),
    unset("requiresRepublish", "false"),
    unset("seLinuxMount", "false"),
];

const HPA_METRICS: &str =
    r#"[{"type":"Resource","resource":{"name":"cpu","target":{"type":"Utilization","averageUtilization":80}}}]"#;

/// The rows of a definition.
pub(super) fn rows(definition: &str) -> &'static [Row] {
    let Some(name) = definition.strip_prefix("io.k8s.") else { return &[] };
    match name {
        "api.core.v1.PodSpec" => POD_SPEC,
        "api.core.v1.Container" | "api.core.v1.EphemeralContainer" => CONTAINER,
        "api.core.v1.Probe" => PROBE,
        "api.core.v1.HTTPGetAction" => HTTP_GET,
        "api.core.v1.Volume" => VOLUME,
        "api.core.v1.PersistentVolumeSpec" => VOLUME_SOURCE,
        "api.core.v1.ObjectFieldSelector" => const { &[empty("apiVersion", "v1")] },
        "api.core.v1.ReplicationControllerSpec" => const { &[unset("replicas", "1")] },
        "api.core.v1.Secret" => const { &[empty("type", "Opaque")] },
        "api.core.v1.NamespaceStatus" => const { &[empty("phase", "Active")] },
        "api.core.v1.PersistentVolumeStatus" | "api.core.v1.PersistentVolumeClaimStatus" => {
            const { &[empty("phase", "Pending")] }
        }
        "api.core.v1.PersistentVolumeClaimSpec" => const { &[unset("volumeMode", "Filesystem")] },
        "api.core.v1.EndpointPort" => const { &[empty("protocol", "TCP")] },
        "api.apps.v1.DeploymentSpec" => {
            const { &[unset("replicas", "1"), unset("revisionHistoryLimit", "10"), unset("progressDeadlineSeconds", "600")] }
        }
        "api.apps.v1.DaemonSetSpec" => const { &[unset("revisionHistoryLimit", "10")] },
        "api.apps.v1.StatefulSetSpec" => {
            const {
                &[
                    unset("replicas", "1"),
                    unset("revisionHistoryLimit", "10"),
                    empty("podManagementPolicy", "OrderedReady"),
                ]
            }
        }
        "api.apps.v1.ReplicaSetSpec" => const { &[unset("replicas", "1")] },
        "api.batch.v1.CronJobSpec" => {
            const {
                &[
                    empty("concurrencyPolicy", "Allow"),
                    unset("suspend", "false"),
                    unset("successfulJobsHistoryLimit", "3"),
                    unset("failedJobsHistoryLimit", "1"),
                ]
            }
        }
        "api.autoscaling.v1.HorizontalPodAutoscalerSpec" => {
            const { &[unset("minReplicas", "1"), unset("targetCPUUtilizationPercentage", "80")] }
        }
        "api.autoscaling.v2.HorizontalPodAutoscalerSpec" => {
            const { &[unset("minReplicas", "1"), empty("metrics", HPA_METRICS)] }
        }
        "api.admissionregistration.v1.ValidatingWebhook" => WEBHOOK,
        "api.admissionregistration.v1.MutatingWebhook" => MUTATING_WEBHOOK,
        "api.admissionregistration.v1.ValidatingAdmissionPolicySpec"
        | "api.admissionregistration.v1.MutatingAdmissionPolicySpec" => const { &[unset("failurePolicy", "Fail")] },
        "api.admissionregistration.v1.MatchResources" => MATCH_RESOURCES,
        "api.discovery.v1.EndpointPort" => const { &[unset("name", "\"\""), unset("protocol", "TCP")] },
        "api.flowcontrol.v1.FlowSchemaSpec" => const { &[empty("matchingPrecedence", "1000")] },
        "api.flowcontrol.v1.ExemptPriorityLevelConfiguration" => {
            const { &[unset("nominalConcurrencyShares", "0"), unset("lendablePercent", "0")] }
        }
        "api.flowcontrol.v1.LimitedPriorityLevelConfiguration" => {
            const { &[unset("nominalConcurrencyShares", "30"), unset("lendablePercent", "0")] }
        }
        "api.flowcontrol.v1.QueuingConfiguration" => {
            const { &[empty("handSize", "8"), empty("queues", "64"), empty("queueLengthLimit", "50")] }
        }
        "api.networking.v1.NetworkPolicyPort" => const { &[unset("protocol", "TCP")] },
        "api.networking.v1.IngressClassSpec" => const { &[unset("parameters.scope", "Cluster")] },
        "api.rbac.v1.RoleRef" => const { &[empty("apiGroup", "rbac.authorization.k8s.io")] },
        "api.scheduling.v1.PriorityClass" => const { &[unset("preemptionPolicy", "PreemptLowerPriority")] },
        "api.storage.v1.StorageClass" => {
            const { &[unset("reclaimPolicy", "Delete"), unset("volumeBindingMode", "Immediate")] }
        }
        "api.storage.v1.CSIDriverSpec" => CSI_DRIVER,
        "api.authentication.v1.TokenRequestSpec" => const { &[unset("expirationSeconds", "3600")] },
        "apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinitionSpec" => {
            const { &[unset("conversion.webhook.clientConfig.service.port", "443")] }
        }
        "kube-aggregator.pkg.apis.apiregistration.v1.APIServiceSpec" => const { &[unset("service.port", "443")] },
        _ => &[],
    }
}
