//! Which requests webhooks and policies are about: rules, selectors, equivalent versions.

use isopod_api::{
    gvk::{Gvk, Gvr},
    meta,
    selector::LabelSelector,
    status::Status,
};
use serde_json::Value;

use super::{Operation, Request, list, text};

/// The group of the objects that configure admission.
const GROUP: &str = "admissionregistration.k8s.io";
/// What nobody can be asked about, lest nobody could repair it.
const EXEMPT: [&str; 6] = [
    "validatingwebhookconfigurations",
    "mutatingwebhookconfigurations",
    "validatingadmissionpolicies",
    "validatingadmissionpolicybindings",
    "mutatingadmissionpolicies",
    "mutatingadmissionpolicybindings",
];
/// Questions, which policies do not see.
const REVIEWS: [&str; 6] = [
    "selfsubjectreviews",
    "tokenreviews",
    "localsubjectaccessreviews",
    "selfsubjectaccessreviews",
    "selfsubjectrulesreviews",
    "subjectaccessreviews",
];

/// Whether a request is about the configuration of admission itself.
pub(super) fn exempt(request: &Request<'_>) -> bool {
    request.gvr.group == GROUP && EXEMPT.contains(&request.gvr.resource.as_str())
}

/// Whether a request only asks something.
pub(super) fn review(request: &Request<'_>) -> bool {
    matches!(request.gvr.group.as_str(), "authentication.k8s.io" | "authorization.k8s.io")
        && REVIEWS.contains(&request.gvr.resource.as_str())
}

/// One rule.
struct Rule {
    operations: Vec<String>,
    groups: Vec<String>,
    versions: Vec<String>,
    /// Resource and subresource.
    resources: Vec<(String, String)>,
    scope: String,
    /// Names; empty for all.
    names: Vec<String>,
}

fn strings(value: &Value, field: &str) -> Vec<String> {
    list(value, field).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn admits(list: &[String], found: &str) -> bool {
    list.iter().any(|item| item == "*" || item == found)
}

impl Rule {
    fn new(value: &Value) -> Self {
        let split = |text: String| match text.split_once('/') {
            Some((resource, subresource)) => (resource.to_owned(), subresource.to_owned()),
            None => (text, String::new()),
        };
        Self {
            operations: strings(value, "operations"),
            groups: strings(value, "apiGroups"),
            versions: strings(value, "apiVersions"),
            resources: strings(value, "resources").into_iter().map(split).collect(),
            scope: text(value, "scope").to_owned(),
            names: strings(value, "resourceNames"),
        }
    }

    fn matches(&self, request: &Request<'_>, gvr: &Gvr) -> bool {
        let namespaced = !request.namespace.is_empty() && !request.is_namespace();
        let scope = match self.scope.as_str() {
            "Namespaced" => namespaced,
            "Cluster" => !namespaced,
            _ => true,
        };
        let resource = |(resource, subresource): &(String, String)| {
            (resource == "*" || *resource == gvr.resource) && (subresource == "*" || subresource == request.subresource)
        };
        scope
            && admits(&self.operations, request.operation.name())
            && admits(&self.groups, &gvr.group)
            && admits(&self.versions, &gvr.version)
            && self.resources.iter().any(resource)
            && (self.names.is_empty() || self.names.iter().any(|name| name == request.name))
    }
}

/// The version of its object a request is judged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Matched {
    /// Resource.
    pub(super) gvr: Gvr,
    /// Kind.
    pub(super) gvk: Gvk,
}

/// `matchResources` of policies and bindings, the like fields of webhooks.
pub(super) struct Matcher {
    rules: Vec<Rule>,
    excluded: Vec<Rule>,
    /// Without rules everything matches (bindings).
    open: bool,
    namespaces: Result<LabelSelector, String>,
    objects: Result<LabelSelector, String>,
    exact: bool,
}

impl Matcher {
    /// Of a policy or a binding.
    pub(super) fn of_policy(value: &Value) -> Self {
        let rules = |field| list(value, field).iter().map(Rule::new).collect();
        let rules_: Vec<Rule> = rules("resourceRules");
        Self {
            open: rules_.is_empty(),
            rules: rules_,
            excluded: rules("excludeResourceRules"),
            ..Self::selectors(value)
        }
    }

    /// Of a webhook.
    pub(super) fn of_webhook(value: &Value) -> Self {
        Self { rules: list(value, "rules").iter().map(Rule::new).collect(), ..Self::selectors(value) }
    }

    fn selectors(value: &Value) -> Self {
        let selector = |field: &str| match &value[field] {
            Value::Null => LabelSelector::from_value(Some(&serde_json::json!({}))),
            selector => LabelSelector::from_value(Some(selector)),
        };
        Self {
            rules: Vec::new(),
            excluded: Vec::new(),
            open: false,
            namespaces: selector("namespaceSelector").map_err(|e| e.to_string()),
            objects: selector("objectSelector").map_err(|e| e.to_string()),
            exact: value["matchPolicy"] == "Exact",
        }
    }

    /// The version in which a request is meant, `None` when it is not. Errors count only for what else matches.
    pub(super) fn matches(&self, request: &Request<'_>) -> Result<Option<Matched>, Status> {
        let namespaces = self.namespace_matches(request);
        if matches!(namespaces, Ok(false)) || matches!(self.object_matches(request), Ok(false)) {
            return Ok(None);
        }
        if self.by_rules(&self.excluded, request).is_some() {
            return Ok(None);
        }
        let found = match self.open {
            true => Some(Matched { gvr: request.gvr.clone(), gvk: request.shape.kind() }),
            false => self.by_rules(&self.rules, request),
        };
        if found.is_some() {
            namespaces?;
            self.object_matches(request)?;
        }
        Ok(found)
    }

