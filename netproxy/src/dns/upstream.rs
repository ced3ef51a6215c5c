//! Who is asked for which names: the node's own name servers, and what the ConfigMap `kube-system/kube-dns` says.
//!
//! That ConfigMap has the keys the cluster DNS add-on has always had: `stubDomains`, a JSON object of domains and their
//! servers, and `upstreamNameservers`, a JSON list that is asked instead of the node's own.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

/// How often, at most, the upstream file is looked at; only while queries come.
const RECHECK: Duration = Duration::from_secs(5);
/// Servers of one domain that are asked.
const SERVERS_MAX: usize = 3;
const PORT: u16 = 53;

/// Servers to ask, in order.
pub(crate) type Servers = Arc<[SocketAddr]>;

/// What the ConfigMap says.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Custom {
    /// Labels of a domain, and its servers; the longest domain first.
    stubs: Vec<(Vec<String>, Servers)>,
    servers: Option<Servers>,
}

/// Why a ConfigMap cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum CustomError {
    #[error("{key} is not JSON of the form {form}: {why}")]
    Json { key: &'static str, form: &'static str, why: String },
    #[error("{key}: \"{text}\" is not an IP address with or without port")]
    Address { key: &'static str, text: String },
    #[error("stubDomains: \"{0}\" is not a domain")]
    Domain(String),
}

fn servers(key: &'static str, list: &[String]) -> Result<Servers, CustomError> {
    let parse = |text: &String| {
        let bare = text.parse::<IpAddr>().map(|a| SocketAddr::new(a, PORT));
        bare.or_else(|_| text.parse()).map_err(|_| CustomError::Address { key, text: text.clone() })
    };
    let all: Result<Vec<SocketAddr>, CustomError> = list.iter().take(SERVERS_MAX).map(parse).collect();
    all.map(Into::into)
}

impl Custom {
    /// Reads the ConfigMap's data.
    pub(crate) fn parse(data: &BTreeMap<String, String>) -> Result<Self, CustomError> {
        let mut custom = Self::default();
        if let Some(text) = data.get("stubDomains") {
            let (key, form) = ("stubDomains", "{\"DOMAIN\": [\"ADDRESS\"]}");
            let domains: BTreeMap<String, Vec<String>> =
                serde_json::from_str(text).map_err(|e| CustomError::Json { key, form, why: e.to_string() })?;
            for (domain, list) in domains {
                let bare = domain.trim_end_matches('.').to_ascii_lowercase();
                let labels: Vec<String> = bare.split('.').map(str::to_owned).collect();
                if labels.iter().any(|l| l.is_empty() || l.len() > 63) {
                    return Err(CustomError::Domain(domain));
                }
                custom.stubs.push((labels, servers(key, &list)?));
            }
            custom.stubs.sort_by_key(|(labels, _)| std::cmp::Reverse(labels.len()));
        }
        if let Some(text) = data.get("upstreamNameservers") {
            let (key, form) = ("upstreamNameservers", "[\"ADDRESS\"]");
            let list: Vec<String> =
                serde_json::from_str(text).map_err(|e| CustomError::Json { key, form, why: e.to_string() })?;
            custom.servers = Some(servers(key, &list)?).filter(|s| !s.is_empty());
        }
        Ok(custom)
    }

    fn stub(&self, labels: &[&str]) -> Option<&Servers> {
        let inside = |domain: &[String]| {
            let tail = labels.len().checked_sub(domain.len()).map(|at| &labels[at..]);
            tail.is_some_and(|t| t.iter().zip(domain).all(|(a, b)| a == b))
        };
        self.stubs.iter().find(|(domain, _)| inside(domain)).map(|(_, servers)| servers)
    }
}

/// Name servers of a resolv.conf.
fn name_servers(text: &str, own: IpAddr) -> Servers {
    let address = |line: &str| {
        let rest = line.trim().strip_prefix("nameserver")?;
        rest.split_whitespace().next()?.split('%').next()?.parse::<IpAddr>().ok()
    };
    let all = text.lines().filter_map(address).filter(|a| *a != own).take(SERVERS_MAX);
    all.map(|a| SocketAddr::new(a, PORT)).collect()
}

#[derive(Default)]
struct State {
    custom: Custom,
    servers: Servers,
    checked: Option<Instant>,
    modified: Option<SystemTime>,
}

