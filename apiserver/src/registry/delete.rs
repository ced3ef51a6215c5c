//! Deleting: preconditions, grace periods, finalizers, propagation.
//!
//! An object goes at once when nothing holds it. Otherwise it gets a deletionTimestamp and goes with the update that
//! removes the last finalizer (see [`super::update`]) or, for pods, when the agent deletes it with grace period 0.

use std::sync::Arc;

use isopod_api::{
    gvk::GroupResource,
    meta,
    status::{Details, Status},
};
use isopod_store::Expect;
use serde_json::{Value, json};

use super::{
    Registry, Resource, Selection, Writer,
    admit::{Admission, Pass},
    metadata, reads,
};
use crate::{
    admission::Operation,
    cache::{Object, Write, key},
};

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// Resources whose deletion answers with the object instead of a Status.
const RETURN_OBJECT: [(&str, &str); 13] = [
    ("", "pods"),
    ("", "services"),
    ("", "serviceaccounts"),
    ("", "persistentvolumes"),
    ("", "persistentvolumeclaims"),
    ("", "podtemplates"),
    ("", "resourcequotas"),
    ("storage.k8s.io", "storageclasses"),
    ("storage.k8s.io", "volumeattachments"),
    ("storage.k8s.io", "csidrivers"),
    ("storage.k8s.io", "csinodes"),
    ("storage.k8s.io", "volumeattributesclasses"),
    ("policy", "podsecuritypolicies"),
];

/// The result of a deletion.
pub(crate) struct Deleted {
    /// The object as it last was.
    pub(crate) object: Arc<Object>,
    /// Whether it is gone (and not merely marked).
    pub(crate) gone: bool,
}

impl Deleted {
    /// The Status that answers for the object, when the kind answers with one.
    pub(crate) fn status(&self, resource: &Resource) -> Option<Status> {
        let gr = resource.group_resource();
        if !self.gone || RETURN_OBJECT.contains(&(&*gr.group, &*gr.resource)) {
            return None;
        }
        let value = self.object.value();
        Some(Status::success(Some(Details {
            name: self.object.name.to_string(),
            group: gr.group,
            kind: gr.resource,
            uid: meta::uid(&value).to_owned(),
            ..Details::default()
        })))
    }

    /// The answer as a value.
    pub(crate) fn into_value(self, resource: &Resource) -> Value {
        match self.status(resource) {
            Some(status) => status.to_value(),
            None => reads::object_value(resource, &self.object),
        }
    }
}

/// What one look at the object says.
enum Plan {
    /// Nothing to do: a deletion at least as quick is under way.
    Pending,
    /// Mark it: the new state, and whether it goes right after.
    Mark(Value, bool),
    /// It goes.
    Remove,
}

impl Registry {
    /// Deletes an object.
    pub(crate) async fn delete_object(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        name: &str,
        options: &Value,
        writer: &mut Writer<'_>,
    ) -> Result<Deleted, Status> {
        let deleted = self.delete_stored(resource, namespace, name, options, writer).await?;
        resource.prepare(std::slice::from_ref(&deleted.object)).await?;
        Ok(deleted)
    }

