//! Where a registry's content is fetched from: containerd's `certs.d/HOST/hosts.toml`.
//!
//! Per `[host."URL"]`, and for `server` at the top: `capabilities` (pull/resolve), `ca`, `client` (one certificate), `skip_verify`,
//! `header`, `override_path`. Without a file the registry itself is asked over HTTPS, and one on a loopback address also over
//! HTTP, as other tools do.
//! <https://github.com/containerd/containerd/blob/main/docs/hosts.md>

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::error::Error;

/// One place to fetch from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// `host[:port]`.
    pub(super) host: String,
    /// HTTP instead of HTTPS.
    pub(super) plain: bool,
    /// Do not verify its certificate.
    pub(super) skip_verify: bool,
    /// PEM files of authorities to trust for it.
    pub(super) ca: Vec<PathBuf>,
    /// PEM files of the certificate to show it, and its key.
    pub(super) client: Vec<PathBuf>,
    /// What every request has besides.
    pub(super) headers: HeaderMap,
    /// The registry it stands in for, when it is another.
    pub(super) mirrors: Option<String>,
    /// What its repositories have in front of their names, with a slash at the end, or nothing.
    pub(super) prefix: String,
}

#[derive(Deserialize, Default)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: toml::Table,
    #[serde(flatten)]
    defaults: HostTable,
}

#[derive(Deserialize, Default, Clone)]
struct HostTable {
    #[serde(default)]
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    ca: Option<OneOrMany<PathBuf>>,
    /// The URL's path is the whole path, with its `/v2`.
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    client: Option<Certificates>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany<String>>,
}

/// containerd takes a file, a list of files with certificate and key in each, or pairs of files.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Certificates {
    File(PathBuf),
    Files(Vec<OneOrMany<PathBuf>>),
}

#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn list(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// The endpoints of a registry, in the order to try.
pub(super) fn endpoints(dir: &Path, registry: &str) -> Result<Vec<Endpoint>, Error> {
    for name in [registry.to_owned(), registry.replace(':', "_"), "_default".to_owned()] {
        let path = dir.join(name).join("hosts.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => return parse(&text, &path, registry),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::Config { path, why: error.to_string() }),
        }
    }
    let https = Endpoint { host: host_of(registry).to_owned(), ..Endpoint::default() };
    let mut all = vec![https.clone()];
    if is_loopback(registry) {
        all.push(Endpoint { plain: true, ..https });
    }
    Ok(all)
}

