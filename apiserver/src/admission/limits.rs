//! LimitRanger: defaults and bounds for the resources of containers, pods and claims.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, quantity::Quantity, status::Status};
use serde_json::Value;

use super::{Operation, Plugin, Request, list, text};

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

/// The plugin.
pub(super) struct LimitRanger;

type Resources = BTreeMap<String, Quantity>;

fn resources(value: &Value) -> Resources {
    let pairs = value.as_object().into_iter().flatten();
    pairs.filter_map(|(name, amount)| Some((name.clone(), Quantity::from_json(amount).ok()?))).collect()
}

fn ranges(request: &Request<'_>) -> Vec<Value> {
    let gvr = Gvr::new("", "v1", "limitranges");
    request.objects.list(&gvr, request.namespace).iter().map(|range| range.value()).collect()
}

/// Applies one range's container defaults; what was set, for the annotation.
fn default_container(container: &mut Value, kind: &str, limit: &Value) -> Vec<String> {
    let mut set = Vec::new();
    for (field, source) in [("requests", "defaultRequest"), ("limits", "default")] {
        let mut names = Vec::new();
        for (name, amount) in limit[source].as_object().into_iter().flatten() {
            let current = &container["resources"][field][name];
            if current.is_null() {
                container["resources"][field][name] = amount.clone();
                names.push(name.clone());
            }
        }
        if !names.is_empty() {
            let (word, name) = (field.trim_end_matches('s'), text(container, "name"));
            set.push(format!("{} {word} for {kind} {name}", names.join(", ")));
        }
    }
    set
}

fn default_pod(pod: &mut Value, ranges: &[Value]) {
    let mut notes = Vec::new();
    for range in ranges {
        for limit in list(&range["spec"], "limits").iter().filter(|limit| limit["type"] == "Container") {
            for (field, kind) in [("containers", "container"), ("initContainers", "init container")] {
                for container in pod["spec"].get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
                    notes.extend(default_container(container, kind, limit));
                }
            }
        }
    }
    if !notes.is_empty() {
        meta::set_annotation(pod, ANNOTATION, &format!("LimitRanger plugin set: {}", notes.join("; ")));
    }
}

/// What a limit's field says of each resource.
fn field(limit: &Value, name: &str) -> Resources {
    resources(&limit[name])
}

struct Usage {
    requests: Resources,
    limits: Resources,
}

impl Usage {
    fn of(value: &Value) -> Self {
        Self { requests: resources(&value["requests"]), limits: resources(&value["limits"]) }
    }

    fn add(&mut self, other: &Self) {
        for (ours, theirs) in [(&mut self.requests, &other.requests), (&mut self.limits, &other.limits)] {
            for (name, amount) in theirs {
                let sum = ours.get(name).map_or(*amount, |have| have.add(amount));
                ours.insert(name.clone(), sum);
            }
        }
    }

    fn max(&mut self, other: &Self) {
        for (ours, theirs) in [(&mut self.requests, &other.requests), (&mut self.limits, &other.limits)] {
            for (name, amount) in theirs {
                if ours.get(name).is_none_or(|have| have < amount) {
                    ours.insert(name.clone(), *amount);
                }
            }
        }
    }

    /// Violations of one limit, with upstream's wording.
    fn violations(&self, kind: &str, limit: &Value) -> Vec<String> {
        let mut out = Vec::new();
        for (name, min) in field(limit, "min") {
            match (self.requests.get(&name), self.limits.get(&name)) {
                (None, _) => out.push(format!("minimum {name} usage per {kind} is {min}.  No request is specified")),
                (Some(request), _) if *request < min => {
                    out.push(format!("minimum {name} usage per {kind} is {min}, but request is {request}"));
                }
                (_, Some(limit)) if *limit < min => {
                    out.push(format!("minimum {name} usage per {kind} is {min}, but limit is {limit}"));
                }
                _ => {}
            }
        }
        for (name, max) in field(limit, "max") {
            match (self.requests.get(&name), self.limits.get(&name)) {
                (_, None) => out.push(format!("maximum {name} usage per {kind} is {max}.  No limit is specified")),
                (_, Some(limit)) if *limit > max => {
                    out.push(format!("maximum {name} usage per {kind} is {max}, but limit is {limit}"));
                }
                (Some(request), _) if *request > max => {
                    out.push(format!("maximum {name} usage per {kind} is {max}, but request is {request}"));
                }
                _ => {}
            }
        }
        for (name, ratio) in field(limit, "maxLimitRequestRatio") {
            let request = self.requests.get(&name).filter(|request| !request.is_zero());
            match (request, self.limits.get(&name)) {
                (None, None) => out.push(format!("{name} max limit to request ratio per {kind} is {ratio}, but no request is specified or request is 0, and no limit is specified")),
                (None, _) => out.push(format!("{name} max limit to request ratio per {kind} is {ratio}, but no request is specified or request is 0")),
                (_, None) => out.push(format!("{name} max limit to request ratio per {kind} is {ratio}, but no limit is specified")),
                (Some(request), Some(limit)) => {
                    let actual = limit.as_f64() / request.as_f64();
                    if actual > ratio.as_f64() {
                        out.push(format!("{name} max limit to request ratio per {kind} is {ratio}, but provided ratio is {actual:.6}"));
                    }
                }
            }
        }
        out
    }
}

