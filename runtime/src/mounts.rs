//! The mounts of a container, made with the new mount API: a mount is first built detached, with all its attributes,
//! and then moved onto a descriptor of its target. No path is ever walked twice.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::{
    cgroups::CgroupView,
    error::{Context, Error, Result},
    masks::KernelMounts,
    mount_options::{self, MountOptions},
    root::{PROC_MAGIC, Root, is_on},
    sys::{MountAttributes, mount_setattr},
};

/// Files of procfs that others (lxcfs) may put a better one over.
const PROC_TARGETS: &[&str] = &[
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// Clones the mount (or tree) at a path or descriptor, detached.
pub(crate) fn clone_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(open_tree(dir, path, flags)?)
}

/// Moves a detached mount onto an open target.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, c"", target, c"", flags)?)
}

/// Makes a new file system instance, detached.
pub(crate) fn new_file_system(
    kind: &str,
    source: Option<&str>,
    data: &[(String, Option<String>)],
    attributes: u64,
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(source) = source {
        fsconfig_set_string(&context, "source", source)?;
    }
    for (key, value) in data {
        match value {
            Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(&context, key.as_str()),
        }
        .map_err(|e| {
            let option = value.as_ref().map_or_else(|| key.clone(), |v| format!("{key}={v}"));
            let told = kernel_message(context.as_fd()).unwrap_or_else(|| io::Error::from(e).to_string());
            io::Error::new(io::Error::from(e).kind(), format!("option {option:?}: {told}"))
        })?;
    }
    fsconfig_create(&context).map_err(|e| match kernel_message(context.as_fd()) {
        Some(told) => io::Error::new(io::Error::from(e).kind(), told),
        None => e.into(),
    })?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::from_bits_retain(attributes as u32))?)
}

/// What the kernel wrote into the file system context about a failure.
fn kernel_message(context: BorrowedFd<'_>) -> Option<String> {
    let mut buffer = [0u8; 512];
    let n = rustix::io::read(context, &mut buffer).ok()?;
    let text = String::from_utf8_lossy(&buffer[..n]);
    Some(text.trim().trim_start_matches(['e', 'w', 'i']).trim().to_owned())
}

/// What mounting needs to know of the container.
pub(crate) struct MountContext<'a> {
    /// The container's root.
    pub(crate) root: &'a Root,
    /// Directory relative sources are in.
    pub(crate) bundle: &'a Path,
    /// The container's cgroup, for mounts of type cgroup.
    pub(crate) cgroup: &'a CgroupView,
    /// Whether the container has a user namespace of its own.
    pub(crate) userns: bool,
    /// What the maker has mounted.
    pub(crate) ahead: &'a crate::userns::Ahead,
    /// User namespaces for idmapped mounts, by index into the mounts.
    pub(crate) idmaps: &'a [Option<OwnedFd>],
    /// `linux.mountLabel`: the SELinux context of the container's own file systems.
    pub(crate) label: Option<&'a str>,
    /// Told of what has no effect.
    pub(crate) warn: &'a dyn Fn(String),
}

/// Makes the mounts of the configuration.
pub(crate) fn mount_all(context: &MountContext<'_>, mounts: &[Mount]) -> Result<KernelMounts> {
    let mut kernel = KernelMounts::default();
    for (index, mount) in mounts.iter().enumerate() {
        kernel.mounted(mount.destination(), mount_one(context, index, mount)?);
    }
    Ok(kernel)
}

