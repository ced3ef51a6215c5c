//! The four access reviews: may somebody do something, and what may I do.

use std::sync::Arc;

use futures::future::BoxFuture;
use isopod_api::{
    field::{Error as FieldError, ErrorList, Path},
    gvk::GroupKind,
    selector::{FieldSelector, Requirements},
    status::Status,
};
use serde_json::{Value, json};

use super::{Create, CreateRequest};
use crate::{
    authn::UserInfo,
    authz::{Attributes, Authorizer, Decision},
    validation::{At, Errs, selector},
};

/// Whose access is reviewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// `spec.user` and `spec.groups`.
    Named,
    /// The same, within one namespace.
    Local,
    /// The one who asks.
    Own,
}

/// `subjectaccessreviews`, `localsubjectaccessreviews` and `selfsubjectaccessreviews`.
pub(super) struct AccessReview {
    pub(super) authorizer: Arc<dyn Authorizer>,
    pub(super) subject: Subject,
}

fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}

/// Upstream prints the internal type: field names with capitals.
fn internal_value(attributes: &Value) -> Value {
    json!({ "Path": text(attributes, "path"), "Verb": text(attributes, "verb") })
}

/// Nothing may be said about the review itself but its namespace, if it has one.
fn nameless(metadata: &Value, subject: Subject) -> Option<FieldError> {
    let local = subject == Subject::Local;
    let allowed = |field: &str| field == "managedFields" || local && field == "namespace";
    let set = metadata.as_object()?.iter().any(|(field, value)| !allowed(field) && !is_empty(value));
    let detail = if local { "must be empty except for namespace" } else { "must be empty" };
    set.then(|| FieldError::invalid(&Path::new("metadata"), metadata.clone(), detail))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn validate(review: &Value, subject: Subject, namespace: &str) -> ErrorList {
    let (spec, path) = (&review["spec"], Path::new("spec"));
    let mut errors = ErrorList::new();
    let (resource, other) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    match (resource.is_object(), other.is_object()) {
        (true, true) => errors.push(FieldError::invalid(
            &path.child("nonResourceAttributes"),
            internal_value(other),
            "cannot be specified in combination with resourceAttributes",
        )),
        (false, false) => errors.push(FieldError::invalid(
            &path.child("resourceAttributes"),
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
        _ => {}
    }
    if subject != Subject::Own && text(spec, "user").is_empty() && spec["groups"].as_array().is_none_or(Vec::is_empty) {
        errors.push(FieldError::invalid(&path.child("user"), "", "at least one of user or group must be specified"));
    }
    let mut selectors = Errs::new();
    for field in ["fieldSelector", "labelSelector"] {
        let at = At::new(path.child("resourceAttributes").child(field), &resource[field]);
        selector::reviewed(&mut selectors, &at);
    }
    errors.append(&mut selectors.0);
    errors.extend(nameless(&review["metadata"], subject));
    if subject == Subject::Local {
        if other.is_object() {
            let detail = "disallowed on this kind of request";
            errors.push(FieldError::invalid(&path.child("nonResourceAttributes"), internal_value(other), detail));
        }
        let asked = text(resource, "namespace");
        if resource.is_object() && asked != namespace {
            let path = path.child("resourceAttributes").child("namespace");
            errors.push(FieldError::invalid(&path, asked, "must match metadata.namespace"));
        }
    }
    errors
}

fn attributes(spec: &Value, user: UserInfo) -> Attributes {
    let resource = &spec["resourceAttributes"];
    if !resource.is_object() {
        let other = &spec["nonResourceAttributes"];
        return Attributes { user, verb: text(other, "verb"), path: text(other, "path"), ..Attributes::default() };
    }
    let version = text(resource, "version");
    Attributes {
        user,
        verb: text(resource, "verb"),
        resource_request: true,
        group: text(resource, "group"),
        version: if version.is_empty() { "*".to_owned() } else { version },
        resource: text(resource, "resource"),
        subresource: text(resource, "subresource"),
        namespace: text(resource, "namespace"),
        name: text(resource, "name"),
        path: String::new(),
    }
}

fn named_user(spec: &Value) -> UserInfo {
    let strings = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let extra = spec["extra"].as_object().into_iter().flatten();
    UserInfo {
        name: text(spec, "user"),
        uid: text(spec, "uid"),
        groups: strings(&spec["groups"]),
        extra: extra.map(|(key, values)| (key.to_lowercase(), strings(values))).collect(),
    }
}

/// Which selectors of a review cannot be read, wholly or in part: they do not narrow what is asked. Nobody of ours looks at
/// selectors, as RBAC does not.
fn unread(spec: &Value) -> String {
    let attributes = &spec["resourceAttributes"];
    let requirements = |selector: &Value| selector["requirements"].as_array().cloned().unwrap_or_default();
    let values = |requirement: &Value| requirement["values"].as_array().map_or(0, Vec::len);
    let judge = |field: &str, parses: &dyn Fn(&str) -> bool, known: &dyn Fn(&Value) -> bool| {
        let selector = attributes.get(field).filter(|selector| selector.is_object())?;
        let raw = text(selector, "rawSelector");
        let all = requirements(selector);
        let read = all.iter().filter(|requirement| known(requirement)).count();
        let ignored = match (raw.is_empty() || parses(&raw), read == all.len(), read) {
            (true, true, _) => return None,
            (true, false, 1..) => "partially ignored",
            _ => "ignored",
        };
        Some(format!("spec.resourceAttributes.{field} {ignored} due to parse error"))
    };
    let field = |r: &Value| matches!(r["operator"].as_str(), Some("In" | "NotIn")) && values(r) == 1;
    let label = |r: &Value| match r["operator"].as_str() {
        Some("In" | "NotIn") => values(r) > 0,
        Some("Exists" | "DoesNotExist") => values(r) == 0,
        _ => false,
    };
    let fields = judge("fieldSelector", &|raw| FieldSelector::parse(raw).is_ok(), &field);
    let labels = judge("labelSelector", &|raw| Requirements::parse(raw).is_ok(), &label);
    fields.into_iter().chain(labels).collect::<Vec<_>>().join("; ")
}

/// The status of a review. `denied` is only there when somebody said no for good.
fn status(decision: Decision, unread: String) -> Value {
    let (allowed, denied, reason) = match decision {
        Decision::Allow(reason) => (true, false, reason),
        Decision::NoOpinion(reason) => (false, false, reason),
        Decision::Deny(reason) => (false, true, reason),
    };
    let mut status = json!({ "allowed": allowed });
    if denied {
        status["denied"] = true.into();
    }
    if !reason.is_empty() {
        status["reason"] = reason.into();
    }
    if !unread.is_empty() {
        status["evaluationError"] = unread.into();
    }
    status
}

impl Create for AccessReview {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let mut answer = request.object;
            let spec = &answer["spec"];
            let errors = validate(&answer, self.subject, request.namespace);
            if !errors.is_empty() {
                return Err(Status::invalid(&GroupKind::new(&request.gvr.group, ""), "", errors));
            }
            let user = if self.subject == Subject::Own { request.user.clone() } else { named_user(spec) };
            answer["status"] = status(self.authorizer.authorize(&attributes(spec, user)), unread(spec));
            Ok(answer)
        })
    }
}

