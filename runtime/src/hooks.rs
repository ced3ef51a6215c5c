//! Lifecycle hooks: programs run at fixed points with the container's state on stdin.

use std::{
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::Hook;

use crate::error::{Error, Kind, Result};

/// Runs `hooks` in order; the first failure ends it.
pub(crate) fn run(name: &str, hooks: Option<&Vec<Hook>>, state: &[u8]) -> Result<()> {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        run_one(hook, state).map_err(|e| e.within(format_args!("{name} hook #{index} {}", hook.path().display())))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<()> {
    if !hook.path().is_absolute() {
        return Err(Error::invalid("the path is not absolute"));
    }
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
    let deadline = hook.timeout().filter(|&t| t > 0).map(|t| Instant::now() + Duration::from_secs(t as u64));
    let status = loop {
        match deadline {
            None => break child.wait(),
            Some(at) => match child.try_wait() {
                Ok(None) if Instant::now() < at => std::thread::sleep(Duration::from_millis(2)),
                Ok(None) => {
                    drop(child.kill());
                    drop(child.wait());
                    return Err(Error::new(Kind::System, "timed out and was killed"));
                }
                Ok(Some(status)) => break Ok(status),
                Err(e) => break Err(e),
            },
        }
    };
    let status = status.map_err(|e| Error::system("wait", e))?;
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (Some(code), _) => Err(Error::new(Kind::System, format!("exited with {code}"))),
        (None, signal) => Err(Error::new(Kind::System, format!("was killed by signal {}", signal.unwrap_or(0)))),
    }
}
