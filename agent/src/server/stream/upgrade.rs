//! The HTTP side of an upgrade: which protocol a client asks for, and the 101 that grants it.

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;

/// The header in which SPDY clients list the stream protocols they speak, best first.
pub(crate) const STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_PROTOCOLS: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");

/// An upgraded connection.
pub(crate) type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// What a client wants to switch to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// SPDY/3.1.
    Spdy,
    /// WebSocket.
    WebSocket,
}

/// Why an upgrade is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// A plain request.
    #[error("Upgrade request required")]
    NotAnUpgrade,
    /// No protocol in common.
    #[error("unable to negotiate protocol: client supports [{client}], server accepts [{server}]")]
    NoCommonProtocol {
        /// What the client offered.
        client: String,
        /// What there is.
        server: String,
    },
    /// A WebSocket request without its key.
    #[error("missing Sec-WebSocket-Key")]
    NoKey,
}

/// A granted upgrade: the response to send and the connection it will turn into.
pub(crate) struct Grant {
    /// What the connection becomes.
    pub(crate) kind: Kind,
    /// The agreed protocol; empty when the client named none.
    pub(crate) protocol: &'static str,
    /// The 101.
    pub(crate) response: Response<()>,
    /// Resolves once the 101 is on its way.
    pub(crate) on_upgrade: hyper::upgrade::OnUpgrade,
}

fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|t| t.eq_ignore_ascii_case(token))
}

fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// What the request asks to switch to.
pub(crate) fn wanted(headers: &HeaderMap) -> Option<Kind> {
    if !has_token(headers, header::CONNECTION, "upgrade") {
        return None;
    }
    if has_token(headers, header::UPGRADE, "websocket") {
        return Some(Kind::WebSocket);
    }
    has_token(headers, header::UPGRADE, "SPDY/3.1").then_some(Kind::Spdy)
}

/// The first protocol of the client's list that is in ours. A client that names none gets the one that is `""` in ours.
fn negotiate(headers: &HeaderMap, name: HeaderName, ours: &[&'static str]) -> Result<&'static str, Refusal> {
    let mut offered = tokens(headers, name.clone()).peekable();
    let find = |wanted: &str| ours.iter().find(|our| **our == wanted).copied();
    let chosen = if offered.peek().is_none() { find("") } else { offered.find_map(find) };
    chosen.ok_or_else(|| Refusal::NoCommonProtocol {
        client: tokens(headers, name).collect::<Vec<_>>().join(" "),
        server: ours.join(" "),
    })
}

/// Grants or refuses an upgrade. `spdy` and `websocket` are the protocols this endpoint speaks over each.
pub(crate) fn grant<B>(
    request: &mut Request<B>,
    spdy: &[&'static str],
    websocket: &[&'static str],
) -> Result<Grant, Refusal> {
    let kind = wanted(request.headers()).ok_or(Refusal::NotAnUpgrade)?;
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let protocol = match kind {
        Kind::Spdy => {
            let protocol = negotiate(request.headers(), STREAM_PROTOCOL, spdy)?;
            headers.insert(header::UPGRADE, HeaderValue::from_static("SPDY/3.1"));
            if !protocol.is_empty() {
                headers.insert(STREAM_PROTOCOL, HeaderValue::from_static(protocol));
            }
            protocol
        }
        Kind::WebSocket => {
            let protocol = negotiate(request.headers(), header::SEC_WEBSOCKET_PROTOCOL, websocket)?;
            let key = request.headers().get(header::SEC_WEBSOCKET_KEY).ok_or(Refusal::NoKey)?;
            let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, HeaderValue::from_str(&accept).map_err(|_| Refusal::NoKey)?);
            if !protocol.is_empty() {
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
            }
            protocol
        }
    };
    Ok(Grant { kind, protocol, response, on_upgrade: hyper::upgrade::on(request) })
}

/// The plain response to a refused upgrade.
pub(crate) fn refused(refusal: &Refusal, ours: &[&'static str]) -> Response<String> {
    let mut response = Response::new(format!("{refusal}\n"));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    if matches!(refusal, Refusal::NoCommonProtocol { .. }) {
        *response.status_mut() = StatusCode::FORBIDDEN;
        for protocol in ours.iter().filter(|p| !p.is_empty()) {
            response.headers_mut().append(ACCEPTED_PROTOCOLS, HeaderValue::from_static(protocol));
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::new(());
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            request.headers_mut().append(name, HeaderValue::from_str(value).unwrap());
        }
        request
    }

    const SPDY: &[&str] = &["v4.channel.k8s.io", "v3.channel.k8s.io"];
    const WS: &[&str] = &["v5.channel.k8s.io", ""];

    #[test]
    fn the_clients_first_common_protocol_wins() {
        let mut r = request(&[
            ("connection", "Upgrade"),
            ("upgrade", "SPDY/3.1"),
            ("x-stream-protocol-version", "v5.channel.k8s.io"),
            ("x-stream-protocol-version", "v4.channel.k8s.io, v3.channel.k8s.io"),
        ]);
        let grant = grant(&mut r, SPDY, WS).ok().unwrap();
        assert_eq!((grant.kind, grant.protocol), (Kind::Spdy, "v4.channel.k8s.io"));
        assert_eq!(grant.response.headers()["upgrade"], "SPDY/3.1");
    }

    #[test]
    fn websocket_accept_follows_the_rfc() {
        let mut r = request(&[
            ("connection", "keep-alive, upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "v5.channel.k8s.io"),
        ]);
        let grant = grant(&mut r, SPDY, WS).ok().unwrap();
        assert_eq!(grant.response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(grant.response.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
    }

    #[test]
    fn refusals_say_why() {
        let plain = grant(&mut request(&[]), SPDY, WS).err().unwrap();
        assert_eq!(plain, Refusal::NotAnUpgrade);
        let mut r = request(&[("connection", "upgrade"), ("upgrade", "spdy/3.1"), ("x-stream-protocol-version", "v9")]);
        let unknown = grant(&mut r, SPDY, WS).err().unwrap();
        let response = refused(&unknown, SPDY);
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert_eq!(response.headers()["x-accepted-stream-protocol-versions"], "v4.channel.k8s.io");
    }
}
