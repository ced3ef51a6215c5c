//! The other side of the agent's gRPC: what plugins serve and clients call, on unix sockets.

use std::{
    convert::Infallible,
    fs,
    path::Path,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http2::SendRequest};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::net::{UnixListener, UnixStream};
use tonic::body::Body;
use tower::Service;

/// Generated from the agent's `proto/`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod proto {
    pub mod cri {
        tonic::include_proto!("runtime.v1");
    }
    pub mod csi {
        tonic::include_proto!("csi.v1");
    }
    pub mod device {
        tonic::include_proto!("v1beta1");
    }
    pub mod dra {
        tonic::include_proto!("k8s.io.kubelet.pkg.apis.dra.v1");
    }
    pub mod resources {
        tonic::include_proto!("v1");
    }
    pub mod registration {
        tonic::include_proto!("pluginregistration");
    }
}

/// A connection to a socket.
#[derive(Clone, Debug)]
pub struct Channel(SendRequest<Body>);

impl Channel {
    /// Connects.
    pub async fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).await.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        Self(sender)
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
        let path = request.uri().path().to_owned();
        *request.uri_mut() = format!("http://localhost{path}").parse().unwrap();
        let mut sender = self.0.clone();
        Box::pin(async move { sender.send_request(request).await })
    }
}

/// Serves on a socket for ever, in the background; it listens when this returns.
pub fn serve<S>(path: &Path, service: S)
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::remove_file(path).ok();
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(service.clone());
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
        }
    });
}
