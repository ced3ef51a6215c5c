//! What the command line remembers of a container: one directory per container, one file replaced atomically, and a lock
//! so that two commands on the same container take turns.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::{
    cgroups::Cgroup,
    config::Config,
    error::{Context, Error, Kind, Result},
    resctrl::Resctrl,
};

/// What is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Container id.
    pub id: String,
    /// Absolute bundle directory.
    pub bundle: PathBuf,
    /// Root directory.
    pub rootfs: PathBuf,
    /// Pid of its init.
    pub pid: i32,
    /// The init's start time in clock ticks since boot: tells a recycled pid apart.
    pub start_time: u64,
    /// RFC 3339.
    pub created: String,
    /// Uid of who created it.
    pub owner: u32,
    /// Its control group.
    pub cgroup: Option<Cgroup>,
    /// Its groups in the resctrl file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<Resctrl>,
    /// `annotations` of the configuration.
    pub annotations: HashMap<String, String>,
}

/// Where a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Waits to be started.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped,
}

/// A container's directory, locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: OwnedFd,
}

/// Name of the fifo a created container waits on; gone once it is started.
const FIFO: &str = "exec.fifo";
const ERRORS: &str = "start-error";
const CONFIG: &str = "config.json";

impl StateDir {
    /// Makes the directory of a new container.
    ///
    /// # Errors
    /// When the id is malformed or in use.
    pub fn create(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        let path = root.join(id);
        let made = match fs::create_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(root).and_then(|()| fs::create_dir(&path))
            }
            other => other,
        };
        match made {
            Ok(()) => Self::lock(path),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::state(format!("container with id exists already: {id}")))
            }
            Err(e) => Err(Error::system(format!("create {}", path.display()), e)),
        }
    }

    /// Opens the directory of a container.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Self::lock(root.join(id)).map_err(|e| match e.errno() {
            Some(libc::ENOENT) => Error::new(Kind::NotFound, format!("container does not exist: {id}")),
            _ => e,
        })
    }

    fn lock(path: PathBuf) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&path, flags, Mode::empty()).context(|| format!("open {}", path.display()))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).context(|| format!("lock {}", path.display()))?;
        // Whoever held the lock may have removed the container.
        match rustix::fs::fstat(&lock) {
            Ok(stat) if stat.st_nlink > 0 => Ok(Self { path, lock }),
            _ => Err(Error::system(format!("open {}", path.display()), io::Error::from_raw_os_error(libc::ENOENT))),
        }
    }

    /// Reads the state.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn read(&self) -> Result<State> {
        let path = self.path.join("state.json");
        let bytes = fs::read(&path).context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("parse {}: {e}", path.display())))
    }

    /// Replaces the state.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, state: &State) -> Result<()> {
        let bytes = serde_json::to_vec(state).map_err(|e| Error::invalid(e.to_string()))?;
        replace(&self.path.join("state.json"), &bytes)
    }

    /// Keeps the configuration: what happens to the bundle's from now on has no effect on the container.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn keep_config(&self, raw: &[u8]) -> Result<()> {
        let path = self.path.join(CONFIG);
        fs::write(&path, raw).context(|| format!("write {}", path.display()))
    }

    /// The configuration the container was created with.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub(crate) fn config(&self, state: &State) -> Result<Config> {
        Config::read(&self.path.join(CONFIG), state.bundle.clone())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// When the directory cannot be removed.
    pub fn remove(self) -> Result<()> {
        for name in ["state.json", CONFIG, FIFO, ERRORS] {
            drop(fs::remove_file(self.path.join(name)));
        }
        match fs::remove_dir(&self.path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOTEMPTY) => {
                fs::remove_dir_all(&self.path).context(|| format!("remove {}", self.path.display()))
            }
            other => other.context(|| format!("remove {}", self.path.display())),
        }
    }

    /// Makes the fifo a created container waits on and the file for its last words.
    ///
    /// # Errors
    /// When the file system refuses.
    pub(crate) fn make_gate(&self) -> Result<(OwnedFd, OwnedFd)> {
        let what = || format!("make {}", self.path.join(FIFO).display());
        rustix::fs::mknodat(&self.lock, FIFO, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .context(what)?;
        let fifo = rustix::fs::openat(&self.lock, FIFO, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context(what)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let errors = rustix::fs::openat(self.lock.as_fd(), ERRORS, flags, Mode::from_raw_mode(0o600)).context(what)?;
        Ok((fifo, errors))
    }

    /// Lets a created container run and waits until it does.
    ///
    /// # Errors
    /// When it does not wait any more, or its program cannot be run.
    pub fn open_gate(&self) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fifo = match rustix::fs::openat(&self.lock, FIFO, flags, Mode::empty()) {
            Ok(fifo) => fifo,
            Err(rustix::io::Errno::NOENT) => return Err(Error::state("cannot start an already running container")),
            Err(rustix::io::Errno::NXIO) => return Err(Error::state("cannot start a container that has stopped")),
            Err(e) => return Err(Error::system(format!("open {}", self.path.join(FIFO).display()), e)),
        };
        rustix::io::write(&fifo, b"0").context(|| "release the container".into())?;
        // The container holds the only reading end; it closes when the program runs or the process ends.
        let mut fds = [rustix::event::PollFd::new(&fifo, rustix::event::PollFlags::empty())];
        while let Err(rustix::io::Errno::INTR) = rustix::event::poll(&mut fds, None) {}
        drop(fs::remove_file(self.path.join(FIFO)));
        let said = fs::read(self.path.join(ERRORS)).unwrap_or_default();
        drop(fs::remove_file(self.path.join(ERRORS)));
        if said.is_empty() {
            return Ok(());
        }
        Err(serde_json::from_slice::<Error>(&said)
            .unwrap_or_else(|_| Error::new(Kind::System, String::from_utf8_lossy(&said).into_owned())))
    }

    /// Whether the container's init waits at its gate. The fifo may be there without it: `start` was killed.
    fn is_waiting(&self) -> bool {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.lock, FIFO, flags, Mode::empty()).is_ok()
    }

    /// Where the container stands.
    #[must_use]
    pub fn status(&self, state: &State) -> Status {
        if !state.is_alive() {
            Status::Stopped
        } else if state.cgroup.as_ref().is_some_and(Cgroup::is_frozen) {
            Status::Paused
        } else if self.is_waiting() {
            Status::Created
        } else {
            Status::Running
        }
    }
}

