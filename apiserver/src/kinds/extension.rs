//! CustomResourceDefinitions and APIServices.

use isopod_api::{field::ErrorList, meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, same},
};

/// The annotation that says who approved a group of the project itself.
const APPROVED: &str = "api-approved.kubernetes.io";

/// `customresourcedefinitions`.
pub(crate) struct CustomResourceDefinition;
/// `apiservices`.
pub(crate) struct ApiService;

impl Strategy for CustomResourceDefinition {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        let stored = storage_version(&obj["spec"]);
        obj["status"] = json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored.into_iter().collect::<Vec<_>>()});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if !cx.subresource.is_empty() {
            return;
        }
        new["status"] = old["status"].clone();
        if let Some(storage) = storage_version(&new["spec"])
            && let Some(stored) = new["status"]["storedVersions"].as_array_mut()
            && !stored.contains(&json!(storage))
        {
            stored.push(json!(storage));
        }
    }

    fn prepare_for_delete(&self, obj: &mut Value) {
        let mut finalizers: Vec<String> = meta::finalizers(obj).iter().map(|f| (*f).to_owned()).collect();
        if !finalizers.iter().any(|f| f == crate::custom::controller::FINALIZER) {
            finalizers.push(crate::custom::controller::FINALIZER.to_owned());
            meta::set(obj, "finalizers", json!(finalizers));
        }
        let message = "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon";
        crate::custom::names::set(&mut obj["status"], "Terminating", true, "InstanceDeletionPending", message);
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = &obj["spec"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        if meta::name(obj) != format!("{}.{}", text(&spec["names"]["plural"]), text(&spec["group"])) {
            let at = At::field(obj, "metadata").get("name");
            e.invalid_str(&at, "must be spec.names.plural+\".\"+spec.group");
        }
        definition(&mut e, obj, &Value::Null);
        names_of(&mut e, &At::field(obj, "status").get("acceptedNames"));
        stored_versions(&mut e, obj);
        protected_group(&mut e, obj);
        preserves(&mut e, obj);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        let accepted = At::field(new, "status").get("acceptedNames");
        if cx.subresource == "status" {
            names_of(&mut e, &accepted);
            return e.0;
        }
        definition(&mut e, new, old);
        let spec = At::field(new, "spec");
        let before = &old["spec"];
        if crate::custom::names::holds(old, "Established") {
            e.immutable(&spec.get("scope"), &before["scope"]);
            e.immutable(&spec.get("names.kind"), &before["names"]["kind"]);
        }
        e.immutable(&spec.get("group"), &before["group"]);
        e.immutable(&spec.get("names.plural"), &before["names"]["plural"]);
        names_of(&mut e, &accepted);
        stored_versions(&mut e, new);
        if approval(new) != approval(old) {
            protected_group(&mut e, new);
        }
        if before["preserveUnknownFields"] != true {
            preserves(&mut e, new);
        }
        e.0
    }

    fn warnings(&self, cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        if !cx.subresource.is_empty() {
            return Vec::new();
        }
        let before = old.map(|old| super::crd_versions::unknown_formats(&old["spec"])).unwrap_or_default();
        let now = super::crd_versions::unknown_formats(&obj["spec"]);
        now.iter()
            .filter(|format| !before.contains(format))
            .map(|format| format!("unrecognized format {format:?}"))
            .collect()
    }
}

/// Versions objects may still be stored in must stay.
fn stored_versions(e: &mut Errs, obj: &Value) {
    let stored = At::field(obj, "status").get("storedVersions");
    if stored.len() == 0 {
        return e.invalid_as(&stored, json!([]), "must have at least one stored version");
    }
    let versions = At::field(obj, "spec").get("versions").items();
    for version in versions.iter().filter(|version| version.get("storage").is_true()) {
        let name = version.get("name").s();
        if !stored.strings().contains(&name) {
            e.invalid(&stored, &format!("must have the storage version {name}"));
        }
    }
    for at in stored.items() {
        let name = at.s();
        if !versions.iter().any(|version| version.get("name").s() == name) {
            e.invalid(&at, &format!("missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"));
        }
    }
}

fn storage_version(spec: &Value) -> Option<String> {
    let versions = spec["versions"].as_array()?;
    versions.iter().find(|v| v["storage"] == true).and_then(|v| v["name"].as_str()).map(str::to_owned)
}

/// Everything that does not depend on an older state, but for the cost of rules that were there.
fn definition(e: &mut Errs, obj: &Value, old: &Value) {
    let spec = At::field(obj, "spec");
    let group = spec.get("group");
    if group.s().is_empty() {
        e.required(&group, "");
    } else if names::dns1123_subdomain(group.s()).is_empty() {
        if group.s().split('.').count() < 2 {
            e.invalid(&group, "should be a domain with at least one dot");
        }
    } else {
        e.dns_subdomain(&group);
    }
    e.required_one_of(&spec.get("scope"), &["Cluster", "Namespaced"]);
    super::crd_versions::each(e, &spec, &old["spec"]["versions"]);
    for field in ["plural", "singular", "kind", "listKind"] {
        let name = spec.get("names").get(field);
        if name.s().is_empty() {
            e.required(&name, "");
        }
    }
    names_of(e, &spec.get("names"));
    super::crd_versions::shared(e, &spec, &old["spec"]["versions"]);
    super::crd_versions::conversion(e, &spec);
}

