//! Aggregation: groups that an extension server answers, found by APIService objects that name a Service.
//!
//! A request for such a group version is authenticated and authorized here, then passed on with the user in
//! `X-Remote-*` headers over TLS with our front-proxy certificate. [`availability`] keeps the `Available` conditions and
//! what discovery shows of these groups, [`documents`] brings their OpenAPI into ours.

mod availability;
mod documents;
mod extensions;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderName, HeaderValue, Request, Response};
use hyper::body::Incoming;
use isopod_api::{gvk::Gvr, resources, status::Status};
use parking_lot::Mutex;
use rustls::ClientConfig;
use serde_json::Value;

pub(crate) use extensions::Extensions;

use crate::{
    authn::UserInfo,
    endpoints::{
        Body,
        proxy::service_target,
        tls,
        transport::{Target, forward_over},
    },
    objects::{Object, Objects},
    server::respond,
};

/// `apiservices`.
pub(crate) fn gvr() -> Gvr {
    Gvr::new("apiregistration.k8s.io", "v1", "apiservices")
}

/// TLS as a revision of an APIService wants it.
type Revised = (u64, Arc<ClientConfig>);

/// Passes requests on to extension servers.
pub(crate) struct Aggregator {
    /// Certificate and key we show to extension servers.
    identity: Option<(PathBuf, PathBuf)>,
    objects: Arc<dyn Objects>,
    /// TLS by APIService.
    tls: Mutex<HashMap<Box<str>, Revised>>,
    extensions: ArcSwap<Extensions>,
}

impl Aggregator {
    /// An aggregator that has seen nothing.
    pub(crate) fn new(identity: Option<(PathBuf, PathBuf)>, objects: Arc<dyn Objects>) -> Self {
        Self { identity, objects, tls: Mutex::default(), extensions: ArcSwap::default() }
    }

    /// What discovery shows of extension servers.
    pub(crate) fn extensions(&self) -> Arc<Extensions> {
        self.extensions.load_full()
    }

    /// The APIService that a path belongs to, when another server answers it.
    pub(crate) fn service(&self, path: &str) -> Option<Arc<Object>> {
        let mut parts = path.strip_prefix("/apis/")?.split('/');
        let (group, version) = (parts.next()?, parts.next().filter(|v| !v.is_empty())?);
        if resources::groups().iter().any(|known| known.name == group) {
            return None;
        }
        let object = self.objects.get(&gvr(), "", &format!("{version}.{group}"))?;
        object.value()["spec"]["service"].is_object().then_some(object)
    }

    /// Passes a request on.
    pub(crate) async fn forward(
        &self,
        service: &Object,
        user: &UserInfo,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, Status> {
        if !availability::is_available(&service.value()) {
            return Ok(respond::text(503, "service unavailable\n".to_owned()));
        }
        let value = service.value();
        let (target, name) = self.target(&value["spec"]).map_err(Status::service_unavailable)?;
        let tls = self.tls(service, &value["spec"]).map_err(Status::service_unavailable)?;
        identify(request.headers_mut(), user);
        let uri = request.uri();
        let path = uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string);
        forward_over(&tls, &name, &target, &path, request).await
    }

    /// A ready endpoint of an APIService's server, and the name its certificate must have.
    fn target(&self, spec: &Value) -> Result<(Target, String), String> {
        let text = |field: &str| spec["service"][field].as_str().unwrap_or_default();
        let (namespace, name, port) =
            (text("namespace"), text("name"), spec["service"]["port"].as_u64().unwrap_or(443));
        let target = service_target(&*self.objects, namespace, &format!("https:{name}:{port}"));
        Ok((target.map_err(|status| status.message)?, format!("{name}.{namespace}.svc")))
    }

    fn tls(&self, service: &Object, spec: &Value) -> Result<Arc<ClientConfig>, String> {
        if let Some((revision, tls)) = self.tls.lock().get(&service.name)
            && *revision == service.revision
        {
            return Ok(Arc::clone(tls));
        }
        let bundle = STANDARD.decode(spec["caBundle"].as_str().unwrap_or_default()).map_err(|e| e.to_string())?;
        let unchecked = spec["insecureSkipTLSVerify"] == true;
        let pinned =
            rustls_pemfile::certs(&mut bundle.as_slice()).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
        let ca = (!unchecked).then_some((Path::new("caBundle"), pinned));
        let tls = tls::config(self.identity.as_ref(), ca).map_err(|error| error.to_string())?;
        self.tls.lock().insert(service.name.clone(), (service.revision, Arc::clone(&tls)));
        Ok(tls)
    }
}

/// Says who asks, in the headers that front proxies use; what the client sent in them is dropped.
fn identify(headers: &mut http::HeaderMap, user: &UserInfo) {
    let forged: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-remote-")).cloned().collect();
    for name in forged {
        headers.remove(name);
    }
    let mut add = |name: String, value: &str| {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.append(name, value);
        }
    };
    add("x-remote-user".to_owned(), &user.name);
    if !user.uid.is_empty() {
        add("x-remote-uid".to_owned(), &user.uid);
    }
    for group in &user.groups {
        add("x-remote-group".to_owned(), group);
    }
    for (key, values) in &user.extra {
        for value in values {
            add(format!("x-remote-extra-{}", escape(key)), value);
        }
    }
}

