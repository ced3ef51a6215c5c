//! Carrying out a worker's plan, and taking in what its tasks report.

use std::{
    sync::Arc,
    time::{Duration, Instant as StdInstant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    plan::{self, Plan, StopReason},
    sandbox::{self, Live},
    start::{self, Prepared, Progress},
    state::{Instance, Nanos, PodFailure, Record, SECOND, now},
    worker::{Input, Making, Worker},
};
use crate::{
    claims,
    config::format_duration,
    events::Kind,
    spec::field::Addresses,
    volumes::{self, Mounted, VolumeError},
};

/// First pause after a failed image pull.
const PULL_PAUSE: Nanos = 10 * SECOND;
/// Longest.
const PULL_PAUSE_MAX: Nanos = 300 * SECOND;
/// How long an ErrImagePull is shown before it reads ImagePullBackOff.
const PULL_SHOWN: Nanos = 2 * SECOND;

impl Worker {
    /// Plans and acts until nothing is left to do now; when to come back.
    pub(super) fn step(&mut self) -> Option<Instant> {
        let at = now();
        self.age_pull_errors(at);
        let resize = self.resize();
        let plan = self.plan(at);
        if plan.deadline_exceeded {
            let message = "Pod was active on the node longer than the specified deadline";
            self.ctx.events.pod(&self.pod, Kind::Normal, "DeadlineExceeded", message);
            self.state.failure = Some(PodFailure { reason: "DeadlineExceeded".into(), message: message.into() });
            self.dirty = true;
            self.terminate(None, false);
            return self.step();
        }
        if plan.initialized {
            self.state.initialized = true;
            self.dirty = true;
            self.record.phase("initialized", None);
        }
        if let Some(name) = &plan.restart_all {
            self.state.begin_again(name);
            self.dirty = true;
            return self.step();
        }
        self.crash_loops(&plan);
        for (name, reason) in &plan.stop {
            self.stop(name, reason);
        }
        let lasts = !self.terminating && !self.state.finished && !self.removing && !plan.finish;
        // Starts under way wait for both: what failed is tried again also when nothing new is to be started.
        let wanted = !plan.start.is_empty() || !self.starting.is_empty();
        if lasts && (wanted || matches!(self.sandbox, Making::Failed(..))) {
            self.make_sandbox();
        }
        if lasts && (wanted || matches!(self.volumes, Making::Failed(..))) {
            self.make_volumes();
        }
        self.start(&plan.start);
        if plan.finish {
            self.finish();
        }
        let planned = plan.wake.map(|w| instant(w, at));
        let shown = self.pull_shown.values().min().map(|w| instant(*w, at));
        let making = [self.sandbox, self.volumes].into_iter().filter_map(|m| match m {
            Making::Failed(when, _) if lasts => Some(when),
            _ => None,
        });
        let remove = self.remove_again.filter(|_| !self.removing);
        [planned, shown, remove, resize].into_iter().flatten().chain(making).min()
    }

    fn plan(&self, at: Nanos) -> Plan {
        let Some(spec) = &self.pod.spec else { return Plan::default() };
        plan::plan(&plan::View {
            spec,
            ephemeral: &self.ephemeral,
            state: &self.state,
            starting: &self.starting.keys().cloned().collect(),
            stopping: &self.stopping,
            retry: &self.retry,
            terminating: self.terminating,
            now: at,
            backoff_max: self.backoff_max(),
        })
    }

    fn crash_loops(&mut self, plan: &Plan) {
        let (name, namespace, uid) = (sandbox::name(&self.pod), sandbox::namespace(&self.pod), self.uid().to_string());
        for (container, delay) in &plan.crash_looping {
            let pause = format_duration(Duration::from_nanos(u64::try_from(*delay).unwrap_or(0)));
            let text =
                format!("back-off {pause} restarting failed container={container} pod={name}_{namespace}({uid})");
            let waiting = ("CrashLoopBackOff".to_string(), text);
            if self.waiting.get(container) != Some(&waiting) {
                let text = format!("Back-off restarting failed container {container} in pod {name}_{namespace}({uid})");
                self.ctx.events.container(&self.pod, container, Kind::Warning, "BackOff", text);
                self.waiting.insert(container.clone(), waiting);
            }
        }
    }

    fn stop(&mut self, name: &str, reason: &StopReason) {
        let spec = self.pod.spec.clone().unwrap_or_default();
        let own = spec.termination_grace_period_seconds.unwrap_or(30);
        let text = format!("Stopping container {name}");
        match reason {
            StopReason::Changed => {
                let text = format!("Container {name} definition changed, will be restarted");
                self.stop_one(name, Some(own), text, Vec::new());
            }
            StopReason::All => {
                let text = format!("Stopping container {name} because a rule restarts all containers of the pod");
                self.stop_one(name, Some(1), text, Vec::new());
            }
            StopReason::Pod | StopReason::Sidecar => {
                // Regular containers end first, then sidecars, the last one first.
                let init = spec.init_containers.as_deref().unwrap_or_default();
                let place = init.iter().position(|c| c.name == name);
                let before = place.map_or_else(Vec::new, |at| {
                    let later = init[at + 1..].iter().map(|c| &c.name);
                    let all = spec.containers.iter().map(|c| &c.name).chain(later);
                    all.filter(|n| self.state.current(n).is_some_and(Instance::running))
                        .filter_map(|n| Some(self.ends.get(n)?.token.clone()))
                        .collect()
                });
                let grace = (*reason == StopReason::Sidecar).then_some(own);
                self.stop_one(name, grace, text, before);
            }
        }
    }

    fn make_sandbox(&mut self) {
        let (pause, again) = match self.sandbox {
            Making::Not => (Duration::from_millis(500), true),
            Making::Failed(at, pause) => (pause, at <= Instant::now()),
            Making::Busy | Making::Done => return,
        };
        if !again {
            return;
        }
        self.sandbox = Making::Busy;
        let attempt = self.state.sandbox.as_ref().map_or(0, |s| s.attempt + 1);
        let (ctx, pod, events, inputs) = (self.ctx.clone(), self.pod.clone(), self.events.clone(), self.inputs.clone());
        tokio::spawn(async move {
            let begun = StdInstant::now();
            let made = sandbox::create(&ctx, &pod, attempt, events).await;
            ctx.metrics.operation("run_podsandbox", begun, made.is_ok());
            let pause = if made.is_ok() { begun.elapsed() } else { pause };
            let _ = inputs.send(Input::Sandbox(made, pause));
        });
    }

    fn make_volumes(&mut self) {
        let (pause, again) = match self.volumes {
            Making::Not => (Duration::from_millis(500), true),
            Making::Failed(at, pause) => (pause, at <= Instant::now()),
            Making::Busy | Making::Done => return,
        };
        if !again {
            return;
        }
        self.volumes = Making::Busy;
        let (ctx, pods, addresses, inputs) =
            (self.ctx.clone(), self.pods.subscribe(), self.addresses.subscribe(), self.inputs.clone());
        tokio::spawn(async move {
            let begun = StdInstant::now();
            let made = volumes::mount(&ctx, pods, addresses).await;
            let pause = if made.is_ok() { begun.elapsed() } else { pause };
            let _ = inputs.send(Input::Volumes(made, pause));
        });
    }

    pub(super) fn sandbox_made(&mut self, made: Result<Live, String>, took: Duration) {
        match made {
            Ok(live) => {
                self.sandbox = Making::Done;
                self.record.phase("sandbox", Some(took));
                let m = &self.ctx.metrics;
                m.count("kubelet_started_pods_total", []);
                if sandbox::own_users(&self.pod) {
                    m.count("kubelet_started_user_namespaced_pods_total", []);
                }
                m.observe("kubelet_run_podsandbox_duration_seconds", [("runtime_handler", "")], took);
                self.state.sandbox = Some(live.sandbox.clone());
                self.state.ips = live.ips.clone();
                self.state.lost = false;
                self.dirty = true;
                self.addresses.send_replace(Addresses { pod: live.ips.clone(), host: self.ctx.machine.ips.clone() });
                self.live = Some(live);
                self.prepare();
            }
            Err(error) => {
                self.ctx.metrics.count("kubelet_started_pods_errors_total", []);
                if sandbox::own_users(&self.pod) {
                    self.ctx.metrics.count("kubelet_started_user_namespaced_pods_errors_total", []);
                }
                let (reason, text) = if error.starts_with(claims::FAILED) {
                    ("FailedPrepareDynamicResources", error.clone())
                } else {
                    ("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {error}"))
                };
                tracing::warn!(pod = sandbox::name(&self.pod), error, "no sandbox");
                self.ctx.events.pod(&self.pod, Kind::Warning, reason, &text);
                self.record.blocked(&text);
                self.sandbox = Making::Failed(Instant::now() + took, (took * 2).min(Duration::from_secs(60)));
            }
        }
    }

    pub(super) fn volumes_made(&mut self, made: Result<Mounted, VolumeError>, took: Duration) {
        match made {
            Ok(mounted) => {
                self.volumes = Making::Done;
                self.record.phase("volumes", Some(took));
                self.mounted = Some(Arc::new(mounted));
                self.prepare();
            }
            Err(error) => {
                if !self.terminating {
                    tracing::warn!(pod = sandbox::name(&self.pod), %error, "no volume");
                    self.ctx.events.pod(&self.pod, Kind::Warning, error.reason(), error.to_string());
                    self.record.blocked(&error.to_string());
                }
                self.volumes = Making::Failed(Instant::now() + took, (took * 2).min(Duration::from_secs(122)));
                self.watch_references();
            }
        }
    }

    fn prepare(&mut self) {
        if let (Some(live), Some(mounted)) = (&self.live, &self.mounted) {
            self.prepared.send_replace(Some(Prepared { live: live.clone(), mounted: mounted.clone() }));
        }
    }

    /// Comes back as soon as one of the objects the pod refers to changes, or a driver of its volumes comes.
    fn watch_references(&mut self) {
        let mut all: Vec<_> =
            super::references(&self.pod).iter().map(|k| self.ctx.objects.hold(k)).map(|h| (h.changes(), h)).collect();
        let inputs = self.inputs.clone();
        let mut drivers = self.ctx.csi.changes();
        let task = tokio::spawn(async move {
            for (c, _) in &mut all {
                c.borrow_and_update();
            }
            let mut changes: FuturesUnordered<_> = all.iter_mut().map(|(c, _)| c.changed()).collect();
            // Both only wait.
            tokio::select! {
                Some(_) = changes.next() => {}
                _ = drivers.changed() => {}
            }
            let _ = inputs.send(Input::Retry);
        });
        if let Some(last) = self.watching.replace(task.abort_handle()) {
            last.abort();
        }
    }

    /// The id of an ephemeral container's target.
    fn target(&self, name: &str) -> Option<String> {
        let list = self.pod.spec.as_ref()?.ephemeral_containers.as_ref()?;
        let target = list.iter().find(|c| c.name == name)?.target_container_name.as_ref()?;
        let instance = self.state.containers.get(target)?.current.as_ref()?;
        instance.running().then(|| instance.id.clone())
    }

    fn start(&mut self, names: &[String]) {
        let mut turn: Option<oneshot::Receiver<()>> = None;
        for name in names {
            let Some(container) = self.container(name) else { continue };
            let record = self.state.containers.get(name);
            let attempt = record.filter(|r| r.current.is_some()).map_or(0, |r| r.restarts + 1);
            let (done, next) = oneshot::channel();
            let cancel = CancellationToken::new();
            self.starting.insert(name.clone(), cancel.clone());
            self.retry.remove(name);
            let job = start::Job {
                ctx: self.ctx.clone(),
                pod: self.pod.clone(),
                target: self.target(name),
                container,
                attempt,
                prepared: self.prepared.subscribe(),
                turn: turn.replace(next),
                _done: done,
                cancel,
            };
            let inputs = self.inputs.clone();
            tokio::spawn(start::run(job, move |p| {
                let _ = inputs.send(Input::Start(p));
            }));
        }
    }

    pub(super) fn progress(&mut self, p: Progress) {
        let running = matches!(p, Progress::Image { .. } | Progress::Running { .. });
        self.take_progress(p);
        if !running
            && self.starting.is_empty()
            && let Some(took) = self.record.first_pass()
        {
            self.ctx.metrics.observe("kubelet_pod_worker_duration_seconds", [("operation_type", "create")], took);
        }
    }

    fn take_progress(&mut self, p: Progress) {
        match p {
            Progress::Image { took } => self.record.phase("image", Some(took)),
            Progress::Running { name, instance, took } => {
                self.record.phase(format!("container {name}"), Some(took));
                let labels = [("container_type", self.kind_of(&name))];
                self.ctx.metrics.count("kubelet_started_containers_total", labels);
                self.installed(&name, *instance);
            }
            Progress::Started { name, id } => {
                self.starting.remove(&name);
                self.waiting.remove(&name);
                self.pulls.remove(&name);
                self.started(&name, &id);
            }
            Progress::HookFailed { name, id, message } => {
                self.starting.remove(&name);
                self.waiting.remove(&name);
                if self.state.by_id(&id).is_some_and(|(_, i)| i.running()) {
                    let own = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
                    self.stop_one(&name, Some(own.unwrap_or(30)), "FailedPostStartHook".into(), Vec::new());
                    // Shown once it has ended, until it is known how long the next start has to wait.
                    self.waiting.insert(name, ("PostStartHookError".into(), message));
                }
            }
            Progress::Failed { name, reason, message, ended } => self.start_failed(&name, reason, message, ended),
            Progress::Cancelled { name } => {
                self.starting.remove(&name);
                if !self.terminating {
                    self.retry.insert(name, now() + SECOND);
                }
            }
        }
    }

    /// What metrics call a container of the pod.
    pub(super) fn kind_of(&self, name: &str) -> &'static str {
        let init = self.pod.spec.as_ref().and_then(|s| s.init_containers.as_ref());
        match () {
            () if init.is_some_and(|l| l.iter().any(|c| c.name == name)) => "init_container",
            () if self.ephemeral.iter().any(|c| c.name == name) => "ephemeral_container",
            () => "container",
        }
    }

    /// A new instance takes the place of the last.
    pub(super) fn installed(&mut self, name: &str, instance: Instance) {
        let max = self.backoff_max();
        let record: &mut Record = self.state.containers.entry(name.into()).or_default();
        if let Some(old) = record.current.take() {
            let finished = old.ended.as_ref().map_or_else(now, |e| e.finished_at);
            record.backoff = Some(plan::next_backoff(record.backoff, finished, now(), max));
            record.last = Some(old);
            record.restarts = instance.attempt;
        }
        record.again = false;
        let early = self.early.remove(&instance.id);
        let sandbox = instance.sandbox;
        record.current = Some(instance);
        self.begins(name);
        self.dirty = true;
        if let Some(status) = early {
            self.exited(&status);
        }
        // Its sandbox was lost while word of the start was on its way.
        if self.state.sandbox.as_ref().is_some_and(|s| s.attempt != sandbox) {
            self.vanished(name);
        }
    }

    fn started(&mut self, name: &str, id: &str) {
        let waits = self.container(name).is_some_and(|c| start::waits_for_startup(&c));
        if let Some((_, i)) = self.state.by_id(id) {
            i.started = i.running() && !waits;
            self.dirty = true;
        }
        self.probe(name, false);
    }

    fn start_failed(&mut self, name: &str, reason: &'static str, message: String, ended: Option<Box<Instance>>) {
        self.starting.remove(name);
        let labels = [("container_type", self.kind_of(name)), ("code", reason)];
        self.ctx.metrics.count("kubelet_started_containers_errors_total", labels);
        self.record.blocked(&format!("{reason}: {message}"));
        tracing::info!(pod = sandbox::name(&self.pod), container = name, reason, message, "container not started");
        let at = now();
        match reason {
            "ErrImagePull" => {
                let pause = self.pulls.get(name).map_or(PULL_PAUSE, |p| (p * 2).min(PULL_PAUSE_MAX));
                self.pulls.insert(name.into(), pause);
                self.retry.insert(name.into(), at + pause);
                self.pull_shown.insert(name.into(), at + PULL_SHOWN);
            }
            "ErrImageNeverPull" | "InvalidImageName" => {
                self.retry.insert(name.into(), at + PULL_PAUSE_MAX);
            }
            _ if ended.is_some() => {}
            _ => {
                self.retry.insert(name.into(), at + 10 * SECOND);
                self.watch_references();
            }
        }
        if let Some(instance) = ended {
            self.installed(name, *instance);
            if let Some(e) = self.ends.get(name) {
                e.flag.send_replace(true);
                e.token.cancel();
            }
        }
        self.waiting.insert(name.into(), (reason.into(), message));
        self.dirty = true;
    }

    /// An error of a pull turns into the back-off that follows it.
    fn age_pull_errors(&mut self, at: Nanos) {
        let due: Vec<String> = self.pull_shown.iter().filter(|(_, t)| **t <= at).map(|(n, _)| n.clone()).collect();
        for name in due {
            self.pull_shown.remove(&name);
            let Some((reason, message)) = self.waiting.get(&name).cloned() else { continue };
            if reason != "ErrImagePull" || self.terminating {
                continue;
            }
            let image = self.container(&name).and_then(|c| c.image).unwrap_or_default();
            let text = format!("Back-off pulling image {image:?}");
            self.ctx.events.container(&self.pod, &name, Kind::Normal, "BackOff", text.clone());
            self.ctx.events.container(&self.pod, &name, Kind::Warning, "Failed", "Error: ImagePullBackOff");
            self.waiting.insert(name, ("ImagePullBackOff".into(), format!("{text}: ErrImagePull: {message}")));
        }
    }

    /// Nothing runs any more and nothing will: take the pod down.
    fn finish(&mut self) {
        if self.removing || self.removed || self.sandbox == Making::Busy || self.volumes == Making::Busy {
            return;
        }
        if self.remove_again.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.removing = true;
        self.remove_again = None;
        self.record.complete("over");
        self.mounted = None;
        self.prepared.send_replace(None);
        for (_, list) in self.probes.drain() {
            list.iter().for_each(|(_, p)| p.abort());
        }
        let supervisor = self.live.as_ref().map(|l| l.supervisor.clone());
        let group = self.state.sandbox.as_ref().map(|s| s.cgroup.clone());
        let (ctx, uid, inputs) = (self.ctx.clone(), self.uid().to_string(), self.inputs.clone());
        tokio::spawn(async move {
            let begun = StdInstant::now();
            let mut done = sandbox::remove(&ctx, &uid, supervisor.as_ref(), group.as_deref()).await;
            ctx.metrics.operation("stop_podsandbox", begun, done.is_ok());
            for released in [crate::csi::release(&ctx, &uid).await, claims::release(&ctx, &uid).await] {
                done = done.and(released);
            }
            let dir = ctx.config.paths.pod(&uid);
            let data = tokio::task::spawn_blocking(move || sandbox::remove_data(&dir, false)).await;
            done = done.and(data.map_err(|e| e.to_string()).and_then(|data| data.map_err(|e| e.to_string())));
            let _ = inputs.send(Input::Removed(done));
        });
    }
}

fn instant(at: Nanos, now: Nanos) -> Instant {
    // Timers round down to a millisecond: one more makes sure that the time has come.
    let left = u64::try_from(at.saturating_sub(now)).unwrap_or(0) + 1_000_000;
    Instant::now() + Duration::from_nanos(left)
}
