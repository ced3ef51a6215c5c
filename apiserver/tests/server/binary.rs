//! A client that speaks protobuf as client-go does: requests, answers, errors, watch frames.

use futures::StreamExt;
use reqwest::{Method, Response};
use serde_json::Value;

use super::{
    Server,
    every_type::{list, objects},
    kubectl::Kubectl,
    wire::{Message, bytes, number, sealed},
};

const BINARY: &str = "application/vnd.kubernetes.protobuf";
const PATH: &str = "/api/v1/namespaces/default/configmaps";

async fn call(server: &Server, method: Method, path: &str, body: Vec<u8>) -> (u16, String, Message) {
    let request = server.client.request(method, server.url(path)).header("content-type", BINARY);
    let request = request.header("accept", format!("{BINARY},application/json"));
    let answer = request.body(body).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], BINARY);
    let status = answer.status().as_u16();
    let (kind, message) = Message::open(&answer.bytes().await.unwrap());
    (status, kind, message)
}

/// ConfigMap: metadata = 1 (name = 1, resourceVersion = 6), data = 2 (a map), immutable = 4.
fn config_map(name: &str, version: &str, value: &str) -> Vec<u8> {
    let metadata = [bytes(1, name.as_bytes()), bytes(6, version.as_bytes())].concat();
    let entry = [bytes(1, b"key"), bytes(2, value.as_bytes())].concat();
    sealed("v1", "ConfigMap", &[bytes(1, &metadata), bytes(2, &entry)].concat())
}

fn value(config_map: &Message) -> String {
    config_map.message(2).text(2)
}

