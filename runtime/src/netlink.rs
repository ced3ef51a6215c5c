//! Just enough rtnetlink to hand network devices over: requests built by hand, answers read until the kernel ends them.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// Length of `nlmsghdr`.
const HEADER: usize = 16;
/// Length of `ifinfomsg`.
const LINK: usize = 16;
/// Length of `ifaddrmsg`.
const ADDRESS: usize = 8;

/// A request or an answer after its `nlmsghdr`: a fixed part, then attributes.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    kind: u16,
    fixed: Vec<u8>,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Message {
    /// About a link: all (0) or the one of this index, with these flags of `IFF_*` set.
    pub(crate) fn link(kind: u16, index: u32, flags: u32) -> Self {
        let mut fixed = vec![0; 4];
        for word in [index, flags, flags] {
            fixed.extend(word.to_ne_bytes());
        }
        Self { kind, fixed, attributes: vec![] }
    }

    /// Asks for all addresses.
    pub(crate) fn all_addresses() -> Self {
        Self { kind: libc::RTM_GETADDR, fixed: vec![0; ADDRESS], attributes: vec![] }
    }

    /// The same address on another link, with these `IFA_F_*` and only these attributes.
    pub(crate) fn moved_address(&self, index: u32, flags: u32, keep: &[u16]) -> Self {
        let mut fixed = self.fixed.clone();
        fixed[2] = flags as u8;
        fixed[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut message = Self { kind: libc::RTM_NEWADDR, fixed, attributes: self.attributes.clone() };
        message.attributes.retain(|(kind, _)| keep.contains(kind));
        message.with(libc::IFA_FLAGS, &flags.to_ne_bytes())
    }

    /// With one more attribute.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.push((kind, value.to_vec()));
        self
    }

    /// The interface index of a link or an address.
    pub(crate) fn index(&self) -> u32 {
        word(&self.fixed, 4)
    }

    /// Scope of an address.
    pub(crate) fn scope(&self) -> u8 {
        self.fixed[3]
    }

    /// `IFA_F_*` of an address.
    pub(crate) fn flags(&self) -> u32 {
        self.attribute(libc::IFA_FLAGS).map_or(u32::from(self.fixed[2]), |bytes| word(bytes, 0))
    }

    /// An attribute's value.
    pub(crate) fn attribute(&self, kind: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| value.as_slice())
    }

    fn encode(&self, flags: i32, sequence: u32) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out.extend(&self.fixed);
        for (kind, value) in &self.attributes {
            out.extend(((4 + value.len()) as u16).to_ne_bytes());
            out.extend(kind.to_ne_bytes());
            out.extend(value);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        let length = out.len() as u32;
        out[..4].copy_from_slice(&length.to_ne_bytes());
        out[4..6].copy_from_slice(&self.kind.to_ne_bytes());
        out[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        out[8..12].copy_from_slice(&sequence.to_ne_bytes());
        out
    }

    fn decode(kind: u16, body: &[u8]) -> Option<Self> {
        let fixed = if kind == libc::RTM_NEWADDR { ADDRESS } else { LINK };
        let mut message = Self { kind, fixed: body.get(..fixed)?.to_vec(), attributes: vec![] };
        let mut rest = &body[fixed..];
        while rest.len() >= 4 {
            let length = usize::from(half(rest, 0));
            let value = rest.get(4..length)?;
            message.attributes.push((half(rest, 2), value.to_vec()));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(message)
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_ne_bytes([b[0], b[1]]))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}

/// A socket to the routing of one network namespace, wherever the process goes afterwards.
#[derive(Debug)]
pub(crate) struct Routing {
    fd: OwnedFd,
    sequence: u32,
}

impl Routing {
    /// Of the namespace this process is in.
    pub(crate) fn here() -> io::Result<Self> {
        // No protocol is the one of routing.
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Of another, which this process visits for as long as making the socket takes.
    pub(crate) fn of(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let own = std::fs::File::open("/proc/self/ns/net")?;
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        let made = Self::here();
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
        made
    }

    /// Asks for or changes one thing.
    pub(crate) fn call(&mut self, message: &Message, flags: i32) -> io::Result<Vec<Message>> {
        self.exchange(message, libc::NLM_F_ACK | flags)
    }

    /// Asks for everything of a kind.
    pub(crate) fn dump(&mut self, message: &Message) -> io::Result<Vec<Message>> {
        self.exchange(message, libc::NLM_F_DUMP)
    }

    fn exchange(&mut self, message: &Message, flags: i32) -> io::Result<Vec<Message>> {
        self.sequence += 1;
        send(&self.fd, &message.encode(libc::NLM_F_REQUEST | flags, self.sequence), SendFlags::empty())?;
        let mut answers = vec![];
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (n, _) = recv(&self.fd, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..n];
            while rest.len() >= HEADER {
                let length = (word(rest, 0) as usize).clamp(HEADER, rest.len());
                let (kind, body) = (half(rest, 4), &rest[HEADER..length]);
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(answers),
                    libc::NLMSG_ERROR => match word(body, 0) as i32 {
                        0 => return Ok(answers),
                        error => return Err(io::Error::from_raw_os_error(-error)),
                    },
                    _ => answers.extend(Message::decode(kind, body)),
                }
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let message = Message::link(libc::RTM_NEWLINK, 7, 1).with(libc::IFLA_IFNAME, b"eth0\0").with(99, &[1]);
        let bytes = message.encode(libc::NLM_F_REQUEST, 3);
        assert_eq!((bytes.len(), bytes.len() as u32), (HEADER + LINK + 12 + 8, word(&bytes, 0)));
        let decoded = Message::decode(half(&bytes, 4), &bytes[HEADER..]).unwrap();
        assert_eq!((decoded.index(), decoded.attribute(libc::IFLA_IFNAME)), (7, Some(&b"eth0\0"[..])));
        assert_eq!(decoded.attribute(99), Some(&[1][..]));
        assert!(Message::decode(libc::RTM_NEWLINK, &bytes[HEADER..bytes.len() - 4]).is_none());
    }

    #[test]
    fn the_loopback_device_is_the_first() {
        let mut routing = Routing::here().unwrap();
        let named = Message::link(libc::RTM_GETLINK, 0, 0).with(libc::IFLA_IFNAME, b"lo\0");
        assert_eq!(routing.call(&named, 0).unwrap()[0].index(), 1);
        let links = routing.dump(&Message::link(libc::RTM_GETLINK, 0, 0)).unwrap();
        assert!(links.iter().any(|link| link.attribute(libc::IFLA_IFNAME) == Some(b"lo\0")));
        let none = Message::link(libc::RTM_GETLINK, 0, 0).with(libc::IFLA_IFNAME, b"nosuch0\0");
        assert_eq!(routing.call(&none, 0).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
}
