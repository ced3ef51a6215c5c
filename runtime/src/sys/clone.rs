//! Making processes.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use super::check;

/// libc has it as an overflowing int.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of [`clone_process`] this is.
pub(crate) enum Cloned {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// The new process's pid.
        pid: i32,
        /// A descriptor for it.
        pidfd: OwnedFd,
    },
}

/// Copies this process into new namespaces (`CLONE_NEW*` of `flags`), straight into a v2 cgroup when one is given.
///
/// The runtime is single-threaded, so the copy finds every lock free and may go on allocating.
pub(crate) fn clone_process(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args is valid; every field is a plain integer.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: no CLONE_VM, so the child runs on a copy of this memory and stack; `args` and `pidfd` outlive the call.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a new descriptor that nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: pid as i32, pidfd })
}

/// Ends this process without running exit handlers or destructors: a cloned child must not flush its parent's buffers.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}
