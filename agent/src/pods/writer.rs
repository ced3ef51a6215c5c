//! Writes one pod's status to the API server: the newest only, only changes, never in the way of a start.
//!
//! One task per pod. In: the wanted status, and for static pods whether there is a mirror. Out: patches of /status, at
//! the end the deletion with grace period 0.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api as KubeApi, DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    api::{is_code, refusal},
    context::Context,
};

/// What is wanted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) status: Option<Arc<PodStatus>>,
    /// Everything is torn down: after this status the object is deleted.
    pub(crate) last: bool,
}

/// Which object carries the status; `None` while there is none (no mirror).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: Option<String>,
    /// Whether the agent deletes the object at the end (a mirror is deleted by its owner).
    pub(crate) delete: bool,
}

/// An object as the API server has it: what somebody else may have written into its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) uid: String,
    revision: u64,
    phase: Option<String>,
    /// Type and status.
    conditions: Vec<(String, String)>,
}

impl Seen {
    /// What of it matters here.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let status = pod.status.as_ref();
        let conditions = status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
        Some(Self {
            uid: pod.metadata.uid.clone()?,
            revision: revision(pod),
            phase: status.and_then(|s| s.phase.clone()),
            conditions: conditions.map(|c| (c.type_.clone(), c.status.clone())).collect(),
        })
    }

    /// Whether it is newer than what was sent and says otherwise.
    fn differs(&self, sent: &Sent) -> bool {
        let listed = sent.status["conditions"].as_array().into_iter().flatten();
        let own = listed.filter_map(|c| Some((c["type"].as_str()?, c["status"].as_str()?)));
        let told = |kind: &str| self.conditions.iter().find(|(k, _)| k == kind).map(|(_, status)| status.as_str());
        self.uid == sent.uid
            && self.revision > sent.revision
            && (self.phase.as_deref() != sent.status["phase"].as_str()
                || own.into_iter().any(|(kind, status)| told(kind) != Some(status)))
    }
}

/// Least time between two corrections of the same pod: whoever insists on something else is not fought with all might.
const BETWEEN: Duration = Duration::from_secs(10);

/// What was written last, to which object, and the revision that made of it.
struct Sent {
    uid: String,
    status: Value,
    revision: u64,
}

/// Revisions only grow, and compare as numbers.
fn revision(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// Runs until the last status is written or the object is gone.
pub(crate) async fn run(
    ctx: Arc<Context>,
    target: Target,
    mut uid: watch::Receiver<Option<String>>,
    mut wanted: watch::Receiver<Wanted>,
    mut seen: watch::Receiver<Option<Seen>>,
) {
    let api = &ctx.api;
    let mut sent: Option<Sent> = None;
    // Since when there is something to write.
    let mut due: Option<Instant> = None;
    let mut corrected: Option<Instant> = None;
    let mut refused = None;
    let mut pause = Duration::from_millis(200);
    loop {
        let want = wanted.borrow_and_update().clone();
        if want.last && !target.delete {
            // A mirror goes with its manifest; the API server may be the very pod that has ended.
            return;
        }
        let now = uid.borrow_and_update().clone();
        let other = seen.borrow_and_update().clone();
        let mut hold = None;
        if sent.as_ref().is_some_and(|s| other.is_some_and(|o| o.differs(s))) {
            // Somebody else wrote (the node controller, while this node was silent): ours is said again, whole.
            match corrected.map(|at| at.elapsed()) {
                Some(since) if since < BETWEEN => hold = Some(BETWEEN - since),
                _ => (sent, corrected) = (None, Some(Instant::now())),
            }
        }
        let mut retry = None;
        if let (Some(status), Some(uid), Some(client)) = (&want.status, now, api.get()) {
            let pods: KubeApi<Pod> = KubeApi::namespaced(client, &target.namespace);
            let full = serde_json::to_value(status.as_ref()).unwrap_or_default();
            let known = sent.as_ref().filter(|s| s.uid == uid).map(|s| &s.status);
            let mut gone = false;
            if known != Some(&full) {
                let since = *due.get_or_insert_with(Instant::now);
                let patch = json!({"metadata": {"uid": uid}, "status": patch(known, &full)});
                // Requests are large while they are under way, and this task is there as long as its pod.
                let patch = Patch::Strategic(patch);
                match Box::pin(pods.patch_status(&target.name, &PatchParams::default(), &patch)).await {
                    Ok(written) => {
                        sent = Some(Sent { uid: uid.clone(), status: full, revision: revision(&written) });
                        pause = Duration::from_millis(200);
                        due = None;
                        ctx.metrics.observe("kubelet_pod_status_sync_duration_seconds", [], since.elapsed());
                    }
                    // Another pod of this name, or none: this one's status interests nobody any more.
                    Err(e)
                        if is_code(&e, 404)
                            || ((is_code(&e, 409) || is_code(&e, 422))
                                && Box::pin(replaced(&pods, &target.name, &uid)).await) =>
                    {
                        gone = true;
                    }
                    Err(error) => {
                        match refusal(&error) {
                            Some(why) if refused.as_ref() != Some(&why) => {
                                tracing::warn!(pod = target.name, why, "the API server refuses the pod's status");
                                refused = Some(why);
                            }
                            _ => tracing::debug!(pod = target.name, %error, "status not written"),
                        }
                        retry = Some(pause);
                    }
                }
            }
            if want.last && retry.is_none() {
                if gone {
                    return;
                }
                let parameters = DeleteParams {
                    grace_period_seconds: Some(0),
                    preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
                    ..DeleteParams::default()
                };
                match Box::pin(pods.delete(&target.name, &parameters)).await {
                    Ok(_) => return,
                    Err(e) if is_code(&e, 404) || is_code(&e, 409) => return,
                    Err(error) => {
                        tracing::debug!(pod = target.name, %error, "pod not deleted");
                        retry = Some(pause);
                    }
                }
            }
        } else if want.last {
            return;
        } else if want.status.is_some() && api.get().is_none() {
            // Cancel-safe: nothing was taken.
            tokio::select! {
                _ = api.wait() => continue,
                r = wanted.changed() => if r.is_err() { return },
            }
            continue;
        }
        if retry.is_some() {
            pause = (pause * 2).min(Duration::from_secs(10));
        }
        tokio::select! {
            r = wanted.changed() => if r.is_err() { return },
            r = uid.changed() => if r.is_err() { return },
            r = seen.changed() => if r.is_err() { return },
            () = async { match retry.or(hold) { Some(p) => tokio::time::sleep(p).await, None => std::future::pending().await } } => {}
        }
    }
}

/// Whether a refusal means that the object is another one by now (a uid never changes).
async fn replaced(pods: &KubeApi<Pod>, name: &str, uid: &str) -> bool {
    matches!(pods.get_metadata_opt(name).await, Ok(now) if now.as_ref().and_then(|p| p.metadata.uid.as_deref()) != Some(uid))
}

/// Conditions that come and go, of which an earlier life of this agent may have left some.
const PASSING: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];

