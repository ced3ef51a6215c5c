//! The content store: image configurations, unpacked layers, and the index of names.
//!
//! ```text
//! ROOT/index.json              names -> images; replaced atomically
//! ROOT/configs/sha256/HEX      image configurations, named by their digest
//! ROOT/layers/HEX/             one unpacked layer, named by its diff id (digest of the uncompressed tar)
//! ROOT/tmp/                    work in progress; removed at start
//! ```
//!
//! Order of a write: layer directories, then the configuration, then the index, each moved into place complete and after
//! the file system was synced. A name in the index therefore always leads to a whole image. Compressed blobs are not
//! kept: the layers are what containers need.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use oci_spec::image::ImageConfiguration;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::{
    ImageHandle, ImageInfo, Pulled,
    error::{Error, store_error},
};

/// A `sha256:HEX` digest, known to be well-formed (so that it is safe in a path).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Digest(String);

impl Digest {
    /// Of some bytes.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self::from_hash(Sha256::digest(bytes).as_slice())
    }

    /// From a finished hash.
    pub(super) fn from_hash(hash: &[u8]) -> Self {
        use std::fmt::Write;
        let mut hex = String::with_capacity(64);
        for byte in hash {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Self(hex)
    }

    pub(super) fn hex(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => {
                Ok(Self(hex.to_owned()))
            }
            _ => Err(format!("\"{text}\" is not a sha256 digest")),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

/// A complete image, ready to be given a name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Image {
    /// Digest of the configuration: the image id.
    pub(super) config: Digest,
    /// Diff ids, lowest layer first.
    pub(super) layers: Vec<Digest>,
    /// Bytes of all unpacked layers.
    pub(super) size: u64,
    /// `repo@sha256:...` names under which it came.
    #[serde(default)]
    pub(super) repo_digests: BTreeSet<String>,
    /// Who may use it without asking its registry: marks of credentials it was pulled with, [`ANYBODY`] for everyone. Empty
    /// is an image nobody pulled.
    #[serde(default)]
    pub(super) pulled_with: BTreeSet<String>,
}

/// Mark of an image that was pulled without a pod's own credentials.
pub(super) const ANYBODY: &str = "";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    /// By full name (`docker.io/library/busybox:1`), also by `repo@digest`.
    images: BTreeMap<String, Image>,
    /// Bytes per unpacked layer.
    layers: BTreeMap<String, u64>,
    /// Archives that were read.
    #[serde(default)]
    read: BTreeMap<PathBuf, Archive>,
}

/// An archive file as it was when it was read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Archive {
    pub(super) size: u64,
    /// Nanoseconds since 1970.
    pub(super) modified: i128,
    /// Full names of its images; none when it could not be read.
    pub(super) names: Vec<String>,
}

pub(super) struct Store {
    root: PathBuf,
    index: Mutex<Index>,
    configs: Mutex<BTreeMap<String, Arc<ImageConfiguration>>>,
    changed: watch::Sender<()>,
}

/// How long the beginning of a download is kept for the rest.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Removes beginnings of downloads that nobody has gone on with for so long.
fn drop_downloads(root: &Path, idle: Duration) {
    for entry in fs::read_dir(root.join("downloads")).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age >= idle) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// Removes configurations of images that are gone.
