//! Pulls one image from a registry.
//!
//! Manifest (an index is resolved to this machine's platform), configuration, then the layers that are not here yet:
//! each is downloaded to a file that keeps what has come when the connection breaks, its digest verified, unpacked, and its
//! diff id compared with the configuration's. <https://github.com/opencontainers/distribution-spec/blob/main/spec.md>

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use oci_client::{
    Client, Reference, RegistryOperation,
    client::{BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    manifest::{ImageIndexEntry, OciDescriptor, OciImageManifest, OciManifest},
    secrets::RegistryAuth,
};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWrite, AsyncWriteExt, BufWriter};

use super::{
    DockerConfig, ImageHandle, Pulled, credentials,
    error::{Error, chain, store_error},
    hosts::{self, Endpoint},
    service::{Inner, PARALLEL_DOWNLOADS, blocking},
    store::{self, Digest, Image},
    unpack,
};

/// Configurations larger than this are refused.
const MAX_CONFIG: i64 = 8 << 20;

/// Pulls `reference`; tries every endpoint of its registry and every matching credential until one works.
pub(super) async fn pull(
    inner: &Arc<Inner>,
    name: &str,
    reference: &Reference,
    secrets: &[DockerConfig],
) -> Result<ImageHandle, Error> {
    let endpoints = hosts::endpoints(&inner.hosts_dir, reference.registry())?;
    let mut node = credentials::read(&inner.node_credentials)?;
    let providers = inner.providers.read().clone();
    node.auths.extend(providers.of(reference).await.auths);
    let credentials = credentials::candidates(reference, secrets, &node);
    let mut failure = None;
    for endpoint in &endpoints {
        let client = client(endpoint)?;
        let there = at(endpoint, reference);
        for auth in &credentials {
            let mark = credentials::mark(reference, auth, &node);
            match pull_from(inner, name, reference, &there, &client, (auth, mark)).await {
                Ok(image) => return Ok(image),
                // What a registry sent was wrong, or this disk failed: another source does not mend that.
                Err(error @ (Error::Store { .. } | Error::Digest { .. } | Error::Layer { .. })) => {
                    return Err(error);
                }
                Err(error) => failure = Some(error),
            }
        }
    }
    Err(failure.unwrap_or_else(|| Error::Pull { name: name.to_owned(), why: "no endpoint to ask".to_owned() }))
}

/// The same image at an endpoint.
fn at(endpoint: &Endpoint, reference: &Reference) -> Reference {
    let (host, repository) = (endpoint.host.clone(), format!("{}{}", endpoint.prefix, reference.repository()));
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => Reference::with_digest(host, repository, digest.to_owned()),
        (None, tag) => Reference::with_tag(host, repository, tag.unwrap_or("latest").to_owned()),
    }
}

fn client(endpoint: &Endpoint) -> Result<Client, Error> {
    let mut certificates = Vec::new();
    for path in &endpoint.ca {
        let data = std::fs::read(path).map_err(|e| Error::Config { path: path.clone(), why: e.to_string() })?;
        certificates.push(Certificate { encoding: CertificateEncoding::Pem, data });
    }
    let config = ClientConfig {
        protocol: if endpoint.plain { ClientProtocol::Http } else { ClientProtocol::Https },
        accept_invalid_certificates: endpoint.skip_verify,
        tls_certs_only: certificates,
        platform_resolver: None,
        connect_timeout: Some(Duration::from_secs(10)),
        read_timeout: Some(Duration::from_secs(60)),
        user_agent: concat!("isopod/", env!("CARGO_PKG_VERSION")),
        ..ClientConfig::default()
    };
    Client::try_from(config)
        .map_err(|error| Error::Pull { name: endpoint.host.clone(), why: format!("TLS set-up: {}", chain(&error)) })
}

