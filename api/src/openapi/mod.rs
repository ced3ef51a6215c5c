//! OpenAPI v2 and v3 of the built-in API, written from the schema and resource tables.
//!
//! - [`v2`]: the whole document for `/openapi/v2`.
//! - [`v3_index`] and [`v3`]: `/openapi/v3` and one document per group and version.
//! - [`v3_paths`]: the keys of the index this module can answer; CRDs add theirs with [`crd_v3`].
//!
//! Documents are built on demand and returned as bytes; callers should keep them only compressed, if at all. Descriptions
//! come from the caller: `describe(definition, field)`.

mod binary;
mod paths;
mod schemas;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

pub use self::paths::CrdPaths;
use crate::{gvk::api_version, resources, schema};

/// Where descriptions come from: `(definition, None)` of a type, `(definition, Some(field))` of a field.
pub type Describe<'a> = &'a dyn Fn(&str, Option<&str>) -> Option<&'a str>;

/// Which dialect is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    V2,
    V3,
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": "v1.36.2"})
}

/// All group versions, core first, in discovery order.
fn group_versions() -> Vec<(String, String)> {
    let mut out = vec![(String::new(), "v1".to_owned())];
    for group in resources::groups() {
        for version in &group.versions {
            if resources::in_version(&group.name, version).next().is_some() {
                out.push((group.name.clone(), version.clone()));
            }
        }
    }
    out
}

/// `api/v1`, `apis/apps/v1`.
fn url(group: &str, version: &str) -> String {
    let prefix = if group.is_empty() { "api" } else { "apis" };
    format!("{prefix}/{}", api_version(group, version))
}

/// Keys of the v3 index: `api/v1`, `apis/apps/v1`, ...
pub fn v3_paths() -> Vec<String> {
    group_versions().iter().map(|(group, version)| url(group, version)).collect()
}

/// Names of the definitions a kind's documents start from.
fn roots(group: &str, version: &str) -> BTreeSet<&'static str> {
    let prefix = format!("{}/", api_version(group, version));
    let mut out = BTreeSet::new();
    for name in schema::definition_names() {
        let own =
            |gvks: &[String]| gvks.iter().any(|g| g.strip_prefix(&prefix).is_some_and(|kind| !kind.contains('/')));
        // Options and Status belong to every group; they come in by reference.
        if let Some(def) = schema::definition(name)
            && def.gvks.len() == 1
            && own(&def.gvks)
        {
            out.insert(name);
        }
    }
    for kind in ["APIResourceList", "DeleteOptions", "Patch", "Status", "WatchEvent"] {
        if let Some(def) = schema::definition(&format!("io.k8s.apimachinery.pkg.apis.meta.v1.{kind}")) {
            out.extend(schema::definition_names().find(|n| **n == *def.name));
        }
    }
    for resource in resources::in_version(group, version) {
        for sub in &resource.subresources {
            out.extend(paths::definition_of(sub.kind_gv.as_deref().unwrap_or(prefix.trim_end_matches('/')), &sub.kind));
        }
    }
    out
}

/// Everything reachable from `pending`.
fn closure(mut pending: Vec<&'static str>) -> BTreeSet<&'static str> {
    let mut out = BTreeSet::new();
    while let Some(name) = pending.pop() {
        if out.insert(name) {
            pending.extend(schemas::references(name));
        }
    }
    out
}

fn document(head: Map<String, Value>, out: &mut Vec<u8>) {
    let text = Value::Object(head).to_string();
    out.extend_from_slice(&text.as_bytes()[..text.len() - 1]);
}

/// Appends `"key":{...}` with entries written one by one, so that no whole document exists as a tree.
fn section<I: Iterator<Item = (String, Value)>>(key: &str, entries: I, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("\"{key}\":{{").as_bytes());
    for (i, (name, value)) in entries.enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(format!("{}:{value}", Value::from(name)).as_bytes());
    }
    out.push(b'}');
}

/// The v2 document.
pub fn v2(describe: Describe<'_>) -> Vec<u8> {
    v2_with(&[], describe)
}

