//! Changing objects: one read-modify-write loop for PUT, PATCH, subresources and the server's own changes.

use std::sync::Arc;

use isopod_api::{
    field::{Error, Path},
    gvk::Gvk,
    meta,
    status::Status,
};
use isopod_store::Expect;
use serde_json::Value;

use super::{
    Registry, Resource, Writer,
    admit::{Admission, Pass},
    convert::convert,
    create::OBJECT_MAX,
    decode, managed, metadata, scale,
};
use crate::{
    admission::Operation,
    cache::{Object, Write, key},
    validation,
};

/// What is changed.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    /// Resource.
    pub(crate) resource: &'a Arc<Resource>,
    /// Namespace or empty.
    pub(crate) namespace: &'a str,
    /// Name.
    pub(crate) name: &'a str,
    /// Subresource or empty.
    pub(crate) subresource: &'a str,
}

/// What happens when the object is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// 404.
    Fail,
    /// It is created.
    Create,
}

/// How managedFields follow from the change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    /// The writer owns what it changed.
    Update,
    /// The edit has set managedFields itself (apply).
    Done,
}

/// A change: from the current object (null when missing), in the served version, to the new one. May run several times.
pub(crate) type Edit<'e> = &'e (dyn Fn(&Value, &mut Vec<String>) -> Result<Value, Status> + Send + Sync);

/// The result of a change.
pub(crate) struct Outcome {
    /// The object as it is now (or last was).
    pub(crate) object: Arc<Object>,
    /// Whether it was created.
    pub(crate) created: bool,
}

/// Options of one change beyond the writer's.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    /// What happens when the object is not there.
    pub(crate) missing: Missing,
    /// Who owns what afterwards.
    pub(crate) tracking: Tracking,
    /// The edit starts from the current object (patch), so that a missing resourceVersion is not the client's fault.
    pub(crate) from_current: bool,
}

impl Rules {
    /// Rules of patches and of the server's own changes.
    pub(crate) const PATCH: Self = Self { missing: Missing::Fail, tracking: Tracking::Update, from_current: true };
    /// Rules of PUT.
    pub(crate) const PUT: Self = Self { missing: Missing::Fail, tracking: Tracking::Update, from_current: false };
}

enum Step {
    Done(Outcome),
    Again,
}

impl Registry {
    /// Changes an object, again and again until the commit finds it unchanged.
    pub(crate) async fn update_object(
        &self,
        target: Target<'_>,
        edit: Edit<'_>,
        rules: Rules,
        writer: &mut Writer<'_>,
    ) -> Result<Outcome, Status> {
        let resource = target.resource;
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        let namespace = if resource.info.namespaced { target.namespace } else { "" };
        let target = Target { namespace, ..target };
        let key = key(namespace, target.name);
        let warnings = writer.warnings.len();
        loop {
            writer.warnings.truncate(warnings);
            let Some(current) = store.get(&key) else {
                if rules.missing == Missing::Fail {
                    return Err(Status::not_found(&resource.group_resource(), target.name));
                }
                let mut new = edit(&Value::Null, &mut writer.warnings)?;
                metadata::place(resource, namespace, &mut new)?;
                metadata::check_name(&new, target.name)?;
                if !meta::uid(&new).is_empty() && rules.from_current {
                    let uid = meta::uid(&new);
                    let message = format!(
                        "uid mismatch: the provided object specified uid {uid}, and no existing object was found"
                    );
                    return Err(Status::conflict(&resource.group_resource(), target.name, message));
                }
                if !meta::uid(&new).is_empty() {
                    return Err(uid_conflict(
                        resource,
                        &shown_key(resource, namespace, target.name),
                        target.name,
                        meta::uid(&new),
                        "",
                    ));
                }
                // Only a create by POST refuses a resourceVersion.
                meta::set_resource_version(&mut new, "");
                match self.create_tracked(resource, namespace, new, rules.tracking, writer).await {
                    Ok(object) => return Ok(Outcome { object, created: true }),
                    Err(status) if status.reason == "AlreadyExists" && store.get(&key).is_some() => continue,
                    Err(status) => return Err(status),
                }
            };
            match self.attempt(target, &key, &current, edit, rules, writer).await? {
                Step::Done(outcome) => {
                    resource.prepare(std::slice::from_ref(&outcome.object)).await?;
                    return Ok(outcome);
                }
                Step::Again => tokio::task::yield_now().await,
            }
        }
    }

