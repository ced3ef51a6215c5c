//! What pods get from the cluster: Priority, DefaultTolerationSeconds, RuntimeClass, PodTopologyLabels.

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, status::Status};
use serde_json::{Value, json};

use super::{Operation, Plugin, Request, list, push};

/// Priorities from priority classes.
pub(super) struct Priority;

/// Classes the cluster itself needs.
const SYSTEM_CLASSES: [&str; 2] = ["system-cluster-critical", "system-node-critical"];

fn priority_classes() -> Gvr {
    Gvr::new("scheduling.k8s.io", "v1", "priorityclasses")
}

/// The default class: of several the one with the lowest value.
fn default_class(request: &Request<'_>) -> Option<Value> {
    let classes = request.objects.list(&priority_classes(), "");
    let defaults = classes.iter().map(|class| class.value()).filter(|class| class["globalDefault"] == true);
    defaults.min_by_key(|class| class["value"].as_i64().unwrap_or_default())
}

fn prioritize(request: &mut Request<'_>) -> Result<(), Status> {
    let name = request.object["spec"]["priorityClassName"].as_str().unwrap_or_default().to_owned();
    let class = if name.is_empty() {
        default_class(request)
    } else {
        let class = request.objects.get(&priority_classes(), "", &name).map(|class| class.value());
        let missing = || request.forbidden(format!("no PriorityClass with name {name} was found"));
        Some(class.ok_or_else(missing)?)
    };
    let value = class.as_ref().and_then(|class| class["value"].as_i64()).unwrap_or(0);
    let policy = class.as_ref().and_then(|class| class["preemptionPolicy"].as_str()).unwrap_or("PreemptLowerPriority");
    if let Some(given) = request.object["spec"]["priority"].as_i64().filter(|given| *given != value) {
        return Err(request.forbidden(format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {value} from the given PriorityClass name"
        )));
    }
    if let Some(given) = request.object["spec"]["preemptionPolicy"].as_str().filter(|given| *given != policy) {
        return Err(request.forbidden(format!(
            "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
        )));
    }
    let spec = &mut request.object["spec"];
    if let Some(class) = class.as_ref().filter(|_| name.is_empty()) {
        spec["priorityClassName"] = class["metadata"]["name"].clone();
    }
    spec["priority"] = value.into();
    spec["preemptionPolicy"] = policy.into();
    Ok(())
}

/// Only one class may be the default.
fn one_default(request: &Request<'_>) -> Result<(), Status> {
    if request.object["globalDefault"] != true {
        return Ok(());
    }
    match default_class(request) {
        Some(class) if meta::name(&class) != meta::name(request.object) => Err(request.forbidden(format!(
            "PriorityClass {} is already marked as default. Only one default can exist",
            meta::name(&class)
        ))),
        _ => Ok(()),
    }
}

