//! Commands run in containers by the agent itself (probes and hooks), and for clients.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::pipe::PipeFlags;
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, net::unix::pipe};

use crate::{
    paths::Paths,
    runtime::{RuntimeError, Supervisor},
};
use isopod_runtime::supervisor::protocol::Op;

/// Output kept of a probe or hook.
const OUTPUT: u64 = 10 * 1024;

/// Where a container instance keeps its bundle, its writable layer and its termination message. The bundle is a directory of
/// its own because the container's root is mounted over it, in the container's view.
pub(crate) fn bundle(paths: &Paths, uid: &str, container: &str, attempt: u32) -> PathBuf {
    paths.pod(uid).join("containers").join(container).join(attempt.to_string())
}

/// The container's own process with another command.
pub(crate) fn process(bundle: &Path, command: &[String], tty: bool) -> io::Result<Value> {
    let config: Value = serde_json::from_slice(&std::fs::read(bundle.join("bundle/config.json"))?)?;
    let mut process = config["process"].clone();
    process["args"] = json!(command);
    process["terminal"] = json!(tty);
    if tty
        && let Some(env) = process["env"].as_array_mut()
        && !env.iter().any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM=")))
    {
        env.push(json!("TERM=xterm"));
    }
    Ok(process)
}

/// A close-on-exec pipe: read end, write end.
pub(crate) fn pipe_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

/// Why a command has no exit code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("command {command:?} timed out after {seconds}s")]
    Timeout { command: String, seconds: u64 },
}

/// Runs a command to its end: exit code and what it said on both streams.
pub(crate) async fn capture(
    supervisor: &Supervisor,
    container: &str,
    bundle: &Path,
    command: &[String],
    timeout: Duration,
) -> Result<(i32, String), ExecError> {
    let process = process(bundle, command, false)?;
    let (read, write) = pipe_pair()?;
    let second = write.try_clone()?;
    let exec = supervisor.exec(container, process, (None, Some(write), Some(second))).await?;
    let mut reader = pipe::Receiver::from_owned_fd(read)?;
    let mut said = Vec::new();
    let id = exec.id.clone();
    let run = async {
        // Reading ends with the last writer; the command's end alone decides, a child that keeps the pipe does not.
        let mut exit = exec.exit;
        let mut buffer = [0u8; 2048];
        let exit = loop {
            tokio::select! {
                exit = &mut exit => break exit,
                n = reader.read(&mut buffer) => match n {
                    Ok(0) | Err(_) => break exit.await,
                    Ok(n) if (said.len() as u64) < OUTPUT => said.extend_from_slice(&buffer[..n]),
                    Ok(_) => {}
                },
            }
        };
        // Asked of the kernel: the reactor may not have seen yet that there is something to read.
        while let Ok(n) = rustix::io::read(&reader, &mut buffer[..]) {
            if n == 0 || said.len() as u64 >= OUTPUT {
                break;
            }
            said.extend_from_slice(&buffer[..n]);
        }
        exit.map_err(|_| RuntimeError::Gone)
    };
    match tokio::time::timeout(timeout, run).await {
        Ok(exit) => Ok((exit?.code, String::from_utf8_lossy(&said).into_owned())),
        Err(_) => {
            supervisor.done(Op::KillExec { exec: id, signal: libc::SIGKILL }).await.ok();
            Err(ExecError::Timeout { command: command.join(" "), seconds: timeout.as_secs() })
        }
    }
}
