//! Real clients against a whole API server in this process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../examples/serve/setup.rs"]
mod setup;

mod addresses;
mod binary;
mod every_type;
mod facts;
mod fuzz;
mod hostile;
mod kube_rs;
mod kubectl;
mod sockets;
mod vectors;
mod versions;
#[allow(dead_code, reason = "unit tests use the rest of it")]
#[path = "../../src/webhook/testing.rs"]
mod webhook;
mod wire;

use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

const TOKEN: &str = "token-of-an-admin";
/// How long anything may take that is waited for: a loaded machine with two cores is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running server; it ends with this.
struct Server {
    port: u16,
    dir: TempDir,
    client: reqwest::Client,
    _stop: DropGuard,
}

impl Server {
    async fn start() -> Self {
        // Another test may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = TempDir::new().unwrap();
        // Held from here on: nobody else gets this port.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = setup::config(dir.path(), port, TOKEN).unwrap();
        let stop = CancellationToken::new();
        let running = tokio::spawn(isopod_apiserver::run_on(config, listener, stop.clone()));
        let ca = std::fs::read(dir.path().join("ca.crt")).unwrap();
        let mut headers = reqwest::header::HeaderMap::new();
        headers.insert("authorization", format!("Bearer {TOKEN}").parse().unwrap());
        let client = reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&ca).unwrap()])
            .default_headers(headers)
            .build()
            .unwrap();
        let server = Self { port, dir, client, _stop: stop.drop_guard() };
        let ready = async {
            while !server.ready().await {
                assert!(!running.is_finished(), "the server does not start");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("the server does not become ready");
        server
    }

    async fn ready(&self) -> bool {
        match self.client.get(self.url("/readyz")).send().await {
            Ok(answer) => answer.status() == 200,
            Err(_) => false,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}{path}", self.port)
    }

    /// Code and body of an answer; patches are merge patches.
    async fn answer(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let kind = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, path, kind, body).await
    }

    /// The same with any body; what is no JSON comes as text, such as the answer to a path nobody serves (yet).
    async fn send(&self, method: Method, path: &str, kind: &str, body: String) -> (u16, Value) {
        let mut request = self.client.request(method, self.url(path));
        if !body.is_empty() {
            request = request.header("content-type", kind).body(body);
        }
        let answer = request.send().await.unwrap();
        let (code, text) = (answer.status().as_u16(), answer.text().await.unwrap());
        (code, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Asks again until an answer is right: what is written shows a little later.
    async fn until(&self, method: Method, path: &str, body: &Value, right: impl Fn(u16, &Value) -> bool) -> Value {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let (code, answer) = self.answer(method.clone(), path, body).await;
            if right(code, &answer) {
                return answer;
            }
            assert!(tokio::time::Instant::now() < deadline, "{path}: {code} {answer}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
