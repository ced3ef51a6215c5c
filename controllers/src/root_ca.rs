//! The ConfigMap `kube-root-ca.crt` of every namespace: the CA with which pods verify the API server.

use crate::context::Context;
use crate::service_account::is_active;
use isopod_client::objects::{HasMeta, is_already_exists, is_namespace_terminating};
use isopod_client::reflect::{Sink, Source, reflect};
use isopod_client::{Queue, spawn_workers};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;

/// The ConfigMap's name.
pub(crate) const NAME: &str = "kube-root-ca.crt";
const ABOUT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints \
    such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of \
    Kubernetes clusters.";

/// The data of the published ConfigMaps, by namespace.
struct Published {
    data: Mutex<HashMap<String, Option<String>>>,
    queue: Arc<Queue<String>>,
}

impl Sink<ConfigMap> for Published {
    fn replace(&self, maps: Vec<ConfigMap>) {
        let mut old: Vec<String> = self.data.lock().keys().cloned().collect();
        for map in maps {
            old.retain(|ns| ns != map.namespace());
            self.apply(map);
        }
        for namespace in old {
            self.data.lock().remove(&namespace);
            self.queue.add(namespace);
        }
    }
    fn apply(&self, map: ConfigMap) {
        let namespace = map.namespace().to_owned();
        let ca = map.data.and_then(|mut data| data.remove("ca.crt"));
        self.data.lock().insert(namespace.clone(), ca);
        self.queue.add(namespace);
    }
    fn delete(&self, map: ConfigMap) {
        self.data.lock().remove(map.namespace());
        self.queue.add(map.namespace().to_owned());
    }
    fn revision(map: &ConfigMap) -> Option<String> {
        map.metadata.resource_version.clone()
    }
}

/// Subscribes the controller and starts its worker.
pub(crate) fn start(ctx: &Arc<Context>, ca: String) {
    let queue: Arc<Queue<String>> = Queue::new();
    let published = Arc::new(Published { data: Mutex::default(), queue: queue.clone() });
    let source = Source {
        path: "/api/v1/configmaps".into(),
        query: format!("fieldSelector=metadata.name%3D{NAME}"),
        metadata_only: false,
    };
    let (client, sink, stop) = (ctx.objects.client().clone(), published.clone(), ctx.stop.clone());
    tokio::spawn(async move { reflect::<ConfigMap, _>(client, source, &*sink, stop).await });
    let q = queue.clone();
    ctx.caches.namespaces.subscribe(move |change| q.add(change.object().name().to_owned()));
    let (context, ca) = (ctx.clone(), Arc::new(ca));
    spawn_workers("root-ca-certificate-publisher-controller", &queue, 2, &ctx.stop, move |namespace| {
        let (ctx, ca, published) = (context.clone(), ca.clone(), published.clone());
        async move { sync(&ctx, &published, &namespace, &ca).await.map(|()| None) }
    });
}

async fn sync(ctx: &Context, published: &Published, namespace: &str, ca: &str) -> Result<(), kube::Error> {
    if !ctx.caches.namespaces.get("", namespace).is_some_and(|ns| is_active(&ns)) {
        return Ok(());
    }
    let current = published.data.lock().get(namespace).cloned();
    match current {
        Some(Some(data)) if data == ca => Ok(()),
        Some(_) => {
            let patch = serde_json::json!({"data": {"ca.crt": ca}});
            ctx.objects.merge::<ConfigMap>(namespace, NAME, "", &patch).await.map(|_| ())
        }
        None => {
            let map = ConfigMap {
                metadata: ObjectMeta {
                    name: Some(NAME.into()),
                    namespace: Some(namespace.to_owned()),
                    annotations: Some([("kubernetes.io/description".to_owned(), ABOUT.to_owned())].into()),
                    ..ObjectMeta::default()
                },
                data: Some([("ca.crt".to_owned(), ca.to_owned())].into()),
                ..ConfigMap::default()
            };
            match ctx.objects.create(&map).await {
                Ok(_) => Ok(()),
                Err(error) if is_already_exists(&error) || is_namespace_terminating(&error) => Ok(()),
                Err(error) => Err(error),
            }
        }
    }
}
