//! Object metadata: names by kind, labels, annotations, owners, finalizers, immutability.

use isopod_api::{
    field::{ErrorList, Path},
    gvk::Gvr,
    names,
};
use serde_json::{Value, json};

use super::{At, Errs, IMMUTABLE, same};

const MAX_ANNOTATIONS: usize = 256 * 1024;

/// Which rule a kind's names follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameRule {
    Subdomain,
    Label,
    PathSegment,
    /// StatefulSets: a subdomain whose pods' label values fit.
    StatefulSet,
    /// Jobs and CronJobs (length limits are the kinds' own).
    IpAddress,
    None,
}

/// The rule for a resource.
pub(crate) fn name_rule(gvr: &Gvr) -> NameRule {
    match (gvr.group.as_str(), gvr.resource.as_str()) {
        ("", "services" | "namespaces") => NameRule::Label,
        ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
        ("apps", "statefulsets") => NameRule::StatefulSet,
        ("networking.k8s.io", "ipaddresses") => NameRule::IpAddress,
        ("apiregistration.k8s.io", _)
        | ("policy", "poddisruptionbudgets")
        | ("certificates.k8s.io", "certificatesigningrequests") => NameRule::PathSegment,
        ("authentication.k8s.io" | "authorization.k8s.io", _) => NameRule::None,
        _ => NameRule::Subdomain,
    }
}

/// Messages for a name under `gvr`; `prefix` relaxes the end, for generateName.
pub(crate) fn name_messages(gvr: &Gvr, name: &str, prefix: bool) -> Vec<String> {
    let masked =
        if prefix && name.ends_with('-') { format!("{}a", name.trim_end_matches('-')) } else { name.to_owned() };
    let name = masked.as_str();
    match name_rule(gvr) {
        NameRule::Subdomain | NameRule::StatefulSet => names::dns1123_subdomain(name),
        NameRule::Label => {
            if name.contains('.') {
                return vec!["must not contain dots".to_owned()];
            }
            names::dns1123_label(name)
        }
        NameRule::PathSegment => names::path_segment(name),
        NameRule::IpAddress => super::net::canonical_ip_messages(name),
        NameRule::None => Vec::new(),
    }
}

/// Errors in the metadata of a new object. `namespaced` tells whether the resource is.
pub fn create(gvr: &Gvr, namespaced: bool, obj: &Value) -> ErrorList {
    let mut e = Errs::new();
    let meta = At::field(obj, "metadata");
    object_meta(&mut e, gvr, namespaced, &meta);
    e.0
}

fn object_meta(e: &mut Errs, gvr: &Gvr, namespaced: bool, meta: &At<'_>) {
    let generate = meta.get("generateName");
    if !generate.s().is_empty() {
        e.messages(&generate, name_messages(gvr, generate.s(), true));
    }
    let name = meta.get("name");
    if name.s().is_empty() {
        e.required(&name, "name or generateName is required");
    } else {
        e.messages(&name, name_messages(gvr, name.s(), false));
        if name_rule(gvr) == NameRule::StatefulSet
            && name.s().len() > 63
            && names::dns1123_subdomain(name.s()).is_empty()
        {
            e.invalid(&name, "must be no more than 63 characters");
        }
    }
    let namespace = meta.get("namespace");
    if namespaced {
        if namespace.s().is_empty() {
            e.required(&namespace, "");
        } else {
            e.messages(&namespace, names::dns1123_label(namespace.s()));
        }
    } else if !namespace.s().is_empty() {
        e.forbidden(&namespace, "not allowed on this type");
    }
    accessors(e, meta);
}

fn accessors(e: &mut Errs, meta: &At<'_>) {
    e.non_negative(&meta.get("generation"));
    labels(e, &meta.get("labels"));
    annotations(e, &meta.get("annotations"));
    owner_references(e, &meta.get("ownerReferences"));
    finalizers(e, &meta.get("finalizers"));
    managed_fields(e, &meta.get("managedFields"));
}

