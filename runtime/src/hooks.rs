//! Lifecycle hooks: programs run at fixed points with the container's state on stdin.

use std::{
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio},
};

use oci_spec::runtime::{Hook, Hooks};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::error::{Error, Kind, Result};

/// Runs `hooks` in order; the first failure ends it.
pub(crate) fn run(name: &str, hooks: Option<&Vec<Hook>>, state: &[u8]) -> Result<()> {
    each(name, hooks, state).collect()
}

/// Runs all `hooks` in order; what failed.
pub(crate) fn run_all(name: &str, hooks: Option<&Vec<Hook>>, state: &[u8]) -> Vec<String> {
    each(name, hooks, state).filter_map(|result| result.err().map(|e| e.to_string())).collect()
}

fn each(name: &str, hooks: Option<&Vec<Hook>>, state: &[u8]) -> impl Iterator<Item = Result<()>> {
    hooks.into_iter().flatten().enumerate().map(move |(index, hook)| {
        let named = |e: Error| e.within(format_args!("{name} hook #{index} {}", hook.path().display())).of_hook();
        run_one(hook, state).map_err(named)
    })
}

/// Refuses hooks the specification does not allow.
pub(crate) fn validate(hooks: &Hooks) -> Result<()> {
    #[allow(deprecated, reason = "it is still in configurations")]
    let prestart = hooks.prestart();
    let kinds = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in kinds {
        for (index, hook) in list.iter().flatten().enumerate() {
            let wrong = match hook.timeout() {
                _ if !hook.path().is_absolute() => "the path is not absolute".to_owned(),
                Some(seconds) if seconds <= 0 => format!("the timeout {seconds} is not positive"),
                _ => continue,
            };
            return Err(Error::invalid(wrong).within(format_args!("{name} hook #{index} {}", hook.path().display())));
        }
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    let mut command = Command::new(hook.path());
    if let [first, rest @ ..] = hook.args().as_deref().unwrap_or_default() {
        command.arg0(first).args(rest);
    }
    command.env_clear().stdin(Stdio::piped());
    for (key, value) in hook.env().iter().flatten().filter_map(|e| e.split_once('=')) {
        command.env(key, value);
    }
    let mut child = command.spawn().map_err(|e| Error::system("start", e))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not read its state is no error.
        drop(stdin.write_all(state));
    }
    if let Some(seconds) = hook.timeout()
        && !ends_within(&child, seconds)
    {
        drop(child.kill());
        drop(child.wait());
        return Err(Error::new(Kind::System, "timed out and was killed"));
    }
    let status = child.wait().map_err(|e| Error::system("wait", e))?;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(Error::new(Kind::System, format!("exited with {code}"))),
        (None, signal) => Err(Error::new(Kind::System, format!("was killed by signal {}", signal.unwrap_or(0)))),
    }
}

/// Waits for a process's end, so many seconds.
fn ends_within(child: &Child, seconds: i64) -> bool {
    let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
    // Not yet waited for, so the pid is its own.
    let Some(pid) = Pid::from_raw(child.id() as i32) else { return true };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    !matches!(poll(&mut fds, Some(&timeout)), Ok(0))
}
