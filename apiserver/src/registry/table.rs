//! Cells of tables (`kubectl get`).

use isopod_api::meta;
use serde_json::{Value, json};

/// The cells of a kind without columns of its own: name and creation time.
pub fn default_cells(obj: &Value, _now: jiff::Timestamp) -> Vec<Value> {
    vec![json!(meta::name(obj)), obj["metadata"]["creationTimestamp"].clone()]
}
