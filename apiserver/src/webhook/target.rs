//! Where a webhook is: a URL, or a service whose endpoints the API server knows.

use std::net::{IpAddr, SocketAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isopod_api::gvk::Gvr;
use serde_json::Value;

use crate::{endpoints::backends, objects::Objects};

/// A service behind a webhook.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Service {
    namespace: String,
    name: String,
    port: u16,
}

/// A `clientConfig`.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    /// Name the certificate must have.
    pub(super) host: String,
    port: u16,
    /// Whether the port is shown.
    explicit: bool,
    /// Path of requests.
    pub(super) path: String,
    /// PEM; empty for the machine's own roots.
    pub(super) ca: Vec<u8>,
    service: Option<Service>,
}

impl Target {
    /// Reads a `clientConfig`.
    pub(crate) fn new(config: &Value) -> Result<Self, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let ca =
            STANDARD.decode(text(&config["caBundle"])).map_err(|e| format!("unable to load root certificates: {e}"))?;
        let service = &config["service"];
        if service.is_object() {
            let (namespace, name) = (text(&service["namespace"]), text(&service["name"]));
            let port = service["port"].as_u64().and_then(|p| u16::try_from(p).ok()).unwrap_or(443);
            let path = text(&service["path"]);
            return Ok(Self {
                host: format!("{name}.{namespace}.svc"),
                port,
                explicit: true,
                path: if path.is_empty() { "/".into() } else { path },
                ca,
                service: Some(Service { namespace, name, port }),
            });
        }
        let url = text(&config["url"]);
        let Some(rest) = url.strip_prefix("https://") else {
            return Err("webhook configuration must have either service or URL".into());
        };
        let (authority, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        let (host, port) = split(authority).ok_or_else(|| format!("Unparsable URL: {url}"))?;
        let (explicit, port) = (port.is_some(), port.unwrap_or(443));
        Ok(Self { host, port, explicit, path: path.to_owned(), ca, service: None })
    }

    /// As errors show it.
    pub(super) fn url(&self) -> String {
        format!("https://{}{}", self.authority(), self.path)
    }

    /// Host, and the port when it was given.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.explicit { format!("{host}:{}", self.port) } else { host }
    }

    /// Where to connect to: any of these.
    pub(super) async fn addresses(&self, objects: &dyn Objects) -> Result<Vec<SocketAddr>, String> {
        if let Some(service) = &self.service {
            return service.addresses(objects);
        }
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let missing = || format!("dial tcp: lookup {}: no such host", self.host);
        let all: Vec<SocketAddr> = found.map_err(|_| missing())?.collect();
        if all.is_empty() { Err(missing()) } else { Ok(all) }
    }
}

impl Service {
    fn addresses(&self, objects: &dyn Objects) -> Result<Vec<SocketAddr>, String> {
        let gvr = Gvr::new("", "v1", "services");
        let found = objects.get(&gvr, &self.namespace, &self.name);
        let service = found.ok_or_else(|| format!("service \"{}\" not found", self.name))?.value();
        let ports = service["spec"]["ports"].as_array().map_or(&[][..], Vec::as_slice);
        let port = ports.iter().find(|p| p["port"] == self.port);
        let port = port.ok_or_else(|| format!("no service port {} found for service \"{}\"", self.port, self.name))?;
        let name = port["name"].as_str().unwrap_or_default();
        let ready = backends::ready(objects, &self.namespace, &self.name, name);
        let all: Vec<SocketAddr> =
            ready.into_iter().filter_map(|(host, port)| Some(SocketAddr::new(host.parse().ok()?, port))).collect();
        if all.is_empty() {
            return Err(format!("no endpoints available for service \"{}\"", self.name));
        }
        Ok(all)
    }
}

/// Host and port of an authority.
fn split(authority: &str) -> Option<(String, Option<u16>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        let port = port.strip_prefix(':').map(|p| p.parse().ok());
        return Some((host.to_owned(), port.map_or(Some(None), |p| p.map(Some))?));
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => Some((host.to_owned(), Some(port.parse().ok()?))),
        None if authority.is_empty() => None,
        None => Some((authority.to_owned(), None)),
    }
}
