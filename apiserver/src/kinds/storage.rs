//! storage.k8s.io: StorageClasses, CSIDrivers, CSINodes, VolumeAttachments, VolumeAttributesClasses, CSIStorageCapacities.

use std::collections::{BTreeMap, BTreeSet};

use isopod_api::{field::ErrorList, meta, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{
        At, Errs, IMMUTABLE, internal, meta as checks, pod_warnings, resources, same, selector, template::sorted,
        volume_source,
    },
};

/// `storageclasses`.
pub(crate) struct StorageClass;
/// `csidrivers`.
pub(crate) struct CsiDriver;
/// `csinodes`.
pub(crate) struct CsiNode;
/// `volumeattachments`.
pub(crate) struct VolumeAttachment;
/// `volumeattributesclasses`.
pub(crate) struct VolumeAttributesClass;
/// `csistoragecapacities`.
pub(crate) struct CsiStorageCapacity;

fn parameters(e: &mut Errs, at: &At<'_>, required: bool) {
    if required && at.len() == 0 {
        return e.required(at, "must contain at least one key/value pair");
    }
    if at.len() > 512 {
        e.0.push(isopod_api::field::Error::too_long(&at.path, 512));
        return;
    }
    let mut total = 0;
    for (key, value) in at.entries() {
        if key.is_empty() {
            e.invalid_as(at, "", "field can not be empty.");
        }
        total += key.len() + value.s().len();
    }
    if total > 256 * 1024 {
        e.too_long(at, 256 * 1024);
    }
}

fn provisioner(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.required(at, "");
    }
    let name = at.s().to_lowercase();
    for message in names::qualified_name(&name) {
        e.invalid_as(at, name.clone(), &message);
    }
}

/// `allowedTopologies`: no term twice, no key twice in a term, no value twice for a key.
fn topologies(e: &mut Errs, list: &At<'_>) {
    // Upstream begins with as many empty terms as there are, so an empty one is there already.
    let mut terms: Vec<BTreeMap<&str, BTreeSet<&str>>> = vec![BTreeMap::new(); list.len()];
    for at in list.items() {
        let mut term = BTreeMap::new();
        for expression in at.get("matchLabelExpressions").items() {
            let (key, values) = (expression.get("key"), expression.get("values"));
            if values.len() == 0 {
                e.required(&values, "");
            }
            let mut seen = BTreeSet::new();
            for value in values.items() {
                if !seen.insert(value.s()) {
                    e.duplicate(&value, value.s());
                }
            }
            checks::label_key(e, &key, key.s());
            if term.insert(key.s(), seen).is_some() {
                e.duplicate(&key, key.s());
            }
        }
        for _ in terms.iter().filter(|known| **known == term) {
            e.duplicate(&at.get("matchLabelExpressions"), "");
        }
        terms.push(term);
    }
}

impl Strategy for StorageClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        provisioner(&mut e, &At::field(obj, "provisioner"));
        parameters(&mut e, &At::field(obj, "parameters"), false);
        let policy = At::field(obj, "reclaimPolicy");
        if !policy.s().is_empty() {
            e.one_of(&policy, &["Delete", "Retain"]);
        }
        let mode = At::field(obj, "volumeBindingMode");
        if !mode.is_set() {
            e.required(&mode, "");
        } else {
            e.one_of(&mode, &["Immediate", "WaitForFirstConsumer"]);
        }
        topologies(&mut e, &At::field(obj, "allowedTopologies"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        for (field, detail) in [
            ("parameters", "updates to parameters are forbidden."),
            ("provisioner", "updates to provisioner are forbidden."),
            ("reclaimPolicy", "updates to reclaimPolicy are forbidden."),
        ] {
            if !same(&new[field], &old[field]) {
                e.forbidden(&At::field(new, field), detail);
            }
        }
        e.immutable(&At::field(new, "volumeBindingMode"), &old["volumeBindingMode"]);
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let terms = At::field(obj, "allowedTopologies").items();
        let keys = terms.iter().flat_map(|term| term.get("matchLabelExpressions").items()).map(|own| own.get("key"));
        keys.filter_map(|key| pod_warnings::deprecated_label(key.s()).map(|text| format!("{}: {text}", key.path)))
            .collect()
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let default =
            ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
                .iter()
                .any(|a| meta::annotation(obj, a) == Some("true"));
        let name = if default { format!("{} (default)", meta::name(obj)) } else { meta::name(obj).to_owned() };
        vec![
            json!(name),
            table::or(&obj["provisioner"], ""),
            table::or(&obj["reclaimPolicy"], "Delete"),
            table::or(&obj["volumeBindingMode"], "<unset>"),
            json!(obj["allowVolumeExpansion"] == true),
            table::age(obj, now),
        ]
    }
}

