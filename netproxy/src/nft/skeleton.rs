//! The constant ruleset: everything that is not a map element.
//!
//! A new connection meets, in this order: `filter` (source ranges, services without endpoints; before translation),
//! `nat` (one lookup in `services` or `nodeports`, then a chain that picks an endpoint), `sticky` (writes down the
//! client's endpoint where ClientIP affinity is on), `strays` (ports nobody serves on a cluster address), `policy` (what
//! NetworkPolicies let through; after translation, so that it sees both pods). No rule names a service or a policy. Loading
//! the text over an existing table replaces all rules but those of [`raw`] in one transaction and leaves the elements alone.

use std::fmt::Write;

use ipnet::IpNet;

use super::{
    element::{Chain, Element, Family, Key, Map, Value},
    raw,
};
use crate::model::plan;

/// Where the number of an endpoint travels from the chain that draws it to the one that looks it up. Of a connection's first
/// packet alone, and routing sets it anew.
const INDEX: &str = "meta priority";

/// What the rules depend on besides the family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) table: String,
    /// Pod addresses of the whole cluster.
    pub(crate) cluster_cidrs: Vec<IpNet>,
    /// Links whose packets are pods', instead of those addresses; a `*` at the end stands for anything.
    pub(crate) pod_links: Option<String>,
    /// Bit of the mark of packets to be masqueraded.
    pub(crate) masquerade_bit: u8,
    /// Whether connections to services are masqueraded whoever makes them.
    pub(crate) masquerade_all: bool,
    /// Addresses answered by the local DNS, never translated.
    pub(crate) dns: Vec<std::net::IpAddr>,
    /// Node addresses that accept node ports; empty: all.
    pub(crate) node_port_addresses: Vec<IpNet>,
    /// Whether 127.0.0.1 accepts node ports.
    pub(crate) localhost_node_ports: bool,
}

/// How many chains of each kind exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chains {
    /// Picking chains exist for 1 to this many endpoints.
    pub(crate) picks: u32,
    /// Affinity timeouts, sorted.
    pub(crate) timeouts: Vec<u32>,
}

impl Chains {
    /// Enough for most clusters, so that they never need more.
    pub(crate) const START: u32 = 32;

    /// Grows to hold what is needed; false when nothing changed.
    pub(crate) fn grow(&mut self, picks: u32, timeouts: &[u32]) -> bool {
        let before = self.clone();
        if picks > self.picks {
            self.picks = picks.next_power_of_two();
        }
        self.timeouts.extend_from_slice(timeouts);
        self.timeouts.sort_unstable();
        self.timeouts.dedup();
        *self != before
    }

    /// Elements that lead from numbers to chains: those that `other` has not.
    pub(crate) fn entries(&self, other: &Self, family: Family) -> Vec<Element> {
        let kinds =
            [Chain::Pick, Chain::MasqueradePick, Chain::LocalPick, Chain::NodePortPick, Chain::NodePortLocalPick];
        let picks = (other.picks + 1..=self.picks).flat_map(|n| kinds.map(|kind| kind(n)));
        let timeouts = self.timeouts.iter().filter(|t| !other.timeouts.contains(t)).map(|t| Chain::Remember(*t));
        let fixed = [Chain::ExternalLocal, Chain::NodePortLocal, Chain::Reject, Chain::Drop, Chain::DropExternal];
        let fixed = fixed.into_iter().filter(|_| other.picks == 0);
        picks.chain(timeouts).chain(fixed).flat_map(|chain| chain.entries(family)).collect()
    }

    pub(crate) const NONE: Self = Self { picks: 0, timeouts: Vec::new() };
}

impl Default for Chains {
    fn default() -> Self {
        Self { picks: Self::START, timeouts: vec![10_800] }
    }
}

struct Text<'a> {
    out: String,
    family: Family,
    settings: &'a Settings,
}

/// The whole text for one family, in place of the rules of the chains that exist.
pub(crate) fn render(family: Family, settings: &Settings, chains: &Chains, existing: &[String]) -> String {
    let mut text = Text { out: String::new(), family, settings };
    let table = format!("table {} {}", family.nft(), settings.table);
    text.line(0, &format!("{table} {{"));
    text.maps();
    text.line(0, "}");
    for chain in existing.iter().filter(|c| !raw::owns(c)) {
        text.line(0, &format!("flush chain {} {} {chain}", family.nft(), settings.table));
    }
    text.line(0, &format!("{table} {{"));
    text.primer();
    raw::finders().for_each(|chain| text.chain(chain, &[]));
    text.refusals();
    text.translations();
    for n in 1..=chains.picks {
        text.picks(n);
    }
    for seconds in &chains.timeouts {
        text.chain(&Chain::Remember(*seconds).to_string(), &[]);
    }
    text.policies();
    text.dispatch();
    text.network_policy();
    text.hooks();
    text.line(0, "}");
    text.out
}

