//! Thin verbs over the network client: typed in, typed out, one request each, no retries.
//!
//! An empty namespace means cluster scope. Updates are merge patches of what changed, guarded by the resourceVersion
//! they were computed from, so a concurrent writer shows as a conflict and never as a lost write.

use crate::merge;
use http::{Method, Request};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

/// Any kind with metadata.
pub trait HasMeta {
    /// The object's metadata.
    fn object_meta(&self) -> &ObjectMeta;
    /// The object's metadata, to change.
    fn object_meta_mut(&mut self) -> &mut ObjectMeta;
    /// `metadata.name`, empty when unset.
    fn name(&self) -> &str {
        self.object_meta().name.as_deref().unwrap_or_default()
    }
    /// `metadata.namespace`, empty for cluster scope.
    fn namespace(&self) -> &str {
        self.object_meta().namespace.as_deref().unwrap_or_default()
    }
    /// `metadata.uid`, empty when unset.
    fn uid(&self) -> &str {
        self.object_meta().uid.as_deref().unwrap_or_default()
    }
    /// Whether deletion was requested.
    fn deleting(&self) -> bool {
        self.object_meta().deletion_timestamp.is_some()
    }
}

impl<T: k8s_openapi::Metadata<Ty = ObjectMeta>> HasMeta for T {
    fn object_meta(&self) -> &ObjectMeta {
        self.metadata()
    }
    fn object_meta_mut(&mut self) -> &mut ObjectMeta {
        self.metadata_mut()
    }
}

/// A typed kind of the API.
pub trait Object:
    kube::Resource<DynamicType = ()>
    + HasMeta
    + Clone
    + Serialize
    + DeserializeOwned
    + std::fmt::Debug
    + Send
    + Sync
    + 'static
{
}

impl<T> Object for T where
    T: kube::Resource<DynamicType = ()>
        + HasMeta
        + Clone
        + Serialize
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static
{
}

/// Options of a delete; the default deletes in the background with the kind's own grace period.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    /// Only when the object still has this UID.
    pub uid: Option<String>,
    /// Only when the object still has this resourceVersion.
    pub resource_version: Option<String>,
    /// Overrides the grace period.
    pub grace_period_seconds: Option<i64>,
    /// `Background`, `Foreground` or `Orphan`.
    pub propagation: Option<&'static str>,
}

impl DeleteOptions {
    /// Deletes only the object with this UID.
    pub fn uid(uid: &str) -> Self {
        Self { uid: Some(uid.to_owned()), ..Self::default() }
    }

    fn body(&self) -> Value {
        let mut body = json!({"apiVersion": "v1", "kind": "DeleteOptions"});
        if self.uid.is_some() || self.resource_version.is_some() {
            let mut pre = json!({});
            if let Some(uid) = &self.uid {
                pre["uid"] = json!(uid);
            }
            if let Some(rv) = &self.resource_version {
                pre["resourceVersion"] = json!(rv);
            }
            body["preconditions"] = pre;
        }
        if let Some(grace) = self.grace_period_seconds {
            body["gracePeriodSeconds"] = json!(grace);
        }
        if let Some(policy) = self.propagation {
            body["propagationPolicy"] = json!(policy);
        }
        body
    }
}

/// A list as the API answers it.
#[derive(Debug, Deserialize)]
pub struct List<T> {
    /// Revision and continuation.
    #[serde(default)]
    pub metadata: ListMeta,
    /// The objects.
    #[serde(default = "Vec::new", deserialize_with = "null_is_empty", bound(deserialize = "T: Deserialize<'de>"))]
    pub items: Vec<T>,
}

/// An empty list of metadata is `null` on the wire.
fn null_is_empty<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(items: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(items)?.unwrap_or_default())
}

/// What a list says about itself.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListMeta {
    /// The revision to watch from.
    pub resource_version: String,
    /// Set when there are more pages.
    #[serde(rename = "continue")]
    pub continue_: String,
}

/// The verbs, under one user agent (which is also the field manager).
#[derive(Clone)]
pub struct Objects {
    client: Client,
    agent: &'static str,
}

/// The path of an object of kind `K`, with an optional subresource.
pub fn path<K: kube::Resource<DynamicType = ()>>(ns: &str, name: &str, sub: &str) -> String {
    let mut path = K::url_path(&(), (!ns.is_empty()).then_some(ns));
    for part in [name, sub] {
        if !part.is_empty() {
            path.push('/');
            path.push_str(part);
        }
    }
    path
}

