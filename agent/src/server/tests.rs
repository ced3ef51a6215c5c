//! The whole server over TLS with a fake host: exec, attach and port-forward by SPDY and by WebSocket, logs, access.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd,
    process::Command,
};

use ::http::{HeaderMap, StatusCode};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Empty};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::{
    stream::spdy_frame::{Decoder, Encoder, Frame, Headers},
    *,
};

/// Runs commands as children of the test; its one pod is `default/p` with container `c`.
struct FakeHost {
    log: PathBuf,
    resized: mpsc::Sender<TerminalSize>,
}

impl Host for FakeHost {
    fn pods(&self) -> Vec<Arc<Value>> {
        vec![Arc::new(
            json!({"metadata": {"namespace": "default", "name": "p"}, "spec": {"containers": [{"name": "c"}]}}),
        )]
    }

    fn log_source(&self, _pod: &PodRef, container: &str, _previous: bool) -> Result<LogSource, HostError> {
        if container != "c" {
            return Err(HostError::BadRequest(format!("container {container:?} in pod \"p\" is waiting to start: X")));
        }
        Ok(LogSource { path: self.log.clone(), ended: watch::channel(true).1 })
    }

    fn exec(&self, request: ExecRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        Box::pin(async move {
            let mut command = Command::new(&request.command[0]);
            command.args(&request.command[1..]);
            let (stdin_r, stdin_w) = rustix::pipe::pipe().unwrap();
            let (stdout_r, stdout_w) = rustix::pipe::pipe().unwrap();
            let (stderr_r, stderr_w) = rustix::pipe::pipe().unwrap();
            for fd in [stdin_w.as_fd(), stdout_r.as_fd(), stderr_r.as_fd()] {
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).unwrap();
            }
            let mut child = command
                .stdin(stdin_r)
                .stdout(stdout_w)
                .stderr(stderr_w)
                .spawn()
                .map_err(|error| HostError::Internal(format!("error executing command in container: {error}")))?;
            drop(command);
            let Stdio { stdin, stdout, stderr, .. } = request.stdio;
            Ok(Session {
                stdin: stdin.then_some(stdin_w),
                stdout: stdout.then_some(stdout_r),
                stderr: stderr.then_some(stderr_r),
                resize: self.resized.clone(),
                exit: Box::pin(async move {
                    let wait = tokio::task::spawn_blocking(move || child.wait().unwrap());
                    Ok(wait.await.unwrap().code().unwrap_or(-1))
                }),
            })
        })
    }

    fn attach(&self, request: AttachRequest) -> BoxFuture<'_, Result<Session, HostError>> {
        let AttachRequest { pod, container, stdio } = request;
        self.exec(ExecRequest { pod, container, command: vec!["cat".to_owned()], stdio })
    }

    fn network_namespace(&self, _pod: &PodRef) -> Result<NetNs, HostError> {
        Ok(NetNs::Host)
    }
}

struct Fixture {
    address: SocketAddr,
    client: Arc<rustls::ClientConfig>,
    anonymous: Arc<rustls::ClientConfig>,
    resized: mpsc::Receiver<TerminalSize>,
    _stop: tokio_util::sync::DropGuard,
    _dir: tempfile::TempDir,
}

fn client_config(ca: &rcgen::Certificate, identity: Option<(Vec<u8>, Vec<u8>)>) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder.with_client_auth_cert(vec![cert.into()], key.try_into().unwrap()).unwrap(),
    })
}

async fn fixture(client_name: &str) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &ca_key);
    let leaf = |name: &str| {
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &issuer).unwrap(), key)
    };
    let (serving, serving_key) = leaf("node");
    let (client, client_key) = leaf(client_name);
    let file = |name: &str, content: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let log = "2026-11-21T10:00:01.000000000Z stdout F one\n2026-11-21T10:00:02.000000000Z stdout F two\n";
    let config = Config {
        bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        cert: file("cert", serving.pem()),
        key: file("key", serving_key.serialize_pem()),
        client_ca: file("ca", ca.pem()),
        only_tls13: false,
        cipher_suites: vec![],
    };
    let (resized_tx, resized) = mpsc::channel(4);
    let host = Arc::new(FakeHost { log: file("0.log", log.to_owned()), resized: resized_tx });
    let bound = Bound::new(&config).await.unwrap();
    let address = bound.address().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(bound.serve(host, stop.clone()));
    let identity = (client.der().to_vec(), client_key.serialize_der());
    Fixture {
        address,
        client: client_config(&ca, Some(identity)),
        anonymous: client_config(&ca, None),
        resized,
        _stop: stop.drop_guard(),
        _dir: dir,
    }
}

