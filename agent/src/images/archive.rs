//! Loads image archives from a directory, for machines without a network: OCI layouts (directories or tar files) and
//! `docker save` archives, plain or compressed.
//!
//! An archive is read at random (blobs lie in any order), so a compressed one is first expanded into a scratch file. Each
//! file is read once, and again when it has changed or one of its images has been removed: its path, size, time and names are
//! remembered with the index. What one may cost this machine is bounded ([`Limits`]).

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Take},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::Deserialize;

use super::{
    error::Error,
    manifest::{Manifest, here},
    pull,
    service::parse_reference,
    store::{self, Digest, Image, Store},
    unpack,
};

/// What reading an archive may cost; ordinary ones come nowhere near.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Bytes that any archive may expand to.
    bytes: u64,
    /// And that many times its own size, where that is more.
    ratio: u64,
    /// Files in it.
    members: usize,
    /// Bytes of the headers of one file: its name may be of any length.
    headers: u64,
    /// Bytes of a manifest or configuration: these are read into memory.
    document: u64,
}

const LIMITS: Limits = Limits { bytes: 1 << 30, ratio: 64, members: 100_000, headers: 1 << 20, document: 16 << 20 };

/// Loads archives in `dir`, in name order: all whose images are not here, or those that may have the image `wanted`. A bad one
/// does not keep the others out.
pub(super) fn load_directory(
    store: &Store,
    dir: &Path,
    wanted: Option<&str>,
) -> Vec<(PathBuf, Result<Vec<String>, Error>)> {
    let Ok(listing) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = listing.flatten().map(|entry| entry.path()).filter(|path| is_archive(path)).collect();
    paths.sort();
    let mut outcomes = Vec::new();
    for path in paths {
        let Ok(meta) = fs::metadata(&path) else { continue };
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        let modified = i128::try_from(modified.as_nanos()).unwrap_or_default();
        if !store.should_read(&path, meta.len(), modified, wanted) {
            continue;
        }
        let loaded = load(store, &path);
        let names = loaded.as_ref().cloned().unwrap_or_default();
        let read = store.archive_read(&path, store::Archive { size: meta.len(), modified, names });
        outcomes.push((path, loaded.and_then(|names| read.map(|()| names))));
    }
    outcomes
}

fn is_archive(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ending = [".tar", ".tar.gz", ".tgz", ".tar.zst"].iter().any(|ending| name.ends_with(ending));
    !name.starts_with('.') && (ending || path.join("oci-layout").is_file())
}

/// Where blobs are read from.
enum Source {
    Directory(PathBuf),
    Tar { file: File, members: BTreeMap<String, (u64, u64)> },
}

impl Source {
    fn open(&self, name: &str) -> std::io::Result<Take<File>> {
        match self {
            Source::Directory(dir) => Ok(File::open(dir.join(name))?.take(u64::MAX)),
            Source::Tar { file, members } => {
                let (offset, size) =
                    members.get(name).ok_or_else(|| std::io::Error::other(format!("no member \"{name}\"")))?;
                // A descriptor of its own would share the offset; reading is sequential, one member at a time.
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(*offset))?;
                Ok(file.take(*size))
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Source::Directory(dir) => dir.join(name).is_file(),
            Source::Tar { members, .. } => members.contains_key(name),
        }
    }

