//! TokenRequest, TokenReview and SelfSubjectReview.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    field::{Error as FieldError, Path},
    gvk::{GroupKind, GroupResource, Gvr},
    meta,
    status::Status,
};
use serde_json::{Map, Value, json};

use super::{Create, CreateRequest};
use crate::{
    authn::{
        TokenAuthenticator, UserInfo,
        serviceaccount::{Issuer, Kubernetes, Reference},
    },
    objects::Objects,
};

/// Lifetime of a token when none is asked for.
const DEFAULT_SECONDS: i64 = 3600;
/// What the service account volume asks for: such tokens live for a year behind the client's back, so that clients that
/// never read the file again go on working.
const VOLUME_SECONDS: i64 = 3607;
const YEAR: i64 = 365 * 24 * 3600;

/// `serviceaccounts/token`.
pub(super) struct TokenRequest {
    pub(super) issuer: Option<Issuer>,
}

impl Create for TokenRequest {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move { self.answer(request) })
    }
}

/// What a token is bound to.
#[derive(Default)]
struct Bound {
    node: Option<Reference>,
    pod: Option<Reference>,
    secret: Option<Reference>,
}

fn reference(value: &Value) -> Reference {
    Reference { name: meta::name(value).to_owned(), uid: meta::uid(value).to_owned() }
}

fn fetch(objects: &dyn Objects, resource: &str, namespace: &str, name: &str) -> Result<Value, Status> {
    let gvr = Gvr::new("", "v1", resource);
    let found = objects.get(&gvr, namespace, name).map(|object| object.value());
    found.ok_or_else(|| Status::not_found(&gvr.group_resource(), name))
}

