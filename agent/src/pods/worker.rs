//! One task per pod: it alone changes the pod's state.
//!
//! In: commands of the manager, exits told by the supervisor, results of its own starts, stops, probes and mounts. Each
//! input changes what is remembered; then a plan is made from all of it and carried out ([`super::act`]); then the status is
//! published. Nothing here waits: whatever takes time is a task that reports back.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    message, probing,
    record::StartRecord,
    sandbox,
    sandbox::Live,
    start::{self, Prepared, Progress},
    state::{Ended, Instance, Nanos, PodState, SECOND, now},
    status,
    table::{ContainerView, Snapshot},
    writer::{self, Wanted},
};
use crate::{
    context::Context,
    events::Kind,
    objects::Held,
    probes::Verdict,
    runtime::RuntimeEvent,
    spec::field::Addresses,
    volumes::{Mounted, VolumeError},
};
use isopod_runtime::supervisor::protocol::{ContainerStatus, Op};

/// Where a pod comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The manifest directory.
    Static,
    /// The API server.
    Api,
}

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// A newer version of the same pod.
    Update(Arc<Pod>),
    /// End it; `None` takes the pod's own grace period.
    Terminate { grace: Option<i64> },
    /// The pod as a whole fails (eviction, admission): it ends but stays visible.
    Fail { reason: String, message: String, grace: i64 },
    /// UID of a static pod's mirror.
    Mirror(Option<String>),
}

/// Everything a worker reacts to.
pub(super) enum Input {
    Command(Command),
    Sandbox(Result<Live, String>, Duration),
    Volumes(Result<Mounted, VolumeError>, Duration),
    Start(Progress),
    Probe(Verdict),
    Stopped(String),
    Removed(Result<(), String>),
    /// Objects a failed start or mount waits for have changed.
    Retry,
}

/// Something that is made once and retried after failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Making {
    Not,
    Busy,
    Done,
    /// Failed; again at this time, after this pause.
    Failed(Instant, Duration),
}

/// What tells others that an instance has ended.
pub(super) struct Ends {
    pub(super) token: CancellationToken,
    pub(super) flag: watch::Sender<bool>,
    pub(super) code: watch::Sender<Option<i32>>,
}

impl Ends {
    fn new() -> Self {
        Self { token: CancellationToken::new(), flag: watch::channel(false).0, code: watch::channel(None).0 }
    }
}

/// The handle the manager keeps.
pub(crate) struct Handle {
    inputs: mpsc::UnboundedSender<Input>,
    task: tokio::task::JoinHandle<()>,
}

impl Handle {
    /// Tells the worker something.
    pub(crate) fn tell(&self, command: Command) {
        let _ = self.inputs.send(Input::Command(command));
    }

    /// Leaves the pod alone: the worker ends, containers go on.
    pub(crate) fn abandon(&self) {
        self.task.abort();
    }
}

/// One pod's worker.
pub(super) struct Worker {
    pub(super) ctx: Arc<Context>,
    pub(super) pod: Arc<Pod>,
    pub(super) pods: watch::Sender<Arc<Pod>>,
    pub(super) ephemeral: Vec<Container>,
    pub(super) state: PodState,
    pub(super) dirty: bool,
    pub(super) live: Option<Live>,
    pub(super) sandbox: Making,
    pub(super) volumes: Making,
    pub(super) mounted: Option<Arc<Mounted>>,
    pub(super) prepared: watch::Sender<Option<Prepared>>,
    pub(super) addresses: watch::Sender<Addresses>,
    pub(super) starting: BTreeMap<String, CancellationToken>,
    pub(super) stopping: std::collections::BTreeSet<String>,
    pub(super) ends: HashMap<String, Ends>,
    /// Exits, by container id, that were told before the start that led to them.
    pub(super) early: HashMap<String, ContainerStatus>,
    pub(super) probes: HashMap<String, Vec<(crate::probes::Kind, tokio::task::AbortHandle)>>,
    pub(super) waiting: BTreeMap<String, status::Waiting>,
    pub(super) retry: BTreeMap<String, Nanos>,
    /// Image pull back-off by container: pause and, once shown, the error.
    pub(super) pulls: HashMap<String, Nanos>,
    /// When an ErrImagePull becomes an ImagePullBackOff.
    pub(super) pull_shown: BTreeMap<String, Nanos>,
    pub(super) terminating: bool,
    /// The object goes away too.
    pub(super) deleting: bool,
    pub(super) deadline: watch::Sender<Instant>,
    pub(super) removing: bool,
    pub(super) remove_again: Option<Instant>,
    pub(super) removed: bool,
    pub(super) mirror: watch::Sender<Option<String>>,
    pub(super) wanted: watch::Sender<Wanted>,
    pub(super) published: Option<Arc<k8s_openapi::api::core::v1::PodStatus>>,
    pub(super) inputs: mpsc::UnboundedSender<Input>,
    pub(super) events: mpsc::UnboundedSender<RuntimeEvent>,
    pub(super) record: StartRecord,
    /// Objects the pod refers to, watched while it lives.
    pub(super) _held: Vec<Held>,
}

