//! `meta.k8s.io` tables.

use isopod_api::{field, status::Status};
use serde_json::{Value, json};

use super::{meta_version, partial};
use crate::registry::{Resource, strategy::Column, table};

/// What rows carry besides their cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Include {
    /// The metadata.
    Metadata = 0,
    /// Nothing.
    None = 1,
    /// The whole object.
    Object = 2,
}

impl Include {
    /// Reads `includeObject`.
    pub(crate) fn parse(text: &str) -> Result<Self, Status> {
        match text {
            "" | "Metadata" => Ok(Self::Metadata),
            "None" => Ok(Self::None),
            "Object" => Ok(Self::Object),
            other => {
                let path = field::Path::new("includeObject");
                let error = field::Error::invalid(&path, other, "must be 'Metadata', 'Object', 'None', or empty");
                Err(Status::bad_request(format!("Unable to convert to Table as requested: {error}")))
            }
        }
    }
}

/// A table of objects.
pub(super) fn table(
    resource: &Resource,
    objects: &[Value],
    metadata: Value,
    beta: bool,
    include: Include,
    with_columns: bool,
) -> Value {
    let now = jiff::Timestamp::now();
    let rows = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": resource.strategy.cells(object, now)});
            let conditions = resource.strategy.row_conditions(object);
            if !conditions.is_empty() {
                row["conditions"] = conditions.into();
            }
            row["object"] = carried(object, beta, include);
            row
        })
        .collect::<Vec<Value>>();
    let own = resource.strategy.columns().unwrap_or_else(|| table::columns(&resource.gvr));
    // Upstream's default convertor leaves the rows of an empty list out.
    let default = own.last().is_some_and(|c| c.name == "Created At");
    let rows = if rows.is_empty() && default { Value::Null } else { rows.into() };
    let columns = if with_columns { definitions(&own) } else { Value::Null };
    json!({"kind": "Table", "apiVersion": meta_version(beta), "metadata": metadata,
        "columnDefinitions": columns, "rows": rows})
}

/// The table of one Scale.
pub(super) fn scale(scale: &Value, beta: bool, include: Include) -> Value {
    let columns =
        [("Name", "string", "name"), ("Desired", "integer", ""), ("Available", "integer", ""), ("Age", "string", "")];
    let columns = columns.map(|(name, kind, format)| Column {
        name: name.to_owned(),
        kind: kind.to_owned(),
        format: format.to_owned(),
        priority: 0,
        description: String::new(),
    });
    let replicas = |part: &str| scale[part]["replicas"].as_i64().unwrap_or(0);
    let age = table::age(scale, jiff::Timestamp::now());
    let row = json!({"cells": [table::name(scale), replicas("spec"), replicas("status"), age],
        "object": carried(scale, beta, include)});
    let metadata = json!({"resourceVersion": scale["metadata"]["resourceVersion"]});
    json!({"kind": "Table", "apiVersion": meta_version(beta), "metadata": metadata,
        "columnDefinitions": definitions(&columns), "rows": [row]})
}

/// What a row carries.
fn carried(object: &Value, beta: bool, include: Include) -> Value {
    match include {
        Include::Metadata => partial(object, beta),
        Include::None => Value::Null,
        Include::Object => object.clone(),
    }
}

fn definitions(columns: &[Column]) -> Value {
    columns
        .iter()
        .map(|c| {
            json!({"name": c.name, "type": c.kind, "format": c.format, "description": c.description,
                "priority": c.priority})
        })
        .collect()
}
