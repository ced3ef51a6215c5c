//! Credential providers: programs that know the credentials of some registries, asked as a kubelet asks them.
//!
//! `etc/isopod/credential-providers.yaml` is a `CredentialProviderConfig`; the programs it names are in
//! `etc/isopod/credential-providers/`. What one says is kept for as long as it says, or the configuration.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use oci_spec::distribution::Reference;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use tokio::{io::AsyncWriteExt, process::Command};

use super::{
    DockerConfig, RegistryAuth,
    credentials::key_matches,
    error::{Error, chain},
};
use crate::config::parse_duration;

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Versions of the words exchanged with programs.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    api_version: String,
    kind: String,
    providers: Vec<Provider>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Provider {
    name: String,
    match_images: Vec<String>,
    #[serde(deserialize_with = "duration")]
    default_cache_duration: Duration,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    #[serde(default)]
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize, Clone)]
struct Variable {
    name: String,
    value: String,
}

fn duration<'de, D: serde::Deserializer<'de>>(text: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(text)?;
    parse_duration(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not a duration")))
}

/// What a program answers.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    kind: String,
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: HashMap<String, Auth>,
}

#[derive(Deserialize)]
struct Auth {
    username: String,
    password: String,
}

/// All of a node's providers, and what they said.
#[derive(Default)]
pub(crate) struct Providers {
    dir: PathBuf,
    list: Vec<Provider>,
    /// By provider and by image, registry or nothing.
    said: Mutex<HashMap<(String, String), (Instant, DockerConfig)>>,
}

impl Providers {
    /// Reads the configuration; without the file there are none.
    pub(crate) fn load(path: &Path, dir: PathBuf) -> Result<Self, super::ImageError> {
        let fail = |why: String| super::ImageError::from(Error::Config { path: path.to_owned(), why });
        let text = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            other => other.map_err(|e| fail(e.to_string()))?,
        };
        let file: File = serde_yaml_ng::from_str(&text).map_err(|e| fail(e.to_string()))?;
        check(&file, &dir).map_err(fail)?;
        Ok(Self { dir, list: file.providers, said: Mutex::default() })
    }

    /// What the providers of an image say.
    pub(super) async fn of(&self, reference: &Reference) -> DockerConfig {
        let mut all = DockerConfig::default();
        let (registry, repository) = (reference.registry(), reference.repository());
        for p in self.list.iter().filter(|p| p.match_images.iter().any(|m| key_matches(m, registry, repository))) {
            match self.asked(p, registry, repository).await {
                Ok(said) => all.auths.extend(said.auths),
                // Others may know, or none is needed.
                Err(why) => tracing::warn!(provider = p.name, registry, repository, why, "no credentials"),
            }
        }
        all
    }

    async fn asked(&self, p: &Provider, registry: &str, repository: &str) -> Result<DockerConfig, String> {
        let image = format!("{registry}/{repository}");
        let key = |of: &str| (p.name.clone(), of.to_owned());
        {
            let mut said = self.said.lock();
            said.retain(|_, (until, _)| *until > Instant::now());
            if let Some((_, known)) = ["", registry, &image].iter().find_map(|of| said.get(&key(of))) {
                return Ok(known.clone());
            }
        }
        let answer = self.run(p, &image).await?;
        let of = match answer.cache_key_type.as_str() {
            "Image" => image.as_str(),
            "Registry" => registry,
            "Global" => "",
            other => return Err(format!("unknown cacheKeyType {other:?}")),
        };
        let keep = match answer.cache_duration.as_deref() {
            Some(text) => parse_duration(text).ok_or_else(|| format!("cacheDuration {text:?} is not a duration"))?,
            None => p.default_cache_duration,
        };
        let auth = |a: Auth| RegistryAuth { username: a.username, password: a.password, identity_token: None };
        let config = DockerConfig { auths: answer.auth.into_iter().map(|(k, a)| (k, auth(a))).collect() };
        if !keep.is_zero() {
            self.said.lock().insert(key(of), (Instant::now() + keep, config.clone()));
        }
        Ok(config)
    }

    async fn run(&self, p: &Provider, image: &str) -> Result<Answer, String> {
        let program = self.dir.join(&p.name);
        let failed = |e: io::Error| format!("{}: {e}", program.display());
        let mut command = Command::new(&program);
        command.args(&p.args).envs(p.env.iter().map(|v| (&v.name, &v.value))).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let request = json!({"kind": "CredentialProviderRequest", "apiVersion": p.api_version, "image": image});
        let work = async {
            let mut child = command.spawn().map_err(failed)?;
            if let Some(mut stdin) = child.stdin.take() {
                // A program that reads nothing may still know.
                let _ = stdin.write_all(request.to_string().as_bytes()).await;
            }
            child.wait_with_output().await.map_err(failed)
        };
        let output = tokio::time::timeout(PATIENCE, work).await;
        let output = output.map_err(|_| format!("{} took longer than {PATIENCE:?}", program.display()))??;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{}: {}: {}", program.display(), output.status, words.trim()));
        }
        let answer: Answer = serde_json::from_slice(&output.stdout).map_err(|e| chain(&e))?;
        if answer.kind != "CredentialProviderResponse" {
            return Err(format!("{} answered with a {:?}", program.display(), answer.kind));
        }
        Ok(answer)
    }
}