/// The servers to ask, as they are now.
pub(crate) struct Upstream {
    file: PathBuf,
    /// Never asked: ourselves.
    own: IpAddr,
    state: Mutex<State>,
}

impl Upstream {
    pub(crate) fn new(file: PathBuf, own: IpAddr) -> Self {
        Self { file, own, state: Mutex::default() }
    }

    /// Takes over what the ConfigMap says; false when that is what it said before.
    pub(crate) fn set_custom(&self, custom: Custom) -> bool {
        let mut state = self.state.lock();
        let changed = state.custom != custom;
        state.custom = custom;
        changed
    }

    /// Who is to be asked for a name.
    pub(crate) fn servers(&self, labels: &[&str]) -> Servers {
        let mut state = self.state.lock();
        if let Some(servers) = state.custom.stub(labels).or(state.custom.servers.as_ref()) {
            return servers.clone();
        }
        if state.checked.is_none_or(|c| c.elapsed() >= RECHECK) {
            state.checked = Some(Instant::now());
            let modified = std::fs::metadata(&self.file).and_then(|m| m.modified()).ok();
            if modified != state.modified || modified.is_none() {
                state.modified = modified;
                let text = std::fs::read_to_string(&self.file).unwrap_or_default();
                state.servers = name_servers(&text, self.own);
            }
        }
        state.servers.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn custom(stubs: &str, servers: &str) -> Result<Custom, String> {
        let data = [("stubDomains", stubs), ("upstreamNameservers", servers)];
        let data = data.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_owned(), v.to_owned()));
        Custom::parse(&data.collect()).map_err(|e| e.to_string())
    }

    #[test]
    fn resolv_conf_is_read_and_we_never_ask_ourselves() {
        let text =
            "# x\nsearch a b\nnameserver 10.96.0.10\nnameserver 192.0.2.1\n nameserver fe80::1%eth0\noptions ndots:5\n";
        let servers = name_servers(text, "10.96.0.10".parse().unwrap());
        assert_eq!(*servers, ["192.0.2.1:53".parse().unwrap(), "[fe80::1]:53".parse().unwrap()]);
    }

    #[test]
    fn names_go_to_the_servers_of_their_longest_domain() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nameserver 192.0.2.1\n").unwrap();
        let upstream = Upstream::new(file.path().into(), "10.96.0.10".parse().unwrap());
        let ask = |name: &str| {
            let labels: Vec<&str> = name.split('.').collect();
            upstream.servers(&labels).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(ask("a.acme.local"), ["192.0.2.1:53"]);
        let stubs = r#"{"acme.local": ["192.0.2.2"], "Lab.Acme.Local.": ["192.0.2.3:5353", "2001:db8::1"]}"#;
        assert!(upstream.set_custom(custom(stubs, "").unwrap()));
        assert!(!upstream.set_custom(custom(stubs, "").unwrap()));
        assert_eq!(ask("a.acme.local"), ["192.0.2.2:53"]);
        assert_eq!(ask("acme.local"), ["192.0.2.2:53"]);
        assert_eq!(ask("x.lab.acme.local"), ["192.0.2.3:5353", "[2001:db8::1]:53"]);
        assert_eq!(ask("notacme.local"), ["192.0.2.1:53"]);
        upstream.set_custom(custom(stubs, r#"["192.0.2.9"]"#).unwrap());
        assert_eq!(ask("example.com"), ["192.0.2.9:53"]);
        upstream.set_custom(Custom::default());
        assert_eq!(ask("a.acme.local"), ["192.0.2.1:53"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (stubs, servers, wanted) in [
            ("acme.local", "", "stubDomains is not JSON of the form {\"DOMAIN\": [\"ADDRESS\"]}"),
            (r#"{"a..b": []}"#, "", "stubDomains: \"a..b\" is not a domain"),
            (r#"{"a": ["ns.example.com"]}"#, "", "stubDomains: \"ns.example.com\" is not an IP address"),
            ("", r#"{"a": 1}"#, "upstreamNameservers is not JSON of the form [\"ADDRESS\"]"),
        ] {
            let why = custom(stubs, servers).unwrap_err();
            assert!(why.starts_with(wanted), "{why}");
        }
    }
}
