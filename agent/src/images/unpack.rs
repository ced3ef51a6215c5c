//! Unpacks one layer into a directory of its own, in the form overlayfs expects of a lower directory.
//!
//! Layers are hostile. Every path is resolved by the kernel inside the target directory (openat2 with
//! `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS`), entries are created relative to an open parent directory and never through
//! a link, and what was at a name before is replaced, not followed. Device nodes are not created: `/dev` of a container
//! never comes from its image. Whiteouts become overlayfs's: a 0:0 character device hides a name, the `opaque` attribute
//! hides a directory's lower content. <https://github.com/opencontainers/image-spec/blob/main/layer.md>

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chownat,
        fchmod, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::store::Digest;

/// What unpacking found out.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Digest of the uncompressed tar.
    pub(super) diff_id: Digest,
    /// Bytes of regular files.
    pub(super) size: u64,
}

/// Unpacks the layer read from `reader` (plain tar, gzip or zstd: told by its first bytes) into the existing, empty `dir`.
/// The error says which entry and why.
pub(super) fn unpack(reader: impl Read, dir: &Path) -> Result<Unpacked, String> {
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let start = reader.fill_buf().map_err(|error| format!("read: {error}"))?;
    let (gzip, zstd) = (start.starts_with(&[0x1f, 0x8b]), start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    if gzip {
        unpack_tar(flate2::bufread::MultiGzDecoder::new(reader), dir)
    } else if zstd {
        let decoder = zstd::Decoder::with_buffer(reader).map_err(|error| format!("zstd: {error}"))?;
        unpack_tar(decoder, dir)
    } else {
        unpack_tar(reader, dir)
    }
}

/// Hashes what passes through.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

fn unpack_tar(reader: impl Read, dir: &Path) -> Result<Unpacked, String> {
    let mut hashing = Hashing { inner: reader, hash: Sha256::new() };
    let mut layer = Layer::new(dir)?;
    {
        let mut archive = tar::Archive::new(&mut hashing);
        let entries = archive.entries().map_err(|error| format!("tar: {error}"))?;
        for entry in entries {
            let mut entry = entry.map_err(|error| format!("tar: {error}"))?;
            let path = entry.path().map_err(|error| format!("tar: entry name: {error}"))?.into_owned();
            layer.add(&mut entry, &path).map_err(|why| format!("entry \"{}\": {why}", path.display()))?;
        }
    }
    // The digest covers what follows the end marker too.
    std::io::copy(&mut hashing, &mut std::io::sink()).map_err(|error| format!("tar: {error}"))?;
    layer.finish()?;
    Ok(Unpacked { diff_id: Digest::from_hash(hashing.hash.finalize().as_slice()), size: layer.size })
}

/// Attributes of an entry, applied after its content.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: Mode,
    times: Timestamps,
    xattrs: Vec<(String, Vec<u8>)>,
}

struct Layer {
    root: OwnedFd,
    /// The last parent directory used: tar files name one directory's entries in a row.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Modification times of directories, set when nothing is added to them any more.
    directories: BTreeMap<PathBuf, Timestamps>,
    size: u64,
}

const IN_LAYER: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