impl Strategy for CsiDriver {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        // Upstream misspells the first.
        for (field, shown) in [
            ("attachRequired", "attachedRequired"),
            ("podInfoOnMount", "podInfoOnMount"),
            ("storageCapacity", "storageCapacity"),
        ] {
            if !spec.get(field).is_set() {
                e.required(&At::new(spec.path.child(shown), &Value::Null), "");
            }
        }
        e.one_of_if_set(&spec.get("fsGroupPolicy"), &["File", "None", "ReadWriteOnceWithFSType"]);
        let mut seen = Vec::new();
        for request in spec.get("tokenRequests").items() {
            let (audience, seconds) = (request.get("audience"), request.get("expirationSeconds"));
            if seen.contains(&audience.s()) {
                e.duplicate(&audience, audience.s());
                continue;
            }
            seen.push(audience.s());
            if seconds.int().is_some_and(|n| n < 600) {
                e.invalid(&seconds, "may not specify a duration less than 10 minutes");
            } else if seconds.int().is_some_and(|n| n > 1 << 32) {
                e.invalid(&seconds, "may not specify a duration larger than 2^32 seconds");
            }
        }
        let modes = spec.get("volumeLifecycleModes");
        for mode in modes.strings().into_iter().filter(|mode| !["Persistent", "Ephemeral"].contains(mode)) {
            e.unsupported_as(&modes, mode, &["Persistent", "Ephemeral"]);
        }
        let period = spec.get("nodeAllocatableUpdatePeriodSeconds");
        if period.int().is_some_and(|n| n < 10) {
            e.invalid(&period, "must be greater than or equal to 10 seconds");
        }
        let secrets = spec.get("serviceAccountTokenInSecrets");
        if secrets.is_set() && spec.get("tokenRequests").len() == 0 {
            e.invalid(&secrets, "serviceAccountTokenInSecrets is set but no tokenRequests are specified");
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        let spec = At::field(new, "spec");
        let attach = At::new(spec.path.child("attachedRequired"), &new["spec"]["attachRequired"]);
        e.immutable(&attach, &old["spec"]["attachRequired"]);
        e.immutable(&spec.get("volumeLifecycleModes"), &old["spec"]["volumeLifecycleModes"]);
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let spec = &obj["spec"];
        if spec["tokenRequests"].as_array().is_some_and(|t| !t.is_empty())
            && spec["serviceAccountTokenInSecrets"].is_null()
        {
            return vec!["spec.serviceAccountTokenInSecrets is unset; if supported by this CSI driver, set to true to prevent possible logging of tokens in volume attributes".to_owned()];
        }
        Vec::new()
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        let audiences: Vec<&str> = spec["tokenRequests"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|t| t["audience"].as_str().unwrap_or_default())
            .collect();
        let requests = if audiences.is_empty() { "<unset>".to_owned() } else { audiences.join(",") };
        let modes = match table::join(&spec["volumeLifecycleModes"], ",") {
            modes if modes.is_empty() => "<none>".to_owned(),
            modes => modes,
        };
        vec![
            table::name(obj),
            json!(spec["attachRequired"] != false),
            json!(spec["podInfoOnMount"] == true),
            json!(spec["storageCapacity"] == true),
            json!(requests),
            json!(spec["requiresRepublish"] == true),
            json!(modes),
            table::age(obj, now),
        ]
    }
}

