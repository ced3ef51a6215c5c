//! Operations: which verbs a path has, with the query parameters clients look for.

use serde_json::{Map, Value, json};

use super::{
    Dialect,
    schemas::{custom_name, reference},
};
use crate::{
    gvk::{Gvk, api_version},
    resources::{self, Resource},
    schema,
};

/// One version of a CRD, as far as OpenAPI is concerned.
#[derive(Debug, Clone, Copy)]
pub struct CrdPaths<'a> {
    /// Kind.
    pub kind: &'a str,
    /// List kind.
    pub list_kind: &'a str,
    /// Plural.
    pub plural: &'a str,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// `openAPIV3Schema`.
    pub schema: Option<&'a Value>,
    /// Has the status subresource.
    pub status: bool,
    /// Has the scale subresource.
    pub scale: bool,
}

/// Name, type and v2 name of the shared parameters of reads.
const LIST_PARAMETERS: &[(&str, &str, &str)] = &[
    ("allowWatchBookmarks", "boolean", "allowWatchBookmarks-HC2hJt-J"),
    ("continue", "string", "continue-QfD61s0i"),
    ("fieldSelector", "string", "fieldSelector-xIcQKXFG"),
    ("labelSelector", "string", "labelSelector-5Zw57w4C"),
    ("limit", "integer", "limit-1NfNmdNH"),
    ("resourceVersion", "string", "resourceVersion-5WAnf1kx"),
    ("resourceVersionMatch", "string", "resourceVersionMatch-t8XhRHeC"),
    ("sendInitialEvents", "boolean", "sendInitialEvents-rLXlEK_k"),
    ("shardSelector", "string", "shardSelector-Kgyki_3_"),
    ("timeoutSeconds", "integer", "timeoutSeconds-yvYezaOC"),
    ("watch", "boolean", "watch-XNNPZGbK"),
];

const CREATE: &[(&str, &str)] = &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string")];
const PATCH: &[(&str, &str)] =
    &[("dryRun", "string"), ("fieldManager", "string"), ("fieldValidation", "string"), ("force", "boolean")];
const DELETE: &[(&str, &str)] = &[
    ("dryRun", "string"),
    ("gracePeriodSeconds", "integer"),
    ("ignoreStoreReadErrorWithClusterBreakingPotential", "boolean"),
    ("orphanDependents", "boolean"),
    ("propagationPolicy", "string"),
];
const PATCH_TYPES: &[&str] = &[
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];
const MEDIA: &[&str] = &["application/json", "application/vnd.kubernetes.protobuf", "application/yaml"];
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";

/// The definition of a kind in a version.
pub(super) fn definition_of(version: &str, kind: &str) -> Option<&'static str> {
    let def = schema::lookup(&Gvk::from_api_version(version, kind))?;
    Some(&def.name)
}

/// The v2 document's shared parameters.
pub(super) fn shared_parameters() -> impl Iterator<Item = (String, Value)> {
    LIST_PARAMETERS.iter().map(|(name, ty, shared)| ((*shared).to_owned(), parameter(name, ty, "query", Dialect::V2)))
}

fn parameter(name: &str, ty: &str, place: &str, dialect: Dialect) -> Value {
    let mut out = match dialect {
        Dialect::V2 => json!({"uniqueItems": true, "type": ty, "name": name, "in": place}),
        Dialect::V3 => json!({"name": name, "in": place, "schema": {"type": ty, "uniqueItems": true}}),
    };
    if place == "path" {
        out["required"] = true.into();
    }
    out
}

/// `rbac.authorization.k8s.io` -> `rbacAuthorization`.
fn group_word(group: &str) -> String {
    let group = group.strip_suffix(".k8s.io").unwrap_or(group);
    let mut out = String::new();
    for (i, part) in group.split('.').enumerate() {
        if i == 0 { out.push_str(part) } else { out.push_str(&capital(part)) }
    }
    if out.is_empty() { "core".into() } else { out }
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// What one operation is.
struct Operation<'a> {
    /// `list`, `create`, `read`, `replace`, `patch`, `delete`, `deletecollection`, `connectGet`...
    verb: &'a str,
    /// Suffix of the id: `NamespacedPod`, `PodForAllNamespaces`.
    noun: &'a str,
    /// Definition of the answer.
    answer: &'a str,
    /// Definition of the body, for writes.
    body: &'a str,
    /// `(group, version, kind)` the operation is about.
    gvk: (&'a str, &'a str, &'a str),
}

/// A group and version being written.
struct Writer<'a> {
    group: &'a str,
    version: &'a str,
    dialect: Dialect,
    /// Of a CRD: no protobuf, no strategic merge. Clients choose what they send by this.
    custom: bool,
}