impl Layer {
    fn new(dir: &Path) -> Result<Self, String> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root =
            openat(CWD, dir, flags, Mode::empty()).map_err(|error| format!("open {}: {error}", dir.display()))?;
        fchmod(&root, Mode::from_raw_mode(0o755)).map_err(|error| format!("chmod {}: {error}", dir.display()))?;
        Ok(Self { root, parent: None, directories: BTreeMap::new(), size: 0 })
    }

    fn add(&mut self, entry: &mut tar::Entry<'_, impl Read>, path: &Path) -> Result<(), String> {
        let path = clean(path)?;
        let attributes = attributes(entry)?;
        let (Some(name), Some(parent_path)) = (path.file_name(), path.parent()) else {
            // The root directory itself.
            return set_directory(self.root.as_fd(), &attributes).map_err(|error| error.to_string());
        };
        let parent_path = parent_path.to_owned();
        let name_text = name.to_str().unwrap_or_default();
        self.enter(&parent_path)?;
        let Some((_, parent)) = &self.parent else { return Err("no parent directory".to_owned()) };
        if name_text == OPAQUE {
            return fsetxattr(parent, "trusted.overlay.opaque", b"y", XattrFlags::empty())
                .map_err(|error| format!("mark opaque: {error}"));
        }
        if let Some(hidden) = name_text.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden.contains('/') || hidden == "." || hidden == ".." {
                return Err("bad whiteout name".to_owned());
            }
            remove(parent, hidden.as_ref())?;
            return mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0)
                .map_err(|error| format!("whiteout: {error}"));
        }
        let kind = entry.header().entry_type();
        match kind {
            tar::EntryType::Directory => {
                make_directory(parent, name)?;
                let dir = open_directory(parent, name)?;
                set_directory(dir.as_fd(), &attributes).map_err(|error| error.to_string())?;
                self.directories.insert(path, attributes.times);
            }
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                remove(parent, name)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = openat(parent, name, flags, Mode::from_raw_mode(0o600))
                    .map_err(|error| format!("create: {error}"))?;
                let mut file = File::from(fd);
                self.size += std::io::copy(entry, &mut file).map_err(|error| format!("write: {error}"))?;
                set_file(&file, &attributes).map_err(|error| error.to_string())?;
            }
            tar::EntryType::Symlink => {
                let target = link_target(entry)?;
                remove(parent, name)?;
                symlinkat(&target, parent, name).map_err(|error| format!("symlink: {error}"))?;
                set_link(parent, name, &attributes).map_err(|error| error.to_string())?;
            }
            tar::EntryType::Link => {
                let target = clean(&link_target(entry)?)?;
                let (Some(source_name), Some(source_parent)) = (target.file_name(), target.parent()) else {
                    return Err("hard link to the root directory".to_owned());
                };
                let source = open_in(self.root.as_fd(), source_parent)
                    .map_err(|error| format!("hard link to \"{}\": {error}", target.display()))?;
                let same = target == path;
                if !same {
                    remove(parent, name)?;
                    linkat(&source, source_name, parent, name, AtFlags::empty())
                        .map_err(|error| format!("hard link to \"{}\": {error}", target.display()))?;
                }
            }
            tar::EntryType::Fifo => {
                remove(parent, name)?;
                mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                    .map_err(|error| format!("fifo: {error}"))?;
                set_link(parent, name, &attributes).map_err(|error| error.to_string())?;
                rustix::fs::chmodat(parent, name, attributes.mode, AtFlags::empty())
                    .map_err(|error| format!("chmod: {error}"))?;
            }
            // Device nodes are left out on purpose; pax headers are consumed by the reader.
            _ => {}
        }
        Ok(())
    }

    /// Makes `path` (and what is missing above it) the current parent directory.
    fn enter(&mut self, path: &Path) -> Result<(), String> {
        if self.parent.as_ref().is_some_and(|(current, _)| current == path) {
            return Ok(());
        }
        let fd = match open_in(self.root.as_fd(), path) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                self.make_missing(path)?;
                open_in(self.root.as_fd(), path).map_err(|error| format!("open \"{}\": {error}", path.display()))?
            }
            Err(error) => return Err(format!("open \"{}\": {error}", path.display())),
        };
        self.parent = Some((path.to_owned(), fd));
        Ok(())
    }

    fn make_missing(&self, path: &Path) -> Result<(), String> {
        let mut so_far = PathBuf::new();
        for part in path.components() {
            let above = open_in(self.root.as_fd(), &so_far)
                .map_err(|error| format!("open \"{}\": {error}", so_far.display()))?;
            match mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(format!("make \"{}\": {error}", path.display())),
            }
            so_far.push(part);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        for (path, times) in std::mem::take(&mut self.directories).into_iter().rev() {
            // A directory may have been replaced by a later entry.
            if let Ok(dir) = open_in(self.root.as_fd(), &path) {
                futimens(&dir, &times).map_err(|error| format!("times of \"{}\": {error}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// A path inside the layer: no `..`, no leading slash, no `.`.
fn clean(path: &Path) -> Result<PathBuf, String> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir => return Err("\"..\" in a path".to_owned()),
            Component::Prefix(_) => return Err("bad path".to_owned()),
        }
    }
    Ok(clean)
}

fn open_in(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), IN_LAYER)
}

