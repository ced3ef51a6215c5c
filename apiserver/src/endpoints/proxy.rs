//! HTTP proxies to pods, services and nodes.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use isopod_api::{gvk::Gvr, status::Status};
use serde_json::Value;

use super::{
    Body, Connect, ConnectRequest, backends,
    connect::node_target,
    transport::{Scheme, Target, Transport},
};
use crate::objects::Objects;

/// Largest page whose links are rewritten.
const MAX_PAGE: usize = 4 << 20;

/// What stands behind the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// `pods/proxy`.
    Pod,
    /// `services/proxy`.
    Service,
    /// `nodes/proxy`.
    Node,
}

/// One of the proxies.
pub(super) struct Proxy {
    pub(super) backend: Backend,
    pub(super) transport: Option<Arc<Transport>>,
}

/// `[SCHEME:]NAME[:PORT]`.
fn split_id(id: &str) -> Option<(&str, &str, &str)> {
    match id.split(':').collect::<Vec<_>>().as_slice() {
        [name] => Some(("", *name, "")),
        [name, port] => Some(("", *name, *port)),
        [scheme @ ("" | "http" | "https"), name, port] => Some((*scheme, *name, *port)),
        _ => None,
    }
}

fn scheme(text: &str) -> Scheme {
    if text == "https" { Scheme::Https } else { Scheme::Http }
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value[field].as_array().map_or(&[], Vec::as_slice)
}

/// Addresses that would lead to the API server's own machine.
fn proxyable(address: &str) -> Result<(), Status> {
    let allowed = address.parse::<std::net::IpAddr>().is_ok_and(|ip| match ip {
        std::net::IpAddr::V4(ip) => {
            !(ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || ip.is_multicast())
        }
        std::net::IpAddr::V6(ip) => {
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || (ip.segments()[0] & 0xffc0) == 0xfe80)
        }
    });
    if allowed { Ok(()) } else { Err(Status::bad_request("address not allowed")) }
}

fn pod(objects: &dyn Objects, namespace: &str, id: &str) -> Result<Target, Status> {
    let invalid = || Status::bad_request(format!("invalid pod request {id:?}"));
    let (wanted, name, port) = split_id(id).ok_or_else(invalid)?;
    let gvr = Gvr::new("", "v1", "pods");
    let pod = objects.get(&gvr, namespace, name).ok_or_else(|| Status::not_found(&gvr.group_resource(), name))?.value();
    let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
    proxyable(ip)?;
    // Without a port the first one a container declares is meant.
    let declared = || {
        let containers = list(&pod["spec"], "containers").iter();
        containers.flat_map(|c| list(c, "ports")).find_map(|port| port["containerPort"].as_u64())
    };
    let by_name = || {
        let containers = list(&pod["spec"], "containers").iter();
        let mut ports = containers.flat_map(|c| list(c, "ports"));
        ports.find(|p| p["name"] == port).and_then(|p| p["containerPort"].as_u64())
    };
    let port = match port {
        "" => declared().unwrap_or(80),
        text => text.parse().ok().or_else(by_name).ok_or_else(invalid)?,
    };
    let port = u16::try_from(port).map_err(|_| invalid())?;
    Ok(Target { host: ip.to_owned(), port, scheme: scheme(wanted) })
}

