//! A client of etcd: one HTTP/2 connection to one endpoint at a time, made anew when it breaks.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response, Uri};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::body::Body;
use tower::Service;

use super::{
    EtcdConfig,
    proto::{
        self, kv_client::KvClient, maintenance_client::MaintenanceClient, watch_client::WatchClient, watch_request,
    },
};
use crate::Error;

/// How long one endpoint may take to be connected.
const DIAL: Duration = Duration::from_secs(3);
/// How long a request may take, a connection included.
const REQUEST: Duration = Duration::from_secs(10);
/// Keys of one page.
const PAGE: i64 = 500;

/// One connection.
#[derive(Clone)]
pub(crate) struct Channel {
    sender: http2::SendRequest<Body>,
    origin: Uri,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut sender = self.sender.clone();
        Box::pin(async move { sender.send_request(request).await })
    }
}

/// The client; belongs to one thread.
pub(crate) struct Client {
    endpoints: Vec<Uri>,
    tls: Option<Arc<ClientConfig>>,
    channel: RefCell<Option<Channel>>,
    next: Cell<usize>,
}

impl Client {
    /// Reads certificates and addresses; does not connect yet.
    pub(crate) fn new(config: &EtcdConfig) -> Result<Self, Error> {
        let endpoints = config.endpoints.iter().map(|text| endpoint(text)).collect::<Result<Vec<Uri>, Error>>()?;
        if endpoints.is_empty() {
            return Err(Error::Endpoint { endpoint: String::new(), reason: "no address of etcd is given".into() });
        }
        let tls = match endpoints.iter().any(|e| e.scheme_str() == Some("https")) {
            true => Some(Arc::new(tls(config)?)),
            false => None,
        };
        Ok(Self { endpoints, tls, channel: RefCell::default(), next: Cell::new(0) })
    }

    /// The open connection, or a new one to the first endpoint that answers.
    async fn channel(&self) -> Result<Channel, Error> {
        if let Some(channel) = self.channel.borrow().as_ref().filter(|c| !c.sender.is_closed()) {
            return Ok(channel.clone());
        }
        let mut reasons = Vec::new();
        for _ in 0..self.endpoints.len() {
            let at = self.next.get() % self.endpoints.len();
            let endpoint = &self.endpoints[at];
            match tokio::time::timeout(DIAL, dial(endpoint, self.tls.as_ref())).await {
                Ok(Ok(channel)) => {
                    *self.channel.borrow_mut() = Some(channel.clone());
                    return Ok(channel);
                }
                Ok(Err(reason)) => reasons.push(format!("{endpoint}: {reason}")),
                Err(_) => reasons.push(format!("{endpoint}: no answer within {DIAL:?}")),
            }
            self.next.set(at + 1);
        }
        Err(Error::Write { reason: format!("cannot reach etcd: {}", reasons.join("; ")) })
    }

    /// Gives up a connection that misbehaves; the next request tries the next endpoint.
    pub(super) fn drop_channel(&self) {
        self.channel.borrow_mut().take();
        self.next.set(self.next.get() + 1);
    }

    async fn kv(&self) -> Result<KvClient<Channel>, Error> {
        let channel = self.channel().await?;
        let origin = channel.origin.clone();
        Ok(KvClient::with_origin(channel, origin).max_decoding_message_size(usize::MAX))
    }

    /// Waits for an answer, not for ever.
    async fn ask<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, Error> {
        let failed = |reason: String| {
            self.drop_channel();
            Err(Error::Write { reason: format!("etcd did not {what}: {reason}") })
        };
        match tokio::time::timeout(REQUEST, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) if status.code() == tonic::Code::Unknown || status.code() == tonic::Code::Unavailable => {
                failed(status.message().to_owned())
            }
            Ok(Err(status)) => Err(Error::Write { reason: format!("etcd refused to {what}: {}", status.message()) }),
            Err(_) => failed(format!("no answer within {REQUEST:?}")),
        }
    }

    /// Keys from `key` up to `end` (empty: the key alone; a zero byte: all there are), at a revision (0: now).
    pub(crate) async fn range(
        &self,
        key: &[u8],
        end: &[u8],
        revision: i64,
        limit: i64,
        keys_only: bool,
    ) -> Result<proto::RangeResponse, Error> {
        let request = proto::RangeRequest {
            key: key.to_vec().into(),
            range_end: end.to_vec().into(),
            limit,
            revision,
            keys_only,
        };
        self.ask("read", self.kv().await?.range(request)).await
    }

    /// All keys under a prefix, page by page at one revision.
    pub(crate) fn pages(self: &Rc<Self>, prefix: &str, revision: i64, keys_only: bool) -> Pages {
        Pages { client: Rc::clone(self), next: Some(start_of(prefix)), end: end_of(prefix), revision, keys_only }
    }

    /// One transaction.
    pub(crate) async fn txn(&self, request: proto::TxnRequest) -> Result<proto::TxnResponse, Error> {
        self.ask("commit", self.kv().await?.txn(request)).await
    }

    /// Forgets what was before a revision.
    pub(super) async fn compact(&self, revision: i64) -> Result<(), Error> {
        self.ask("compact", self.kv().await?.compact(proto::CompactionRequest { revision })).await.map(drop)
    }

    /// Bytes of etcd's file.
    pub(super) async fn size(&self) -> Result<u64, Error> {
        let channel = self.channel().await?;
        let origin = channel.origin.clone();
        let mut client = MaintenanceClient::with_origin(channel, origin);
        let answer = self.ask("tell its size", client.status(proto::StatusRequest {})).await?;
        Ok(u64::try_from(answer.db_size).unwrap_or_default())
    }

    /// Every event from a revision on.
    pub(super) async fn watch(&self, from: i64) -> Result<tonic::Streaming<proto::WatchResponse>, Error> {
        let channel = self.channel().await?;
        let origin = channel.origin.clone();
        let mut client = WatchClient::with_origin(channel, origin).max_decoding_message_size(usize::MAX);
        let create = proto::WatchCreateRequest { key: vec![0].into(), range_end: vec![0].into(), start_revision: from };
        let first = proto::WatchRequest { request_union: Some(watch_request::RequestUnion::CreateRequest(create)) };
        // The request's stream stays open for as long as the answer's.
        let requests = tokio_stream(first);
        self.ask("watch", client.watch(requests)).await
    }
}

