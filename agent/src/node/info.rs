//! Facts of this machine: capacity, allocatable, addresses, nodeInfo.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
};

use k8s_openapi::{
    api::core::v1::{NodeSwapStatus, NodeSystemInfo},
    apimachinery::pkg::api::resource::Quantity,
};

use crate::{
    config::{Config, KubeletConfiguration},
    context::Machine,
    quantity,
    spec::{field::Allocatable, files::Resolver},
    topology::{machine::huge_pages, settings},
};

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_string()
}

/// A line of /proc/meminfo in bytes.
pub(crate) fn meminfo(key: &str) -> i64 {
    let all = text("/proc/meminfo");
    let line = all.lines().find(|l| l.starts_with(key) && l[key.len()..].starts_with(':'));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<i64>().ok()).unwrap_or(0) * 1024
}

/// Bytes in use in a sense that counts for eviction: total minus available.
pub(crate) fn memory_available() -> i64 {
    meminfo("MemAvailable")
}

/// Size, free bytes, inodes, free inodes of the file system at `path`.
pub(crate) fn disk(path: &Path) -> Option<(u64, u64, u64, u64)> {
    let s = rustix::fs::statvfs(path).ok()?;
    Some((s.f_blocks * s.f_frsize, s.f_bavail * s.f_frsize, s.f_files, s.f_ffree))
}

/// An eviction threshold as written, in units of `capacity`: a percentage of it or a quantity.
pub(crate) fn amount(text: &str, capacity: i64) -> i64 {
    match text.strip_suffix('%').and_then(|p| p.parse::<f64>().ok()) {
        Some(percent) => (capacity as f64 * percent / 100.0) as i64,
        None => quantity::milli(text).map_or(0, |m| i64::try_from(m / 1000).unwrap_or(0)),
    }
}

/// The threshold of a signal; nothing without one.
fn threshold(of: &BTreeMap<String, String>, signal: &str, capacity: i64) -> i64 {
    of.get(signal).map_or(0, |text| amount(text, capacity))
}

/// Thousandths of a resource that daemons and the system have for themselves.
pub(crate) fn reserved(k: &KubeletConfiguration, resource: &str) -> i64 {
    let of = |m: &BTreeMap<String, String>| m.get(resource).and_then(|q| quantity::milli(q)).unwrap_or(0);
    let named = settings::reserved_cpus(k).unwrap_or_default().len();
    if resource == "cpu" && named > 0 {
        // As upstream: CPUs that are named say how much is reserved, whatever else does.
        return i64::try_from(named).unwrap_or(0) * 1000;
    }
    i64::try_from(of(&k.kube_reserved) + of(&k.system_reserved)).unwrap_or(0)
}

/// Thousandths of a resource that the node has and pods do not get.
pub(crate) fn left_out(k: &KubeletConfiguration, m: &Machine, resource: &str) -> i64 {
    let eviction = if resource == "memory" { threshold(&k.eviction_hard, "memory.available", m.memory) } else { 0 };
    reserved(k, resource) + eviction * 1000
}

/// The address other nodes reach this one at: the given one, or that of the route to the API server.
fn node_ip(config: &Config) -> Vec<IpAddr> {
    if let Some(ip) = config.node_ip {
        return vec![ip];
    }
    // Connecting a datagram socket sends nothing; it only picks a source address.
    for probe in ["192.0.2.1:9", "[2001:db8::1]:9"] {
        let Ok(target) = probe.parse::<SocketAddr>() else { continue };
        let any: SocketAddr = if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let found = UdpSocket::bind(any).and_then(|s| s.connect(target).and_then(|()| s.local_addr()));
        if let Ok(address) = found
            && !address.ip().is_unspecified()
        {
            return vec![address.ip()];
        }
    }
    // No default route: the first address of a link that is up and not the loopback.
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let found = all.filter_map(|i| {
        let a = i.address?;
        a.as_sockaddr_in().map(|s| IpAddr::V4(s.ip()))
    });
    found.filter(|ip| !ip.is_loopback()).take(1).collect()
}

