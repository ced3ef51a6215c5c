//! What was mounted for whom: `vol_data.json` beside each published and each staged volume, named as the kubelet names it.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::pods::state::write_atomically;

const FILE: &str = "vol_data.json";

/// One volume of a pod, or (with fewer words) one staged for the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Record {
    pub(super) driver_name: String,
    pub(super) volume_handle: String,
    #[serde(rename = "specVolID", skip_serializing_if = "String::is_empty")]
    pub(super) name: String,
    /// The claim it was asked for by.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) claim: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) node_name: String,
    /// Its VolumeAttachment, when it has one.
    #[serde(rename = "attachmentID", skip_serializing_if = "String::is_empty")]
    pub(super) attachment: String,
    /// `Persistent` or `Ephemeral`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) volume_lifecycle_mode: String,
    /// The boot in which the driver said that it is there.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) done: String,
}

impl Record {
    /// Reads that of a directory.
    pub(super) fn read(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// Writes it, making the directory.
    pub(super) fn write(&self, dir: &Path) -> Result<(), String> {
        let done = fs::create_dir_all(dir)
            .and_then(|()| serde_json::to_vec(self).map_err(io::Error::other))
            .and_then(|text| write_atomically(&dir.join(FILE), &text));
        done.map_err(|e| format!("{}: {e}", dir.display()))
    }

    /// Whether it is still there: mounts do not outlive a boot.
    pub(super) fn is_done(&self) -> bool {
        !self.done.is_empty() && self.done == boot()
    }

    /// The driver has done it.
    pub(super) fn finish(&mut self, dir: &Path) -> Result<(), String> {
        self.done = boot();
        self.write(dir)
    }
}

/// Takes the directory away, which the driver has emptied. Never looks below a mount point: that would be the volume.
pub(super) fn remove(dir: &Path, mount: &str) -> io::Result<()> {
    let gone = |r: io::Result<()>| match r {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    // A directory, or the file that a device was shown at.
    gone(fs::remove_dir(dir.join(mount)).or_else(|e| match e.kind() {
        io::ErrorKind::NotADirectory => fs::remove_file(dir.join(mount)),
        _ => Err(e),
    }))?;
    gone(fs::remove_file(dir.join(FILE)))?;
    gone(fs::remove_dir(dir))
}

/// This boot of the machine.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_written_and_holds_for_this_boot() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("pv");
        let mut r = Record { driver_name: "d".into(), volume_handle: "h".into(), ..Record::default() };
        r.write(&place).unwrap();
        assert!(!Record::read(&place).unwrap().is_done());
        r.finish(&place).unwrap();
        let mut read = Record::read(&place).unwrap();
        assert_eq!(read, r);
        assert!(read.is_done());
        read.done = "another boot".into();
        assert!(!read.is_done());
        fs::create_dir(place.join("mount")).unwrap();
        fs::write(place.join("mount/data"), b"precious").unwrap();
        assert!(remove(&place, "mount").is_err());
        assert!(place.join("mount/data").exists());
        fs::remove_file(place.join("mount/data")).unwrap();
        remove(&place, "mount").unwrap();
        assert!(!place.exists());
        remove(&place, "mount").unwrap();
    }
}
