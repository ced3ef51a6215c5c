//! OpenAPI of custom resources, built when asked for.

use isopod_api::openapi::{self, CrdPaths, Describe};

use super::{Definition, Served, Version};

fn paths<'a>(definition: &'a Definition, version: &'a Version) -> CrdPaths<'a> {
    CrdPaths {
        kind: &version.gvk.kind,
        list_kind: definition.text("listKind"),
        plural: definition.text("plural"),
        namespaced: definition.namespaced,
        schema: Some(version.schema.schema()),
        status: version.has_status,
        scale: version.scale.is_some(),
    }
}

/// What a group and version serves.
fn openapi_paths<'a>(served: &'a Served, group: &str, version: &str) -> Vec<CrdPaths<'a>> {
    let custom = served.in_version(group, version).into_iter().filter_map(|r| r.custom.as_ref());
    custom.map(|c| paths(&c.definition, &c.version)).collect()
}

/// Paths of the v3 index with the hashes of their content.
pub(crate) fn v3_index(served: &Served) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for group in served.groups() {
        for version in &group.versions {
            let hashes = served.in_version(&group.name, version).into_iter().filter_map(|r| r.custom.as_ref());
            let hash = hashes
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, c| (hash ^ c.definition.hash).wrapping_mul(0x0100_0000_01b3));
            out.push((format!("apis/{}/{version}", group.name), format!("{hash:016X}")));
        }
    }
    out
}

/// The v3 document of a group and version; `None` when it has no custom resources.
pub(crate) fn v3(served: &Served, group: &str, version: &str, describe: Describe<'_>) -> Option<Vec<u8>> {
    let crds = openapi_paths(served, group, version);
    (!crds.is_empty()).then(|| openapi::crd_v3(group, version, &crds, describe))
}

/// The v2 document of everything.
pub(crate) fn v2(served: &Served, describe: Describe<'_>) -> Vec<u8> {
    let mut crds = Vec::new();
    for group in served.groups() {
        for version in &group.versions {
            crds.push((group.name.as_str(), version.as_str(), openapi_paths(served, &group.name, version)));
        }
    }
    openapi::v2_with(&crds, describe)
}
