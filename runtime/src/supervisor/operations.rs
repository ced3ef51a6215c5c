//! What a supervisor does for a request.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, LinuxSeccomp, Process};
use rustix::{
    event::epoll,
    termios::{Winsize, tcsetwinsize},
};

use super::{
    container::{Attached, Container, Held, Pipes, config_path, ready_output, set_nonblocking},
    log::{LogWriter, Rotation, Stream},
    protocol::{
        Answer, ContainerState, ContainerStatus, Failure, FailureKind, OLDEST, Op, PidMode, Rootfs, VERSION, WinSize,
    },
    server::{ExecProcess, Server, Source},
    status::{self, Durability},
};
use crate::{
    cgroups::Cgroup,
    config::{self, Config},
    error::{Context, Error, Kind, Result},
    launch::{Exec, Launch, Stdio, Wiring},
    sys,
    time::now_nanos,
};

type Outcome = Result<(Answer, Vec<OwnedFd>), Failure>;

impl Server {
    pub(super) fn perform(&mut self, client: u64, op: Op, fds: Vec<OwnedFd>) -> Outcome {
        let answer = match op {
            Op::Hello { version } if version < OLDEST => {
                let message =
                    format!("version {version} of the protocol is not spoken any more, the oldest is {OLDEST}");
                return Err(Failure { kind: FailureKind::Invalid, message });
            }
            Op::Hello { version } => Answer::Hello { version: version.min(VERSION) },
            Op::Create { container, bundle, rootfs, log_path, stdin, stdin_once, pid_of } => {
                let log = log_path.as_deref();
                let target = pid_of.as_deref();
                let pid = self.create(&container, &bundle, &rootfs, log, [stdin, stdin_once], target)?;
                Answer::Created { pid }
            }
            Op::Start { container } => self.start(&container)?,
            Op::Kill { container, signal, all } => self.kill(&container, signal, all)?,
            Op::Delete { container } => self.delete(&container)?,
            Op::Exec { container, exec, process, stdin, stdout, stderr } => {
                return self.exec(client, &container, exec, process, [stdin, stdout, stderr], fds);
            }
            Op::KillExec { exec, signal } => self.kill_exec(&exec, signal)?,
            Op::Attach { container, stdin, stdout, stderr } => {
                self.attach(&container, take_marked([stdin, stdout, stderr], fds)?)?
            }
            Op::Resize { target, size } => self.resize(&target, size)?,
            Op::Update { container, resources } => self.update(&container, resources)?,
            Op::ReopenLog { container } => {
                if let Some(log) = &mut self.container(&container)?.log {
                    log.reopen().context(|| format!("reopen the log of container {container}"))?;
                }
                Answer::Done
            }
            Op::List => self.list(),
            Op::Subscribe => {
                self.subscribe(client);
                self.list()
            }
            Op::Shutdown => {
                self.shut_down()?;
                Answer::Done
            }
        };
        Ok((answer, vec![]))
    }

    fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::new(Kind::NotFound, format!("no container {id}")))
    }

    fn create(
        &mut self,
        id: &str,
        bundle: &Path,
        rootfs: &Rootfs,
        log_path: Option<&Path>,
        stdin: [bool; 2],
        pid_of: Option<&str>,
    ) -> Result<i32> {
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(Error::invalid(format!("container id {id:?} is no file name")));
        }
        if self.containers.contains_key(id) {
            return Err(Error::state(format!("container {id} exists already")));
        }
        let mut config = Config::load(bundle)?;
        let target = pid_of.map(|target| self.pid_namespace_of(target)).transpose()?.flatten();
        self.share_namespaces(&mut config, target.is_some());
        let configured = config.spec.linux().as_ref().and_then(|l| l.cgroups_path().as_ref());
        let path = self.container_cgroup(id, configured.and_then(|p| p.to_str()));
        let resources = config.spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        let cgroup = Cgroup::plan(&path, resources)?;
        let made = self.launch(id, &config, rootfs, log_path, stdin, target, cgroup.clone());
        match made {
            Ok(pid) => Ok(pid),
            Err(error) => {
                self.close_streams(id);
                self.containers.remove(id);
                drop(cgroup.kill_and_wait().and_then(|()| cgroup.remove()));
                drop(status::remove(&self.dir, id));
                Err(error)
            }
        }
    }

    /// What the pod shares is inherited from this process; a namespace of its own would cut the container off.
    fn share_namespaces(&self, config: &mut Config, targeted: bool) {
        let own_pid = self.pod.pid == PidMode::Container && !targeted;
        let Some(linux) = config.spec.linux_mut() else { return };
        if let Some(namespaces) = linux.namespaces_mut() {
            namespaces.retain(|n| {
                let new = n.path().as_ref().is_none_or(|p| p.as_os_str().is_empty());
                match n.typ() {
                    LinuxNamespaceType::Network | LinuxNamespaceType::Uts | LinuxNamespaceType::Ipc => !new,
                    LinuxNamespaceType::Pid => own_pid && new,
                    _ => true,
                }
            });
        }
        config.spec.set_hostname(None).set_domainname(None);
    }

    /// What to enter for the PID namespace of a running container: its init's pidfd. `None` where all share one anyway.
    fn pid_namespace_of(&mut self, target: &str) -> Result<Option<OwnedFd>> {
        if self.pod.pid != PidMode::Container {
            return Ok(None);
        }
        let container = self.container(target)?;
        match &container.pidfd {
            Some(fd) if container.status.state == ContainerState::Running => {
                fd.try_clone().map(Some).context(|| "copy a descriptor".into())
            }
            _ => Err(Error::state(format!("container {target} is not running"))),
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn launch(
        &mut self,
        id: &str,
        config: &Config,
        rootfs: &Rootfs,
        log_path: Option<&Path>,
        [stdin, stdin_once]: [bool; 2],
        target: Option<OwnedFd>,
        mut cgroup: Cgroup,
    ) -> Result<i32> {
        let rotation = Rotation { max_size: self.pod.log_max_size, max_files: self.pod.log_max_files };
        let log = log_path
            .map(|p| LogWriter::open(p, rotation).context(|| format!("open log {}", p.display())))
            .transpose()?;
        let resources = config.spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        status::plan(&self.dir, id, cgroup.path()).context(|| format!("record container {id}"))?;
        cgroup.create()?;
        if let Some(resources) = resources {
            cgroup.apply(resources)?;
        }
        cgroup.apply_devices(resources)?;
        let terminal = config.process()?.terminal() == Some(true);
        let (stdio, input, output) = if terminal {
            (Stdio::Given([None, None, None]), None, None)
        } else {
            let pipes = Pipes::new(stdin)?;
            (pipes.stdio, pipes.stdin, Some(pipes.output))
        };
        let pod_init = self.pod_init.as_ref();
        let pid_namespace = match target {
            Some(target) => Some(target),
            None => pod_init.map(|i| i.namespace.try_clone().context(|| "copy a descriptor".into())).transpose()?,
        };
        if self.pod.pid == PidMode::Pod && pid_namespace.is_none() {
            return Err(Error::state("the pod's PID namespace is gone"));
        }
        let state = |pid: i32| hook_state(id, &config.bundle, pid);
        let mut launched = Launch {
            config,
            rootfs,
            cgroup: Some(&cgroup),
            wiring: Wiring { stdio, ..Wiring::default() },
            no_pivot: false,
            pid_namespace,
            state: &state,
        }
        .run()?;
        for warning in launched.warnings.drain(..) {
            eprintln!("container {id}: {warning}");
        }
        let pid = launched.pid;
        let master = launched.master.take();
        let status = ContainerStatus {
            id: id.to_owned(),
            state: ContainerState::Created,
            pid: Some(pid),
            created_at: now_nanos(),
            started_at: None,
            exit: None,
        };
        status::write(&self.dir, &status, Durability::Relaxed)
            .context(|| format!("record container {id}"))
            .inspect_err(|_| end_quietly(&cgroup, pid))?;
        let pidfd = launched.pidfd.try_clone().ok();
        let container = Container {
            status,
            bundle: config.bundle.clone(),
            cgroup,
            launched: Some(launched),
            pidfd,
            output: [None, None],
            master: None,
            stdin: input.map(|fd| (fd, None)),
            stdin_once,
            held: stdin_once.then(Held::default),
            log,
            attached: vec![],
        };
        self.containers.insert(id.to_owned(), container);
        self.watch_streams(id, output, master)?;
        Ok(pid)
    }

    fn watch_streams(&mut self, id: &str, output: Option<[OwnedFd; 2]>, master: Option<OwnedFd>) -> Result<()> {
        if let Some([stdout, stderr]) = output {
            for (fd, stream) in [(stdout, Stream::Stdout), (stderr, Stream::Stderr)] {
                let source = Source::Output { container: id.to_owned(), stream };
                let token = self.watch(fd.as_fd(), source, epoll::EventFlags::IN)?;
                self.container(id)?.output[stream as usize] = Some((fd, token));
            }
        }
        if let Some(master) = master {
            set_nonblocking(master.as_fd()).context(|| "set the terminal nonblocking".into())?;
            let source = Source::Master { container: id.to_owned() };
            let token = self.watch(master.as_fd(), source, epoll::EventFlags::IN)?;
            self.container(id)?.master = Some((master, token));
        }
        Ok(())
    }

    fn start(&mut self, id: &str) -> Result<Answer> {
        let container = self.container(id)?;
        let Some(launched) = container.launched.take().filter(|_| container.status.state == ContainerState::Created)
        else {
            return Err(Error::state(format!("container {id} is not waiting to be started")));
        };
        launched.start()?;
        let started_at = now_nanos();
        container.status.state = ContainerState::Running;
        container.status.started_at = Some(started_at);
        let status = container.status.clone();
        status::write(&self.dir, &status, Durability::Relaxed).context(|| format!("record container {id}"))?;
        Ok(Answer::Started { pid: status.pid.unwrap_or(0), started_at })
    }

    fn kill(&mut self, id: &str, signal: i32, all: bool) -> Result<Answer> {
        let container = self.container(id)?;
        if !container.is_alive() {
            return Ok(Answer::Done);
        }
        if all {
            container.cgroup.signal_all(signal)?;
        } else if let Some(pidfd) = &container.pidfd {
            match sys::pidfd_kill(pidfd.as_fd(), signal) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(Error::system(format!("signal container {id}"), e));
                }
                _ => {}
            }
        }
        Ok(Answer::Done)
    }

    fn delete(&mut self, id: &str) -> Result<Answer> {
        let Some(container) = self.containers.get(id) else { return Ok(Answer::Done) };
        if container.status.state == ContainerState::Running {
            return Err(Error::state(format!("container {id} is running")));
        }
        self.end_and_forget(id)?;
        Ok(Answer::Done)
    }

    /// Kills what lives of a container, waits for its end, and removes its traces.
    pub(super) fn end_and_forget(&mut self, id: &str) -> Result<()> {
        let Some(container) = self.containers.get(id) else { return Ok(()) };
        if container.is_alive() {
            if let Some(pidfd) = &container.pidfd {
                drop(sys::pidfd_kill(pidfd.as_fd(), libc::SIGKILL));
                let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
                let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
                let _ = rustix::event::poll(&mut fds, Some(&timeout));
            }
            self.reap();
        }
        let Some(container) = self.containers.get(id) else { return Ok(()) };
        container.cgroup.kill_and_wait()?;
        container.cgroup.remove()?;
        self.close_streams(id);
        status::remove(&self.dir, id).context(|| format!("remove the state of container {id}"))?;
        self.containers.remove(id);
        Ok(())
    }

    fn exec(
        &mut self,
        client: u64,
        id: &str,
        exec: String,
        process: serde_json::Value,
        marked: [bool; 3],
        fds: Vec<OwnedFd>,
    ) -> Outcome {
        let given = take_marked(marked, fds)?;
        let process: Process = serde_json::from_value(process)
            .map_err(|e| Error::invalid(format!("exec {exec}: malformed process: {e}")))?;
        config::validate_process(&process)?;
        if self.execs.contains_key(&exec) {
            return Err(Error::state(format!("exec {exec} exists already")).into());
        }
        let container = self.container(id)?;
        let (Some(pidfd), Some(pid), ContainerState::Running) =
            (&container.pidfd, container.status.pid, container.status.state)
        else {
            return Err(Error::state(format!("container {id} is not running")).into());
        };
        let seccomp = seccomp_of(&container.bundle)?;
        let mut launched = Exec {
            process: &process,
            init: pidfd.as_fd(),
            init_pid: pid,
            cgroup: Some(&container.cgroup),
            seccomp: seccomp.as_ref(),
            user: None,
            wiring: Wiring { stdio: Stdio::Given(given), ..Wiring::default() },
        }
        .run()?;
        for warning in launched.warnings.drain(..) {
            eprintln!("exec {exec}: {warning}");
        }
        let master = launched.master.take();
        let passed = master.as_ref().map(OwnedFd::try_clone).transpose();
        let passed = passed.context(|| "copy the terminal".into())?;
        let pid = launched.pid;
        if let Err(error) = launched.start() {
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            return Err(error.into());
        }
        self.execs.insert(exec, ExecProcess { container: id.to_owned(), pid, client, master });
        Ok((Answer::Started { pid, started_at: now_nanos() }, passed.into_iter().collect()))
    }

    fn kill_exec(&mut self, exec: &str, signal: i32) -> Result<Answer> {
        let process = self.execs.get(exec).ok_or_else(|| Error::new(Kind::NotFound, format!("no exec {exec}")))?;
        // It is our child and not yet reaped, so the pid is still its own.
        match sys::kill(process.pid, signal) {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => Err(Error::system(format!("signal exec {exec}"), e)),
            _ => Ok(Answer::Done),
        }
    }

    fn attach(&mut self, id: &str, ends: [Option<OwnedFd>; 3]) -> Result<Answer> {
        let container = self.container(id)?;
        if !container.is_alive() {
            return Err(Error::state(format!("container {id} has ended")));
        }
        let [stdin, stdout, stderr] = ends;
        for fd in [&stdout, &stderr].into_iter().flatten() {
            ready_output(fd).context(|| "ready a client's descriptor".into())?;
        }
        let mut attached = Attached { stdout, stderr, ..Attached::default() };
        let takes_input = container.input().is_some();
        if let Some(fd) = stdin.filter(|_| takes_input) {
            set_nonblocking(fd.as_fd()).context(|| "ready a client's descriptor".into())?;
            let source = Source::ClientStdin { container: id.to_owned() };
            let token = self.watch(fd.as_fd(), source, epoll::EventFlags::IN)?;
            attached.stdin = Some((fd, token));
            attached.had_stdin = true;
        }
        self.container(id)?.attach(attached);
        Ok(Answer::Done)
    }

    fn resize(&mut self, target: &str, size: WinSize) -> Result<Answer> {
        let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
        let master = match (self.containers.get(target), self.execs.get(target)) {
            (Some(container), _) => container.master.as_ref().map(|m| m.0.as_fd()),
            (None, Some(exec)) => exec.master.as_ref().map(AsFd::as_fd),
            (None, None) => return Err(Error::new(Kind::NotFound, format!("no container or exec {target}"))),
        };
        let master = master.ok_or_else(|| Error::state(format!("{target} has no terminal")))?;
        tcsetwinsize(master, size).context(|| format!("resize the terminal of {target}"))?;
        Ok(Answer::Done)
    }

    fn update(&mut self, id: &str, resources: serde_json::Value) -> Result<Answer> {
        let resources: LinuxResources =
            serde_json::from_value(resources).map_err(|e| Error::invalid(format!("malformed resources: {e}")))?;
        self.container(id)?.cgroup.apply(&resources)?;
        Ok(Answer::Done)
    }
}

