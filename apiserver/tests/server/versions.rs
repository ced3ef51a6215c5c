//! Webhooks and policies that name another version of a custom resource than the one that is written, where a webhook
//! converts between the two.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{Server, webhook::WebhookServer};

/// Converts `spec.old` of v1 into `spec.new` of v2 and back.
fn converted(object: &Value, to: &str) -> Value {
    let mut object = object.clone();
    if object["apiVersion"] != to {
        let (from, into) = if to == "x.example.com/v2" { ("old", "new") } else { ("new", "old") };
        object["apiVersion"] = to.into();
        let value = object["spec"][from].take();
        object["spec"] = json!({});
        object["spec"][into] = value;
    }
    object
}

fn answer(asked: &Value) -> (u16, Value) {
    let request = &asked["request"];
    let mut response = json!({"uid": request["uid"]});
    if asked["kind"] == "ConversionReview" {
        let to = request["desiredAPIVersion"].as_str().unwrap();
        let objects = request["objects"].as_array().unwrap();
        response["convertedObjects"] = objects.iter().map(|object| converted(object, to)).collect();
        response["result"] = json!({"status": "Success"});
    } else {
        let (object, old) = (&request["object"], &request["oldObject"]);
        let seen = [object, old]
            .iter()
            .all(|o| o.is_null() || o["apiVersion"] == "x.example.com/v2" && o["spec"]["new"].is_string());
        response["allowed"] = seen.into();
        response["status"] = json!({"message": format!("saw {object} and {old}")});
        if seen && object["spec"]["new"] == "x" {
            response["patchType"] = "JSONPatch".into();
            // [{"op":"replace","path":"/spec/new","value":"y"}]
            response["patch"] = "W3sib3AiOiJyZXBsYWNlIiwicGF0aCI6Ii9zcGVjL25ldyIsInZhbHVlIjoieSJ9XQ==".into();
        }
    }
    (200, json!({"kind": asked["kind"], "apiVersion": asked["apiVersion"], "response": response}))
}

fn definition(convert: &Value) -> Value {
    let version = |name: &str, field: &str, storage: bool| {
        let mut properties = json!({});
        properties[field] = json!({"type": "string"});
        json!({"name": name, "served": true, "storage": storage, "schema": {"openAPIV3Schema": {"type": "object",
            "properties": {"spec": {"type": "object", "properties": properties}}}}})
    };
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.x.example.com"},
        "spec": {"group": "x.example.com", "scope": "Cluster", "names": {"plural": "things", "kind": "Thing"},
            "versions": [version("v1", "old", true), version("v2", "new", false)],
            "conversion": {"strategy": "Webhook",
                "webhook": {"conversionReviewVersions": ["v1"], "clientConfig": convert}}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_and_policies_see_the_version_they_name() {
    let server = Server::start().await;
    let hook = WebhookServer::start(&["127.0.0.1"], |asked| answer(&asked)).await;
    let rule = json!({"apiGroups": ["x.example.com"], "apiVersions": ["v2"], "operations": ["CREATE", "UPDATE"], "resources": ["things"]});
    let config = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "h"}, "webhooks": [{"name": "h.example.com", "clientConfig": hook.config("/admit"),
            "timeoutSeconds": 30, "rules": [rule], "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "matchConditions": [{"name": "c", "expression": "has(object.spec.new)"}]}]});
    let policy = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "p"}, "spec": {"matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "object.spec.new == 'y' && (oldObject == null || oldObject.spec.new == 'y')"}]}});
    let binding = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "p"}, "spec": {"policyName": "p", "validationActions": ["Deny"]}});
    let admission = "/apis/admissionregistration.k8s.io/v1";
    for (path, object) in [
        ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions".to_owned(), definition(&hook.config("/convert"))),
        (format!("{admission}/mutatingwebhookconfigurations"), config),
        (format!("{admission}/validatingadmissionpolicies"), policy),
        (format!("{admission}/validatingadmissionpolicybindings"), binding),
    ] {
        let (code, made) = server.answer(Method::POST, &path, &object).await;
        assert_eq!(code, 201, "{made}");
    }
    let things = "/apis/x.example.com/v1/things";
    let thing = |old: &str| json!({"apiVersion": "x.example.com/v1", "kind": "Thing", "metadata": {"name": "a"}, "spec": {"old": old}});
    let made = server.until(Method::POST, things, &thing("x"), |code, _| code == 201).await;
    assert_eq!(made["spec"], json!({"old": "y"}), "the webhook's change came back as v1");
    assert_eq!(made["apiVersion"], "x.example.com/v1");
    let path = format!("{things}/a");
    let (code, put) = server.answer(Method::PATCH, &path, &json!({"spec": {"old": "x"}})).await;
    assert_eq!((code, &put["spec"]), (200, &json!({"old": "y"})), "{put}");
    let (code, denied) = server.answer(Method::PATCH, &path, &json!({"spec": {"old": "z"}})).await;
    assert_eq!(code, 422, "{denied}");
    assert!(denied["message"].as_str().unwrap().contains("failed expression: object.spec.new == 'y'"), "{denied}");
}
