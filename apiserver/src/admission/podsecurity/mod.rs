//! PodSecurity: the baseline and restricted standards, by labels of the namespace.
//!
//! `enforce` refuses pods, `warn` warns about pods and about whatever will make pods. Audit annotations have nowhere to go.

mod checks;

use futures::future::BoxFuture;
use isopod_api::{
    field::{Error as FieldError, ErrorList, Path},
    gvk::{GroupKind, Gvr},
    meta,
    status::Status,
};
use serde_json::Value;

use self::checks::{Level, Version, evaluate};
use super::{Operation, Plugin, Request};

const PREFIX: &str = "pod-security.kubernetes.io/";
/// What a policy without labels is.
const PRIVILEGED: Policy = Policy { level: Level::Privileged, version: Version::LATEST };

/// The plugin.
pub(super) struct PodSecurity;

/// One of a namespace's three policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Policy {
    level: Level,
    version: Version,
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.level.name(), self.version)
    }
}

/// Reads one policy; labels that do not parse count as the strictest level, as nobody meant less.
fn policy(namespace: &Value, mode: &str) -> Policy {
    let label = |suffix: &str| meta::label(namespace, &format!("{PREFIX}{mode}{suffix}"));
    let version = label("-version").and_then(Version::parse).unwrap_or(Version::LATEST);
    match label("") {
        None => Policy { version, ..PRIVILEGED },
        Some(text) => Policy { level: Level::parse(text).unwrap_or(Level::Restricted), version },
    }
}

/// Labels that do not parse.
fn label_errors(namespace: &Value) -> ErrorList {
    let path = Path::new("metadata").child("labels");
    let mut errors = ErrorList::new();
    for mode in ["enforce", "audit", "warn"] {
        let level = format!("{PREFIX}{mode}");
        if let Some(text) = meta::label(namespace, &level).filter(|text| Level::parse(text).is_none()) {
            let detail = "must be one of privileged, baseline, restricted";
            errors.push(FieldError::invalid(&path.key(&level), text, detail));
        }
        let version = format!("{PREFIX}{mode}-version");
        if let Some(text) = meta::label(namespace, &version).filter(|text| Version::parse(text).is_none()) {
            let detail = "must be \"latest\" or \"v1.x\"";
            errors.push(FieldError::invalid(&path.key(&version), text, detail));
        }
    }
    errors
}

/// The pod inside whatever will make pods.
fn template<'a>(gvr: &Gvr, object: &'a Value) -> Option<&'a Value> {
    let template = match (gvr.group.as_str(), gvr.resource.as_str()) {
        ("apps", "deployments" | "replicasets" | "statefulsets" | "daemonsets")
        | ("", "replicationcontrollers")
        | ("batch", "jobs") => &object["spec"]["template"],
        ("batch", "cronjobs") => &object["spec"]["jobTemplate"]["spec"]["template"],
        ("", "podtemplates") => &object["template"],
        _ => return None,
    };
    template.is_object().then_some(template)
}

/// Whether an update of a pod can change the verdict.
fn significant(old: &Value, new: &Value) -> bool {
    let strip = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates", "nodeSelector", "affinity"] {
            spec.as_object_mut().map(|spec| spec.remove(field));
        }
        for container in ["containers", "initContainers"] {
            for container in spec.get_mut(container).and_then(Value::as_array_mut).into_iter().flatten() {
                container["image"] = Value::Null;
                container["resources"] = Value::Null;
            }
        }
        spec
    };
    let profiles = |pod: &Value| -> Vec<(String, Value)> {
        let annotations = meta::annotations(pod).iter();
        let security = annotations.filter(|(key, _)| key.contains("apparmor") || key.contains("seccomp"));
        security.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    strip(old) != strip(new) || profiles(old) != profiles(new)
}

