//! The DNS server on the cluster's DNS address: what UDP and TCP share, and TCP.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt};
use parking_lot::RwLock;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    answer::{Verdict, answer, follow},
    forward::Forwarder,
    query::Query,
    reply::fail_malformed,
    udp::Receivers,
    zone::Zone,
};
use crate::metrics::Metrics;

const CONNECTIONS: usize = 128;
const IDLE: Duration = Duration::from_secs(10);
const TCP_MAX: usize = 65_535;
/// Aliases that lead to aliases of ours are followed so far.
const ALIASES_MAX: usize = 8;

/// What everything that answers shares.
pub(crate) struct Server {
    pub(crate) zone: Arc<RwLock<Zone>>,
    pub(crate) forwarder: Forwarder,
    /// Cluster networks: reverse names of no one else.
    pub(crate) own_nets: Vec<IpNet>,
    pub(crate) metrics: Arc<Metrics>,
}

/// What is left to do for a query.
pub(crate) enum Step {
    /// Nothing: the answer is written, or there must not be one.
    Done,
    /// [`Server::finish`] has to ask for it, or for the name it is an alias of.
    Upstream(Box<Query>, Option<String>),
}

fn open(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
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

/// The sockets of one address.
pub(crate) type Sockets = (std::net::UdpSocket, TcpListener);

/// Opens both sockets.
pub(crate) fn bind(address: IpAddr, port: u16) -> io::Result<Sockets> {
    let address = SocketAddr::new(address, port);
    let udp = std::net::UdpSocket::from(open(address, SockType::Datagram)?);
    let _ = setsockopt(&udp, sockopt::RcvBufForce, &(4 << 20));
    let _ = setsockopt(&udp, sockopt::SndBufForce, &(4 << 20));
    let tcp = std::net::TcpListener::from(open(address, SockType::Stream)?);
    tcp.set_nonblocking(true)?;
    Ok((udp, TcpListener::from_std(tcp)?))
}

/// Serves until stopped.
pub(crate) async fn serve(server: Arc<Server>, (udp, tcp): Sockets, stop: CancellationToken) {
    let _receivers = match Receivers::start(&server, udp) {
        Ok(receivers) => receivers,
        Err(error) => return tracing::error!(%error, "cluster DNS does not answer: its threads do not start"),
    };
    // Cancel-safe: connections that are cut are opened again by their clients.
    tokio::select! {
        () = stop.cancelled() => {}
        () = accept(server, tcp) => {}
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
    let mut out = Vec::new();
    loop {
        let len = timeout(IDLE, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(len)];
        timeout(IDLE, stream.read_exact(&mut query)).await??;
        let step = server.step(&server.zone.read(), &query, |_| TCP_MAX, &mut out);
        if let Step::Upstream(query, target) = step {
            server.finish(&query, target, TCP_MAX, &mut out).await;
        }
        if out.is_empty() {
            return Ok(());
        }
        server.count(std::iter::once(&out));
        let mut framed = u16::try_from(out.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
        framed.extend_from_slice(&out);
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

impl Server {
    /// Answers from what is at hand, into `out`.
    pub(crate) fn step(&self, zone: &Zone, bytes: &[u8], limit: impl Fn(&Query) -> usize, out: &mut Vec<u8>) -> Step {
        let query = match Query::parse(bytes) {
            Ok(query) => query,
            Err(what) => {
                fail_malformed(what, out);
                return Step::Done;
            }
        };
        match answer(zone, &self.own_nets, &query, limit(&query), out) {
            Verdict::Respond => Step::Done,
            Verdict::Follow(target) => Step::Upstream(Box::new(query), Some(target)),
            Verdict::Forward if self.forwarder.cache.answer(&query, limit(&query), out) => {
                self.metrics.dns_cache_hits.inc();
                Step::Done
            }
            Verdict::Forward => Step::Upstream(Box::new(query), None),
        }
    }

    /// Asks upstream, or for what an alias of ours leads to.
    pub(crate) async fn finish(&self, query: &Query, target: Option<String>, limit: usize, out: &mut Vec<u8>) {
        let Some(target) = target else {
            self.metrics.dns_forwarded.inc();
            return self.forwarder.resolve(query, limit, out).await;
        };
        let mut chain = vec![(query.clone(), target)];
        let mut said = Vec::new();
        while let Some(next) = chain.last().and_then(|(query, target)| query.about(target)) {
            let verdict = answer(&self.zone.read(), &self.own_nets, &next, TCP_MAX, &mut said);
            match verdict {
                Verdict::Follow(target) if chain.len() < ALIASES_MAX => {
                    chain.push((next, target));
                    continue;
                }
                Verdict::Forward if !self.forwarder.cache.answer(&next, TCP_MAX, &mut said) => {
                    self.metrics.dns_forwarded.inc();
                    self.forwarder.resolve(&next, TCP_MAX, &mut said).await;
                }
                _ => {}
            }
            break;
        }
        for (number, (query, target)) in chain.iter().enumerate().rev() {
            let limit = if number == 0 { limit } else { TCP_MAX };
            follow(query, target, &said, limit, out);
            std::mem::swap(&mut said, out);
        }
        std::mem::swap(&mut said, out);
    }

    /// Counts answers.
    pub(crate) fn count<'a>(&self, answers: impl Iterator<Item = &'a Vec<u8>>) {
        let mut codes = [0; 16];
        answers.filter_map(|a| a.get(3)).for_each(|code| codes[usize::from(code & 15)] += 1);
        self.metrics.answered(&codes);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use hickory_proto::{
        op::{Message, ResponseCode},
        rr::{Name, RData, Record, RecordType, rdata::A},
    };
    use tokio::net::UdpSocket;

    use super::{
        super::{query::tests::ask, upstream::Custom, upstream::Upstream},
        *,
    };
    use crate::model::{
        objects::Kind,
        tests::{service, slice},
    };

    /// A name server that knows one name, over UDP and TCP; tells how often it was asked.
    async fn upstream() -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let respond = |query: &[u8], whole: bool| {
            let mut message = Message::from_vec(query).unwrap().into_response();
            let name = message.queries[0].name().clone();
            match name.to_ascii().as_str() {
                "www.example.com." => {
                    message.answers.push(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 7))));
                }
                "long.example.com." if whole => (0..100).for_each(|n| {
                    message.answers.push(Record::from_rdata(name.clone(), 60, RData::A(A::new(192, 0, 2, n))));
                }),
                "long.example.com." => message.metadata.truncation = true,
                "broken.example.com." => message.metadata.response_code = ResponseCode::ServFail,
                _ => message.metadata.response_code = ResponseCode::NXDomain,
            }
            message.to_vec().unwrap()
        };
        let count = asked.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (len, from) = udp.recv_from(&mut buffer).await.unwrap();
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                udp.send_to(&respond(&buffer[..len], false), from).await.unwrap();
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let len = stream.read_u16().await.unwrap();
                let mut query = vec![0; len.into()];
                stream.read_exact(&mut query).await.unwrap();
                let answer = respond(&query, true);
                stream.write_u16(answer.len() as u16).await.unwrap();
                stream.write_all(&answer).await.unwrap();
            }
        });
        (address, asked)
    }

    fn zone() -> Zone {
        let mut zone = Zone::new("cluster.local");
        let web = service("default", "web", &["10.96.0.9"], &[("http", 80, 0)]);
        zone.update(&web.name.clone(), Some(&web), [].into_iter());
        let mut db = service("default", "db", &[], &[("sql", 1, 0)]);
        db.kind = Kind::Headless;
        let hosts: Vec<String> = (1..200).map(|i| format!("10.244.0.{i}")).collect();
        let pairs: Vec<(&str, &str)> = hosts.iter().map(|h| (h.as_str(), "n1")).collect();
        zone.update(&db.name.clone(), Some(&db), [slice(&db.name, "sql", 1, &pairs)].iter());
        for (name, target) in [
            ("out", "www.example.com"),
            ("deep", "out.default.svc.cluster.local"),
            ("loop", "loop.default.svc.cluster.local"),
        ] {
            let mut out = service("default", name, &[], &[]);
            out.kind = Kind::External(target.into());
            zone.update(&out.name.clone(), Some(&out), [].into_iter());
        }
        zone.set_ready();
        zone
    }

    struct Peer {
        address: SocketAddr,
        stop: CancellationToken,
    }

    impl Peer {
        async fn udp(&self, name: &str, kind: RecordType) -> Message {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.send_to(&ask(name, kind, None), self.address).await.unwrap();
            let mut buffer = [0; 2048];
            let (len, from) = timeout(IDLE, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!(from, self.address);
            Message::from_vec(&buffer[..len]).unwrap()
        }

        async fn tcp(&self, names: &[&str], kind: RecordType) -> Vec<Message> {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let mut all = Vec::new();
            for name in names {
                let query = ask(name, kind, None);
                stream.write_u16(query.len() as u16).await.unwrap();
                stream.write_all(&query).await.unwrap();
                let len = stream.read_u16().await.unwrap();
                let mut answer = vec![0; len.into()];
                stream.read_exact(&mut answer).await.unwrap();
                all.push(Message::from_vec(&answer).unwrap());
            }
            all
        }
    }

    async fn start(custom: &str) -> Peer {
        let forwarder = Forwarder::new(Upstream::new("/nonexistent".into(), [10, 96, 0, 10].into()));
        let data = [("stubDomains".to_owned(), custom.to_owned())];
        forwarder.upstream.set_custom(Custom::parse(&data.into()).unwrap());
        let server = Server {
            zone: Arc::new(RwLock::new(zone())),
            forwarder,
            own_nets: Vec::new(),
            metrics: Arc::new(Metrics::new()),
        };
        let sockets = loop {
            // TCP may have the port that UDP was given.
            let port = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            if let Ok(sockets) = bind([127, 0, 0, 1].into(), port) {
                break sockets;
            }
        };
        let (address, stop) = (sockets.0.local_addr().unwrap(), CancellationToken::new());
        tokio::spawn(serve(Arc::new(server), sockets, stop.clone()));
        Peer { address, stop }
    }

    fn data(message: &Message) -> Vec<String> {
        message.answers.iter().map(|r| r.data.to_string()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn names_are_answered_over_both_transports() {
        let (upstream, asked) = upstream().await;
        let peer = start(&format!(r#"{{"example.com": ["{upstream}"]}}"#)).await;
        let web = "web.default.svc.cluster.local.";
        assert_eq!(data(&peer.udp(web, RecordType::A).await), ["10.96.0.9"]);
        let cut = peer.udp("db.default.svc.cluster.local.", RecordType::A).await;
        assert!(cut.metadata.truncation);
        let both = peer.tcp(&["db.default.svc.cluster.local.", web], RecordType::A).await;
        assert_eq!((both[0].answers.len(), data(&both[1])), (199, vec!["10.96.0.9".to_owned()]));
        // Upstream is asked once; a long answer over TCP.
        for _ in 0..3 {
            assert_eq!(data(&peer.udp("www.example.com.", RecordType::A).await), ["192.0.2.7"]);
            assert_eq!(peer.udp("no.example.com.", RecordType::A).await.metadata.response_code, ResponseCode::NXDomain);
            let broken = peer.udp("broken.example.com.", RecordType::A).await;
            assert_eq!(broken.metadata.response_code, ResponseCode::ServFail);
        }
        assert_eq!(peer.tcp(&["long.example.com."], RecordType::A).await[0].answers.len(), 100);
        assert!(peer.udp("long.example.com.", RecordType::A).await.metadata.truncation);
        // Once each; what cannot be answered is tried twice.
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1 + 1 + 2 + 1);
        // Nobody to ask: said at once.
        let nobody = peer.udp("example.org.", RecordType::A).await;
        assert_eq!(nobody.metadata.response_code, ResponseCode::ServFail);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn aliases_are_followed_to_their_end() {
        let (upstream, _) = upstream().await;
        let peer = start(&format!(r#"{{"example.com": ["{upstream}"]}}"#)).await;
        let out = peer.udp("out.default.svc.cluster.local.", RecordType::A).await;
        assert_eq!(data(&out), ["www.example.com.", "192.0.2.7"]);
        let deep = peer.udp("deep.default.svc.cluster.local.", RecordType::A).await;
        assert_eq!(data(&deep), ["out.default.svc.cluster.local.", "www.example.com.", "192.0.2.7"]);
        assert_eq!(deep.answers[2].name, Name::from_ascii("www.example.com.").unwrap());
        let circle = peer.udp("loop.default.svc.cluster.local.", RecordType::A).await;
        assert!(!circle.answers.is_empty(), "a circle ends");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn threads_end_and_free_the_port() {
        let peer = start("{}").await;
        let _ = peer.udp("web.default.svc.cluster.local.", RecordType::A).await;
        let started = Instant::now();
        peer.stop.cancel();
        while std::net::UdpSocket::bind(peer.address).is_err() {
            assert!(started.elapsed() < IDLE, "the threads still hold the socket");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_no_query_gets_its_code_or_nothing() {
        let peer = start("{}").await;
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut bad = ask("a.b.", RecordType::A, None);
        bad.truncate(15);
        for bytes in [&[1, 2, 3][..], &[], &bad] {
            socket.send_to(bytes, peer.address).await.unwrap();
        }
        let mut buffer = [0; 512];
        let (len, _) = timeout(IDLE, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert_eq!((len, buffer[3] & 15), (12, 1), "only the last one is answered");
    }
}
