//! Roles, ClusterRoles and their bindings.

use isopod_api::{field::ErrorList, names};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, same, selector},
};

const GROUP: &str = "rbac.authorization.k8s.io";

/// `roles` and `clusterroles`.
pub(crate) struct Role {
    /// Cluster roles may name non-resource URLs and aggregate others.
    pub(crate) cluster: bool,
}

/// `rolebindings` and `clusterrolebindings`.
pub(crate) struct RoleBinding {
    /// Cluster role bindings only name cluster roles.
    pub(crate) cluster: bool,
}

impl Strategy for Role {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        for rule in At::field(obj, "rules").items() {
            policy_rule(&mut e, &rule, !self.cluster);
        }
        let aggregation = At::field(obj, "aggregationRule");
        if self.cluster && aggregation.is_set() {
            let selectors = aggregation.get("clusterRoleSelectors");
            if selectors.len() == 0 {
                e.required(&selectors, "at least one clusterRoleSelector required if aggregationRule is non-nil");
            }
            for item in selectors.items() {
                selector::label_selector(&mut e, &item);
            }
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, _old: &Value) -> ErrorList {
        // Upstream validates the new role twice.
        [self.validate(cx, new), self.validate(cx, new)].concat()
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }
}

fn policy_rule(e: &mut Errs, at: &At<'_>, namespaced: bool) {
    let list = |field: &str| at.get(field);
    if list("verbs").len() == 0 {
        e.required(&list("verbs"), "verbs must contain at least one value");
    }
    let urls = list("nonResourceURLs");
    if urls.len() > 0 {
        if namespaced {
            e.invalid(&urls, "namespaced rules cannot apply to non-resource URLs");
        }
        if list("apiGroups").len() > 0 || list("resources").len() > 0 || list("resourceNames").len() > 0 {
            e.invalid(&urls, "rules cannot apply to both regular resources and non-resource URLs");
        }
        return;
    }
    if list("apiGroups").len() == 0 {
        e.required(&list("apiGroups"), "resource rules must supply at least one api group");
    }
    if list("resources").len() == 0 {
        e.required(&list("resources"), "resource rules must supply at least one resource");
    }
}

impl Strategy for RoleBinding {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let role = At::field(obj, "roleRef");
        let group = role.get("apiGroup");
        if group.s() != GROUP {
            e.unsupported(&group, &[GROUP]);
        }
        e.one_of(&role.get("kind"), if self.cluster { &["ClusterRole"] } else { &["Role", "ClusterRole"] });
        let name = role.get("name");
        if name.s().is_empty() {
            e.required(&name, "");
        } else {
            e.messages(&name, names::path_segment(name.s()));
        }
        for subject in At::field(obj, "subjects").items() {
            self.subject(&mut e, &subject);
        }
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs([self.validate(cx, new), self.validate(cx, new)].concat());
        if !same(&new["roleRef"], &old["roleRef"]) {
            let internal = json!({"APIGroup": new["roleRef"]["apiGroup"], "Kind": new["roleRef"]["kind"], "Name": new["roleRef"]["name"]});
            e.invalid_as(&At::field(new, "roleRef"), internal, "cannot change roleRef");
        }
        e.0
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let subjects = |kind: &str, separator: &str| {
            let all: Vec<String> = obj["subjects"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|s| s["kind"] == kind)
                .map(|s| match text(&s["namespace"]) {
                    namespace if kind == "ServiceAccount" && !namespace.is_empty() => {
                        format!("{namespace}/{}", text(&s["name"]))
                    }
                    _ => text(&s["name"]),
                })
                .collect();
            json!(all.join(separator))
        };
        vec![
            table::name(obj),
            json!(format!("{}/{}", text(&obj["roleRef"]["kind"]), text(&obj["roleRef"]["name"]))),
            table::age(obj, now),
            subjects("User", ", "),
            subjects("Group", ", "),
            subjects("ServiceAccount", ", "),
        ]
    }
}

impl RoleBinding {
    fn subject(&self, e: &mut Errs, at: &At<'_>) {
        let (kind, name, group, namespace) = (at.get("kind"), at.get("name"), at.get("apiGroup"), at.get("namespace"));
        if name.s().is_empty() {
            e.required(&name, "");
        }
        match kind.s() {
            "ServiceAccount" => {
                if !name.s().is_empty() {
                    e.dns_subdomain(&name);
                }
                if !group.s().is_empty() {
                    e.unsupported(&group, &[""]);
                }
                if self.cluster && namespace.s().is_empty() {
                    e.required(&namespace, "");
                }
            }
            "User" | "Group" => {
                if group.s() != GROUP {
                    e.unsupported(&group, &[GROUP]);
                }
            }
            _ => e.unsupported(&kind, &["ServiceAccount", "User", "Group"]),
        }
    }
}
