//! Graceful shutdown of the node: pods end in order while logind waits.
//!
//! In: logind's word that the machine goes down (a lock of ours delays it). Out: the node's Ready condition, pods told to
//! fail as `Terminated`, the lock given back when they are gone or their time is up. A shutdown that is called off
//! leaves the node as it was. The agent takes no more pods meanwhile.

use std::{
    collections::HashSet,
    fs,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use isopod_runtime::logind::Logind;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    config::KubeletConfiguration,
    context::Context,
    events::Kind,
    pods::{
        TERMINATED, sandbox,
        table::{PodTable, Snapshot},
    },
    sources::SOURCE,
};

/// Where the system's bus listens.
const BUS: &str = "/run/dbus/system_bus_socket";
/// Where logind's longest delay is raised.
const DROP_IN: &str = "/etc/systemd/logind.conf.d/99-kubelet.conf";
/// First line of a file that isopod wrote.
const OURS: &str = "# Written by isopod for a graceful shutdown.";
/// Pods from this priority on are critical.
const CRITICAL: i32 = 2_000_000_000;
/// First pause before a bus that is gone is tried again ...
const PAUSE: Duration = Duration::from_secs(1);
/// ... and the longest.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Pods of at least a priority, and how long they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    priority: i32,
    period: Duration,
}

/// The steps of a shutdown, lowest priority first; none when it is not to be graceful.
fn steps(k: &KubeletConfiguration) -> Vec<Step> {
    let (total, critical) = (k.shutdown_grace_period, k.shutdown_grace_period_critical_pods);
    let mut steps: Vec<Step> = k
        .shutdown_grace_period_by_pod_priority
        .iter()
        .map(|p| {
            let seconds = u64::try_from(p.shutdown_grace_period_seconds).unwrap_or(0);
            Step { priority: p.priority, period: Duration::from_secs(seconds) }
        })
        .collect();
    if steps.is_empty() && total > Duration::ZERO {
        steps = vec![
            Step { priority: 0, period: total.saturating_sub(critical) },
            Step { priority: CRITICAL, period: critical },
        ];
    }
    steps.sort_by_key(|s| s.priority);
    steps
}

/// Which step a pod of some priority belongs to: the last it reaches, or the first of all.
fn step_of(steps: &[Step], priority: i32) -> usize {
    steps.iter().rposition(|s| s.priority <= priority).unwrap_or(0)
}

/// Runs until `stop`, when shutdowns are to be graceful.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let steps = steps(&ctx.config.kubelet);
    if steps.is_empty() {
        return;
    }
    let mut pause = PAUSE;
    loop {
        // Both arms may be dropped: what is held goes with them.
        let ended = tokio::select! {
            () = stop.cancelled() => return,
            ended = follow(&ctx, &steps) => ended,
        };
        ctx.shutdown.send_if_modified(|now| std::mem::replace(now, false));
        match ended {
            Ok(()) => pause = PAUSE,
            Err(error) => {
                tracing::error!(error, "shutdowns of this node are not graceful");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                }
            }
        }
    }
}

/// Ends a wait for logind when it goes.
struct Closer(UnixStream);

impl Drop for Closer {
    fn drop(&mut self) {
        // Fails only when the bus was quicker.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Holds the lock and acts on a shutdown; returns when one was called off.
async fn follow(ctx: &Arc<Context>, steps: &[Step]) -> Result<(), String> {
    let whole = steps.iter().map(|s| s.period).sum();
    let held = tokio::task::spawn_blocking(move || hold(whole)).await;
    let (logind, lock) = held.map_err(|e| e.to_string())??;
    let _closer = Closer(logind.closer().map_err(|e| e.to_string())?);
    tracing::info!(?whole, "this node's shutdown waits for its pods");
    let mut words = listen(logind);
    let mut lock = Some(lock);
    loop {
        let word = words.recv().await.ok_or("the bus is gone")?;
        if !word? {
            continue;
        }
        let going = "Shutdown manager detected shutdown event";
        ctx.events.node(&ctx.node_name, Kind::Normal, "Shutdown", going);
        ctx.metrics.set_now("kubelet_graceful_shutdown_start_time_seconds");
        ctx.shutdown.send_replace(true);
        tracing::warn!("the machine is shutting down");
        let ends = async {
            end_pods(&ctx.table, steps).await;
            ctx.metrics.set_now("kubelet_graceful_shutdown_end_time_seconds");
        };
        // Word that it is called off stays in the channel while pods end.
        tokio::select! {
            () = ends => drop(lock.take()),
            word = words.recv() => {
                word.ok_or("the bus is gone")??;
            }
        }
        while lock.is_none() {
            if !words.recv().await.ok_or("the bus is gone")?? {
                break;
            }
        }
        let off = "Shutdown manager detected shutdown cancellation";
        ctx.events.node(&ctx.node_name, Kind::Normal, "Shutdown", off);
        return Ok(());
    }
}

/// What logind says, from a thread of its own: its socket is read without an end in sight.
fn listen(mut logind: Logind) -> mpsc::UnboundedReceiver<Result<bool, String>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    thread::spawn(move || {
        loop {
            let word = logind.announced().map_err(|e| e.to_string());
            let over = word.is_err();
            if sender.send(word).is_err() || over {
                return;
            }
        }
    });
    receiver
}

/// Takes the lock; logind is told to grant long enough a delay when it does not.
fn hold(whole: Duration) -> Result<(Logind, OwnedFd), String> {
    let said = |e: isopod_runtime::error::Error| e.to_string();
    let mut logind = Logind::connect(Path::new(BUS)).map_err(said)?;
    let mut delay = logind.longest_delay().map_err(said)?;
    if delay < whole {
        let text = format!("{OURS}\n[Login]\nInhibitDelayMaxSec={}\n", whole.as_secs());
        let path = Path::new(DROP_IN);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(path, text));
        written.map_err(|e| format!("{DROP_IN}: {e}"))?;
        logind.reload().map_err(said)?;
        // It answers the next question with what it has read.
        delay = logind.longest_delay().map_err(said)?;
        if delay < whole {
            return Err(format!(
                "node shutdown manager was unable to update logind InhibitDelayMaxSec to {whole:?} (ShutdownGracePeriod), \
                 current value of InhibitDelayMaxSec ({delay:?}) is less than requested ShutdownGracePeriod"
            ));
        }
    }
    let lock = logind.inhibit("kubelet", "Kubelet needs time to handle node shutdown").map_err(said)?;
    Ok((logind, lock))
}

