//! Every fact of two tables by a request: the defaults of `default-rows.json` (`defaults.json` has an object for each) and
//! the fields of `field-selectors.json`.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use serde_json::{Value, json};

use crate::Server;

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

#[tokio::test(flavor = "multi_thread")]
async fn every_resource_and_column() {
    let facts: Value = serde_json::from_str(include_str!("../../../api/data/resources.json")).unwrap();
    let columns: Value = serde_json::from_str(include_str!("../../data/printer-columns.json")).unwrap();
    let server = Server::start().await;
    let words = |v: &Value| list(v).map(|word| word.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>();
    let text = |v: &Value, field: &str| v[field].as_str().unwrap_or_default().to_owned();
    let (mut wrong, mut tables, mut discovered) = (Vec::new(), 0, BTreeMap::new());
    for fact in list(&facts["resources"]) {
        let (group, version, plural) = (text(fact, "group"), text(fact, "version"), text(fact, "plural"));
        let root = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        if !discovered.contains_key(&root) {
            let (_, answer) = server.answer(Method::GET, &root, &Value::Null).await;
            discovered.insert(root.clone(), answer);
        }
        let Some(found) = list(&discovered[&root]["resources"]).find(|found| found["name"] == *plural) else {
            wrong.push(format!("{root}/{plural} is not there"));
            continue;
        };
        for (own, fact) in [("singularName", text(fact, "singular")), ("kind", text(fact, "kind"))] {
            if text(found, own) != fact {
                wrong.push(format!("{root}/{plural}: {own} {} is not {fact:?}", found[own]));
            }
        }
        for field in ["shortNames", "categories", "verbs"] {
            if words(&found[field]) != words(&fact[field]) {
                wrong.push(format!("{root}/{plural}: {field} {} are not {}", found[field], fact[field]));
            }
        }
        if found["namespaced"] != fact["namespaced"] {
            wrong.push(format!("{root}/{plural}: namespaced {}", found["namespaced"]));
        }
        if !words(&fact["verbs"]).contains("list") {
            continue;
        }
        let url = server.url(&format!("{root}/{plural}?limit=1"));
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
        let answer = server.client.get(url).header("accept", accept).send().await.unwrap().text().await.unwrap();
        let table: Value = serde_json::from_str(&answer).unwrap();
        let shown = |c: &Value| json!([c["name"], c["type"], c["format"], c["priority"]]);
        let shown: Value = list(&table["columnDefinitions"]).map(shown).collect();
        let key = if group.is_empty() { format!("{version}/{plural}") } else { format!("{group}/{version}/{plural}") };
        let plain = json!([["Name", "string", "name", 0], ["Created At", "date", "", 0]]);
        if shown != *columns["columns"].get(&key).unwrap_or(&plain) {
            wrong.push(format!("{key}: columns {shown}"));
        }
        tables += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tables > 60, "{tables} tables");
}
