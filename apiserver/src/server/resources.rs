//! Routing of resource requests: from verb and path to the registry or an endpoint.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, header};
use isopod_api::{
    gvk::{Gvk, Gvr},
    protobuf,
    status::Status,
};
use serde_json::{Value, json};

use super::{
    App,
    handle::{Call, header_text},
    limits,
    negotiate::{Binary, Media, Transform, negotiate, no_stream},
    query::Query,
    request::RequestInfo,
    respond::{self, Style},
};
use crate::{
    cache::Object,
    endpoints::{
        Body, ConnectRequest, CreateRequest,
        socket::{self, Framing},
    },
    kinds,
    objects::Objects,
    registry::{
        Missing, PatchKind, PatchRequest, Resource, Rules, Selection, Target, WatchRequest, WriteOptions, Writer,
        check_name, decode_object, delete_options, list, scale, watch,
    },
    render::{self, Rendering},
};

/// Answers a request about a resource.
pub(super) async fn answer(app: &Arc<App>, mut call: Call<'_>) -> Result<Response<Body>, Status> {
    let info = &call.info;
    let gvr = Gvr::new(&info.group, &info.version, &info.resource);
    let Some(resource) = app.registry.resource(&gvr) else {
        return match app.registry.versions(&info.group) {
            Some(_) => Err(Status::no_route()),
            None => Ok(respond::page_not_found()),
        };
    };
    if info.namespaced && !resource.info.namespaced {
        return if resource.custom.is_some() { Ok(respond::page_not_found()) } else { Err(Status::no_route()) };
    }
    let key = (gvr, info.subresource.clone());
    if !info.subresource.is_empty() && !app.endpoints.connects.contains_key(&key) {
        let known = resource.info.subresource(&info.subresource).is_some();
        if !known && resource.custom.is_some() {
            return Err(Status::not_found(&resource.group_resource(), &info.name));
        }
        if !known || !info.rest.is_empty() {
            return Err(Status::no_route());
        }
    }
    let method = call.parts.method.clone();
    if let Some(status) = terminating(&resource, &call.info.verb) {
        return Err(status);
    }
    check_method(&resource, &call, &method)?;
    // Only reads that name a revision are content with less than the newest.
    let reads = matches!(&*info.verb, "get" | "list" | "watch");
    if !reads || call.query.text("resourceVersion").is_empty() {
        let caught_up = app.registry.cache().catch_up().await;
        caught_up.map_err(|error| Status::internal(error.to_string()))?;
    }
    if let Some(connect) = app.endpoints.connects.get(&key) {
        if info.subresource != "proxy" && !info.rest.is_empty() {
            return Err(Status::no_route());
        }
        if let Some(options) = connect_options(&resource, info, &call.query) {
            app.registry.admit_connect(&resource, info, options, &call.user).await?;
        }
        let body = call.body.take().ok_or_else(|| Status::internal("the body is gone"))?;
        let request = ConnectRequest {
            gvr: key.0,
            subresource: key.1,
            namespace: info.namespace.clone(),
            name: info.name.clone(),
            path: if info.rest.is_empty() { "/".into() } else { info.rest.clone() },
            user: call.user,
            request: Request::from_parts(call.parts, body),
            objects: Arc::clone(&app.registry) as Arc<dyn Objects>,
        };
        return connect.connect(request).await;
    }
    let watchable = matches!(&*info.verb, "list" | "watch");
    let body = body_kind(&resource, &info.subresource);
    let binary = if protobuf::supported(&body) { Binary::Served } else { Binary::MetadataOnly };
    call.style.accepted = negotiate(header_text(&call.parts, header::ACCEPT), watchable, binary)?;
    call.style.pretty |= call.style.accepted.pretty;
    let custom = resource.custom.as_ref();
    let deprecation =
        crate::kinds::deprecation(&resource.gvr).or_else(|| custom.and_then(|c| c.version.deprecation.clone()));
    let style = call.style;
    let answer = match &*info.verb {
        "get" => get(app, &resource, call).await,
        "list" => list_objects(app, &resource, call).await,
        "watch" => watch_objects(app, &resource, call).await,
        "create" => create(app, &resource, call).await,
        "update" => update(app, &resource, call).await,
        "patch" => patch(app, &resource, call).await,
        "delete" | "deletecollection" => delete(app, &resource, call).await,
        _ => Err(Status::method_not_allowed()),
    };
    let Some(deprecation) = deprecation else { return answer };
    let mut response = answer.unwrap_or_else(|status| respond::status(style, &status));
    // It comes before what the request itself is warned of.
    let headers = response.headers_mut();
    let others: Vec<_> = headers.get_all(header::WARNING).iter().cloned().collect();
    headers.remove(header::WARNING);
    respond::add_warnings(headers, &[deprecation]);
    for other in others {
        headers.append(header::WARNING, other);
    }
    Ok(response)
}

