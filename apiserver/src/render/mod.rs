//! Objects and lists in the form the client asked for: as they are, as PartialObjectMetadata, as a table.

mod body;
mod table;

use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use isopod_api::{gvk::Gvk, protobuf, status::Status};
use serde_json::{Map, Value, json};

pub(crate) use table::Include;

use crate::{
    cache::Object,
    endpoints::Body,
    registry::{Resource, object_bytes, object_value},
    server::{
        negotiate::{Media, Transform},
        query::Query,
        respond::{self, Style},
    },
};

/// The form of objects on their way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rendering {
    /// What objects are turned into.
    pub(crate) transform: Transform,
    /// What table rows carry.
    pub(crate) include: Include,
}

impl Rendering {
    /// From the negotiated transform and `includeObject`.
    pub(crate) fn new(transform: Transform, query: &Query) -> Result<Self, Status> {
        let include = match transform {
            Transform::Table(_) => Include::parse(query.text("includeObject"))?,
            _ => Include::Metadata,
        };
        Ok(Self { transform, include })
    }

    /// The kind of a resource's objects in this form.
    pub(crate) fn kind(self, resource: &Resource) -> Gvk {
        match self.transform {
            Transform::None => resource.gvk.clone(),
            Transform::Partial(beta) => Gvk::from_api_version(meta_version(beta), "PartialObjectMetadata"),
            Transform::Table(beta) => Gvk::from_api_version(meta_version(beta), "Table"),
        }
    }

    /// A number that tells renderings apart.
    pub(crate) fn id(self) -> u32 {
        let transform = match self.transform {
            Transform::None => 0,
            Transform::Table(beta) => 2 + u32::from(beta),
            Transform::Partial(beta) => 4 + u32::from(beta),
        };
        transform | (self.include as u32) << 4
    }
}

/// `meta.k8s.io/v1` or its beta.
fn meta_version(beta: bool) -> &'static str {
    if beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" }
}

/// One object's JSON. `first` tables carry the columns.
pub(crate) fn one(resource: &Resource, object: &Object, rendering: Rendering, first: bool) -> Bytes {
    match rendering.transform {
        Transform::None => object_bytes(resource, object),
        _ => serde_json::to_vec(&value(resource, object, rendering, first)).unwrap_or_default().into(),
    }
}

/// The same as a value.
pub(crate) fn value(resource: &Resource, object: &Object, rendering: Rendering, first: bool) -> Value {
    match rendering.transform {
        Transform::None => object_value(resource, object),
        Transform::Partial(beta) => partial(&object_value(resource, object), beta),
        Transform::Table(beta) => {
            let rows = [object_value(resource, object)];
            let metadata = json!({"resourceVersion": object.revision.to_string()});
            table::table(resource, &rows, metadata, beta, rendering.include, first)
        }
    }
}

/// A stored object's protobuf message, kept for the next who asks.
pub(crate) fn message(resource: &Resource, object: &Object, rendering: Rendering) -> Result<Bytes, protobuf::Error> {
    let encode = || match rendering.transform {
        Transform::None => protobuf::encode_json(&object_bytes(resource, object)),
        _ => protobuf::encode_message(&value(resource, object, rendering, false)),
    };
    match &resource.store {
        Some(store) => store.messages().get(store.message_key(object, resource.format() | rendering.id()), encode),
        None => encode().map(Bytes::from),
    }
}

/// A Scale, which is no resource of its own.
pub(crate) fn scale(scale: &Value, rendering: Rendering) -> Value {
    match rendering.transform {
        Transform::None => scale.clone(),
        Transform::Partial(beta) => partial(scale, beta),
        Transform::Table(beta) => table::scale(scale, beta, rendering.include),
    }
}

/// A bookmark's object.
pub(crate) fn bookmark(object: Value, rendering: Rendering) -> Value {
    match rendering.transform {
        Transform::None => object,
        Transform::Partial(beta) => partial(&object, beta),
        Transform::Table(beta) => {
            let row = json!({"cells": [], "object": partial(&object, beta)});
            json!({"kind": "Table", "apiVersion": meta_version(beta), "metadata": {"resourceVersion": object["metadata"]["resourceVersion"]},
                "columnDefinitions": null, "rows": [row]})
        }
    }
}

