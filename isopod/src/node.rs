//! This machine as a node: its name, its address, and the settings that `up` remembers between runs.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use nix::{ifaddrs::getifaddrs, net::if_::InterfaceFlags, sys::socket::SockaddrStorage};
use serde::{Deserialize, Serialize};

use crate::error::Usage;

/// Settings of a cluster on this machine; `etc/isopod/cluster.yaml`. Options given to `up` change them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Settings {
    /// Name of the node object.
    pub(crate) node_name: String,
    /// The node's address.
    pub(crate) node_ip: IpAddr,
    /// Whether the address was given rather than found: a found one follows the machine.
    #[serde(default)]
    pub(crate) node_ip_given: bool,
    /// Port of the API server.
    pub(crate) api_port: u16,
    /// Port of the agent's own server.
    pub(crate) agent_port: u16,
    /// Addresses of all pods.
    #[serde(rename = "podCIDR")]
    pub(crate) pod_cidr: IpNet,
    /// Addresses of all services.
    #[serde(rename = "serviceCIDR")]
    pub(crate) service_cidr: IpNet,
    /// What becomes of packets between pods of different nodes.
    #[serde(default)]
    pub(crate) pod_encryption: PodEncryption,
}

/// How packets between pods of different nodes are kept from others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PodEncryption {
    /// Not at all.
    #[default]
    None,
    /// By WireGuard; the kernel has to have it.
    Wireguard,
}

/// Options that override remembered settings.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Options {
    /// The node's name [default: the host name]
    #[arg(long)]
    node_name: Option<String>,
    /// The node's address [default: that of the default route, else the first global one]
    #[arg(long)]
    node_ip: Option<IpAddr>,
    /// Port of the API server [default: 6443]
    #[arg(long)]
    api_port: Option<u16>,
    /// Port of the agent's server [default: 10250]
    #[arg(long)]
    agent_port: Option<u16>,
    /// Addresses of all pods [default: 10.244.0.0/16]
    #[arg(long, value_name = "CIDR")]
    pod_cidr: Option<IpNet>,
    /// Addresses of all services [default: 10.96.0.0/16]
    #[arg(long, value_name = "CIDR")]
    service_cidr: Option<IpNet>,
    /// Encryption of packets between pods of different nodes, the same on every node [default: none]
    #[arg(long)]
    pod_encryption: Option<PodEncryption>,
}

impl Settings {
    /// Remembered settings with the options applied, written back.
    pub(crate) fn resolve(path: &Path, options: Options) -> Result<Self> {
        let remembered = match fs::read_to_string(path) {
            Ok(text) => Some(
                serde_yaml_ng::from_str::<Settings>(&text)
                    .map_err(|error| Usage(format!("{}: {error}", path.display())))?,
            ),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let mut settings = match remembered {
            Some(settings) => settings,
            None => Settings {
                node_name: host_name()?,
                node_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
                node_ip_given: false,
                api_port: 6443,
                agent_port: 10250,
                pod_cidr: "10.244.0.0/16".parse().context("default pod CIDR")?,
                service_cidr: "10.96.0.0/16".parse().context("default service CIDR")?,
                pod_encryption: PodEncryption::None,
            },
        };
        if let Some(name) = options.node_name {
            settings.node_name = name;
        }
        let problems = isopod_api::names::dns1123_subdomain(&settings.node_name);
        if let Some(problem) = problems.first() {
            return Err(Usage(format!("node name \"{}\": {problem}", settings.node_name)).into());
        }
        if let Some(address) = options.node_ip {
            (settings.node_ip, settings.node_ip_given) = (address, true);
        }
        if !settings.node_ip_given {
            settings.node_ip = address()?;
        }
        settings.api_port = options.api_port.unwrap_or(settings.api_port);
        settings.agent_port = options.agent_port.unwrap_or(settings.agent_port);
        settings.pod_cidr = options.pod_cidr.unwrap_or(settings.pod_cidr);
        settings.service_cidr = options.service_cidr.unwrap_or(settings.service_cidr);
        settings.pod_encryption = options.pod_encryption.unwrap_or(settings.pod_encryption);
        if settings.pod_cidr.contains(&settings.service_cidr) || settings.service_cidr.contains(&settings.pod_cidr) {
            bail!(Usage(format!("pod CIDR {} and service CIDR {} overlap", settings.pod_cidr, settings.service_cidr)));
        }
        Ok(settings)
    }

    /// Writes the settings down for the next run.
    pub(crate) fn remember(&self, path: &Path) -> Result<()> {
        let text = serde_yaml_ng::to_string(self).context("render settings")?;
        crate::pki::write_private(path, text.as_bytes())
    }

    /// The address of the service `kubernetes`: the first of the service CIDR.
    pub(crate) fn kubernetes_ip(&self) -> Option<IpAddr> {
        nth(&self.service_cidr, 1)
    }

    /// The address of the cluster's DNS: the tenth of the service CIDR.
    pub(crate) fn dns_ip(&self) -> Option<IpAddr> {
        nth(&self.service_cidr, 10)
    }
}

fn nth(net: &IpNet, n: u32) -> Option<IpAddr> {
    let address = match net.network() {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from(u32::from(v4).checked_add(n)?)),
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6).checked_add(u128::from(n))?).into()),
    };
    net.contains(&address).then_some(address)
}

