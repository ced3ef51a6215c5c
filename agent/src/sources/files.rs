//! Static pods: manifests in a directory, as upstream reads them.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret, Toleration};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{HASH, SEEN, SOURCE};
use crate::objects::{Local, Object, ObjectKind, ObjectRef, Objects};

/// Static pods by namespace and name.
pub(crate) type Manifests = BTreeMap<(String, String), Arc<Pod>>;

/// Follows the directory: the receiver always has its present content.
pub(crate) fn start(
    path: PathBuf,
    node: Arc<str>,
    objects: Objects,
    stop: CancellationToken,
) -> watch::Receiver<Manifests> {
    let dir = if path.is_file() { path.parent().map_or_else(|| path.clone(), Path::to_path_buf) } else { path.clone() };
    if let Err(error) = fs::create_dir_all(&dir) {
        tracing::error!(path = %dir.display(), %error, "manifest directory");
    }
    let events = super::directory_events(&dir);
    let mut said = BTreeMap::new();
    let (first, local) = read(&path, &node, &mut said);
    objects.set_local(local);
    let (sender, receiver) = watch::channel(first);
    let events = match events {
        Ok(e) => e,
        Err(error) => {
            tracing::error!(path = %dir.display(), %error, "manifest directory cannot be watched");
            return receiver;
        }
    };
    tokio::spawn(async move {
        let mut events = events.boxed();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                e = events.next() => if e.is_none() { return },
            }
            // An editor writes a file in several steps; those that come at once are read once.
            while let Ok(Some(())) = tokio::time::timeout(Duration::from_millis(5), events.next()).await {}
            let (fresh, local) = read(&path, &node, &mut said);
            objects.set_local(local);
            sender.send_if_modified(|now| {
                let uids = |m: &Manifests| m.values().map(|p| p.metadata.uid.clone()).collect::<Vec<_>>();
                let changed = uids(now) != uids(&fresh);
                if changed {
                    *now = fresh;
                }
                changed
            });
        }
    });
    receiver
}

/// Reads all manifests; each bad file is told once per content.
fn read(path: &Path, node: &str, said: &mut BTreeMap<PathBuf, String>) -> (Manifests, Local) {
    let mut files: Vec<PathBuf> = if path.is_file() {
        vec![path.to_path_buf()]
    } else {
        fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path()).collect()
    };
    files.retain(|f| {
        let name = f.file_name().and_then(|n| n.to_str()).unwrap_or("");
        let known = matches!(f.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"));
        known && !name.starts_with('.') && f.is_file()
    });
    files.sort();
    let (mut all, mut local) = (Manifests::new(), Local::new());
    for file in files {
        let result = fs::read_to_string(&file).map_err(|e| e.to_string()).and_then(|t| parse(&t, &file, node));
        match result {
            Ok(found) => {
                said.remove(&file);
                local.extend(found.objects.into_iter().map(|(key, o)| (key, Arc::new(o))));
                for pod in found.pods {
                    let key = (
                        pod.metadata.namespace.clone().unwrap_or_default(),
                        pod.metadata.name.clone().unwrap_or_default(),
                    );
                    match all.entry(key) {
                        Entry::Vacant(place) => _ = place.insert(Arc::new(pod)),
                        Entry::Occupied(taken) => {
                            let (namespace, name) = taken.key();
                            tracing::error!(path = %file.display(), "pod {namespace}/{name} is in another manifest already");
                        }
                    }
                }
            }
            Err(error) => {
                if said.get(&file) != Some(&error) {
                    tracing::error!(path = %file.display(), "manifest {} is refused: {error}", file.display());
                    said.insert(file, error);
                }
            }
        }
    }
    (all, local)
}

/// What one file holds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) pods: Vec<Pod>,
    pub(crate) objects: Vec<(ObjectRef, Object)>,
}

/// The static pods of one file, and ConfigMaps and Secrets for them.
pub(crate) fn parse(text: &str, file: &Path, node: &str) -> Result<Found, String> {
    let documents = isopod_api::yaml::parse_all(text).map_err(|e| e.to_string())?;
    let (mut found, mut listed) = (Found::default(), false);
    for mut value in documents.into_iter().filter(|v| !v.is_null()) {
        if value["kind"] == "PodList" || value["kind"] == "List" {
            // A list says what there is, be it nothing.
            listed |= value["items"].is_array();
            for item in value["items"].take().as_array_mut().into_iter().flatten() {
                found.take(item.take(), file, node)?;
            }
        } else {
            found.take(value, file, node)?;
        }
    }
    let empty = found.pods.is_empty() && found.objects.is_empty();
    if empty && !listed { Err("it holds no Pod".into()) } else { Ok(found) }
}

