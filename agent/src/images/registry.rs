//! One endpoint of a registry and one repository there: manifests and blobs over HTTP, shown whatever credentials it asks for.
//! <https://github.com/opencontainers/distribution-spec/blob/main/spec.md>,
//! <https://distribution.github.io/distribution/spec/auth/token/>

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use oci_spec::distribution::Reference;
use parking_lot::Mutex;
use reqwest::{
    Certificate, Client, Identity, RequestBuilder, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    RegistryAuth,
    error::{Error, chain},
    hosts::Endpoint,
    store::Digest,
};

/// Manifests, tokens and errors larger than this are refused.
const MAX_ANSWER: usize = 4 << 20;
/// Kinds of manifests that are understood.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A repository at an endpoint.
pub(super) struct Registry {
    http: Client,
    /// The image as it was asked for.
    name: String,
    /// `scheme://host/v2/repository`.
    base: String,
    repository: String,
    /// The registry that a mirror stands in for.
    namespace: Option<String>,
    headers: HeaderMap,
    auth: Option<RegistryAuth>,
    /// `Authorization` as it was wanted last.
    shown: Mutex<Option<HeaderValue>>,
}

/// Connections to an endpoint.
pub(super) fn http(endpoint: &Endpoint) -> Result<Client, Error> {
    let read =
        |path: &PathBuf| std::fs::read(path).map_err(|e| Error::Config { path: path.clone(), why: e.to_string() });
    let bad = |path: &PathBuf| {
        let path = path.clone();
        move |e: reqwest::Error| Error::Config { path, why: chain(&e) }
    };
    let mut roots = Vec::new();
    for path in &endpoint.ca {
        roots.extend(Certificate::from_pem_bundle(&read(path)?).map_err(bad(path))?);
    }
    let mut client = Client::builder()
        .user_agent(concat!("isopod/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(60))
        .tls_certs_merge(roots)
        .tls_danger_accept_invalid_certs(endpoint.skip_verify);
    if let [first, ..] = endpoint.client.as_slice() {
        let pem: Vec<Vec<u8>> = endpoint.client.iter().map(read).collect::<Result<_, _>>()?;
        client = client.identity(Identity::from_pem(&pem.join(&b'\n')).map_err(bad(first))?);
    }
    client.build().map_err(|e| Error::Pull { name: endpoint.host.clone(), why: format!("TLS set-up: {}", chain(&e)) })
}

impl Registry {
    /// The repository of `reference` at an endpoint; `name` is what messages call the image.
    pub(super) fn new(
        http: Client,
        endpoint: &Endpoint,
        name: &str,
        reference: &Reference,
        auth: Option<RegistryAuth>,
    ) -> Self {
        let repository = format!("{}{}", endpoint.prefix, reference.repository());
        let scheme = if endpoint.plain { "http" } else { "https" };
        Self {
            http,
            name: name.to_owned(),
            base: format!("{scheme}://{}/v2/{repository}", endpoint.host),
            repository,
            namespace: endpoint.mirrors.clone(),
            headers: endpoint.headers.clone(),
            auth,
            shown: Mutex::default(),
        }
    }

    /// The image as it was asked for.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A manifest by tag or digest.
    pub(super) async fn manifest(&self, reference: &str) -> Result<Vec<u8>, Error> {
        let answer = self.get(&format!("manifests/{reference}"), |r| r.header(ACCEPT, MANIFESTS)).await?;
        self.whole(answer, MAX_ANSWER).await
    }

    /// A small blob of a known size.
    pub(super) async fn small(&self, blob: &Digest, size: usize) -> Result<Vec<u8>, Error> {
        let answer = self.get(&format!("blobs/{blob}"), |r| r).await?;
        self.whole(answer, size).await
    }

    /// A blob from some byte on; from the first, where the answer's status does not say `206`.
    pub(super) async fn blob(&self, blob: &Digest, from: u64) -> Result<Response, Error> {
        let range = |r: RequestBuilder| if from > 0 { r.header(RANGE, format!("bytes={from}-")) } else { r };
        self.get(&format!("blobs/{blob}"), range).await
    }

    fn failed(&self, why: impl Into<String>) -> Error {
        Error::Pull { name: self.name.clone(), why: why.into() }
    }

    async fn get(&self, what: &str, with: impl Fn(RequestBuilder) -> RequestBuilder) -> Result<Response, Error> {
        let url = format!("{}/{what}", self.base);
        let mut url = Url::parse(&url).map_err(|e| self.failed(format!("{url}: {e}")))?;
        if let Some(of) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", of);
        }
        let ask = async || {
            let mut request = with(self.http.get(url.clone()).headers(self.headers.clone()));
            let shown = self.shown.lock().clone();
            if let Some(value) = shown {
                request = request.header(AUTHORIZATION, value);
            }
            request.send().await.map_err(|e| self.failed(chain(&e)))
        };
        let mut answer = ask().await?;
        if answer.status() == StatusCode::UNAUTHORIZED
            && let Some(value) = self.authorization(answer.headers()).await?
        {
            *self.shown.lock() = Some(value);
            answer = ask().await?;
        }
        if answer.status().is_success() { Ok(answer) } else { Err(self.refused(answer).await) }
    }

    async fn whole(&self, mut answer: Response, most: usize) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|e| self.failed(chain(&e)))? {
            all.extend_from_slice(&part);
            if all.len() > most {
                let path = answer.url().path();
                return Err(self.failed(format!("{path} is larger than {most} bytes")));
            }
        }
        Ok(all)
    }

    /// What an answer that is no success says.
    async fn refused(&self, answer: Response) -> Error {
        let status = answer.status();
        let text = self.whole(answer, MAX_ANSWER).await.unwrap_or_default();
        let told: Told = serde_json::from_slice(&text).unwrap_or_default();
        let Complaint { code, message } = told.errors.into_iter().next().unwrap_or_default();
        let why = format!("the registry answered {status}: {code} {message}").trim_end_matches([' ', ':']).to_owned();
        let name = self.name.clone();
        match (code.as_str(), status) {
            ("MANIFEST_UNKNOWN" | "NAME_UNKNOWN" | "NOT_FOUND", _) => Error::NotFound { name },
            ("UNAUTHORIZED" | "DENIED", _) | (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Error::Denied { name, why }
            }
            (_, StatusCode::NOT_FOUND) => Error::NotFound { name },
            _ => Error::Pull { name, why },
        }
    }

    /// `Authorization` for what the registry wants to be shown, if there is anything to show.
    async fn authorization(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, Error> {
        let all = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|v| Challenge::parse(v.to_str().ok()?));
        let mut basic = false;
        for challenge in all {
            match challenge.scheme.as_str() {
                "bearer" => return self.token(&challenge.parameters).await.map(Some),
                "basic" => basic = true,
                _ => {}
            }
        }
        let Some(auth) = self.auth.as_ref().filter(|_| basic) else { return Ok(None) };
        // The value as reqwest makes it.
        let made = self.http.get(&self.base).basic_auth(&auth.username, Some(&auth.password)).build();
        Ok(made.ok().and_then(|r| r.headers().get(AUTHORIZATION).cloned()))
    }

    /// Asks the registry's token server.
    async fn token(&self, parameters: &BTreeMap<String, String>) -> Result<HeaderValue, Error> {
        let realm = parameters.get("realm").map(String::as_str).unwrap_or_default();
        let mut url = Url::parse(realm).map_err(|e| self.failed(format!("token server {realm:?}: {e}")))?;
        let own = format!("repository:{}:pull", self.repository);
        let scope = parameters.get("scope").unwrap_or(&own);
        url.query_pairs_mut().append_pair("scope", scope);
        if let Some(service) = parameters.get("service") {
            url.query_pairs_mut().append_pair("service", service);
        }
        let request = match &self.auth {
            Some(RegistryAuth { identity_token: Some(token), .. }) => {
                url.query_pairs_mut()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", "isopod")
                    .append_pair("refresh_token", token);
                let form = url.query().unwrap_or_default().to_owned();
                url.set_query(None);
                self.http.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
            }
            Some(auth) => self.http.get(url).basic_auth(&auth.username, Some(&auth.password)),
            None => self.http.get(url),
        };
        let answer = request.send().await.map_err(|e| self.failed(format!("token server: {}", chain(&e))))?;
        if !answer.status().is_success() {
            let why = format!("the token server answered {}", answer.status());
            return Err(Error::Denied { name: self.name.clone(), why });
        }
        let said = self.whole(answer, MAX_ANSWER).await?;
        let bad = |why: String| self.failed(format!("token server: {why}"));
        let Token { token, access_token } = serde_json::from_slice(&said).map_err(|e| bad(e.to_string()))?;
        let token = token.or(access_token).ok_or_else(|| bad("no token in its answer".into()))?;
        let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|e| bad(e.to_string()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// A registry's errors.
#[derive(Deserialize, Default)]
struct Told {
    #[serde(default)]
    errors: Vec<Complaint>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Complaint {
    code: String,
    message: String,
}

/// One `WWW-Authenticate`.
#[derive(Debug, PartialEq, Eq)]
struct Challenge {
    /// In lower case.
    scheme: String,
    parameters: BTreeMap<String, String>,
}

impl Challenge {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut parameters = BTreeMap::new();
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            if rest.is_empty() {
                return Some(Self { scheme: scheme.to_lowercase(), parameters });
            }
            let (key, after) = rest.split_once('=')?;
            let (value, left) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            parameters.insert(key.trim().to_lowercase(), value.trim().to_owned());
            rest = left;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Read, Write},
        net::TcpListener,
    };

    use super::*;

    /// A registry whose token server knows `u:p` and the refresh token `r`; the lines it was asked, in order.
    fn guarded() -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (own, mut asked) = (address.clone(), Vec::new());
        let server = std::thread::spawn(move || {
            loop {
                let (mut stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let lines = reader.by_ref().lines().map_while(Result::ok);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let of = |name: &str| head.iter().find_map(|l| l.strip_prefix(name).map(str::to_owned));
                let size = of("content-length: ").map_or(0, |n| n.parse().unwrap());
                let mut body = vec![0; size];
                reader.read_exact(&mut body).unwrap();
                let (line, body) = (head[0].clone(), String::from_utf8(body).unwrap());
                asked.push(format!("{line} {body}").trim().replace(" HTTP/1.1", ""));
                let shown = of("authorization: ").unwrap_or_default();
                let wants = format!(
                    "WWW-Authenticate: Bearer realm=\"http://{own}/token\",service=\"s\",scope=\"repository:team/app:pull\"\r\n"
                );
                let (status, more, text) = match line.split(' ').nth(1).unwrap() {
                    "/stop" => return asked,
                    path if path.starts_with("/token")
                        && (shown == "Basic dTpw" || body.contains("refresh_token=r")) =>
                    {
                        ("200 OK", "", if body.is_empty() { r#"{"token":"t"}"# } else { r#"{"access_token":"t"}"# })
                    }
                    path if path.starts_with("/token") => ("401 Unauthorized", "", "{}"),
                    _ if shown != "Bearer t" => {
                        ("401 Unauthorized", wants.as_str(), r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#)
                    }
                    "/v2/team/app/manifests/1" => ("200 OK", "", "manifest"),
                    "/v2/team/app/manifests/2" => {
                        ("404 Not Found", "", r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"?"}]}"#)
                    }
                    _ => ("429 Too Many Requests", "", r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"later"}]}"#),
                };
                let size = text.len();
                write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{more}Connection: close\r\n\r\n{text}")
                    .unwrap();
            }
        });
        (address, server)
    }

    #[tokio::test]
    async fn tokens_are_asked_for_once_and_refusals_told_apart() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (address, server) = guarded();
        let endpoint = Endpoint { host: address.clone(), plain: true, ..Endpoint::default() };
        let reference = "team/app:1".parse().unwrap();
        let of = |auth| Registry::new(http(&endpoint).unwrap(), &endpoint, "app:1", &reference, auth);
        let auth = |username: &str, password: &str, token: Option<&str>| {
            Some(RegistryAuth {
                username: username.into(),
                password: password.into(),
                identity_token: token.map(Into::into),
            })
        };
        let known = of(auth("u", "p", None));
        assert_eq!(known.manifest("1").await.unwrap(), b"manifest");
        assert!(matches!(known.manifest("2").await, Err(Error::NotFound { .. })));
        let busy = known.manifest("3").await.unwrap_err().to_string();
        assert!(busy.ends_with("the registry answered 429 Too Many Requests: TOOMANYREQUESTS later"), "{busy}");
        assert_eq!(of(auth("", "", Some("r"))).manifest("1").await.unwrap(), b"manifest");
        for nobody in [None, auth("u", "wrong", None)] {
            assert!(matches!(of(nobody).manifest("1").await, Err(Error::Denied { .. })));
        }
        std::net::TcpStream::connect(&address).unwrap().write_all(b"GET /stop HTTP/1.1\r\n\r\n").unwrap();
        let (asked, manifest) = (server.join().unwrap(), "GET /v2/team/app/manifests/");
        let token = "/token?scope=repository%3Ateam%2Fapp%3Apull&service=s";
        let one = |n: u8| format!("{manifest}{n}");
        let first = [one(1), format!("GET {token}"), one(1), one(2), one(3), one(1)];
        assert_eq!(asked[..6], first);
        let form =
            "scope=repository%3Ateam%2Fapp%3Apull&service=s&grant_type=refresh_token&client_id=isopod&refresh_token=r";
        assert_eq!(asked[6..8], [format!("POST /token {form}"), one(1)]);
    }

    #[test]
    fn challenges_are_read() {
        let read = |text: &str| Challenge::parse(text).map(|c| (c.scheme, c.parameters));
        let all = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let bearer =
            "Bearer realm=\"https://a.example/token?x=1\",service=\"r.example\", scope=\"repository:a/b:pull,push\"";
        let want = all(&[
            ("realm", "https://a.example/token?x=1"),
            ("service", "r.example"),
            ("scope", "repository:a/b:pull,push"),
        ]);
        assert_eq!(read(bearer), Some(("bearer".into(), want)));
        assert_eq!(read("Basic realm=here"), Some(("basic".into(), all(&[("realm", "here")]))));
        assert_eq!(read("Negotiate"), Some(("negotiate".into(), all(&[]))));
        assert_eq!(read("Bearer realm=\"open"), None);
    }
}
