//! One file per kind (or family of kinds): its [`Strategy`].

use std::{collections::HashMap, sync::LazyLock};

use isopod_api::gvk::Gvr;
use serde_json::Value;

use crate::registry::strategy::{Generic, Strategy};

mod admission_policies;
mod autoscaling;
mod certificates;
mod cluster;
pub(crate) mod components;
mod config;
mod crd_cost;
mod crd_internal;
mod crd_schema;
mod crd_structural;
mod crd_versions;
mod cron;
mod cronjob;
mod daemonset;
mod deployment;
mod dra;
mod dra_claims;
mod dra_slices;
mod endpoints;
mod event;
mod expressions;
mod extension;
mod flowcontrol;
mod ingress;
mod job;
mod job_indexes;
mod job_validation;
#[cfg(test)]
mod manifests;
mod namespace;
mod networking;
mod node;
mod persistentvolume;
mod persistentvolumeclaim;
mod pod;
pub(crate) mod pod_defaults;
pub(crate) mod pod_qos;
mod pod_table;
mod podtemplate;
mod policy;
mod quota;
mod rbac;
mod replicaset;
mod service;
mod service_validation;
mod statefulset;
mod storage;
mod webhooks;

/// Group, resource and strategy of every kind that adds something.
static TABLE: &[(&str, &str, &dyn Strategy)] = &[
    ("", "componentstatuses", &components::ComponentStatus),
    ("", "configmaps", &config::ConfigMap),
    ("", "endpoints", &endpoints::Endpoints),
    ("", "events", &event::Event),
    ("", "limitranges", &quota::LimitRange),
    ("", "namespaces", &namespace::Namespace),
    ("", "nodes", &node::Node),
    ("", "persistentvolumeclaims", &persistentvolumeclaim::PersistentVolumeClaim),
    ("", "persistentvolumes", &persistentvolume::PersistentVolume),
    ("", "pods", &pod::Pod),
    ("", "podtemplates", &podtemplate::PodTemplate),
    ("", "replicationcontrollers", &replicaset::ReplicationController),
    ("", "resourcequotas", &quota::ResourceQuota),
    ("", "secrets", &config::Secret),
    ("", "serviceaccounts", &config::ServiceAccount),
    ("", "services", &service::Service),
    (
        "admissionregistration.k8s.io",
        "mutatingadmissionpolicies",
        &admission_policies::AdmissionPolicy { mutating: true },
    ),
    (
        "admissionregistration.k8s.io",
        "mutatingadmissionpolicybindings",
        &admission_policies::AdmissionPolicyBinding { mutating: true },
    ),
    (
        "admissionregistration.k8s.io",
        "mutatingwebhookconfigurations",
        &webhooks::WebhookConfiguration { mutating: true },
    ),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicies",
        &admission_policies::AdmissionPolicy { mutating: false },
    ),
    (
        "admissionregistration.k8s.io",
        "validatingadmissionpolicybindings",
        &admission_policies::AdmissionPolicyBinding { mutating: false },
    ),
    (
        "admissionregistration.k8s.io",
        "validatingwebhookconfigurations",
        &webhooks::WebhookConfiguration { mutating: false },
    ),
    ("apiextensions.k8s.io", "customresourcedefinitions", &extension::CustomResourceDefinition),
    ("apiregistration.k8s.io", "apiservices", &extension::ApiService),
    ("apps", "controllerrevisions", &podtemplate::ControllerRevision),
    ("apps", "daemonsets", &daemonset::DaemonSet),
    ("apps", "deployments", &deployment::Deployment),
    ("apps", "replicasets", &replicaset::ReplicaSet),
    ("apps", "statefulsets", &statefulset::StatefulSet),
    ("autoscaling", "horizontalpodautoscalers", &autoscaling::HorizontalPodAutoscaler),
    ("batch", "cronjobs", &cronjob::CronJob),
    ("batch", "jobs", &job::Job),
    ("certificates.k8s.io", "certificatesigningrequests", &certificates::CertificateSigningRequest),
    ("coordination.k8s.io", "leases", &cluster::Lease),
    ("discovery.k8s.io", "endpointslices", &endpoints::EndpointSlice),
    ("events.k8s.io", "events", &event::Event),
    ("flowcontrol.apiserver.k8s.io", "flowschemas", &flowcontrol::FlowSchema),
    ("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations", &flowcontrol::PriorityLevel),
    ("networking.k8s.io", "ingressclasses", &networking::IngressClass),
    ("networking.k8s.io", "ingresses", &ingress::Ingress),
    ("networking.k8s.io", "ipaddresses", &networking::IpAddress),
    ("networking.k8s.io", "networkpolicies", &networking::NetworkPolicy),
    ("networking.k8s.io", "servicecidrs", &networking::ServiceCidr),
    ("node.k8s.io", "runtimeclasses", &cluster::RuntimeClass),
    ("policy", "poddisruptionbudgets", &policy::PodDisruptionBudget),
    ("rbac.authorization.k8s.io", "clusterrolebindings", &rbac::RoleBinding { cluster: true }),
    ("rbac.authorization.k8s.io", "clusterroles", &rbac::Role { cluster: true }),
    ("rbac.authorization.k8s.io", "rolebindings", &rbac::RoleBinding { cluster: false }),
    ("rbac.authorization.k8s.io", "roles", &rbac::Role { cluster: false }),
    ("resource.k8s.io", "deviceclasses", &dra::DeviceClass),
    ("resource.k8s.io", "resourceclaims", &dra::ResourceClaim),
    ("resource.k8s.io", "resourceclaimtemplates", &dra::ResourceClaimTemplate),
    ("resource.k8s.io", "resourceslices", &dra::ResourceSlice),
    ("scheduling.k8s.io", "priorityclasses", &cluster::PriorityClass),
    ("storage.k8s.io", "csidrivers", &storage::CsiDriver),
    ("storage.k8s.io", "csinodes", &storage::CsiNode),
    ("storage.k8s.io", "csistoragecapacities", &storage::CsiStorageCapacity),
    ("storage.k8s.io", "storageclasses", &storage::StorageClass),
    ("storage.k8s.io", "volumeattachments", &storage::VolumeAttachment),
    ("storage.k8s.io", "volumeattributesclasses", &storage::VolumeAttributesClass),
];

