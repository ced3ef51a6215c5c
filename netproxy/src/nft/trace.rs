//! Follows a packet through the maps as the skeleton's rules would: for `isopod trace`, and for tests against real packets.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::{
    element::{Chain, Element, Family, Key, Map, Value},
    skeleton::shape,
};
use crate::{
    model::{objects::Protocol, plan::LOCAL_BASE},
    policy::{Direction, grants::Maps},
};

/// A connection's first packet.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) from: IpAddr,
    pub(crate) to: SocketAddr,
    pub(crate) protocol: Protocol,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Not ours: goes where it was going.
    Untouched,
    Refused,
    Dropped,
    /// Goes to one of these, with its own source address or the node's.
    Sent {
        to: BTreeSet<SocketAddr>,
        masqueraded: bool,
    },
}

/// The maps, and what the rules know besides.
pub(crate) struct Tracer {
    elements: HashMap<(Map, Key), Value>,
    ranges: Vec<(Map, Key, Key)>,
    pub(crate) cluster: Vec<IpNet>,
    /// Addresses of this node.
    pub(crate) node: Vec<IpAddr>,
}

impl Tracer {
    /// For packets of one family: a key of a node port does not tell which it belongs to.
    pub(crate) fn new(family: Family, elements: &[Element], cluster: Vec<IpNet>, node: Vec<IpAddr>) -> Self {
        let elements: Vec<&Element> = elements.iter().filter(|e| e.family == family).collect();
        let ranges = elements.iter().filter_map(|e| match e.value {
            Value::Until(end) => Some((e.map, e.key, end)),
            _ => None,
        });
        let ranges = ranges.collect();
        Self { elements: elements.iter().map(|e| ((e.map, e.key), e.value)).collect(), ranges, cluster, node }
    }

    fn chain(&self, map: Map, key: Key) -> Option<Chain> {
        match self.elements.get(&(map, key)) {
            Some(Value::Goto(chain)) => Some(*chain),
            _ => None,
        }
    }

    fn inside(&self, packet: &Packet) -> bool {
        self.cluster.iter().any(|c| c.contains(&packet.from))
    }

    fn is_node(&self, address: &IpAddr) -> bool {
        address.is_loopback() || self.node.contains(address)
    }

    pub(crate) fn trace(&self, packet: &Packet) -> Fate {
        let port_key = Key::EMPTY.protocol(packet.protocol).port(packet.to.port());
        let key = Key::EMPTY.address(&packet.to.ip()).protocol(packet.protocol).port(packet.to.port());
        let to_node = self.is_node(&packet.to.ip());
        if self.elements.contains_key(&(Map::Firewall, key)) && !self.in_range(Map::Allowed, &key.address(&packet.from))
        {
            return Fate::Dropped;
        }
        let refusal = self.chain(Map::Unavailable, key);
        let refusal = refusal.or_else(|| self.chain(Map::NodePortUnavailable, port_key).filter(|_| to_node));
        match refusal {
            Some(Chain::Reject) => return Fate::Refused,
            Some(Chain::DropExternal) if self.inside(packet) || self.is_node(&packet.from) => {}
            Some(_) => return Fate::Dropped,
            None => {}
        }
        let chain = self.chain(Map::Services, key);
        let chain = chain.or_else(|| self.chain(Map::NodePorts, port_key).filter(|_| to_node));
        let Some(chain) = chain else { return self.stray(packet) };
        self.follow(packet, chain, key, port_key)
    }

    /// Whether a key is in an interval set. Fields of several words, IPv6 addresses, are compared as one number.
    fn in_range(&self, map: Map, key: &Key) -> bool {
        let shape = shape(map);
        let family = if key.bytes().len() == key_len(Family::V4, shape) { Family::V4 } else { Family::V6 };
        let value = fields(family, shape, key);
        self.ranges.iter().filter(|(m, first, _)| *m == map && first.bytes().len() == key.bytes().len()).any(
            |(_, first, last)| {
                let (first, last) = (fields(family, shape, first), fields(family, shape, last));
                (0..value.len()).all(|i| (first[i]..=last[i]).contains(&value[i]))
            },
        )
    }