/// `selfsubjectrulesreviews`.
pub(super) struct RulesReview {
    pub(super) authorizer: Arc<dyn Authorizer>,
}

impl Create for RulesReview {
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>> {
        Box::pin(async move {
            let mut answer = request.object;
            let namespace = text(&answer["spec"], "namespace");
            if namespace.is_empty() {
                return Err(Status::bad_request("no namespace on request"));
            }
            let (mut resource, mut other) = (Vec::new(), Vec::new());
            for rule in self.authorizer.rules(request.user, &namespace) {
                if !rule.resources.is_empty() {
                    let plain = crate::authz::Rule { non_resource_urls: Vec::new(), ..rule.clone() };
                    resource.push(plain.to_value());
                }
                if !rule.non_resource_urls.is_empty() {
                    other.push(json!({ "verbs": rule.verbs, "nonResourceURLs": rule.non_resource_urls }));
                }
            }
            answer["status"] = json!({ "resourceRules": resource, "nonResourceRules": other, "incomplete": false });
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(spec: Value, subject: Subject) -> Vec<String> {
        validate(&json!({ "spec": spec }), subject, "ns").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn reviews_are_validated_as_upstream_does() {
        let resource = json!({"verb": "get", "resource": "pods", "namespace": "ns"});
        assert!(messages(json!({"resourceAttributes": resource}), Subject::Own).is_empty());
        assert_eq!(
            messages(json!({"resourceAttributes": resource}), Subject::Named),
            ["spec.user: Invalid value: \"\": at least one of user or group must be specified"]
        );
        assert_eq!(
            messages(json!({}), Subject::Own),
            [
                "spec.resourceAttributes: Invalid value: null: exactly one of nonResourceAttributes or resourceAttributes must be specified"
            ]
        );
        let named = |metadata: Value, subject: Subject| {
            let spec = json!({"user": "u", "resourceAttributes": {"namespace": "ns"}});
            let errors = validate(&json!({"metadata": metadata, "spec": spec}), subject, "ns");
            errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        let metadata = json!({"namespace": "ns", "managedFields": []});
        assert_eq!(named(metadata.clone(), Subject::Local), "");
        let want = "metadata: Invalid value: {\"namespace\":\"ns\",\"managedFields\":[]}: must be empty";
        assert_eq!(named(metadata, Subject::Named), want);
        let want = "metadata: Invalid value: {\"name\":\"x\"}: must be empty except for namespace";
        assert_eq!(named(json!({"name": "x"}), Subject::Local), want);
        let with = |field: &str, selector: Value| {
            let mut asked = json!({"user": "u", "resourceAttributes": {"resource": "pods"}});
            asked["resourceAttributes"][field] = selector;
            (messages(asked.clone(), Subject::Named).join(", "), unread(&asked))
        };
        let at = "spec.resourceAttributes.";
        let one = |operator: &str, values: &[&str]| json!([{"key": "k", "operator": operator, "values": values}]);
        for (field, selector, message, error) in [
            ("fieldSelector", json!({"rawSelector": "spec.nodeName=n"}), String::new(), ""),
            ("fieldSelector", json!({"requirements": one("In", &["n"])}), String::new(), ""),
            ("fieldSelector", json!({"rawSelector": "a in (b)"}), String::new(), "fieldSelector ignored"),
            ("fieldSelector", json!({"requirements": one("Exists", &[])}), String::new(), "fieldSelector ignored"),
            ("labelSelector", json!({"requirements": one("New", &["x"])}), String::new(), "labelSelector ignored"),
            (
                "labelSelector",
                json!({"requirements": [one("Exists", &[])[0].clone(), one("New", &[])[0].clone()]}),
                String::new(),
                "labelSelector partially ignored",
            ),
            (
                "fieldSelector",
                json!({}),
                format!(
                    "{at}fieldSelector.requirements: Required value: when {at}fieldSelector is specified, requirements or rawSelector is required"
                ),
                "",
            ),
            (
                "labelSelector",
                json!({"rawSelector": "k=v", "requirements": one("In", &[])}),
                format!(
                    "{at}labelSelector.rawSelector: Invalid value: \"k=v\": may not specified at the same time as requirements, {at}labelSelector.requirements[0].values: Required value: must be specified when `operator` is 'In' or 'NotIn'"
                ),
                "labelSelector ignored",
            ),
        ] {
            let error = if error.is_empty() { String::new() } else { format!("{at}{error} due to parse error") };
            assert_eq!(with(field, selector.clone()), (message, error), "{selector}");
        }
        let elsewhere = json!({"user": "u", "resourceAttributes": {"namespace": "other"}});
        assert_eq!(
            messages(elsewhere, Subject::Local),
            ["spec.resourceAttributes.namespace: Invalid value: \"other\": must match metadata.namespace"]
        );
    }
}
