//! Map elements as the kernel sees them: keys padded to four bytes per field, values as bytes or as a chain to go to.
//!
//! Example: the service element for 10.96.0.1:443/tcp with three endpoints is key `0a600001 06000000 01bb0000` in map
//! `services`, value 0x01000003, the number of chain `pick_3`; map `nat_chains` leads from that number to the chain. The
//! kernel checks all chains of a table again when an element that goes to one comes in, walking every map of such
//! elements: the large maps have none.

use std::net::IpAddr;

use crate::model::objects::{Backend, Protocol};

/// IP family; each has its own table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// As nft spells it.
    pub(crate) fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

macro_rules! maps {
    ($($variant:ident $name:literal $doc:literal),* $(,)?) => {
        /// The maps and sets of our table.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub(crate) enum Map { $(#[doc = $doc] $variant),* }

        impl Map {
            /// All whose elements the model owns.
            pub(crate) const ALL: &'static [Map] = &[$(Map::$variant),*];

            pub(crate) fn name(self) -> &'static str {
                match self { $(Map::$variant => $name),* }
            }
        }
    };
}

maps! {
    Services "services" "Address, protocol, port -> number of the chain to go to.",
    NodePorts "nodeports" "Protocol, port -> number of the chain to go to.",
    ExternalCluster "ext_cluster" "As services, for addresses with external policy Local: traffic from inside.",
    ExternalLocal "ext_local" "As services, for addresses with external policy Local: traffic from outside.",
    NodePortCluster "np_cluster" "As nodeports with external policy Local: traffic from inside.",
    NodePortLocal "np_local" "As nodeports with external policy Local: traffic from outside.",
    Endpoints "endpoints" "Address, protocol, port, index -> endpoint.",
    NodePortEndpoints "np_endpoints" "Protocol, port, index -> endpoint.",
    Unavailable "unavailable" "Address, protocol, port -> how to refuse.",
    NodePortUnavailable "np_unavailable" "Protocol, port -> how to refuse.",
    Affine "affine" "Address, protocol, port -> chain that remembers the client's endpoint.",
    NodePortAffine "np_affine" "Protocol, port -> chain that remembers the client's endpoint.",
    NatChains "nat_chains" "Number -> chain that translates.",
    PickChains "pick_chains" "The same without those that look further, which go here: the kernel allows no circle.",
    FilterChains "filter_chains" "Number -> chain that refuses or remembers.",
    Firewall "firewall" "Address, protocol, port open only to some sources.",
    Allowed "fw_allow" "Address, protocol, port, source range let through the firewall.",
    Hairpin "hairpin" "Local endpoint address, twice: talks to itself through a service.",
    ClusterIps "cluster_ips" "Cluster addresses: other ports are refused.",
    IngressIsolated "in_isolated" "Pods that policies let only some packets in to.",
    IngressPeer "in_peer" "Pod, sender let in.",
    IngressPort "in_port" "Pod, protocol, port open to everybody.",
    IngressPeerPort "in_peer_port" "Pod, sender, protocol, port let in.",
    IngressNet "in_net" "Pod, range of senders, protocols and ports let in.",
    EgressIsolated "out_isolated" "Pods that policies let only some packets out of.",
    EgressPeer "out_peer" "Pod, receiver it may reach.",
    EgressPort "out_port" "Pod, protocol, port it may reach anywhere.",
    EgressPeerPort "out_peer_port" "Pod, receiver, protocol, port it may reach.",
    EgressNet "out_net" "Pod, range of receivers, protocols and ports it may reach.",
}

impl Map {
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|map| map.name() == name)
    }

    /// Whether it holds keys only.
    pub(crate) fn is_set(self) -> bool {
        matches!(self, Self::Allowed | Self::Firewall | Self::Hairpin | Self::ClusterIps)
            || self >= Self::IngressIsolated
    }

    /// Whether its values are numbers of chains.
    pub(crate) fn is_numbered(self) -> bool {
        self <= Self::NodePortLocal || (Self::Unavailable..=Self::NodePortAffine).contains(&self)
    }
}

