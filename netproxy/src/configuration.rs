//! `KubeProxyConfiguration`, kube-proxy's own configuration file: every field is honoured, or has nothing to act on here
//! and is accepted, or is refused by its name. None is ignored by mistake: the table names them all.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use isopod_api::duration::parse_duration;
use serde_json::Value;

use crate::Config;

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// What becomes of a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Use {
    Honoured,
    /// There is nothing of the kind here: no periodic sync, no profile, no other mode.
    NoEffect,
    /// Only its default can be had.
    DefaultOnly,
}

use Use::{DefaultOnly, Honoured, NoEffect};

/// Every field; a name that ends in a dot stands for all below it.
const FIELDS: &[(&str, Use)] = &[
    ("apiVersion", Honoured),
    ("kind", Honoured),
    ("bindAddress", Honoured),
    ("bindAddressHardFail", Honoured),
    ("clientConnection.acceptContentTypes", NoEffect),
    ("clientConnection.burst", NoEffect),
    ("clientConnection.contentType", NoEffect),
    ("clientConnection.kubeconfig", Honoured),
    ("clientConnection.qps", NoEffect),
    ("clusterCIDR", Honoured),
    ("configSyncPeriod", NoEffect),
    ("conntrack.maxPerCore", Honoured),
    ("conntrack.min", Honoured),
    ("conntrack.tcpBeLiberal", Honoured),
    ("conntrack.tcpCloseWaitTimeout", Honoured),
    ("conntrack.tcpEstablishedTimeout", Honoured),
    ("conntrack.udpStreamTimeout", Honoured),
    ("conntrack.udpTimeout", Honoured),
    ("detectLocal.bridgeInterface", Honoured),
    ("detectLocal.interfaceNamePrefix", Honoured),
    ("detectLocalMode", Honoured),
    ("enableProfiling", DefaultOnly),
    ("featureGates.", NoEffect),
    ("healthzBindAddress", Honoured),
    ("hostnameOverride", Honoured),
    ("iptables.localhostNodePorts", Honoured),
    ("iptables.masqueradeAll", NoEffect),
    ("iptables.masqueradeBit", NoEffect),
    ("iptables.minSyncPeriod", NoEffect),
    ("iptables.syncPeriod", NoEffect),
    ("ipvs.", NoEffect),
    ("logging.", NoEffect),
    ("metricsBindAddress", Honoured),
    ("mode", Honoured),
    ("nftables.masqueradeAll", Honoured),
    ("nftables.masqueradeBit", Honoured),
    ("nftables.minSyncPeriod", NoEffect),
    ("nftables.syncPeriod", NoEffect),
    ("nodePortAddresses", Honoured),
    ("oomScoreAdj", Honoured),
    ("portRange", NoEffect),
    ("showHiddenMetricsForVersion", NoEffect),
    ("windowsRunAsService", DefaultOnly),
    ("winkernel.", DefaultOnly),
];

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("read {0}")]
    Read(PathBuf, #[source] std::io::Error),
    /// It is no YAML.
    #[error("{0}")]
    Yaml(PathBuf, #[source] serde_yaml_ng::Error),
    /// It is something else.
    #[error("{0}: not {API_VERSION} {KIND}")]
    Kind(PathBuf),
    /// A field nobody knows.
    #[error("{0}: unknown field {1}")]
    Unknown(PathBuf, String),
    /// A value that cannot be had.
    #[error("{path}: {field}: {why}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// A configuration, read and found good.
#[derive(Clone, Debug)]
pub struct KubeProxyConfiguration {
    path: PathBuf,
    leaves: BTreeMap<String, Value>,
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    }
}

fn collect(prefix: &str, value: Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                collect(&name, value, leaves);
            }
        }
        value => drop(leaves.insert(prefix.to_owned(), value)),
    }
}

fn treatment(name: &str) -> Option<Use> {
    let fits = |field: &str| name == field || field.ends_with('.') && name.starts_with(field);
    FIELDS.iter().find(|(field, _)| fits(field)).map(|(_, treatment)| *treatment)
}

