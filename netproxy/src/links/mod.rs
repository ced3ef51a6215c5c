//! What the proxy needs of this node's links and routes: the DNS address, and ways to the other nodes' pods.
//!
//! Routes carry a protocol number of our own, so that they are told apart from anyone else's. A node on a link of ours is
//! the gateway to its pods; one that is not is reached by `vxlan`. When the administrator chose it, all are by `wireguard`.

#[cfg(test)]
mod packets;
mod vxlan;
pub(crate) mod wireguard;

use std::{collections::BTreeMap, io, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use netlink_packet_route::{
    address::{AddressAttribute, AddressScope},
    link::{LinkAttribute, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::sync::watch;

use crate::watch::Nodes;

/// Protocol number of routes to other nodes' pods.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(214);
/// Largest packets: where nothing tells it, and what IPv6 needs at least inside of others.
const MTU: u32 = 1500;
const MTU_LEAST: u32 = 1280 + 80;
/// How soon what failed is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Why links or routes could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket.
    #[error("open route socket")]
    Open(#[source] io::Error),
    /// A request failed.
    #[error("{0}")]
    Request(String, #[source] Box<rtnetlink::Error>),
    /// The kernel lacks what was chosen.
    #[error(
        "pods' packets are to be encrypted and this kernel has no WireGuard: install its module `wireguard` \
         (CONFIG_WIREGUARD) or choose --pod-encryption none; pods of other nodes are not reached meanwhile"
    )]
    NoWireguard,
    /// This node's key cannot be read or made.
    #[error("private key of WireGuard {0}")]
    Key(PathBuf, #[source] io::Error),
    /// WireGuard refuses key or peers.
    #[error("set up WireGuard on {0}")]
    Device(String, #[source] io::Error),
}

pub(crate) fn request(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    |e| Error::Request(what.into(), Box::new(e))
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|c| -c.get()),
        _ => None,
    }
}

/// A link's name: the bridge's with a letter more, at most 15 bytes.
fn name(bridge: &str, letter: char) -> String {
    let end = bridge.char_indices().nth(14).map_or(bridge.len(), |(at, _)| at);
    format!("{}{letter}", &bridge[..end])
}

/// The first address of a node's range is the node's own.
fn gateway(range: &IpNet) -> IpAddr {
    match range.network() {
        IpAddr::V4(a) => IpAddr::from(u32::from(a).wrapping_add(1).to_be_bytes()),
        IpAddr::V6(a) => IpAddr::from(u128::from(a).wrapping_add(1).to_be_bytes()),
    }
}

async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, Error> {
    match handle.link().get().match_name(name).execute().try_next().await {
        Ok(found) => Ok(found.map(|m| m.header.index)),
        Err(e) if errno(&e) == Some(nix::libc::ENODEV) => Ok(None),
        Err(e) => Err(request(format!("look up link {name}"))(e)),
    }
}

/// Makes a link if it is not there; its number.
async fn make_link(handle: &Handle, name: &str, message: LinkMessage) -> Result<u32, Error> {
    if let Some(link) = index(handle, name).await? {
        return Ok(link);
    }
    handle.link().add(message).execute().await.map_err(request(format!("make link {name}")))?;
    let missing = || Error::Request(format!("link {name} is not there"), Box::new(rtnetlink::Error::RequestFailed));
    index(handle, name).await?.ok_or_else(missing)
}

/// Takes a link away, and everything on it.
async fn remove_link(handle: &Handle, name: &str) -> Result<(), Error> {
    let Some(link) = index(handle, name).await? else { return Ok(()) };
    handle.link().del(link).execute().await.map_err(request(format!("delete link {name}")))
}

/// The largest packet of the link that has an address.
async fn mtu_at(handle: &Handle, address: IpAddr) -> Result<u32, Error> {
    let what = || request(format!("look up the link of {address}"));
    let found: Vec<_> =
        handle.address().get().set_address_filter(address).execute().try_collect().await.map_err(what())?;
    let Some(index) = found.first().map(|m| m.header.index) else { return Ok(MTU) };
    let link = handle.link().get().match_index(index).execute().try_next().await.map_err(what())?;
    let mtu = link.iter().flat_map(|l| &l.attributes).find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Ok(mtu.unwrap_or(MTU).max(MTU_LEAST))
}

/// Opens a handle in the current network namespace. Every task has its own: while one lists something, another that lists on the
/// same socket gets EBUSY.
pub(crate) fn open() -> Result<Handle, Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Open)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Puts the DNS address on the loopback link. Host scope: it never becomes a source address of other traffic.
pub(crate) async fn add_dns_address(handle: &Handle, address: IpAddr) -> Result<(), Error> {
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    let mut add = handle.address().add(1, address, prefix);
    add.message_mut().header.scope = AddressScope::Host;
    match add.execute().await {
        Err(e) if errno(&e) == Some(nix::libc::EEXIST) => Ok(()),
        other => other.map_err(request(format!("add address {address} to lo"))),
    }
}

/// Takes it away again.
pub(crate) async fn remove_dns_address(handle: &Handle, address: IpAddr) -> Result<(), Error> {
    let mut found = handle.address().get().set_link_index_filter(1).execute();
    while let Some(message) = found.try_next().await.map_err(request("list addresses of lo"))? {
        if message.attributes.contains(&AddressAttribute::Address(address)) {
            return handle
                .address()
                .del(message)
                .execute()
                .await
                .map_err(request(format!("remove address {address} from lo")));
        }
    }
    Ok(())
}

/// The routes this node should have: other nodes' pod ranges by way of their addresses.
fn wanted(nodes: &Nodes, own: &str, own_addresses: &[IpAddr]) -> BTreeMap<IpNet, IpAddr> {
    let mut routes = BTreeMap::new();
    for (_, node) in nodes.iter().filter(|(name, _)| *name != own) {
        for cidr in &node.pod_cidrs {
            let way = node.addresses.iter().find(|a| a.is_ipv4() == cidr.addr().is_ipv4());
            if let Some(way) = way.filter(|a| !own_addresses.contains(a)) {
                routes.insert(*cidr, *way);
            }
        }
    }
    routes
}

fn message(net: IpNet, way: IpAddr) -> Option<RouteMessage> {
    let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(net.network(), net.prefix_len()).ok()?;
    Some(route.gateway(way).ok()?.protocol(PROTOCOL).build())
}

fn destination(message: &RouteMessage) -> Option<IpNet> {
    let prefix = message.header.destination_prefix_length;
    message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(a)) => IpNet::new((*a).into(), prefix).ok(),
        RouteAttribute::Destination(RouteAddress::Inet6(a)) => IpNet::new((*a).into(), prefix).ok(),
        _ => None,
    })
}

