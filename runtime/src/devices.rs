//! Device nodes and links in a container's /dev.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, symlinkat};

use crate::{
    error::{Context, Error, Result},
    mounts,
    root::{Root, split},
};

/// Devices every container has: path, major, minor.
const DEFAULT: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Fills /dev. `userns` containers may not make nodes and get the host's bound in.
pub(crate) fn populate(root: &Root, configured: &[LinuxDevice], userns: bool) -> Result<()> {
    let dev = root.ensure_dir(Path::new("/dev"))?;
    let mut bind = userns;
    for &(path, major, minor) in DEFAULT {
        if configured.iter().any(|d| d.path() == Path::new(path)) {
            continue;
        }
        let node = Node { path: path.into(), kind: FileType::CharacterDevice, major, minor, mode: 0o666, owner: None };
        node.create(root, Some(dev.as_fd()), &mut bind)?;
    }
    for device in configured {
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Error::invalid(format!("device {} has type a", device.path().display())));
            }
        };
        let owner = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        let node = Node {
            path: device.path().clone(),
            kind,
            major: device.major() as u32,
            minor: device.minor() as u32,
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            owner: Some(owner),
        };
        node.create(root, None, &mut bind)?;
    }
    link(dev.as_fd())
}

fn link(dev: BorrowedFd<'_>) -> Result<()> {
    for (name, to) in LINKS {
        match symlinkat(*to, dev, *name) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) if *name != "ptmx" => {}
            Err(rustix::io::Errno::EXIST) => {
                let _ = rustix::fs::unlinkat(dev, *name, AtFlags::empty());
                symlinkat(*to, dev, *name).context(|| format!("link /dev/{name}"))?;
            }
            Err(e) => return Err(Error::system(format!("link /dev/{name}"), e)),
        }
    }
    Ok(())
}

struct Node {
    path: PathBuf,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    owner: Option<(u32, u32)>,
}

impl Node {
    fn create(&self, root: &Root, dev: Option<BorrowedFd<'_>>, bind: &mut bool) -> Result<()> {
        let (parent, name) = split(&self.path)?;
        let opened: OwnedFd;
        let parent = match dev {
            Some(dev) => dev,
            None => {
                opened = root.ensure_dir(parent)?;
                opened.as_fd()
            }
        };
        let what = || format!("create device {}", self.path.display());
        if !*bind {
            match mknodat(parent, name, self.kind, Mode::from_raw_mode(self.mode), makedev(self.major, self.minor)) {
                // The umask is empty here: the mode is whole, and no chmod could be led through a link put in its place.
                Ok(()) => {
                    if let Some((uid, gid)) = self.owner.filter(|&o| o != (0, 0)) {
                        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
                        chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
                    }
                    return Ok(());
                }
                Err(rustix::io::Errno::EXIST) => return self.is_what_exists(parent, name),
                Err(rustix::io::Errno::PERM) => *bind = true,
                Err(e) => return Err(Error::system(what(), e)),
            }
        }
        drop(root.ensure_file(&self.path)?);
        // What the image has there must not lead the mount somewhere else.
        let target = root.open_exact(&self.path, OFlags::PATH).context(what)?;
        mounts::clone_tree(CWD, &self.path, false)
            .and_then(|host| mounts::attach(host.as_fd(), target.as_fd()))
            .context(|| format!("bind device {}", self.path.display()))
    }

    /// An image may come with device nodes, but not with others under their names.
    fn is_what_exists(&self, parent: BorrowedFd<'_>, name: &std::ffi::OsStr) -> Result<()> {
        let what = || format!("stat device {} of the rootfs", self.path.display());
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
        let device = self.kind == FileType::Fifo || stat.st_rdev == makedev(self.major, self.minor);
        if FileType::from_raw_mode(stat.st_mode) == self.kind && device {
            return Ok(());
        }
        Err(Error::invalid(format!("{} in the rootfs is something else than that device", self.path.display())))
    }
}