impl Strategy for CsiNode {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let mut seen = Vec::new();
        for driver in At::field(obj, "spec").get("drivers").items() {
            let (name, node) = (driver.get("name"), driver.get("nodeID"));
            volume_source::csi_driver_name(&mut e, &name);
            if node.s().is_empty() {
                e.required(&node, "");
            } else if node.s().len() > 256 {
                e.invalid(&node, "must be 256 characters or less");
            }
            e.non_negative(&driver.get("allocatable.count"));
            if seen.contains(&name.s()) {
                e.duplicate(&name, name.s());
            }
            seen.push(name.s());
            let mut keys = Vec::new();
            for key in driver.get("topologyKeys").strings() {
                if key.is_empty() {
                    e.required(&driver, "");
                }
                if keys.contains(&key) {
                    e.duplicate(&driver, key);
                }
                keys.push(key);
                for message in names::qualified_name(key) {
                    e.invalid_as(&driver, key, &message);
                }
            }
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        let before = At::field(old, "spec").get("drivers").items();
        let at = At::field(new, "spec").get("drivers");
        let now = at.items();
        // What a driver can attach may change, nothing else of it.
        let fixed = |driver: &At<'_>| {
            let mut driver = driver.v.clone();
            driver["allocatable"] = Value::Null;
            driver
        };
        for (old, driver) in before.iter().flat_map(|old| now.iter().map(move |driver| (old, driver))) {
            let (old, driver) = (fixed(old), fixed(driver));
            if driver["name"] == old["name"] && !same(&driver, &old) {
                e.invalid_as(&at, internal::named("NodeDriver", &driver), IMMUTABLE);
            }
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), json!(table::count(&obj["spec"]["drivers"])), table::age(obj, now)]
    }
}

/// Largest metadata and longest message of an attachment.
const ATTACHMENT_METADATA_MAX: usize = 256 * 1024;
const ATTACHMENT_MESSAGE_MAX: usize = 1024;

/// What is asked of every attachment; a new one needs more.
fn attachment(e: &mut Errs, obj: &Value) {
    let (spec, status) = (At::field(obj, "spec"), At::field(obj, "status"));
    let attacher = spec.get("attacher");
    if attacher.s().is_empty() {
        e.required(&attacher, "");
    }
    let source = spec.get("source");
    let (name, inline) = (source.get("persistentVolumeName"), source.get("inlineVolumeSpec"));
    match (name.is_set(), inline.is_set()) {
        (false, false) => e.required(&source, "must specify exactly one of inlineVolumeSpec and persistentVolumeName"),
        (true, true) => e.forbidden(&source, "must specify exactly one of inlineVolumeSpec and persistentVolumeName"),
        (true, false) if name.s().is_empty() => e.required(&name, "must specify non empty persistentVolumeName"),
        (false, true) => super::persistentvolume::volume_spec(e, &inline, None),
        _ => {}
    }
    e.dns_subdomain(&spec.get("nodeName"));
    let metadata = status.get("attachmentMetadata");
    if metadata.entries().iter().map(|(key, value)| key.len() + value.s().len()).sum::<usize>()
        > ATTACHMENT_METADATA_MAX
    {
        e.too_long(&metadata, ATTACHMENT_METADATA_MAX);
    }
    for error in [status.get("attachError"), status.get("detachError")] {
        let (message, code) = (error.get("message"), error.get("errorCode"));
        if message.s().len() > ATTACHMENT_MESSAGE_MAX {
            // Upstream names the other limit.
            e.too_long(&message, ATTACHMENT_METADATA_MAX);
        }
        if code.int().is_some_and(|code| code < 0) {
            e.invalid(&code, "must be between 0 and 2147483647, inclusive");
        }
    }
}

impl Strategy for VolumeAttachment {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({"attached": false});
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        attachment(&mut e, obj);
        let spec = At::field(obj, "spec");
        volume_source::csi_driver_name(&mut e, &spec.get("attacher"));
        let volume = spec.get("source.persistentVolumeName");
        if volume.is_set() {
            e.dns_subdomain(&volume);
        }
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        attachment(&mut e, new);
        if !same(&new["spec"], &old["spec"]) {
            let spec = At::field(new, "spec");
            e.invalid_as(&spec, internal::named("Attachment", spec.v), IMMUTABLE);
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let spec = &obj["spec"];
        vec![
            table::name(obj),
            table::or(&spec["attacher"], ""),
            table::or(&spec["source"]["persistentVolumeName"], ""),
            table::or(&spec["nodeName"], ""),
            json!(obj["status"]["attached"] == true),
            table::age(obj, now),
        ]
    }
}

