//! The supervisor's event loop: one thread, one epoll, everything else is a state.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
    wait::waitpid,
};
use rustix::{
    event::{Timespec, epoll},
    net::{AddressFamily, SocketFlags, SocketType},
    process::WaitOptions,
};

use super::{
    client::SOCKET,
    container::Container,
    log::Stream,
    pod::PodInit,
    protocol::{
        Answer, ContainerState, ContainerStatus, Event, Exit, Failure, FailureKind, Message, PodConfig, Reply, Request,
    },
    status::{self, Durability},
    wire,
};
use crate::{
    cgroups::Cgroup,
    error::{Context, Result},
    sys,
    time::now_nanos,
};

/// Most messages kept for a client that does not read; it then reconnects and asks anew.
const MAX_QUEUED: usize = 4096;
pub(super) const READ_BUFFER: usize = 64 << 10;
/// After this long without an event the supervisor rests.
const REST: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What an event token stands for.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Listener,
    Signals,
    Client,
    Output { container: String, stream: Stream },
    Master { container: String },
    Stdin { container: String },
    ClientStdin { container: String },
}

#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    subscribed: bool,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

/// A process run by exec.
#[derive(Debug)]
pub(super) struct ExecProcess {
    pub(super) container: String,
    pub(super) pid: i32,
    pub(super) client: u64,
    pub(super) master: Option<OwnedFd>,
}

/// The supervisor.
#[derive(Debug)]
pub(crate) struct Server {
    pub(super) dir: PathBuf,
    pub(super) pod: PodConfig,
    group: Cgroup,
    pub(super) pod_init: Option<PodInit>,
    pub(super) epoll: OwnedFd,
    listener: OwnedFd,
    signals: SignalFd,
    next_token: u64,
    pub(super) sources: BTreeMap<u64, Source>,
    clients: BTreeMap<u64, Client>,
    pub(super) containers: BTreeMap<String, Container>,
    pub(super) execs: BTreeMap<String, ExecProcess>,
    pub(super) buffer: Vec<u8>,
    pub(super) batch: Vec<u8>,
    stopping: bool,
    _lock: OwnedFd,
}

impl Server {
    /// Binds the socket and takes over what a former supervisor of the pod left.
    pub(crate) fn new(
        dir: PathBuf,
        pod: PodConfig,
        group: Cgroup,
        pod_init: Option<PodInit>,
        lock: OwnedFd,
    ) -> Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().context(|| "block signals".into())?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context(|| "make a signalfd".into())?;
        let listener = listen(&dir)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context(|| "make an epoll".into())?;
        let mut server = Self {
            dir,
            pod,
            group,
            pod_init,
            epoll,
            listener,
            signals,
            next_token: 1,
            sources: BTreeMap::new(),
            clients: BTreeMap::new(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            buffer: vec![],
            batch: vec![],
            stopping: false,
            _lock: lock,
        };
        let listener = server.token(Source::Listener);
        epoll::add(&server.epoll, &server.listener, epoll::EventData::new_u64(listener), epoll::EventFlags::IN)
            .context(|| "watch the socket".into())?;
        let signals = server.token(Source::Signals);
        epoll::add(&server.epoll, &server.signals, epoll::EventData::new_u64(signals), epoll::EventFlags::IN)
            .context(|| "watch signals".into())?;
        server.take_over()?;
        Ok(server)
    }

    /// Containers of a supervisor that died: their processes have nobody to hold their streams; they end now, and it
    /// is told as it is, with no exit code known. Of what was never whole nothing stays.
    fn take_over(&mut self) -> Result<()> {
        for left in status::read_all(&self.dir) {
            let cgroup = Cgroup::plan(&self.container_cgroup(&left.id, left.cgroup.as_deref()), None)?;
            let Some(mut status) = left.status else {
                cgroup.kill_and_wait()?;
                cgroup.remove()?;
                status::remove(&self.dir, &left.id).context(|| format!("forget container {}", left.id))?;
                continue;
            };
            if status.state != ContainerState::Exited {
                cgroup.kill_and_wait()?;
                status.state = ContainerState::Exited;
                status.pid = None;
                status.exit = Some(Exit {
                    code: 255,
                    signal: None,
                    oom_killed: cgroup.oom_kills() > 0,
                    finished_at: now_nanos(),
                });
                status::write(&self.dir, &status, Durability::Synced)
                    .context(|| format!("record the end of container {}", status.id))?;
            }
            self.containers.insert(status.id.clone(), Container::ended(status, cgroup));
        }
        Ok(())
    }