/// The options of a connection as an object; `None` for logs, which are read.
fn connect_options(resource: &Resource, info: &RequestInfo, query: &Query) -> Option<Value> {
    let kind = resource.info.subresource(&info.subresource)?.kind.as_str();
    let mut options = json!({"kind": kind, "apiVersion": "v1"});
    let flags = ["stdin", "stdout", "stderr", "tty"].into_iter().filter(|f| query.flag(f));
    match kind {
        "PodExecOptions" | "PodAttachOptions" => {
            for flag in flags {
                options[flag] = true.into();
            }
            if query.has("container") {
                options["container"] = query.text("container").into();
            }
            if kind == "PodExecOptions" {
                options["command"] = json!(query.all("command"));
            }
        }
        "PodPortForwardOptions" => {
            let ports: Vec<i64> = query.all("ports").iter().filter_map(|p| p.parse().ok()).collect();
            if !ports.is_empty() {
                options["ports"] = json!(ports);
            }
        }
        "PodProxyOptions" | "ServiceProxyOptions" | "NodeProxyOptions" => {
            options["path"] = info.rest.as_str().into();
        }
        _ => return None,
    }
    Some(options)
}

/// While a definition goes, its objects can only be read and deleted.
fn terminating(resource: &Resource, verb: &str) -> Option<Status> {
    let definition = &resource.custom.as_ref()?.definition;
    if !definition.terminating || verb != "create" {
        return None;
    }
    let mut status = Status::method_not_supported(&resource.group_resource(), verb);
    status.message = format!("{verb} not allowed while custom resource definition is terminating");
    Some(status)
}

/// Refuses verbs a path does not have.
fn check_method(resource: &Resource, call: &Call<'_>, method: &Method) -> Result<(), Status> {
    let info = &call.info;
    let refuse = || Err(Status::method_not_allowed());
    // What stands behind a proxy decides for itself.
    if info.subresource == "proxy" && matches!(*method, Method::HEAD | Method::OPTIONS) {
        return if resource.offers("proxy", "get") { Ok(()) } else { refuse() };
    }
    if info.verb.is_empty() || *method == Method::HEAD {
        return refuse();
    }
    if !info.subresource.is_empty() {
        return if resource.offers(&info.subresource, &info.verb) { Ok(()) } else { refuse() };
    }
    let collection = info.is_collection();
    let everywhere = collection && resource.info.namespaced && !info.namespaced;
    let allowed = match &*info.verb {
        "create" => collection && !everywhere,
        "deletecollection" => !everywhere,
        "update" | "patch" => !collection,
        _ => true,
    };
    if allowed && resource.offers("", &info.verb) { Ok(()) } else { refuse() }
}

