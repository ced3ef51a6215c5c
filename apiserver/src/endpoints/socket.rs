//! Streams over WebSocket, as browsers and some clients ask for them: the pieces of a log, the events of a watch.
//!
//! In: a request that wants an upgrade, and the answer as it would be streamed without. Out: the 101, and a task that sends
//! until the stream or the client ends.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::{Extensions, HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use isopod_api::status::Status;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::Body;

/// What is a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Every piece as it comes, as bytes.
    Pieces,
    /// Every piece as it comes, in base64.
    Base64,
    /// Every line of text.
    Lines,
    /// Everything that follows its length in four bytes.
    Prefixed,
}

/// Protocols of logs; a client that names none gets the first.
const LOGS: [(&str, Framing); 3] =
    [("", Framing::Pieces), ("binary.k8s.io", Framing::Pieces), ("base64.binary.k8s.io", Framing::Base64)];
/// A protocol whose name is a token: it is for authentication alone.
const TOKEN: &str = "base64url.bearer.authorization.k8s.io.";

/// A client that waits for its 101.
pub(crate) struct Socket {
    upgrade: hyper::upgrade::OnUpgrade,
    accept: String,
    protocol: String,
    framing: Framing,
}

fn words(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|word| !word.is_empty())
}

/// What the client could speak.
fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    words(headers, header::SEC_WEBSOCKET_PROTOCOL).filter(|word| !word.starts_with(TOKEN))
}

/// The first protocol of the client's that is one of ours.
fn negotiate(headers: &HeaderMap) -> Option<(&'static str, Framing)> {
    let mut asked = protocols(headers).peekable();
    if asked.peek().is_none() {
        return Some(LOGS[0]);
    }
    asked.find_map(|word| LOGS[1..].iter().find(|(name, _)| *name == word).copied())
}

/// Takes the upgrade out of a request that wants one: what is left asks for a plain log.
pub(super) fn for_log(headers: &mut HeaderMap, extensions: &mut Extensions) -> Result<Option<Socket>, Status> {
    if !wanted(headers) {
        return Ok(None);
    }
    let (protocol, framing) = negotiate(headers)
        .ok_or_else(|| Status::bad_request("no protocol in common: binary.k8s.io is spoken here".to_owned()))?;
    take(headers, extensions, protocol.to_owned(), framing).map(Some)
}

/// Takes the upgrade out of a request for a watch. One protocol of the client's, whatever it is, is agreed to.
pub(crate) fn for_watch(
    headers: &mut HeaderMap,
    extensions: &mut Extensions,
    framing: Framing,
) -> Result<Option<Socket>, Status> {
    if !wanted(headers) {
        return Ok(None);
    }
    let asked: Vec<&str> = protocols(headers).collect();
    let protocol = match asked.as_slice() {
        [] => String::new(),
        [one] => (*one).to_owned(),
        _ => return Err(Status::bad_request("a watch has no protocols to choose from".to_owned())),
    };
    take(headers, extensions, protocol, framing).map(Some)
}

fn wanted(headers: &HeaderMap) -> bool {
    words(headers, header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"))
        && words(headers, header::UPGRADE).any(|word| word.eq_ignore_ascii_case("websocket"))
}

fn take(
    headers: &mut HeaderMap,
    extensions: &mut Extensions,
    protocol: String,
    framing: Framing,
) -> Result<Socket, Status> {
    let key = headers.get(header::SEC_WEBSOCKET_KEY);
    let key = key.ok_or_else(|| Status::bad_request("missing Sec-WebSocket-Key".to_owned()))?;
    let accept = derive_accept_key(key.as_bytes());
    let upgrade = extensions.remove::<hyper::upgrade::OnUpgrade>();
    let upgrade = upgrade.ok_or_else(|| Status::bad_request("this connection cannot be upgraded".to_owned()))?;
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
    Ok(Socket { upgrade, accept, protocol, framing })
}

impl Socket {
    /// Sends a stream to the client; the 101 that begins it.
    pub(crate) fn send(self, stream: Body) -> Result<Response<Body>, Status> {
        let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        let value = |text: &str| HeaderValue::from_str(text).map_err(|error| Status::internal(error.to_string()));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, value(&self.accept)?);
        if !self.protocol.is_empty() {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, value(&self.protocol)?);
        }
        let (upgrade, framing) = (self.upgrade, self.framing);
        tokio::spawn(async move {
            match upgrade.await {
                Ok(client) => pump(TokioIo::new(client), stream, framing).await,
                Err(error) => tracing::debug!(%error, "upgrade"),
            }
        });
        Ok(response)
    }
}