impl Writer<'_> {
    /// Media types of patches.
    fn patches(&self) -> &'static [&'static str] {
        if self.custom { &PATCH_TYPES[..3] } else { PATCH_TYPES }
    }

    /// Media types of other bodies.
    fn bodies(&self) -> &'static [&'static str] {
        if self.custom { &["application/json", "application/yaml"] } else { &["*/*"] }
    }

    fn operation(&self, op: &Operation<'_>) -> Value {
        let word = group_word(self.group);
        let action = match op.verb {
            "read" => "get",
            "create" => "post",
            "replace" => "put",
            verb if verb.starts_with("connect") => "connect",
            verb => verb,
        };
        let prefix =
            if op.verb == "deletecollection" { "deleteCollection" } else { op.verb.split('-').next().unwrap_or("") };
        let id = match op.verb.split_once('-') {
            Some((verb, method)) => {
                format!("{verb}{}{}{}{}", capital(method), capital(&word), capital(self.version), op.noun)
            }
            None if op.verb == "deletecollection" => {
                let noun = op
                    .noun
                    .strip_prefix("Namespaced")
                    .map_or_else(|| format!("Collection{}", op.noun), |rest| format!("CollectionNamespaced{rest}"));
                format!("delete{}{}{noun}", capital(&word), capital(self.version))
            }
            None => format!("{prefix}{}{}{}", capital(&word), capital(self.version), op.noun),
        };
        let mut out = Map::new();
        out.insert("tags".into(), json!([format!("{word}_{}", self.version)]));
        out.insert("operationId".into(), id.into());
        self.input(op, &mut out);
        self.output(op, &mut out);
        out.insert("x-kubernetes-action".into(), action.into());
        let (group, version, kind) = op.gvk;
        out.insert("x-kubernetes-group-version-kind".into(), json!({"group": group, "version": version, "kind": kind}));
        Value::Object(out)
    }

    fn input(&self, op: &Operation<'_>, out: &mut Map<String, Value>) {
        let simple = |list: &[(&str, &str)]| -> Vec<Value> {
            list.iter().map(|(name, ty)| parameter(name, ty, "query", self.dialect)).collect()
        };
        let mut parameters = match op.verb {
            "list" | "deletecollection" if self.dialect == Dialect::V2 => {
                LIST_PARAMETERS.iter().map(|(_, _, shared)| json!({"$ref": format!("#/parameters/{shared}")})).collect()
            }
            "list" | "deletecollection" => {
                LIST_PARAMETERS.iter().map(|(name, ty, _)| parameter(name, ty, "query", self.dialect)).collect()
            }
            "create" | "replace" => simple(CREATE),
            "patch" => simple(PATCH),
            "delete" => simple(DELETE),
            _ => Vec::new(),
        };
        let body = match op.verb {
            "patch" => format!("{META}Patch"),
            "delete" | "deletecollection" => format!("{META}DeleteOptions"),
            _ => op.body.to_owned(),
        };
        if self.dialect == Dialect::V2 {
            let consumes = if op.verb == "patch" { self.patches() } else { self.bodies() };
            let mut produces = vec!["application/json", "application/yaml"];
            if !self.custom {
                produces.push("application/vnd.kubernetes.protobuf");
            }
            if op.verb == "list" && !self.custom {
                produces.extend(["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"]);
            }
            out.insert("consumes".into(), consumes.to_vec().into());
            out.insert("produces".into(), produces.into());
            out.insert("schemes".into(), json!(["https"]));
            if !body.is_empty() {
                parameters.insert(0, json!({"in": "body", "name": "body", "schema": reference(&body, self.dialect)}));
            }
        }
        if !parameters.is_empty() {
            out.insert("parameters".into(), parameters.into());
        }
        if self.dialect == Dialect::V3 && !body.is_empty() {
            let types = if op.verb == "patch" { self.patches() } else { self.bodies() };
            let content: Map<String, Value> =
                types.iter().map(|t| ((*t).to_owned(), json!({"schema": reference(&body, self.dialect)}))).collect();
            let mut request = json!({"content": content});
            if matches!(op.verb, "create" | "replace" | "patch") {
                request["required"] = true.into();
            }
            out.insert("requestBody".into(), request);
        }
    }

    fn output(&self, op: &Operation<'_>, out: &mut Map<String, Value>) {
        let codes: &[(&str, &str)] = match op.verb {
            "create" => &[("200", "OK"), ("201", "Created"), ("202", "Accepted")],
            "replace" | "patch" => &[("200", "OK"), ("201", "Created")],
            "delete" => &[("200", "OK"), ("202", "Accepted")],
            _ => &[("200", "OK")],
        };
        let mut responses = Map::new();
        for (code, description) in codes {
            let mut response = json!({"description": description});
            let schema =
                if op.answer.is_empty() { json!({"type": "string"}) } else { reference(op.answer, self.dialect) };
            if self.dialect == Dialect::V2 {
                response["schema"] = schema;
            } else {
                let mut types = if self.custom { self.bodies().to_vec() } else { MEDIA.to_vec() };
                if op.verb == "list" && !self.custom {
                    types.insert(1, "application/json;stream=watch");
                    types.insert(3, "application/vnd.kubernetes.protobuf;stream=watch");
                }
                let content: Map<String, Value> =
                    types.iter().map(|t| ((*t).to_owned(), json!({"schema": schema}))).collect();
                response["content"] = Value::Object(content);
            }
            responses.insert((*code).to_owned(), response);
        }
        responses.insert("401".into(), json!({"description": "Unauthorized"}));
        out.insert("responses".into(), Value::Object(responses));
    }

    fn path(&self, operations: Vec<(&str, Operation<'_>)>, namespaced: bool, named: bool) -> Value {
        let mut out = Map::new();
        for (method, operation) in operations {
            out.insert(method.to_owned(), self.operation(&operation));
        }
        let mut parameters = Vec::new();
        if named {
            parameters.push(parameter("name", "string", "path", self.dialect));
        }
        if namespaced {
            parameters.push(parameter("namespace", "string", "path", self.dialect));
        }
        parameters.push(parameter("pretty", "string", "query", self.dialect));
        out.insert("parameters".into(), parameters.into());
        Value::Object(out)
    }
}

