//! The streams under exec, attach and port-forward, whatever protocol carries them.
//!
//! [`spdy`] and [`websocket`] turn an upgraded connection into byte streams of one shape: a [`Reader`] that yields chunks
//! until the peer closes its half, and a [`Writer`] whose back pressure is the connection's. [`upgrade`] answers the HTTP
//! request that asks for either.

pub(crate) mod fd;
pub(crate) mod spdy;
pub(crate) mod spdy_frame;
pub(crate) mod upgrade;
pub(crate) mod websocket;

use bytes::Bytes;
use tokio::sync::mpsc;

/// Chunks that wait in one direction of one stream; with chunks of at most 32 KiB this bounds what a slow reader holds.
pub(crate) const DEPTH: usize = 8;

/// The connection under a stream is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection is closed")]
pub(crate) struct Closed;

/// The incoming half of a stream.
#[derive(Debug)]
pub(crate) struct Reader(mpsc::Receiver<Bytes>);

impl Reader {
    /// A reader and the sender that feeds it; dropping the sender ends the stream.
    pub(crate) fn pair() -> (mpsc::Sender<Bytes>, Reader) {
        let (tx, rx) = mpsc::channel(DEPTH);
        (tx, Reader(rx))
    }

    /// The next chunk, `None` when the peer has closed its half or the connection is gone. Cancel-safe.
    pub(crate) async fn read(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

/// The outgoing half of a stream. Dropping it does not close the stream: [`Writer::close`] does.
#[derive(Debug)]
pub(crate) enum Writer {
    /// A SPDY stream.
    Spdy(spdy::Sender),
    /// A WebSocket channel.
    WebSocket(websocket::Sender),
}

impl Writer {
    /// Sends one chunk.
    pub(crate) async fn write(&mut self, data: Bytes) -> Result<(), Closed> {
        match self {
            Writer::Spdy(sender) => sender.write(data).await,
            Writer::WebSocket(sender) => sender.write(data).await,
        }
    }

    /// Ends this direction.
    pub(crate) async fn close(&mut self) {
        match self {
            Writer::Spdy(sender) => sender.close().await,
            Writer::WebSocket(sender) => sender.close().await,
        }
    }
}
