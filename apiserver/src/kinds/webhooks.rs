//! Webhook configurations.

use isopod_api::{field::ErrorList, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::expressions;
use crate::{
    cel::admission::{self, Offers},
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, selector},
};

/// `validatingwebhookconfigurations` and `mutatingwebhookconfigurations`.
pub(crate) struct WebhookConfiguration {
    /// Mutating webhooks can be reinvoked.
    pub(crate) mutating: bool,
}

impl Strategy for WebhookConfiguration {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let list = At::field(obj, "webhooks");
        let mut seen = Vec::new();
        for at in list.items() {
            self.webhook(&mut e, &at);
            let name = at.get("name");
            if seen.contains(&name.s()) {
                e.duplicate(&name, name.s());
            }
            seen.push(name.s());
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), json!(table::count(&obj["webhooks"])), table::age(obj, now)]
    }
}

impl WebhookConfiguration {
    fn webhook(&self, e: &mut Errs, at: &At<'_>) {
        let name = at.get("name");
        fully_qualified(e, &name);
        for rule in at.get("rules").items() {
            rule_with_operations(e, &rule);
        }
        e.one_of_if_set(&at.get("failurePolicy"), &["Fail", "Ignore"]);
        e.one_of_if_set(&at.get("matchPolicy"), &["Equivalent", "Exact"]);
        let effects = at.get("sideEffects");
        if !effects.is_set() {
            e.required(&effects, "must specify one of None, NoneOnDryRun");
        } else {
            e.one_of(&effects, &["None", "NoneOnDryRun"]);
        }
        let seconds = at.get("timeoutSeconds");
        if seconds.int().is_some_and(|n| !(1..=30).contains(&n)) {
            e.invalid(&seconds, "the timeout value must be between 1 and 30 seconds");
        }
        selector::label_selector(e, &at.get("namespaceSelector"));
        selector::label_selector(e, &at.get("objectSelector"));
        if self.mutating {
            e.one_of_if_set(&at.get("reinvocationPolicy"), &["IfNeeded", "Never"]);
        }
        client_config(e, &at.get("clientConfig"));
        review_versions(e, &at.get("admissionReviewVersions"));
        let conditions = at.get("matchConditions");
        if conditions.len() > 0 {
            let offers = Offers { params: false, authorizer: true };
            expressions::match_conditions(e, &conditions, &admission::environment(offers));
        }
    }
}

fn fully_qualified(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        return e.required(at, "");
    }
    let messages = names::dns1123_subdomain(at.s());
    if messages.is_empty() && at.s().split('.').count() < 3 {
        return e.invalid(at, "should be a domain with at least three segments separated by dots");
    }
    e.messages(at, messages);
}

fn review_versions(e: &mut Errs, at: &At<'_>) {
    let versions = at.strings();
    if versions.is_empty() {
        return e.required(at, "must specify one of v1, v1beta1");
    }
    let mut seen = Vec::new();
    for item in at.items() {
        if seen.contains(&item.s()) {
            e.invalid(&item, "duplicate version");
        }
        e.messages(&item, names::dns1035_label(item.s()));
        seen.push(item.s());
    }
    if !versions.iter().any(|v| ["v1", "v1beta1"].contains(v)) {
        e.invalid(at, "must include at least one of v1, v1beta1");
    }
}

/// `clientConfig`: a URL or a service.
pub(crate) fn client_config(e: &mut Errs, at: &At<'_>) {
    let (url, service) = (at.get("url"), at.get("service"));
    if url.is_set() == service.is_set() {
        return e.required(at, "exactly one of url or service is required");
    }
    if url.is_set() {
        https_url(e, &url);
        return;
    }
    for field in ["name", "namespace"] {
        let field = service.get(field);
        if field.s().is_empty() {
            e.required(&field, "");
        }
    }
    let port = service.get("port");
    if port.is_set() && !(1..=65535).contains(&port.int0()) {
        e.invalid(&port, "port is not valid: must be between 1 and 65535, inclusive");
    }
    service_path(e, &service.get("path"));
}

fn service_path(e: &mut Errs, at: &At<'_>) {
    let path = at.s();
    if path.is_empty() || path == "/" {
        return;
    }
    if !path.starts_with('/') {
        e.invalid(at, "must start with a '/'");
    }
    // Upstream leaves the first character out, whatever it is.
    let inner: String = path.chars().skip(1).collect();
    for (i, step) in inner.strip_suffix('/').unwrap_or(&inner).split('/').enumerate() {
        if step.is_empty() {
            e.invalid(at, &format!("segment[{i}] may not be empty"));
            continue;
        }
        for message in names::dns1123_subdomain(step) {
            e.invalid(at, &format!("segment[{i}]: {message}"));
        }
    }
}

