//! The flight record of a pod's start: how long each phase took, kept after the pod is gone.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use serde::Serialize;

/// Records kept on a node.
const KEPT: usize = 500;
/// After so many more the oldest are dropped.
const BETWEEN: usize = 64;
static WRITTEN: AtomicUsize = AtomicUsize::new(0);

/// One record, `var/lib/isopod/starts/NAMESPACE_NAME_UID.json`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StartRecord {
    #[serde(skip)]
    begun: Instant,
    #[serde(skip)]
    path: PathBuf,
    namespace: String,
    name: String,
    uid: String,
    /// Milliseconds since the agent saw the pod, by phase.
    phases: Vec<Phase>,
    /// The last thing that went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    blocked: Option<String>,
    #[serde(skip)]
    complete: bool,
    #[serde(skip)]
    passed: bool,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Phase {
    phase: String,
    /// When it ended, milliseconds after the pod was seen.
    at_ms: f64,
    /// How long it took by itself, when that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    took_ms: Option<f64>,
}

impl StartRecord {
    /// Begins now.
    pub(crate) fn new(dir: &Path, namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            begun: Instant::now(),
            path: dir.join(format!("{namespace}_{name}_{uid}.json")),
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
            phases: Vec::new(),
            blocked: None,
            complete: false,
            passed: false,
        }
    }

    /// Since when the pod is here.
    pub(crate) fn age(&self) -> std::time::Duration {
        self.begun.elapsed()
    }

    /// The first starts have come to their end: how long that took, once.
    pub(crate) fn first_pass(&mut self) -> Option<std::time::Duration> {
        (!std::mem::replace(&mut self.passed, true)).then(|| self.age())
    }

    /// A phase has ended.
    pub(crate) fn phase(&mut self, phase: impl Into<String>, took: Option<std::time::Duration>) {
        if self.complete {
            return;
        }
        let ms = |d: std::time::Duration| (d.as_secs_f64() * 1e5).round() / 100.0;
        self.phases.push(Phase { phase: phase.into(), at_ms: ms(self.begun.elapsed()), took_ms: took.map(ms) });
        self.blocked = None;
    }

    /// How long a phase took, as often as there was one.
    pub(crate) fn spent(&self, phase: &str) -> std::time::Duration {
        let all = self.phases.iter().filter(|p| p.phase == phase).filter_map(|p| p.took_ms);
        std::time::Duration::from_secs_f64(all.sum::<f64>().max(0.0) / 1000.0)
    }

    /// Something went wrong; written at once, so that it can be asked for.
    pub(crate) fn blocked(&mut self, why: &str) {
        if !self.complete && self.blocked.as_deref() != Some(why) {
            self.blocked = Some(why.into());
            self.write();
        }
    }

    /// The pod is ready (or over): write the record, once. How long it took, the first time.
    pub(crate) fn complete(&mut self, phase: &str) -> Option<std::time::Duration> {
        if self.complete {
            return None;
        }
        self.phase(phase, None);
        self.complete = true;
        self.write();
        if WRITTEN.fetch_add(1, Ordering::Relaxed) % BETWEEN == BETWEEN - 1
            && let Some(dir) = self.path.parent()
        {
            prune(dir);
        }
        Some(self.begun.elapsed())
    }

    fn write(&self) {
        let Ok(text) = serde_json::to_vec(self) else { return };
        if let Err(error) = fs::write(&self.path, text) {
            tracing::debug!(path = %self.path.display(), %error, "start record");
        }
    }
}

/// Makes the directory and drops the oldest records.
pub(crate) fn prune(dir: &Path) {
    fs::create_dir_all(dir).ok();
    let mut all: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    all.sort();
    let surplus = all.len().saturating_sub(KEPT);
    for (_, path) in all.into_iter().take(surplus) {
        fs::remove_file(path).ok();
    }
}
