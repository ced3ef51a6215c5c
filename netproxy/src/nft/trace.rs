//! Follows a packet through the maps as the skeleton's rules would: for tests, against real packets.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use super::element::{Chain, Element, Key, Map, Value};
use crate::model::{objects::Protocol, plan::LOCAL_BASE};

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
    ranges: Vec<(Key, Key)>,
    pub(crate) cluster: Vec<IpNet>,
    /// Addresses of this node.
    pub(crate) node: Vec<IpAddr>,
}

impl Tracer {
    pub(crate) fn new(elements: &[Element], cluster: Vec<IpNet>, node: Vec<IpAddr>) -> Self {
        let ranges = elements.iter().filter_map(|e| match e.value {
            Value::Until(end) => Some((e.key, end)),
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
        if self.elements.contains_key(&(Map::Firewall, key)) && !self.allowed(&key.address(&packet.from)) {
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

    fn allowed(&self, key: &Key) -> bool {
        let words = |k: &Key| -> Vec<u32> {
            k.bytes().chunks(4).map(|w| u32::from_be_bytes([w[0], w[1], w[2], w[3]])).collect()
        };
        let value = words(key);
        self.ranges.iter().any(|(first, last)| {
            let (first, last) = (words(first), words(last));
            // IPv4 only: every field is one word.
            value.len() == first.len() && (0..value.len()).all(|i| (first[i]..=last[i]).contains(&value[i]))
        })
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
