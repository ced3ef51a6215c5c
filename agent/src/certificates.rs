//! The node's certificates, renewed before they end: the client identity in the kubeconfig and the serving certificate.
//!
//! In: the files. Out: CertificateSigningRequests as a kubelet makes them, and the files again, written whole. Who uses them
//! reads them for every new connection, so nothing has to be told. `isopod join` asks for its first ones by the same
//! [`request`].

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    runtime::watcher,
};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{config::Config, context::Context};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key or a request cannot be made.
    #[error("make a certificate request")]
    Make(#[from] rcgen::Error),
    /// The API server does not take it, or does not answer.
    #[error("CertificateSigningRequest")]
    Api(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Somebody, or the signer, said no.
    #[error("CertificateSigningRequest {name}: {why}")]
    Refused {
        /// Its name.
        name: String,
        /// Their words.
        why: String,
    },
    /// A file.
    #[error("{path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// A certificate and its key, both PEM.
pub struct Signed {
    /// The certificate.
    pub cert: String,
    /// Its key.
    pub key: String,
}

/// What a certificate is for.
#[derive(Debug, Clone)]
pub enum Purpose {
    /// The node's identity towards the API server.
    Client,
    /// The node API under these names.
    Serving(String, Vec<IpAddr>),
}

impl Purpose {
    fn signer(&self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving(..) => "kubernetes.io/kubelet-serving",
        }
    }

    /// The family that counts failures to renew it.
    fn failures(&self) -> &'static str {
        match self {
            Self::Client => "kubelet_certificate_manager_client_expiration_renew_errors",
            Self::Serving(..) => "kubelet_server_expiration_renew_errors",
        }
    }

    fn names(&self) -> Result<Vec<SanType>, rcgen::Error> {
        let Self::Serving(name, addresses) = self else { return Ok(Vec::new()) };
        let addresses = addresses.iter().copied().map(SanType::IpAddress);
        Ok([SanType::DnsName(name.clone().try_into()?)].into_iter().chain(addresses).collect())
    }
}

/// A new key, and the request for its certificate.
fn made(node: &str, purpose: &Purpose) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
    params.subject_alt_names = purpose.names()?;
    Ok((key.serialize_pem(), params.serialize_request(&key)?.pem()?))
}

/// Asks for a node's certificate and waits until it is signed.
pub async fn request(client: Client, node: &str, purpose: &Purpose) -> Result<Signed, Error> {
    let (key, text) = made(node, purpose)?;
    let usage = if matches!(purpose, Purpose::Client) { "client auth" } else { "server auth" };
    let api = |e: kube::Error| Error::Api(e.into());
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(text.into_bytes()),
            signer_name: purpose.signer().to_owned(),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let created = requests.create(&PostParams::default(), &object).await.map_err(api)?;
    let name = created.metadata.name.unwrap_or_default();
    let mut events = watcher::watch_object(requests, &name).boxed();
    while let Some(event) = events.try_next().await.map_err(|e| Error::Api(e.into()))? {
        let Some(status) = event.and_then(|object| object.status) else { continue };
        if let Some(no) = status.conditions.iter().flatten().find(|c| c.type_ == "Denied" || c.type_ == "Failed") {
            let why = format!("{}: {}", no.type_, no.message.clone().unwrap_or_default());
            return Err(Error::Refused { name, why });
        }
        if let Some(ByteString(cert)) = status.certificate {
            let refused = |e: std::string::FromUtf8Error| Error::Refused { name: name.clone(), why: e.to_string() };
            return Ok(Signed { cert: String::from_utf8(cert).map_err(refused)?, key });
        }
    }
    Err(Error::Refused { name, why: "the watch of it ended".into() })
}

/// Where a certificate of this node is.
#[derive(Debug, Clone)]
enum Place {
    Kubeconfig(PathBuf),
    Files { cert: PathBuf, key: PathBuf },
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Kubeconfig(path) | Self::Files { cert: path, .. } => path,
        }
    }

    fn failed(&self, why: impl ToString) -> Error {
        Error::File { path: self.path().to_owned(), why: why.to_string() }
    }

    /// The certificate's PEM; `None` where there is none.
    fn certificate(&self) -> Option<Vec<u8>> {
        let text = fs::read(self.path()).ok()?;
        match self {
            Self::Files { .. } => Some(text),
            Self::Kubeconfig(_) => {
                let file: Value = serde_yaml_ng::from_slice(&text).ok()?;
                STANDARD.decode(own_user(&file)?["client-certificate-data"].as_str()?).ok()
            }
        }
    }

    fn write(&self, signed: &Signed) -> Result<(), Error> {
        match self {
            // Until both are there the old pair is used: the two have to fit.
            Self::Files { cert, key } => write_private(key, signed.key.as_bytes())
                .and_then(|()| write_private(cert, signed.cert.as_bytes()))
                .map_err(|e| self.failed(e)),
            Self::Kubeconfig(path) => {
                let text = fs::read(path).map_err(|e| self.failed(e))?;
                let mut file: Value = serde_yaml_ng::from_slice(&text).map_err(|e| self.failed(e))?;
                let user = own_user(&file).cloned().ok_or_else(|| self.failed("no user in it"))?;
                let mut renewed = user.clone();
                renewed["client-certificate-data"] = STANDARD.encode(&signed.cert).into();
                renewed["client-key-data"] = STANDARD.encode(&signed.key).into();
                for entry in file["users"].as_array_mut().into_iter().flatten().filter(|u| u["user"] == user) {
                    entry["user"] = renewed.clone();
                }
                let text = serde_yaml_ng::to_string(&file).map_err(|e| self.failed(e))?;
                write_private(path, text.as_bytes()).map_err(|e| self.failed(e))
            }
        }
    }
}

