//! Port-forward: joins a client's streams to ports of a pod.
//!
//! Over SPDY (also inside a WebSocket tunnel) the client opens an error stream and a data stream per connection, paired by
//! the `requestID` header. Over WebSocket channels the ports are in the query and each has two channels, data and error,
//! which both begin with the port number in two little-endian bytes.

use std::{collections::HashMap, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use super::{
    NetNs, netns,
    stream::{
        Reader, Writer,
        spdy::{self, Stream},
        spdy_frame,
        upgrade::{Grant, Kind, Upgraded},
        websocket,
    },
};

/// SPDY protocols of port-forward.
pub(crate) const SPDY_PROTOCOLS: &[&str] = &["portforward.k8s.io", ""];
/// WebSocket protocols of port-forward: the tunnel, and channels.
pub(crate) const WEBSOCKET_PROTOCOLS: &[&str] =
    &[TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", ""];
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// How long the second stream of a pair may take.
const PAIRING: Duration = Duration::from_secs(30);
const CHUNK: usize = 32 << 10;

/// Why a client was sent away.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("upgrade failed")]
    Upgrade(#[from] hyper::Error),
    #[error("SPDY")]
    Spdy(#[from] spdy_frame::Error),
}

/// Serves one granted upgrade to its end. `ports` are the query's, for the channel protocols.
pub(crate) async fn serve(netns: NetNs, grant: Grant, ports: Vec<u16>) {
    if let Err(error) = serve_inner(netns, grant, ports).await {
        tracing::debug!(%error, "port-forward client did not connect");
    }
}

async fn serve_inner(netns: NetNs, grant: Grant, ports: Vec<u16>) -> Result<(), Error> {
    let io = Upgraded::new(grant.on_upgrade.await?);
    match (grant.kind, grant.protocol) {
        (Kind::Spdy, _) => serve_spdy(netns, spdy::Connection::server(io)?).await,
        (Kind::WebSocket, TUNNEL) => {
            serve_spdy(netns, spdy::Connection::server(websocket::tunnel(io).await)?).await;
        }
        (Kind::WebSocket, protocol) => serve_channels(netns, io, protocol, ports).await,
    }
    Ok(())
}

/// The halves of a pair, as far as they have come.
#[derive(Default)]
struct Pair {
    data: Option<Stream>,
    error: Option<Stream>,
}

async fn serve_spdy(netns: NetNs, mut connection: spdy::Connection) {
    let mut pairs: HashMap<String, Pair> = HashMap::new();
    let mut forwards = JoinSet::new();
    let (expired_tx, mut expired) = tokio::sync::mpsc::unbounded_channel::<String>();
    loop {
        // Every arm is cancel-safe: channels, and a join set that keeps what has not been reaped.
        let mut stream = tokio::select! {
            stream = connection.accept() => match stream {
                Some(stream) => stream,
                None => break,
            },
            Some(_) = forwards.join_next(), if !forwards.is_empty() => continue,
            Some(id) = expired.recv() => {
                pairs.remove(&id);
                continue;
            }
        };
        let Some(port) = stream.headers.get("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0)
        else {
            stream.writer.reset().await;
            continue;
        };
        // Clients before 1.4 sent no request id: their streams pair by port.
        let id = stream.headers.get("requestid").map_or_else(|| format!("port {port}"), str::to_owned);
        let pair = pairs.entry(id.clone()).or_insert_with(|| {
            let (id, tx) = (id.clone(), expired_tx.clone());
            tokio::spawn(async move {
                tokio::time::sleep(PAIRING).await;
                let _ = tx.send(id);
            });
            Pair::default()
        });
        match stream.headers.get("streamtype") {
            Some("data") => pair.data = Some(stream),
            Some("error") => pair.error = Some(stream),
            _ => {
                stream.writer.reset().await;
                continue;
            }
        }
        if let Pair { data: Some(_), error: Some(_) } = pair
            && let Some(Pair { data: Some(data), error: Some(error) }) = pairs.remove(&id)
        {
            let netns = netns.clone();
            let (error, reader, writer) = (Writer::Spdy(error.writer), data.reader, Writer::Spdy(data.writer));
            forwards.spawn(async move { forward(&netns, port, reader, writer, error).await });
        }
    }
}

async fn serve_channels(netns: NetNs, io: Upgraded, protocol: &str, ports: Vec<u16>) {
    let encoding = if protocol.contains("base64") { websocket::Encoding::Base64 } else { websocket::Encoding::Binary };
    let readable: Vec<u8> = (0..ports.len()).map(|i| 2 * i as u8).collect();
    let mut channels = websocket::Channels::server(io, encoding, &readable).await;
    let closed = channels.closed();
    let mut forwards = JoinSet::new();
    for (channel, port) in readable.into_iter().zip(ports) {
        let Some(reader) = channels.reader(channel) else { continue };
        let mut data = Writer::WebSocket(channels.writer(channel));
        let mut error = Writer::WebSocket(channels.writer(channel + 1));
        let netns = netns.clone();
        forwards.spawn(async move {
            let greeting = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.write(greeting.clone()).await.is_ok() && error.write(greeting).await.is_ok() {
                forward(&netns, port, reader, data, error).await;
            }
        });
    }
    drop(channels);
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {}
        () = closed.cancelled() => {} // the client has gone: dropping the set ends the forwards
    }
}

/// One forwarded connection, to its end.
async fn forward(netns: &NetNs, port: u16, reader: Reader, mut writer: Writer, mut error: Writer) {
    match netns::connect_loopback(netns, port).await {
        Ok(stream) => copy(stream, reader, &mut writer).await,
        Err(failure) => {
            let text = format!("an error occurred forwarding port {port}: {failure}");
            let _ = error.write(text.into()).await;
        }
    }
    writer.close().await;
    error.close().await;
}

async fn copy(stream: TcpStream, mut reader: Reader, writer: &mut Writer) {
    let (mut from_pod, mut to_pod) = stream.into_split();
    let upload = async {
        while let Some(data) = reader.read().await {
            if to_pod.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = to_pod.shutdown().await;
    };
    let download = async {
        loop {
            let mut buf = BytesMut::with_capacity(CHUNK);
            match from_pod.read_buf(&mut buf).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {
                    if writer.write(buf.freeze()).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    tokio::pin!(upload, download);
    // The pod's end of file ends the connection; the client's only its half.
    tokio::select! {
        () = &mut download => {}
        () = &mut upload => download.await,
    }
}
