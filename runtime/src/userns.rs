//! What a container with users of its own cannot mount by itself: made by its maker, with ids mapped, and handed over.
//!
//! The layers of an overlay, and bind mounts that say `idmap`, belong to file systems of the machine; only who has privilege
//! over those may map their ids. In volumes everything keeps the ids it has inside. mqueue and
//! sysfs show namespaces that the pod's supervisor is in and the container's users do not own.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxIdMapping, Mount};
use rustix::fs::CWD;

use crate::{
    config::Config,
    error::{Context, Error, Result},
    mount_options,
    mounts::{clone_tree, new_file_system},
    rootfs,
    supervisor::protocol::Rootfs,
    sys::{MountAttributes, mount_setattr},
};

/// Mounts made ahead.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// The root.
    pub(crate) root: Option<OwnedFd>,
    /// By index into the mounts.
    pub(crate) mounts: Vec<Option<OwnedFd>>,
}

impl Ahead {
    /// The mount made for this index.
    pub(crate) fn mount(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.mounts.get(index).and_then(Option::as_ref).map(AsFd::as_fd)
    }

    /// Every descriptor.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        self.root.iter().chain(self.mounts.iter().flatten()).map(AsRawFd::as_raw_fd)
    }

    /// Makes them for a container whose user namespace is new; `users` has its mappings.
    pub(crate) fn make(config: &Config, rootfs: &Rootfs, users: BorrowedFd<'_>) -> Result<Self> {
        let root = match rootfs {
            Rootfs::Overlay { lower, upper, work } => {
                let what = || format!("mount overlay with mapped ids and upper directory {}", upper.display());
                let linux = config.spec.linux().as_ref();
                let uid = outside(linux.and_then(|l| l.uid_mappings().as_deref()))?;
                let gid = outside(linux.and_then(|l| l.gid_mappings().as_deref()))?;
                Some(overlay(lower, upper, work, users, (uid, gid)).context(what)?)
            }
            Rootfs::Directory => None,
        };
        let mounts = config.spec.mounts().iter().flatten();
        let mounts = mounts.map(|m| ahead(config, m, users)).collect::<Result<_>>()?;
        Ok(Self { root, mounts })
    }
}

fn map(tree: &OwnedFd, users: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attributes =
        MountAttributes { set: libc::MOUNT_ATTR_IDMAP, userns: Some(users), recursive, ..MountAttributes::default() };
    mount_setattr(tree.as_fd(), attributes)
}

fn ahead(config: &Config, mount: &Mount, users: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    let options = mount_options::parse(mount.options().as_deref().unwrap_or_default())?;
    let kind = mount.typ().as_deref().unwrap_or_default();
    let place = mount.destination().display();
    if matches!(kind, "mqueue" | "sysfs") {
        let made = new_file_system(kind, Some(kind), &options.data, options.set);
        return made.map(Some).context(|| format!("mount {kind} on {place}"));
    }
    if !(options.bind || kind == "bind") || options.idmap.is_none() {
        return Ok(None);
    }
    let source = mount.source().as_ref().ok_or_else(|| Error::invalid("a bind mount needs a source"))?;
    let source = if source.is_absolute() { source.clone() } else { config.bundle.join(source) };
    let tree = clone_tree(CWD, &source, options.recursive).context(|| format!("open source {}", source.display()))?;
    map(&tree, users, options.idmap == Some(true)).map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => Error::invalid(format!(
            "mount bind on {place}: the file system of {} cannot map ids, which users of the container's own need",
            source.display()
        )),
        _ => Error::system(format!("map ids of {} for {place}", source.display()), e),
    })?;
    Ok(Some(tree))
}

/// Every layer as a mount with mapped ids; kernels before 6.15 take no such mounts that are attached nowhere.
///
/// The writable directory is not mapped: overlayfs works in it as the machine's root, who has no place in the map. It belongs
/// to the container's root instead.
fn overlay(
    lower: &[PathBuf],
    upper: &Path,
    work: &Path,
    users: BorrowedFd<'_>,
    root: (u32, u32),
) -> io::Result<OwnedFd> {
    let mapped = |path: &PathBuf| -> io::Result<OwnedFd> {
        let tree = clone_tree(CWD, path, false)?;
        map(&tree, users, false)?;
        Ok(tree)
    };
    std::os::unix::fs::chown(upper, Some(root.0), Some(root.1))?;
    let layers = lower.iter().map(mapped).collect::<io::Result<Vec<_>>>()?;
    let paths: Vec<PathBuf> = layers.iter().map(|l| format!("/proc/self/fd/{}", l.as_raw_fd()).into()).collect();
    rootfs::overlay_by_layers(&paths, upper, work)
}

/// Who root of the container is outside.
fn outside(maps: Option<&[LinuxIdMapping]>) -> Result<u32> {
    let first = maps.into_iter().flatten().find(|m| m.container_id() == 0);
    first.map(LinuxIdMapping::host_id).ok_or_else(|| Error::invalid("the id mappings have no root"))
}
