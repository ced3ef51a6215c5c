//! What a container's first process and its maker say to each other before the program runs.
//!
//! A `SOCK_SEQPACKET` pair; the end of the stream, when the child's copy closes at exec, says that the program runs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Context, Error, Kind, Result},
    supervisor::wire,
};

/// From the child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The namespaces exist: maps can be written, runtime hooks run; the child waits for [`Word`].
    Namespaces,
    /// Something was not possible but does not matter enough to fail.
    Warning(String),
    /// The terminal's master is attached.
    Terminal,
    /// The seccomp listener is attached.
    Listener,
    /// All is done but running the program.
    Ready,
    /// It failed.
    Failed(Error),
}

/// From the maker: go on. Carries the container's state for hooks when there are any.
pub(crate) type Word = Vec<u8>;

/// One end.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes both ends: the maker's and the child's.
pub(crate) fn pair() -> Result<(Channel, Channel)> {
    let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .context(|| "make a socket pair".into())?;
    Ok((Channel { fd: a }, Channel { fd: b }))
}

fn gone() -> Error {
    Error::new(Kind::System, "the runtime went away")
}

impl Channel {
    /// Child: tells the maker.
    pub(crate) fn report(&self, report: &Report, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        wire::send(self.fd.as_fd(), report, fd.as_slice()).context(|| "report to the runtime".into())
    }

    /// Child: waits for the maker's word.
    pub(crate) fn word(&self) -> Result<Word> {
        let word = wire::recv_bytes(self.fd.as_fd()).context(|| "wait for the runtime".into())?;
        word.map(|(bytes, _)| bytes).ok_or_else(gone)
    }

    /// Child: waits at the gate, by nothing but read(2) (a seccomp filter may already be in force).
    pub(crate) fn wait(&self) -> Result<()> {
        let n = rustix::io::read(&self.fd, &mut [0u8; 8][..]).context(|| "wait for the runtime".into())?;
        if n == 0 { Err(gone()) } else { Ok(()) }
    }

    /// Child, after the gate: the last thing it can say, by write(2) alone.
    pub(crate) fn fail_plainly(&self, error: Error) {
        if let Ok(bytes) = serde_json::to_vec(&Report::Failed(error)) {
            let _ = rustix::io::write(&self.fd, &bytes);
        }
    }

    /// Maker: lets the child go on.
    pub(crate) fn go(&self, state: &[u8]) -> Result<()> {
        let word = if state.is_empty() { b"{}" } else { state };
        wire::send_bytes(self.fd.as_fd(), word, &[]).context(|| "release the container's init".into())
    }

    /// Maker: the next report; `None` when the child runs its program or died.
    pub(crate) fn next(&self) -> Result<Option<(Report, Vec<OwnedFd>)>> {
        match wire::recv(self.fd.as_fd()) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            other => other.context(|| "read from the container's init".into()),
        }
    }
}
