//! The plugins against a real TLS server on loopback.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isopod_api::status::Status;
use serde_json::{Value, json};

use super::{MutatingAdmissionWebhook, ValidatingAdmissionWebhook, Webhooks};
use crate::{
    admission::testing::{Case, FakeObjects},
    webhook::testing::WebhookServer,
};

/// Answers a review.
fn reply(review: &Value, response: Value) -> (u16, Value) {
    let mut response = response;
    response["uid"] = review["request"]["uid"].clone();
    (200, json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": response}))
}

fn patched(operations: &Value) -> Value {
    json!({"allowed": true, "patchType": "JSONPatch", "patch": STANDARD.encode(operations.to_string())})
}

fn webhook(name: &str, config: Value, extra: Value) -> Value {
    let mut webhook = json!({"name": name, "clientConfig": config, "sideEffects": "None", "timeoutSeconds": 5,
        "admissionReviewVersions": ["v1"], "failurePolicy": "Fail", "matchPolicy": "Equivalent",
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["*"], "resources": ["configmaps"]}]});
    for (key, value) in extra.as_object().unwrap() {
        webhook[key.as_str()] = value.clone();
    }
    webhook
}

fn configuration(kind: &str, name: &str, webhooks: Value) -> Value {
    json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name},
        "webhooks": webhooks})
}

fn objects(configurations: &[Value]) -> FakeObjects {
    let objects = FakeObjects::new([json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns"}})]);
    for value in configurations {
        objects.put(&crate::admission::testing::gvr_of(value), value.clone());
    }
    objects
}

fn map(data: Value) -> Case<'static> {
    Case::create(json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "c", "namespace": "ns"}, "data": data}))
}

fn plugins() -> (MutatingAdmissionWebhook, ValidatingAdmissionWebhook) {
    let webhooks = Arc::new(Webhooks::new(Arc::default()));
    (MutatingAdmissionWebhook(Arc::clone(&webhooks)), ValidatingAdmissionWebhook(webhooks))
}

async fn validate(server: &WebhookServer, path: &str, extra: Value) -> (Result<(), Status>, Vec<String>) {
    let hook = webhook("v.example.com", server.config(path), extra);
    let objects = objects(&[configuration("ValidatingWebhookConfiguration", "v", json!([hook]))]);
    let mut case = map(json!({"k": "v"}));
    let result = case.run(&plugins().1, &objects).await;
    (result, case.warnings)
}

#[tokio::test]
async fn validating_answers() {
    let server = WebhookServer::start(&["127.0.0.1"], |review| {
        let request = &review["request"];
        match review["@path"].as_str().unwrap().split('?').next().unwrap() {
            "/allow" => {
                assert_eq!(review["kind"], "AdmissionReview");
                assert_eq!((&request["operation"], &request["namespace"]), (&json!("CREATE"), &json!("ns")));
                assert_eq!(request["object"]["data"], json!({"k": "v"}));
                assert_eq!((&request["oldObject"], &request["dryRun"]), (&Value::Null, &json!(false)));
                assert_eq!(request["requestResource"]["resource"], "configmaps");
                reply(&review, json!({"allowed": true, "warnings": ["careful"]}))
            }
            "/silent" => reply(&review, json!({"allowed": false})),
            "/said" => reply(&review, json!({"allowed": false, "status": {"message": "not here", "code": 403, "reason": "Forbidden"}})),
            "/patch" => reply(&review, patched(&json!([]))),
            "/uid" => (200, json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "response": {"uid": "x", "allowed": true}})),
            "/none" => (200, json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"})),
            _ => (500, json!("boom")),
        }
    })
    .await;
    let at = server.address;
    let calling =
        |text: &str| Some((format!("Internal error occurred: failed calling webhook \"v.example.com\": {text}"), 500));
    for (path, want) in [
        ("/allow", None),
        (
            "/silent",
            Some(("admission webhook \"v.example.com\" denied the request without explanation".to_owned(), 400)),
        ),
        ("/said", Some(("admission webhook \"v.example.com\" denied the request: not here".to_owned(), 403))),
        ("/patch", calling("received invalid webhook response: validating webhook may not return response.patch")),
        ("/none", calling("received invalid webhook response: webhook response was absent")),
        (
            "/broken",
            calling(
                "failed to call webhook: an error on the server (\"\\\"boom\\\"\") has prevented the request from succeeding",
            ),
        ),
    ] {
        let (result, _) = validate(&server, path, json!({})).await;
        assert_eq!(result.err().map(|s| (s.message, s.code)), want, "{path}");
    }
    let (result, _) = validate(&server, "/uid", json!({})).await;
    assert!(result.unwrap_err().message.contains("expected response.uid="));
    assert_eq!(validate(&server, "/allow", json!({})).await.1, ["careful"]);
    let ignored = json!({"failurePolicy": "Ignore"});
    assert!(validate(&server, "/broken", ignored.clone()).await.0.is_ok(), "an unreachable webhook may be missing");
    assert!(validate(&server, "/silent", ignored).await.0.is_err(), "a refusal counts all the same");
    let skipped = json!({"matchConditions": [{"name": "n", "expression": "object.metadata.name != 'c'"}]});
    assert!(validate(&server, "/silent", skipped).await.0.is_ok());
    let broken = json!({"matchConditions": [{"name": "n", "expression": "object.spec.x == 1"}]});
    let status = validate(&server, "/allow", broken).await.0.unwrap_err();
    let want = "configmaps \"c\" is forbidden: expression 'object.spec.x == 1' resulted in error: no such key: spec";
    assert_eq!((status.message.as_str(), status.code), (want, 403));
    let (result, _) = validate(&server, "/silent", json!({"objectSelector": {"matchLabels": {"no": "no"}}})).await;
    assert!(result.is_ok());
    drop(server);
    let gone = json!({"url": format!("https://{at}/x"), "caBundle": ""});
    let hook = webhook(
        "v.example.com",
        gone,
        json!({"rules": [{"apiGroups": [""], "apiVersions": ["v1"],
        "operations": ["*"], "resources": ["secrets"]}]}),
    );
    let objects = objects(&[configuration("ValidatingWebhookConfiguration", "v", json!([hook]))]);
    assert!(map(json!({})).run(&plugins().1, &objects).await.is_ok(), "other writes do not wait for it");
}

