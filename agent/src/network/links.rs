//! Links, addresses and routes by netlink: one function per thing this room asks of the kernel, errors with the name it
//! failed on.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteMessage, RouteScope},
};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// The pod's end of its link.
pub(crate) const POD_LINK: &str = "eth0";

/// A request the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(crate) struct Error {
    what: String,
    #[source]
    source: Box<rtnetlink::Error>,
}

impl Error {
    pub(crate) fn new(what: String, source: rtnetlink::Error) -> Self {
        Self { what, source: Box::new(source) }
    }
}

fn failed(what: String) -> impl FnOnce(rtnetlink::Error) -> Error {
    |source| Error { what, source: Box::new(source) }
}

fn errno(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map_or(0, |c| -c.get()),
        _ => 0,
    }
}

fn ignore(code: i32) -> impl FnOnce(Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    move |result| match result {
        Err(e) if errno(&e) == code => Ok(()),
        other => other,
    }
}

/// Index of a link; `None` when there is none of that name.
pub(crate) async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, Error> {
    match handle.link().get().match_name(name).execute().try_next().await {
        Ok(found) => Ok(found.map(|m| m.header.index)),
        Err(e) if errno(&e) == nix::libc::ENODEV => Ok(None),
        Err(e) => Err(failed(format!("look up link {name}"))(e)),
    }
}

pub(crate) async fn need(handle: &Handle, name: &str) -> Result<u32, Error> {
    let missing =
        || Error { what: format!("link {name} is not there"), source: Box::new(rtnetlink::Error::RequestFailed) };
    index(handle, name).await?.ok_or_else(missing)
}

/// The largest packet of the link that has an address; `None` for those that never leave the machine.
pub(crate) async fn mtu_at(handle: &Handle, address: IpAddr) -> Result<Option<u32>, Error> {
    let request = handle.address().get().set_address_filter(address).execute();
    let found: Vec<_> = request.try_collect().await.map_err(failed(format!("look up address {address}")))?;
    let Some(index) = found.first().map(|m| m.header.index) else { return Ok(None) };
    let link = handle.link().get().match_index(index).execute().try_next().await;
    let link = link.map_err(failed(format!("look up the link of {address}")))?;
    let link = link.filter(|l| !l.header.flags.contains(LinkFlags::Loopback));
    Ok(link.and_then(|l| {
        l.attributes.iter().find_map(|a| if let LinkAttribute::Mtu(mtu) = a { Some(*mtu) } else { None })
    }))
}

/// Makes the bridge if it is not there, and switches it on.
pub(crate) async fn ensure_bridge(handle: &Handle, name: &str, address: [u8; 6], mtu: u32) -> Result<u32, Error> {
    // With an address of its own the bridge does not take on its ports', which come and go.
    let message = LinkBridge::new(name).address(address.to_vec()).mtu(mtu).build();
    ignore(nix::libc::EEXIST)(handle.link().add(message).execute().await)
        .map_err(failed(format!("make bridge {name}")))?;
    let bridge = need(handle, name).await?;
    up(handle, bridge, name).await?;
    Ok(bridge)
}

/// Switches a link on.
pub(crate) async fn up(handle: &Handle, link: u32, name: &str) -> Result<(), Error> {
    let message = LinkMessageBuilder::<LinkUnspec>::default().index(link).up().build();
    handle.link().change(message).execute().await.map_err(failed(format!("switch on {name}")))
}

/// Makes a pod's link: one end on the bridge, the other in a namespace, both at once.
pub(crate) async fn add_veth(
    handle: &Handle,
    name: &str,
    bridge: u32,
    ns: BorrowedFd<'_>,
    mtu: u32,
) -> Result<(), Error> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new().name(POD_LINK).mtu(mtu).setns_by_fd(ns.as_raw_fd()).build();
    let message = LinkVeth::new(name, POD_LINK)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .mtu(mtu)
        .controller(bridge)
        .up()
        .build();
    handle.link().add(message).execute().await.map_err(failed(format!("make link {name}")))?;
    let index = need(handle, name).await?;
    let port = LinkBridgePort::new(index).hairpin(true).build();
    handle.link().change(port).execute().await.map_err(failed(format!("set hairpin mode of {name}")))
}