type Io = TokioIo<hyper::upgrade::Upgraded>;

impl Fixture {
    async fn send(
        &self,
        config: &Arc<rustls::ClientConfig>,
        path: &str,
        headers: &[(&str, &str)],
    ) -> ::http::Response<Incoming> {
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let name = rustls::pki_types::ServerName::IpAddress(IpAddr::from(Ipv4Addr::LOCALHOST).into());
        let tls = tokio_rustls::TlsConnector::from(config.clone()).connect(name, tcp).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::get(path).header("host", "node");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap()
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.send(&self.client, path, &[]).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn upgrade(&self, path: &str, headers: &[(&str, &str)]) -> (HeaderMap, Io) {
        let response = self.send(&self.client, path, headers).await;
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        let headers = response.headers().clone();
        (headers, TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
    }

    async fn spdy(&self, path: &str, protocol: &str) -> SpdyClient<Io> {
        let headers = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", protocol)];
        let (answer, io) = self.upgrade(path, &headers).await;
        assert_eq!(answer["x-stream-protocol-version"], protocol);
        SpdyClient::new(io)
    }

    async fn websocket(&self, path: &str, protocol: &str) -> WebSocketStream<Io> {
        let headers = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", protocol),
        ];
        let (answer, io) = self.upgrade(path, &headers).await;
        assert_eq!(answer["sec-websocket-protocol"], protocol);
        WebSocketStream::from_raw_socket(io, Role::Client, None).await
    }
}

/// What clients do: odd stream ids, one compressor for all headers.
struct SpdyClient<IO> {
    io: IO,
    encoder: Encoder,
    decoder: Decoder,
    next: u32,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> SpdyClient<IO> {
    fn new(io: IO) -> Self {
        Self { io, encoder: Encoder::new().unwrap(), decoder: Decoder::new(), next: 1 }
    }

    async fn send(&mut self, frame: Frame) {
        let mut buf = BytesMut::new();
        self.encoder.encode(&frame, &mut buf).unwrap();
        self.io.write_all(&buf).await.unwrap();
        self.io.flush().await.unwrap();
    }

    async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let headers = Headers(headers.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect());
        self.send(Frame::SynStream { id, fin: false, headers }).await;
        id
    }

    async fn data(&mut self, id: u32, data: &'static [u8], fin: bool) {
        self.send(Frame::Data { id, fin, data: Bytes::from_static(data) }).await;
    }

    /// Reads until the given streams have ended; what came on each.
    async fn read_until_end(&mut self, ids: &[u32]) -> HashMap<u32, String> {
        let (mut buf, mut open, mut seen) = (BytesMut::new(), ids.to_vec(), HashMap::new());
        while !open.is_empty() {
            while let Some(frame) = self.decoder.decode(&mut buf).unwrap() {
                if let Frame::Data { id, fin, data } = frame {
                    let text: &mut String = seen.entry(id).or_default();
                    text.push_str(std::str::from_utf8(&data).unwrap());
                    open.retain(|o| !(fin && *o == id));
                }
            }
            if !open.is_empty() {
                assert_ne!(self.io.read_buf(&mut buf).await.unwrap(), 0, "ended early: {seen:?}");
            }
        }
        seen
    }
}

const EXEC: &str = "/exec/default/p/c?input=1&output=1&error=1&command=sh&command=-c&command=";

#[tokio::test]
async fn exec_by_spdy() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let path = format!("{EXEC}cat%3B%20echo%20bad%20%3E%262%3B%20exit%203");
    let mut client = fixture.spdy(&path, "v4.channel.k8s.io").await;
    let error = client.open(&[("streamType", "error")]).await;
    let stdin = client.open(&[("streamType", "stdin")]).await;
    let stdout = client.open(&[("streamType", "stdout")]).await;
    let stderr = client.open(&[("streamType", "stderr")]).await;
    client.data(stdin, b"hello", true).await;
    let seen = client.read_until_end(&[error, stdout, stderr]).await;
    assert_eq!((seen[&stdout].as_str(), seen[&stderr].as_str()), ("hello", "bad\n"));
    let status: Value = serde_json::from_str(&seen[&error]).unwrap();
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(status["details"]["causes"][0]["message"], "3");
}

