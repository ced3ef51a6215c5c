//! The cluster's services, as small as container environments need them; one watch for the whole agent.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Service as ApiService;
use kube::runtime::{WatchStreamExt, watcher};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    spec::env::{Service, service_variables},
};

type Table = HashMap<String, BTreeMap<String, Service>>;

/// Services by namespace and name.
#[derive(Clone)]
pub(crate) struct Services {
    table: Arc<RwLock<Table>>,
    synced: watch::Receiver<bool>,
}

impl Services {
    /// Starts the watch once there is an API server.
    pub(crate) fn start(api: Api, stop: CancellationToken) -> Self {
        let table: Arc<RwLock<Table>> = Arc::default();
        let (sender, synced) = watch::channel(false);
        let shared = table.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = follow(api, &shared, &sender) => {}
            }
        });
        Self { table, synced }
    }

    /// Resolves when services have been read at least once.
    pub(crate) async fn synced(&self) {
        let mut synced = self.synced.clone();
        let _ = synced.wait_for(|s| *s).await;
    }

    /// Variables of a pod in `namespace`; without links only the API server's service.
    pub(crate) fn variables(&self, namespace: &str, links: bool) -> Vec<(String, String)> {
        let table = self.table.read();
        let own = table.get(namespace).into_iter().flat_map(BTreeMap::values).filter(|_| links);
        let master = table.get("default").and_then(|d| d.get("kubernetes"));
        let master = master.filter(|_| !(links && namespace == "default"));
        let shadowed = links && table.get(namespace).is_some_and(|t| t.contains_key("kubernetes"));
        service_variables(master.filter(|_| !shadowed).into_iter().chain(own))
    }
}

async fn follow(api: Api, table: &RwLock<Table>, synced: &watch::Sender<bool>) {
    let Some(client) = api.wait().await else { return };
    let services: kube::Api<ApiService> = kube::Api::all(client);
    let mut stream = std::pin::pin!(watcher(services, watcher::Config::default()).backoff(crate::api::pauses()));
    let mut fresh: Option<Table> = None;
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => fresh = Some(Table::new()),
            Ok(watcher::Event::InitApply(s)) => {
                if let Some(t) = &mut fresh {
                    apply(t, &s);
                }
            }
            Ok(watcher::Event::InitDone) => {
                *table.write() = fresh.take().unwrap_or_default();
                synced.send_replace(true);
            }
            Ok(watcher::Event::Apply(s)) => apply(&mut table.write(), &s),
            Ok(watcher::Event::Delete(s)) => remove(&mut table.write(), &s),
            Err(e) => tracing::debug!(error = %e, "watch of services"),
        }
    }
}

fn names(s: &ApiService) -> (String, String) {
    (s.metadata.namespace.clone().unwrap_or_default(), s.metadata.name.clone().unwrap_or_default())
}

fn remove(table: &mut Table, s: &ApiService) {
    let (namespace, name) = names(s);
    if let Some(t) = table.get_mut(&namespace) {
        t.remove(&name);
        if t.is_empty() {
            table.remove(&namespace);
        }
    }
}

fn apply(table: &mut Table, s: &ApiService) {
    let (namespace, name) = names(s);
    let spec = s.spec.clone().unwrap_or_default();
    let ip = spec.cluster_ip.filter(|ip| !ip.is_empty() && ip != "None");
    let Some(ip) = ip else { return remove(table, s) };
    let ports = spec.ports.unwrap_or_default();
    let ports = ports.into_iter().map(|p| (p.name, p.port, p.protocol.unwrap_or_else(|| "TCP".into()))).collect();
    let service = Service { namespace: namespace.clone(), name: name.clone(), ip, ports };
    table.entry(namespace).or_default().insert(name, service);
}