/// A ready endpoint of a service, `[SCHEME:]NAME[:PORT]`.
pub(crate) fn service_target(objects: &dyn Objects, namespace: &str, id: &str) -> Result<Target, Status> {
    let invalid = || Status::bad_request(format!("invalid service request {id:?}"));
    let (wanted, name, port) = split_id(id).ok_or_else(invalid)?;
    let gvr = Gvr::new("", "v1", "services");
    let service = objects.get(&gvr, namespace, name);
    let service = service.ok_or_else(|| Status::not_found(&gvr.group_resource(), name))?.value();
    if service["spec"]["type"] == "ExternalName" {
        let host = service["spec"]["externalName"].as_str().unwrap_or_default().to_owned();
        let port = port.parse().map_err(|_| invalid())?;
        return Ok(Target { host, port, scheme: scheme(wanted) });
    }
    let ports = list(&service["spec"], "ports");
    let port_name = match port {
        "" => ports.first().filter(|_| ports.len() == 1),
        text => ports.iter().find(|p| p["name"] == text || p["port"].as_u64().is_some_and(|n| n.to_string() == text)),
    };
    let unavailable = || Status::service_unavailable(format!("no endpoints available for service {id:?}"));
    let Some(port_name) = port_name else {
        return Err(Status::service_unavailable(format!("no service port {port:?} found for service {name:?}")));
    };
    let port_name = crate::admission::text(port_name, "name").to_owned();
    let ready = backends::ready(objects, namespace, name, &port_name).into_iter();
    let mut targets: Vec<_> = ready.map(|(host, port)| Target { host, port, scheme: scheme(wanted) }).collect();
    if targets.is_empty() {
        return Err(unavailable());
    }
    Ok(targets.swap_remove(rand::random_range(0..targets.len())))
}

fn node(objects: &dyn Objects, id: &str) -> Result<Target, Status> {
    let invalid = || Status::bad_request(format!("invalid node request {id:?}"));
    let (wanted, name, port) = split_id(id).ok_or_else(invalid)?;
    let mut target = node_target(objects, name)?;
    if !port.is_empty() {
        let port = port.parse().map_err(|_| invalid())?;
        if port != target.port {
            // Another port of the node is not its agent: no certificate of ours is shown to it.
            target.scheme = scheme(wanted);
        }
        target.port = port;
    }
    Ok(target)
}

impl Proxy {
    async fn answer(&self, request: ConnectRequest) -> Result<Response<Body>, Status> {
        let objects = &*request.objects;
        let target = match self.backend {
            Backend::Pod => pod(objects, &request.namespace, &request.name)?,
            Backend::Service => service_target(objects, &request.namespace, &request.name)?,
            Backend::Node => node(objects, &request.name)?,
        };
        if request.path == "/"
            && let Some(moved) = to_directory(&request.request)
        {
            return Ok(moved);
        }
        let transport = self.transport.as_ref().ok_or_else(|| Status::internal("no transport"))?;
        let uri = request.request.uri();
        let full_path = uri.path().to_owned();
        let prefix = full_path.strip_suffix(&request.path).unwrap_or(&full_path).trim_end_matches('/').to_owned();
        let path = if request.path.is_empty() { "/" } else { &request.path };
        let path = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        };
        let response = transport.forward(&target, &path, request.request).await?;
        rewrite(response, &prefix, &target).await
    }
}

/// Sends who reads the proxy itself, without a slash, to its root: relative links in the answer are then right.
fn to_directory<B>(request: &http::Request<B>) -> Option<Response<Body>> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads || request.uri().path().ends_with('/') || request.headers().contains_key(header::UPGRADE) {
        return None;
    }
    let query = request.uri().query().map(|q| format!("?{q}")).unwrap_or_default();
    let to = HeaderValue::try_from(format!("{}/{query}", request.uri().path())).ok()?;
    let mut response = Response::new(Full::default().map_err(|never| match never {}).boxed());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    response.headers_mut().insert(header::LOCATION, to);
    Some(response)
}

