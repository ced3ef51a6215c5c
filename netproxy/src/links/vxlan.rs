//! Pods of nodes that share no link with this one: their packets go in UDP, by VXLAN.
//!
//! Nothing is learned or flooded: for every such node there is one route, one neighbour and one forwarding entry. A node's
//! hardware address on this network follows from its IP address, so that nodes need not tell each other. What goes over
//! IPv4 and what goes over IPv6 has a link each; a range of pods goes over the family it is of.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{neighbour::NeighbourFlags, route::RouteMessage};
use rtnetlink::{Handle, LinkUnspec, LinkVxlan, RouteMessageBuilder};

use super::{Error, PROTOCOL, gateway, make_link, mtu_at, remove_link, request};

/// Number of the network on the wire, and the port IANA gave to VXLAN.
const NETWORK: u32 = 214;
const PORT: u16 = 4789;

/// Ranges of pods behind VXLAN, and their nodes.
pub(crate) type Far = BTreeMap<IpNet, IpAddr>;

/// The link's name: the bridge's with a letter more.
pub(crate) fn name(bridge: &str, v6: bool) -> String {
    super::name(bridge, if v6 { 'y' } else { 'x' })
}

fn hardware_address(node: IpAddr) -> Vec<u8> {
    match node {
        IpAddr::V4(node) => [&[0x0e, 0xa5][..], &node.octets()].concat(),
        IpAddr::V6(node) => {
            // FNV-1a: the same on every node.
            let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
            let hash = node.octets().into_iter().fold(0x811c_9dc5, step);
            [&[0x0e, 0xa6][..], &hash.to_be_bytes()].concat()
        }
    }
}

async fn ensure(handle: &Handle, name: &str, own: IpAddr) -> Result<u32, Error> {
    let message = LinkVxlan::new(name, NETWORK).port(PORT).learning(false).address(hardware_address(own));
    let mtu = mtu_at(handle, own).await?;
    // What the outer headers take of a packet.
    let message = match own {
        IpAddr::V4(own) => message.local(own).mtu(mtu - 50),
        IpAddr::V6(own) => message.local6(own).mtu(mtu - 70),
    };
    let link = make_link(handle, name, message.build()).await?;
    let up = LinkUnspec::new_with_index(link).up().build();
    handle.link().change(up).execute().await.map_err(request(format!("switch on {name}")))?;
    Ok(link)
}

fn route(range: &IpNet, link: u32, source: Option<IpAddr>) -> Option<RouteMessage> {
    let mut route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(range.network(), range.prefix_len())
        .and_then(|r| r.gateway(gateway(range)))
        .ok()?
        .output_interface(link)
        .onlink()
        .protocol(PROTOCOL);
    if let Some(source) = source {
        route = route.pref_source(source).ok()?;
    }
    Some(route.build())
}

/// Makes the ways to `far`, all of one family; without any the link goes. `source` is this node's address towards pods.
pub(crate) async fn apply(
    handle: &Handle,
    name: &str,
    own: IpAddr,
    source: Option<IpAddr>,
    far: &Far,
) -> Result<(), Error> {
    if far.is_empty() {
        return remove_link(handle, name).await;
    }
    let link = ensure(handle, name, own).await?;
    for (range, node) in far {
        let (gateway, hardware) = (gateway(range), hardware_address(*node));
        let neighbour = handle.neighbours().add(link, gateway).link_layer_address(&hardware).replace();
        neighbour.execute().await.map_err(request(format!("add neighbour {gateway} on {name}")))?;
        let entry = handle.neighbours().add_bridge(link, &hardware).destination(*node);
        let entry = entry.flags(NeighbourFlags::Own).replace();
        entry.execute().await.map_err(request(format!("add forwarding entry of {node} on {name}")))?;
        let Some(route) = route(range, link, source) else { continue };
        handle.route().add(route).replace().execute().await.map_err(request(format!("add route to {range}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses() {
        assert_eq!(name("isobr0", false), "isobr0x");
        assert_eq!(name("iso123456789012345", true).len(), 15);
        assert_eq!(hardware_address([192, 0, 2, 1].into()), [0x0e, 0xa5, 192, 0, 2, 1]);
        let six = |a: &str| hardware_address(a.parse().unwrap());
        assert_ne!(six("2001:db8::1"), six("2001:db8:0:1::1"));
        assert_eq!(six("2001:db8::1")[..2], [0x0e, 0xa6]);
        assert_eq!(gateway(&"10.244.3.0/24".parse().unwrap()), IpAddr::from([10, 244, 3, 1]));
        assert_eq!(gateway(&"2001:db8::/64".parse().unwrap()), "2001:db8::1".parse::<IpAddr>().unwrap());
    }
}
