//! What a pod's policies let through in one direction, in the shape of the kernel's sets. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{
    Direction,
    objects::{Pod, Ports, without},
};
use crate::{
    model::objects::Protocol,
    nft::element::{Element, Family, Key, Map, Value},
};

/// Addresses, IP protocols and ports, all from a first to a last.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Area {
    pub(crate) net: IpNet,
    pub(crate) protocols: (u8, u8),
    pub(crate) ports: (u16, u16),
}

/// Whom and what is let through. Everything when `open`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Grants {
    pub(crate) open: bool,
    /// These on every port.
    pub(crate) peers: BTreeSet<IpAddr>,
    /// Everybody on these ports.
    pub(crate) ports: BTreeSet<(Protocol, u16)>,
    pub(crate) peer_ports: BTreeSet<(IpAddr, Protocol, u16)>,
    /// Disjoint once finished.
    pub(crate) areas: Vec<Area>,
}

fn everywhere() -> [IpNet; 2] {
    [IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0), IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0)]
}

impl Grants {
    /// Lets some peers through on some ports. `None` is everybody, and every port.
    pub(crate) fn allow_pods<'a>(&mut self, pods: impl Iterator<Item = &'a Pod>, ports: Option<&[Ports]>) {
        for pod in pods {
            for address in &pod.addresses {
                let Some(ports) = ports else {
                    self.peers.insert(*address);
                    continue;
                };
                for wanted in ports {
                    match wanted {
                        Ports::Range(protocol, first, last) if first == last => {
                            self.peer_ports.insert((*address, *protocol, *first));
                        }
                        Ports::Range(protocol, first, last) => {
                            self.area(IpNet::from(*address), *protocol, *first, *last)
                        }
                        Ports::Named(protocol, name) => {
                            let found = pod.ports_named(name, *protocol);
                            self.peer_ports.extend(found.map(|n| (*address, *protocol, n)));
                        }
                    }
                }
            }
        }
    }

    /// Lets a network through; named ports have been resolved before.
    pub(crate) fn allow_nets(&mut self, nets: &[IpNet], ports: Option<&[Ports]>) {
        for net in nets {
            match ports {
                None => self.areas.push(Area { net: *net, protocols: (0, u8::MAX), ports: (0, u16::MAX) }),
                Some(list) => list.iter().for_each(|p| {
                    if let Ports::Range(protocol, first, last) = p {
                        self.area(*net, *protocol, *first, *last);
                    }
                }),
            }
        }
    }

    /// Lets everybody through; named ports have been resolved before.
    pub(crate) fn allow_all(&mut self, ports: Option<&[Ports]>) {
        let Some(ports) = ports else {
            self.open = true;
            return;
        };
        for wanted in ports {
            match wanted {
                Ports::Range(protocol, first, last) if first == last => {
                    self.ports.insert((*protocol, *first));
                }
                Ports::Range(protocol, first, last) => {
                    everywhere().into_iter().for_each(|net| self.area(net, *protocol, *first, *last));
                }
                Ports::Named(..) => {}
            }
        }
    }

    fn area(&mut self, net: IpNet, protocol: Protocol, first: u16, last: u16) {
        let number = protocol as u8;
        self.areas.push(Area { net, protocols: (number, number), ports: (first, last) });
    }

    /// Makes the areas disjoint and drops what an open door makes superfluous.
    pub(crate) fn finish(mut self) -> Self {
        if self.open {
            return Self { open: true, ..Self::default() };
        }
        self.areas = disjoint(&self.areas);
        self
    }

    /// Calls `emit` with the elements of a pod's address. `own` are all addresses of the pod: it may talk to itself.
    pub(crate) fn elements(&self, direction: Direction, pod: &IpAddr, own: &[IpAddr], emit: &mut dyn FnMut(Element)) {
        if self.open {
            return;
        }
        let family = Family::of(pod);
        let maps = Maps::of(direction);
        let mut put = |map, key, value| emit(Element { family, map, key, value });
        let base = Key::EMPTY.address(pod);
        put(maps.isolated, base, Value::Member);
        let same = |a: &&IpAddr| Family::of(a) == family;
        for peer in self.peers.iter().chain(own.iter().filter(|a| !self.peers.contains(*a))).filter(same) {
            put(maps.peer, base.address(peer), Value::Member);
        }
        for (protocol, port) in &self.ports {
            put(maps.port, base.protocol(*protocol).port(*port), Value::Member);
        }
        for (peer, protocol, port) in self.peer_ports.iter().filter(|(a, ..)| Family::of(a) == family) {
            put(maps.peer_port, base.address(peer).protocol(*protocol).port(*port), Value::Member);
        }
        for area in self.areas.iter().filter(|a| Family::of(&a.net.addr()) == family) {
            let corner = |address: IpAddr, protocol: u8, port: u16| base.address(&address).number(protocol).port(port);
            let first = corner(area.net.network(), area.protocols.0, area.ports.0);
            let last = corner(area.net.broadcast(), area.protocols.1, area.ports.1);
            put(maps.net, first, Value::Until(last));
        }
    }
}