/// Deletes a link; one that is not there is no error.
pub(crate) async fn delete(handle: &Handle, name: &str) -> Result<(), Error> {
    let Some(index) = index(handle, name).await? else { return Ok(()) };
    ignore(nix::libc::ENODEV)(handle.link().del(index).execute().await).map_err(failed(format!("delete link {name}")))
}

/// Deletes many links at once; those that are not there are no error.
pub(crate) async fn delete_all(handle: &Handle, names: &[String]) -> Result<(), Error> {
    // The kernel deletes a whole group in one go; nobody else has this one.
    let group = rand::random::<u32>() | 1 << 31;
    let mut any = false;
    for name in names {
        let Some(index) = index(handle, name).await? else { continue };
        let message = LinkMessageBuilder::<LinkUnspec>::default().index(index).link_group(group).build();
        ignore(nix::libc::ENODEV)(handle.link().change(message).execute().await)
            .map_err(failed(format!("put link {name} into a group")))?;
        any = true;
    }
    if !any {
        return Ok(());
    }
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    ignore(nix::libc::ENODEV)(handle.link().del_with_message(message).execute().await)
        .map_err(failed(format!("delete {} links", names.len())))
}

/// Forgets whose hardware address a pod's address was: the next pod that gets it has another one.
pub(crate) async fn forget_neighbour(handle: &Handle, bridge: u32, address: IpAddr) -> Result<(), Error> {
    let message = handle.neighbours().add(bridge, address).message_mut().clone();
    ignore(nix::libc::ENOENT)(handle.neighbours().del(message).execute().await)
        .map_err(failed(format!("forget neighbour {address}")))
}

/// Names of the links on a bridge.
pub(crate) async fn ports(handle: &Handle, bridge: u32) -> Result<Vec<String>, Error> {
    let all: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(failed("list links".into()))?;
    let on_bridge = |m: &&LinkMessage| m.attributes.contains(&LinkAttribute::Controller(bridge));
    let name = |m: &LinkMessage| {
        m.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
    };
    Ok(all.iter().filter(on_bridge).filter_map(name).collect())
}

/// Puts an address on a link.
pub(crate) async fn add_address(handle: &Handle, link: u32, net: IpNet) -> Result<(), Error> {
    let request = handle.address().add(link, net.addr(), net.prefix_len());
    ignore(nix::libc::EEXIST)(request.execute().await).map_err(failed(format!("add address {net}")))
}

fn route(link: u32, to: IpNet, via: Option<IpAddr>, source: Option<IpAddr>) -> RouteMessage {
    match to {
        IpNet::V4(to) => {
            let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .output_interface(link);
            match via {
                Some(IpAddr::V4(via)) => builder = builder.gateway(via),
                _ => builder = builder.scope(RouteScope::Link),
            }
            if let Some(IpAddr::V4(source)) = source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
        IpNet::V6(to) => {
            let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.network(), to.prefix_len())
                .output_interface(link);
            if let Some(IpAddr::V6(via)) = via {
                builder = builder.gateway(via);
            }
            if let Some(IpAddr::V6(source)) = source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
    }
}

/// Makes or replaces a route out of a link: directly, or by way of a gateway.
pub(crate) async fn add_route(
    handle: &Handle,
    link: u32,
    to: IpNet,
    via: Option<IpAddr>,
    source: Option<IpAddr>,
) -> Result<(), Error> {
    let message = route(link, to, via, source);
    handle.route().add(message).replace().execute().await.map_err(failed(format!("add route to {to}")))
}

/// Sets up the inside of a pod's namespace: loopback, its addresses, and the node as its only neighbour.
///
/// The address has a full-length prefix: also pods of the same node reach each other through the node, which is what
/// makes translated connections between them work without bridge filtering.
pub(crate) async fn configure_pod(inside: &Handle, addresses: &[(IpAddr, IpAddr)]) -> Result<(), Error> {
    up(inside, 1, "lo").await?;
    let link = need(inside, POD_LINK).await?;
    up(inside, link, POD_LINK).await?;
    for (address, gateway) in addresses {
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let everything = IpNet::new_assert(any, 0);
        add_address(inside, link, IpNet::from(*address)).await?;
        add_route(inside, link, IpNet::from(*gateway), None, None).await?;
        add_route(inside, link, everything, Some(*gateway), None).await?;
    }
    Ok(())
}