impl Framing {
    /// The next message of what has come so far, when it is whole.
    fn message(self, gathered: &mut BytesMut) -> Option<Message> {
        let piece = match self {
            Framing::Pieces | Framing::Base64 => gathered.len(),
            Framing::Lines => gathered.iter().position(|byte| *byte == b'\n')? + 1,
            Framing::Prefixed => {
                let length = u32::from_be_bytes(gathered.first_chunk().copied()?) as usize;
                if gathered.len() < 4 + length {
                    return None;
                }
                gathered.advance(4);
                return Some(Message::Binary(gathered.split_to(length).freeze()));
            }
        };
        let piece = gathered.split_to(piece).freeze();
        match self {
            _ if piece.is_empty() => None,
            Framing::Base64 => Some(Message::text(STANDARD.encode(&piece))),
            Framing::Lines => Some(text(piece)),
            _ => Some(Message::Binary(piece)),
        }
    }
}

/// A message of text; what is none goes as bytes.
fn text(line: Bytes) -> Message {
    match line.clone().try_into() {
        Ok(text) => Message::Text(text),
        Err(_) => Message::Binary(line),
    }
}

/// Copies until either side ends.
async fn pump<T>(client: T, mut stream: Body, framing: Framing)
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut client = WebSocketStream::from_raw_socket(client, Role::Server, None).await;
    let mut gathered = BytesMut::new();
    loop {
        // Both arms are cancel-safe: nothing is taken before it is whole.
        tokio::select! {
            frame = stream.frame() => {
                let Some(Ok(frame)) = frame else { break };
                let Ok(data) = frame.into_data() else { continue };
                gathered.extend_from_slice(&data);
                while let Some(message) = framing.message(&mut gathered) {
                    if client.send(message).await.is_err() {
                        return;
                    }
                }
            }
            said = client.next() => if !matches!(said, Some(Ok(_))) { return },
        }
    }
    if let Err(error) = client.close(None).await {
        tracing::debug!(%error, "a stream over WebSocket");
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(of(&[]), Some(("", Framing::Pieces)));
        assert_eq!(of(&["other, base64.binary.k8s.io"]), Some(("base64.binary.k8s.io", Framing::Base64)));
        assert_eq!(of(&["base64url.bearer.authorization.k8s.io.YQ"]), Some(("", Framing::Pieces)));
        assert_eq!(of(&["v4.channel.k8s.io"]), None);
    }

    #[tokio::test]
    async fn a_stream_becomes_messages_and_ends_with_it() {
        let sent = |bytes: &'static [u8]| Message::Binary(Bytes::from_static(bytes));
        let table = [
            (Framing::Pieces, &b"hello\n"[..], vec![sent(b"hello\n")]),
            (Framing::Base64, b"hello\n", vec![Message::text("aGVsbG8K")]),
            (Framing::Lines, b"{1}\n{2}\n{cut", vec![Message::text("{1}\n"), Message::text("{2}\n")]),
            (Framing::Lines, b"\xff\n", vec![sent(b"\xff\n")]),
            (Framing::Prefixed, b"\0\0\0\x01a\0\0\0\x02bc\0\0\0\x09d", vec![sent(b"a"), sent(b"bc")]),
        ];
        for (framing, stream, want) in table {
            let (ours, theirs) = tokio::io::duplex(1024);
            let stream = Full::new(Bytes::from_static(stream)).map_err(|never| match never {}).boxed();
            let pumped = tokio::spawn(pump(ours, stream, framing));
            let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
            for message in want {
                assert_eq!(client.next().await.unwrap().unwrap(), message, "{framing:?}");
            }
            assert!(client.next().await.unwrap().unwrap().is_close(), "{framing:?}");
            pumped.await.unwrap();
        }
    }
}
