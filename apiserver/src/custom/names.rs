//! Which names of a CRD are accepted: `NamesAccepted` and `Established`.

use std::collections::HashSet;

use isopod_api::meta;
use serde_json::{Value, json};

/// A condition by type.
pub(crate) fn condition<'a>(crd: &'a Value, kind: &str) -> Option<&'a Value> {
    crd["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind)
}

/// Whether a condition is True.
pub(crate) fn holds(crd: &Value, kind: &str) -> bool {
    condition(crd, kind).is_some_and(|c| c["status"] == "True")
}

/// Sets a condition; its time changes with its status only.
pub(crate) fn set(status: &mut Value, kind: &str, state: bool, reason: &str, message: &str) {
    let text = if state { "True" } else { "False" };
    if !status["conditions"].is_array() {
        status["conditions"] = json!([]);
    }
    let Some(conditions) = status["conditions"].as_array_mut() else { return };
    let mut new = json!({"type": kind, "status": text, "lastTransitionTime": meta::now(), "reason": reason,
        "message": message});
    match conditions.iter_mut().find(|c| c["type"] == kind) {
        Some(old) => {
            if old["status"] == new["status"] {
                new["lastTransitionTime"] = old["lastTransitionTime"].clone();
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// Names other CRDs of a group have been given.
#[derive(Default)]
pub(super) struct Taken {
    resources: HashSet<String>,
    kinds: HashSet<String>,
}

impl Taken {
    /// By all CRDs of the group but one.
    pub(super) fn by_others(crds: &[Value], group: &str, but: &str) -> Self {
        let mut taken = Self::default();
        for crd in crds.iter().filter(|c| c["spec"]["group"] == group && meta::name(c) != but) {
            let names = &crd["status"]["acceptedNames"];
            let text = |key: &str| names[key].as_str().filter(|s| !s.is_empty()).map(str::to_owned);
            taken.resources.extend(["plural", "singular"].into_iter().filter_map(text));
            let short = names["shortNames"].as_array().into_iter().flatten().filter_map(Value::as_str);
            taken.resources.extend(short.map(str::to_owned));
            taken.kinds.extend(["kind", "listKind"].into_iter().filter_map(text));
        }
        taken
    }
}

/// The status a CRD should have, as far as its names go.
pub(super) fn accept(crd: &Value, taken: &Taken) -> Value {
    let mut status = crd["status"].clone();
    if !status.is_object() {
        status = json!({});
    }
    let (wanted, had) = (&crd["spec"]["names"], &crd["status"]["acceptedNames"]);
    let mut accepted = if had.is_object() { had.clone() } else { json!({}) };
    let mut refused: Option<(&str, String)> = None;
    for (field, reason, used) in [
        ("plural", "PluralConflict", &taken.resources),
        ("singular", "SingularConflict", &taken.resources),
        ("shortNames", "ShortNamesConflict", &taken.resources),
        ("kind", "KindConflict", &taken.kinds),
        ("listKind", "ListKindConflict", &taken.kinds),
    ] {
        let names: Vec<&str> = match &wanted[field] {
            Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
            other => other.as_str().into_iter().collect(),
        };
        let ours = |name: &str| match &had[field] {
            Value::Array(names) => names.iter().any(|n| n == name),
            other => other == name,
        };
        let clashes: Vec<String> = names
            .iter()
            .filter(|n| !ours(n) && used.contains(**n))
            .map(|n| format!("\"{n}\" is already in use"))
            .collect();
        match clashes.as_slice() {
            [] => copy(&mut accepted, field, wanted),
            [one] => refused = Some((reason, one.clone())),
            many => refused = Some((reason, format!("[{}]", many.join(", ")))),
        }
    }
    copy(&mut accepted, "categories", wanted);
    for field in ["plural", "kind"] {
        if !accepted[field].is_string() {
            accepted[field] = "".into();
        }
    }
    status["acceptedNames"] = accepted;
    let established = condition(crd, "Established").is_some_and(|c| c["status"] == "True");
    match refused {
        Some((reason, message)) => {
            set(&mut status, "NamesAccepted", false, reason, &message);
            if !established {
                set(&mut status, "Established", false, "NotAccepted", "not all names are accepted");
            }
        }
        None => {
            set(&mut status, "NamesAccepted", true, "NoConflicts", "no conflicts found");
            if !established {
                let message = "the initial names have been accepted";
                set(&mut status, "Established", true, "InitialNamesAccepted", message);
            }
        }
    }
    approve(crd, &mut status);
    status
}

fn copy(accepted: &mut Value, field: &str, from: &Value) {
    match from.get(field).filter(|v| !v.is_null()) {
        Some(value) => accepted[field] = value.clone(),
        None => drop(accepted.as_object_mut().and_then(|a| a.shift_remove(field))),
    }
}

/// Groups of the project itself say whether they are approved.
fn approve(crd: &Value, status: &mut Value) {
    let group = crd["spec"]["group"].as_str().unwrap_or_default();
    if !["k8s.io", "kubernetes.io"].iter().any(|d| group == *d || group.ends_with(&format!(".{d}"))) {
        return;
    }
    let key = "api-approved.kubernetes.io";
    let value = meta::annotation(crd, key).unwrap_or_default();
    let protected = "protected groups must have approval annotation \"api-approved.kubernetes.io\"";
    let see = "see https://github.com/kubernetes/enhancements/pull/1111";
    let (state, reason, message) = if value.is_empty() {
        (false, "MissingAnnotation", format!("{protected}, {see}"))
    } else if value.starts_with("unapproved") {
        (false, "UnapprovedAnnotation", format!("not approved: {value:?}"))
    } else if value.contains("://") {
        (true, "ApprovedAnnotation", format!("approved in {value}"))
    } else {
        (
            false,
            "InvalidAnnotation",
            format!("{protected} with either a URL or a reason starting with \"unapproved\", {see}"),
        )
    };
    set(status, "KubernetesAPIApprovalPolicyConformant", state, reason, &message);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd(plural: &str, kind: &str) -> Value {
        json!({"metadata": {"name": format!("{plural}.g")}, "spec": {"group": "g", "names": {"plural": plural,
            "singular": kind.to_lowercase(), "kind": kind, "listKind": format!("{kind}List"), "shortNames": ["tt"]}}})
    }

    #[test]
    fn conflicts() {
        let mut one = crd("things", "Thing");
        one["status"] = accept(&one, &Taken::default());
        assert!(holds(&one, "Established") && holds(&one, "NamesAccepted"));
        let crds = [one.clone()];
        let two = crd("widgets", "Thing");
        let status = accept(&two, &Taken::by_others(&crds, "g", "widgets.g"));
        assert_eq!(status["conditions"][0]["reason"], "ListKindConflict");
        assert_eq!(status["conditions"][1]["reason"], "NotAccepted");
        assert_eq!(status["acceptedNames"], json!({"plural": "widgets", "kind": ""}));
        assert_eq!(accept(&one, &Taken::by_others(&crds, "g", "things.g")), one["status"], "stable");
    }
}
