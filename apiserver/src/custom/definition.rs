//! One CRD, compiled.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use isopod_api::{gvk::Gvk, meta, structural::Structural};
use jiff::Timestamp;
use serde_json::Value;

use super::{
    columns::PrinterColumn,
    conversion::{Conversion, Converter},
    path::JsonPath,
    rules::Rules,
};

/// The paths of the scale subresource.
#[derive(Debug)]
pub(crate) struct ScalePaths {
    /// `specReplicasPath`.
    pub(crate) spec: JsonPath,
    /// Its text.
    pub(crate) spec_text: String,
    /// `statusReplicasPath`.
    pub(crate) status: JsonPath,
    /// Its text.
    pub(crate) status_text: String,
    /// `labelSelectorPath`.
    pub(crate) selector: Option<JsonPath>,
    /// Its text.
    pub(crate) selector_text: Option<String>,
}

/// One version of a CRD.
pub(crate) struct Version {
    /// Group, version, kind.
    pub(crate) gvk: Gvk,
    /// Whether clients may use it.
    pub(crate) served: bool,
    /// The schema.
    pub(crate) schema: Structural,
    /// CEL rules, when there are any.
    pub(crate) rules: Option<Rules>,
    /// Columns behind the name.
    pub(crate) columns: Vec<PrinterColumn>,
    /// Fields of field selectors: the name without the leading dot, and where it is.
    pub(crate) selectable: Vec<(String, JsonPath)>,
    /// Whether there may be resources inside its objects.
    pub(crate) embeds: bool,
    /// Whether status is a subresource.
    pub(crate) has_status: bool,
    /// The scale subresource.
    pub(crate) scale: Option<ScalePaths>,
    /// Warning of a deprecated version.
    pub(crate) deprecation: Option<String>,
}

impl Version {
    fn new(group: &str, kind: &str, spec: &Value) -> Self {
        let gvk = Gvk::new(group, spec["name"].as_str().unwrap_or_default(), kind);
        let schema = spec.pointer("/schema/openAPIV3Schema");
        let path = |v: &Value| v.as_str().and_then(JsonPath::parse);
        let selectable = spec["selectableFields"].as_array().into_iter().flatten().filter_map(|f| {
            let text = f["jsonPath"].as_str()?;
            Some((text.trim_start_matches('.').to_owned(), JsonPath::parse(text)?))
        });
        let scale = &spec["subresources"]["scale"];
        let scale =
            path(&scale["specReplicasPath"]).zip(path(&scale["statusReplicasPath"])).map(|(spec, status)| ScalePaths {
                spec,
                status,
                spec_text: scale["specReplicasPath"].as_str().unwrap_or_default().to_owned(),
                status_text: scale["statusReplicasPath"].as_str().unwrap_or_default().to_owned(),
                selector: path(&scale["labelSelectorPath"]),
                selector_text: scale["labelSelectorPath"].as_str().map(str::to_owned),
            });
        Self {
            served: spec["served"] == true,
            schema: Structural::new(schema),
            rules: schema.and_then(Rules::compile),
            columns: super::columns::columns(spec),
            selectable: selectable.collect(),
            embeds: schema.is_some_and(super::embedded::any),
            has_status: spec["subresources"]["status"].is_object(),
            scale,
            deprecation: None,
            gvk,
        }
    }

    /// Prunes and defaults an object that was converted to this version.
    pub(crate) fn settle(&self, value: &mut Value) {
        if let Err(error) = self.schema.decode(value, &[]) {
            tracing::debug!(kind = %self.gvk, %error, "a stored object does not fit its schema");
        }
        self.schema.default(value);
    }
}

/// One CRD.
pub(crate) struct Definition {
    /// Name of the CRD.
    pub(crate) name: String,
    /// Group.
    pub(crate) group: String,
    /// Accepted names.
    pub(crate) names: Value,
    /// Whether objects live in namespaces.
    pub(crate) namespaced: bool,
    /// All versions, best first.
    pub(crate) versions: Vec<Arc<Version>>,
    storage: usize,
    /// The webhook that converts between versions.
    pub(crate) conversion: Option<Conversion>,
    /// Whether the CRD is being deleted.
    pub(crate) terminating: bool,
    /// When it was established, in whole seconds.
    established: Option<Timestamp>,
    /// Changes with everything clients can see.
    pub(crate) hash: u64,
}

