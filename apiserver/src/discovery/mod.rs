//! /api, /apis, /apis/G, /apis/G/V and the aggregated form, in upstream's order.

use std::net::SocketAddr;

use http::{HeaderValue, Response, header};
use isopod_api::{
    gvk::api_version,
    resources::{self, Resource},
    status::Status,
};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha512};

use crate::{
    aggregation::Extensions,
    custom::Served,
    endpoints::Body,
    server::{
        negotiate::{Accepted, Binary, negotiate},
        respond::{self, Style},
    },
};

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// What is served besides the built-in resources.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// Custom resources.
    pub(crate) custom: &'a Served,
    /// What extension servers have.
    pub(crate) extensions: &'a Extensions,
}

/// A discovery request.
pub(crate) struct DiscoveryRequest<'a> {
    /// Path without slashes at the ends.
    pub(crate) path: &'a str,
    /// Accept header.
    pub(crate) accept: Option<&'a str>,
    /// If-None-Match header.
    pub(crate) etag: Option<&'a str>,
    /// Where clients reach the server.
    pub(crate) address: SocketAddr,
}

/// Answers a discovery request; `None` when the path is no discovery path.
pub(crate) fn answer(request: &DiscoveryRequest<'_>, style: Style, known: Known<'_>) -> Option<Response<Body>> {
    let parts: Vec<&str> = request.path.split('/').collect();
    let aggregatable = matches!(parts[..], ["api"] | ["apis"]);
    let document = match parts[..] {
        ["api"] => Some(legacy(request.address)),
        ["apis"] => Some(groups(known)),
        ["api", "v1"] => Some(resource_list("", "v1", known)),
        ["api", _] => return Some(respond::status(style, &Status::no_route())),
        ["apis", group] => match all_groups(known).find(|g| g.name == group) {
            Some(group) => Some(with_header("APIGroup", group_value(group))),
            None => return Some(respond::page_not_found()),
        },
        ["apis", group, version] => match all_groups(known).find(|g| g.name == group) {
            Some(g) if g.versions.iter().any(|v| v == version) => Some(resource_list(group, version, known)),
            Some(g) if known.custom.groups().iter().any(|c| c.name == g.name) => {
                return Some(respond::page_not_found());
            }
            Some(_) => return Some(respond::status(style, &Status::no_route())),
            None => return Some(respond::page_not_found()),
        },
        _ => None,
    }?;
    let accepted = match negotiate(request.accept, false, Binary::Served) {
        Ok(accepted) => accepted,
        Err(status) => return Some(respond::status(style, &status)),
    };
    let style =
        Style { accepted: Accepted { discovery: None, ..accepted }, pretty: style.pretty || accepted.pretty, ..style };
    if accepted.discovery.is_none() {
        return Some(respond::value(style, 200, &document));
    }
    if !aggregatable {
        let text = "only the following media types are accepted: application/json, application/yaml, application/vnd.kubernetes.protobuf";
        return Some(respond::status(style, &Status::not_acceptable(text)));
    }
    Some(aggregated(parts[0] == "api", request.etag, style, known))
}

fn aggregated(legacy: bool, etag: Option<&str>, style: Style, known: Known<'_>) -> Response<Body> {
    let items: Vec<Value> = if legacy {
        vec![json!({"metadata": {}, "versions": [aggregated_version("", "v1", known)]})]
    } else {
        let version = |group: &resources::Group| -> Vec<Value> {
            group.versions.iter().map(|v| aggregated_version(&group.name, v, known)).collect()
        };
        all_groups(known).map(|g| json!({"metadata": {"name": g.name}, "versions": version(g)})).collect()
    };
    let value = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items});
    let hash = Sha512::digest(value.to_string().as_bytes());
    let tag: String = hash.iter().map(|b| format!("{b:02X}")).collect();
    let tag = format!("\"{tag}\"");
    let mut response = if etag == Some(tag.as_str()) {
        respond::with_type(304, AGGREGATED, "")
    } else {
        respond::value(style, 200, &value)
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(AGGREGATED));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

fn with_header(kind: &str, value: Value) -> Value {
    let mut out = Map::new();
    out.insert("kind".into(), kind.into());
    out.insert("apiVersion".into(), "v1".into());
    out.extend(value.as_object().cloned().unwrap_or_default());
    out.into()
}

fn legacy(address: SocketAddr) -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address.to_string()}]})
}

fn group_value(group: &resources::Group) -> Value {
    let version = |v: &str| json!({"groupVersion": api_version(&group.name, v), "version": v});
    let versions: Vec<Value> = group.versions.iter().map(|v| version(v)).collect();
    json!({"name": group.name, "versions": versions, "preferredVersion": version(&group.preferred)})
}

