//! What a process is before its program runs: user, groups, capabilities, limits, scheduling, and the program itself.

use std::{
    collections::{BTreeSet, HashSet},
    ffi::{CStr, CString},
    io,
    os::fd::BorrowedFd,
    path::Path,
};

use caps::CapSet;
use oci_spec::runtime::{
    Capability, IOPriorityClass, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType,
    Process,
};
use rustix::fs::{Access, AtFlags, CWD};

use crate::{
    cpu_list,
    error::{Context, Error, Kind, Result},
    root,
    sys::{self, SchedulerAttributes},
};

/// Sets the limits that need no more privilege than we have; others are told to `warn`.
pub(crate) fn set_limits(process: &Process, proc: BorrowedFd<'_>, warn: &mut dyn FnMut(String)) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ());
        let result = nix::sys::resource::setrlimit(resource, limit.soft(), limit.hard());
        match result {
            Err(nix::errno::Errno::EPERM) => {
                let hard = nix::sys::resource::getrlimit(resource).map_or(0, |l| l.1);
                let _ = nix::sys::resource::setrlimit(resource, limit.soft().min(hard), hard);
                warn(format!("rlimit {:?} cannot be raised to {}: not permitted", limit.typ(), limit.hard()));
            }
            other => other.context(|| format!("set rlimit {:?}", limit.typ()))?,
        }
    }
    if let Some(adj) = process.oom_score_adj() {
        match root::write_below(proc, "self/oom_score_adj", adj.to_string().as_bytes()) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
                warn(format!("oom_score_adj cannot be set to {adj}: not permitted"));
            }
            other => other.context(|| format!("set oom_score_adj to {adj}"))?,
        }
    }
    set_scheduling(process)
}

fn set_scheduling(process: &Process) -> Result<()> {
    if let Some(io) = process.io_priority() {
        let class = match io.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        sys::set_io_priority(class << 13 | io.priority() as i32).context(|| "set process.ioPriority".into())?;
    }
    let Some(scheduler) = process.scheduler() else { return Ok(()) };
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    sys::set_scheduler(SchedulerAttributes {
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0) as u32,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
        ..SchedulerAttributes::default()
    })
    .context(|| "set process.scheduler".into())
}

/// Binds this process to the listed processors, as far as its cpuset has them.
pub(crate) fn set_affinity(list: &str) -> Result<()> {
    let mut set = nix::sched::CpuSet::new();
    for cpu in cpu_list::parse(list)? {
        set.set(cpu).context(|| format!("process.execCPUAffinity {list:?}"))?;
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
        .context(|| format!("set process.execCPUAffinity {list:?}"))
}

fn resource(kind: PosixRlimitType) -> nix::sys::resource::Resource {
    use nix::sys::resource::Resource as R;
    match kind {
        PosixRlimitType::RlimitCpu => R::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => R::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => R::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => R::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => R::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => R::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => R::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => R::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => R::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => R::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => R::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => R::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => R::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => R::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => R::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => R::RLIMIT_RTTIME,
    }
}

/// Sets the execution domain.
pub(crate) fn set_personality(personality: &oci_spec::runtime::LinuxPersonality) -> Result<()> {
    let domain = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 0x0008,
    };
    nix::sys::personality::set(nix::sys::personality::Persona::from_bits_retain(domain))
        .map(drop)
        .context(|| "set linux.personality".into())
}

