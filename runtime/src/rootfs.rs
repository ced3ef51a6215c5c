//! The container's root: a directory or an overlay, mounted inside the container's own mount namespace, then pivoted to.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
    },
    process::{chdir, chroot, fchdir, pivot_root},
};

use crate::{
    error::{Context, Error, Result},
    mounts,
    root::Root,
    supervisor::protocol::Rootfs,
    sys::{MountAttributes, mount_setattr},
};

/// Where the root goes and how.
pub(crate) struct RootPlan<'a> {
    /// The bundle's directory; the overlay is mounted over it, which only this namespace sees.
    pub(crate) bundle: &'a Path,
    /// `root.path`, absolute.
    pub(crate) directory: &'a Path,
    /// What to mount.
    pub(crate) rootfs: &'a Rootfs,
    /// The root when the maker has mounted it.
    pub(crate) made: Option<BorrowedFd<'a>>,
    /// `linux.rootfsPropagation`.
    pub(crate) propagation: Option<u64>,
}

/// Cuts this mount namespace's ties and mounts the root; everything else is then mounted below it.
pub(crate) fn prepare(plan: &RootPlan<'_>) -> Result<Root> {
    // What is unbindable could not be cloned below; the root becomes that at the end.
    let flag = match plan.propagation {
        Some(libc::MS_UNBINDABLE) => libc::MS_PRIVATE,
        other => other.unwrap_or(libc::MS_SLAVE),
    };
    let flags = MountPropagationFlags::from_bits_retain(flag as u32) | MountPropagationFlags::REC;
    mount_change("/", flags).context(|| "set the propagation of /".into())?;
    let target = match plan.rootfs {
        Rootfs::Directory => plan.directory,
        Rootfs::Overlay { .. } => plan.bundle,
    };
    if flag == libc::MS_SHARED {
        // The new root must not appear in the host's table: the mount below it may not be shared.
        let below = mounts::mount_point_of(target)?;
        mount_change(&below, MountPropagationFlags::PRIVATE).context(|| format!("make {} private", below.display()))?;
    }
    let made = plan.made.map(|m| m.try_clone_to_owned().context(|| "copy a descriptor".into())).transpose()?;
    let root = match (made, plan.rootfs) {
        (Some(made), _) => made,
        (None, Rootfs::Directory) => mounts::clone_tree(CWD, plan.directory, true)
            .context(|| format!("open rootfs {}", plan.directory.display()))?,
        (None, Rootfs::Overlay { lower, upper, work }) => overlay(lower, upper, work)?,
    };
    let private = MountAttributes { propagation: libc::MS_PRIVATE, recursive: true, ..MountAttributes::default() };
    mount_setattr(root.as_fd(), private).context(|| "make the rootfs private".into())?;
    move_mount(&root, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context(|| format!("mount the rootfs on {}", target.display()))?;
    Ok(Root::new(root))
}

fn overlay(lower: &[std::path::PathBuf], upper: &Path, work: &Path) -> Result<OwnedFd> {
    if lower.is_empty() {
        return Err(Error::invalid("an overlay needs at least one lower directory"));
    }
    overlay_by_layers(lower, upper, work)
        .or_else(|e| match e.raw_os_error() {
            // Before 6.7 there is no lowerdir+; one colon-separated string holds what fits in a page.
            Some(libc::EINVAL) => overlay_by_string(lower, upper, work),
            _ => Err(e),
        })
        .context(|| format!("mount overlay with upper directory {}", upper.display()))
}

pub(crate) fn overlay_by_layers(lower: &[std::path::PathBuf], upper: &Path, work: &Path) -> io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for layer in lower {
        fsconfig_set_string(&context, "lowerdir+", layer.as_path())?;
    }
    finish_overlay(&context, upper, work)
}

fn overlay_by_string(lower: &[std::path::PathBuf], upper: &Path, work: &Path) -> io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let escape = |p: &std::path::PathBuf| p.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:");
    let joined = lower.iter().map(escape).collect::<Vec<_>>().join(":");
    fsconfig_set_string(&context, "lowerdir", joined.as_str())?;
    finish_overlay(&context, upper, work)
}

fn finish_overlay(context: &OwnedFd, upper: &Path, work: &Path) -> io::Result<OwnedFd> {
    fsconfig_set_string(context, "upperdir", upper)?;
    fsconfig_set_string(context, "workdir", work)?;
    fsconfig_set_string(context, "source", "overlay")?;
    fsconfig_create(context)?;
    Ok(fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// Makes `root` this namespace's root and drops the host's tree.
pub(crate) fn enter(root: &Root) -> Result<()> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, rustix::fs::Mode::empty()).context(|| "open the old root".into())?;
    fchdir(root).context(|| "enter the rootfs".into())?;
    // The old root is stacked on the new one at ".", so no directory for it is needed in the image.
    pivot_root(".", ".").context(|| "pivot_root".into())?;
    // Unmounting must not travel back to the host. "." is the old root only for who is in it: the new one keeps its ties,
    // which are what a volume with Bidirectional propagation is for.
    fchdir(&old).context(|| "enter the old root".into())?;
    mount_change(".", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context(|| "detach the old root's propagation".into())?;
    unmount(".", UnmountFlags::DETACH).context(|| "unmount the old root".into())?;
    chdir("/").context(|| "enter the new root".into())
}

/// As [`enter`] for a root on initramfs, which cannot be pivoted away from.
pub(crate) fn enter_by_move(root: &Root) -> Result<()> {
    fchdir(root).context(|| "enter the rootfs".into())?;
    rustix::mount::mount_move(".", "/").context(|| "move the rootfs to /".into())?;
    chroot(".").context(|| "chroot".into())?;
    chdir("/").context(|| "enter the new root".into())
}

/// Last touches once everything is mounted.
pub(crate) fn finish(root: BorrowedFd<'_>, read_only: bool, propagation: Option<u64>) -> Result<()> {
    if read_only {
        mount_setattr(root, MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() })
            .context(|| "make the rootfs read-only".into())?;
    }
    if let Some(propagation) = propagation {
        mount_setattr(root, MountAttributes { propagation, ..MountAttributes::default() })
            .context(|| "set the rootfs's propagation".into())?;
    }
    Ok(())
}
