//! The end of a group: what is in it is killed, and it goes when the last of that has gone.
//!
//! v2 tells when a group empties (`populated` of `cgroup.events`). v1 tells nobody: there the ends of the processes are waited
//! for, one by one.

use std::{fs, io, path::Path, time::Duration};

use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep, timeout_at},
};

use super::{CgroupError, Cgroups, pids_below};

/// How long killed processes may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Some kernels tell of a process's end before they take it off its group.
const MOMENT: Duration = Duration::from_millis(5);

impl Cgroups {
    /// Kills everything in a group and removes it; one that is not there is no error.
    pub(crate) async fn end(&self, group: &str) -> Result<(), CgroupError> {
        let deadline = Instant::now() + PATIENCE;
        let mut moment = false;
        loop {
            self.kill(group);
            let Err(error) = self.remove(group) else { return Ok(()) };
            match timeout_at(deadline, self.emptied(group)).await {
                Err(_) => return Err(error),
                Ok(true) => {}
                // Nothing is in it, and yet it stays.
                Ok(false) if moment => return Err(error),
                Ok(false) => {
                    sleep(MOMENT).await;
                    moment = true;
                }
            }
        }
    }

    /// Waits until a group is empty; whether there was anything to wait for.
    async fn emptied(&self, group: &str) -> bool {
        let mut waited = false;
        for mount in self.hierarchies.mounts() {
            let dir = mount.join(group);
            if Some(mount) == self.hierarchies.v2.as_deref() {
                // What cannot be read is gone.
                waited |= unpopulated(&dir).await.unwrap_or(false);
                continue;
            }
            for pid in pids_below(&dir) {
                waited |= ended(pid).await;
            }
        }
        waited
    }
}

async fn unpopulated(dir: &Path) -> io::Result<bool> {
    let file = dir.join("cgroup.events");
    let inotify = Inotify::init()?;
    inotify.watches().add(&file, WatchMask::MODIFY)?;
    let mut events = inotify.into_event_stream([0; 256])?;
    let mut waited = false;
    while fs::read_to_string(&file)?.contains("populated 1") {
        waited = true;
        if events.next().await.is_none() {
            break;
        }
    }
    Ok(waited)
}

async fn ended(pid: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return false };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    // `register` is unsafe for types that may give another descriptor each time; a pidfd has one.
    #[allow(deprecated)]
    let registered = AsyncFd::with_interest(process, Interest::READABLE);
    match registered {
        Ok(process) => process.readable().await.is_ok(),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::{super::driver::Driver, *};

    /// Processes that start others as fast as they can, deep in the group, go with it.
    #[tokio::test]
    async fn a_group_goes_with_all_that_is_in_it() {
        let name = format!("isopod-unit-{}", std::process::id());
        let Ok(tree) = Cgroups::at(&name, Driver::Cgroupfs) else { return };
        let group = format!("{name}/pod/inner");
        tree.make(&group).unwrap();
        let enter: String = tree
            .hierarchies
            .mounts()
            .iter()
            .map(|m| format!("echo 0 > {}/{group}/cgroup.procs; ", m.display()))
            .collect();
        let script = format!("{enter} echo in; while :; do sleep 100 & sleep 0.01; done");
        let mut child = Command::new("sh").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = [0; 3];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        tree.end(&name).await.unwrap();
        assert!(tree.hierarchies.mounts().iter().all(|m| !m.join(&name).exists()));
        assert!(!child.wait().unwrap().success());
        tree.end(&name).await.unwrap();
    }
}
