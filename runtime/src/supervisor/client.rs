//! The agent's end of a supervisor's socket.
//!
//! [`Connection`] is a nonblocking descriptor: wrap it in an event loop (`AsFd`) and call [`Connection::send`] and
//! [`Connection::recv`] when it is ready. [`Connection::call`] and [`Connection::next`] are blocking conveniences.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{AddressFamily, SocketFlags, SocketType},
};

use super::{
    protocol::{Answer, Event, Failure, FailureKind, Message, Op, Reply, Request, VERSION},
    wire,
};

/// Name of the socket in the pod's run directory.
pub const SOCKET: &str = "supervisor.sock";

/// Why a blocking call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("supervisor socket")]
    Io(#[from] io::Error),
    /// The supervisor refused.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The supervisor went away.
    #[error("the supervisor closed the connection")]
    Closed,
    /// No answer in time.
    #[error("the supervisor did not answer in time")]
    Timeout,
}

/// A connection to one supervisor.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
    next_id: u64,
    events: VecDeque<Event>,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Connection {
    /// Connects to the supervisor whose run directory is `dir`.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when no supervisor listens there.
    pub fn connect(dir: &Path) -> io::Result<Self> {
        let parent = wire::open_dir(dir)?;
        let address = wire::socket_address(parent.as_fd(), SOCKET)?;
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        rustix::net::connect(&fd, &address)?;
        Ok(Self { fd, next_id: 1, events: VecDeque::new() })
    }

    /// Sends one request; never blocks.
    ///
    /// # Errors
    /// `WouldBlock` when the supervisor does not drain; nothing was sent then.
    pub fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        wire::send(self.fd.as_fd(), request, fds)
    }

    /// Receives one message and its descriptors; `None` when the supervisor has closed; never blocks.
    ///
    /// # Errors
    /// `WouldBlock` when nothing waits.
    pub fn recv(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        while let Some((bytes, fds)) = wire::recv_bytes(self.fd.as_fd())? {
            if let Some(message) = understand(&bytes)? {
                return Ok(Some((message, fds)));
            }
        }
        Ok(None)
    }

    /// Sends [`Op::Hello`] and waits for the agreed version.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub fn hello(&mut self, timeout: Duration) -> Result<u32, Error> {
        match self.call(Op::Hello { version: VERSION }, &[], timeout)?.0 {
            Answer::Hello { version } => Ok(version),
            _ => Err(Error::Io(io::Error::new(io::ErrorKind::InvalidData, "unexpected answer to hello"))),
        }
    }

    /// Sends `op` and waits for its reply; events that come in between are kept for [`Connection::next`].
    ///
    /// # Errors
    /// The supervisor's [`Failure`], or why there is none.
    pub fn call(&mut self, op: Op, fds: &[BorrowedFd<'_>], timeout: Duration) -> Result<(Answer, Vec<OwnedFd>), Error> {
        let deadline = Instant::now() + timeout;
        let id = self.next_id;
        self.next_id += 1;
        let request = Request { id, op };
        loop {
            match self.send(&request, fds) {
                Ok(()) => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT, deadline)?,
                Err(e) => return Err(e.into()),
            }
        }
        loop {
            match self.receive(deadline)? {
                (Message::Reply(Reply { id: got, result }), fds) if got == id => return Ok((result?, fds)),
                (Message::Reply(_), _) => {}
                (Message::Event(event), _) => self.events.push_back(event),
            }
        }
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// When none comes in time or the supervisor goes away.
    pub fn next(&mut self, timeout: Duration) -> Result<Event, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            if let (Message::Event(event), _) = self.receive(deadline)? {
                return Ok(event);
            }
        }
    }

    fn receive(&self, deadline: Instant) -> Result<(Message, Vec<OwnedFd>), Error> {
        loop {
            match self.recv() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => return Err(Error::Closed),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN, deadline)?,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(Error::Closed),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Timeout);
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&self.fd, flags)], Some(&timeout)) {
            Ok(0) => Err(Error::Timeout),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(Error::Io(e.into())),
        }
    }
}

/// What a supervisor of any version says. Of a younger one's, an answer is still an answer; an event is passed over.
fn understand(bytes: &[u8]) -> io::Result<Option<Message>> {
    let unknown = match serde_json::from_slice(bytes) {
        Ok(message) => return Ok(Some(message)),
        Err(unknown) => unknown,
    };
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
    Ok(value.pointer("/reply/id").and_then(serde_json::Value::as_u64).map(|id| {
        let message = format!("an answer of another version: {unknown}");
        Message::Reply(Reply { id, result: Err(Failure { kind: FailureKind::System, message }) })
    }))
}