/// Where a registry really is.
fn host_of(registry: &str) -> &str {
    if registry == "docker.io" { "registry-1.docker.io" } else { registry }
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost"
        || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn parse(text: &str, path: &Path, registry: &str) -> Result<Vec<Endpoint>, Error> {
    let fail = |why: String| Error::Config { path: path.to_owned(), why };
    let file: HostsFile = toml::from_str(text).map_err(|error| fail(error.to_string().trim().to_owned()))?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut all = Vec::new();
    // toml::Table keeps the file's order (feature preserve_order), which is the order to try.
    for (url, table) in file.host {
        let table: HostTable = table.try_into().map_err(|error| fail(format!("host \"{url}\": {error}")))?;
        if table.capabilities.as_ref().is_some_and(|list| !list.iter().any(|c| c == "pull")) {
            continue;
        }
        all.push(endpoint(&url, &table, dir).map_err(|why| fail(format!("host \"{url}\": {why}")))?);
    }
    let default = format!("https://{}", host_of(registry));
    let server = file.server.as_deref().unwrap_or(&default);
    let last = endpoint(server, &file.defaults, dir);
    all.push(last.map_err(|why| fail(format!("server \"{server}\": {why}")))?);
    for e in all.iter_mut().filter(|e| e.host != host_of(registry)) {
        e.mirrors = Some(registry.to_owned());
    }
    let mut seen = BTreeMap::new();
    all.retain(|e| seen.insert((e.host.clone(), e.plain, e.prefix.clone()), ()).is_none());
    Ok(all)
}

fn endpoint(url: &str, table: &HostTable, dir: &Path) -> Result<Endpoint, String> {
    let (plain, rest) = match url.split_once("://") {
        Some(("http", rest)) => (true, rest),
        Some(("https", rest)) => (false, rest),
        None => (false, url),
        Some(_) => return Err("not an http(s) URL".to_owned()),
    };
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() {
        return Err("not an http(s) URL".to_owned());
    }
    let prefix = match (path.trim_matches('/'), table.override_path) {
        ("" | "v2", _) => String::new(),
        (path, true) => match path.strip_prefix("v2/") {
            Some(rest) => format!("{rest}/"),
            None => return Err(format!("the path /{path} does not begin with /v2")),
        },
        (path, false) => return Err(format!("the path /{path} can only be had with override_path and a /v2 in front")),
    };
    let there = |paths: Vec<PathBuf>| paths.into_iter().map(|path| dir.join(path)).collect();
    Ok(Endpoint {
        prefix,
        host: host.to_owned(),
        plain,
        skip_verify: table.skip_verify,
        ca: there(table.ca.clone().map(OneOrMany::list).unwrap_or_default()),
        client: there(client(table)?),
        headers: headers(table)?,
        mirrors: None,
    })
}

/// The files of the one certificate that can be shown; a pair's key may be in the certificate's file.
fn client(table: &HostTable) -> Result<Vec<PathBuf>, String> {
    match table.client.clone() {
        None => Ok(Vec::new()),
        Some(Certificates::File(path)) => Ok(vec![path]),
        Some(Certificates::Files(mut list)) => match (list.pop(), list.is_empty()) {
            (Some(last), true) => {
                let files: Vec<PathBuf> = last.list().into_iter().filter(|p| !p.as_os_str().is_empty()).collect();
                if files.len() > 2 { Err("client: want a certificate and its key".into()) } else { Ok(files) }
            }
            _ => Err("client: only one certificate can be had".into()),
        },
    }
}

fn headers(table: &HostTable) -> Result<HeaderMap, String> {
    let mut all = HeaderMap::new();
    for (name, values) in table.header.clone() {
        let bad = |e: &dyn std::fmt::Display| format!("header {name:?}: {e}");
        for value in values.list() {
            let value = HeaderValue::try_from(value).map_err(|e| bad(&e))?;
            all.append(HeaderName::try_from(&name).map_err(|e| bad(&e))?, value);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_first_and_the_server_last() {
        let text = "server = \"https://r.example\"\n[host.\"http://10.0.0.1:5000\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
                    [host.\"https://push.example\"]\ncapabilities = [\"push\"]\n[host.\"https://m.example\"]\nca = \"ca.pem\"\n";
        let all = parse(text, Path::new("/c/r.example/hosts.toml"), "r.example").unwrap();
        let hosts: Vec<_> = all.iter().map(|e| (e.host.as_str(), e.plain)).collect();
        assert_eq!(hosts, [("10.0.0.1:5000", true), ("m.example", false), ("r.example", false)]);
        assert_eq!(all[1].ca, [Path::new("/c/r.example/ca.pem")]);
        let mirrors: Vec<_> = all.iter().map(|e| e.mirrors.as_deref()).collect();
        assert_eq!(mirrors, [Some("r.example"), Some("r.example"), None]);
    }

    #[test]
    fn a_host_may_want_a_certificate_and_headers() {
        let of =
            |more: &str| parse(&format!("[host.\"https://m.example\"]\n{more}\n"), Path::new("/c/h/hosts.toml"), "h");
        for (text, want) in [
            ("client = 'both.pem'", vec!["/c/h/both.pem"]),
            ("client = ['both.pem']", vec!["/c/h/both.pem"]),
            ("client = [['/a.crt', 'a.key']]", vec!["/a.crt", "/c/h/a.key"]),
            ("client = [['a.crt', '']]", vec!["/c/h/a.crt"]),
            ("", vec![]),
        ] {
            let want: Vec<_> = want.into_iter().map(PathBuf::from).collect();
            assert_eq!(of(text).unwrap()[0].client, want, "{text}");
        }
        let two = of("client = ['a.pem', 'b.pem']").unwrap_err().to_string();
        assert!(two.contains("only one certificate"), "{two}");
        let with = of("header = {x-one = 'a', x-two = ['b', 'c']}").unwrap();
        let named = |name: &str| with[0].headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((named("x-one"), named("x-two")), (vec!["a"], vec!["b", "c"]));
        assert!(of("header = {'a b' = 'c'}").unwrap_err().to_string().contains("header \"a b\""));
    }

    #[test]
    fn a_mirror_may_have_a_path_of_its_own() {
        let of =
            |more: &str| parse(&format!("[host.\"https://m.example/v2/cache/hub/\"]\n{more}"), Path::new("/c/h"), "h");
        assert_eq!(of("override_path = true\n").unwrap()[0].prefix, "cache/hub/");
        let error = of("").unwrap_err().to_string();
        assert!(error.contains("override_path"), "{error}");
    }

    #[test]
    fn only_loopback_registries_may_be_plain_without_being_told() {
        let none = Path::new("/nonexistent");
        assert_eq!(endpoints(none, "127.0.0.1:5000").unwrap().len(), 2);
        assert_eq!(endpoints(none, "10.0.0.1:5000").unwrap().len(), 1);
    }

    #[test]
    fn a_bad_file_is_one_error_with_its_path() {
        let error = parse("server = 5", Path::new("/c/x/hosts.toml"), "x").unwrap_err().to_string();
        assert!(error.starts_with("/c/x/hosts.toml: "), "{error}");
    }
}
