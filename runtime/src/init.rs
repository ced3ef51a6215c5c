//! The container's side: from a fresh clone to the program.
//!
//! Runs in the cloned child and never returns. The order is bound by the kernel and by history: namespaces and cgroup
//! before mounts, mounts before the root changes, everything that needs the host's /proc before it is gone, privileges
//! last, seccomp as late as no_new_privs permits.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::{
    fs::{Mode, OFlags},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    devices,
    error::{Context, Error, Result},
    hooks,
    launch::{self, Console, Gate, Prepared, PreparedExec, Stdio, Wiring},
    lsm, memory_policy,
    mounts::{self, MountContext},
    passwd, process,
    process::Program,
    root::{self, Root},
    rootfs::{self, RootPlan},
    seccomp,
    sync::{Channel, Report},
    sys, tty,
};

/// Sets the container up and runs its program.
pub(crate) fn main(prepared: &Prepared<'_>, channel: &Channel) -> ! {
    die_with_maker();
    if !prepared.userns {
        hide();
    }
    sys::close_all_except(&mut launch::kept(prepared, channel));
    match set_up(prepared, channel) {
        Ok(ready) => run(ready, &prepared.wiring, channel),
        Err(error) => fail(channel, error),
    }
}

/// Joins a container and runs a program in it.
pub(crate) fn exec_main(prepared: &PreparedExec<'_>, channel: &Channel) -> ! {
    sys::close_all_except(&mut launch::kept_by_exec(prepared, channel));
    match join(prepared, channel) {
        Ok(ready) => run(ready, &prepared.wiring, channel),
        Err(error) => fail(channel, error),
    }
}

/// Until it is recorded anywhere a container must not outlive a maker that is killed. A change of user, one of the last
/// steps, ends this; so does [`finish`].
pub(crate) fn die_with_maker() {
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
}

/// Until the program runs, processes that share the PID namespace may not look into this one, which holds descriptors of
/// the host (CVE-2016-9962). In a user namespace of its own only from [`finish`] on: before, its maker writes its maps.
fn hide() {
    let _ = nix::sys::prctl::set_dumpable(false);
}

fn fail(channel: &Channel, error: Error) -> ! {
    let code = error.exit_code();
    drop(channel.report(&Report::Failed(error.short()), None));
    sys::exit_now(code)
}

/// A process at its gate.
struct Ready {
    program: Program,
    /// To be installed last.
    seccomp: Option<seccomp::Program>,
    /// `startContainer` hooks and the state they are told.
    hooks: Option<(Vec<oci_spec::runtime::Hook>, Vec<u8>)>,
}

fn run(ready: Ready, wiring: &Wiring, channel: &Channel) -> ! {
    let error = match wait_and_run(&ready, wiring, channel) {
        Ok(never) => match never {},
        Err(error) => error.short(),
    };
    let code = error.exit_code();
    match &wiring.gate {
        Gate::Launcher => channel.fail_plainly(error),
        Gate::Fifo { errors, .. } => {
            if let Ok(bytes) = serde_json::to_vec(&error) {
                let _ = rustix::io::write(errors, &bytes);
            }
        }
    }
    sys::exit_now(code)
}

fn wait_and_run(ready: &Ready, wiring: &Wiring, channel: &Channel) -> Result<std::convert::Infallible> {
    match &wiring.gate {
        Gate::Launcher => channel.wait()?,
        Gate::Fifo { fifo, .. } => {
            rustix::io::read(fifo, &mut [0u8; 1][..]).context(|| "wait for start".into())?;
        }
    }
    if let Some((hooks, state)) = &ready.hooks {
        hooks::run("startContainer", Some(hooks), state)?;
    }
    sys::reset_signals();
    if let Some(program) = &ready.seccomp {
        sys::install_seccomp(&program.instructions, program.flags).context(|| "install seccomp filter".into())?;
    }
    Err(ready.program.execute())
}

