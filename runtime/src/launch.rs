//! The maker's side of a new container process: prepare everything that can fail early, clone, see it through.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Process};
use rustix::{
    fs::{Mode, OFlags},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    cgroups::{Cgroup, CgroupView, Join},
    config::Config,
    error::{Context, Error, Kind, Result},
    hooks, init, mount_options, net_devices, root,
    seccomp::{self, Program},
    supervisor::protocol::Rootfs,
    sync::{self, Channel, Report},
    sys::{self, Cloned},
    tty,
    userns::Ahead,
};

/// What the process reads and writes.
#[derive(Debug, Default)]
pub(crate) enum Stdio {
    /// The runtime's own.
    #[default]
    Inherit,
    /// These; /dev/null where there is none.
    Given([Option<OwnedFd>; 3]),
}

/// Who gets the master of the process's terminal.
#[derive(Debug, Default)]
pub(crate) enum Console {
    /// Whoever launches.
    #[default]
    Launcher,
    /// The listener of this connected socket.
    Socket(OwnedFd),
}

/// What lets the process run its program.
#[derive(Debug, Default)]
pub(crate) enum Gate {
    /// [`Launched::start`].
    #[default]
    Launcher,
    /// A byte in a fifo, after the launcher is gone; what fails then is written to the other file.
    Fifo {
        /// Open for reading and writing.
        fifo: OwnedFd,
        /// For the error.
        errors: OwnedFd,
    },
}

/// How to run one process, beside its configuration.
#[derive(Debug, Default)]
pub(crate) struct Wiring {
    /// Standard streams.
    pub(crate) stdio: Stdio,
    /// Terminal.
    pub(crate) console: Console,
    /// Start signal.
    pub(crate) gate: Gate,
    /// Descriptors from 3 on that the program inherits.
    pub(crate) preserve: u32,
    /// Stay in the caller's session keyring.
    pub(crate) keep_keyring: bool,
}

impl Wiring {
    fn keep(&self, keep: &mut Vec<RawFd>) {
        keep.extend((3..3 + self.preserve).map(|fd| fd as RawFd));
        if let Stdio::Given(fds) = &self.stdio {
            keep.extend(fds.iter().flatten().map(AsRawFd::as_raw_fd));
        }
        if let Console::Socket(fd) = &self.console {
            keep.push(fd.as_raw_fd());
        }
        if let Gate::Fifo { fifo, errors } = &self.gate {
            keep.extend([fifo.as_raw_fd(), errors.as_raw_fd()]);
        }
    }
}

/// A namespace to enter by descriptor.
#[derive(Debug)]
pub(crate) struct Joined {
    /// Which.
    pub(crate) kind: LinuxNamespaceType,
    /// Open namespace file.
    pub(crate) fd: OwnedFd,
}

/// Everything a container's init needs, made before it is cloned.
pub(crate) struct Prepared<'a> {
    pub(crate) config: &'a Config,
    pub(crate) rootfs: &'a Rootfs,
    pub(crate) wiring: Wiring,
    pub(crate) no_pivot: bool,
    pub(crate) cgroup_view: CgroupView,
    pub(crate) join: Option<Join>,
    pub(crate) seccomp: Option<Program>,
    pub(crate) joined: Vec<Joined>,
    /// `CLONE_NEW*` of clone3.
    pub(crate) flags: u64,
    pub(crate) unshare_cgroup: bool,
    pub(crate) unshare_time: bool,
    pub(crate) userns: bool,
    pub(crate) idmaps: Vec<Option<OwnedFd>>,
    pub(crate) ahead: Ahead,
    pub(crate) proc: OwnedFd,
    pub(crate) propagation: Option<u64>,
}

/// A request for a container process.
pub(crate) struct Launch<'a> {
    /// Its configuration.
    pub(crate) config: &'a Config,
    /// Its root.
    pub(crate) rootfs: &'a Rootfs,
    /// Its control group, already created.
    pub(crate) cgroup: Option<&'a Cgroup>,
    /// Streams, terminal, gate.
    pub(crate) wiring: Wiring,
    /// Move instead of pivot.
    pub(crate) no_pivot: bool,
    /// PID namespace to run in, beside the configuration's.
    pub(crate) pid_namespace: Option<OwnedFd>,
    /// The container's state as JSON for hooks, with the pid left 0.
    pub(crate) state: &'a dyn Fn(i32) -> Vec<u8>,
}