/// What a pod uses as a whole: its containers together, or its largest init container.
fn pod_usage(spec: &Value) -> Usage {
    let mut sum = Usage { requests: Resources::new(), limits: Resources::new() };
    for container in list(spec, "containers") {
        sum.add(&Usage::of(&container["resources"]));
    }
    for container in list(spec, "initContainers") {
        let usage = Usage::of(&container["resources"]);
        if container["restartPolicy"] == "Always" { sum.add(&usage) } else { sum.max(&usage) }
    }
    sum
}

fn pod_violations(pod: &Value, range: &Value) -> Vec<String> {
    let mut out = Vec::new();
    for limit in list(&range["spec"], "limits") {
        match limit["type"].as_str() {
            Some("Container") => {
                for container in ["containers", "initContainers"].iter().flat_map(|f| list(&pod["spec"], f)) {
                    out.extend(Usage::of(&container["resources"]).violations("Container", limit));
                }
            }
            Some("Pod") => out.extend(pod_usage(&pod["spec"]).violations("Pod", limit)),
            _ => {}
        }
    }
    out
}

fn claim_violations(claim: &Value, range: &Value) -> Vec<String> {
    let requests = resources(&claim["spec"]["resources"]["requests"]);
    let mut out = Vec::new();
    for limit in list(&range["spec"], "limits").iter().filter(|limit| limit["type"] == "PersistentVolumeClaim") {
        for (name, request) in &requests {
            if let Some(min) = field(limit, "min").get(name).filter(|min| request < min) {
                out.push(format!("minimum {name} usage per PersistentVolumeClaim is {min}, but request is {request}"));
            }
            if let Some(max) = field(limit, "max").get(name).filter(|max| request > max) {
                out.push(format!("maximum {name} usage per PersistentVolumeClaim is {max}, but request is {request}"));
            }
        }
    }
    out
}

fn check(request: &Request<'_>) -> Result<(), Status> {
    let violations = if request.gvr.resource == "pods" { pod_violations } else { claim_violations };
    for range in ranges(request) {
        let found = violations(request.object, &range);
        match found.as_slice() {
            [] => {}
            [one] => return Err(request.forbidden(one)),
            many => return Err(request.forbidden(format!("[{}]", many.join(", ")))),
        }
    }
    Ok(())
}

/// Whether limits apply: to new pods and to new or changed claims.
fn applies(request: &Request<'_>) -> bool {
    let writes = matches!(request.operation, Operation::Create | Operation::Update);
    request.creates("", "pods") || (writes && request.is("", "persistentvolumeclaims"))
}

impl Plugin for LimitRanger {
    fn name(&self) -> &'static str {
        "LimitRanger"
    }

    fn admit<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        if request.creates("", "pods") {
            let ranges = ranges(request);
            default_pod(request.object, &ranges);
        }
        Box::pin(async { Ok(()) })
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        let result = if applies(request) { check(request) } else { Ok(()) };
        Box::pin(async { result })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{FakeObjects, admit};

    fn cluster(limit: Value) -> FakeObjects {
        FakeObjects::new([json!({"apiVersion": "v1", "kind": "LimitRange",
            "metadata": {"name": "l", "namespace": "ns"}, "spec": {"limits": [limit]}})])
    }

    fn pod(resources: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "ns"},
            "spec": {"containers": [{"name": "c", "resources": resources}]}})
    }

    #[tokio::test]
    async fn defaults_are_filled_and_noted() {
        let objects = cluster(
            json!({"type": "Container", "default": {"cpu": "1"}, "defaultRequest": {"cpu": "500m", "memory": "1Mi"}}),
        );
        let admitted = admit(&LimitRanger, &objects, pod(json!({"requests": {"cpu": "1m"}}))).await.unwrap();
        let resources = &admitted["spec"]["containers"][0]["resources"];
        assert_eq!(*resources, json!({"requests": {"cpu": "1m", "memory": "1Mi"}, "limits": {"cpu": "1"}}));
        assert_eq!(
            meta::annotation(&admitted, ANNOTATION),
            Some("LimitRanger plugin set: memory request for container c; cpu limit for container c")
        );
    }

    #[tokio::test]
    async fn bounds_are_enforced() {
        let objects = cluster(json!({"type": "Container", "max": {"cpu": "1"}, "min": {"cpu": "100m"}}));
        let admit = async |resources: Value| admit(&LimitRanger, &objects, pod(resources)).await.map(drop);
        assert!(admit(json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "1"}})).await.is_ok());
        let error = admit(json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "2"}})).await.unwrap_err();
        assert_eq!(error.message, "pods \"p\" is forbidden: maximum cpu usage per Container is 1, but limit is 2");
        let error = admit(json!({"limits": {"cpu": "1"}})).await.unwrap_err();
        assert!(error.message.ends_with("minimum cpu usage per Container is 100m.  No request is specified"));
    }

    #[tokio::test]
    async fn init_containers_count_by_the_largest() {
        let spec = json!({"containers": [{"resources": {"requests": {"cpu": "1"}}}, {"resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [{"resources": {"requests": {"cpu": "3"}}}]});
        assert_eq!(pod_usage(&spec).requests["cpu"].to_string(), "3");
    }
}
