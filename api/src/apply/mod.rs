//! Server-side apply and `metadata.managedFields`.
//!
//! - [`update`]: after a create, update or patch: who owns what now. Call it last, just before the object is stored.
//! - [`apply`]: merges an applied configuration into the live object, with conflicts, and sets the managed fields.
//!
//! Both take a [`Request`] that names the manager. `live` is `None` on create. The result of [`apply`] still has to go
//! through decode, defaults, admission and validation, like any other write; keep its managed fields on the way.
//!
//! An entry whose time alone changed is not a change: both functions then keep the old time stamps.

mod managers;
mod set;
mod typed;

use managers::{Entry, Managers, Operation};
use serde_json::{Map, Value};
use set::{Element, Set};
use typed::{Cursor, compare, field_set, merge, remove, validate};

use crate::{
    gvk::Gvk,
    meta,
    schema::{self, Definition},
    status::{Cause, Status},
    text::quote,
};

/// Who writes, and what.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The kind's definition.
    pub def: &'a Definition,
    /// The kind, in the version of the request.
    pub gvk: &'a Gvk,
    /// `fieldManager` of the request.
    pub manager: &'a str,
    /// `""`, `"status"`, `"scale"`, ...
    pub subresource: &'a str,
    /// Whether the kind has a status subresource: then writes to the main resource never own status.
    pub has_status: bool,
    /// The present, from [`meta::now`].
    pub now: &'a str,
}

/// Name under which fields are kept that existed before the first apply.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// `kubectl apply`'s annotation.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

impl Request<'_> {
    fn root(&self) -> Cursor<'_> {
        Cursor::root(self.def)
    }

    /// Fields this request cannot own.
    fn reset_fields(&self) -> Set {
        let mut out = Set::default();
        let field = |name: &str| [Element::Field(name.to_owned())];
        // A certificate request is immutable but for what its subresources do.
        if self.subresource.is_empty() && self.gvk.kind == "CertificateSigningRequest" {
            out.insert(&field("spec"));
        }
        match self.subresource {
            "" if self.has_status => out.insert(&field("status")),
            "status" => out.insert(&field("spec")),
            _ => {}
        }
        out
    }

    fn entry(&self, manager: &str, operation: Operation) -> Entry {
        Entry {
            manager: manager.to_owned(),
            operation,
            api_version: self.gvk.api_version(),
            subresource: self.subresource.to_owned(),
            time: self.now.to_owned(),
            set: Set::default(),
        }
    }

    /// The object a create starts from: only what Go prints for an empty struct.
    fn empty(&self) -> Value {
        let mut out = Value::Object(Map::new());
        schema::fill(self.def, &mut out);
        out["apiVersion"] = self.gvk.api_version().into();
        out["kind"] = self.gvk.kind.as_str().into();
        out
    }
}

/// System fields nobody owns.
fn stripped() -> Set {
    let mut out = Set::default();
    let field = |name: &str| Element::Field(name.to_owned());
    for top in ["apiVersion", "kind", "metadata"] {
        out.insert(&[field(top)]);
    }
    for name in [
        "clusterName",
        "creationTimestamp",
        "generation",
        "managedFields",
        "name",
        "namespace",
        "resourceVersion",
        "selfLink",
        "uid",
    ] {
        out.insert(&[field("metadata"), field(name)]);
    }
    out
}

/// `managedFields: [{}]` asks to forget all managers.
fn is_reset(obj: &Value) -> bool {
    let entries = meta::managed_fields(obj);
    entries.len() == 1 && entries[0].as_object().is_some_and(|e| e.values().all(|v| v.is_null() || v == ""))
}

fn without_managed_fields(obj: &Value) -> Value {
    let mut out = obj.clone();
    if let Some(metadata) = out.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.shift_remove("managedFields");
    }
    out
}

/// Takes what changed between `old` and `new` away from the other managers; without `force`, conflicts are an error.
fn settle(
    req: &Request<'_>,
    managers: &mut Managers,
    old: &Value,
    new: &Value,
    current: Option<usize>,
    force: bool,
) -> Result<typed::Comparison, Vec<(usize, Set)>> {
    let mut difference = compare(req.root(), old, new);
    let reset = req.reset_fields();
    difference.added = difference.added.recursive_difference(&reset);
    difference.modified = difference.modified.recursive_difference(&reset);
    difference.removed = difference.removed.recursive_difference(&reset);
    let changed = difference.modified.union(&difference.added);
    let mut conflicts = Vec::new();
    for (i, entry) in managers.0.iter().enumerate().filter(|(i, _)| Some(*i) != current) {
        let conflict = entry.set.intersection(&changed);
        if !conflict.is_empty() {
            conflicts.push((i, conflict));
        }
    }
    if !force && !conflicts.is_empty() {
        return Err(conflicts);
    }
    for (i, conflict) in conflicts {
        managers.0[i].set = managers.0[i].set.difference(&conflict);
    }
    for (_, entry) in managers.0.iter_mut().enumerate().filter(|(i, _)| Some(*i) != current) {
        entry.set = entry.set.difference(&difference.removed);
    }
    Ok(difference)
}

