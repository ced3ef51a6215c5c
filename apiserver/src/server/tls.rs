//! TLS of the server: its certificate, and client certificates that are welcome but not required.

use std::{fs::File, io::BufReader, path::Path, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
    server::WebPkiClientVerifier,
};

use crate::{Config, Error};

fn open(path: &Path) -> Result<BufReader<File>, Error> {
    File::open(path).map(BufReader::new).map_err(|source| Error::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = rustls_pemfile::certs(&mut open(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| Error::Read { path: path.to_owned(), source })?;
    if found.is_empty() {
        return Err(Error::Content { path: path.to_owned(), reason: "there is no certificate in it".into() });
    }
    Ok(found)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    rustls_pemfile::private_key(&mut open(path)?)
        .map_err(|source| Error::Read { path: path.to_owned(), source })?
        .ok_or_else(|| Error::Content { path: path.to_owned(), reason: "there is no private key in it".into() })
}

/// The server's TLS configuration.
pub(super) fn config(config: &Config) -> Result<ServerConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&config.client_ca)? {
        roots.add(certificate)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|e| Error::Content { path: config.client_ca.clone(), reason: e.to_string() })?;
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&config.tls_cert)?, key(&config.tls_key)?)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}
