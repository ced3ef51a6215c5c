//! `status.json` of each container: replaced atomically, and durable before an exit is told to anyone.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::protocol::ContainerStatus;

/// Whether a change must survive a power cut before it is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// The kernel writes it when it likes.
    Relaxed,
    /// On disk when the call returns.
    Synced,
}

/// Name of the file with the path of the container's group.
const CGROUP: &str = "cgroup";

/// Where a container's status is, below the pod's run directory.
#[must_use]
pub fn file(pod: &Path, id: &str) -> PathBuf {
    directory(pod, id).join("status.json")
}

/// Where what is known of a container lies, below the pod's run directory.
pub(crate) fn directory(pod: &Path, id: &str) -> PathBuf {
    pod.join("containers").join(id)
}

/// Replaces the status.
pub(crate) fn write(pod: &Path, status: &ContainerStatus, durability: Durability) -> io::Result<()> {
    let dir = directory(pod, &status.id);
    fs::create_dir_all(&dir)?;
    let temporary = dir.join(".status.json");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(status)?)?;
    if durability == Durability::Synced {
        file.sync_all()?;
    }
    fs::rename(&temporary, dir.join("status.json"))?;
    if durability == Durability::Synced {
        File::open(&dir)?.sync_all()?;
    }
    Ok(())
}

/// Names the container's group before it is made, so that whoever comes next finds what there is of it.
pub(crate) fn plan(pod: &Path, id: &str, cgroup: &str) -> io::Result<()> {
    let dir = directory(pod, id);
    fs::create_dir_all(&dir)?;
    fs::write(dir.join(CGROUP), cgroup)
}

/// What a former supervisor left of a container.
#[derive(Debug)]
pub(crate) struct Left {
    /// Container id.
    pub(crate) id: String,
    /// Its group, when that was planned.
    pub(crate) cgroup: Option<String>,
    /// `None` when it was never whole, or was about to be forgotten.
    pub(crate) status: Option<ContainerStatus>,
}

/// Everything a former supervisor left.
pub(crate) fn read_all(pod: &Path) -> Vec<Left> {
    let entries = fs::read_dir(pod.join("containers")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let status = fs::read(entry.path().join("status.json")).ok();
            Some(Left {
                id: entry.file_name().into_string().ok()?,
                cgroup: fs::read_to_string(entry.path().join(CGROUP)).ok(),
                status: status.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            })
        })
        .collect()
}

/// Forgets a container.
pub(crate) fn remove(pod: &Path, id: &str) -> io::Result<()> {
    match fs::remove_dir_all(directory(pod, id)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
