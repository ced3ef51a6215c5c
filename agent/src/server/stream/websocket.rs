//! Kubernetes' WebSocket protocols on the server's side.
//!
//! Two shapes: *channels* (`v1..v5.channel.k8s.io` and their base64 forms), where the first byte of every message names the
//! stream, and the *tunnel* (`SPDY/3.1+portforward.k8s.io`), whose messages are nothing but the bytes of a SPDY connection.

use std::{io, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt, stream::SplitSink, stream::SplitStream};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::CancellationToken;

use super::{Closed, Reader};

/// Largest message a client may send.
const MAX_MESSAGE: usize = 8 << 20;
/// Largest message we send.
const MAX_DATA: usize = 32 << 10;
/// Messages waiting for the writing task.
const QUEUE: usize = 16;
/// How long a peer may take to hang up after our close frame.
const LINGER: Duration = Duration::from_secs(5);
/// v5: this channel's message closes the channel it names.
const CLOSE_CHANNEL: u8 = 255;

/// How payloads are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Binary messages, the channel as a byte.
    Binary,
    /// Text messages, the channel as a digit, the payload in base64.
    Base64,
}

/// The sending half of a channel.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    channel: u8,
    messages: mpsc::Sender<(u8, Bytes)>,
}

impl Sender {
    /// Sends data in messages of bounded size; empty data is sent as an empty message.
    pub(crate) async fn write(&mut self, mut data: Bytes) -> Result<(), Closed> {
        loop {
            let piece = data.split_to(data.len().min(MAX_DATA));
            self.messages.send((self.channel, piece)).await.map_err(|_| Closed)?;
            if data.is_empty() {
                return Ok(());
            }
        }
    }

    /// Channels end with the connection: servers do not close them one by one.
    pub(crate) async fn close(&mut self) {}
}

/// A connection of channels.
pub(crate) struct Channels {
    messages: mpsc::Sender<(u8, Bytes)>,
    readers: Vec<(u8, Reader)>,
    closed: CancellationToken,
}

impl Channels {
    /// Starts serving; messages on channels other than `readable` are dropped.
    pub(crate) async fn server<IO>(io: IO, encoding: Encoding, readable: &[u8]) -> Self
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sink, stream) = accept(io).await.split();
        let closed = CancellationToken::new();
        let (messages, outgoing) = mpsc::channel(QUEUE);
        let (senders, readers) = readable
            .iter()
            .map(|&channel| {
                let (tx, rx) = Reader::pair();
                ((channel, tx), (channel, rx))
            })
            .unzip();
        let finished = CancellationToken::new();
        let guard = finished.clone().drop_guard();
        tokio::spawn(async move {
            let _guard = guard;
            write_messages(sink, encoding, outgoing).await;
        });
        let done = closed.clone();
        tokio::spawn(async move {
            let _guard = done.drop_guard();
            let linger = async {
                finished.cancelled().await;
                tokio::time::sleep(LINGER).await;
            };
            tokio::select! {
                () = read_messages(stream, encoding, senders) => {}
                () = linger => {} // we have said goodbye; unread input no longer matters
            }
        });
        Self { messages, readers, closed }
    }

    /// Takes the incoming half of a channel.
    pub(crate) fn reader(&mut self, channel: u8) -> Option<Reader> {
        let at = self.readers.iter().position(|(c, _)| *c == channel)?;
        Some(self.readers.swap_remove(at).1)
    }

    /// The outgoing half of a channel.
    pub(crate) fn writer(&self, channel: u8) -> Sender {
        Sender { channel, messages: self.messages.clone() }
    }

    /// Is cancelled when the peer has gone.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }
}

async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    let config = WebSocketConfig::default()
        .read_buffer_size(16 << 10)
        .write_buffer_size(0)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

/// Splits a message into channel and payload.
fn decode(encoding: Encoding, message: &Message) -> Option<(u8, Bytes)> {
    match (encoding, message) {
        (Encoding::Binary, Message::Binary(data)) if !data.is_empty() => Some((data[0], data.slice(1..))),
        (Encoding::Binary, Message::Text(text)) if !text.is_empty() => {
            Some((text.as_bytes()[0], Bytes::copy_from_slice(&text.as_bytes()[1..])))
        }
        (Encoding::Base64, Message::Text(text)) if !text.is_empty() => {
            let (channel, payload) = text.as_bytes().split_first()?;
            Some((channel.checked_sub(b'0')?, STANDARD.decode(payload).ok()?.into()))
        }
        _ => None,
    }
}

fn encode(encoding: Encoding, channel: u8, data: &[u8]) -> Message {
    match encoding {
        Encoding::Binary => {
            let mut out = BytesMut::with_capacity(data.len() + 1);
            out.extend_from_slice(&[channel]);
            out.extend_from_slice(data);
            Message::Binary(out.freeze())
        }
        Encoding::Base64 => Message::text(format!("{}{}", char::from(b'0' + channel), STANDARD.encode(data))),
    }
}

