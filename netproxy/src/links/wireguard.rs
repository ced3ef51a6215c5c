//! Pods' packets to other nodes in WireGuard, where the administrator chose it.
//!
//! Every node makes a key at its first start and tells the public half in an annotation of its Node; a peer may send from the
//! pod ranges of its node, and nothing else. The whole cluster's pods are routed to one link, so that nothing goes in the
//! clear: what has no peer is refused, and so is everything while the kernel has no WireGuard.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use netlink_packet_generic::{
    GenlFamily, GenlHeader, GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_route::route::{RouteMessage, RouteScope, RouteType};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::{Socket, protocols::NETLINK_GENERIC};
use rand::{TryRng, rngs::SysRng};
use rtnetlink::{
    Handle, LinkUnspec, LinkWireguard, RouteMessageBuilder,
    packet_core::{
        Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, ParseableParametrized,
    },
};

use super::{Error, Own, PROTOCOL, errno, gateway, make_link, mtu_at, request};
use crate::watch::Nodes;

/// Annotation of a Node with its public key.
pub(crate) const ANNOTATION: &str = "isopod.dev/wireguard-public-key";
/// Where nodes hear each other, as everywhere.
const PORT: u16 = 51_820;
/// Peers in one message: an attribute ends at 64 KiB.
const LOT: usize = 200;

/// One half of a pair of keys.
pub(crate) type Key = [u8; WireguardAttribute::WG_KEY_LEN];

/// What the kernel has to know of another node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Peer {
    endpoint: Option<SocketAddr>,
    pods: BTreeSet<IpNet>,
}

pub(super) type Peers = BTreeMap<Key, Peer>;

/// The link's name: the bridge's with a letter more.
pub(crate) fn name(bridge: &str) -> String {
    super::name(bridge, 'w')
}

/// A key as people and annotations write it.
pub(crate) fn text(key: &Key) -> String {
    STANDARD.encode(key)
}

/// The key in a text, if it is one.
pub(crate) fn parse(text: &str) -> Option<Key> {
    STANDARD.decode(text.trim()).ok()?.try_into().ok()
}

/// This node's private key, made when there is none yet.
fn private_key(path: &Path) -> Result<Key, Error> {
    let failed = |e: io::Error| Error::Key(path.into(), e);
    match fs::read_to_string(path) {
        Ok(text) => return parse(&text).ok_or_else(|| failed(io::Error::other("it is no WireGuard key"))),
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        Err(_) => {}
    }
    let mut key = Key::default();
    SysRng.try_fill_bytes(&mut key).map_err(|e| failed(io::Error::other(e)))?;
    let write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let scratch = path.with_extension("new");
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&scratch)?;
        io::Write::write_all(&mut file, format!("{}\n", text(&key)).as_bytes())?;
        file.sync_all()?;
        fs::rename(scratch, path)
    };
    write().map_err(failed)?;
    Ok(key)
}

/// The other nodes that have told a key, by it.
fn wanted(nodes: &Nodes, own: &Own) -> Peers {
    let peer = |(_, node): (_, &crate::watch::NodeInfo)| {
        let reachable = |a: &&IpAddr| own.addresses.iter().any(|o| o.is_ipv4() == a.is_ipv4());
        let address = node.addresses.iter().find(reachable).filter(|a| !own.addresses.contains(a))?;
        let pods = node.pod_cidrs.iter().map(IpNet::trunc).collect();
        Some((node.wireguard?, Peer { endpoint: Some(SocketAddr::new(*address, PORT)), pods }))
    };
    nodes.iter().filter(|(name, _)| **name != own.name).filter_map(peer).collect()
}

fn allowed(net: &IpNet) -> WireguardAllowedIp {
    let family = if net.addr().is_ipv4() { WireguardAddressFamily::Ipv4 } else { WireguardAddressFamily::Ipv6 };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.addr()),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}

fn attributes(key: Key, peer: Option<&Peer>) -> WireguardPeer {
    let mut all = vec![WireguardPeerAttribute::PublicKey(key)];
    match peer {
        None => all.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)),
        Some(peer) => {
            all.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
            all.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
            all.push(WireguardPeerAttribute::AllowedIps(peer.pods.iter().map(allowed).collect()));
        }
    }
    WireguardPeer(all)
}