impl KubeProxyConfiguration {
    /// Reads a file.
    ///
    /// # Errors
    /// With the file's and the field's name when something in it cannot be had.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::Read(path.into(), e))?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let value: Value = serde_yaml_ng::from_str(text).map_err(|e| Error::Yaml(path.into(), e))?;
        if value["apiVersion"] != API_VERSION || value["kind"] != KIND {
            return Err(Error::Kind(path.into()));
        }
        let mut leaves = BTreeMap::new();
        collect("", value, &mut leaves);
        leaves.retain(|_, value| !value.is_null());
        let new = Self { path: path.into(), leaves };
        for (name, value) in &new.leaves {
            match treatment(name) {
                None => return Err(Error::Unknown(path.into(), name.clone())),
                Some(DefaultOnly) if !is_empty(value) => {
                    let field = FIELDS.iter().map(|(f, _)| *f).find(|f| name.starts_with(f)).unwrap_or_default();
                    return Err(new.bad(field, format!("{name} is not available here")));
                }
                Some(NoEffect) if !is_empty(value) => tracing::debug!(field = name, "has no effect here"),
                Some(_) => {}
            }
        }
        // What is wrong is said at once, not when it is used.
        new.apply(&mut Config::new("", "", ""), &[])?;
        Ok(new)
    }

    fn bad(&self, field: &'static str, why: impl Into<String>) -> Error {
        Error::Field { path: self.path.clone(), field, why: why.into() }
    }

    /// A text; an empty one is none.
    fn text(&self, field: &'static str) -> Result<Option<&str>, Error> {
        match self.leaves.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|t| !t.is_empty())),
            Some(other) => Err(self.bad(field, format!("want a string, not {other}"))),
        }
    }

    fn flag(&self, field: &'static str) -> Result<Option<bool>, Error> {
        let value = self.leaves.get(field);
        value.map(|v| v.as_bool().ok_or_else(|| self.bad(field, format!("want true or false, not {v}")))).transpose()
    }

    fn number(&self, field: &'static str, low: i64, high: i64) -> Result<Option<i64>, Error> {
        let Some(value) = self.leaves.get(field) else { return Ok(None) };
        let number = value.as_i64().filter(|n| (low..=high).contains(n));
        number.map(Some).ok_or_else(|| self.bad(field, format!("want a number from {low} to {high}, not {value}")))
    }

    fn duration(&self, field: &'static str) -> Result<Option<Duration>, Error> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        parse_duration(text).map(Some).ok_or_else(|| self.bad(field, format!("\"{text}\" is not a duration")))
    }

    fn parsed<T: std::str::FromStr>(&self, field: &'static str, what: &str) -> Result<Option<T>, Error> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.bad(field, format!("\"{text}\" is not {what}")))
    }

    /// An address to serve on: with a port, or with the default one.
    fn listen(&self, field: &'static str, port: u16) -> Result<Option<SocketAddr>, Error> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        let bare = text.parse::<IpAddr>().map(|a| SocketAddr::new(a, port));
        let any = || text.strip_prefix(':').and_then(|p| Some(SocketAddr::new([0, 0, 0, 0].into(), p.parse().ok()?)));
        let full = bare.ok().or_else(|| text.parse().ok()).or_else(any);
        full.map(Some).ok_or_else(|| self.bad(field, format!("\"{text}\" is not ADDRESS[:PORT]")))
    }

    fn nets(&self, field: &'static str, list: impl Iterator<Item = String>) -> Result<Vec<IpNet>, Error> {
        let parse = |text: String| {
            let net = text.trim().parse::<IpNet>().map(|n| n.trunc());
            net.map_err(|_| self.bad(field, format!("\"{text}\" is not a CIDR")))
        };
        list.map(parse).collect()
    }

    /// The kubeconfig of the proxy's identity.
    pub fn kubeconfig(&self) -> Option<PathBuf> {
        self.text("clientConnection.kubeconfig").ok().flatten().map(Into::into)
    }

    /// The name of the node, when it is not the host's.
    pub fn node_name(&self) -> Option<String> {
        self.text("hostnameOverride").ok().flatten().map(|n| n.trim().to_lowercase())
    }

    /// How willing the process is to be killed when memory runs out.
    pub fn oom_score_adj(&self) -> i64 {
        self.number("oomScoreAdj", -1000, 1000).ok().flatten().unwrap_or(-999)
    }

    /// Sets what the file says; `own` are the node's addresses, for `nodePortAddresses: [primary]`.
    ///
    /// # Errors
    /// Never, for a file that has been loaded.
    pub fn apply(&self, config: &mut Config, own: &[IpAddr]) -> Result<(), Error> {
        if let Some(mode) = self.text("mode")?.filter(|m| *m != "nftables") {
            return Err(self.bad("mode", format!("\"{mode}\" is not available: this proxy is nftables")));
        }
        self.parsed::<IpAddr>("bindAddress", "an IP address")?;
        config.addresses_must_bind = self.flag("bindAddressHardFail")?.unwrap_or(false);
        config.healthz = self.listen("healthzBindAddress", 10_256)?.or(Some(([0, 0, 0, 0], 10_256).into()));
        config.metrics = self.listen("metricsBindAddress", 10_249)?.or(Some(([127, 0, 0, 1], 10_249).into()));
        if let Some(list) = self.text("clusterCIDR")? {
            config.cluster_cidrs = self.nets("clusterCIDR", list.split(',').map(str::to_owned))?;
        }
        self.apply_local(config)?;
        if let Some(bit) = self.number("nftables.masqueradeBit", 0, 31)? {
            config.masquerade_bit = u8::try_from(bit).unwrap_or(14);
        }
        config.masquerade_all = self.flag("nftables.masqueradeAll")?.unwrap_or(false);
        config.localhost_node_ports = self.flag("iptables.localhostNodePorts")?.unwrap_or(true);
        self.number("oomScoreAdj", -1000, 1000)?;
        self.apply_node_ports(config, own)?;
        self.apply_conntrack(config)
    }

    fn apply_local(&self, config: &mut Config) -> Result<(), Error> {
        let link = |field| self.text(field)?.ok_or_else(|| self.bad(field, "is required by this detectLocalMode"));
        let mode = self.text("detectLocalMode")?;
        config.pods_of_node = mode == Some("NodeCIDR");
        config.pod_links = match mode {
            None | Some("ClusterCIDR" | "NodeCIDR") => None,
            Some("BridgeInterface") => Some(link("detectLocal.bridgeInterface")?.to_owned()),
            Some("InterfaceNamePrefix") => Some(format!("{}*", link("detectLocal.interfaceNamePrefix")?)),
            Some(other) => {
                let why =
                    format!("\"{other}\" is not one of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix");
                return Err(self.bad("detectLocalMode", why));
            }
        };
        let links = config.pod_links.as_deref().unwrap_or_default();
        if links.len() > 15 || links.contains(|c: char| !c.is_ascii_graphic() || c == '"' || c == '/') {
            return Err(self.bad("detectLocal.bridgeInterface", format!("\"{links}\" is no name of a link")));
        }
        Ok(())
    }

    fn apply_node_ports(&self, config: &mut Config, own: &[IpAddr]) -> Result<(), Error> {
        let field = "nodePortAddresses";
        let Some(value) = self.leaves.get(field) else { return Ok(()) };
        let list: Option<Vec<String>> = serde_json::from_value(value.clone()).ok();
        let list = list.ok_or_else(|| self.bad(field, "want a list of CIDRs"))?;
        config.node_port_addresses = if list == ["primary"] {
            own.iter().map(|a| IpNet::from(*a)).collect()
        } else {
            self.nets(field, list.into_iter())?
        };
        Ok(())
    }

    /// kube-proxy's limits, with its defaults.
    fn apply_conntrack(&self, config: &mut Config) -> Result<(), Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let number = |field, default| Ok(self.number(field, 0, i64::from(i32::MAX))?.map_or(default, |n| n as u64));
        let (per_core, least) = (number("conntrack.maxPerCore", 32_768)?, number("conntrack.min", 131_072)?);
        let mut limits = Vec::new();
        if per_core > 0 {
            limits.push(("max", (per_core * cores).max(least)));
        }
        for (field, name, default) in [
            ("conntrack.tcpEstablishedTimeout", "tcp_timeout_established", 86_400),
            ("conntrack.tcpCloseWaitTimeout", "tcp_timeout_close_wait", 3600),
            ("conntrack.udpTimeout", "udp_timeout", 0),
            ("conntrack.udpStreamTimeout", "udp_timeout_stream", 0),
        ] {
            let seconds = self.duration(field)?.map_or(default, |d| d.as_secs());
            limits.extend((seconds > 0).then_some((name, seconds)));
        }
        if self.flag("conntrack.tcpBeLiberal")?.unwrap_or(false) {
            limits.push(("tcp_be_liberal", 1));
        }
        config.conntrack = limits;
        Ok(())
    }
}

