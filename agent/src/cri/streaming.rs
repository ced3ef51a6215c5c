//! exec, attach and port-forward over CRI: a call gives a URL on the loopback that is good once and for a minute; what comes
//! there is upgraded and served like the node API's own.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

use super::view;
use crate::{
    accept,
    context::Context,
    host,
    server::{
        AttachRequest, ExecRequest, Host, HostError, NetNs, PodRef, Session, Stdio, accept_forward, accept_remote,
    },
};

/// How long a URL is good for.
const LIFE: Duration = Duration::from_secs(60);

/// What a URL stands for.
pub(super) enum Task {
    /// A command in a container.
    Exec { container: String, command: Vec<String>, stdio: Stdio },
    /// A container's own streams.
    Attach { container: String, stdio: Stdio },
    /// Ports of a sandbox.
    Forward { netns: NetNs, ports: Vec<u16> },
}

/// The server and what it waits for.
#[derive(Clone)]
pub(super) struct Streaming {
    address: SocketAddr,
    tasks: Arc<Mutex<HashMap<String, (Instant, Task)>>>,
}

impl Streaming {
    /// Listens on a port of the loopback until `stop`.
    pub(super) async fn start(ctx: Arc<Context>, stop: CancellationToken) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let streaming = Self { address: listener.local_addr()?, tasks: Arc::default() };
        let server = streaming.clone();
        tokio::spawn(async move {
            let connection = |stream| {
                let (server, host) = (server.clone(), Arc::new(CriHost { ctx: ctx.clone() }));
                async move {
                    let service = service_fn(move |r| {
                        let response = server.answer(host.clone(), r);
                        async move { Ok::<_, Infallible>(response) }
                    });
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await.ok();
                }
            };
            accept::connections(|| listener.accept(), &stop, connection).await;
        });
        Ok(streaming)
    }

    /// A URL for a task.
    pub(super) fn url(&self, kind: &str, task: Task) -> String {
        let token: [u8; 16] = rand::random();
        let token: String = token.iter().map(|b| format!("{b:02x}")).collect();
        let now = Instant::now();
        let mut tasks = self.tasks.lock();
        tasks.retain(|_, (until, _)| *until > now);
        tasks.insert(token.clone(), (now + LIFE, task));
        format!("http://{}/{kind}/{token}", self.address)
    }

    fn answer(&self, host: Arc<CriHost>, mut request: Request<Incoming>) -> Response<String> {
        let token = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let task = self.tasks.lock().remove(&token).filter(|(until, _)| *until > Instant::now());
        let nobody = PodRef { namespace: String::new(), name: String::new(), uid: None };
        match task {
            Some((_, Task::Exec { container, command, stdio })) => {
                accept_remote(host, &mut request, ExecRequest { pod: nobody, container, command, stdio }.into())
            }
            Some((_, Task::Attach { container, stdio })) => {
                accept_remote(host, &mut request, AttachRequest { pod: nobody, container, stdio }.into())
            }
            Some((_, Task::Forward { netns, ports })) => accept_forward(netns, &mut request, ports),
            None => {
                let mut response = Response::new("404 page not found\n".to_string());
                *response.status_mut() = StatusCode::NOT_FOUND;
                response
            }
        }
    }
}

/// Containers by id, whoever's they are.
struct CriHost {
    ctx: Arc<Context>,
}

fn not_found(e: tonic::Status) -> HostError {
    HostError::NotFound(e.message().to_owned())
}

impl Host for CriHost {
    fn exec(&self, r: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        Box::pin(async move {
            let c = view::container(&self.ctx, &r.container).map_err(not_found)?;
            let supervisor = c.running().map_err(not_found)?.clone();
            host::exec_in(supervisor, &c.id, &c.bundle, &r.command, r.stdio).await
        })
    }

    fn attach(&self, r: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        Box::pin(async move {
            let c = view::container(&self.ctx, &r.container).map_err(not_found)?;
            let supervisor = c.running().map_err(not_found)?.clone();
            host::attach_to(supervisor, &c.id, c.tty, r.stdio, c.ended.clone()).await
        })
    }
}