impl PodSecurity {
    fn check(request: &mut Request<'_>) -> Result<(), Status> {
        if request.gvr.group.is_empty() && request.gvr.resource == "namespaces" {
            return Self::namespace(request);
        }
        let pod = request.is("", "pods") || request.is_sub("", "pods", "ephemeralcontainers");
        let template = if request.subresource.is_empty() { template(request.gvr, request.object) } else { None };
        if !pod && template.is_none() {
            return Ok(());
        }
        let namespace = request.objects.get(&Gvr::new("", "v1", "namespaces"), "", request.namespace);
        let Some(namespace) = namespace else { return Ok(()) };
        if !namespace.labels.iter().any(|(key, _)| key.starts_with(PREFIX)) {
            return Ok(());
        }
        let namespace = namespace.value();
        let subject = template.unwrap_or(request.object);
        if pod {
            if request.operation == Operation::Update && !significant(request.old, request.object) {
                return Ok(());
            }
            let enforce = policy(&namespace, "enforce");
            let found = evaluate(enforce.level, enforce.version, subject);
            if !found.is_empty() {
                let reasons: Vec<String> = found.iter().map(ToString::to_string).collect();
                return Err(request.forbidden(format!("violates PodSecurity \"{enforce}\": {}", reasons.join(", "))));
            }
        }
        let warn = policy(&namespace, "warn");
        let found = evaluate(warn.level, warn.version, subject);
        if !found.is_empty() {
            let reasons: Vec<String> = found.iter().map(ToString::to_string).collect();
            let warning = format!("would violate PodSecurity \"{warn}\": {}", reasons.join(", "));
            request.warnings.push(warning);
        }
        Ok(())
    }

    fn namespace(request: &mut Request<'_>) -> Result<(), Status> {
        if !request.subresource.is_empty() {
            return Ok(());
        }
        let errors = label_errors(request.object);
        let old_errors = label_errors(request.old);
        if !errors.is_empty() && (request.operation == Operation::Create || errors != old_errors) {
            return Err(Status::invalid(&GroupKind::new("", "Namespace"), request.display_name(), errors));
        }
        let (old, new) = (policy(request.old, "enforce"), policy(request.object, "enforce"));
        let stricter = new.level > old.level || (new.level == old.level && new.version != old.version);
        if request.operation == Operation::Update && new.level != Level::Privileged && stricter {
            let name = request.display_name().to_owned();
            let warnings = Self::existing(request, &name, new);
            request.warnings.extend(warnings);
        }
        Ok(())
    }

    /// Warnings about pods that are there already, grouped by what is wrong with them.
    fn existing(request: &Request<'_>, namespace: &str, policy: Policy) -> Vec<String> {
        let mut groups: Vec<(String, String, usize)> = Vec::new();
        for pod in request.objects.list(&Gvr::new("", "v1", "pods"), namespace) {
            let found = evaluate(policy.level, policy.version, &pod.value());
            if found.is_empty() {
                continue;
            }
            let reasons = found.iter().map(|violation| violation.reason.as_str()).collect::<Vec<_>>().join(", ");
            match groups.iter_mut().find(|(_, known, _)| *known == reasons) {
                Some((_, _, others)) => *others += 1,
                None => groups.push((pod.name.to_string(), reasons, 0)),
            }
        }
        if groups.is_empty() {
            return Vec::new();
        }
        let heading =
            format!("existing pods in namespace {namespace:?} violate the new PodSecurity enforce level \"{policy}\"");
        let lines = groups.into_iter().map(|(name, reasons, others)| match others {
            0 => format!("{name}: {reasons}"),
            1 => format!("{name} (and 1 other pod): {reasons}"),
            n => format!("{name} (and {n} other pods): {reasons}"),
        });
        std::iter::once(heading).chain(lines).collect()
    }
}