fn set_up(p: &Prepared<'_>, channel: &Channel) -> Result<Ready> {
    let spec = &p.config.spec;
    let linux = spec.linux().as_ref().ok_or_else(|| Error::invalid("linux is missing"))?;
    let process = p.config.process()?;
    let mut warn = |text: String| drop(channel.report(&Report::Warning(text), None));
    p.config.warnings.iter().cloned().for_each(&mut warn);
    rustix::process::umask(Mode::empty());
    let hook_state = namespaces(p, channel)?;
    rustix::process::setsid().context(|| "setsid".into())?;
    process::set_limits(process, p.proc.as_fd(), &mut warn)?;
    let state = hook_state.unwrap_or_default();
    let directory = p.config.rootfs();
    let plan = RootPlan {
        bundle: &p.config.bundle,
        directory: &directory,
        rootfs: p.rootfs,
        made: p.ahead.root.as_ref().map(AsFd::as_fd),
        propagation: p.propagation,
    };
    let root = rootfs::prepare(&plan)?;
    let null = device_null()?;
    let context = MountContext {
        root: &root,
        bundle: &p.config.bundle,
        cgroup: &p.cgroup_view,
        userns: p.userns,
        idmaps: &p.idmaps,
        ahead: &p.ahead,
        label: linux.mount_label().as_deref().filter(|l| !l.is_empty()),
        warn: &|text| drop(channel.report(&Report::Warning(text), None)),
    };
    let kernel = mounts::mount_all(&context, spec.mounts().as_deref().unwrap_or_default())?;
    if !binds_dev(spec) {
        devices::populate(&root, linux.devices().as_deref().unwrap_or_default(), p.userns)?;
    }
    let terminal = terminal(process, &root, &p.wiring.console, channel, true)?;
    sysctls(p)?;
    if let Some(all) = spec.hooks() {
        hooks::run("createContainer", all.create_container().as_ref(), &seen_inside(&state, "creating"))?;
    }
    for path in linux.readonly_paths().iter().flatten() {
        kernel.make_read_only(&root, Path::new(path))?;
    }
    for path in linux.masked_paths().iter().flatten() {
        kernel.mask(&root, Path::new(path), null.as_fd())?;
    }
    process::ensure_cwd(&root, process.cwd());
    let read_only = spec.root().as_ref().and_then(|r| r.readonly()).unwrap_or(false);
    if p.no_pivot {
        rootfs::enter_by_move(&root)?
    } else {
        rootfs::enter(&root)?
    }
    rootfs::finish(root.as_fd(), read_only, p.propagation)?;
    if let Some(policy) = linux.memory_policy() {
        memory_policy::apply(policy)?;
    }
    if let Some(personality) = linux.personality() {
        process::set_personality(personality)?;
    }
    stdio(&p.wiring.stdio, terminal.as_ref(), null.as_fd(), process)?;
    let hooks = spec.hooks().as_ref().and_then(|h| h.start_container().clone()).filter(|h| !h.is_empty());
    finish(Finish {
        process,
        root: &root,
        seccomp: p.seccomp.as_ref(),
        wiring: &p.wiring,
        channel,
        userns: p.userns,
        home: None,
        hooks: hooks.map(|h| (h, seen_inside(&state, "created"))),
        proc: p.proc.as_fd(),
    })
}

/// The state for hooks that run in the container, where its process has another pid.
fn seen_inside(state: &[u8], status: &str) -> Vec<u8> {
    let Ok(mut state) = serde_json::from_slice::<serde_json::Value>(state) else { return vec![] };
    state["pid"] = std::process::id().into();
    state["status"] = status.into();
    state.to_string().into_bytes()
}

/// Joins and makes namespaces and joins the cgroup; the container's state for hooks when the maker sent one.
fn namespaces(p: &Prepared<'_>, channel: &Channel) -> Result<Option<Vec<u8>>> {
    let spec = &p.config.spec;
    if let Some(join) = &p.join {
        join.enter()?;
    }
    for joined in &p.joined {
        nix::sched::setns(&joined.fd, nix::sched::CloneFlags::from_bits_retain(launch::clone_flag(joined.kind) as i32))
            .context(|| format!("enter {:?} namespace", joined.kind))?;
    }
    let hooks = spec.hooks().is_some();
    let maps = p.flags & libc::CLONE_NEWUSER as u64 != 0;
    let state = if hooks || maps || p.config.net_devices().is_some() {
        channel.report(&Report::Namespaces, None)?;
        Some(channel.word()?)
    } else {
        None
    };
    if p.userns {
        become_root()?;
    }
    if p.unshare_cgroup {
        // After joining: the namespace's root is the group the process is in.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP).context(|| "unshare cgroup namespace".into())?;
    }
    if p.unshare_time {
        time_namespace(p)?;
    }
    if p.config.namespace(LinuxNamespaceType::Uts) == Some(None) {
        if let Some(name) = spec.hostname().as_ref().filter(|h| !h.is_empty()) {
            rustix::system::sethostname(name.as_bytes()).context(|| format!("set hostname {name:?}"))?;
        }
        if let Some(name) = spec.domainname().as_ref().filter(|d| !d.is_empty()) {
            rustix::system::setdomainname(name.as_bytes()).context(|| format!("set domainname {name:?}"))?;
        }
    }
    Ok(state)
}

