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
    probing,
    record::StartRecord,
    sandbox,
    sandbox::Live,
    start::{Prepared, Progress},
    state::{Nanos, PodState, SECOND, now},
    status,
    writer::{self, Seen, Wanted},
};
use crate::{
    context::Context,
    events::Kind,
    objects::Held,
    probes::Verdict,
    qos::Limits,
    runtime::RuntimeEvent,
    spec::field::Addresses,
    volumes::{Mounted, VolumeError, nfs},
};
use isopod_runtime::supervisor::protocol::ContainerStatus;

/// How long after a state that could not be written it is tried again.
const SAVE_AGAIN: Duration = Duration::from_secs(1);

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
    /// A static pod's mirror.
    Mirror(Option<Seen>),
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
    /// The node's pods have changed: a resize that waits may fit now.
    Room,
    /// Containers' groups have been resized: those done with what they have now, the pod's limits or the error.
    Resized {
        done: Vec<(String, serde_json::Value)>,
        result: Result<Limits, String>,
    },
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
    pub(super) fn new() -> Self {
        Self { token: CancellationToken::new(), flag: watch::channel(false).0, code: watch::channel(None).0 }
    }
}

/// What lets others of the agent end a pod.
#[derive(Clone)]
pub(crate) struct Teller(mpsc::UnboundedSender<Input>);

impl std::fmt::Debug for Teller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Teller")
    }
}

impl Teller {
    pub(super) fn new(inputs: mpsc::UnboundedSender<Input>) -> Self {
        Self(inputs)
    }