/// A process that was made and waits.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Its pid here.
    pub(crate) pid: i32,
    /// A descriptor for it.
    pub(crate) pidfd: OwnedFd,
    /// The master of its terminal.
    pub(crate) master: Option<OwnedFd>,
    /// What could not be done but does not matter enough.
    pub(crate) warnings: Vec<String>,
    channel: Channel,
}

impl Launched {
    /// Kills and reaps it.
    pub(crate) fn end(&self) {
        drop(sys::pidfd_kill(self.pidfd.as_fd(), libc::SIGKILL));
        drop(wait(self.pid));
    }

    /// Lets the program run and waits until it does.
    pub(crate) fn start(&self) -> Result<()> {
        self.channel.go(&[])?;
        loop {
            match self.channel.next()? {
                None => return Ok(()),
                Some((Report::Failed(error), _)) => return Err(error),
                Some(_) => {}
            }
        }
    }
}

impl<'a> Launch<'a> {
    fn prepare(self) -> Result<(Prepared<'a>, Option<OwnedFd>)> {
        let linux = self.config.spec.linux().as_ref().ok_or_else(|| Error::invalid("linux is missing"))?;
        let mut flags = 0u64;
        let mut joined = vec![];
        let mut pid_namespace = self.pid_namespace;
        let (mut unshare_cgroup, mut unshare_time) = (false, false);
        for namespace in linux.namespaces().iter().flatten() {
            let kind = namespace.typ();
            match namespace.path().as_deref().filter(|p| !p.as_os_str().is_empty()) {
                Some(path) => {
                    let fd = open_namespace(path)?;
                    match kind {
                        LinuxNamespaceType::Pid => pid_namespace = Some(fd),
                        LinuxNamespaceType::Mount => {
                            return Err(Error::invalid("joining a mount namespace is not supported"));
                        }
                        _ => joined.push(Joined { kind, fd }),
                    }
                }
                None => match kind {
                    LinuxNamespaceType::Cgroup => unshare_cgroup = true,
                    LinuxNamespaceType::Time => unshare_time = true,
                    _ => flags |= clone_flag(kind),
                },
            }
        }
        if pid_namespace.is_some() {
            flags &= !(libc::CLONE_NEWPID as u64);
        }
        joined.sort_by_key(|j| j.kind != LinuxNamespaceType::User);
        let userns =
            flags & libc::CLONE_NEWUSER as u64 != 0 || joined.iter().any(|j| j.kind == LinuxNamespaceType::User);
        let propagation = mount_options::rootfs_propagation(linux.rootfs_propagation().as_deref().unwrap_or_default())?;
        // By a supervisor for a pod with users of its own; others map the ids of mounts within the container.
        let overlay = matches!(self.rootfs, Rootfs::Overlay { .. });
        let ahead = if overlay && flags & libc::CLONE_NEWUSER as u64 != 0 {
            let users = user_namespace(linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref())?;
            Some(Ahead::make(self.config, self.rootfs, users.as_fd())?)
        } else {
            None
        };
        let prepared = Prepared {
            config: self.config,
            rootfs: self.rootfs,
            wiring: self.wiring,
            no_pivot: self.no_pivot,
            cgroup_view: self.cgroup.map(Cgroup::view).unwrap_or_default(),
            join: self.cgroup.map(Cgroup::join).transpose()?,
            seccomp: linux.seccomp().as_ref().map(seccomp::compile).transpose()?,
            joined,
            flags,
            unshare_cgroup,
            unshare_time,
            userns,
            idmaps: if ahead.is_some() { vec![] } else { idmaps(self.config)? },
            ahead: ahead.unwrap_or_default(),
            proc: root::host_proc()?,
            propagation,
        };
        Ok((prepared, pid_namespace))
    }

    /// Makes the process and sees it to its gate.
    pub(crate) fn run(self) -> Result<Launched> {
        let config = self.config;
        let state = self.state;
        let (prepared, pid_namespace) = self.prepare()?;
        let back = pid_namespace.as_ref().map(|fd| enter_pid_namespace(fd.as_fd())).transpose()?;
        let (flags, join) = (prepared.flags, prepared.join.as_ref());
        make(flags, join, back, |to| init::main(&prepared, to), |launched| see_through(launched, config, state))
    }
}