/// Records an update's ownership in `managers`.
fn record_update(req: &Request<'_>, managers: &mut Managers, old: &Value, new: &Value, manager: &str) {
    let Ok(difference) = settle(req, managers, old, new, None, true) else { return };
    let owned = difference.modified.union(&difference.added).difference(&stripped());
    managers.0.retain(|entry| !entry.set.is_empty());
    if !owned.is_empty() {
        let entry = req.entry(manager, Operation::Update);
        managers.add(entry, &owned);
    }
}

/// Sets `metadata.managedFields` of `new` after a create, update or patch.
pub fn update(req: &Request<'_>, live: Option<&Value>, new: &mut Value) {
    track(req, live, new);
    schema::seal(req.def, new);
}

fn track(req: &Request<'_>, live: Option<&Value>, new: &mut Value) {
    let given = if req.subresource.is_empty() { Some(&*new) } else { None };
    let reset = given.is_some_and(is_reset);
    let mut managers = if reset {
        Managers::default()
    } else {
        let decoded = given.and_then(Managers::decode).filter(|m| !m.0.is_empty());
        decoded.or_else(|| live.and_then(Managers::decode)).unwrap_or_default()
    };
    meta::set(new, "managedFields", Value::Null);
    if live.is_some() && managers.0.is_empty() {
        return;
    }
    let old = live.map_or_else(|| req.empty(), without_managed_fields);
    record_update(req, &mut managers, &old, new, req.manager);
    managers.cap();
    managers.encode(new);
    if let Some(live) = live {
        keep_times(live, new);
    }
}

/// If only time stamps in managedFields changed, keeps the old ones.
fn keep_times(live: &Value, new: &mut Value) {
    let timeless = |entries: &[Value]| -> Vec<Value> {
        let mut out = entries.to_vec();
        for entry in &mut out {
            if let Some(map) = entry.as_object_mut() {
                map.shift_remove("time");
            }
        }
        out.sort_by_key(ToString::to_string);
        out
    };
    let unchanged = timeless(meta::managed_fields(live)) == timeless(meta::managed_fields(new))
        && without_managed_fields(live) == without_managed_fields(new);
    if unchanged && let Some(old) = live.get("metadata").and_then(|m| m.get("managedFields")) {
        meta::set(new, "managedFields", old.clone());
    }
}

/// Merges an applied configuration into the live object. The result carries the new managed fields.
pub fn apply(req: &Request<'_>, live: Option<&Value>, applied: &Value, force: bool) -> Result<Value, Status> {
    let given = Gvk::of(applied);
    if given.api_version() != req.gvk.api_version() {
        return Err(Status::bad_request(format!(
            "Incorrect version specified in apply patch. Specified patch version: {}, expected: {}",
            given.api_version(),
            req.gvk.api_version()
        )));
    }
    if applied.get("metadata").and_then(|m| m.get("managedFields")).is_some_and(|v| !v.is_null()) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    validate(req.root(), applied, false).map_err(|e| {
        Status::unknown(format!(
            "failed to create typed patch object ({}/{}; {}): {e}",
            meta::namespace(applied),
            meta::name(applied),
            given
        ))
    })?;
    let base = live.map_or_else(|| req.empty(), without_managed_fields);
    let mut managers = live.and_then(Managers::decode).unwrap_or_default();
    if managers.0.is_empty() {
        record_update(req, &mut managers, &req.empty(), &base, BEFORE_FIRST_APPLY);
    }
    let result = match try_apply(req, &base, applied, managers.clone(), force) {
        Err(conflicts) if req.manager == "kubectl" && allowed_by_last_applied(req, live, &conflicts) => {
            try_apply(req, &base, applied, managers, true)
        }
        other => other,
    };
    let (mut out, managers) = result.map_err(|conflicts| conflict_status(&conflicts))?;
    managers.encode(&mut out);
    if req.manager == "kubectl" && meta::annotation(&out, LAST_APPLIED).is_some() {
        meta::set_annotation(&mut out, LAST_APPLIED, &format!("{}\n", without_annotation(applied)));
    }
    if let Some(live) = live {
        keep_times(live, &mut out);
    }
    Ok(out)
}