/// Only further chains, for a table that is loaded already.
pub(crate) fn render_more(family: Family, settings: &Settings, old: &Chains, new: &Chains) -> String {
    let mut text = Text { out: String::new(), family, settings };
    text.line(0, &format!("table {} {} {{", family.nft(), settings.table));
    for n in old.picks + 1..=new.picks {
        text.picks(n);
    }
    for seconds in new.timeouts.iter().filter(|t| !old.timeouts.contains(t)) {
        text.chain(&Chain::Remember(*seconds).to_string(), &[]);
    }
    text.line(0, "}");
    text.out
}

/// Text that replaces a table whose maps have another shape, elements included, in one transaction.
pub(crate) fn render_replacement(family: Family, settings: &Settings, chains: &Chains, elements: &[Element]) -> String {
    let name = format!("{} {}", family.nft(), settings.table);
    let mut out = format!("table {name} {{\n}}\ndelete table {name}\n");
    out.push_str(&render(family, settings, chains, &[]));
    for element in elements.iter().filter(|e| e.family == family) {
        let _ = writeln!(out, "add element {name} {} {{ {} }}", element.map.name(), spell(element));
    }
    out
}

fn spell(element: &Element) -> String {
    let shape = shape(element.map);
    let key = match element.value {
        Value::Until(end) => {
            let (first, last) =
                (spell_fields(element.family, shape, &element.key), spell_fields(element.family, shape, &end));
            let both = first.into_iter().zip(last);
            both.map(|(a, b)| if a == b { a } else { format!("{a}-{b}") }).collect::<Vec<_>>().join(" . ")
        }
        _ => spell_fields(element.family, shape, &element.key).join(" . "),
    };
    match element.value {
        Value::Goto(chain) if element.map.is_numbered() => format!("{key} : {}", chain.number()),
        Value::Goto(chain) => format!("{key} : goto {chain}"),
        Value::Backend(to) => format!("{key} : {}", spell_fields(element.family, "ap", &to).join(" . ")),
        Value::Member | Value::Until(_) | Value::Foreign => key,
    }
}

/// Fields of a map's key: address, transport protocol, port, index, mark.
pub(crate) fn shape(map: Map) -> &'static str {
    match map {
        Map::Services | Map::ExternalCluster | Map::ExternalLocal | Map::Unavailable | Map::Affine | Map::Firewall => {
            "atp"
        }
        Map::NodePorts | Map::NodePortCluster | Map::NodePortLocal | Map::NodePortUnavailable | Map::NodePortAffine => {
            "tp"
        }
        Map::NatChains | Map::PickChains | Map::FilterChains => "m",
        Map::Endpoints => "atpi",
        Map::NodePortEndpoints => "tpi",
        Map::Allowed => "atpa",
        Map::Hairpin => "aa",
        Map::ClusterIps | Map::IngressIsolated | Map::EgressIsolated => "a",
        Map::IngressPeer | Map::EgressPeer => "aa",
        Map::IngressPort | Map::EgressPort => "atp",
        Map::IngressPeerPort | Map::EgressPeerPort | Map::IngressNet | Map::EgressNet => "aatp",
    }
}

/// Writes a key as people read it.
pub(crate) fn spell_fields(family: Family, shape: &str, key: &Key) -> Vec<String> {
    let mut rest = key.bytes();
    let mut take = |n: usize| {
        let (field, tail) = rest.split_at(n.min(rest.len()));
        rest = tail;
        field
    };
    let field = |kind: char| match (kind, family) {
        ('a', Family::V4) => <[u8; 4]>::try_from(take(4)).map(|b| std::net::Ipv4Addr::from(b).to_string()),
        ('a', Family::V6) => <[u8; 16]>::try_from(take(16)).map(|b| std::net::Ipv6Addr::from(b).to_string()),
        ('t', _) => <[u8; 4]>::try_from(take(4)).map(|b| b[0].to_string()),
        ('p', _) => <[u8; 4]>::try_from(take(4)).map(|b| u16::from_be_bytes([b[0], b[1]]).to_string()),
        // As nft spells priorities.
        ('i', _) => <[u8; 4]>::try_from(take(4)).map(|b| {
            let index = u32::from_ne_bytes(b);
            format!("{:x}:{:x}", index >> 16, index & 0xffff)
        }),
        _ => <[u8; 4]>::try_from(take(4)).map(|b| u32::from_ne_bytes(b).to_string()),
    };
    shape.chars().map(field).map(|f| f.unwrap_or_else(|_| "?".into())).collect()
}

