//! HTTP connections from the API server to nodes, pods and services, and the passing on of one request.
//!
//! A request is passed on as it is, upgrades included: after a 101 the two connections are joined byte by byte, so every
//! protocol between client and node (SPDY, WebSocket, a tunnel of one in the other) goes through untranslated.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use isopod_api::status::Status;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::{Body, tls};
use crate::{Config, Error};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Headers that belong to one connection, not to the request.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    HeaderName::from_static("keep-alive"),
];

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How the far end is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Plain.
    Http,
    /// TLS whose certificate nobody checks: pods and services behind `https:`.
    Https,
    /// TLS with our client certificate and the agents' CA.
    Node,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// How.
    pub(crate) scheme: Scheme,
}

impl Target {
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// Makes connections.
pub(crate) struct Transport {
    node: Arc<ClientConfig>,
    unchecked: Arc<ClientConfig>,
}

impl Transport {
    /// Reads the client certificate and the agents' CA.
    pub(crate) fn load(config: &Config) -> Result<Self, Error> {
        let identity = (config.kubelet_client_cert.clone(), config.kubelet_client_key.clone());
        let ca = (config.kubelet_ca.as_path(), tls::certificates(&config.kubelet_ca)?);
        Ok(Self { node: tls::config(Some(&identity), Some(ca))?, unchecked: tls::config(None, None)? })
    }

    async fn connect(&self, target: &Target) -> io::Result<Box<dyn Stream>> {
        let tcp = match target.host.parse() {
            Ok(ip) => TcpStream::connect(SocketAddr::new(ip, target.port)).await?,
            Err(_) => TcpStream::connect((target.host.as_str(), target.port)).await?,
        };
        tcp.set_nodelay(true)?;
        let config = match target.scheme {
            Scheme::Http => return Ok(Box::new(tcp)),
            Scheme::Https => &self.unchecked,
            Scheme::Node => &self.node,
        };
        let name = ServerName::try_from(target.host.clone()).map_err(io::Error::other)?;
        Ok(Box::new(TlsConnector::from(config.clone()).connect(name, tcp).await?))
    }

    /// Passes a request on to `target` under another path, and the answer back.
    pub(crate) async fn forward(
        &self,
        target: &Target,
        path_and_query: &str,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Status> {
        let failed = |error: &dyn std::fmt::Display| {
            Status::service_unavailable(format!("error trying to reach service: {error}"))
        };
        let stream = in_time(target, self.connect(target)).await.map_err(|error| failed(&error))?;
        exchange(stream, target, path_and_query, request).await
    }
}

/// Waits for a connection; errors read as Go's.
async fn in_time(
    target: &Target,
    connecting: impl Future<Output = io::Result<Box<dyn Stream>>>,
) -> Result<Box<dyn Stream>, String> {
    let dial = format!("dial tcp {}", target.authority());
    match tokio::time::timeout(CONNECT, connecting).await {
        Err(_) => Err(format!("{dial}: i/o timeout")),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(format!("{dial}: connect: connection refused"))
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::HostUnreachable => {
            Err(format!("{dial}: connect: no route to host"))
        }
        Ok(Err(error)) => Err(format!("{dial}: {error}")),
        Ok(Ok(stream)) => Ok(stream),
    }
}

/// A TLS connection to an extension server under the name it must have.
async fn secure(tls: &Arc<ClientConfig>, name: &str, target: &Target) -> io::Result<Box<dyn Stream>> {
    let tcp = TcpStream::connect((target.host.as_str(), target.port)).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    Ok(Box::new(TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await?))
}

/// Passes a request on to an extension server.
pub(crate) async fn forward_over(
    tls: &Arc<ClientConfig>,
    name: &str,
    target: &Target,
    path_and_query: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let stream = in_time(target, secure(tls, name, target)).await;
    let stream =
        stream.map_err(|error| Status::service_unavailable(format!("error trying to reach service: {error}")))?;
    exchange(stream, target, path_and_query, request).await
}

/// Largest answer to a question of our own.
const ANSWER: usize = 4 << 20;

/// Asks an extension server something ourselves: status and body.
pub(crate) async fn fetch(
    tls: &Arc<ClientConfig>,
    name: &str,
    target: &Target,
    path: &str,
) -> Result<(u16, Bytes), String> {
    let stream = in_time(target, secure(tls, name, target)).await?;
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let asking = async {
        let (mut sender, connection) =
            http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
        let driven = tokio::spawn(connection);
        let request = Request::get(path).header(header::HOST, name).header(header::ACCEPT, "application/json");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| text(&error))?;
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER).collect().await.map_err(|error| text(&error))?;
        driven.abort();
        Ok((status, body.to_bytes()))
    };
    tokio::time::timeout(CONNECT, asking).await.map_err(|_| "timeout awaiting response".to_owned())?
}

/// One request and its answer over a connection, upgrades included.
async fn exchange(
    stream: Box<dyn Stream>,
    target: &Target,
    path_and_query: &str,
    request: Request<Incoming>,
) -> Result<Response<Body>, Status> {
    let failed =
        |error: &dyn std::fmt::Display| Status::service_unavailable(format!("error trying to reach service: {error}"));
    let (mut sender, connection) =
        http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to a backend");
        }
    });
    let (outgoing, client_upgrade) = outgoing(target, path_and_query, request)?;
    let mut response = sender.send_request(outgoing).await.map_err(|error| failed(&error))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        strip(response.headers_mut(), false);
        return Ok(response.map(|body| body.map_err(io::Error::other).boxed()));
    }
    let backend_upgrade = hyper::upgrade::on(&mut response);
    tokio::spawn(join(client_upgrade, backend_upgrade));
    Ok(response.map(|_| Empty::new().map_err(|never| match never {}).boxed()))
}

/// The request as the far end gets it, and the client's upgrade, should it come to one.
fn outgoing(
    target: &Target,
    path_and_query: &str,
    mut request: Request<Incoming>,
) -> Result<(Request<Incoming>, hyper::upgrade::OnUpgrade), Status> {
    let upgrade = hyper::upgrade::on(&mut request);
    let upgrading = request.headers().contains_key(header::UPGRADE);
    let (mut parts, body) = request.into_parts();
    parts.uri = Uri::try_from(path_and_query).map_err(|error| Status::bad_request(error.to_string()))?;
    parts.version = http::Version::HTTP_11;
    parts.extensions.clear();
    let headers = &mut parts.headers;
    strip(headers, upgrading);
    // What authenticates the client to us is nobody else's business.
    headers.remove(header::AUTHORIZATION);
    let impersonation: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
    for name in impersonation {
        headers.remove(name);
    }
    let host = HeaderValue::try_from(target.authority()).map_err(|error| Status::bad_request(error.to_string()))?;
    headers.insert(header::HOST, host);
    Ok((Request::from_parts(parts, body), upgrade))
}

fn strip(headers: &mut HeaderMap, upgrading: bool) {
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    if !upgrading {
        headers.remove(header::CONNECTION);
        headers.remove(header::UPGRADE);
    }
}

/// Joins both ends of an upgrade until one of them closes.
async fn join(client: hyper::upgrade::OnUpgrade, backend: hyper::upgrade::OnUpgrade) {
    let (client, backend) = match tokio::try_join!(client, backend) {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(%error, "upgrade");
            return;
        }
    };
    let (mut client, mut backend) = (TokioIo::new(client), TokioIo::new(backend));
    if let Err(error) = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut backend, 32 << 10, 32 << 10).await {
        tracing::debug!(%error, "tunnel");
    }
}
