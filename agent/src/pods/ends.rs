//! How a pod's containers and its supervisor end, taken in by the worker.

use isopod_runtime::supervisor::{
    protocol::{ContainerStatus, Op},
    status_file,
};

use super::{
    message, sandbox, start,
    state::{Ended, now},
    worker::{Ends, Making, Worker},
};
use crate::{events::Kind, runtime::RuntimeEvent};

impl Worker {
    /// What the supervisor tells.
    pub(super) fn runtime(&mut self, event: RuntimeEvent) {
        match event {
            RuntimeEvent::Exited(status) => self.exited(&status),
            RuntimeEvent::Lost if self.removing || self.removed || self.live.is_none() => {}
            RuntimeEvent::Lost => {
                tracing::warn!(pod = sandbox::name(&self.pod), "the pod's supervisor is gone");
                self.lost();
            }
        }
    }

    /// The supervisor is gone and with it the pod's containers: everything starts again in a new sandbox.
    pub(super) fn lost(&mut self) {
        self.live = None;
        self.prepared.send_replace(None);
        let running = self.state.containers.iter().filter(|(_, r)| r.running());
        let running: Vec<String> = running.map(|(name, _)| name.clone()).collect();
        running.iter().for_each(|name| self.vanished(name));
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

    /// A container that runs for all the agent knows is there no more. What its supervisor recorded before it could tell is
    /// the truth; of what it had not seen nobody knows.
    pub(super) fn vanished(&mut self, name: &str) {
        if let Some(status) = self.recorded(name) {
            self.exited(&status);
        }
        self.ended_with(name, || Ended {
            code: 137,
            signal: None,
            reason: "ContainerStatusUnknown".into(),
            message: "The container could not be located when the pod was terminated".into(),
            finished_at: now(),
        });
        let Some(attempt) = self.state.current(name).map(|i| i.attempt) else { return };
        let bundle = super::exec::bundle(&self.ctx.config.paths, self.uid(), name, attempt);
        if let Err(error) = crate::volumes::mounts::remove_tree(&bundle) {
            tracing::debug!(%error, "container directory");
        }
    }

    /// The end of a container that runs for all the agent knows, as its supervisor left it on disk.
    fn recorded(&self, name: &str) -> Option<ContainerStatus> {
        let id = &self.state.current(name)?.id;
        let text = std::fs::read(status_file(&self.ctx.config.paths.run_pod(self.uid()), id)).ok()?;
        serde_json::from_slice(&text).ok().filter(|status: &ContainerStatus| status.exit.is_some())
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
        let labels =
            [("container_type", self.kind_of(&name)), ("exit_code", &exit.code.to_string()), ("reason", reason)];
        self.ctx.metrics.count("kubelet_terminated_containers_total", labels);
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
}
