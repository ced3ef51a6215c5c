//! A little of the Kubernetes API on the node itself, for `kubectl --server` and `isopod`'s own commands when there is no
//! API server: pods, the node, events and namespaces to read, logs, exec, attach and port-forward. Nothing can be changed.

use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    http::{Body, Parts, Server, json_response, pod},
    logs::BadOptions,
};

/// Whether a path belongs here.
pub(super) fn is_ours(path: &[&str]) -> bool {
    matches!(path.first(), Some(&("api" | "apis" | "version")))
}

fn refuse(code: StatusCode, reason: &str, message: String) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason, "code": code.as_u16()});
    let mut response = json_response(&status);
    *response.status_mut() = code;
    response
}

/// Options of a log that cannot be followed, as a Status: the node's own callers read that, and people can.
pub(super) fn bad_log_options(pod: &str, error: &BadOptions) -> Response<Body> {
    match error {
        BadOptions::Unreadable(why) => refuse(StatusCode::BAD_REQUEST, "BadRequest", why.clone()),
        BadOptions::Invalid(why) => {
            let text = format!("PodLogOptions {pod:?} is invalid: {why}");
            refuse(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", text)
        }
    }
}

fn not_found(kind: &str, name: &str) -> Response<Body> {
    refuse(StatusCode::NOT_FOUND, "NotFound", format!("{kind} {name:?} not found"))
}

/// Resource, kind, whether it has namespaces, short name, verbs.
const RESOURCES: [(&str, &str, bool, &str, &str); 8] = [
    ("events", "Event", true, "ev", "get list"),
    ("namespaces", "Namespace", false, "ns", "get list"),
    ("nodes", "Node", false, "no", "get list"),
    ("pods", "Pod", true, "po", "get list"),
    ("pods/attach", "PodAttachOptions", true, "", "create get"),
    ("pods/exec", "PodExecOptions", true, "", "create get"),
    ("pods/log", "Pod", true, "", "get"),
    ("pods/portforward", "PodPortForwardOptions", true, "", "create get"),
];

fn discovery() -> Value {
    let resources: Vec<Value> = RESOURCES
        .iter()
        .map(|(name, kind, namespaced, short, verbs)| {
            let verbs: Vec<&str> = verbs.split(' ').collect();
            let mut one =
                json!({"name": name, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs});
            if !short.is_empty() {
                one["shortNames"] = json!([short]);
                one["singularName"] = json!(name.trim_end_matches('s'));
            }
            one
        })
        .collect();
    json!({"kind": "APIResourceList", "groupVersion": "v1", "resources": resources})
}

fn typed(mut object: Value, kind: &str) -> Value {
    object["apiVersion"] = json!("v1");
    object["kind"] = json!(kind);
    object
}

/// Whether an object has the fields of a field selector and the labels of a label selector (equality only).
fn selected(object: &Value, fields: &str, labels: &str) -> Result<bool, String> {
    let mut all = true;
    for (selector, is_field) in [(fields, true), (labels, false)] {
        for part in selector.split(',').filter(|p| !p.is_empty()) {
            let (key, want, equal) = if let Some((k, v)) = part.split_once("!=") {
                (k, v, false)
            } else if let Some((k, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (k, v, true)
            } else {
                return Err(format!("selector {part:?}: only = and != are served by the node"));
            };
            let found = if is_field {
                object.pointer(&format!("/{}", key.trim().replace('.', "/")))
            } else {
                object["metadata"]["labels"].get(key.trim())
            };
            all &= (found.and_then(Value::as_str).unwrap_or("") == want.trim()) == equal;
        }
    }
    Ok(all)
}

/// What kubectl shows of a pod: ready, status, restarts.
pub fn summary(pod: &Value) -> (String, String, u64) {
    let list = |name: &str| pod["status"][name].as_array().cloned().unwrap_or_default();
    let (containers, inits) = (list("containerStatuses"), list("initContainerStatuses"));
    let total = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
    let ready = containers.iter().filter(|c| c["ready"] == true).count();
    let restarts = containers.iter().chain(&inits).map(|c| c["restartCount"].as_u64().unwrap_or(0)).sum();
    let text = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let mut status = text(&pod["status"]["reason"]);
    if status.is_empty() {
        status = text(&pod["status"]["phase"]);
    }
    let of_state = |c: &Value| {
        let (waiting, ended) = (&c["state"]["waiting"], &c["state"]["terminated"]);
        let reason = if waiting.is_object() { text(&waiting["reason"]) } else { text(&ended["reason"]) };
        (!reason.is_empty()).then_some(reason)
    };
    let done = |c: &Value| c["state"]["terminated"]["exitCode"] == 0 || c["started"] == true && c["ready"] == true;
    match inits.iter().enumerate().find(|(_, c)| !done(c)) {
        Some((at, c)) if pod["status"]["phase"] == "Pending" => {
            status = match of_state(c).filter(|r| r != "PodInitializing") {
                Some(reason) => format!("Init:{reason}"),
                None => format!("Init:{at}/{}", inits.len()),
            };
        }
        _ => {
            if let Some(reason) = containers.iter().rev().find_map(of_state) {
                status = reason;
            }
        }
    }
    if pod["metadata"]["deletionTimestamp"].is_string() {
        status = "Terminating".into();
    }
    (format!("{ready}/{total}"), status, restarts)
}

/// A duration as kubectl shows ages.
fn age(since: &Value) -> String {
    let Some(at) = since.as_str().and_then(|t| t.parse::<jiff::Timestamp>().ok()) else { return "<unknown>".into() };
    let s = (jiff::Timestamp::now().as_second() - at.as_second()).max(0);
    match s {
        0..120 => format!("{s}s"),
        120..7200 => format!("{}m", s / 60),
        7200..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

fn table(items: &[Value]) -> Value {
    let column = |name: &str, priority: i64| json!({"name": name, "type": "string", "format": "", "description": "", "priority": priority});
    let columns = [("Name", 0), ("Ready", 0), ("Status", 0), ("Restarts", 0), ("Age", 0), ("IP", 1), ("Node", 1)];
    let rows: Vec<Value> = items
        .iter()
        .map(|p| {
            let (ready, status, restarts) = summary(p);
            let began = if p["metadata"]["creationTimestamp"].is_string() {
                &p["metadata"]["creationTimestamp"]
            } else {
                &p["status"]["startTime"]
            };
            let ip = p["status"]["podIP"].as_str().unwrap_or("<none>");
            let cells = json!([
                p["metadata"]["name"],
                ready,
                status,
                restarts.to_string(),
                age(began),
                ip,
                p["spec"]["nodeName"]
            ]);
            let object =
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": p["metadata"]});
            json!({"cells": cells, "object": object})
        })
        .collect();
    let definitions: Vec<Value> = columns.iter().map(|(n, p)| column(n, *p)).collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": definitions, "rows": rows})
}

impl Server {
    /// Answers a request that [`is_ours`].
    pub(super) async fn kube(&self, path: &[&str], parts: &Parts, request: Request<Incoming>) -> Response<Body> {
        let streams = matches!(path.last(), Some(&("exec" | "attach" | "portforward")));
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        if !reads && (!streams || path.len() != 7) {
            let text = "the node's own API is read-only: changes go to the API server or the manifest directory";
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", text.into());
        }
        if parts.flag(["watch", "watch"]) {
            let text = "the node's own API has no watches";
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", text.into());
        }
        let accept = request.headers().get(header::ACCEPT).and_then(|a| a.to_str().ok()).unwrap_or("").to_string();
        match path {
            ["version"] => json_response(&json!({"major": "1", "minor": "36", "gitVersion": "v1.36.2",
                "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "",
                "platform": format!("linux/{}", crate::node::info::architecture())})),
            ["api"] => {
                json_response(&json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}))
            }
            ["apis"] => json_response(&json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})),
            ["api", "v1"] => json_response(&discovery()),
            ["api", "v1", "namespaces"] => json_response(&json!({"kind": "NamespaceList", "apiVersion": "v1",
                "metadata": {}, "items": self.namespaces()})),
            ["api", "v1", "namespaces", name] => {
                let found = self.namespaces().into_iter().find(|n| n["metadata"]["name"] == *name);
                found.map_or_else(|| not_found("namespaces", name), |n| json_response(&typed(n, "Namespace")))
            }
            ["api", "v1", "nodes"] => json_response(
                &json!({"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": [self.host.node()]}),
            ),
            ["api", "v1", "nodes", name] => {
                let node = self.host.node();
                if node["metadata"]["name"] == *name {
                    json_response(&typed(node, "Node"))
                } else {
                    not_found("nodes", name)
                }
            }
            ["api", "v1", "events"] => self.list("Event", None, parts, &accept),
            ["api", "v1", "pods"] => self.list("Pod", None, parts, &accept),
            ["api", "v1", "namespaces", namespace, "events"] => self.list("Event", Some(namespace), parts, &accept),
            ["api", "v1", "namespaces", namespace, "pods"] => self.list("Pod", Some(namespace), parts, &accept),
            ["api", "v1", "namespaces", namespace, "pods", name] => match self.one(namespace, name) {
                None => not_found("pods", name),
                Some(p) if accept.contains("as=Table") => json_response(&table(&[p])),
                Some(p) => json_response(&typed(p, "Pod")),
            },
            ["api", "v1", "namespaces", namespace, "pods", name, action] => {
                self.pod_action(namespace, name, action, parts, request).await
            }
            _ => refuse(StatusCode::NOT_FOUND, "NotFound", "the node does not serve this resource".into()),
        }
    }

    fn one(&self, namespace: &str, name: &str) -> Option<Value> {
        self.host.pod(namespace, name).map(|p| (*p).clone())
    }

    fn namespaces(&self) -> Vec<Value> {
        let pods = self.host.pods();
        let mut names: Vec<&str> =
            pods.iter().filter_map(|p| p["metadata"]["namespace"].as_str()).chain(["default"]).collect();
        names.sort_unstable();
        names.dedup();
        names.iter().map(|n| json!({"metadata": {"name": n}, "spec": {}, "status": {"phase": "Active"}})).collect()
    }

    fn list(&self, kind: &str, namespace: Option<&str>, parts: &Parts, accept: &str) -> Response<Body> {
        let mut items: Vec<Value> = match kind {
            "Event" => self.host.events(),
            _ => self.host.pods().iter().map(|p| (**p).clone()).collect(),
        };
        let said = |name: &'static str| parts.all(name).next().unwrap_or("").to_string();
        let (fields, labels) = (said("fieldSelector"), said("labelSelector"));
        let mut wrong = None;
        items.retain(|i| {
            let fits = selected(i, &fields, &labels).unwrap_or_else(|e| {
                wrong = Some(e);
                false
            });
            fits && namespace.is_none_or(|n| i["metadata"]["namespace"] == n)
        });
        if let Some(error) = wrong {
            return refuse(StatusCode::BAD_REQUEST, "BadRequest", error);
        }
        let key = |v: &Value| (v["metadata"]["namespace"].to_string(), v["metadata"]["name"].to_string());
        if kind == "Pod" {
            items.sort_by_key(key);
            if accept.contains("as=Table") {
                return json_response(&table(&items));
            }
        }
        json_response(
            &json!({"kind": format!("{kind}List"), "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}),
        )
    }

    async fn pod_action(
        &self,
        namespace: &str,
        name: &str,
        action: &str,
        parts: &Parts,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let Some(found) = self.one(namespace, name) else { return not_found("pods", name) };
        let reference = pod(namespace, name, None);
        if action == "portforward" {
            return self.port_forward(&reference, parts, request);
        }
        let default = found["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
        let first = found["spec"]["containers"][0]["name"].as_str();
        let asked = parts.all("container").next().filter(|c| !c.is_empty());
        let Some(container) = asked.or(default).or(first) else { return not_found("containers of pod", name) };
        match action {
            "log" => self.logs(&reference, container, parts).await,
            "exec" => self.exec(reference, container, parts, request),
            "attach" => self.attach(reference, container, parts, request),
            _ => not_found("subresources", action),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_equalities() {
        let o = json!({"metadata": {"name": "a", "labels": {"app": "x"}}, "status": {"phase": "Running"}});
        for (fields, labels, want) in [
            ("metadata.name=a,status.phase!=Failed", "app=x", Ok(true)),
            ("metadata.name==b", "", Ok(false)),
            ("", "app!=x", Ok(false)),
            ("", "none=", Ok(true)),
        ] {
            assert_eq!(selected(&o, fields, labels), want, "{fields} {labels}");
        }
        assert!(selected(&o, "", "app in (x)").is_err());
    }

    #[test]
    fn pods_are_summed_up_as_kubectl_does() {
        for (pod, want) in [
            (
                json!({"spec":{"containers":[{}]},"status":{"phase":"Running","containerStatuses":[{"ready":true,"restartCount":2,"state":{"running":{}}}]}}),
                ("1/1", "Running", 2),
            ),
            (
                json!({"spec":{"containers":[{}]},"status":{"phase":"Running","containerStatuses":[{"state":{"waiting":{"reason":"CrashLoopBackOff"}},"restartCount":5}]}}),
                ("0/1", "CrashLoopBackOff", 5),
            ),
            (
                json!({"spec":{"containers":[{}]},"status":{"phase":"Pending","initContainerStatuses":[{"state":{"running":{}}}],"containerStatuses":[{"state":{"waiting":{"reason":"PodInitializing"}}}]}}),
                ("0/1", "Init:0/1", 0),
            ),
            (json!({"spec":{"containers":[{}]},"status":{"phase":"Failed","reason":"Evicted"}}), ("0/1", "Evicted", 0)),
        ] {
            let (ready, status, restarts) = summary(&pod);
            assert_eq!((ready.as_str(), status.as_str(), restarts), want);
        }
    }
}
