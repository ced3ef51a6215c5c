//! What the proxy needs of this node's links and routes: the DNS address, and ways to the other nodes' pods.
//!
//! Routes carry a protocol number of our own, so that they are told apart from anyone else's. A node on a link of ours is
//! the gateway to its pods; one that is not is reached by `vxlan`.

#[cfg(test)]
mod packets;
mod vxlan;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    address::{AddressAttribute, AddressScope},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::sync::watch;

use crate::watch::Nodes;

/// Protocol number of routes to other nodes' pods.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(214);

/// Why links or routes could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket.
    #[error("open route socket")]
    Open(#[source] std::io::Error),
    /// A request failed.
    #[error("{0}")]
    Request(String, #[source] Box<rtnetlink::Error>),
}

fn request(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    |e| Error::Request(what.into(), Box::new(e))
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|c| -c.get()),
        _ => None,
    }
}

/// Opens a handle in the current network namespace.
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

fn gateway(message: &RouteMessage) -> Option<IpAddr> {
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
}

/// Whether the kernel refuses a gateway because it is on no link of ours.
fn is_far(error: &rtnetlink::Error) -> bool {
    [nix::libc::ENETUNREACH, nix::libc::EHOSTUNREACH].iter().any(|code| errno(error) == Some(*code))
}

/// Makes the routes as wanted; one that cannot be made does not keep the others from it.
async fn apply(handle: &Handle, own: &Own, nodes: &Nodes) -> Result<(), Error> {
    let mut wanted = wanted(nodes, &own.name, &own.addresses);
    for route in present(handle, &own.cluster).await? {
        let Some(net) = destination(&route) else { continue };
        match wanted.get(&net) {
            Some(way) if gateway(&route) == Some(*way) => drop(wanted.remove(&net)),
            Some(_) => {}
            None => handle.route().del(route).execute().await.map_err(request(format!("remove route to {net}")))?,
        }
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
        let source = ranges.iter().find(|r| r.addr().is_ipv6() == v6).map(vxlan::gateway);
        let far = far.iter().filter(|(_, way)| way.is_ipv6() == v6).map(|(net, way)| (*net, *way)).collect();
        vxlan::apply(handle, &vxlan::name(&own.bridge, v6), *address, source, &far).await?;
    }
    Ok(())
}

/// Follows the nodes.
pub(crate) async fn run(handle: Handle, own: Own, mut nodes: watch::Receiver<Arc<Nodes>>) {
    while nodes.changed().await.is_ok() {
        let table = nodes.borrow_and_update().clone();
        if let Err(error) = apply(&handle, &own, &table).await {
            tracing::warn!(error = %crate::sync::Chain(&error), "routes to other nodes' pods");
        }
    }
}

/// Removes every route of ours, and the link for nodes that are far.
pub(crate) async fn remove_routes(handle: &Handle, cluster: &[IpNet], bridge: &str) -> Result<(), Error> {
    for route in present(handle, cluster).await? {
        let net = destination(&route).map(|n| n.to_string()).unwrap_or_default();
        handle.route().del(route).execute().await.map_err(request(format!("remove route to {net}")))?;
    }
    vxlan::remove(handle, &vxlan::name(bridge, false)).await?;
    vxlan::remove(handle, &vxlan::name(bridge, true)).await
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