/// Built-in groups, then custom ones by name, then those of extension servers.
fn all_groups<'a>(known: Known<'a>) -> impl Iterator<Item = &'a resources::Group> {
    resources::groups().iter().chain(known.custom.groups()).chain(known.extensions.groups())
}

/// The resources of a group and version.
fn in_version<'a>(group: &'a str, version: &'a str, known: Known<'a>) -> impl Iterator<Item = &'a Resource> {
    let built_in = resources::in_version(group, version).map(|r| -> &'a Resource { r });
    let custom = known.custom.in_version(group, version).into_iter().map(|r| &r.info);
    built_in.chain(custom).chain(known.extensions.in_version(group, version))
}

fn groups(known: Known<'_>) -> Value {
    let groups: Vec<Value> = all_groups(known).map(group_value).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

fn resource_list(group: &str, version: &str, known: Known<'_>) -> Value {
    let mut list = Vec::new();
    for resource in in_version(group, version, known) {
        let mut entry = Map::new();
        entry.insert("name".into(), resource.plural.as_str().into());
        entry.insert("singularName".into(), resource.singular.as_str().into());
        entry.insert("namespaced".into(), resource.namespaced.into());
        entry.insert("kind".into(), resource.kind.as_str().into());
        entry.insert("verbs".into(), json!(resource.verbs));
        if !resource.short_names.is_empty() {
            entry.insert("shortNames".into(), json!(resource.short_names));
        }
        if !resource.categories.is_empty() {
            entry.insert("categories".into(), json!(resource.categories));
        }
        if let Some(hash) = &resource.storage_version_hash {
            entry.insert("storageVersionHash".into(), hash.as_str().into());
        }
        list.push(Value::Object(entry));
        for sub in &resource.subresources {
            let mut entry = json!({"name": format!("{}/{}", resource.plural, sub.name), "singularName": "",
                "namespaced": resource.namespaced});
            if let Some((group, version)) = sub.kind_gv.as_deref().and_then(|gv| gv.split_once('/')) {
                entry["group"] = group.into();
                entry["version"] = version.into();
            }
            entry["kind"] = sub.kind.as_str().into();
            entry["verbs"] = json!(sub.verbs);
            list.push(entry);
        }
    }
    let kind = json!({"kind": "APIResourceList"});
    let mut out = kind.as_object().cloned().unwrap_or_default();
    if !group.is_empty() {
        out.insert("apiVersion".into(), "v1".into());
    }
    out.insert("groupVersion".into(), api_version(group, version).into());
    out.insert("resources".into(), list.into());
    out.into()
}

fn aggregated_version(group: &str, version: &str, known: Known<'_>) -> Value {
    let items: Vec<Value> = in_version(group, version, known).map(aggregated_resource).collect();
    json!({"version": version, "resources": items, "freshness": "Current"})
}

fn aggregated_resource(resource: &Resource) -> Value {
    let mut entry = json!({
        "resource": resource.plural,
        "responseKind": {"group": "", "version": "", "kind": resource.kind},
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs,
    });
    if !resource.short_names.is_empty() {
        entry["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        entry["categories"] = json!(resource.categories);
    }
    let subresource = |sub: &resources::Subresource| {
        let (group, version) = sub.kind_gv.as_deref().and_then(|gv| gv.split_once('/')).unwrap_or(("", ""));
        json!({"subresource": sub.name, "responseKind": {"group": group, "version": version, "kind": sub.kind},
            "verbs": sub.verbs})
    };
    let subresources: Vec<Value> = resource.subresources.iter().map(subresource).collect();
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}

/// The paths listed at `/`.
pub(crate) fn paths(known: Known<'_>) -> Value {
    let mut paths = vec![
        "/.well-known/openid-configuration".to_owned(),
        "/api".into(),
        "/api/v1".into(),
        "/apis".into(),
        "/apis/".into(),
    ];
    for group in all_groups(known) {
        paths.push(format!("/apis/{}", group.name));
        paths.extend(group.versions.iter().map(|v| format!("/apis/{}/{v}", group.name)));
    }
    for path in [
        "/healthz",
        "/healthz/etcd",
        "/healthz/log",
        "/healthz/ping",
        "/livez",
        "/livez/etcd",
        "/livez/log",
        "/livez/ping",
        "/metrics",
        "/openapi/v2",
        "/openapi/v3",
        "/openapi/v3/",
        "/openid/v1/jwks",
        "/readyz",
        "/readyz/etcd",
        "/readyz/log",
        "/readyz/ping",
        "/readyz/shutdown",
        "/version",
    ] {
        paths.push(path.into());
    }
    paths.sort();
    json!({"paths": paths})
}
