//! `isopod exec`: a command in a container of this machine.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result};
use futures::SinkExt;
use isopod_agent::Paths;
use kube::api::{AttachParams, TerminalSize};
use nix::sys::termios::{self, SetArg, Termios};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Node, PodName, ask, text};

/// Options of `exec`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pod: PodName,
    /// Container; the first by default.
    #[arg(short, long)]
    container: Option<String>,
    /// Pass input on.
    #[arg(short = 'i', long)]
    stdin: bool,
    /// With a terminal.
    #[arg(short, long)]
    tty: bool,
    /// The command, after `--`.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub(crate) fn run(paths: &Paths, args: Args) -> Result<()> {
    let code = ask(async {
        let node = Node::connect(paths).await?;
        let pod = node.pod(&args.pod).await?;
        let tty = args.tty && std::io::stdin().is_terminal();
        let parameters = AttachParams {
            container: args.container.clone(),
            stdin: args.stdin,
            stdout: true,
            stderr: !tty,
            tty,
            ..AttachParams::default()
        };
        let name = text(&pod["metadata"]["name"]);
        let process = node.api(&pod).exec(name, args.command.clone(), &parameters).await;
        let _raw = if tty { Raw::enter()? } else { None };
        attend(process.with_context(|| format!("run {:?} in pod {name}", args.command[0]))?, tty).await
    })?;
    if code != 0 {
        std::process::exit(code);
    }
    Ok(())
}

/// A terminal that passes every key on, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(&stdin).context("terminal")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("terminal")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// Passes streams and terminal sizes until the process ends; its exit code.
async fn attend(mut process: kube::api::AttachedProcess, tty: bool) -> Result<i32> {
    let status = process.take_status();
    if let Some(input) = process.stdin() {
        tokio::spawn(feed(input));
    }
    if let Some(mut sizes) = process.terminal_size().filter(|_| tty) {
        tokio::spawn(async move {
            use tokio::signal::unix::{SignalKind, signal};
            let Ok(mut changed) = signal(SignalKind::window_change()) else { return };
            while let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout()) {
                let size = TerminalSize { width: size.ws_col, height: size.ws_row };
                if sizes.send(size).await.is_err() || changed.recv().await.is_none() {
                    return;
                }
            }
        });
    }
    let out = process.stdout().map(|s| tokio::spawn(copy(s, std::io::stdout())));
    let err = process.stderr().map(|s| tokio::spawn(copy(s, std::io::stderr())));
    for task in [out, err].into_iter().flatten() {
        let _ = task.await;
    }
    let Some(status) = status else { return Ok(0) };
    let status = status.await.unwrap_or_default();
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let causes = status.details.and_then(|d| d.causes).unwrap_or_default();
    let code = causes.iter().find(|c| c.reason.as_deref() == Some("ExitCode")).and_then(|c| c.message.as_deref());
    match code.and_then(|c| c.parse().ok()) {
        Some(code) => Ok(code),
        None => anyhow::bail!("{}", status.message.unwrap_or_else(|| "the command failed".into())),
    }
}

/// Passes our input on; a thread of its own waits for it.
async fn feed(mut to: impl AsyncWrite + Unpin) {
    let (sender, mut pieces) = tokio::sync::mpsc::channel::<Vec<u8>>(4);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.blocking_send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    while let Some(piece) = pieces.recv().await {
        if to.write_all(&piece).await.is_err() {
            return;
        }
        let _ = to.flush().await;
    }
    let _ = to.shutdown().await;
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl Write) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}
