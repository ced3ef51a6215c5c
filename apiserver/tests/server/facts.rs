//! Every fact of two tables by a request: the defaults of `default-rows.json` (`defaults.json` has an object for each) and
//! the fields of `field-selectors.json`.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use crate::Server;

impl Server {
    async fn answer(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let mut request = self.client.request(method.clone(), self.url(path));
        if !body.is_null() {
            let kind = if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" };
            request = request.header("content-type", kind).body(body.to_string());
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap())
    }
}

fn list(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_default() {
    let rows: Value = serde_json::from_str(include_str!("default-rows.json")).unwrap();
    let cases: Value = serde_json::from_str(include_str!("defaults.json")).unwrap();
    let fact = |row: &Value| [&row[0], &row[1], &row[3]].map(|v| v.as_str().unwrap_or_default()).join(" | ");
    let facts: BTreeSet<String> = list(&rows).map(fact).collect();
    let cased = list(&cases).flat_map(|c| list(&c["facts"])).map(|f| f.as_str().unwrap().to_owned());
    assert_eq!(cased.collect::<BTreeSet<_>>(), facts, "facts with cases");

    let server = Server::start().await;
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    server.answer(Method::POST, "/api/v1/namespaces/default/serviceaccounts", &account).await;
    let mut wrong = Vec::new();
    for case in list(&cases) {
        let (path, manifest) = (case["path"].as_str().unwrap(), &case["manifest"]);
        let dry = format!("{path}?dryRun=All");
        let method = if path.ends_with("/exempt") { Method::PUT } else { Method::POST };
        let (code, made) = match case.get("status") {
            None => server.answer(method, &dry, manifest).await,
            Some(status) => {
                server.answer(method, path, manifest).await;
                server.answer(Method::PATCH, &format!("{path}/own/status"), &json!({ "status": status })).await
            }
        };
        if code != 200 && code != 201 {
            wrong.push(format!("{manifest}: {code} {made}"));
            continue;
        }
        for (pointer, want) in case["want"].as_object().unwrap() {
            let got = made.pointer(pointer).unwrap_or(&Value::Null);
            if got != want && (want != "<any>" || got.is_null()) {
                wrong.push(format!("{manifest}: {pointer} is {got}, not {want}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_to_select_by() {
    let facts: Value = serde_json::from_str(include_str!("field-selectors.json")).unwrap();
    let server = Server::start().await;
    let mut wrong = Vec::new();
    let url = |key: &str, selector: &str| {
        let root = if key.starts_with("v1/") { "api" } else { "apis" };
        format!("/{root}/{key}?fieldSelector={selector}")
    };
    let supported = facts["supported"].as_object().unwrap();
    for (key, fields) in supported {
        for field in list(fields) {
            let path = url(key, &format!("{}=x", field.as_str().unwrap()));
            let (code, body) = server.answer(Method::GET, &path, &Value::Null).await;
            if code != 200 {
                wrong.push(format!("{path}: {body}"));
            }
        }
    }
    for (pattern, resources) in facts["unsupportedError"]["patterns"].as_object().unwrap() {
        let want = pattern.replace("<field>", "spec.foo");
        for resource in list(resources) {
            let suffix = format!("/{}", resource.as_str().unwrap());
            for key in supported.keys().filter(|k| k.ends_with(&suffix)) {
                let path = url(key, "spec.foo=x");
                let (code, body) = server.answer(Method::GET, &path, &Value::Null).await;
                if code != 400 || body["message"] != want {
                    wrong.push(format!("{path}: {code} {body}, not {want}"));
                }
            }
        }
    }
    for (path, want) in facts["exactErrors"].as_object().unwrap() {
        let (_, body) = server.answer(Method::GET, path, &Value::Null).await;
        if body != want["body"] {
            wrong.push(format!("{path}: {body}, not {}", want["body"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