#[tokio::test]
async fn mutating_in_order_and_again() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let server = WebhookServer::start(&["127.0.0.1"], move |review| {
        let data = &review["request"]["object"]["data"];
        match review["@path"].as_str().unwrap().split('?').next().unwrap() {
            "/count" => {
                counted.fetch_add(1, Ordering::Relaxed);
                let seen = data.as_object().map_or(0, serde_json::Map::len).to_string();
                reply(&review, patched(&json!([{"op": "add", "path": "/data/seen", "value": seen}])))
            }
            "/add" if data["late"].is_null() => {
                reply(&review, patched(&json!([{"op": "add", "path": "/data/late", "value": "1"}])))
            }
            "/delete" => reply(&review, patched(&json!([{"op": "add", "path": "/x", "value": "1"}]))),
            "/bad" => reply(&review, patched(&json!([{"op": "remove", "path": "/data/nope"}]))),
            _ => reply(&review, json!({"allowed": true})),
        }
    })
    .await;
    let first = webhook("a.example.com", server.config("/count"), json!({"reinvocationPolicy": "IfNeeded"}));
    let second = webhook("b.example.com", server.config("/add"), json!({"reinvocationPolicy": "Never"}));
    let kind = "MutatingWebhookConfiguration";
    let cluster = objects(&[configuration(kind, "one", json!([first])), configuration(kind, "two", json!([second]))]);
    let mut case = map(json!({"k": "v"}));
    case.run(&plugins().0, &cluster).await.unwrap();
    assert_eq!(case.object["data"], json!({"k": "v", "seen": "3", "late": "1"}), "the first saw what the second added");
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    for (path, want) in [("/bad", "doc is missing path: /data/nope"), ("/delete", "attempted to modify the object")] {
        let hook = webhook("m.example.com", server.config(path), json!({}));
        let cluster = objects(&[configuration(kind, "m", json!([hook]))]);
        let mut case = map(json!({"k": "v"}));
        if path == "/delete" {
            case.operation = crate::admission::Operation::Delete;
            (case.old, case.object) = (case.object, Value::Null);
        }
        let status = case.run(&plugins().0, &cluster).await.unwrap_err();
        assert!(status.message.contains(want) && status.code == 500, "{}", status.message);
    }
}

#[tokio::test]
async fn dry_run_needs_a_webhook_without_side_effects() {
    let server = WebhookServer::start(&["127.0.0.1"], |review| {
        assert_eq!(review["request"]["dryRun"], true);
        reply(&review, json!({"allowed": true}))
    })
    .await;
    for (effects, want) in [
        ("NoneOnDryRun", None),
        ("Some", Some("admission webhook \"v.example.com\" does not support dry run".to_owned())),
    ] {
        let hook = webhook("v.example.com", server.config("/"), json!({"sideEffects": effects}));
        let cluster = objects(&[configuration("ValidatingWebhookConfiguration", "v", json!([hook]))]);
        let mut case = map(json!({}));
        case.dry_run = true;
        assert_eq!(case.run(&plugins().1, &cluster).await.err().map(|s| s.message), want);
    }
}

#[tokio::test]
async fn nobody_judges_webhook_configurations() {
    let closed = json!({"url": "https://127.0.0.1:1/", "caBundle": ""});
    let all = json!({"rules": [{"apiGroups": ["*"], "apiVersions": ["*"], "operations": ["*"], "resources": ["*/*"]}]});
    let config = configuration("ValidatingWebhookConfiguration", "v", json!([webhook("v.example.com", closed, all)]));
    let cluster = objects(std::slice::from_ref(&config));
    assert!(Case::create(config).run(&plugins().1, &cluster).await.is_ok());
    assert!(map(json!({})).run(&plugins().1, &cluster).await.is_err());
}
