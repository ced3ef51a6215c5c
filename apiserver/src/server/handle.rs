//! The pipeline of a request: panic containment, authentication, impersonation, limits, authorization, routing.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use futures::FutureExt;
use http::{HeaderValue, Method, Request, Response, Version, header, request::Parts};
use hyper::body::{Body as _, Incoming};
use isopod_api::status::Status;
use serde_json::json;

use super::{
    App, forbidden, limits,
    negotiate::{Accepted, Binary, negotiate},
    openapi,
    query::Query,
    request::RequestInfo,
    resources, respond,
    respond::Style,
};
use crate::{
    authn::{UserInfo, chain, impersonate::impersonate, serviceaccount},
    authz::{Attributes, Decision},
    discovery::{self, DiscoveryRequest, Known},
    endpoints::Body,
};

/// One request on its way.
pub(super) struct Call<'b> {
    /// Method, headers, extensions.
    pub(super) parts: Parts,
    /// The body, until it is read.
    pub(super) body: &'b mut Option<Incoming>,
    /// What it is about.
    pub(super) info: RequestInfo,
    /// Its query.
    pub(super) query: Query,
    /// Who asks.
    pub(super) user: UserInfo,
    /// How the answer is written.
    pub(super) style: Style,
}

/// Answers a request, whatever happens.
pub(super) async fn handle(
    app: Arc<App>,
    certificate: Arc<Option<UserInfo>>,
    request: Request<Incoming>,
) -> Response<Body> {
    let started = Instant::now();
    let query = Query::parse(request.uri().query().unwrap_or(""));
    let info = RequestInfo::new(request.method().as_str(), request.uri().path(), &query);
    let style = Style { accepted: Accepted::JSON, pretty: pretty(&request, &query), gzip: takes_gzip(&request) };
    // Errors are written in the encoding the client prefers, never transformed.
    let accepted =
        negotiate(request.headers().get(header::ACCEPT).and_then(|v| v.to_str().ok()), false, Binary::Served);
    let media = accepted.map_or(Accepted::JSON.media, |accepted| accepted.media);
    let errors = Style { accepted: Accepted { media, ..Accepted::JSON }, ..style };
    let (head, version) = (request.method() == Method::HEAD, request.version());
    let running = app.counters.start(&info);
    let long = info.long_running();
    let counted = info.clone();
    let (parts, body) = request.into_parts();
    let expects = parts.headers.contains_key(header::EXPECT);
    let mut body = Some(body);
    let call = answer(&app, certificate.as_ref().as_ref(), (parts, &mut body), info, query, style);
    let call = AssertUnwindSafe(call).catch_unwind();
    let outcome = if long {
        call.await
    } else {
        match tokio::time::timeout(limits::REQUEST_TIMEOUT, call).await {
            Ok(outcome) => outcome,
            Err(_) => Ok(Err(Status::timeout("request did not complete within the allotted timeout", 0))),
        }
    };
    let mut response = match outcome {
        Ok(Ok(response)) => response,
        Ok(Err(status)) => respond::status(errors, &status),
        Err(_) => {
            tracing::error!(path = counted.path, "a request panicked");
            respond::status(errors, &Status::internal("the server panicked; see its log"))
        }
    };
    drop(running);
    let known = counted.resource_request && response.status() != 404;
    app.counters.answered(&counted, known, response.status().as_u16(), started.elapsed());
    // Who waits for a word to send the body has had none, unless it was too much of a body.
    let waits = expects && response.status() != 413;
    let headers = response.headers_mut();
    if let Some(left) = body.filter(|left| !left.is_end_stream())
        && (waits || !limits::drain(left).await)
        && version < Version::HTTP_2
    {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
        headers.insert("Audit-Id", id);
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache, private"));
    if head {
        *response.body_mut() = respond::full("");
    }
    response
}

fn pretty(request: &Request<Incoming>, query: &Query) -> bool {
    if query.has("pretty") {
        return query.flag("pretty");
    }
    let agent = request.headers().get(header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("");
    ["curl", "Wget", "Mozilla/5.0"].iter().any(|p| agent.starts_with(p))
}

fn takes_gzip(request: &Request<Incoming>) -> bool {
    let header = request.headers().get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).unwrap_or("");
    header.split(',').any(|e| e.split(';').next().unwrap_or("").trim() == "gzip")
}

/// A header as text.
pub(super) fn header_text(parts: &Parts, name: header::HeaderName) -> Option<&str> {
    parts.headers.get(name).and_then(|v| v.to_str().ok())
}

async fn answer(
    app: &Arc<App>,
    certificate: Option<&UserInfo>,
    (parts, body): (Parts, &mut Option<Incoming>),
    info: RequestInfo,
    query: Query,
    style: Style,
) -> Result<Response<Body>, Status> {
    let user = chain::authenticate(&*app.tokens, certificate, &parts.headers)?;
    let user = impersonate(&*app.authorizer, user, &parts.headers)?;
    let _place = match info.long_running() {
        true => None,
        false => app.in_flight.enter(&user, !matches!(&*info.verb, "get" | "list")).await?,
    };
    authorize(app, &info, &user)?;
    if let Some(service) = app.aggregator.service(&info.path)
        && let Some(body) = body.take()
    {
        return app.aggregator.forward(&service, &user, Request::from_parts(parts, body)).await;
    }
    let mut call = Call { parts, body, info, query, user, style };
    if let Ok(accepted) = negotiate(header_text(&call.parts, header::ACCEPT), false, Binary::Served) {
        call.style.pretty |= accepted.pretty;
    }
    if call.info.resource_request {
        return resources::answer(app, call).await;
    }
    plain(app, call).await
}

fn authorize(app: &App, info: &RequestInfo, user: &UserInfo) -> Result<(), Status> {
    let attributes = Attributes {
        user: user.clone(),
        verb: info.verb.clone(),
        resource_request: info.resource_request,
        group: info.group.clone(),
        version: info.version.clone(),
        resource: info.resource.clone(),
        subresource: info.subresource.clone(),
        namespace: info.namespace.clone(),
        name: info.name.clone(),
        path: info.path.clone(),
    };
    match app.authorizer.authorize(&attributes) {
        Decision::Allow(_) => Ok(()),
        Decision::NoOpinion(reason) | Decision::Deny(reason) => Err(forbidden::status(&attributes, &reason)),
    }
}

/// Requests that are about no resource.
async fn plain(app: &Arc<App>, call: Call<'_>) -> Result<Response<Body>, Status> {
    let path = call.info.path.trim_matches('/').to_owned();
    if let Some(response) = app.health.answer(&path, &call.query) {
        return Ok(response);
    }
    let (custom, extensions) = (app.registry.custom(), app.aggregator.extensions());
    let known = Known { custom: &custom, extensions: &extensions };
    let get = matches!(call.parts.method, Method::GET | Method::HEAD);
    let accept = header_text(&call.parts, header::ACCEPT);
    let request = DiscoveryRequest {
        path: &path,
        accept,
        etag: header_text(&call.parts, header::IF_NONE_MATCH),
        address: std::net::SocketAddr::new(app.config.advertise, app.config.bind.port()),
    };
    let response = match path.as_str() {
        "" => Some(respond::value(call.style, 200, &discovery::paths(known))),
        "version" => Some(respond::value(call.style, 200, &version())),
        "metrics" => Some(respond::text(200, app.counters.text(&app.registry))),
        ".well-known/openid-configuration" => {
            Some(respond::value(call.style, 200, &serviceaccount::openid_configuration(&app.config)))
        }
        "openid/v1/jwks" => {
            let keys = serde_json::to_vec(&serviceaccount::jwks(&app.config)).unwrap_or_default();
            Some(respond::with_type(200, "application/jwk-set+json", keys))
        }
        path if path.starts_with("openapi/") => {
            openapi::answer(path, &call.query, accept, call.style, app.registry.custom(), &app.aggregator).await
        }
        _ => discovery::answer(&request, call.style, known),
    };
    match response {
        Some(_) if !get => Err(Status::method_not_allowed()),
        Some(response) => Ok(response),
        None => Ok(respond::page_not_found()),
    }
}

fn version() -> serde_json::Value {
    json!({
        "major": "1",
        "minor": "36",
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": "v1.36.2+isopod",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "2026-11-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}
