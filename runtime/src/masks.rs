//! Masked and read-only paths.
//!
//! What lies below a procfs or sysfs of the container is resolved from that mount itself, not from the root: a parallel
//! writer who renames the directory it is mounted on, or puts a link in its place, moves the masks along with it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};

use crate::{
    error::{Context, Error, Result},
    mounts::{attach, clone_tree, new_file_system},
    root::{PROC_MAGIC, Root, SYSFS_MAGIC, is_on},
    sys::{MountAttributes, mount_setattr},
};

/// The container's mounts of procfs and sysfs, by their destinations.
#[derive(Debug, Default)]
pub(crate) struct KernelMounts(Vec<(PathBuf, OwnedFd)>);

impl KernelMounts {
    /// Remembers what was mounted last on `destination`; forgets what it covers.
    pub(crate) fn mounted(&mut self, destination: &Path, mount: OwnedFd) {
        self.0.retain(|(path, _)| !path.starts_with(destination));
        if is_on(mount.as_fd(), PROC_MAGIC) || is_on(mount.as_fd(), SYSFS_MAGIC) {
            self.0.push((destination.to_owned(), mount));
        }
    }

    /// The mount a path lies on by name, and the rest of the path.
    fn holding<'a>(&self, path: &'a Path) -> Option<(BorrowedFd<'_>, &'a Path)> {
        let below = self.0.iter().filter_map(|(at, fd)| Some((at, fd.as_fd(), path.strip_prefix(at).ok()?)));
        below.max_by_key(|(at, ..)| at.components().count()).map(|(_, fd, rest)| (fd, rest))
    }

    /// A path to be protected; `None` when it does not exist.
    fn existing(&self, root: &Root, path: &Path) -> Result<Option<OwnedFd>> {
        let opened = match self.holding(path) {
            Some((mount, rest)) => {
                let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                openat2(mount, rest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).map_err(io::Error::from)
            }
            None => root.open(path, OFlags::PATH),
        };
        match opened {
            Ok(fd) => Ok(Some(fd)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                Err(Error::invalid(format!("{} leads out of its file system", path.display())))
            }
            Err(e) => Err(Error::system(format!("open {}", path.display()), e)),
        }
    }

    /// Covers a path: a file by the host's null device, a directory by an empty read-only tmpfs.
    pub(crate) fn mask(&self, root: &Root, path: &Path, null: BorrowedFd<'_>) -> Result<()> {
        let Some(target) = self.existing(root, path)? else { return Ok(()) };
        let is_dir = rustix::fs::fstat(&target)
            .map(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory)
            .context(|| format!("stat {}", path.display()))?;
        let cover = if is_dir {
            let data = [("nr_inodes".to_owned(), Some("2".to_owned())), ("mode".to_owned(), Some("755".to_owned()))];
            new_file_system("tmpfs", Some("tmpfs"), &data, libc::MOUNT_ATTR_RDONLY)
        } else {
            clone_tree(null, Path::new(""), false)
        };
        cover.and_then(|c| attach(c.as_fd(), target.as_fd())).context(|| format!("mask {}", path.display()))
    }

    /// Makes a path read-only by binding it over itself.
    pub(crate) fn make_read_only(&self, root: &Root, path: &Path) -> Result<()> {
        let Some(target) = self.existing(root, path)? else { return Ok(()) };
        let attributes =
            MountAttributes { set: libc::MOUNT_ATTR_RDONLY, recursive: true, ..MountAttributes::default() };
        clone_tree(target.as_fd(), Path::new(""), true)
            .and_then(|tree| {
                mount_setattr(tree.as_fd(), attributes)?;
                attach(tree.as_fd(), target.as_fd())
            })
            .context(|| format!("make {} read-only", path.display()))
    }
}