fn become_root() -> Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context(|| "become gid 0 of the user namespace".into())?;
    setresuid(uid, uid, uid).context(|| "become uid 0 of the user namespace".into())?;
    let _ = setgroups(&[]);
    Ok(())
}

fn time_namespace(p: &Prepared<'_>) -> Result<()> {
    let newtime = nix::sched::CloneFlags::from_bits_retain(0x80);
    nix::sched::unshare(newtime).context(|| "unshare time namespace".into())?;
    let offsets = p.config.spec.linux().as_ref().and_then(|l| l.time_offsets().as_ref());
    for (clock, offset) in offsets.into_iter().flatten() {
        let line = format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        root::write_below(p.proc.as_fd(), "self/timens_offsets", line.as_bytes())
            .context(|| format!("set time offset {line:?}"))?;
    }
    let file =
        rustix::fs::openat(&p.proc, "self/ns/time_for_children", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .context(|| "open time namespace".into())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Time)).context(|| "enter time namespace".into())
}

fn binds_dev(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|m| {
        m.destination().as_path() == Path::new("/dev")
            && (m.typ().as_deref() == Some("bind") || m.options().iter().flatten().any(|o| o == "bind" || o == "rbind"))
    })
}

fn sysctls(p: &Prepared<'_>) -> Result<()> {
    let sysctls = p.config.spec.linux().as_ref().and_then(|l| l.sysctl().as_ref());
    for (name, value) in sysctls.into_iter().flatten() {
        set_sysctl(p.proc.as_fd(), name, value)?;
    }
    Ok(())
}

/// Sets a sysctl through a procfs known to be one. `net.ipv4.conf.eth0/1.x` keeps dots by writing them as slashes.
pub(crate) fn set_sysctl(proc: BorrowedFd<'_>, name: &str, value: &str) -> Result<()> {
    let path: String = if name.contains('/') && !name.contains('.') {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect()
    };
    root::write_below(proc, &format!("sys/{path}"), value.as_bytes()).context(|| format!("set sysctl {name}={value}"))
}

fn device_null() -> Result<OwnedFd> {
    let fd = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /dev/null".into())?;
    let stat = rustix::fs::fstat(&fd).context(|| "stat /dev/null".into())?;
    if stat.st_rdev != rustix::fs::makedev(1, 3) {
        return Err(Error::invalid("/dev/null is not the null device"));
    }
    Ok(fd)
}

/// Makes the process's terminal and hands its master on.
fn terminal(
    process: &Process,
    root: &Root,
    console: &Console,
    channel: &Channel,
    bind_console: bool,
) -> Result<Option<OwnedFd>> {
    if process.terminal() != Some(true) {
        return Ok(None);
    }
    let size = process.console_size().as_ref().map(|s| (s.height() as u16, s.width() as u16));
    let terminal = tty::open(root, size, bind_console)?;
    match console {
        Console::Launcher => channel.report(&Report::Terminal, Some(terminal.master.as_fd()))?,
        Console::Socket(socket) => tty::send_to_console(socket.as_fd(), terminal.master.as_fd())?,
    }
    Ok(Some(terminal.slave))
}

fn stdio(stdio: &Stdio, slave: Option<&OwnedFd>, null: BorrowedFd<'_>, process: &Process) -> Result<()> {
    if let Some(slave) = slave {
        tty::own(slave, process.user().uid());
        return tty::take(slave);
    }
    if let Stdio::Given([stdin, stdout, stderr]) = stdio {
        let or_null = |fd: &Option<OwnedFd>| -> io::Result<OwnedFd> {
            fd.as_ref().map_or(null, AsFd::as_fd).try_clone_to_owned()
        };
        // Copies above 2 first: a given descriptor may itself be 0, 1 or 2.
        let (i, o, e) = (or_null(stdin), or_null(stdout), or_null(stderr));
        let what = || "set up standard streams".to_owned();
        let (i, o, e) = (i.context(what)?, o.context(what)?, e.context(what)?);
        for (stream, fd) in [(0, i), (1, o), (2, e)] {
            sys::dup_to_stream(fd.as_fd(), stream).context(what)?;
        }
    }
    tty::own_stdio(process.user().uid());
    Ok(())
}

