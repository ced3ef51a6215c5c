//! Credential providers: programs that know the credentials of some registries, asked as a kubelet asks them.
//!
//! `etc/isopod/credential-providers.yaml` is a `CredentialProviderConfig`; the programs it names are in
//! `etc/isopod/credential-providers/`. What one says is kept for as long as it says, or the configuration.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
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
    token_attributes: Option<TokenAttributes>,
}

/// What a provider wants to know of a pod's service account.
#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenAttributes {
    service_account_token_audience: String,
    cache_type: CacheType,
    require_service_account: bool,
    #[serde(default)]
    required_service_account_annotation_keys: Vec<String>,
    #[serde(default)]
    optional_service_account_annotation_keys: Vec<String>,
}

/// Whom an answer is good for.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
enum CacheType {
    ServiceAccount,
    Token,
}

/// A pod's service account, as far as providers care.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account {
    /// Namespace, name and UID.
    pub(crate) id: String,
    /// Of the pod whose tokens are asked for.
    pub(crate) pod: String,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Whose credentials are asked for.
pub(crate) trait Owner: Sync {
    /// The pod's service account; a static pod has none.
    fn account(&self) -> BoxFuture<'_, Result<Option<Account>, String>>;
    /// A token of it for an audience.
    fn token<'a>(&'a self, audience: &'a str) -> BoxFuture<'a, Result<String, String>>;
}

/// What a provider is told of one.
#[derive(Default)]
struct Subject {
    /// Whom the answer is good for; everybody, when it is empty.
    key: String,
    token: Option<String>,
    annotations: BTreeMap<String, String>,
}

impl TokenAttributes {
    /// What may be told of an account; nothing, when it lacks what has to be told.
    fn annotations(&self, account: &Account) -> Option<BTreeMap<String, String>> {
        let of = |key: &String| Some((key.clone(), account.annotations.get(key)?.clone()));
        let required: Option<BTreeMap<_, _>> = self.required_service_account_annotation_keys.iter().map(of).collect();
        let optional = self.optional_service_account_annotation_keys.iter().filter_map(of);
        required.map(|all| all.into_iter().chain(optional).collect())
    }

    fn check(&self) -> Result<(), &'static str> {
        let (required, optional) =
            (&self.required_service_account_annotation_keys, &self.optional_service_account_annotation_keys);
        if self.service_account_token_audience.is_empty() {
            return Err("serviceAccountTokenAudience is empty");
        }
        if !self.require_service_account && !required.is_empty() {
            return Err("requiredServiceAccountAnnotationKeys without requireServiceAccount");
        }
        if required.iter().any(|key| optional.contains(key)) {
            return Err("an annotation is both required and optional");
        }
        Ok(())
    }
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

/// Which provider, whom it is good for, and image, registry or nothing.
type Asked = (String, String, String);

/// All of a node's providers, and what they said.
#[derive(Default)]
pub(crate) struct Providers {
    dir: PathBuf,
    list: Vec<Provider>,
    /// Until when it holds.
    said: Mutex<HashMap<Asked, (Instant, DockerConfig)>>,
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

    /// Providers of an image: those that want to know a service account, or those that do not.
    fn matching(&self, reference: &Reference, accounts: bool) -> impl Iterator<Item = &Provider> {
        let (registry, repository) = (reference.registry(), reference.repository());
        let all = self.list.iter().filter(move |p| p.token_attributes.is_some() == accounts);
        all.filter(move |p| p.match_images.iter().any(|m| key_matches(m, registry, repository)))
    }

    /// What the providers of an image say, whoever wants it.
    pub(super) async fn of(&self, reference: &Reference) -> DockerConfig {
        let mut all = DockerConfig::default();
        for p in self.matching(reference, false) {
            match self.asked(p, reference, Subject::default(), None).await {
                Ok(said) => all.auths.extend(said.auths),
                Err(why) => none(p, reference, &why),
            }
        }
        all
    }

    /// What those say that want to know a pod's service account.
    pub(crate) async fn of_pod(&self, image: &str, owner: &dyn Owner) -> Vec<DockerConfig> {
        let Ok(reference) = image.parse::<Reference>() else { return Vec::new() };
        let mut all = Vec::new();
        for p in self.matching(&reference, true) {
            match self.asked_for(p, &reference, owner).await {
                Ok(said) => all.push(said),
                Err(why) => none(p, &reference, &why),
            }
        }
        all
    }

    async fn asked_for(&self, p: &Provider, reference: &Reference, owner: &dyn Owner) -> Result<DockerConfig, String> {
        let Some(attributes) = &p.token_attributes else { return Ok(DockerConfig::default()) };
        let Some(account) = owner.account().await? else {
            return match attributes.require_service_account {
                true => Ok(DockerConfig::default()),
                false => self.asked(p, reference, Subject::default(), None).await,
            };
        };
        let annotations = attributes.annotations(&account).ok_or("the service account lacks an annotation")?;
        let key = match attributes.cache_type {
            CacheType::ServiceAccount => format!("{} {annotations:?}", account.id),
            CacheType::Token => account.pod,
        };
        let subject = Subject { key, token: None, annotations };
        self.asked(p, reference, subject, Some((owner, &attributes.service_account_token_audience))).await
    }

