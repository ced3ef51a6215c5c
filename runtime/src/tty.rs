//! Pseudo-terminals: the container's own, made in its devpts, and the relay of an attached `run` or `exec`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Termios, Winsize, tcsetwinsize},
};

use crate::{
    error::{Context, Error, Result},
    mounts,
    root::Root,
};

/// A new terminal.
pub(crate) struct Terminal {
    /// For whoever shows it.
    pub(crate) master: OwnedFd,
    /// For the process.
    pub(crate) slave: OwnedFd,
}

/// Makes a terminal in the devpts at `root`/dev/pts and, when asked, shows it as /dev/console.
pub(crate) fn open(root: &Root, size: Option<(u16, u16)>, console: bool) -> Result<Terminal> {
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    // The multiplexer of the container's own devpts, not whatever its /dev/ptmx leads to.
    let master =
        root.open_exact(Path::new("/dev/pts/ptmx"), flags).context(|| "open /dev/pts/ptmx in the container".into())?;
    unlockpt(&master).context(|| "unlock terminal".into())?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .context(|| "open the terminal's slave".into())?;
    if let Some((rows, cols)) = size.filter(|&s| s != (0, 0)) {
        tcsetwinsize(&master, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 })
            .context(|| "set terminal size".into())?;
    }
    if console {
        drop(root.ensure_file(Path::new("/dev/console"))?);
        // CVE-2025-52565: through a symlink of the image the terminal would cover some other file.
        let target = root
            .open_exact(Path::new("/dev/console"), OFlags::PATH)
            .context(|| "open /dev/console as an ordinary file".into())?;
        mounts::clone_tree(slave.as_fd(), Path::new(""), false)
            .and_then(|tree| mounts::attach(tree.as_fd(), target.as_fd()))
            .context(|| "bind /dev/console".into())?;
    }
    Ok(Terminal { master, slave })
}

/// Makes `slave` the controlling terminal and standard streams of this session leader.
pub(crate) fn take(slave: &OwnedFd) -> Result<()> {
    rustix::process::ioctl_tiocsctty(slave).context(|| "take controlling terminal".into())?;
    (0..3)
        .try_for_each(|stream| crate::sys::dup_to_stream(slave.as_fd(), stream))
        .context(|| "use terminal as standard streams".into())
}

/// Hands a master to the listener at `path`, as `--console-socket` promises.
pub(crate) fn send_to_console(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> Result<()> {
    crate::supervisor::wire::send_bytes(socket, b"/dev/ptmx", &[master])
        .context(|| "send terminal to console socket".into())
}

/// Connects to a console socket.
pub(crate) fn connect(path: &Path) -> Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let what = || format!("connect to console socket {}", path.display());
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).context(what)?;
    let name = path.file_name().ok_or_else(|| Error::invalid(format!("{} is no socket", path.display())))?;
    let address = crate::supervisor::wire::socket_address(dir.as_fd(), &name.to_string_lossy()).context(what)?;
    let fd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).context(what)?;
    rustix::net::connect(&fd, &address).context(what)?;
    Ok(fd)
}

/// Puts a terminal in raw mode until dropped.
pub(crate) struct RawMode {
    fd: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// `None` when `fd` is no terminal.
    pub(crate) fn enter(fd: BorrowedFd<'_>) -> Option<Self> {
        let before = rustix::termios::tcgetattr(fd).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(fd, rustix::termios::OptionalActions::Now, &raw).ok()?;
        let fd = fd.try_clone_to_owned().ok()?;
        Some(Self { fd, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(&self.fd, rustix::termios::OptionalActions::Now, &self.before);
    }
}

/// Gives `to` the size of `from`.
pub(crate) fn copy_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    if let Ok(size) = rustix::termios::tcgetwinsize(from) {
        let _ = tcsetwinsize(to, size);
    }
}

/// Copies what is ready from one descriptor to another; `false` at the end of the input.
pub(crate) fn pump(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<bool> {
    let mut buffer = [0u8; 8192];
    let n = match rustix::io::read(from, &mut buffer) {
        Ok(n) => n,
        // The last slave is closed.
        Err(rustix::io::Errno::IO) => return Ok(false),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    let mut rest = &buffer[..n];
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(w) => rest = &rest[w..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                let mut fds = [rustix::event::PollFd::new(&to, rustix::event::PollFlags::OUT)];
                let _ = rustix::event::poll(&mut fds, None);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(n > 0)
}

/// The owner of a process's terminal is its user.
pub(crate) fn own(slave: &OwnedFd, uid: u32) {
    let _ = rustix::fs::fchown(slave, Some(rustix::fs::Uid::from_raw(uid)), None);
}

/// So that a process can reopen /dev/stdout, its user must own pipes it was given.
pub(crate) fn own_stdio(uid: u32) {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for fd in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let Ok(stat) = rustix::fs::fstat(fd) else { continue };
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        if stat.st_uid != uid && kind != rustix::fs::FileType::CharacterDevice {
            let _ = rustix::fs::fchown(fd, Some(rustix::fs::Uid::from_raw(uid)), None);
        }
    }
}
