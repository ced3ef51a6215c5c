//! Which pods there are: manifests, the API server's watch and what is on disk, turned into workers.
//!
//! In: the manifest directory's content, the watch of this node's pods, workers that have ended. Out: workers started and
//! told, mirror pods kept in step. One task owns all of it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    admission, sandbox,
    table::Snapshot,
    worker::{self, Command, Handle, Source},
    writer::Seen,
};
use crate::{
    context::Context,
    devices, qos,
    sources::{HASH, MIRROR, SOURCE, files::Manifests, mirror},
    volumes::mounts,
};

type FullName = (String, String);

struct Entry {
    handle: Handle,
    pod: Arc<Pod>,
    source: Source,
    ending: bool,
    /// The API server has it no more: others count on what it still holds here.
    gone: bool,
}

enum Note {
    /// A worker has ended.
    Gone(String),
    /// A mirror was created or deleted, or could not be.
    Mirror(FullName, Result<(), String>),
}

struct Manager {
    ctx: Arc<Context>,
    workers: HashMap<String, Entry>,
    manifests: Manifests,
    /// Static pods whose older version still ends.
    queued: BTreeMap<FullName, Arc<Pod>>,
    /// Pods that there is no room for before others, whom the API server has no more, have ended.
    held: BTreeMap<String, Arc<Pod>>,
    mirrors: BTreeMap<FullName, Pod>,
    mirror_work: HashSet<FullName>,
    synced: bool,
    listing: Option<Vec<Pod>>,
    notes: mpsc::UnboundedSender<Note>,
    /// When mirrors that could not be written are tried again, and the pause before that.
    retry: Option<(Instant, Duration)>,
    /// When mirrors were last looked at.
    tried: Instant,
}

/// First pause after a mirror could not be written.
const MIRROR_PAUSE: Duration = Duration::from_secs(1);
/// Longest.
const MIRROR_PAUSE_MAX: Duration = Duration::from_secs(300);

fn full_name(pod: &Pod) -> FullName {
    (sandbox::namespace(pod).into(), sandbox::name(pod).into())
}

fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR))
}

fn is_static(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(SOURCE)).is_some_and(|s| s == "file")
}

/// Runs until `stop`; pods go on.
pub(crate) async fn run(ctx: Arc<Context>, mut manifests: watch::Receiver<Manifests>, stop: CancellationToken) {
    let (notes, mut inbox) = mpsc::unbounded_channel();
    let mut m = Manager {
        ctx: ctx.clone(),
        workers: HashMap::new(),
        manifests: Manifests::new(),
        queued: BTreeMap::new(),
        held: BTreeMap::new(),
        mirrors: BTreeMap::new(),
        mirror_work: HashSet::new(),
        synced: false,
        listing: None,
        notes,
        retry: None,
        tried: Instant::now(),
    };
    m.restore().await;
    let first = manifests.borrow_and_update().clone();
    m.set_manifests(first);
    let mut pods = watch_pods(&ctx);
    loop {
        // All arms are cancel-safe: streams and channels keep what is not taken.
        tokio::select! {
            () = stop.cancelled() => break,
            event = pods.next() => match event {
                Some(event) => m.api(event),
                None => break,
            },
            changed = manifests.changed() => {
                if changed.is_err() {
                    stop.cancelled().await;
                    break;
                }
                let now = manifests.borrow_and_update().clone();
                m.set_manifests(now);
            }
            Some(note) = inbox.recv() => m.note(note),
            () = crate::volumes::sleep_until(m.retry_at()) => m.sync_mirrors(),
        }
    }
    for entry in m.workers.values() {
        entry.handle.abandon();
    }
}

fn watch_pods(ctx: &Arc<Context>) -> BoxStream<'static, watcher::Result<watcher::Event<Pod>>> {
    let (api, node) = (ctx.api.clone(), ctx.node_name.clone());
    let stream = async move {
        match api.wait().await {
            Some(client) => pod_events(client, &node).boxed(),
            None => futures::stream::pending().boxed(),
        }
    };
    futures::stream::once(stream).flatten().boxed()
}

