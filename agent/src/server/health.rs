//! /healthz on a local port without TLS, for people and scripts on the machine.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::exposition::Exposition;
use crate::accept;

/// The checks of /healthz.
const CHECKS: [&str; 3] = ["ping", "log", "syncloop"];

/// /metrics/slis: the checks as they stand.
pub(super) fn slis(well: bool) -> String {
    let mut e = Exposition::default();
    e.begin("kubernetes_healthcheck", "gauge", "This metric records the result of a single healthcheck.");
    for name in CHECKS {
        let value = if name == "syncloop" && !well { 0.0 } else { 1.0 };
        e.sample("kubernetes_healthcheck", &[("name", name), ("type", "healthz")], Some(value));
    }
    e.finish()
}

fn answer(path: &str) -> Response<Full<Bytes>> {
    let check = path.strip_prefix("/healthz/");
    let known = path == "/healthz" || check.is_some_and(|c| CHECKS.contains(&c));
    let (status, text) = if known { (StatusCode::OK, "ok") } else { (StatusCode::NOT_FOUND, "404 page not found\n") };
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

/// Answers until `stop`. A port that is taken is said and done without: several agents may live on one machine.
pub(crate) async fn serve(address: SocketAddr, stop: CancellationToken) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%address, %error, "no health port");
            return;
        }
    };
    let connection = async |stream| {
        let service = service_fn(|r: Request<Incoming>| async move { Ok::<_, Infallible>(answer(r.uri().path())) });
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(TokioTimer::new()).keep_alive(false);
        if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!(%error, "health connection");
        }
    };
    accept::connections(|| listener.accept(), &stop, connection).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_have_names() {
        for (path, want) in [("/healthz", 200), ("/healthz/syncloop", 200), ("/healthz/other", 404), ("/", 404)] {
            assert_eq!(answer(path).status(), want, "{path}");
        }
    }
}
