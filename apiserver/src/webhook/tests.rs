//! Calls over real TLS on loopback.

use serde_json::json;

use super::{testing::WebhookServer, *};
use crate::admission::testing::FakeObjects;

const SHORT: Duration = Duration::from_secs(30);

async fn post(client: &Client, config: &Value, objects: &FakeObjects, timeout: Duration) -> Result<Value, String> {
    let target = Arc::new(Target::new(config)?);
    client.post(objects, &target, &json!({"n": 1}), timeout).await
}

#[tokio::test]
async fn urls_and_errors() {
    let server = WebhookServer::start(&["127.0.0.1"], |body| match body["@path"].as_str().unwrap_or_default() {
        "/ok?timeout=30s" => (200, json!({"n": body["n"]})),
        "/hang?timeout=1s" => (0, Value::Null),
        "/status?timeout=30s" => (400, json!({"kind": "Status", "message": "said so"})),
        "/broken?timeout=30s" => (500, json!("boom")),
        other => (404, json!(other)),
    })
    .await;
    let (client, objects) = (Client::default(), FakeObjects::new([]));
    for _ in 0..3 {
        assert_eq!(post(&client, &server.config("/ok"), &objects, SHORT).await, Ok(json!({"n": 1})));
    }
    assert_eq!(server.connections(), 1, "connections are used again");
    let at = server.address;
    for (path, want) in [
        ("/status", "said so".to_owned()),
        ("/broken", "an error on the server (\"\\\"boom\\\"\") has prevented the request from succeeding".to_owned()),
        ("/nope", "the server could not find the requested resource".to_owned()),
    ] {
        assert_eq!(post(&client, &server.config(path), &objects, SHORT).await, Err(want), "{path}");
    }
    let late = post(&client, &server.config("/hang"), &objects, Duration::from_secs(1)).await;
    assert_eq!(late, Err(format!("Post \"https://{at}/hang?timeout=1s\": context deadline exceeded")));
    let other = WebhookServer::start(&["127.0.0.1"], |_| (200, json!({}))).await;
    let mut wrong = server.config("/ok");
    wrong["caBundle"] = other.config("/")["caBundle"].clone();
    let unknown = post(&client, &wrong, &objects, SHORT).await.unwrap_err();
    let want = format!(
        "Post \"https://{at}/ok?timeout=30s\": tls: failed to verify certificate: x509: certificate signed by unknown authority"
    );
    assert_eq!(unknown, want);
    let config = server.config("/ok");
    drop(server);
    // The listener closes when its task is gone.
    let closed = async {
        while tokio::net::TcpStream::connect(at).await.err().map(|e| e.kind())
            != Some(std::io::ErrorKind::ConnectionRefused)
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SHORT, closed).await.expect("the server listens on");
    let refused = post(&Client::default(), &config, &objects, SHORT).await.unwrap_err();
    assert!(refused.contains(&format!("dial tcp {at}: connect: connection refused")), "{refused}");
}

#[tokio::test]
async fn services_lead_to_their_endpoints() {
    let server = WebhookServer::start(&["hook.ns.svc"], |body| (200, json!({"path": body["@path"]}))).await;
    let (client, objects) = (Client::default(), FakeObjects::new([]));
    let config = server.service("ns", "hook", 8443);
    let failed = |text: &str| Err(format!("Post \"https://hook.ns.svc:8443/svc?timeout=30s\": {text}"));
    assert_eq!(post(&client, &config, &objects, SHORT).await, failed("service \"hook\" not found"));
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "hook", "namespace": "ns"},
        "spec": {"ports": [{"name": "tls", "port": 8443}]}});
    objects.put(&crate::admission::testing::gvr_of(&service), service);
    assert_eq!(post(&client, &config, &objects, SHORT).await, failed("no endpoints available for service \"hook\""));
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "hook-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "hook"}},
        "ports": [{"name": "tls", "port": server.address.port()}],
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true}}]});
    objects.put(&crate::admission::testing::gvr_of(&slice), slice);
    assert_eq!(post(&client, &config, &objects, SHORT).await, Ok(json!({"path": "/svc?timeout=30s"})));
    let other = server.service("ns", "hook", 1);
    let error = post(&client, &other, &objects, SHORT).await.unwrap_err();
    assert!(error.contains("no service port 1 found for service \"hook\""), "{error}");
}

#[tokio::test]
async fn a_server_may_be_its_own_authority() {
    let server = WebhookServer::self_signed("127.0.0.1", |body| (200, json!({"n": body["n"]}))).await;
    let (client, objects) = (Client::default(), FakeObjects::new([]));
    assert_eq!(post(&client, &server.config("/"), &objects, SHORT).await, Ok(json!({"n": 1})));
    let mut wrong = server.config("/");
    wrong["caBundle"] =
        WebhookServer::self_signed("127.0.0.1", |_| (200, json!({}))).await.config("/")["caBundle"].clone();
    let refused = post(&client, &wrong, &objects, SHORT).await.unwrap_err();
    assert!(refused.contains("failed to verify certificate"), "{refused}");
}