/// What the paths of one resource need to know.
struct Shape<'a> {
    plural: &'a str,
    kind: &'a str,
    namespaced: bool,
    has: &'a dyn Fn(&str) -> bool,
    item: &'a str,
    list: &'a str,
}

fn collection_paths(writer: &Writer<'_>, shape: &Shape<'_>, out: &mut Vec<(String, Value)>) {
    let prefix = if writer.group.is_empty() { "api" } else { "apis" };
    let root = format!("/{prefix}/{}", api_version(writer.group, writer.version));
    let gvk = (writer.group, writer.version, shape.kind);
    let noun = if shape.namespaced { format!("Namespaced{}", shape.kind) } else { shape.kind.to_owned() };
    let everywhere = format!("{}ForAllNamespaces", shape.kind);
    let base = if shape.namespaced {
        format!("{root}/namespaces/{{namespace}}/{}", shape.plural)
    } else {
        format!("{root}/{}", shape.plural)
    };
    let status = format!("{META}Status");
    let op = |verb: &'static str| {
        let answer = match verb {
            "list" => shape.list,
            "delete" | "deletecollection" => status.as_str(),
            _ => shape.item,
        };
        let body = if matches!(verb, "create" | "replace") { shape.item } else { "" };
        Operation { verb, noun: &noun, answer, body, gvk }
    };
    let pick = |all: &[(&'static str, &'static str, &'static str)]| -> Vec<(&'static str, Operation<'_>)> {
        all.iter().filter(|(.., verb)| (shape.has)(verb)).map(|(method, id, _)| (*method, op(id))).collect()
    };
    let collection = pick(&[
        ("get", "list", "list"),
        ("post", "create", "create"),
        ("delete", "deletecollection", "deletecollection"),
    ]);
    if !collection.is_empty() {
        out.push((base.clone(), writer.path(collection, shape.namespaced, false)));
    }
    let item = pick(&[
        ("get", "read", "get"),
        ("put", "replace", "update"),
        ("delete", "delete", "delete"),
        ("patch", "patch", "patch"),
    ]);
    if !item.is_empty() {
        out.push((format!("{base}/{{name}}"), writer.path(item, shape.namespaced, true)));
    }
    if shape.namespaced && (shape.has)("list") {
        let all = Operation { verb: "list", noun: &everywhere, answer: shape.list, body: "", gvk };
        out.push((format!("{root}/{}", shape.plural), writer.path(vec![("get", all)], false, false)));
    }
}