async fn pull_from(
    inner: &Arc<Inner>,
    name: &str,
    reference: &Reference,
    there: &Reference,
    client: &Client,
    (auth, mark): (&RegistryAuth, String),
) -> Result<ImageHandle, Error> {
    let started = Instant::now();
    let fail = |error: OciDistributionError| classify(name, error);
    client.auth(there, auth, RegistryOperation::Pull).await.map_err(fail)?;
    let (manifest, digest) = client.pull_manifest(there, auth).await.map_err(fail)?;
    let (manifest, digest) = match manifest {
        OciManifest::Image(manifest) => (manifest, digest),
        OciManifest::ImageIndex(index) => {
            let entry = platform(&index.manifests).ok_or_else(|| Error::Pull {
                name: name.to_owned(),
                why: format!("no match for platform linux/{} in manifest", architecture()),
            })?;
            let whole = there.clone_with_digest(entry.digest.clone());
            let (manifest, _) = client.pull_image_manifest(&whole, auth).await.map_err(fail)?;
            (manifest, digest)
        }
    };
    let repo_digest = format!("{}/{}@{digest}", reference.registry(), reference.repository());
    let image = fetch(inner, name, there, client, &manifest).await?;
    let Fetched { config_digest, config_bytes, diff_ids, bytes } = image;
    let image = Image {
        config: config_digest,
        size: inner.store.size_of(&diff_ids),
        layers: diff_ids,
        repo_digests: BTreeSet::from([repo_digest.clone()]),
        pulled_with: BTreeSet::from([mark]),
    };
    let task = {
        let (inner, image, names) = (inner.clone(), image.clone(), vec![reference.whole(), repo_digest]);
        move || inner.store.add_image(&names, image, &config_bytes)
    };
    blocking(task).await?;
    let took = started.elapsed();
    inner.store.handle(&reference.whole(), &image, Some(Pulled { took, including_waiting: took, size: bytes }))
}

struct Fetched {
    config_digest: Digest,
    config_bytes: Vec<u8>,
    diff_ids: Vec<Digest>,
    bytes: u64,
}

async fn fetch(
    inner: &Arc<Inner>,
    name: &str,
    there: &Reference,
    client: &Client,
    manifest: &OciImageManifest,
) -> Result<Fetched, Error> {
    let broken = |why: String| Error::Pull { name: name.to_owned(), why };
    if manifest.config.size > MAX_CONFIG {
        return Err(broken(format!("configuration of {} bytes is too large", manifest.config.size)));
    }
    let config_digest = Digest::try_from(manifest.config.digest.clone()).map_err(broken)?;
    let mut config_bytes = Vec::new();
    fetch_small(client, name, there, &manifest.config, &mut config_bytes).await?;
    check(&format!("configuration of {name}"), &config_digest, &Digest::of(&config_bytes))?;
    let config = store::parse_config(&config_bytes).map_err(broken)?;
    let diff_ids = store::diff_ids(&config).map_err(broken)?;
    if diff_ids.len() != manifest.layers.len() {
        let (layers, ids) = (manifest.layers.len(), diff_ids.len());
        return Err(broken(format!("manifest has {layers} layers, configuration {ids} diff ids")));
    }
    let pairs: Vec<(OciDescriptor, Digest)> = manifest.layers.iter().cloned().zip(diff_ids.iter().cloned()).collect();
    let bytes = stream::iter(pairs)
        .map(|(layer, diff_id)| fetch_layer(inner, name, there, client, layer, diff_id))
        .buffer_unordered(PARALLEL_DOWNLOADS)
        .try_fold(0, |sum, bytes| async move { Ok(sum + bytes) })
        .await?;
    Ok(Fetched { config_digest, config_bytes, diff_ids, bytes })
}

/// Fetches a small blob; its digest is verified on the way.
async fn fetch_small(
    client: &Client,
    name: &str,
    there: &Reference,
    blob: &OciDescriptor,
    out: impl AsyncWrite + Unpin,
) -> Result<(), Error> {
    let stream = client.pull_blob_stream(there, blob).await.map_err(|error| classify(name, error))?;
    let taken = take(stream, blob.size, out).await;
    taken.map_err(|why| Error::Pull { name: name.to_owned(), why: format!("blob {}: {why}", blob.digest) })
}

/// Writes what comes, up to the size that was announced: who sends more sends it without end.
async fn take(
    mut stream: impl Stream<Item = std::io::Result<Bytes>> + Unpin,
    size: i64,
    mut out: impl AsyncWrite + Unpin,
) -> Result<(), String> {
    let mut left = usize::try_from(size).map_err(|_| format!("a size of {size} bytes"))?;
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(|error| chain(&error))?;
        left = left
            .checked_sub(bytes.len())
            .ok_or_else(|| format!("is larger than the {size} bytes it has by the manifest"))?;
        out.write_all(&bytes).await.map_err(|error| format!("write: {error}"))?;
    }
    out.flush().await.map_err(|error| format!("write: {error}"))
}

async fn fetch_layer(
    inner: &Arc<Inner>,
    name: &str,
    there: &Reference,
    client: &Client,
    layer: OciDescriptor,
    diff_id: Digest,
) -> Result<u64, Error> {
    if inner.store.has_layer(&diff_id) {
        return Ok(0);
    }
    let Ok(_slot) = inner.downloads.acquire().await else { return Ok(0) };
    let blob = Digest::try_from(layer.digest.clone()).map_err(|why| Error::Pull { name: name.to_owned(), why })?;
    let _turn = inner.turn(&layer.digest).await;
    // Another image that has it may have brought it meanwhile.
    if inner.store.has_layer(&diff_id) {
        return Ok(0);
    }
    let path = inner.store.download(&blob);
    download(name, there, client, &layer, &blob, &path).await?;
    let inner = inner.clone();
    let bytes = u64::try_from(layer.size).unwrap_or_default();
    blocking(move || {
        let file = std::fs::File::open(&path).map_err(store_error("open", &path))?;
        let added = add_layer(&inner.store, file, &layer.digest, &diff_id);
        // Whole and verified: what cannot be made of it now cannot be made of it later either, unless the disk was full.
        std::fs::remove_file(&path).map_err(store_error("remove", &path))?;
        added
    })
    .await?;
    Ok(bytes)
}