fn mount_one(context: &MountContext<'_>, index: usize, mount: &Mount) -> Result<OwnedFd> {
    let options = mount_options::parse(mount.options().as_deref().unwrap_or_default())?;
    let destination = mount.destination();
    let kind = mount.typ().as_deref().unwrap_or(if options.bind { "bind" } else { "none" });
    let result = match kind {
        _ if options.bind || kind == "bind" => bind(context, index, mount, &options),
        "cgroup" | "cgroup2" | "proc" | "sysfs" if context.idmaps.get(index).is_some_and(Option::is_some) => {
            Err(Error::invalid("ids cannot be mapped on this type of mount"))
        }
        "cgroup" | "cgroup2" => cgroup(context, destination, &options),
        "proc" | "sysfs" => kernel_fs(context, index, kind, mount, &options),
        _ => file_system(context, index, kind, mount, &options),
    };
    result.map_err(|e| e.within(format_args!("mount {kind} on {}", destination.display())))
}

fn bind(context: &MountContext<'_>, index: usize, mount: &Mount, options: &MountOptions) -> Result<OwnedFd> {
    let source = mount.source().as_ref().ok_or_else(|| Error::invalid("a bind mount needs a source"))?;
    let source = if source.is_absolute() { source.clone() } else { context.bundle.join(source) };
    for (word, _) in &options.data {
        (context.warn)(format!("mount on {}: {word} has no effect on a bind mount", mount.destination().display()));
    }
    let tree = match context.ahead.mount(index) {
        Some(made) => made.try_clone_to_owned().context(|| "copy a descriptor".into())?,
        None => {
            let tree = clone_tree(CWD, &source, options.recursive);
            let tree = tree.context(|| format!("open source {}", source.display()))?;
            map_ids(context, index, tree.as_fd(), options)?;
            tree
        }
    };
    apply(tree.as_fd(), options)?;
    let is_dir = rustix::fs::fstat(&tree)
        .map(|s| rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Directory)
        .context(|| format!("stat source {}", source.display()))?;
    let destination = mount.destination();
    let target = if is_dir { context.root.ensure_dir(destination)? } else { context.root.ensure_file(destination)? };
    refuse_procfs(target.as_fd(), destination)?;
    attach(tree.as_fd(), target.as_fd()).context(|| "attach".into())?;
    propagate(tree.as_fd(), options)?;
    Ok(tree)
}

/// Applies the mappings of an idmapped mount.
fn map_ids(context: &MountContext<'_>, index: usize, mount: BorrowedFd<'_>, options: &MountOptions) -> Result<()> {
    let Some(userns) = context.idmaps.get(index).and_then(Option::as_ref) else { return Ok(()) };
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_IDMAP,
        userns: Some(userns.as_fd()),
        recursive: options.idmap == Some(true),
        ..MountAttributes::default()
    };
    mount_setattr(mount, attributes).context(|| "map ids".into())
}

fn kernel_fs(
    context: &MountContext<'_>,
    index: usize,
    kind: &str,
    mount: &Mount,
    options: &MountOptions,
) -> Result<OwnedFd> {
    let destination = mount.destination();
    drop(context.root.ensure_dir(destination)?);
    // CVE-2019-16884 and kin: through a symlink the mount would land elsewhere and the masks with it.
    let target = context.root.open_exact(destination, OFlags::PATH | OFlags::DIRECTORY).map_err(|_| {
        Error::invalid(format!("{kind} must be mounted on an ordinary directory, not through a symlink"))
    })?;
    let handed = context.ahead.mount(index).map(|made| made.try_clone_to_owned());
    let new = || new_file_system(kind, Some(kind), &options.data, options.set);
    let made = handed.unwrap_or_else(new).or_else(|e| {
        // A user namespace that does not own the network namespace may not mount sysfs: bind the host's.
        if context.userns && e.raw_os_error() == Some(libc::EPERM) {
            let tree = clone_tree(CWD, Path::new(if kind == "proc" { "/proc" } else { "/sys" }), true)?;
            let attributes = MountAttributes { set: options.set, recursive: false, ..MountAttributes::default() };
            mount_setattr(tree.as_fd(), attributes)?;
            return Ok(tree);
        }
        Err(e)
    });
    let made = made.context(|| "create".into())?;
    attach(made.as_fd(), target.as_fd()).context(|| "attach".into())?;
    propagate(made.as_fd(), options)?;
    Ok(made)
}

