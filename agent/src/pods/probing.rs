//! A worker's probes: started when a container runs, what they say taken in.

use std::{collections::HashMap, time::Duration};

use super::{
    exec, plan,
    state::now,
    stop,
    worker::{Input, Worker},
};
use crate::probes::{self, Kind, Target, Verdict};

/// While a pod ends only its readiness is still asked for.
pub(super) fn keep_readiness(all: &mut HashMap<String, Vec<(Kind, tokio::task::AbortHandle)>>) {
    for list in all.values_mut() {
        list.retain(|(kind, task)| {
            let keep = *kind == Kind::Readiness;
            if !keep {
                task.abort();
            }
            keep
        });
    }
}

impl Worker {
    /// Starts the probes that are due: the startup probe first, the others when it has passed.
    pub(super) fn probe(&mut self, name: &str, resumed: bool) {
        let (Some(c), Some(live)) = (self.container(name), self.live.clone()) else { return };
        let Some(i) = self.state.current(name).filter(|i| i.running()).cloned() else { return };
        let is_init =
            self.pod.spec.as_ref().is_some_and(|s| s.init_containers.iter().flatten().any(|x| x.name == name));
        if is_init && !crate::qos::is_sidecar(&c) {
            return;
        }
        let age = now().saturating_sub(i.started_at.unwrap_or_default());
        let target = Target {
            ctx: self.ctx.clone(),
            pod: self.pod.clone(),
            bundle: exec::bundle(&self.ctx.config.paths, self.uid(), name, i.attempt),
            container: c,
            id: i.id.clone(),
            supervisor: live.supervisor,
            ip: live.ips.first().copied(),
            age: Duration::from_nanos(u64::try_from(age).unwrap_or(0)),
        };
        let kinds: &[Kind] = if i.started { &[Kind::Liveness, Kind::Readiness] } else { &[Kind::Startup] };
        for kind in kinds {
            if self.terminating && *kind != Kind::Readiness {
                continue;
            }
            let known = (resumed && *kind == Kind::Readiness).then_some(i.ready);
            let inputs = self.inputs.clone();
            let report = move |v: Verdict| {
                let _ = inputs.send(Input::Probe(v));
            };
            if let Some(task) = probes::spawn(target.clone(), *kind, known, report) {
                self.probes.entry(name.into()).or_default().push((*kind, task));
            }
        }
    }

    /// A probe's result has turned.
    pub(super) fn verdict(&mut self, v: &Verdict) {
        let Some((name, i)) = self.state.by_id(&v.id) else { return };
        let name = name.clone();
        if !i.running() {
            return;
        }
        match (v.kind, v.good) {
            (Kind::Readiness, good) => {
                i.ready = good;
                self.dirty = true;
            }
            (Kind::Startup, true) => {
                i.started = true;
                self.dirty = true;
                self.probe(&name, false);
            }
            (Kind::Liveness, true) => {}
            (Kind::Startup, false) => self.unhealthy(&name, "startup", v.kind),
            (Kind::Liveness, false) => self.unhealthy(&name, "liveness", v.kind),
        }
    }

    fn unhealthy(&mut self, name: &str, what: &str, kind: Kind) {
        let Some(c) = self.container(name) else { return };
        let own = probes::of(&c, kind).and_then(|p| p.termination_grace_period_seconds);
        let pod = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let grace = own.or(pod).unwrap_or(30);
        let message = format!("Container {name} failed {what} probe, will be restarted");
        self.stop_one(name, Some(grace), message, Vec::new());
    }

    /// Begins to stop one running container. `grace` of `None` is the pod's own deadline.
    pub(super) fn stop_one(
        &mut self,
        name: &str,
        grace: Option<i64>,
        message: String,
        after: Vec<tokio_util::sync::CancellationToken>,
    ) {
        if self.stopping.contains(name) {
            return;
        }
        let (Some(mut container), Some(live)) = (self.container(name), self.live.clone()) else { return };
        let Some(i) = self.state.current(name).filter(|i| i.running()) else { return };
        if !self.terminating && self.pod.spec.as_ref().is_some_and(|s| plan::restarts_all(s, &self.state).is_some()) {
            // As upstream: no hook holds up a restart of all.
            container.lifecycle = None;
        }
        let Some(ends) = self.ends.get(name) else { return };
        let deadline = match grace {
            None => self.deadline.subscribe(),
            Some(g) => {
                let g = Duration::from_secs(u64::try_from(g).unwrap_or(0).max(1));
                tokio::sync::watch::channel(tokio::time::Instant::now() + g).1
            }
        };
        let job = stop::Job {
            ctx: self.ctx.clone(),
            pod: self.pod.clone(),
            id: i.id.clone(),
            bundle: exec::bundle(&self.ctx.config.paths, self.uid(), name, i.attempt),
            ip: live.ips.first().copied(),
            supervisor: live.supervisor,
            signal: if i.stop_signal > 0 { i.stop_signal } else { libc::SIGTERM },
            deadline,
            ended: ends.token.clone(),
            after,
            message,
            container,
        };
        self.stopping.insert(name.into());
        let (inputs, name) = (self.inputs.clone(), name.to_string());
        tokio::spawn(async move {
            stop::run(job).await;
            let _ = inputs.send(Input::Stopped(name));
        });
    }
}
