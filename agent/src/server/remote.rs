//! Exec and attach: joins a client's streams to a process's.
//!
//! In: an upgraded connection and a [`Session`]. Out: bytes both ways until the process ends, then one status on the error
//! stream. Over SPDY the client opens one stream per channel; over WebSocket the channels are numbered.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    AttachRequest, ExecRequest, Host, HostError, Session, Stdio, TerminalSize,
    stream::{
        Reader, Writer,
        fd::FdStream,
        spdy,
        upgrade::{Grant, Kind, Upgraded},
        websocket,
    },
};

/// SPDY protocols of exec and attach.
pub(crate) const SPDY_PROTOCOLS: &[&str] =
    &["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""];
/// WebSocket protocols of exec and attach.
pub(crate) const WEBSOCKET_PROTOCOLS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// How long a SPDY client may take to open its streams.
const STREAM_CREATION: Duration = Duration::from_secs(30);
/// How long output may stay open after the process has ended (a background child can hold it for ever).
const OUTPUT_DRAIN: Duration = Duration::from_secs(3);
const CHUNK: usize = 32 << 10;

/// What to do with the streams once they are there.
pub(crate) enum Action {
    /// Run a command.
    Exec(ExecRequest),
    /// Join a container.
    Attach(AttachRequest),
}

impl From<ExecRequest> for Action {
    fn from(r: ExecRequest) -> Self {
        Self::Exec(r)
    }
}

impl From<AttachRequest> for Action {
    fn from(r: AttachRequest) -> Self {
        Self::Attach(r)
    }
}

impl Action {
    fn stdio(&self) -> Stdio {
        match self {
            Action::Exec(request) => request.stdio,
            Action::Attach(request) => request.stdio,
        }
    }
}

/// The client's side, whatever carries it.
struct Client {
    stdin: Option<Reader>,
    stdout: Option<Writer>,
    stderr: Option<Writer>,
    error: Writer,
    resize: Option<Reader>,
    /// Whether the error stream takes a Status object (v4 and later) or text.
    structured: bool,
    closed: CancellationToken,
    /// Keeps a SPDY connection open; dropping it says goodbye.
    _connection: Option<spdy::Connection>,
}

/// Why the streams did not come together.
#[derive(Debug, thiserror::Error)]
enum Setup {
    #[error("upgrade failed")]
    Upgrade(#[from] hyper::Error),
    #[error("SPDY")]
    Spdy(#[from] super::stream::spdy_frame::Error),
    #[error("timed out waiting for the client to create its streams")]
    Timeout,
    #[error("the client left before it had created its streams")]
    Left,
    #[error("unexpected stream type {0:?}")]
    StreamType(String),
}

/// Serves one granted upgrade to its end; spawn it once the 101 is returned.
pub(crate) async fn serve(host: Arc<dyn Host>, grant: Grant, action: Action) {
    let client = match connect(grant, action.stdio()).await {
        Ok(client) => client,
        Err(error) => {
            tracing::debug!(%error, "remote command client did not connect");
            return;
        }
    };
    run(host, client, action).await;
}

async fn connect(grant: Grant, stdio: Stdio) -> Result<Client, Setup> {
    let io = Upgraded::new(grant.on_upgrade.await?);
    match grant.kind {
        Kind::Spdy => {
            let connection = spdy::Connection::server(io)?;
            tokio::time::timeout(STREAM_CREATION, collect(connection, stdio, grant.protocol))
                .await
                .map_err(|_| Setup::Timeout)?
        }
        Kind::WebSocket => Ok(channels(io, stdio, grant.protocol).await),
    }
}

/// Waits for the streams the client has to open: error, and whatever of the others it asked for.
async fn collect(mut connection: spdy::Connection, stdio: Stdio, protocol: &str) -> Result<Client, Setup> {
    let resizes = stdio.tty && !matches!(protocol, "v2.channel.k8s.io" | "channel.k8s.io" | "");
    let expected = 1 + [stdio.stdin, stdio.stdout, stdio.stderr, resizes].into_iter().filter(|wanted| *wanted).count();
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    for _ in 0..expected {
        let stream = connection.accept().await.ok_or(Setup::Left)?;
        match stream.headers.get("streamtype").unwrap_or_default() {
            "stdin" => stdin = Some(stream.reader),
            "stdout" => stdout = Some(Writer::Spdy(stream.writer)),
            "stderr" => stderr = Some(Writer::Spdy(stream.writer)),
            "error" => error = Some(Writer::Spdy(stream.writer)),
            "resize" => resize = Some(stream.reader),
            other => return Err(Setup::StreamType(other.to_owned())),
        }
    }
    Ok(Client {
        stdin,
        stdout,
        stderr,
        error: error.ok_or(Setup::Left)?,
        resize,
        structured: matches!(protocol, "v4.channel.k8s.io" | "v5.channel.k8s.io"),
        closed: connection.closed(),
        _connection: Some(connection),
    })
}

async fn channels(io: Upgraded, stdio: Stdio, protocol: &str) -> Client {
    let base64 = protocol.contains("base64");
    let encoding = if base64 { websocket::Encoding::Base64 } else { websocket::Encoding::Binary };
    let mut channels = websocket::Channels::server(io, encoding, &[STDIN, RESIZE]).await;
    let writer = |wanted: bool, channel| wanted.then(|| Writer::WebSocket(channels.writer(channel)));
    let (mut stdout, mut stderr) = (writer(stdio.stdout, STDOUT), writer(stdio.stderr, STDERR));
    let mut error = Writer::WebSocket(channels.writer(ERROR));
    // An empty message on the first channel we write tells the client that the streams are up.
    let first = stdout.as_mut().or(stderr.as_mut()).unwrap_or(&mut error);
    let _ = first.write(Bytes::new()).await;
    Client {
        stdin: channels.reader(STDIN).filter(|_| stdio.stdin),
        stdout,
        stderr,
        error,
        resize: channels.reader(RESIZE).filter(|_| stdio.tty),
        structured: protocol.starts_with("v4") || protocol.starts_with("v5"),
        closed: channels.closed(),
        _connection: None,
    }
}

async fn run(host: Arc<dyn Host>, client: Client, action: Action) {
    let session = tokio::select! {
        session = start(&*host, action) => session,
        () = client.closed.cancelled() => return, // dropping the call undoes it: nobody waits for the process
    };
    let Client { stdin, stdout, stderr, mut error, resize, structured, closed, _connection } = client;
    let result = match session {
        Err(failure) => Err(failure),
        Ok(session) => {
            let pumps = Pumps::start(session.stdin, session.stdout, session.stderr, stdin, stdout, stderr);
            let resizing = resize.map(|resize| AbortOnDrop(tokio::spawn(forward_sizes(resize, session.resize))));
            let result = tokio::select! {
                result = session.exit => result,
                () = closed.cancelled() => return, // dropping `exit` tells the host that the client has gone
            };
            drop(resizing);
            pumps.finish().await;
            result
        }
    };
    let status = status(&result, structured);
    if !status.is_empty() {
        let _ = error.write(status).await;
    }
    error.close().await;
}

async fn start(host: &dyn Host, action: Action) -> Result<Session, HostError> {
    match action {
        Action::Exec(request) => host.exec(request).await,
        Action::Attach(request) => host.attach(request).await,
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The copying of one session.
struct Pumps {
    /// Ends when the output does.
    output: JoinSet<()>,
    /// Aborted when the process ends.
    _input: Option<AbortOnDrop>,
}

impl Pumps {
    fn start(
        to: Option<std::os::fd::OwnedFd>,
        out: Option<std::os::fd::OwnedFd>,
        err: Option<std::os::fd::OwnedFd>,
        stdin: Option<Reader>,
        stdout: Option<Writer>,
        stderr: Option<Writer>,
    ) -> Self {
        let input = to.zip(stdin).and_then(|(fd, reader)| Some((FdStream::writer(fd).ok()?, reader)));
        let input = input.map(|(fd, reader)| AbortOnDrop(tokio::spawn(pump_in(reader, fd))));
        let mut output = JoinSet::new();
        for (fd, writer) in [out.zip(stdout), err.zip(stderr)].into_iter().flatten() {
            match FdStream::reader(fd) {
                Ok(fd) => drop(output.spawn(pump_out(fd, writer))),
                Err(error) => tracing::warn!(%error, "output descriptor cannot be watched"),
            }
        }
        Self { output, _input: input }
    }

    /// Waits until the output is through.
    async fn finish(mut self) {
        let drained = async { while self.output.join_next().await.is_some() {} };
        if tokio::time::timeout(OUTPUT_DRAIN, drained).await.is_err() {
            tracing::debug!("output was still open after the process had ended");
        }
    }
}

async fn pump_in(mut reader: Reader, mut fd: FdStream) {
    while let Some(data) = reader.read().await {
        // A process that has closed its input wants no more of it; the client goes on.
        if fd.write_all(&data).await.is_err() {
            return;
        }
    }
}

async fn pump_out(mut fd: FdStream, mut writer: Writer) {
    loop {
        let mut buf = BytesMut::with_capacity(CHUNK);
        match fd.read_buf(&mut buf).await {
            Ok(0) => break,
            Ok(_) => {
                if writer.write(buf.freeze()).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "output ended");
                break;
            }
        }
    }
    writer.close().await;
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireSize {
    width: u16,
    height: u16,
}

/// Sizes come as JSON objects, one after the other, cut anywhere.
async fn forward_sizes(mut reader: Reader, sizes: tokio::sync::mpsc::Sender<TerminalSize>) {
    let mut buf = Vec::new();
    while let Some(data) = reader.read().await {
        buf.extend_from_slice(&data);
        for size in take_sizes(&mut buf) {
            if sizes.send(size).await.is_err() {
                return;
            }
        }
    }
}

fn take_sizes(buf: &mut Vec<u8>) -> Vec<TerminalSize> {
    let mut stream = serde_json::Deserializer::from_slice(buf).into_iter::<WireSize>();
    let (mut sizes, mut done) = (Vec::new(), 0);
    loop {
        match stream.next() {
            Some(Ok(size)) => {
                done = stream.byte_offset();
                sizes.push(TerminalSize { width: size.width, height: size.height });
            }
            Some(Err(error)) if error.is_eof() => break,
            Some(Err(_)) => {
                done = buf.len();
                break;
            }
            None => {
                done = buf.len();
                break;
            }
        }
    }
    buf.drain(..done);
    sizes
}

/// What the error stream says at the end.
fn status(result: &Result<i32, HostError>, structured: bool) -> Bytes {
    let status: Value = match (result, structured) {
        (Ok(0), false) => return Bytes::new(),
        (Ok(code), false) => return format!("error executing remote command: command exited with {code}").into(),
        (Err(error), false) => return format!("error executing remote command: {error}").into(),
        (Ok(0), true) => json!({"metadata": {}, "status": "Success"}),
        (Ok(code), true) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        (Err(error), true) => json!({
            "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
            "message": format!("Internal error occurred: {error}"),
            "details": {"causes": [{"message": error.to_string()}]},
        }),
    };
    status.to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_be_cut_anywhere() {
        let mut buf = br#"{"Width":80,"Height":24}{"Width":1"#.to_vec();
        assert_eq!(take_sizes(&mut buf), [TerminalSize { width: 80, height: 24 }]);
        buf.extend_from_slice(br#"20,"Height":40}"#);
        assert_eq!(take_sizes(&mut buf), [TerminalSize { width: 120, height: 40 }]);
        assert!(buf.is_empty());
        buf.extend_from_slice(b"nonsense");
        assert!(take_sizes(&mut buf).is_empty() && buf.is_empty());
    }

    #[test]
    fn the_exit_code_travels_as_a_cause() {
        let text = status(&Ok(3), true);
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
        assert_eq!(status(&Ok(0), false), "");
    }
}