/// Takes back what logind was told, if it was told by isopod.
pub(crate) fn forget() {
    if fs::read_to_string(DROP_IN).is_ok_and(|text| text.starts_with(OURS)) {
        fs::remove_file(DROP_IN).ok();
    }
}

/// Ends pods step by step; a step ends when its pods are gone or its time is up. Pods that the agent takes over only now are
/// waited for: their turn may be before the API server's.
async fn end_pods(table: &PodTable, steps: &[Step]) {
    let mut told = HashSet::new();
    for (at, step) in steps.iter().enumerate() {
        let over = told.clone();
        let mine = |s: &Arc<Snapshot>| {
            step_of(steps, priority(&s.pod)) <= at && is_there(s) && !over.contains(sandbox::uid(&s.pod))
        };
        let most = i64::try_from(step.period.as_secs()).unwrap_or(i64::MAX);
        let mut changes = table.changes();
        let ends = async {
            table.complete().await;
            loop {
                let pods: Vec<_> = table.all().into_iter().filter(mine).collect();
                for s in pods.iter().filter(|s| told.insert(sandbox::uid(&s.pod).to_owned())) {
                    let own = s.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
                    let (reason, message) = TERMINATED;
                    s.worker.fail(reason, message.into(), own.min(most));
                }
                if pods.is_empty() || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(step.period, ends).await.is_err() {
            tracing::warn!(priority = step.priority, "pods have not ended in time");
        }
    }
}

/// Static pods are critical whatever they say: the API server is one of them.
fn priority(pod: &Pod) -> i32 {
    let said = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    let is_static = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(SOURCE));
    if is_static { said.max(CRITICAL) } else { said }
}

fn is_there(s: &Snapshot) -> bool {
    let phase = s.pod.status.as_ref().and_then(|s| s.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> KubeletConfiguration {
        KubeletConfiguration::parse(&format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}\n"
        ))
        .unwrap()
    }

    #[test]
    fn static_pods_are_critical() {
        let pod = |annotations: &str, priority: i32| -> Pod {
            let text = format!(
                r#"{{"metadata":{{"annotations":{annotations}}},"spec":{{"containers":[],"priority":{priority}}}}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        assert_eq!(priority(&pod("{}", 7)), 7);
        let source = format!(r#"{{"{SOURCE}":"file"}}"#);
        assert_eq!((priority(&pod(&source, 0)), priority(&pod(&source, CRITICAL + 9))), (CRITICAL, CRITICAL + 9));
    }

    #[test]
    fn the_critical_end_last() {
        assert!(steps(&config("")).is_empty());
        let two = steps(&config("shutdownGracePeriod: 30s\nshutdownGracePeriodCriticalPods: 10s"));
        let step = |priority, seconds| Step { priority, period: Duration::from_secs(seconds) };
        assert_eq!(two, [step(0, 20), step(CRITICAL, 10)]);
        assert_eq!([-5, 0, 1000, CRITICAL, CRITICAL + 1000].map(|p| step_of(&two, p)), [0, 0, 0, 1, 1]);
        let own = "shutdownGracePeriodByPodPriority: [{priority: 100, shutdownGracePeriodSeconds: 5}, \
                   {priority: 10, shutdownGracePeriodSeconds: 7}]";
        let own = steps(&config(own));
        assert_eq!(own, [step(10, 7), step(100, 5)]);
        assert_eq!([0, 10, 99, 100].map(|p| step_of(&own, p)), [0, 0, 0, 1]);
    }
}
