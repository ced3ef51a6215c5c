//! Signals, seccomp, scheduling and descriptors of the calling process.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use super::check;

/// One BPF instruction, as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Jump if true.
    pub jt: u8,
    /// Jump if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Installs a seccomp filter; the listener when `flags` asks for one.
pub(crate) fn install_seccomp(program: &[SockFilter], flags: u64) -> io::Result<Option<OwnedFd>> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let prog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: SockFilter has sock_filter's layout, `prog` points at `len` of them, and the kernel only reads.
    let result =
        check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog) })?;
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 {
        return Ok(None);
    }
    // SAFETY: with NEW_LISTENER the result is a new descriptor that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(result as RawFd) }))
}

/// Default dispositions for all signals and none blocked, as a new program expects.
pub(crate) fn reset_signals() {
    // SAFETY: SIG_DFL is a valid handler for every number (the kernel refuses the few that cannot be changed), and the
    // set is initialised by sigemptyset before it is used.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Sends `signal` to a process or (negative) group; any number, real-time signals included.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill has no memory preconditions.
    check(unsafe { libc::kill(pid, signal) }.into())?;
    Ok(())
}

/// Sends `signal` through a pidfd; any number.
pub(crate) fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo is allowed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) })?;
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: only flags change; no descriptor is closed.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes every descriptor above 2 but those in `keep` (sorted by this function).
///
/// Only for a cloned child that leaves all its parent's objects alone until it executes or exits: their owners in this
/// process must not be dropped.
pub(crate) fn close_all_except(keep: &mut [RawFd]) {
    keep.sort_unstable();
    let mut first = 3u32;
    for &fd in keep.iter() {
        let fd = fd as u32;
        if fd < first {
            continue;
        }
        if fd > first {
            // SAFETY: by contract nobody in this process uses the closed descriptors again.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// The position of the first `byte`, by the C library's vectorised search.
pub(crate) fn find_byte(haystack: &[u8], byte: u8) -> Option<usize> {
    // SAFETY: the pointer and length are those of a live slice.
    let found = unsafe { libc::memchr(haystack.as_ptr().cast(), byte.into(), haystack.len()) };
    if found.is_null() { None } else { Some(found as usize - haystack.as_ptr() as usize) }
}

/// Leaves the session keyring of whoever called us for a new, empty one.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) })?;
    Ok(())
}

/// ioprio_set(2) on the calling process.
pub(crate) fn set_io_priority(value: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: plain integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })?;
    Ok(())
}

/// Arguments of sched_setattr(2).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SchedulerAttributes {
    /// Size of this structure; set by [`set_scheduler`].
    pub(crate) size: u32,
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// Niceness.
    pub(crate) nice: i32,
    /// Static priority.
    pub(crate) priority: u32,
    /// Deadline scheduling: runtime.
    pub(crate) runtime: u64,
    /// Deadline scheduling: deadline.
    pub(crate) deadline: u64,
    /// Deadline scheduling: period.
    pub(crate) period: u64,
}

/// sched_setattr(2) on the calling process.
pub(crate) fn set_scheduler(mut attributes: SchedulerAttributes) -> io::Result<()> {
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: `attributes` is a valid sched_attr of the size it says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })?;
    Ok(())
}

/// Makes `fd` the standard stream `stream` (0, 1 or 2) too.
pub(crate) fn dup_to_stream(fd: BorrowedFd<'_>, stream: u8) -> io::Result<()> {
    assert!(stream < 3, "only standard streams may be replaced");
    // SAFETY: the standard streams are never owned by an OwnedFd in this program.
    check(unsafe { libc::dup2(fd.as_raw_fd(), stream.into()) }.into())?;
    Ok(())
}

/// set_mempolicy(2) on the calling process.
pub(crate) fn set_memory_policy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    let (mask, bits) = if nodes.is_empty() { (std::ptr::null(), 0) } else { (nodes.as_ptr(), nodes.len() * 64 + 1) };
    // SAFETY: the kernel reads one bit less than `bits`, which is what `nodes` holds, or nothing at all.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) })?;
    Ok(())
}