impl State {
    /// Whether its init still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        process_start_time(self.pid).is_some_and(|t| t == self.start_time)
    }
}

/// The start time of a process that is not a zombie.
#[must_use]
pub fn process_start_time(pid: i32) -> Option<u64> {
    if pid <= 0 {
        return None;
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything; the state follows the last one.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Ids of all containers.
#[must_use]
pub fn all_ids(root: &Path) -> Vec<String> {
    let mut ids: Vec<String> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join("state.json").exists())
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    ids.sort();
    ids
}

/// Writes a file so that readers see the old or the new content whole.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .context(|| format!("write {}", path.display()))
}

fn check_id(id: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.chars().all(fine) {
        return Err(Error::invalid(format!("invalid container ID format: {id:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names() {
        for good in ["a", "a.b-c_d+e", "0123"] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "../x"] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn own_start_time_is_found_and_stable() {
        let pid = std::process::id() as i32;
        assert!(process_start_time(pid).is_some());
        assert_eq!(process_start_time(pid), process_start_time(pid));
        assert_eq!(process_start_time(-1), None);
    }

    #[test]
    fn one_id_one_container() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::create(root.path(), "x").unwrap();
        assert_eq!(StateDir::create(root.path(), "x").unwrap_err().kind(), Kind::State);
        dir.remove().unwrap();
        assert_eq!(StateDir::open(root.path(), "x").unwrap_err().kind(), Kind::NotFound);
    }
}