fn join(p: &PreparedExec<'_>, channel: &Channel) -> Result<Ready> {
    let mut warn = |text: String| drop(channel.report(&Report::Warning(text), None));
    if !p.userns {
        hide();
    }
    let affinity = p.process.exec_cpu_affinity().as_ref();
    if let Some(cpus) = affinity.and_then(|a| a.initial().as_deref()) {
        process::set_affinity(cpus)?;
    }
    if let Some(join) = &p.join {
        join.enter()?;
    }
    if let Some(affinity) = affinity {
        // Without a final word whatever the container may use.
        process::set_affinity(affinity.cpu_affinity_final().as_deref().unwrap_or("0-1023"))?;
    }
    process::set_limits(p.process, p.proc.as_fd(), &mut warn)?;
    let null = device_null()?;
    let flags = nix::sched::CloneFlags::from_bits_retain(p.namespaces as i32);
    if !flags.is_empty() {
        nix::sched::setns(p.pidfd, flags).context(|| "enter the container's namespaces".into())?;
    }
    if p.userns {
        become_root()?;
    }
    rustix::process::setsid().context(|| "setsid".into())?;
    rustix::process::chdir("/").context(|| "enter the container's root".into())?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open the container's root".into())?;
    let root = Root::new(root);
    let mut process = p.process.clone();
    let mut home = None;
    if let Some(user) = p.user {
        let identity =
            passwd::resolve(user, &passwd::read(&root, "/etc/passwd")?, &passwd::read(&root, "/etc/group")?)?;
        home = identity.home;
        let user = process.user_mut();
        user.set_uid(identity.uid).set_gid(identity.gid);
        let mut groups = user.additional_gids().clone().unwrap_or_default();
        groups.extend(identity.groups);
        user.set_additional_gids(Some(groups));
    }
    let slave = terminal(&process, &root, &p.wiring.console, channel, false)?;
    stdio(&p.wiring.stdio, slave.as_ref(), null.as_fd(), &process)?;
    finish(Finish {
        process: &process,
        root: &root,
        seccomp: p.seccomp.as_ref(),
        wiring: &p.wiring,
        channel,
        userns: p.userns,
        home,
        hooks: None,
        proc: p.proc.as_fd(),
    })
}

struct Finish<'a> {
    process: &'a Process,
    root: &'a Root,
    seccomp: Option<&'a seccomp::Program>,
    wiring: &'a Wiring,
    channel: &'a Channel,
    userns: bool,
    home: Option<String>,
    hooks: Option<(Vec<oci_spec::runtime::Hook>, Vec<u8>)>,
    proc: BorrowedFd<'a>,
}

/// The last steps that need privilege, and those that drop it.
fn finish(f: Finish<'_>) -> Result<Ready> {
    let process = f.process;
    if !f.wiring.keep_keyring
        && let Err(e) = sys::new_session_keyring()
        && !matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
    {
        return Err(Error::system("make a session keyring (--no-new-keyring leaves it out)", e));
    }
    sys::close_on_exec_from(3 + f.wiring.preserve).context(|| "mark descriptors close-on-exec".into())?;
    let mut home = f.home;
    let has_home = process.env().iter().flatten().any(|e| e.strip_prefix("HOME=").is_some_and(|h| !h.is_empty()));
    if home.is_none() && !has_home {
        // A hostile passwd file only costs the process its HOME.
        home = passwd::read(f.root, "/etc/passwd").ok().and_then(|t| passwd::home_of(process.user().uid(), &t));
    }
    rustix::process::umask(Mode::from_raw_mode(process.user().umask().unwrap_or(0o022)));
    // While it is still allowed: no_new_privs forbids some changes of label.
    lsm::label_next_exec(process, f.proc)?;
    let no_new_privs = process.no_new_privileges() == Some(true);
    if no_new_privs {
        nix::sys::prctl::set_no_new_privs().context(|| "set no_new_privs".into())?;
    }
    let mut late = f.seccomp.cloned();
    // Without no_new_privs installing a filter takes CAP_SYS_ADMIN, which is about to go. With a listener it must be
    // handed over while the maker still listens.
    if late.as_ref().is_some_and(|s| !no_new_privs || s.notifies)
        && let Some(program) = late.take()
    {
        let listener =
            sys::install_seccomp(&program.instructions, program.flags).context(|| "install seccomp filter".into())?;
        if let Some(listener) = listener {
            f.channel.report(&Report::Listener, Some(listener.as_fd()))?;
        }
    }
    if f.userns {
        hide();
    }
    // As root first: a directory only root may enter is still the one that was asked for.
    let entered = process::enter_cwd(process.cwd());
    process::become_user(process, f.userns, &mut |text| drop(f.channel.report(&Report::Warning(text), None)))?;
    if entered.is_err() {
        process::enter_cwd(process.cwd())?;
    }
    let program = Program::find(process, home)?;
    nix::sys::prctl::set_pdeathsig(None).context(|| "outlive the runtime".into())?;
    f.channel.report(&Report::Ready, None)?;
    Ok(Ready { program, seccomp: late, hooks: f.hooks })
}
