//! Other people's firewalls. In nftables a packet has to get through every table, so a chain of somebody else that drops
//! what it does not know (policy DROP, as Docker and ufw set it by iptables) would keep pods from each other.
//!
//! In such chains of iptables pods' packets are accepted first: in FORWARD what is sent from and to pods, as other pod networks
//! do it; in INPUT only what pods need of their node: answers, what was translated (a Service whose endpoint is the node,
//! as the API server's), cluster DNS, and in IPv6 the talk of neighbours. What else a pod may reach of its node is the
//! administrator's to say. Chains that accept by themselves are left alone, no chain is ever made,
//! and of tables that are not iptables' it is only said that they are in the way.

use std::{
    io,
    process::{Command, Output, Stdio},
};

use ipnet::IpNet;
use serde_json::Value;

use super::rules::Settings;

/// Why somebody else's chains could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("run {0}")]
    Run(&'static str, #[source] io::Error),
    #[error("{0} failed: {1}")]
    Failed(&'static str, String),
    #[error("read what nft lists")]
    Json(#[source] serde_json::Error),
}

/// A chain of somebody else that packets to or past this node meet.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    family: String,
    table: String,
    name: String,
    /// Whether it drops what none of its rules accepts.
    drops: bool,
}

impl Chain {
    /// The program that may change it.
    fn program(&self) -> Option<&'static str> {
        match (&*self.family, &*self.table, &*self.name) {
            ("ip", "filter", "FORWARD" | "INPUT") => Some("iptables"),
            ("ip6", "filter", "FORWARD" | "INPUT") => Some("ip6tables"),
            _ => None,
        }
    }

    /// The rules that pods need in it.
    fn rules(&self, settings: &Settings) -> Vec<Vec<String>> {
        let v6 = self.family == "ip6";
        let accept = |what: &str| -> Vec<String> {
            let end = ["-m", "comment", "--comment", &settings.table, "-j", "ACCEPT"];
            what.split(' ').chain(end).map(str::to_owned).collect()
        };
        let of_family = |nets: &[IpNet]| -> Vec<String> {
            nets.iter().filter(|n| n.addr().is_ipv6() == v6).map(ToString::to_string).collect()
        };
        if self.name != "INPUT" {
            let nets = of_family(&settings.cluster).into_iter();
            return nets.flat_map(|net| [accept(&format!("-s {net}")), accept(&format!("-d {net}"))]).collect();
        }
        let bridge = &settings.bridge;
        let mut rules = vec![accept(&format!("-i {bridge} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT"))];
        // Of Services' addresses only that of DNS is the node's own.
        for net in of_family(&settings.services) {
            rules.extend(["udp", "tcp"].map(|p| accept(&format!("-i {bridge} -d {net} -p {p} --dport 53"))));
        }
        if v6 {
            rules.push(accept(&format!("-i {bridge} -p ipv6-icmp")));
        }
        rules
    }
}

/// What there is.
struct Seen {
    /// Whether our own table is there.
    own: bool,
    chains: Vec<Chain>,
}

fn run(program: &'static str, words: &[&str]) -> Result<Output, Error> {
    Command::new(program).args(words).stdin(Stdio::null()).output().map_err(|e| Error::Run(program, e))
}