    async fn attempt(
        &self,
        target: Target<'_>,
        key: &str,
        current: &Arc<Object>,
        edit: Edit<'_>,
        rules: Rules,
        writer: &mut Writer<'_>,
    ) -> Result<Step, Status> {
        let Target { resource, namespace, name, subresource } = target;
        resource.prepare(std::slice::from_ref(current)).await?;
        let old = resource.value(current);
        let served = resource.converted().then(|| convert(old.clone(), &resource.gvk));
        let mut new = edit(served.as_ref().unwrap_or(&old), &mut writer.warnings)?;
        metadata::place(resource, namespace, &mut new)?;
        metadata::check_name(&new, name)?;
        let mut tracking = rules.tracking;
        if let Some(served) = served.filter(|s| tracking == Tracking::Update && Gvk::of(s) == Gvk::of(&new)) {
            // Ownership is in terms of the version the client speaks.
            decode::complete_served(resource, &mut new);
            managed::track(resource, &resource.gvk, Some(&served), &mut new, &writer.options.manager, subresource);
            tracking = Tracking::Done;
        }
        decode::complete(resource, &mut new);
        check_preconditions(resource, name, &new, current, &old, rules)?;
        metadata::dedup_owners(&mut new, writer);
        compose(resource, subresource, &mut new, &old);
        metadata::for_update(&mut new, &old);
        if tracking == Tracking::Update {
            managed::track(resource, &resource.storage, Some(&old), &mut new, &writer.options.manager, subresource);
        }
        let admission =
            Admission { operation: Operation::Update, resource, gvk: None, subresource, namespace, name, old: &old };
        self.admit(Pass::Mutating, &admission, &mut new, writer).await?;
        let cx = self.context(resource, subresource, namespace, name, writer);
        resource.strategy.prepare_for_update(&cx, &mut new, &old);
        if subresource != "binding" {
            metadata::bump_generation(resource, &mut new, &old);
        }
        let allocation = self.cache.allocation();
        let reservation = resource.strategy.reserve(&cx, &mut new, Some(&old))?;
        let allocation = allocation.filter(|_| reservation.is_some());
        let mut errors = validation::meta::update(&resource.gvr, resource.info.namespaced, subresource, &new, &old);
        let (own, warnings) = resource.strategy.judge_update(&cx, &new, &old);
        errors.extend(own);
        if !errors.is_empty() {
            return Err(match subresource {
                "scale" if resource.custom.is_none() => scale::invalid(name, errors),
                _ => Status::invalid(&resource.group_kind(), name, errors),
            });
        }
        writer.warnings.extend(warnings);
        self.admit(Pass::Validating, &admission, &mut new, writer).await?;
        meta::set_resource_version(&mut new, meta::resource_version(&old));
        let outdated = resource.custom.as_ref().is_some_and(|c| c.outdated(current));
        if new == old && !outdated {
            return Ok(Step::Done(Outcome { object: Arc::clone(current), created: false }));
        }
        let gone = finished(resource, &new);
        let draft = resource.draft(new).await?;
        if draft.stored.len() > OBJECT_MAX {
            return Err(Status::unknown("etcdserver: request is too large"));
        }
        if writer.options.dry_run {
            let object = Arc::new(draft.finish(current.revision));
            return Ok(Step::Done(Outcome { object, created: false }));
        }
        let store = resource.store.as_ref().ok_or_else(Status::no_route)?;
        let expect = Expect::Revision(current.revision);
        if gone {
            // The last finalizer is gone: the object goes with this write and is shown as it last was.
            return match self.cache.commit(store, key, expect, Write::Delete).await {
                Ok(_) => {
                    self.follow_addresses(resource, &old, None).await;
                    Ok(Step::Done(Outcome { object: Arc::new(draft.finish(current.revision)), created: false }))
                }
                Err(isopod_store::Error::Conflict { .. }) => Ok(Step::Again),
                Err(error) => Err(Status::internal(error)),
            };
        }
        match self.cache.commit_with(store, key, expect, Write::Put(draft), allocation).await {
            Ok(revision) => {
                drop(reservation);
                let object = self.committed(resource, key, revision)?;
                self.follow_addresses(resource, &old, Some(&object)).await;
                Ok(Step::Done(Outcome { object, created: false }))
            }
            Err(isopod_store::Error::Conflict { .. }) => Ok(Step::Again),
            Err(error) => Err(Status::internal(error)),
        }
    }
}

/// Whether nothing holds a deleted object any more.
fn finished(resource: &Resource, new: &Value) -> bool {
    let held_by_spec = resource.gvr.group.is_empty()
        && resource.gvr.resource == "namespaces"
        && new["spec"]["finalizers"].as_array().is_some_and(|f| !f.is_empty());
    meta::deletion_timestamp(new).is_some()
        && meta::finalizers(new).is_empty()
        && meta::deletion_grace_period(new).unwrap_or(0) == 0
        && !held_by_spec
}

/// The key upstream names in storage errors.
fn shown_key(resource: &Resource, namespace: &str, name: &str) -> String {
    resource.info.key(namespace, name).unwrap_or_default()
}

fn uid_conflict(resource: &Resource, key: &str, name: &str, wanted: &str, found: &str) -> Status {
    let message = format!(
        "StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
    );
    Status::conflict(&resource.group_resource(), name, message)
}

