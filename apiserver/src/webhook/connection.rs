//! Connections to one webhook: TLS with its CA, kept while the far end is still an endpoint.

use std::{fs, io, net::SocketAddr, path::Path};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{CertificateError, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Target;
use crate::endpoints::tls;

/// Idle connections of one webhook.
const IDLE: usize = 16;
/// Where systems keep the CAs they trust.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// One open connection.
pub(super) struct Connection {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

/// Why a request did not get its answer.
pub(super) enum Broken {
    /// The connection was closed before: the request can be sent again.
    Unsent,
    /// The far end may have seen it.
    Sent(String),
}

impl Connection {
    pub(super) async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Broken> {
        self.sender.ready().await.map_err(|_| Broken::Unsent)?;
        self.sender.send_request(request).await.map_err(|error| match error.is_canceled() {
            true => Broken::Unsent,
            false if error.is_incomplete_message() => Broken::Sent("EOF".into()),
            false => Broken::Sent(error.to_string()),
        })
    }
}

/// The connections of one webhook.
pub(super) struct Pool {
    tls: TlsConnector,
    name: ServerName<'static>,
    idle: Mutex<Vec<Connection>>,
}

impl Pool {
    /// Reads the CA; opens nothing.
    pub(super) fn new(target: &Target) -> Result<Self, String> {
        let system = || SYSTEM_ROOTS.iter().find_map(|path| fs::read(path).ok()).unwrap_or_default();
        let pem = if target.ca.is_empty() { system() } else { target.ca.clone() };
        let pinned = rustls_pemfile::certs(&mut pem.as_slice()).flatten().collect();
        let config = tls::config(None, Some((Path::new("caBundle"), pinned)))
            .map_err(|_| "unable to load root certificates: unable to parse bytes as PEM block")?;
        let name = ServerName::try_from(target.host.clone()).map_err(|e| e.to_string())?;
        Ok(Self { tls: TlsConnector::from(config), name, idle: Mutex::default() })
    }

    /// A kept connection to one of the addresses.
    pub(super) fn take(&self, addresses: &[SocketAddr]) -> Option<Connection> {
        let mut idle = self.idle.lock();
        idle.retain(|connection| !connection.sender.is_closed() && addresses.contains(&connection.address));
        idle.pop()
    }

    /// Keeps a connection whose answer has been read.
    pub(super) async fn put(&self, mut connection: Connection) {
        // Resolves at once: the answer was read to its end, or the far end closes.
        if connection.sender.ready().await.is_err() {
            return;
        }
        let mut idle = self.idle.lock();
        if idle.len() < IDLE {
            idle.push(connection);
        }
    }

    /// A new connection to one of the addresses, begun at a random one.
    pub(super) async fn connect(&self, target: &Target, addresses: &[SocketAddr]) -> Result<Connection, String> {
        let first = rand::random_range(0..addresses.len().max(1));
        let mut last = format!("dial tcp: lookup {}: no such host", target.host);
        for address in addresses.iter().cycle().skip(first).take(addresses.len()) {
            match TcpStream::connect(address).await {
                Ok(stream) => return self.secure(*address, stream).await,
                Err(error) => last = format!("dial tcp {address}: connect: {}", os_text(&error)),
            }
        }
        Err(last)
    }

    async fn secure(&self, address: SocketAddr, stream: TcpStream) -> Result<Connection, String> {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%address, %error, "no delay");
        }
        let stream = self.tls.connect(self.name.clone(), stream).await.map_err(|error| tls_text(&error))?;
        let (sender, connection) =
            http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%address, %error, "connection to a webhook");
            }
        });
        Ok(Connection { address, sender })
    }
}

/// An error of the system in Go's words.
fn os_text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::HostUnreachable => "no route to host".into(),
        io::ErrorKind::NetworkUnreachable => "network is unreachable".into(),
        io::ErrorKind::ConnectionReset => "connection reset by peer".into(),
        _ => error.to_string(),
    }
}

/// A failed handshake in Go's words, as far as they are known.
fn tls_text(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let problem = match inner {
        // A CA of the same name but another key is not the issuer either.
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "x509: certificate signed by unknown authority".to_owned()
        }
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => "x509: certificate has expired or is not yet valid".to_owned(),
        Some(rustls::Error::InvalidCertificate(other)) => format!("x509: {other}"),
        _ if error.kind() == io::ErrorKind::UnexpectedEof => return "EOF".to_owned(),
        _ => return error.to_string(),
    };
    format!("tls: failed to verify certificate: {problem}")
}
