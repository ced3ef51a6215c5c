//! Ranges of host users for pods with users of their own (`hostUsers: false`).
//!
//! Each such pod has a range to itself, `userNamespaces.idsPerPod` long, from which no id of the machine comes. It is written
//! down in the pod's directory (`userns`, as upstream does) before anything uses it and stays its own until that is removed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::PodSpec;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::state::write_atomically;

/// Users and groups `0..length` of a pod are `host..host + length` of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) host: u32,
    pub(crate) length: u32,
}

/// One line of a map, in upstream's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Note {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

/// All ranges given out on this machine.
#[derive(Debug)]
pub(crate) struct UserRanges {
    pods: PathBuf,
    length: u32,
    taken: Mutex<BTreeMap<String, Range>>,
}

fn note_path(pods: &Path, uid: &str) -> PathBuf {
    pods.join(uid).join("userns")
}

fn read(path: &Path) -> Option<Range> {
    let note: Note = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let m = note.uid_mappings.first()?;
    (m.container_id == 0 && m.length > 0).then_some(Range { host: m.host_id, length: m.length })
}

impl UserRanges {
    /// Finds what earlier agents have given out.
    pub(crate) fn open(pods: PathBuf, length: i64) -> Self {
        let entries = fs::read_dir(&pods).into_iter().flatten().flatten();
        let taken = entries
            .filter_map(|e| Some((e.file_name().to_string_lossy().into_owned(), read(&e.path().join("userns"))?)))
            .collect();
        let length = u32::try_from(length).unwrap_or(65_536).max(65_536);
        Self { pods, length, taken: Mutex::new(taken) }
    }

    /// The pod's range, given out now if it has none.
    pub(crate) fn of(&self, uid: &str) -> io::Result<Range> {
        let mut taken = self.taken.lock();
        if let Some(range) = taken.get(uid) {
            return Ok(*range);
        }
        let free = |host: u64| {
            let end = host + u64::from(self.length);
            !taken.values().any(|r| u64::from(r.host) < end && host < u64::from(r.host) + u64::from(r.length))
        };
        let starts = (1..).map(|n| n * u64::from(self.length));
        // The last id of all means "none".
        let mut starts = starts.take_while(|s| s + u64::from(self.length) < u64::from(u32::MAX));
        let host = starts.find(|s| free(*s)).and_then(|s| u32::try_from(s).ok());
        let host = host.ok_or_else(|| io::Error::other("no range of users is free"))?;
        let range = Range { host, length: self.length };
        let lines = vec![Mapping { host_id: host, container_id: 0, length: self.length }];
        let note = Note { uid_mappings: lines.clone(), gid_mappings: lines };
        let path = note_path(&self.pods, uid);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        write_atomically(&path, &serde_json::to_vec(&note)?)?;
        taken.insert(uid.into(), range);
        Ok(range)
    }

    /// Gives a pod's range back: nothing of the pod is left.
    pub(crate) fn release(&self, uid: &str) {
        self.taken.lock().remove(uid);
    }
}

/// Whether the kernel maps ids on mounts that are attached nowhere (6.15), and has user namespaces at all.
pub(crate) fn supported() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    fs::exists("/proc/self/ns/user").unwrap_or(false) && recent(&release)
}

fn recent(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (major, minor) >= (6, 15)
}

/// Why a pod cannot have users of its own, if so.
pub(crate) fn refusal(spec: &PodSpec) -> Option<&'static str> {
    let yes = |v: Option<bool>| v == Some(true);
    match () {
        () if !supported() => Some("this node's kernel cannot map ids on mounts (6.15 or later can)"),
        () if yes(spec.host_network) => Some("hostNetwork needs the host's users"),
        () if yes(spec.host_pid) => Some("hostPID needs the host's users"),
        () if yes(spec.host_ipc) => Some("hostIPC needs the host's users"),
        () if yes(spec.share_process_namespace) => Some("shareProcessNamespace is not supported with it"),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_apart_and_outlive_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let all = UserRanges::open(dir.path().into(), 65_536);
        let (a, b) = (all.of("a").unwrap(), all.of("b").unwrap());
        assert_eq!((a.host, b.host), (65_536, 131_072));
        assert_eq!(all.of("a").unwrap(), a);
        // Another agent, which gives longer ranges.
        let all = UserRanges::open(dir.path().into(), 131_072);
        assert_eq!(all.of("b").unwrap(), b);
        let c = all.of("c").unwrap();
        assert_eq!((c.host, c.length), (262_144, 131_072));
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        all.release("a");
        assert!(!fs::read_to_string(dir.path().join("c/userns")).unwrap().contains("65536,"));
        let again = UserRanges::open(dir.path().into(), 65_536);
        assert_eq!(again.of("d").unwrap().host, 65_536);
    }

    #[test]
    fn only_kernels_that_can() {
        for (release, want) in
            [("6.18.44-fc", true), ("6.15", true), ("6.1.0-13-amd64", false), ("7.0", true), ("", false)]
        {
            assert_eq!(recent(release), want, "{release}");
        }
        let spec = |v: serde_json::Value| -> PodSpec { serde_json::from_value(v).unwrap() };
        if supported() {
            assert_eq!(refusal(&spec(serde_json::json!({"containers": []}))), None);
            assert!(refusal(&spec(serde_json::json!({"containers": [], "hostPID": true}))).is_some());
        }
    }
}
