//! One container of the pod: its process, its streams, its log and who is attached.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::pipe::{PipeFlags, pipe_with};

use super::{
    log::{LogWriter, Stream},
    protocol::{ContainerState, ContainerStatus},
};
use crate::{
    cgroups::Cgroup,
    error::{Context, Result},
    launch::{Launched, Stdio},
};

/// A client's ends.
#[derive(Debug, Default)]
pub(crate) struct Attached {
    /// Read for the container's stdin, with its event token.
    pub(crate) stdin: Option<(OwnedFd, u64)>,
    /// What was read and the container has not yet taken.
    pub(crate) pending: Vec<u8>,
    /// Written to.
    pub(crate) stdout: Option<OwnedFd>,
    /// Written to.
    pub(crate) stderr: Option<OwnedFd>,
    /// It gave a stdin, even when that has ended.
    pub(crate) had_stdin: bool,
}

impl Attached {
    /// Passes output on. A client that does not drain is let go.
    fn tell(&mut self, stream: Stream, data: &[u8]) {
        let end = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        if end.as_ref().is_some_and(|fd| !write_all_now(fd.as_fd(), data)) {
            *end = None;
        }
    }

    fn is_gone(&self) -> bool {
        self.stdin.is_none() && self.pending.is_empty() && self.stdout.is_none() && self.stderr.is_none()
    }
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) status: ContainerStatus,
    pub(crate) bundle: PathBuf,
    pub(crate) cgroup: Cgroup,
    /// Until it is started.
    pub(crate) launched: Option<Launched>,
    pub(crate) pidfd: Option<OwnedFd>,
    /// Read ends of its output with their event tokens; index by [`Stream`].
    pub(crate) output: [Option<(OwnedFd, u64)>; 2],
    /// The terminal's master with its event token, instead of the pipes.
    pub(crate) master: Option<(OwnedFd, u64)>,
    /// Write end of its stdin with the event token in use while it is full.
    pub(crate) stdin: Option<(OwnedFd, Option<u64>)>,
    pub(crate) stdin_once: bool,
    /// What it said before its one client came; `None` when nobody is waited for.
    pub(crate) held: Option<Held>,
    pub(crate) log: Option<LogWriter>,
    pub(crate) attached: Vec<Attached>,
}

/// Most bytes kept for a client that has not come yet.
const MOST_HELD: usize = 64 * 1024;
/// What a piece of it costs beside its bytes.
const PIECE: usize = 64;

/// The beginning of a container's output, for the client it was started for (`stdinOnce`): a quick program has said all it has
/// to say before anybody can attach.
#[derive(Debug, Default)]
pub(crate) struct Held {
    said: Vec<(Stream, Vec<u8>)>,
    bytes: usize,
}

impl Held {
    fn add(&mut self, stream: Stream, data: &[u8]) {
        let data = &data[..data.len().min(MOST_HELD.saturating_sub(self.bytes))];
        if data.is_empty() {
            return;
        }
        self.bytes += data.len();
        match self.said.last_mut() {
            Some((last, said)) if *last == stream => said.extend_from_slice(data),
            _ => {
                // A program that changes between its streams with every byte pays for the pieces.
                self.bytes += PIECE;
                self.said.push((stream, data.to_vec()));
            }
        }
    }
}

/// The pipes of a container without a terminal.
pub(crate) struct Pipes {
    /// For the container.
    pub(crate) stdio: Stdio,
    /// Write end of its stdin.
    pub(crate) stdin: Option<OwnedFd>,
    /// Read ends.
    pub(crate) output: [OwnedFd; 2],
}

impl Pipes {
    /// Makes them. Ours do not block; the container's do.
    pub(crate) fn new(stdin: bool) -> Result<Self> {
        let make = || pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe".into());
        let ((out, out_w), (err, err_w)) = (make()?, make()?);
        let (stdin_r, stdin_w) = if stdin { make().map(|(r, w)| (Some(r), Some(w)))? } else { (None, None) };
        for fd in [Some(&out), Some(&err), stdin_w.as_ref()].into_iter().flatten() {
            set_nonblocking(fd.as_fd()).context(|| "set a pipe nonblocking".into())?;
        }
        Ok(Self { stdio: Stdio::Given([stdin_r, Some(out_w), Some(err_w)]), stdin: stdin_w, output: [out, err] })
    }
}

