//! Becoming a pod's supervisor: leave the caller, enter the pod's namespaces and cgroup.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::sched::CloneFlags;
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::{
    protocol::{PidMode, PodConfig, VERSION},
    server::Server,
};
use crate::{
    cgroups::{Cgroup, Layout, Scope},
    error::{Context, Error, Result},
    init, root,
    sys::{self, Cloned},
};

/// PID 1 of a pod whose containers share a PID namespace.
#[derive(Debug)]
pub(crate) struct PodInit {
    /// Its pid here.
    pub(crate) pid: i32,
    /// The namespace.
    pub(crate) namespace: OwnedFd,
    /// Open for as long as this process lives.
    _alive: OwnedFd,
}

/// Runs `supervise DIR`: leaves the caller, becomes the pod's supervisor, and tells the caller in one line.
///
/// Returns in the caller with that line and its exit code; the supervisor itself never returns.
///
/// # Errors
/// When not even a process can be made.
pub fn supervise(dir: &Path) -> Result<(String, i32)> {
    let dir = std::path::absolute(dir).context(|| format!("resolve {}", dir.display()))?;
    let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "make a pipe".into())?;
    match sys::clone_process(0, None).context(|| "clone the supervisor".into())? {
        Cloned::Child => {
            sys::close_all_except(&mut [theirs.as_raw_fd()]);
            std::mem::forget(ours);
            let code = run(&dir, theirs);
            sys::exit_now(code)
        }
        Cloned::Parent { .. } => {
            drop(theirs);
            let mut line = std::io::read_to_string(File::from(ours)).context(|| "read from the supervisor".into())?;
            if line.is_empty() {
                line = "error: the supervisor died while starting".to_owned();
            }
            let code = i32::from(!line.starts_with("ready"));
            Ok((line.trim_end().to_owned(), code))
        }
    }
}

fn run(dir: &Path, told: OwnedFd) -> i32 {
    match set_up(dir) {
        Ok(mut server) => {
            let _ = rustix::io::write(&told, b"ready\n");
            drop(told);
            redirect(dir);
            server.run()
        }
        Err(error) => {
            let _ = rustix::io::write(&told, format!("error: {error}\n").as_bytes());
            1
        }
    }
}

/// From here on messages go to the pod's own file.
fn redirect(dir: &Path) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
    let log = rustix::fs::open(dir.join("supervisor.log"), flags, Mode::from_raw_mode(0o640))
        .or_else(|_| rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()));
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    if let (Ok(log), Ok(null)) = (log, null) {
        drop(sys::dup_to_stream(null.as_fd(), 0));
        drop(sys::dup_to_stream(log.as_fd(), 1));
        drop(sys::dup_to_stream(log.as_fd(), 2));
    }
}

fn set_up(dir: &Path) -> Result<Server> {
    let _ = rustix::process::setsid();
    let path = dir.join("pod.json");
    let raw = crate::config::read_limited(&path)?;
    let pod: PodConfig =
        serde_json::from_slice(&raw).map_err(|e| Error::invalid(format!("parse {}: {e}", path.display())))?;
    if pod.version > VERSION {
        // What it says beyond our knowledge may be what keeps the pod apart from others.
        let version = pod.version;
        return Err(Error::invalid(format!(
            "{} is of protocol version {version}, isopod-runtime speaks {VERSION}: it is older than the agent",
            path.display()
        )));
    }
    let lock = lock(dir)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context(|| "become a subreaper".into())?;
    // The agent keeps its own heap out of huge pages, and this is inherited: whether a pod uses them is its own affair.
    nix::sys::prctl::set_thp_disable(false).context(|| "allow huge pages".into())?;
    let _ = rustix::thread::set_name(c"isopod-pod");
    let group = Cgroup::plan_on(Layout::detect()?, &format!("{}/supervisor", pod.cgroup), None)?;
    if dir.join("supervisor.pid").exists() && group.directories().any(|group| group.exists()) {
        // A former supervisor's: the pod's init, processes that were not yet in their containers' groups.
        group.kill_and_wait()?;
    }
    if let Some(scope) = Scope::at(&pod.cgroup) {
        enter_scope(&scope, &group)?;
    }
    group.create()?;
    group.enter()?;
    enter_namespaces(&pod)?;
    let pod_init = (pod.pid == PidMode::Pod).then(start_pod_init).transpose()?;
    fs::write(dir.join("supervisor.pid"), format!("{}\n", rustix::process::getpid().as_raw_nonzero()))
        .context(|| format!("write {}", dir.join("supervisor.pid").display()))?;
    Server::new(dir.to_owned(), pod, group, pod_init, lock)
}