fn drop_configs(root: &Path, index: &Index) {
    let used: BTreeSet<&str> = index.images.values().map(|i| i.config.hex()).collect();
    for entry in fs::read_dir(root.join("configs/sha256")).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_none_or(|name| !used.contains(name)) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

impl Store {
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let tmp = root.join("tmp");
        if tmp.exists() {
            fs::remove_dir_all(&tmp).map_err(store_error("remove", &tmp))?;
        }
        for dir in [&tmp, &root.join("configs/sha256"), &root.join("layers"), &root.join("downloads")] {
            fs::create_dir_all(dir).map_err(store_error("create", dir))?;
        }
        drop_downloads(root, KEPT);
        let path = root.join("index.json");
        let index = match fs::read(&path) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(index) => index,
                Err(error) => {
                    let aside = root.join("index.json.unreadable");
                    fs::rename(&path, &aside).map_err(store_error("rename", &path))?;
                    tracing::error!(path = %path.display(), kept = %aside.display(), %error,
                        "image index is unreadable; images will be fetched again");
                    Index::default()
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Index::default(),
            Err(error) => return Err(store_error("read", &path)(error)),
        };
        drop_configs(root, &index);
        Ok(Self {
            root: root.to_owned(),
            index: Mutex::new(index),
            configs: Mutex::default(),
            changed: watch::channel(()).0,
        })
    }

    /// A new empty file or directory name under `tmp/`.
    pub(super) fn scratch(&self, prefix: &str) -> PathBuf {
        self.root.join("tmp").join(format!("{prefix}-{}", uuid::Uuid::new_v4()))
    }

    /// Where a blob is downloaded to: what is there of it already need not come again.
    pub(super) fn download(&self, blob: &Digest) -> PathBuf {
        self.root.join("downloads").join(blob.hex())
    }

    pub(super) fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    pub(super) fn has_layer(&self, diff_id: &Digest) -> bool {
        self.index.lock().layers.contains_key(diff_id.hex()) && self.layer_dir(diff_id).is_dir()
    }

    /// Moves a completely unpacked layer into place.
    pub(super) fn add_layer(&self, diff_id: &Digest, unpacked: &Path, size: u64) -> Result<(), Error> {
        let to = self.layer_dir(diff_id);
        sync_file_system(unpacked)?;
        let mut index = self.index.lock();
        if to.exists() {
            // Either an equal layer finished meanwhile, or one from before a lost index: both are whole.
            fs::remove_dir_all(unpacked).map_err(store_error("remove", unpacked))?;
        } else {
            fs::rename(unpacked, &to).map_err(store_error("rename", &to))?;
        }
        index.layers.insert(diff_id.hex().to_owned(), size);
        Ok(())
    }

    /// Bytes of the layers that an image made of them has.
    pub(super) fn size_of(&self, layers: &[Digest]) -> u64 {
        let index = self.index.lock();
        layers.iter().filter_map(|layer| index.layers.get(layer.hex())).sum()
    }

    /// Gives a complete image its names. The configuration's bytes are stored under their digest.
    pub(super) fn add_image(&self, names: &[String], mut image: Image, config: &[u8]) -> Result<(), Error> {
        let path = self.config_path(&image.config);
        let mut index = self.index.lock();
        if !path.exists() {
            self.write_atomic(&path, config)?;
        }
        // A layer that was here when the pull began may have been freed with the last image that had it.
        if let Some(gone) = image.layers.iter().find(|l| !index.layers.contains_key(l.hex())) {
            let name = names.first().cloned().unwrap_or_default();
            return Err(Error::Pull {
                name,
                why: format!("layer {gone} was removed meanwhile, it will be fetched again"),
            });
        }
        for other in index.images.values_mut().filter(|i| i.config == image.config) {
            other.pulled_with.extend(image.pulled_with.iter().cloned());
            image.pulled_with.extend(other.pulled_with.iter().cloned());
        }
        for name in names {
            index.images.insert(name.clone(), image.clone());
        }
        self.save(&index)?;
        self.changed.send_replace(());
        Ok(())
    }

    /// Marks of the credentials an image was pulled with.
    pub(super) fn pulled_with(&self, name: &str) -> BTreeSet<String> {
        self.index.lock().images.get(name).map(|i| i.pulled_with.clone()).unwrap_or_default()
    }

    /// Tells of every later change of the list.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn config_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("configs/sha256").join(digest.hex())
    }

    fn save(&self, index: &Index) -> Result<(), Error> {
        // BTreeMaps with string keys always serialize.
        let text = serde_json::to_vec(index).unwrap_or_default();
        self.write_atomic(&self.root.join("index.json"), &text)
    }

    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let scratch = self.scratch("file");
        let mut file = fs::File::create(&scratch).map_err(store_error("create", &scratch))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(store_error("write", &scratch))?;
        fs::rename(&scratch, path).map_err(store_error("rename", path))?;
        let dir = path.parent().unwrap_or(&self.root);
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(store_error("sync", dir))
    }

    /// The image under a full name, when every part of it is there.
    pub(super) fn lookup(&self, name: &str) -> Result<Option<ImageHandle>, Error> {
        let Some(image) = self.index.lock().images.get(name).cloned() else { return Ok(None) };
        self.handle(name, &image, None).map(Some)
    }

    /// The image with an id or (from eight digits on) the beginning of one.
    pub(super) fn by_id(&self, id: &str) -> Result<Option<ImageHandle>, Error> {
        let digits = id.strip_prefix("sha256:").unwrap_or(id);
        if digits.len() < 8 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let found = {
            let index = self.index.lock();
            let image = index.images.iter().find(|(_, i)| i.config.hex().starts_with(digits));
            image.map(|(name, i)| (name.clone(), i.clone()))
        };
        found.map(|(name, image)| self.handle(&name, &image, None)).transpose()
    }

    pub(super) fn handle(&self, name: &str, image: &Image, pulled: Option<Pulled>) -> Result<ImageHandle, Error> {
        let config = self.config(&image.config)?;
        Ok(ImageHandle {
            id: image.config.to_string(),
            digest_reference: image.repo_digests.first().cloned().unwrap_or_else(|| image.config.to_string()),
            reference: name.to_owned(),
            config,
            layers: image.layers.iter().rev().map(|layer| self.layer_dir(layer)).collect(),
            pulled,
        })
    }

    fn config(&self, digest: &Digest) -> Result<Arc<ImageConfiguration>, Error> {
        if let Some(config) = self.configs.lock().get(digest.hex()) {
            return Ok(config.clone());
        }
        let path = self.config_path(digest);
        let bytes = fs::read(&path).map_err(store_error("read", &path))?;
        let config = Arc::new(parse_config(&bytes).map_err(|why| Error::Config { path, why })?);
        self.configs.lock().insert(digest.hex().to_owned(), config.clone());
        Ok(config)
    }

    /// Whether an archive has to be read (again): it has changed, or an image of it is wanted and not here. Without
    /// `wanted`, all its images are.
    pub(super) fn should_read(&self, path: &Path, size: u64, modified: i128, wanted: Option<&str>) -> bool {
        let index = self.index.lock();
        let same = |a: &&Archive| (a.size, a.modified) == (size, modified);
        let Some(archive) = index.read.get(path).filter(same) else { return true };
        match wanted {
            Some(name) => archive.names.iter().any(|n| n == name),
            None => archive.names.is_empty() || !archive.names.iter().all(|n| index.images.contains_key(n)),
        }
    }

    pub(super) fn archive_read(&self, path: &Path, archive: Archive) -> Result<(), Error> {
        let mut index = self.index.lock();
        index.read.insert(path.to_owned(), archive);
        self.save(&index)
    }

    pub(super) fn list(&self) -> Vec<ImageInfo> {
        let index = self.index.lock();
        let mut by_id: BTreeMap<&str, ImageInfo> = BTreeMap::new();
        for (name, image) in &index.images {
            let summary = by_id.entry(image.config.hex()).or_insert_with(|| ImageInfo {
                id: image.config.to_string(),
                names: image.repo_digests.iter().cloned().collect(),
                size: image.size,
            });
            if !summary.names.contains(name) {
                summary.names.push(name.clone());
            }
        }
        let mut all: Vec<_> = by_id.into_values().collect();
        all.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.names.cmp(&b.names)));
        all
    }

    pub(super) fn remove(&self, id: &str) -> Result<u64, Error> {
        let started = Instant::now();
        let mut index = self.index.lock();
        let of = |i: &Image| i.layers.iter().map(|l| l.hex().to_owned()).collect::<Vec<_>>();
        // Layers of no image at all may be those of a pull under way.
        let own: BTreeSet<String> = index.images.values().filter(|i| i.config.to_string() == id).flat_map(of).collect();
        index.images.retain(|_, image| image.config.to_string() != id);
        let used: BTreeSet<String> = index.images.values().flat_map(of).collect();
        let unused: Vec<String> = own.difference(&used).cloned().collect();
        let mut freed = 0;
        for layer in &unused {
            freed += index.layers.remove(layer).unwrap_or_default();
        }
        self.save(&index)?;
        self.changed.send_replace(());
        if let Ok(config) = Digest::try_from(id.to_owned()) {
            self.configs.lock().remove(config.hex());
            fs::remove_file(self.config_path(&config)).ok();
        }
        for layer in unused {
            let (from, to) = (self.root.join("layers").join(&layer), self.scratch("removed"));
            match fs::rename(&from, &to) {
                Ok(()) => fs::remove_dir_all(&to).map_err(store_error("remove", &to))?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(store_error("rename", &from)(error)),
            }
        }
        tracing::debug!(id, freed, elapsed = ?started.elapsed(), "image removed");
        Ok(freed)
    }
}

