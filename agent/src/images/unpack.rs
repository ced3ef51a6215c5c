//! Unpacks one layer into a directory of its own, in the form overlayfs expects of a lower directory.
//!
//! Layers are hostile. Every path is resolved by the kernel inside the target directory (openat2 with
//! `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS`), entries are created relative to an open parent directory and never through
//! a link, and what was at a name before is replaced, not followed. Device nodes are not created: `/dev` of a container
//! never comes from its image. Whiteouts become overlayfs's: a 0:0 character device hides a name, the `opaque` attribute
//! hides a directory's lower content. What a layer may cost is bounded ([`Limits`]).
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md>

use std::{
    cell::Cell,
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
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

/// What a layer may cost this machine; ordinary ones come nowhere near.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Bytes that any layer may unpack to.
    bytes: u64,
    /// And that many times the bytes of its blob, where that is more: what deflate can do at most is 1032.
    ratio: u64,
    /// Bytes of the headers of one entry: long names, extended attributes, the map of a sparse file.
    headers: u64,
    /// Entries.
    entries: u64,
}

const LIMITS: Limits = Limits { bytes: 1 << 30, ratio: 1024, headers: 1 << 20, entries: 4_000_000 };
/// Directories below each other: each costs a descriptor when the layer is removed.
const DEPTH: usize = 200;
/// zstd's window is memory: 128 MiB, what its own tools accept.
pub(super) const ZSTD_WINDOW: u32 = 27;

/// Unpacks the layer read from `reader` (plain tar, gzip or zstd: told by its first bytes) into the existing, empty `dir`.
/// The error says which entry and why.
pub(super) fn unpack(reader: impl Read, dir: &Path) -> Result<Unpacked, String> {
    unpack_within(LIMITS, reader, dir)
}

fn unpack_within(limits: Limits, reader: impl Read, dir: &Path) -> Result<Unpacked, String> {
    let meter = Meter { limits, blob: Cell::new(0), tar: Cell::new(0), headers: Cell::new(None) };
    let mut reader = BufReader::with_capacity(64 * 1024, Blob { inner: reader, meter: &meter });
    let start = reader.fill_buf().map_err(|error| format!("read: {error}"))?;
    let (gzip, zstd) = (start.starts_with(&[0x1f, 0x8b]), start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    if gzip {
        unpack_tar(flate2::bufread::MultiGzDecoder::new(reader), dir, &meter)
    } else if zstd {
        let mut decoder = zstd::Decoder::with_buffer(reader).map_err(|error| format!("zstd: {error}"))?;
        decoder.window_log_max(ZSTD_WINDOW).map_err(|error| format!("zstd: {error}"))?;
        unpack_tar(decoder, dir, &meter)
    } else {
        unpack_tar(reader, dir, &meter)
    }
}

/// What has been read so far.
struct Meter {
    limits: Limits,
    /// Bytes of the blob.
    blob: Cell<u64>,
    /// Bytes of the tar in it.
    tar: Cell<u64>,
    /// Bytes left for headers while those are read.
    headers: Cell<Option<u64>>,
}

impl Meter {
    /// Bytes the layer may unpack to, by what was read of its blob.
    fn most(&self) -> u64 {
        self.limits.bytes.max(self.blob.get().saturating_mul(self.limits.ratio))
    }

    fn passed(&self, n: u64) -> std::io::Result<()> {
        self.tar.set(self.tar.get() + n);
        if self.tar.get() > self.most() {
            let (blob, most) = (self.blob.get(), self.most());
            return Err(std::io::Error::other(format!("{blob} bytes unpack to more than {most}")));
        }
        if let Some(left) = self.headers.get() {
            let left = left.checked_sub(n).ok_or_else(|| {
                std::io::Error::other(format!("an entry has more than {} bytes of headers", self.limits.headers))
            })?;
            self.headers.set(Some(left));
        }
        Ok(())
    }
}

/// Counts the blob's bytes.
struct Blob<'a, R> {
    inner: R,
    meter: &'a Meter,
}