/// Chain a verdict goes to. The number is how many endpoints there are to choose from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) enum Chain {
    /// Any endpoint; masqueraded when the client is not a pod.
    Pick(u32),
    /// Any endpoint, always masqueraded.
    MasqueradePick(u32),
    /// Any endpoint of this node, the client's address kept.
    LocalPick(u32),
    /// As `MasqueradePick`, for a node port.
    NodePortPick(u32),
    /// As `LocalPick`, for a node port.
    NodePortLocalPick(u32),
    /// External policy Local: inside traffic to all endpoints, outside traffic to this node's.
    ExternalLocal,
    /// The same for node ports.
    NodePortLocal,
    /// Refuse.
    Reject,
    /// Drop.
    Drop,
    /// Drop what comes from outside.
    DropExternal,
    /// Remember the client's endpoint for so many seconds.
    Remember(u32),
}

impl Chain {
    /// As it stands in maps: the kind in the upper byte, what it counts in the others.
    pub(crate) fn number(self) -> u32 {
        let (kind, count) = match self {
            Self::Pick(n) => (1, n),
            Self::MasqueradePick(n) => (2, n),
            Self::LocalPick(n) => (3, n),
            Self::NodePortPick(n) => (4, n),
            Self::NodePortLocalPick(n) => (5, n),
            Self::ExternalLocal => (6, 0),
            Self::NodePortLocal => (7, 0),
            Self::Reject => (8, 0),
            Self::Drop => (9, 0),
            Self::DropExternal => (10, 0),
            Self::Remember(t) => (11, t),
        };
        kind << 24 | count
    }

    /// The chain with a number; `None` for numbers we never write.
    pub(crate) fn numbered(number: u32) -> Option<Self> {
        let count = number & 0xff_ffff;
        let chain = match number >> 24 {
            1 => Self::Pick(count),
            2 => Self::MasqueradePick(count),
            3 => Self::LocalPick(count),
            4 => Self::NodePortPick(count),
            5 => Self::NodePortLocalPick(count),
            6 => Self::ExternalLocal,
            7 => Self::NodePortLocal,
            8 => Self::Reject,
            9 => Self::Drop,
            10 => Self::DropExternal,
            11 => Self::Remember(count),
            _ => return None,
        };
        (chain.number() == number).then_some(chain)
    }

    /// The elements that lead from its number to it.
    pub(crate) fn entries(self, family: Family) -> impl Iterator<Item = Element> {
        let maps: &[Map] = match self {
            _ if self < Self::ExternalLocal => &[Map::NatChains, Map::PickChains],
            Self::ExternalLocal | Self::NodePortLocal => &[Map::NatChains],
            _ => &[Map::FilterChains],
        };
        let key = Key::EMPTY.index(self.number());
        maps.iter().map(move |map| Element { family, map: *map, key, value: Value::Goto(self) })
    }
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pick(n) => write!(f, "pick_{n}"),
            Self::MasqueradePick(n) => write!(f, "mpick_{n}"),
            Self::LocalPick(n) => write!(f, "lpick_{n}"),
            Self::NodePortPick(n) => write!(f, "np_pick_{n}"),
            Self::NodePortLocalPick(n) => write!(f, "np_lpick_{n}"),
            Self::ExternalLocal => f.write_str("ext_local_policy"),
            Self::NodePortLocal => f.write_str("np_local_policy"),
            Self::Reject => f.write_str("refuse"),
            Self::Drop => f.write_str("discard"),
            Self::DropExternal => f.write_str("discard_external"),
            Self::Remember(t) => write!(f, "remember_{t}"),
        }
    }
}