    /// A small member, whole.
    fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let (mut bytes, most) = (Vec::new(), LIMITS.document);
        let member = self.open(name).map_err(|error| format!("{name}: {error}"))?;
        member.take(most + 1).read_to_end(&mut bytes).map_err(|error| format!("{name}: {error}"))?;
        if bytes.len() as u64 > most { Err(format!("{name} has more than {most} bytes")) } else { Ok(bytes) }
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        serde_json::from_slice(&self.read(name)?).map_err(|error| format!("{name}: {error}"))
    }

    /// A blob of an OCI layout, verified.
    fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, String> {
        let digest = Digest::try_from(descriptor.digest().to_string())?;
        let name = blob_name(&digest);
        let bytes = self.read(&name)?;
        pull::check(&name, &digest, &Digest::of(&bytes)).map_err(|error| error.to_string())?;
        Ok(bytes)
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn load(store: &Store, path: &Path) -> Result<Vec<String>, Error> {
    let fail = |why: String| Error::Archive { path: path.to_owned(), why };
    let scratch = store.scratch("archive");
    let source = open(path, &scratch);
    // The descriptor keeps the content; the name is not needed.
    let _ = fs::remove_file(&scratch);
    let source = source.map_err(fail)?;
    // `docker save` writes both forms since version 25; its manifest.json carries the names.
    if source.has("manifest.json") {
        load_docker(store, &source, path)
    } else if source.has("index.json") {
        load_layout(store, &source, path)
    } else {
        Err(fail("neither an OCI layout (index.json) nor a docker archive (manifest.json)".to_owned()))
    }
}

fn open(path: &Path, scratch: &Path) -> Result<Source, String> {
    if path.is_dir() {
        return Ok(Source::Directory(path.to_owned()));
    }
    let text = |error: std::io::Error| error.to_string();
    let mut file = File::open(path).map_err(text)?;
    let mut magic = [0u8; 4];
    let known = file.read(&mut magic).map_err(text)?;
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    if known == 4 && magic.starts_with(&[0x1f, 0x8b]) {
        let reader = flate2::read::MultiGzDecoder::new(file.try_clone().map_err(text)?);
        file = expand(LIMITS, file, reader, scratch)?;
    } else if magic == [0x28, 0xb5, 0x2f, 0xfd] {
        let mut reader = zstd::Decoder::new(file.try_clone().map_err(text)?).map_err(text)?;
        reader.window_log_max(unpack::ZSTD_WINDOW).map_err(text)?;
        file = expand(LIMITS, file, reader, scratch)?;
    }
    let members = members(LIMITS, &file)?;
    Ok(Source::Tar { file, members })
}

/// The content of a compressed archive, in a file of its own.
fn expand(limits: Limits, packed: File, reader: impl Read, scratch: &Path) -> Result<File, String> {
    let text = |error: std::io::Error| error.to_string();
    let size = packed.metadata().map_err(text)?.len();
    let most = limits.bytes.max(size.saturating_mul(limits.ratio));
    let mut file = File::options().read(true).write(true).create_new(true).open(scratch).map_err(text)?;
    if std::io::copy(&mut reader.take(most + 1), &mut file).map_err(text)? > most {
        return Err(format!("{size} bytes expand to more than {most}"));
    }
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    Ok(file)
}

/// Reads headers alone: content is passed over by seeking.
struct Headers<'a> {
    file: &'a File,
    /// Bytes that the next member may still have of them.
    left: &'a Cell<u64>,
}

impl Read for Headers<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        let left = self.left.get().checked_sub(n as u64);
        self.left.set(left.ok_or_else(|| std::io::Error::other("a member's headers are too large"))?);
        Ok(n)
    }
}

impl Seek for Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

