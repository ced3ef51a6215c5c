//! The params of a policy: which objects a binding means.

use std::sync::Arc;

use isopod_api::{gvk::Gvr, selector::LabelSelector};
use serde_json::Value;

use super::compiled::{Binding, Policy};
use crate::{admission::Request, objects::Objects};

/// The resource of a policy's params.
pub(super) struct Kind {
    gvr: Gvr,
    namespaced: bool,
}

/// The resource of a policy's params; `None` without params.
pub(super) fn kind(objects: &dyn Objects, policy: &Policy) -> Result<Option<Kind>, String> {
    let Some(gvk) = &policy.param_kind else { return Ok(None) };
    match objects.resource_of(gvk) {
        Some((gvr, namespaced)) => Ok(Some(Kind { gvr, namespaced })),
        None => Err(format!(
            "failed to find resource referenced by paramKind: '{}, Kind={}'",
            match gvk.group.as_str() {
                "" => format!("/{}", gvk.version),
                _ => gvk.api_version(),
            },
            gvk.kind
        )),
    }
}

/// The params to evaluate with: none at all when they are missing and may be, `None` when the policy runs without.
pub(super) fn collect(
    request: &Request<'_>,
    kind: Option<&Kind>,
    binding: &Binding,
) -> Result<Vec<Option<Arc<Value>>>, String> {
    let (Some(kind), Some(wanted)) = (kind, &binding.param) else { return Ok(vec![None]) };
    let namespace = match (kind.namespaced, wanted.namespace.as_str()) {
        (true, "") if request.namespace.is_empty() => {
            return Err("cannot use namespaced paramRef in policy binding that matches cluster-scoped resources".into());
        }
        (true, "") => request.namespace,
        (_, namespace) => namespace,
    };
    if !kind.namespaced && !namespace.is_empty() {
        return Err("paramRef.namespace must not be provided for a cluster-scoped `paramKind`".into());
    }
    let found: Vec<Value> = if wanted.name.is_empty() {
        let selector = wanted.selector.as_ref().map_err(Clone::clone)?;
        if matches!(selector, LabelSelector::Nothing) {
            return Err("one of name or selector must be provided".into());
        }
        let all = request.objects.list(&kind.gvr, namespace);
        let labels = |object: &crate::objects::Object| -> std::collections::BTreeMap<String, String> {
            object.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let selected = all.iter().filter(|object| selector.matches(&labels(object)));
        selected.map(|object| request.objects.served(&kind.gvr, object)).collect()
    } else {
        let object = request.objects.get(&kind.gvr, namespace, &wanted.name);
        object.iter().map(|object| request.objects.served(&kind.gvr, object)).collect()
    };
    if found.is_empty() && wanted.deny_missing {
        return Err("no params found for policy binding with `Deny` parameterNotFoundAction".into());
    }
    Ok(found.into_iter().map(|value| Some(Arc::new(value))).collect())
}