impl Definition {
    /// Compiles a CRD whose names are accepted.
    pub(crate) fn new(crd: &Value, converter: Option<Arc<Converter>>) -> Self {
        let spec = &crd["spec"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let (group, kind) = (text(&spec["group"]), text(&crd["status"]["acceptedNames"]["kind"]));
        let mut specs: Vec<&Value> = spec["versions"].as_array().into_iter().flatten().collect();
        specs.sort_by_key(|v| std::cmp::Reverse(rank(v["name"].as_str().unwrap_or_default())));
        let storage = specs.iter().position(|v| v["storage"] == true).unwrap_or(0);
        let mut versions: Vec<Version> = specs.iter().map(|v| Version::new(&group, &kind, v)).collect();
        let newest = newest(&specs, &group, &kind);
        for (version, spec) in versions.iter_mut().zip(&specs) {
            version.deprecation = deprecation(&version.gvk, spec, newest.as_ref());
        }
        let terminating = meta::deletion_timestamp(crd).is_some();
        let mut hasher = DefaultHasher::new();
        (spec.to_string(), terminating, crd["status"]["acceptedNames"].to_string()).hash(&mut hasher);
        Self {
            name: meta::name(crd).to_owned(),
            names: crd["status"]["acceptedNames"].clone(),
            namespaced: spec["scope"] == "Namespaced",
            versions: versions.into_iter().map(Arc::new).collect(),
            storage,
            conversion: Conversion::new(&spec["conversion"], converter),
            terminating,
            established: established(crd),
            hash: hasher.finish(),
            group,
        }
    }

    /// The version objects are stored in.
    pub(crate) fn storage(&self) -> &Arc<Version> {
        &self.versions[self.storage]
    }

    /// A version by name, served or not.
    pub(crate) fn version(&self, name: &str) -> Option<&Arc<Version>> {
        self.versions.iter().find(|v| v.gvk.version == name)
    }

    /// One of the accepted names.
    pub(crate) fn text(&self, field: &str) -> &str {
        self.names[field].as_str().unwrap_or_default()
    }

    /// Waits out the second in which it was established, as creations do (two seconds of them in Kubernetes), so that
    /// times of whole seconds tell apart what came before objects and what came with them.
    pub(crate) async fn settled(&self) {
        let left = self.unsettled(Timestamp::now());
        if !left.is_zero() {
            tokio::time::sleep(left).await;
        }
    }

    fn unsettled(&self, now: Timestamp) -> Duration {
        let since = |time| now.duration_since(time).try_into().unwrap_or_default();
        self.established.map_or(Duration::ZERO, |time| Duration::from_secs(1).saturating_sub(since(time)))
    }

    /// Key prefix of the objects in the store.
    pub(crate) fn prefix(&self) -> String {
        prefix(&self.group, self.text("plural"))
    }
}

fn established(crd: &Value) -> Option<Timestamp> {
    let conditions = crd["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == "Established")?["lastTransitionTime"].as_str()?.parse().ok()
}

/// Key prefix of a CRD's objects in the store.
pub(super) fn prefix(group: &str, plural: &str) -> String {
    format!("/registry/{group}/{plural}/")
}

/// The best served version that is not deprecated.
fn newest(specs: &[&Value], group: &str, kind: &str) -> Option<Gvk> {
    let good = specs.iter().find(|v| v["served"] == true && v["deprecated"] != true)?;
    Some(Gvk::new(group, good["name"].as_str()?, kind))
}

fn deprecation(gvk: &Gvk, spec: &Value, newest: Option<&Gvk>) -> Option<String> {
    if spec["deprecated"] != true {
        return None;
    }
    if let Some(own) = spec["deprecationWarning"].as_str() {
        return Some(own.to_owned());
    }
    let rank_of = |gvk: &Gvk| rank(&gvk.version);
    let own = format!("{} {} is deprecated", gvk.api_version(), gvk.kind);
    Some(match newest.filter(|n| rank_of(n) > rank_of(gvk)) {
        Some(newest) => format!("{own}; use {} {}", newest.api_version(), newest.kind),
        None => own,
    })
}

/// Kubernetes' order of versions: v2 > v1 > v2beta1 > v1alpha3 > anything else by reverse name.
pub(super) fn rank(version: &str) -> (u8, u64, u64, std::cmp::Reverse<String>) {
    let other = (0, 0, 0, std::cmp::Reverse(version.to_owned()));
    let Some(rest) = version.strip_prefix('v') else { return other };
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let Ok(major) = rest[..digits].parse::<u64>() else { return other };
    let none = std::cmp::Reverse(String::new());
    match &rest[digits..] {
        "" => (3, major, 0, none),
        rest => {
            let (stage, minor) = match (rest.strip_prefix("beta"), rest.strip_prefix("alpha")) {
                (Some(minor), _) => (2, minor),
                (_, Some(minor)) => (1, minor),
                _ => return other,
            };
            minor.parse().map_or(other, |minor| (stage, major, minor, none))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_definition_settles_within_its_second() {
        let condition = serde_json::json!({"type": "Established", "lastTransitionTime": "2026-01-01T00:00:07Z"});
        let definition = Definition::new(&serde_json::json!({"status": {"conditions": [condition]}}), None);
        let left = |now: &str| definition.unsettled(now.parse().unwrap()).as_millis();
        assert_eq!([left("2026-01-01T00:00:07.25Z"), left("2026-01-01T00:00:08Z")], [750, 0]);
        assert_eq!(left("2026-01-01T00:00:06Z"), 1000, "a clock that went back delays no longer than that");
        assert_eq!(Definition::new(&serde_json::json!({}), None).unsettled(Timestamp::now()), Duration::ZERO);
    }

    #[test]
    fn versions_in_order() {
        let mut versions = vec!["foo1", "v1alpha1", "v1", "v11alpha2", "v3beta1", "v10", "foo10", "v2", "v12alpha1"];
        versions.sort_by_key(|v| std::cmp::Reverse(rank(v)));
        assert_eq!(versions, ["v10", "v2", "v1", "v3beta1", "v12alpha1", "v11alpha2", "v1alpha1", "foo1", "foo10"]);
    }
}