/// What /configz shows: the configuration as it is in force.
pub(crate) fn shown(config: &Config) -> Value {
    let list = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    serde_json::json!({ "kubeproxy.config.k8s.io": {
        "mode": "nftables",
        "clusterCIDR": list(&config.cluster_cidrs).join(","),
        "healthzBindAddress": config.healthz.map(|a| a.to_string()).unwrap_or_default(),
        "metricsBindAddress": config.metrics.map(|a| a.to_string()).unwrap_or_default(),
        "bindAddressHardFail": config.addresses_must_bind,
        "hostnameOverride": config.node_name,
        "iptables": { "localhostNodePorts": config.localhost_node_ports },
        "nftables": { "masqueradeBit": config.masquerade_bit, "masqueradeAll": config.masquerade_all },
        "nodePortAddresses": list(&config.node_port_addresses),
    } })
}

/// Sets limits of connection tracking. Some are the machine's alone: in a namespace they stay as they are.
pub(crate) fn set_conntrack(limits: &[(&str, u64)]) {
    for (name, value) in limits {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        let now = std::fs::read_to_string(&path).ok().and_then(|t| t.trim().parse().ok());
        // As kube-proxy: a table that is larger already stays.
        let enough = |now: u64| now == *value || *name == "max" && now > *value;
        if now.is_some_and(enough) {
            continue;
        }
        match std::fs::write(&path, value.to_string()) {
            Ok(()) => tracing::info!(path, value, "connection tracking limit set"),
            Err(error) => tracing::warn!(path, value, %error, "connection tracking limit not set"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<KubeProxyConfiguration, String> {
        let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{text}");
        KubeProxyConfiguration::parse(Path::new("p.yaml"), &text).map_err(|e| e.to_string())
    }

    fn config(text: &str) -> Config {
        let mut config = Config::new("n", "t", "b");
        let own = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        parse(text).unwrap().apply(&mut config, &own).unwrap();
        config
    }

    /// Every field upstream has, with its default, from what `kube-proxy --write-config-to` wrote.
    #[test]
    fn every_field_is_known_with_its_default() {
        let text = include_str!("../testdata/kube-proxy-defaults.yaml");
        let got = KubeProxyConfiguration::parse(Path::new("p.yaml"), text).unwrap();
        let mut unseen: Vec<&str> = FIELDS.iter().map(|(f, _)| *f).collect();
        unseen.retain(|f| !got.leaves.keys().any(|l| l == f || f.ends_with('.') && l.starts_with(f)));
        // Null in that file, or left out of it when empty.
        let empty = [
            "bindAddressHardFail",
            "featureGates.",
            "iptables.localhostNodePorts",
            "logging.",
            "nodePortAddresses",
            "portRange",
            "windowsRunAsService",
        ];
        unseen.retain(|f| !empty.contains(f));
        assert!(unseen.is_empty(), "{unseen:?}");
        let (mut written, mut none) = (Config::new("n", "t", "b"), Config::new("n", "t", "b"));
        got.apply(&mut written, &[]).unwrap();
        parse("").unwrap().apply(&mut none, &[]).unwrap();
        assert_eq!(format!("{written:?}"), format!("{none:?}"), "the defaults are upstream's");
        assert_eq!(written.healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(written.metrics, Some("127.0.0.1:10249".parse().unwrap()));
        assert_eq!(written.conntrack[1..], [("tcp_timeout_established", 86_400), ("tcp_timeout_close_wait", 3600)]);
        assert!(written.conntrack[0].1 >= 131_072);
    }

    /// The defaults of the fact table change nothing, and its modes are had or refused by name.
    #[test]
    fn defaults_and_modes_are_those_of_the_facts() {
        let facts: Value = serde_json::from_str(include_str!("../testdata/kube-proxy.json")).unwrap();
        let defaults = facts["defaults"].as_object().unwrap();
        // The table's own words, not values of a file.
        let words = ["mode", "modes", "detectLocalMode", "detectLocalModes"];
        let mut file = serde_json::Map::new();
        for (name, value) in defaults.iter().filter(|(n, _)| !words.contains(&n.as_str())) {
            match name.split_once('.') {
                Some((outer, inner)) => {
                    file.entry(outer).or_insert_with(|| serde_json::json!({}))[inner] = value.clone()
                }
                None => drop(file.insert(name.clone(), value.clone())),
            }
        }
        assert!(file.len() > 10, "{file:?}");
        let (mut written, mut none) = (Config::new("n", "t", "b"), Config::new("n", "t", "b"));
        let got = parse(&serde_yaml_ng::to_string(&file).unwrap()).unwrap();
        got.apply(&mut written, &[]).unwrap();
        parse("").unwrap().apply(&mut none, &[]).unwrap();
        assert_eq!(format!("{written:?}"), format!("{none:?}"));
        assert_eq!(got.oom_score_adj(), parse("").unwrap().oom_score_adj());
        let list =
            |name: &str| defaults[name].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect::<Vec<_>>();
        for mode in list("modes") {
            assert_eq!(parse(&format!("mode: {mode}")).is_ok(), mode == "nftables", "{mode}");
        }
        let below = "detectLocal: {bridgeInterface: b, interfaceNamePrefix: v}";
        for mode in list("detectLocalModes") {
            let got = parse(&format!("clusterCIDR: 10.0.0.0/8\ndetectLocalMode: {mode}\n{below}"));
            let mut config = Config::new("n", "t", "b");
            got.unwrap().apply(&mut config, &[]).unwrap();
            assert_eq!(config.pods_of_node, mode == "NodeCIDR");
            assert_eq!(config.pod_links.is_some(), mode.contains("Interface"), "{mode}");
        }
    }

    #[test]
    fn what_is_said_is_done() {
        let got = config(
            "mode: nftables\nclusterCIDR: 10.1.0.0/16,2001:db8:5::/56\nnodePortAddresses: [primary]\nhealthzBindAddress: 127.0.0.1\n\
             metricsBindAddress: ':9999'\nnftables: {masqueradeBit: 5, masqueradeAll: true}\niptables: {localhostNodePorts: false}\n\
             detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}\n\
             conntrack: {maxPerCore: 0, udpTimeout: 1m30s, tcpBeLiberal: true, tcpEstablishedTimeout: 0s}",
        );
        assert_eq!(got.cluster_cidrs.len(), 2);
        let own: Vec<String> = got.node_port_addresses.iter().map(ToString::to_string).collect();
        assert_eq!(own, ["192.0.2.1/32", "2001:db8::1/128"]);
        assert_eq!(got.healthz, Some("127.0.0.1:10256".parse().unwrap()));
        assert_eq!(got.metrics, Some("0.0.0.0:9999".parse().unwrap()));
        assert_eq!((got.masquerade_bit, got.masquerade_all, got.localhost_node_ports), (5, true, false));
        assert_eq!(got.pod_links.as_deref(), Some("veth*"));
        assert_eq!(got.conntrack, [("tcp_timeout_close_wait", 3600), ("udp_timeout", 90), ("tcp_be_liberal", 1)]);
        let bridge = config("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: br0}");
        assert_eq!(bridge.pod_links.as_deref(), Some("br0"));
        let named = parse("hostnameOverride: ' Node-1'\nclientConnection: {kubeconfig: /k}\noomScoreAdj: -5").unwrap();
        assert_eq!((named.node_name().unwrap().as_str(), named.oom_score_adj()), ("node-1", -5));
        assert_eq!(named.kubeconfig(), Some("/k".into()));
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (text, wanted) in [
            ("mode: ipvs", "p.yaml: mode: \"ipvs\" is not available: this proxy is nftables"),
            ("nonsense: 1", "p.yaml: unknown field nonsense"),
            ("iptables: {x: 1}", "p.yaml: unknown field iptables.x"),
            ("clusterCIDR: 10.0.0.0", "p.yaml: clusterCIDR: \"10.0.0.0\" is not a CIDR"),
            ("bindAddress: x", "p.yaml: bindAddress: \"x\" is not an IP address"),
            ("healthzBindAddress: x", "p.yaml: healthzBindAddress: \"x\" is not ADDRESS[:PORT]"),
            ("nftables: {masqueradeBit: 32}", "p.yaml: nftables.masqueradeBit: want a number from 0 to 31, not 32"),
            ("detectLocalMode: LocalCIDR", "p.yaml: detectLocalMode: \"LocalCIDR\" is not one of"),
            ("detectLocalMode: BridgeInterface", "p.yaml: detectLocal.bridgeInterface: is required"),
            ("conntrack: {udpTimeout: 5}", "p.yaml: conntrack.udpTimeout: want a string, not 5"),
            ("conntrack: {udpTimeout: 5x}", "p.yaml: conntrack.udpTimeout: \"5x\" is not a duration"),
            ("oomScoreAdj: 2000", "p.yaml: oomScoreAdj: want a number from -1000 to 1000, not 2000"),
            ("winkernel: {enableDSR: true}", "p.yaml: winkernel.: winkernel.enableDSR is not available here"),
            ("nodePortAddresses: 10.0.0.0/8", "p.yaml: nodePortAddresses: want a list of CIDRs"),
            ("enableProfiling: true", "p.yaml: enableProfiling: enableProfiling is not available here"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.starts_with(wanted), "{text}: {why}");
        }
        let other = KubeProxyConfiguration::parse(Path::new("p.yaml"), "apiVersion: v1\nkind: Pod");
        assert!(other.unwrap_err().to_string().starts_with("p.yaml: not kubeproxy.config.k8s.io/v1alpha1"));
    }
}