fn rendering(call: &Call<'_>, resource: &Resource) -> Result<Rendering, Status> {
    let list = call.info.is_collection() && matches!(&*call.info.verb, "list" | "deletecollection");
    if let Some(asked) = call.style.accepted.list.filter(|asked| *asked != list && call.info.verb != "watch") {
        let package = match resource.gvk.group.as_str() {
            "" => "core",
            group => group.split('.').next().unwrap_or(group),
        };
        let kind = &resource.gvk.kind;
        return Err(Status::not_acceptable(match asked {
            true => format!(
                "you requested PartialObjectMetadataList, but the requested object is not a list (*{package}.{kind})"
            ),
            false => format!(
                "you requested PartialObjectMetadata, but the requested object is a list (*{package}.{kind}List)"
            ),
        }));
    }
    Rendering::new(call.style.accepted.transform, &call.query)
}

async fn get(app: &App, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let rendering = rendering(&call, resource)?;
    let info = &call.info;
    if !matches!(&*info.subresource, "" | "status" | "scale" | "approval" | "ephemeralcontainers" | "resize") {
        return Err(Status::service_unavailable(format!("{} is not served here", info.subresource)));
    }
    let object = match component(app, resource, &info.name).await? {
        Some(component) => component,
        None => app.registry.get_object(resource, &info.namespace, &info.name, &call.query).await?,
    };
    if info.subresource == "scale" {
        let scale = render::scale(&scale::seen(resource, &resource.value(&object)), rendering);
        return Ok(respond::value(call.style, 200, &scale));
    }
    Ok(respond::json(call.style, 200, render::one(resource, &object, rendering, true)))
}

/// Whether this is the one kind that is looked up instead of stored.
fn observed(resource: &Resource) -> bool {
    resource.gvr.group.is_empty() && resource.gvr.resource == "componentstatuses"
}

async fn components(app: &App, resource: &Resource) -> Result<Vec<Arc<Object>>, Status> {
    let mut all = Vec::new();
    for component in kinds::components::observed(&*app.registry, jiff::Timestamp::now()) {
        all.push(Arc::new(resource.draft(component).await?.finish_unstored()));
    }
    Ok(all)
}

async fn component(app: &App, resource: &Resource, name: &str) -> Result<Option<Arc<Object>>, Status> {
    if !observed(resource) {
        return Ok(None);
    }
    let found = components(app, resource).await?.into_iter().find(|component| &*component.name == name);
    found.map(Some).ok_or_else(|| Status::not_found(&resource.group_resource(), name))
}

async fn list_objects(app: &App, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let rendering = rendering(&call, resource)?;
    let selection = Selection::parse(resource, &call.info.namespace, "", &call.query)?;
    if resource.store.is_none() {
        let mut objects = if observed(resource) { components(app, resource).await? } else { Vec::new() };
        objects.retain(|object| selection.matches(object));
        return Ok(render::list(resource, objects, false, json!({}), rendering, call.style).await);
    }
    let mut listing = list(resource, &selection, &call.query).await?;
    if let Some(rank) = resource.strategy.row_rank().filter(|_| matches!(rendering.transform, Transform::Table(_))) {
        listing.objects.sort_by_cached_key(|object| rank(&resource.value(object)));
    }
    let metadata = render::list_metadata(listing.revision, listing.next.as_deref(), listing.remaining);
    Ok(render::list(resource, listing.objects, true, metadata, rendering, call.style).await)
}

async fn watch_objects(app: &App, resource: &Arc<Resource>, mut call: Call<'_>) -> Result<Response<Body>, Status> {
    let rendering = rendering(&call, resource)?;
    let info = &call.info;
    let selection = Selection::parse(resource, &info.namespace, &info.name, &call.query)?;
    let media = call.style.accepted.media;
    if media == Media::Yaml {
        return Err(no_stream());
    }
    let request = WatchRequest { selection, rendering, binary: media == Media::Protobuf, stop: app.stop.clone() };
    let framing = if request.binary { Framing::Prefixed } else { Framing::Lines };
    let socket = socket::for_watch(&mut call.parts.headers, &mut call.parts.extensions, framing)?;
    let body = watch(resource, &call.query, request).await?;
    if let Some(socket) = socket {
        return socket.send(body);
    }
    let mut response = Response::new(body);
    let content_type = header::HeaderValue::from_static(media.stream_type());
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    Ok(response)
}

