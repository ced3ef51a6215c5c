//! Endpoints as services hold them: there may be a million, so each takes no more than its bytes.

use std::net::IpAddr;

use super::objects::Backend;

/// Endpoints of one family in the order of their indices: address and port, six bytes each, or eighteen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Backends {
    V4(Box<[[u8; 6]]>),
    V6(Box<[[u8; 18]]>),
}

impl Default for Backends {
    fn default() -> Self {
        Self::V4(Box::default())
    }
}

fn pack<const ADDRESS: usize, const ALL: usize>(address: [u8; ADDRESS], port: u16) -> [u8; ALL] {
    let mut out = [0; ALL];
    out[..ADDRESS].copy_from_slice(&address);
    out[ADDRESS..].copy_from_slice(&port.to_be_bytes());
    out
}

fn unpack<const ADDRESS: usize, const ALL: usize>(bytes: &[u8; ALL]) -> Backend
where
    IpAddr: From<[u8; ADDRESS]>,
{
    let (mut address, mut port) = ([0; ADDRESS], [0; 2]);
    address.copy_from_slice(&bytes[..ADDRESS]);
    port.copy_from_slice(&bytes[ADDRESS..]);
    Backend::new(address.into(), u16::from_be_bytes(port))
}

impl FromIterator<Backend> for Backends {
    /// All of one family: that of the first.
    fn from_iter<T: IntoIterator<Item = Backend>>(all: T) -> Self {
        let mut all = all.into_iter().peekable();
        let four = |b: Backend| if let IpAddr::V4(a) = b.ip() { Some(pack(a.octets(), b.port())) } else { None };
        let six = |b: Backend| if let IpAddr::V6(a) = b.ip() { Some(pack(a.octets(), b.port())) } else { None };
        match all.peek().map(Backend::ip) {
            Some(IpAddr::V6(_)) => Self::V6(all.filter_map(six).collect()),
            _ => Self::V4(all.filter_map(four).collect()),
        }
    }
}

impl Backends {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::V4(all) => all.len(),
            Self::V6(all) => all.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Backend> {
        let (four, six): (&[_], &[_]) = match self {
            Self::V4(all) => (all, &[]),
            Self::V6(all) => (&[], all),
        };
        four.iter().map(unpack::<4, 6>).chain(six.iter().map(unpack::<16, 18>))
    }

    pub(crate) fn contains(&self, backend: &Backend) -> bool {
        self.iter().any(|b| b == *backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_come_back_as_they_were() {
        for list in
            [vec!["10.244.0.1:80", "10.244.255.2:65535"], vec!["[2001:db8::1]:1", "[::ffff:10.0.0.1]:2"], vec![]]
        {
            let all: Vec<Backend> = list.iter().map(|t| t.parse::<std::net::SocketAddr>().unwrap().into()).collect();
            let packed: Backends = all.iter().copied().collect();
            assert_eq!(packed.iter().collect::<Vec<_>>(), all);
            assert_eq!(packed.len(), all.len());
            assert!(all.iter().all(|b| packed.contains(b)) && !packed.contains(&Backend::new([9, 9, 9, 9].into(), 9)));
        }
    }
}
