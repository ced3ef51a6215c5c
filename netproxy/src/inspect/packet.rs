//! `isopod trace --packet`: a real packet, sent by who asks, and what the kernel's rules did with it.
//!
//! A table of our own marks the one flow for tracing while it lasts; the kernel then tells of every rule that has a say
//! (`NFT_MSG_TRACE`), with the packet's headers at each hook: translation shows in them.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    model::objects::Protocol,
    nft::{
        element::Family,
        kernel::{self, run_nft},
        wire,
    },
};

/// `NFNLGRP_NFTRACE`.
const GROUP: u32 = 9;
const MSG_TRACE: u16 = 17;
const PATIENCE: Duration = Duration::from_secs(1);

/// Attributes of a trace message.
mod attr {
    pub(super) const TABLE: u16 = 1;
    pub(super) const CHAIN: u16 = 2;
    pub(super) const KIND: u16 = 4;
    pub(super) const VERDICT: u16 = 5;
    pub(super) const ID: u16 = 6;
    pub(super) const NETWORK_HEADER: u16 = 8;
    pub(super) const TRANSPORT_HEADER: u16 = 9;
}

/// A connection to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Namespace and name of the pod that connects; `None`: this node.
    pub pod: Option<(String, String)>,
    /// Name of that pod's node.
    pub node: String,
    pub(super) from: IpAddr,
    pub(super) to: SocketAddr,
    pub(super) protocol: Protocol,
}

/// Why no packet was followed.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The marking rules.
    #[error(transparent)]
    Rules(#[from] kernel::Error),
    /// The socket that hears of traces.
    #[error("listen for traces of packets")]
    Listen(#[source] io::Error),
    /// The pod's network namespace.
    #[error("enter {0}")]
    Enter(std::path::PathBuf, #[source] io::Error),
    /// A transport we do not speak.
    #[error("packets of {0} are not sent")]
    Protocol(&'static str),
}

/// Removes the marking rules.
struct Marked(Family, String);

impl Drop for Marked {
    fn drop(&mut self) {
        if let Err(error) = run_nft(&format!("delete table {} {}\n", self.0.nft(), self.1)) {
            tracing::warn!(table = self.1, %error, "the table that marks packets is left");
        }
    }
}

fn mark(probe: &Probe) -> Result<Marked, kernel::Error> {
    let family = Family::of(&probe.to.ip());
    let (name, ip, proto) = (format!("isopod-trace-{}", std::process::id()), family.nft(), probe.protocol.lower());
    let rule = format!(
        "{ip} saddr {} {ip} daddr {} {proto} dport {} meta nftrace set 1",
        probe.from,
        probe.to.ip(),
        probe.to.port()
    );
    let hook = |hook: &str| format!("chain {hook} {{ type filter hook {hook} priority -450; {rule}; }}");
    run_nft(&format!("table {ip} {name} {{\n{}\n{}\n}}\n", hook("prerouting"), hook("output")))?;
    Ok(Marked(family, name))
}

/// Tries the connection; how it went.
fn connect(probe: &Probe) -> io::Result<()> {
    if probe.protocol == Protocol::Udp {
        let socket = UdpSocket::bind((probe.from, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(probe.to)?;
        socket.send(&[0])?;
        return socket.recv(&mut [0; 16]).map(drop);
    }
    TcpStream::connect_timeout(&probe.to, PATIENCE).map(drop)
}

/// Runs a closure in a network namespace, on a thread of its own.
fn within<T: Send>(netns: Option<&Path>, body: impl FnOnce() -> T + Send) -> Result<T, PacketError> {
    let Some(path) = netns else { return Ok(body()) };
    let failed = |e: io::Error| PacketError::Enter(path.into(), e);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(path)?;
            nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(body())
        });
        thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())).map_err(failed)
    })
}

/// What one rule or chain did.
struct Event {
    id: u32,
    table: String,
    chain: String,
    verdict: String,
    /// Where the packet is going at this hook, told once for each.
    to: Option<SocketAddr>,
}

fn number(bytes: Option<&[u8]>) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes?.first_chunk()?))
}

fn destination(family: u8, network: &[u8], transport: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*transport.get(2..)?.first_chunk()?);
    let address = if family == Family::V4.number() {
        IpAddr::from(*network.get(16..)?.first_chunk::<4>()?)
    } else {
        IpAddr::from(*network.get(24..)?.first_chunk::<16>()?)
    };
    Some(SocketAddr::new(address, port))
}

fn event(family: u8, body: &[u8]) -> Option<Event> {
    let text = |kind| wire::attribute(body, kind).map(|v| wire::text(v).to_owned());
    let verdict = wire::attribute(body, attr::VERDICT);
    let code = number(verdict.and_then(|v| wire::attribute(v, 1))).map(|c| c as i32);
    let target = verdict.and_then(|v| wire::attribute(v, 2)).map(wire::text).unwrap_or_default();
    let verdict = match code {
        Some(0) => "drop".to_owned(),
        Some(1) => "accept".to_owned(),
        Some(-3) => format!("jump {target}"),
        Some(-4) => format!("goto {target}"),
        Some(-5) => "return".to_owned(),
        _ => String::new(),
    };
    // 1: the policy of a chain, which says nothing of our rules.
    let verdict = if number(wire::attribute(body, attr::KIND)) == Some(1) { String::new() } else { verdict };
    let (network, transport) =
        (wire::attribute(body, attr::NETWORK_HEADER), wire::attribute(body, attr::TRANSPORT_HEADER));
    Some(Event {
        id: number(wire::attribute(body, attr::ID))?,
        table: text(attr::TABLE)?,
        chain: text(attr::CHAIN)?,
        verdict,
        to: network.zip(transport).and_then(|(n, t)| destination(family, n, t)),
    })
}

