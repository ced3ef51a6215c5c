//! The table of custom resources that are served now.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isopod_api::{
    gvk::Gvr,
    resources::{self, Group, Subresource},
};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Behaviour, Custom, Definition, Version};
use crate::{
    cache::ResourceCache,
    registry::{Behaved, Resource},
};

const VERBS: [&str; 8] = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"];
const TERMINATING_VERBS: [&str; 5] = ["delete", "deletecollection", "get", "list", "watch"];
const SUBRESOURCE_VERBS: [&str; 3] = ["get", "patch", "update"];

/// What is served.
#[derive(Default)]
pub(crate) struct Served {
    resources: HashMap<Gvr, Arc<Resource>>,
    groups: Vec<Group>,
    definitions: HashMap<String, Arc<Definition>>,
}

/// A definition to publish.
pub(crate) struct Publication {
    /// The CRD.
    pub(crate) definition: Arc<Definition>,
    /// Its objects.
    pub(crate) store: Arc<ResourceCache>,
    /// Objects written at this revision or earlier may be older than the schema.
    pub(crate) since: u64,
}

impl Served {
    /// The table of some definitions. What did not change since `previous` is taken from it, what did is ended there.
    pub(crate) fn build(publications: Vec<Publication>, previous: &Served) -> Self {
        let mut served = Self::default();
        let mut groups: HashMap<String, Vec<String>> = HashMap::new();
        for Publication { definition, store, since } in publications {
            let versions: Vec<&Arc<Version>> = definition.versions.iter().filter(|v| v.served).collect();
            for version in &versions {
                let gvr = Gvr::new(&definition.group, &version.gvk.version, definition.text("plural"));
                let same =
                    |r: &&Arc<Resource>| r.custom.as_ref().is_some_and(|c| Arc::ptr_eq(&c.definition, &definition));
                let resource = match previous.resources.get(&gvr).filter(same) {
                    Some(resource) => Arc::clone(resource),
                    None => Arc::new(resource(&definition, version, &store, since)),
                };
                served.resources.insert(gvr, resource);
                let known = groups.entry(definition.group.clone()).or_default();
                if !known.contains(&version.gvk.version) {
                    known.push(version.gvk.version.clone());
                }
            }
            served.definitions.insert(definition.name.clone(), definition);
        }
        served.groups = groups
            .into_iter()
            .map(|(name, mut versions)| {
                versions.sort_by_key(|v| std::cmp::Reverse(super::definition::rank(v)));
                Group { preferred: versions[0].clone(), versions, name }
            })
            .collect();
        served.groups.sort_by(|a, b| a.name.cmp(&b.name));
        for (gvr, old) in &previous.resources {
            let kept = served.resources.get(gvr).is_some_and(|new| Arc::ptr_eq(new, old));
            if let Some(custom) = old.custom.as_ref().filter(|_| !kept) {
                custom.gone.store(true, Ordering::Release);
                old.store.iter().for_each(|store| store.wake_all());
            }
        }
        served
    }

    /// A resource.
    pub(crate) fn get(&self, gvr: &Gvr) -> Option<&Arc<Resource>> {
        self.resources.get(gvr)
    }

    /// All resources.
    pub(crate) fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    /// Groups by name.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// A definition by the CRD's name.
    pub(crate) fn definition(&self, name: &str) -> Option<&Arc<Definition>> {
        self.definitions.get(name)
    }

    /// All definitions.
    pub(crate) fn definitions(&self) -> impl Iterator<Item = &Arc<Definition>> {
        self.definitions.values()
    }

    /// The resources of a group and version, by plural.
    pub(crate) fn in_version(&self, group: &str, version: &str) -> Vec<&Arc<Resource>> {
        let mut found: Vec<_> =
            self.resources.values().filter(|r| r.gvr.group == group && r.gvr.version == version).collect();
        found.sort_by(|a, b| a.gvr.resource.cmp(&b.gvr.resource));
        found
    }
}

fn resource(definition: &Arc<Definition>, version: &Arc<Version>, store: &Arc<ResourceCache>, since: u64) -> Resource {
    let list = |field: &str| -> Vec<String> {
        let names = definition.names[field].as_array().into_iter().flatten().filter_map(Value::as_str);
        names.map(str::to_owned).collect()
    };
    let owned = |verbs: &[&str]| verbs.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    let (group, plural) = (&definition.group, definition.text("plural"));
    let mut subresources = Vec::new();
    let subresource = |name: &str, kind: &str, kind_gv: Option<&str>| Subresource {
        name: name.into(),
        kind: kind.into(),
        verbs: owned(&SUBRESOURCE_VERBS),
        kind_gv: kind_gv.map(str::to_owned),
    };
    if version.has_status {
        subresources.push(subresource("status", &version.gvk.kind, None));
    }
    if version.scale.is_some() {
        subresources.push(subresource("scale", "Scale", Some("autoscaling/v1")));
    }
    let storage = &definition.storage().gvk;
    let hash = Sha256::digest(format!("{group}/{}/{}", storage.version, storage.kind).as_bytes());
    let place = if definition.namespaced { "{namespace}/{name}" } else { "{name}" };
    let info = resources::Resource {
        group: group.clone(),
        version: version.gvk.version.clone(),
        preferred: definition.versions.iter().find(|v| v.served).is_some_and(|v| Arc::ptr_eq(v, version)),
        kind: version.gvk.kind.clone(),
        plural: plural.to_owned(),
        singular: definition.text("singular").to_owned(),
        short_names: list("shortNames"),
        categories: list("categories"),
        namespaced: definition.namespaced,
        verbs: if definition.terminating { owned(&TERMINATING_VERBS) } else { owned(&VERBS) },
        subresources,
        etcd_prefix: Some(format!("{}{place}", definition.prefix())),
        storage_version_hash: Some(STANDARD.encode(&hash[..8])),
    };
    let behaviour = Behaviour { version: Arc::clone(version) };
    let custom = Custom::new(Arc::clone(definition), Arc::clone(version), since);
    Resource {
        gvr: info.gvr(),
        gvk: info.gvk(),
        storage: info.gvk(),
        strategy: Behaved::Custom(Arc::new(behaviour)),
        store: Some(Arc::clone(store)),
        custom: Some(custom),
        info,
    }
}
