//! The DNS sockets on the cluster's DNS address, UDP and TCP.
//!
//! Names of the cluster are answered in the receiving task itself; a name for upstream gets a task of its own.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use ipnet::IpNet;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};
use parking_lot::RwLock;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    answer::{Verdict, answer, encode, response_to, udp_limit},
    forward::Forwarder,
    zone::Zone,
};
use crate::metrics::Metrics;

/// Queries answered before other tasks get a turn.
const BURST: usize = 64;
const CONNECTIONS: usize = 128;
const IDLE: Duration = Duration::from_secs(10);
const TCP_MAX: usize = 65_535;
/// Receiving tasks on the UDP socket.
const RECEIVERS: usize = 2;

/// What every task of the server shares.
pub(crate) struct Server {
    pub(crate) zone: Arc<RwLock<Zone>>,
    pub(crate) forwarder: Forwarder,
    /// Cluster networks: reverse names of no one else.
    pub(crate) own_nets: Vec<IpNet>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A response, or the query that has to go upstream.
enum Step {
    Done(Option<Vec<u8>>),
    Upstream(Box<(Message, Option<Message>)>),
}

fn open(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    // The address may come to this node a moment after us.
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    if kind == SockType::Stream {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    }
    socket::bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrStorage::from(address))?;
    if kind == SockType::Stream {
        socket::listen(&fd, socket::Backlog::new(128)?)?;
    }
    Ok(fd)
}

/// Opens both sockets.
pub(crate) fn bind(address: IpAddr, port: u16) -> io::Result<(UdpSocket, TcpListener)> {
    let address = SocketAddr::new(address, port);
    let udp = std::net::UdpSocket::from(open(address, SockType::Datagram)?);
    let _ = setsockopt(&udp, sockopt::RcvBufForce, &(4 << 20));
    let tcp = std::net::TcpListener::from(open(address, SockType::Stream)?);
    Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
}

/// Serves until stopped.
pub(crate) async fn serve(server: Arc<Server>, (udp, tcp): (UdpSocket, TcpListener), stop: CancellationToken) {
    let udp = Arc::new(udp);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..RECEIVERS {
        tasks.spawn(receive(server.clone(), udp.clone()));
    }
    tasks.spawn(accept(server, tcp));
    stop.cancelled().await;
    tasks.shutdown().await;
}

async fn receive(server: Arc<Server>, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; 4096];
    loop {
        if let Err(error) = socket.readable().await {
            tracing::warn!(%error, "DNS socket is not readable any more");
            return;
        }
        for _ in 0..BURST {
            let (len, from) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // An ICMP error of an earlier answer: not about the socket.
                Err(_) => continue,
            };
            match server.step(&buffer[..len], Transport::Udp) {
                Step::Done(None) => {}
                Step::Done(Some(bytes)) => send(&socket, &bytes, from).await,
                Step::Upstream(pending) => {
                    let (server, socket) = (server.clone(), socket.clone());
                    tokio::spawn(async move {
                        let limit = udp_limit(&pending.0);
                        if let Some(bytes) = encode(server.finish(*pending).await, limit) {
                            send(&socket, &bytes, from).await;
                        }
                    });
                }
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr) {
    let sent = match socket.try_send_to(bytes, to) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.send_to(bytes, to).await,
        other => other,
    };
    if let Err(error) = sent {
        tracing::debug!(%error, %to, "DNS answer not sent");
    }
}

async fn accept(server: Arc<Server>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = server.clone();
                tasks.spawn(async move {
                    let _slot = slot;
                    // A client that hangs up or idles ends its connection, no more.
                    let _ = converse(&server, stream).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "DNS connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while tasks.try_join_next().is_some() {}
    }
}

async fn converse(server: &Server, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let len = timeout(IDLE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(len)];
        timeout(IDLE, stream.read_exact(&mut query)).await??;
        let answer = match server.step(&query, Transport::Tcp) {
            Step::Done(answer) => answer,
            Step::Upstream(pending) => encode(server.finish(*pending).await, TCP_MAX),
        };
        let Some(answer) = answer else { return Ok(()) };
        let mut framed = u16::try_from(answer.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
        framed.extend_from_slice(&answer);
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

#[derive(Clone, Copy)]
enum Transport {
    Udp,
    Tcp,
}

impl Server {
    fn step(&self, bytes: &[u8], transport: Transport) -> Step {
        self.metrics.dns_requests.inc();
        let Ok(query) = Message::from_vec(bytes) else { return Step::Done(form_error(bytes)) };
        if query.metadata.message_type != MessageType::Query {
            return Step::Done(None);
        }
        let limit = match transport {
            Transport::Udp => udp_limit(&query),
            Transport::Tcp => TCP_MAX,
        };
        let verdict = answer(&self.zone.read(), &self.own_nets, &query);
        match verdict {
            Verdict::Respond(response) => Step::Done(encode(response, limit)),
            Verdict::Follow(response, target) => {
                let mut next = query.clone();
                let kind = query.queries[0].query_type();
                next.queries = vec![Query::query(target, kind)];
                Step::Upstream(Box::new((next, Some(response))))
            }
            Verdict::Forward => match self.forwarder.cached(&query) {
                Some(hit) => Step::Done(encode(hit, limit)),
                None => Step::Upstream(Box::new((query, None))),
            },
        }
    }

    /// Asks upstream. With a response at hand, an alias of ours, the answer is appended to it.
    async fn finish(&self, (query, alias): (Message, Option<Message>)) -> Message {
        self.metrics.dns_forwarded.inc();
        let own = match alias {
            Some(_) => match answer(&self.zone.read(), &self.own_nets, &query) {
                Verdict::Respond(response) => Some(response),
                _ => None,
            },
            None => None,
        };
        let found = match own {
            Some(response) => Some(response),
            None => self.forwarder.resolve(&query).await,
        };
        match (found, alias) {
            (Some(response), None) => response,
            (None, None) => response_to(&query, ResponseCode::ServFail),
            (Some(mut target), Some(mut response)) => {
                response.answers.append(&mut target.answers);
                response
            }
            // The alias alone is still a true answer.
            (None, Some(response)) => response,
        }
    }
}

/// An answer to bytes that are no DNS message, when at least its identity can be read.
fn form_error(bytes: &[u8]) -> Option<Vec<u8>> {
    let id = u16::from_be_bytes(*bytes.first_chunk()?);
    let is_query = bytes.len() >= 12 && bytes[2] & 0x80 == 0;
    is_query.then(|| Message::error_msg(id, OpCode::Query, ResponseCode::FormErr).to_vec().ok()).flatten()
}