/// Looks at the machine.
pub(crate) fn machine(config: &Config) -> Machine {
    let k = &config.kubelet;
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let memory = meminfo("MemTotal");
    fs::create_dir_all(config.paths.state()).ok();
    let storage = disk(&config.paths.state()).map_or(0, |d| i64::try_from(d.0).unwrap_or(0));
    let allocatable = Allocatable {
        cpu_milli: (i64::from(cpus) * 1000 - reserved(k, "cpu")).max(0),
        memory: (memory - reserved(k, "memory") / 1000 - threshold(&k.eviction_hard, "memory.available", memory))
            .max(0),
        storage: (storage
            - reserved(k, "ephemeral-storage") / 1000
            - threshold(&k.eviction_hard, "nodefs.available", storage))
        .max(0),
    };
    let resolver = Resolver::parse(&fs::read_to_string(&k.resolv_conf).unwrap_or_default());
    Machine { ips: node_ip(config), cpus, memory, swap: meminfo("SwapTotal"), allocatable, resolver }
}

/// Most pods on this node.
pub(crate) fn max_pods(k: &KubeletConfiguration, cpus: u32) -> u32 {
    if k.pods_per_core > 0 { k.max_pods.min(k.pods_per_core * cpus) } else { k.max_pods }
}

/// Capacity and allocatable as the API writes them.
pub(crate) fn resources(config: &Config, m: &Machine) -> (BTreeMap<String, Quantity>, BTreeMap<String, Quantity>) {
    let storage = disk(&config.paths.state()).map_or(0, |d| d.0);
    let pods = max_pods(&config.kubelet, m.cpus).to_string();
    let cpu = |milli: i64| if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") };
    let ki = |bytes: i64| format!("{}Ki", bytes / 1024);
    let mut capacity = BTreeMap::new();
    let mut allocatable = BTreeMap::new();
    let mut put = |name: &str, c: String, a: String| {
        capacity.insert(name.to_string(), Quantity(c));
        allocatable.insert(name.to_string(), Quantity(a));
    };
    put("cpu", cpu(i64::from(m.cpus) * 1000), cpu(m.allocatable.cpu_milli));
    put("memory", ki(m.memory), ki(m.allocatable.memory));
    put("ephemeral-storage", ki(storage as i64), m.allocatable.storage.to_string());
    put("pods", pods.clone(), pods);
    for entry in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(kb) = name.strip_prefix("hugepages-").and_then(|n| n.strip_suffix("kB")?.parse::<u64>().ok()) else {
            continue;
        };
        let count: u64 = text(&entry.path().join("nr_hugepages").to_string_lossy()).parse().unwrap_or(0);
        let bytes = count * kb * 1024;
        let amount = if bytes == 0 { "0".to_string() } else { format!("{}Ki", bytes / 1024) };
        put(&huge_pages(kb), amount.clone(), amount);
    }
    (capacity, allocatable)
}

/// The kernel's name for this architecture as Go says it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `status.nodeInfo`.
pub(crate) fn system_info() -> NodeSystemInfo {
    let release = text("/etc/os-release");
    let pretty = release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux").trim_matches('"');
    let machine_id = Some(text("/etc/machine-id")).filter(|m| !m.is_empty());
    let uuid = Some(text("/sys/class/dmi/id/product_uuid")).filter(|u| !u.is_empty());
    let swap = meminfo("SwapTotal");
    NodeSystemInfo {
        architecture: architecture().into(),
        boot_id: text("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: "isopod://0.1.0".into(),
        kernel_version: text("/proc/sys/kernel/osrelease"),
        kube_proxy_version: String::new(),
        kubelet_version: "v1.36.2".into(),
        operating_system: "linux".into(),
        os_image: pretty.into(),
        system_uuid: uuid.clone().or_else(|| machine_id.clone()).unwrap_or_default(),
        machine_id: machine_id.or(uuid).unwrap_or_default(),
        swap: (swap > 0).then_some(NodeSwapStatus { capacity: Some(swap) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_amounts_or_percentages() {
        let of: BTreeMap<String, String> =
            [("a", "10%"), ("b", "100Mi")].map(|(k, v)| (k.to_string(), v.to_string())).into();
        assert_eq!(threshold(&of, "a", 1000), 100);
        assert_eq!(threshold(&of, "b", 1000), 100 << 20);
        assert_eq!(threshold(&of, "c", 1000), 0);
    }
}