/// Becomes the process's user with exactly its capabilities.
///
/// The bounding set shrinks first (it needs CAP_SETPCAP), the user changes under PR_SET_KEEPCAPS, and the other sets
/// follow last, so that at no point the process has more than before.
pub(crate) fn become_user(process: &Process, in_userns: bool, warn: &mut dyn FnMut(String)) -> Result<()> {
    let has = |error| move |e: caps::errors::CapsError| Error::new(Kind::System, format!("{error}: {e}"));
    let wanted = process.capabilities().as_ref();
    let set_of = |list: Option<&HashSet<Capability>>| -> HashSet<caps::Capability> {
        list.into_iter().flatten().map(|&c| capability(c)).collect()
    };
    let current = caps::read(None, CapSet::Permitted).map_err(has("read capabilities"))?;
    if let Some(wanted) = wanted {
        let bounding = set_of(wanted.bounding().as_ref());
        for cap in caps::all().difference(&bounding) {
            match drop_bounding(*cap) {
                // Capabilities younger than this kernel.
                Err(nix::errno::Errno::EINVAL) | Ok(()) => {}
                Err(e) => return Err(Error::system(format!("drop {cap} from the bounding set"), e)),
            }
        }
    }
    nix::sys::prctl::set_keepcaps(true).context(|| "keep capabilities".into())?;
    set_ids(process, in_userns)?;
    nix::sys::prctl::set_keepcaps(false).context(|| "stop keeping capabilities".into())?;
    let Some(wanted) = wanted else { return Ok(()) };
    // What the runtime itself does not have cannot be given.
    let permitted: HashSet<_> = set_of(wanted.permitted().as_ref()).intersection(&current).copied().collect();
    let effective: HashSet<_> = set_of(wanted.effective().as_ref()).intersection(&permitted).copied().collect();
    let inheritable: HashSet<_> = set_of(wanted.inheritable().as_ref()).intersection(&current).copied().collect();
    caps::set(None, CapSet::Inheritable, &inheritable).map_err(has("set inheritable capabilities"))?;
    caps::set(None, CapSet::Effective, &effective).map_err(has("set effective capabilities"))?;
    caps::set(None, CapSet::Permitted, &permitted).map_err(has("set permitted capabilities"))?;
    let ambient: HashSet<_> = set_of(wanted.ambient().as_ref());
    let (given, out): (Vec<_>, Vec<_>) =
        ambient.iter().partition(|cap| permitted.contains(cap) && inheritable.contains(cap));
    let asked = [wanted.permitted(), wanted.effective(), wanted.inheritable()].map(|set| set_of(set.as_ref()));
    let missing = asked.iter().flatten().filter(|cap| !current.contains(cap)).chain(out);
    let missing: BTreeSet<_> = missing.map(ToString::to_string).collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.into_iter().collect();
        warn(format!("process.capabilities: {} cannot be granted", names.join(", ")));
    }
    for cap in given {
        caps::raise(None, CapSet::Ambient, *cap).map_err(has("set ambient capabilities"))?;
    }
    Ok(())
}

fn drop_bounding(cap: caps::Capability) -> nix::Result<()> {
    match caps::drop(None, CapSet::Bounding, cap) {
        Ok(()) => Ok(()),
        Err(_) => match nix::errno::Errno::last() {
            nix::errno::Errno::UnknownErrno => Err(nix::errno::Errno::EPERM),
            e => Err(e),
        },
    }
}

fn set_ids(process: &Process, in_userns: bool) -> Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let user = process.user();
    let extra = user.additional_gids().as_deref().unwrap_or_default();
    let groups: Vec<Gid> = extra.iter().map(|&g| Gid::from_raw(g)).collect();
    match setgroups(&groups) {
        // An unprivileged user namespace denies setgroups; there is nothing to drop then.
        Err(nix::errno::Errno::EPERM) if in_userns && groups.is_empty() => {}
        other => other.context(|| format!("set {} additional groups", extra.len()))?,
    }
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).context(|| format!("set gid {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("set uid {uid}"))
}

fn capability(cap: Capability) -> caps::Capability {
    use caps::Capability as C;
    match cap {
        Capability::AuditControl => C::CAP_AUDIT_CONTROL,
        Capability::AuditRead => C::CAP_AUDIT_READ,
        Capability::AuditWrite => C::CAP_AUDIT_WRITE,
        Capability::BlockSuspend => C::CAP_BLOCK_SUSPEND,
        Capability::Bpf => C::CAP_BPF,
        Capability::CheckpointRestore => C::CAP_CHECKPOINT_RESTORE,
        Capability::Chown => C::CAP_CHOWN,
        Capability::DacOverride => C::CAP_DAC_OVERRIDE,
        Capability::DacReadSearch => C::CAP_DAC_READ_SEARCH,
        Capability::Fowner => C::CAP_FOWNER,
        Capability::Fsetid => C::CAP_FSETID,
        Capability::IpcLock => C::CAP_IPC_LOCK,
        Capability::IpcOwner => C::CAP_IPC_OWNER,
        Capability::Kill => C::CAP_KILL,
        Capability::Lease => C::CAP_LEASE,
        Capability::LinuxImmutable => C::CAP_LINUX_IMMUTABLE,
        Capability::MacAdmin => C::CAP_MAC_ADMIN,
        Capability::MacOverride => C::CAP_MAC_OVERRIDE,
        Capability::Mknod => C::CAP_MKNOD,
        Capability::NetAdmin => C::CAP_NET_ADMIN,
        Capability::NetBindService => C::CAP_NET_BIND_SERVICE,
        Capability::NetBroadcast => C::CAP_NET_BROADCAST,
        Capability::NetRaw => C::CAP_NET_RAW,
        Capability::Perfmon => C::CAP_PERFMON,
        Capability::Setgid => C::CAP_SETGID,
        Capability::Setfcap => C::CAP_SETFCAP,
        Capability::Setpcap => C::CAP_SETPCAP,
        Capability::Setuid => C::CAP_SETUID,
        Capability::SysAdmin => C::CAP_SYS_ADMIN,
        Capability::SysBoot => C::CAP_SYS_BOOT,
        Capability::SysChroot => C::CAP_SYS_CHROOT,
        Capability::SysModule => C::CAP_SYS_MODULE,
        Capability::SysNice => C::CAP_SYS_NICE,
        Capability::SysPacct => C::CAP_SYS_PACCT,
        Capability::SysPtrace => C::CAP_SYS_PTRACE,
        Capability::SysRawio => C::CAP_SYS_RAWIO,
        Capability::SysResource => C::CAP_SYS_RESOURCE,
        Capability::SysTime => C::CAP_SYS_TIME,
        Capability::SysTtyConfig => C::CAP_SYS_TTY_CONFIG,
        Capability::Syslog => C::CAP_SYSLOG,
        Capability::WakeAlarm => C::CAP_WAKE_ALARM,
    }
}

/// A program, its arguments and environment, ready for execve.
#[derive(Debug)]
pub(crate) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds the program of `process` as its user sees it, by its own PATH.
    pub(crate) fn find(process: &Process, home: Option<String>) -> Result<Self> {
        let args = process.args().as_deref().unwrap_or_default();
        let mut env = process.env().clone().unwrap_or_default();
        let has_home = env.iter().any(|e| e.strip_prefix("HOME=").is_some_and(|h| !h.is_empty()));
        if !has_home {
            env.retain(|e| !e.starts_with("HOME="));
            env.push(format!("HOME={}", home.as_deref().unwrap_or("/")));
        }
        let name = args.first().map(String::as_str).unwrap_or_default();
        let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH="));
        let found = look_up(name, path.unwrap_or_default())?;
        Ok(Self {
            path: c_string(found)?,
            args: args.iter().map(|a| c_string(a.as_str())).collect::<Result<_>>()?,
            env: env.iter().map(|e| c_string(e.as_str())).collect::<Result<_>>()?,
        })
    }

    /// Replaces this process; returns only on failure.
    pub(crate) fn execute(&self) -> Error {
        let args: Vec<&CStr> = self.args.iter().map(CString::as_c_str).collect();
        let env: Vec<&CStr> = self.env.iter().map(CString::as_c_str).collect();
        let Err(errno) = nix::unistd::execve(&self.path, &args, &env);
        let shown = self.path.to_string_lossy();
        let error = Error::system(format!("exec {shown}"), errno);
        match errno {
            nix::errno::Errno::ENOENT => Error::new(Kind::NoExecutable, error.to_string()),
            nix::errno::Errno::EACCES | nix::errno::Errno::ENOEXEC | nix::errno::Errno::EISDIR => {
                Error::new(Kind::NotExecutable, error.to_string())
            }
            _ => error,
        }
    }
}

