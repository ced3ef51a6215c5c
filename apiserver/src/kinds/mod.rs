//! One file per kind (or family of kinds): its [`Strategy`].

use std::{collections::HashMap, sync::LazyLock};

use isopod_api::gvk::Gvr;
use serde_json::Value;

use crate::registry::strategy::{Generic, Strategy};

mod config;
mod cron;
mod cronjob;
mod daemonset;
mod deployment;
#[cfg(test)]
pub(crate) mod fake;
mod job;
mod job_validation;
mod namespace;
mod pod;
pub(crate) mod pod_defaults;
pub(crate) mod pod_qos;
mod pod_table;
mod podtemplate;
mod replicaset;
mod service;
mod service_validation;
mod statefulset;

/// Group, resource and strategy of every kind that adds something.
static TABLE: &[(&str, &str, &dyn Strategy)] = &[
    ("", "configmaps", &config::ConfigMap),
    ("", "namespaces", &namespace::Namespace),
    ("", "pods", &pod::Pod),
    ("", "podtemplates", &podtemplate::PodTemplate),
    ("", "replicationcontrollers", &replicaset::ReplicationController),
    ("", "secrets", &config::Secret),
    ("", "serviceaccounts", &config::ServiceAccount),
    ("", "services", &service::Service),
    ("apps", "controllerrevisions", &podtemplate::ControllerRevision),
    ("apps", "daemonsets", &daemonset::DaemonSet),
    ("apps", "deployments", &deployment::Deployment),
    ("apps", "replicasets", &replicaset::ReplicaSet),
    ("apps", "statefulsets", &statefulset::StatefulSet),
    ("batch", "cronjobs", &cronjob::CronJob),
    ("batch", "jobs", &job::Job),
];

static INDEX: LazyLock<HashMap<(&'static str, &'static str), &'static dyn Strategy>> =
    LazyLock::new(|| TABLE.iter().map(|(group, resource, strategy)| ((*group, *resource), *strategy)).collect());

/// The strategy of a resource; the generic one for custom resources and kinds that add nothing.
pub fn strategy_for(gvr: &Gvr) -> &'static dyn Strategy {
    INDEX.get(&(gvr.group.as_str(), gvr.resource.as_str())).copied().unwrap_or(&Generic)
}

/// Defaults of the pod spec at a JSON pointer.
fn template_defaults(obj: &mut Value, pointer: &str) {
    if let Some(spec) = obj.pointer_mut(pointer) {
        pod_defaults::template(spec);
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
