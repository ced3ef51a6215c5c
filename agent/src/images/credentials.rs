//! Registry credentials in Docker's config.json form, from imagePullSecrets and from the node.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use oci_spec::distribution::Reference;
use serde::Deserialize;

use super::{
    DockerConfig, RegistryAuth,
    error::Error,
    store::{ANYBODY, Digest},
};

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: Option<String>,
}

impl DockerConfig {
    /// Parses `.dockerconfigjson` (an object with `auths`).
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        let file: File = serde_json::from_slice(text)?;
        Ok(Self::from_entries(file.auths))
    }

    /// Parses the older `.dockercfg` (the map itself).
    pub fn parse_legacy(text: &[u8]) -> Result<Self, serde_json::Error> {
        Ok(Self::from_entries(serde_json::from_slice(text)?))
    }

    fn from_entries(entries: BTreeMap<String, Entry>) -> Self {
        Self { auths: entries.into_iter().map(|(key, entry)| (key, entry.into())).collect() }
    }

    /// Credentials for a repository, the most specific entry first.
    fn matches(&self, host: &str, repository: &str) -> Vec<&RegistryAuth> {
        let mut found: Vec<_> = self.auths.iter().filter(|(key, _)| key_matches(key, host, repository)).collect();
        found.sort_by_key(|(key, _)| std::cmp::Reverse(bare(key).len()));
        found.into_iter().map(|(_, auth)| auth).collect()
    }
}

impl From<Entry> for RegistryAuth {
    fn from(entry: Entry) -> Self {
        let mut auth =
            Self { username: entry.username, password: entry.password, identity_token: entry.identity_token };
        let decoded = STANDARD.decode(entry.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        if let (true, Some((user, password))) =
            (auth.username.is_empty(), decoded.as_deref().and_then(|plain| plain.split_once(':')))
        {
            auth.username = user.to_owned();
            auth.password = password.trim_end_matches('\0').to_owned();
        }
        auth
    }
}

/// Reads the node's own file; absent is empty.
pub(super) fn read(path: &Path) -> Result<DockerConfig, Error> {
    let fail = |why: String| Error::Config { path: path.to_owned(), why };
    match std::fs::read(path) {
        Ok(text) => DockerConfig::parse(&text).map_err(|error| fail(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(DockerConfig::default()),
        Err(error) => Err(fail(error.to_string())),
    }
}

/// Everything to try for an image, in order: pull secrets, the node's file; nothing at all where there is neither.
pub(super) fn candidates(
    reference: &Reference,
    secrets: &[DockerConfig],
    node: &DockerConfig,
) -> Vec<Option<RegistryAuth>> {
    let of = |config: &DockerConfig| -> Vec<_> {
        let found = config.matches(reference.registry(), reference.repository());
        found.into_iter().cloned().map(Some).collect()
    };
    let all: Vec<_> = secrets.iter().chain([node]).flat_map(of).collect();
    if all.is_empty() { vec![None] } else { all }
}

/// What is remembered of a credential an image was pulled with: never the credential itself. The node's own and none at
/// all are everybody's.
pub(super) fn mark(reference: &Reference, auth: Option<&RegistryAuth>, node: &DockerConfig) -> String {
    let (registry, repository) = (reference.registry(), reference.repository());
    let Some(auth) = auth.filter(|auth| !node.matches(registry, repository).contains(auth)) else {
        return ANYBODY.into();
    };
    match &auth.identity_token {
        Some(token) => hashed(&[registry, token]),
        None => hashed(&[registry, &auth.username, &auth.password]),
    }
}

fn hashed(parts: &[&str]) -> String {
    // No part holds a zero, so that no two lists make one text.
    Digest::of(parts.join("\0").as_bytes()).to_string()
}

/// Marks of everything a pod may pull an image with.
pub(super) fn marks(reference: &Reference, secrets: &[DockerConfig], node: &DockerConfig) -> BTreeSet<String> {
    candidates(reference, secrets, node).iter().map(|auth| mark(reference, auth.as_ref(), node)).collect()
}

/// A key of `auths` without its scheme.
fn bare(key: &str) -> &str {
    key.trim_start_matches("https://").trim_start_matches("http://")
}

/// Whether a key of `auths` (`https://host[:port][/path]`, `*.host`) covers a repository.
pub(super) fn key_matches(key: &str, host: &str, repository: &str) -> bool {
    let key = bare(key);
    let (key_host, path) = key.split_once('/').unwrap_or((key, ""));
    let path = path.trim_matches('/');
    let docker_hub = |h: &str| matches!(h, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    let host_matches = key_host == host || (docker_hub(key_host) && docker_hub(host)) || glob_host(key_host, host);
    let path_matches = matches!(path, "" | "v1" | "v2")
        || repository == path
        || repository.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
    host_matches && path_matches
}

/// `*` stands for one label of a host name.
fn glob_host(pattern: &str, host: &str) -> bool {
    if !pattern.contains('*') {
        return false;
    }
    let (pattern, host): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), host.split('.').collect());
    pattern.len() == host.len() && pattern.iter().zip(&host).all(|(p, h)| *p == "*" || p == h)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_specific_entry_wins() {
        let config = DockerConfig::parse(
            br#"{"auths":{"https://r.example:5000":{"username":"a","password":"1"},
                 "r.example:5000/team":{"auth":"Yjoy"}, "other":{"auth":"Yzoz"}}}"#,
        )
        .unwrap();
        let reference: Reference = "r.example:5000/team/app:1".parse().unwrap();
        let found = candidates(&reference, &[config], &DockerConfig::default());
        let found: Vec<_> = found.into_iter().flatten().map(|auth| (auth.username, auth.password)).collect();
        assert_eq!(found, [("b", "2"), ("a", "1")].map(|(user, password)| (user.to_owned(), password.to_owned())));
    }

    #[test]
    fn without_an_entry_the_pull_is_anonymous() {
        let reference: Reference = "busybox".parse().unwrap();
        assert_eq!(candidates(&reference, &[], &DockerConfig::default()), vec![None]);
    }

    #[test]
    fn marks_tell_credentials_apart_and_give_none_away() {
        let reference: Reference = "r.example/app:1".parse().unwrap();
        let config = |password: &str| {
            DockerConfig::parse(
                format!(r#"{{"auths":{{"r.example":{{"username":"u","password":"{password}"}}}}}}"#).as_bytes(),
            )
            .unwrap()
        };
        let (a, b, nobody) = (config("geheim"), config("other"), DockerConfig::default());
        let of = |secrets: &[DockerConfig], node: &DockerConfig| marks(&reference, secrets, node);
        assert_ne!(of(std::slice::from_ref(&a), &nobody), of(&[b], &nobody));
        assert!(!format!("{:?}", of(std::slice::from_ref(&a), &nobody)).contains("geheim"));
        // The node's own credentials are everybody's, and so is an open registry.
        for marks in [of(std::slice::from_ref(&a), &a), of(&[], &a), of(&[], &nobody)] {
            assert_eq!(marks, BTreeSet::from([ANYBODY.to_string()]));
        }
    }

    #[test]
    fn keys_cover_hosts_and_paths() {
        assert!(key_matches("https://index.docker.io/v1/", "docker.io", "library/busybox"));
        assert!(key_matches("*.example.com", "r.example.com", "x"));
        assert!(!key_matches("*.example.com", "a.r.example.com", "x"));
        assert!(!key_matches("r/team", "r", "teammate/app"));
    }
}