impl Plugin for Priority {
    fn name(&self) -> &'static str {
        "Priority"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let removes = request.operation == Operation::Delete && request.is("scheduling.k8s.io", "priorityclasses");
        let result = if request.creates("", "pods") {
            prioritize(request)
        } else if removes && SYSTEM_CLASSES.contains(&request.name) {
            Err(request.forbidden("this is a system priority class and cannot be deleted"))
        } else {
            Ok(())
        };
        Box::pin(async { result })
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let writes = matches!(request.operation, Operation::Create | Operation::Update);
        let applies = writes && request.is("scheduling.k8s.io", "priorityclasses");
        let result = if applies { one_default(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

/// Pods stay five minutes on nodes that are gone.
pub(super) struct DefaultTolerationSeconds;

const TOLERATED: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];
const TOLERATION_SECONDS: i64 = 300;

fn tolerate(spec: &mut Value) {
    for key in TOLERATED {
        let tolerates = |toleration: &Value| {
            let text = |field: &str| toleration[field].as_str().unwrap_or_default();
            (text("key") == key || text("key").is_empty()) && matches!(text("effect"), "NoExecute" | "")
        };
        if !list(spec, "tolerations").iter().any(tolerates) {
            let toleration = json!({ "key": key, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": TOLERATION_SECONDS });
            push(spec, "tolerations", toleration);
        }
    }
}

impl Plugin for DefaultTolerationSeconds {
    fn name(&self) -> &'static str {
        "DefaultTolerationSeconds"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let writes = matches!(request.operation, Operation::Create | Operation::Update);
        if writes && request.is("", "pods") {
            tolerate(&mut request.object["spec"]);
        }
        Box::pin(async { Ok(()) })
    }
}

/// Overhead and placement from runtime classes.
pub(super) struct RuntimeClass;

fn runtime_class(request: &Request<'_>) -> Result<Option<Value>, Status> {
    let Some(name) = request.object["spec"]["runtimeClassName"].as_str() else { return Ok(None) };
    let class = request.objects.get(&Gvr::new("node.k8s.io", "v1", "runtimeclasses"), "", name);
    let class = class.ok_or_else(|| request.forbidden(format!("pod rejected: RuntimeClass {name:?} not found")))?;
    Ok(Some(class.value()))
}

fn apply_class(request: &mut Request<'_>, class: &Value) -> Result<(), Status> {
    if let Some(overhead) = class["overhead"]["podFixed"].as_object() {
        match request.object["spec"]["overhead"].as_object() {
            Some(given) if given != overhead => {
                return Err(
                    request.forbidden("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead")
                );
            }
            _ => request.object["spec"]["overhead"] = overhead.clone().into(),
        }
    }
    let scheduling = &class["scheduling"];
    for (key, value) in scheduling["nodeSelector"].as_object().into_iter().flatten() {
        let given = &request.object["spec"]["nodeSelector"][key];
        if !given.is_null() && given != value {
            return Err(request
                .forbidden("pod rejected: conflict: runtimeClass.scheduling.nodeSelector and pod.spec.nodeSelector"));
        }
        request.object["spec"]["nodeSelector"][key] = value.clone();
    }
    for toleration in list(scheduling, "tolerations") {
        if !list(&request.object["spec"], "tolerations").contains(toleration) {
            push(&mut request.object["spec"], "tolerations", toleration.clone());
        }
    }
    Ok(())
}

impl Plugin for RuntimeClass {
    fn name(&self) -> &'static str {
        "RuntimeClass"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let result = if request.creates("", "pods") {
            runtime_class(request).and_then(|class| class.map_or(Ok(()), |class| apply_class(request, &class)))
        } else {
            Ok(())
        };
        Box::pin(async { result })
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let result = if request.creates("", "pods") { check_overhead(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

fn check_overhead(request: &Request<'_>) -> Result<(), Status> {
    let overhead = request.object["spec"]["overhead"].as_object().filter(|overhead| !overhead.is_empty());
    if overhead.is_none() || runtime_class(request)?.is_some_and(|class| class["overhead"]["podFixed"].is_object()) {
        return Ok(());
    }
    Err(request.forbidden("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead"))
}

/// Bound pods carry their node's zone and region.
pub(super) struct PodTopologyLabels;

const TOPOLOGY: [&str; 2] = ["topology.kubernetes.io/zone", "topology.kubernetes.io/region"];

impl PodTopologyLabels {
    fn label(request: &mut Request<'_>) {
        let name = if request.is_sub("", "pods", "binding") {
            request.object["target"]["name"].as_str()
        } else {
            request.object["spec"]["nodeName"].as_str()
        };
        let Some(name) = name.filter(|name| !name.is_empty()) else { return };
        let Some(node) = request.objects.get(&Gvr::new("", "v1", "nodes"), "", name) else { return };
        for key in TOPOLOGY {
            if let Some(value) = node.label(key) {
                meta::set_label(request.object, key, value);
            }
        }
    }
}

impl Plugin for PodTopologyLabels {
    fn name(&self) -> &'static str {
        "PodTopologyLabels"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let binds = request.operation == Operation::Create && request.is_sub("", "pods", "binding");
        if binds || request.creates("", "pods") {
            Self::label(request);
        }
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::{FakeObjects, admit};

    fn class(name: &str, value: i64, default: bool) -> Value {
        json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "globalDefault": default})
    }

    fn pod(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "ns"}, "spec": spec})
    }

    #[tokio::test]
    async fn priorities() {
        let objects = FakeObjects::new([class("high", 1000, false)]);
        let plain = admit(&Priority, &objects, pod(json!({}))).await.unwrap();
        assert_eq!(plain["spec"], json!({"priority": 0, "preemptionPolicy": "PreemptLowerPriority"}));
        let high = admit(&Priority, &objects, pod(json!({"priorityClassName": "high"}))).await.unwrap();
        assert_eq!(high["spec"]["priority"], 1000);
        let error = admit(&Priority, &objects, pod(json!({"priorityClassName": "x"}))).await.unwrap_err();
        assert_eq!(error.message, "pods \"p\" is forbidden: no PriorityClass with name x was found");
        let error = admit(&Priority, &objects, pod(json!({"priority": 5}))).await.unwrap_err();
        assert!(error.message.contains("the integer value of priority (5) must not be provided"), "{}", error.message);
    }

    #[tokio::test]
    async fn the_default_class_is_named_and_alone() {
        let objects = FakeObjects::new([class("g", 77, true)]);
        let plain = admit(&Priority, &objects, pod(json!({}))).await.unwrap();
        assert_eq!((&plain["spec"]["priority"], &plain["spec"]["priorityClassName"]), (&json!(77), &json!("g")));
        let error = admit(&Priority, &objects, class("h", 1, true)).await.unwrap_err();
        assert_eq!(
            error.message,
            "priorityclasses.scheduling.k8s.io \"h\" is forbidden: PriorityClass g is already marked as default. Only one default can exist"
        );
        assert!(admit(&Priority, &objects, class("g", 77, true)).await.is_ok());
    }

    #[tokio::test]
    async fn tolerations_are_added_unless_there() {
        let objects = FakeObjects::default();
        let keys = |pod: &Value| -> Vec<String> {
            list(&pod["spec"], "tolerations").iter().map(|t| t["key"].as_str().unwrap_or("*").to_owned()).collect()
        };
        let plain = admit(&DefaultTolerationSeconds, &objects, pod(json!({}))).await.unwrap();
        assert_eq!(keys(&plain), TOLERATED);
        let all = json!({"tolerations": [{"operator": "Exists"}]});
        assert_eq!(keys(&admit(&DefaultTolerationSeconds, &objects, pod(all)).await.unwrap()), ["*"]);
        let one = json!({"tolerations": [{"key": TOLERATED[1], "operator": "Exists", "effect": "NoExecute"}]});
        let one = admit(&DefaultTolerationSeconds, &objects, pod(one)).await.unwrap();
        assert_eq!(keys(&one), [TOLERATED[1], TOLERATED[0]]);
    }

    #[tokio::test]
    async fn runtime_classes_bring_overhead() {
        let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "rc"},
            "handler": "h", "overhead": {"podFixed": {"cpu": "10m"}}, "scheduling": {"nodeSelector": {"a": "b"}}});
        let objects = FakeObjects::new([class]);
        let admitted = admit(&RuntimeClass, &objects, pod(json!({"runtimeClassName": "rc"}))).await.unwrap();
        assert_eq!(admitted["spec"]["overhead"], json!({"cpu": "10m"}));
        assert_eq!(admitted["spec"]["nodeSelector"], json!({"a": "b"}));
        assert!(admit(&RuntimeClass, &objects, pod(json!({"runtimeClassName": "zz"}))).await.is_err());
        assert!(admit(&RuntimeClass, &objects, pod(json!({"overhead": {"cpu": "1"}}))).await.is_err());
    }
}
