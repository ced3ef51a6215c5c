//! HTTP for machines: health of the proxy, metrics, and the health check ports of services.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{Error, metrics::Metrics, sync::Report, watch::Nodes};

/// Changes that wait longer make the proxy unhealthy: twice kube-proxy's sync period.
const PATIENCE: Duration = Duration::from_secs(60);

/// What answers are made of.
pub(crate) struct Health {
    pub(crate) node: String,
    pub(crate) report: watch::Receiver<Report>,
    pub(crate) nodes: watch::Receiver<Arc<Nodes>>,
    pub(crate) metrics: Arc<Metrics>,
    /// For /configz.
    pub(crate) config: serde_json::Value,
}

/// A response before it is HTTP.
struct Answer {
    code: StatusCode,
    kind: &'static str,
    body: String,
    weight: Option<usize>,
}

impl Health {
    fn healthy(&self) -> bool {
        self.report.borrow().failing_since.is_none_or(|s| s.elapsed() < PATIENCE)
    }

    fn eligible(&self) -> bool {
        let nodes = self.nodes.borrow();
        // Before the first list nothing is known against this node.
        nodes.is_empty() || nodes.get(&self.node).is_some_and(|n| n.eligible)
    }

    fn answer(&self, path: &str) -> Answer {
        let healthy = self.healthy();
        let now = jiff::Timestamp::now();
        let behind = self.report.borrow().failing_since.map(|s| s.elapsed()).unwrap_or_default();
        let updated = now.saturating_sub(jiff::SignedDuration::try_from(behind).unwrap_or_default());
        let updated = updated.map_or(now, |u| u).to_string();
        let family = json!({ "lastUpdated": updated, "healthy": healthy });
        let mut body = json!({
            "lastUpdated": updated, "currentTime": now.to_string(), "healthy": healthy,
            "status": { "IPv4": family, "IPv6": family },
        });
        let code = |good: bool| if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let text =
            |body: String| Answer { code: StatusCode::OK, kind: "text/plain; charset=utf-8", body, weight: None };
        match path {
            "/healthz" => {
                body["nodeEligible"] = self.eligible().into();
                let code = code(healthy && self.eligible());
                Answer { code, kind: "application/json", body: body.to_string(), weight: None }
            }
            "/livez" => Answer { code: code(healthy), kind: "application/json", body: body.to_string(), weight: None },
            "/metrics" => Answer {
                kind: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                ..text(self.metrics.text())
            },
            "/proxyMode" => text("nftables".into()),
            "/configz" => Answer { kind: "application/json", ..text(self.config.to_string()) },
            _ => Answer { code: StatusCode::NOT_FOUND, ..text("404 page not found\n".into()) },
        }
    }

    /// A service's own health check port: has this node endpoints of it?
    fn answer_service(&self, port: u16) -> Answer {
        let report = self.report.borrow();
        let Some((_, name, count)) = report.health_checks.iter().find(|(p, ..)| *p == port) else {
            return Answer {
                code: StatusCode::SERVICE_UNAVAILABLE,
                kind: "text/plain",
                body: String::new(),
                weight: None,
            };
        };
        let healthy = self.healthy();
        let body = json!({
            "service": { "namespace": &*name.namespace, "name": &*name.name },
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        });
        let code = if healthy && *count > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        Answer { code, kind: "application/json", body: body.to_string(), weight: Some(*count) }
    }
}

fn respond(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.code;
    let headers = response.headers_mut();
    headers.insert("content-type", hyper::header::HeaderValue::from_static(answer.kind));
    headers.insert("x-content-type-options", hyper::header::HeaderValue::from_static("nosniff"));
    if let Some(weight) = answer.weight {
        headers.insert("x-load-balancing-endpoint-weight", weight.into());
    }
    response
}

/// Serves one address; `service` is set on a service's own port.
async fn serve(health: Arc<Health>, listener: TcpListener, service: Option<u16>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let health = health.clone();
        connections.spawn(async move {
            let handler = service_fn(|request: Request<Incoming>| {
                let answer = match service {
                    Some(port) => health.answer_service(port),
                    None => health.answer(request.uri().path()),
                };
                async move { Ok::<_, Infallible>(respond(answer)) }
            });
            // A client's broken connection is its own affair.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), handler).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Opens the proxy's own addresses. One that cannot be opened is an error, or told and left out.
pub(crate) async fn bind(addresses: impl Iterator<Item = SocketAddr>, must: bool) -> Result<Vec<TcpListener>, Error> {
    let mut all = Vec::new();
    for address in addresses {
        match TcpListener::bind(address).await {
            Ok(listener) => all.push(listener),
            Err(error) if must => return Err(Error::Address(address, error)),
            Err(error) => tracing::warn!(%address, %error, "health and metrics are not served"),
        }
    }
    Ok(all)
}

/// A port at every address of either family; without IPv6 there is one.
async fn bind_all(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        other => other,
    }
}

/// Serves the proxy's own addresses and, as services come and go, their health check ports.
pub(crate) async fn run(health: Health, listeners: Vec<TcpListener>, stop: CancellationToken) {
    let mut report = health.report.clone();
    let health = Arc::new(health);
    let mut own = JoinSet::new();
    listeners.into_iter().for_each(|listener| drop(own.spawn(serve(health.clone(), listener, None))));
    let mut ports: HashMap<u16, tokio_util::task::AbortOnDropHandle<()>> = HashMap::new();
    loop {
        let wanted: Vec<u16> = report.borrow_and_update().health_checks.iter().map(|(p, ..)| *p).collect();
        ports.retain(|p, _| wanted.contains(p));
        for port in wanted {
            if ports.contains_key(&port) {
                continue;
            }
            match bind_all(port).await {
                Ok(listener) => {
                    let task = tokio::spawn(serve(health.clone(), listener, Some(port)));
                    ports.insert(port, tokio_util::task::AbortOnDropHandle::new(task));
                }
                Err(error) => tracing::warn!(port, %error, "health check port of a service is not served"),
            }
        }
        // Cancel-safe: both only wait.
        tokio::select! {
            changed = report.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