fn gateway_of(message: &RouteMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(RouteAddress::Inet(a)) => Some((*a).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(a)) => Some((*a).into()),
        _ => None,
    })
}

/// Our routes as the kernel has them, within the cluster's ranges.
async fn present(handle: &Handle, cluster: &[IpNet]) -> Result<Vec<RouteMessage>, Error> {
    let mut all = Vec::new();
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    for family in [v4, v6] {
        let found: Vec<_> = handle.route().get(family).execute().try_collect().await.map_err(request("list routes"))?;
        all.extend(found);
    }
    let ours = |m: &RouteMessage| {
        m.header.protocol == PROTOCOL && destination(m).is_some_and(|d| cluster.iter().any(|c| c.contains(&d)))
    };
    all.retain(ours);
    Ok(all)
}

/// Where this node is, for the routes to others.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) cluster: Vec<IpNet>,
    pub(crate) bridge: String,
    /// File of the private key, when packets between pods of different nodes are encrypted.
    pub(crate) wireguard: Option<PathBuf>,
}

/// Whether the kernel refuses a gateway because it is on no link of ours.
fn is_far(error: &rtnetlink::Error) -> bool {
    [nix::libc::ENETUNREACH, nix::libc::EHOSTUNREACH].iter().any(|code| errno(error) == Some(*code))
}

/// Makes the ways as wanted; one that cannot be made does not keep the others from it. The node's public key, if it
/// encrypts.
async fn apply(handle: &Handle, own: &Own, nodes: &Nodes) -> Result<Option<wireguard::Key>, Error> {
    let encrypted = match &own.wireguard {
        Some(key) => Some(wireguard::apply(handle, own, key, nodes).await),
        None => None,
    };
    // The encrypted way has one route for all.
    let mut wanted = if encrypted.is_some() { BTreeMap::new() } else { wanted(nodes, &own.name, &own.addresses) };
    for route in present(handle, &own.cluster).await? {
        let Some(net) = destination(&route) else { continue };
        match wanted.get(&net) {
            Some(way) if gateway_of(&route) == Some(*way) => drop(wanted.remove(&net)),
            Some(_) => {}
            None if encrypted.is_some() && own.cluster.contains(&net) => {}
            None => handle.route().del(route).execute().await.map_err(request(format!("remove route to {net}")))?,
        }
    }
    if encrypted.is_none() {
        remove_link(handle, &wireguard::name(&own.bridge)).await?;
    }
    let mut far = vxlan::Far::new();
    for (net, way) in wanted {
        let Some(message) = message(net, way) else { continue };
        match handle.route().add(message).replace().execute().await {
            Ok(()) => {}
            Err(error) if is_far(&error) => drop(far.insert(net, way)),
            Err(error) => tracing::warn!(%net, via = %way, %error, "no route to another node's pods"),
        }
    }
    let ranges = nodes.get(&own.name).map(|n| n.pod_cidrs.as_slice()).unwrap_or_default();
    for v6 in [false, true] {
        let Some(address) = own.addresses.iter().find(|a| a.is_ipv6() == v6) else { continue };
        let source = ranges.iter().find(|r| r.addr().is_ipv6() == v6).map(gateway);
        let far = far.iter().filter(|(_, way)| way.is_ipv6() == v6).map(|(net, way)| (*net, *way)).collect();
        vxlan::apply(handle, &vxlan::name(&own.bridge, v6), *address, source, &far).await?;
    }
    encrypted.transpose()
}