fn file_system(
    context: &MountContext<'_>,
    index: usize,
    kind: &str,
    mount: &Mount,
    options: &MountOptions,
) -> Result<OwnedFd> {
    let destination = mount.destination();
    let target = context.root.ensure_dir(destination)?;
    refuse_procfs(target.as_fd(), destination)?;
    let source = mount.source().as_ref().map(|s| s.to_string_lossy().into_owned());
    let mut data = options.data.clone();
    if kind == "tmpfs" && !data.iter().any(|(k, _)| k == "mode") {
        // Over an existing directory a tmpfs keeps its mode, as with other runtimes.
        if let Ok(stat) = rustix::fs::fstat(&target) {
            data.push(("mode".to_owned(), Some(format!("{:o}", stat.st_mode & 0o7777))));
        }
    }
    if let Some(label) = context.label.filter(|_| !data.iter().any(|(k, _)| k == "context")) {
        data.push(("context".to_owned(), Some(label.to_owned())));
    }
    let read_only = libc::MOUNT_ATTR_RDONLY;
    let first = if options.copy_up { options.set & !read_only } else { options.set };
    let handed = context.ahead.mount(index).map(|made| made.try_clone_to_owned());
    let made = match handed.unwrap_or_else(|| new_file_system(kind, source.as_deref(), &data, first)) {
        // In a user namespace gids outside the map are refused; devpts then lives without a tty group.
        Err(e) if kind == "devpts" && context.userns && e.kind() == io::ErrorKind::InvalidInput => {
            data.retain(|(k, _)| k != "gid");
            new_file_system(kind, source.as_deref(), &data, first)
        }
        other => other,
    }
    .context(|| "create".into())?;
    map_ids(context, index, made.as_fd(), options)?;
    if options.copy_up {
        copy_up(context.root, destination, made.as_fd())?;
        if options.set & read_only != 0 {
            mount_setattr(made.as_fd(), MountAttributes { set: read_only, ..MountAttributes::default() })
                .context(|| "make read-only".into())?;
        }
    }
    attach(made.as_fd(), target.as_fd()).context(|| "attach".into())?;
    propagate(made.as_fd(), options)?;
    Ok(made)
}

