//! Pod templates and the selectors of the workloads that own them.

use serde_json::Value;

use super::{At, Errs, meta, pod_annotations, pod_spec::pod_spec, selector};

/// A pod template at `at` (`spec.template`): labels, annotations and the spec.
pub(crate) fn pod_template(e: &mut Errs, at: &At<'_>) {
    template_metadata(e, at);
    let spec = at.get("spec");
    pod_spec(e, &spec, None);
    pod_annotations::agree(e, &at.get("metadata.annotations"), &spec);
    let ephemeral = spec.get("ephemeralContainers");
    if ephemeral.len() > 0 {
        e.forbidden(&ephemeral, "ephemeral containers not allowed in pod template");
    }
}

/// Labels and annotations of a pod template.
pub(crate) fn template_metadata(e: &mut Errs, at: &At<'_>) {
    meta::template_meta(e, at);
    pod_annotations::annotations(e, &at.get("metadata.annotations"), &at.get("spec"));
}

/// `spec.selector` and that it matches the template's labels; returns whether the selector is usable.
pub(crate) fn selector_and_template(e: &mut Errs, spec: &At<'_>, kind: &str) {
    let selector_at = spec.get("selector");
    if !selector_at.is_set() {
        e.required(&selector_at, "");
    } else {
        selector::label_selector(e, &selector_at);
        if selector::is_empty(&selector_at) {
            e.invalid(&selector_at, &format!("empty selector is invalid for {kind}"));
        }
    }
}

/// The template's labels must match the selector (which is known to parse).
pub(crate) fn labels_match(e: &mut Errs, template: &At<'_>, matches: bool) {
    if !matches {
        let labels = template.get("metadata.labels");
        let shown = if labels.is_set() { sorted(labels.v) } else { Value::Null };
        e.invalid_as(&labels, shown, "`selector` does not match template `labels`");
    }
}

/// A map with its keys in order, as Go prints maps.
pub(crate) fn sorted(v: &Value) -> Value {
    match v {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.cmp(b.0));
            Value::Object(entries.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect())
        }
        other => other.clone(),
    }
}

/// The template of a ReplicaSet-like owner: matching labels, the spec, restartPolicy Always, no deadline.
pub(crate) fn for_replicas(e: &mut Errs, spec: &At<'_>) {
    let template = spec.get("template");
    if matching_labels(e, spec, "invalid label selector") {
        pod_template(e, &template);
        always(e, &template, "ReplicaSet");
    }
}

/// Whether the selector can be used; the template's labels must match it.
pub(crate) fn matching_labels(e: &mut Errs, spec: &At<'_>, detail: &str) -> bool {
    let (selector_at, template) = (spec.get("selector"), spec.get("template"));
    let Some(matched) = selector::matches(selector_at.v, template.get("metadata.labels").v) else {
        e.invalid(&selector_at, detail);
        return false;
    };
    if !selector_at.is_set() || (!selector::is_empty(&selector_at) && !matched) {
        labels_match(e, &template, false);
    }
    true
}

/// restartPolicy must be Always and there must be no activeDeadlineSeconds.
pub(crate) fn always(e: &mut Errs, template: &At<'_>, kind: &str) {
    let policy = template.get("spec.restartPolicy");
    if !policy.s().is_empty() && policy.s() != "Always" {
        e.unsupported(&policy, &["Always"]);
    }
    let deadline = template.get("spec.activeDeadlineSeconds");
    if deadline.is_set() {
        e.forbidden(&deadline, &format!("activeDeadlineSeconds in {kind} is not Supported"));
    }
}
