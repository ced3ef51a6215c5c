//! The `Available` condition of APIServices, and discovery of those that are.
//!
//! Looks after every change of APIServices, Services and EndpointSlices. A server that is not ours tells nobody when it
//! breaks: as long as there are any, they are asked again after a while, as upstream does.

use std::{sync::Arc, time::Duration};

use isopod_api::{gvk::Gvr, meta};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Aggregator, Extensions, gvr};
use crate::{authn::UserInfo, endpoints::transport::fetch, objects::Object};

/// Time until servers that answered are asked again.
const WELL: Duration = Duration::from_secs(30);
/// Time until servers that did not are asked again.
const ILL: Duration = Duration::from_secs(3);

/// What a look at one APIService found.
struct Finding {
    available: bool,
    reason: &'static str,
    message: String,
    resources: Value,
}

impl Finding {
    fn ill(reason: &'static str, message: String) -> Self {
        Self { available: false, reason, message, resources: Value::Null }
    }
}

/// Whether an APIService's server can be asked.
pub(super) fn is_available(service: &Value) -> bool {
    condition(service).is_some_and(|condition| condition["status"] == "True")
}

fn condition(service: &Value) -> Option<&Value> {
    service["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == "Available")
}

impl Aggregator {
    /// Follows the extension servers until `stop` fires.
    pub(crate) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let watched = [gvr(), Gvr::new("", "v1", "services"), Gvr::new("discovery.k8s.io", "v1", "endpointslices")];
        loop {
            // Before looking, so that no change falls in between.
            let changed = self.objects.changed(&watched);
            let again = self.look().await;
            // Every arm only waits.
            tokio::select! {
                () = changed => {}
                () = stop.cancelled() => return,
                () = async {
                    match again {
                        Some(pause) => tokio::time::sleep(pause).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    /// One look at all of them; tells when to look again.
    pub(super) async fn look(&self) -> Option<Duration> {
        let services: Vec<(Arc<Object>, Value)> = self
            .objects
            .list(&gvr(), "")
            .into_iter()
            .map(|object| {
                let value = object.value();
                (object, value)
            })
            .filter(|(_, value)| value["spec"]["service"].is_object())
            .collect();
        let mut again = None;
        let mut found = Vec::new();
        for (object, value) in &services {
            let finding = self.ask(object, value).await;
            again = if finding.available && again != Some(ILL) { Some(WELL) } else { Some(ILL) };
            self.note(value, &finding).await;
            if finding.available {
                let text = |field: &str| value["spec"][field].as_str().unwrap_or_default().to_owned();
                found.push((text("group"), text("version"), finding.resources));
            }
        }
        if !services.is_empty() || !self.extensions.load().groups().is_empty() {
            self.extensions.store(Arc::new(Extensions::build(&found)));
        }
        self.tls.lock().retain(|name, _| services.iter().any(|(object, _)| object.name == *name));
        again
    }

    /// Asks a server what it has.
    async fn ask(&self, object: &Object, value: &Value) -> Finding {
        let service = &value["spec"]["service"];
        let text = |field: &str| service[field].as_str().unwrap_or_default();
        let (namespace, service) = (text("namespace"), text("name"));
        if self.objects.get(&Gvr::new("", "v1", "services"), namespace, service).is_none() {
            let message = format!("service/{service} in {namespace:?} is not present");
            return Finding::ill("ServiceNotFound", message);
        }
        let spec = &value["spec"];
        let (target, name) = match self.target(spec) {
            Ok(found) => found,
            Err(message) => return Finding::ill("MissingEndpoints", message),
        };
        let path = format!(
            "/apis/{}/{}",
            spec["group"].as_str().unwrap_or_default(),
            spec["version"].as_str().unwrap_or_default()
        );
        let failed = |why: String| {
            let url = format!("https://{}:{}{path}", target.host, target.port);
            Finding::ill("FailedDiscoveryCheck", format!("failing or missing response from {url}: {why}"))
        };
        let tls = match self.tls(object, spec) {
            Ok(tls) => tls,
            Err(error) => return failed(error),
        };
        match fetch(&tls, &name, &target, &path).await {
            Ok((200, body)) => match serde_json::from_slice(&body) {
                Ok(resources) => {
                    Finding { available: true, reason: "Passed", message: "all checks passed".to_owned(), resources }
                }
                Err(error) => failed(format!("not a list of resources: {error}")),
            },
            Ok((code, _)) => failed(format!("bad status from {path}: {code}")),
            Err(error) => failed(error),
        }
    }

    /// Writes a condition that changed.
    async fn note(&self, service: &Value, finding: &Finding) {
        let status = if finding.available { "True" } else { "False" };
        let before = condition(service);
        let text = |field: &str| before.map_or("", |c| c[field].as_str().unwrap_or_default());
        if (text("status"), text("reason"), text("message")) == (status, finding.reason, &finding.message) {
            return;
        }
        let since = if text("status") == status { text("lastTransitionTime").to_owned() } else { meta::now() };
        let new = json!({"type": "Available", "status": status, "lastTransitionTime": since,
            "reason": finding.reason, "message": finding.message});
        let change = Box::new(move |service: &mut Value| {
            service["status"]["conditions"] = json!([new]);
            Ok(())
        });
        let name = meta::name(service);
        let written = self.objects.modify(&gvr(), "", name, "status", &UserInfo::system(), change).await;
        if let Err(status) = written.map(drop).or_else(|s| if s.code == 404 { Ok(()) } else { Err(s) }) {
            tracing::warn!(%status, apiservice = name, "condition");
        }
    }
}
