//! Collects the descriptions that `kubectl explain` shows from k8s-openapi's schemas: definition -> "" or field -> text,
//! deflated into `OUT_DIR/descriptions.json.z`.

use std::{collections::BTreeMap, io::Write, path::PathBuf};

use schemars::{SchemaGenerator, generate::SchemaSettings};

/// Descriptions of one definition: its own under "", its fields' under their names.
type Texts = BTreeMap<String, String>;

macro_rules! collect {
    ($generator:expr, $($path:path,)*) => { $( $generator.subschema_for::<$path>(); )* };
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let mut generator = SchemaGenerator::new(SchemaSettings::draft07());
    kinds(&mut generator);
    let mut all: BTreeMap<String, Texts> = BTreeMap::new();
    for (name, schema) in generator.take_definitions(true) {
        let mut texts = Texts::new();
        if let Some(text) = schema.get("description").and_then(|d| d.as_str()) {
            texts.insert(String::new(), text.to_owned());
        }
        for (field, property) in schema.get("properties").and_then(|p| p.as_object()).into_iter().flatten() {
            if let Some(text) = property.get("description").and_then(|d| d.as_str()) {
                texts.insert(field.clone(), text.to_owned());
            }
        }
        all.insert(name, texts);
    }
    assert!(all.len() > 500, "only {} definitions: has the schemas' form changed?", all.len());
    let path = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("descriptions.json.z");
    let file = std::fs::File::create(&path).expect("create the output");
    let mut encoder = flate2::write::ZlibEncoder::new(file, flate2::Compression::best());
    encoder.write_all(&serde_json::to_vec(&all).expect("strings serialize")).expect("write the output");
    encoder.finish().expect("write the output");
}

/// Every kind that is served; what they refer to comes along.
fn kinds(generator: &mut SchemaGenerator) {
    use k8s_openapi::{api, apiextensions_apiserver, kube_aggregator};
    collect!(
        generator,
        api::admissionregistration::v1::MutatingAdmissionPolicy,
        api::admissionregistration::v1::MutatingAdmissionPolicyBinding,
        api::admissionregistration::v1::MutatingWebhookConfiguration,
        api::admissionregistration::v1::ValidatingAdmissionPolicy,
        api::admissionregistration::v1::ValidatingAdmissionPolicyBinding,
        api::admissionregistration::v1::ValidatingWebhookConfiguration,
        api::apps::v1::ControllerRevision,
        api::apps::v1::DaemonSet,
        api::apps::v1::Deployment,
        api::apps::v1::ReplicaSet,
        api::apps::v1::StatefulSet,
        api::authentication::v1::SelfSubjectReview,
        api::authentication::v1::TokenRequest,
        api::authentication::v1::TokenReview,
        api::authorization::v1::LocalSubjectAccessReview,
        api::authorization::v1::SelfSubjectAccessReview,
        api::authorization::v1::SelfSubjectRulesReview,
        api::authorization::v1::SubjectAccessReview,
        api::autoscaling::v1::HorizontalPodAutoscaler,
        api::autoscaling::v1::Scale,
        api::autoscaling::v2::HorizontalPodAutoscaler,
        api::batch::v1::CronJob,
        api::batch::v1::Job,
        api::certificates::v1::CertificateSigningRequest,
        api::coordination::v1::Lease,
        api::core::v1::Binding,
        api::core::v1::ComponentStatus,
        api::core::v1::ConfigMap,
        api::core::v1::Endpoints,
        api::core::v1::Event,
        api::core::v1::LimitRange,
        api::core::v1::Namespace,
        api::core::v1::Node,
        api::core::v1::PersistentVolume,
        api::core::v1::PersistentVolumeClaim,
        api::core::v1::Pod,
        api::core::v1::PodTemplate,
        api::core::v1::ReplicationController,
        api::core::v1::ResourceQuota,
        api::core::v1::Secret,
        api::core::v1::Service,
        api::core::v1::ServiceAccount,
        api::discovery::v1::EndpointSlice,
        api::events::v1::Event,
        api::flowcontrol::v1::FlowSchema,
        api::flowcontrol::v1::PriorityLevelConfiguration,
        api::networking::v1::IPAddress,
        api::networking::v1::Ingress,
        api::networking::v1::IngressClass,
        api::networking::v1::NetworkPolicy,
        api::networking::v1::ServiceCIDR,
        api::node::v1::RuntimeClass,
        api::policy::v1::Eviction,
        api::policy::v1::PodDisruptionBudget,
        api::rbac::v1::ClusterRole,
        api::rbac::v1::ClusterRoleBinding,
        api::rbac::v1::Role,
        api::rbac::v1::RoleBinding,
        api::resource::v1::DeviceClass,
        api::resource::v1::ResourceClaim,
        api::resource::v1::ResourceClaimTemplate,
        api::resource::v1::ResourceSlice,
        api::scheduling::v1::PriorityClass,
        api::storage::v1::CSIDriver,
        api::storage::v1::CSINode,
        api::storage::v1::CSIStorageCapacity,
        api::storage::v1::StorageClass,
        api::storage::v1::VolumeAttachment,
        api::storage::v1::VolumeAttributesClass,
        apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
        kube_aggregator::pkg::apis::apiregistration::v1::APIService,
    );
}
