//! Building responses: JSON, YAML, Status, text, gzip.

use std::io::Write;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::{BodyExt, Full};
use isopod_api::{protobuf, status::Status};
use serde_json::Value;

use super::{
    negotiate::{Accepted, Media},
    yaml,
};
use crate::endpoints::Body;

/// Responses smaller than this are not worth compressing.
pub(crate) const GZIP_MINIMUM: usize = 128 * 1024;

/// How the response of one request is to be written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    /// What was negotiated.
    pub(crate) accepted: Accepted,
    /// Indented JSON.
    pub(crate) pretty: bool,
    /// The client takes gzip.
    pub(crate) gzip: bool,
}

/// A body held in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// A value in the negotiated encoding.
pub(crate) fn value(style: Style, code: u16, value: &Value) -> Response<Body> {
    let bytes = match style.accepted.media {
        Media::Yaml => yaml::encode(value).into_bytes(),
        Media::Protobuf => match protobuf::encode(value) {
            Ok(bytes) => bytes,
            Err(error) => return unencodable(&error),
        },
        Media::Json if style.pretty => {
            let mut out = serde_json::to_vec_pretty(value).unwrap_or_default();
            out.push(b'\n');
            out
        }
        Media::Json => {
            let mut out = serde_json::to_vec(value).unwrap_or_default();
            out.push(b'\n');
            out
        }
    };
    bytes_response(style, code, bytes.into())
}

/// JSON bytes in the negotiated encoding.
pub(crate) fn json(style: Style, code: u16, bytes: Bytes) -> Response<Body> {
    if style.accepted.media == Media::Json && !style.pretty {
        return bytes_response(style, code, bytes);
    }
    match serde_json::from_slice(&bytes) {
        Ok(parsed) => value(style, code, &parsed),
        Err(_) => bytes_response(style, code, bytes),
    }
}

/// What upstream answers when an object does not fit the encoding that was asked for.
pub(crate) fn unencodable(error: &protobuf::Error) -> Response<Body> {
    let status =
        Status::not_acceptable(format!("object does not implement the protobuf marshalling interface: {error}"));
    let body = serde_json::to_vec(&status.to_value()).unwrap_or_default();
    with_type(status.code, Media::Json.content_type(), body)
}

fn bytes_response(style: Style, code: u16, bytes: Bytes) -> Response<Body> {
    let (bytes, zipped) = match style.gzip && bytes.len() > GZIP_MINIMUM {
        true => gzip(&bytes).map_or((bytes, false), |z| (z.into(), true)),
        false => (bytes, false),
    };
    let mut response = with_type(code, style.accepted.media.content_type(), bytes);
    if zipped {
        mark_zipped(response.headers_mut());
    }
    response
}

/// Says that a body is compressed.
pub(crate) fn mark_zipped(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
}

fn gzip(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 8), Compression::new(1));
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// A response of a content type.
pub(crate) fn with_type(code: u16, content_type: &'static str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Plain text.
pub(crate) fn text(code: u16, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = with_type(code, "text/plain; charset=utf-8", text);
    response.headers_mut().insert("X-Content-Type-Options", HeaderValue::from_static("nosniff"));
    response
}

/// What Go's mux answers for a path nobody serves.
pub(crate) fn page_not_found() -> Response<Body> {
    text(404, "404 page not found\n")
}

/// A Status.
pub(crate) fn status(style: Style, status: &Status) -> Response<Body> {
    let code = if status.code == 0 { 200 } else { status.code };
    let mut response = value(Style { gzip: false, ..style }, code, &status.to_value());
    let retry = status.details.as_ref().map_or(0, |d| d.retry_after_seconds);
    if retry > 0 {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(retry));
    }
    response
}

/// Appends warnings as upstream formats them.
pub(crate) fn add_warnings(headers: &mut HeaderMap, warnings: &[String]) {
    let mut seen = std::collections::HashSet::new();
    for warning in warnings.iter().filter(|w| seen.insert(w.as_str())) {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"").replace(['\n', '\r'], " ");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            headers.append(header::WARNING, value);
        }
    }
}