static INDEX: LazyLock<HashMap<(&'static str, &'static str), &'static dyn Strategy>> =
    LazyLock::new(|| TABLE.iter().map(|(group, resource, strategy)| ((*group, *resource), *strategy)).collect());

/// The strategy of a resource; the generic one for custom resources and kinds that add nothing.
pub fn strategy_for(gvr: &Gvr) -> &'static dyn Strategy {
    INDEX.get(&(gvr.group.as_str(), gvr.resource.as_str())).copied().unwrap_or(&Generic)
}

/// The warning that goes with every answer about a deprecated resource.
pub fn deprecation(gvr: &Gvr) -> Option<String> {
    match (gvr.group.as_str(), gvr.resource.as_str()) {
        ("", "endpoints") => {
            Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".to_owned())
        }
        ("", "componentstatuses") => Some("v1 ComponentStatus is deprecated in v1.19+".to_owned()),
        _ => None,
    }
}

/// Defaults of the pod spec at a JSON pointer.
fn template_defaults(obj: &mut Value, pointer: &str) {
    if let Some(spec) = obj.pointer_mut(pointer) {
        pod_defaults::features_off(spec);
    }
    clean(
        obj,
        &["/spec", "/spec/template", "/spec/template/metadata", "/spec/jobTemplate", "/spec/jobTemplate/spec", ""],
    );
}

/// Removes null members at JSON pointers (indexing leaves them behind).
fn clean(obj: &mut Value, pointers: &[&str]) {
    for pointer in pointers {
        if let Some(v) = obj.pointer_mut(pointer) {
            pod_defaults::drop_nulls(v);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::registry::table;

    /// Selectable fields besides name and namespace, as upstream's server has them.
    const SELECTABLE: &[(&str, &str)] = &[
        (
            "events",
            "involvedObject.apiVersion involvedObject.fieldPath involvedObject.kind involvedObject.name \
             involvedObject.namespace involvedObject.resourceVersion involvedObject.uid reason reportingComponent source type",
        ),
        ("namespaces", "status.phase"),
        ("nodes", "spec.unschedulable"),
        (
            "pods",
            "spec.hostNetwork spec.nodeName spec.restartPolicy spec.schedulerName spec.serviceAccountName \
             status.nominatedNodeName status.phase status.podIP status.podIPs",
        ),
        ("replicationcontrollers", "status.replicas"),
        ("secrets", "type"),
        ("services", "spec.clusterIP spec.type"),
        ("jobs", "status.successful"),
        ("certificatesigningrequests", "spec.signerName"),
        ("resourceslices", "spec.driver spec.nodeName"),
    ];

    /// Every resource with columns, once bare and once with what arrays and maps a cell may look into.
    #[test]
    fn a_cell_for_every_column() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let objects = [json!({}), json!({"metadata": {"name": "a"}, "spec": {}, "status": {}})];
        let mut seen = 0;
        for key in table::known() {
            let parts: Vec<&str> = key.split('/').collect();
            let gvr = match parts[..] {
                [version, resource] => Gvr { group: String::new(), version: version.into(), resource: resource.into() },
                [group, version, resource] => {
                    Gvr { group: group.into(), version: version.into(), resource: resource.into() }
                }
                _ => panic!("{key}"),
            };
            if gvr.resource == "componentstatuses" {
                continue;
            }
            for obj in &objects {
                let cells = strategy_for(&gvr).cells(obj, now);
                let more = usize::from(gvr.resource == "ipaddresses");
                assert_eq!(cells.len(), table::columns(&gvr).len() + more, "{key}");
            }
            assert!(INDEX.contains_key(&(gvr.group.as_str(), gvr.resource.as_str())), "{key} has no strategy");
            seen += 1;
        }
        assert!(seen > 55, "{seen} resources");
    }

    #[test]
    fn fields_that_can_be_selected_by() {
        for (group, resource, strategy) in TABLE {
            let wanted = SELECTABLE.iter().find(|(r, _)| r == resource).map_or("", |(_, fields)| *fields);
            let mut names = strategy.field_names().to_vec();
            let mut values: Vec<&str> = strategy.fields(&json!({})).iter().map(|(name, _)| *name).collect();
            names.sort_unstable();
            values.sort_unstable();
            assert_eq!(names.join(" "), wanted, "{group} {resource}");
            assert_eq!(values, names, "{group} {resource}");
        }
    }
}