/// Clones a process of the container, born where `back` leads away from, and sees it to its gate.
fn make(
    flags: u64,
    join: Option<&Join>,
    back: Option<OwnedFd>,
    child: impl FnOnce(&Channel),
    see: impl FnOnce(&mut Launched) -> Result<()>,
) -> Result<Launched> {
    let (ours, theirs) = sync::pair()?;
    let cloned = sys::clone_process(flags, join.and_then(|j| j.into.as_ref()).map(AsFd::as_fd));
    // Only here: the child was born in the other namespace and must stay.
    if !matches!(cloned, Ok(Cloned::Child)) {
        return_to(back)?;
    }
    match cloned.context(|| "clone a process".into())? {
        Cloned::Child => {
            // The maker's end must not keep the stream open in this process; it is closed with all the rest.
            std::mem::forget(ours);
            child(&theirs);
            // It does not come back.
            sys::exit_now(1)
        }
        Cloned::Parent { pid, pidfd } => {
            drop(theirs);
            let mut launched = Launched { pid, pidfd, master: None, warnings: vec![], channel: ours };
            let seen = see(&mut launched);
            if seen.is_err() {
                launched.end();
            }
            seen.map(|()| launched)
        }
    }
}

fn see_through(launched: &mut Launched, config: &Config, state: &dyn Fn(i32) -> Vec<u8>) -> Result<()> {
    loop {
        match launched.channel.next()? {
            Some((Report::Ready, _)) => return Ok(()),
            Some((Report::Warning(text), _)) => launched.warnings.push(text),
            Some((Report::Failed(error), _)) => return Err(error),
            Some((Report::Terminal, fds)) => launched.master = fds.into_iter().next(),
            Some((Report::Listener, fds)) => {
                let listener = fds.into_iter().next().ok_or_else(|| Error::invalid("no seccomp listener came"))?;
                hand_listener(config, launched.pid, listener.as_fd(), &state(launched.pid))?;
            }
            Some((Report::Namespaces, _)) => {
                write_maps(launched.pid, config)?;
                if let Some(devices) = config.net_devices() {
                    net_devices::hand_over(devices, launched.pid)?;
                }
                let told = state(launched.pid);
                if let Some(all) = config.spec.hooks() {
                    #[allow(deprecated)]
                    hooks::run("prestart", all.prestart().as_ref(), &told)?;
                    hooks::run("createRuntime", all.create_runtime().as_ref(), &told)?;
                }
                launched.channel.go(&told)?;
            }
            None => {
                let status = wait(launched.pid);
                return Err(Error::new(Kind::System, format!("the container's init died while starting ({status})")));
            }
        }
    }
}

/// How a child ended, in words.
fn wait(pid: i32) -> String {
    match nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None) {
        Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => format!("exit code {code}"),
        Ok(nix::sys::wait::WaitStatus::Signaled(_, signal, _)) => {
            format!("{signal}; its memory limit may be too small")
        }
        other => format!("{other:?}"),
    }
}

/// Gives the listener of SCMP_ACT_NOTIFY to whoever waits at `listenerPath`.
fn hand_listener(config: &Config, pid: i32, listener: BorrowedFd<'_>, state: &[u8]) -> Result<()> {
    let profile = config.spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let path = profile
        .and_then(|p| p.listener_path().as_ref())
        .ok_or_else(|| Error::invalid("SCMP_ACT_NOTIFY needs seccomp.listenerPath"))?;
    let state: serde_json::Value = serde_json::from_slice(state).unwrap_or_default();
    let message = serde_json::json!({
        "ociVersion": crate::spec::VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": profile.and_then(|p| p.listener_metadata().clone()).unwrap_or_default(),
        "state": state,
    });
    let socket = tty::connect(path)?;
    crate::supervisor::wire::send(socket.as_fd(), &message, &[listener])
        .context(|| format!("send to {}", path.display()))
}

pub(crate) fn clone_flag(kind: LinuxNamespaceType) -> u64 {
    (match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => 0x80,
    }) as u64
}

pub(crate) fn open_namespace(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open namespace {}", path.display()))
}

/// Makes this process's children be born in the namespace; returns the way back.
pub(crate) fn enter_pid_namespace(namespace: BorrowedFd<'_>) -> Result<OwnedFd> {
    let own = open_namespace(Path::new("/proc/self/ns/pid"))?;
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::ProcessID))
        .context(|| "enter PID namespace".into())?;
    Ok(own)
}

/// Makes this process's children be born in its own PID namespace again.
///
/// An ordinary user, who may enter the namespaces he made, may not go back to the machine's; his runtime has done with
/// making processes then.
fn return_to(own: Option<OwnedFd>) -> Result<()> {
    let Some(own) = own else { return Ok(()) };
    match move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)) {
        Err(rustix::io::Errno::PERM) if crate::cgroups::unprivileged() => Ok(()),
        other => other.context(|| "return to our PID namespace".into()),
    }
}

