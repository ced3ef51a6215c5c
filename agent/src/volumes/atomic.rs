//! Volumes whose whole content changes at once.
//!
//! Files live in a directory `..TIME` that the link `..data` points to; what pods see are links through `..data`. An
//! update makes a new directory and renames a new link over `..data`: readers see the old or the new content, never a
//! mix. Worked example: `a/b` becomes the link `a -> ..data/a` and the file `..TIME/a/b`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Component, Path},
};

/// One file of the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
    /// Owner, for tokens of pods that run as one user.
    pub(crate) uid: Option<u32>,
}

/// Content by relative path.
pub(crate) type Payload = BTreeMap<String, File>;

/// Checks that every path stays inside the volume.
pub(crate) fn check(payload: &Payload) -> Result<(), String> {
    for path in payload.keys() {
        let ok = !path.is_empty()
            && path.len() < 4096
            && !path.starts_with("..")
            && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
        if !ok {
            return Err(format!("invalid path in volume: {path:?}"));
        }
    }
    Ok(())
}

/// Makes the volume at `target` hold exactly `payload`. True when something changed.
pub(crate) fn write(target: &Path, payload: &Payload, gid: Option<u32>) -> io::Result<bool> {
    check(payload).map_err(io::Error::other)?;
    fs::create_dir_all(target)?;
    let data = target.join("..data");
    let old = fs::read_link(&data).ok();
    if let Some(old) = &old
        && same(&target.join(old), payload)
    {
        links(target, payload)?;
        return Ok(false);
    }
    let stamp = format!("..{}", super::super::pods::state::now());
    let fresh = target.join(&stamp);
    fs::create_dir(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    for (path, file) in payload {
        let place = fresh.join(path);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&place, &file.data)?;
        // Members of the pod's group may read everything.
        let mode = file.mode | gid.map_or(0, |_| 0o440);
        fs::set_permissions(&place, fs::Permissions::from_mode(mode))?;
        if file.uid.is_some() || gid.is_some() {
            std::os::unix::fs::chown(&place, file.uid, gid)?;
            fs::set_permissions(&place, fs::Permissions::from_mode(mode))?;
        }
    }
    if gid.is_some() {
        std::os::unix::fs::chown(&fresh, None, gid)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o2755))?;
    }
    let next = target.join("..data_tmp");
    let _ = fs::remove_file(&next);
    symlink(&stamp, &next)?;
    fs::rename(&next, &data)?;
    links(target, payload)?;
    if let Some(old) = old {
        fs::remove_dir_all(target.join(old)).ok();
    }
    Ok(true)
}

fn first_parts(payload: &Payload) -> BTreeSet<&str> {
    payload.keys().filter_map(|p| p.split('/').find(|s| !s.is_empty())).collect()
}

/// Links for what is there, none for what is gone.
fn links(target: &Path, payload: &Payload) -> io::Result<()> {
    let wanted = first_parts(payload);
    for name in &wanted {
        let place = target.join(name);
        if fs::symlink_metadata(&place).is_err() {
            symlink(Path::new("..data").join(name), &place)?;
        }
    }
    for entry in fs::read_dir(target)?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !wanted.contains(name.as_ref()) {
            fs::remove_file(entry.path()).ok();
        }
    }
    Ok(())
}

fn same(dir: &Path, payload: &Payload) -> bool {
    fn count(dir: &Path) -> usize {
        fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .fold(0, |n, e| n + if e.file_type().is_ok_and(|t| t.is_dir()) { count(&e.path()) } else { 1 })
    }
    dir.is_dir()
        && count(dir) == payload.len()
        && payload.iter().all(|(path, f)| fs::read(dir.join(path)).is_ok_and(|d| d == f.data))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(p, d)| (p.to_string(), File { data: d.as_bytes().to_vec(), mode: 0o640, uid: None }))
            .collect()
    }

    #[test]
    fn content_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("v");
        assert!(write(&target, &payload(&[("a", "1"), ("d/x", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(target.join("d/x")).unwrap(), "2");
        assert_eq!(fs::metadata(target.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(!write(&target, &payload(&[("a", "1"), ("d/x", "2")]), None).unwrap());
        assert!(write(&target, &payload(&[("a", "9")]), None).unwrap());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "9");
        let mut names: Vec<String> =
            fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names.len(), 3, "{names:?}");
        assert!(fs::symlink_metadata(target.join("d")).is_err());
    }

    #[test]
    fn paths_that_leave_are_refused() {
        for bad in ["../x", "/x", "a/../../b", "", "..hidden"] {
            assert!(check(&payload(&[(bad, "")])).is_err(), "{bad}");
        }
    }
}
