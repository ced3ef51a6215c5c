//! The client certificate of a kubeconfig, read again for every new connection: it may have been renewed since.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::FutureExt;
use kube::{
    Config,
    client::ConfigExt,
    config::{KubeConfigOptions, Kubeconfig},
};
use rustls::{SignatureScheme, client::ResolvesClientCert, sign::CertifiedKey};

use crate::connect::{Error, over};

/// A client for the identity in a kubeconfig file.
pub async fn connect_file(path: &Path) -> Result<kube::Client, Error> {
    let failed = |source| Error::File { path: path.to_owned(), source };
    let file = Kubeconfig::read_from(path).map_err(failed)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)?;
    if config.cluster_url.scheme_str() == Some("http") {
        // Somebody else made the way safe: `kubectl proxy`, a tunnel.
        return Ok(kube::Client::try_from(config)?);
    }
    let mut tls = config.rustls_client_config()?;
    if tls.client_auth_cert_resolver.has_certs() {
        tls.client_auth_cert_resolver = Arc::new(Identity { path: path.to_owned() });
    }
    over(config, tls)
}

/// Where the certificate is.
#[derive(Debug)]
struct Identity {
    path: PathBuf,
}

impl Identity {
    fn read(&self) -> Result<rustls::ClientConfig, String> {
        let file = Kubeconfig::read_from(&self.path).map_err(|e| e.to_string())?;
        // Certificates are read at once; only programs that give tokens would have to be waited for.
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).now_or_never();
        let config = config.ok_or("the kubeconfig cannot be read at once")?.map_err(|e| e.to_string())?;
        config.rustls_client_config().map_err(|e| e.to_string())
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, hints: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let read = self.read().inspect_err(|error| tracing::warn!(path = %self.path.display(), error, "no identity"));
        read.ok()?.client_auth_cert_resolver.resolve(hints, schemes)
    }

    fn has_certs(&self) -> bool {
        true
    }
}
