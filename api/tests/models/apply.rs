//! Server-side apply against a model of ownership.
//!
//! The model knows paths and owners, nothing of tries, schemas or merging of values. An object is the set of its paths: leaves
//! with their text (also whole atomic lists), items of keyed lists and sets, and the containers they are in. A manager owns
//! paths. Writers come in any order, create, update, apply and force; afterwards object, managedFields and conflicts agree.

use std::collections::{BTreeMap, BTreeSet};

use isopod_api::{
    apply::{Request, apply, update},
    gvk::Gvk,
    meta,
    schema::{fill, lookup},
    status::Status,
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// A path in the notation of fieldsV1.
type Path = Vec<String>;
/// A manager's name and whether it applies.
type Owner = (String, bool);

fn path(parts: &[&str]) -> Path {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

/// What one writer says about a Pod. Empty maps and lists are left out.
#[derive(Debug, Clone, Default)]
struct Said {
    /// A map.
    labels: BTreeMap<String, String>,
    /// A set.
    finalizers: BTreeSet<String>,
    /// A list by key.
    containers: BTreeMap<String, Container>,
}

#[derive(Debug, Clone, Default)]
struct Container {
    image: Option<String>,
    /// An atomic list.
    args: Vec<String>,
    /// A list by key inside another.
    env: BTreeMap<String, Option<String>>,
}

fn said() -> impl Strategy<Value = Said> {
    let word = || prop::sample::select(vec!["0", "1", "2"]).prop_map(str::to_owned);
    let env = prop::collection::btree_map("[EF]", prop::option::of(word()), 0..3);
    let container = (prop::option::of(word()), prop::collection::vec(word(), 0..3), env)
        .prop_map(|(image, args, env)| Container { image, args, env });
    (
        prop::collection::btree_map("[a-c]", word(), 0..4),
        prop::collection::btree_set(prop::sample::select(vec!["x.io/x", "x.io/y", "x.io/z"]), 0..3),
        prop::collection::btree_map("[cd]", container, 0..3),
    )
        .prop_map(|(labels, finalizers, containers)| Said {
            labels,
            finalizers: finalizers.into_iter().map(str::to_owned).collect(),
            containers,
        })
}

impl Said {
    fn object(&self) -> Value {
        let mut object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}});
        if !self.labels.is_empty() {
            object["metadata"]["labels"] = json!(self.labels);
        }
        if !self.finalizers.is_empty() {
            object["metadata"]["finalizers"] = json!(self.finalizers);
        }
        let item = |(name, container): (&String, &Container)| {
            let mut item = Map::from_iter([("name".to_owned(), json!(name))]);
            item.extend(container.image.as_ref().map(|image| ("image".to_owned(), json!(image))));
            if !container.args.is_empty() {
                item.insert("args".into(), json!(container.args));
            }
            let env = container.env.iter().map(|(name, value)| match value {
                Some(value) => json!({"name": name, "value": value}),
                None => json!({"name": name}),
            });
            if !container.env.is_empty() {
                item.insert("env".into(), env.collect());
            }
            Value::Object(item)
        };
        if !self.containers.is_empty() {
            object["spec"] = json!({"containers": self.containers.iter().map(item).collect::<Vec<_>>()});
        }
        object
    }

    /// Leaves with their text and items, no containers.
    fn paths(&self) -> BTreeMap<Path, String> {
        let mut out = BTreeMap::new();
        for (key, value) in &self.labels {
            out.insert(path(&["f:metadata", "f:labels", &format!("f:{key}")]), value.clone());
        }
        for finalizer in &self.finalizers {
            out.insert(path(&["f:metadata", "f:finalizers", &format!("v:\"{finalizer}\"")]), String::new());
        }
        for (name, container) in &self.containers {
            let key = format!("k:{{\"name\":\"{name}\"}}");
            let at = |rest: &[&str]| [path(&["f:spec", "f:containers", &key]), path(rest)].concat();
            out.insert(at(&[]), String::new());
            out.insert(at(&["f:name"]), name.clone());
            out.extend(container.image.iter().map(|image| (at(&["f:image"]), image.clone())));
            if !container.args.is_empty() {
                out.insert(at(&["f:args"]), container.args.join(" "));
            }
            for (name, value) in &container.env {
                let key = format!("k:{{\"name\":\"{name}\"}}");
                out.insert(at(&["f:env", &key]), String::new());
                out.insert(at(&["f:env", &key, "f:name"]), name.clone());
                out.extend(value.iter().map(|value| (at(&["f:env", &key, "f:value"]), value.clone())));
            }
        }
        out
    }
}