    /// Serves until told to stop; the exit code.
    pub(crate) fn run(&mut self) -> i32 {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut rests = false;
        while !self.stopping {
            events.clear();
            let patience = if rests { None } else { Some(&REST) };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), patience) {
                Ok(0) if !rests => {
                    // Best effort: it is memory alone.
                    let _ = sys::forget_code();
                    rests = true;
                    continue;
                }
                Ok(_) => rests = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    eprintln!("epoll: {e}");
                    return 1;
                }
            }
            for event in &events {
                let (data, flags) = (event.data, event.flags);
                self.handle(data.u64(), flags);
            }
        }
        0
    }

    fn handle(&mut self, token: u64, flags: epoll::EventFlags) {
        // An earlier event of the same round may have ended this one's source.
        let Some(source) = self.sources.get(&token).cloned() else { return };
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.signals(),
            Source::Client => self.client(token, flags),
            Source::Output { container, stream } => self.output(&container, stream),
            Source::Master { container } => self.terminal(&container, flags),
            Source::Stdin { container } => self.feed(&container),
            Source::ClientStdin { container } => self.client_stdin(&container, token),
        }
    }

    pub(super) fn token(&mut self, source: Source) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.sources.insert(token, source);
        token
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, source: Source, flags: epoll::EventFlags) -> Result<u64> {
        let token = self.token(source);
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags).context(|| "watch a descriptor".into())?;
        Ok(token)
    }

    /// Forgets a watched descriptor. It is removed from the epoll too: a copy of it may live on in a child.
    pub(super) fn unwatch(&mut self, fd: BorrowedFd<'_>, token: u64) {
        self.sources.remove(&token);
        let _ = epoll::delete(&self.epoll, fd);
    }

    fn accept(&mut self) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            };
            let token = self.token(Source::Client);
            let added = epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
            if added.is_ok() {
                self.clients.insert(token, Client { socket, subscribed: false, queue: VecDeque::new() });
            } else {
                self.sources.remove(&token);
            }
        }
    }

    fn client(&mut self, token: u64, flags: epoll::EventFlags) {
        if flags.contains(epoll::EventFlags::OUT) {
            self.flush(token);
        }
        // A few per round, so that one client cannot starve the others.
        for _ in 0..16 {
            let Some(client) = self.clients.get(&token) else { return };
            match wire::recv_bytes(client.socket.as_fd()) {
                Ok(Some((bytes, fds))) => self.request(token, &bytes, fds),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => return self.drop_client(token),
            }
            if self.stopping {
                return;
            }
        }
    }

    fn drop_client(&mut self, token: u64) {
        if let Some(client) = self.clients.remove(&token) {
            self.unwatch(client.socket.as_fd(), token);
        }
    }

    fn request(&mut self, token: u64, bytes: &[u8], fds: Vec<OwnedFd>) {
        let request: Request = match serde_json::from_slice(bytes) {
            Ok(request) => request,
            Err(e) => {
                // A newer client's operation still has an id to answer to.
                let id = serde_json::from_slice::<serde_json::Value>(bytes)
                    .ok()
                    .and_then(|v| v.get("id").and_then(serde_json::Value::as_u64))
                    .unwrap_or(0);
                let failure = Failure { kind: FailureKind::Invalid, message: format!("unknown request: {e}") };
                return self.send(token, &Message::Reply(Reply { id, result: Err(failure) }), vec![]);
            }
        };
        let id = request.id;
        let (result, fds) = match self.perform(token, request.op, fds) {
            Ok((answer, fds)) => (Ok(answer), fds),
            Err(failure) => (Err(failure), vec![]),
        };
        self.send(token, &Message::Reply(Reply { id, result }), fds);
    }

    pub(super) fn subscribe(&mut self, token: u64) {
        if let Some(client) = self.clients.get_mut(&token) {
            client.subscribed = true;
        }
    }

    fn send(&mut self, token: u64, message: &Message, fds: Vec<OwnedFd>) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        let Ok(bytes) = serde_json::to_vec(message) else { return };
        client.queue.push_back((bytes, fds));
        if client.queue.len() > MAX_QUEUED {
            return self.drop_client(token);
        }
        self.flush(token);
    }

    fn flush(&mut self, token: u64) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        while let Some((bytes, fds)) = client.queue.front() {
            let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match wire::send_bytes(client.socket.as_fd(), bytes, &borrowed) {
                Ok(()) => drop(client.queue.pop_front()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.drop_client(token),
            }
        }
        let mut flags = epoll::EventFlags::IN;
        if !client.queue.is_empty() {
            flags |= epoll::EventFlags::OUT;
        }
        let _ = epoll::modify(&self.epoll, &client.socket, epoll::EventData::new_u64(token), flags);
    }

    fn tell(&mut self, event: &Event) {
        let tokens: Vec<u64> = self.clients.iter().filter(|(_, c)| c.subscribed).map(|(t, _)| *t).collect();
        for token in tokens {
            self.send(token, &Message::Event(event.clone()), vec![]);
        }
    }

    fn signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo != Signal::SIGCHLD as u32 {
                // An orderly stop of the machine: the containers get their signal from whoever stops it.
                eprintln!("ignored signal {}", info.ssi_signo);
            }
        }
        self.reap();
    }

    /// Collects every child that ended, the pod's orphans among them.
    pub(super) fn reap(&mut self) {
        loop {
            // Not nix's waitpid: it cannot name real-time signals and loses whom they killed.
            let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid.as_raw_nonzero().get(), status),
                Err(rustix::io::Errno::INTR) => continue,
                Ok(None) | Err(_) => return,
            };
            let signal = status.terminating_signal();
            let code = signal.map_or_else(|| status.exit_status().unwrap_or(255), |s| 128 + s);
            self.ended(pid, code, signal);
        }
    }

    fn ended(&mut self, pid: i32, code: i32, signal: Option<i32>) {
        let container =
            self.containers.values().find(|c| c.status.pid == Some(pid) && c.is_alive()).map(|c| c.status.id.clone());
        if let Some(id) = container {
            return self.container_ended(&id, code, signal);
        }
        let exec = self.execs.iter().find(|(_, e)| e.pid == pid).map(|(id, _)| id.clone());
        if let Some((id, process)) = exec.and_then(|id| self.execs.remove_entry(&id)) {
            let oom_killed = signal == Some(libc::SIGKILL)
                && self.containers.get(&process.container).is_some_and(|c| c.cgroup.oom_kills() > 0);
            let exit = Exit { code, signal, oom_killed, finished_at: now_nanos() };
            let event = Message::Event(Event::ExecExited { exec: id, exit });
            return self.send(process.client, &event, vec![]);
        }
        if self.pod_init.as_ref().is_some_and(|i| i.pid == pid) {
            // The kernel kills the whole namespace with it; the containers' ends follow by themselves.
            eprintln!("the pod's init ended");
            self.pod_init = None;
        }
    }

    fn container_ended(&mut self, id: &str, code: i32, signal: Option<i32>) {
        let finished_at = now_nanos();
        self.drain(id);
        let Some(container) = self.containers.get_mut(id) else { return };
        // In a shared PID namespace its other processes live on; a container ends with its first process.
        if let Err(e) = container.cgroup.signal_all(libc::SIGKILL) {
            eprintln!("container {id}: {e}");
        }
        let oom_killed = container.cgroup.oom_kills() > 0;
        self.drain(id);
        self.close_streams(id);
        let Some(container) = self.containers.get_mut(id) else { return };
        container.status.state = ContainerState::Exited;
        container.status.pid = None;
        container.status.exit = Some(Exit { code, signal, oom_killed, finished_at });
        (container.pidfd, container.launched) = (None, None);
        let status = container.status.clone();
        if let Err(e) = status::write(&self.dir, &status, Durability::Synced) {
            eprintln!("container {id}: record its end: {e}");
        }
        self.tell(&Event::Exited { status });
    }

    /// Everything's state.
    pub(super) fn list(&self) -> Answer {
        Answer::List(self.containers.values().map(|c| c.status.clone()).collect::<Vec<ContainerStatus>>())
    }

    /// Where a container's group is.
    pub(super) fn container_cgroup(&self, id: &str, configured: Option<&str>) -> String {
        match configured.filter(|c| !c.is_empty()) {
            Some(path) => path.to_owned(),
            None => format!("{}/{id}", self.pod.cgroup),
        }
    }

    /// Ends everything and takes away what the kernel keeps of it.
    pub(super) fn shut_down(&mut self) -> Result<()> {
        let mut first = Ok(());
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for container in self.containers.values().filter(|c| c.is_alive()) {
            if let Some(pid) = container.status.pid {
                drop(sys::kill(pid, libc::SIGKILL));
            }
            first = first.and(container.cgroup.signal_all(libc::SIGKILL));
        }
        for id in ids {
            if let Err(failure) = self.end_and_forget(&id) {
                first = first.and(Err(failure));
            }
        }
        if let Some(init) = self.pod_init.take() {
            drop(sys::kill(init.pid, libc::SIGKILL));
            let _ = waitpid(nix::unistd::Pid::from_raw(init.pid), None);
        }
        self.group.leave();
        first = first.and(self.group.remove());
        drop(std::fs::remove_file(self.dir.join(SOCKET)));
        drop(std::fs::remove_file(self.dir.join("supervisor.pid")));
        self.stopping = true;
        first
    }
}

fn listen(dir: &std::path::Path) -> Result<OwnedFd> {
    let what = || format!("listen on {}", dir.join(SOCKET).display());
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .context(what)?;
    drop(std::fs::remove_file(dir.join(SOCKET)));
    let parent = wire::open_dir(dir).context(what)?;
    let address = wire::socket_address(parent.as_fd(), SOCKET).context(what)?;
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = rustix::net::bind(&fd, &address);
    rustix::process::umask(before);
    bound.context(what)?;
    rustix::net::listen(&fd, 16).context(what)?;
    Ok(fd)
}