    async fn asked(
        &self,
        p: &Provider,
        reference: &Reference,
        mut subject: Subject,
        owner: Option<(&dyn Owner, &str)>,
    ) -> Result<DockerConfig, String> {
        let registry = reference.registry();
        let image = format!("{registry}/{}", reference.repository());
        let whose = subject.key.clone();
        let key = |of: &str| (p.name.clone(), whose.clone(), of.to_owned());
        {
            let mut said = self.said.lock();
            said.retain(|_, (until, _)| *until > Instant::now());
            if let Some((_, known)) = ["", registry, &image].iter().find_map(|of| said.get(&key(of))) {
                return Ok(known.clone());
            }
        }
        if let Some((owner, audience)) = owner {
            subject.token = Some(owner.token(audience).await?);
        }
        let answer = self.run(p, &image, &subject).await?;
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

    async fn run(&self, p: &Provider, image: &str, subject: &Subject) -> Result<Answer, String> {
        let program = self.dir.join(&p.name);
        let failed = |e: io::Error| format!("{}: {e}", program.display());
        let mut command = Command::new(&program);
        command.args(&p.args).envs(p.env.iter().map(|v| (&v.name, &v.value))).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut request = json!({"kind": "CredentialProviderRequest", "apiVersion": p.api_version, "image": image});
        if let Some(token) = &subject.token {
            request["serviceAccountToken"] = json!(token);
            request["serviceAccountAnnotations"] = json!(subject.annotations);
        }
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

/// Others may know, or none is needed.
fn none(p: &Provider, reference: &Reference, why: &str) {
    tracing::warn!(provider = p.name, image = %reference, why, "no credentials");
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
        if let Some(attributes) = &p.token_attributes {
            attributes.check().map_err(|why| format!("provider {name:?}: tokenAttributes: {why}"))?;
            if p.api_version != "credentialprovider.kubelet.k8s.io/v1" {
                return Err(format!(
                    "provider {name:?}: tokenAttributes go with credentialprovider.kubelet.k8s.io/v1 only"
                ));
            }
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

    struct Fake(Option<Account>);

    impl Owner for Fake {
        fn account(&self) -> BoxFuture<'_, Result<Option<Account>, String>> {
            Box::pin(async { Ok(self.0.clone()) })
        }

        fn token<'a>(&'a self, audience: &'a str) -> BoxFuture<'a, Result<String, String>> {
            Box::pin(async move { Ok(format!("token for {audience}")) })
        }
    }

    #[tokio::test]
    async fn a_program_may_want_to_know_the_service_account() {
        let attributes = "  tokenAttributes: {serviceAccountTokenAudience: aud, cacheType: ServiceAccount, requireServiceAccount: \
             true, requiredServiceAccountAnnotationKeys: [role], optionalServiceAccountAnnotationKeys: [zone]}\n";
        let (dir, all) = providers(SCRIPT, attributes);
        let all = all.unwrap();
        let image = "r.example.com/team/app:1";
        assert!(all.of(&image.parse().unwrap()).await.auths.is_empty(), "without a pod it is not asked");
        let annotated = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let account = |id: &str, list: &[(&str, &str)]| {
            Some(Account { id: id.into(), pod: format!("pod of {id}"), annotations: annotated(list) })
        };
        let ask = async |account: Option<Account>| {
            all.of_pod(image, &Fake(account)).await.iter().filter(|c| !c.auths.is_empty()).count()
        };
        let a = account("a", &[("role", "puller"), ("zone", "z"), ("other", "o")]);
        // The second pod of the account gets what the first was told; another account does not.
        assert_eq!((ask(a.clone()).await, ask(a).await), (1, 1));
        assert_eq!(ask(account("b", &[("role", "puller")])).await, 1);
        assert_eq!((ask(account("c", &[("zone", "z")])).await, ask(None).await), (0, 0));
        let asked = std::fs::read_to_string(dir.path().join("vault.asked")).unwrap();
        let asked: Vec<serde_json::Value> = asked.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(asked.len(), 2);
        assert_eq!(asked[0]["serviceAccountToken"], "token for aud");
        assert_eq!(asked[0]["serviceAccountAnnotations"], json!({"role": "puller", "zone": "z"}));
        assert_eq!(asked[1]["serviceAccountAnnotations"], json!({"role": "puller"}));
    }

    #[tokio::test]
    async fn failures_are_no_credentials_and_bad_files_are_refused() {
        let reference: Reference = "r.example.com/team/app:1".parse().unwrap();
        for script in ["exit 3\n", "echo rubbish\n", "echo '{\"kind\": \"Other\", \"cacheKeyType\": \"Image\"}'\n"] {
            let (_dir, all) = providers(script, "");
            assert!(all.unwrap().of(&reference).await.auths.is_empty(), "{script}");
        }
        for (more, why) in [
            ("  tokenAttributes: {}\n", "serviceAccountTokenAudience"),
            (
                "  tokenAttributes: {serviceAccountTokenAudience: a, cacheType: Token, requireServiceAccount: false, \
                 requiredServiceAccountAnnotationKeys: [x]}\n",
                "requiredServiceAccountAnnotationKeys without",
            ),
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