/// Most times that a download goes on after its connection broke, within one pull.
const CONTINUATIONS: usize = 5;

/// Brings a blob to `path`, going on where an earlier try ended, and verifies it.
async fn download(
    name: &str,
    there: &Reference,
    client: &Client,
    layer: &OciDescriptor,
    blob: &Digest,
    path: &Path,
) -> Result<(), Error> {
    let size = u64::try_from(layer.size).unwrap_or_default();
    let mut options = tokio::fs::OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path).await;
    let mut file = file.map_err(store_error("create", path))?;
    let mut hash = Sha256::new();
    let mut have = 0;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer).await.map_err(store_error("read", path))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        have += n as u64;
    }
    drop(buffer);
    // What comes is in small pieces, and each write is a journey to another thread.
    let mut file = BufWriter::with_capacity(1 << 20, file);
    for tries in 0.. {
        if have >= size && have > 0 {
            break;
        }
        let answer = client.pull_blob_stream_partial(there, layer, have, None).await;
        let mut stream = match answer.map_err(|error| classify(name, error))? {
            BlobResponse::Partial(rest) => rest.stream,
            BlobResponse::Full(whole) => {
                // It does not know ranges: from the beginning, then.
                (have, hash) = (0, Sha256::new());
                file.get_mut().set_len(0).await.map_err(store_error("truncate", path))?;
                file.rewind().await.map_err(store_error("seek", path))?;
                whole.stream
            }
        };
        let before = have;
        let mut broken = None;
        while let Some(part) = stream.next().await {
            match part {
                Ok(bytes) => {
                    hash.update(&bytes);
                    have += bytes.len() as u64;
                    if have > size {
                        let _ = std::fs::remove_file(path);
                        let why = format!("{blob} is larger than the {size} bytes its manifest says");
                        return Err(Error::Pull { name: name.to_owned(), why });
                    }
                    let written = file.write_all(&bytes).await;
                    // A full disk is not helped by keeping this.
                    written.inspect_err(|_| drop(std::fs::remove_file(path))).map_err(store_error("write", path))?;
                }
                Err(error) => {
                    broken = Some(error.to_string());
                    break;
                }
            }
        }
        file.flush().await.map_err(store_error("write", path))?;
        match broken {
            None => break,
            // What has come is kept: the next pull goes on from there.
            Some(why) if have == before || tries >= CONTINUATIONS => {
                return Err(Error::Pull { name: name.to_owned(), why: format!("download of {blob}: {why}") });
            }
            Some(why) => tracing::info!(name, %blob, have, size, why, "the download broke off and goes on"),
        }
    }
    let actual = Digest::from_hash(hash.finalize().as_slice());
    check(&format!("blob of {name}"), blob, &actual).inspect_err(|_| {
        // Nothing of it is of use.
        let _ = std::fs::remove_file(path);
    })
}

/// Unpacks a verified layer blob and puts it in place, provided that its content is what the configuration says.
pub(super) fn add_layer(
    store: &store::Store,
    reader: impl std::io::Read,
    blob: &str,
    diff_id: &Digest,
) -> Result<(), Error> {
    let dir = store.scratch("layer");
    std::fs::create_dir(&dir).map_err(store_error("create", &dir))?;
    let result = unpack::unpack(reader, &dir)
        .map_err(|why| Error::Layer { digest: blob.to_owned(), why })
        .and_then(|unpacked| check(&format!("layer {blob}"), diff_id, &unpacked.diff_id).map(|()| unpacked.size))
        .and_then(|size| store.add_layer(diff_id, &dir, size));
    if result.is_err() {
        // What stays is removed at the next start.
        let _ = std::fs::remove_dir_all(&dir);
    }
    result
}