    fn by_rules(&self, rules: &[Rule], request: &Request<'_>) -> Option<Matched> {
        if rules.is_empty() {
            return None;
        }
        if rules.iter().any(|rule| rule.matches(request, request.gvr)) {
            return Some(Matched { gvr: request.gvr.clone(), gvk: request.shape.kind() });
        }
        if self.exact {
            return None;
        }
        let others = request.shape.versions();
        let mut pairs = rules.iter().flat_map(|rule| others.iter().map(move |other| (rule, other)));
        let (_, (gvr, gvk)) = pairs.find(|(rule, (gvr, _))| rule.matches(request, gvr))?;
        Some(Matched { gvr: gvr.clone(), gvk: gvk.clone() })
    }

    fn namespace_matches(&self, request: &Request<'_>) -> Result<bool, Status> {
        let selector = self.namespaces.as_ref().map_err(Status::internal)?;
        if selector.is_everything() {
            return Ok(true);
        }
        if request.is_namespace() {
            if matches!(request.operation, Operation::Create | Operation::Update) && request.subresource.is_empty() {
                return Ok(selector.matches(&meta::labels_owned(request.object)));
            }
            return Ok(selector.matches(&meta::labels_owned(request.old)));
        }
        if request.namespace.is_empty() {
            return Ok(true);
        }
        let gvr = Gvr::new("", "v1", "namespaces");
        let namespace = request.objects.get(&gvr, "", request.namespace);
        let namespace = namespace.ok_or_else(|| Status::not_found(&gvr.group_resource(), request.namespace))?;
        let labels: std::collections::BTreeMap<String, String> =
            namespace.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Ok(selector.matches(&labels))
    }

    fn object_matches(&self, request: &Request<'_>) -> Result<bool, Status> {
        let selector = self.objects.as_ref().map_err(Status::internal)?;
        let selects = |object: &Value| object.is_object() && selector.matches(&meta::labels_owned(object));
        Ok(selector.is_everything() || selects(request.object) || selects(request.old))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::{Case, FakeObjects};

    async fn matched(value: Value, object: Value, operation: Operation) -> bool {
        struct Probe(Matcher, parking_lot::Mutex<bool>);
        impl crate::admission::Plugin for Probe {
            fn name(&self) -> &'static str {
                "Probe"
            }
            fn validate<'a>(
                &'a self,
                request: &'a mut Request<'_>,
            ) -> futures::future::BoxFuture<'a, Result<(), Status>> {
                *self.1.lock() = self.0.matches(request).unwrap().is_some();
                Box::pin(async { Ok(()) })
            }
        }
        let objects = FakeObjects::new([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "ns", "labels": {"team": "a"}}}),
        ]);
        let probe = Probe(Matcher::of_policy(&value), parking_lot::Mutex::new(false));
        let mut case = Case::create(object);
        case.operation = operation;
        case.run(&probe, &objects).await.unwrap();
        probe.1.into_inner()
    }

    #[tokio::test]
    async fn rules_and_selectors() {
        let map = || {
            json!({"apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": "c", "namespace": "ns", "labels": {"x": "1"}}})
        };
        let rule = |operation: &str, resource: &str| json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": [operation], "resources": [resource]});
        let with = |extra: Value| {
            let mut base = json!({"resourceRules": [rule("CREATE", "configmaps")]});
            for (key, value) in extra.as_object().unwrap() {
                base[key.as_str()] = value.clone();
            }
            base
        };
        for (value, want) in [
            (with(json!({})), true),
            (with(json!({"resourceRules": [rule("UPDATE", "configmaps")]})), false),
            (with(json!({"resourceRules": [rule("*", "*")]})), true),
            (with(json!({"resourceRules": [rule("*", "configmaps/status")]})), false),
            (with(json!({"resourceRules": [rule("*", "*/*")]})), true),
            (with(json!({"excludeResourceRules": [rule("*", "configmaps")]})), false),
            (with(json!({"namespaceSelector": {"matchLabels": {"team": "a"}}})), true),
            (with(json!({"namespaceSelector": {"matchLabels": {"team": "b"}}})), false),
            (with(json!({"objectSelector": {"matchLabels": {"x": "1"}}})), true),
            (with(json!({"objectSelector": {"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}})), false),
            (json!({}), true),
        ] {
            assert_eq!(matched(value.clone(), map(), Operation::Create).await, want, "{value}");
        }
        let named = json!({"resourceRules": [{"apiGroups": [""], "apiVersions": ["*"], "operations": ["CREATE"],
            "resources": ["configmaps"], "resourceNames": ["d"]}]});
        assert!(!matched(named, map(), Operation::Create).await);
        let cluster = json!({"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
            "resources": ["*"], "scope": "Cluster"}]});
        assert!(!matched(cluster.clone(), map(), Operation::Create).await);
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}});
        assert!(matched(cluster, namespace, Operation::Create).await);
    }

    #[tokio::test]
    async fn equivalent_versions() {
        let hpa = || {
            json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "h", "namespace": "ns"}})
        };
        let of = |policy: &str| {
            json!({"matchPolicy": policy, "resourceRules": [{"apiGroups": ["autoscaling"],
            "apiVersions": ["v1"], "operations": ["*"], "resources": ["horizontalpodautoscalers"]}]})
        };
        assert!(matched(of("Equivalent"), hpa(), Operation::Create).await);
        assert!(!matched(of("Exact"), hpa(), Operation::Create).await);
    }
}
