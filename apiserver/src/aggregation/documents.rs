//! OpenAPI of extension servers: asked for when a client asks us, not kept.
//!
//! The v3 index names their documents under their own hashes, and each is passed on as it is. The v2 document is one, so
//! theirs are merged into ours: the paths of their groups, and the definitions those reach. A definition that we know
//! otherwise gets a name of its own.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Aggregator, availability::is_available, gvr};
use crate::endpoints::transport::fetch;

const DEFINITIONS: &str = "#/definitions/";

impl Aggregator {
    /// Asks one server for a document; `None` when it has none.
    async fn document(&self, group: &str, version: &str, path: &str) -> Option<Bytes> {
        let service = self.objects.get(&gvr(), "", &format!("{version}.{group}"))?;
        let value = service.value();
        if !value["spec"]["service"].is_object() || !is_available(&value) {
            return None;
        }
        let (target, name) = self.target(&value["spec"]).ok()?;
        let tls = self.tls(&service, &value["spec"]).ok()?;
        match fetch(&tls, &name, &target, path).await {
            Ok((200, body)) => Some(body),
            Ok((code, _)) => {
                tracing::debug!(%name, path, code, "no document");
                None
            }
            Err(error) => {
                tracing::debug!(%name, path, %error, "no document");
                None
            }
        }
    }

    /// A path, as text, of every group and version of an extension server in a document each of them has.
    async fn documents(&self, path: &str) -> Vec<(String, String, Value)> {
        let extensions = self.extensions();
        let each = extensions.groups().iter().flat_map(|group| group.versions.iter().map(move |v| (&group.name, v)));
        let asked = each.map(|(group, version)| async move {
            let body = self.document(group, version, path).await?;
            Some((group.clone(), version.clone(), serde_json::from_slice(&body).ok()?))
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// Puts their entries into the v3 index.
    pub(crate) async fn extend_v3_index(&self, index: &mut Value) {
        for (group, version, theirs) in self.documents("/openapi/v3").await {
            let path = format!("apis/{group}/{version}");
            let entry = &theirs["paths"][&path];
            if entry.is_object() {
                index["paths"][path] = entry.clone();
            }
        }
    }

    /// The v3 document of one of their groups and versions.
    pub(crate) async fn v3(&self, group: &str, version: &str) -> Option<Bytes> {
        self.document(group, version, &format!("/openapi/v3/apis/{group}/{version}")).await
    }

    /// Puts their paths and definitions into the v2 document; it stays as it is when there are none.
    pub(crate) async fn extend_v2(&self, document: Vec<u8>) -> Vec<u8> {
        let theirs = self.documents("/openapi/v2").await;
        let Some(mut own) = (!theirs.is_empty()).then(|| serde_json::from_slice(&document).ok()).flatten() else {
            return document;
        };
        for (group, version, document) in theirs {
            merge(&mut own, &document, &format!("/apis/{group}/{version}/"));
        }
        serde_json::to_vec(&own).unwrap_or(document)
    }
}

/// Calls with the name of every definition a value refers to.
fn references(value: &Value, call: &mut impl FnMut(&str)) {
    match value {
        Value::Object(map) => {
            if let Some(name) = map.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix(DEFINITIONS)) {
                call(name);
            }
            map.values().for_each(|value| references(value, call));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, call)),
        _ => {}
    }
}

/// The definitions some values need, and what those need.
fn reached(values: &Map<String, Value>, definitions: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut left: Vec<&Value> = values.values().collect();
    while let Some(value) = left.pop() {
        references(value, &mut |name: &str| {
            if names.insert(name.to_owned()) {
                left.extend(definitions.get(name));
            }
        });
    }
    names
}

fn rename(value: &mut Value, names: &BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get_mut("$ref")
                && let Some(new) = reference.strip_prefix(DEFINITIONS).and_then(|name| names.get(name))
            {
                *reference = format!("{DEFINITIONS}{new}");
            }
            map.values_mut().for_each(|value| rename(value, names));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| rename(value, names)),
        _ => {}
    }
}

/// Merges the paths below a prefix, and their definitions, into a v2 document.
fn merge(own: &mut Value, theirs: &Value, prefix: &str) {
    let ours = |path: &str| path.starts_with(prefix) || path == prefix.trim_end_matches('/');
    let paths = theirs["paths"].as_object().into_iter().flatten().filter(|(path, _)| ours(path));
    let mut paths: Map<String, Value> = paths.map(|(path, item)| (path.clone(), item.clone())).collect();
    let definitions = &theirs["definitions"];
    let wanted = reached(&paths, definitions);
    let differs = |name: &str| own["definitions"].get(name).is_some_and(|known| *known != definitions[name]);
    let mut names = BTreeMap::new();
    for name in wanted.iter().filter(|name| differs(name)) {
        let free = (2..).map(|n| format!("{name}_v{n}")).find(|new| own["definitions"].get(new).is_none());
        names.extend(free.map(|new| (name.clone(), new)));
    }
    for item in paths.values_mut() {
        rename(item, &names);
    }
    for name in &wanted {
        let Some(mut definition) = definitions.get(name).cloned() else { continue };
        rename(&mut definition, &names);
        own["definitions"][names.get(name).unwrap_or(name)] = definition;
    }
    for (path, item) in paths {
        own["paths"][path] = item;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_belongs_to_the_group_comes_in() {
        let refer = |name: &str| json!({"schema": {"$ref": format!("{DEFINITIONS}{name}")}});
        let mut own = json!({"paths": {"/api/v1/": {}},
            "definitions": {"Meta": {"type": "object"}, "Time": {"type": "string"}, "Own": {}}});
        let theirs = json!({
        "paths": {"/apis/x.io/v1/": {"get": {}}, "/apis/x.io/v1/things": {"get": refer("Thing")}, "/version/": refer("Other")},
        "definitions": {
            "Thing": {"properties": {"meta": refer("Meta"), "at": refer("Time"), "self": refer("Thing")}},
            "Meta": {"type": "object", "description": "theirs", "properties": {"at": refer("Time")}},
            "Time": {"type": "string"}, "Other": {}, "Own": {"type": "string"},
        }});
        merge(&mut own, &theirs, "/apis/x.io/v1/");
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(
            names(&own["paths"]),
            ["/api/v1/", "/apis/x.io/v1/", "/apis/x.io/v1/things"].map(str::to_owned).into()
        );
        assert_eq!(names(&own["definitions"]), ["Meta", "Meta_v2", "Own", "Thing", "Time"].map(str::to_owned).into());
        assert_eq!(own["definitions"]["Meta"], json!({"type": "object"}), "ours stays");
        assert_eq!(own["definitions"]["Own"], json!({}));
        let meta = &own["definitions"]["Thing"]["properties"]["meta"]["schema"]["$ref"];
        assert_eq!(meta, "#/definitions/Meta_v2");
    }
}