/// Deletions of conditions that are not there any more.
fn gone_conditions(known: Option<&Value>, full: &Value) -> Vec<Value> {
    let types = |of: &Value| -> Vec<String> {
        let list = of["conditions"].as_array().into_iter().flatten();
        list.filter_map(|c| c["type"].as_str().map(str::to_owned)).collect()
    };
    let before = known.map_or_else(|| PASSING.map(str::to_owned).to_vec(), types);
    let now = types(full);
    before.into_iter().filter(|t| !now.contains(t)).map(|t| json!({"$patch": "delete", "type": t})).collect()
}

/// The patch that makes the object's status the wanted one: what is gone is said so.
fn patch(known: Option<&Value>, full: &Value) -> Value {
    let mut out = full.clone();
    let Some(map) = out.as_object_mut() else { return out };
    // Of what an earlier life of this agent has written nothing may stay either.
    for key in ["reason", "message", "podIP", "podIPs", "resources", "allocatedResources"] {
        map.entry(key).or_insert(Value::Null);
    }
    if let Some(before) = known.and_then(Value::as_object) {
        for key in before.keys() {
            map.entry(key.as_str()).or_insert(Value::Null);
        }
    }
    // Lists merged by key keep what is not mentioned.
    for c in map.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(c) = c.as_object_mut() {
            c.entry("reason").or_insert(Value::Null);
            c.entry("message").or_insert(Value::Null);
        }
    }
    let gone = gone_conditions(known, full);
    if let (false, Some(list)) = (gone.is_empty(), map.get_mut("conditions").and_then(Value::as_array_mut)) {
        list.extend(gone);
    }
    for key in ["podIPs", "hostIPs"] {
        let changed = known.and_then(|k| k.get(key)) != full.get(key);
        if let Some(list) = map.get_mut(key).and_then(Value::as_array_mut).filter(|_| changed) {
            list.insert(0, json!({"$patch": "replace"}));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_write_is_noticed_and_an_echo_is_not() {
        let pod = |revision: &str, ready: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"uid": "u", "resourceVersion": revision}, "status": {
                "phase": "Running", "conditions": [{"type": "Ready", "status": ready}, {"type": "x", "status": "True"}]}}))
            .unwrap()
        };
        let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
        let sent = Sent { uid: "u".into(), status, revision: 7 };
        for (revision, ready, want) in [("8", "False", true), ("8", "True", false), ("6", "False", false)] {
            assert_eq!(Seen::of(&pod(revision, ready)).unwrap().differs(&sent), want, "{revision} {ready}");
        }
        let other = Sent { uid: "v".into(), ..sent };
        assert!(!Seen::of(&pod("8", "False")).unwrap().differs(&other));
    }

    #[test]
    fn what_is_gone_is_said() {
        let before = json!({"phase":"Pending","reason":"X","podIPs":[{"ip":"a"}],"startTime":"t",
            "conditions":[{"type":"PodResizeInProgress","status":"True"}]});
        let after = json!({"phase":"Running","podIPs":[{"ip":"b"}],"conditions":[{"type":"Ready","status":"True"}]});
        assert_eq!(
            patch(Some(&before), &after),
            json!({"phase":"Running","reason":null,"message":null,"podIP":null,"startTime":null,
                "resources":null,"allocatedResources":null,"podIPs":[{"$patch":"replace"},{"ip":"b"}],
                "conditions":[{"type":"Ready","status":"True","reason":null,"message":null},
                    {"$patch":"delete","type":"PodResizeInProgress"}]})
        );
        // An agent that has just started does not know what was written before.
        let first = patch(None, &json!({"phase":"Running","hostIPs":[{"ip":"h"}],"conditions":[]}));
        assert_eq!((&first["podIPs"], &first["hostIPs"]), (&json!(null), &json!([{"$patch":"replace"},{"ip":"h"}])));
        assert_eq!(patch(None, &after)["podIPs"], json!([{"$patch":"replace"},{"ip":"b"}]));
    }
}