/// Everything heard of so far: the kernel tells while the packet is on its way.
fn heard(socket: &Socket, family: u8) -> Vec<Event> {
    let mut all = Vec::new();
    while let Ok((datagram, _)) = socket.recv_from_full() {
        let traces = wire::messages(&datagram).filter(|m| m.kind == wire::nft(MSG_TRACE));
        all.extend(traces.filter_map(|m| event(family, m.body)));
    }
    all
}

impl Probe {
    /// Sends the packet from the pod's network namespace and tells what became of it, one sentence per step.
    ///
    /// # Errors
    /// When it cannot be marked, sent or followed.
    pub fn send(&self, netns: Option<&Path>) -> Result<Vec<(&'static str, String)>, PacketError> {
        if self.protocol == Protocol::Sctp {
            return Err(PacketError::Protocol("SCTP"));
        }
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(PacketError::Listen)?;
        let listening = socket.bind_auto().and_then(|_| socket.add_membership(GROUP));
        listening.and_then(|()| socket.set_non_blocking(true)).map_err(PacketError::Listen)?;
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20));
        let marked = mark(self)?;
        let started = Instant::now();
        let outcome = within(netns, || connect(self))?;
        let took = started.elapsed();
        let events = heard(&socket, marked.0.number());
        drop(marked);
        Ok(self.tell(&events, outcome, took))
    }

    fn tell(&self, events: &[Event], outcome: io::Result<()>, took: Duration) -> Vec<(&'static str, String)> {
        let mut steps = vec![("packet", format!("sent from {} to {}/{}", self.from, self.to, self.protocol.lower()))];
        // One packet: answers to it make others of the same flow.
        let first = events.first().map(|e| e.id);
        let mut at = self.to;
        for event in events.iter().filter(|e| Some(e.id) == first && !e.table.starts_with("isopod-trace-")) {
            if let Some(to) = event.to.filter(|to| *to != at) {
                steps.push(("nat", format!("the kernel chose {to}")));
                at = to;
            }
            if !event.verdict.is_empty() {
                steps.push(("rule", format!("{} {}: {}", event.table, event.chain, event.verdict)));
            }
        }
        if first.is_none() {
            steps.push(("rule", "no rule of this node has seen it".to_owned()));
        }
        let millis = took.as_secs_f64() * 1000.0;
        steps.push((
            "answer",
            match outcome {
                Ok(()) => format!("came after {millis:.1} ms, from {} as the client sees it", self.to),
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => format!("refused after {millis:.1} ms"),
                Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                    format!("none within {} s", PATIENCE.as_secs())
                }
                Err(e) => format!("none: {e}"),
            },
        ));
        steps
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::{
        hosts::run,
        model::{
            objects::Place,
            shadow::Shadow,
            tests::{service, slice},
        },
        nft::{kernel::Kernel, tests as nft},
    };

    #[test]
    fn a_real_packet_shows_the_rules_and_the_endpoint() {
        nft::in_own_network(|| {
            run("ip link set lo up");
            run("ip addr add 192.0.2.1/32 dev lo");
            run("ip route add local 10.244.0.0/16 dev lo");
            run("ip route add 10.96.0.0/16 dev lo src 192.0.2.1");
            let listener = TcpListener::bind("10.244.0.9:8080").unwrap();
            let mut shadow = Shadow::new(Place { node: "me".into(), zone: None });
            let web = service("ns", "web", &["10.96.0.9"], &[("a", 80, 0)]);
            shadow.set_slice(slice(&web.name, "a", 8080, &[("10.244.0.9", "me")]));
            shadow.set_service(web);
            shadow.set_service(service("ns", "none", &["10.96.0.8"], &[("a", 80, 0)]));
            shadow.flush();
            let mut kernel = Kernel::open(nft::settings(), None).unwrap();
            kernel.reconcile(&|emit| shadow.elements(emit)).unwrap();
            let probe = |to: &str| Probe {
                pod: None,
                node: "me".into(),
                from: "192.0.2.1".parse().unwrap(),
                to: to.parse().unwrap(),
                protocol: Protocol::Tcp,
            };
            let steps = probe("10.96.0.9:80").send(None).unwrap();
            let has = |what: &str, text: &str| steps.iter().any(|(w, t)| *w == what && t.starts_with(text));
            assert!(has("rule", "isopod-test to_service: goto pick_1"), "{steps:#?}");
            assert!(has("nat", "the kernel chose 10.244.0.9:8080"), "{steps:#?}");
            assert!(has("answer", "came after"), "{steps:#?}");
            drop(listener);
            let steps = probe("10.96.0.8:80").send(None).unwrap();
            assert!(steps.iter().any(|(_, t)| t == "isopod-test refuse_service: goto refuse"), "{steps:#?}");
            assert!(steps.last().unwrap().1.starts_with("refused"), "{steps:#?}");
            assert!(!run("nft list tables").contains("isopod-trace"), "the marking table is gone");
        });
    }
}
