//! Metadata rules of writes: what the system fills in, what clients may not change, when the generation goes up.

use isopod_api::{meta, status::Status};
use serde_json::Value;

use super::{Resource, Writer};

const SUFFIX: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LEN: usize = 5;
const NAME_MAX: usize = 63;

/// Kinds whose objects have a generation.
const GENERATIONS: [(&str, &[&str]); 13] = [
    ("", &["pods", "replicationcontrollers", "podtemplates"]),
    ("apps", &["deployments", "replicasets", "daemonsets", "statefulsets"]),
    ("batch", &["jobs", "cronjobs"]),
    ("networking.k8s.io", &["ingresses", "networkpolicies", "ingressclasses"]),
    ("policy", &["poddisruptionbudgets"]),
    ("apiextensions.k8s.io", &["customresourcedefinitions"]),
    (
        "admissionregistration.k8s.io",
        &[
            "validatingwebhookconfigurations",
            "mutatingwebhookconfigurations",
            "validatingadmissionpolicies",
            "validatingadmissionpolicybindings",
            "mutatingadmissionpolicies",
            "mutatingadmissionpolicybindings",
        ],
    ),
    ("flowcontrol.apiserver.k8s.io", &["flowschemas", "prioritylevelconfigurations"]),
    ("discovery.k8s.io", &["endpointslices"]),
    ("scheduling.k8s.io", &["priorityclasses"]),
    ("resource.k8s.io", &["deviceclasses", "resourceslices"]),
    ("storage.k8s.io", &[]),
    ("autoscaling", &[]),
];

/// Whether objects of a resource have a generation.
pub(super) fn has_generation(resource: &Resource) -> bool {
    let gr = resource.group_resource();
    resource.custom.is_some()
        || GENERATIONS.iter().any(|(group, plurals)| *group == gr.group && plurals.contains(&gr.resource.as_str()))
}

/// Puts the request's namespace into an object, or refuses another one.
pub(super) fn place(resource: &Resource, namespace: &str, obj: &mut Value) -> Result<(), Status> {
    if !resource.info.namespaced {
        meta::set_namespace(obj, "");
        return Ok(());
    }
    match meta::namespace(obj) {
        "" => meta::set_namespace(obj, namespace),
        found if found == namespace => {}
        _ => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    }
    Ok(())
}

/// Refuses an object that says another name than the URL.
pub(crate) fn check_name(obj: &Value, name: &str) -> Result<(), Status> {
    match meta::name(obj) {
        "" => Err(Status::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        ))),
        found if found == name => Ok(()),
        found => Err(Status::bad_request(format!(
            "the name of the object ({found}) does not match the name on the URL ({name})"
        ))),
    }
}

/// A generated name.
pub(super) fn generate(base: &str) -> String {
    let mut end = base.len().min(NAME_MAX - SUFFIX_LEN);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    let suffix = (0..SUFFIX_LEN).map(|_| SUFFIX[rand::random_range(0..SUFFIX.len())] as char);
    base[..end].chars().chain(suffix).collect()
}

/// The system's fields of a new object. Keeps a given uid only for the server's own writes.
pub(super) fn for_create(resource: &Resource, obj: &mut Value) {
    meta::set_deletion_timestamp(obj, None);
    meta::set(obj, "deletionGracePeriodSeconds", Value::Null);
    meta::set_creation_timestamp(obj, &meta::now());
    meta::set_uid(obj, &uuid::Uuid::new_v4().to_string());
    meta::set_resource_version(obj, "");
    if has_generation(resource) {
        meta::set_generation(obj, 1);
    }
}

/// What an update may not change or may leave out is taken from the stored object.
pub(super) fn for_update(new: &mut Value, old: &Value) {
    meta::set_generation(new, meta::generation(old));
    meta::set_creation_timestamp(new, meta::creation_timestamp(old));
    if meta::uid(new).is_empty() {
        meta::set_uid(new, meta::uid(old));
    }
    if meta::deletion_timestamp(new).is_none() {
        meta::set_deletion_timestamp(new, meta::deletion_timestamp(old));
    }
    if meta::deletion_grace_period(new).is_none()
        && let Some(seconds) = meta::deletion_grace_period(old)
    {
        meta::set(new, "deletionGracePeriodSeconds", Value::from(seconds));
    }
}

/// Raises the generation when anything but metadata and status changed.
pub(super) fn bump_generation(resource: &Resource, new: &mut Value, old: &Value) {
    if !has_generation(resource) {
        return;
    }
    let rest = |obj: &Value| -> Vec<(String, Value)> {
        let members = obj.as_object().into_iter().flatten();
        let mut out: Vec<_> = members
            .filter(|(k, _)| !matches!(k.as_str(), "kind" | "apiVersion" | "metadata"))
            // Without the subresource, status is like everything else in a custom resource.
            .filter(|(k, _)| k.as_str() != "status" || (resource.custom.is_some() && !resource.has_status()))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        out.sort_by(|a, b| a.0.cmp(&b.0));
        out
    };
    let generation = meta::generation(old);
    let changed = rest(new) != rest(old);
    meta::set_generation(new, generation + i64::from(changed));
}

/// Drops repeated owner references with a warning, as upstream does.
pub(super) fn dedup_owners(obj: &mut Value, writer: &mut Writer<'_>) {
    let owners = meta::owner_references(obj);
    let mut kept: Vec<Value> = Vec::with_capacity(owners.len());
    for owner in owners {
        if !kept.contains(owner) {
            kept.push(owner.clone());
        }
    }
    if kept.len() < owners.len() {
        writer.warnings.push(
            ".metadata.ownerReferences contains duplicate entries; API server dedups owner references in 1.20+, and may reject such requests as early as 1.24; please fix your requests; duplicate UID(s) observed"
                .into(),
        );
        meta::set(obj, "ownerReferences", kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names() {
        assert_eq!(generate("a-").len(), 7);
        assert_eq!(generate(&"x".repeat(100)).len(), NAME_MAX);
        assert_ne!(generate("a-"), generate("a-"));
    }
}