fn open_directory(parent: &OwnedFd, name: &std::ffi::OsStr) -> Result<OwnedFd, String> {
    openat(parent, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("open: {error}"))
}

fn make_directory(parent: &OwnedFd, name: &std::ffi::OsStr) -> Result<(), String> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => {
            let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|error| format!("stat: {error}"))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                return Ok(());
            }
            remove(parent, name)?;
            mkdirat(parent, name, Mode::from_raw_mode(0o700)).map_err(|error| format!("mkdir: {error}"))
        }
        Err(error) => Err(format!("mkdir: {error}")),
    }
}

/// Removes whatever is at a name; a directory only with what this layer put into it.
fn remove(parent: &OwnedFd, name: &std::ffi::OsStr) -> Result<(), String> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(format!("replace: {error}")),
    }
    let dir = open_directory(parent, name)?;
    let listing = rustix::fs::Dir::read_from(&dir).map_err(|error| format!("read: {error}"))?;
    for inner in listing {
        let inner = inner.map_err(|error| format!("read: {error}"))?;
        let inner_name = inner.file_name().to_bytes();
        if inner_name != b"." && inner_name != b".." {
            use std::os::unix::ffi::OsStrExt;
            remove(&dir, std::ffi::OsStr::from_bytes(inner_name))?;
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(|error| format!("replace: {error}"))
}

fn link_target(entry: &tar::Entry<'_, impl Read>) -> Result<PathBuf, String> {
    let target = entry.link_name().map_err(|error| format!("link target: {error}"))?;
    target.map(|target| target.into_owned()).ok_or_else(|| "link without a target".to_owned())
}

fn attributes(entry: &mut tar::Entry<'_, impl Read>) -> Result<Attributes, String> {
    let header = entry.header();
    // An empty field is zero to every other reader of tar files.
    let number = |value: std::io::Result<u64>, field: &[u8], what: &str| match value {
        Ok(value) => u32::try_from(value).map_err(|_| format!("{what} {value} is too large")),
        Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
        Err(error) => Err(format!("{what}: {error}")),
    };
    let fields = header.as_old();
    let (uid, gid) = (number(header.uid(), &fields.uid, "uid")?, number(header.gid(), &fields.gid, "gid")?);
    let mode = Mode::from_raw_mode(header.mode().map_err(|error| format!("mode: {error}"))? & 0o7777);
    let seconds = i64::try_from(header.mtime().unwrap_or_default()).unwrap_or_default();
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let mut xattrs = Vec::new();
    if let Some(extensions) = entry.pax_extensions().map_err(|error| format!("pax header: {error}"))? {
        for extension in extensions {
            let extension = extension.map_err(|error| format!("pax header: {error}"))?;
            let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix("SCHILY.xattr.")) else { continue };
            // Others (trusted.*, security.selinux) would change how the host treats the layer.
            if name.starts_with("user.") || name == "security.capability" {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    Ok(Attributes { uid, gid, mode, times: Timestamps { last_access: time, last_modification: time }, xattrs })
}

fn set_owner_mode_xattrs(fd: impl AsFd, attributes: &Attributes) -> Result<(), Errno> {
    // Owner first: changing it clears set-id bits and file capabilities.
    rustix::fs::fchown(&fd, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
    fchmod(&fd, attributes.mode)?;
    for (name, value) in &attributes.xattrs {
        match fsetxattr(&fd, name.as_str(), value, XattrFlags::empty()) {
            // A file system without user attributes still runs the image.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn set_directory(dir: impl AsFd, attributes: &Attributes) -> Result<(), Errno> {
    set_owner_mode_xattrs(dir, attributes)
}

fn set_file(file: &File, attributes: &Attributes) -> Result<(), Errno> {
    set_owner_mode_xattrs(file, attributes)?;
    futimens(file, &attributes.times)
}

fn set_link(parent: &OwnedFd, name: &std::ffi::OsStr, attributes: &Attributes) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;

    fn header(kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(size);
        header
    }

    /// Builds a tar; paths are written raw so that hostile ones get in.
    fn layer(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
            let mut header = header(*kind, if link { 0 } else { content.len() as u64 });
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            if link {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            if *kind == tar::EntryType::Directory {
                header.set_mode(0o755);
            }
            header.set_cksum();
            builder.append(&header, if link { &b""[..] } else { content.as_bytes() }).unwrap();
        }
        builder.into_inner().unwrap()
    }

    use tar::EntryType::{Directory, Link, Regular, Symlink};

    fn run(entries: &[(&str, tar::EntryType, &str)]) -> (tempfile::TempDir, Result<Unpacked, String>) {
        let dir = tempfile::tempdir().unwrap();
        let result = unpack(&layer(entries)[..], dir.path());
        (dir, result)
    }

    #[test]
    fn files_links_and_whiteouts() {
        let (dir, result) = run(&[
            ("a", Directory, ""),
            ("a/file", Regular, "hello"),
            ("a/hard", Link, "a/file"),
            ("a/soft", Symlink, "file"),
            ("gone/.wh.old", Regular, ""),
            ("opaque/.wh..wh..opq", Regular, ""),
        ]);
        assert_eq!(result.unwrap().size, 5);
        let root = dir.path();
        assert_eq!(fs::read_to_string(root.join("a/soft")).unwrap(), "hello");
        assert_eq!(fs::metadata(root.join("a/file")).unwrap().nlink(), 2);
        assert_eq!(fs::symlink_metadata(root.join("gone/old")).unwrap().rdev(), 0);
        let mut value = [0u8; 4];
        let n = rustix::fs::getxattr(root.join("opaque"), "trusted.overlay.opaque", &mut value).unwrap();
        assert_eq!(&value[..n], b"y");
    }

    #[test]
    fn nothing_leaves_the_directory() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().to_str().unwrap();
        let (dir, result) = run(&[("out", Symlink, target), ("out/file", Regular, "x")]);
        // The absolute link is resolved inside the layer, where its target does not exist.
        assert!(result.is_err() || !outside.path().join("file").exists());
        assert!(!outside.path().join("file").exists());
        drop(dir);
        let (_dir, result) = run(&[("../escape", Regular, "x")]);
        assert_eq!(result.unwrap_err(), "entry \"../escape\": \"..\" in a path");
        let (_dir, result) = run(&[("l", Link, "../../etc/passwd")]);
        assert!(result.unwrap_err().contains("\"..\" in a path"));
        let (_dir, result) = run(&[("d", Symlink, "/etc"), ("h", Link, "d/passwd")]);
        assert!(result.unwrap_err().starts_with("entry \"h\": hard link to \"d/passwd\""));
    }

    #[test]
    fn later_entries_replace_earlier_ones_without_following_them() {
        let victim = tempfile::NamedTempFile::new().unwrap();
        let (dir, result) =
            run(&[("x", Symlink, victim.path().to_str().unwrap()), ("x", Regular, "mine"), ("x", Directory, "")]);
        result.unwrap();
        assert!(dir.path().join("x").is_dir());
        assert_eq!(fs::read(victim.path()).unwrap(), b"");
    }

    #[test]
    fn compressed_layers_have_the_digest_of_the_tar() {
        use std::io::Write;
        let tar = layer(&[("f", Regular, "x")]);
        let plain = Digest::of(&tar);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        for bytes in [gzip.finish().unwrap(), zstd::encode_all(&tar[..], 1).unwrap(), tar.clone()] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(unpack(&bytes[..], dir.path()).unwrap().diff_id, plain);
        }
    }

    #[test]
    fn a_truncated_layer_is_an_error() {
        let tar = layer(&[("f", Regular, "0123456789")]);
        let dir = tempfile::tempdir().unwrap();
        assert!(unpack(&tar[..515], dir.path()).is_err());
    }
}