/// The machine's host name as a node name.
pub(crate) fn host_name() -> Result<String> {
    let name = nix::unistd::gethostname().context("host name")?;
    Ok(name.to_string_lossy().trim().to_lowercase())
}

/// The address others reach this machine by: of the interface with the default route, else the first global one.
pub(crate) fn address() -> Result<IpAddr> {
    let route = default_route_interface();
    let mut found: Vec<(bool, bool, bool, IpAddr)> = Vec::new();
    for interface in getifaddrs().context("list interfaces")? {
        let up =
            interface.flags.contains(InterfaceFlags::IFF_UP) && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK);
        let Some(storage) = interface.address.filter(|_| up) else { continue };
        let address = match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) if !v6.ip().is_unicast_link_local() => IpAddr::V6(v6.ip()),
            _ => continue,
        };
        // Bridges of pod networks carry addresses too, but nobody outside reaches them.
        let bridge = Path::new("/sys/class/net").join(&interface.interface_name).join("bridge").exists();
        if bridge && route.as_deref() != Some(interface.interface_name.as_str()) {
            continue;
        }
        // Those of Services are announced with masks of one address.
        let alone = interface.netmask.is_some_and(|m| is_full(&m));
        let no_route = route.as_deref() != Some(interface.interface_name.as_str());
        found.push((no_route, address.is_ipv6(), alone, address));
    }
    found.sort_by_key(|(no_route, v6, alone, _)| (*no_route, *v6, *alone));
    // A machine without any network still runs a cluster of its own.
    Ok(found.first().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |(.., address)| *address))
}

/// Whether a mask leaves one address.
fn is_full(mask: &SockaddrStorage) -> bool {
    let v4 = mask.as_sockaddr_in().map(|m| m.ip().to_bits() == u32::MAX);
    let v6 = mask.as_sockaddr_in6().map(|m| m.ip().to_bits() == u128::MAX);
    v4.or(v6) == Some(true)
}

fn default_route_interface() -> Option<String> {
    let table = fs::read_to_string("/proc/net/route").ok()?;
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let (interface, destination) = (fields.next()?, fields.next()?);
        (destination == "00000000").then(|| interface.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_win_over_remembered_settings_and_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.yaml");
        let options = Options { api_port: Some(7443), node_name: Some("one".to_owned()), ..Options::default() };
        Settings::resolve(&path, options).unwrap().remember(&path).unwrap();
        let again = Settings::resolve(&path, Options::default()).unwrap();
        assert_eq!((again.api_port, again.node_name.as_str()), (7443, "one"));
        assert_eq!(again.dns_ip().unwrap().to_string(), "10.96.0.10");
    }

    #[test]
    fn bad_settings_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.yaml");
        fs::write(&path, "nodeName: x\nnonsense: 1\n").unwrap();
        let error = Settings::resolve(&path, Options::default()).unwrap_err().to_string();
        assert!(error.contains("cluster.yaml") && error.contains("nonsense"), "{error}");
        fs::remove_file(&path).unwrap();
        let overlap = Options { service_cidr: "10.244.1.0/24".parse().ok(), ..Options::default() };
        assert!(Settings::resolve(&path, overlap).unwrap_err().to_string().contains("overlap"));
        let name = Options { node_name: Some("Bad_Name".to_owned()), ..Options::default() };
        assert!(Settings::resolve(&path, name).is_err());
    }
}