impl Found {
    fn take(&mut self, value: Value, file: &Path, node: &str) -> Result<(), String> {
        let kind = value["kind"].as_str().unwrap_or_default();
        if value["apiVersion"] != "v1" || !matches!(kind, "ConfigMap" | "Secret") {
            self.pods.push(one(value, file, node)?);
            return Ok(());
        }
        let text = |key: &str| value["metadata"][key].as_str().filter(|t| !t.is_empty()).map(ToString::to_string);
        let name = text("name").ok_or("metadata.name is missing")?;
        let namespace = text("namespace").unwrap_or_else(|| "default".into());
        let bad = |e: serde_json::Error| format!("{kind} {name}: {e}");
        let (kind, object) = if kind == "ConfigMap" {
            (ObjectKind::ConfigMap, serde_json::from_value::<ConfigMap>(value.clone()).map_err(bad)?.into())
        } else {
            (ObjectKind::Secret, serde_json::from_value::<Secret>(value.clone()).map_err(bad)?.into())
        };
        self.objects.push((ObjectRef { kind, namespace, name }, object));
        Ok(())
    }
}

fn one(mut value: Value, file: &Path, node: &str) -> Result<Pod, String> {
    let of = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or("").to_string();
    let (version, kind) = (of("apiVersion"), of("kind"));
    if version != "v1" || kind != "Pod" {
        return Err(format!("want apiVersion v1, kind Pod, got {version:?}, {kind:?}"));
    }
    stringify_quantities(&mut value);
    let mut pod: Pod = serde_path(&value)?;
    let back = serde_json::to_value(&pod).map_err(|e| e.to_string())?;
    let mut unknown = Vec::new();
    unknown_fields(&value, &back, "", &mut unknown);
    if !unknown.is_empty() {
        return Err(format!(
            "unknown field {}",
            unknown.iter().map(|u| format!("{u:?}")).collect::<Vec<_>>().join(", ")
        ));
    }
    let digest = Sha256::digest(format!("{node}\n{}\n{}", file.display(), value));
    let hash: String = digest.iter().take(16).map(|b| format!("{b:02x}")).collect();
    let m = &mut pod.metadata;
    let name = m.name.take().filter(|n| !n.is_empty()).ok_or("metadata.name is missing")?;
    let bad = isopod_api::names::dns1123_subdomain(&name);
    if let Some(first) = bad.first() {
        return Err(format!("metadata.name {name:?}: {first}"));
    }
    m.name = Some(format!("{name}-{}", node.to_lowercase()));
    m.namespace.get_or_insert_with(|| "default".into());
    let uid = m.uid.clone().filter(|u| !u.is_empty()).unwrap_or_else(|| hash.clone());
    m.uid = Some(uid);
    let annotations = m.annotations.get_or_insert_default();
    annotations.insert(HASH.into(), hash);
    annotations.insert(SOURCE.into(), "file".into());
    annotations.insert(SEEN.into(), k8s_openapi::jiff::Timestamp::now().to_string());
    let spec = pod.spec.as_mut().ok_or("spec is missing")?;
    check(spec)?;
    spec.node_name = Some(node.into());
    spec.tolerations.get_or_insert_default().push(Toleration {
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        ..Toleration::default()
    });
    Ok(pod)
}

fn check(spec: &k8s_openapi::api::core::v1::PodSpec) -> Result<(), String> {
    if spec.containers.is_empty() {
        return Err("spec.containers: Required value".into());
    }
    let mut seen = std::collections::BTreeSet::new();
    for c in crate::qos::all_containers(spec) {
        if !isopod_api::names::dns1123_label(&c.name).is_empty() {
            return Err(format!("container name {:?} is not a DNS label", c.name));
        }
        if !seen.insert(&c.name) {
            return Err(format!("container name {:?} is there twice", c.name));
        }
        if c.image.as_deref().unwrap_or("").is_empty() {
            return Err(format!("container {:?} has no image", c.name));
        }
        for m in c.volume_mounts.iter().flatten() {
            if !spec.volumes.iter().flatten().any(|v| v.name == m.name) {
                return Err(format!("container {:?} mounts volume {:?}, which does not exist", c.name, m.name));
            }
        }
    }
    if let Some(p) = spec.restart_policy.as_deref().filter(|p| !matches!(*p, "Always" | "OnFailure" | "Never")) {
        return Err(format!("spec.restartPolicy {p:?}: want Always, OnFailure or Never"));
    }
    if spec.service_account_name.as_deref().is_some_and(|s| !s.is_empty()) {
        return Err("a static pod cannot have a service account".into());
    }
    Ok(())
}

