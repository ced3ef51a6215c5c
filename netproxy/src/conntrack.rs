//! Forgetting UDP flows that would go on to an endpoint that is gone, or past a service that has one now.
//!
//! Only those: TCP ends by itself, and every other flow is left alone.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_sys::{Socket, SocketAddr as Peer, protocols::NETLINK_NETFILTER};

use crate::{
    model::{
        objects::{Backend, Protocol},
        plan::Frontend,
        shadow::StaleFlow,
    },
    nft::{element::Family, wire},
};

const MSG_GET: u16 = wire::SUBSYS_CTNETLINK << 8 | 1;
const MSG_DELETE: u16 = wire::SUBSYS_CTNETLINK << 8 | 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const SEEN_REPLY: u32 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const UDP: u8 = 17;

/// A UDP flow.
struct Flow {
    /// Where its packets were sent to.
    to: SocketAddr,
    /// Where they are answered from.
    from: SocketAddr,
    answered: bool,
}

/// Source and destination of one direction of a flow.
fn tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (ip, proto) = (wire::attribute(bytes, 1)?, wire::attribute(bytes, 2)?);
    if wire::attribute(proto, 1)? != [UDP] {
        return None;
    }
    let address = |v4: u16, v6: u16| match (wire::attribute(ip, v4), wire::attribute(ip, v6)) {
        (Some(a), _) => Some(IpAddr::from(<[u8; 4]>::try_from(a).ok()?)),
        (_, Some(a)) => Some(IpAddr::from(<[u8; 16]>::try_from(a).ok()?)),
        _ => None,
    };
    let port = |kind| wire::attribute(proto, kind).and_then(|p| Some(u16::from_be_bytes(p.try_into().ok()?)));
    Some((SocketAddr::new(address(1, 3)?, port(2)?), SocketAddr::new(address(2, 4)?, port(3)?)))
}

/// Whether a flow, sent to `to` and answered from `from`, is one of the stale ones.
fn is_stale(stale: &HashSet<StaleFlow>, to: SocketAddr, from: SocketAddr) -> bool {
    let protocol = Protocol::Udp;
    let backend = (to != from).then(|| Backend::from(from));
    [Frontend::Address(to.ip(), protocol, to.port()), Frontend::NodePort(Family::of(&to.ip()), protocol, to.port())]
        .into_iter()
        .any(|frontend| stale.contains(&StaleFlow { frontend, backend }))
}

/// Deletes the flows; returns how many.
pub(crate) fn forget(stale: &[StaleFlow]) -> io::Result<usize> {
    let stale: HashSet<StaleFlow> = stale.iter().copied().collect();
    let families = Family::ALL.into_iter().filter(|f| stale.iter().any(|s| s.frontend.family() == *f));
    forget_where(families, |flow| is_stale(&stale, flow.to, flow.from))
}

/// Deletes UDP flows of host ports whose pod comes or goes: those translated to `pods`, and those to `ports` that were
/// begun when nobody had them and never answered. Returns how many.
///
/// # Errors
/// When the kernel's connection tracking cannot be read.
pub fn forget_host_ports(pods: &[IpAddr], ports: &[u16]) -> io::Result<usize> {
    let families = Family::ALL.into_iter().filter(|f| pods.iter().any(|p| Family::of(p) == *f));
    forget_where(families, |flow| match flow.to == flow.from {
        true => ports.contains(&flow.to.port()) && !flow.answered,
        false => pods.contains(&flow.from.ip()),
    })
}

fn forget_where(families: impl Iterator<Item = Family>, stale: impl Fn(&Flow) -> bool) -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&Peer::new(0, 0))?;
    let mut deleted = 0;
    for family in families {
        for flow in collect(&socket, family, &stale)? {
            let mut request = Vec::new();
            let head = (MSG_DELETE, wire::NLM_F_REQUEST | wire::NLM_F_ACK, 2);
            wire::message(&mut request, head, (family.number(), 0), |m| m.extend_from_slice(&flow));
            socket.send(&request, 0)?;
            let (answer, _) = socket.recv_from_full()?;
            deleted += usize::from(wire::messages(&answer).any(|m| m.kind == wire::NLMSG_ERROR && m.errno() == 0));
        }
    }
    Ok(deleted)
}

fn collect(socket: &Socket, family: Family, stale: &impl Fn(&Flow) -> bool) -> io::Result<Vec<Vec<u8>>> {
    let mut request = Vec::new();
    wire::message(&mut request, (MSG_GET, wire::NLM_F_REQUEST | wire::NLM_F_DUMP, 1), (family.number(), 0), |_| {});
    socket.send(&request, 0)?;
    let mut flows = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        for message in wire::messages(&answer) {
            match message.kind {
                wire::NLMSG_DONE => return Ok(flows),
                wire::NLMSG_ERROR => return Err(io::Error::from_raw_os_error(message.errno())),
                _ => {}
            }
            let side = |kind| wire::attribute(message.body, kind).and_then(tuple);
            let (Some((_, to)), Some((from, _))) = (side(TUPLE_ORIG), side(TUPLE_REPLY)) else { continue };
            let status = wire::attribute(message.body, STATUS).and_then(|s| s.first_chunk().copied());
            let answered = status.is_some_and(|s| u32::from_be_bytes(s) & SEEN_REPLY != 0);
            if stale(&Flow { to, from, answered }) {
                flows.push(identity(message.body));
            }
        }
    }
}

/// The attributes that name a flow.
fn identity(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, value) in wire::attributes(body) {
        match kind {
            TUPLE_ORIG => wire::nest(&mut out, kind, |n| n.extend_from_slice(value)),
            ID | ZONE => wire::put(&mut out, kind, value),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flows_of_the_gone_endpoint_are_stale() {
        let at = |s: &str| s.parse::<SocketAddr>().unwrap();
        let frontend = Frontend::Address("10.96.0.5".parse().unwrap(), Protocol::Udp, 53);
        let gone = StaleFlow { frontend, backend: Some(at("10.244.0.2:53").into()) };
        let fresh = StaleFlow { frontend: Frontend::NodePort(Family::V4, Protocol::Udp, 30_000), backend: None };
        let stale = HashSet::from([gone, fresh]);
        assert!(is_stale(&stale, at("10.96.0.5:53"), at("10.244.0.2:53")));
        assert!(!is_stale(&stale, at("10.96.0.5:53"), at("10.244.0.3:53")));
        assert!(!is_stale(&stale, at("10.96.0.6:53"), at("10.244.0.2:53")));
        assert!(is_stale(&stale, at("192.0.2.1:30000"), at("192.0.2.1:30000")));
        assert!(!is_stale(&stale, at("192.0.2.1:30000"), at("10.244.0.9:53")));
    }
}
