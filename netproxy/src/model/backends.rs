//! Endpoints as services hold them: there may be a million, so each takes no more than its bytes.

use std::{net::IpAddr, sync::Arc};

use super::objects::{Backend, Endpoint, Rare};

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

    pub(crate) fn iter(&self) -> impl Iterator<Item = Backend> + Clone {
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

const READY: u16 = 1;
const SERVING: u16 = 2;
const TERMINATING: u16 = 4;
const HERE: u16 = 8;
const RARE: u16 = 16;

/// The endpoints of a slice, which are all of one family.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Endpoints {
    /// Addresses, and in the place of ports what is true of them.
    packed: Backends,
    /// What few have, by their numbers.
    rare: Box<[(usize, Arc<Rare>)]>,
}

impl FromIterator<Endpoint> for Endpoints {
    fn from_iter<T: IntoIterator<Item = Endpoint>>(all: T) -> Self {
        let mut all = all.into_iter().peekable();
        let v6 = all.peek().is_some_and(|e| e.address.is_ipv6());
        let (mut packed, mut rare) = (Vec::new(), Vec::new());
        for endpoint in all.filter(|e| e.address.is_ipv6() == v6) {
            let bit = |bit, set| if set { bit } else { 0 };
            let Endpoint { address, ready, serving, terminating, here, rare: more } = endpoint;
            let state = bit(READY, ready) | bit(SERVING, serving) | bit(TERMINATING, terminating) | bit(HERE, here);
            let state = state | bit(RARE, more.is_some());
            rare.extend(more.map(|more| (packed.len(), more)));
            packed.push(Backend::new(address, state));
        }
        Self { packed: packed.into_iter().collect(), rare: rare.into() }
    }
}

impl Endpoints {
    pub(crate) fn iter(&self) -> impl Iterator<Item = Endpoint> + Clone {
        self.packed.iter().enumerate().map(|(number, packed)| {
            let is = |bit| packed.port() & bit != 0;
            let rare = || Some(self.rare[self.rare.binary_search_by_key(&number, |(n, _)| *n).ok()?].1.clone());
            Endpoint {
                address: packed.ip(),
                ready: is(READY),
                serving: is(SERVING),
                terminating: is(TERMINATING),
                here: is(HERE),
                rare: if is(RARE) { rare() } else { None },
            }
        })
    }

    /// Changes what a test made.
    #[cfg(test)]
    pub(crate) fn edit(&mut self, mut change: impl FnMut(usize, &mut Endpoint)) {
        let mut all: Vec<Endpoint> = self.iter().collect();
        all.iter_mut().enumerate().for_each(|(number, endpoint)| change(number, endpoint));
        *self = all.into_iter().collect();
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

    #[test]
    fn endpoints_come_back_as_they_were() {
        let all: Vec<Endpoint> = (0..40u8)
            .map(|n| Endpoint {
                address: [10, 0, 0, n].into(),
                ready: n & 1 != 0,
                serving: n & 2 != 0,
                terminating: n & 4 != 0,
                here: n & 8 != 0,
                rare: (n % 5 == 0)
                    .then(|| Arc::new(Rare { hostname: Some(format!("h{n}").into()), ..Rare::default() })),
            })
            .collect();
        assert_eq!(all.iter().cloned().collect::<Endpoints>().iter().collect::<Vec<_>>(), all);
    }
}