/// A key as part of a header's name: what may not be there is percent-encoded.
fn escape(key: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"!#$&'*+-.^_`|~".contains(&b);
    key.to_lowercase().bytes().fold(String::new(), |mut out, b| {
        if plain(b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::webhook::testing::WebhookServer;

    #[test]
    fn users_are_told_and_cannot_be_forged() {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-remote-user", HeaderValue::from_static("admin"));
        headers.insert("x-remote-group", HeaderValue::from_static("system:masters"));
        let user = UserInfo {
            name: "bob".into(),
            groups: vec!["dev".into(), "ops".into()],
            extra: [("example.com/Key".to_owned(), vec!["v".to_owned()])].into(),
            ..UserInfo::default()
        };
        identify(&mut headers, &user);
        let all = |name: &str| headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>().join(",");
        assert_eq!((all("x-remote-user"), all("x-remote-group")), ("bob".to_owned(), "dev,ops".to_owned()));
        assert_eq!(all("x-remote-extra-example.com%2fkey"), "v");
    }

    /// What the extension server has at a path.
    fn answer(asked: &Value) -> (u16, Value) {
        let answer = match asked["@path"].as_str().unwrap() {
            "/openapi/v2" => {
                let operation = json!({"get": {"schema": {"$ref": "#/definitions/P"}}});
                json!({"paths": {"/apis/x.example.com/v1/pods": operation, "/other": {}}, "definitions": {"P": {"type": "object"}}})
            }
            "/openapi/v3" => {
                let entry = json!({"serverRelativeURL": "/openapi/v3/apis/x.example.com/v1?hash=7"});
                json!({"paths": {"apis/x.example.com/v1": entry, "version": {}}})
            }
            "/openapi/v3/apis/x.example.com/v1" => json!({"openapi": "3.0.0"}),
            _ => json!({"kind": "APIResourceList", "resources": [{"name": "pods", "kind": "P", "verbs": ["list"]}]}),
        };
        (200, answer)
    }

    /// The server's documents are in ours as long as it is available.
    async fn documents(aggregator: &Aggregator, there: bool) {
        let mut index = json!({"paths": {"api/v1": {}}});
        aggregator.extend_v3_index(&mut index).await;
        let shown: Vec<&str> = index["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let own = br#"{"paths":{},"definitions":{}}"#.to_vec();
        let whole: Value = serde_json::from_slice(&aggregator.extend_v2(own).await).unwrap();
        let v3 = aggregator.v3("x.example.com", "v1").await;
        if there {
            assert_eq!(shown, ["api/v1", "apis/x.example.com/v1"]);
            assert_eq!(whole["paths"].as_object().unwrap().len(), 1);
            assert_eq!(whole["definitions"], json!({"P": {"type": "object"}}));
            assert_eq!(v3.unwrap(), json!({"openapi": "3.0.0"}).to_string());
        } else {
            assert_eq!((shown, v3), (vec!["api/v1"], None));
            assert_eq!(whole, json!({"paths": {}, "definitions": {}}));
        }
    }

    #[tokio::test]
    async fn servers_are_available_when_their_certificate_is_right() {
        let server = WebhookServer::start(&["m.n.svc"], |asked| answer(&asked)).await;
        let alone = WebhookServer::self_signed("m.n.svc", |asked| answer(&asked)).await;
        let (port, ca, own_port, own) = (server.address.port(), &server.ca, alone.address.port(), &alone.ca);
        let objects = Arc::new(crate::admission::testing::FakeObjects::default());
        objects.put_as(
            "services",
            json!({"metadata": {"name": "m", "namespace": "n"},
            "spec": {"ports": [{"name": "", "port": 443}]}}),
        );
        let slice = |port: u16| {
            json!({"metadata": {"name": "m-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "m"}},
                "ports": [{"name": "", "port": port}],
                "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true}}]})
        };
        let aggregator = Aggregator::new(None, Arc::clone(&objects) as Arc<dyn Objects>);
        let condition =
            || objects.get(&gvr(), "", "v1.x.example.com").unwrap().value()["status"]["conditions"][0].clone();
        for (bundle, port, service, reason) in [
            (ca, port, "m", "Passed"),
            (own, port, "m", "FailedDiscoveryCheck"),
            (own, own_port, "m", "Passed"),
            (ca, own_port, "m", "FailedDiscoveryCheck"),
            (ca, port, "gone", "ServiceNotFound"),
        ] {
            objects.put_as("endpointslices", slice(port));
            objects.put_as(
                "apiservices",
                json!({"metadata": {"name": "v1.x.example.com"},
                "spec": {"group": "x.example.com", "version": "v1", "caBundle": STANDARD.encode(bundle),
                    "service": {"namespace": "n", "name": service, "port": 443}}}),
            );
            aggregator.look().await;
            assert_eq!(condition()["reason"], reason, "{}", condition());
            let known = aggregator.extensions().in_version("x.example.com", "v1").count();
            assert_eq!(known, usize::from(reason == "Passed"));
            documents(&aggregator, reason == "Passed").await;
        }
        assert!(aggregator.service("/apis/x.example.com/v1/namespaces/n/pods").is_some());
        assert!(aggregator.service("/apis/apps/v1/deployments").is_none());
    }
}
