//! A webhook server over TLS on loopback, with a CA of its own.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::AbortHandle};
use tokio_rustls::TlsAcceptor;

/// Answers a body; the code and the answer.
type Answer = Arc<dyn Fn(Value) -> (u16, Value) + Send + Sync>;

/// The server; it ends when this is dropped.
pub(crate) struct WebhookServer {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// What its certificate is checked with.
    pub(crate) ca: String,
    connections: Arc<AtomicUsize>,
    accepting: AbortHandle,
}

impl Drop for WebhookServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl WebhookServer {
    /// Starts it with a certificate for these names.
    pub(crate) async fn start(names: &[&str], answer: impl Fn(Value) -> (u16, Value) + Send + Sync + 'static) -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
        Self::serve(&certificate, &key, ca_pem, Arc::new(answer)).await
    }

    /// Starts it with a certificate that signs itself, as a CA may, and is its own bundle.
    pub(crate) async fn self_signed(
        name: &str,
        answer: impl Fn(Value) -> (u16, Value) + Send + Sync + 'static,
    ) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(vec![name.to_owned()]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        let pem = certificate.pem();
        Self::serve(&certificate, &key, pem, Arc::new(answer)).await
    }

    async fn serve(certificate: &Certificate, key: &KeyPair, ca: String, answer: Answer) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let (acceptor, answer) = (acceptor.clone(), Arc::clone(&answer));
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| answered(Arc::clone(&answer), request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, ca, connections, accepting: accepting.abort_handle() }
    }

    /// A `clientConfig` that leads here.
    pub(crate) fn config(&self, path: &str) -> Value {
        json!({"url": format!("https://{}{path}", self.address), "caBundle": STANDARD.encode(&self.ca)})
    }

    /// A `clientConfig` that leads to a service.
    pub(crate) fn service(&self, namespace: &str, name: &str, port: u16) -> Value {
        json!({"service": {"namespace": namespace, "name": name, "port": port, "path": "/svc"},
            "caBundle": STANDARD.encode(&self.ca)})
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn answered(answer: Answer, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let path = request.uri().to_string();
    let body = request.into_body().collect().await?.to_bytes();
    let mut value: Value = serde_json::from_slice(&body).unwrap_or_default();
    value["@path"] = path.into();
    let (code, answer) = answer(value);
    // No answer at all is asked for by a code of 0: the client must give up by itself.
    if code == 0 {
        std::future::pending::<()>().await;
    }
    let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
    *response.status_mut() = http::StatusCode::from_u16(code).unwrap();
    Ok(response)
}
