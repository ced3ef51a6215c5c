//! `linux.netDevices`: network devices of the host that move into the container's network namespace.
//!
//! They stay there: what becomes of them when the container ends is between the kernel and whoever owns the namespace.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use oci_spec::runtime::LinuxNetDevice;

use crate::{
    error::{Context, Error, Result},
    launch::open_namespace,
    netlink::{Message, Routing},
};

const PERMANENT: u32 = 0x80;
/// What the kernel finds out by itself: secondary, duplicates, tentative, permanent.
const KERNELS_OWN: u32 = 0x01 | 0x08 | 0x40 | PERMANENT;
const UNIVERSE: u8 = 0;

/// The name a device gets in the container.
fn new_name<'a>(name: &'a str, device: &'a LinuxNetDevice) -> &'a str {
    device.name().as_deref().filter(|new| !new.is_empty()).unwrap_or(name)
}

/// A name the kernel makes the rest of.
fn is_template(name: &str) -> bool {
    name.ends_with("%d")
}

/// Refuses names no device can have, and two devices of one name.
pub(crate) fn validate(devices: &HashMap<String, LinuxNetDevice>) -> Result<()> {
    let mut taken = HashSet::new();
    for (name, device) in devices {
        let new = new_name(name, device);
        for (word, digits) in [(name.as_str(), name.as_str()), (new, new.strip_suffix("%d").unwrap_or(new))] {
            let odd = |c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control();
            if word.is_empty() || word.len() > 15 || [".", ".."].contains(&word) || digits.contains(odd) {
                return Err(Error::invalid(format!("linux.netDevices: {word:?} is no name of a network device")));
            }
        }
        if !is_template(new) && !taken.insert(new) {
            return Err(Error::invalid(format!("linux.netDevices: two devices are to be named {new}")));
        }
    }
    Ok(())
}

/// Moves the devices into the network namespace of `pid`, a process of the container; all is checked before the first goes.
pub(crate) fn hand_over(devices: &HashMap<String, LinuxNetDevice>, pid: i32) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let within = |e: Error| e.within("linux.netDevices");
    let namespace = open_namespace(Path::new(&format!("/proc/{pid}/ns/net")))?;
    let mut host = Routing::here().context(|| "open a routing socket".into()).map_err(within)?;
    let container = Routing::of(namespace.as_fd()).context(|| "enter the container's network namespace".into());
    let mut container = container.map_err(within)?;
    let mut moves = vec![];
    for (name, device) in devices.iter().collect::<BTreeMap<_, _>>() {
        let new = new_name(name, device);
        let index = index_of(&mut host, name)?;
        let index = index.ok_or_else(|| Error::invalid(format!("linux.netDevices: the host has no device {name}")))?;
        if !is_template(new) && index_of(&mut container, new)?.is_some() {
            let text = format!("linux.netDevices {name}: the container's network namespace has a device {new} already");
            return Err(Error::invalid(text));
        }
        moves.push((index, name, new));
    }
    for (index, name, new) in moves {
        move_one(&mut host, &mut container, namespace.as_fd().as_raw_fd(), index, new)
            .context(|| format!("linux.netDevices: move {name} into the container as {new}"))?;
    }
    Ok(())
}

fn index_of(routing: &mut Routing, name: &str) -> Result<Option<u32>> {
    let question = Message::link(libc::RTM_GETLINK, 0, 0).with(libc::IFLA_IFNAME, &terminated(name));
    match routing.call(&question, 0) {
        Ok(answers) => Ok(answers.first().map(Message::index)),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(Error::system(format!("linux.netDevices: look for {name}"), e)),
    }
}

fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn indices(routing: &mut Routing) -> io::Result<HashSet<u32>> {
    Ok(routing.dump(&Message::link(libc::RTM_GETLINK, 0, 0))?.iter().map(Message::index).collect())
}

/// The kernel takes a moved device down and its addresses away; both are put back on the other side.
fn move_one(host: &mut Routing, container: &mut Routing, namespace: i32, index: u32, new: &str) -> io::Result<()> {
    let mut addresses = host.dump(&Message::all_addresses())?;
    addresses.retain(|a| a.index() == index && a.scope() == UNIVERSE && a.flags() & PERMANENT != 0);
    let before = indices(container)?;
    let order = Message::link(libc::RTM_SETLINK, index, 0)
        .with(libc::IFLA_NET_NS_FD, &namespace.to_ne_bytes())
        .with(libc::IFLA_IFNAME, &terminated(new));
    host.call(&order, 0)?;
    // The name may have been a template, and the index may have been taken.
    let arrived = indices(container)?.difference(&before).next().copied();
    let index = arrived.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
    for address in addresses {
        let keep = [libc::IFA_ADDRESS, libc::IFA_LOCAL, libc::IFA_BROADCAST, libc::IFA_ANYCAST, IFA_RT_PRIORITY];
        let order = address.moved_address(index, address.flags() & !KERNELS_OWN, &keep);
        container.call(&order, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)?;
    }
    container.call(&Message::link(libc::RTM_SETLINK, index, libc::IFF_UP as u32), 0).map(drop)
}

const IFA_RT_PRIORITY: u16 = 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names() {
        let check = |name: &str, new: Option<&str>| {
            let mut device = LinuxNetDevice::default();
            device.set_name(new.map(str::to_owned));
            validate(&HashMap::from([(name.to_owned(), device)]))
        };
        for (name, new) in [("eth0", None), ("eth0", Some("")), ("e", Some("net%d")), ("fifteen-letters", Some("x"))] {
            assert!(check(name, new).is_ok(), "{name} {new:?}");
        }
        let bad = [("", None), (".", None), ("a/b", None), ("a b", None), ("eth%d", None), ("e", Some("a%db"))];
        for (name, new) in bad.into_iter().chain([("e", Some("%d%d")), ("e", Some("sixteen--letters")), ("e:1", None)])
        {
            assert!(check(name, new).is_err(), "{name} {new:?}");
        }
        let mut twin = LinuxNetDevice::default();
        twin.set_name(Some("a".to_owned()));
        let two = HashMap::from([("a".to_owned(), LinuxNetDevice::default()), ("b".to_owned(), twin)]);
        assert!(validate(&two).unwrap_err().to_string().contains("two devices are to be named a"));
    }
}