async fn read_messages<IO>(
    mut stream: SplitStream<WebSocketStream<IO>>,
    encoding: Encoding,
    mut senders: Vec<(u8, mpsc::Sender<Bytes>)>,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = stream.next().await {
        if matches!(message, Message::Close(_)) {
            // The next poll answers it and ends the stream.
            continue;
        }
        let Some((channel, data)) = decode(encoding, &message) else { continue };
        if channel == CLOSE_CHANNEL {
            senders.retain(|(c, _)| data.first() != Some(c));
        } else if let Some((_, sender)) = senders.iter().find(|(c, _)| *c == channel)
            && !data.is_empty()
        {
            // A reader that has been dropped wants no more.
            let _ = sender.send(data).await;
        }
    }
}

/// Writes until every sender is gone, then closes the connection in order.
async fn write_messages<IO>(
    mut sink: SplitSink<WebSocketStream<IO>, Message>,
    encoding: Encoding,
    mut messages: mpsc::Receiver<(u8, Bytes)>,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    while let Some((channel, data)) = messages.recv().await {
        if sink.send(encode(encoding, channel, &data)).await.is_err() {
            return;
        }
    }
    let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    let _ = sink.send(Message::Close(Some(frame))).await;
}

/// The byte stream inside a tunnel: bytes written come out as binary messages and the other way round.
pub(crate) async fn tunnel<IO>(io: IO) -> DuplexStream
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sink, mut stream) = accept(io).await.split();
    let (ours, theirs) = tokio::io::duplex(2 * MAX_DATA);
    let (mut read, mut write) = tokio::io::split(theirs);
    tokio::spawn(async move {
        while let Some(Ok(message)) = stream.next().await {
            let (Message::Binary(_) | Message::Text(_)) = &message else { continue };
            if write.write_all(&message.into_data()).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    });
    tokio::spawn(async move {
        let result: io::Result<()> = async {
            loop {
                let mut buf = BytesMut::with_capacity(MAX_DATA);
                if read.read_buf(&mut buf).await? == 0 {
                    return Ok(());
                }
                sink.send(Message::Binary(buf.freeze())).await.map_err(io::Error::other)?;
            }
        }
        .await;
        if result.is_ok() {
            let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
            let _ = sink.send(Message::Close(Some(frame))).await;
        }
    });
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair(encoding: Encoding, readable: &[u8]) -> (WebSocketStream<DuplexStream>, Channels) {
        let (client, server) = tokio::io::duplex(64 << 10);
        let channels = Channels::server(server, encoding, readable).await;
        (WebSocketStream::from_raw_socket(client, Role::Client, None).await, channels)
    }

    #[tokio::test]
    async fn channels_carry_and_v5_closes_one() {
        let (mut client, mut channels) = pair(Encoding::Binary, &[0, 4]).await;
        let mut stdin = channels.reader(0).unwrap();
        let mut resize = channels.reader(4).unwrap();
        client.send(Message::Binary(Bytes::from_static(b"\x00hello"))).await.unwrap();
        client.send(Message::Binary(Bytes::from_static(b"\x02dropped"))).await.unwrap();
        client.send(Message::Binary(Bytes::from_static(&[255, 0]))).await.unwrap();
        client.send(Message::Binary(Bytes::from_static(b"\x04size"))).await.unwrap();
        assert_eq!(stdin.read().await.unwrap(), "hello");
        assert_eq!(stdin.read().await, None);
        assert_eq!(resize.read().await.unwrap(), "size");
        channels.writer(1).write(Bytes::from_static(b"out")).await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap(), Message::Binary(Bytes::from_static(b"\x01out")));
        drop((channels, stdin, resize));
        assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
    }

    #[tokio::test]
    async fn base64_channels_are_text() {
        let (mut client, mut channels) = pair(Encoding::Base64, &[0]).await;
        client.send(Message::text("0aGVsbG8=")).await.unwrap();
        assert_eq!(channels.reader(0).unwrap().read().await.unwrap(), "hello");
        channels.writer(3).write(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap(), Message::text("3eA=="));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_noticed() {
        let (client, channels) = pair(Encoding::Binary, &[0]).await;
        drop(client);
        channels.closed().cancelled().await;
    }

    #[tokio::test]
    async fn a_tunnel_is_a_byte_stream() {
        let (client, server) = tokio::io::duplex(64 << 10);
        let mut inner = tunnel(server).await;
        let mut client = WebSocketStream::from_raw_socket(client, Role::Client, None).await;
        client.send(Message::Binary(Bytes::from_static(b"ab"))).await.unwrap();
        client.send(Message::Binary(Bytes::from_static(b"cd"))).await.unwrap();
        let mut buf = [0; 4];
        inner.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"abcd");
        inner.write_all(b"xyz").await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap().into_data(), "xyz");
        drop(inner);
        assert!(matches!(client.next().await, Some(Ok(Message::Close(_)))));
    }
}