/// What a stored object says.
fn read(object: &Value) -> Said {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let optional = |value: &Value| value.as_str().map(str::to_owned);
    let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
    let env = |item: &Value| list(&item["env"]).iter().map(|e| (text(&e["name"]), optional(&e["value"]))).collect();
    let container = |item: &Value| Container {
        image: optional(&item["image"]).filter(|image| !image.is_empty()),
        args: list(&item["args"]).iter().map(text).collect(),
        env: env(item),
    };
    Said {
        labels: labels.map(|(key, value)| (key.clone(), text(value))).collect(),
        finalizers: list(&object["metadata"]["finalizers"]).iter().map(text).collect(),
        containers: list(&object["spec"]["containers"]).iter().map(|i| (text(&i["name"]), container(i))).collect(),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Update { manager: String, said: Said },
    Apply { manager: String, said: Said, force: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let manager = || prop::sample::select(vec!["one", "two", "three"]).prop_map(str::to_owned);
    prop_oneof![
        1 => (manager(), said()).prop_map(|(manager, said)| Step::Update { manager, said }),
        3 => (manager(), said(), any::<bool>()).prop_map(|(manager, said, force)| Step::Apply { manager, said, force }),
    ]
}

/// The object and who owns what of it.
#[derive(Debug, Clone, Default)]
struct Model {
    paths: BTreeMap<Path, String>,
    owners: BTreeMap<Owner, BTreeSet<Path>>,
    exists: bool,
}

/// How two states differ.
struct Difference {
    changed: BTreeSet<Path>,
    removed: BTreeSet<Path>,
}

/// The containers of some paths: all fields above them, but those that Go prints also when they are empty.
fn containers<'p>(paths: impl Iterator<Item = &'p Path>) -> BTreeSet<Path> {
    let printed = [path(&["f:metadata"]), path(&["f:spec"]), path(&["f:spec", "f:containers"])];
    let above = paths.flat_map(|path| (1..path.len()).map(|n| path[..n].to_vec()));
    above.filter(|p| p.last().is_some_and(|last| last.starts_with("f:")) && !printed.contains(p)).collect()
}

impl Model {
    fn all(&self) -> BTreeSet<Path> {
        let mut out = containers(self.paths.keys());
        out.extend(self.paths.keys().cloned());
        out
    }

    fn difference(&self, new: &Self) -> Difference {
        let (before, after) = (self.all(), new.all());
        let modified = self.paths.iter().filter(|(p, v)| new.paths.get(*p).is_some_and(|new| new != *v));
        let added = after.difference(&before).cloned();
        Difference {
            changed: added.chain(modified.map(|(p, _)| p.clone())).collect(),
            removed: before.difference(&after).cloned().collect(),
        }
    }

    /// What others own of a change.
    fn conflicts(&self, writer: &Owner, changed: &BTreeSet<Path>) -> BTreeSet<(Owner, Path)> {
        let others = self.owners.iter().filter(|(owner, _)| *owner != writer);
        others.flat_map(|(o, own)| own.intersection(changed).map(|p| (o.clone(), p.clone()))).collect()
    }

    fn settle(&mut self, writer: &Owner, difference: &Difference) {
        for (owner, own) in &mut self.owners {
            if owner != writer || !writer.1 {
                own.retain(|p| !difference.removed.contains(p) && !difference.changed.contains(p));
            }
        }
    }

    fn update(&mut self, manager: &str, said: &Said) {
        let mut new = Self { paths: said.paths(), owners: self.owners.clone(), exists: true };
        // Where nobody owns anything, updates do not begin to.
        if self.exists && self.owners.is_empty() {
            *self = new;
            return;
        }
        let difference = self.difference(&new);
        let writer = (manager.to_owned(), false);
        new.settle(&writer, &difference);
        new.owners.entry(writer).or_default().extend(difference.changed);
        new.owners.retain(|_, own| !own.is_empty());
        *self = new;
    }

    fn apply(&mut self, manager: &str, said: &Said, force: bool) -> Result<(), BTreeSet<(Owner, Path)>> {
        let writer = (manager.to_owned(), true);
        let mut new = Self { exists: true, ..self.clone() };
        // Whatever came from nobody keeps an owner of its own.
        if self.owners.is_empty() && !self.paths.is_empty() {
            new.owners.insert(("before-first-apply".to_owned(), false), self.all());
        }
        let wanted = said.paths();
        new.paths.extend(wanted.clone());
        let last = new.owners.insert(writer.clone(), wanted.into_keys().collect()).unwrap_or_default();
        let owned: BTreeSet<&Path> = new.owners.values().flatten().collect();
        // What only this applier wanted, and now no longer does, goes with all below it.
        let gone: Vec<Path> = last.into_iter().filter(|p| !owned.contains(p)).collect();
        new.paths.retain(|p, _| !gone.iter().any(|gone| p.starts_with(gone)));
        let mut difference = self.difference(&new);
        // A container that somebody owns is only emptied, unless it went with its item.
        let owned: BTreeSet<&Path> = new.owners.values().flatten().collect();
        let below = |path: &Path| gone.iter().any(|gone| path.starts_with(gone));
        difference.removed.retain(|path| self.paths.contains_key(path) || !owned.contains(path) || below(path));
        let conflicts = new.conflicts(&writer, &difference.changed);
        if !force && !conflicts.is_empty() {
            return Err(conflicts);
        }
        new.settle(&writer, &difference);
        new.owners.retain(|_, own| !own.is_empty());
        *self = new;
        Ok(())
    }
}

/// What Go prints empty in an item; nobody says anything about it here.
const PRINTED: [&str; 2] = ["f:resources", "f:status"];

/// The owners in an object's managedFields.
fn owners(object: &Value) -> BTreeMap<Owner, BTreeSet<Path>> {
    fn collect(fields: &Value, at: &Path, out: &mut BTreeSet<Path>) {
        for (key, below) in fields.as_object().unwrap() {
            if key == "." {
                out.insert(at.clone());
                continue;
            }
            let at = [at.as_slice(), std::slice::from_ref(key)].concat();
            match below.as_object().unwrap().is_empty() {
                true => {
                    out.insert(at);
                }
                false => collect(below, &at, out),
            }
        }
    }
    let mut out = BTreeMap::new();
    for entry in meta::managed_fields(object) {
        let owner = (entry["manager"].as_str().unwrap().to_owned(), entry["operation"] == "Apply");
        let mut own = BTreeSet::new();
        collect(&entry["fieldsV1"], &Path::new(), &mut own);
        own.retain(|path| !PRINTED.contains(&path.last().map_or("", String::as_str)));
        if own.is_empty() {
            continue;
        }
        assert!(out.insert(owner, own).is_none(), "one entry per manager and operation: {object}");
    }
    out
}

/// The path as conflicts show it.
fn shown(path: &Path) -> String {
    let part = |part: &String| match part.split_once(':').unwrap() {
        ("f", name) => format!(".{name}"),
        ("v", value) => format!("[={value}]"),
        (_, key) => {
            let key: BTreeMap<String, Value> = serde_json::from_str(key).unwrap();
            format!("[{}]", key.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","))
        }
    };
    path.iter().map(part).collect()
}