impl<R: Read> Read for Blob<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.meter.blob.set(self.meter.blob.get() + n as u64);
        Ok(n)
    }
}

/// Hashes and counts the tar's bytes.
struct Hashing<'a, R> {
    inner: R,
    hash: Sha256,
    meter: &'a Meter,
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.meter.passed(n as u64)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

/// A file that is being written; a sparse one is larger than what the layer holds of it.
struct Content<'a> {
    file: File,
    meter: &'a Meter,
    /// Of the layer's files so far.
    size: &'a mut u64,
}

impl Write for Content<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let (size, most) = (*self.size + bytes.len() as u64, self.meter.most());
        if size > most {
            return Err(std::io::Error::other(format!("the layer unpacks to more than {most} bytes")));
        }
        let n = self.file.write(bytes)?;
        *self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn unpack_tar(reader: impl Read, dir: &Path, meter: &Meter) -> Result<Unpacked, String> {
    let mut hashing = Hashing { inner: reader, hash: Sha256::new(), meter };
    let mut layer = Layer::new(dir, meter)?;
    {
        let mut archive = tar::Archive::new(&mut hashing);
        let mut entries = archive.entries().map_err(|error| format!("tar: {error}"))?;
        for count in 0.. {
            meter.headers.set(Some(meter.limits.headers));
            let Some(entry) = entries.next() else { break };
            meter.headers.set(None);
            if count == meter.limits.entries {
                return Err(format!("tar: more than {count} entries"));
            }
            let mut entry = entry.map_err(|error| format!("tar: {error}"))?;
            let path = entry.path().map_err(|error| format!("tar: entry name: {error}"))?.into_owned();
            let added = layer.add(&mut entry, &path);
            // So that nothing but headers is read for the next one.
            let rest = added.and_then(|()| std::io::copy(&mut entry, &mut std::io::sink()).map_err(|e| e.to_string()));
            rest.map_err(|why| format!("entry \"{}\": {why}", path.display()))?;
        }
        meter.headers.set(None);
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

struct Layer<'a> {
    root: OwnedFd,
    /// Directories above the layer's own.
    above: usize,
    meter: &'a Meter,
    /// The last parent directory used: tar files name one directory's entries in a row.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Modification times of directories, set when nothing is added to them any more.
    directories: BTreeMap<PathBuf, Timestamps>,
    size: u64,
}

const IN_LAYER: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

impl<'a> Layer<'a> {
    fn new(dir: &Path, meter: &'a Meter) -> Result<Self, String> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root =
            openat(CWD, dir, flags, Mode::empty()).map_err(|error| format!("open {}: {error}", dir.display()))?;
        fchmod(&root, Mode::from_raw_mode(0o755)).map_err(|error| format!("chmod {}: {error}", dir.display()))?;
        let above = depth_of(&root).map_err(|error| format!("open {}: {error}", dir.display()))?;
        Ok(Self { root, above, meter, parent: None, directories: BTreeMap::new(), size: 0 })
    }

    fn add(&mut self, entry: &mut tar::Entry<'_, impl Read>, path: &Path) -> Result<(), String> {
        use tar::EntryType::{Continuous, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
        let kind = entry.header().entry_type();
        if !matches!(kind, Regular | Continuous | GNUSparse | Directory | Symlink | Link | Fifo) {
            // Device nodes are left out on purpose, and what describes all that follows says nothing needed here.
            return Ok(());
        }
        let path = clean(path)?;
        let attributes = attributes(entry)?;
        let (Some(name), Some(parent_path)) = (path.file_name(), path.parent()) else {
            // The root directory itself.
            return set_owner_mode_xattrs(self.root.as_fd(), &attributes);
        };
        let parent_path = parent_path.to_owned();
        self.enter(&parent_path)?;
        let Some((_, parent)) = &self.parent else { return Err("no parent directory".to_owned()) };
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            // Old ones are hard links to each other.
            return match kind {
                GNUSparse => Err("a whiteout with content".to_owned()),
                _ => white_out(parent, name, OsStr::from_bytes(hidden)),
            };
        }
        match kind {
            Directory => {
                make_directory(parent, name)?;
                set_owner_mode_xattrs(open_directory(parent, name)?, &attributes)?;
                self.directories.insert(path, attributes.times);
            }
            Symlink => {
                let target = link_target(entry)?;
                remove(parent, name)?;
                symlinkat(&target, parent, name).map_err(|error| format!("symlink: {error}"))?;
                set_link(parent, name, &attributes).map_err(|error| error.to_string())?;
            }
            Link => {
                let target = clean(&link_target(entry)?)?;
                let (Some(source_name), Some(source_parent)) = (target.file_name(), target.parent()) else {
                    return Err("hard link to the root directory".to_owned());
                };
                let failed = |error: Errno| format!("hard link to \"{}\": {error}", target.display());
                let source = self.directory(source_parent).map_err(failed)?;
                if target != path {
                    remove(parent, name)?;
                    linkat(&source, source_name, parent, name, AtFlags::empty()).map_err(failed)?;
                }
            }
            Fifo => {
                remove(parent, name)?;
                mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                    .map_err(|error| format!("fifo: {error}"))?;
                set_link(parent, name, &attributes).map_err(|error| error.to_string())?;
                rustix::fs::chmodat(parent, name, attributes.mode, AtFlags::empty())
                    .map_err(|error| format!("chmod: {error}"))?;
            }
            _ => {
                remove(parent, name)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = openat(parent, name, flags, Mode::from_raw_mode(0o600))
                    .map_err(|error| format!("create: {error}"))?;
                let mut file = Content { file: File::from(fd), meter: self.meter, size: &mut self.size };
                std::io::copy(entry, &mut file).map_err(|error| format!("write: {error}"))?;
                set_owner_mode_xattrs(&file.file, &attributes)?;
                futimens(&file.file, &attributes.times).map_err(|error| format!("times: {error}"))?;
            }
        }
        Ok(())
    }

    /// Makes `path` (and what is missing above it) the current parent directory.
    fn enter(&mut self, path: &Path) -> Result<(), String> {
        if self.parent.as_ref().is_some_and(|(current, _)| current == path) {
            return Ok(());
        }
        let failed = |error: Errno| format!("open \"{}\": {error}", path.display());
        let fd = match self.directory(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => {
                self.make_missing(path)?;
                self.directory(path).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        self.parent = Some((path.to_owned(), fd));
        Ok(())
    }

    fn make_missing(&self, path: &Path) -> Result<(), String> {
        let mut so_far = PathBuf::new();
        for part in path.components() {
            let above = self.directory(&so_far).map_err(|error| format!("open \"{}\": {error}", so_far.display()))?;
            match mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                Err(Errno::EXIST) if is_whiteout(&above, part.as_os_str()) => {
                    make_directory(&above, part.as_os_str())?;
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(format!("make \"{}\": {error}", path.display())),
            }
            so_far.push(part);
        }
        Ok(())
    }

    /// Opens a directory of the layer. Links may lead to one that is deeper than its path says.
    fn directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let open = |resolve| openat2(&self.root, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve);
        match open(IN_LAYER | ResolveFlags::NO_SYMLINKS) {
            Err(Errno::LOOP) => {
                let fd = open(IN_LAYER)?;
                if depth_of(&fd)?.saturating_sub(self.above) > DEPTH { Err(Errno::NAMETOOLONG) } else { Ok(fd) }
            }
            other => other,
        }
    }

    fn finish(&mut self) -> Result<(), String> {
        for (path, times) in std::mem::take(&mut self.directories).into_iter().rev() {
            // A directory may have been replaced by a later entry.
            if let Ok(dir) = self.directory(&path) {
                futimens(&dir, &times).map_err(|error| format!("times of \"{}\": {error}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// How many directories deep an open one is.
fn depth_of(dir: &OwnedFd) -> Result<usize, Errno> {
    let path = rustix::fs::readlink(format!("/proc/self/fd/{}", dir.as_raw_fd()), Vec::new())?;
    Ok(Path::new(OsStr::from_bytes(path.as_bytes())).components().count())
}

/// Hides what lower layers have. What this layer itself has at the name stays, whichever came first.
fn white_out(parent: &OwnedFd, name: &OsStr, hidden: &OsStr) -> Result<(), String> {
    if name.as_bytes() == OPAQUE {
        return set_opaque(parent);
    }
    match hidden.as_bytes() {
        // The bookkeeping of file systems of former times.
        inner if inner.starts_with(WHITEOUT) => return Ok(()),
        b"" | b"." | b".." => return Err("bad whiteout name".to_owned()),
        _ => {}
    }
    match mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0) {
        Err(Errno::EXIST) => match open_directory(parent, hidden) {
            Ok(dir) => set_opaque(&dir),
            Err(_) => Ok(()),
        },
        other => other.map_err(|error| format!("whiteout: {error}")),
    }
}

fn set_opaque(dir: &OwnedFd) -> Result<(), String> {
    fsetxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty()).map_err(|error| format!("mark opaque: {error}"))
}

fn is_whiteout(parent: &OwnedFd, name: &OsStr) -> bool {
    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice && s.st_rdev == 0)
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
    if clean.components().count() > DEPTH {
        return Err(format!("more than {DEPTH} directories deep"));
    }
    Ok(clean)
}

fn open_directory(parent: &OwnedFd, name: &OsStr) -> Result<OwnedFd, String> {
    openat(parent, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("open: {error}"))
}

/// Makes a directory, in place of what else is there. One that replaces a whiteout shows nothing of lower layers.
fn make_directory(parent: &OwnedFd, name: &OsStr) -> Result<(), String> {
    let make = || mkdirat(parent, name, Mode::from_raw_mode(0o755));
    match make() {
        Err(Errno::EXIST) if open_directory(parent, name).is_ok() => return Ok(()),
        Err(Errno::EXIST) => {}
        other => return other.map_err(|error| format!("mkdir: {error}")),
    }
    let hidden = is_whiteout(parent, name);
    remove(parent, name)?;
    make().map_err(|error| format!("mkdir: {error}"))?;
    if hidden { set_opaque(&open_directory(parent, name)?) } else { Ok(()) }
}

/// Removes whatever is at a name; a directory only with what this layer put into it.
fn remove(parent: &OwnedFd, name: &OsStr) -> Result<(), String> {
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
            remove(&dir, OsStr::from_bytes(inner_name))?;
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
            let user = name.starts_with("user.") && !name.starts_with("user.overlay.");
            if user || name == "security.capability" {
                xattrs.push((name.to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    Ok(Attributes { uid, gid, mode, times: Timestamps { last_access: time, last_modification: time }, xattrs })
}

fn set_owner_mode_xattrs(fd: impl AsFd, attributes: &Attributes) -> Result<(), String> {
    // Owner first: changing it clears set-id bits and file capabilities.
    rustix::fs::fchown(&fd, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))
        .map_err(|error| format!("owner: {error}"))?;
    fchmod(&fd, attributes.mode).map_err(|error| format!("mode: {error}"))?;
    for (name, value) in &attributes.xattrs {
        match fsetxattr(&fd, name.as_str(), value, XattrFlags::empty()) {
            // A file system without user attributes still runs the image.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(format!("attribute {name:?} of {} bytes: {error}", value.len())),
        }
    }
    Ok(())
}

fn set_link(parent: &OwnedFd, name: &OsStr, attributes: &Attributes) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