impl Objects {
    /// Verbs over this client.
    pub fn new(client: Client, agent: &'static str) -> Self {
        Self { client, agent }
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Sends any request with a JSON body and reads the JSON answer.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Vec<u8>,
    ) -> Result<T, kube::Error> {
        let mut request = Request::builder().method(method).uri(path).header(http::header::USER_AGENT, self.agent);
        if !body.is_empty() {
            request = request.header(http::header::CONTENT_TYPE, content_type);
        }
        let request = request.body(body).map_err(kube::Error::HttpError)?;
        self.client.request(request).await
    }

    /// Reads any path.
    pub async fn get_path<T: DeserializeOwned>(&self, path: &str) -> Result<T, kube::Error> {
        self.send(Method::GET, path, "", Vec::new()).await
    }

    /// Reads one object; `None` when there is none.
    pub async fn get<K: Object>(&self, ns: &str, name: &str) -> Result<Option<K>, kube::Error> {
        match self.get_path(&path::<K>(ns, name, "")).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if is_not_found(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates an object (or, with a subresource, posts to it).
    pub async fn create<K: Object>(&self, object: &K) -> Result<K, kube::Error> {
        let body = serde_json::to_vec(object).map_err(kube::Error::SerdeError)?;
        self.send(Method::POST, &path::<K>(object.namespace(), "", ""), "application/json", body).await
    }

    /// Posts a document to a path.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, kube::Error> {
        let body = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
        self.send(Method::POST, path, "application/json", body).await
    }

    /// Puts a document to a path.
    pub async fn put(&self, path: &str, body: &Value) -> Result<Value, kube::Error> {
        let body = serde_json::to_vec(body).map_err(kube::Error::SerdeError)?;
        self.send(Method::PUT, path, "application/json", body).await
    }

    /// Applies a JSON merge patch to a path.
    pub async fn merge_path<T: DeserializeOwned>(&self, path: &str, patch: &Value) -> Result<T, kube::Error> {
        let body = serde_json::to_vec(patch).map_err(kube::Error::SerdeError)?;
        self.send(Method::PATCH, path, "application/merge-patch+json", body).await
    }

    /// Applies a JSON merge patch to an object or its subresource.
    pub async fn merge<K: Object>(&self, ns: &str, name: &str, sub: &str, patch: &Value) -> Result<K, kube::Error> {
        self.merge_path(&path::<K>(ns, name, sub), patch).await
    }

    /// Writes what changed between `old` and `new`; `Ok(None)` when nothing did. Conflicts when `old` is stale.
    pub async fn update<K: Object>(&self, old: &K, new: &K, sub: &str) -> Result<Option<K>, kube::Error> {
        let before = serde_json::to_value(old).map_err(kube::Error::SerdeError)?;
        let after = serde_json::to_value(new).map_err(kube::Error::SerdeError)?;
        let Some(mut patch) = merge::diff(&before, &after) else { return Ok(None) };
        patch["metadata"]["resourceVersion"] = json!(old.object_meta().resource_version);
        self.merge(old.namespace(), old.name(), sub, &patch).await.map(Some)
    }

    /// Deletes an object; `false` when it was already gone.
    pub async fn delete<K: Object>(&self, ns: &str, name: &str, options: &DeleteOptions) -> Result<bool, kube::Error> {
        self.delete_path(&path::<K>(ns, name, ""), options).await
    }

    /// Deletes whatever is at a path; `false` when it was already gone.
    pub async fn delete_path(&self, path: &str, options: &DeleteOptions) -> Result<bool, kube::Error> {
        let body = serde_json::to_vec(&options.body()).map_err(kube::Error::SerdeError)?;
        match self.send::<Value>(Method::DELETE, path, "application/json", body).await {
            Ok(_) => Ok(true),
            Err(error) if is_not_found(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    }
}

fn reason(error: &kube::Error) -> &str {
    match error {
        kube::Error::Api(status) => &status.reason,
        _ => "",
    }
}

/// The server says there is no such object.
pub fn is_not_found(error: &kube::Error) -> bool {
    code(error) == 404
}

/// The object changed since it was read, or a precondition failed.
pub fn is_conflict(error: &kube::Error) -> bool {
    code(error) == 409 && reason(error) != "AlreadyExists"
}

/// The name is taken.
pub fn is_already_exists(error: &kube::Error) -> bool {
    reason(error) == "AlreadyExists"
}

/// The server refuses the object for good.
pub fn is_invalid(error: &kube::Error) -> bool {
    code(error) == 422
}

/// The revision is no longer in the server's history.
pub fn is_expired(error: &kube::Error) -> bool {
    code(error) == 410
}

/// The namespace is being deleted: creating in it is pointless.
pub fn is_namespace_terminating(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => {
            status.details.as_ref().is_some_and(|d| d.causes.iter().any(|c| c.reason == "NamespaceTerminating"))
        }
        _ => false,
    }
}

/// The text a person should read: the server's own message when it answered.
pub fn message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}