fn pod_events(
    client: kube::Client,
    node: &str,
) -> impl Stream<Item = watcher::Result<watcher::Event<Pod>>> + Send + use<> {
    let pods: kube::Api<Pod> = kube::Api::all(client);
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    watcher(pods, config).backoff(crate::api::pauses())
}

impl Manager {
    /// Starts workers for what is on disk and removes what belongs to no pod.
    async fn restore(&mut self) {
        let paths = &self.ctx.config.paths;
        let mut known = Vec::new();
        let made = self.ctx.cri.on_disk();
        for entry in fs::read_dir(paths.pods()).into_iter().flatten().flatten() {
            let uid = entry.file_name().to_string_lossy().into_owned();
            let read = fs::read(entry.path().join("pod.json")).ok();
            match read.and_then(|t| serde_json::from_slice::<Pod>(&t).ok()).filter(|p| sandbox::uid(p) == uid) {
                Some(pod) => known.push(pod),
                None if made.contains(&uid) => {}
                None => tracing::warn!(uid, "pod directory without a readable pod is removed"),
            }
        }
        let uids: Vec<String> = known.iter().map(|p| sandbox::uid(p).to_string()).collect();
        super::manager_clean(&self.ctx, &uids).await;
        self.ctx.table.expect(uids.into_iter().collect());
        for pod in known {
            let source = if is_static(&pod) { Source::Static } else { Source::Api };
            self.spawn(Arc::new(pod), source, None);
        }
    }

    fn spawn(&mut self, pod: Arc<Pod>, source: Source, refused: Option<admission::Refusal>) {
        let uid = sandbox::uid(&pod).to_string();
        let notes = self.notes.clone();
        let ending = pod.metadata.deletion_timestamp.is_some();
        let refused = refused.or_else(|| {
            let ctx = &self.ctx;
            let given = || ctx.topology.admit(&pod, &ctx.devices, &ctx.metrics);
            if ending || !is_active(&pod) { None } else { given().err().map(|(reason, why)| (reason.into(), why)) }
        });
        let containers = pod.spec.iter().flat_map(qos::all_containers).count() as u64;
        self.ctx.metrics.observe("kubelet_containers_per_pod_count", [], Duration::from_secs(containers));
        let starts = !ending && refused.is_none() && is_active(&pod);
        let first = refused.map(|(reason, message)| Command::Fail { reason, message, grace: 1 });
        let handle = worker::spawn(self.ctx.clone(), pod.clone(), source, first, move |uid| {
            let _ = notes.send(Note::Gone(uid));
        });
        if source == Source::Static {
            handle.tell(Command::Mirror(self.mirrors.get(&full_name(&pod)).and_then(Seen::of)));
        }
        if starts && self.ctx.devices.wants(&pod) {
            let (ctx, pod, teller) = (self.ctx.clone(), pod.clone(), handle.teller());
            tokio::spawn(async move {
                if let Err(message) = devices::allocate(&ctx, &pod).await {
                    teller.fail("UnexpectedAdmissionError", message, 1);
                }
            });
        }
        self.workers.insert(uid, Entry { handle, pod, source, ending, gone: false });
    }