impl Strategy for VolumeAttributesClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        provisioner(&mut e, &At::field(obj, "driverName"));
        parameters(&mut e, &At::field(obj, "parameters"), true);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        for (field, detail) in [
            ("driverName", "updates to driverName are forbidden."),
            ("parameters", "updates to parameters are forbidden."),
        ] {
            if !same(&new[field], &old[field]) {
                e.forbidden(&At::field(new, field), detail);
            }
        }
        e.0.extend(self.validate(cx, new));
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let default = meta::annotation(obj, "volumeattributesclass.alpha.kubernetes.io/is-default-class");
        let mark = if default == Some("true") { " (default)" } else { "" };
        vec![json!(format!("{}{mark}", meta::name(obj))), table::or(&obj["driverName"], ""), table::age(obj, now)]
    }
}

impl Strategy for CsiStorageCapacity {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        selector::label_selector(&mut e, &At::field(obj, "nodeTopology"));
        e.dns_subdomain(&At::field(obj, "storageClassName"));
        resources::non_negative_quantity(&mut e, &At::field(obj, "capacity"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs(self.validate(cx, new));
        for field in ["nodeTopology", "storageClassName"] {
            if !same(&new[field], &old[field]) {
                e.invalid_as(&At::field(new, field), sorted(&new[field]), "field is immutable");
            }
        }
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let topology = At::field(obj, "nodeTopology");
        let mut out = Vec::new();
        pod_warnings::node_term(&mut out, &topology, false);
        for (label, _) in topology.get("matchLabels").entries() {
            if let Some(text) = pod_warnings::deprecated_label(label) {
                out.push(format!("{}: {text}", topology.get("matchLabels").path.child(label)));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::manifests::errors;

    /// The errors of an object, in short: fields, and messages where they are short.
    fn faults(kind: &str, content: Value, old: Option<Value>) -> String {
        let object = |mut content: Value| {
            content["apiVersion"] = "storage.k8s.io/v1".into();
            content["kind"] = kind.into();
            content["metadata"] = json!({"name": "a", "namespace": "n"});
            content
        };
        let short = |text: String| match text.split_once(": a lowercase") {
            Some((start, _)) => start.to_owned(),
            None => text,
        };
        errors(object(content), old.map(object)).into_iter().map(short).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn what_is_wrong_with_storage() {
        let long = "x".repeat(1025);
        let table = [
            (
                "VolumeAttachment",
                json!({"spec": {"attacher": "", "nodeName": "n", "source": {}}}),
                "spec.attacher: Required value; spec.source: Required value: must specify exactly one of inlineVolumeSpec and persistentVolumeName; \
                 spec.attacher: Required value; spec.attacher: Invalid value: \"\"",
            ),
            (
                "VolumeAttachment",
                json!({"spec": {"attacher": "d", "nodeName": "n", "source": {"persistentVolumeName": "A"}},
                    "status": {"attached": true, "attachError": {"message": long, "errorCode": -1}}}),
                "status.attachError.message: Too long: may not be more than 262144 bytes; \
                 status.attachError.errorCode: Invalid value: -1: must be between 0 and 2147483647, inclusive; \
                 spec.source.persistentVolumeName: Invalid value: \"A\"",
            ),
            (
                "CSIStorageCapacity",
                json!({"storageClassName": "", "nodeTopology": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
                "nodeTopology.matchExpressions[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'; \
                 storageClassName: Invalid value: \"\"",
            ),
            (
                "CSIDriver",
                json!({"spec": {"serviceAccountTokenInSecrets": false}}),
                "spec.serviceAccountTokenInSecrets: Invalid value: false: serviceAccountTokenInSecrets is set but no tokenRequests are specified",
            ),
            (
                "StorageClass",
                json!({"provisioner": "p", "reclaimPolicy": "", "allowedTopologies": [{}]}),
                "allowedTopologies[0].matchLabelExpressions: Duplicate value: \"\"",
            ),
        ];
        for (kind, content, want) in table {
            assert_eq!(faults(kind, content.clone(), None), want, "{kind} {content}");
        }
        // What only new attachments need is not asked of old ones.
        let old = json!({"spec": {"attacher": "A_", "nodeName": "n", "source": {"persistentVolumeName": "v"}}});
        assert_eq!(faults("VolumeAttachment", old.clone(), Some(old)), "");
    }
}