pub(super) fn check(what: &str, expected: &Digest, actual: &Digest) -> Result<(), Error> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::Digest { what: what.to_owned(), expected: expected.to_string(), actual: actual.to_string() })
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// This machine's entry of an image index: no variant or the plainest one first.
fn platform(entries: &[ImageIndexEntry]) -> Option<&ImageIndexEntry> {
    let matches = entries.iter().filter(|entry| {
        entry
            .platform
            .as_ref()
            .is_some_and(|p| p.os.to_string() == "linux" && p.architecture.to_string() == architecture())
    });
    let variant =
        |entry: &&ImageIndexEntry| entry.platform.as_ref().and_then(|p| p.variant.clone()).unwrap_or_default();
    matches.min_by_key(variant).or_else(|| entries.iter().find(|entry| entry.platform.is_none()))
}

fn classify(name: &str, error: OciDistributionError) -> Error {
    let name = name.to_owned();
    match &error {
        OciDistributionError::ImageManifestNotFoundError(_) => Error::NotFound { name },
        OciDistributionError::RegistryError { envelope, .. } => match envelope.errors.first().map(|e| &e.code) {
            Some(OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::NotFound) => {
                Error::NotFound { name }
            }
            Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => Error::Denied { name, why: chain(&error) },
            _ => Error::Pull { name, why: chain(&error) },
        },
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            Error::Denied { name, why: chain(&error) }
        }
        OciDistributionError::ServerError { code: 404, .. } => Error::NotFound { name },
        _ => Error::Pull { name, why: chain(&error) },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::TcpListener,
    };

    use super::*;

    /// A registry with one blob, which sends only so many bytes on each connection; what it was asked for.
    fn registry(blob: Vec<u8>, each: usize, ranges: bool) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let mut asked = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let head: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
                if head[0].contains("/stop") {
                    return asked;
                }
                let range = head.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                let from = range.as_ref().filter(|_| ranges).map_or(0, |r| r.trim_end_matches('-').parse().unwrap());
                asked.push(range.unwrap_or_default());
                let status = if ranges { "206 Partial Content" } else { "200 OK" };
                let rest = &blob[from..];
                write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", rest.len())
                    .unwrap();
                stream.write_all(&rest[..rest.len().min(each)]).unwrap();
            }
        });
        (address, server)
    }

    async fn pulled(blob: &[u8], each: usize, ranges: bool, begun: &[u8]) -> (Result<Vec<u8>, String>, Vec<String>) {
        let (address, server) = registry(blob.to_vec(), each, ranges);
        let there = Reference::with_tag(address.clone(), "team/app".into(), "1".into());
        let endpoint =
            Endpoint { host: address.clone(), plain: true, skip_verify: false, ca: Vec::new(), prefix: String::new() };
        let client = client(&endpoint).unwrap();
        let digest = Digest::of(b"0123456789");
        let layer = OciDescriptor { digest: digest.to_string(), size: 10, ..OciDescriptor::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, begun).unwrap();
        let done = download("app:1", &there, &client, &layer, &digest, &path).await;
        let mut stop = std::net::TcpStream::connect(&address).unwrap();
        stop.write_all(b"GET /stop HTTP/1.1\r\n\r\n").unwrap();
        (done.map(|()| std::fs::read(&path).unwrap()).map_err(|e| e.to_string()), server.join().unwrap())
    }

    #[tokio::test]
    async fn a_download_goes_on_where_it_broke_off() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let blob = b"0123456789";
        let (done, asked) = pulled(blob, 4, true, b"").await;
        assert_eq!((done.unwrap().as_slice(), asked), (&blob[..], vec!["0-".into(), "4-".into(), "8-".into()]));
        // What an earlier pull, or an earlier agent, left is not fetched again.
        let (done, asked) = pulled(blob, 10, true, b"01234").await;
        assert_eq!((done.unwrap().as_slice(), asked), (&blob[..], vec!["5-".into()]));
        // A registry without ranges begins again; a beginning of something else is found out.
        let (done, _) = pulled(blob, 10, false, b"01").await;
        assert_eq!(done.unwrap(), blob);
        let (done, _) = pulled(blob, 10, true, b"xx").await;
        assert!(done.unwrap_err().contains("sha256"));
        let (done, _) = pulled(b"0123456789 and more", 30, true, b"").await;
        assert!(done.unwrap_err().contains("larger than"), "endless bodies are cut off");
    }

    #[tokio::test]
    async fn a_blob_without_end_ends() {
        let chunks = |n: usize| stream::iter((0..n).map(|_| Ok(Bytes::from_static(&[0; 100]))));
        let mut out = vec![];
        take(chunks(3), 300, &mut out).await.unwrap();
        assert_eq!(out.len(), 300);
        let why = take(chunks(usize::MAX), 250, &mut tokio::io::sink()).await.unwrap_err();
        assert_eq!(why, "is larger than the 250 bytes it has by the manifest");
        assert_eq!(take(chunks(1), -1, &mut tokio::io::sink()).await.unwrap_err(), "a size of -1 bytes");
    }
}
