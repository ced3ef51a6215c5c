//! Requests to the node: routing, parameters, answers.

use std::{convert::Infallible, io, sync::Arc, time::Instant};

use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, sync::mpsc};

use super::{
    AttachRequest, ExecRequest, Host, HostError, NetNs, PodRef, Stdio, access, health, kube,
    logs::{self, truth},
    portforward, remote,
    stream::{fd::FdStream, upgrade},
    summary, syslogs,
    tls::Identity,
};

/// The body of every response.
pub(crate) type Body = BoxBody<Bytes, io::Error>;

/// Largest output /run collects.
const MAX_RUN_OUTPUT: u64 = 16 << 20;

fn full(data: impl Into<Bytes>) -> Body {
    Full::new(data.into()).map_err(|never: Infallible| match never {}).boxed()
}

fn text(status: StatusCode, content: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(content));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

pub(super) fn json_response(value: &Value) -> Response<Body> {
    let mut response = Response::new(full(value.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl HostError {
    fn response(&self) -> Response<Body> {
        let status = match self {
            HostError::NotFound(_) => StatusCode::NOT_FOUND,
            HostError::BadRequest(_) => StatusCode::BAD_REQUEST,
            HostError::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        text(status, format!("{self}\n"))
    }
}

/// Grants an upgrade for a command or a container's streams, and serves it.
pub(crate) fn accept_remote(
    host: Arc<dyn Host>,
    request: &mut Request<Incoming>,
    action: remote::Action,
) -> Response<String> {
    match upgrade::grant(request, remote::SPDY_PROTOCOLS, remote::WEBSOCKET_PROTOCOLS) {
        Ok(mut grant) => {
            let response = std::mem::take(&mut grant.response).map(|()| String::new());
            tokio::spawn(remote::serve(host, grant, action));
            response
        }
        Err(refusal) => upgrade::refused(&refusal, remote::SPDY_PROTOCOLS),
    }
}

/// The same for a pod's ports.
pub(crate) fn accept_forward(netns: NetNs, request: &mut Request<Incoming>, ports: Vec<u16>) -> Response<String> {
    match upgrade::grant(request, portforward::SPDY_PROTOCOLS, portforward::WEBSOCKET_PROTOCOLS) {
        Ok(mut grant) => {
            let response = std::mem::take(&mut grant.response).map(|()| String::new());
            tokio::spawn(portforward::serve(netns, grant, ports));
            response
        }
        Err(refusal) => upgrade::refused(&refusal, portforward::SPDY_PROTOCOLS),
    }
}

/// All that comes out of a pipe, or the first of it; the rest is read and forgotten, so that nobody waits to write it.
pub(crate) async fn read_all(fd: Option<std::os::fd::OwnedFd>, most: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    if let Some(fd) = fd {
        let mut stream = FdStream::reader(fd)?;
        (&mut stream).take(most).read_to_end(&mut out).await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(out)
}

/// A request until it is answered, or its client has gone.
struct UnderWay<'a> {
    host: &'a dyn Host,
    method: Method,
    path: &'a str,
    begun: Instant,
}

impl<'a> UnderWay<'a> {
    fn begin(host: &'a dyn Host, method: &Method, path: &'a str) -> Self {
        host.asked(method.as_str(), path);
        Self { host, method: method.clone(), path, begun: Instant::now() }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.host.answered(self.method.as_str(), self.path, self.begun.elapsed());
    }
}

/// What every request needs.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) host: Arc<dyn Host>,
}

/// A request's path, cut up, and its decoded query.
pub(super) struct Parts {
    path: Vec<String>,
    pub(super) query: Vec<(String, String)>,
}

impl Parts {
    fn of<B>(request: &Request<B>) -> Self {
        let decode = |text: &str| percent_decode(text);
        let path = request.uri().path().split('/').filter(|s| !s.is_empty()).map(decode).collect();
        let query = request.uri().query().unwrap_or_default();
        let query = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decode(&name.replace('+', " ")), percent_decode(&value.replace('+', " ")))
        });
        Self { path, query: query.collect() }
    }

    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.query.iter().filter(move |(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(super) fn flag(&self, names: [&str; 2]) -> bool {
        self.query.iter().any(|(n, v)| names.contains(&n.as_str()) && truth(v))
    }

    fn stdio(&self) -> Stdio {
        let tty = self.flag(["tty", "tty"]);
        Stdio {
            stdin: self.flag(["input", "stdin"]),
            stdout: self.flag(["output", "stdout"]),
            stderr: self.flag(["error", "stderr"]) && !tty,
            tty,
        }
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = (bytes[i] == b'%').then(|| text.get(i + 1..i + 3)).flatten();
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            out.push(byte);
            i += 3;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

pub(super) fn pod(namespace: &str, name: &str, uid: Option<&str>) -> PodRef {
    PodRef { namespace: namespace.to_owned(), name: name.to_owned(), uid: uid.map(str::to_owned) }
}

fn pod_list(pods: &[Arc<Value>]) -> Response<Body> {
    let items: Vec<&Value> = pods.iter().map(|pod| &**pod).collect();
    json_response(&json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items }))
}

impl Server {
    /// Answers one request of `identity` (`None`: no certificate).
    pub(crate) async fn handle(&self, identity: Option<&Identity>, request: Request<Incoming>) -> Response<Body> {
        let parts = Parts::of(&request);
        let path: Vec<&str> = parts.path.iter().map(String::as_str).collect();
        if matches!(path.as_slice(), ["healthz", ..]) {
            return self.healthz();
        }
        if let Err(refusal) = access::check(self.host.as_ref(), identity, &request, &path).await {
            let (status, message) = refusal;
            return text(status, message);
        }
        let _under_way = UnderWay::begin(self.host.as_ref(), request.method(), path.first().unwrap_or(&""));
        self.allowed(&parts, &path, request).await
    }

    /// Answers a request of somebody who may ask it.
    async fn allowed(&self, parts: &Parts, path: &[&str], request: Request<Incoming>) -> Response<Body> {
        let debugs = ["runningpods", "containerLogs", "exec", "attach", "portForward", "run"];
        if path.first().is_some_and(|first| debugs.contains(first)) && !self.host.debugging() {
            return text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.\n");
        }
        if kube::is_ours(path) {
            return self.kube(path, parts, request).await;
        }
        let reading = matches!(*request.method(), Method::GET | Method::HEAD);
        match path {
            ["pods"] if reading => pod_list(&self.host.pods()),
            ["runningpods"] if reading => pod_list(&self.host.running_pods()),
            ["logs", rest @ ..] if reading => self.system_logs(rest, parts).await,
            ["checkpoint", namespace, name, container] if *request.method() == Method::POST => {
                self.checkpoint(&pod(namespace, name, None), container)
            }
            ["configz"] if reading => json_response(&json!({ "kubeletconfig": self.host.configuration() })),
            ["metrics"] if reading => text(StatusCode::OK, self.host.metrics().await),
            ["metrics", "resource"] if reading => {
                text(StatusCode::OK, summary::resource_metrics(&self.host.stats(true).await))
            }
            ["metrics", "slis"] if reading => text(StatusCode::OK, health::slis(self.host.healthy().is_ok())),
            ["metrics", "probes"] if reading => text(StatusCode::OK, self.host.probes()),
            ["metrics", "cadvisor"] if reading => text(StatusCode::OK, self.host.cadvisor().await),
            ["stats", "summary"] if reading => {
                let brief = parts.flag(["only_cpu_and_memory", "only_cpu_and_memory"]);
                json_response(&self.host.stats(brief).await)
            }
            ["containerLogs", namespace, name, container] if reading => {
                self.logs(&pod(namespace, name, None), container, parts).await
            }
            ["exec", namespace, name, container] => self.exec(pod(namespace, name, None), container, parts, request),
            ["exec", namespace, name, uid, container] => {
                self.exec(pod(namespace, name, Some(uid)), container, parts, request)
            }
            ["attach", namespace, name, container] => {
                self.attach(pod(namespace, name, None), container, parts, request)
            }
            ["attach", namespace, name, uid, container] => {
                self.attach(pod(namespace, name, Some(uid)), container, parts, request)
            }
            ["portForward", namespace, name] => self.port_forward(&pod(namespace, name, None), parts, request),
            ["portForward", namespace, name, uid] => {
                self.port_forward(&pod(namespace, name, Some(uid)), parts, request)
            }
            ["run", namespace, name, container] if *request.method() == Method::POST => {
                self.run(pod(namespace, name, None), container, parts).await
            }
            ["run", namespace, name, uid, container] if *request.method() == Method::POST => {
                self.run(pod(namespace, name, Some(uid)), container, parts).await
            }
            _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    fn healthz(&self) -> Response<Body> {
        match self.host.healthy() {
            Ok(()) => text(StatusCode::OK, "ok"),
            Err(reason) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n")),
        }
    }

    async fn system_logs(&self, path: &[&str], parts: &Parts) -> Response<Body> {
        let Some((root, by_name)) = self.host.system_logs() else {
            return text(StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled.\n");
        };
        let (status, kind, content) = syslogs::answer(root, path, &parts.query, by_name).await;
        let mut response = text(status, content);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        response
    }

    /// There are no checkpoints; whoever asks learns first whether the container is here.
    fn checkpoint(&self, pod: &PodRef, container: &str) -> Response<Body> {
        if let Err(error @ HostError::NotFound(_)) = self.host.network_namespace(pod) {
            return error.response();
        }
        let message =
            format!("checkpoint of container {container:?} in pod {pod}: not implemented by this node's runtime\n");
        text(StatusCode::NOT_IMPLEMENTED, message)
    }

    pub(super) async fn logs(&self, pod: &PodRef, container: &str, parts: &Parts) -> Response<Body> {
        let options = match logs::Options::parse(&parts.query, jiff::Timestamp::now()) {
            Ok(options) => options,
            Err(error) => return kube::bad_log_options(&pod.name, &error),
        };
        let source = match self.host.log_source(pod, container, options.previous) {
            Ok(source) => source,
            Err(error) => return error.response(),
        };
        if let Err(error) = tokio::fs::metadata(&source.path).await {
            let message = format!("failed to open log file {:?}: {error}\n", source.path);
            return text(StatusCode::INTERNAL_SERVER_ERROR, message);
        }
        let (tx, mut rx) = mpsc::channel(4);
        tokio::spawn(async move {
            if let Err(error) = logs::reader::copy(source, options, tx.clone()).await {
                tracing::warn!(%error, "container log");
                let _ = tx.send(Err(io::Error::other(error))).await;
            }
        });
        let stream = futures::stream::poll_fn(move |cx| rx.poll_recv(cx));
        let mut response = Response::new(BodyExt::boxed(StreamBody::new(stream.map(|chunk| chunk.map(Frame::data)))));
        let kind = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }

    /// Checks that the pod is here and has the container, before any upgrade.
    fn find(&self, pod: &PodRef, container: Option<&str>) -> Result<(), HostError> {
        let Some(found) = self.host.pod(&pod.namespace, &pod.name) else {
            return Err(HostError::NotFound("pod does not exist".to_owned()));
        };
        let Some(container) = container else { return Ok(()) };
        let has =
            |list: &str| found["spec"][list].as_array().is_some_and(|list| list.iter().any(|c| c["name"] == container));
        if has("containers") || has("initContainers") || has("ephemeralContainers") {
            return Ok(());
        }
        Err(HostError::NotFound(format!("container not found (\"{container}\")")))
    }

    pub(super) fn exec(
        &self,
        pod: PodRef,
        container: &str,
        parts: &Parts,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let command: Vec<String> = parts.all("command").map(str::to_owned).collect();
        if command.is_empty() {
            return text(StatusCode::BAD_REQUEST, "you must specify a command\n");
        }
        let stdio = parts.stdio();
        let exec = ExecRequest { pod: pod.clone(), container: container.to_owned(), command, stdio };
        self.remote(&pod, container, stdio, remote::Action::Exec(exec), request)
    }

    pub(super) fn attach(
        &self,
        pod: PodRef,
        container: &str,
        parts: &Parts,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let stdio = parts.stdio();
        let attach = AttachRequest { pod: pod.clone(), container: container.to_owned(), stdio };
        self.remote(&pod, container, stdio, remote::Action::Attach(attach), request)
    }

    fn remote(
        &self,
        pod: &PodRef,
        container: &str,
        stdio: Stdio,
        action: remote::Action,
        mut request: Request<Incoming>,
    ) -> Response<Body> {
        if !(stdio.stdin || stdio.stdout || stdio.stderr) {
            return text(StatusCode::BAD_REQUEST, "you must specify at least 1 of stdin, stdout, stderr\n");
        }
        if let Err(error) = self.find(pod, Some(container)) {
            return error.response();
        }
        self.count_websocket(&request, if matches!(action, remote::Action::Exec(_)) { "exec" } else { "attach" });
        accept_remote(self.host.clone(), &mut request, action).map(full)
    }

    pub(super) fn port_forward(&self, pod: &PodRef, parts: &Parts, mut request: Request<Incoming>) -> Response<Body> {
        let mut ports = Vec::new();
        for port in parts.all("port").chain(parts.all("ports")).flat_map(|value| value.split(',')) {
            match port.parse::<u16>() {
                // Two channels per port, numbered in one byte, of which the last ones have other meanings.
                Ok(port) if port > 0 && ports.len() < 64 => ports.push(port),
                _ => return text(StatusCode::BAD_REQUEST, format!("invalid port {port:?}\n")),
            }
        }
        let netns = match self.find(pod, None).and_then(|()| self.host.network_namespace(pod)) {
            Ok(netns) => netns,
            Err(error) => return error.response(),
        };
        self.count_websocket(&request, "portforward");
        accept_forward(netns, &mut request, ports).map(full)
    }

    fn count_websocket(&self, request: &Request<Incoming>, subresource: &str) {
        if upgrade::wanted(request.headers()) == Some(upgrade::Kind::WebSocket) {
            self.host.websocket(subresource);
        }
    }

    /// Runs a command and answers with all it has written.
    async fn run(&self, pod: PodRef, container: &str, parts: &Parts) -> Response<Body> {
        let command: Vec<String> = parts.all("cmd").flat_map(str::split_whitespace).map(str::to_owned).collect();
        if command.is_empty() {
            return text(StatusCode::BAD_REQUEST, "you must specify a command\n");
        }
        if let Err(error) = self.find(&pod, Some(container)) {
            return error.response();
        }
        let stdio = Stdio { stdin: false, stdout: true, stderr: true, tty: false };
        let session = match self.host.exec(ExecRequest { pod, container: container.to_owned(), command, stdio }).await {
            Ok(session) => session,
            Err(error) => return error.response(),
        };
        let read = |fd| read_all(fd, MAX_RUN_OUTPUT);
        let (stdout, stderr, exit) = tokio::join!(read(session.stdout), read(session.stderr), session.exit);
        let mut output = stdout.unwrap_or_default();
        output.extend(stderr.unwrap_or_default());
        match exit {
            Ok(0) => text(StatusCode::OK, output),
            Ok(code) => {
                output.extend(format!("command exited with {code}\n").into_bytes());
                text(StatusCode::INTERNAL_SERVER_ERROR, output)
            }
            Err(error) => error.response(),
        }
    }
}