/// The v2 document with custom resources, by group and version.
pub fn v2_with(custom: &[(&str, &str, Vec<CrdPaths<'_>>)], describe: Describe<'_>) -> Vec<u8> {
    let mut head = Map::new();
    head.insert("swagger".into(), "2.0".into());
    head.insert("info".into(), info());
    let mut out = Vec::with_capacity(1 << 20);
    document(head, &mut out);
    out.push(b',');
    let all = group_versions();
    let operations = all.iter().flat_map(|(group, version)| paths::built_in(group, version, Dialect::V2));
    let own = |(group, version, crds): &(&str, &str, Vec<CrdPaths<'_>>)| {
        crds.iter().flat_map(|crd| paths::custom(group, version, crd, Dialect::V2)).collect::<Vec<_>>()
    };
    section("paths", operations.chain(custom.iter().flat_map(own)), &mut out);
    out.push(b',');
    let mut names: Vec<_> = schema::definition_names().collect();
    names.sort_unstable();
    let definitions =
        names.into_iter().filter_map(|n| Some((n.to_owned(), schemas::definition(n, Dialect::V2, describe)?)));
    let own = |(group, version, crds): &(&str, &str, Vec<CrdPaths<'_>>)| {
        crds.iter().flat_map(|crd| schemas::custom(group, version, crd, Dialect::V2)).collect::<Vec<_>>()
    };
    section("definitions", definitions.chain(custom.iter().flat_map(own)), &mut out);
    out.push(b',');
    section("parameters", paths::shared_parameters(), &mut out);
    out.extend_from_slice(b",\"securityDefinitions\":{\"BearerToken\":{\"description\":\"Bearer Token authentication\",\"type\":\"apiKey\",\"name\":\"authorization\",\"in\":\"header\"}},\"security\":[{\"BearerToken\":[]}]}");
    out
}

/// The v2 document in protobuf, as upstream's clients ask for it. It has no operations.
pub fn v2_protobuf(describe: Describe<'_>) -> Vec<u8> {
    let mut names: Vec<_> = schema::definition_names().collect();
    names.sort_unstable();
    let definitions: Map<String, Value> = names
        .into_iter()
        .filter_map(|n| Some((n.to_owned(), schemas::definition(n, Dialect::V2, describe)?)))
        .collect();
    binary::encode(&json!({"info": info(), "definitions": definitions}))
}

/// The v3 document of a built-in group and version.
pub fn v3(group: &str, version: &str, describe: Describe<'_>) -> Option<Vec<u8>> {
    resources::in_version(group, version).next()?;
    let names = closure(roots(group, version).into_iter().collect());
    Some(v3_document(
        paths::built_in(group, version, Dialect::V3),
        names.into_iter().filter_map(|n| Some((n.to_owned(), schemas::definition(n, Dialect::V3, describe)?))),
    ))
}

fn v3_document(paths: Vec<(String, Value)>, schemas: impl Iterator<Item = (String, Value)>) -> Vec<u8> {
    let mut head = Map::new();
    head.insert("openapi".into(), "3.0.0".into());
    head.insert("info".into(), info());
    let mut out = Vec::with_capacity(1 << 16);
    document(head, &mut out);
    out.push(b',');
    section("paths", paths.into_iter(), &mut out);
    out.extend_from_slice(b",\"components\":{");
    section("schemas", schemas, &mut out);
    out.extend_from_slice(b",\"securitySchemes\":{\"BearerToken\":{\"type\":\"apiKey\",\"description\":\"Bearer Token authentication\",\"name\":\"authorization\",\"in\":\"header\"}}}}");
    out
}

/// The v3 document of CRDs that share a group and version.
pub fn crd_v3(group: &str, version: &str, crds: &[CrdPaths<'_>], describe: Describe<'_>) -> Vec<u8> {
    let meta = |kind: &str| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{kind}");
    let wanted: Vec<String> =
        ["DeleteOptions", "ListMeta", "ObjectMeta", "Patch", "Status", "WatchEvent"].map(meta).into();
    let roots = schema::definition_names().filter(|n| wanted.iter().any(|w| w == n)).collect();
    let shared: Vec<_> = closure(roots)
        .into_iter()
        .filter_map(|n| Some((n.to_owned(), schemas::definition(n, Dialect::V3, describe)?)))
        .collect();
    let mut operations = Vec::new();
    let mut own = Vec::new();
    for crd in crds {
        operations.extend(paths::custom(group, version, crd, Dialect::V3));
        own.extend(schemas::custom(group, version, crd, Dialect::V3));
    }
    v3_document(operations, shared.into_iter().chain(own))
}

/// The v3 index. `extra` are further paths (CRDs) with a hash of their content.
pub fn v3_index(extra: &[(String, String)]) -> Value {
    let mut paths = Map::new();
    let entry = |path: &str, hash: &str| json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}")});
    // The built-in documents change only with the program.
    let hash = |path: &str| {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for b in path.bytes().chain(env!("CARGO_PKG_VERSION").bytes()) {
            hash = (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
        }
        format!("{hash:016X}")
    };
    let mut known = v3_paths();
    known.push("version".to_owned());
    known.sort();
    for path in known {
        let value = entry(&path, &hash(&path));
        paths.insert(path, value);
    }
    for (path, hash) in extra {
        paths.insert(path.clone(), entry(path, hash));
    }
    json!({"paths": paths})
}

/// The v3 document of `/version`.
pub fn v3_version() -> Vec<u8> {
    let get = json!({"get": {"tags": ["version"], "operationId": "getCodeVersion", "description": "get the version information for this server",
        "responses": {"200": {"description": "OK"}, "401": {"description": "Unauthorized"}}}});
    v3_document(vec![("/version/".to_owned(), get)], std::iter::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str, _: Option<&str>) -> Option<&'static str> {
        None
    }

    fn parse(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    /// Every `$ref` in the document points at something.
    fn check_references(v: &Value, root: &Value) {
        match v {
            Value::Object(map) => {
                if let Some(target) = map.get("$ref").and_then(Value::as_str) {
                    assert!(root.pointer(&target[1..]).is_some(), "{target} is missing");
                }
                map.values().for_each(|v| check_references(v, root));
            }
            Value::Array(items) => items.iter().for_each(|v| check_references(v, root)),
            _ => {}
        }
    }

    #[test]
    fn v3_documents_are_closed() {
        for (group, version) in group_versions() {
            let doc = parse(&v3(&group, &version, &none).unwrap());
            check_references(&doc, &doc);
        }
        assert!(v3("nope", "v1", &none).is_none());
    }

    #[test]
    fn v3_schema_shape() {
        let doc = parse(
            &v3("apps", "v1", &|d, f| (d.ends_with("DeploymentSpec") && f == Some("replicas")).then_some("How many."))
                .unwrap(),
        );
        let schemas = &doc["components"]["schemas"];
        let spec = &schemas["io.k8s.api.apps.v1.DeploymentSpec"];
        assert_eq!(
            spec["properties"]["replicas"],
            json!({"description": "How many.", "type": "integer", "format": "int32"})
        );
        assert_eq!(
            spec["properties"]["strategy"],
            json!({"default": {}, "allOf": [{"$ref": "#/components/schemas/io.k8s.api.apps.v1.DeploymentStrategy"}],
                "x-kubernetes-patch-strategy": "retainKeys"})
        );
        assert_eq!(
            schemas["io.k8s.api.apps.v1.Deployment"]["x-kubernetes-group-version-kind"],
            json!([{"group": "apps", "kind": "Deployment", "version": "v1"}])
        );
        let patch = &doc["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}/scale"]["patch"];
        assert_eq!(patch["operationId"], "patchAppsV1NamespacedDeploymentScale");
        assert!(patch["parameters"].as_array().unwrap().iter().any(|p| p["name"] == "fieldValidation"));
    }

    #[test]
    fn v2_is_complete() {
        let doc = parse(&v2(&none));
        check_references(&doc, &doc);
        assert_eq!(
            doc["definitions"]["io.k8s.api.core.v1.ContainerPort"]["properties"]["containerPort"],
            json!({"type": "integer", "format": "int32"})
        );
        assert_eq!(
            doc["paths"]["/api/v1/namespaces/{namespace}/pods"]["get"]["operationId"],
            "listCoreV1NamespacedPod"
        );
    }

    #[test]
    fn crd_documents() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object"}}});
        let crd = CrdPaths {
            kind: "Thing",
            list_kind: "ThingList",
            plural: "things",
            namespaced: true,
            schema: Some(&schema),
            status: true,
            scale: true,
        };
        let doc = parse(&crd_v3("x.example.com", "v1", &[crd], &none));
        check_references(&doc, &doc);
        assert!(doc["components"]["schemas"]["com.example.x.v1.Thing"]["properties"]["metadata"].is_object());
        // kubectl sends strategic merge patches where they are offered.
        let patch = &doc["paths"]["/apis/x.example.com/v1/namespaces/{namespace}/things/{name}"]["patch"];
        let types: Vec<&String> = patch["requestBody"]["content"].as_object().unwrap().keys().collect();
        assert_eq!(
            types,
            ["application/apply-patch+yaml", "application/json-patch+json", "application/merge-patch+json"]
        );
        let types: Vec<&String> = patch["responses"]["200"]["content"].as_object().unwrap().keys().collect();
        assert_eq!(types, ["application/json", "application/yaml"]);
    }
}