fn https_url(e: &mut Errs, at: &At<'_>) {
    const FORM: &str = "desired format: https://host[/path]";
    let (rest, fragment) = at.s().split_once('#').unwrap_or((at.s(), ""));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    if rest.starts_with(':') {
        let error = format!("parse {:?}: missing protocol scheme", at.s());
        return e.required(at, &format!("url must be a valid URL: {error}; {FORM}"));
    }
    let is_scheme = |s: &str| {
        s.starts_with(|c: char| c.is_ascii_alphabetic())
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    };
    let (scheme, rest) = rest.split_once(':').filter(|(scheme, _)| is_scheme(scheme)).unwrap_or(("", rest));
    let authority = rest.strip_prefix("//").and_then(|r| r.split('/').next()).unwrap_or_default();
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "https" {
        e.invalid_as(at, scheme, &format!("'https' is the only allowed URL scheme; {FORM}"));
    }
    if host.is_empty() {
        e.invalid_as(at, "", &format!("host must be specified; {FORM}"));
    }
    if let Some(user) = user {
        e.invalid_as(at, user, "user information is not permitted in the URL");
    }
    if !fragment.is_empty() {
        e.invalid_as(at, fragment, "fragments are not permitted in the URL");
    }
    if !query.is_empty() {
        e.invalid_as(at, query, "query parameters are not permitted in the URL");
    }
}

/// A rule of webhooks and policies.
pub(crate) fn rule_with_operations(e: &mut Errs, at: &At<'_>) {
    let operations = at.get("operations");
    if operations.len() == 0 {
        e.required(&operations, "");
    }
    if operations.len() > 1 && operations.strings().contains(&"*") {
        e.invalid(&operations, "if '*' is present, must not specify other operations");
    }
    for operation in operations.items() {
        e.one_of(&operation, &["*", "CONNECT", "CREATE", "DELETE", "UPDATE"]);
    }
    for (field, what) in [("apiGroups", "API groups"), ("apiVersions", "API versions")] {
        let list = at.get(field);
        if list.len() == 0 {
            e.required(&list, "");
        }
        if list.len() > 1 && list.strings().contains(&"*") {
            e.invalid(&list, &format!("if '*' is present, must not specify other {what}"));
        }
        if field == "apiVersions" {
            for item in list.items() {
                if item.s().is_empty() {
                    e.required(&item, "");
                }
            }
        }
    }
    resources(e, &at.get("resources"));
    e.one_of_if_set(&at.get("scope"), &["*", "Cluster", "Namespaced"]);
}

fn resources(e: &mut Errs, at: &At<'_>) {
    let all = at.strings();
    if all.is_empty() {
        e.required(at, "");
    }
    let (mut any_below, mut below_any, mut plain) = (Vec::new(), Vec::new(), false);
    for item in at.items() {
        let text = item.s();
        if text.is_empty() {
            e.required(&item, "");
            continue;
        }
        let Some((resource, below)) = text.split_once('/') else {
            // Like upstream: the last one counts.
            plain = text != "*";
            continue;
        };
        if any_below.contains(&resource) {
            e.invalid(&item, &format!("if '{resource}/*' is present, must not specify {text}"));
        }
        if below_any.contains(&below) {
            e.invalid(&item, &format!("if '*/{below}' is present, must not specify {text}"));
        }
        if below == "*" {
            any_below.push(resource);
        }
        if resource == "*" {
            below_any.push(below);
        }
    }
    if all.contains(&"*/*") && all.len() > 1 {
        e.invalid(at, "if '*/*' is present, must not specify other resources");
    }
    if all.contains(&"*") && plain {
        e.invalid(at, "if '*' is present, must not specify other resources without subresources");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_of_rules() {
        for (list, want) in [
            (json!(["pods", "pods/status"]), ""),
            (json!(["*/*", "pods"]), "if '*/*' is present, must not specify other resources"),
            (json!(["*", "pods"]), "if '*' is present, must not specify other resources without subresources"),
            (json!(["pods/*", "pods/status"]), "if 'pods/*' is present, must not specify pods/status"),
            (json!(["*/status", "pods/status"]), "if '*/status' is present, must not specify pods/status"),
        ] {
            let (mut e, obj) = (Errs::new(), json!({ "resources": list }));
            resources(&mut e, &At::field(&obj, "resources"));
            let found: Vec<String> = e.0.into_iter().map(|error| error.detail).collect();
            assert_eq!(found.join("; "), want, "{obj}");
        }
    }

    #[test]
    fn where_a_webhook_is() {
        const FORM: &str = "; desired format: https://host[/path]";
        let https = format!("'https' is the only allowed URL scheme{FORM}");
        let host = format!("host must be specified{FORM}");
        let segment = |i: usize| format!("segment[{i}] may not be empty");
        for (config, want) in [
            (json!({"url": "https://a.b:1/c"}), vec![]),
            (json!({"url": "a.b/c"}), vec![https.clone(), host.clone()]),
            (json!({"url": "http:a"}), vec![https, host]),
            (
                json!({"url": "https://u:p@a?b=c#d"}),
                vec![
                    "user information is not permitted in the URL".into(),
                    "fragments are not permitted in the URL".into(),
                    "query parameters are not permitted in the URL".into(),
                ],
            ),
            (
                json!({"url": ":a"}),
                vec![format!("url must be a valid URL: parse \":a\": missing protocol scheme{FORM}")],
            ),
            (json!({"service": {"name": "a", "namespace": "b", "path": "/"}}), vec![]),
            (json!({"service": {"name": "a", "namespace": "b", "path": "//"}}), vec![segment(0)]),
            (json!({"service": {"name": "a", "namespace": "b", "path": "/c//d/"}}), vec![segment(1)]),
        ] {
            let (mut e, obj) = (Errs::new(), json!({ "clientConfig": config }));
            client_config(&mut e, &At::field(&obj, "clientConfig"));
            let found: Vec<String> = e.0.into_iter().map(|error| error.detail).collect();
            assert_eq!(found, want, "{obj}");
        }
    }
}
