//! Whatever clients send, the server answers: it never fails inside and stays alive. Deterministic: one seed, one run.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use isopod_api::{protobuf, resources};
use reqwest::{Method, header};
use serde_json::{Value, json};

use super::Server;

/// Requests of one run.
const REQUESTS: usize = 6000;
const SEED: u64 = 0x15_0F0D;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.roll(of.len())]
    }

    fn often(&mut self) -> bool {
        self.roll(4) > 0
    }
}

#[derive(Debug, Clone)]
struct Shot {
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

const QUERIES: [&str; 28] = [
    "limit=1",
    "limit=-1",
    "limit=x",
    "continue=abc",
    "continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6LTEsInN0YXJ0IjoiIn0",
    "resourceVersion=0",
    "resourceVersion=99999999999999999999",
    "resourceVersion=-",
    "resourceVersionMatch=Exact",
    "labelSelector=a%20in%20(",
    "labelSelector=%00%ff",
    "fieldSelector=metadata.name%3Dx%2C%2C",
    "fieldSelector=%5C",
    "watch=true&timeoutSeconds=1",
    "watch=1&timeoutSeconds=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
    "dryRun=All",
    "dryRun=%F0%9F%98%80",
    "fieldManager=%0A",
    "fieldManager=x",
    "force=true",
    "fieldValidation=Strict",
    "fieldValidation=Nope",
    "pretty=true",
    "gracePeriodSeconds=-9223372036854775808",
    "propagationPolicy=Foreground",
    "orphanDependents=maybe",
    "includeObject=Object",
    "timeout=1ns",
];
const ACCEPTS: [&str; 9] = [
    "application/json",
    "application/yaml",
    "application/vnd.kubernetes.protobuf",
    "*/*",
    "text/html;q=0.1,",
    "application/json;as=Table;g=meta.k8s.io;v=v1",
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    "application/vnd.kubernetes.protobuf;stream=watch",
    ";;;=",
];
const TYPES: [&str; 9] = [
    "application/json",
    "application/yaml",
    "application/vnd.kubernetes.protobuf",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
    "text/plain",
    "application/json;charset=\u{e9}",
];

/// A value of no particular shape.
fn value(dice: &mut Dice, depth: usize) -> Value {
    let names =
        ["spec", "metadata", "name", "status", "items", "$patch", "op", "path", "", "a.b/c", "f:x", "containers"];
    match dice.roll(if depth < 4 { 9 } else { 6 }) {
        0 => Value::Null,
        1 => json!(dice.roll(2) == 0),
        2 => json!([0, -1, i64::MAX, i64::MIN][dice.roll(4)]),
        3 => json!([1e308, -0.5, 1e-7][dice.roll(3)]),
        4 | 5 => json!(dice.one(&[
            "",
            "x",
            "\u{0}",
            "delete",
            "replace",
            "1Gi",
            "-",
            "2024-01-01T00:00:00Z",
            "😀",
            "/spec/0"
        ])),
        6 => (0..dice.roll(4)).map(|_| value(dice, depth + 1)).collect(),
        _ => (0..dice.roll(5))
            .map(|_| (dice.one(&names).to_owned(), value(dice, depth + 1)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
    }
}

/// An object of a kind with random members.
fn object(dice: &mut Dice, kind: &str, version: &str) -> Value {
    let mut object =
        json!({"kind": kind, "apiVersion": version, "metadata": {"name": dice.one(&["x", "x", "fuzz", "A_b"])}});
    for member in ["spec", "status", "data", "rules", "webhooks", "subjects", "items", "target"] {
        if dice.roll(8) == 0 {
            object[member] = value(dice, 0);
        }
    }
    if dice.often() {
        if !object["spec"].is_object() {
            object["spec"] = json!({});
        }
        object["spec"]["template"] = json!({"spec": {"containers": [value(dice, 2)]}});
    }
    object
}

fn patch(dice: &mut Dice) -> Value {
    let paths = [
        "/metadata/labels/a",
        "/spec",
        "/",
        "",
        "/spec/containers/-",
        "/a~1b~0c~2",
        "/metadata/name",
        "/items/999999999999",
    ];
    let ops = ["add", "remove", "replace", "move", "copy", "test", "no"];
    (0..dice.roll(4))
        .map(|_| json!({"op": dice.one(&ops), "path": dice.one(&paths), "from": dice.one(&paths), "value": value(dice, 1)}))
        .collect()
}

/// Bytes of a kind of body, now and then damaged.
fn body(dice: &mut Dice, content: &str, kind: &str, version: &str) -> Vec<u8> {
    let made = object(dice, kind, version);
    let mut bytes = match content {
        "application/vnd.kubernetes.protobuf" => protobuf::encode(&made).unwrap_or_else(|_| b"k8s\0\x12\xff".to_vec()),
        "application/json-patch+json" => patch(dice).to_string().into_bytes(),
        "application/merge-patch+json" | "application/strategic-merge-patch+json" if dice.often() => {
            value(dice, 0).to_string().into_bytes()
        }
        "application/yaml" | "application/apply-patch+yaml" if dice.roll(2) == 0 => {
            format!("kind: {kind}\napiVersion: {version}\nmetadata: {{name: x}}\nspec: &a [*a, !!binary x]\n")
                .into_bytes()
        }
        _ => made.to_string().into_bytes(),
    };
    match dice.roll(8) {
        0 => bytes.truncate(dice.roll(bytes.len() + 1)),
        1 if !bytes.is_empty() => {
            let at = dice.roll(bytes.len());
            bytes[at] = dice.roll(256) as u8;
        }
        2 => bytes = (0..dice.roll(64)).map(|_| dice.roll(256) as u8).collect(),
        3 => bytes = "[".repeat(dice.roll(40_000)).into_bytes(),
        _ => {}
    }
    bytes
}

fn shot(dice: &mut Dice) -> Shot {
    let all = resources::all();
    let resource = &all[dice.roll(all.len())];
    let prefix = match resource.group.as_str() {
        "" => format!("/api/{}", resource.version),
        group => format!("/apis/{group}/{}", resource.version),
    };
    let mut path = prefix;
    if resource.namespaced && dice.often() {
        path += match dice.often() {
            true => "/namespaces/default",
            false => dice.one(&["/namespaces/fuzz", "/namespaces/%2e%2e", "/namespaces/A_b"]),
        };
    }
    path += &format!("/{}", resource.plural);
    if dice.roll(2) == 0 {
        path += dice.one(&["/x", "/x", "/fuzz", "/kubernetes", "/default", "/%00", "/..", "/a%2Fb", "/"]);
        let subresources = &resource.subresources;
        if !subresources.is_empty() && dice.roll(2) == 0 {
            path += &format!("/{}", subresources[dice.roll(subresources.len())].name);
        }
    }
    if dice.roll(12) == 0 {
        path = dice
            .one(&[
                "/",
                "/openapi/v2",
                "/openapi/v3/api/v1",
                "/apis",
                "/api//v1",
                "/metrics",
                "/version",
                "/%ff",
                "/readyz/x",
                "/.well-known/x",
            ])
            .to_owned();
    }
    let queries = if dice.roll(2) == 0 { 0 } else { dice.roll(3) };
    let queries: Vec<&str> = (0..queries).map(|_| dice.one(&QUERIES)).collect();
    if !queries.is_empty() {
        path += &format!("?{}", queries.join("&"));
    }
    let methods = ["GET", "GET", "POST", "POST", "PUT", "PATCH", "PATCH", "DELETE", "OPTIONS", "BREW"];
    let method: Method = methods[dice.roll(methods.len())].parse().unwrap();
    let fitting = if method == Method::PATCH { &TYPES[3..7] } else { &TYPES[..1] };
    let content = if dice.often() { dice.one(fitting) } else { dice.one(&TYPES) };
    let accept = if dice.often() { ACCEPTS[0] } else { dice.one(&ACCEPTS) };
    let mut headers = vec![("accept", accept.to_owned()), ("content-type", content.to_owned())];
    if dice.roll(10) == 0 {
        headers.push(("impersonate-user", dice.one(&["fuzz", "", "system:serviceaccount:a:b", "\u{e9}"]).to_owned()));
    }
    Shot { method, path, headers, body: body(dice, content, &resource.kind, &resource.api_version()) }
}

/// The answer's code, and its text when it tells of an error.
async fn fire(server: &Server, shot: &Shot) -> Result<(u16, String), String> {
    let mut request =
        server.client.request(shot.method.clone(), server.url(&shot.path)).timeout(Duration::from_secs(40));
    for (name, value) in &shot.headers {
        request = request.header(*name, header::HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    let answer = request.body(shot.body.clone()).send().await.map_err(|e| format!("{e:?}"))?;
    let code = answer.status().as_u16();
    let text = if code >= 400 { answer.text().await.map_err(|e| e.to_string())? } else { String::new() };
    Ok((code, text))
}

/// Kubernetes itself answers 500 without a reason to some patches; a failure inside says InternalError.
fn failed_inside(code: u16, text: &str) -> bool {
    code == 500 && (text.contains("InternalError") || text.contains("panicked") || !text.contains("message"))
}

#[tokio::test(flavor = "multi_thread")]
async fn anything_is_answered() {
    let server = Arc::new(Server::start().await);
    let mut dice = Dice(SEED);
    let shots: Vec<Shot> = (0..REQUESTS).map(|_| shot(&mut dice)).collect();
    let taken = AtomicUsize::new(0);
    let counted = &taken;
    let failures: Vec<String> = stream::iter(shots)
        .map(|shot| {
            let server = Arc::clone(&server);
            async move {
                match fire(&server, &shot).await {
                    Ok((code, text)) if failed_inside(code, &text) => Some(format!("{code} {text}: {}", shown(&shot))),
                    Ok((code, _)) => {
                        counted.fetch_add(usize::from(code < 300), Ordering::Relaxed);
                        None
                    }
                    Err(error) => Some(format!("{error}: {}", shown(&shot))),
                }
            }
        })
        .buffer_unordered(16)
        .filter_map(|failure| async { failure })
        .collect()
        .await;
    assert!(
        failures.is_empty(),
        "{} of {REQUESTS} failed, such as\n{}",
        failures.len(),
        failures[..failures.len().min(8)].join("\n")
    );
    assert!(server.ready().await, "the server lives");
    let taken = taken.into_inner();
    assert!(taken > REQUESTS / 20, "only {taken} requests made any sense");
}

fn shown(shot: &Shot) -> String {
    let body = &shot.body[..shot.body.len().min(400)];
    format!("{} {} {:?} {}", shot.method, shot.path, shot.headers, String::from_utf8_lossy(body).escape_debug())
}
