//! isopod scheduler: gives every pod without a node the best one, or says why there is none.
//!
//! In: watches of pods, nodes and what spreading, volumes and budgets need. Out: bindings, conditions, events, evictions.
//! Plugins are pure functions over [`cluster`]; [`cycle`] runs them for one pod; this file is the loop around it. A pod
//! given a node counts there at once (assumed); its binding goes out while the next pod is looked at.

mod apply;
mod cluster;
mod cycle;
mod model;
mod plugins;
mod preempt;
mod queue;
mod state;
#[cfg(test)]
mod testing;
mod workload;

use apply::Writer;
use isopod_client::elect::Election;
use isopod_client::objects::{is_not_found, message};
use isopod_client::record::Flavor;
use isopod_client::reflect::{Source, reflect};
use isopod_client::select::Selector;
use isopod_client::{Cache, Objects, Recorder};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use model::PodInfo;
use plugins::volumes::{Needs, Storage};
use preempt::{Budget, Preemption};
use queue::{Event, Queued};
use state::Shared;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use workload::Workloads;

/// How the scheduler runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Pods that name this scheduler are ours.
    pub scheduler_name: String,
    /// How many bindings are on the way at once.
    pub parallel_binds: usize,
    /// Act only while holding the lease `kube-system/kube-scheduler`.
    pub leader_elect: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { scheduler_name: "default-scheduler".into(), parallel_binds: 32, leader_elect: false }
    }
}

/// Why the scheduler ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process leads now.
    #[error("lost the leader lease kube-system/kube-scheduler")]
    LeaseLost,
}

struct Scheduler {
    shared: Arc<Shared>,
    storage: Storage,
    workloads: Workloads,
    budgets: Arc<Cache<PodDisruptionBudget>>,
    writer: Writer,
    binds: Arc<Semaphore>,
}

/// Runs the scheduler until `stop`.
pub async fn run(client: kube::Client, config: Config, stop: CancellationToken) -> Result<(), Error> {
    let objects = Objects::new(client.clone(), "kube-scheduler");
    let leading = if config.leader_elect {
        match Election::new("kube-scheduler").lead(objects.clone(), stop.clone()).await {
            Some(leading) => leading,
            None => return Ok(()),
        }
    } else {
        stop.child_token()
    };
    let scheduler = Arc::new(Scheduler::start(client, objects, &config, &leading));
    tokio::select! {
        // Cancel-safe: a cycle is synchronous, and what it started runs in tasks of its own.
        () = scheduler.clone().work() => {}
        () = leading.cancelled() => {}
    }
    if stop.is_cancelled() { Ok(()) } else { Err(Error::LeaseLost) }
}

fn follow<T>(shared: &Arc<Shared>, client: &kube::Client, path: &str, stop: &CancellationToken)
where
    T: Clone + serde::de::DeserializeOwned + Send + 'static,
    Shared: isopod_client::reflect::Sink<T>,
{
    let source = Source { path: path.to_owned(), query: String::new(), metadata_only: false };
    let (shared, client, stop) = (shared.clone(), client.clone(), stop.clone());
    tokio::spawn(async move { reflect::<T, _>(client, source, &*shared, stop).await });
}

/// What one cycle came to.
enum Outcome {
    Bind(Queued, String, Vec<(String, Option<String>)>),
    Fail(Queued, String, Option<(String, Vec<Arc<PodInfo>>)>),
}

