//! What a worker writes down and shows: its state on disk, the status for the API server, the snapshot for the node's clients.

use std::{sync::Arc, time::SystemTime};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::{
    sandbox,
    state::{Instance, now},
    status,
    table::{ContainerView, Snapshot},
    worker::{Teller, Worker},
};

impl Worker {
    pub(super) fn forget(&self) {
        let uid = self.uid();
        let paths = &self.ctx.config.paths;
        if let Err(error) = sandbox::remove_data(&paths.pod(uid), true) {
            tracing::warn!(pod = sandbox::name(&self.pod), %error, "pod directory stays");
        }
        let logs = paths.pod_logs(sandbox::namespace(&self.pod), sandbox::name(&self.pod), uid);
        std::fs::remove_dir_all(logs).ok();
        self.ctx.metrics.forget_pod(sandbox::namespace(&self.pod), sandbox::name(&self.pod));
        self.ctx.devices.release(uid);
        self.ctx.topology.release(uid);
        self.ctx.users.release(uid);
        self.ctx.table.remove(uid);
    }

    pub(super) fn save_spec(&self) {
        let dir = self.ctx.config.paths.pod(self.uid());
        if std::fs::create_dir_all(&dir).is_ok()
            && let Ok(text) = serde_json::to_vec(self.pod.as_ref())
            && let Err(error) = super::state::write_atomically(&dir.join("pod.json"), &text)
        {
            tracing::warn!(path = %dir.display(), %error, "pod not saved");
        }
    }

    /// Saves what is remembered and shows it to the API server and the node's clients.
    pub(super) fn publish(&mut self) {
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
            if ready && let Some(took) = self.record.complete("ready") {
                let m = &self.ctx.metrics;
                m.observe("kubelet_pod_start_duration_seconds", [], took);
                let created = self.pod.metadata.creation_timestamp.as_ref().map(|t| SystemTime::from(t.0));
                let total = created.and_then(|at| at.elapsed().ok()).map_or(took, |total| total.max(took));
                m.observe("kubelet_pod_start_total_duration_seconds", [], total);
                let pulls = self.record.spent("image");
                let sli = total.saturating_sub(pulls);
                m.observe("kubelet_pod_start_sli_duration_seconds", [], sli);
                if self.pod.spec.as_ref().is_some_and(|s| s.host_network != Some(true)) {
                    m.first("kubelet_first_network_pod_start_sli_duration_seconds", sli);
                }
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
                self.dirty = true;
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
            attempt: self.state.sandbox.as_ref().map_or(0, |s| s.attempt),
            netns: self.state.sandbox.as_ref().and_then(|s| s.netns.clone()),
            host_network: self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true)),
            supervisor: self.live.as_ref().map(|l| l.supervisor.clone()),
            worker: Teller::new(self.inputs.clone()),
            pod: Arc::new(pod),
        };
        self.ctx.table.put(self.uid(), snapshot);
    }
}