fn check_preconditions(
    resource: &Resource,
    name: &str,
    new: &Value,
    current: &Object,
    old: &Value,
    rules: Rules,
) -> Result<(), Status> {
    let uid = meta::uid(new);
    if !rules.from_current && !uid.is_empty() && uid != meta::uid(old) {
        return Err(uid_conflict(
            resource,
            &shown_key(resource, meta::namespace(old), name),
            name,
            uid,
            meta::uid(old),
        ));
    }
    match meta::resource_version(new) {
        "" | "0" if rules.from_current || resource.strategy.allow_unconditional_update() => Ok(()),
        "" | "0" => {
            let path = Path::new("metadata").child("resourceVersion");
            let error = Error::invalid(&path, serde_json::json!(0), "must be specified for an update");
            Err(Status::invalid(&resource.group_kind(), name, vec![error]))
        }
        text => match text.parse::<u64>() {
            Ok(revision) if revision == current.revision => Ok(()),
            Ok(_) => Err(Status::modified(&resource.group_resource(), name)),
            Err(_) => {
                let path = Path::new("metadata").child("resourceVersion");
                let detail = format!("strconv.ParseUint: parsing {text:?}: invalid syntax");
                Err(Status::invalid(&resource.group_kind(), name, vec![Error::invalid(&path, text, detail)]))
            }
        },
    }
}

/// Takes from the stored object what the (sub)resource does not write.
fn compose(resource: &Resource, subresource: &str, new: &mut Value, old: &Value) {
    match subresource {
        "" if resource.has_status() => set_member(new, "status", old.get("status").cloned()),
        "status" => {
            let status = new.get("status").cloned();
            let managed = meta::managed_fields(new).to_vec();
            let metadata = new.get("metadata").cloned().unwrap_or_default();
            take_all_but(new, old, &["status"]);
            set_member(new, "status", status);
            set_metadata(new, &metadata, written_with_status(resource));
            meta::set(new, "managedFields", managed);
        }
        "approval" => {
            let conditions = new["status"].get("conditions").cloned();
            let managed = meta::managed_fields(new).to_vec();
            let metadata = new.get("metadata").cloned().unwrap_or_default();
            take_all_but(new, old, &[]);
            set_metadata(new, &metadata, &CLIENT_METADATA);
            meta::set(new, "managedFields", managed);
            if conditions.is_some() || new["status"].get("conditions").is_some() {
                set_member(&mut new["status"], "conditions", conditions);
            }
        }
        "finalize" => {
            let finalizers = new["spec"].get("finalizers").cloned();
            let managed = meta::managed_fields(new).to_vec();
            let metadata = new.get("metadata").cloned().unwrap_or_default();
            take_all_but(new, old, &[]);
            set_metadata(new, &metadata, &CLIENT_METADATA);
            meta::set(new, "managedFields", managed);
            set_member(&mut new["spec"], "finalizers", finalizers);
        }
        _ => {}
    }
    resource.schema(&Gvk::of(new)).fill(new);
}

/// Metadata that belongs to clients.
const CLIENT_METADATA: [&str; 4] = ["labels", "annotations", "finalizers", "ownerReferences"];

/// The metadata a write of `status` may change. Most kinds let all of it change; newer ones none.
fn written_with_status(resource: &Resource) -> &'static [&'static str] {
    let gvr = &resource.gvr;
    match (gvr.group.as_str(), gvr.resource.as_str()) {
        ("", "pods") => &CLIENT_METADATA[..3],
        ("apps", "deployments") => &CLIENT_METADATA[1..],
        ("flowcontrol.apiserver.k8s.io" | "resource.k8s.io" | "apiextensions.k8s.io" | "apiregistration.k8s.io", _)
        | ("storage.k8s.io", "volumeattachments")
        | ("admissionregistration.k8s.io" | "internal.apiserver.k8s.io", _) => &[],
        _ if isopod_api::schema::lookup(&resource.gvk).is_none() => &[],
        _ => &CLIENT_METADATA,
    }
}

/// Takes `members` of a written metadata.
fn set_metadata(new: &mut Value, written: &Value, members: &[&str]) {
    if !members.is_empty() {
        // Who names an object by its uid means this one and no successor: validation tells.
        meta::set_uid(new, written["uid"].as_str().unwrap_or_default());
    }
    for member in members {
        meta::set(new, member, written.get(*member).cloned().unwrap_or_default());
    }
}

fn take_all_but(new: &mut Value, old: &Value, keep: &[&str]) {
    let mut taken = old.clone();
    for member in keep {
        set_member(&mut taken, member, new.get(*member).cloned());
    }
    *new = taken;
}

fn set_member(obj: &mut Value, member: &str, value: Option<Value>) {
    match (obj, value) {
        (obj @ Value::Object(_), Some(value)) => obj[member] = value,
        (Value::Object(map), None) => drop(map.shift_remove(member)),
        (obj, Some(value)) => *obj = serde_json::json!({member: value}),
        _ => {}
    }
}