/// Takes in a peer the kernel tells of; one with many ranges comes in parts.
fn note(peers: &mut Peers, attributes: &[WireguardPeerAttribute]) {
    let key =
        attributes.iter().find_map(|a| if let WireguardPeerAttribute::PublicKey(k) = a { Some(*k) } else { None });
    let Some(key) = key else { return };
    let peer = peers.entry(key).or_default();
    for attribute in attributes {
        match attribute {
            WireguardPeerAttribute::Endpoint(address) => peer.endpoint = Some(*address),
            WireguardPeerAttribute::AllowedIps(all) => peer.pods.extend(all.iter().filter_map(|one| {
                let address = one.iter().find_map(|a| match a {
                    WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
                    _ => None,
                });
                let len =
                    one.iter().find_map(|a| if let WireguardAllowedIpAttr::Cidr(l) = a { Some(*l) } else { None });
                IpNet::new(address?, len?).ok()
            })),
            _ => {}
        }
    }
}

/// Sends a request of generic netlink; what comes before its end.
fn ask<F>(socket: &Socket, flags: u16, mut message: GenlMessage<F>, family: u16) -> io::Result<Vec<F>>
where
    F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + Debug,
{
    message.set_resolved_family_id(family);
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | flags;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<GenlMessage<F>>::deserialize(rest).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => answers.push(inner.payload),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
            let len = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

/// A link as WireGuard sees it.
pub(super) struct Device {
    socket: Socket,
    family: u16,
    name: String,
}

impl Device {
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        let family = GenlCtrlAttrs::FamilyName(WireguardMessage::family_name().to_owned());
        let question = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![family] };
        let answers = ask(&socket, NLM_F_ACK, GenlMessage::from_payload(question), 0)?;
        let family = answers.iter().flat_map(|a| &a.nlas).find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        let family = family.ok_or_else(|| io::Error::other("the kernel does not tell its number of wireguard"))?;
        Ok(Self { socket, family, name: name.to_owned() })
    }

    fn ask(&self, cmd: WireguardCmd, flags: u16, more: Vec<WireguardAttribute>) -> io::Result<Vec<WireguardMessage>> {
        let mut attributes = vec![WireguardAttribute::IfName(self.name.clone())];
        attributes.extend(more);
        ask(&self.socket, flags, GenlMessage::from_payload(WireguardMessage { cmd, attributes }), self.family)
    }

    fn set(&self, attributes: Vec<WireguardAttribute>) -> io::Result<()> {
        self.ask(WireguardCmd::SetDevice, NLM_F_ACK, attributes).map(drop)
    }

    /// Its public key and its peers.
    pub(super) fn get(&self) -> io::Result<(Key, Peers)> {
        let (mut key, mut peers) = (Key::default(), Peers::new());
        for attribute in self.ask(WireguardCmd::GetDevice, NLM_F_DUMP, Vec::new())?.iter().flat_map(|m| &m.attributes) {
            match attribute {
                WireguardAttribute::PublicKey(public) => key = *public,
                WireguardAttribute::Peers(all) => all.iter().for_each(|peer| note(&mut peers, peer)),
                _ => {}
            }
        }
        Ok((key, peers))
    }

    /// Makes key and peers what they should be, and leaves those that are: their sessions go on.
    fn configure(&self, private: Key, wanted: &Peers) -> io::Result<Key> {
        self.set(vec![WireguardAttribute::PrivateKey(private), WireguardAttribute::ListenPort(PORT)])?;
        let (public, present) = self.get()?;
        let gone = present.keys().filter(|k| !wanted.contains_key(*k)).map(|k| attributes(*k, None));
        let changed = wanted.iter().filter(|(k, p)| present.get(*k) != Some(*p)).map(|(k, p)| attributes(*k, Some(p)));
        let all: Vec<WireguardPeer> = gone.chain(changed).collect();
        all.chunks(LOT).try_for_each(|lot| self.set(vec![WireguardAttribute::Peers(lot.to_vec())]))?;
        Ok(public)
    }
}

/// The way to all pods: by the link, or none.
fn route(net: &IpNet, link: Option<u32>, source: Option<IpAddr>) -> Option<RouteMessage> {
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(net.network(), net.prefix_len()).ok()?;
    let mut route = route.protocol(PROTOCOL);
    let Some(link) = link else { return Some(route.kind(RouteType::Unreachable).build()) };
    route = route.output_interface(link);
    if net.addr().is_ipv4() {
        route = route.scope(RouteScope::Link);
    }
    match source {
        Some(source) => Some(route.pref_source(source).ok()?.build()),
        None => Some(route.build()),
    }
}

/// Routes the cluster's pods, those of this node excepted, which have routes of their own.
async fn lead(handle: &Handle, own: &Own, ranges: &[IpNet], link: Option<u32>) -> Result<(), Error> {
    for net in own.cluster.iter().filter(|net| !ranges.contains(net)) {
        let source = ranges.iter().find(|r| r.addr().is_ipv4() == net.addr().is_ipv4()).map(gateway);
        let Some(route) = route(net, link, source) else { continue };
        handle.route().add(route).replace().execute().await.map_err(request(format!("add route to {net}")))?;
    }
    Ok(())
}

