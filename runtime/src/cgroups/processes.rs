//! What is done to the processes of a group: list, signal, stop, continue, kill.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{Cgroup, Hierarchy, control::collect, v1, v2};
use crate::error::{Context, Error, Result};

impl Cgroup {
    /// Processes of the group and those below it.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let Some(hierarchy) = self.reference() else { return Ok(vec![]) };
        let mut pids = vec![];
        collect(&self.dir(hierarchy), &mut pids, 0).context(|| format!("list cgroup {}", self.path))?;
        Ok(pids)
    }

    /// Sends `signal` to every process of the group.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            let unified = self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. }));
            if unified.is_some_and(|h| fs::write(self.dir(h).join("cgroup.kill"), "1").is_ok()) {
                return Ok(());
            }
        }
        for pid in self.processes()? {
            match crate::sys::kill(pid, signal) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(Error::system(format!("signal process {pid}"), e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills every process and waits until the group is empty.
    ///
    /// # Errors
    /// When processes remain after a few seconds.
    pub fn kill_and_wait(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut pause = Duration::from_micros(200);
        loop {
            let pids = match self.processes() {
                Ok(pids) if pids.is_empty() => return Ok(()),
                Err(e) if e.errno() == Some(libc::ENOENT) || e.errno() == Some(libc::ENODEV) => return Ok(()),
                other => other?,
            };
            self.signal_all(libc::SIGKILL)?;
            self.thaw_quietly();
            if Instant::now() > deadline {
                return Err(Error::state(format!("processes of cgroup {} survive SIGKILL", self.path)));
            }
            if !await_ends(&pids, deadline) {
                // They have ended and the group does not know yet.
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
        }
    }

    /// Stops or continues every process of the group.
    ///
    /// # Errors
    /// When there is no freezer or it does not finish.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        if self.layout.can_freeze_v2() {
            let unified = self.joined.iter().find(|h| matches!(h, Hierarchy::V2 { .. }));
            if let Some(hierarchy) = unified {
                return v2::freeze(&self.dir(hierarchy), frozen);
            }
        }
        if !self.joined.iter().any(|h| h.has("freezer")) {
            let Some(h) = self.layout.hierarchies.iter().find(|h| h.has("freezer")).cloned() else {
                return Err(Error::invalid("this machine mounts no freezer"));
            };
            self.join_late(h)?;
        }
        match self.joined.iter().find(|h| h.has("freezer")) {
            Some(hierarchy) => v1::freeze(&self.dir(hierarchy), frozen),
            None => Ok(()),
        }
    }

    fn thaw_quietly(&self) {
        for hierarchy in &self.joined {
            let dir = self.dir(hierarchy);
            match hierarchy {
                Hierarchy::V2 { .. } => drop(fs::write(dir.join("cgroup.freeze"), "0")),
                Hierarchy::V1 { .. } if hierarchy.has("freezer") => {
                    drop(fs::write(dir.join("freezer.state"), "THAWED"))
                }
                Hierarchy::V1 { .. } => {}
            }
        }
    }

    /// Whether the group is frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.joined.iter().any(|h| {
            let dir = self.dir(h);
            match h {
                Hierarchy::V2 { .. } => {
                    fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|t| t.contains("frozen 1"))
                }
                Hierarchy::V1 { .. } => {
                    h.has("freezer")
                        && fs::read_to_string(dir.join("freezer.state")).is_ok_and(|t| t.trim() != "THAWED")
                }
            }
        })
    }
}

/// Waits for the ends of processes that were killed; `false` when there was none to wait for.
fn await_ends(pids: &[i32], deadline: Instant) -> bool {
    let mut waited = false;
    for pid in pids.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let ends = |timeout: Duration| {
            let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
            matches!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)), Ok(1..))
        };
        if !ends(Duration::ZERO) {
            waited = true;
            ends(deadline.saturating_duration_since(Instant::now()));
        }
    }
    waited
}