/// What is wrong with a configuration.
fn check(file: &File, dir: &Path) -> Result<(), String> {
    let versions = VERSIONS.map(|v| format!("kubelet.config.k8s.io/{v}"));
    if file.kind != "CredentialProviderConfig" || !versions.contains(&file.api_version) {
        return Err(format!("{} {} is no CredentialProviderConfig", file.api_version, file.kind));
    }
    for p in &file.providers {
        let (name, versions) = (&p.name, VERSIONS.map(|v| format!("credentialprovider.kubelet.k8s.io/{v}")));
        if name.is_empty() || name.contains(['/', ' ']) || name == "." || name == ".." {
            return Err(format!("provider name {name:?} is no file name"));
        }
        if p.match_images.is_empty() {
            return Err(format!("provider {name:?}: matchImages is empty"));
        }
        if !versions.contains(&p.api_version) {
            return Err(format!("provider {name:?}: apiVersion {:?} is none of {versions:?}", p.api_version));
        }
        if p.token_attributes.is_some() {
            return Err(format!("provider {name:?}: tokenAttributes cannot be had"));
        }
        if !dir.join(name).is_file() {
            return Err(format!("provider {name:?}: there is no {}", dir.join(name).display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn providers(script: &str, more: &str) -> (tempfile::TempDir, Result<Providers, String>) {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vault");
        std::fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: vault\n  \
             matchImages: ['*.example.com/team']\n  defaultCacheDuration: 1m\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  env: [{{name: SAYS, value: geheim}}]\n{more}"
        );
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, config).unwrap();
        let all = Providers::load(&path, dir.path().to_owned()).map_err(|e| e.to_string());
        (dir, all)
    }

    const SCRIPT: &str = "cat >> \"$0.asked\"; echo >> \"$0.asked\"; echo '{\"kind\": \"CredentialProviderResponse\", \
        \"apiVersion\": \"credentialprovider.kubelet.k8s.io/v1\", \"cacheKeyType\": \"Registry\", \
        \"auth\": {\"r.example.com\": {\"username\": \"u\", \"password\": \"'$SAYS'\"}}}'\n";

    #[tokio::test]
    async fn a_program_is_asked_once_for_what_it_knows() {
        let (dir, all) = providers(SCRIPT, "");
        let all = all.unwrap();
        for image in ["r.example.com/team/app:1", "r.example.com/team/other@sha256:0", "elsewhere.org/team/app"] {
            let Ok(reference) = image.parse::<Reference>() else { continue };
            let said = all.of(&reference).await;
            let known = said.auths.get("r.example.com").map(|a| (a.username.as_str(), a.password.as_str()));
            assert_eq!(known, image.starts_with("r.").then_some(("u", "geheim")), "{image}");
        }
        let asked = std::fs::read_to_string(dir.path().join("vault.asked")).unwrap();
        assert_eq!(asked.lines().count(), 1, "{asked}");
        let request: serde_json::Value = serde_json::from_str(&asked).unwrap();
        assert_eq!(
            (&request["kind"], &request["image"]),
            (&json!("CredentialProviderRequest"), &json!("r.example.com/team/app"))
        );
    }

    #[tokio::test]
    async fn failures_are_no_credentials_and_bad_files_are_refused() {
        let reference: Reference = "r.example.com/team/app:1".parse().unwrap();
        for script in ["exit 3\n", "echo rubbish\n", "echo '{\"kind\": \"Other\", \"cacheKeyType\": \"Image\"}'\n"] {
            let (_dir, all) = providers(script, "");
            assert!(all.unwrap().of(&reference).await.auths.is_empty(), "{script}");
        }
        for (more, why) in [
            ("  tokenAttributes: {}\n", "tokenAttributes"),
            ("  madeUp: 1\n", "madeUp"),
            ("- {name: a/b, matchImages: [x], defaultCacheDuration: 1m, apiVersion: x}\n", "a/b"),
            ("- {name: vault, matchImages: [x], defaultCacheDuration: 1m, apiVersion: v9}\n", "v9"),
            (
                "- {name: none, matchImages: [x], defaultCacheDuration: 1m, apiVersion: credentialprovider.kubelet.k8s.io/v1}\n",
                "there is no",
            ),
        ] {
            let (_dir, all) = providers(SCRIPT, more);
            let said = all.err().unwrap();
            assert!(said.contains(why), "{said}");
        }
    }
}
