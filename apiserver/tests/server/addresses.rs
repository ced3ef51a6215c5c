//! The addresses of Services are objects as soon as the Service is there, and no longer.

use std::{collections::BTreeSet, sync::Arc};

use reqwest::Method;
use serde_json::{Value, json};

use crate::Server;

const SERVICES: &str = "/api/v1/namespaces/default/services";
const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

fn service(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}})
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_come_and_go_with_their_services() {
    let server = Arc::new(Server::start().await);
    let one = |name: String| {
        let server = Arc::clone(&server);
        async move {
            let (code, made) = server.answer(Method::POST, SERVICES, &service(&name)).await;
            assert_eq!(code, 201, "{made}");
            let path = format!("{ADDRESSES}/{}", made["spec"]["clusterIP"].as_str().unwrap());
            let (code, address) = server.answer(Method::GET, &path, &Value::Null).await;
            let parent = json!({"resource": "services", "namespace": "default", "name": name});
            assert_eq!((code, &address["spec"]["parentRef"]), (200, &parent), "{address}");
            let own = format!("{SERVICES}/{name}");
            let outside =
                json!({"spec": {"type": "ExternalName", "externalName": "a.b", "clusterIP": null, "clusterIPs": null}});
            let (code, changed) = server.answer(Method::PATCH, &own, &outside).await;
            assert_eq!(code, 200, "{changed}");
            // Somebody else may have the address by now.
            let (code, address) = server.answer(Method::GET, &path, &Value::Null).await;
            assert!(code == 404 || address["spec"]["parentRef"] != parent, "{address}");
            let back = json!({"spec": {"type": "ClusterIP", "externalName": null}});
            assert_eq!(server.answer(Method::PATCH, &own, &back).await.0, 200);
        }
    };
    futures::future::join_all((0..20).map(|n| one(format!("s{n}")))).await;
    let (_, services) = server.answer(Method::GET, SERVICES, &Value::Null).await;
    let held = services["items"].as_array().unwrap().iter().map(|service| &service["spec"]["clusterIP"]);
    let held: BTreeSet<&str> = held.filter_map(Value::as_str).collect();
    assert_eq!(held.len(), 21, "with the one called kubernetes");
    let same = |list: &Value| {
        let names = list["items"].as_array().unwrap().iter().map(|address| &address["metadata"]["name"]);
        names.filter_map(Value::as_str).collect::<BTreeSet<_>>() == held
    };
    server.until(Method::GET, ADDRESSES, &Value::Null, |_, list| same(list)).await;
}
