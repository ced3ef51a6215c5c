//! TLS of the node's server: its certificate, the CA clients are checked against, and who a client is.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use parking_lot::Mutex;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("read {}: {source}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A key file without a key.
    #[error("{}: no private key in it", path.display())]
    NoKey {
        /// Its path.
        path: PathBuf,
    },
    /// A cipher suite nobody knows.
    #[error("tlsCipherSuites: {name:?} is not one of {known}")]
    Suite {
        /// As written.
        name: String,
        /// What there is.
        known: String,
    },
    /// Certificates that do not fit.
    #[error("certificate or key refused")]
    Refused(#[source] rustls::Error),
    /// A CA that cannot be used.
    #[error("client CA refused")]
    ClientCa(#[source] rustls::server::VerifierBuilderError),
}

/// Who a client is, by its certificate or its token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Common name or user name.
    pub user: String,
    /// Organizations or groups.
    pub groups: Vec<String>,
}

impl Identity {
    /// Reads a verified certificate's subject.
    pub(crate) fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let subject = certificate.subject();
        let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        let groups = subject.iter_organization().filter_map(|o| o.as_str().ok().map(str::to_owned)).collect();
        Some(Self { user, groups })
    }

    /// The API server and the cluster's administrators need no permission, so that they get in also when nobody can be asked.
    pub(crate) fn trusted(&self) -> bool {
        self.user == "kube-apiserver-kubelet-client"
            || self.groups.iter().any(|g| g == "system:masters" || g == "kubeadm:cluster-admins")
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let error = |source| Error::Read { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(error)?;
    rustls_pemfile::certs(&mut BufReader::new(file)).collect::<Result<_, _>>().map_err(error)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let error = |source| Error::Read { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(error)?;
    let key = rustls_pemfile::private_key(&mut BufReader::new(file)).map_err(error)?;
    key.ok_or_else(|| Error::NoKey { path: path.to_path_buf() })
}

/// The library's provider with these suites of TLS 1.2 only; those of 1.3 cannot be chosen, as upstream has it.
fn provider(suites: &[String]) -> Result<rustls::crypto::CryptoProvider, Error> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // rustls calls TLS 1.3's suites TLS13_AES_..., which IANA does not.
    let name = |s: &rustls::SupportedCipherSuite| format!("{:?}", s.suite()).replace("TLS13_", "TLS_");
    if let Some(unknown) = suites.iter().find(|w| !provider.cipher_suites.iter().any(|s| name(s) == **w)) {
        let known = provider.cipher_suites.iter().map(name).collect::<Vec<_>>().join(", ");
        return Err(Error::Suite { name: unknown.clone(), known });
    }
    if !suites.is_empty() {
        provider.cipher_suites.retain(|s| s.tls13().is_some() || suites.contains(&name(s)));
    }
    Ok(provider)
}

/// The server's certificate, read again when its file has changed: it is renewed while the server runs.
struct Serving {
    cert: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: Mutex<(Option<SystemTime>, Arc<CertifiedKey>)>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Serving({})", self.cert.display())
    }
}

impl Serving {
    fn open(wanted: &super::Config, provider: Arc<CryptoProvider>) -> Result<Self, Error> {
        let changed = modified(&wanted.cert);
        let pair = Arc::new(pair(&wanted.cert, &wanted.key, &provider)?);
        let (cert, key) = (wanted.cert.clone(), wanted.key.clone());
        Ok(Self { cert, key, provider, current: Mutex::new((changed, pair)) })
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn pair(cert: &Path, private: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, Error> {
    CertifiedKey::from_der(certificates(cert)?, key(private)?, provider).map_err(Error::Refused)
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock();
        let changed = modified(&self.cert);
        if changed != current.0 {
            match pair(&self.cert, &self.key, &self.provider) {
                Ok(pair) => *current = (changed, Arc::new(pair)),
                // One of the two is not there yet; the old pair goes on.
                Err(error) => tracing::debug!(%error, "serving certificate"),
            }
        }
        Some(current.1.clone())
    }
}

/// The server's TLS configuration. Clients without a certificate get in as far as /healthz.
pub(crate) fn server_config(wanted: &super::Config) -> Result<Arc<ServerConfig>, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&wanted.client_ca)? {
        roots.add(certificate).map_err(Error::Refused)?;
    }
    let provider = Arc::new(provider(&wanted.cipher_suites)?);
    let versions: &[&rustls::SupportedProtocolVersion] =
        if wanted.only_tls13 { &[&rustls::version::TLS13] } else { rustls::DEFAULT_VERSIONS };
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(Error::ClientCa)?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(Error::Refused)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Serving::open(wanted, provider)?));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_chosen_by_name() {
        let all = provider(&[]).unwrap().cipher_suites.len();
        let one = provider(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256".into()]).unwrap().cipher_suites;
        assert_eq!(one.iter().filter(|s| s.tls13().is_none()).count(), 1);
        assert!(one.len() < all && one.iter().any(|s| s.tls13().is_some()));
        assert!(provider(&["TLS_AES_128_GCM_SHA256".into()]).is_ok());
        let error = provider(&["TLS_RSA_WITH_RC4_128_SHA".into()]).unwrap_err().to_string();
        assert!(error.starts_with("tlsCipherSuites: \"TLS_RSA_WITH_RC4_128_SHA\" is not one of TLS_"), "{error}");
    }
}