/// Looks up the object the token shall be bound to; the UID in the request, when there is one, has to match.
fn bind(request: &CreateRequest<'_>, account: &str) -> Result<Bound, Status> {
    let wanted = &request.object["spec"]["boundObjectRef"];
    if !wanted.is_object() {
        return Ok(Bound::default());
    }
    let text = |field: &str| wanted[field].as_str().unwrap_or_default();
    let (kind, version, name) = (text("kind"), text("apiVersion"), text("name"));
    let objects = &*request.objects;
    let mut bound = Bound::default();
    let (resource, object) = match (version, kind) {
        ("v1", "Pod") => {
            let pod = fetch(objects, "pods", request.namespace, name)?;
            let runs_as = pod["spec"]["serviceAccountName"].as_str().unwrap_or_default();
            if runs_as != account {
                let message = format!(
                    "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
                );
                return Err(Status::bad_request(message));
            }
            if let Some(node) = pod["spec"]["nodeName"].as_str() {
                let uid = fetch(objects, "nodes", "", node).map(|node| meta::uid(&node).to_owned()).unwrap_or_default();
                bound.node = Some(Reference { name: node.to_owned(), uid });
            }
            bound.pod = Some(reference(&pod));
            ("pods", pod)
        }
        ("v1", "Node") => {
            let node = fetch(objects, "nodes", "", name)?;
            bound.node = Some(reference(&node));
            ("nodes", node)
        }
        ("v1", "Secret") => {
            let secret = fetch(objects, "secrets", request.namespace, name)?;
            bound.secret = Some(reference(&secret));
            ("secrets", secret)
        }
        _ => {
            let message = format!("cannot bind token to object of type {version}, Kind={kind}");
            return Err(Status::bad_request(message));
        }
    };
    let (expected, actual) = (text("uid"), meta::uid(&object));
    if !expected.is_empty() && expected != actual {
        let message = format!(
            "the UID in the bound object reference ({expected}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict(&GroupResource::new("", resource), name, message));
    }
    Ok(bound)
}

impl TokenRequest {
    fn answer(&self, request: CreateRequest<'_>) -> Result<Value, Status> {
        let issuer = self.issuer.as_ref().ok_or_else(|| Status::internal("no signing key"))?;
        let kind = GroupKind::new("authentication.k8s.io", "TokenRequest");
        let own = meta::name(&request.object);
        if !own.is_empty() && own != request.name {
            let path = Path::new("metadata").child("name");
            let error = FieldError::invalid(&path, own, "must match the service account name if specified");
            return Err(Status::invalid(&kind, request.name, vec![error]));
        }
        let account = fetch(&*request.objects, "serviceaccounts", request.namespace, request.name)?;
        let spec = &request.object["spec"];
        let seconds = spec["expirationSeconds"].as_i64().unwrap_or(DEFAULT_SECONDS);
        let path = Path::new("spec").child("expirationSeconds");
        let mut errors = Vec::new();
        if seconds < 600 {
            errors.push(FieldError::invalid(&path, seconds, "may not specify a duration less than 10 minutes"));
        }
        if seconds > 1 << 32 {
            errors.push(FieldError::invalid(&path, seconds, "may not specify a duration larger than 2^32 seconds"));
        }
        if !errors.is_empty() {
            return Err(Status::invalid(&kind, "", errors));
        }
        let bound = bind(&request, request.name)?;
        let mut audiences: Vec<String> =
            spec["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        if audiences.is_empty() {
            audiences.push(issuer.name().to_owned());
        }
        let now = jiff::Timestamp::now();
        let for_server = audiences.len() == 1 && audiences[0] == issuer.name();
        let extended = seconds == VOLUME_SECONDS && bound.pod.is_some() && for_server;
        let kubernetes = Kubernetes {
            namespace: request.namespace.to_owned(),
            node: bound.node,
            pod: bound.pod,
            secret: bound.secret,
            serviceaccount: reference(&account),
            warnafter: extended.then(|| now.as_second() + seconds),
        };
        let lifetime = if extended { YEAR } else { seconds };
        let token = issuer.issue(kubernetes, audiences.clone(), lifetime).map_err(Status::internal)?;
        let end = now.checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(now);
        let mut answer = request.object;
        answer["apiVersion"] = "authentication.k8s.io/v1".into();
        answer["kind"] = "TokenRequest".into();
        meta::set_name(&mut answer, request.name);
        meta::set_namespace(&mut answer, request.namespace);
        meta::set_creation_timestamp(&mut answer, &meta::time(now));
        answer["spec"]["audiences"] = audiences.into();
        answer["spec"]["expirationSeconds"] = seconds.into();
        if answer["spec"].get("boundObjectRef").is_none() {
            answer["spec"]["boundObjectRef"] = Value::Null;
        }
        answer["status"] = json!({ "token": token, "expirationTimestamp": meta::time(end) });
        Ok(answer)
    }
}

/// A user as the authentication API writes it.
fn user_info(user: &UserInfo) -> Value {
    let mut map = Map::new();
    map.insert("username".into(), user.name.clone().into());
    if !user.uid.is_empty() {
        map.insert("uid".into(), user.uid.clone().into());
    }
    if !user.groups.is_empty() {
        map.insert("groups".into(), user.groups.clone().into());
    }
    if !user.extra.is_empty() {
        map.insert("extra".into(), json!(user.extra));
    }
    Value::Object(map)
}

/// `tokenreviews`.
pub(super) struct TokenReview {
    pub(super) tokens: Arc<dyn TokenAuthenticator>,
    pub(super) issuer: String,
}

impl Create for TokenReview {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let mut answer = request.object;
            let token = answer["spec"]["token"].as_str().unwrap_or_default().to_owned();
            if token.is_empty() {
                return Err(Status::bad_request("token is required for TokenReview in authentication"));
            }
            let asked = answer["spec"]["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let mut audiences: Vec<String> = asked.map(str::to_owned).collect();
            if audiences.is_empty() {
                audiences.push(self.issuer.clone());
            }
            answer["status"] = match self.tokens.authenticate(&token, &audiences) {
                Ok(Some(mut identity)) => {
                    identity.user.groups.push(crate::authn::ALL_AUTHENTICATED.to_owned());
                    let audiences = if identity.audiences.is_empty() { audiences } else { identity.audiences };
                    json!({ "authenticated": true, "user": user_info(&identity.user), "audiences": audiences })
                }
                Ok(None) => json!({ "user": {}, "error": "[invalid bearer token]" }),
                Err(error) => json!({ "user": {}, "error": format!("[invalid bearer token, {error}]") }),
            };
            Ok(answer)
        })
    }
}

/// `selfsubjectreviews`.
pub(super) struct SelfSubjectReview;

impl Create for SelfSubjectReview {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            Ok(json!({
                "kind": "SelfSubjectReview",
                "apiVersion": request.gvr.api_version(),
                "metadata": { "creationTimestamp": meta::now() },
                "status": { "userInfo": user_info(request.user) },
            }))
        })
    }
}
