//! As much of SCTP as a first packet and its answer need, over raw sockets: the rules and connection tracking see the real
//! thing whether or not the kernel has SCTP of its own.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, setsockopt,
        socket, sockopt,
    },
};

use super::{Family, NODE, PATIENCE, Protocol, Seen, World, at, at_cluster, parse, pod, service, socket as socket_at};

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const STATE_COOKIE: u16 = 7;
/// Common header and the fixed part of INIT and INIT ACK.
const FIXED: usize = 12 + 20;

/// Any raw socket can be used as std uses those of UDP.
fn raw(address: &IpAddr) -> UdpSocket {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).unwrap().into()
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A packet of one chunk with a cookie.
fn packet(from: u16, to: u16, tag: u32, kind: u8, cookie: &[u8]) -> Vec<u8> {
    let mut out = [from.to_be_bytes(), to.to_be_bytes()].concat();
    out.extend_from_slice(&tag.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    let parameter = if cookie.is_empty() { 0 } else { 4 + cookie.len() };
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(&u16::try_from(20 + parameter).unwrap().to_be_bytes());
    // Initiate tag, window, streams out and in, first sequence number.
    for field in [1u32, 65_536, 1 << 16 | 1, 1] {
        out.extend_from_slice(&field.to_be_bytes());
    }
    if parameter > 0 {
        out.extend_from_slice(&STATE_COOKIE.to_be_bytes());
        out.extend_from_slice(&u16::try_from(parameter).unwrap().to_be_bytes());
        out.extend_from_slice(cookie);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    let sum = crc32c(&out).to_le_bytes();
    out[8..12].copy_from_slice(&sum);
    out
}

/// Ports, kind of chunk, and cookie. Of IPv4 a raw socket gets the IP header as well.
fn read(family: Family, bytes: &[u8]) -> Option<(u16, u16, u8, &[u8])> {
    let header = if family == Family::V4 { usize::from(bytes.first()? & 15) * 4 } else { 0 };
    let bytes = bytes.get(header..)?;
    let half = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let end = 12 + usize::from(half(14)?);
    Some((half(0)?, half(2)?, *bytes.get(12)?, bytes.get(FIXED + 4..end).unwrap_or_default()))
}

/// A server on port 8080 that says who it is and whom it sees.
pub(super) fn serve(name: &'static str, address: IpAddr) {
    let family = Family::of(&address);
    let socket = at(name, || {
        let socket = raw(&address);
        let own = SockaddrStorage::from(SocketAddr::new(address, 0));
        bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &own).unwrap();
        socket
    });
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            let Some((theirs, 8080, INIT, _)) = read(family, &buffer[..len]) else { continue };
            let answer = packet(8080, theirs, 1, INIT_ACK, format!("{name} {}", from.ip()).as_bytes());
            let _ = socket.send_to(&answer, SocketAddr::new(from.ip(), 0));
        }
    });
}

/// Begins an association; what comes of it.
pub(super) fn ask(to: SocketAddr) -> Seen {
    static PORTS: AtomicU16 = AtomicU16::new(0);
    let own = 1024 + PORTS.fetch_add(1, Ordering::Relaxed) % 60_000;
    let socket = raw(&to.ip());
    let family = Family::of(&to.ip());
    socket.connect(SocketAddr::new(to.ip(), 0)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    match socket.send(&packet(own, to.port(), 0, INIT, &[])) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => return Seen::Refused,
        // What the node's own rules refuse fails at once; the ICMP error tells it from a drop.
        _ => {}
    }
    let mut buffer = [0; 256];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Seen::Silence;
        }
        socket.set_read_timeout(Some(left)).unwrap();
        match socket.recv(&mut buffer) {
            Ok(len) => match read(family, &buffer[..len]) {
                Some((theirs, ours, INIT_ACK, text)) if (theirs, ours) == (to.port(), own) => {
                    return parse(std::str::from_utf8(text).unwrap());
                }
                _ => {}
            },
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => return Seen::Refused,
            Err(_) => return Seen::Silence,
        }
    }
}

#[test]
fn checksums_are_those_of_the_standard() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

/// A stream of the kernel's own SCTP, which std can use as those of TCP; `None` where the kernel has none. It tells its peer
/// of addresses of its own family alone: nobody translates what is inside of packets.
fn stream(address: &SocketAddr) -> Option<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = match socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp) {
        Err(Errno::EPROTONOSUPPORT) => return None,
        other => other.unwrap(),
    };
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true).unwrap();
    }
    Some(socket)
}

fn says(to: SocketAddr) -> std::io::Result<String> {
    let socket = stream(&to).unwrap();
    connect(socket.as_raw_fd(), &SockaddrStorage::from(to))?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"hello")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Whole connections of the kernel's own SCTP over IPv4, from everywhere, where it has that; `ISOPOD_TEST_SCTP` is set where it must.
#[test]
fn the_kernels_own_sctp_passes_services() {
    let test = |family: Family| {
        let mut world = World::new();
        let listening = socket_at(pod("a", family), 8080);
        let Some(listener) = at("a", || stream(&listening)) else {
            return assert!(std::env::var_os("ISOPOD_TEST_SCTP").is_none(), "this kernel has no SCTP");
        };
        at("a", || {
            bind(listener.as_raw_fd(), &SockaddrStorage::from(listening)).unwrap();
            listen(&listener, Backlog::new(16).unwrap()).unwrap();
        });
        std::thread::spawn(move || {
            for mut stream in TcpListener::from(listener).incoming().flatten() {
                let mut text = [0; 5];
                if stream.read_exact(&mut text).is_ok() {
                    let _ = stream.write_all(&[b"a hears ", &text[..]].concat());
                }
            }
        });
        let mut service = service("ns", "sctp", &[&at_cluster(family, 9)], &[("p", 80, 30_009)]);
        service.ports[0].protocol = Protocol::Sctp;
        world.put(service, &["a"]);
        world.apply();
        let cluster = socket_at(&at_cluster(family, 9), 80);
        let node = socket_at(NODE[3 * family.index()], 30_009);
        let ask = |(from, to): (&'static str, SocketAddr)| (from, at(from, || says(to)).map_err(|e| e.to_string()));
        let got = [("b", cluster), ("node", cluster), ("client", node), ("a", cluster)].map(ask);
        let wrong: Vec<_> = got.iter().filter(|(_, said)| said.as_deref() != Ok("a hears hello")).collect();
        assert!(wrong.is_empty(), "{family:?}: {wrong:?}");
    };
    std::thread::spawn(move || test(Family::V4)).join().unwrap();
}
