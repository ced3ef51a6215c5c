//! Taking a pod over after a restart of the agent: nothing in the pod notices.

use super::{
    exec, sandbox,
    state::Instance,
    worker::{Making, Worker},
};
use crate::{spec::field::Addresses, volumes};
use isopod_runtime::supervisor::protocol::{ContainerState, ContainerStatus, Op};

impl Worker {
    /// Joins the sandbox that the state on disk speaks of, if it is still there.
    pub(super) async fn adopt(&mut self) {
        if self.pod.metadata.deletion_timestamp.is_some() {
            let grace = self.pod.metadata.deletion_grace_period_seconds;
            self.terminate(grace, true);
        }
        if self.state.finished {
            self.ctx.topology.release(self.uid());
            self.removed = true;
            return;
        }
        let Some(sandbox) = self.state.sandbox.clone() else {
            // The agent may have died between the supervisor's start and its note: begin from nothing.
            self.clear_leftovers().await;
            return;
        };
        match sandbox::join(&self.ctx, &self.pod, &sandbox, self.events.clone()).await {
            Ok((live, containers)) => {
                self.addresses.send_replace(Addresses { pod: live.ips.clone(), host: self.ctx.machine.ips.clone() });
                self.state.ips = live.ips.clone();
                self.state.lost = false;
                self.live = Some(live);
                self.sandbox = Making::Done;
                self.reconcile(&containers).await;
                tracing::info!(pod = sandbox::name(&self.pod), containers = containers.len(), "pod taken over");
                if !self.terminating {
                    self.mount_again().await;
                }
            }
            Err(error) => {
                if sandbox::was_stopped(&self.ctx, self.uid()) {
                    tracing::info!(pod = sandbox::name(&self.pod), "pod was stopped with its node");
                } else {
                    tracing::warn!(pod = sandbox::name(&self.pod), error, "the pod's supervisor cannot be joined");
                }
                self.lost();
                // The machine or a person ended it, not its own failure: as after a restart of the kubelet, nothing waits.
                self.state.containers.values_mut().for_each(|r| r.backoff = None);
                self.clear_leftovers().await;
            }
        }
    }

    /// Content volumes follow their sources again; without an API server that waits in the background.
    async fn mount_again(&mut self) {
        self.volumes = Making::Busy;
        let (ctx, pods, addresses, inputs) =
            (self.ctx.clone(), self.pods.subscribe(), self.addresses.subscribe(), self.inputs.clone());
        tokio::spawn(async move {
            let made = volumes::mount(&ctx, pods, addresses).await;
            let _ = inputs.send(super::worker::Input::Volumes(made, std::time::Duration::from_secs(1)));
        });
    }

    async fn clear_leftovers(&mut self) {
        let run = self.ctx.config.paths.run_pod(self.uid());
        if !run.exists() {
            return;
        }
        let (events, _) = tokio::sync::mpsc::unbounded_channel();
        let stale = crate::runtime::connect(&run, events).ok();
        if let Err(error) = sandbox::remove(&self.ctx, self.uid(), stale.as_ref(), None).await {
            tracing::warn!(pod = sandbox::name(&self.pod), error, "leftovers of an earlier start");
        }
    }

    /// Compares what is remembered with what the supervisor has.
    async fn reconcile(&mut self, containers: &[ContainerStatus]) {
        for status in containers {
            if self.state.by_id(&status.id).is_none() {
                self.unknown(status).await;
            }
        }
        let names: Vec<String> = self.state.containers.keys().cloned().collect();
        for name in names {
            let Some(i) = self.state.current(&name).filter(|i| i.running()).cloned() else { continue };
            self.begins(&name);
            match containers.iter().find(|s| s.id == i.id) {
                Some(s) if s.state == ContainerState::Running => {}
                Some(s) if s.state == ContainerState::Exited => {
                    self.exited(s);
                    continue;
                }
                _ => {
                    self.vanished(&name);
                    continue;
                }
            }
            self.probe(&name, true);
        }
    }

    /// A container that the agent started and died before it wrote that down.
    async fn unknown(&mut self, status: &ContainerStatus) {
        if let Some((name, mut instance)) = self.noted(&status.id)
            && status.started_at.is_some()
        {
            instance.started_at = status.started_at;
            instance.started = self.container(&name).is_some_and(|c| !super::start::waits_for_startup(&c));
            self.installed(&name, instance);
            return;
        }
        let Some(supervisor) = self.live.as_ref().map(|l| l.supervisor.clone()) else { return };
        if status.exit.is_none() {
            supervisor.kill(&status.id, libc::SIGKILL, true).await.ok();
        }
        supervisor.done(Op::Delete { container: status.id.clone() }).await.ok();
    }

    /// The note a start leaves beside config.json.
    fn noted(&self, id: &str) -> Option<(String, Instance)> {
        let spec = self.pod.spec.as_ref()?;
        let names = crate::qos::all_containers(spec).chain(&self.ephemeral).map(|c| c.name.clone());
        names.into_iter().find_map(|name| {
            let next = self.state.containers.get(&name).map_or(0, |r| r.restarts + 1);
            (0..=next).rev().take(2).find_map(|attempt| {
                let bundle = exec::bundle(&self.ctx.config.paths, self.uid(), &name, attempt);
                let text = std::fs::read(bundle.join("instance.json")).ok()?;
                let instance: Instance = serde_json::from_slice(&text).ok()?;
                (instance.id == id).then(|| (name.clone(), instance))
            })
        })
    }
}
