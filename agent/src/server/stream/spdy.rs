//! A SPDY/3.1 connection: one task reads frames and feeds streams, one task writes what streams send.
//!
//! Kubernetes clients neither announce nor honour flow-control windows, so back pressure is the connection's own: a stream
//! that is not read holds up the others on it once its queue is full, as in every implementation clients know.

use std::{collections::HashMap, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::{
    Closed, Reader,
    spdy_frame::{Decoder, Encoder, Error, Frame, Headers},
};

/// Frames that wait for the writing task.
const QUEUE: usize = 16;
/// Largest payload put into one data frame.
const MAX_DATA: usize = 32 << 10;
/// Streams of one connection at a time.
const MAX_STREAMS: usize = 4096;
/// How long a peer may take to hang up after we have sent our last frame.
const LINGER: Duration = Duration::from_secs(5);
/// RST_STREAM status REFUSED_STREAM.
const REFUSED: u32 = 3;

/// One stream the peer has opened.
#[derive(Debug)]
pub(crate) struct Stream {
    /// The headers it came with.
    pub(crate) headers: Headers,
    /// What the peer sends.
    pub(crate) reader: Reader,
    /// What we send.
    pub(crate) writer: Sender,
}

/// The sending half of a stream.
#[derive(Debug, Clone)]
pub(crate) struct Sender {
    id: u32,
    frames: mpsc::Sender<Frame>,
}

impl Sender {
    /// Sends data, in frames of bounded size.
    pub(crate) async fn write(&mut self, mut data: Bytes) -> Result<(), Closed> {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_DATA));
            let frame = Frame::Data { id: self.id, fin: false, data: piece };
            self.frames.send(frame).await.map_err(|_| Closed)?;
        }
        Ok(())
    }

    /// Ends our half.
    pub(crate) async fn close(&mut self) {
        // A connection that is gone has closed the stream already.
        let _ = self.frames.send(Frame::Data { id: self.id, fin: true, data: Bytes::new() }).await;
    }

    /// Aborts the stream.
    pub(crate) async fn reset(&mut self) {
        let _ = self.frames.send(Frame::Reset { id: self.id, status: 5 }).await;
    }
}

/// The server's side of a connection.
pub(crate) struct Connection {
    incoming: mpsc::Receiver<Stream>,
    closed: CancellationToken,
}

impl Connection {
    /// Starts serving the peer on `io`. Dropping the connection ends it in order: what its streams have sent is written, our
    /// direction is shut down, and the peer has a moment to hang up, so that no reset overtakes the last bytes.
    pub(crate) fn server<IO>(io: IO) -> Result<Self, Error>
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (streams, incoming) = mpsc::channel(QUEUE);
        let (frames, outgoing) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let encoder = Encoder::new()?;
        let done = closed.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = write_frames(write, encoder, outgoing) => {}
                () = done.cancelled() => {} // the connection is dead: dropping half-written frames loses nothing
            }
        });
        let reading = ReadTask { frames, streams, open: HashMap::new(), last: 0 };
        let done = closed.clone();
        tokio::spawn(async move {
            let _guard = done.drop_guard();
            if let Err(error) = reading.run(read).await {
                tracing::debug!(%error, "SPDY connection ended");
            }
        });
        Ok(Self { incoming, closed })
    }

    /// The next stream the peer opens; `None` when the connection is gone. Cancel-safe.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Is cancelled when the peer has gone.
    pub(crate) fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }
}

/// Why reading stopped.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("read: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] Error),
}

struct ReadTask {
    frames: mpsc::Sender<Frame>,
    streams: mpsc::Sender<Stream>,
    open: HashMap<u32, mpsc::Sender<Bytes>>,
    last: u32,
}

impl ReadTask {
    async fn run<IO: AsyncRead>(mut self, mut io: ReadHalf<IO>) -> Result<(), ReadError> {
        let (mut decoder, mut buf) = (Decoder::new(), BytesMut::new());
        loop {
            while let Some(frame) = decoder.decode(&mut buf)? {
                self.handle(frame).await;
            }
            buf.reserve(MAX_DATA);
            let n = tokio::select! {
                n = io.read_buf(&mut buf) => n?, // cancel-safe: nothing is lost when the other arm wins
                () = self.streams.closed() => break,
            };
            if n == 0 {
                return Ok(());
            }
        }
        drop(self);
        let mut sink = tokio::io::sink();
        let drain = tokio::io::copy(&mut io, &mut sink);
        let _ = tokio::time::timeout(LINGER, drain).await;
        Ok(())
    }

    async fn handle(&mut self, frame: Frame) {
        match frame {
            Frame::SynStream { id, fin, headers } => self.open(id, fin, headers).await,
            Frame::Data { id, fin, data } => {
                if !data.is_empty()
                    && let Some(sender) = self.open.get(&id)
                {
                    // A reader that has been dropped wants no more; the frames are swallowed until the peer ends.
                    let _ = sender.send(data).await;
                }
                if fin {
                    self.open.remove(&id);
                }
            }
            Frame::Headers { id, fin: true } | Frame::SynReply { id, fin: true, .. } | Frame::Reset { id, .. } => {
                self.open.remove(&id);
            }
            Frame::Ping { id } => {
                let _ = self.frames.send(Frame::Ping { id }).await;
            }
            Frame::Headers { .. } | Frame::SynReply { .. } | Frame::GoAway { .. } | Frame::Ignored { .. } => {}
        }
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) {
        if id.is_multiple_of(2) || id <= self.last || self.open.len() >= MAX_STREAMS {
            let _ = self.frames.send(Frame::Reset { id, status: REFUSED }).await;
            return;
        }
        self.last = id;
        let (sender, reader) = Reader::pair();
        let writer = Sender { id, frames: self.frames.clone() };
        let _ = self.frames.send(Frame::SynReply { id, fin: false, headers: Headers::default() }).await;
        if self.streams.send(Stream { headers, reader, writer }).await.is_ok() && !fin {
            self.open.insert(id, sender);
        }
    }
}

/// Writes frames until every sender is gone, then shuts the direction down so that the peer sees an orderly end.
async fn write_frames<IO: AsyncWrite>(mut io: WriteHalf<IO>, mut encoder: Encoder, mut frames: mpsc::Receiver<Frame>) {
    let mut buf = BytesMut::new();
    while let Some(frame) = frames.recv().await {
        let mut next = Some(frame);
        while let Some(frame) = next.take() {
            if let Err(error) = encoder.encode(&frame, &mut buf) {
                tracing::debug!(%error, "SPDY frame not sent");
                return;
            }
            if buf.len() < 2 * MAX_DATA {
                next = frames.try_recv().ok();
            }
        }
        if io.write_all(&buf).await.is_err() || io.flush().await.is_err() {
            return;
        }
        buf.clear();
    }
    let _ = io.shutdown().await;
}