#[tokio::test]
async fn exec_by_websocket_v5_closes_stdin() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let mut client = fixture.websocket(&format!("{EXEC}cat"), "v5.channel.k8s.io").await;
    client.send(Message::Binary(Bytes::from_static(b"\x00hello"))).await.unwrap();
    client.send(Message::Binary(Bytes::from_static(&[255, 0]))).await.unwrap();
    let mut seen: HashMap<u8, Vec<u8>> = HashMap::new();
    while let Some(Ok(message)) = client.next().await {
        if let Message::Binary(data) = message {
            seen.entry(data[0]).or_default().extend_from_slice(&data[1..]);
        }
    }
    assert_eq!(seen[&1], b"hello");
    assert_eq!(serde_json::from_slice::<Value>(&seen[&3]).unwrap()["status"], "Success");
}

#[tokio::test]
async fn large_output_survives_the_end() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let path = "/exec/default/p/c?output=1&command=head&command=-c&command=3000000&command=/dev/zero";
    let mut client = fixture.spdy(path, "v5.channel.k8s.io").await;
    let error = client.open(&[("streamtype", "error")]).await;
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    let seen = client.read_until_end(&[error, stdout]).await;
    assert_eq!(seen[&stdout].len(), 3_000_000);
}

#[tokio::test]
async fn a_command_that_cannot_run_is_told_on_the_error_stream() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let mut client = fixture.spdy("/exec/default/p/c?output=1&command=/no/such", "v4.channel.k8s.io").await;
    let error = client.open(&[("streamtype", "error")]).await;
    client.open(&[("streamtype", "stdout")]).await;
    let seen = client.read_until_end(&[error]).await;
    let status: Value = serde_json::from_str(&seen[&error]).unwrap();
    assert_eq!((status["reason"].as_str(), status["code"].as_i64()), (Some("InternalError"), Some(500)));
}

#[tokio::test]
async fn attach_with_a_terminal_forwards_sizes() {
    let mut fixture = fixture("kube-apiserver-kubelet-client").await;
    let path = "/attach/default/p/c?input=1&output=1&tty=1";
    let mut client = fixture.websocket(path, "v4.channel.k8s.io").await;
    let size = Bytes::from_static(b"\x04{\"Width\":100,\"Height\":30}");
    client.send(Message::Binary(size)).await.unwrap();
    assert_eq!(fixture.resized.recv().await, Some(TerminalSize { width: 100, height: 30 }));
    client.send(Message::Binary(Bytes::from_static(b"\x00ping"))).await.unwrap();
    while client.next().await.unwrap().unwrap().into_data() != b"\x01ping"[..] {}
}

/// A server that answers one connection with what it got, in upper case.
async fn echo_server() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut text = String::new();
                stream.read_to_string(&mut text).await.unwrap();
                stream.write_all(text.to_uppercase().as_bytes()).await.unwrap();
            });
        }
    });
    port
}