    /// The pod as a whole fails; its containers have `grace` seconds.
    pub(crate) fn fail(&self, reason: &str, message: String, grace: i64) {
        let _ = self.0.send(Input::Command(Command::Fail { reason: reason.into(), message, grace }));
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

    /// Lets others end the pod.
    pub(crate) fn teller(&self) -> Teller {
        Teller(self.inputs.clone())
    }

    /// Leaves the pod alone: the worker ends, containers go on.
    pub(crate) fn abandon(&self) {
        self.task.abort();
    }
}

/// One pod's worker.
pub(super) struct Worker {
    pub(super) ctx: Arc<Context>,
    /// The pod with the resources allocated to it.
    pub(super) pod: Arc<Pod>,
    /// The pod as the API has it.
    pub(super) desired: Arc<Pod>,
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
    /// Since when.
    ending: Option<Instant>,
    /// The object goes away too.
    pub(super) deleting: bool,
    pub(super) deadline: watch::Sender<Instant>,
    pub(super) removing: bool,
    pub(super) remove_again: Option<Instant>,
    pub(super) removed: bool,
    pub(super) mirror: watch::Sender<Option<String>>,
    pub(super) wanted: watch::Sender<Wanted>,
    pub(super) seen: watch::Sender<Option<Seen>>,
    pub(super) published: Option<Arc<k8s_openapi::api::core::v1::PodStatus>>,
    pub(super) inputs: mpsc::UnboundedSender<Input>,
    pub(super) events: mpsc::UnboundedSender<RuntimeEvent>,
    pub(super) record: StartRecord,
    /// What the pod's group was last given.
    pub(super) limits: Option<Limits>,
    pub(super) resizing: bool,
    pub(super) resize_again: Option<Instant>,
    pub(super) waits_for_room: bool,
    /// Who waits for something that a failed start or mount lacks.
    pub(super) watching: Option<tokio::task::AbortHandle>,
    /// Objects the pod refers to, watched while it lives.
    pub(super) _held: Vec<Held>,
}

/// Starts a pod's worker; `gone` is called when the pod has ended and everything of it is removed.
pub(crate) fn spawn(
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    source: Source,
    first: Option<Command>,
    gone: impl FnOnce(String) + Send + 'static,
) -> Handle {
    let (inputs, receiver) = mpsc::unbounded_channel();
    if let Some(command) = first {
        // The channel is new: it takes this.
        let _ = inputs.send(Input::Command(command));
    }
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
    if w.state.failure.is_some() && !w.state.finished {
        // It was on its way out when the last agent ended.
        w.terminate(Some(1), false);
    }
    // On the heap while it takes: this task is there as long as its pod.
    Box::pin(w.adopt()).await;
    // What it was made with comes before its first step: a pod that is refused starts nothing.
    while let Ok(input) = receiver.try_recv() {
        w.take(input);
    }
    w.ctx.metrics.observe("kubelet_pod_worker_start_duration_seconds", [], w.record.age());
    loop {
        let begun = Instant::now();
        let mut wake = w.step();
        w.publish();
        w.ctx.metrics.observe("kubelet_pod_worker_duration_seconds", [("operation_type", "sync")], begun.elapsed());
        if w.dirty {
            // It could not be written down: the disk may be full.
            let again = Instant::now() + SAVE_AGAIN;
            wake = Some(wake.map_or(again, |w| w.min(again)));
        }
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
        let seen = watch::channel(None).0;
        let target = writer::Target {
            namespace: sandbox::namespace(&pod).into(),
            name: sandbox::name(&pod).into(),
            uid: Some(uid.clone()),
            delete: source == Source::Api,
        };
        let writer =
            tokio::spawn(writer::run(ctx.clone(), target, mirror.subscribe(), wanted.subscribe(), seen.subscribe()));
        let starts = ctx.config.paths.starts();
        let record = StartRecord::new(&starts, sandbox::namespace(&pod), sandbox::name(&pod), &uid);
        let state_path = ctx.config.paths.pod(&uid).join("state.json");
        // A static pod that went down with its machine, or whose manifest went and came back, is run again.
        let again = |s: &PodState| {
            let went_down = s.failure.as_ref().is_some_and(|f| f.reason == super::TERMINATED.0);
            // What ended by itself keeps no sandbox.
            went_down || s.finished && s.sandbox.is_some()
        };
        let state = PodState::load(&state_path).filter(|s| source == Source::Api || !again(s));
        let state = state.unwrap_or_else(|| PodState::new(now()));
        let held = super::references(&pod).iter().map(|key| ctx.objects.hold(key)).collect();
        let mut worker = Self {
            ephemeral: super::ephemeral(&pod),
            desired: pod.clone(),
            pods: watch::channel(pod.clone()).0,
            addresses: watch::channel(Addresses { pod: Vec::new(), host: ctx.machine.ips.clone() }).0,
            ctx,
            pod: pod.clone(),
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
            ending: None,
            deleting: false,
            deadline: watch::channel(Instant::now()).0,
            removing: false,
            remove_again: None,
            removed: false,
            mirror,
            wanted,
            seen,
            published: None,
            inputs,
            events,
            record,
            limits: None,
            resizing: false,
            resize_again: None,
            waits_for_room: false,
            watching: None,
            _held: held,
        };
        worker.take_pod(pod);
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
                if let Some(begun) = self.ending.take() {
                    let labels = [("operation_type", "kill")];
                    self.ctx.metrics.observe("kubelet_pod_worker_duration_seconds", labels, begun.elapsed());
                }
                self.removing = false;
                self.removed = true;
                self.live = None;
                self.state.sandbox = self.state.sandbox.take().filter(|_| self.deleting);
                self.state.lost = false;
                self.state.finished = true;
                self.ctx.devices.release(self.uid());
                self.ctx.topology.release(self.uid());
                self.dirty = true;
            }
            Input::Removed(Err(error)) => {
                tracing::warn!(pod = sandbox::name(&self.pod), error, "cannot tear the pod down, trying again");
                let text = format!("error killing pod: {error}");
                self.ctx.events.pod(&self.pod, Kind::Warning, "FailedKillPod", text);
                self.removing = false;
                self.remove_again = Some(Instant::now() + Duration::from_secs(5));
            }
            Input::Room => self.waits_for_room = false,
            Input::Resized { done, result } => self.resized(done, result),
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
                self.seen.send_replace(Seen::of(&pod));
                self.ephemeral = super::ephemeral(&pod);
                self.configure_again(&pod);
                self.take_pod(pod);
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
            Command::Mirror(mirror) => {
                let uid = mirror.as_ref().map(|m| m.uid.clone());
                self.seen.send_replace(mirror);
                if *self.mirror.borrow() != uid {
                    self.mirror.send_replace(uid);
                    self.published = None;
                }
            }
        }
    }

    /// What could not be configured may be with a pod that has changed: its annotations stand in environments and paths.
    fn configure_again(&mut self, pod: &Pod) {
        let (old, new) = (&self.desired.metadata, &pod.metadata);
        if (&old.labels, &old.annotations, old.generation) != (&new.labels, &new.annotations, new.generation) {
            let waiting = &self.waiting;
            self.retry
                .retain(|name, _| waiting.get(name).is_none_or(|(reason, _)| reason != "CreateContainerConfigError"));
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
        self.ending.get_or_insert_with(Instant::now);
        if !self.terminating {
            self.let_go_of_servers();
        }
        self.terminating = true;
        self.deleting |= deleting;
        for cancel in self.starting.values() {
            cancel.cancel();
        }
        probing::keep_readiness(&mut self.probes);
    }

    /// Its end does not wait for a file server that is away.
    fn let_go_of_servers(&self) {
        let dir = self.ctx.config.paths.pod(self.uid());
        if !nfs::has(&dir) {
            return;
        }
        let (ctx, pod) = (self.ctx.clone(), self.pod.clone());
        let tell = move |text| {
            ctx.events.pod(&pod, Kind::Warning, "FailedKillPod", format!("error killing pod: {text}"));
        };
        tokio::spawn(nfs::let_go(dir, self.deadline.subscribe(), tell));
    }

    /// Longest wait between restarts.
    pub(super) fn backoff_max(&self) -> Nanos {
        let max = self.ctx.config.kubelet.crash_loop_back_off.max_container_restart_period;
        i64::try_from(max.as_nanos()).unwrap_or(300 * SECOND)
    }
}