fn set_of(nets: impl Iterator<Item = IpNet>) -> Option<String> {
    let list: Vec<String> = nets.map(|n| n.to_string()).collect();
    match list.as_slice() {
        [] => None,
        [one] => Some(one.clone()),
        many => Some(format!("{{ {} }}", many.join(", "))),
    }
}

impl Text<'_> {
    fn line(&mut self, depth: usize, text: &str) {
        self.out.extend(std::iter::repeat_n('\t', depth));
        self.out.push_str(text);
        self.out.push('\n');
    }

    fn chain(&mut self, name: &str, rules: &[String]) {
        self.line(1, &format!("chain {name} {{"));
        rules.iter().for_each(|r| self.line(2, r));
        self.line(1, "}");
    }

    /// `ip` or `ip6` in front of a header field.
    fn ip(&self, field: &str) -> String {
        format!("{} {field}", self.family.nft())
    }

    fn key(&self) -> String {
        format!("{} . meta l4proto . th dport", self.ip("daddr"))
    }

    /// Condition of packets from pods; or, with `!= `, of all others.
    fn pods(&self, not: &str) -> Option<String> {
        if let Some(links) = &self.settings.pod_links {
            return Some(format!("iifname {not}\"{links}\""));
        }
        let family = self.family;
        let own = self.settings.cluster_cidrs.iter().copied().filter(move |n| Family::of(&n.addr()) == family);
        set_of(own).map(|c| format!("{} {not}{c}", self.ip("saddr")))
    }

    /// The mark of packets to be masqueraded.
    fn mark(&self) -> String {
        format!("{:#x}", 1u32 << self.settings.masquerade_bit)
    }

    fn maps(&mut self) {
        let address = if self.family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
        let daddr = self.ip("daddr");
        // Declared by example. `th dport` would do for a first load, but nft 1.0.6 cannot read such a declaration back
        // from the kernel.
        let example = [daddr.as_str(), "meta l4proto", "tcp dport", INDEX];
        let named = [address, "inet_proto", "inet_service", "mark"];
        let spell = |map: &Map, words: [&str; 4]| -> String {
            let word = |kind: char| words["atp".find(kind).unwrap_or(3)];
            shape(*map).chars().map(word).collect::<Vec<_>>().join(" . ")
        };
        let mut lines = Vec::new();
        for map in Map::ALL {
            let name = map.name();
            lines.push(match map {
                Map::Allowed | Map::IngressNet | Map::EgressNet => {
                    format!("set {name} {{ type {}; flags interval; }}", spell(map, named))
                }
                Map::Endpoints | Map::NodePortEndpoints => {
                    format!("map {name} {{ typeof {} : {daddr} . tcp dport; }}", spell(map, example))
                }
                _ if map.is_set() => format!("set {name} {{ type {}; }}", spell(map, named)),
                _ if map.is_numbered() => format!("map {name} {{ type {} : mark; }}", spell(map, named)),
                _ => format!("map {name} {{ type {} : verdict; }}", spell(map, named)),
            });
        }
        lines.push(format!(
            "map affinity {{ type {address} . {address} . inet_proto . inet_service : {address} . inet_service; \
             size 1048576; flags dynamic,timeout; timeout 3h; }}"
        ));
        lines.iter().for_each(|l| self.line(1, l));
    }

    /// A chain nobody goes to, which has to come first: in the first rule of a text that uses a map declared by the
    /// example of `tcp dport`, nft 1.0.6 matches TCP only.
    fn primer(&mut self) {
        let (family, key) = (self.family.nft(), self.key());
        let rule = |key: &str, map: &str| format!("dnat {family} to {key} . {INDEX} map @{map}");
        self.chain("primer", &[rule(&key, "endpoints"), rule("meta l4proto . th dport", "np_endpoints")]);
    }

    fn refusals(&mut self) {
        let unreachable = match self.family {
            Family::V4 => "reject with icmp port-unreachable",
            Family::V6 => "reject with icmpv6 port-unreachable",
        };
        self.chain("refuse", &["meta l4proto tcp reject with tcp reset".into(), unreachable.into()]);
        self.chain("discard", &["drop".into()]);
        let mut rules: Vec<String> = self.pods("").map(|pods| format!("{pods} return")).into_iter().collect();
        rules.extend(["fib saddr type local return".into(), "drop".into()]);
        self.chain("discard_external", &rules);
        let allowed = format!("{} . {} @fw_allow return", self.key(), self.ip("saddr"));
        self.chain("firewall_check", &[allowed, "drop".into()]);
    }

    /// Draws among `n` endpoints. Whenever a chain that uses a map is loaded, the kernel walks the map: these chains do
    /// not, they leave what they have drawn in the packet's priority to the one chain that looks it up.
    fn picks(&mut self, n: u32) {
        let mark = format!("meta mark set meta mark or {}", self.mark());
        let any = |then: &str| format!("{INDEX} set numgen random mod {n} goto {then}");
        let local = |then: &str| format!("{INDEX} set numgen random mod {n} offset {} goto {then}", plan::LOCAL_BASE);
        let mut outside: Vec<String> = match self.pods("!= ") {
            _ if self.settings.masquerade_all => vec![mark.clone()],
            others => others.map(|others| format!("{others} {mark}")).into_iter().collect(),
        };
        outside.push(any("to_endpoint"));
        self.chain(&format!("pick_{n}"), &outside);
        self.chain(&format!("mpick_{n}"), &[mark.clone(), any("to_endpoint")]);
        self.chain(&format!("lpick_{n}"), &[local("to_endpoint")]);
        self.chain(&format!("np_pick_{n}"), &[mark, any("to_np_endpoint")]);
        self.chain(&format!("np_lpick_{n}"), &[local("to_np_endpoint")]);
    }

    /// Translates to the endpoint a client sticks to, else to the one that was drawn.
    fn translations(&mut self) {
        let (family, saddr, key) = (self.family.nft(), self.ip("saddr"), self.key());
        let sticky = format!("dnat {family} to {saddr} . {key} map @affinity");
        let drawn = |key: &str, map: &str| format!("dnat {family} to {key} . {INDEX} map @{map}");
        self.chain("to_endpoint", &[sticky.clone(), drawn(&key, "endpoints")]);
        self.chain("to_np_endpoint", &[sticky, drawn("meta l4proto . th dport", "np_endpoints")]);
    }

    fn policies(&mut self) {
        let pods = self.pods("");
        for (name, inside, outside) in [
            ("ext_local_policy", "to_ext_cluster", "to_ext_local"),
            ("np_local_policy", "to_np_cluster", "to_np_local"),
        ] {
            let mut rules: Vec<String> = pods.iter().map(|pods| format!("{pods} goto {inside}")).collect();
            rules.push(format!("fib saddr type local goto {inside}"));
            rules.push(format!("goto {outside}"));
            self.chain(name, &rules);
        }
    }

    /// Condition of packets to a node's own address.
    fn to_node(&self) -> String {
        let family = self.family;
        let daddr = self.ip("daddr");
        let chosen =
            set_of(self.settings.node_port_addresses.iter().copied().filter(|n| Family::of(&n.addr()) == family));
        let loopback = match (family, self.settings.localhost_node_ports) {
            (Family::V4, false) => format!("{daddr} != 127.0.0.0/8 "),
            (Family::V4, true) => String::new(),
            (Family::V6, _) => format!("{daddr} != ::1 "),
        };
        let chosen = chosen.map(|c| format!("{daddr} {c} ")).unwrap_or_default();
        format!("{loopback}{chosen}fib daddr type local")
    }

    fn own_dns(&self, verdict: &str) -> Vec<String> {
        let family = self.family;
        let own = self.settings.dns.iter().filter(|a| Family::of(a) == family);
        own.map(|a| format!("{} {a} {verdict}", self.ip("daddr"))).collect()
    }

    fn dispatch(&mut self) {
        let (key, to_node) = (self.key(), self.to_node());
        let mut filter = self.own_dns("return");
        filter.push(format!("{key} @firewall jump firewall_check"));
        filter.push("jump refuse_service".into());
        filter.push(format!("{to_node} goto refuse_nodeport"));
        self.chain("filter", &filter);
        let mut nat = self.own_dns("return");
        nat.push("jump to_service".into());
        nat.push(format!("{to_node} goto to_nodeport"));
        self.chain("nat", &nat);
        let ip = self.family.nft();
        let elsewhere = format!("ct original {ip} daddr != @cluster_ips goto remember_nodeport");
        self.chain("sticky", &["jump remember_service".into(), elsewhere]);
        let mut strays = self.own_dns("return");
        strays.push(format!("{} @cluster_ips goto refuse", self.ip("daddr")));
        self.chain("strays", &strays);
    }

    /// One chain per direction: out of the sender, into the receiver.
    fn network_policy(&mut self) {
        let (saddr, daddr) = (self.ip("saddr"), self.ip("daddr"));
        let port = "meta l4proto . th dport";
        for (prefix, pod, peer) in [("out", &saddr, &daddr), ("in", &daddr, &saddr)] {
            let rules = [
                format!("{pod} . {peer} @{prefix}_peer return"),
                format!("{pod} . {port} @{prefix}_port return"),
                format!("{pod} . {peer} . {port} @{prefix}_peer_port return"),
                format!("{pod} . {peer} . {port} @{prefix}_net return"),
                "drop".into(),
            ];
            self.chain(&format!("{prefix}_policy"), &rules);
        }
        let rules = [("out", &saddr), ("in", &daddr)].map(|(p, pod)| format!("{pod} @{p}_isolated jump {p}_policy"));
        self.chain("network_policy", &rules);
    }

    /// Queries to this node's own DNS leave no trace in conntrack: a busy cluster's would fill it.
    fn untracked(&mut self) {
        let family = self.family;
        let own = self.settings.dns.iter().filter(|a| Family::of(a) == family);
        let rule = |address: &str, a, port| format!("{address} {a} udp {port} 53 notrack");
        let queries: Vec<String> = own.clone().map(|a| rule(&self.ip("daddr"), a, "dport")).collect();
        let answers: Vec<String> = own.map(|a| rule(&self.ip("saddr"), a, "sport")).collect();
        if !queries.is_empty() {
            let hook = |hook: &str| vec![format!("type filter hook {hook} priority -300;")];
            self.chain("untracked-prerouting", &[hook("prerouting"), queries.clone()].concat());
            self.chain("untracked-output", &[hook("output"), queries, answers].concat());
        }
    }

    fn hooks(&mut self) {
        let hook = |kind: &str, hook: &str, priority: i32| format!("type {kind} hook {hook} priority {priority};");
        let guard = "iifname != \"lo\" ip daddr 127.0.0.0/8 drop".to_owned();
        let guard = (self.family == Family::V4 && self.settings.localhost_node_ports).then_some(guard);
        self.untracked();
        let filter = "ct state new jump filter".to_owned();
        let mut first = vec![hook("filter", "prerouting", -110)];
        first.extend(guard);
        first.push(filter.clone());
        self.chain("filter-prerouting", &first);
        self.chain("filter-output", &[hook("filter", "output", -110), filter]);
        self.chain("nat-prerouting", &[hook("nat", "prerouting", -100), "jump nat".into()]);
        self.chain("nat-output", &[hook("nat", "output", -100), "jump nat".into()]);
        let sticky = "ct state new ct status dnat jump sticky".to_owned();
        self.chain("sticky-prerouting", &[hook("filter", "prerouting", -95), sticky.clone()]);
        self.chain("sticky-output", &[hook("filter", "output", -95), sticky]);
        let strays = "ct state new jump strays".to_owned();
        self.chain("strays-forward", &[hook("filter", "forward", 0), strays.clone()]);
        self.chain("strays-output", &[hook("filter", "output", 0), strays]);
        let answers = "ct state established,related accept".to_owned();
        self.chain("policy-forward", &[hook("filter", "forward", 10), answers, "jump network_policy".into()]);
        let (saddr, daddr, mark) = (self.ip("saddr"), self.ip("daddr"), self.mark());
        self.chain(
            "nat-postrouting",
            &[
                hook("nat", "postrouting", 100),
                format!("meta mark & {mark} != 0 meta mark set meta mark xor {mark} masquerade fully-random"),
                format!("ct status dnat {saddr} . {daddr} @hairpin masquerade fully-random"),
            ],
        );
    }
}
