//! The pod network's own nftables table: host ports, and masquerading of what leaves the cluster.
//!
//! Rules are constant; host ports are elements of two maps, written whole and atomically from the pods' records. Chains
//! run one step before the service proxy's: a host port beats a node port, as with every other network plugin.
//!
//! What is sent to a pod that is gone is refused at once: without that a client waits for retransmissions that nobody
//! will ever answer. An address is in the set `gone` from before its link goes, for some seconds or until it is given out
//! again.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    process::{Command, Stdio},
};

use ipnet::IpNet;

use super::{Protocol, records::Record};

/// Why the table could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("nft not found: apt-get install nftables")]
    NoNft,
    #[error("run nft")]
    Run(#[source] io::Error),
    #[error("nft refused the rules: {0}")]
    Refused(String),
}

/// What the rules depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) table: String,
    pub(crate) bridge: String,
    pub(crate) cluster: Vec<IpNet>,
    pub(crate) services: Vec<IpNet>,
    /// This node's pods.
    pub(crate) pods: Vec<IpNet>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn holds(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    fn set(self, nets: &[IpNet]) -> Option<String> {
        let list: Vec<String> = nets.iter().filter(|n| self.holds(&n.addr())).map(ToString::to_string).collect();
        (!list.is_empty()).then(|| format!("{{ {} }}", list.join(", ")))
    }
}

fn families() -> Vec<Family> {
    let v6 = std::fs::exists("/proc/thread-self/net/if_inet6").unwrap_or(false);
    if v6 { vec![Family::V4, Family::V6] } else { vec![Family::V4] }
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

fn render(family: Family, settings: &Settings, records: &[Record], gone: &[IpAddr]) -> String {
    let (ip, bridge) = (family.nft(), &settings.bridge);
    let address = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
    let table = format!("{ip} {}", settings.table);
    let not_services = family.set(&settings.services).map(|s| format!("{ip} daddr != {s} ")).unwrap_or_default();
    let guard = match family {
        Family::V4 => "iifname != \"lo\" ip daddr 127.0.0.0/8 drop",
        Family::V6 => "iifname != \"lo\" ip6 daddr ::1 drop",
    };
    let seconds = super::gone::WHILE.as_secs();
    let unreachable = match family {
        Family::V4 => "reject with icmp host-unreachable",
        Family::V6 => "reject with icmpv6 addr-unreachable",
    };
    let localhost = match family {
        Family::V4 => format!("oifname \"{bridge}\" ip saddr 127.0.0.0/8 masquerade"),
        Family::V6 => String::new(),
    };
    let leaving = match (family.set(&settings.pods), family.set(&settings.cluster)) {
        (Some(pods), Some(cluster)) => {
            format!("{ip} saddr {pods} {ip} daddr != {cluster} oifname != \"{bridge}\" masquerade fully-random")
        }
        _ => String::new(),
    };
    let mut out = format!(
        "table {table} {{
	map ports {{ type inet_proto . inet_service : {address} . inet_service; }}
	map addressed {{ type {address} . inet_proto . inet_service : {address} . inet_service; }}
	set hairpin {{ type {address} . {address}; }}
	set gone {{ type {address}; flags timeout; timeout {seconds}s; }}
}}
flush table {table}
flush map {table} ports
flush map {table} addressed
flush set {table} hairpin
flush set {table} gone
table {table} {{
	chain host_ports {{
		dnat {ip} to {ip} daddr . meta l4proto . th dport map @addressed
		{not_services}fib daddr type local dnat {ip} to meta l4proto . th dport map @ports
	}}
	chain nobody {{
		meta l4proto tcp reject with tcp reset
		{unreachable}
	}}
	chain guard {{
		type filter hook prerouting priority -300;
		{guard}
	}}
	chain gone-forward {{
		type filter hook forward priority -1;
		{ip} daddr @gone goto nobody
	}}
	chain gone-output {{
		type filter hook output priority -1;
		{ip} daddr @gone goto nobody
	}}
	chain prerouting {{
		type nat hook prerouting priority -101;
		jump host_ports
	}}
	chain output {{
		type nat hook output priority -101;
		jump host_ports
	}}
	chain postrouting {{
		type nat hook postrouting priority 99;
		{localhost}
		ct status dnat {ip} saddr . {ip} daddr @hairpin masquerade
		{leaving}
	}}
}}
"
    );
    elements(&mut out, family, &table, records);
    out.push_str(&burials("add", family, settings, gone));
    out
}

fn burials(verb: &str, family: Family, settings: &Settings, addresses: &[IpAddr]) -> String {
    let list: Vec<String> = addresses.iter().filter(|a| family.holds(a)).map(ToString::to_string).collect();
    if list.is_empty() {
        return String::new();
    }
    format!("{verb} element {} {} gone {{ {} }}\n", family.nft(), settings.table, list.join(", "))
}

/// Changes which addresses are nobody's, in one transaction.
pub(crate) fn bury(settings: &Settings, added: &[IpAddr], removed: &[IpAddr]) -> Result<(), Error> {
    // One whose time is up meanwhile is not there any more: added first, it can be deleted in any case.
    let free = |f| burials("add", f, settings, removed) + &burials("delete", f, settings, removed);
    let text = |f: Family| free(f) + &burials("add", f, settings, added);
    let text: String = families().into_iter().map(text).collect();
    if text.is_empty() { Ok(()) } else { nft(&text) }
}

fn elements(out: &mut String, family: Family, table: &str, records: &[Record]) {
    for record in records.iter().filter(|r| !r.host_ports.is_empty()) {
        let Some(pod) = record.ips.iter().find(|a| family.holds(a)) else { continue };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "add element {table} hairpin {{ {pod} . {pod} }}");
        for port in &record.host_ports {
            let key = format!("{} . {}", protocol(port.protocol), port.host_port);
            let to = format!("{pod} . {}", port.container_port);
            match port.host_ip.filter(|a| !a.is_unspecified()) {
                None => drop(writeln!(out, "add element {table} ports {{ {key} : {to} }}")),
                Some(at) if family.holds(&at) => {
                    let _ = writeln!(out, "add element {table} addressed {{ {at} . {key} : {to} }}");
                }
                Some(_) => {}
            }
        }
    }
}

/// Writes the whole table in one transaction.
pub(crate) fn apply(settings: &Settings, records: &[Record], gone: &[IpAddr]) -> Result<(), Error> {
    nft(&families().into_iter().map(|f| render(f, settings, records, gone)).collect::<String>())
}

/// Removes the table.
pub(crate) fn remove(table: &str) -> Result<(), Error> {
    let text = |f: Family| format!("table {0} {table} {{\n}}\ndelete table {0} {table}\n", f.nft());
    nft(&families().into_iter().map(text).collect::<String>())
}

fn nft(text: &str) -> Result<(), Error> {
    let spawn = |program: &str| {
        let mut command = Command::new(program);
        command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()
    };
    let child = match spawn("nft") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => spawn("/usr/sbin/nft"),
        other => other,
    };
    let mut child =
        child.map_err(|e| if e.kind() == io::ErrorKind::NotFound { Error::NoNft } else { Error::Run(e) })?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stops reading says why on its standard error.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().map_err(Error::Run)?;
    if output.status.success() {
        return Ok(());
    }
    let lines = String::from_utf8_lossy(&output.stderr);
    Err(Error::Refused(lines.lines().filter(|l| !l.trim().is_empty()).take(3).collect::<Vec<_>>().join("; ")))
}
