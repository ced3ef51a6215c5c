//! What kubectl does with objects, done with an object of every type there is. kubectl takes them all at once, so each line
//! here is one call.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, process::Command};

use isopod_api::{gvk::Gvk, resources, yaml};
use serde_json::{Value, json};

use super::{Server, kubectl::Kubectl};

/// One object per type, as the file has them.
pub(super) fn objects(k: &Kubectl) -> Vec<Value> {
    let script = "openssl req -new -newkey rsa:2048 -nodes -keyout u.key -subj /CN=jane 2>/dev/null | base64 -w0";
    let request = Command::new("sh").current_dir(&k.0).args(["-c", script]).output().unwrap().stdout;
    let text = include_str!("every_type.yaml").replace("REQUEST", std::str::from_utf8(&request).unwrap());
    let mut all: Vec<Value> = yaml::parse_all(&text).unwrap();
    for object in &mut all {
        object["metadata"]["labels"] = json!({"every": "one"});
    }
    all
}

pub(super) fn list(k: &Kubectl, name: &str, objects: &[Value]) {
    k.file(name, &json!({"apiVersion": "v1", "kind": "List", "items": objects}));
}

/// The lines that end in a word: one for each object, and no other.
fn each(shown: &str, word: &str, n: usize) {
    let wrong: Vec<&str> = shown.lines().filter(|line| !line.ends_with(word)).collect();
    assert_eq!((shown.lines().count(), wrong), (n, Vec::new()), "{shown}");
}

/// The values of the label.
fn labels(k: &Kubectl) -> Vec<String> {
    let shown = k.k("get -f all.json -o jsonpath='{range .items[*]}{.metadata.labels.every}{\"\\n\"}{end}'");
    shown.lines().map(str::to_owned).collect()
}

