//! The Container Runtime Interface on `run/isopod/cri.sock`: for crictl, and for a kubelet of other people's.
//!
//! In: calls of runtime.v1. Out: what the agent's own pods are made of, and pods that the caller makes ([`store`]), by the
//! same pieces: a sandbox over CRI is a pod like any other to networks, groups, files and supervisors. Lists, statuses,
//! stats, logs, exec and forwarding are about both ([`view`]); making and taking away only about the caller's own, since
//! the agent would bring its own back.

mod convert;
mod images;
mod lifecycle;
mod metrics;
mod runtime;
mod stats;
mod store;
mod streaming;
mod view;

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as Cx, Poll},
};

use futures::{Stream, stream};
use http::{Request, Response};
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

pub(crate) use self::store::Store;
use crate::{
    context::Context,
    grpc::{
        proto::cri::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer},
        server,
    },
};

/// Answers one by one, for lists that may be larger than a message.
type Items<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;

fn one_by_one<T: Send + 'static>(all: Vec<T>) -> Result<tonic::Response<Items<T>>, tonic::Status> {
    Ok(tonic::Response::new(Box::pin(stream::iter(all.into_iter().map(Ok)))))
}

/// Both services on one socket.
#[derive(Clone)]
struct Both {
    runtime: RuntimeServiceServer<runtime::Runtime>,
    images: ImageServiceServer<images::Images>,
}

impl Service<Request<Incoming>> for Both {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Cx<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        match request.uri().path().starts_with("/runtime.v1.ImageService/") {
            true => self.images.call(request),
            false => self.runtime.call(request),
        }
    }
}

/// Serves until `stop`. What was made over the socket before is taken over first.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    store::adopt(&ctx).await;
    let path = ctx.config.paths.run().join("cri.sock");
    let listener = match server::listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "no CRI socket");
            return;
        }
    };
    let streaming = match streaming::Streaming::start(ctx.clone(), stop.clone()).await {
        Ok(streaming) => streaming,
        Err(error) => {
            tracing::error!(%error, "no CRI streaming server");
            return;
        }
    };
    let both = Both {
        runtime: RuntimeServiceServer::new(runtime::Runtime { ctx: ctx.clone(), streaming }),
        images: ImageServiceServer::new(images::Images { ctx: ctx.clone() }),
    };
    server::serve(listener, both, stop).await;
}
