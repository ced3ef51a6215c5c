//! Bodies that nest too deep, in every form, and patches that would make objects nobody could read again.

use reqwest::Method;
use serde_json::{Value, json};

use crate::Server;

const THINGS: &str = "/apis/y.example.com/v1/things";
const JSON: &str = "application/json";

fn nested(levels: usize) -> String {
    "{\"a\":".repeat(levels) + "1" + &"}".repeat(levels)
}

fn thing(name: &str, spec: &str) -> String {
    format!(r#"{{"apiVersion":"y.example.com/v1","kind":"Thing","metadata":{{"name":"{name}"}},"spec":{spec}}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_early_can_ask_again() {
    let server = Server::start().await;
    let (code, answer) = server.answer(Method::GET, THINGS, &Value::Null).await;
    assert_eq!((code, answer), (404, "404 page not found\n".into()), "of a group that nobody serves");
    let ca = std::fs::read(server.dir.path().join("ca.crt")).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([reqwest::Certificate::from_pem(&ca).unwrap()]);
    let client = client.http1_only().build().unwrap();
    // What nobody wants of a body is read all the same, so that the connection is good for more.
    for _ in 0..2 {
        let request = client.post(server.url("/version")).bearer_auth(crate::TOKEN).body("x".repeat(2_000_000));
        let answer = request.send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers().get("connection")), (405, None));
        assert_eq!(answer.json::<Value>().await.unwrap()["reason"], "MethodNotAllowed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_the_path_is_refused_first() {
    let server = Server::start().await;
    let path = "/api/v1/namespaces/default/configmaps";
    for (name, want) in [
        (json!("b"), "the name of the object (b) does not match the name on the URL (a)"),
        (Value::Null, "the name of the object (a based on URL) was undeterminable: name must be provided"),
    ] {
        let (code, answer) =
            server.answer(Method::PUT, &format!("{path}/a"), &json!({"metadata": {"name": name}})).await;
        assert_eq!((code, answer["message"].as_str().unwrap()), (400, want));
    }
    let request = server.client.get(server.url(&format!("{path}?watch=1"))).header("accept", "application/yaml");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 406);
    let want = "only the following media types are accepted: application/json;stream=watch, application/vnd.kubernetes.protobuf;stream=watch";
    // The error comes in the form that was asked for: only there is no stream of it.
    let text = answer.text().await.unwrap();
    assert!(text.contains("kind: Status\n") && text.replace("\n  ", " ").contains(want), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn depth_is_refused_before_it_hurts() {
    let server = Server::start().await;
    let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.y.example.com"},
        "spec": {"group": "y.example.com", "scope": "Cluster", "names": {"plural": "things", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": open}}}}]}});
    let (code, made) =
        server.answer(Method::POST, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &crd).await;
    assert_eq!(code, 201, "{made}");
    server.until(Method::GET, THINGS, &Value::Null, |code, _| code == 200).await;

    for levels in [100, 127, 128, 500, 10_001, 400_000] {
        for kind in [JSON, "application/yaml"] {
            let (code, answer) = server.send(Method::POST, THINGS, kind, thing("deep", &nested(levels))).await;
            assert_eq!(code, 400, "{levels} {kind}: {answer}");
            let message = answer["message"].as_str().unwrap();
            assert!(message.contains("exceeded max depth"), "{levels} {kind}: {message}");
        }
        let patch = format!(r#"{{"spec":{}}}"#, nested(levels));
        for kind in ["application/merge-patch+json", "application/apply-patch+yaml"] {
            let body = if kind.contains("apply") { thing("b", &nested(levels)) } else { patch.clone() };
            let path = format!("{THINGS}/b?fieldManager=m");
            let (code, answer) = server.send(Method::PATCH, &path, kind, body).await;
            assert!((400..500).contains(&code), "{levels} {kind}: {code} {answer}");
        }
    }

    // As deep as may be, it can be read, listed and applied again, whatever managedFields add.
    let (code, answer) = server.send(Method::POST, THINGS, JSON, thing("a", &nested(99))).await;
    assert_eq!(code, 201, "{answer}");
    let (code, list) = server.answer(Method::GET, THINGS, &Value::Null).await;
    assert_eq!((code, list["items"].as_array().map(Vec::len)), (200, Some(1)));
    let path = format!("{THINGS}/a");
    let (code, read) = server.answer(Method::GET, &path, &Value::Null).await;
    assert_eq!((code, read["spec"]["a"]["a"].is_object()), (200, true));
    let (code, labelled) = server.answer(Method::PATCH, &path, &json!({"metadata": {"labels": {"x": "y"}}})).await;
    assert_eq!((code, &labelled["spec"]), (200, &read["spec"]));

    // One level more, and a document that doubles forty times.
    let deeper = json!([{"op": "copy", "from": "/spec", "path": "/spec/b"}]);
    let doubles: Vec<Value> =
        (0..40).map(|n| json!({"op": "copy", "from": "/spec", "path": format!("/spec/x{n}")})).collect();
    for patch in [deeper, doubles.into()] {
        let kind = "application/json-patch+json";
        let (code, answer) = server.send(Method::PATCH, &path, kind, patch.to_string()).await;
        assert_eq!(code, 422, "{answer}");
    }
    let (code, _) = server.answer(Method::DELETE, &path, &Value::Null).await;
    assert_eq!(code, 200);
}