/// Sets O_NONBLOCK.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// What reading a stream brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// This many bytes.
    Data(usize),
    /// Nothing for now.
    Empty,
    /// The end.
    End,
}

/// Reads without blocking.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Read {
    loop {
        match rustix::io::read(fd, &mut *buffer) {
            Ok(0) => return Read::End,
            Ok(n) => return Read::Data(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Read::Empty,
            // A terminal whose last slave is closed says EIO.
            Err(_) => return Read::End,
        }
    }
}

impl Container {
    /// One whose end is all that is known.
    pub(crate) fn ended(status: ContainerStatus, cgroup: Cgroup) -> Self {
        Self {
            status,
            bundle: PathBuf::new(),
            cgroup,
            launched: None,
            pidfd: None,
            output: [None, None],
            master: None,
            stdin: None,
            stdin_once: false,
            held: None,
            log: None,
            attached: vec![],
        }
    }

    /// Whether its process lives.
    pub(crate) fn is_alive(&self) -> bool {
        self.status.state != ContainerState::Exited
    }

    /// Passes output on to the log and to whoever is attached.
    pub(crate) fn output(&mut self, stream: Stream, data: &[u8], batch: &mut Vec<u8>) {
        if let Some(log) = &mut self.log {
            log.append(stream, data, batch);
        }
        if let Some(held) = &mut self.held {
            held.add(stream, data);
        }
        for client in &mut self.attached {
            client.tell(stream, data);
        }
    }

    /// Takes a client in; the first hears what was said before it came.
    pub(crate) fn attach(&mut self, mut client: Attached) {
        for (stream, data) in self.held.take().into_iter().flat_map(|h| h.said) {
            client.tell(stream, &data);
        }
        self.attached.push(client);
    }

    /// The descriptor stdin is written to.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        match (&self.master, &self.stdin) {
            (Some((master, _)), _) => Some(master.as_fd()),
            (None, Some((stdin, _))) => Some(stdin.as_fd()),
            _ => None,
        }
    }

    /// Moves what clients sent towards the container; `true` when it takes no more for now.
    pub(crate) fn feed(&mut self) -> bool {
        let mut closed = false;
        let mut full = false;
        for index in 0..self.attached.len() {
            let pending = std::mem::take(&mut self.attached[index].pending);
            if pending.is_empty() {
                continue;
            }
            let Some(input) = self.input() else { continue };
            let mut rest = pending.as_slice();
            while !rest.is_empty() {
                match rustix::io::write(input, rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => {
                        full = true;
                        break;
                    }
                    Err(_) => {
                        closed = true;
                        rest = &[];
                    }
                }
            }
            let rest = rest.to_vec();
            self.attached[index].pending = rest;
        }
        if closed && self.master.is_none() {
            self.stdin = None;
        }
        full
    }

    /// Forgets clients that have nothing left; `true` when stdin is to be closed with the first of them.
    pub(crate) fn forget_clients(&mut self) -> bool {
        let mut left_with_stdin = false;
        self.attached.retain(|client| {
            let ended = client.had_stdin && client.stdin.is_none() && client.pending.is_empty();
            left_with_stdin |= ended;
            !client.is_gone()
        });
        left_with_stdin && self.stdin_once
    }
}

/// Writes all or reports that the other end does not take it.
fn write_all_now(fd: BorrowedFd<'_>, mut data: &[u8]) -> bool {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(n) => data = &data[n..],
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Readies a client's output end: never block on it, and let it buffer as much as a pipe may.
pub(crate) fn ready_output(fd: &OwnedFd) -> io::Result<()> {
    set_nonblocking(fd.as_fd())?;
    let _ = rustix::pipe::fcntl_setpipe_size(fd, 1 << 20);
    Ok(())
}

/// Where a bundle's configuration is.
pub(crate) fn config_path(bundle: &Path) -> PathBuf {
    bundle.join("config.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_for_a_client_is_bounded_however_it_is_said() {
        let mut held = Held::default();
        for _ in 0..MOST_HELD {
            held.add(Stream::Stdout, b"o");
            held.add(Stream::Stderr, b"e");
        }
        assert!(held.said.len() <= MOST_HELD / PIECE && held.bytes <= MOST_HELD + PIECE);
        let mut held = Held::default();
        held.add(Stream::Stdout, &[b'x'; 2 * MOST_HELD]);
        held.add(Stream::Stdout, b"more");
        assert_eq!((held.said.len(), held.bytes), (1, MOST_HELD + PIECE));
    }
}