/// What every write needs from its request.
struct Input<'c> {
    writer: Writer<'c>,
    content_type: Option<String>,
}

fn input<'c>(call: &'c Call<'_>, kind: &str, apply: bool) -> Result<Input<'c>, Status> {
    let agent = header_text(&call.parts, header::USER_AGENT).unwrap_or("");
    let options = WriteOptions::read(&call.query, agent, kind, apply)?;
    let content_type = header_text(&call.parts, header::CONTENT_TYPE).map(str::to_owned);
    Ok(Input { writer: Writer { user: &call.user, options, admission: true, warnings: Vec::new() }, content_type })
}

fn finish(style: Style, code: u16, bytes: Bytes, warnings: &[String]) -> Response<Body> {
    let mut response = respond::json(style, code, bytes);
    respond::add_warnings(response.headers_mut(), warnings);
    response
}

/// An error of a write still carries the warnings seen so far.
fn failed(style: Style, status: &Status, warnings: &[String]) -> Response<Body> {
    let mut response = respond::status(style, status);
    respond::add_warnings(response.headers_mut(), warnings);
    response
}

/// The kind a (sub)resource's bodies are of.
fn body_kind(resource: &Resource, subresource: &str) -> Gvk {
    match resource.info.subresource(subresource) {
        None => resource.gvk.clone(),
        Some(sub) => match &sub.kind_gv {
            Some(version) => Gvk::from_api_version(version, &sub.kind),
            None => Gvk::new(&resource.gvk.group, &resource.gvk.version, &sub.kind),
        },
    }
}

async fn create(app: &Arc<App>, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let body = limits::read_body(call.body).await?;
    let style = call.style;
    if let Some(custom) = &resource.custom {
        custom.definition.settled().await;
    }
    let Input { mut writer, content_type } = input(&call, "CreateOptions", false)?;
    let info = &call.info;
    let gvk = body_kind(resource, &info.subresource);
    let validation = writer.options.validation;
    let object = decode_object(resource, &gvk, &body, content_type.as_deref(), validation, &mut writer.warnings)?;
    let endpoint = app.endpoints.creates.get(&(resource.gvr.clone(), info.subresource.clone()));
    let result = match endpoint {
        Some(endpoint) => {
            let object = app.registry.admit_create(resource, info, &gvk, object, &mut writer).await?;
            let request = CreateRequest {
                gvr: &resource.gvr,
                namespace: &info.namespace,
                name: &info.name,
                user: &call.user,
                object,
                dry_run: writer.options.dry_run,
                objects: Arc::clone(&app.registry) as Arc<dyn Objects>,
            };
            endpoint.create(request).await.map(|v| serde_json::to_vec(&v).unwrap_or_default().into())
        }
        None if !info.subresource.is_empty() => Err(Status::method_not_allowed()),
        None => {
            let rendering = rendering(&call, resource)?;
            let created = app.registry.create_object(resource, &info.namespace, object, &mut writer).await;
            created.map(|object| render::one(resource, &object, rendering, true))
        }
    };
    Ok(match result {
        Ok(bytes) => finish(style, 201, bytes, &writer.warnings),
        Err(status) => failed(style, &status, &writer.warnings),
    })
}

fn target<'c>(resource: &'c Arc<Resource>, call: &'c Call<'_>) -> Target<'c> {
    let info = &call.info;
    Target { resource, namespace: &info.namespace, name: &info.name, subresource: &info.subresource }
}