fn cgroup(context: &MountContext<'_>, destination: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let target = context.root.ensure_dir(destination)?;
    refuse_procfs(target.as_fd(), destination)?;
    if let Some(unified) = &context.cgroup.unified_only {
        let tree = clone_tree(CWD, unified, false).context(|| format!("open {}", unified.display()))?;
        apply(tree.as_fd(), options)?;
        attach(tree.as_fd(), target.as_fd()).context(|| "attach".into())?;
        propagate(tree.as_fd(), options)?;
        return Ok(tree);
    }
    let data = [("mode".to_owned(), Some("755".to_owned()))];
    let flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let tmpfs = new_file_system("tmpfs", Some("cgroup"), &data, flags).context(|| "create tmpfs".into())?;
    attach(tmpfs.as_fd(), target.as_fd()).context(|| "attach".into())?;
    for (name, dir) in &context.cgroup.directories {
        let tree = clone_tree(CWD, dir, false).context(|| format!("open {}", dir.display()))?;
        apply(tree.as_fd(), options)?;
        rustix::fs::mkdirat(&tmpfs, name.as_str(), Mode::from_raw_mode(0o755)).context(|| format!("mkdir {name}"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below =
            rustix::fs::openat(&tmpfs, name.as_str(), flags, Mode::empty()).context(|| format!("open {name}"))?;
        attach(tree.as_fd(), below.as_fd()).context(|| format!("attach {name}"))?;
    }
    for (link, name) in &context.cgroup.links {
        rustix::fs::symlinkat(name.as_str(), &tmpfs, link.as_str()).context(|| format!("link {link}"))?;
    }
    if options.set & libc::MOUNT_ATTR_RDONLY != 0 {
        let attributes = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
        mount_setattr(tmpfs.as_fd(), attributes).context(|| "make read-only".into())?;
    }
    Ok(tmpfs)
}

/// Sets a built mount's attributes.
fn apply(mount: BorrowedFd<'_>, options: &MountOptions) -> Result<()> {
    if options.set | options.clear != 0 {
        let attributes = MountAttributes { set: options.set, clear: options.clear, ..MountAttributes::default() };
        mount_setattr(mount, attributes).context(|| "set attributes".into())?;
    }
    if options.set_recursive | options.clear_recursive != 0 {
        let attributes = MountAttributes {
            set: options.set_recursive,
            clear: options.clear_recursive,
            recursive: true,
            ..MountAttributes::default()
        };
        mount_setattr(mount, attributes).context(|| "set recursive attributes".into())?;
    }
    Ok(())
}

fn propagate(mount: BorrowedFd<'_>, options: &MountOptions) -> Result<()> {
    for &(propagation, recursive) in &options.propagation {
        let attributes = MountAttributes { propagation, recursive, ..MountAttributes::default() };
        mount_setattr(mount, attributes).context(|| "set propagation".into())?;
    }
    Ok(())
}

/// Only the known harmless files of a procfs may be covered: a mount over another would fake the kernel's word.
fn refuse_procfs(target: BorrowedFd<'_>, destination: &Path) -> Result<()> {
    if !is_on(target, PROC_MAGIC) {
        return Ok(());
    }
    let below = destination.strip_prefix("/proc").ok();
    if below.is_some_and(|p| PROC_TARGETS.iter().any(|t| Path::new(t) == p) || p.as_os_str().is_empty()) {
        return Ok(());
    }
    Err(Error::invalid("cannot mount inside /proc"))
}

/// Copies what `destination` holds into a detached tmpfs.
fn copy_up(root: &Root, destination: &Path, into: BorrowedFd<'_>) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let from = root.open(destination, flags).context(|| format!("open {}", destination.display()))?;
    copy_dir(from.as_fd(), into, 0).context(|| format!("copy up {}", destination.display()))
}

fn copy_dir(from: BorrowedFd<'_>, into: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    use rustix::fs::{AtFlags, Dir, FileType, Gid, Uid, chownat, mkdirat, openat, readlinkat, statat, symlinkat};
    if depth > 64 {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let nofollow = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(into, name, mode)?;
                let source = openat(from, name, OFlags::RDONLY | OFlags::DIRECTORY | nofollow, Mode::empty())?;
                let target = openat(into, name, OFlags::RDONLY | OFlags::DIRECTORY | nofollow, Mode::empty())?;
                copy_dir(source.as_fd(), target.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => {
                let source = openat(from, name, OFlags::RDONLY | OFlags::NONBLOCK | nofollow, Mode::empty())?;
                let target = openat(into, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | nofollow, mode)?;
                io::copy(&mut std::fs::File::from(source), &mut std::fs::File::from(target))?;
            }
            FileType::Symlink => symlinkat(readlinkat(from, name, vec![])?, into, name)?,
            _ => continue,
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        chownat(into, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Where a path is mounted, for [`crate::rootfs`]: its mount point in this namespace.
pub(crate) fn mount_point_of(path: &Path) -> Result<PathBuf> {
    let statx = rustix::fs::statx(CWD, path, rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::MNT_ID)
        .context(|| format!("stat {}", path.display()))?;
    let table = std::fs::read_to_string("/proc/self/mountinfo").context(|| "read /proc/self/mountinfo".into())?;
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            (fields.next()?.parse() == Ok(statx.stx_mnt_id)).then(|| fields.nth(3)).flatten()
        })
        .map(|escaped| PathBuf::from(crate::cgroups::unescape(escaped)))
        .next_back()
        .ok_or_else(|| Error::invalid(format!("{} is on no known mount", path.display())))
}
