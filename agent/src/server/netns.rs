//! Connections to a port inside a pod's network namespace.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpSocket, TcpStream};

use super::NetNs;

/// Why a port cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace cannot be entered.
    #[error("enter network namespace {}: {source}", path.display())]
    Enter {
        /// Its path.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// No socket.
    #[error("create a socket: {0}")]
    Socket(#[source] io::Error),
    /// Nobody listens, or worse.
    #[error("connect to localhost:{port}: {source}")]
    Connect {
        /// The port.
        port: u16,
        /// Cause.
        source: io::Error,
    },
}

/// Connects to `port` on the loopback address of a network namespace, IPv4 first.
pub async fn connect_loopback(netns: &NetNs, port: u16) -> Result<TcpStream, Error> {
    let v4 = socket(netns, false).await?;
    let refused = match v4.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Ok(stream) => return Ok(stream),
        Err(source) => source,
    };
    // The IPv4 error is the one people expect to read, so it is the one reported when IPv6 fails too.
    let Ok(v6) = socket(netns, true).await else { return Err(Error::Connect { port, source: refused }) };
    v6.connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
        .await
        .map_err(|_| Error::Connect { port, source: refused })
}

/// A socket that belongs to the namespace, whoever uses it. It is made by a thread of its own, because entering a namespace
/// changes the thread that does it.
async fn socket(netns: &NetNs, v6: bool) -> Result<TcpSocket, Error> {
    let make = move || if v6 { TcpSocket::new_v6() } else { TcpSocket::new_v4() }.map_err(Error::Socket);
    let NetNs::Path(path) = netns.clone() else { return make() };
    let (tx, rx) = tokio::sync::oneshot::channel();
    let thread = move || {
        let entered = File::open(&path).and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
        let result = entered.map_err(|source| Error::Enter { path, source }).and_then(|()| make());
        // The requester may have gone.
        let _ = tx.send(result);
    };
    std::thread::Builder::new().name("netns".into()).stack_size(64 << 10).spawn(thread).map_err(Error::Socket)?;
    rx.await.unwrap_or_else(|_| Err(Error::Socket(io::Error::other("the thread died"))))
}
