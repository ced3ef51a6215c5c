//! One agent per root: an advisory lock on `run/isopod/agent.lock`, which the kernel releases when its holder dies, so
//! that it can never be stale. The file holds the holder's PID for people and for `isopod down`.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

/// The lock, held until dropped.
pub(crate) struct AgentLock(#[expect(dead_code, reason = "held for its descriptor")] File);

fn path(run: &Path) -> PathBuf {
    run.join("agent.lock")
}

/// Takes the lock or says who has it.
pub(crate) fn take(run: &Path) -> Result<AgentLock> {
    fs::create_dir_all(run).with_context(|| format!("create {}", run.display()))?;
    let path = path(run);
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        file.read_to_string(&mut holder).with_context(|| format!("read {}", path.display()))?;
        bail!("another isopod (PID {}) runs on this root; stop it first (`isopod down`)", holder.trim());
    }
    file.set_len(0).and_then(|()| file.rewind()).with_context(|| format!("write {}", path.display()))?;
    writeln!(file, "{}", std::process::id()).with_context(|| format!("write {}", path.display()))?;
    Ok(AgentLock(file))
}

/// Asks the running agent to stop and waits until it has; `false` when none ran.
pub(crate) fn stop_holder(run: &Path) -> Result<bool> {
    let path = path(run);
    let Ok(mut file) = File::options().read(true).open(&path) else { return Ok(false) };
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Ok(false);
    }
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(|| format!("read {}", path.display()))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    let Some(pid) = pid else { bail!("{} is locked but names no PID", path.display()) };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(false) };
    kill_process(pid, Signal::TERM).with_context(|| format!("signal PID {}", pid.as_raw_nonzero()))?;
    poll(&mut [PollFd::new(&handle, PollFlags::IN)], None).context("wait for the agent to stop")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_and_a_dead_one_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(path(dir.path()), "999999\n").unwrap();
        let lock = take(dir.path()).unwrap();
        let error = take(dir.path()).err().unwrap().to_string();
        assert!(error.contains(&format!("PID {}", std::process::id())), "{error}");
        drop(lock);
        assert!(!stop_holder(dir.path()).unwrap());
        take(dir.path()).unwrap();
    }
}