/// Makes absolute links of an answer lead through the proxy again.
async fn rewrite(mut response: Response<Body>, prefix: &str, target: &Target) -> Result<Response<Body>, Status> {
    if let Some(location) = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()) {
        let host = format!("{}:{}", target.host, target.port);
        let local = ["http://", "https://"].iter().find_map(|s| location.strip_prefix(s)?.strip_prefix(host.as_str()));
        let path = local.or_else(|| location.starts_with('/').then_some(location));
        if let Some(path) = path
            && let Ok(value) = HeaderValue::try_from(format!("{prefix}{path}"))
        {
            response.headers_mut().insert(header::LOCATION, value);
        }
    }
    let kind = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let plain = !response.headers().contains_key(header::CONTENT_ENCODING);
    let length = response.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if !kind.starts_with("text/html") || !plain || length.is_some_and(|length| length > MAX_PAGE) {
        return Ok(response);
    }
    let (mut parts, body) = response.into_parts();
    let page = body.collect().await.map_err(|error| Status::service_unavailable(error.to_string()))?.to_bytes();
    let page = rewrite_links(&page, prefix);
    parts.headers.remove(header::CONTENT_LENGTH);
    Ok(Response::from_parts(parts, Full::new(page).map_err(|never| match never {}).boxed()))
}

/// Puts `prefix` before the paths of links in a page: values of `href`, `src` and the like that begin with one slash.
fn rewrite_links(page: &Bytes, prefix: &str) -> Bytes {
    const ATTRIBUTES: [&[u8]; 5] = [b"href=\"/", b"src=\"/", b"action=\"/", b"href='/", b"src='/"];
    let mut out = Vec::with_capacity(page.len() + 256);
    let mut rest: &[u8] = page;
    while !rest.is_empty() {
        let attribute = ATTRIBUTES
            .iter()
            .find(|attribute| rest.len() >= attribute.len() && rest[..attribute.len()].eq_ignore_ascii_case(attribute));
        match attribute {
            Some(attribute) if rest.get(attribute.len()) != Some(&b'/') => {
                out.extend_from_slice(&rest[..attribute.len() - 1]);
                out.extend_from_slice(prefix.as_bytes());
                out.push(b'/');
                rest = &rest[attribute.len()..];
            }
            _ => {
                out.push(rest[0]);
                rest = &rest[1..];
            }
        }
    }
    out.into()
}

impl Connect for Proxy {
    fn connect<'a>(&'a self, request: ConnectRequest) -> BoxFuture<'a, Result<Response<Body>, Status>> {
        Box::pin(self.answer(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_up_to_three_parts() {
        assert_eq!(split_id("web"), Some(("", "web", "")));
        assert_eq!(split_id("web:80"), Some(("", "web", "80")));
        assert_eq!(split_id("https:web:tls"), Some(("https", "web", "tls")));
        assert_eq!(split_id("ftp:web:21"), None);
    }

    #[test]
    fn own_addresses_are_not_reached() {
        for address in ["", "127.0.0.1", "169.254.169.254", "::1", "fe80::1", "0.0.0.0"] {
            assert!(proxyable(address).is_err(), "{address}");
        }
        assert!(proxyable("10.244.0.7").is_ok());
    }

    #[test]
    fn the_root_of_a_proxy_ends_with_a_slash() {
        let sent_to = |method: &str, upgrade: bool| {
            let mut request = http::Request::builder().method(method).uri("/api/v1/namespaces/n/pods/p/proxy?a=b");
            if upgrade {
                request = request.header("Upgrade", "websocket");
            }
            let moved = to_directory(&request.body(()).unwrap())?;
            assert_eq!(moved.status(), StatusCode::MOVED_PERMANENTLY);
            Some(moved.headers()[header::LOCATION].to_str().unwrap().to_owned())
        };
        for method in ["GET", "HEAD"] {
            assert_eq!(sent_to(method, false).as_deref(), Some("/api/v1/namespaces/n/pods/p/proxy/?a=b"));
            assert_eq!(sent_to(method, true), None);
        }
        assert_eq!(sent_to("POST", false), None);
    }

    #[test]
    fn links_lead_through_the_proxy() {
        let page = Bytes::from_static(b"<a href=\"/rewriteme\">x</a><img src='//cdn/y'><a href=\"rel\">");
        let expected = "<a href=\"/p/proxy/rewriteme\">x</a><img src='//cdn/y'><a href=\"rel\">";
        assert_eq!(rewrite_links(&page, "/p/proxy"), expected);
    }
}