    fn set_manifests(&mut self, now: Manifests) {
        let wanted: HashSet<String> = now.values().map(|p| sandbox::uid(p).to_string()).collect();
        for (uid, e) in self.workers.iter_mut().filter(|(_, e)| e.source == Source::Static) {
            if !wanted.contains(uid) && !e.ending {
                e.ending = true;
                e.handle.tell(Command::Terminate { grace: None });
            }
        }
        self.queued.retain(|name, _| now.contains_key(name));
        for (name, pod) in &now {
            if self.workers.contains_key(sandbox::uid(pod)) {
                continue;
            }
            let old = self.workers.values().any(|e| e.source == Source::Static && full_name(&e.pod) == *name);
            if old {
                self.queued.insert(name.clone(), pod.clone());
            } else {
                self.spawn(pod.clone(), Source::Static, None);
            }
        }
        self.manifests = now;
        self.sync_mirrors();
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Gone(uid) => {
                let Some(e) = self.workers.remove(&uid) else { return };
                if e.source == Source::Static
                    && let Some(pod) = self.queued.remove(&full_name(&e.pod))
                {
                    self.spawn(pod, Source::Static, None);
                }
                // A manifest that came back while its pod ended.
                if let Some(pod) = self.manifests.get(&full_name(&e.pod)).cloned()
                    && sandbox::uid(&pod) == uid
                {
                    self.ctx.metrics.count("kubelet_restarted_pods_total", [("static", "true")]);
                    self.spawn(pod, Source::Static, None);
                }
                for pod in std::mem::take(&mut self.held).into_values() {
                    self.take(pod);
                }
                self.sync_mirrors();
            }
            Note::Mirror(name, result) => {
                match result {
                    // The watch tells what became of it; until then nothing more is to be done.
                    Ok(()) => self.retry = None,
                    Err(error) => {
                        tracing::debug!(pod = name.1, error, "mirror pod");
                        self.mirror_work.remove(&name);
                        let pause = self.retry.map_or(MIRROR_PAUSE, |(_, p)| (p * 2).min(MIRROR_PAUSE_MAX));
                        self.retry = Some((Instant::now() + pause, pause));
                    }
                }
            }
        }
    }

    fn api(&mut self, event: watcher::Result<watcher::Event<Pod>>) {
        match event {
            Ok(watcher::Event::Init) => self.listing = Some(Vec::new()),
            Ok(watcher::Event::InitApply(p)) => {
                if let Some(l) = &mut self.listing {
                    l.push(p);
                }
            }
            Ok(watcher::Event::InitDone) => {
                let list = self.listing.take().unwrap_or_default();
                self.listed(list);
            }
            Ok(watcher::Event::Apply(p)) => {
                let mirrors = is_mirror(&p);
                self.apply(p);
                if mirrors {
                    self.sync_mirrors();
                }
            }
            Ok(watcher::Event::Delete(p)) => {
                self.mirror_work.remove(&full_name(&p));
                if is_mirror(&p) {
                    self.mirrors.remove(&full_name(&p));
                    self.tell_mirror(&full_name(&p), None);
                    self.sync_mirrors();
                } else {
                    self.deleted(&p);
                }
            }
            Err(error) => tracing::debug!(%error, "watch of pods"),
        }
    }

    fn listed(&mut self, list: Vec<Pod>) {
        let there: HashSet<String> = list.iter().map(|p| sandbox::uid(p).to_string()).collect();
        self.mirrors.clear();
        self.mirror_work.clear();
        self.held.retain(|uid, _| there.contains(uid));
        for (uid, e) in self.workers.iter_mut().filter(|(_, e)| e.source == Source::Api) {
            e.gone = !there.contains(uid);
            if e.gone && !e.ending {
                e.ending = true;
                e.handle.tell(Command::Terminate { grace: e.pod.metadata.deletion_grace_period_seconds });
            }
        }
        for p in list {
            self.apply(p);
        }
        self.synced = true;
        self.sync_mirrors();
    }

    fn deleted(&mut self, p: &Pod) {
        self.held.remove(sandbox::uid(p));
        if let Some(e) = self.workers.get_mut(sandbox::uid(p)) {
            (e.ending, e.gone) = (true, true);
            e.handle.tell(Command::Terminate { grace: p.metadata.deletion_grace_period_seconds });
        }
    }

    fn apply(&mut self, p: Pod) {
        if is_mirror(&p) {
            let name = full_name(&p);
            self.mirror_work.remove(&name);
            self.tell_mirror(&name, Seen::of(&p));
            self.mirrors.insert(name, p);
            return;
        }
        let uid = sandbox::uid(&p).to_string();
        let pod = Arc::new(p);
        if let Some(e) = self.workers.get_mut(&uid) {
            e.ending |= pod.metadata.deletion_timestamp.is_some();
            e.pod = pod.clone();
            e.handle.tell(Command::Update(pod));
            return;
        }
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed")) {
            // It ended in an earlier life of this node: nothing is left here but its object.
            if pod.metadata.deletion_timestamp.is_some()
                && let Some(client) = self.ctx.api.get()
            {
                tokio::spawn(async move { mirror::delete(client, &pod).await });
            }
            return;
        }
        self.take(pod);
    }

    /// Judges a pod that is new here. One that finds no room where others are about to leave waits for them: the scheduler
    /// knows of them no more.
    fn take(&mut self, pod: Arc<Pod>) {
        let mut others = self.ctx.table.all();
        let refused = admission::admit(&self.ctx, &others, &pod);
        if let Some((_, why)) = refused.as_ref().filter(|_| pod.metadata.deletion_timestamp.is_none()) {
            let all = others.len();
            others.retain(|s| self.workers.get(sandbox::uid(&s.pod)).is_none_or(|e| !e.gone));
            if others.len() < all && admission::admit(&self.ctx, &others, &pod).is_none() {
                let pod_name = sandbox::name(&pod);
                tracing::info!(pod = pod_name, why, "waits for pods that are gone from the API and still end here");
                self.held.insert(sandbox::uid(&pod).to_owned(), pod);
                return;
            }
        }
        self.held.remove(sandbox::uid(&pod));
        self.spawn(pod, Source::Api, refused);
    }

    /// When the pause after a failure is over; a time that has come is not waited for twice.
    fn retry_at(&self) -> Option<Instant> {
        let (at, _) = self.retry?;
        let last = at <= self.tried;
        (!last).then_some(at)
    }

    fn tell_mirror(&self, name: &FullName, mirror: Option<Seen>) {
        for e in self.workers.values().filter(|e| e.source == Source::Static && full_name(&e.pod) == *name) {
            e.handle.tell(Command::Mirror(mirror.clone()));
        }
    }

    /// A mirror for each static pod, none for anything else.
    fn sync_mirrors(&mut self) {
        self.tried = Instant::now();
        let Some(client) = self.ctx.api.get().filter(|_| self.synced) else { return };
        let mut work: Vec<(FullName, Option<Pod>, Option<Arc<Pod>>)> = Vec::new();
        for (name, m) in &self.mirrors {
            let wanted = self.manifests.get(name);
            let same = wanted.is_some_and(|w| {
                w.metadata.annotations.as_ref().and_then(|a| a.get(HASH)).map(String::as_str) == mirror::hash(m)
            });
            let of_it = |e: &Entry| e.ending && sandbox::name(&e.pod) == name.1 && sandbox::namespace(&e.pod) == name.0;
            if (!same || m.metadata.deletion_timestamp.is_some()) && !self.workers.values().any(of_it) {
                work.push((name.clone(), Some(m.clone()), None));
            }
        }
        for (name, pod) in &self.manifests {
            if !self.mirrors.contains_key(name) {
                work.push((name.clone(), None, Some(pod.clone())));
            }
        }
        for (name, old, new) in work {
            if !self.mirror_work.insert(name.clone()) {
                continue;
            }
            let (client, notes, node) = (client.clone(), self.notes.clone(), self.ctx.node_name.clone());
            tokio::spawn(async move {
                let result = match (old, new) {
                    (Some(old), _) => mirror::delete(client, &old).await,
                    (_, Some(new)) => mirror::create(client, &new, &node).await,
                    _ => Ok(()),
                };
                let _ = notes.send(Note::Mirror(name, result.map_err(|e| e.to_string())));
            });
        }
    }
}

/// Whether a pod still holds what it was given.
pub(super) fn is_active(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    !matches!(phase, Some("Succeeded" | "Failed"))
}

/// Sum of what running pods request of a resource, in thousandths.
pub(super) fn requested(pods: &[Arc<Snapshot>], resource: &str) -> i64 {
    pods.iter()
        .filter(|s| is_active(&s.pod))
        .filter_map(|s| Some(qos::pod_amount(s.pod.spec.as_ref()?, resource).0))
        .sum()
}

/// Removes a directory of a pod nobody knows.
pub(super) fn drop_directory(ctx: &Context, uid: &str) {
    if let Err(error) = mounts::remove_tree(&ctx.config.paths.pod(uid)) {
        tracing::warn!(uid, %error, "pod directory stays");
    }
}
