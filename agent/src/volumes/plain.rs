//! emptyDir, hostPath, local and the ownership a pod's group gets.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Pod};
use nix::mount::MsFlags;

use crate::quantity;

/// Makes an emptyDir; memory ones are a tmpfs, those of huge pages a hugetlbfs.
pub(crate) fn empty_dir(target: &Path, source: &EmptyDirVolumeSource, pod: &Pod) -> Result<(), String> {
    let context = |what: &str| {
        let text = format!("{what} {}", target.display());
        move |e: io::Error| format!("{text}: {e}")
    };
    fs::create_dir_all(target).map_err(context("create"))?;
    let medium = source.medium.as_deref().unwrap_or("");
    let mount = |kind: &str, data: &str| {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        nix::mount::mount(Some(kind), target, Some(kind), flags, Some(data))
            .map_err(|e| format!("mount {kind} {}: {e}", target.display()))
    };
    match medium {
        "" => {}
        _ if super::mounts::is_mount(target) => {}
        "Memory" => {
            let size = source.size_limit.as_ref().map(quantity::value).filter(|s| *s > 0);
            let data = size.map_or_else(|| "mode=0777".to_string(), |s| format!("mode=0777,size={s}"));
            // Kernels before 6.4 may swap it out.
            mount("tmpfs", &format!("{data},noswap")).or_else(|_| mount("tmpfs", &data))?;
        }
        _ if medium.starts_with(HUGE_PAGES) => {
            let size = page_size(medium, pod)?;
            mount("hugetlbfs", &format!("mode=0777,pagesize={}", size.trim_end_matches('i')))?;
        }
        other => return Err(format!("unknown storage medium {other:?}")),
    }
    fs::set_permissions(target, fs::Permissions::from_mode(0o777)).map_err(context("chmod"))?;
    if let Some(gid) = fs_group(pod) {
        own(target, gid, true).map_err(context("chown"))?;
    }
    Ok(())
}

/// `medium` of an emptyDir in huge pages: this, or with a size behind a dash.
const HUGE_PAGES: &str = "HugePages";

/// The size of the pages that a medium means: the one it names, or the only one the pod asks for.
fn page_size(medium: &str, pod: &Pod) -> Result<String, String> {
    let containers = pod.spec.iter().flat_map(crate::qos::all_containers);
    let lists = containers.filter_map(|c| c.resources.as_ref()).flat_map(|r| [&r.requests, &r.limits]);
    let names = lists.flatten().flat_map(|list| list.keys());
    let sizes: BTreeSet<&str> = names.filter_map(|name| name.strip_prefix("hugepages-")).collect();
    match medium.strip_prefix(HUGE_PAGES).map(|rest| rest.trim_start_matches('-')).unwrap_or_default() {
        "" => match sizes.iter().collect::<Vec<_>>()[..] {
            [] => Err("hugePages storage requested, but there is no resource request for huge pages".into()),
            [size] => Ok((*size).into()),
            _ => Err(format!("medium {medium} can't be used if container requests multiple huge page sizes")),
        },
        size if sizes.contains(size) => Ok(size.into()),
        size => Err(format!("medium {medium}: no container requests hugepages-{size}")),
    }
}

/// Checks a hostPath, making what its type asks to make.
pub(crate) fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or("");
    let meta = fs::metadata(&path);
    let is = |check: fn(&fs::FileType) -> bool| meta.as_ref().is_ok_and(|m| check(&m.file_type()));
    let make = |made: io::Result<()>| made.map_err(|e| format!("hostPath type check failed: {}: {e}", source.path));
    let what = match kind {
        "" => {
            if meta.is_err() {
                make(fs::create_dir_all(&path))?;
            }
            return Ok(path);
        }
        "DirectoryOrCreate" => {
            if meta.is_err() {
                make(fs::create_dir_all(&path))?;
                make(fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))?;
                return Ok(path);
            }
            is(fs::FileType::is_dir).then_some(()).ok_or("a directory")
        }
        "Directory" => is(fs::FileType::is_dir).then_some(()).ok_or("a directory"),
        "FileOrCreate" => {
            if meta.is_err() {
                make(fs::File::create(&path).map(|_| ()))?;
                make(fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))?;
                return Ok(path);
            }
            is(fs::FileType::is_file).then_some(()).ok_or("a file")
        }
        "File" => is(fs::FileType::is_file).then_some(()).ok_or("a file"),
        "Socket" => is(|t| t.is_socket()).then_some(()).ok_or("a socket file"),
        "CharDevice" => is(|t| t.is_char_device()).then_some(()).ok_or("a character device"),
        "BlockDevice" => is(|t| t.is_block_device()).then_some(()).ok_or("a block device"),
        other => return Err(format!("{other:?} is an invalid hostPath type")),
    };
    what.map(|()| path).map_err(|what| format!("hostPath type check failed: {} is not {what}", source.path))
}

/// The directory of a local volume, which is made when it is to be: anyone may write, as the class has no owner to go by.
pub(crate) fn local(path: &str, make: bool, gid: Option<u32>) -> Result<PathBuf, String> {
    let target = PathBuf::from(path);
    let context = |what: &str| {
        let text = format!("{what} {path}");
        move |e: io::Error| format!("{text}: {e}")
    };
    if make && !target.exists() {
        fs::create_dir_all(&target).map_err(context("create"))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o777)).map_err(context("chmod"))?;
    }
    let meta = fs::metadata(&target).map_err(|_| format!("path {path:?} does not exist"))?;
    if let Some(gid) = gid.filter(|gid| meta.is_dir() && meta.gid() != *gid) {
        own(&target, gid, true).map_err(context("chown"))?;
    }
    Ok(target)
}

