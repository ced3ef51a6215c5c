//! Which objects a list or watch is about: namespace, name, label selector, field selector.

use std::sync::Arc;

use isopod_api::{
    selector::{FieldSelector, Requirements},
    status::Status,
};

use super::Resource;
use crate::{cache::Object, custom::Version, server::query::Query};

/// A compiled selection.
#[derive(Clone)]
pub(crate) struct Selection {
    labels: Option<Requirements>,
    fields: Option<FieldSelector>,
    /// The version whose own fields are selected by, and the format its objects are kept in.
    custom: Option<(Arc<Version>, u32)>,
    /// Key prefix: `""` or `namespace/`.
    pub(crate) prefix: String,
}

impl Selection {
    /// Everything in a namespace (`""`: everywhere).
    pub(crate) fn all(namespace: &str) -> Self {
        let prefix = if namespace.is_empty() { String::new() } else { format!("{namespace}/") };
        Self { labels: None, fields: None, custom: None, prefix }
    }

    /// Reads the selectors of a query; `name` restricts further (watches of one object).
    pub(crate) fn parse(resource: &Resource, namespace: &str, name: &str, query: &Query) -> Result<Self, Status> {
        let mut selection = Self::all(if resource.info.namespaced { namespace } else { "" });
        let labels = query.text("labelSelector");
        if !labels.is_empty() {
            let parsed = Requirements::parse(labels).map_err(|e| Status::bad_request(e.to_string()))?;
            selection.labels = Some(parsed).filter(|p| !p.is_empty());
        }
        let mut fields = query.text("fieldSelector").to_owned();
        if !name.is_empty() && fields.is_empty() {
            fields = format!("metadata.name={name}");
        }
        if !fields.is_empty() {
            let mut parsed = FieldSelector::parse(&fields).map_err(|e| Status::bad_request(e.to_string()))?;
            for requirement in &mut parsed.0 {
                if let Some(custom) = own_field(resource, &requirement.field)? {
                    selection.custom = Some(custom);
                    continue;
                }
                check(resource, &requirement.field)?;
                requirement.field = stored_name(resource, &requirement.field);
            }
            selection.fields = Some(parsed).filter(|p| !p.is_empty());
        }
        Ok(selection)
    }

    /// Whether there is any selector.
    pub(crate) fn filters(&self) -> bool {
        self.labels.is_some() || self.fields.is_some()
    }

    /// Whether objects have to be readable in the served version before they are selected.
    pub(crate) fn reads_objects(&self) -> bool {
        self.custom.is_some()
    }

    /// Whether an object is selected.
    pub(crate) fn matches(&self, object: &Object) -> bool {
        (self.prefix.is_empty() || self.prefix.strip_suffix('/') == Some(&*object.namespace))
            && self.labels.as_ref().is_none_or(|l| l.matches(&*object.labels))
            && self.fields.as_ref().is_none_or(|f| match &self.custom {
                None => f.0.iter().all(|r| (object.field(&r.field).unwrap_or("") == r.value) == r.equal),
                Some((version, format)) => own_matches(version, *format, f, object),
            })
    }

    /// What all selected objects have in common: changes of others need not wake who watches them.
    pub(crate) fn topic(&self, resource: &Resource) -> Option<(&'static str, &str)> {
        if let Some(name) = self.exact_name() {
            return Some(("metadata.name", name));
        }
        let fields = self.fields.as_ref().filter(|_| self.custom.is_none());
        let mut known = resource.strategy.field_names().iter();
        let field = known.find_map(|name| Some((*name, fields?.exact(name)?)));
        field.or_else(|| self.prefix.strip_suffix('/').map(|namespace| ("metadata.namespace", namespace)))
    }

    /// The one name the field selector allows, when it does.
    pub(crate) fn exact_name(&self) -> Option<&str> {
        self.fields.as_ref()?.exact("metadata.name")
    }
}

/// The version of a custom resource that declares a field selectable.
fn own_field(resource: &Resource, field: &str) -> Result<Option<(Arc<Version>, u32)>, Status> {
    let Some(custom) = &resource.custom else { return Ok(None) };
    if matches!(field, "metadata.name" | "metadata.namespace") {
        return Ok(None);
    }
    match custom.version.selectable.iter().any(|(name, _)| name == field) {
        true => Ok(Some((Arc::clone(&custom.version), custom.format))),
        false => Err(Status::bad_request(format!("field label not supported: {field}"))),
    }
}

fn own_matches(version: &Version, format: u32, selector: &FieldSelector, object: &Object) -> bool {
    let form = object.forms.get(format);
    let value = form.map_or_else(|| object.value(), |form| serde_json::from_slice(&form).unwrap_or_default());
    selector.0.iter().all(|r| {
        let own = version.selectable.iter().find(|(name, _)| *name == r.field);
        let found = match own {
            None => object.field(&r.field).unwrap_or_default().to_owned(),
            Some((_, path)) => match path.first(&value) {
                None | Some(serde_json::Value::Null) => String::new(),
                Some(serde_json::Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            },
        };
        (found == r.value) == r.equal
    })
}

/// The name a field has where objects are stored: events.k8s.io reads core events.
fn stored_name(resource: &Resource, field: &str) -> String {
    match field.strip_prefix("regarding.") {
        Some(rest) if resource.converted() => format!("involvedObject.{rest}"),
        None if resource.converted() && field == "reportingController" => "reportingComponent".to_owned(),
        _ => field.to_owned(),
    }
}

/// Whether a field may be selected by, with the message of the kind when not.
fn check(resource: &Resource, field: &str) -> Result<(), Status> {
    let name = stored_name(resource, field);
    let names = resource.strategy.field_names();
    let without_namespace = ["namespaces", "nodes", "certificatesigningrequests", "resourceslices"];
    let cluster_only = resource.custom.is_none() && without_namespace.contains(&&*resource.gvr.resource);
    // The other group's names of the same fields.
    let other = resource.converted()
        && (field.starts_with("involvedObject.") || ["reportingComponent", "source"].contains(&field));
    match field {
        "metadata.name" => return Ok(()),
        "metadata.namespace" if !cluster_only => return Ok(()),
        _ if !other && names.contains(&name.as_str()) => return Ok(()),
        _ => {}
    }
    Err(Status::bad_request(match (&*resource.gvr.group, &*resource.gvr.resource) {
        ("batch", "jobs") => format!("field label \"{field}\" not supported for Job"),
        ("resource.k8s.io", "resourceslices") => {
            format!("field label not supported for resource.k8s.io/v1, Kind=ResourceSlice: {field}")
        }
        (
            "" | "certificates.k8s.io" | "events.k8s.io",
            "certificatesigningrequests"
            | "events"
            | "namespaces"
            | "nodes"
            | "pods"
            | "replicationcontrollers"
            | "secrets"
            | "services",
        ) => format!("field label not supported: {field}"),
        _ => format!("\"{field}\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""),
    }))
}