fn serde_path(value: &Value) -> Result<Pod, String> {
    serde_json::from_value(value.clone()).map_err(|e| e.to_string())
}

/// Quantities may be written as numbers; typed objects want text.
fn stringify_quantities(value: &mut Value) {
    let text = |v: &mut Value| {
        if v.is_number() {
            *v = Value::String(v.to_string());
        }
    };
    match value {
        Value::Object(map) => {
            for (key, v) in map {
                match (key.as_str(), &mut *v) {
                    ("limits" | "requests" | "overhead", Value::Object(list)) => list.values_mut().for_each(text),
                    ("sizeLimit" | "divisor", v) => text(v),
                    _ => stringify_quantities(v),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(stringify_quantities),
        _ => {}
    }
}

/// What was written but not understood.
fn unknown_fields(written: &Value, understood: &Value, at: &str, out: &mut Vec<String>) {
    match (written, understood) {
        (Value::Object(w), Value::Object(u)) => {
            for (key, v) in w.iter().filter(|(_, v)| !v.is_null()) {
                let place = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                match u.get(key) {
                    Some(u) => unknown_fields(v, u, &place, out),
                    None => out.push(place),
                }
            }
        }
        (Value::Array(w), Value::Array(u)) => {
            for (i, (w, u)) in w.iter().zip(u).enumerate() {
                unknown_fields(w, u, &format!("{at}[{i}]"), out);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, creationTimestamp: null}\nspec:\n  containers:\n  - {name: c, image: i, resources: {limits: {cpu: 1, memory: 64Mi}}}\n";

    fn of(text: &str) -> Result<Vec<Pod>, String> {
        parse(text, Path::new("/m/web.yaml"), "Node1").map(|f| f.pods)
    }

    #[test]
    fn a_manifest_becomes_a_static_pod() {
        let pod = of(GOOD).unwrap().remove(0);
        let m = &pod.metadata;
        assert_eq!((m.name.as_deref(), m.namespace.as_deref()), (Some("web-node1"), Some("default")));
        let a = m.annotations.as_ref().unwrap();
        assert_eq!(a.get(HASH), m.uid.as_ref());
        assert_eq!(a[SOURCE], "file");
        assert_eq!(pod.spec.as_ref().unwrap().node_name.as_deref(), Some("Node1"));
        assert_eq!(of(GOOD).unwrap()[0].metadata.uid, m.uid);
        assert_ne!(of(&GOOD.replace("image: i", "image: j")).unwrap()[0].metadata.uid, m.uid);
    }

    #[test]
    fn bad_manifests_get_one_clear_error() {
        for (from, to, want) in [
            ("image: i", "imagee: i", "unknown field \"spec.containers[0].imagee\""),
            ("kind: Pod", "kind: Service", "want apiVersion v1, kind Pod, got \"v1\", \"Service\""),
            ("name: web, ", "", "metadata.name is missing"),
            ("name: web", "name: Web_1", "metadata.name \"Web_1\""),
            ("image: i, ", "", "container \"c\" has no image"),
            ("spec:", "spec: [", ""),
            (
                "name: c,",
                "name: c, volumeMounts: [{name: v, mountPath: /v}],",
                "mounts volume \"v\", which does not exist",
            ),
        ] {
            let error = of(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(want), "{to}: {error}");
        }
    }

    #[test]
    fn a_directory_is_read_in_order_and_bad_files_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("a.yaml", GOOD), ("b.json", "{"), (".c.yaml", GOOD), ("d.txt", GOOD)] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let mut said = BTreeMap::new();
        let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {k: v}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s, namespace: x}\nstringData: {k: v}\n";
        fs::write(dir.path().join("e.yaml"), map).unwrap();
        let (all, local) = read(dir.path(), "n", &mut said);
        let names: Vec<_> = local.iter().map(|(k, o)| (k.namespace.as_str(), k.name.as_str(), o.text("k"))).collect();
        assert_eq!(names, [("default", "m", Some("v".into())), ("x", "s", Some("v".into()))]);
        assert_eq!(all.len(), 1);
        assert_eq!(said.len(), 1);
    }
}