/// Errors in the metadata of an update. Upstream's generic code and each kind both check, so each error comes twice.
pub fn update(_gvr: &Gvr, new: &Value, old: &Value) -> ErrorList {
    let mut e = Errs::new();
    let meta = At::field(new, "metadata");
    let old = At::field(old, "metadata");
    for field in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let at = meta.get(field);
        if !same(at.v, old.get(field).v) {
            e.invalid(&at, IMMUTABLE);
        }
    }
    let generation = meta.get("generation");
    if generation.int0() < old.get("generation").int0() {
        e.invalid_as(&generation, generation.int0(), "must not be decremented");
    }
    if old.get("deletionTimestamp").is_set() {
        no_new_finalizers(&mut e, &meta.get("finalizers"), &old.get("finalizers").strings());
    }
    labels(&mut e, &meta.get("labels"));
    annotations(&mut e, &meta.get("annotations"));
    owner_references(&mut e, &meta.get("ownerReferences"));
    managed_fields(&mut e, &meta.get("managedFields"));
    let once = e.0.clone();
    e.0.extend(once);
    e.0
}

fn no_new_finalizers(e: &mut Errs, at: &At<'_>, old: &[&str]) {
    let extra: Vec<&str> = at.strings().into_iter().filter(|f| !old.contains(f)).collect();
    if !extra.is_empty() {
        let shown = format!(
            "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
            extra.iter().map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ")
        );
        e.forbidden(at, &shown);
    }
}

/// Labels: qualified keys, label values; reported at the map itself.
pub(crate) fn labels(e: &mut Errs, at: &At<'_>) {
    for (key, value) in at.entries() {
        label_key(e, at, key);
        for message in names::label_value(value.s()) {
            e.invalid_as(at, value.s(), &message);
        }
    }
}

/// A label key, reported at `at`.
pub(crate) fn label_key(e: &mut Errs, at: &At<'_>, key: &str) {
    for message in names::qualified_name(key) {
        e.invalid_as(at, key, &message);
    }
}

/// Annotations: qualified keys (case ignored) and total size.
pub(crate) fn annotations(e: &mut Errs, at: &At<'_>) {
    let mut total = 0;
    for (key, value) in at.entries() {
        for message in names::qualified_name(&key.to_lowercase()) {
            e.invalid_as(at, key, &message);
        }
        total += key.len() + value.s().len();
    }
    if total > MAX_ANNOTATIONS {
        e.too_long(at, MAX_ANNOTATIONS);
    }
}

fn owner_references(e: &mut Errs, at: &At<'_>) {
    let mut controller: Option<At<'_>> = None;
    for owner in at.items() {
        let item = At::new(at.path.clone(), owner.v);
        let api_version = item.get("apiVersion");
        let (group, version) = api_version.s().rsplit_once('/').unwrap_or(("", api_version.s()));
        if version.is_empty() {
            e.invalid_str(&item.get("apiVersion"), "version must not be empty");
        }
        for field in ["kind", "name", "uid"] {
            let field = item.get(field);
            if field.s().is_empty() {
                e.invalid_str(&field, "must not be empty");
            }
        }
        if group.is_empty() && version == "v1" && item.get("kind").s() == "Event" {
            e.invalid(&item, "/v1, Kind=Event is disallowed from being an owner");
        }
        if !item.get("controller").is_true() {
            continue;
        }
        match &controller {
            Some(first) => {
                let shown = |at: &At<'_>| format!("{}/{}", at.get("kind").s(), at.get("name").s());
                let detail = format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {} and {}",
                    shown(first),
                    shown(&item)
                );
                e.invalid(at, &detail);
            }
            None => controller = Some(item),
        }
    }
}

