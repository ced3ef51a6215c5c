//! gRPC: clients over one connection each, servers on unix sockets. tonic frames and decodes, hyper carries.
//!
//! tonic's own transport stays out: the agent has hyper already, and a plugin's socket needs no balancing or TLS.

pub(crate) mod server;

use std::{
    io,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tonic::body::Body;
use tower::Service;

/// Messages and stubs, generated from `proto/`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub(crate) mod proto {
    pub(crate) mod cri {
        tonic::include_proto!("runtime.v1");
    }
    pub(crate) mod csi {
        tonic::include_proto!("csi.v1");
    }
    pub(crate) mod device {
        tonic::include_proto!("v1beta1");
    }
    pub(crate) mod dra {
        tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
    }
    pub(crate) mod health {
        tonic::include_proto!("grpc.health.v1");
    }
    pub(crate) mod registration {
        tonic::include_proto!("pluginregistration");
    }
    pub(crate) mod resources {
        tonic::include_proto!("v1");
    }
}

/// One connection to a server; it closes with its last clone.
#[derive(Clone, Debug)]
pub(crate) struct Channel(SendRequest<Body>);

impl Channel {
    /// Speaks HTTP/2 with prior knowledge on a stream.
    pub(crate) async fn over<T>(stream: T) -> Result<Self, hyper::Error>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let executor = TokioExecutor::new();
        let (sender, connection) = hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "gRPC connection ended");
            }
        });
        Ok(Self(sender))
    }

    /// To the server that listens on a socket.
    pub(crate) async fn unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path).await?;
        Self::over(stream).await.map_err(io::Error::other)
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // A unix socket has no authority; servers want one.
        if request.uri().authority().is_none() {
            let mut parts = std::mem::take(request.uri_mut()).into_parts();
            parts.scheme = Some(http::uri::Scheme::HTTP);
            parts.authority = Some(http::uri::Authority::from_static("localhost"));
            if let Ok(uri) = http::Uri::from_parts(parts) {
                *request.uri_mut() = uri;
            }
        }
        let mut sender = self.0.clone();
        Box::pin(async move { sender.send_request(request).await })
    }
}

/// What a server said no with, as Go's clients print it.
pub(crate) fn words(status: &tonic::Status) -> String {
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}
