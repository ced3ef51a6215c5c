//! What the agent remembers of a pod across its own restarts: `var/lib/isopod/pods/UID/state.json`.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Version of the file.
const VERSION: u32 = 1;

/// Nanoseconds since the epoch.
pub(crate) type Nanos = i64;

/// One second.
pub(crate) const SECOND: Nanos = 1_000_000_000;

/// Now.
pub(crate) fn now() -> Nanos {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// A pod's memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PodState {
    version: u32,
    /// When the agent first saw the pod.
    pub(crate) start_time: Nanos,
    /// The network and supervisor made for it; `None` when there is none (yet, or any more).
    pub(crate) sandbox: Option<Sandbox>,
    /// The sandbox is gone against our will and its successor is not there yet.
    pub(crate) lost: bool,
    /// The pod's addresses, also when it has ended.
    pub(crate) ips: Vec<IpAddr>,
    /// All init containers have done their part in this sandbox.
    pub(crate) initialized: bool,
    /// By container name.
    pub(crate) containers: BTreeMap<String, Record>,
    /// Set once: why the whole pod failed (`DeadlineExceeded`, `Evicted`, ...).
    pub(crate) failure: Option<PodFailure>,
    /// All containers have ended for good and nothing is left to run.
    pub(crate) finished: bool,
    /// Resources the pod has been given.
    pub(crate) allocated: Option<super::resize::Allocation>,
    /// A change of them under way.
    pub(crate) resize: super::resize::Resize,
    /// When each condition last turned, by type: status and time.
    pub(crate) transitions: BTreeMap<String, (String, Nanos)>,
}

/// A pod's sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sandbox {
    pub(crate) attempt: u32,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) cgroup: String,
}

/// Why a pod as a whole failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodFailure {
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A container over all its instances.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Record {
    /// `restartCount`.
    pub(crate) restarts: u32,
    /// The newest instance.
    pub(crate) current: Option<Instance>,
    /// The one before it.
    pub(crate) last: Option<Instance>,
    /// Wait before the next restart, and when it was set.
    pub(crate) backoff: Option<Backoff>,
    /// Its newest instance was stopped to be started again, whatever the restart policy.
    pub(crate) again: bool,
}

/// Crash back-off of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    pub(crate) delay: Nanos,
    pub(crate) updated: Nanos,
}

/// One instance of a container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Instance {
    pub(crate) id: String,
    /// Number in log and directory names.
    pub(crate) attempt: u32,
    pub(crate) image: String,
    pub(crate) image_id: String,
    /// Of the sandbox it ran in.
    pub(crate) sandbox: u32,
    pub(crate) started_at: Option<Nanos>,
    pub(crate) ended: Option<Ended>,
    /// Readiness probe's last word (true without one).
    pub(crate) ready: bool,
    /// Startup probe passed (or none) and postStart done.
    pub(crate) started: bool,
    pub(crate) stop_signal: i32,
    /// Resources it runs with, as written in the spec.
    pub(crate) resources: Option<serde_json::Value>,
    /// uid, gid, groups of its first process.
    pub(crate) user: Option<serde_json::Value>,
}

/// How an instance ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) signal: Option<i32>,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) finished_at: Nanos,
}

impl Record {
    /// Whether its newest instance runs.
    pub(crate) fn running(&self) -> bool {
        self.current.as_ref().is_some_and(Instance::running)
    }
}

impl Instance {
    /// Started and not ended.
    pub(crate) fn running(&self) -> bool {
        self.started_at.is_some() && self.ended.is_none()
    }
}

impl PodState {
    /// A pod seen for the first time.
    pub(crate) fn new(start_time: Nanos) -> Self {
        Self { version: VERSION, start_time, ..Self::default() }
    }

    /// Reads the file; `None` when it is not there or of no use (which is said).
    pub(crate) fn load(path: &Path) -> Option<Self> {
        let text = std::fs::read(path).ok()?;
        match serde_json::from_slice::<Self>(&text) {
            Ok(s) if s.version == VERSION => Some(s),
            Ok(s) => {
                tracing::warn!(path = %path.display(), version = s.version, "state of another version is ignored");
                None
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "half-written state is ignored");
                None
            }
        }
    }

    /// Replaces the file.
    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        write_atomically(path, &serde_json::to_vec(self)?)
    }

    /// Every container is to run again, init containers first; only the one that wanted it keeps its back-off.
    pub(crate) fn begin_again(&mut self, wanted_by: &str) {
        self.initialized = false;
        for (name, record) in self.containers.iter_mut().filter(|(_, r)| r.current.is_some()) {
            record.again = true;
            record.backoff = record.backoff.filter(|_| name == wanted_by);
        }
    }

    /// The newest instance of a container.
    pub(crate) fn current(&self, name: &str) -> Option<&Instance> {
        self.containers.get(name)?.current.as_ref()
    }

    /// The same, of this sandbox only.
    pub(crate) fn in_sandbox(&self, name: &str) -> Option<&Instance> {
        let attempt = self.sandbox.as_ref()?.attempt;
        self.current(name).filter(|i| i.sandbox == attempt)
    }

    /// Finds an instance by container id.
    pub(crate) fn by_id(&mut self, id: &str) -> Option<(&String, &mut Instance)> {
        self.containers.iter_mut().find_map(|(name, r)| {
            let i = r.current.as_mut().filter(|i| i.id == id)?;
            Some((name, i))
        })
    }
}

/// Writes a file so that readers see the old or the new content, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let temporary = path.with_file_name(name);
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_and_rubbish_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let mut s = PodState::new(7);
        s.containers.insert("c".into(), Record { restarts: 3, ..Record::default() });
        s.save(&path).unwrap();
        assert_eq!(PodState::load(&path), Some(s));
        std::fs::write(&path, b"{\"version\":1,\"sta").unwrap();
        assert_eq!(PodState::load(&path), None);
    }
}