/// Where the files of a tar archive begin, and their sizes.
fn members(limits: Limits, file: &File) -> Result<BTreeMap<String, (u64, u64)>, String> {
    let text = |error: std::io::Error| error.to_string();
    let (mut members, mut links) = (BTreeMap::new(), Vec::new());
    let left = Cell::new(limits.headers);
    let mut archive = tar::Archive::new(Headers { file, left: &left });
    for entry in archive.entries_with_seek().map_err(text)? {
        let entry = entry.map_err(text)?;
        left.set(limits.headers);
        if members.len() + links.len() == limits.members {
            return Err(format!("more than {} files in it", limits.members));
        }
        let name = entry.path().map_err(text)?.to_string_lossy().trim_start_matches("./").to_owned();
        if entry.header().entry_type().is_file() {
            members.insert(name, (entry.raw_file_position(), entry.size()));
        } else if let (tar::EntryType::Symlink, Ok(Some(target))) = (entry.header().entry_type(), entry.link_name()) {
            links.push((name, target.to_string_lossy().into_owned()));
        }
    }
    // Older `docker save` writes a repeated layer as a link to the first: `ID/layer.tar -> ../OTHER/layer.tar`.
    for (name, target) in links {
        if let Some(place) = members.get(target.trim_start_matches("../")).copied() {
            members.insert(name, place);
        }
    }
    Ok(members)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn load_docker(store: &Store, source: &Source, path: &Path) -> Result<Vec<String>, Error> {
    let fail = |why: String| Error::Archive { path: path.to_owned(), why };
    let images: Vec<DockerImage> = source.parse("manifest.json").map_err(fail)?;
    let mut loaded = Vec::new();
    for image in images {
        let config = source.read(&image.config).map_err(fail)?;
        let tags = image.repo_tags.unwrap_or_default();
        let tags = if tags.is_empty() { vec![stem(path)] } else { tags };
        loaded.extend(add(store, source, path, &config, &image.layers, &tags, BTreeSet::new())?);
    }
    Ok(loaded)
}

fn load_layout(store: &Store, source: &Source, path: &Path) -> Result<Vec<String>, Error> {
    let fail = |why: String| Error::Archive { path: path.to_owned(), why };
    let index: ImageIndex = source.parse("index.json").map_err(fail)?;
    let mut loaded = Vec::new();
    for descriptor in index.manifests() {
        let name = layout_name(descriptor, path);
        let Some(manifest) = resolve(source, descriptor).map_err(fail)? else { continue };
        let config = source.blob(manifest.config()).map_err(fail)?;
        let layers: Result<Vec<String>, String> = manifest
            .layers()
            .iter()
            .map(|layer| Digest::try_from(layer.digest().to_string()).map(|digest| blob_name(&digest)))
            .collect();
        let layers = layers.map_err(fail)?;
        let mut repo_digests = BTreeSet::new();
        if let Ok(reference) = parse_reference(&name) {
            repo_digests.insert(format!("{}/{}@{}", reference.registry(), reference.repository(), descriptor.digest()));
        }
        loaded.extend(add(store, source, path, &config, &layers, &[name], repo_digests)?);
    }
    if loaded.is_empty() {
        return Err(fail("no image for this platform".to_owned()));
    }
    Ok(loaded)
}

/// The manifest for this machine behind a descriptor.
fn resolve(source: &Source, descriptor: &Descriptor) -> Result<Option<ImageManifest>, String> {
    let read = |d: &Descriptor| Manifest::parse(&source.blob(d)?).map_err(|e| format!("{}: {e}", d.digest()));
    let inner = match read(descriptor)? {
        Manifest::Image(manifest) => return Ok(Some(*manifest)),
        Manifest::Index(index) => here(&index).map(read).transpose()?,
    };
    Ok(inner.and_then(|m| if let Manifest::Image(manifest) = m { Some(*manifest) } else { None }))
}

/// The name of an image in a layout: containerd's annotation, a full reference, or the file's name with the tag given.
fn layout_name(descriptor: &Descriptor, path: &Path) -> String {
    let annotations = descriptor.annotations().clone().unwrap_or_default();
    if let Some(name) = annotations.get("io.containerd.image.name") {
        return name.clone();
    }
    match annotations.get("org.opencontainers.image.ref.name") {
        Some(name) if name.contains('/') || name.contains(':') => name.clone(),
        Some(tag) => format!("{}:{tag}", stem(path)),
        None => stem(path),
    }
}

/// The archive's file name without its endings, as an image name.
fn stem(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("image").to_lowercase();
    [".zst", ".gz", ".tgz", ".tar"]
        .iter()
        .fold(name, |name, ending| name.strip_suffix(ending).map_or(name.clone(), str::to_owned))
}

fn add(
    store: &Store,
    source: &Source,
    path: &Path,
    config_bytes: &[u8],
    layers: &[String],
    names: &[String],
    repo_digests: BTreeSet<String>,
) -> Result<Vec<String>, Error> {
    let fail = |why: String| Error::Archive { path: path.to_owned(), why };
    let config = store::parse_config(config_bytes).map_err(fail)?;
    let diff_ids = store::diff_ids(&config).map_err(fail)?;
    if diff_ids.len() != layers.len() {
        return Err(fail(format!("{} layers but {} diff ids", layers.len(), diff_ids.len())));
    }
    for (member, diff_id) in layers.iter().zip(&diff_ids) {
        if store.has_layer(diff_id) {
            continue;
        }
        let reader = source.open(member).map_err(|error| fail(format!("{member}: {error}")))?;
        pull::add_layer(store, reader, member, diff_id)
            .map_err(|error| if matches!(error, Error::Store { .. }) { error } else { fail(error.to_string()) })?;
    }
    let mut full = Vec::new();
    for name in names {
        full.push(parse_reference(name).map_err(|error| fail(error.to_string()))?.whole());
    }
    let image = Image {
        config: Digest::of(config_bytes),
        size: store.size_of(&diff_ids),
        layers: diff_ids,
        repo_digests,
        pulled_with: BTreeSet::new(),
    };
    store.add_image(&full, image, config_bytes)?;
    Ok(full)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn config_for(layer: &[u8]) -> Vec<u8> {
        json!({"architecture": "amd64", "os": "linux",
               "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer).to_string()]}})
        .to_string()
        .into_bytes()
    }

    fn docker_archive(layer: &[u8]) -> Vec<u8> {
        let manifest = json!([{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["l/layer.tar"]}]).to_string();
        tar_of(&[
            ("l/layer.tar", layer),
            ("c.json", &config_for(&tar_of(&[("hello", b"world")]))),
            ("manifest.json", manifest.as_bytes()),
        ])
    }

    fn oci_archive(layer: &[u8], blob_hex: &str) -> Vec<u8> {
        let config = config_for(&tar_of(&[("hello", b"world")]));
        let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": config.len(),
                "digest": Digest::of(&config).to_string()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "size": layer.len(),
                "digest": format!("sha256:{blob_hex}")}]})
        .to_string();
        let digest = Digest::of(manifest.as_bytes());
        let index =
            json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest.to_string(), "size": manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": "v2"}}]})
            .to_string();
        tar_of(&[
            ("index.json", index.as_bytes()),
            (&blob_name(&Digest::of(&config)), &config),
            (&blob_name(&digest), manifest.as_bytes()),
            (&format!("blobs/sha256/{blob_hex}"), layer),
        ])
    }

    #[test]
    fn both_archive_forms_load_once() {
        let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let layer = tar_of(&[("hello", b"world")]);
        fs::write(images.path().join("a.tar"), docker_archive(&layer)).unwrap();
        let oci = oci_archive(&layer, Digest::of(&layer).hex());
        fs::write(images.path().join("web.tar.zst"), zstd::encode_all(&oci[..], 1).unwrap()).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let outcomes = load_directory(&store, images.path(), None);
        let names: Vec<_> = outcomes.into_iter().flat_map(|(_, result)| result.unwrap()).collect();
        assert_eq!(names, ["docker.io/library/app:1", "docker.io/library/web:v2"]);
        let handle = store.lookup("docker.io/library/web:v2").unwrap().unwrap();
        assert_eq!(fs::read_to_string(handle.layers[0].join("hello")).unwrap(), "world");
        assert!(load_directory(&store, images.path(), None).is_empty());
        // Once removed it comes back when it is asked for, and nothing else is read.
        store.remove(&handle.id).unwrap();
        assert!(load_directory(&store, images.path(), Some("docker.io/library/other:1")).is_empty());
        let again = load_directory(&store, images.path(), Some("docker.io/library/web:v2"));
        assert_eq!(again.len(), 1);
        assert!(store.lookup("docker.io/library/web:v2").unwrap().is_some());
    }

    #[test]
    fn a_corrupt_layer_is_refused_and_leaves_nothing() {
        let (dir, images) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(images.path().join("bad.tar"), docker_archive(&tar_of(&[("hello", b"w0rld")]))).unwrap();
        let store = Store::open(dir.path()).unwrap();
        let outcomes = load_directory(&store, images.path(), None);
        let error = outcomes[0].1.as_ref().unwrap_err().to_string();
        assert!(error.contains("bad.tar") && error.contains("digest mismatch"), "{error}");
        // It is told of again at the next start, not whenever some image is pulled.
        assert!(load_directory(&store, images.path(), Some("docker.io/library/app:1")).is_empty());
        assert_eq!(load_directory(&store, images.path(), None).len(), 1);
        assert!(store.list().is_empty());
        assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn what_an_archive_may_cost_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let (packed, scratch) = (dir.path().join("bomb.tar.zst"), dir.path().join("scratch"));
        let zeros = zstd::encode_all(&vec![0; 1 << 20][..], 1).unwrap();
        fs::write(&packed, &zeros).unwrap();
        let expanded = |limits| {
            fs::remove_file(&scratch).ok();
            expand(limits, File::open(&packed).unwrap(), zstd::Decoder::new(&zeros[..]).unwrap(), &scratch)
                .map(|file| file.metadata().unwrap().len())
        };
        let limits = Limits { bytes: 1000, ratio: 2, ..LIMITS };
        let most = 1000.max(2 * zeros.len());
        assert_eq!(expanded(limits), Err(format!("{} bytes expand to more than {most}", zeros.len())));
        assert_eq!(expanded(Limits { bytes: 1 << 20, ..limits }), Ok(1 << 20));

        let of = |limits, tar: Vec<u8>| {
            fs::write(&packed, tar).unwrap();
            members(limits, &File::open(&packed).unwrap()).map(|m| m.len())
        };
        let many: Vec<String> = (0..5).map(|n| format!("{}{n}", "x".repeat(3000))).collect();
        let many: Vec<(&str, &[u8])> = many.iter().map(|name| (name.as_str(), &b"content"[..])).collect();
        assert_eq!(of(Limits { headers: 5000, ..LIMITS }, tar_of(&many)), Ok(5));
        let few = of(Limits { headers: 4000, ..LIMITS }, tar_of(&many));
        assert!(few.as_ref().is_err_and(|why| why.contains("headers are too large")), "{few:?}");
        assert_eq!(of(Limits { members: 4, ..LIMITS }, tar_of(&many)), Err("more than 4 files in it".into()));
    }

    #[test]
    fn something_else_is_named() {
        let images = tempfile::tempdir().unwrap();
        fs::write(images.path().join("x.tar"), tar_of(&[("readme", b"")])).unwrap();
        let store_dir = tempfile::tempdir().unwrap();
        let store = Store::open(store_dir.path()).unwrap();
        let outcomes = load_directory(&store, images.path(), None);
        assert!(outcomes[0].1.as_ref().unwrap_err().to_string().contains("neither an OCI layout"));
    }
}
