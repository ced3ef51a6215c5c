//! Pods of nodes that share no link with this one: their packets go in UDP, by VXLAN.
//!
//! Nothing is learned or flooded: for every such node there is one route, one neighbour and one forwarding entry. A node's
//! hardware address on this network follows from its IP address, so that nodes need not tell each other.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net};
use netlink_packet_route::neighbour::NeighbourFlags;
use rtnetlink::{Handle, LinkUnspec, LinkVxlan, RouteMessageBuilder};

use super::{Error, PROTOCOL, errno, request};

/// Number of the network on the wire, and the port IANA gave to VXLAN.
const NETWORK: u32 = 214;
const PORT: u16 = 4789;
/// What the outer headers take of a packet.
const OVERHEAD: u32 = 50;
const MTU: u32 = 1500 - OVERHEAD;

/// Ranges of pods behind VXLAN, and their nodes.
pub(crate) type Far = BTreeMap<Ipv4Net, Ipv4Addr>;

/// The link's name: the bridge's with a letter more, at most 15 bytes.
pub(crate) fn name(bridge: &str) -> String {
    let end = bridge.char_indices().nth(14).map_or(bridge.len(), |(at, _)| at);
    format!("{}x", &bridge[..end])
}

fn hardware_address(node: Ipv4Addr) -> Vec<u8> {
    [&[0x0e, 0xa5][..], &node.octets()].concat()
}

/// The first address of a node's range is the node's own.
pub(crate) fn gateway(range: &Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()).wrapping_add(1))
}

async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, Error> {
    match handle.link().get().match_name(name).execute().try_next().await {
        Ok(found) => Ok(found.map(|m| m.header.index)),
        Err(e) if errno(&e) == Some(nix::libc::ENODEV) => Ok(None),
        Err(e) => Err(request(format!("look up link {name}"))(e)),
    }
}

/// Takes the link away, and everything on it.
pub(crate) async fn remove(handle: &Handle, name: &str) -> Result<(), Error> {
    let Some(link) = index(handle, name).await? else { return Ok(()) };
    handle.link().del(link).execute().await.map_err(request(format!("delete link {name}")))
}

async fn ensure(handle: &Handle, name: &str, own: Ipv4Addr) -> Result<u32, Error> {
    let message = LinkVxlan::new(name, NETWORK)
        .port(PORT)
        .local(own)
        .learning(false)
        .address(hardware_address(own))
        .mtu(MTU)
        .build();
    match handle.link().add(message).execute().await {
        Err(e) if errno(&e) != Some(nix::libc::EEXIST) => return Err(request(format!("make link {name}"))(e)),
        _ => {}
    }
    let missing = || Error::Request(format!("link {name} is not there"), Box::new(rtnetlink::Error::RequestFailed));
    let link = index(handle, name).await?.ok_or_else(missing)?;
    let up = LinkUnspec::new_with_index(link).up().build();
    handle.link().change(up).execute().await.map_err(request(format!("switch on {name}")))?;
    Ok(link)
}

/// Makes the ways to `far`; without any the link goes. `source` is this node's address towards pods.
pub(crate) async fn apply(
    handle: &Handle,
    name: &str,
    own: Ipv4Addr,
    source: Option<Ipv4Addr>,
    far: &Far,
) -> Result<(), Error> {
    if far.is_empty() {
        return remove(handle, name).await;
    }
    let link = ensure(handle, name, own).await?;
    for (range, node) in far {
        let (gateway, hardware) = (gateway(range), hardware_address(*node));
        let neighbour = handle.neighbours().add(link, IpAddr::V4(gateway)).link_layer_address(&hardware).replace();
        neighbour.execute().await.map_err(request(format!("add neighbour {gateway} on {name}")))?;
        let entry = handle.neighbours().add_bridge(link, &hardware).destination(IpAddr::V4(*node));
        let entry = entry.flags(NeighbourFlags::Own).replace();
        entry.execute().await.map_err(request(format!("add forwarding entry of {node} on {name}")))?;
        let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(range.network(), range.prefix_len())
            .output_interface(link)
            .gateway(gateway)
            .onlink()
            .protocol(PROTOCOL);
        if let Some(source) = source {
            route = route.pref_source(source);
        }
        let net = IpNet::V4(*range);
        handle.route().add(route.build()).replace().execute().await.map_err(request(format!("add route to {net}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses() {
        assert_eq!(name("isobr0"), "isobr0x");
        assert_eq!(name("iso123456789012345").len(), 15);
        assert_eq!(hardware_address([192, 0, 2, 1].into()), [0x0e, 0xa5, 192, 0, 2, 1]);
        assert_eq!(gateway(&"10.244.3.0/24".parse().unwrap()), Ipv4Addr::new(10, 244, 3, 1));
    }
}