/// Names as far as they are there.
fn names_of(e: &mut Errs, at: &At<'_>) {
    let joined = |messages: Vec<String>| messages.join(",");
    for field in ["plural", "singular"] {
        let name = at.get(field);
        let wrong = names::dns1035_label(name.s());
        if !name.s().is_empty() && !wrong.is_empty() {
            e.invalid(&name, &joined(wrong));
        }
    }
    for field in ["kind", "listKind"] {
        let name = at.get(field);
        let wrong = names::dns1035_label(&name.s().to_lowercase());
        if !name.s().is_empty() && !wrong.is_empty() {
            e.invalid(&name, &format!("may have mixed case, but should otherwise match: {}", joined(wrong)));
        }
    }
    for (i, list) in ["shortNames", "categories"].into_iter().enumerate() {
        for name in at.get(list).items() {
            let wrong = names::dns1035_label(name.s());
            if !wrong.is_empty() {
                e.invalid(&name, &joined(wrong));
            }
        }
        if i == 0 && at.get("kind").s() == at.get("listKind").s() && !at.get("kind").s().is_empty() {
            e.invalid(&at.get("listKind"), "kind and listKind may not be the same");
        }
    }
}

/// New definitions preserve unknown fields by their schemas only.
fn preserves(e: &mut Errs, obj: &Value) {
    let preserve = At::field(obj, "spec").get("preserveUnknownFields");
    if preserve.is_true() {
        let instead =
            "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        e.invalid(&preserve, instead);
    }
}

/// What an annotation says about the approval of a protected group.
fn approval(obj: &Value) -> &str {
    match meta::annotation(obj, APPROVED).unwrap_or_default() {
        "" => "missing",
        value if value.starts_with("unapproved") => "bypassed",
        value if value.starts_with("https://") || value.starts_with("http://") => "approved",
        _ => "invalid",
    }
}

/// Groups of the project itself need an approval.
fn protected_group(e: &mut Errs, obj: &Value) {
    let group = obj["spec"]["group"].as_str().unwrap_or_default();
    if !["k8s.io", "kubernetes.io"].iter().any(|d| group == *d || group.ends_with(&format!(".{d}"))) {
        return;
    }
    let at = At::field(obj, "metadata").get("annotations").key(APPROVED);
    match approval(obj) {
        "missing" => e.required(&at, "protected groups must have approval annotation \"api-approved.kubernetes.io\", see https://github.com/kubernetes/enhancements/pull/1111"),
        "invalid" => e.invalid(&at, "protected groups must have approval annotation \"api-approved.kubernetes.io\" with either a URL or a reason starting with \"unapproved\", see https://github.com/kubernetes/enhancements/pull/1111"),
        _ => {}
    }
}

impl Strategy for ApiService {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
        if obj["spec"].get("service").is_none() {
            obj["status"]["conditions"] = json!([{
                "type": "Available", "status": "True", "lastTransitionTime": meta::now(), "reason": "Local",
                "message": "Local APIServices are always available",
            }]);
        }
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() && !same(&new["status"], &old["status"]) {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        let (group, version, service) = (spec.get("group"), spec.get("version"), spec.get("service"));
        let wanted = format!("{}.{}", version.s(), group.s());
        if meta::name(obj) != wanted {
            let detail = format!("must be `spec.version+\".\"+spec.group`: {wanted:?}");
            e.invalid_str(&At::field(obj, "metadata").get("name"), &detail);
        }
        if group.s().is_empty() && version.s() != "v1" {
            e.required(&group, "only v1 may have an empty group and it better be legacy kube");
        }
        if !group.s().is_empty() {
            e.dns_subdomain(&group);
        }
        e.messages(&version, names::dns1035_label(version.s()));
        for (field, max) in [("groupPriorityMinimum", 20_000), ("versionPriority", 1000)] {
            let at = spec.get(field);
            if at.int0() <= 0 || at.int0() > max {
                e.invalid_as(&at, at.int0(), &format!("must be positive and less than {max}"));
            }
        }
        if !service.is_set() {
            if spec.get("caBundle").is_set() {
                let bytes = spec.get("caBundle").s().trim_end_matches('=').len() * 3 / 4;
                let detail = "local APIServices may not have a caBundle";
                e.invalid_as(&spec.get("caBundle"), format!("{bytes} bytes"), detail);
            }
            if spec.get("insecureSkipTLSVerify").is_true() {
                e.invalid(&spec.get("insecureSkipTLSVerify"), "local APIServices may not have insecureSkipTLSVerify");
            }
            return e.0;
        }
        for field in ["namespace", "name"] {
            if service.get(field).s().is_empty() {
                e.required(&service.get(field), "");
            }
        }
        if spec.get("insecureSkipTLSVerify").is_true() && spec.get("caBundle").is_set() {
            e.invalid(&spec.get("insecureSkipTLSVerify"), "may not be true if caBundle is present");
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let service = match &obj["spec"]["service"] {
            Value::Null => "Local".to_owned(),
            service => format!("{}/{}", text(&service["namespace"]), text(&service["name"])),
        };
        let available = obj["status"]["conditions"].as_array().into_iter().flatten().find(|c| c["type"] == "Available");
        let available = match available {
            Some(c) if c["status"] == "True" => "True".to_owned(),
            Some(c) => format!("{} ({})", text(&c["status"]), text(&c["reason"])),
            None => "Unknown".to_owned(),
        };
        vec![table::name(obj), json!(service), json!(available), table::age(obj, now)]
    }
}
