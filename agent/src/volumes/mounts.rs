//! Mounts below a pod's directory: subPath binds made without a race, and their end.

use std::{
    borrow::Cow,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

/// Binds `sub_path` of the volume at `root` to a place of the pod's own and returns it.
///
/// The path is resolved by openat2 beneath the volume, so neither `..` nor a link planted by another container of the
/// pod leads out of it (CVE-2017-1002101, CVE-2021-25741), and what was opened is what is bound.
pub(crate) fn bind_sub_path(root: &Path, sub_path: &str, place: &Path, mode: u32) -> io::Result<PathBuf> {
    if Path::new(sub_path).components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(io::Error::other(format!("subPath {sub_path:?} must be a relative path without ..")));
    }
    if is_mount(place) {
        return Ok(place.to_path_buf());
    }
    let volume = rustix::fs::open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let target = open_or_make(volume.as_fd(), sub_path, mode)?;
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    let stat = rustix::fs::fstat(&target)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
        fs::create_dir_all(place)?;
    } else {
        fs::OpenOptions::new().create(true).append(true).open(place)?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(&target, "", flags)?;
    rustix::mount::move_mount(&tree, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(place.to_path_buf())
}

fn beneath(dir: std::os::fd::BorrowedFd<'_>, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn open_or_make(volume: std::os::fd::BorrowedFd<'_>, path: &str, mode: u32) -> io::Result<OwnedFd> {
    match beneath(volume, path, OFlags::PATH) {
        Err(rustix::io::Errno::NOENT) => {}
        other => return other.map_err(Into::into),
    }
    let mut at = String::new();
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        let parent = if at.is_empty() { ".".to_string() } else { at.clone() };
        if !at.is_empty() {
            at.push('/');
        }
        at.push_str(part);
        if beneath(volume, &at, OFlags::PATH).is_err() {
            let dir = beneath(volume, &parent, OFlags::DIRECTORY | OFlags::RDONLY)?;
            rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(0o750))?;
            let made = rustix::fs::openat(&dir, part, OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
            rustix::fs::fchmod(&made, Mode::from_raw_mode(mode))?;
        }
    }
    Ok(beneath(volume, path, OFlags::PATH)?)
}

/// Mount points at or below `dir`, the deepest first.
pub(crate) fn below(dir: &Path) -> Vec<PathBuf> {
    below_any(&[dir.to_path_buf()])
}

/// Mount points at or below any of these, the deepest first.
fn below_any(dirs: &[PathBuf]) -> Vec<PathBuf> {
    mounted_below(dirs).into_iter().map(|(place, _)| place).collect()
}

/// The same, and whether it is NFS. A machine has some for every pod, so all are read at once.
fn mounted_below(dirs: &[PathBuf]) -> Vec<(PathBuf, bool)> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let beneath = |place: &str| dirs.iter().any(|dir| Path::new(place).starts_with(dir));
    let mut found = Vec::new();
    for line in text.lines() {
        let Some(place) = line.split(' ').nth(4) else { continue };
        let place = if place.contains('\\') { Cow::Owned(unescape(place)) } else { Cow::Borrowed(place) };
        if beneath(&place) {
            found.push((PathBuf::from(&*place), line.contains(" - nfs")));
        }
    }
    found.reverse();
    found
}

/// Unmounts everything below `dir`, not what is mounted there itself; the places that could not be, and why.
pub(crate) fn unmount_below(dir: &Path) -> Vec<String> {
    let failed =
        |(place, nfs): (PathBuf, bool)| unmount(&place, nfs).err().map(|error| format!("{}: {error}", place.display()));
    mounted_below(&[dir.to_path_buf()]).into_iter().filter(|(place, _)| place != dir).filter_map(failed).collect()
}

fn unmount(place: &Path, nfs: bool) -> io::Result<()> {
    if nfs { super::nfs::detach(place) } else { Ok(rustix::mount::unmount(place, UnmountFlags::DETACH)?) }
}

/// Whether something is mounted exactly there.
pub(crate) fn is_mount(place: &Path) -> bool {
    // Asked without a word to a server that may be away.
    match rustix::fs::statx(CWD, place, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE) {
        Ok(told) => told.stx_attributes.contains(StatxAttributes::MOUNT_ROOT),
        Err(Errno::NOENT | Errno::NOTDIR) => false,
        // Mounted, and its server is gone.
        Err(_) => below(place).iter().any(|m| m == place),
    }
}

/// Whether mounts made at a place show elsewhere as `propagation` wants it; what is wrong, if not.
pub(crate) fn propagates(place: &Path, propagation: &str) -> Result<(), String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let real = place.canonicalize().unwrap_or_else(|_| place.to_path_buf());
    check_propagation(&text, &real, propagation)
}