async fn update(app: &App, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let body = limits::read_body(call.body).await?;
    let Input { mut writer, content_type } = input(&call, "UpdateOptions", false)?;
    let rendering = rendering(&call, resource)?;
    let target = target(resource, &call);
    let gvk = body_kind(resource, target.subresource);
    let validation = writer.options.validation;
    let object = decode_object(resource, &gvk, &body, content_type.as_deref(), validation, &mut writer.warnings)?;
    // What does not fit the path is refused whether there is an object or not.
    if let Err(status) = check_name(&object, target.name) {
        return Ok(failed(call.style, &status, &writer.warnings));
    }
    let creates = target.subresource.is_empty() && resource.strategy.allow_create_on_update();
    let rules = Rules { missing: if creates { Missing::Create } else { Missing::Fail }, ..Rules::PUT };
    let outcome = if target.subresource == "scale" {
        let edit = |current: &Value, _: &mut Vec<String>| scale::put_back(resource, current, &object, target.name);
        app.registry.update_object(target, &edit, rules, &mut writer).await
    } else {
        let edit = |_: &Value, _: &mut Vec<String>| Ok(object.clone());
        app.registry.update_object(target, &edit, rules, &mut writer).await
    };
    Ok(match outcome {
        Ok(outcome) => {
            let code = if outcome.created { 201 } else { 200 };
            finish(call.style, code, answer_bytes(resource, &call, &outcome.object, rendering), &writer.warnings)
        }
        Err(status) => failed(call.style, &status, &writer.warnings),
    })
}

fn answer_bytes(resource: &Resource, call: &Call<'_>, object: &Object, rendering: Rendering) -> Bytes {
    match call.info.subresource.as_str() {
        "scale" => {
            let scale = render::scale(&scale::seen(resource, &resource.value(object)), rendering);
            serde_json::to_vec(&scale).unwrap_or_default().into()
        }
        _ => render::one(resource, object, rendering, true),
    }
}

async fn patch(app: &App, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let kind = PatchKind::parse(header_text(&call.parts, header::CONTENT_TYPE), resource.custom.is_some())?;
    let body = limits::read_body(call.body).await?;
    let Input { mut writer, .. } = input(&call, "PatchOptions", kind == PatchKind::Apply)?;
    let rendering = rendering(&call, resource)?;
    let request = PatchRequest { target: target(resource, &call), kind, body: &body };
    Ok(match app.registry.patch_object(request, &mut writer).await {
        Ok(outcome) => {
            let code = if outcome.created { 201 } else { 200 };
            finish(call.style, code, answer_bytes(resource, &call, &outcome.object, rendering), &writer.warnings)
        }
        Err(status) => failed(call.style, &status, &writer.warnings),
    })
}

async fn delete(app: &App, resource: &Arc<Resource>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let body = limits::read_body(call.body).await?;
    let content_type = header_text(&call.parts, header::CONTENT_TYPE);
    let options = delete_options(&body, content_type, &call.query)?;
    let rendering = rendering(&call, resource)?;
    let mut writer = Writer { admission: true, ..Writer::internal(&call.user) };
    let info = &call.info;
    if info.verb == "deletecollection" {
        let selection = Selection::parse(resource, &info.namespace, "", &call.query)?;
        let deleted =
            app.registry.delete_collection(resource, &info.namespace, &selection, &options, &mut writer).await?;
        let metadata = render::list_metadata(app.registry.cache().revision(), None, None);
        return Ok(render::list(resource, deleted, false, metadata, rendering, call.style).await);
    }
    let deleted = app.registry.delete_object(resource, &info.namespace, &info.name, &options, &mut writer).await?;
    let mut response = match deleted.status(resource) {
        Some(status) => respond::status(call.style, &status),
        None => respond::json(call.style, 200, render::one(resource, &deleted.object, rendering, true)),
    };
    if !deleted.gone && options["orphanDependents"] == json!(false) {
        *response.status_mut() = http::StatusCode::ACCEPTED;
    }
    respond::add_warnings(response.headers_mut(), &writer.warnings);
    Ok(response)
}