/// Starts a pod's worker; `gone` is called when the pod has ended and everything of it is removed.
pub(crate) fn spawn(
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    source: Source,
    gone: impl FnOnce(String) + Send + 'static,
) -> Handle {
    let (inputs, receiver) = mpsc::unbounded_channel();
    let sender = inputs.clone();
    let task = tokio::spawn(async move {
        let uid = sandbox::uid(&pod).to_string();
        run(ctx, pod, source, sender, receiver).await;
        gone(uid);
    });
    Handle { inputs, task }
}

async fn run(
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    source: Source,
    inputs: mpsc::UnboundedSender<Input>,
    mut receiver: mpsc::UnboundedReceiver<Input>,
) {
    let (events, mut exits) = mpsc::unbounded_channel();
    let (mut w, writer) = Worker::new(ctx, pod, source, inputs, events);
    w.adopt().await;
    loop {
        let wake = w.step();
        w.publish();
        if w.deleting && w.removed {
            break;
        }
        // All arms are cancel-safe: channels keep what is not received.
        tokio::select! {
            input = receiver.recv() => match input {
                Some(input) => w.take(input),
                None => return,
            },
            event = exits.recv() => if let Some(event) = event { w.runtime(event) },
            () = crate::volumes::sleep_until(wake.map(Instant::into_std)) => {}
        }
        while let Ok(input) = receiver.try_recv() {
            w.take(input);
        }
        while let Ok(event) = exits.try_recv() {
            w.runtime(event);
        }
    }
    w.wanted.send_modify(|wanted| wanted.last = true);
    let _ = writer.await;
    w.forget();
}

impl Worker {
    fn new(
        ctx: Arc<Context>,
        pod: Arc<Pod>,
        source: Source,
        inputs: mpsc::UnboundedSender<Input>,
        events: mpsc::UnboundedSender<RuntimeEvent>,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let uid = sandbox::uid(&pod).to_string();
        let mirror = watch::channel((source == Source::Api).then(|| uid.clone())).0;
        let wanted = watch::channel(Wanted::default()).0;
        let target = writer::Target {
            namespace: sandbox::namespace(&pod).into(),
            name: sandbox::name(&pod).into(),
            uid: Some(uid.clone()),
            delete: source == Source::Api,
        };
        let writer = tokio::spawn(writer::run(ctx.api.clone(), target, mirror.subscribe(), wanted.subscribe()));
        let starts = ctx.config.paths.starts();
        let record = StartRecord::new(&starts, sandbox::namespace(&pod), sandbox::name(&pod), &uid);
        let state_path = ctx.config.paths.pod(&uid).join("state.json");
        let state = PodState::load(&state_path).unwrap_or_else(|| PodState::new(now()));
        let held = super::references(&pod).iter().map(|key| ctx.objects.hold(key)).collect();
        let worker = Self {
            ephemeral: super::ephemeral(&pod),
            pods: watch::channel(pod.clone()).0,
            addresses: watch::channel(Addresses { pod: Vec::new(), host: ctx.machine.ips.clone() }).0,
            ctx,
            pod,
            state,
            dirty: true,
            live: None,
            sandbox: Making::Not,
            volumes: Making::Not,
            mounted: None,
            prepared: watch::channel(None).0,
            starting: BTreeMap::new(),
            stopping: Default::default(),
            ends: HashMap::new(),
            early: HashMap::new(),
            probes: HashMap::new(),
            waiting: BTreeMap::new(),
            retry: BTreeMap::new(),
            pulls: HashMap::new(),
            pull_shown: BTreeMap::new(),
            terminating: false,
            deleting: false,
            deadline: watch::channel(Instant::now()).0,
            removing: false,
            remove_again: None,
            removed: false,
            mirror,
            wanted,
            published: None,
            inputs,
            events,
            record,
            _held: held,
        };
        (worker, writer)
    }