fn c_string(text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid("process.args or process.env contains a NUL byte"))
}

/// The words are those of runc, which the callers of runtimes know.
fn look_up(name: &str, path: &str) -> Result<String> {
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(libc::EACCES) => Err(Error::new(Kind::NotExecutable, format!("exec: {name:?}: permission denied"))),
            Err(libc::EISDIR) => Err(Error::new(Kind::NotExecutable, format!("exec: {name:?}: is a directory"))),
            Err(errno) => {
                let cause = Error::system(format!("exec: {name:?}: stat {name}"), io::Error::from_raw_os_error(errno));
                Err(Error::new(Kind::NoExecutable, cause.to_string()))
            }
        };
    }
    let mut denied = false;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = format!("{}/{name}", dir.trim_end_matches('/'));
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(libc::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        return Err(Error::new(Kind::NotExecutable, format!("exec: {name:?}: permission denied")));
    }
    Err(Error::new(Kind::NoExecutable, format!("exec: {name:?}: executable file not found in $PATH")))
}

fn executable(path: &str) -> Result<(), i32> {
    let stat = rustix::fs::stat(path).map_err(rustix::io::Errno::raw_os_error)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory {
        return Err(libc::EISDIR);
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(rustix::io::Errno::raw_os_error)
}

/// Enters the working directory and makes sure it lies in this root.
///
/// CVE-2024-21626: `/proc/self/fd/N` as the directory, with a descriptor leaked from the host, would stay outside.
pub(crate) fn enter_cwd(cwd: &Path) -> Result<()> {
    match rustix::process::chdir(cwd) {
        Ok(()) => {}
        Err(e) => return Err(Error::system(format!("chdir to cwd ({cwd:?}) set in config.json failed"), e)),
    }
    match rustix::process::getcwd(vec![]) {
        Ok(real) if real.to_bytes().first() == Some(&b'/') => Ok(()),
        _ => Err(Error::invalid(format!("cwd {cwd:?} is outside of the container's mount namespace root"))),
    }
}

/// Creates the working directory when the image lacks it.
pub(crate) fn ensure_cwd(root: &root::Root, cwd: &Path) {
    // A directory that cannot be made (a read-only image) shows when it is entered.
    drop(root.ensure_dir(cwd));
}
