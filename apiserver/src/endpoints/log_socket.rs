//! Logs over WebSocket, as browsers ask for them: every piece of the log is a message.
//!
//! In: a request that wants an upgrade, and the log as the node streams it. Out: the 101, and a task that sends until the log
//! or the client ends.

use base64::{Engine, engine::general_purpose::STANDARD};
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use isopod_api::status::Status;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::Body;

/// Protocols, and whether their messages are bytes as they are; a client that names none gets the first.
const PROTOCOLS: [(&str, bool); 3] = [("", true), ("binary.k8s.io", true), ("base64.binary.k8s.io", false)];

/// A client that waits for its 101.
pub(super) struct Socket {
    upgrade: hyper::upgrade::OnUpgrade,
    accept: String,
    protocol: &'static str,
    binary: bool,
}

fn words(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|word| !word.is_empty())
}

/// The first protocol of the client's that is one of ours.
fn negotiate(headers: &HeaderMap) -> Option<(&'static str, bool)> {
    let mut asked = words(headers, header::SEC_WEBSOCKET_PROTOCOL).peekable();
    if asked.peek().is_none() {
        return Some(PROTOCOLS[0]);
    }
    asked.find_map(|word| PROTOCOLS[1..].iter().find(|(name, _)| *name == word).copied())
}

/// Takes the upgrade out of a request that wants one: what is left asks for a plain log.
pub(super) fn take(request: &mut Request<Incoming>) -> Result<Option<Socket>, Status> {
    let headers = request.headers();
    let wanted = words(headers, header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"))
        && words(headers, header::UPGRADE).any(|word| word.eq_ignore_ascii_case("websocket"));
    if !wanted {
        return Ok(None);
    }
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let key = key.ok_or_else(|| Status::bad_request("missing Sec-WebSocket-Key".to_owned()))?;
    let accept = derive_accept_key(key.as_bytes());
    let (protocol, binary) = negotiate(headers)
        .ok_or_else(|| Status::bad_request("no protocol in common: binary.k8s.io is spoken here".to_owned()))?;
    let upgrade = hyper::upgrade::on(&mut *request);
    let headers = request.headers_mut();
    for name in [
        header::CONNECTION,
        header::UPGRADE,
        header::SEC_WEBSOCKET_KEY,
        header::SEC_WEBSOCKET_PROTOCOL,
        header::SEC_WEBSOCKET_VERSION,
        header::SEC_WEBSOCKET_EXTENSIONS,
    ] {
        headers.remove(name);
    }
    Ok(Some(Socket { upgrade, accept, protocol, binary }))
}

impl Socket {
    /// Sends a log to the client; the 101 that begins it.
    pub(super) fn send(self, log: Response<Body>) -> Result<Response<Body>, Status> {
        let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        let accept = HeaderValue::try_from(self.accept).map_err(|error| Status::internal(error.to_string()))?;
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        if !self.protocol.is_empty() {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(self.protocol));
        }
        let (upgrade, binary) = (self.upgrade, self.binary);
        tokio::spawn(async move {
            match upgrade.await {
                Ok(client) => pump(TokioIo::new(client), log.into_body(), binary).await,
                Err(error) => tracing::debug!(%error, "upgrade"),
            }
        });
        Ok(response)
    }
}

/// Copies until either side ends.
async fn pump<T>(client: T, mut log: Body, binary: bool)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut client = WebSocketStream::from_raw_socket(client, Role::Server, None).await;
    loop {
        // Both arms are cancel-safe: nothing is taken before it is whole.
        tokio::select! {
            frame = log.frame() => {
                let Some(Ok(frame)) = frame else { break };
                let Ok(data) = frame.into_data() else { continue };
                let message = if binary { Message::Binary(data) } else { Message::text(STANDARD.encode(&data)) };
                if client.send(message).await.is_err() {
                    return;
                }
            }
            said = client.next() => if !matches!(said, Some(Ok(_))) { return },
        }
    }
    if let Err(error) = client.close(None).await {
        tracing::debug!(%error, "log over WebSocket");
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;

    use super::*;

    #[test]
    fn the_clients_first_protocol_wins() {
        let of = |asked: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in asked {
                headers.append(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value));
            }
            negotiate(&headers)
        };
        assert_eq!(of(&[]), Some(("", true)));
        assert_eq!(of(&["other, base64.binary.k8s.io"]), Some(("base64.binary.k8s.io", false)));
        assert_eq!(of(&["v4.channel.k8s.io"]), None);
    }

    #[tokio::test]
    async fn a_log_becomes_messages_and_ends_with_the_log() {
        for (binary, want) in [(true, Message::Binary("hello\n".into())), (false, Message::text("aGVsbG8K"))] {
            let (ours, theirs) = tokio::io::duplex(1024);
            let log = Full::new(Bytes::from_static(b"hello\n")).map_err(|never| match never {}).boxed();
            let pumped = tokio::spawn(pump(ours, log, binary));
            let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
            assert_eq!(client.next().await.unwrap().unwrap(), want);
            assert!(client.next().await.unwrap().unwrap().is_close());
            pumped.await.unwrap();
        }
    }
}
