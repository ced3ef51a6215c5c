//! As much of D-Bus as it takes to ask systemd for a scope and logind for a delay: authentication, method calls, replies with
//! descriptors, and signals.
//!
//! Little-endian only, no introspection. What comes in is checked: a short or malformed message is an
//! error, never a panic. Values are written in the order of their signature; the marshalling rules (natural alignment,
//! length-prefixed strings and arrays) are those of the D-Bus specification, "Marshaling".

use std::{
    io::{self, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::error::{Context, Error, Kind, Result};

/// Longest message accepted.
const MAX_MESSAGE: usize = 1 << 20;
/// How long the bus may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most descriptors of one message.
const MAX_FDS: usize = 4;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A value of a unit's property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// `s`
    Text(String),
    /// `b`
    Flag(bool),
    /// `t`
    Number(u64),
    /// `au`
    Numbers(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

/// Writes values.
#[derive(Debug, Default)]
pub(crate) struct Body {
    bytes: Vec<u8>,
    signature: String,
}

impl Body {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.bytes.push(text.len() as u8);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    /// An array whose elements `write` appends, each aligned to `to`.
    fn array(&mut self, to: usize, write: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.bytes.len() - 4;
        self.align(to);
        let start = self.bytes.len();
        write(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Flag(flag) => {
                self.signature("b");
                self.u32((*flag).into());
            }
            Value::Number(number) => {
                self.signature("t");
                self.align(8);
                self.bytes.extend(number.to_le_bytes());
            }
            Value::Numbers(numbers) => {
                self.signature("au");
                self.array(4, |b| numbers.iter().for_each(|n| b.u32(*n)));
            }
            Value::Bytes(bytes) => {
                self.signature("ay");
                self.array(1, |b| b.bytes.extend(bytes));
            }
        }
    }

    /// An argument of type `s`.
    pub(crate) fn text(mut self, text: &str) -> Self {
        self.signature.push('s');
        self.string(text);
        self
    }

    /// An argument of type `b`.
    pub(crate) fn flag(mut self, flag: bool) -> Self {
        self.signature.push('b');
        self.u32(flag.into());
        self
    }

    /// An argument of type `i`.
    pub(crate) fn number(mut self, number: i32) -> Self {
        self.signature.push('i');
        self.align(4);
        self.bytes.extend(number.to_le_bytes());
        self
    }

    /// An argument of type `a(sv)`.
    pub(crate) fn properties(mut self, properties: &[(&str, Value)]) -> Self {
        self.signature.push_str("a(sv)");
        self.array(8, |b| {
            for (name, value) in properties {
                b.align(8);
                b.string(name);
                b.variant(value);
            }
        });
        self
    }

    /// An empty argument of type `a(sa(sv))`.
    pub(crate) fn no_further_units(mut self) -> Self {
        self.signature.push_str("a(sa(sv))");
        self.array(8, |_| ());
        self
    }
}

/// A message that came in.
#[derive(Debug, Default)]
pub(crate) struct Message {
    kind: u8,
    reply_to: u32,
    /// Of a signal.
    pub(crate) member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
    /// Descriptors that came with it.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Reads values in order.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, n: usize) -> Option<&[u8]> {
        let end = self.at.checked_add(n)?;
        let part = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(part)
    }

    fn u32(&mut self) -> Option<u32> {
        self.at = self.at.next_multiple_of(4);
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        self.at = self.at.next_multiple_of(8);
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    /// A value of a simple type, or of one in a variant, as text.
    fn value(&mut self, kind: char) -> Option<String> {
        match kind {
            'u' | 'b' | 'h' => self.u32().map(|n| n.to_string()),
            't' => self.u64().map(|n| n.to_string()),
            's' | 'o' => self.string(),
            'v' => {
                let inner = self.signature()?.chars().next().filter(|kind| *kind != 'v')?;
                self.value(inner)
            }
            _ => None,
        }
    }

    fn text(&mut self, length: usize) -> Option<String> {
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.take(1)?;
        Some(text)
    }

    fn string(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    fn signature(&mut self) -> Option<String> {
        let length = self.take(1)?[0] as usize;
        self.text(length)
    }
}

impl Message {
    fn parse(header: &[u8], body: Vec<u8>) -> Option<Self> {
        let mut message = Self { kind: header[1], body, ..Self::default() };
        let mut reader = Reader { bytes: header, at: 16 };
        while reader.at < header.len() {
            reader.at = reader.at.next_multiple_of(8);
            if reader.at >= header.len() {
                break;
            }
            let code = reader.take(1)?[0];
            match (code, reader.signature()?.as_str()) {
                (3, "s") => message.member = reader.string()?,
                (4, "s") => message.error = reader.string()?,
                (8, "g") => message.signature = reader.signature()?,
                (5, "u") => message.reply_to = reader.u32()?,
                (_, "s" | "o") => drop(reader.string()?),
                (_, "g") => drop(reader.signature()?),
                (_, "u") => drop(reader.u32()?),
                _ => return None,
            }
        }
        Some(message)
    }

    /// The leading arguments of simple types, as text.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut reader = Reader { bytes: &self.body, at: 0 };
        let mut found = vec![];
        for kind in self.signature.chars() {
            match reader.value(kind) {
                Some(text) => found.push(text),
                None => break,
            }
        }
        found
    }
}

/// A connection to a message bus.
#[derive(Debug)]
pub(crate) struct Bus {
    stream: UnixStream,
    /// Descriptors that came with what was last read.
    fds: Vec<OwnedFd>,
    serial: u32,
    /// Signals that came while a reply was awaited.
    signals: Vec<Message>,
}

impl Bus {
    /// Connects to the bus whose socket is at `path`.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let what = || format!("connect to D-Bus at {}", path.display());
        let mut stream = UnixStream::connect(path).context(what)?;
        stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        // Without an identity in it the bus takes the socket's, which also holds in a user namespace.
        stream.write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").context(what)?;
        // "DATA" asks for the identity we already gave as empty; "OK guid" follows.
        for wanted in ["DATA", "OK", "AGREE_UNIX_FD"] {
            let line = read_line(&mut stream).context(what)?;
            if !line.starts_with(wanted) {
                return Err(Error::new(Kind::System, format!("{}: refused: {}", what(), line.trim())));
            }
        }
        let mut bus = Self { stream, fds: vec![], serial: 0, signals: vec![] };
        let hello = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
        bus.call(hello, "Hello", Body::default())?;
        Ok(bus)
    }

    /// Calls a method of `(destination, path, interface)` and waits for its reply.
    pub(crate) fn call(&mut self, object: (&str, &str, &str), method: &str, body: Body) -> Result<Message> {
        let what = || format!("D-Bus call {method}");
        self.serial += 1;
        let message = encode(self.serial, object, method, &body);
        self.stream.write_all(&message).context(what)?;
        loop {
            let message = self.read().map_err(|e| e.within(what()))?;
            match message.kind {
                METHOD_RETURN if message.reply_to == self.serial => return Ok(message),
                ERROR if message.reply_to == self.serial => {
                    let text = message.arguments().into_iter().next().unwrap_or_default();
                    // The name first: callers tell errors apart by it.
                    let kind = if message.error.ends_with(".NoSuchUnit") { Kind::NotFound } else { Kind::System };
                    return Err(Error::new(kind, format!("{}: {}: {text}", what(), message.error)));
                }
                SIGNAL => self.signals.push(message),
                _ => {}
            }
        }
    }

    /// The same for one that may take as long as it likes.
    pub(crate) fn wait(&mut self) -> Result<Message> {
        let what = || "wait for D-Bus".to_owned();
        self.stream.set_read_timeout(None).context(what)?;
        let signal = self.signal();
        self.stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        signal
    }

    /// What ends a wait when it is shut down.
    pub(crate) fn closer(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// The next signal.
    pub(crate) fn signal(&mut self) -> Result<Message> {
        if !self.signals.is_empty() {
            return Ok(self.signals.remove(0));
        }
        loop {
            let message = self.read()?;
            if message.kind == SIGNAL {
                return Ok(message);
            }
        }
    }

    fn read(&mut self) -> Result<Message> {
        let what = || "read from D-Bus".to_owned();
        let bad = || Error::new(Kind::System, "a malformed message came from D-Bus");
        let mut header = vec![0; 16];
        self.fill(&mut header).context(what)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;
        let (body_length, fields_length) = (word(4), word(12));
        if header[0] != b'l' || body_length > MAX_MESSAGE || fields_length > MAX_MESSAGE {
            return Err(bad());
        }
        let padded = (16 + fields_length).next_multiple_of(8);
        header.resize(padded, 0);
        self.fill(&mut header[16..]).context(what)?;
        header.truncate(16 + fields_length);
        let mut body = vec![0; body_length];
        self.fill(&mut body).context(what)?;
        let fds = std::mem::take(&mut self.fds);
        Message::parse(&header, body).map(|message| Message { fds, ..message }).ok_or_else(bad)
    }

    /// Reads all of a buffer, keeping descriptors that come along.
    fn fill(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let slices = &mut [IoSliceMut::new(buffer)];
            let got = match rustix::net::recvmsg(self.stream.as_fd(), slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?.bytes,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[got..];
        }
        Ok(())
    }
}

fn encode(serial: u32, (destination, path, interface): (&str, &str, &str), method: &str, body: &Body) -> Vec<u8> {
    let mut message = Body { bytes: vec![b'l', METHOD_CALL, 0, 1], signature: String::new() };
    message.u32(body.bytes.len() as u32);
    message.u32(serial);
    message.array(8, |m| {
        for (code, kind, value) in [(1, "o", path), (6, "s", destination), (2, "s", interface), (3, "s", method)] {
            m.align(8);
            m.bytes.push(code);
            m.signature(kind);
            m.string(value);
        }
        if !body.signature.is_empty() {
            m.align(8);
            m.bytes.push(8);
            m.signature("g");
            m.signature(&body.signature);
        }
    });
    message.align(8);
    message.bytes.extend(&body.bytes);
    message.bytes
}

/// One line of the authentication, byte by byte: what follows it is already binary.
fn read_line(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut line = vec![];
    let mut byte = [0];
    while !line.ends_with(b"\r\n") && line.len() < 512 {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// A bus of one's own, for tests: what it answers and sends.
#[cfg(test)]
pub(crate) mod mock {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// One end of a connection; the other is a [`Bus`].
    pub(crate) struct Server(Bus);

    impl Server {
        /// Takes one client.
        pub(crate) fn accept(listener: &UnixListener) -> Self {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0]).unwrap();
            for answer in ["", "DATA\r\n", "OK 1234\r\n", "AGREE_UNIX_FD\r\n"] {
                stream.write_all(answer.as_bytes()).unwrap();
                read_line(&mut stream).unwrap();
            }
            Self(Bus { stream, fds: vec![], serial: 0, signals: vec![] })
        }

        /// The next call: its number, name and arguments.
        pub(crate) fn call(&mut self) -> Option<(u32, String, Vec<String>)> {
            let mut header = vec![0; 16];
            self.0.fill(&mut header).ok()?;
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let (body, serial, fields) = (word(4) as usize, word(8), word(12) as usize);
            header.resize((16 + fields).next_multiple_of(8), 0);
            self.0.fill(&mut header[16..]).ok()?;
            header.truncate(16 + fields);
            let mut bytes = vec![0; body];
            self.0.fill(&mut bytes).ok()?;
            let m = Message::parse(&header, bytes)?;
            Some((serial, m.member.clone(), m.arguments()))
        }

        /// Sends a message: an answer to a call, or a signal of this name; perhaps with a descriptor.
        pub(crate) fn send(&mut self, to: Result<u32, &str>, body: &Body, fd: Option<&OwnedFd>) {
            let kind = if to.is_ok() { METHOD_RETURN } else { SIGNAL };
            let mut message = Body { bytes: vec![b'l', kind, 0, 1], signature: String::new() };
            message.u32(body.bytes.len() as u32);
            message.u32(1);
            message.array(8, |m| {
                let mut field = |code: u8, kind: &str, write: &dyn Fn(&mut Body)| {
                    m.align(8);
                    m.bytes.push(code);
                    m.signature(kind);
                    write(m);
                };
                match to {
                    Ok(serial) => field(5, "u", &|m| m.u32(serial)),
                    Err(name) => field(3, "s", &|m| m.string(name)),
                }
                field(8, "g", &|m| m.signature(&body.signature));
                field(9, "u", &|m| m.u32(fd.iter().count() as u32));
            });
            message.align(8);
            message.bytes.extend(&body.bytes);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            let fds = fd.map(AsFd::as_fd).into_iter().collect::<Vec<_>>();
            if !fds.is_empty() {
                assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
            }
            let slices = [io::IoSlice::new(&message.bytes)];
            rustix::net::sendmsg(self.0.stream.as_fd(), &slices, &mut control, rustix::net::SendFlags::empty())
                .unwrap();
        }
    }

    impl Body {
        /// An argument of type `h`: the first descriptor.
        pub(crate) fn first_descriptor(mut self) -> Self {
            self.signature.push('h');
            self.u32(0);
            self
        }

        /// An argument of type `v`, holding a `t`.
        pub(crate) fn big(mut self, number: u64) -> Self {
            self.signature.push('v');
            self.variant(&Value::Number(number));
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reads_back_as_it_was_written() {
        let body = Body::default().text("a.scope").flag(true).properties(&[
            ("PIDs", Value::Numbers(vec![7, 8])),
            ("Delegate", Value::Flag(true)),
            ("MemoryMax", Value::Number(1 << 40)),
            ("AllowedCPUs", Value::Bytes(vec![3])),
        ]);
        assert_eq!(body.signature, "sba(sv)");
        let message = encode(5, ("d.e", "/p", "i.f"), "Do", &body);
        let fields = u32::from_le_bytes(message[12..16].try_into().unwrap()) as usize;
        let start = (16 + fields).next_multiple_of(8);
        assert_eq!(&message[start..], body.bytes);
        let parsed = Message::parse(&message[..16 + fields], body.bytes.clone()).unwrap();
        assert_eq!((parsed.kind, parsed.member.as_str(), parsed.signature.as_str()), (1, "Do", "sba(sv)"));
        assert_eq!(parsed.arguments(), ["a.scope", "1"]);
        // The array begins after string (4 + 8) and boolean: length at 16, elements aligned to 8 at 24.
        assert_eq!(&body.bytes[24..32], b"\x04\0\0\0PIDs");
    }

    proptest::proptest! {
        #[test]
        fn malformed_messages_are_no_panic(header in proptest::collection::vec(proptest::num::u8::ANY, 16..80), body in proptest::collection::vec(proptest::num::u8::ANY, 0..40), signature in "[uso]{0,4}") {
            let mut message = Message::parse(&header, body).unwrap_or_default();
            message.signature = signature;
            let _ = message.arguments();
        }
    }
}