/// The link, with the node's addresses towards pods: what the node itself sends there comes from those.
async fn ensure(handle: &Handle, own: &Own, ranges: &[IpNet]) -> Result<u32, Error> {
    let name = name(&own.bridge);
    let link = match make_link(handle, &name, LinkWireguard::new(&name).build()).await {
        Err(Error::Request(_, error)) if errno(&error) == Some(nix::libc::EOPNOTSUPP) => {
            return Err(Error::NoWireguard);
        }
        other => other?,
    };
    let mut mtu = u32::MAX;
    for address in &own.addresses {
        // What the outer headers take of a packet.
        mtu = mtu.min(mtu_at(handle, *address).await? - if address.is_ipv4() { 60 } else { 80 });
    }
    let message = LinkUnspec::new_with_index(link).mtu(mtu).up().build();
    handle.link().change(message).execute().await.map_err(request(format!("switch on {name}")))?;
    for address in ranges.iter().map(gateway) {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        match handle.address().add(link, address, prefix).execute().await {
            Err(e) if errno(&e) != Some(nix::libc::EEXIST) => {
                return Err(request(format!("add address {address} to {name}"))(e));
            }
            _ => {}
        }
    }
    Ok(link)
}

/// Makes the link and its peers; this node's public key.
pub(crate) async fn apply(handle: &Handle, own: &Own, key: &Path, nodes: &Nodes) -> Result<Key, Error> {
    let private = private_key(key)?;
    let ranges = nodes.get(&own.name).map(|n| n.pod_cidrs.as_slice()).unwrap_or_default();
    let name = name(&own.bridge);
    let link = match ensure(handle, own, ranges).await {
        Err(error) => {
            lead(handle, own, ranges, None).await?;
            return Err(error);
        }
        Ok(link) => link,
    };
    lead(handle, own, ranges, Some(link)).await?;
    let keyless: Vec<&String> =
        nodes.iter().filter(|(n, i)| **n != own.name && i.wireguard.is_none()).map(|(n, _)| n).collect();
    if !keyless.is_empty() {
        tracing::warn!(nodes = ?keyless, "pods of nodes that have told no WireGuard key are not reached");
    }
    let configure = || Device::open(&name)?.configure(private, &wanted(nodes, own));
    configure().map_err(|e| Error::Device(name.clone(), e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::watch::NodeInfo;

    #[test]
    fn a_key_is_made_once_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network/wireguard.key");
        let key = private_key(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(private_key(&path).unwrap(), key);
        assert_ne!(private_key(&dir.path().join("other")).unwrap(), key);
        assert_eq!(parse(&fs::read_to_string(&path).unwrap()), Some(key));
        fs::write(&path, "nonsense").unwrap();
        assert!(private_key(&path).unwrap_err().to_string().ends_with("wireguard.key"));
    }

    #[test]
    fn peers_are_the_other_nodes_that_have_told_a_key() {
        let node = |n: u8, key: Option<Key>| NodeInfo {
            pod_cidrs: vec![format!("10.244.{n}.7/24").parse().unwrap()],
            addresses: vec!["2001:db8::1".parse().unwrap(), IpAddr::from([192, 0, 2, n])],
            wireguard: key,
            ..NodeInfo::default()
        };
        let nodes = Nodes::from([
            ("me".into(), node(1, Some([1; 32]))),
            ("other".into(), node(2, Some([2; 32]))),
            ("silent".into(), node(3, None)),
        ]);
        let own = Own {
            name: "me".into(),
            addresses: vec![IpAddr::from([192, 0, 2, 1])],
            cluster: vec![],
            bridge: "br".into(),
            wireguard: None,
        };
        let pods = BTreeSet::from(["10.244.2.0/24".parse().unwrap()]);
        let peer = Peer { endpoint: Some("192.0.2.2:51820".parse().unwrap()), pods };
        assert_eq!(wanted(&nodes, &own), Peers::from([([2; 32], peer.clone())]));
        // As the kernel tells it, in parts.
        let (mut peers, WireguardPeer(parts)) = (Peers::new(), attributes([2; 32], Some(&peer)));
        note(&mut peers, &parts[..3]);
        note(&mut peers, &[parts[0].clone(), parts[3].clone()]);
        assert_eq!(peers, Peers::from([([2; 32], peer)]));
    }
}
