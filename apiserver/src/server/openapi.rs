//! /openapi/v2 and /openapi/v3: documents are built when asked for, off the async threads, and not kept. Those of extension
//! servers come from there.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use isopod_api::openapi;

use super::{
    descriptions::Descriptions,
    query::Query,
    respond::{self, Style},
};
use crate::{
    aggregation::Aggregator,
    custom::{self, Served},
    endpoints::Body,
};

/// Upstream answers an unknown document with nothing at all.
fn not_found() -> Response<Body> {
    let mut response = respond::text(404, "");
    response.headers_mut().remove(header::CONTENT_TYPE);
    response
}

/// What clients call the v2 document's protobuf form, up to its version.
const V2_BINARY: &str = "application/com.github.proto-openapi.spec.v2";

/// Answers `openapi/...`; `None` when the path is not one of them.
pub(super) async fn answer(
    path: &str,
    query: &Query,
    accept: Option<&str>,
    style: Style,
    served: Arc<Served>,
    extensions: &Aggregator,
) -> Option<Response<Body>> {
    if path == "openapi/v2" && accept.is_some_and(|accept| accept.starts_with(V2_BINARY)) {
        let document = tokio::task::spawn_blocking(|| {
            let texts = Descriptions::load();
            openapi::v2_protobuf(&|definition, field| texts.of(definition, field))
        });
        let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return Some(respond::with_type(200, content_type, document.await.ok()?));
    }
    if path == "openapi/v2" {
        let document = tokio::task::spawn_blocking(move || {
            let texts = Descriptions::load();
            custom::v2(&served, &|definition, field| texts.of(definition, field))
        });
        let document = extensions.extend_v2(document.await.ok()?).await;
        return Some(respond::json(style, 200, document.into()));
    }
    if path == "openapi/v3" {
        let mut index = openapi::v3_index(&custom::v3_index(&served));
        extensions.extend_v3_index(&mut index).await;
        return Some(respond::text(200, serde_json::to_vec(&index).unwrap_or_default()));
    }
    let name = path.strip_prefix("openapi/v3/")?.to_owned();
    let parts: Vec<String> = name.split('/').map(str::to_owned).collect();
    let built = tokio::task::spawn_blocking(move || {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let texts = Descriptions::load();
        let describe = |definition: &str, field: Option<&str>| texts.of(definition, field);
        match parts[..] {
            ["version"] => Some(openapi::v3_version()),
            ["api", version] => openapi::v3("", version, &describe),
            ["apis", group, version] if !group.is_empty() => {
                openapi::v3(group, version, &describe).or_else(|| custom::v3(&served, group, version, &describe))
            }
            _ => None,
        }
    });
    let mut document = built.await.ok()?.map(Bytes::from);
    if document.is_none()
        && let Some((group, version)) = name.strip_prefix("apis/").and_then(|gv| gv.split_once('/'))
    {
        document = extensions.v3(group, version).await;
    }
    let Some(document) = document else { return Some(not_found()) };
    let mut response = respond::json(style, 200, document);
    let hash = query.text("hash");
    if !hash.is_empty() {
        // The hash names the content: it never changes.
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        if let Ok(tag) = HeaderValue::from_str(&format!("\"{hash}\"")) {
            headers.insert(header::ETAG, tag);
        }
    }
    Some(response)
}