/// Tells the other nodes this node's key, or that it has none any more.
async fn publish(client: &Client, own: &str, key: Option<wireguard::Key>) -> Result<(), kube::Error> {
    let value = key.as_ref().map(wireguard::text);
    let patch = serde_json::json!({ "metadata": { "annotations": { wireguard::ANNOTATION: value } } });
    let nodes = Api::<Node>::all(client.clone());
    nodes.patch(own, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

/// Tells the administrator, who chose encryption, that there is none.
async fn complain(client: &Client, own: &str, why: &str) {
    let reporter = Reporter { controller: "isopod-proxy".into(), instance: Some(own.into()) };
    let node = ObjectReference {
        kind: Some("Node".into()),
        name: Some(own.into()),
        // As the agent's events of nodes have it.
        uid: Some(own.into()),
        ..ObjectReference::default()
    };
    let event = Event {
        type_: EventType::Warning,
        reason: "PodEncryptionFailed".into(),
        note: Some(why.into()),
        action: "EncryptPods".into(),
        secondary: None,
    };
    if let Err(error) = Recorder::new(client.clone(), reporter).publish(&event, &node).await {
        tracing::warn!(%error, "event not written");
    }
}

/// Follows the nodes.
pub(crate) async fn run(handle: Handle, own: Own, client: Client, mut nodes: watch::Receiver<Arc<Nodes>>) {
    let mut trouble: Option<String> = None;
    loop {
        // Cancel-safe: both only wait.
        tokio::select! {
            changed = nodes.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(RETRY), if trouble.is_some() => {}
        }
        let table = nodes.borrow_and_update().clone();
        match apply(&handle, &own, &table).await {
            Ok(key) => {
                trouble = None;
                if table.get(&own.name).is_some_and(|node| node.wireguard != key)
                    && let Err(error) = publish(&client, &own.name, key).await
                {
                    tracing::warn!(%error, "this node's WireGuard key not told to the others");
                    trouble = Some(error.to_string());
                }
            }
            Err(error) => {
                let text = crate::sync::Chain(&error).to_string();
                if trouble.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "ways to other nodes' pods");
                    if own.wireguard.is_some() {
                        complain(&client, &own.name, &text).await;
                    }
                }
                trouble = Some(text);
            }
        }
    }
}

/// Removes every route of ours, and the links to other nodes.
pub(crate) async fn remove_routes(handle: &Handle, cluster: &[IpNet], bridge: &str) -> Result<(), Error> {
    for route in present(handle, cluster).await? {
        let net = destination(&route).map(|n| n.to_string()).unwrap_or_default();
        handle.route().del(route).execute().await.map_err(request(format!("remove route to {net}")))?;
    }
    remove_link(handle, &wireguard::name(bridge)).await?;
    remove_link(handle, &vxlan::name(bridge, false)).await?;
    remove_link(handle, &vxlan::name(bridge, true)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::NodeInfo;

    #[test]
    fn routes_lead_to_other_nodes_only() {
        let node = |cidr: &str, address: &str| NodeInfo {
            pod_cidrs: vec![cidr.parse().unwrap()],
            addresses: vec![address.parse().unwrap()],
            ..NodeInfo::default()
        };
        let nodes = Nodes::from([
            ("me".into(), node("10.244.0.0/24", "192.0.2.1")),
            ("other".into(), node("10.244.1.0/24", "192.0.2.2")),
            ("same-machine".into(), node("10.244.2.0/24", "192.0.2.1")),
            ("mixed".into(), node("2001:db8::/64", "192.0.2.3")),
        ]);
        let routes = wanted(&nodes, "me", &["192.0.2.1".parse().unwrap()]);
        assert_eq!(routes, BTreeMap::from([("10.244.1.0/24".parse().unwrap(), "192.0.2.2".parse().unwrap())]));
    }
}
