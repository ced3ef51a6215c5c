//! A root file system that may be hostile.
//!
//! Every path in it is resolved by openat2 with RESOLVE_IN_ROOT (symlinks cannot leave it) and RESOLVE_NO_MAGICLINKS
//! (no detour through /proc); what is missing is created component by component below descriptors already held, so a
//! parallel writer cannot swap a component for a link to the host.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstatfs, mkdirat, mknodat, openat, openat2};

use crate::error::{Context, Error, Kind, Result};

/// `f_type` of procfs.
pub(crate) const PROC_MAGIC: i64 = 0x9fa0;
/// `f_type` of sysfs.
pub(crate) const SYSFS_MAGIC: i64 = 0x6265_6572;

/// An open root directory.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Root {
    /// Takes an open directory as the root.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Opens `path` inside the root.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        retry(|| openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve))
    }

    /// Opens `path` refusing symlinks in any component.
    pub(crate) fn open_exact(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        retry(|| openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve))
    }

    /// Opens directory `path`, creating what is missing of it.
    pub(crate) fn ensure_dir(&self, path: &Path) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other.context(|| format!("open {} in the rootfs", path.display())),
        }
        let mut current =
            self.open(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY).context(|| "open rootfs".into())?;
        let mut prefix = std::path::PathBuf::new();
        for name in components(path)? {
            prefix.push(name);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let next = match self.open(&prefix, flags) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    match mkdirat(&current, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                        Err(e) => return Err(Error::system(format!("mkdir {} in the rootfs", prefix.display()), e)),
                    }
                    openat(&current, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
                        .map_err(io::Error::from)
                }
                other => other,
            };
            current = next.context(|| format!("open {} in the rootfs", prefix.display()))?;
        }
        Ok(current)
    }

    /// Opens `path` as a mount target for a file, creating an empty one when it is missing.
    pub(crate) fn ensure_file(&self, path: &Path) -> Result<OwnedFd> {
        match self.open(path, OFlags::PATH) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => return other.context(|| format!("open {} in the rootfs", path.display())),
        }
        let (parent, name) = split(path)?;
        let parent = self.ensure_dir(parent)?;
        mknodat(&parent, name, FileType::RegularFile, Mode::from_raw_mode(0o644), 0)
            .or_else(|e| if e == rustix::io::Errno::EXIST { Ok(()) } else { Err(e) })
            .context(|| format!("create {} in the rootfs", path.display()))?;
        openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .context(|| format!("open {} in the rootfs", path.display()))
    }
}

/// Splits a path into its parent and last component.
pub(crate) fn split(path: &Path) -> Result<(&Path, &std::ffi::OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(Error::invalid(format!("{} names no file", path.display()))),
    }
}

fn components(path: &Path) -> Result<Vec<&std::ffi::OsStr>> {
    let mut names = vec![];
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(Error::new(Kind::Invalid, format!("{} contains ..", path.display()))),
        }
    }
    Ok(names)
}

/// openat2 answers EAGAIN when any rename on the machine races with a scoped walk over `..`; the kernel asks to try again.
/// Somebody who renames without end makes that last, but not for ever.
fn retry(mut call: impl FnMut() -> rustix::io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    for _ in 0..8192 {
        match call() {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => return other.map_err(Into::into),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Whether a descriptor lies on the file system of this type.
pub(crate) fn is_on(fd: BorrowedFd<'_>, magic: i64) -> bool {
    fstatfs(fd).is_ok_and(|s| s.f_type == magic)
}

/// The host's procfs, known to be one.
pub(crate) fn host_proc() -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/proc", flags, Mode::empty()).context(|| "open /proc".into())?;
    if !is_on(fd.as_fd(), PROC_MAGIC) {
        return Err(Error::invalid("/proc is not a procfs"));
    }
    Ok(fd)
}

/// Writes a file below a directory in one write, following no symlink out of it and entering no other mount: what covers
/// a file of procfs would swallow the word.
pub(crate) fn write_below(dir: BorrowedFd<'_>, path: &str, value: &[u8]) -> io::Result<()> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    // /proc/self is an ordinary symlink to a sibling, so it stays beneath.
    let fd = openat2(dir, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let written = rustix::io::write(&fd, value)?;
    if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