    async fn delete_stored(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        name: &str,
        options: &Value,
        writer: &mut Writer<'_>,
    ) -> Result<Deleted, Status> {
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        let namespace = if resource.info.namespaced { namespace } else { "" };
        let key = key(namespace, name);
        writer.options.dry_run |= options.get("dryRun").and_then(Value::as_array).is_some_and(|d| !d.is_empty());
        writer.options.object = options.clone();
        let dry_run = writer.options.dry_run;
        loop {
            let current = store.get(&key).ok_or_else(|| Status::not_found(&resource.group_resource(), name))?;
            resource.prepare(std::slice::from_ref(&current)).await?;
            let old = resource.value(&current);
            check_preconditions(resource, name, options, &old)?;
            let admission = Admission {
                operation: Operation::Delete,
                resource,
                gvk: None,
                subresource: "",
                namespace,
                name,
                old: &old,
            };
            let mut none = Value::Null;
            self.admit(Pass::Mutating, &admission, &mut none, writer).await?;
            self.admit(Pass::Validating, &admission, &mut none, writer).await?;
            let expect = Expect::Revision(current.revision);
            if orphans_unasked(resource, options) {
                writer.warnings.push("child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress this warning".into());
            }
            let (expect, last) = match plan(resource, &old, options) {
                Plan::Pending => return Ok(Deleted { object: current, gone: false }),
                Plan::Remove => (expect, current),
                Plan::Mark(new, gone) => {
                    let draft = resource.draft(new).await?;
                    if dry_run {
                        return Ok(Deleted { object: Arc::new(draft.finish(current.revision)), gone });
                    }
                    let marked = match self.cache.commit(store, &key, expect, Write::Put(draft)).await {
                        Ok(revision) => self.committed(resource, &key, revision)?,
                        Err(isopod_store::Error::Conflict { .. }) => continue,
                        Err(error) => return Err(Status::internal(error)),
                    };
                    if !gone {
                        return Ok(Deleted { object: marked, gone: false });
                    }
                    (Expect::Any, marked)
                }
            };
            if dry_run {
                return Ok(Deleted { object: last, gone: true });
            }
            match self.cache.commit(store, &key, expect, Write::Delete).await {
                Ok(_) => {
                    self.follow_addresses(resource, &old, None).await;
                    return Ok(Deleted { object: last, gone: true });
                }
                Err(isopod_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(Status::internal(error)),
            }
        }
    }

    /// Deletes everything selected; answers with the objects as they were.
    pub(crate) async fn delete_collection(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        selection: &Selection,
        options: &Value,
        writer: &mut Writer<'_>,
    ) -> Result<Vec<Arc<Object>>, Status> {
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        let (snapshot, _) = store.snapshot(&selection.prefix, None);
        if selection.reads_objects() {
            resource.prepare(&snapshot.objects).await?;
        }
        let selected: Vec<_> = snapshot.objects.into_iter().filter(|o| selection.matches(o)).collect();
        let mut deleted = Vec::with_capacity(selected.len());
        for object in selected {
            match self.delete_object(resource, namespace, &object.name, options, writer).await {
                Ok(result) => deleted.push(result.object),
                // Somebody else was quicker.
                Err(status) if status.code == 404 => {}
                Err(status) => return Err(status),
            }
        }
        Ok(deleted)
    }
}

fn check_preconditions(resource: &Resource, name: &str, options: &Value, old: &Value) -> Result<(), Status> {
    let kind = GroupResource::new(&resource.gvk.group, &resource.gvk.kind);
    let wanted = |key: &str| options["preconditions"].get(key).and_then(Value::as_str);
    if let Some(uid) = wanted("uid").filter(|uid| *uid != meta::uid(old)) {
        let found = meta::uid(old);
        return Err(Status::conflict(
            &kind,
            name,
            format!(
                "the UID in the precondition ({uid}) does not match the UID in record ({found}). The object might have been deleted and then recreated"
            ),
        ));
    }
    if let Some(revision) = wanted("resourceVersion").filter(|r| *r != meta::resource_version(old)) {
        let found = meta::resource_version(old);
        return Err(Status::conflict(
            &kind,
            name,
            format!(
                "the ResourceVersion in the precondition ({revision}) does not match the ResourceVersion in record ({found}). The object might have been modified"
            ),
        ));
    }
    Ok(())
}

fn plan(resource: &Resource, old: &Value, options: &Value) -> Plan {
    if resource.gvr.group.is_empty() && resource.gvr.resource == "namespaces" {
        return plan_namespace(resource, old, options);
    }
    let asked = options.get("gracePeriodSeconds").and_then(Value::as_i64).map(|s| if s < 0 { 1 } else { s });
    let mut new = old.clone();
    if let Some(default) = resource.strategy.grace_period(old) {
        // A default of 0 means that nobody is there to be graceful with (unscheduled or finished pods).
        let seconds = if default == 0 { 0 } else { asked.unwrap_or(default) };
        if let Some(since) = meta::deletion_timestamp(old) {
            let before = meta::deletion_grace_period(old).unwrap_or(0);
            if asked.is_none_or(|_| seconds >= before) {
                return match before {
                    0 if meta::finalizers(old).is_empty() => Plan::Remove,
                    _ => Plan::Pending,
                };
            }
            let earlier = meta::parse_time(since).map(|t| t - jiff::SignedDuration::from_secs(before - seconds));
            meta::set_deletion_timestamp(&mut new, earlier.map(meta::time).as_deref());
        } else {
            mark(resource, &mut new, seconds);
        }
        meta::set(&mut new, "deletionGracePeriodSeconds", Value::from(seconds));
        set_finalizers(resource, &mut new, old, options);
        let gone = seconds == 0 && meta::finalizers(&new).is_empty();
        return Plan::Mark(new, gone);
    }
    if meta::deletion_timestamp(old).is_some() && !meta::finalizers(old).is_empty() {
        return Plan::Pending;
    }
    set_finalizers(resource, &mut new, old, options);
    if meta::deletion_timestamp(old).is_none() {
        resource.strategy.prepare_for_delete(&mut new);
    }
    if meta::finalizers(&new).is_empty() {
        return Plan::Remove;
    }
    mark(resource, &mut new, 0);
    meta::set(&mut new, "deletionGracePeriodSeconds", Value::from(0));
    Plan::Mark(new, false)
}

fn mark(resource: &Resource, new: &mut Value, seconds: i64) {
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    meta::set_deletion_timestamp(new, Some(&meta::time(at)));
    let generation = meta::generation(new);
    if generation > 0 && metadata::has_generation(resource) {
        meta::set_generation(new, generation + 1);
    }
}

/// Whether a Job's pods stay behind without anyone having said so.
fn orphans_unasked(resource: &Resource, options: &Value) -> bool {
    let asked = ["propagationPolicy", "orphanDependents"].iter().any(|k| options.get(*k).is_some_and(|v| !v.is_null()));
    resource.gvr.group == "batch" && resource.gvr.resource == "jobs" && !asked
}

/// Namespaces end in two steps: Terminating, then gone when both lists of finalizers are empty.
fn plan_namespace(resource: &Resource, old: &Value, options: &Value) -> Plan {
    let held = old["spec"]["finalizers"].as_array().is_some_and(|f| !f.is_empty());
    if meta::deletion_timestamp(old).is_some() {
        return match held || !meta::finalizers(old).is_empty() {
            true => Plan::Pending,
            false => Plan::Remove,
        };
    }
    let mut new = old.clone();
    meta::set_deletion_timestamp(&mut new, Some(&meta::now()));
    new["status"]["phase"] = "Terminating".into();
    set_finalizers(resource, &mut new, old, options);
    let gone = !held && meta::finalizers(&new).is_empty();
    Plan::Mark(new, gone)
}

/// The finalizers the garbage collector looks for, from the options and the object.
fn set_finalizers(resource: &Resource, new: &mut Value, old: &Value, options: &Value) {
    // Events have no dependents: there is no garbage to collect.
    if resource.gvr.resource == "events" && matches!(&*resource.gvr.group, "" | "events.k8s.io") {
        return;
    }
    let existing = meta::finalizers(old);
    let policy = options.get("propagationPolicy").and_then(Value::as_str);
    let orphan_dependents = options.get("orphanDependents").and_then(Value::as_bool);
    let orphans_by_default =
        matches!((&*resource.gvr.group, &*resource.gvr.resource), ("", "replicationcontrollers") | ("batch", "jobs"));
    let (orphan, foreground) = match (orphan_dependents, policy) {
        (Some(orphan), _) => (orphan, false),
        (None, Some(policy)) => (policy == "Orphan", policy == "Foreground"),
        (None, None) if existing.contains(&ORPHAN) => (true, false),
        (None, None) if existing.contains(&FOREGROUND) => (false, true),
        (None, None) => (orphans_by_default, false),
    };
    let mut finalizers: Vec<&str> = existing.iter().copied().filter(|f| *f != ORPHAN && *f != FOREGROUND).collect();
    if orphan {
        finalizers.push(ORPHAN);
    }
    if foreground {
        finalizers.push(FOREGROUND);
    }
    if finalizers != existing {
        meta::set(new, "finalizers", json!(finalizers));
    }
}