    /// Whether policies let a first packet out of the one, or into the other.
    pub(crate) fn permits(&self, direction: Direction, from: IpAddr, to: SocketAddr, protocol: Protocol) -> bool {
        let (pod, peer) = match direction {
            Direction::Egress => (from, to.ip()),
            Direction::Ingress => (to.ip(), from),
        };
        let has = |map, key| self.elements.contains_key(&(map, key));
        let maps = Maps::of(direction);
        let pod = Key::EMPTY.address(&pod);
        let with_peer = pod.address(&peer);
        let (port, peer_port) = (pod.protocol(protocol).port(to.port()), with_peer.protocol(protocol).port(to.port()));
        !has(maps.isolated, pod)
            || has(maps.peer, with_peer)
            || has(maps.port, port)
            || has(maps.peer_port, peer_port)
            || self.in_range(maps.net, &peer_port)
    }

    fn stray(&self, packet: &Packet) -> Fate {
        let known = self.elements.contains_key(&(Map::ClusterIps, Key::EMPTY.address(&packet.to.ip())));
        if known { Fate::Refused } else { Fate::Untouched }
    }

    fn follow(&self, packet: &Packet, chain: Chain, key: Key, port_key: Key) -> Fate {
        let local_or_pod = self.inside(packet) || self.is_node(&packet.from);
        let again = |map, key| match self.chain(map, key) {
            Some(next) => self.follow(packet, next, key, port_key),
            None => Fate::Untouched,
        };
        let pick = |map: Map, key: Key, base: u32, count: u32, masquerade: bool| {
            let to = (0..count).filter_map(|i| match self.elements.get(&(map, key.index(base + i))) {
                Some(Value::Backend(to)) => Some(socket(to)),
                _ => None,
            });
            self.sent(packet, to.collect(), masquerade)
        };
        match chain {
            Chain::Pick(n) => pick(Map::Endpoints, key, 0, n, !self.inside(packet)),
            Chain::MasqueradePick(n) => pick(Map::Endpoints, key, 0, n, true),
            Chain::LocalPick(n) => pick(Map::Endpoints, key, LOCAL_BASE, n, false),
            Chain::NodePortPick(n) => pick(Map::NodePortEndpoints, port_key, 0, n, true),
            Chain::NodePortLocalPick(n) => pick(Map::NodePortEndpoints, port_key, LOCAL_BASE, n, false),
            Chain::ExternalLocal if local_or_pod => again(Map::ExternalCluster, key),
            Chain::ExternalLocal => again(Map::ExternalLocal, key),
            Chain::NodePortLocal if local_or_pod => again(Map::NodePortCluster, port_key),
            Chain::NodePortLocal => again(Map::NodePortLocal, port_key),
            _ => Fate::Dropped,
        }
    }

    /// A packet that comes back to its own sender is always masqueraded; only pods can be their own endpoint.
    fn sent(&self, packet: &Packet, to: BTreeSet<SocketAddr>, masqueraded: bool) -> Fate {
        let hairpin = to.iter().all(|t| t.ip() == packet.from);
        Fate::Sent { to, masqueraded: masqueraded || hairpin }
    }
}

fn width(family: Family, field: char) -> usize {
    if field == 'a' && family == Family::V6 { 16 } else { 4 }
}

fn key_len(family: Family, shape: &str) -> usize {
    shape.chars().map(|f| width(family, f)).sum()
}

/// The fields of a key as numbers that compare as the kernel compares them.
fn fields(family: Family, shape: &str, key: &Key) -> Vec<u128> {
    let mut rest = key.bytes();
    let mut take = |field| {
        let (bytes, tail) = rest.split_at(width(family, field).min(rest.len()));
        rest = tail;
        bytes.iter().fold(0, |n, b| n << 8 | u128::from(*b))
    };
    shape.chars().map(&mut take).collect()
}

fn socket(key: &Key) -> SocketAddr {
    let bytes = key.bytes();
    let (ip, port): (IpAddr, &[u8]) = if bytes.len() == 8 {
        (IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]), &bytes[4..6])
    } else {
        let mut address = [0; 16];
        address.copy_from_slice(&bytes[..16]);
        (IpAddr::from(address), &bytes[16..18])
    };
    SocketAddr::new(ip, u16::from_be_bytes([port[0], port[1]]))
}
