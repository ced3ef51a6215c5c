//! A Rust client: kube-rs with its typed and dynamic API, watcher, server-side apply and custom resources.

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::{
    api::core::v1::{ConfigMap, Namespace},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
    discovery::Discovery,
    runtime::{WatchStreamExt, wait, watcher},
};
use serde_json::json;

use super::{PATIENCE, Server, TOKEN};

fn client(server: &Server) -> Client {
    let mut config = Config::new(server.url("").parse().unwrap());
    let ca = std::fs::read(server.dir.path().join("ca.crt")).unwrap();
    config.root_cert = Some(rustls_pemfile::certs(&mut ca.as_slice()).map(|cert| cert.unwrap().to_vec()).collect());
    config.auth_info.token = Some(TOKEN.to_owned().into());
    Client::try_from(config).unwrap()
}

fn config_map(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"key": value}})).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn kube_rs_works() {
    let server = Server::start().await;
    let client = client(&server);
    assert_eq!(client.apiserver_version().await.unwrap().minor, "36");
    written_and_read(&client).await;
    watched(&client).await;
    applied(&client).await;
    custom(&client).await;
    let found = Discovery::new(client.clone()).run_aggregated().await.unwrap();
    assert!(found.resolve_gvk(&GroupVersionKind::gvk("apps", "v1", "Deployment")).is_some());
    assert!(found.resolve_gvk(&GroupVersionKind::gvk("x.example.com", "v1", "Thing")).is_some());
}

async fn written_and_read(client: &Client) {
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let made = maps.create(&PostParams::default(), &config_map("a", "one")).await.unwrap();
    let mut changed = made.clone();
    changed.data.as_mut().unwrap().insert("key".into(), "two".into());
    let put = maps.replace("a", &PostParams::default(), &changed).await.unwrap();
    assert_eq!(put.data.unwrap()["key"], "two");
    match maps.replace("a", &PostParams::default(), &changed).await {
        Err(kube::Error::Api(status)) => assert_eq!((status.code, status.reason.as_str()), (409, "Conflict")),
        other => panic!("{other:?}"),
    }
    let merge = Patch::Merge(json!({"metadata": {"labels": {"x": "y"}}}));
    assert_eq!(maps.patch("a", &PatchParams::default(), &merge).await.unwrap().labels()["x"], "y");
    let selected = maps.list(&ListParams::default().labels("x=y").fields("metadata.name=a")).await.unwrap();
    assert_eq!(selected.items.len(), 1);
    assert_eq!(maps.list_metadata(&ListParams::default().labels("x in (y)")).await.unwrap().items[0].name_any(), "a");
    assert!(maps.get_opt("b").await.unwrap().is_none());
    maps.delete(
        "a",
        &DeleteParams::default().preconditions(kube::api::Preconditions { uid: made.uid(), resource_version: None }),
    )
    .await
    .unwrap();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    assert!(namespaces.list(&ListParams::default()).await.unwrap().iter().any(|n| n.name_any() == "default"));
}

async fn watched(client: &Client) {
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    maps.create(&PostParams::default(), &config_map("w", "1")).await.unwrap();
    for settings in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
        let mut seen = watcher(maps.clone(), settings.fields("metadata.name=w")).touched_objects().boxed();
        assert_eq!(next(&mut seen).await, "1");
        let merge = Patch::Merge(json!({"data": {"key": "2"}}));
        maps.patch("w", &PatchParams::default(), &merge).await.unwrap();
        assert_eq!(next(&mut seen).await, "2");
        let back = Patch::Merge(json!({"data": {"key": "1"}}));
        maps.patch("w", &PatchParams::default(), &back).await.unwrap();
        assert_eq!(next(&mut seen).await, "1");
    }
}

async fn next(seen: &mut (impl futures::Stream<Item = watcher::Result<ConfigMap>> + Unpin)) -> String {
    let next = tokio::time::timeout(PATIENCE, seen.try_next()).await;
    next.expect("an event").unwrap().unwrap().data.unwrap()["key"].clone()
}

async fn applied(client: &Client) {
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let wanted = |value: &str| Patch::Apply(json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"key": value}}));
    let mine = maps.patch("s", &PatchParams::apply("one"), &wanted("1")).await.unwrap();
    assert_eq!(mine.managed_fields()[0].manager.as_deref(), Some("one"));
    match maps.patch("s", &PatchParams::apply("two"), &wanted("2")).await {
        Err(kube::Error::Api(status)) => {
            assert!(status.message.contains("conflict with \"one\": .data.key"), "{status:?}")
        }
        other => panic!("{other:?}"),
    }
    let forced = maps.patch("s", &PatchParams::apply("two").force(), &wanted("2")).await.unwrap();
    let owners: Vec<_> = forced.managed_fields().iter().filter_map(|entry| entry.manager.clone()).collect();
    assert_eq!(owners, ["two"]);
}

async fn custom(client: &Client) {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let crd = serde_json::from_value(json!({"metadata": {"name": "things.x.example.com"}, "spec": {
        "group": "x.example.com", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
        "versions": [{"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                "spec": {"type": "object", "properties": {"size": {"type": "integer", "default": 3}}},
                "status": {"type": "object", "properties": {"seen": {"type": "boolean"}}}}}}}]}}));
    crds.create(&PostParams::default(), &crd.unwrap()).await.unwrap();
    let established = wait::await_condition(crds, "things.x.example.com", wait::conditions::is_crd_established());
    tokio::time::timeout(PATIENCE, established).await.expect("established").unwrap();
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("x.example.com", "v1", "Thing"));
    let things: Api<DynamicObject> = Api::default_namespaced_with(client.clone(), &resource);
    let made =
        things.create(&PostParams::default(), &DynamicObject::new("t", &resource).data(json!({"spec": {}}))).await;
    assert_eq!(made.unwrap().data["spec"]["size"], 3);
    let status = Patch::Merge(json!({"spec": {"size": 9}, "status": {"seen": true}}));
    let seen = things.patch_status("t", &PatchParams::default(), &status).await.unwrap();
    assert_eq!((&seen.data["spec"]["size"], &seen.data["status"]["seen"]), (&json!(3), &json!(true)));
    let wrong = Patch::Merge(json!({"spec": {"size": "big"}}));
    assert!(things.patch("t", &PatchParams::default(), &wrong).await.is_err());
}