/// The next event: a length of four bytes, then type = 1 and object = 2 (raw = 1: an envelope of its own).
async fn event(
    watch: &mut (impl StreamExt<Item = reqwest::Result<bytes::Bytes>> + Unpin),
    kept: &mut Vec<u8>,
) -> String {
    loop {
        if let Some((head, rest)) = kept.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*head) as usize;
            if rest.len() >= length {
                let event = Message::read(&rest[..length]);
                let (kind, object) = Message::open(event.message(2).all(1).next().unwrap());
                let shown = format!("{} {kind} {} {}", event.text(1), object.message(1).text(1), value(&object));
                kept.drain(..length + 4);
                return shown;
            }
        }
        kept.extend_from_slice(&watch.next().await.expect("more events").unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protobuf_client_works() {
    let server = Server::start().await;
    let (status, kind, list) = call(&server, Method::GET, PATH, Vec::new()).await;
    assert_eq!((status, kind.as_str()), (200, "v1 ConfigMapList"));
    let since = list.message(1).text(2);
    let watching = format!("{PATH}?watch=true&resourceVersion={since}");
    let accept = format!("{BINARY};stream=watch");
    let watch: Response = server.client.get(server.url(&watching)).header("accept", &accept).send().await.unwrap();
    assert_eq!(watch.headers()["content-type"], accept.as_str());
    let (mut watch, mut kept) = (watch.bytes_stream(), Vec::new());

    let (status, kind, made) = call(&server, Method::POST, PATH, config_map("binary", "", "one")).await;
    assert_eq!((status, kind.as_str(), value(&made).as_str()), (201, "v1 ConfigMap", "one"));
    let metadata = made.message(1);
    assert_eq!((metadata.text(3).as_str(), metadata.text(5).len()), ("default", 36), "namespace and uid");
    assert!(metadata.message(8).number(1) > 1_700_000_000, "a creationTimestamp");

    let one = format!("{PATH}/binary");
    let changed = config_map("binary", &metadata.text(6), "two");
    let (status, _, put) = call(&server, Method::PUT, &one, changed.clone()).await;
    assert_eq!((status, value(&put).as_str()), (200, "two"));
    // Status: reason = 4, details = 5 (name = 1), code = 6.
    let (status, kind, conflict) = call(&server, Method::PUT, &one, changed).await;
    assert_eq!((status, kind.as_str()), (409, "v1 Status"));
    assert_eq!((conflict.text(4).as_str(), conflict.number(6)), ("Conflict", 409));

    let patch = server.client.patch(server.url(&one)).header("accept", BINARY);
    let patch = patch.header("content-type", "application/strategic-merge-patch+json");
    let patched = patch.body(r#"{"data":{"key":"three"}}"#).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(value(&Message::open(&patched).1), "three");

    assert_eq!(call(&server, Method::POST, PATH, config_map("other", "", "")).await.0, 201);
    let (_, _, list) = call(&server, Method::GET, &format!("{PATH}?limit=1"), Vec::new()).await;
    assert_eq!(list.all(2).count(), 1);
    assert!(!list.message(1).text(3).is_empty(), "a continue token");

    // DeleteOptions: preconditions = 2 (uid = 1).
    let wrong = sealed("v1", "DeleteOptions", &bytes(2, &bytes(1, b"another")));
    assert_eq!(call(&server, Method::DELETE, &one, wrong).await.0, 409);
    let options = sealed("v1", "DeleteOptions", &[number(1, 0), bytes(4, b"Background")].concat());
    let (status, kind, _) = call(&server, Method::DELETE, &one, options).await;
    assert_eq!((status, kind.as_str()), (200, "v1 Status"));
    let (status, _, gone) = call(&server, Method::GET, &one, Vec::new()).await;
    assert_eq!((status, gone.text(4).as_str(), gone.message(5).text(1).as_str()), (404, "NotFound", "binary"));

    let mut seen = Vec::new();
    while seen.last().is_none_or(|last: &String| !last.starts_with("DELETED")) {
        let shown = event(&mut watch, &mut kept).await;
        seen.extend(Some(shown).filter(|shown| shown.contains("binary")));
    }
    let want =
        ["ADDED v1 ConfigMap binary one", "MODIFIED v1 ConfigMap binary two", "MODIFIED v1 ConfigMap binary three"];
    assert_eq!(seen[..3], want);
    assert_eq!(seen[3], "DELETED v1 ConfigMap binary three");
}

async fn json(server: &Server, path: &str) -> Value {
    server.client.get(server.url(path)).send().await.unwrap().json().await.unwrap()
}

/// An object without what every write changes.
async fn content(server: &Server, path: &str) -> Value {
    let mut object = json(server, path).await;
    for field in ["managedFields", "resourceVersion"] {
        object["metadata"].as_object_mut().unwrap().remove(field);
    }
    object
}

/// Reads an object in protobuf and writes just that; a conflict is for another try.
async fn written_back(server: &Server, path: &str) {
    for _ in 0..5 {
        let read = server.client.get(server.url(path)).header("accept", BINARY).send().await.unwrap();
        assert_eq!(
            (read.status().as_u16(), &read.headers()["content-type"]),
            (200, &BINARY.parse().unwrap()),
            "{path}"
        );
        let body = read.bytes().await.unwrap();
        let put = server.client.put(server.url(path)).header("content-type", BINARY).body(body).send().await.unwrap();
        match put.status().as_u16() {
            409 => {}
            status => return assert_eq!(status, 200, "{path}: {}", put.text().await.unwrap()),
        }
    }
    panic!("{path} changes all the time");
}

/// What typed clients of client-go do all the time.
#[tokio::test(flavor = "multi_thread")]
async fn everything_survives_being_read_and_written_back() {
    let server = Server::start().await;
    let k = Kubectl::new(&server);
    tokio::task::block_in_place(|| {
        list(&k, "all.json", &objects(&k));
        k.k("create -f all.json");
    });
    let mut paths = vec!["/api/v1".to_owned()];
    for group in json(&server, "/apis").await["groups"].as_array().unwrap() {
        // Custom resources have no protobuf.
        let versions = group["versions"].as_array().unwrap().iter().filter(|_| group["name"] != "example.com");
        paths.extend(versions.map(|v| format!("/apis/{}", v["groupVersion"].as_str().unwrap())));
    }
    let mut written = 0;
    for group in paths {
        for resource in json(&server, &group).await["resources"].as_array().unwrap() {
            let can = |verb: &str| resource["verbs"].as_array().unwrap().iter().any(|v| v == verb);
            if !can("list") || !can("update") {
                continue;
            }
            let name = resource["name"].as_str().unwrap();
            // Two of each, of which one is not built in.
            let all = json(&server, &format!("{group}/{name}")).await;
            let items = all["items"].as_array().unwrap();
            for item in
                items.iter().take(1).chain(items.iter().skip(1).filter(|i| !i["metadata"]["labels"]["every"].is_null()))
            {
                let metadata = &item["metadata"];
                let place = match metadata["namespace"].as_str() {
                    Some(namespace) => format!("namespaces/{namespace}/"),
                    None => String::new(),
                };
                let path = format!("{group}/{place}{name}/{}", metadata["name"].as_str().unwrap());
                let before = content(&server, &path).await;
                written_back(&server, &path).await;
                assert_eq!(content(&server, &path).await, before, "{path}");
                written += 1;
            }
        }
    }
    assert!(written > 60, "{written}");
}