/// Merges what a mutating policy sets into an object. Nobody owns it afterwards.
pub fn merge_unowned(def: &Definition, live: &Value, patch: &Value) -> Result<Value, String> {
    let root = Cursor::root(def);
    validate(root, patch, false).map_err(|e| format!("failed to convert patch object to typed object: {e}"))?;
    let atomics = typed::atomics(root, patch);
    if !atomics.is_empty() {
        let all = atomics.join(", ");
        return Err(format!("invalid ApplyConfiguration: may not mutate atomic arrays, maps or structs: {all}"));
    }
    Ok(merge(root, live, patch))
}

fn without_annotation(applied: &Value) -> Value {
    let mut out = applied.clone();
    if meta::annotation(&out, LAST_APPLIED).is_some() {
        meta::remove_annotation(&mut out, LAST_APPLIED);
    }
    out
}

struct Conflict {
    entry: Entry,
    set: Set,
}

fn try_apply(
    req: &Request<'_>,
    base: &Value,
    applied: &Value,
    mut managers: Managers,
    force: bool,
) -> Result<(Value, Managers), Vec<Conflict>> {
    let root = req.root();
    let mut merged = merge(root, base, applied);
    let reset = req.reset_fields();
    let set = field_set(root, applied).recursive_difference(&reset).difference(&stripped());
    let (current, last) = managers.replace_applier(req.entry(req.manager, Operation::Apply), set);
    if let Some(last) = last.filter(|set| !set.is_empty()) {
        merged = prune(root, &merged, &managers, &last);
    }
    match settle(req, &mut managers, base, &merged, Some(current), force) {
        Ok(_) => {
            managers.0.retain(|entry| !entry.set.is_empty());
            drop_nulls(&mut merged, applied);
            Ok((merged, managers))
        }
        Err(conflicts) => {
            Err(conflicts.into_iter().map(|(i, set)| Conflict { entry: managers.0[i].clone(), set }).collect())
        }
    }
}

/// Removal leaves nulls behind where containers became empty; those were not asked for.
fn drop_nulls(value: &mut Value, applied: &Value) {
    if let Value::Object(map) = value {
        map.retain(|key, value| !value.is_null() || applied.get(key).is_some_and(Value::is_null));
        for (key, value) in map.iter_mut() {
            drop_nulls(value, applied.get(key).unwrap_or(&Value::Null));
        }
    } else if let Value::Array(items) = value {
        for item in items {
            drop_nulls(item, &Value::Null);
        }
    }
}

/// Removes what the applier owned last time and nobody owns now.
fn prune(root: Cursor<'_>, merged: &Value, managers: &Managers, last: &Set) -> Value {
    let named = |set: &Set| set.with_named_fields(root);
    let last = named(last);
    let pruned = remove(root, merged, &last);
    let all = named(&field_set(root, merged));
    let owned = managers.0.iter().fold(Set::default(), |all, entry| all.union(&entry.set));
    let kept = named(&field_set(root, &pruned)).union(&named(&owned));
    let pruned = remove(root, merged, &all.difference(&kept));
    let dangling = all.difference(&named(&field_set(root, &pruned))).intersection(&last);
    remove(root, merged, &dangling)
}

/// Whether all conflicts are over fields that `kubectl apply` (client-side) set.
fn allowed_by_last_applied(req: &Request<'_>, live: Option<&Value>, conflicts: &[Conflict]) -> bool {
    let Some(live) = live else { return false };
    let Some(last) = meta::annotation(live, LAST_APPLIED).and_then(|text| serde_json::from_str::<Value>(text).ok())
    else {
        return false;
    };
    if Gvk::of(&last).api_version() != req.gvk.api_version() {
        return false;
    }
    let allowed = field_set(req.root(), &last);
    let same = compare(req.root(), &last, live).modified;
    let allowed = allowed.difference(&same);
    conflicts.iter().all(|conflict| conflict.set.difference(&allowed).is_empty())
}

fn conflict_status(conflicts: &[Conflict]) -> Status {
    let mut sorted: Vec<&Conflict> = conflicts.iter().collect();
    sorted.sort_by_key(|c| c.entry.identifier());
    let name = |entry: &Entry| {
        let mut out = quote(&entry.manager);
        if !entry.subresource.is_empty() {
            out.push_str(&format!(" with subresource {}", quote(&entry.subresource)));
        }
        if entry.operation == Operation::Update {
            out.push_str(&format!(" using {}", entry.api_version));
        }
        out
    };
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    for conflict in sorted {
        let manager = name(&conflict.entry);
        lines.push(format!("conflicts with {manager}:"));
        for field in conflict.set.paths() {
            lines.push(format!("- {field}"));
            let message = format!("conflict with {manager}");
            causes.push(Cause { reason: "FieldManagerConflict".into(), message, field });
        }
    }
    let text = match causes.as_slice() {
        [one] => format!("Apply failed with 1 conflict: {}: {}", one.message, one.field),
        many => format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n")),
    };
    Status::apply_conflict(causes, text)
}

#[cfg(test)]
mod tests;