/// Checks that a local volume is the block device it is said to be.
pub(crate) fn block_device(path: &str) -> Result<PathBuf, String> {
    match fs::metadata(path) {
        Ok(m) if m.file_type().is_block_device() => Ok(path.into()),
        Ok(_) => Err(format!("path {path:?} is not a block device")),
        Err(e) => Err(format!("path {path:?}: {e}")),
    }
}

/// The group that a pod's volumes belong to.
pub(crate) fn fs_group(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    context.fs_group.and_then(|g| u32::try_from(g).ok())
}

/// As [`own`], but leaves a tree alone whose root is the group's already, when that is enough.
pub(crate) fn own_with(root: &Path, gid: u32, root_tells: bool) -> io::Result<()> {
    let meta = fs::symlink_metadata(root)?;
    let has = meta.gid() == gid && meta.mode() & 0o2770 == 0o2770;
    if root_tells && has { Ok(()) } else { own(root, gid, true) }
}

/// Gives a tree to a group: everyone in it may read, write and, in directories, create.
pub(crate) fn own(root: &Path, gid: u32, writable: bool) -> io::Result<()> {
    let mask = if writable { 0o660 } else { 0o440 };
    let mut stack = vec![root.to_path_buf()];
    while let Some(path) = stack.pop() {
        let meta = fs::symlink_metadata(&path)?;
        if meta.file_type().is_symlink() {
            std::os::unix::fs::lchown(&path, None, Some(gid))?;
            continue;
        }
        let add = if meta.is_dir() { mask | 0o2110 } else { mask };
        if meta.gid() != gid {
            std::os::unix::fs::chown(&path, None, Some(gid))?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode((meta.mode() & 0o7777) | add))?;
        if meta.is_dir() {
            stack.extend(fs::read_dir(&path)?.flatten().map(|e| e.path()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn host_path_types() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, kind: &str| {
            host_path(&HostPathVolumeSource {
                path: dir.path().join(name).to_string_lossy().into_owned(),
                type_: Some(kind.into()),
            })
        };
        assert!(of("none", "Directory").unwrap_err().ends_with("none is not a directory"));
        assert!(of("none", "File").unwrap_err().ends_with("is not a file"));
        assert!(of("d", "DirectoryOrCreate").unwrap().is_dir());
        assert!(of("d", "Directory").is_ok());
        assert!(of("d", "FileOrCreate").is_err());
        assert!(of("f", "FileOrCreate").unwrap().is_file());
        assert!(of("f", "Socket").unwrap_err().ends_with("is not a socket file"));
        assert!(
            host_path(&HostPathVolumeSource { path: "/dev/null".into(), type_: Some("CharDevice".into()) }).is_ok()
        );
        assert!(of("x/y", "").unwrap().is_dir());
    }

    #[test]
    fn local_volumes_are_made_only_for_the_provisioner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/v");
        let path = path.to_str().unwrap();
        assert!(local(path, false, None).unwrap_err().ends_with("does not exist"));
        let meta = fs::metadata(local(path, true, Some(77)).unwrap()).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o2777, 77));
        fs::write(dir.path().join("a/v/f"), "kept").unwrap();
        local(path, true, Some(77)).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("a/v/f")).unwrap(), "kept");
    }

    #[test]
    fn empty_dirs_are_for_everyone() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("e");
        let pod =
            serde_json::from_value(json!({"spec": {"containers": [], "securityContext": {"fsGroup": 77}}})).unwrap();
        empty_dir(&target, &EmptyDirVolumeSource::default(), &pod).unwrap();
        let meta = fs::metadata(&target).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o2777, 77));
    }

    #[test]
    fn huge_pages_are_mounted() {
        use nix::sched::{CloneFlags, unshare};

        // In mounts of this thread's own.
        let test = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let limits = json!({"limits": {"hugepages-2Mi": "2Mi"}});
            let pod = json!({"spec": {"containers": [{"name": "c", "resources": limits}]}});
            let pod = serde_json::from_value(pod).unwrap();
            let source = EmptyDirVolumeSource { medium: Some("HugePages".into()), size_limit: None };
            // Once is enough.
            empty_dir(dir.path(), &source, &pod).unwrap();
            empty_dir(dir.path(), &source, &pod).unwrap();
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let own: Vec<&str> = mounts.lines().filter(|l| l.contains(&*dir.path().to_string_lossy())).collect();
            assert!(own.len() == 1 && own[0].contains("- hugetlbfs") && own[0].contains("pagesize=2M"), "{own:?}");
            nix::mount::umount(dir.path()).unwrap();
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn huge_pages_are_of_the_size_that_is_asked_for() {
        let of = |medium: &str, sizes: &[&str]| {
            let limits: serde_json::Map<_, _> =
                sizes.iter().map(|size| (format!("hugepages-{size}"), json!("4Mi"))).collect();
            let containers = json!([{"name": "c", "resources": {"limits": limits}}]);
            page_size(medium, &serde_json::from_value(json!({"spec": {"containers": containers}})).unwrap())
        };
        assert_eq!(of("HugePages", &["2Mi"]), Ok("2Mi".into()));
        assert_eq!(of("HugePages-1Gi", &["2Mi", "1Gi"]), Ok("1Gi".into()));
        for (medium, sizes) in [("HugePages", &[][..]), ("HugePages", &["2Mi", "1Gi"]), ("HugePages-1Gi", &["2Mi"])] {
            assert!(of(medium, sizes).is_err(), "{medium} {sizes:?}");
        }
    }
}