/// The sets of one direction.
pub(crate) struct Maps {
    pub(crate) isolated: Map,
    pub(crate) peer: Map,
    pub(crate) port: Map,
    pub(crate) peer_port: Map,
    pub(crate) net: Map,
}

impl Maps {
    pub(crate) fn of(direction: Direction) -> Self {
        match direction {
            Direction::Ingress => Self {
                isolated: Map::IngressIsolated,
                peer: Map::IngressPeer,
                port: Map::IngressPort,
                peer_port: Map::IngressPeerPort,
                net: Map::IngressNet,
            },
            Direction::Egress => Self {
                isolated: Map::EgressIsolated,
                peer: Map::EgressPeer,
                port: Map::EgressPort,
                peer_port: Map::EgressPeerPort,
                net: Map::EgressNet,
            },
        }
    }
}

/// The same packets in areas that do not overlap: the kernel refuses overlapping elements.
///
/// First what is open to every protocol; then, protocol by protocol, the ports are cut where any area begins or ends, and
/// each piece has the networks of all areas that cover it. Pieces side by side with the same networks are joined again.
fn disjoint(areas: &[Area]) -> Vec<Area> {
    let wide: Vec<IpNet> = areas.iter().filter(|a| a.protocols.1 == u8::MAX).map(|a| a.net).collect();
    let wide = IpNet::aggregate(&wide);
    let mut out: Vec<Area> =
        wide.iter().map(|net| Area { net: *net, protocols: (0, u8::MAX), ports: (0, u16::MAX) }).collect();
    let mut narrow: BTreeMap<(u8, u8), Vec<&Area>> = BTreeMap::new();
    for area in areas.iter().filter(|a| a.protocols.1 != u8::MAX) {
        narrow.entry(area.protocols).or_default().push(area);
    }
    for (protocols, list) in narrow {
        let mut cuts: Vec<u32> = list.iter().flat_map(|a| [u32::from(a.ports.0), u32::from(a.ports.1) + 1]).collect();
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<(u32, u32, Vec<IpNet>)> = Vec::new();
        for pair in cuts.windows(2) {
            let (first, last) = (pair[0], pair[1] - 1);
            let covers = |a: &&&Area| u32::from(a.ports.0) <= first && last <= u32::from(a.ports.1);
            let nets: Vec<IpNet> = list.iter().filter(covers).map(|a| a.net).collect();
            let nets = without(IpNet::aggregate(&nets), &wide);
            match pieces.last_mut() {
                Some(before) if before.1 + 1 == first && before.2 == nets => before.1 = last,
                _ => pieces.push((first, last, nets)),
            }
        }
        for (first, last, nets) in pieces {
            let ports = (first as u16, last as u16);
            out.extend(nets.into_iter().map(|net| Area { net, protocols, ports }));
        }
    }
    out
}