fn partial(object: &Value, beta: bool) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": meta_version(beta), "metadata": object["metadata"]})
}

/// The metadata of a list.
pub(crate) fn list_metadata(revision: u64, next: Option<&str>, remaining: Option<usize>) -> Value {
    let mut metadata = Map::new();
    metadata.insert("resourceVersion".into(), revision.to_string().into());
    if let Some(next) = next {
        metadata.insert("continue".into(), next.into());
    }
    if let Some(remaining) = remaining {
        metadata.insert("remainingItemCount".into(), remaining.into());
    }
    metadata.into()
}

/// A list response. Plain JSON of stored objects, and protobuf, is streamed from their bytes. `stored` objects have their
/// revision to themselves; what a dry run made has not.
pub(crate) async fn list(
    resource: &Resource,
    objects: Vec<Arc<Object>>,
    stored: bool,
    metadata: Value,
    rendering: Rendering,
    style: Style,
) -> Response<Body> {
    let mut head =
        json!({"kind": resource.list_kind(), "apiVersion": resource.gvk.api_version(), "metadata": metadata});
    if resource.custom.is_some() && rendering.transform == Transform::None && head["metadata"].get("continue").is_none()
    {
        head["metadata"]["continue"] = "".into();
    }
    let plain = rendering.transform == Transform::None && !objects.iter().any(|o| resource.reshapes(o));
    if plain && style.accepted.media == Media::Json && !style.pretty {
        return body::list(style, body::Items::json(&head, objects));
    }
    if style.accepted.media == Media::Protobuf && !matches!(rendering.transform, Transform::Table(_)) {
        if let Transform::Partial(beta) = rendering.transform {
            head["kind"] = "PartialObjectMetadataList".into();
            head["apiVersion"] = meta_version(beta).into();
        }
        let items = match protobuf::List::new(&head) {
            Ok(list) => messages(resource, &objects, stored, rendering).await.map(|m| body::Items::protobuf(list, m)),
            Err(error) => Err(error),
        };
        return match items {
            Ok(items) => body::list(style, items),
            Err(error) => respond::unencodable(&error),
        };
    }
    respond::value(style, 200, &list_value(resource, &objects, head, rendering))
}

/// The messages of objects. Others get their turn now and then: many that nobody asked for before take a second.
async fn messages(
    resource: &Resource,
    objects: &[Arc<Object>],
    stored: bool,
    rendering: Rendering,
) -> Result<Vec<Bytes>, protobuf::Error> {
    let mut messages = Vec::with_capacity(objects.len());
    for some in objects.chunks(64) {
        for object in some {
            messages.push(match stored {
                true => message(resource, object, rendering)?,
                false => protobuf::encode_message(&value(resource, object, rendering, false))?.into(),
            });
        }
        tokio::task::yield_now().await;
    }
    Ok(messages)
}

/// A list as a value.
fn list_value(resource: &Resource, objects: &[Arc<Object>], mut head: Value, rendering: Rendering) -> Value {
    let values = objects.iter().map(|o| object_value(resource, o));
    match rendering.transform {
        Transform::None => {
            head["items"] = match resource.custom {
                Some(_) => values.collect(),
                None => values.map(without_kind).collect(),
            };
            head
        }
        Transform::Partial(beta) => {
            let items: Vec<Value> = values.map(|v| partial(&v, beta)).collect();
            let items = if items.is_empty() { Value::Null } else { items.into() };
            json!({"kind": "PartialObjectMetadataList", "apiVersion": meta_version(beta),
                "metadata": head["metadata"], "items": items})
        }
        Transform::Table(beta) => {
            let rows: Vec<Value> = values.collect();
            table::table(resource, &rows, head["metadata"].clone(), beta, rendering.include, true)
        }
    }
}

fn without_kind(mut value: Value) -> Value {
    if let Some(map) = value.as_object_mut() {
        map.shift_remove("kind");
        map.shift_remove("apiVersion");
    }
    value
}