/// The user of a kubeconfig's current context.
fn own_user(file: &Value) -> Option<&Value> {
    let of = |list: &str, name: &Value| file[list].as_array()?.iter().find(|e| e["name"] == *name);
    let context = of("contexts", &file["current-context"])?;
    of("users", &context["context"]["user"]).map(|u| &u["user"])
}

/// Replaces a file that only root may read.
fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("renewed");
    fs::remove_file(&new).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// From when to when a certificate is good, in seconds since 1970.
fn validity(pem: &[u8]) -> Option<(i64, i64)> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let validity = certificate.validity();
    Some((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Seconds until the node's own certificates end, those that are renewed here: the client's and the server's.
pub(crate) fn left(config: &Config) -> [Option<f64>; 2] {
    let (client, serving) = places(config);
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64());
    [client, serving].map(|place| Some(validity(&place?.certificate()?)?.1 as f64 - now))
}

/// Where the certificates are that this node renews.
fn places(config: &Config) -> (Option<Place>, Option<Place>) {
    let kubelet = &config.kubelet;
    let client = config.kubeconfig.clone().filter(|_| kubelet.rotate_certificates).map(Place::Kubeconfig);
    // A certificate that somebody else put there is theirs to renew.
    let own = kubelet.server_tls_bootstrap && kubelet.tls_cert_file.is_none();
    let serving = Place::Files { cert: config.serving_cert.clone(), key: config.serving_key.clone() };
    (client, own.then_some(serving))
}

/// When to renew: after 70 to 90 % of its life, as a kubelet does; `None` for what is no certificate.
fn due(pem: &[u8], part: f64) -> Option<SystemTime> {
    let (from, to) = validity(pem)?;
    let at = from as f64 + (to - from) as f64 * (0.7 + 0.2 * part);
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs_f64(at.max(0.0)))
}

/// How long a request may wait for somebody's approval.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// First pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));
/// Clocks are set: how long a wait is believed.
const LOOK: Duration = Duration::from_secs(24 * 3600);

/// Keeps both certificates young until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let (client, serving) = places(&ctx.config);
    let mut addresses = ctx.machine.ips.clone();
    addresses.push(IpAddr::from([127, 0, 0, 1]));
    let serving = serving.map(|place| (place, Purpose::Serving(ctx.node_name.to_string(), addresses)));
    let both = async {
        tokio::join!(
            async {
                if let Some(place) = client {
                    keep(&ctx, &place, &Purpose::Client).await
                }
            },
            async {
                if let Some((place, purpose)) = serving {
                    keep(&ctx, &place, &purpose).await
                }
            },
        )
    };
    // Cancel-safe: files are written whole.
    tokio::select! {
        () = stop.cancelled() => {}
        _ = both => {}
    }
}

async fn keep(ctx: &Context, place: &Place, purpose: &Purpose) {
    // A node alone has none of a cluster's yet.
    let Some(_) = ctx.api.wait().await else { return };
    let mut pause = PAUSES.0;
    loop {
        let Some(at) = place.certificate().and_then(|pem| due(&pem, rand::random())) else { return };
        while let Ok(left) = at.duration_since(SystemTime::now()) {
            tokio::time::sleep(left.min(LOOK)).await;
        }
        match renew(ctx, place, purpose).await {
            Ok(()) => {
                tracing::info!(path = %place.path().display(), "certificate renewed");
                pause = PAUSES.0;
            }
            Err(error) => {
                let error = crate::images::chain(&error);
                tracing::warn!(path = %place.path().display(), error, "certificate not renewed");
                ctx.metrics.count(purpose.failures(), []);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }
}

async fn renew(ctx: &Context, place: &Place, purpose: &Purpose) -> Result<(), Error> {
    let Some(client) = ctx.api.wait().await else { return Ok(()) };
    let asked = tokio::time::timeout(PATIENCE, request(client, &ctx.node_name, purpose)).await;
    let nobody = |_| Error::Api(format!("nobody has approved it for {} s", PATIENCE.as_secs()).into());
    place.write(&asked.map_err(nobody)??)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_kubeconfig_keeps_everything_but_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.conf");
        let user = |name: &str, cert: &str| {
            format!("{{name: {name}, user: {{client-certificate-data: {cert}, client-key-data: a2V5}}}}")
        };
        fs::write(
            &path,
            format!(
                "apiVersion: v1\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: me}}}}]\n\
                 clusters: [{{name: k, cluster: {{server: 'https://h'}}}}]\nusers: [{}, {}]\n",
                user("other", "b3RoZXI="),
                user("me", "b2xk")
            ),
        )
        .unwrap();
        let place = Place::Kubeconfig(path.clone());
        assert_eq!(place.certificate().unwrap(), b"old");
        place.write(&Signed { cert: "new".into(), key: "new key".into() }).unwrap();
        assert_eq!(place.certificate().unwrap(), b"new");
        let file: Value = serde_yaml_ng::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(file["users"][0]["user"]["client-certificate-data"], "b3RoZXI=");
        assert_eq!(file["clusters"][0]["cluster"]["server"], "https://h");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Place::Kubeconfig(dir.path().join("none")).certificate().is_none());
    }

    #[test]
    fn renewal_is_due_late_in_life_and_before_its_end() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 4, 11);
        let pem = params.self_signed(&key).unwrap().pem();
        let first = SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600);
        let day = |at: SystemTime| at.duration_since(first).unwrap().as_secs() / 86_400;
        assert_eq!((day(due(pem.as_bytes(), 0.0).unwrap()), day(due(pem.as_bytes(), 1.0).unwrap())), (70, 90));
        assert_eq!(due(b"nothing", 0.5), None);
    }
}
