//! Word to everybody on a link that an address is here now: gratuitous ARP, unsolicited neighbour advertisements.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};

/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

type Mac = [u8; 6];

fn ethernet(to: Mac, from: Mac, kind: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), body].concat()
}

/// An ARP announcement (RFC 5227): a question for one's own address.
fn arp(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    // Ethernet and IPv4 addresses, of 6 and 4 bytes; a request.
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    let body = [&head[..], &mac, &address.octets(), &[0; 6], &address.octets()].concat();
    ethernet([0xff; 6], mac, 0x0806, &body)
}

/// The Internet's checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let (words, _) = bytes.as_chunks::<2>();
    let mut sum: u32 = words.iter().map(|w| u32::from(u16::from_be_bytes(*w))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A neighbour advertisement nobody asked for (RFC 4861), which overrides what is known.
fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    const ICMP: u8 = 58;
    let target = address.octets();
    // Type and code, room for the checksum, the flag `override`, then the target and its hardware address.
    let mut icmp = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target, &[2, 1], &mac].concat();
    let len = [0, icmp.len() as u8];
    let pseudo = [&target[..], &ALL_NODES.octets(), &[0, 0], &len, &[0, 0, 0, ICMP], &icmp].concat();
    icmp[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let header = [&[0x60, 0, 0, 0][..], &len, &[ICMP, 255], &target, &ALL_NODES.octets()].concat();
    ethernet([0x33, 0x33, 0, 0, 0, 1], mac, 0x86dd, &[header, icmp].concat())
}

/// Tells of an address on a link; on one that is no Ethernet there is nobody to tell.
pub(super) fn send(link: u32, address: IpAddr) -> io::Result<()> {
    let links = getifaddrs()?.filter_map(|i| i.address?.as_link_addr().copied());
    let of_link = |a: &LinkAddr| u32::try_from(a.ifindex()) == Ok(link) && a.hatype() == ETHERNET;
    let Some((to, mac)) = links.filter(of_link).find_map(|a| Some((a, a.addr()?))) else { return Ok(()) };
    let frame = match address {
        IpAddr::V4(address) => arp(mac, address),
        IpAddr::V6(address) => advertisement(mac, address),
    };
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    sendto(socket.as_raw_fd(), &frame, &to, MsgFlags::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_as_the_standards_have_them() {
        let mac = [2, 0, 0, 0, 0, 7];
        let frame = arp(mac, Ipv4Addr::new(192, 0, 2, 9));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], frame[38..42], "sender and target are the same");
        let frame = advertisement(mac, "2001:db8::9".parse().unwrap());
        assert_eq!(frame.len(), 14 + 40 + 32);
        // With its checksum the sum of all is nothing.
        let icmp = &frame[54..];
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58], icmp].concat();
        assert_eq!(checksum(&pseudo), 0);
        assert_eq!(
            checksum(&[0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7]),
            0xb861
        );
    }
}