fn finalizers(e: &mut Errs, at: &At<'_>) {
    let mut foreground = false;
    let mut orphan = false;
    for item in at.items() {
        let messages = names::qualified_name(item.s());
        let broken = !messages.is_empty();
        for message in messages {
            e.invalid_as(at, item.s(), &message);
        }
        if !broken && !item.s().contains('/') && !["kubernetes", "orphan", "foregroundDeletion"].contains(&item.s()) {
            e.invalid(&item, "name is neither a standard finalizer name nor is it fully qualified");
        }
        foreground |= item.s() == "foregroundDeletion";
        orphan |= item.s() == "orphan";
    }
    if foreground && orphan {
        e.invalid(at, "finalizer orphan and foregroundDeletion cannot be both set");
    }
}

/// Finalizers of a namespace's spec.
pub(crate) fn finalizer_name(e: &mut Errs, at: &At<'_>) {
    let messages = names::qualified_name(at.s());
    if messages.is_empty() && !at.s().contains('/') && !["kubernetes", "orphan", "foregroundDeletion"].contains(&at.s())
    {
        e.invalid(at, "name is neither a standard finalizer name nor is it fully qualified");
    }
    e.messages(at, messages);
}

fn managed_fields(e: &mut Errs, at: &At<'_>) {
    for item in at.items() {
        let operation = item.get("operation");
        if !["Apply", "Update"].contains(&operation.s()) {
            e.invalid_str(&operation, "must be `Apply` or `Update`");
        }
        let fields_type = item.get("fieldsType");
        if !fields_type.s().is_empty() && fields_type.s() != "FieldsV1" {
            e.invalid_str(&fields_type, "must be `FieldsV1`");
        }
        if item.get("manager").s().len() > 128 {
            e.too_long(&item.get("manager"), 128);
        }
    }
}

/// Labels and annotations of a pod template's metadata.
pub(crate) fn template_meta(e: &mut Errs, template: &At<'_>) {
    // Upstream reports these without the `metadata` element.
    let metadata = template.v.get("metadata").cloned().unwrap_or_else(|| json!({}));
    let rebased = At::new(Path::clone(&template.path), &metadata);
    labels(e, &rebased.get("labels"));
    annotations(e, &rebased.get("annotations"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gvr(group: &str, resource: &str) -> Gvr {
        Gvr { group: group.into(), version: "v1".into(), resource: resource.into() }
    }

    fn fields(list: &ErrorList) -> Vec<String> {
        list.iter().map(|error| error.to_string()).collect()
    }

    #[test]
    fn names_by_kind() {
        for (group, resource, name, ok) in [
            ("", "configmaps", "a.b", true),
            ("", "services", "a.b", false),
            ("", "services", "1a", true),
            ("rbac.authorization.k8s.io", "roles", "system:x", true),
            ("rbac.authorization.k8s.io", "roles", "a/b", false),
            ("apps", "deployments", "UPPER", false),
        ] {
            assert_eq!(name_messages(&gvr(group, resource), name, false).is_empty(), ok, "{resource} {name}");
        }
        assert!(name_messages(&gvr("", "pods"), "web-", true).is_empty());
    }

    #[test]
    fn owners_and_finalizers() {
        let obj = json!({"metadata": {"name": "a", "namespace": "n", "finalizers": ["nodomain"],
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "", "uid": "1"}]}});
        let errors = fields(&create(&gvr("", "configmaps"), true, &obj));
        assert_eq!(
            errors,
            [
                "metadata.ownerReferences.name: Invalid value: \"\": must not be empty",
                "metadata.finalizers[0]: Invalid value: \"nodomain\": name is neither a standard finalizer name nor is it fully qualified",
            ]
        );
    }

    #[test]
    fn updates_report_twice() {
        let old = json!({"metadata": {"name": "a", "uid": "1"}});
        let new = json!({"metadata": {"name": "a", "uid": "2"}});
        assert_eq!(update(&gvr("", "pods"), &new, &old).len(), 2);
    }
}
