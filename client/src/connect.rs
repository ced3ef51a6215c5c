//! The way to an API server: every request of a process, watches included, shares one HTTP/2 connection.
//!
//! In: a client configuration. Out: a `kube::Client`. A connection costs a TLS handshake at the start and some 100 KiB on
//! both sides for ever, and a control plane keeps eighty watches open: hence one. It is made by the first request that
//! needs it, and made anew when it has closed; a request that was not sent on a closing one is sent again, once. Nothing is
//! pooled and nothing outlives its request but the connection's own task and the one that makes it, so a request dropped, or left
//! alone, at any point holds up no other.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kube::{
    Client,
    client::{Body, ClientBuilder, ConfigExt},
};
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, sync::oneshot};
use tokio_rustls::TlsConnector;
use tower::ServiceBuilder;

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection is asked for a sign of life this often (as client-go does) ...
const PING: Duration = Duration::from_secs(30);
/// ... and given up when none comes in this time.
const PING_WAIT: Duration = Duration::from_secs(15);
/// Bytes of one answer that may be on the way before they are read: a page of a list.
const STREAM_WINDOW: u32 = 1 << 20;
/// The same for all answers together.
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Why a server cannot be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration does not make a client.
    #[error("client configuration")]
    Config(#[from] kube::Error),
    /// A kubeconfig.
    #[error("kubeconfig {}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// What is wrong with it.
        source: kube::config::KubeconfigError,
    },
    /// No server can be named by this.
    #[error("server URL {0}: want https://HOST[:PORT]")]
    Url(String),
    /// TCP or TLS.
    #[error("connect to {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// What failed.
        source: io::Error,
    },
    /// HTTP.
    #[error("request")]
    Http(#[from] hyper::Error),
    /// One of these, for all who waited for the same connection.
    #[error(transparent)]
    Shared(Arc<Error>),
}

/// A request that has come to its end.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Host and port.
    pub host: &'a str,
    /// How it was asked.
    pub method: &'a http::Method,
    /// The answer's status; `None` when there was no answer.
    pub code: Option<u16>,
    /// Until the answer began.
    pub took: Duration,
}