impl Plugin for PodSecurity {
    fn name(&self) -> &'static str {
        "PodSecurity"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let writes = matches!(request.operation, Operation::Create | Operation::Update);
        let result = if writes { Self::check(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{Case, FakeObjects};

    fn namespace(labels: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns", "labels": labels}})
    }

    fn pod(name: &str, spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns"}, "spec": spec})
    }

    const WARNING: &str = "would violate PodSecurity \"restricted:latest\": allowPrivilegeEscalation != false (container \"c\" must set securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container \"c\" must set securityContext.capabilities.drop=[\"ALL\"]), runAsNonRoot != true (pod or container \"c\" must set securityContext.runAsNonRoot=true), seccompProfile (pod or container \"c\" must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")";

    #[tokio::test]
    async fn enforce_refuses_and_warn_warns() {
        let objects = FakeObjects::new([namespace(json!({
            "pod-security.kubernetes.io/warn": "restricted",
            "pod-security.kubernetes.io/enforce": "baseline",
            "pod-security.kubernetes.io/enforce-version": "v1.30",
        }))]);
        let mut plain = Case::create(pod("a", json!({"containers": [{"name": "c"}]})));
        plain.run(&PodSecurity, &objects).await.unwrap();
        assert_eq!(plain.warnings, [WARNING]);
        let privileged = json!({"containers": [{"name": "c", "securityContext": {"privileged": true}}]});
        let mut refused = Case::create(pod("priv", privileged));
        let error = refused.run(&PodSecurity, &objects).await.unwrap_err();
        assert_eq!(
            error.message,
            "pods \"priv\" is forbidden: violates PodSecurity \"baseline:v1.30\": privileged (container \"c\" must not set securityContext.privileged=true)"
        );
        assert!(refused.warnings.is_empty());
        let mut deployment = Case::create(json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "d", "namespace": "ns"},
            "spec": {"template": {"spec": {"containers": [{"name": "c"}]}}}}));
        deployment.run(&PodSecurity, &objects).await.unwrap();
        assert_eq!(deployment.warnings, [WARNING]);
    }

    #[tokio::test]
    async fn stricter_namespaces_name_the_pods_they_have() {
        let spec = json!({"containers": [{"name": "c"}]});
        let mut host = spec.clone();
        host["hostNetwork"] = true.into();
        let objects = FakeObjects::new([pod("a", spec.clone()), pod("b", spec), pod("c", host)]);
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let mut case =
            Case { operation: Operation::Update, old: namespace(json!({})), ..Case::create(namespace(labels.clone())) };
        case.run(&PodSecurity, &objects).await.unwrap();
        assert_eq!(
            case.warnings,
            [
                "existing pods in namespace \"ns\" violate the new PodSecurity enforce level \"restricted:latest\"",
                "a (and 1 other pod): allowPrivilegeEscalation != false, unrestricted capabilities, runAsNonRoot != true, seccompProfile",
                "c: host namespaces, allowPrivilegeEscalation != false, unrestricted capabilities, runAsNonRoot != true, seccompProfile",
            ]
        );
        let weaker = namespace(json!({"pod-security.kubernetes.io/enforce": "baseline"}));
        let mut case = Case { operation: Operation::Update, old: namespace(labels), ..Case::create(weaker) };
        case.run(&PodSecurity, &objects).await.unwrap();
        assert!(case.warnings.is_empty());
    }

    #[tokio::test]
    async fn bad_labels_are_invalid() {
        let labels = json!({"pod-security.kubernetes.io/enforce-version": "x", "pod-security.kubernetes.io/warn": "a"});
        let error = Case::create(namespace(labels)).run(&PodSecurity, &FakeObjects::default()).await.unwrap_err();
        assert_eq!(
            error.message,
            "Namespace \"ns\" is invalid: [metadata.labels[pod-security.kubernetes.io/enforce-version]: Invalid value: \"x\": must be \"latest\" or \"v1.x\", metadata.labels[pod-security.kubernetes.io/warn]: Invalid value: \"a\": must be one of privileged, baseline, restricted]"
        );
    }
}
