//! One graceful end of one container: preStop hook, its turn, the stop signal, and after the grace period SIGKILL.

use std::{path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use super::hooks;
use crate::{context::Context, events::Kind, runtime::Supervisor};

/// Given after a preStop hook has used up the grace period.
const LEAST: Duration = Duration::from_secs(2);

/// A container to be stopped.
pub(crate) struct Job {
    pub(crate) ctx: Arc<Context>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) container: Container,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) ip: Option<std::net::IpAddr>,
    pub(crate) supervisor: Supervisor,
    pub(crate) signal: i32,
    /// When SIGKILL is due; may come nearer.
    pub(crate) deadline: watch::Receiver<Instant>,
    /// Cancelled when the container has ended.
    pub(crate) ended: CancellationToken,
    /// Containers that end before this one is told to.
    pub(crate) after: Vec<CancellationToken>,
    pub(crate) message: String,
}

/// Does it; returns when the container has ended or has been killed.
pub(crate) async fn run(job: Job) {
    job.ctx.events.container(&job.pod, &job.container.name, Kind::Normal, "Killing", job.message.clone());
    let gentle = async {
        let hook = job.container.lifecycle.as_ref().and_then(|l| l.pre_stop.clone());
        let left = job.deadline.borrow().saturating_duration_since(Instant::now());
        if let Some(hook) = hook.filter(|_| !left.is_zero()) {
            if hook.sleep.as_ref().is_some_and(|s| u64::try_from(s.seconds).is_ok_and(|s| s > left.as_secs())) {
                job.ctx.metrics.count("kubelet_sleep_action_terminated_early_total", []);
            }
            let ran = hooks::run(&hook, &job.container, &job.id, &job.supervisor, &job.bundle, job.ip, left);
            if let Err(message) = ran.await {
                tracing::info!(container = job.container.name, message, "preStop hook failed");
                let events = &job.ctx.events;
                events.container(
                    &job.pod,
                    &job.container.name,
                    Kind::Warning,
                    "FailedPreStopHook",
                    "PreStopHook failed",
                );
            }
        }
        for before in &job.after {
            before.cancelled().await;
        }
    };
    tokio::select! {
        () = job.ended.cancelled() => return,
        () = gentle => {}
        () = reached(job.deadline.clone(), Duration::ZERO) => {}
    }
    let asked = Instant::now();
    let done = || job.ctx.metrics.operation("stop_container", asked.into_std(), true);
    if let Err(error) = job.supervisor.kill(&job.id, job.signal, false).await {
        tracing::debug!(container = job.container.name, %error, "stop signal");
    }
    tokio::select! {
        () = job.ended.cancelled() => return done(),
        () = async {
            reached(job.deadline.clone(), Duration::ZERO).await;
            // However long the hook took, the process gets a moment to react.
            let hooked = job.container.lifecycle.as_ref().is_some_and(|l| l.pre_stop.is_some());
            if hooked {
                tokio::time::sleep_until(asked + LEAST).await;
            }
        } => {}
    }
    if let Err(error) = job.supervisor.kill(&job.id, libc::SIGKILL, true).await {
        tracing::debug!(container = job.container.name, %error, "SIGKILL");
    }
    job.ended.cancelled().await;
    done();
}

async fn reached(mut deadline: watch::Receiver<Instant>, more: Duration) {
    loop {
        let at = *deadline.borrow_and_update() + more;
        tokio::select! {
            () = tokio::time::sleep_until(at) => return,
            changed = deadline.changed() => if changed.is_err() {
                tokio::time::sleep_until(at).await;
                return;
            },
        }
    }
}