fn failed(program: &'static str, output: &Output) -> Error {
    Error::Failed(program, String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "))
}

fn look(own: &str) -> Result<Seen, Error> {
    let output = run("nft", &["-j", "list", "chains"])?;
    if !output.status.success() {
        return Err(failed("nft", &output));
    }
    Ok(read(own, &serde_json::from_slice(&output.stdout).map_err(Error::Json)?))
}

fn read(own: &str, listing: &Value) -> Seen {
    let mut seen = Seen { own: false, chains: Vec::new() };
    for chain in listing["nftables"].as_array().into_iter().flatten().map(|item| &item["chain"]) {
        let text = |key: &str| chain[key].as_str().unwrap_or_default().to_owned();
        seen.own |= chain["table"] == own;
        if matches!(chain["hook"].as_str(), Some("forward" | "input")) && chain["table"] != own {
            let drops = chain["policy"] == "drop";
            seen.chains.push(Chain { family: text("family"), table: text("table"), name: text("name"), drops });
        }
    }
    seen
}

/// By the program for nftables: of that name alone there may be one for what the kernel had before.
fn change(program: &'static str, verb: &str, chain: &Chain, rule: &[String]) -> Result<Output, Error> {
    let words: Vec<&str> = ["-w", verb, &chain.name].into_iter().chain(rule.iter().map(String::as_str)).collect();
    let of_nftables = if program == "ip6tables" { "ip6tables-nft" } else { "iptables-nft" };
    match run(of_nftables, &words) {
        Err(Error::Run(_, e)) if e.kind() == io::ErrorKind::NotFound => run(program, &words),
        other => other,
    }
}

/// Lets pods' packets through; tells whether our own table is there.
pub(crate) fn pass(settings: &Settings) -> Result<bool, Error> {
    let seen = look(&settings.table)?;
    for chain in seen.chains.iter().filter(|c| c.drops) {
        let Some(program) = chain.program() else {
            tracing::warn!(?chain, "somebody else's chain drops what it does not know: it has to accept pods' packets");
            continue;
        };
        for rule in chain.rules(settings) {
            if change(program, "-C", chain, &rule)?.status.success() {
                continue;
            }
            let output = change(program, "-I", chain, &rule)?;
            if !output.status.success() {
                return Err(failed(program, &output));
            }
            tracing::info!(program, chain = chain.name, rule = rule.join(" "), "pods pass somebody else's firewall");
        }
    }
    Ok(seen.own)
}

/// Takes our rules out of other people's chains, also of those that accept by themselves now.
pub(crate) fn leave(settings: &Settings) -> Result<(), Error> {
    for chain in &look(&settings.table)?.chains {
        let Some(program) = chain.program() else { continue };
        for rule in chain.rules(settings) {
            // One that is not there is no failure.
            change(program, "-D", chain, &rule)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_chains_of_iptables_are_changed() {
        let chain = |family: &str, table: &str, name: &str, hook: &str, policy: &str| json!({"chain": {"family": family, "table": table, "name": name, "hook": hook, "policy": policy}});
        let listing = json!({"nftables": [
            {"metainfo": {}},
            chain("ip", "own", "gone-forward", "forward", "accept"),
            chain("ip", "filter", "FORWARD", "forward", "drop"),
            chain("ip6", "filter", "INPUT", "input", "drop"),
            chain("ip", "filter", "OUTPUT", "output", "drop"),
            chain("ip", "filter", "INPUT", "input", "accept"),
            chain("inet", "fw", "forward", "forward", "drop"),
            {"chain": {"family": "ip", "table": "filter", "name": "DOCKER"}},
        ]});
        let seen = read("own", &listing);
        assert!(seen.own && !read("other", &listing).chains.is_empty());
        let found: Vec<_> = seen.chains.iter().map(|c| (&*c.name, c.program(), c.drops)).collect();
        let wanted = [
            ("FORWARD", Some("iptables"), true),
            ("INPUT", Some("ip6tables"), true),
            ("INPUT", Some("iptables"), false),
            ("forward", None, true),
        ];
        assert_eq!(found, wanted);
        let settings = Settings {
            table: "own".into(),
            bridge: "br".into(),
            cluster: vec!["10.244.0.0/16".parse().unwrap(), "2001:db8::/48".parse().unwrap()],
            services: vec!["10.96.0.0/16".parse().unwrap()],
            pods: Vec::new(),
        };
        let text = |n: usize| seen.chains[n].rules(&settings).iter().map(|r| r.join(" ")).collect::<Vec<_>>();
        let comment = "-m comment --comment own -j ACCEPT";
        assert_eq!(text(0), [format!("-s 10.244.0.0/16 {comment}"), format!("-d 10.244.0.0/16 {comment}")]);
        let answers = format!("-i br -m conntrack --ctstate RELATED,ESTABLISHED,DNAT {comment}");
        assert_eq!(text(1), [answers.clone(), format!("-i br -p ipv6-icmp {comment}")]);
        let dns = ["udp", "tcp"].map(|p| format!("-i br -d 10.96.0.0/16 -p {p} --dport 53 {comment}"));
        assert_eq!(text(2), [&[answers][..], &dns].concat());
    }
}