type Listener = Box<dyn Fn(&Asked<'_>) + Send + Sync>;

static LISTENER: OnceLock<Listener> = OnceLock::new();

/// Has every request of this process told to `listener`; the first one that is named stays.
pub fn listen(listener: impl Fn(&Asked<'_>) + Send + Sync + 'static) {
    let _ = LISTENER.set(Box::new(listener));
}

/// A client of the API server, over one shared connection.
pub fn connect(config: kube::Config) -> Result<Client, Error> {
    let tls = config.rustls_client_config()?;
    over(config, tls)
}

/// The same with a TLS configuration that somebody has seen to.
pub(crate) fn over(config: kube::Config, mut tls: rustls::ClientConfig) -> Result<Client, Error> {
    let url = &config.cluster_url;
    let wrong = || Error::Url(url.to_string());
    let host = url.host().filter(|_| url.scheme() == Some(&http::uri::Scheme::HTTPS)).ok_or_else(wrong)?;
    // An IPv6 address stands in brackets in a URL and nowhere else.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = config.tls_server_name.clone().unwrap_or_else(|| host.to_owned());
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let channel = Channel(Arc::new(Server {
        host: host.to_owned(),
        port: url.port_u16().unwrap_or(443),
        name: ServerName::try_from(name).map_err(|_| wrong())?,
        tls: TlsConnector::from(Arc::new(tls)),
        way: Mutex::new(Way::None),
    }));
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(channel);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

type Sender = http2::SendRequest<Body>;

/// Where the server is and the connection to it, if there is one.
struct Server {
    host: String,
    port: u16,
    name: ServerName<'static>,
    tls: TlsConnector,
    way: Mutex<Way>,
}

/// A connection that is being made, for all who wait for it.
type Making = Shared<BoxFuture<'static, Result<Sender, Arc<Error>>>>;

/// The way to the server.
enum Way {
    None,
    Making(Making),
    Open(Sender),
}

impl Server {
    /// The open connection, or a new one. Who comes while one is being made waits for it.
    ///
    /// A task of its own makes it: a request that waits may be a future that nobody polls for a while (a watch in one arm of a
    /// `select!` whose other arm is at work), and what it held would be held up with it, that other arm's request first.
    async fn sender(self: &Arc<Self>) -> Result<Sender, Error> {
        let making = {
            let mut way = self.way.lock();
            match &*way {
                Way::Open(sender) if !sender.is_closed() => return Ok(sender.clone()),
                Way::Making(making) => making.clone(),
                _ => {
                    let making = self.make();
                    *way = Way::Making(making.clone());
                    making
                }
            }
        };
        making.await.map_err(Error::Shared)
    }

    fn make(self: &Arc<Self>) -> Making {
        let (done, made) = oneshot::channel();
        let server = Arc::clone(self);
        tokio::spawn(async move {
            let opened = server.open().await.map_err(Arc::new);
            *server.way.lock() = opened.as_ref().map_or(Way::None, |sender| Way::Open(sender.clone()));
            // Nobody may be waiting any more.
            let _ = done.send(opened);
        });
        let ended = || Arc::new(Error::Connect { address: String::new(), source: io::ErrorKind::Interrupted.into() });
        async move { made.await.unwrap_or_else(|_| Err(ended())) }.boxed().shared()
    }

    async fn open(&self) -> Result<Sender, Error> {
        let failed = |source| Error::Connect { address: format!("{}:{}", self.host, self.port), source };
        let stream = tokio::time::timeout(CONNECT, async {
            let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
            stream.set_nodelay(true)?;
            self.tls.connect(self.name.clone(), stream).await
        });
        let stream = stream.await.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?.map_err(failed)?;
        check_protocol(stream.get_ref().1).map_err(failed)?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING_WAIT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await?;
        // Ends with the last sender, or with the connection.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the API server ended");
            }
        });
        Ok(sender)
    }

    async fn send(self: &Arc<Self>, request: Request<Body>) -> Result<Response<Incoming>, Error> {
        let mut request = request;
        let mut again = true;
        loop {
            let mut sender = self.sender().await?;
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut error) => match error.take_message() {
                    // The connection closed under it: not a byte of it was sent.
                    Some(unsent) if again => {
                        request = unsent;
                        again = false;
                    }
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }
}

fn check_protocol(connection: &rustls::ClientConnection) -> Result<(), io::Error> {
    match connection.alpn_protocol() {
        Some(b"h2") => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "the server does not speak HTTP/2")),
    }
}

/// The service below kube's layers.
#[derive(Clone)]
struct Channel(Arc<Server>);

impl tower::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let server = Arc::clone(&self.0);
        let Some(listener) = LISTENER.get() else { return Box::pin(async move { server.send(request).await }) };
        let (begun, method) = (Instant::now(), request.method().clone());
        Box::pin(async move {
            let answer = server.send(request).await;
            let host = format!("{}:{}", server.host, server.port);
            let code = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            listener(&Asked { host: &host, method: &method, code, took: begun.elapsed() });
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_that_nobody_polls_holds_up_no_other() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // It accepts and never says a word.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let roots = rustls::RootCertStore::empty();
        let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let server = Arc::new(Server {
            host: "127.0.0.1".into(),
            port: silent.local_addr().unwrap().port(),
            name: ServerName::try_from("localhost").unwrap(),
            tls: TlsConnector::from(Arc::new(tls)),
            way: Mutex::new(Way::None),
        });
        let mut first = std::pin::pin!(server.sender());
        assert!(first.as_mut().now_or_never().is_none());
        let (stream, _) = silent.accept().await.unwrap();
        drop((stream, silent));
        // The first is still there, and is not polled.
        let second = tokio::time::timeout(Duration::from_secs(5), server.sender()).await;
        assert!(matches!(second, Ok(Err(Error::Shared(_)))), "the second waits for the first");
        assert!(first.await.is_err());
    }
}
