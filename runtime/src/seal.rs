//! Keeps containers from overwriting the runtime through /proc/PID/exe (CVE-2019-5736).
//!
//! The runtime executes itself again from a read-only clone of the mount its file lies on: whoever opens the link gets
//! that mount and cannot write. Cheaper than copying the binary; the copy (a sealed memfd) remains for callers who may
//! not make mounts.

use std::{
    ffi::{CStr, CString},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::Path,
};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, StatVfsMountFlags};

use crate::{
    error::{Context, Error, Result},
    mounts,
    sys::{MountAttributes, mount_setattr},
};

/// Returns when this program runs from a file that cannot be written; executes itself from one otherwise.
///
/// # Errors
/// When neither way works.
pub fn ensure_sealed() -> Result<()> {
    let own = rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /proc/self/exe".into())?;
    let read_only = rustix::fs::fstatvfs(&own).is_ok_and(|s| s.f_flag.contains(StatVfsMountFlags::RDONLY));
    if read_only || is_sealed_copy() {
        return Ok(());
    }
    let sealed = read_only_clone(&own).or_else(|_| sealed_copy()).context(|| "seal the runtime's file".into())?;
    let args: Vec<CString> = std::env::args_os().filter_map(|a| CString::new(a.into_vec()).ok()).collect();
    let env: Vec<CString> = std::env::vars_os()
        .filter_map(|(k, v)| {
            let mut pair = k.into_vec();
            pair.push(b'=');
            pair.extend(v.into_vec());
            CString::new(pair).ok()
        })
        .collect();
    let args: Vec<&CStr> = args.iter().map(CString::as_c_str).collect();
    let env: Vec<&CStr> = env.iter().map(CString::as_c_str).collect();
    let Err(e) = nix::unistd::execveat(&sealed, c"", &args, &env, nix::fcntl::AtFlags::AT_EMPTY_PATH);
    Err(e).context(|| "execute the sealed runtime".into())
}

fn read_only_clone(own: &OwnedFd) -> io::Result<OwnedFd> {
    let clone = mounts::clone_tree(own.as_fd(), Path::new(""), false)?;
    mount_setattr(clone.as_fd(), MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() })?;
    Ok(clone)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create(c"isopod-runtime", flags)?;
    let mut from = std::fs::File::open("/proc/self/exe")?;
    let mut into = std::fs::File::from(memfd);
    io::copy(&mut from, &mut into)?;
    into.flush()?;
    rustix::fs::fcntl_add_seals(&into, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(into.into())
}

fn is_sealed_copy() -> bool {
    std::fs::File::open("/proc/self/exe")
        .is_ok_and(|f| rustix::fs::fcntl_get_seals(&f).is_ok_and(|s| s.contains(SealFlags::WRITE)))
}

/// Keeps descriptors the caller did not mean for us out of the programs we run.
///
/// # Errors
/// When one that is to be passed on is not open, or the kernel refuses.
pub fn protect_descriptors(preserve: u32) -> Result<()> {
    let closed = (3..3 + preserve).find(|fd| !Path::new(&format!("/proc/self/fd/{fd}")).is_symlink());
    if let Some(fd) = closed {
        return Err(Error::invalid(format!("--preserve-fds {preserve}: descriptor {fd} is not open")));
    }
    crate::sys::close_on_exec_from(3 + preserve).context(|| "mark descriptors close-on-exec".into())
}