/// One item, then silence.
fn tokio_stream(first: proto::WatchRequest) -> impl futures::Stream<Item = proto::WatchRequest> + Send + 'static {
    futures::StreamExt::chain(futures::stream::iter([first]), futures::stream::pending())
}

/// See [`Client::pages`].
pub(crate) struct Pages {
    client: Rc<Client>,
    next: Option<Vec<u8>>,
    end: Vec<u8>,
    /// etcd's revision of all pages; 0 until the first one said it.
    pub(crate) revision: i64,
    keys_only: bool,
}

impl Pages {
    /// The next page, empty only when it is the first and the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<proto::KeyValue>>, Error> {
        let Some(key) = self.next.take() else { return Ok(None) };
        let answer = self.client.range(&key, &self.end, self.revision, PAGE, self.keys_only).await?;
        if self.revision == 0 {
            self.revision = answer.header.map_or(0, |header| header.revision);
        }
        if let Some(last) = answer.kvs.last().filter(|_| answer.more) {
            self.next = Some([&last.key[..], &[0]].concat());
        }
        Ok(Some(answer.kvs))
    }
}

fn start_of(prefix: &str) -> Vec<u8> {
    if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() }
}

/// The first key behind all with a prefix.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![0]
}

fn endpoint(text: &str) -> Result<Uri, Error> {
    let bad = |reason: &str| Error::Endpoint { endpoint: text.to_owned(), reason: reason.to_owned() };
    let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| bad("not a URL"))?;
    match uri.scheme_str() {
        Some("http" | "https") if uri.port_u16().is_some() => Ok(uri),
        Some("http" | "https") => Err(bad("the port is missing")),
        _ => Err(bad("must begin with http:// or https://")),
    }
}

async fn dial(endpoint: &Uri, tls: Option<&Arc<ClientConfig>>) -> Result<Channel, String> {
    let host = endpoint.host().unwrap_or_default().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, endpoint.port_u16().unwrap_or(2379))).await.map_err(|e| e.to_string())?;
    let _ = stream.set_nodelay(true);
    match tls.filter(|_| endpoint.scheme_str() == Some("https")) {
        None => over(stream, endpoint).await,
        Some(tls) => {
            let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(tls));
            over(connector.connect(name, stream).await.map_err(|e| e.to_string())?, endpoint).await
        }
    }
}

async fn over<T>(stream: T, origin: &Uri) -> Result<Channel, String>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.timer(TokioTimer::new());
    // A dead peer is noticed within half a minute, also when nothing is asked of it.
    builder.keep_alive_interval(Duration::from_secs(15)).keep_alive_timeout(Duration::from_secs(10));
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to etcd ended");
        }
    });
    Ok(Channel { sender, origin: origin.clone() })
}

fn tls(config: &EtcdConfig) -> Result<ClientConfig, Error> {
    let read = |path: &std::path::PathBuf| {
        std::fs::read(path).map_err(|source| Error::File { operation: "read", path: path.clone(), source })
    };
    let bad = |path: &std::path::PathBuf, reason: String| Error::Endpoint {
        endpoint: config.endpoints.join(","),
        reason: format!("{}: {reason}", path.display()),
    };
    let certificates = |path: &std::path::PathBuf| {
        let found: Result<Vec<_>, _> = rustls_pemfile::certs(&mut read(path)?.as_slice()).collect();
        found.map_err(|error| bad(path, error.to_string()))
    };
    let mut roots = RootCertStore::empty();
    if let Some(ca) = &config.ca {
        roots.add_parsable_certificates(certificates(ca)?);
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let failed = |error: rustls::Error| Error::Write { reason: format!("cannot set up TLS towards etcd: {error}") };
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(failed)?;
    let builder = builder.with_root_certificates(roots);
    let mut out = match &config.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let private =
                rustls_pemfile::private_key(&mut read(key)?.as_slice()).map_err(|e| bad(key, e.to_string()))?;
            let private = private.ok_or_else(|| bad(key, "there is no private key in it".into()))?;
            builder.with_client_auth_cert(certificates(cert)?, private).map_err(failed)?
        }
    };
    out.alpn_protocols = vec![b"h2".to_vec()];
    Ok(out)
}