fn check_propagation(mountinfo: &str, place: &Path, propagation: &str) -> Result<(), String> {
    let holds = |line: &&str| line.split(' ').nth(4).is_some_and(|m| place.starts_with(unescape(m)));
    // The last of the longest is the one on top.
    let Some(line) = mountinfo.lines().filter(holds).max_by_key(|l| l.split(' ').nth(4).map(str::len)) else {
        return Ok(());
    };
    let tags = line.split(" - ").next().unwrap_or_default();
    let (shared, slave) = (tags.contains(" shared:"), tags.contains(" master:"));
    let (fits, want) = match propagation {
        "rshared" => (shared, "a shared mount"),
        "rslave" => (shared || slave, "a shared or slave mount"),
        _ => (true, ""),
    };
    let on = unescape(line.split(' ').nth(4).unwrap_or_default());
    if fits { Ok(()) } else { Err(format!("path {:?} is mounted on {on:?} but it is not {want}", place.display())) }
}

pub(crate) fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        let octal = (bytes[i] == b'\\').then(|| text.get(i + 1..i + 4)).flatten();
        match octal.and_then(|o| u8::from_str_radix(o, 8).ok()) {
            Some(b) => {
                out.push(b);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Unmounts everything at and below `dir`, then removes it. Never deletes through a mount that stays.
pub(crate) fn remove_tree(dir: &Path) -> io::Result<()> {
    remove_trees(&[dir])
}

/// The same for several.
pub(crate) fn remove_trees(dirs: &[&Path]) -> io::Result<()> {
    let there = dirs.iter().filter(|dir| fs::symlink_metadata(dir).is_ok());
    let real = there.map(|dir| dir.canonicalize()).collect::<io::Result<Vec<_>>>()?;
    if real.is_empty() {
        return Ok(());
    }
    let mounts = mounted_below(&real);
    for (place, nfs) in &mounts {
        unmount(place, *nfs)?;
    }
    // One of several mounts at one place may be left.
    if !mounts.is_empty()
        && let Some(left) = below_any(&real).first()
    {
        return Err(io::Error::other(format!("{} is still mounted", left.display())));
    }
    for dir in dirs {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_paths_cannot_leave_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        fs::create_dir_all(&volume).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("out")).unwrap();
        std::os::unix::fs::symlink("in", volume.join("link")).unwrap();
        fs::create_dir(volume.join("in")).unwrap();
        let fd = rustix::fs::open(&volume, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        assert!(open_or_make(fd.as_fd(), "link", 0o755).is_ok());
        assert!(open_or_make(fd.as_fd(), "out/passwd", 0o755).is_err());
        assert!(open_or_make(fd.as_fd(), "out/new", 0o755).is_err());
        open_or_make(fd.as_fd(), "made/deep", 0o755).unwrap();
        assert!(volume.join("made/deep").is_dir());
        assert!(bind_sub_path(&volume, "../v", &dir.path().join("p"), 0o755).is_err());
        assert!(bind_sub_path(&volume, "/etc", &dir.path().join("p"), 0o755).is_err());
    }

    #[test]
    fn mounts_propagate_from_shared_places_only() {
        let text = "1 0 8:1 / / rw - ext4 d rw\n2 1 8:1 / /s rw shared:3 - ext4 d rw\n3 2 8:1 / /s/m rw master:3 - ext4 d rw\n";
        let of = |place: &str, how: &str| check_propagation(text, Path::new(place), how);
        for (place, how, fits) in [
            ("/a", "rshared", false),
            ("/a", "rprivate", true),
            ("/a", "rslave", false),
            ("/s/x", "rshared", true),
            ("/s/m/x", "rshared", false),
            ("/s/m/x", "rslave", true),
        ] {
            assert_eq!(of(place, how).is_ok(), fits, "{place} {how}");
        }
        assert_eq!(of("/a", "rshared").unwrap_err(), "path \"/a\" is mounted on \"/\" but it is not a shared mount");
    }

    #[test]
    fn what_is_mounted_is_known_without_a_list() {
        assert!(is_mount(Path::new("/proc")) && is_mount(Path::new("/")));
        assert!(!is_mount(Path::new("/proc/self")) && !is_mount(Path::new("/no/such")));
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_mount(dir.path()));
        assert!(below(Path::new("/proc")).contains(&PathBuf::from("/proc")));
        assert!(below(Path::new("/pro")).is_empty());
    }

    #[test]
    fn several_trees_go_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, none] = ["a", "b", "none"].map(|name| dir.path().join(name));
        fs::create_dir_all(a.join("x/y")).unwrap();
        fs::create_dir(&b).unwrap();
        remove_trees(&[&a, &b, &none]).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn escapes_of_mountinfo() {
        assert_eq!(unescape("/a\\040b\\134"), "/a b\\");
    }
}