fn labelled(objects: &[Value], value: &str) -> Vec<Value> {
    let mut out = objects.to_vec();
    out.iter_mut().for_each(|object| object["metadata"]["labels"]["every"] = value.into());
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_and_every_type() {
    let server = Server::start().await;
    let k = Kubectl::new(&server);
    tokio::task::block_in_place(|| {
        let all = objects(&k);
        nothing_is_missing(&all);
        list(&k, "all.json", &all);
        list(&k, "two.json", &labelled(&all, "two"));
        applied(&k, &all);
        changed(&k, &all);
        printed(&k, &all);
        deleted(&k, &all);
        reviewed(&k);
    });
}

fn nothing_is_missing(objects: &[Value]) {
    let there: BTreeSet<Gvk> = objects.iter().map(Gvk::of).collect();
    let stored = resources::all().iter().filter(|r| r.has_verb("create") && r.has_verb("list"));
    assert_eq!(there, stored.map(|r| r.gvk()).collect::<BTreeSet<_>>());
}

fn applied(k: &Kubectl, all: &[Value]) {
    each(&k.k("apply -f all.json --validate=strict"), " created", all.len());
    // The selector of a budget is replaced as a whole: kubectl always sends it.
    let again = k.k("apply -f all.json");
    let changed: Vec<&str> = again.lines().filter(|line| !line.ends_with(" unchanged")).collect();
    assert_eq!((again.lines().count(), changed), (all.len(), vec!["poddisruptionbudget.policy/every configured"]));
    assert_eq!(k.k("diff -f all.json"), "");
    let difference = k.output("diff -f two.json");
    let shown = String::from_utf8(difference.stdout).unwrap();
    assert_eq!(difference.status.code(), Some(1));
    assert_eq!(
        shown.lines().filter(|line| line.trim_start_matches('+').trim() == "every: two").count(),
        all.len(),
        "{shown}"
    );
    each(&k.k("apply -f two.json --dry-run=server"), " configured (server dry run)", all.len());
    each(&k.k("apply -f two.json"), " configured", all.len());
    assert_eq!(labels(k), vec!["two"; all.len()]);
    let conflicts = k.refused("apply --server-side --field-manager=other -f all.json");
    let conflicting =
        conflicts.lines().filter(|line| line.contains("Apply failed with") || line.contains("conflicts with"));
    assert!(conflicting.count() >= all.len(), "{conflicts}");
    let forced = k.k("apply --server-side --force-conflicts --field-manager=other -f all.json");
    each(&forced, " serverside-applied", all.len());
    assert_eq!(k.k("diff --server-side --force-conflicts --field-manager=other -f all.json"), "");
}

fn changed(k: &Kubectl, all: &[Value]) {
    fs::write(k.0.join("editor"), "#!/bin/sh\nsed -i 's/every: one/every: edited/' \"$1\"\n").unwrap();
    fs::set_permissions(k.0.join("editor"), fs::Permissions::from_mode(0o755)).unwrap();
    each(&k.k("edit -f all.json"), " edited", all.len());
    assert_eq!(labels(k), vec!["edited"; all.len()]);
    let mut whole: Value = serde_json::from_str(&k.k("get -f all.json -o json")).unwrap();
    whole["items"].as_array_mut().unwrap().iter_mut().for_each(|o| o["metadata"]["labels"]["every"] = "two".into());
    k.file("whole.json", &whole);
    each(&k.k("replace -f whole.json"), " replaced", all.len());
    assert_eq!(labels(k), vec!["two"; all.len()]);
    for (kind, patch) in [
        ("merge", r#"{"metadata":{"labels":{"every":"merge"}}}"#),
        ("strategic", r#"{"metadata":{"labels":{"every":"strategic"}}}"#),
        ("json", r#"[{"op":"replace","path":"/metadata/labels/every","value":"json"}]"#),
    ] {
        each(&k.k(&format!("patch -f all.json --type={kind} -p '{patch}'")), " patched", all.len());
        assert_eq!(labels(k), vec![kind; all.len()]);
    }
    each(&k.k("label -f all.json --overwrite every=one"), " labeled", all.len());
    each(&k.k("annotate -f all.json note=seen"), " annotated", all.len());
    // kubectl asks the server five times a second while it waits: four share the work.
    std::thread::scope(|scope| {
        for (n, part) in all.chunks(all.len().div_ceil(4)).enumerate() {
            scope.spawn(move || {
                list(k, &format!("part-{n}.json"), part);
                let wait = "--for=jsonpath='{.metadata.annotations.note}'=seen --timeout=2m";
                each(&k.k(&format!("wait -f part-{n}.json {wait}")), " condition met", part.len());
            });
        }
    });
}

fn printed(k: &Kubectl, all: &[Value]) {
    let get = |format: &str| k.k(&format!("get -f all.json {format}"));
    let names: Vec<&str> = all.iter().map(|object| object["metadata"]["name"].as_str().unwrap()).collect();
    let whole: Value = serde_json::from_str(&get("-o json")).unwrap();
    let read = |list: &Value| -> Vec<String> {
        let items = list["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(read(&whole), names);
    assert_eq!(read(&yaml::parse(&get("-o yaml")).unwrap()), names);
    assert_eq!(get("-o name").lines().count(), names.len());
    fs::write(k.0.join("path"), "{range .items[*]}{.metadata.name}{\"\\n\"}{end}").unwrap();
    fs::write(k.0.join("template"), "{{range .items}}{{.metadata.name}}{{\"\\n\"}}{{end}}").unwrap();
    fs::write(k.0.join("columns"), "NAME           EVERY\n.metadata.name .metadata.labels.every\n").unwrap();
    for format in [
        "jsonpath=\"$(cat path)\"",
        "jsonpath-file=path",
        "go-template=\"$(cat template)\"",
        "go-template-file=template",
        "template --template=\"$(cat template)\"",
        "templatefile --template=template",
    ] {
        assert_eq!(get(&format!("-o {format}")).lines().collect::<Vec<_>>(), names, "{format}");
    }
    let listed: Value = serde_json::from_str(&get("-o jsonpath-as-json='{.items[*].metadata.name}'")).unwrap();
    assert_eq!(listed, json!(names));
    for format in ["custom-columns=NAME:.metadata.name,EVERY:.metadata.labels.every", "custom-columns-file=columns"] {
        let shown = get(&format!("-o {format} --no-headers"));
        // The header of a file is always printed.
        let rows = shown.lines().filter(|line| !line.starts_with("NAME"));
        let rows: Vec<Vec<&str>> = rows.map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows, names.iter().map(|name| vec![*name, "one"]).collect::<Vec<_>>(), "{format}");
    }
    // Tables have a row per object; wide ones are wider.
    for format in ["", "-o wide", "--show-labels"] {
        let shown = get(&format!("{format} --no-headers"));
        assert_eq!(shown.lines().filter(|line| !line.trim().is_empty()).count(), names.len(), "{format}: {shown}");
    }
    selected(k, all);
}

fn selected(k: &Kubectl, all: &[Value]) {
    // By full names: two kinds have two versions.
    let full = |object: &Value| {
        let gvk = Gvk::of(object);
        format!("{}.{}.{}", resources::by_gvk(&gvk).unwrap().plural, gvk.version, gvk.group)
    };
    let types = all.iter().map(full).collect::<Vec<_>>().join(",");
    let found = |more: &str| -> BTreeSet<String> {
        k.k(&format!("get {types} {more} -o name")).lines().map(str::to_owned).collect()
    };
    let everything = found("-l every=one");
    assert_eq!(everything.len(), all.len() + 2, "both events are there by two names: {everything:?}");
    assert_eq!(found("-l 'every in (one),every!=two' --sort-by=.metadata.name"), everything);
    assert_eq!(found("-l every=none --ignore-not-found"), BTreeSet::new());
    let named = found("--field-selector=metadata.name=every");
    let wanted: BTreeSet<String> = everything.iter().filter(|name| name.ends_with("/every")).cloned().collect();
    assert_eq!(named.iter().filter(|name| everything.contains(*name)).cloned().collect::<BTreeSet<_>>(), wanted);
    assert!(named.iter().all(|name| name.ends_with("/every")), "{named:?}");
}

fn deleted(k: &Kubectl, all: &[Value]) {
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "every"}, "spec": {"finalizers": []}});
    k.file("namespace.json", &namespace);
    for (cascade, finalizer) in
        [("background", None), ("orphan", Some("orphan")), ("foreground", Some("foregroundDeletion"))]
    {
        if finalizer.is_some() {
            each(&k.k("create -f all.json"), " created", all.len());
        }
        let shown = k.k(&format!("delete -f all.json --cascade={cascade} --wait=false"));
        assert_eq!(
            shown.lines().filter(|line| line.ends_with(" deleted") || line.contains(" deleted from ")).count(),
            all.len(),
            "{shown}"
        );
        let left: Value = serde_json::from_str(&k.k("get -f all.json --ignore-not-found -o json")).unwrap();
        // A namespace, at least, takes two steps.
        let left = left["items"].as_array().cloned().unwrap_or(vec![left.clone()]);
        assert!(left.iter().all(|object| object["metadata"]["deletionTimestamp"].is_string()), "{left:?}");
        // Nobody collects garbage here: what waits for its dependents waits for good. Events have none.
        if let Some(finalizer) = finalizer {
            let waits = |object: &&Value| object["metadata"]["finalizers"].to_string().contains(finalizer);
            assert_eq!(left.iter().filter(waits).count(), all.len() - 2, "{cascade}");
        }
        // Definitions go by themselves, perhaps just now.
        let definition = |object: &&Value| finalizer.is_none() && object["kind"] == "CustomResourceDefinition";
        let left: Vec<Value> = left.iter().filter(|object| !definition(object)).cloned().collect();
        list(k, "left.json", &left);
        k.k(r#"patch -f left.json --type=merge -p '{"metadata":{"finalizers":null}}'"#);
        k.k("replace --raw /api/v1/namespaces/every/finalize -f namespace.json");
        k.k("wait -f all.json --for=delete --timeout=2m");
    }
}

/// What is only answered.
fn reviewed(k: &Kubectl) {
    let spec = |kind: &str| match kind {
        "TokenReview" => json!({"token": "x"}),
        "SelfSubjectRulesReview" => json!({"namespace": "default"}),
        "LocalSubjectAccessReview" => {
            json!({"user": "u", "resourceAttributes": {"namespace": "default", "verb": "get", "resource": "pods"}})
        }
        _ => json!({"user": "u", "resourceAttributes": {"verb": "get", "resource": "pods"}}),
    };
    let reviews = resources::all().iter().filter(|r| r.kind.ends_with("Review"));
    let reviews: Vec<Value> = reviews
        .map(|r| {
            let mut review = json!({"apiVersion": r.api_version(), "kind": r.kind});
            if r.kind != "SelfSubjectReview" {
                review["spec"] = spec(&r.kind);
            }
            if r.kind == "SelfSubjectAccessReview" {
                review["spec"].as_object_mut().unwrap().remove("user");
            }
            if r.namespaced {
                review["metadata"] = json!({"namespace": "default"});
            }
            review
        })
        .collect();
    assert_eq!(reviews.len(), 6);
    list(k, "reviews.json", &reviews);
    let answered = k.k("create -f reviews.json -o json");
    let answered: Vec<Value> = serde_json::Deserializer::from_str(&answered).into_iter().map(Result::unwrap).collect();
    assert_eq!(answered.iter().filter(|review| review["status"].is_object()).count(), 6, "{answered:?}");
}
