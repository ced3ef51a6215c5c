//! Waiting for a process in the foreground: signals are forwarded, a terminal is relayed, the exit code returned.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::WaitOptions,
};

use crate::{
    error::{Context, Result},
    sys, tty,
};

/// All signals, blocked and read from a descriptor.
pub(super) struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks them. Before the process is made, so that none is lost.
    pub(super) fn block() -> Result<Self> {
        let mask = SigSet::all();
        mask.thread_block().context(|| "block signals".into())?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context(|| "make a signalfd".into())?;
        Ok(Self { fd })
    }
}

/// Waits for `pid`; its exit code, 128 + n when signal n killed it.
pub(super) fn attend(signals: &Signals, pid: i32, master: Option<BorrowedFd<'_>>) -> Result<i32> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let _raw = master.and_then(|_| tty::RawMode::enter(stdin.as_fd()));
    if let Some(master) = master {
        tty::copy_size(stdin.as_fd(), master);
    }
    let (mut output, mut input) = (master, master.map(|_| stdin.as_fd()));
    loop {
        if let Some(code) = reap(pid)? {
            // What the process wrote last is still in the terminal.
            while output.is_some_and(|m| readable(m) && tty::pump(m, stdout.as_fd()).unwrap_or(false)) {}
            return Ok(code);
        }
        let mut fds = vec![PollFd::new(&signals.fd, PollFlags::IN)];
        fds.extend(output.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        fds.extend(input.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context(|| "wait for the container".into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            forward(signals, pid, master);
        }
        if output.is_some()
            && ready.next() == Some(true)
            && !output.is_some_and(|m| tty::pump(m, stdout.as_fd()).unwrap_or(false))
        {
            output = None;
        }
        if let (Some(from), Some(to), Some(true)) = (input, master, ready.next())
            && !tty::pump(from, to).unwrap_or(false)
        {
            input = None;
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0) && fds[0].revents().contains(PollFlags::IN)
}

fn forward(signals: &Signals, pid: i32, master: Option<BorrowedFd<'_>>) {
    while let Ok(Some(info)) = signals.fd.read_signal() {
        let signal = info.ssi_signo as i32;
        if signal == Signal::SIGWINCH as i32
            && let Some(master) = master
        {
            tty::copy_size(io::stdin().as_fd(), master);
            continue;
        }
        if ![libc::SIGCHLD, libc::SIGURG, libc::SIGPIPE].contains(&signal) {
            drop(sys::kill(pid, signal));
        }
    }
}

fn reap(pid: i32) -> Result<Option<i32>> {
    loop {
        // Not nix's waitpid: it cannot name real-time signals and loses whom they killed.
        match rustix::process::waitpid(rustix::process::Pid::from_raw(pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => {
                let killed = status.terminating_signal().map(|s| 128 + s);
                return Ok(killed.or_else(|| status.exit_status()));
            }
            Ok(None) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context(|| "wait for the container".into()),
        }
    }
}
