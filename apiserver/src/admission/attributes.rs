//! A request as webhooks get it and as expressions see it.

use std::sync::{Arc, LazyLock};

use isopod_api::{gvk::Gvr, status::Status};
use serde_json::{Map, Value, json};

use super::{Operation, Request, matching::Matched};
use crate::{
    authz::{Attributes, Authorizer},
    cel::{self, Scope, admission::NAMESPACE_METADATA},
};

impl Operation {
    /// Upstream's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
            Self::Connect => "CONNECT",
        }
    }
}

/// The AdmissionRequest without objects and identity.
pub(super) fn attributes(request: &Request<'_>, matched: &Matched) -> Value {
    let kind = |gvk: &isopod_api::gvk::Gvk| json!({"group": gvk.group, "version": gvk.version, "kind": gvk.kind});
    let resource = |gvr: &Gvr| json!({"group": gvr.group, "version": gvr.version, "resource": gvr.resource});
    let mut out = json!({"kind": kind(&matched.gvk), "resource": resource(&matched.gvr)});
    let mut put = |name: &str, text: &str| {
        if !text.is_empty() {
            out[name] = text.into();
        }
    };
    put("subResource", request.subresource);
    put("requestSubResource", request.subresource);
    put("name", request.name);
    put("namespace", request.namespace);
    put("operation", request.operation.name());
    out["requestKind"] = kind(&request.shape.kind());
    out["requestResource"] = resource(request.gvr);
    let mut user = Map::new();
    for (name, text) in [("username", &request.user.name), ("uid", &request.user.uid)] {
        if !text.is_empty() {
            user.insert(name.into(), text.as_str().into());
        }
    }
    if !request.user.groups.is_empty() {
        user.insert("groups".into(), json!(request.user.groups));
    }
    if !request.user.extra.is_empty() {
        user.insert("extra".into(), json!(request.user.extra));
    }
    out["userInfo"] = Value::Object(user);
    out["dryRun"] = request.dry_run.into();
    let mut options = request.options.clone();
    if options.is_object() && options["kind"].is_null() {
        let kind = match request.operation {
            Operation::Create => "CreateOptions",
            Operation::Delete => "DeleteOptions",
            Operation::Update | Operation::Connect => "UpdateOptions",
        };
        options["kind"] = kind.into();
        options["apiVersion"] = "meta.k8s.io/v1".into();
    }
    out["options"] = options;
    out
}

/// Has both objects converted into the matched version, where that takes a webhook.
pub(super) async fn prepare(request: &Request<'_>, matched: &Matched) -> Result<(), Status> {
    let prepared = request.shape.prepare([request.object, request.old], &matched.gvk).await;
    prepared.map_err(|status| Status::internal(status.message))
}

/// Both objects in the matched version.
pub(super) fn objects(request: &Request<'_>, matched: &Matched) -> Result<(Value, Value), Status> {
    let show = |object: &Value| match object.is_null() {
        true => Ok(Value::Null),
        false => request.shape.show(object, &matched.gvk),
    };
    Ok((show(request.object)?, show(request.old)?))
}

static NAMESPACE: LazyLock<Value> = LazyLock::new(|| {
    let time = json!({"type": "string", "format": "date-time"});
    let any = |field: &&str| !field.ends_with("Timestamp");
    let mut metadata: Map<String, Value> =
        NAMESPACE_METADATA.iter().filter(|f| any(f)).map(|f| ((*f).to_owned(), Value::Null)).collect();
    metadata.insert("creationTimestamp".into(), time.clone());
    metadata.insert("deletionTimestamp".into(), time);
    json!({"properties": {
        "metadata": {"properties": metadata},
        "spec": {"properties": {"finalizers": null}},
        "status": {"properties": {"phase": null}},
    }})
});

/// `namespaceObject` of a request; null in cluster scope and for namespaces themselves.
pub(super) fn namespace(request: &Request<'_>) -> Result<Value, Status> {
    if request.namespace.is_empty() || request.is_namespace() {
        return Ok(Value::Null);
    }
    let gvr = Gvr::new("", "v1", "namespaces");
    let found = request.objects.get(&gvr, "", request.namespace);
    Ok(found.ok_or_else(|| Status::not_found(&gvr.group_resource(), request.namespace))?.value())
}

/// The values of one evaluation.
pub(super) fn scope(
    request: &Request<'_>,
    matched: &Matched,
    params: Option<&Value>,
    namespace: &Value,
) -> Result<Scope, Status> {
    let (object, old) = objects(request, matched)?;
    let mut scope = Scope::new();
    scope.set("object", cel::untyped(&object));
    scope.set("oldObject", cel::untyped(&old));
    scope.set("request", cel::untyped(&attributes(request, matched)));
    scope.set("params", cel::untyped(params.unwrap_or(&Value::Null)));
    scope.set("namespaceObject", cel::typed(&NAMESPACE, namespace, false));
    if let Some(authorizer) = request.authorizer {
        ask(&mut scope, request, authorizer);
    }
    Ok(scope)
}

fn ask(scope: &mut Scope, request: &Request<'_>, authorizer: &Arc<dyn Authorizer>) {
    let attributes = Attributes {
        user: request.user.clone(),
        resource_request: true,
        group: request.gvr.group.clone(),
        version: request.gvr.version.clone(),
        resource: request.gvr.resource.clone(),
        subresource: request.subresource.to_owned(),
        namespace: request.namespace.to_owned(),
        name: request.name.to_owned(),
        ..Attributes::default()
    };
    scope.set("authorizer", cel::authorizer(Arc::clone(authorizer), request.user));
    scope.set("authorizer.requestResource", cel::request_resource(Arc::clone(authorizer), attributes));
}
