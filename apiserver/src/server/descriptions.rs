//! What `kubectl explain` says of types and fields: collected at build time, inflated while a document is built.

use std::{collections::HashMap, io::Read};

static DEFLATED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptions.json.z"));

/// Descriptions by definition; a type's own stands under the empty field name.
pub(super) struct Descriptions(HashMap<String, HashMap<String, String>>);

impl Descriptions {
    /// Inflates them all: held only as long as a document is being built.
    pub(super) fn load() -> Self {
        let mut json = Vec::new();
        let read = flate2::read::ZlibDecoder::new(DEFLATED).read_to_end(&mut json);
        // The build script wrote it; without descriptions the documents are still right.
        Self(read.ok().and_then(|_| serde_json::from_slice(&json).ok()).unwrap_or_default())
    }

    /// The description of a definition, or of one of its fields.
    pub(super) fn of(&self, definition: &str, field: Option<&str>) -> Option<&str> {
        self.0.get(definition)?.get(field.unwrap_or("")).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_fields_are_described() {
        let all = Descriptions::load();
        assert!(all.of("io.k8s.api.core.v1.Pod", None).is_some_and(|text| text.starts_with("Pod is a collection")));
        assert!(all.of("io.k8s.api.apps.v1.DeploymentSpec", Some("replicas")).is_some());
        assert!(all.of("io.k8s.api.core.v1.Pod", Some("nonsense")).is_none());
    }
}