fn write_maps(pid: i32, config: &Config) -> Result<()> {
    let Some(linux) = config.spec.linux() else { return Ok(()) };
    if config.namespace(LinuxNamespaceType::User) != Some(None) {
        return Ok(());
    }
    write_id_maps(pid, linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref())
}

fn write_id_maps(pid: i32, uids: Option<&[LinuxIdMapping]>, gids: Option<&[LinuxIdMapping]>) -> Result<()> {
    let text = |maps: Option<&[LinuxIdMapping]>| -> String {
        maps.into_iter().flatten().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
    };
    let proc = root::host_proc()?;
    let write = |file: &str, value: &str| root::write_below(proc.as_fd(), &format!("{pid}/{file}"), value.as_bytes());
    if !rustix::process::geteuid().is_root() {
        drop(write("setgroups", "deny"));
    }
    for (file, tool, maps) in [("uid_map", "newuidmap", uids), ("gid_map", "newgidmap", gids)] {
        if maps.is_none_or(<[_]>::is_empty) {
            continue;
        }
        match write(file, &text(maps)) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => map_with_tool(tool, pid, maps)?,
            other => other.context(|| format!("write {file} of the user namespace"))?,
        }
    }
    Ok(())
}

/// An ordinary user gets more than one id only through the set-uid tools of the shadow package.
fn map_with_tool(tool: &str, pid: i32, maps: Option<&[LinuxIdMapping]>) -> Result<()> {
    let mut command = std::process::Command::new(tool);
    command.arg(pid.to_string());
    for map in maps.into_iter().flatten() {
        command.args([map.container_id().to_string(), map.host_id().to_string(), map.size().to_string()]);
    }
    let output = command.output().context(|| format!("run {tool}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::new(Kind::System, format!("{tool}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// A user namespace per idmapped mount.
fn idmaps(config: &Config) -> Result<Vec<Option<OwnedFd>>> {
    let mut out = vec![];
    for (index, mount) in config.spec.mounts().iter().flatten().enumerate() {
        let (uids, gids) = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
        let words = mount.options().iter().flatten().any(|o| o == "idmap" || o == "ridmap");
        let linux = config.spec.linux().as_ref();
        let (uids, gids) = match (uids, gids) {
            (None, None) if words => {
                (linux.and_then(|l| l.uid_mappings().as_deref()), linux.and_then(|l| l.gid_mappings().as_deref()))
            }
            other => other,
        };
        if uids.is_none() && gids.is_none() {
            continue;
        }
        out.resize_with(index, || None);
        out.push(Some(user_namespace(uids, gids)?));
    }
    Ok(out)
}

/// Makes a user namespace with these maps and nothing in it.
fn user_namespace(uids: Option<&[LinuxIdMapping]>, gids: Option<&[LinuxIdMapping]>) -> Result<OwnedFd> {
    let maker = nix::unistd::getpid();
    match sys::clone_process(libc::CLONE_NEWUSER as u64, None).context(|| "make a user namespace".into())? {
        Cloned::Child => {
            init::die_with_maker();
            // It may have died before that word.
            while nix::unistd::getppid() == maker {
                nix::unistd::pause();
            }
            sys::exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            let made = write_id_maps(pid, uids, gids)
                .and_then(|()| open_namespace(Path::new(&format!("/proc/{pid}/ns/user"))));
            drop(sys::pidfd_kill(pidfd.as_fd(), libc::SIGKILL));
            drop(wait(pid));
            made
        }
    }
}

/// A process to run in a container that exists.
pub(crate) struct Exec<'a> {
    /// What to run.
    pub(crate) process: &'a Process,
    /// The container's init.
    pub(crate) init: BorrowedFd<'a>,
    /// Its pid.
    pub(crate) init_pid: i32,
    /// Its control group.
    pub(crate) cgroup: Option<&'a Cgroup>,
    /// Seccomp profile of the container.
    pub(crate) seccomp: Option<&'a oci_spec::runtime::LinuxSeccomp>,
    /// `user[:group]` to resolve inside instead of the process's own ids.
    pub(crate) user: Option<&'a str>,
    /// Streams, terminal, gate.
    pub(crate) wiring: Wiring,
}

/// What an exec's process needs, made before it is cloned.
pub(crate) struct PreparedExec<'a> {
    pub(crate) process: &'a Process,
    pub(crate) user: Option<&'a str>,
    pub(crate) wiring: Wiring,
    pub(crate) join: Option<Join>,
    pub(crate) seccomp: Option<Program>,
    pub(crate) pidfd: BorrowedFd<'a>,
    /// Namespaces that differ from ours.
    pub(crate) namespaces: u64,
    pub(crate) userns: bool,
    pub(crate) proc: OwnedFd,
}

impl Exec<'_> {
    /// Makes the process and sees it to its gate.
    pub(crate) fn run(self) -> Result<Launched> {
        let namespaces = differing(self.init_pid)?;
        let prepared = PreparedExec {
            process: self.process,
            user: self.user,
            wiring: self.wiring,
            join: self.cgroup.map(Cgroup::join).transpose()?,
            seccomp: self.seccomp.map(seccomp::compile).transpose()?,
            pidfd: self.init,
            namespaces: namespaces & !(libc::CLONE_NEWPID as u64),
            userns: namespaces & libc::CLONE_NEWUSER as u64 != 0,
            proc: root::host_proc()?,
        };
        let back = if namespaces & libc::CLONE_NEWPID as u64 != 0 {
            let own = open_namespace(Path::new("/proc/self/ns/pid"))?;
            nix::sched::setns(self.init, nix::sched::CloneFlags::CLONE_NEWPID)
                .context(|| "enter the container's PID namespace".into())?;
            Some(own)
        } else {
            None
        };
        make(0, prepared.join.as_ref(), back, |to| init::exec_main(&prepared, to), see_exec_through)
    }
}