async fn forward_twice<IO: AsyncRead + AsyncWrite + Unpin>(mut client: SpdyClient<IO>, port: u16) {
    let port = port.to_string();
    for id in ["0", "1"] {
        let error = client.open(&[("streamtype", "error"), ("port", &port), ("requestid", id)]).await;
        let data = client.open(&[("streamtype", "data"), ("port", &port), ("requestid", id)]).await;
        client.data(error, b"", true).await;
        client.data(data, b"abc", true).await;
        let seen = client.read_until_end(&[error, data]).await;
        assert_eq!((seen[&data].as_str(), seen[&error].as_str()), ("ABC", ""));
    }
    let error = client.open(&[("streamtype", "error"), ("port", "1"), ("requestid", "2")]).await;
    client.open(&[("streamtype", "data"), ("port", "1"), ("requestid", "2")]).await;
    let seen = client.read_until_end(&[error]).await;
    assert!(seen[&error].contains("forwarding port 1"), "{seen:?}");
}

#[tokio::test]
async fn port_forward_by_spdy() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let client = fixture.spdy("/portForward/default/p", "portforward.k8s.io").await;
    forward_twice(client, echo_server().await).await;
}

#[tokio::test]
async fn port_forward_by_tunneled_spdy() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let ws = fixture.websocket("/portForward/default/p", "SPDY/3.1+portforward.k8s.io").await;
    let (mut sink, mut stream) = ws.split();
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let (mut read, mut write) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut buf = BytesMut::new();
        while read.read_buf(&mut buf).await.unwrap_or(0) > 0 {
            sink.send(Message::Binary(buf.split().freeze())).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(Message::Binary(data))) = stream.next().await {
            write.write_all(&data).await.unwrap();
        }
    });
    forward_twice(SpdyClient::new(ours), echo_server().await).await;
}

#[tokio::test]
async fn port_forward_by_websocket_channels() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = fixture.websocket(&format!("/portForward/default/p?port={port}"), "v4.channel.k8s.io").await;
    let [low, high] = port.to_le_bytes();
    assert_eq!(client.next().await.unwrap().unwrap().into_data(), &[0, low, high][..]);
    assert_eq!(client.next().await.unwrap().unwrap().into_data(), &[1, low, high][..]);
    let (mut pod, _) = listener.accept().await.unwrap();
    client.send(Message::Binary(Bytes::from_static(b"\x00hi"))).await.unwrap();
    let mut buf = [0; 2];
    pod.read_exact(&mut buf).await.unwrap();
    assert_eq!(&buf, b"hi");
    pod.write_all(b"yo").await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap().into_data(), &b"\x00yo"[..]);
}

#[tokio::test]
async fn plain_requests() {
    let fixture = fixture("kube-apiserver-kubelet-client").await;
    assert_eq!(fixture.get("/healthz").await, (StatusCode::OK, "ok".to_owned()));
    let logs = fixture.get("/containerLogs/default/p/c?tailLines=1").await;
    assert_eq!(logs, (StatusCode::OK, "two\n".to_owned()));
    for (query, want, said) in [
        ("sinceTime=abc", StatusCode::BAD_REQUEST, "parsing time \\\"abc\\\""),
        ("tailLines=-1", StatusCode::UNPROCESSABLE_ENTITY, "PodLogOptions \\\"p\\\" is invalid: tailLines"),
    ] {
        let (status, text) = fixture.get(&format!("/containerLogs/default/p/c?{query}")).await;
        assert!(status == want && text.contains(said), "{query}: {status} {text}");
    }
    let (status, text) = fixture.get("/containerLogs/default/p/zz").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("is waiting to start"), "{text}");
    let (_, pods) = fixture.get("/pods").await;
    assert_eq!(serde_json::from_str::<Value>(&pods).unwrap()["items"][0]["metadata"]["name"], "p");
    assert_eq!(fixture.get("/exec/default/p/zz?output=1&command=x").await.0, StatusCode::NOT_FOUND);
    assert_eq!(fixture.get("/exec/default/p/c?output=1&command=x").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(fixture.get("/nope").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn only_the_api_server_gets_in() {
    let fixture = fixture("system:node:n").await;
    assert_eq!(fixture.get("/pods").await.0, StatusCode::FORBIDDEN);
    assert_eq!(fixture.get("/healthz").await.0, StatusCode::OK);
    let response = fixture.send(&fixture.anonymous, "/pods", &[]).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
}
