//! Watches over WebSocket: text for JSON, bytes for protobuf, the token as a protocol.

use std::sync::Arc;

use futures::StreamExt;
use reqwest::Method;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pemfile::certs;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        http::{HeaderValue, Response},
    },
};

use crate::{PATIENCE, Server, TOKEN, wire};

type Socket = WebSocketStream<TlsStream<TcpStream>>;

impl Server {
    async fn socket(
        &self,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<(Socket, Response<Option<Vec<u8>>>), Error> {
        let ca = std::fs::read(self.dir.path().join("ca.crt")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certs(&mut &ca[..]).map(Result::unwrap));
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let mut request = format!("wss://127.0.0.1:{}{path}", self.port).into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
        }
        tokio::time::timeout(PATIENCE, client_async(request, stream)).await.unwrap()
    }
}

async fn next(socket: &mut Socket) -> Message {
    tokio::time::timeout(PATIENCE, socket.next()).await.expect("no message comes").unwrap().unwrap()
}

#[tokio::test]
async fn watches_come_as_messages() {
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    for name in ["a", "b"] {
        let body = json!({"metadata": {"name": name, "labels": {"of": "test"}}, "data": {"text": "two\nlines"}});
        assert_eq!(server.answer(Method::POST, path, &body).await.0, 201);
    }
    let watch = format!("{path}?watch=1&labelSelector=of%3Dtest&timeoutSeconds=600");
    let bearer = format!("Bearer {TOKEN}");
    let (mut socket, answer) = server.socket(&watch, &[("authorization", &bearer)]).await.unwrap();
    assert_eq!(answer.headers().get("sec-websocket-protocol"), None);
    for name in ["a", "b"] {
        let Message::Text(text) = next(&mut socket).await else { panic!("no text") };
        let event: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!("ADDED"), &json!(name)));
        assert_eq!(event["object"]["data"]["text"], "two\nlines");
    }
    assert_eq!(server.answer(Method::DELETE, &format!("{path}/a"), &Value::Null).await.0, 200);
    let Message::Text(text) = next(&mut socket).await else { panic!("no text") };
    assert!(text.starts_with(r#"{"type":"DELETED""#), "{text}");

    let protobuf = "application/vnd.kubernetes.protobuf";
    let headers = [("authorization", bearer.as_str()), ("accept", protobuf), ("sec-websocket-protocol", "any")];
    let (mut socket, answer) = server.socket(&watch, &headers).await.unwrap();
    assert_eq!(answer.headers()["sec-websocket-protocol"], "any");
    let Message::Binary(bytes) = next(&mut socket).await else { panic!("no bytes") };
    assert_eq!(wire::Message::read(&bytes).text(1), "ADDED");
}

#[tokio::test]
async fn a_watch_ends_with_its_time_and_errors_are_plain() {
    let server = Server::start().await;
    let bearer = format!("Bearer {TOKEN}");
    let path = "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1";
    let (mut socket, _) = server.socket(path, &[("authorization", &bearer)]).await.unwrap();
    while !next(&mut socket).await.is_close() {}
    let refused = server.socket(&format!("{path}&fieldSelector=x%3Dy"), &[("authorization", &bearer)]).await;
    assert!(matches!(refused, Err(Error::Http(answer)) if answer.status() == 400));
    let refused = server.socket(path, &[]).await;
    assert!(matches!(refused, Err(Error::Http(answer)) if answer.status() == 403));
}