/// Parses an image configuration and checks what later code relies on.
pub(super) fn parse_config(bytes: &[u8]) -> Result<ImageConfiguration, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("image configuration: {error}"))
}

/// Diff ids of a configuration, lowest layer first.
pub(super) fn diff_ids(config: &ImageConfiguration) -> Result<Vec<Digest>, String> {
    config.rootfs().diff_ids().iter().map(|id| Digest::try_from(id.clone())).collect()
}

fn sync_file_system(path: &Path) -> Result<(), Error> {
    let dir = fs::File::open(path).map_err(store_error("open", path))?;
    rustix::fs::syncfs(&dir).map_err(|error| store_error("sync", path)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(store: &Store, name: &str, layer: &str) -> Image {
        let diff_id = Digest::of(layer.as_bytes());
        let dir = store.scratch("layer");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), layer).unwrap();
        store.add_layer(&diff_id, &dir, 10).unwrap();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","author":"{name}","rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#
        );
        let image = Image {
            config: Digest::of(config.as_bytes()),
            layers: vec![diff_id],
            size: 10,
            repo_digests: BTreeSet::new(),
            pulled_with: BTreeSet::new(),
        };
        store.add_image(&[name.to_owned()], image.clone(), config.as_bytes()).unwrap();
        image
    }

    #[test]
    fn images_survive_a_restart_and_leftovers_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        image(&store, "a:1", "one");
        let half = store.scratch("layer");
        fs::create_dir(&half).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert!(!half.exists());
        let handle = store.lookup("a:1").unwrap().unwrap();
        assert_eq!(fs::read_to_string(handle.layers[0].join("file")).unwrap(), "one");
        assert!(store.lookup("b:1").unwrap().is_none());
    }

    #[test]
    fn removal_frees_only_layers_nobody_else_uses() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = image(&store, "a:1", "shared");
        image(&store, "b:1", "shared");
        assert_eq!(store.remove(&a.config.to_string()).unwrap(), 0);
        let b = store.lookup("b:1").unwrap().unwrap();
        assert!(b.layers[0].exists());
        let configs = || fs::read_dir(dir.path().join("configs/sha256")).unwrap().count();
        assert_eq!(configs(), 1);
        assert_eq!(store.remove(&b.id).unwrap(), 10);
        assert!(!b.layers[0].exists());
        assert_eq!(configs(), 0);
        fs::write(dir.path().join("configs/sha256/stray"), "").unwrap();
        drop(store);
        Store::open(dir.path()).unwrap();
        assert_eq!(configs(), 0);
    }

    #[test]
    fn a_half_written_index_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("index.json"), "{\"images\":{").unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(store.list().is_empty());
        assert!(dir.path().join("index.json.unreadable").exists());
    }

    #[test]
    fn digests_are_checked() {
        assert!(Digest::try_from(format!("sha256:{}", "a".repeat(64))).is_ok());
        for bad in ["sha256:../../etc", "md5:00", &format!("sha256:{}", "A".repeat(64))] {
            assert!(Digest::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
