//! Pulls one image from a registry.
//!
//! Manifest (an index is resolved to this machine's platform), configuration, then the layers that are not here yet:
//! each is [downloaded](super::download), its digest verified, unpacked, and its diff id compared with the configuration's. <https://github.com/opencontainers/distribution-spec/blob/main/spec.md>

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use futures::{StreamExt, TryStreamExt, stream};
use oci_spec::{
    distribution::Reference,
    image::{Descriptor, ImageManifest},
};

use super::{
    DockerConfig, ImageHandle, Pulled, credentials,
    download::download,
    error::{Error, store_error},
    hosts,
    manifest::{Manifest, architecture, here},
    registry::{self, Registry},
    service::{Inner, PARALLEL_DOWNLOADS, blocking},
    store::{self, Digest, Image},
    unpack,
};

/// Configurations larger than this are refused.
const MAX_CONFIG: u64 = 8 << 20;

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
        let http = registry::http(endpoint)?;
        for auth in &credentials {
            let mark = credentials::mark(reference, auth.as_ref(), &node);
            let there = Registry::new(http.clone(), endpoint, name, reference, auth.clone());
            match pull_from(inner, reference, &there, mark).await {
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

async fn pull_from(
    inner: &Arc<Inner>,
    reference: &Reference,
    there: &Registry,
    mark: String,
) -> Result<ImageHandle, Error> {
    let started = Instant::now();
    let wanted = reference.digest().or(reference.tag()).unwrap_or("latest");
    let (digest, manifest) = manifest(there, wanted).await?;
    let manifest = match manifest {
        Manifest::Image(manifest) => manifest,
        Manifest::Index(index) => {
            let missing = || broken(there, format!("no match for platform linux/{} in manifest", architecture()));
            let entry = here(&index).ok_or_else(missing)?;
            match self::manifest(there, entry.digest().as_ref()).await?.1 {
                Manifest::Image(manifest) => manifest,
                Manifest::Index(_) => return Err(broken(there, "a list of images within a list".into())),
            }
        }
    };
    let repo_digest = format!("{}/{}@{digest}", reference.registry(), reference.repository());
    let image = fetch(inner, there, &manifest).await?;
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

fn broken(there: &Registry, why: String) -> Error {
    Error::Pull { name: there.name().to_owned(), why }
}

/// A manifest by tag or digest, and its digest.
async fn manifest(there: &Registry, wanted: &str) -> Result<(Digest, Manifest), Error> {
    let bytes = there.manifest(wanted).await?;
    let digest = Digest::of(&bytes);
    if wanted.contains(':') {
        let expected = Digest::try_from(wanted.to_owned()).map_err(|why| broken(there, why))?;
        check(&format!("manifest of {}", there.name()), &expected, &digest)?;
    }
    let manifest = Manifest::parse(&bytes).map_err(|e| broken(there, format!("manifest {wanted}: {e}")))?;
    Ok((digest, manifest))
}

async fn fetch(inner: &Arc<Inner>, there: &Registry, manifest: &ImageManifest) -> Result<Fetched, Error> {
    let broken = |why: String| broken(there, why);
    let size = manifest.config().size();
    if size > MAX_CONFIG {
        return Err(broken(format!("configuration of {size} bytes is too large")));
    }
    let config_digest = Digest::try_from(manifest.config().digest().to_string()).map_err(broken)?;
    let config_bytes = there.small(&config_digest, usize::try_from(size).unwrap_or(0)).await?;
    check(&format!("configuration of {}", there.name()), &config_digest, &Digest::of(&config_bytes))?;
    let config = store::parse_config(&config_bytes).map_err(broken)?;
    let diff_ids = store::diff_ids(&config).map_err(broken)?;
    if diff_ids.len() != manifest.layers().len() {
        let (layers, ids) = (manifest.layers().len(), diff_ids.len());
        return Err(broken(format!("manifest has {layers} layers, configuration {ids} diff ids")));
    }
    let pairs: Vec<(Descriptor, Digest)> = manifest.layers().iter().cloned().zip(diff_ids.iter().cloned()).collect();
    let bytes = stream::iter(pairs)
        .map(|(layer, diff_id)| fetch_layer(inner, there, layer, diff_id))
        .buffer_unordered(PARALLEL_DOWNLOADS)
        .try_fold(0, |sum, bytes| async move { Ok(sum + bytes) })
        .await?;
    Ok(Fetched { config_digest, config_bytes, diff_ids, bytes })
}

async fn fetch_layer(inner: &Arc<Inner>, there: &Registry, layer: Descriptor, diff_id: Digest) -> Result<u64, Error> {
    if inner.store.has_layer(&diff_id) {
        return Ok(0);
    }
    let Ok(_slot) = inner.downloads.acquire().await else { return Ok(0) };
    let digest = layer.digest().to_string();
    let blob = Digest::try_from(digest.clone()).map_err(|why| broken(there, why))?;
    let _turn = inner.turn(&digest).await;
    // Another image that has it may have brought it meanwhile.
    if inner.store.has_layer(&diff_id) {
        return Ok(0);
    }
    let path = inner.store.download(&blob);
    download(there, &blob, layer.size(), &path).await?;
    let inner = inner.clone();
    blocking(move || {
        let file = std::fs::File::open(&path).map_err(store_error("open", &path))?;
        let added = add_layer(&inner.store, file, &digest, &diff_id);
        // Whole and verified: what cannot be made of it now cannot be made of it later either, unless the disk was full.
        std::fs::remove_file(&path).map_err(store_error("remove", &path))?;
        added
    })
    .await?;
    Ok(layer.size())
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