/// Has systemd make the pod's group, delegated to us: below it systemd does not interfere. We leave its top before it hands
/// controllers down: with a process there the kernel would make it a tree of threads.
fn enter_scope(scope: &Scope, group: &Cgroup) -> Result<()> {
    scope.start_around_us()?;
    for dir in group.directories() {
        fs::create_dir_all(&dir).context(|| format!("create {}", dir.display()))?;
    }
    group.enter()
}

/// One supervisor per pod.
fn lock(dir: &Path) -> Result<OwnedFd> {
    let path = dir.join("supervisor.lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let fd =
        rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)).context(|| format!("open {}", path.display()))?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(fd),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::state("another supervisor serves this pod")),
        Err(e) => Err(Error::system(format!("lock {}", path.display()), e)),
    }
}

fn enter_namespaces(pod: &PodConfig) -> Result<()> {
    if let Some(netns) = &pod.netns {
        let file = File::open(netns).context(|| format!("open network namespace {}", netns.display()))?;
        nix::sched::setns(&file, CloneFlags::CLONE_NEWNET)
            .context(|| format!("enter network namespace {}", netns.display()))?;
    }
    if let Some(hostname) = &pod.hostname {
        nix::sched::unshare(CloneFlags::CLONE_NEWUTS).context(|| "unshare the UTS namespace".into())?;
        rustix::system::sethostname(hostname.as_bytes()).context(|| format!("set hostname {hostname:?}"))?;
    }
    if !pod.host_ipc {
        nix::sched::unshare(CloneFlags::CLONE_NEWIPC).context(|| "unshare the IPC namespace".into())?;
    }
    let proc = root::host_proc()?;
    for (name, value) in &pod.sysctls {
        let allowed = name.starts_with("net.") && pod.netns.is_some()
            || (name.starts_with("kernel.") || name.starts_with("fs.mqueue.")) && !pod.host_ipc;
        if !allowed {
            return Err(Error::invalid(format!("sysctl {name} is not in a separate namespace")));
        }
        init::set_sysctl(proc.as_fd(), name, value)?;
    }
    Ok(())
}

/// Clones a process that does nothing but reap, as PID 1 of a new namespace.
fn start_pod_init() -> Result<PodInit> {
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(|| "make a pipe".into())?;
    match sys::clone_process(libc::CLONE_NEWPID as u64, None).context(|| "clone the pod's init".into())? {
        Cloned::Child => {
            // Without its supervisor nobody would know of it; the namespace's processes go with it.
            init::die_with_maker();
            // The caller waits for the end of our streams; this process must not hold them.
            if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
                for stream in 0..3 {
                    drop(sys::dup_to_stream(null.as_fd(), stream));
                }
                std::mem::forget(null);
            }
            sys::close_all_except(&mut [theirs.as_raw_fd()]);
            std::mem::forget(ours);
            if hung_up(theirs.as_fd()) {
                // The supervisor died before that word.
                sys::exit_now(1);
            }
            drop(theirs);
            let _ = rustix::thread::set_name(c"pause");
            let _ = rustix::process::setsid();
            reap_forever()
        }
        Cloned::Parent { pid, .. } => {
            let namespace =
                File::open(format!("/proc/{pid}/ns/pid")).context(|| "open the pod's PID namespace".into())?;
            Ok(PodInit { pid, namespace: namespace.into(), _alive: ours })
        }
    }
}

/// Whether the other end of a pipe is closed.
fn hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())), Ok(1..))
}

fn reap_forever() -> ! {
    use nix::sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    };
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let _ = children.thread_block();
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        let _ = children.wait();
    }
}
