//! Object metadata: names by kind, labels, annotations, owners, finalizers, immutability.

use isopod_api::{
    field::{ErrorList, Path},
    gvk::Gvr,
    names, resources,
};
use serde_json::{Value, json};

use super::{At, Errs, IMMUTABLE, same};

const MAX_ANNOTATIONS: usize = 256 * 1024;

/// The group and version of an `apiVersion`.
pub(crate) fn group_version(text: &str) -> Result<(&str, &str), String> {
    match text.split_once('/') {
        Some((_, version)) if version.contains('/') => Err(format!("unexpected GroupVersion string: {text}")),
        Some(pair) => Ok(pair),
        None => Ok(("", text)),
    }
}

/// Which rule a kind's names follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NameRule {
    Subdomain,
    Label,
    PathSegment,
    IpAddress,
    None,
}

/// The rule for a resource.
pub(crate) fn name_rule(gvr: &Gvr) -> NameRule {
    match (gvr.group.as_str(), gvr.resource.as_str()) {
        ("", "services" | "namespaces") | ("apps", "statefulsets") => NameRule::Label,
        ("rbac.authorization.k8s.io", _) => NameRule::PathSegment,
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
        NameRule::Subdomain => names::dns1123_subdomain(name),
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
    standard_finalizers(e, gvr, &meta.get("finalizers"));
}

/// Metadata of a resource inside another, which may do without a name.
pub(crate) fn embedded(e: &mut Errs, meta: &At<'_>) {
    for at in [meta.get("generateName"), meta.get("name")].iter().filter(|at| !at.s().is_empty()) {
        e.messages(at, names::path_segment(at.s()));
    }
    let namespace = meta.get("namespace");
    if !namespace.s().is_empty() {
        e.messages(&namespace, names::dns1123_label(namespace.s()));
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

/// How a kind's own code checks the metadata of an update, after the generic code has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// As an update.
    Update,
    /// As if the object were new.
    New,
}

/// What upstream's strategies call, in order: each error comes once for the generic code and once for each of these.
fn rounds(gvr: &Gvr, subresource: &str) -> &'static [Round] {
    use Round::{New, Update};
    match (gvr.group.as_str(), gvr.resource.as_str()) {
        _ if !subresource.is_empty() && subresource != "ephemeralcontainers" && subresource != "resize" => &[Update],
        ("", "configmaps" | "secrets" | "serviceaccounts" | "pods" | "services" | "endpoints") => &[Update, New],
        ("", "nodes" | "namespaces" | "replicationcontrollers") => &[New, Update],
        ("apps", "daemonsets") | ("batch", "jobs") | ("storage.k8s.io", "storageclasses") => &[New, Update],
        ("", "persistentvolumes") => &[New, New],
        ("", "persistentvolumeclaims") => &[New, Update, New],
        ("", "limitranges") | ("policy", "poddisruptionbudgets") => &[New],
        ("networking.k8s.io", "networkpolicies") => &[New, Update],
        ("networking.k8s.io", "ingresses" | "ingressclasses") => &[Update, New],
        ("rbac.authorization.k8s.io", _) => &[New, New, Update],
        _ => &[Update],
    }
}

/// Errors in the metadata of an update.
pub fn update(gvr: &Gvr, namespaced: bool, subresource: &str, new: &Value, old: &Value) -> ErrorList {
    let mut e = Errs::new();
    changed(&mut e, new, old);
    if e.is_empty() && standard(&At::field(new, "metadata").get("finalizers")) {
        return e.0;
    }
    for round in rounds(gvr, subresource) {
        match round {
            Round::Update => {
                changed(&mut e, new, old);
                standard_finalizers(&mut e, gvr, &At::field(new, "metadata").get("finalizers"));
            }
            Round::New => e.0.extend(create(gvr, namespaced, new)),
        }
    }
    e.0
}

fn changed(e: &mut Errs, new: &Value, old: &Value) {
    let meta = At::field(new, "metadata");
    let old = At::field(old, "metadata");
    if old.get("deletionTimestamp").is_set() {
        no_new_finalizers(e, &meta.get("finalizers"), &old.get("finalizers").strings());
    }
    let generation = meta.get("generation");
    if generation.int0() < old.get("generation").int0() {
        e.invalid_as(&generation, generation.int0(), "must not be decremented");
    }
    for field in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let at = meta.get(field);
        if !same(at.v, old.get(field).v) {
            e.invalid(&at, IMMUTABLE);
        }
    }
    labels(e, &meta.get("labels"));
    annotations(e, &meta.get("annotations"));
    owner_references(e, &meta.get("ownerReferences"));
    managed_fields(e, &meta.get("managedFields"));
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
        for message in names::qualified_name(item.s()) {
            e.invalid_as(at, item.s(), &message);
        }
        foreground |= item.s() == "foregroundDeletion";
        orphan |= item.s() == "orphan";
    }
    if foreground && orphan {
        e.invalid(at, "finalizer orphan and foregroundDeletion cannot be both set");
    }
}

/// Whether finalizers without a domain are those that every kind may have.
fn standard(list: &At<'_>) -> bool {
    list.strings().iter().all(|name| name.contains('/') || FINALIZERS.contains(name))
}

const FINALIZERS: [&str; 3] = ["kubernetes", "orphan", "foregroundDeletion"];

fn standard_finalizer(e: &mut Errs, at: &At<'_>) {
    if !at.s().contains('/') && !FINALIZERS.contains(&at.s()) {
        e.invalid_str(at, "name is neither a standard finalizer name nor is it fully qualified");
    }
}

/// Checked for the kinds of the core project, not for custom resources and what defines them.
fn standard_finalizers(e: &mut Errs, gvr: &Gvr, list: &At<'_>) {
    let of_core = || {
        let extension = ["apiextensions.k8s.io", "apiregistration.k8s.io"].contains(&gvr.group.as_str());
        !extension && resources::all().iter().any(|r| r.group == gvr.group && r.plural == gvr.resource)
    };
    for item in list.items().iter().filter(|_| !standard(list) && of_core()) {
        standard_finalizer(e, item);
    }
}

/// Finalizers of a namespace's spec.
pub(crate) fn finalizer_name(e: &mut Errs, at: &At<'_>) {
    e.messages(at, names::qualified_name(at.s()));
    standard_finalizer(e, at);
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
            ("apps", "statefulsets", "a.b", false),
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
    fn updates_report_more_than_once() {
        let old = json!({"metadata": {"name": "a", "namespace": "n", "uid": "1"}});
        let mut new = old.clone();
        new["metadata"]["uid"] = json!("2");
        new["metadata"]["labels"] = json!({"a": "b c"});
        for (group, resource, uids, labels) in
            [("", "pods", 2, 3), ("apps", "deployments", 2, 2), ("", "persistentvolumeclaims", 2, 4)]
        {
            let errors = update(&gvr(group, resource), true, "", &new, &old);
            let count = |field: &str| errors.iter().filter(|error| error.field == field).count();
            assert_eq!((count("metadata.uid"), count("metadata.labels")), (uids, labels), "{resource}");
        }
    }
}