impl Scheduler {
    fn start(client: kube::Client, objects: Objects, config: &Config, stop: &CancellationToken) -> Self {
        let shared = Shared::new(&config.scheduler_name);
        follow::<Pod>(&shared, &client, "/api/v1/pods", stop);
        follow::<Node>(&shared, &client, "/api/v1/nodes", stop);
        follow::<Namespace>(&shared, &client, "/api/v1/namespaces", stop);
        let storage = Storage { claims: Cache::new(), volumes: Cache::new(), classes: Cache::new() };
        let s = shared.clone();
        storage.claims.subscribe(move |_| s.event(Event::Storage));
        let s = shared.clone();
        storage.volumes.subscribe(move |_| s.event(Event::Storage));
        let s = shared.clone();
        storage.classes.subscribe(move |_| s.event(Event::Storage));
        storage.claims.start_all(client.clone(), stop.clone());
        storage.volumes.start_all(client.clone(), stop.clone());
        storage.classes.start_all(client.clone(), stop.clone());
        let budgets = Cache::new();
        budgets.start_all(client.clone(), stop.clone());
        // The component is a name in every event; it comes from the configuration once.
        let component: &'static str = match config.scheduler_name.as_str() {
            "default-scheduler" => "default-scheduler",
            other => Box::leak(other.to_owned().into_boxed_str()),
        };
        let recorder = Recorder::start(objects.clone(), Flavor::Events, component, stop.clone());
        Self {
            shared,
            storage,
            workloads: Workloads::start(&client, stop),
            budgets,
            writer: Writer { objects, recorder },
            binds: Arc::new(Semaphore::new(config.parallel_binds.max(1))),
        }
    }

    async fn work(self: Arc<Self>) {
        self.shared.synced().await;
        self.workloads.synced().await;
        self.storage.claims.synced().await;
        self.storage.volumes.synced().await;
        self.storage.classes.synced().await;
        self.budgets.synced().await;
        loop {
            let wake = self.shared.wake.notified();
            while let Some(outcome) = self.cycle() {
                self.clone().apply(outcome);
                // Lets bindings and watches run between two pods.
                tokio::task::yield_now().await;
            }
            let deadline = self.shared.state.lock().waiting.deadline();
            match deadline {
                Some(at) => {
                    tokio::select! {
                        // Cancel-safe: both only wait.
                        () = wake => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => wake.await,
            }
        }
    }

    /// Takes the next pod and decides.
    fn cycle(&self) -> Option<Outcome> {
        let mut state = self.shared.state.lock();
        let state = &mut *state;
        let mut queued = state.waiting.pop(Instant::now())?;
        let pod = queued.pod.clone();
        let needs = Needs::new(&self.storage, &pod.namespace, &pod.claims);
        let found = cycle::schedule(&mut state.cluster, &pod, needs.clone(), || self.workloads.selector(&pod));
        let unfit = match found {
            Ok(index) => {
                let node = state.cluster.nodes[index].name.clone();
                let chosen = needs.ok().and_then(|n| n.choose(&state.cluster.nodes[index])).unwrap_or_default();
                state.cluster.nominated.remove(&pod.uid);
                state.cluster.place(&pod, &node);
                state.assumed.insert(pod.uid.clone(), pod);
                return Some(Outcome::Bind(queued, node, chosen));
            }
            Err(unfit) => unfit,
        };
        let mut text = unfit.message();
        let mut evictions = None;
        if unfit.total > 0 {
            match needs {
                Err(_) => text.push_str(" not found"),
                Ok(needs) => match preempt::preempt(&mut state.cluster, &pod, &needs, &unfit, &self.budgets()) {
                    Preemption::Evict(index, victims) => {
                        let node = state.cluster.nodes[index].name.clone();
                        let (promised, victims) = state.promise(&pod, &node, victims);
                        queued.pod = promised;
                        evictions = Some((node, victims));
                    }
                    Preemption::Nothing(more) => text = format!("{text} {more}"),
                },
            }
        }
        state.waiting.unschedulable(queued.clone(), unfit.plugins, Instant::now());
        Some(Outcome::Fail(queued, text, evictions))
    }

    fn budgets(&self) -> Vec<Budget> {
        let budget = |b: &PodDisruptionBudget| Budget {
            namespace: b.metadata.namespace.clone().unwrap_or_default(),
            selector: Selector::optional(b.spec.as_ref().and_then(|s| s.selector.as_ref())),
            allowed: b.status.as_ref().map_or(0, |s| i64::from(s.disruptions_allowed.unwrap_or(0))),
        };
        self.budgets.list().iter().map(|b| budget(b)).collect()
    }

    fn apply(self: Arc<Self>, outcome: Outcome) {
        tokio::spawn(async move {
            match outcome {
                Outcome::Bind(queued, node, chosen) => self.bind(queued, &node, &chosen).await,
                Outcome::Fail(queued, text, evictions) => self.fail(queued, &text, evictions).await,
            }
        });
    }

    async fn bind(&self, queued: Queued, node: &str, chosen: &[(String, Option<String>)]) {
        let pod = &queued.pod;
        if !chosen.is_empty()
            && let Err(error) = self.writer.bind_claims(&self.storage, &pod.namespace, node, chosen).await
        {
            return self.rejected(queued, &error).await;
        }
        let Ok(_permit) = self.binds.acquire().await else { return };
        if let Err(error) = self.writer.bind(pod, node).await {
            self.rejected(queued, &error).await;
        }
    }

    /// The API server did not take the binding: the node's room is free again, and the pod comes back later.
    async fn rejected(&self, queued: Queued, error: &kube::Error) {
        let pod = queued.pod.clone();
        {
            let mut state = self.shared.state.lock();
            // Seen bound, or deleted, in the meantime: nothing is assumed any more.
            if state.assumed.remove(&pod.uid).is_none() {
                return;
            }
            state.cluster.unplace(&pod.uid);
            state.waiting.wake(Event::PodGone, Instant::now());
            if !is_not_found(error) {
                state.waiting.retry(queued, Instant::now());
            }
        }
        self.shared.wake.notify_one();
        let text = format!("binding rejected: {}", message(error));
        self.writer.failed(&pod, "SchedulerError", &text, None).await;
    }

    async fn fail(&self, queued: Queued, text: &str, evictions: Option<(String, Vec<Arc<PodInfo>>)>) {
        let pod = &queued.pod;
        let Some((node, victims)) = evictions else {
            return self.writer.failed(pod, "Unschedulable", text, None).await;
        };
        for victim in &victims {
            if let Err(error) = self.writer.evict(victim, pod, &node).await
                && !is_not_found(&error)
            {
                tracing::debug!(victim = victim.name, %error, "eviction failed");
                self.shared.spare(victim);
            }
        }
        self.writer.failed(pod, "Unschedulable", text, Some(&node)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isopod_client::testing::Fake;
    use serde_json::{Value, json};

    fn pod(name: &str, cpu: &str) -> Value {
        json!({
            "metadata": {"name": name, "namespace": "ns"},
            "spec": {"schedulerName": "default-scheduler", "containers": [
                {"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}]},
        })
    }

    fn node(name: &str) -> Value {
        json!({"metadata": {"name": name}, "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"}}})
    }

    fn bound(fake: &Fake, name: &str) -> Option<String> {
        let pod = fake.get("/api/v1/pods", "ns", name)?;
        Some(pod["spec"]["nodeName"].as_str()?.to_owned())
    }

    #[test]
    fn pods_are_bound_fail_with_a_reason_and_are_bound_when_a_node_comes() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fake = Fake::default();
            fake.create("/api/v1/nodes", node("n1"));
            fake.create("/api/v1/pods", pod("first", "3"));
            let stop = CancellationToken::new();
            let running = tokio::spawn(run(fake.client(), Config::default(), stop.clone()));
            assert_eq!(fake.until(|f| bound(f, "first")).await, Some("n1".into()));
            fake.create("/api/v1/pods", pod("second", "3"));
            let text = fake
                .until(|f| {
                    let pod = f.get("/api/v1/pods", "ns", "second")?;
                    Some(pod.pointer("/status/conditions/0/message")?.as_str()?.to_owned())
                })
                .await;
            assert_eq!(
                text.as_deref(),
                Some(
                    "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes \
                     are available: 1 No preemption victims found for incoming pod."
                )
            );
            fake.create("/api/v1/nodes", node("n2"));
            assert_eq!(fake.until(|f| bound(f, "second")).await, Some("n2".into()));
            let reasons = |f: &Fake| -> Vec<String> {
                let events = f.list("/apis/events.k8s.io/v1/events");
                events.iter().filter_map(|e| Some(e["reason"].as_str()?.to_owned())).collect()
            };
            let seen = fake.until(|f| Some(reasons(f)).filter(|r| r.len() >= 3)).await.unwrap_or_default();
            assert_eq!(seen.iter().filter(|r| *r == "Scheduled").count(), 2);
            assert!(seen.iter().any(|r| r == "FailedScheduling"));
            stop.cancel();
            assert!(running.await.unwrap().is_ok());
        });
    }
}