impl std::str::FromStr for Chain {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "ext_local_policy" => return Ok(Self::ExternalLocal),
            "np_local_policy" => return Ok(Self::NodePortLocal),
            "refuse" => return Ok(Self::Reject),
            "discard" => return Ok(Self::Drop),
            "discard_external" => return Ok(Self::DropExternal),
            _ => {}
        }
        let (kind, number) = name.rsplit_once('_').ok_or(())?;
        let number = number.parse().map_err(|_| ())?;
        match kind {
            "pick" => Ok(Self::Pick(number)),
            "mpick" => Ok(Self::MasqueradePick(number)),
            "lpick" => Ok(Self::LocalPick(number)),
            "np_pick" => Ok(Self::NodePortPick(number)),
            "np_lpick" => Ok(Self::NodePortLocalPick(number)),
            "remember" => Ok(Self::Remember(number)),
            _ => Err(()),
        }
    }
}

/// Longest key: two IPv6 addresses, protocol and port.
const KEY_MAX: usize = 40;

/// Bytes of a key or of an end of range.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    len: u8,
    bytes: [u8; KEY_MAX],
}

impl Key {
    pub(crate) const EMPTY: Self = Self { len: 0, bytes: [0; KEY_MAX] };

    /// Takes bytes as the kernel gave them; longer ones than any of our keys are cut.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self::EMPTY.raw(&bytes[..bytes.len().min(KEY_MAX)])
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        let start = usize::from(self.len);
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.len += u8::try_from(bytes.len()).unwrap_or(0);
        self
    }

    pub(crate) fn address(self, address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => self.raw(&a.octets()),
            IpAddr::V6(a) => self.raw(&a.octets()),
        }
    }

    pub(crate) fn protocol(self, protocol: Protocol) -> Self {
        self.number(protocol as u8)
    }

    /// An IP protocol number.
    pub(crate) fn number(self, protocol: u8) -> Self {
        self.raw(&[protocol, 0, 0, 0])
    }

    pub(crate) fn port(self, port: u16) -> Self {
        let [a, b] = port.to_be_bytes();
        self.raw(&[a, b, 0, 0])
    }

    /// A number in host order, as `numgen` and marks have it.
    pub(crate) fn index(self, index: u32) -> Self {
        self.raw(&index.to_ne_bytes())
    }

    pub(crate) fn backend(self, backend: &Backend) -> Self {
        self.address(&backend.ip()).port(backend.port())
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.bytes().chunks(4).try_for_each(|word| {
            word.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
            f.write_str(" ")
        })
    }
}

/// What a key leads to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Value {
    /// Member of a set.
    Member,
    /// Member of a set of ranges: the key is the first, this the last of each field.
    Until(Key),
    /// Goes to a chain, by its number where the map is one of numbers.
    Goto(Chain),
    /// Address and port.
    Backend(Key),
    /// Something we never write.
    Foreign,
}

/// One element of one map.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Element {
    pub(crate) family: Family,
    pub(crate) map: Map,
    pub(crate) key: Key,
    pub(crate) value: Value,
}

/// What identifies an element in the kernel. Ranges are different elements when either end differs.
pub(crate) type ElementKey = (Family, Map, Key, Option<Key>);

impl Element {
    pub(crate) fn id(&self) -> ElementKey {
        let end = match self.value {
            Value::Until(end) => Some(end),
            _ => None,
        };
        (self.family, self.map, self.key, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_are_read_back() {
        for chain in [
            Chain::Pick(1),
            Chain::MasqueradePick(2),
            Chain::LocalPick(30),
            Chain::NodePortPick(4),
            Chain::NodePortLocalPick(5),
            Chain::ExternalLocal,
            Chain::NodePortLocal,
            Chain::Reject,
            Chain::Drop,
            Chain::DropExternal,
            Chain::Remember(10_800),
        ] {
            assert_eq!(chain.to_string().parse(), Ok(chain));
            assert_eq!(Chain::numbered(chain.number()), Some(chain));
        }
        assert_eq!(Chain::numbered(Chain::Reject.number() + 1), None);
        assert_eq!("pick_x".parse::<Chain>(), Err(()));
    }

    #[test]
    fn fields_are_padded_to_words() {
        let key = Key::EMPTY.address(&IpAddr::from([10, 96, 0, 1])).protocol(Protocol::Tcp).port(443);
        assert_eq!(key.bytes(), [10, 96, 0, 1, 6, 0, 0, 0, 1, 0xbb, 0, 0]);
    }
}
