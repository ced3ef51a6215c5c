//! HTTP: connections, TLS, the pipeline of a request, negotiation, responses.

mod descriptions;
pub(crate) mod forbidden;
mod handle;
mod health;
mod limits;
mod metrics;
pub(crate) mod negotiate;
mod openapi;
pub(crate) mod query;
pub(crate) mod request;
mod resources;
pub(crate) mod respond;
mod tls;
mod yaml;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub(crate) use health::Health;
pub(crate) use limits::InFlight;
pub(crate) use metrics::Counters;

use crate::{
    Config, Error,
    aggregation::Aggregator,
    authn::{TokenAuthenticator, chain},
    authz::Authorizer,
    endpoints::Endpoints,
    registry::Registry,
};

/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests may take to end when the server stops.
const DRAIN: Duration = Duration::from_secs(3);
/// Streams of one HTTP/2 connection.
const STREAMS: u32 = 250;

/// Everything a request needs.
pub(crate) struct App {
    /// Configuration.
    pub(crate) config: Arc<Config>,
    /// Objects.
    pub(crate) registry: Arc<Registry>,
    /// Bearer tokens.
    pub(crate) tokens: Arc<dyn TokenAuthenticator>,
    /// Who may do what.
    pub(crate) authorizer: Arc<dyn Authorizer>,
    /// Requests that other servers answer.
    pub(crate) aggregator: Arc<Aggregator>,
    /// Requests that are not plain reads and writes.
    pub(crate) endpoints: Endpoints,
    /// Requests in flight.
    pub(crate) in_flight: InFlight,
    /// Counters.
    pub(crate) counters: Counters,
    /// The server's own state.
    pub(crate) health: Health,
    /// Fires when the server stops.
    pub(crate) stop: CancellationToken,
}

/// A bound server.
pub(crate) struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Server {
    /// Reads the certificates.
    pub(crate) fn new(config: &Config, listener: TcpListener) -> Result<Self, Error> {
        Ok(Self { listener, acceptor: TlsAcceptor::from(Arc::new(tls::config(config)?)) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Accepts connections until the server stops, then lets requests end.
    pub(crate) async fn serve(self, app: Arc<App>) {
        let graceful = GracefulShutdown::new();
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(30));
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .keep_alive_interval(Some(Duration::from_secs(60)))
            .max_send_buf_size(256 * 1024)
            .adaptive_window(false);
        let builder = Arc::new(builder);
        loop {
            // Both arms are cancel-safe: an accepted connection is returned at once.
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = app.stop.cancelled() => break,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let _ = stream.set_nodelay(true);
            let (acceptor, app, builder) = (self.acceptor.clone(), Arc::clone(&app), Arc::clone(&builder));
            let watcher = graceful.watcher();
            tokio::spawn(async move {
                let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => stream,
                    Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
                    Err(_) => return,
                };
                let certificate = stream.get_ref().1.peer_certificates().and_then(|c| c.first().cloned());
                let user = Arc::new(certificate.and_then(|c| chain::certificate_user(&c)));
                let service = service_fn(move |request| {
                    let (app, user) = (Arc::clone(&app), Arc::clone(&user));
                    // Boxed, so that it can go before its answer does: a watch lasts for an hour.
                    let answer = Box::pin(handle::handle(app, user, request));
                    async move { Ok::<_, std::convert::Infallible>(answer.await) }
                });
                let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
                if let Err(error) = watcher.watch(connection).await {
                    tracing::debug!(%peer, %error, "connection ended");
                }
            });
        }
        drop(self.listener);
        if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
            tracing::debug!("some requests did not end in time");
        }
    }
}