fn subresource_path(
    writer: &Writer<'_>,
    resource: &Resource,
    sub: &resources::Subresource,
    out: &mut Vec<(String, Value)>,
) {
    let own = api_version(writer.group, writer.version);
    let version = sub.kind_gv.as_deref().unwrap_or(&own);
    let (group, version_only) = crate::gvk::split_api_version(version);
    let prefix = if writer.group.is_empty() { "api" } else { "apis" };
    let place = if resource.namespaced { "namespaces/{namespace}/" } else { "" };
    let path = format!("/{prefix}/{own}/{place}{}/{{name}}/{}", resource.plural, sub.name);
    let scope = if resource.namespaced { "Namespaced" } else { "" };
    let noun = format!("{scope}{}{}", resource.kind, capital(&sub.name));
    let connect = matches!(sub.name.as_str(), "exec" | "attach" | "portforward" | "proxy");
    let definition =
        if connect || sub.name == "log" { "" } else { definition_of(version, &sub.kind).unwrap_or_default() };
    let mut operations = Vec::new();
    for verb in &sub.verbs {
        let (method, id) = match verb.as_str() {
            "get" => ("get", if connect { "connect-get" } else { "read" }),
            "create" => ("post", if connect { "connect-post" } else { "create" }),
            "update" => ("put", if connect { "connect-put" } else { "replace" }),
            "patch" => ("patch", if connect { "connect-patch" } else { "patch" }),
            "delete" => ("delete", "connect-delete"),
            _ => continue,
        };
        let body = if matches!(id, "create" | "replace") { definition } else { "" };
        let gvk = (group, version_only, sub.kind.as_str());
        operations.push((method, Operation { verb: id, noun: &noun, answer: definition, body, gvk }));
    }
    out.push((path, writer.path(operations, resource.namespaced, true)));
}

/// The paths of a built-in group and version.
pub(super) fn built_in(group: &str, version: &str, dialect: Dialect) -> Vec<(String, Value)> {
    let writer = Writer { group, version, dialect, custom: false };
    let gv = api_version(group, version);
    let mut out = Vec::new();
    for resource in resources::in_version(group, version) {
        let shape = Shape {
            plural: &resource.plural,
            kind: &resource.kind,
            namespaced: resource.namespaced,
            has: &|verb| resource.has_verb(verb),
            item: definition_of(&gv, &resource.kind).unwrap_or_default(),
            list: definition_of(&gv, &format!("{}List", resource.kind)).unwrap_or_default(),
        };
        collection_paths(&writer, &shape, &mut out);
        for sub in &resource.subresources {
            subresource_path(&writer, resource, sub, &mut out);
        }
    }
    out
}

/// The paths of a CRD's version.
pub(super) fn custom(group: &str, version: &str, crd: &CrdPaths<'_>, dialect: Dialect) -> Vec<(String, Value)> {
    let writer = Writer { group, version, dialect, custom: true };
    let (item, list) = (custom_name(group, version, crd.kind), custom_name(group, version, crd.list_kind));
    let mut out = Vec::new();
    let shape = Shape {
        plural: crd.plural,
        kind: crd.kind,
        namespaced: crd.namespaced,
        has: &|_| true,
        item: &item,
        list: &list,
    };
    collection_paths(&writer, &shape, &mut out);
    if crd.status {
        let place = if crd.namespaced { "namespaces/{namespace}/" } else { "" };
        let noun = format!("{}{}Status", if crd.namespaced { "Namespaced" } else { "" }, crd.kind);
        let op = |verb, body| Operation { verb, noun: &noun, answer: &item, body, gvk: (group, version, crd.kind) };
        let operations =
            vec![("get", op("read", "")), ("put", op("replace", item.as_str())), ("patch", op("patch", ""))];
        let path = format!("/apis/{group}/{version}/{place}{}/{{name}}/status", crd.plural);
        out.push((path, writer.path(operations, crd.namespaced, true)));
    }
    out
}
