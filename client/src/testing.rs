//! An API server in memory, for tests: enough of create, read, merge patch, delete, binding and watch that controllers
//! and the scheduler can run against it in one process. It validates and defaults nothing.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::sync::watch;

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Answer = Result<Value, (StatusCode, &'static str, String)>;

struct Event {
    revision: u64,
    collection: String,
    namespace: String,
    kind: &'static str,
    object: Value,
}

#[derive(Default)]
struct State {
    revision: u64,
    /// `/api/v1/pods` -> (namespace, name) -> object.
    objects: BTreeMap<String, BTreeMap<(String, String), Value>>,
    log: Vec<Event>,
    requests: Vec<String>,
}

/// The server; clones share it.
#[derive(Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Default for Fake {
    fn default() -> Self {
        Self { state: Arc::default(), changed: Arc::new(watch::Sender::new(0)) }
    }
}

struct Target {
    collection: String,
    namespace: String,
    name: String,
    sub: String,
}

fn target(path: &str) -> Option<Target> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let prefix = if parts.first() == Some(&"api") { 2 } else { 3 };
    let root = parts.get(..prefix)?.join("/");
    let rest = parts.get(prefix..)?;
    let at = |i: usize| rest.get(i).copied().unwrap_or_default().to_owned();
    let (namespace, shift) =
        if rest.first() == Some(&"namespaces") && rest.len() > 2 && !matches!(rest[2], "status" | "finalize") {
            (at(1), 2)
        } else {
            (String::new(), 0)
        };
    let resource = at(shift);
    (!resource.is_empty()).then(|| Target {
        collection: format!("/{root}/{resource}"),
        namespace,
        name: at(shift + 1),
        sub: at(shift + 2),
    })
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(object) = target {
        for (key, value) in patch {
            if value.is_null() {
                object.remove(key);
            } else {
                merge(object.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

impl Fake {
    /// A client of this server.
    pub fn client(&self) -> kube::Client {
        let fake = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let fake = fake.clone();
            async move { Ok::<_, Infallible>(fake.serve(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// One object, as stored.
    pub fn get(&self, collection: &str, namespace: &str, name: &str) -> Option<Value> {
        let state = self.state.lock();
        state.objects.get(collection)?.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All objects of a collection such as `/api/v1/pods`.
    pub fn list(&self, collection: &str) -> Vec<Value> {
        self.state.lock().objects.get(collection).map(|all| all.values().cloned().collect()).unwrap_or_default()
    }

    /// Creates an object; its path comes from the collection and its own metadata.
    pub fn create(&self, collection: &str, object: Value) -> Value {
        let namespace = text(&object, "/metadata/namespace").to_owned();
        let target = Target { collection: collection.to_owned(), namespace, name: String::new(), sub: String::new() };
        self.post(&target, object).unwrap_or_else(|error| json!({"failed": error.2}))
    }

    /// Merges a patch into an object, status included.
    pub fn patch(&self, collection: &str, namespace: &str, name: &str, patch: &Value) {
        let mut state = self.state.lock();
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(mut object) = state.objects.get(collection).and_then(|all| all.get(&key)).cloned() {
            merge(&mut object, patch);
            self.store(&mut state, collection, key, object, "MODIFIED");
        }
    }

    /// Deletes an object as a client would.
    pub fn delete(&self, collection: &str, namespace: &str, name: &str) {
        let target = Target {
            collection: collection.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sub: String::new(),
        };
        let _ = self.remove(&target, &Value::Null);
    }

    /// `METHOD path` of every write so far.
    pub fn writes(&self) -> Vec<String> {
        self.state.lock().requests.clone()
    }

    /// Waits until `check` gives something, at most ten seconds; `None` then.
    pub async fn until<T>(&self, mut check: impl FnMut(&Self) -> Option<T>) -> Option<T> {
        let mut changed = self.changed.subscribe();
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            changed.borrow_and_update();
            if let Some(found) = check(self) {
                return Some(found);
            }
            tokio::time::timeout_at(deadline, changed.changed()).await.ok()?.ok()?;
        }
    }

    fn store(&self, state: &mut State, collection: &str, key: (String, String), mut object: Value, kind: &'static str) {
        state.revision += 1;
        let revision = state.revision;
        object["metadata"]["resourceVersion"] = json!(revision.to_string());
        let all = state.objects.entry(collection.to_owned()).or_default();
        if kind == "DELETED" {
            all.remove(&key);
        } else {
            all.insert(key.clone(), object.clone());
        }
        state.log.push(Event { revision, collection: collection.to_owned(), namespace: key.0, kind, object });
        self.changed.send_replace(revision);
    }

    async fn serve(&self, request: Request<kube::client::Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map(|b| b.to_bytes()).unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let query: BTreeMap<String, String> = parts
            .uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        let path = parts.uri.path();
        if parts.method != Method::GET {
            self.state.lock().requests.push(format!("{} {path}", parts.method));
        }
        let Some(target) = target(path) else { return answer(Err(not_found(path))) };
        if query.contains_key("watch") {
            return self.watch(target, &query);
        }
        answer(match parts.method {
            Method::GET => self.read(&target),
            Method::POST => self.post(&target, body),
            Method::PATCH => self.change(&target, |object| merge(object, &body), &body),
            Method::PUT => self.change(&target, |object| *object = body.clone(), &body),
            Method::DELETE => self.remove(&target, &body),
            _ => Err(not_found(path)),
        })
    }

    fn read(&self, target: &Target) -> Answer {
        let state = self.state.lock();
        let all = state.objects.get(&target.collection);
        if target.name.is_empty() {
            let items: Vec<&Value> = all
                .iter()
                .flat_map(|all| all.iter())
                .filter(|((ns, _), _)| target.namespace.is_empty() || *ns == target.namespace)
                .map(|(_, object)| object)
                .collect();
            return Ok(json!({"metadata": {"resourceVersion": state.revision.to_string()}, "items": items}));
        }
        let key = (target.namespace.clone(), target.name.clone());
        all.and_then(|all| all.get(&key)).cloned().ok_or_else(|| not_found(&target.name))
    }

    fn post(&self, target: &Target, mut object: Value) -> Answer {
        if target.sub == "binding" {
            let node = object["target"]["name"].clone();
            return self.change(target, |pod| pod["spec"]["nodeName"] = node.clone(), &Value::Null);
        }
        let mut state = self.state.lock();
        let mut name = text(&object, "/metadata/name").to_owned();
        if name.is_empty() {
            name = format!("{}{:05x}", text(&object, "/metadata/generateName"), state.revision);
        }
        let key = (target.namespace.clone(), name.clone());
        if state.objects.get(&target.collection).is_some_and(|all| all.contains_key(&key)) {
            return Err((StatusCode::CONFLICT, "AlreadyExists", format!("{name} already exists")));
        }
        let meta = &mut object["metadata"];
        meta["name"] = json!(name);
        if !target.namespace.is_empty() {
            meta["namespace"] = json!(target.namespace);
        }
        if meta["uid"].is_null() {
            meta["uid"] = json!(uuid::Uuid::new_v4().to_string());
        }
        if meta["creationTimestamp"].is_null() {
            meta["creationTimestamp"] = json!(jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        }
        meta["generation"] = json!(1);
        self.store(&mut state, &target.collection, key.clone(), object, "ADDED");
        state.objects[&target.collection].get(&key).cloned().ok_or_else(|| not_found(&name))
    }

    fn change(&self, target: &Target, change: impl Fn(&mut Value), body: &Value) -> Answer {
        let mut state = self.state.lock();
        let key = (target.namespace.clone(), target.name.clone());
        let old = state.objects.get(&target.collection).and_then(|all| all.get(&key)).cloned();
        let old = old.ok_or_else(|| not_found(&target.name))?;
        let wanted = text(body, "/metadata/resourceVersion");
        if !wanted.is_empty() && wanted != text(&old, "/metadata/resourceVersion") {
            return Err((StatusCode::CONFLICT, "Conflict", "the object has been modified".into()));
        }
        let mut new = old.clone();
        change(&mut new);
        match target.sub.as_str() {
            "status" => {
                let status = new["status"].take();
                new = old.clone();
                new["status"] = status;
            }
            "" => {
                if old.get("status").is_some() || new.get("status").is_some() {
                    new["status"] = old["status"].clone();
                }
                if new["spec"] != old["spec"] {
                    let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
                    new["metadata"]["generation"] = json!(generation);
                }
            }
            _ => {}
        }
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
        if new == old {
            return Ok(old);
        }
        let finalizers = new["metadata"]["finalizers"].as_array().map_or(0, Vec::len);
        let dying = !new["metadata"]["deletionTimestamp"].is_null();
        let kind = if dying && finalizers == 0 { "DELETED" } else { "MODIFIED" };
        self.store(&mut state, &target.collection, key, new.clone(), kind);
        Ok(new)
    }

    fn remove(&self, target: &Target, options: &Value) -> Answer {
        let mut state = self.state.lock();
        let names: Vec<(String, String)> = match state.objects.get(&target.collection) {
            Some(all) if target.name.is_empty() => {
                all.keys().filter(|(ns, _)| *ns == target.namespace).cloned().collect()
            }
            _ => vec![(target.namespace.clone(), target.name.clone())],
        };
        for key in names {
            let found = state.objects.get(&target.collection).and_then(|all| all.get(&key)).cloned();
            let Some(mut object) = found else { return Err(not_found(&key.1)) };
            let uid = text(options, "/preconditions/uid");
            if !uid.is_empty() && uid != text(&object, "/metadata/uid") {
                return Err((StatusCode::CONFLICT, "Conflict", "the UID does not match".into()));
            }
            let policy = text(options, "/propagationPolicy");
            let meta = &mut object["metadata"];
            let extra = match policy {
                "Foreground" => Some("foregroundDeletion"),
                "Orphan" => Some("orphan"),
                _ => None,
            };
            if let Some(extra) = extra {
                let mut list = meta["finalizers"].as_array().cloned().unwrap_or_default();
                list.push(json!(extra));
                meta["finalizers"] = json!(list);
            }
            if meta["finalizers"].as_array().is_some_and(|list| !list.is_empty()) {
                if meta["deletionTimestamp"].is_null() {
                    meta["deletionTimestamp"] =
                        json!(jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
                }
                self.store(&mut state, &target.collection, key, object, "MODIFIED");
            } else {
                self.store(&mut state, &target.collection, key, object, "DELETED");
            }
        }
        Ok(json!({"kind": "Status", "status": "Success"}))
    }

    fn watch(&self, target: Target, query: &BTreeMap<String, String>) -> Response<Body> {
        let from: u64 = query.get("resourceVersion").and_then(|rv| rv.parse().ok()).unwrap_or(0);
        let fake = self.clone();
        let changed = self.changed.subscribe();
        let stream = futures::stream::unfold((from, changed), move |(from, mut changed)| {
            let (fake, collection, namespace) = (fake.clone(), target.collection.clone(), target.namespace.clone());
            async move {
                loop {
                    changed.borrow_and_update();
                    let next = fake.next_event(&collection, &namespace, from);
                    if let Some((revision, line)) = next {
                        return Some((Ok(Frame::data(Bytes::from(line))), (revision, changed)));
                    }
                    changed.changed().await.ok()?;
                }
            }
        });
        Response::new(StreamBody::new(stream).boxed_unsync())
    }

    fn next_event(&self, collection: &str, namespace: &str, from: u64) -> Option<(u64, String)> {
        let state = self.state.lock();
        let start = state.log.partition_point(|event| event.revision <= from);
        let event = state.log[start..]
            .iter()
            .find(|e| e.collection == collection && (namespace.is_empty() || e.namespace == namespace))?;
        Some((event.revision, format!("{}\n", json!({"type": event.kind, "object": event.object}))))
    }
}

fn not_found(name: &str) -> (StatusCode, &'static str, String) {
    (StatusCode::NOT_FOUND, "NotFound", format!("{name} not found"))
}

fn answer(result: Answer) -> Response<Body> {
    let (code, body) = match result {
        Ok(body) => (StatusCode::OK, body),
        Err((code, reason, message)) => (
            code,
            json!({"kind": "Status", "status": "Failure", "code": code.as_u16(), "reason": reason, "message": message}),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())).boxed_unsync());
    *response.status_mut() = code;
    response
}