fn see_exec_through(launched: &mut Launched) -> Result<()> {
    loop {
        match launched.channel.next()? {
            Some((Report::Ready, _)) => return Ok(()),
            Some((Report::Warning(text), _)) => launched.warnings.push(text),
            Some((Report::Failed(error), _)) => return Err(error),
            Some((Report::Terminal, fds)) => launched.master = fds.into_iter().next(),
            Some((Report::Listener | Report::Namespaces, _)) => {}
            None => {
                let status = wait(launched.pid);
                return Err(Error::new(Kind::System, format!("the process died while starting ({status})")));
            }
        }
    }
}

/// The namespaces of `pid` that are not ours. Joining one's own user namespace again is an error.
fn differing(pid: i32) -> Result<u64> {
    let kinds = [
        ("user", LinuxNamespaceType::User),
        ("mnt", LinuxNamespaceType::Mount),
        ("uts", LinuxNamespaceType::Uts),
        ("ipc", LinuxNamespaceType::Ipc),
        ("net", LinuxNamespaceType::Network),
        ("pid", LinuxNamespaceType::Pid),
        ("cgroup", LinuxNamespaceType::Cgroup),
        ("time", LinuxNamespaceType::Time),
    ];
    let mut flags = 0;
    for (name, kind) in kinds {
        let theirs = std::fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let theirs = match theirs {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::state("the container is not running")),
            other => other.context(|| format!("read the {name} namespace of process {pid}"))?,
        };
        let own =
            std::fs::read_link(format!("/proc/self/ns/{name}")).context(|| format!("read our {name} namespace"))?;
        if theirs != own {
            flags |= clone_flag(kind);
        }
    }
    Ok(flags)
}

/// The descriptors an init keeps of its maker's.
pub(crate) fn kept(prepared: &Prepared<'_>, channel: &Channel) -> Vec<RawFd> {
    let mut keep = vec![channel.as_fd().as_raw_fd(), prepared.proc.as_raw_fd()];
    keep.extend(prepared.joined.iter().map(|j| j.fd.as_raw_fd()));
    keep.extend(prepared.idmaps.iter().flatten().map(AsRawFd::as_raw_fd));
    keep.extend(prepared.ahead.descriptors());
    keep.extend(prepared.join.iter().flat_map(|j| &j.tasks).map(AsRawFd::as_raw_fd));
    prepared.wiring.keep(&mut keep);
    keep
}

/// The descriptors an exec'ed process keeps of its maker's.
pub(crate) fn kept_by_exec(prepared: &PreparedExec<'_>, channel: &Channel) -> Vec<RawFd> {
    let mut keep = vec![channel.as_fd().as_raw_fd(), prepared.proc.as_raw_fd(), prepared.pidfd.as_raw_fd()];
    keep.extend(prepared.join.iter().flat_map(|j| &j.tasks).map(AsRawFd::as_raw_fd));
    prepared.wiring.keep(&mut keep);
    keep
}