    pub(super) fn uid(&self) -> &str {
        sandbox::uid(&self.pod)
    }

    /// A container of the spec by name.
    pub(super) fn container(&self, name: &str) -> Option<Container> {
        let spec = self.pod.spec.as_ref()?;
        crate::qos::all_containers(spec).chain(&self.ephemeral).find(|c| c.name == name).cloned()
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Command(c) => self.command(c),
            Input::Sandbox(made, took) => self.sandbox_made(made, took),
            Input::Volumes(made, took) => self.volumes_made(made, took),
            Input::Start(p) => self.progress(p),
            Input::Probe(v) => self.verdict(&v),
            Input::Stopped(name) => {
                self.stopping.remove(&name);
            }
            Input::Removed(Ok(())) => {
                self.removing = false;
                self.removed = true;
                self.live = None;
                self.state.sandbox = self.state.sandbox.take().filter(|_| self.deleting);
                self.state.lost = false;
                self.state.finished = true;
                self.dirty = true;
            }
            Input::Removed(Err(error)) => {
                tracing::warn!(pod = sandbox::name(&self.pod), error, "cannot tear the pod down, trying again");
                let text = format!("error killing pod: {error}");
                self.ctx.events.pod(&self.pod, Kind::Warning, "FailedKillPod", text);
                self.removing = false;
                self.remove_again = Some(Instant::now() + Duration::from_secs(5));
            }
            Input::Retry => {
                self.retry.clear();
                for m in [&mut self.sandbox, &mut self.volumes] {
                    if matches!(m, Making::Failed(..)) {
                        *m = Making::Not;
                    }
                }
            }
        }
    }

    fn command(&mut self, c: Command) {
        match c {
            Command::Update(pod) => {
                self.ephemeral = super::ephemeral(&pod);
                self.pod = pod.clone();
                self.pods.send_replace(pod);
                self.save_spec();
                if let Some(m) = self.pod.metadata.deletion_timestamp.as_ref() {
                    let grace = self.pod.metadata.deletion_grace_period_seconds;
                    tracing::debug!(pod = sandbox::name(&self.pod), ?grace, at = %m.0, "pod is being deleted");
                    self.terminate(grace, true);
                }
            }
            Command::Terminate { grace } => self.terminate(grace, true),
            Command::Fail { reason, message, grace } => {
                if !self.state.finished && self.state.failure.is_none() {
                    self.state.failure = Some(super::state::PodFailure { reason, message });
                    self.dirty = true;
                    self.terminate(Some(grace), false);
                }
            }
            Command::Mirror(uid) => {
                if *self.mirror.borrow() != uid {
                    self.mirror.send_replace(uid);
                    self.published = None;
                }
            }
        }
    }

    /// Begins (or hurries) the end.
    pub(super) fn terminate(&mut self, grace: Option<i64>, deleting: bool) {
        let own = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        let grace = Duration::from_secs(u64::try_from(grace.unwrap_or(own)).unwrap_or(0).max(1));
        let at = Instant::now() + grace;
        if !self.terminating || at < *self.deadline.borrow() {
            self.deadline.send_replace(at);
        }
        if deleting && self.state.finished {
            // Over already: only what is on disk remains.
            self.removed = self.live.is_none();
        }
        self.terminating = true;
        self.deleting |= deleting;
        for cancel in self.starting.values() {
            cancel.cancel();
        }
        probing::keep_readiness(&mut self.probes);
    }

    /// What the supervisor tells.
    fn runtime(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Exited(status) => self.exited(&status),
            RuntimeEvent::Lost if self.removing || self.removed || self.live.is_none() => {}
            RuntimeEvent::Lost => self.lost(),
        }
    }

    /// The supervisor is gone and with it the pod's containers: everything starts again in a new sandbox.
    pub(super) fn lost(&mut self) {
        tracing::warn!(pod = sandbox::name(&self.pod), "the pod's supervisor is gone");
        self.live = None;
        self.prepared.send_replace(None);
        let running = self.state.containers.iter().filter(|(_, r)| r.running());
        let running: Vec<(String, u32)> =
            running.filter_map(|(name, r)| Some((name.clone(), r.current.as_ref()?.attempt))).collect();
        for (name, attempt) in running {
            self.ended_with(&name, || Ended {
                code: 137,
                signal: None,
                reason: "ContainerStatusUnknown".into(),
                message: "The container could not be located when the pod was terminated".into(),
                finished_at: now(),
            });
            let bundle = super::exec::bundle(&self.ctx.config.paths, self.uid(), &name, attempt);
            if let Err(error) = crate::volumes::mounts::remove_tree(&bundle) {
                tracing::debug!(%error, "container directory");
            }
        }
        self.early.clear();
        self.state.lost = true;
        if let Some(s) = &mut self.state.sandbox {
            self.ctx.cgroups.kill(&s.cgroup);
            // Init containers that ran in the old sandbox do not count for the next.
            s.attempt += 1;
        }
        let text = "Pod sandbox changed, it will be killed and re-created.";
        if !self.terminating {
            self.ctx.events.pod(&self.pod, Kind::Normal, "SandboxChanged", text);
        }
        self.state.initialized =
            self.state.initialized && self.pod.spec.as_ref().is_some_and(|s| super::plan::all_done(s, &self.state));
        self.sandbox = Making::Not;
        self.dirty = true;
    }

    /// Records an exit.
    pub(super) fn exited(&mut self, status: &ContainerStatus) {
        let Some(exit) = &status.exit else { return };
        let Some((name, instance)) = self.state.by_id(&status.id) else {
            // The supervisor's word and the start's own come by different ways.
            if !self.starting.is_empty() {
                self.early.insert(status.id.clone(), status.clone());
            }
            return;
        };
        let (name, attempt) = (name.clone(), instance.attempt);
        if instance.started_at.is_none() {
            instance.started_at = status.started_at;
        }
        let c = self.container(&name);
        let bundle = super::exec::bundle(&self.ctx.config.paths, self.uid(), &name, attempt);
        let log = start::log_path(&self.ctx, &self.pod, &name, attempt);
        let policy = c.as_ref().and_then(|c| c.termination_message_policy.as_deref());
        let text = message::read(&start::message_path(&bundle), &log, policy, exit.code);
        let reason = match (exit.code, exit.oom_killed) {
            (_, true) => "OOMKilled",
            (0, _) => "Completed",
            _ => "Error",
        };
        let ended = Ended {
            code: exit.code,
            signal: exit.signal,
            reason: reason.into(),
            message: text,
            finished_at: exit.finished_at,
        };
        self.ended_with(&name, || ended);
        tracing::info!(pod = sandbox::name(&self.pod), container = name, code = exit.code, reason, "container ended");
        // Its files and cgroup are of no more use; logs stay.
        let (supervisor, id) = (self.live.as_ref().map(|l| l.supervisor.clone()), status.id.clone());
        let old_log = attempt.checked_sub(2).map(|a| start::log_path(&self.ctx, &self.pod, &name, a));
        tokio::spawn(async move {
            if let Some(s) = supervisor {
                s.done(Op::Delete { container: id }).await.ok();
            }
            if let Err(error) = crate::volumes::mounts::remove_tree(&bundle) {
                tracing::debug!(%error, "container directory");
            }
            if let Some(old) = old_log {
                super::remove_logs(&old);
            }
        });
    }

    /// Marks a running instance as ended and tells everyone who waits for it.
    pub(super) fn ended_with(&mut self, name: &str, how: impl FnOnce() -> Ended) {
        let Some(instance) = self.state.containers.get_mut(name).and_then(|r| r.current.as_mut()) else { return };
        if instance.ended.is_some() {
            return;
        }
        let ended = how();
        let code = ended.code;
        instance.ended = Some(ended);
        instance.ready = false;
        instance.started = false;
        self.dirty = true;
        for (_, p) in self.probes.remove(name).unwrap_or_default() {
            p.abort();
        }
        if let Some(e) = self.ends.get(name) {
            e.code.send_replace(Some(code));
            e.flag.send_replace(true);
            e.token.cancel();
        }
    }

    /// A new instance runs: those who want to know of its end can ask.
    pub(super) fn begins(&mut self, name: &str) {
        self.ends.insert(name.into(), Ends::new());
    }

    fn forget(&self) {
        let uid = self.uid();
        let paths = &self.ctx.config.paths;
        if let Err(error) = sandbox::remove_data(&paths.pod(uid), true) {
            tracing::warn!(pod = sandbox::name(&self.pod), %error, "pod directory stays");
        }
        let logs = paths.pod_logs(sandbox::namespace(&self.pod), sandbox::name(&self.pod), uid);
        std::fs::remove_dir_all(logs).ok();
        self.ctx.table.remove(uid);
    }

    fn save_spec(&self) {
        let dir = self.ctx.config.paths.pod(self.uid());
        if std::fs::create_dir_all(&dir).is_ok()
            && let Ok(text) = serde_json::to_vec(self.pod.as_ref())
            && let Err(error) = super::state::write_atomically(&dir.join("pod.json"), &text)
        {
            tracing::warn!(path = %dir.display(), %error, "pod not saved");
        }
    }

    /// Saves what is remembered and shows it to the API server and the node's clients.
    fn publish(&mut self) {
        let status = status::generate(&status::View {
            pod: &self.pod,
            ephemeral: &self.ephemeral,
            state: &self.state,
            waiting: &self.waiting,
            host_ips: &self.ctx.machine.ips,
            terminating: self.terminating,
            now: now(),
        });
        status::remember(&mut self.state, &status);
        let changed = self.published.as_deref() != Some(&status);
        if changed {
            let status = Arc::new(status);
            self.published = Some(status.clone());
            self.dirty = true;
            let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
            if ready {
                self.record.complete("ready");
            }
            self.wanted.send_modify(|w| w.status = Some(status));
        }
        if self.dirty {
            self.dirty = false;
            let dir = self.ctx.config.paths.pod(self.uid());
            let first = !dir.join("pod.json").exists();
            if first {
                self.save_spec();
            }
            if let Err(error) = self.state.save(&dir.join("state.json")) {
                tracing::warn!(path = %dir.display(), %error, "state not saved");
            }
            self.show();
        }
    }

    fn show(&self) {
        let mut pod = Pod::clone(&self.pod);
        pod.status = self.published.as_deref().cloned();
        let containers = self.state.containers.iter().filter_map(|(name, r)| {
            let i: &Instance = r.current.as_ref()?;
            let ends = self.ends.get(name);
            let view = ContainerView {
                id: i.id.clone(),
                attempt: i.attempt,
                running: i.running(),
                tty: self.container(name).is_some_and(|c| c.tty == Some(true)),
                ended: ends.map_or_else(|| watch::channel(!i.running()).1, |e| e.flag.subscribe()),
                exit_code: ends
                    .map_or_else(|| watch::channel(i.ended.as_ref().map(|e| e.code)).1, |e| e.code.subscribe()),
                previous: r.last.as_ref().map(|l| l.attempt),
            };
            Some((name.clone(), view))
        });
        let snapshot = Snapshot {
            mirror_uid: self.mirror.borrow().clone(),
            containers: containers.collect(),
            netns: self.state.sandbox.as_ref().and_then(|s| s.netns.clone()),
            host_network: self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true)),
            supervisor: self.live.as_ref().map(|l| l.supervisor.clone()),
            pod: Arc::new(pod),
        };
        self.ctx.table.put(self.uid(), snapshot);
    }

    /// Longest wait between restarts.
    pub(super) fn backoff_max(&self) -> Nanos {
        let max = self.ctx.config.kubelet.crash_loop_back_off.max_container_restart_period;
        i64::try_from(max.as_nanos()).unwrap_or(300 * SECOND)
    }
}