/// Assigns the passed descriptors, in order, to the streams marked.
fn take_marked(marked: [bool; 3], fds: Vec<OwnedFd>) -> Result<[Option<OwnedFd>; 3], Failure> {
    let wanted = marked.iter().filter(|m| **m).count();
    if wanted != fds.len() {
        let message = format!("{wanted} descriptors are marked and {} came", fds.len());
        return Err(Failure { kind: FailureKind::Invalid, message });
    }
    let mut fds = fds.into_iter();
    Ok(marked.map(|m| if m { fds.next() } else { None }))
}

fn seccomp_of(bundle: &Path) -> Result<Option<LinuxSeccomp>> {
    let config = Config::read(&config_path(bundle), bundle.to_owned())?;
    Ok(config.spec.linux().as_ref().and_then(|l| l.seccomp().clone()))
}

fn end_quietly(cgroup: &Cgroup, pid: i32) {
    drop(sys::kill(pid, libc::SIGKILL));
    drop(cgroup.kill_and_wait());
}

/// The container's state as hooks are told it.
pub(crate) fn hook_state(id: &str, bundle: &Path, pid: i32) -> Vec<u8> {
    let state = serde_json::json!({
        "ociVersion": crate::spec::VERSION, "id": id, "status": "creating", "pid": pid, "bundle": bundle,
    });
    state.to_string().into_bytes()
}
