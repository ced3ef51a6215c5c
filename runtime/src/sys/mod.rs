//! The only unsafe code of the runtime: narrow, safe functions over system calls that rustix and nix do not wrap.
#![allow(unsafe_code)]

mod bpf;
mod clone;
mod code;
mod mount;
mod process;

pub(crate) use bpf::{attach_device_program, load_device_program};
pub(crate) use clone::{Cloned, clone_process, exit_now};
pub use code::forget_code;
pub(crate) use mount::{MountAttributes, mount_setattr};
pub use process::SockFilter;
pub(crate) use process::{
    SchedulerAttributes, close_all_except, close_on_exec_from, dup_to_stream, find_byte, install_seccomp, kill,
    new_session_keyring, pidfd_kill, reset_signals, set_io_priority, set_memory_policy, set_scheduler,
};

use std::io;

/// The result of a raw system call.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
