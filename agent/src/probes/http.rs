//! One HTTP GET of a probe or a hook.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;

/// Most of an answer that is read.
const BODY: usize = 10 * 1024;

/// Probes accept any certificate, as upstream's do: they ask whether a server answers, not who it is.
#[derive(Debug)]
struct AnyCertificate(rustls::crypto::WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

fn tls() -> Result<tokio_rustls::TlsConnector, String> {
    static CONNECTOR: std::sync::OnceLock<tokio_rustls::TlsConnector> = std::sync::OnceLock::new();
    if let Some(c) = CONNECTOR.get() {
        return Ok(c.clone());
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(AnyCertificate(provider.signature_verification_algorithms));
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(CONNECTOR.get_or_init(|| Arc::new(config).into()).clone())
}

/// What to GET.
#[derive(Debug, Clone)]
pub(crate) struct Get {
    pub(crate) ip: IpAddr,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) path: String,
    pub(crate) https: bool,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) agent: &'static str,
}

impl Get {
    fn url(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        format!("{scheme}://{}{}", authority(&self.host, self.port), self.path)
    }
}

pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Connects as Go says it.
pub(crate) async fn dial(ip: IpAddr, port: u16) -> Result<TcpStream, String> {
    let target = authority(&ip.to_string(), port);
    TcpStream::connect((ip, port)).await.map_err(|e| {
        let text = e.to_string().to_lowercase();
        let text = text.split(" (os error").next().unwrap_or_default().to_string();
        format!("dial tcp {target}: connect: {text}")
    })
}

/// What a server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    /// The beginning of the body.
    pub(crate) body: String,
    location: Option<String>,
}

/// Most redirects that are followed.
const REDIRECTS: usize = 10;

/// Where a redirect leads, when it stays on the host.
fn redirected(g: &Get, location: &str) -> Option<Get> {
    let absolute: http::Uri = match location.split_once("://") {
        Some(_) => location.parse().ok()?,
        None if location.starts_with('/') => format!("{}{location}", g.url().strip_suffix(&g.path)?).parse().ok()?,
        None => return None,
    };
    let host = absolute.host()?.trim_matches(['[', ']']);
    let https = absolute.scheme_str() == Some("https");
    let port = absolute.port_u16().unwrap_or(if https { 443 } else { 80 });
    let path = absolute.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
    (host == g.host).then(|| Get { port, path, https, ..g.clone() })
}

/// Does the GET and follows redirects that stay on the host; one that leaves it is the answer. The error is upstream's text.
pub(crate) async fn get(g: &Get, timeout: Duration) -> Result<Answered, String> {
    let url = g.url();
    let follow = async {
        let mut at = g.clone();
        for _ in 0..=REDIRECTS {
            let answer = exchange(&at).await?;
            let redirect = matches!(answer.status, 301 | 302 | 303 | 307 | 308);
            match answer.location.as_deref().filter(|_| redirect).and_then(|l| redirected(&at, l)) {
                Some(next) => at = next,
                None => return Ok(answer),
            }
        }
        Err(format!("stopped after {REDIRECTS} redirects"))
    };
    match tokio::time::timeout(timeout, follow).await {
        Ok(r) => r.map_err(|e| format!("Get {url:?}: {e}")),
        Err(_) => {
            Err(format!("Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)"))
        }
    }
}

async fn exchange(g: &Get) -> Result<Answered, String> {
    let stream = dial(g.ip, g.port).await?;
    let mut request = http::Request::get(if g.path.is_empty() { "/" } else { &g.path });
    let has = |n: &str| g.headers.iter().any(|(k, _)| k.eq_ignore_ascii_case(n));
    if !has("host") {
        request = request.header("Host", authority(&g.host, g.port));
    }
    if !has("user-agent") {
        request = request.header("User-Agent", g.agent);
    }
    if !has("accept") {
        request = request.header("Accept", "*/*");
    }
    request = request.header("Connection", "close");
    for (k, v) in g.headers.iter().filter(|(_, v)| !v.is_empty()) {
        request = request.header(k, v);
    }
    let request = request.body(Full::new(Bytes::new())).map_err(|e| e.to_string())?;
    if g.https {
        let name = ServerName::try_from(g.host.clone()).map_err(|e| e.to_string())?;
        let stream = tls()?.connect(name, stream).await.map_err(|e| e.to_string())?;
        answer(TokioIo::new(stream), request).await
    } else {
        answer(TokioIo::new(stream), request).await
    }
}

async fn answer<T>(io: T, request: http::Request<Full<Bytes>>) -> Result<Answered, String>
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(|e| e.to_string())?;
    let driver = tokio::spawn(connection);
    let result = async {
        let mut response = sender.send_request(request).await.map_err(|e| match e.is_incomplete_message() {
            true => "EOF".to_string(),
            false => e.to_string(),
        })?;
        let status = response.status().as_u16();
        let location = response.headers().get(http::header::LOCATION);
        let location = location.and_then(|l| l.to_str().ok()).map(str::to_owned);
        let mut body = Vec::new();
        while body.len() < BODY {
            match response.body_mut().frame().await {
                Some(Ok(f)) => body.extend_from_slice(f.data_ref().map_or(&[][..], |d| d)),
                _ => break,
            }
        }
        body.truncate(BODY);
        Ok(Answered { status, body: String::from_utf8_lossy(&body).into_owned(), location })
    }
    .await;
    driver.abort();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn at(port: u16, path: &str) -> Get {
        let ip: IpAddr = "127.0.0.1".parse().unwrap();
        Get { ip, host: ip.to_string(), port, path: path.into(), https: false, headers: vec![], agent: "test" }
    }

    #[test]
    fn redirects_stay_on_the_host() {
        let g = at(80, "/a?b");
        for (location, want) in [
            ("/c?d", Some((80, "/c?d"))),
            ("http://127.0.0.1:81/", Some((81, "/"))),
            ("http://0.0.0.0/", None),
            ("https://example.com/", None),
            ("nonsense", None),
        ] {
            let got = redirected(&g, location).map(|g| (g.port, g.path));
            assert_eq!(got, want.map(|(port, path)| (port, path.to_string())), "{location}");
        }
    }

    #[tokio::test]
    async fn redirects_are_followed_but_not_forever() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut s, _)) = listener.accept().await {
                let mut text = [0u8; 1024];
                let n = s.read(&mut text).await.unwrap();
                let head = match String::from_utf8_lossy(&text[..n]).split(' ').nth(1).unwrap() {
                    "/start" => "302 Found\r\nLocation: /end",
                    "/end" => "418 Teapot",
                    "/away" => "302 Found\r\nLocation: http://0.0.0.0/",
                    _ => "302 Found\r\nLocation: /loop",
                };
                s.write_all(format!("HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await.unwrap();
            }
        });
        let long = Duration::from_secs(10);
        let status = |path: &'static str| async move { get(&at(port, path), long).await.map(|a| a.status) };
        assert_eq!(status("/start").await, Ok(418));
        assert_eq!(status("/away").await, Ok(302));
        assert!(status("/loop").await.unwrap_err().ends_with("stopped after 10 redirects"));
    }
}