fn refused(status: &Status) -> BTreeSet<(String, String)> {
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"), "{status:?}");
    let causes = &status.details.as_ref().unwrap().causes;
    causes.iter().map(|cause| (cause.message.clone(), cause.field.clone())).collect()
}

fn expected(conflicts: &BTreeSet<(Owner, Path)>) -> BTreeSet<(String, String)> {
    let one = |((manager, applies), path): &(Owner, Path)| {
        let using = if *applies { "" } else { " using v1" };
        (format!("conflict with \"{manager}\"{using}"), shown(path))
    };
    conflicts.iter().map(one).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn ownership_is_as_in_the_model(steps in prop::collection::vec(step(), 1..9)) {
        let gvk = Gvk::new("", "v1", "Pod");
        let def = lookup(&gvk).unwrap();
        let mut model = Model::default();
        let mut live: Option<Value> = None;
        for (n, step) in steps.iter().enumerate() {
            let now = format!("2024-01-01T00:00:{n:02}Z");
            let (Step::Update { manager, .. } | Step::Apply { manager, .. }) = step;
            let request = Request { def, gvk: &gvk, manager, subresource: "", has_status: true, now: &now };
            match step {
                Step::Update { said, .. } => {
                    // A creation that says nothing has no owner, and the next apply would own it before it came.
                    if live.is_none() && said.paths().is_empty() {
                        continue;
                    }
                    let mut new = said.object();
                    fill(def, &mut new);
                    update(&request, live.as_ref(), &mut new);
                    model.update(manager, said);
                    live = Some(new);
                }
                Step::Apply { said, force, .. } => {
                    if live.is_none() && said.paths().is_empty() {
                        continue;
                    }
                    let got = apply(&request, live.as_ref(), &said.object(), *force);
                    match (got, model.apply(manager, said, *force)) {
                        (Ok(mut new), Ok(())) => {
                            fill(def, &mut new);
                            live = Some(new);
                        }
                        (Err(status), Err(conflicts)) => prop_assert_eq!(refused(&status), expected(&conflicts)),
                        (got, want) => prop_assert!(false, "step {}: {:?}, in the model {:?}", n, got, want),
                    }
                }
            }
            let object = live.as_ref().unwrap();
            prop_assert_eq!(&read(object).paths(), &model.paths, "step {}: {}", n, object);
            prop_assert_eq!(&owners(object), &model.owners, "step {}: {}", n, object);
        }
    }
}
