//! Nobody may grant what he does not hold: the check on writes of roles and bindings.

use isopod_api::status::Status;
use serde_json::Value;

use super::{
    Attributes, Decision,
    rbac::{GROUP, Policy, gvr},
    rule::{Rule, compacted, quoted, uncovered},
};
use crate::{authn::UserInfo, objects::Objects};

/// One write of a role or binding.
pub struct Write<'a> {
    /// `roles`, `clusterroles`, `rolebindings` or `clusterrolebindings`.
    pub resource: &'a str,
    /// Namespace or empty.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// Who.
    pub user: &'a UserInfo,
    /// What is to be stored.
    pub new: &'a Value,
    /// What is stored, null on create.
    pub old: &'a Value,
}

impl Write<'_> {
    /// Refuses the write if it would give somebody more than the writer has.
    pub fn check(&self, objects: &dyn Objects) -> Result<(), Status> {
        if self.user.in_group("system:masters") {
            return Ok(());
        }
        let policy = Policy::build(objects, &Policy::default());
        if self.resource.ends_with("bindings") { self.binding(&policy, objects) } else { self.role(&policy) }
    }

    fn unchanged(&self, fields: &[&str]) -> bool {
        !self.old.is_null() && fields.iter().all(|field| self.new.get(field) == self.old.get(field))
    }

    fn may(&self, policy: &Policy, verb: &str, resource: &str, name: &str) -> bool {
        let attributes = Attributes {
            user: self.user.clone(),
            verb: verb.into(),
            resource_request: true,
            group: GROUP.into(),
            version: "v1".into(),
            resource: resource.into(),
            namespace: self.namespace.into(),
            name: name.into(),
            ..Attributes::default()
        };
        matches!(policy.authorize(&attributes), Decision::Allow(_))
    }

    fn role(&self, policy: &Policy) -> Result<(), Status> {
        if self.unchanged(&["rules", "aggregationRule"]) || self.may(policy, "escalate", self.resource, self.name) {
            return Ok(());
        }
        let aggregates =
            self.new["aggregationRule"].is_object() && self.new["aggregationRule"] != self.old["aggregationRule"];
        let mut wanted = Rule::list(&self.new["rules"]);
        if aggregates {
            // Whatever roles there will be: only who may do everything may collect them.
            let star = || vec!["*".to_owned()];
            wanted.push(Rule { verbs: star(), api_groups: star(), resources: star(), ..Rule::default() });
            wanted.push(Rule { verbs: star(), non_resource_urls: star(), ..Rule::default() });
        }
        self.confirm(policy, &wanted)
    }

    fn binding(&self, policy: &Policy, objects: &dyn Objects) -> Result<(), Status> {
        if self.unchanged(&["roleRef", "subjects"]) {
            return Ok(());
        }
        let kind = self.new["roleRef"]["kind"].as_str().unwrap_or_default();
        let name = self.new["roleRef"]["name"].as_str().unwrap_or_default();
        let (resource, namespace) =
            if kind == "ClusterRole" { ("clusterroles", "") } else { ("roles", self.namespace) };
        if self.may(policy, "bind", resource, name) {
            return Ok(());
        }
        let Some(role) = objects.get(&gvr(resource), namespace, name) else {
            return Err(Status::not_found(&gvr(self.resource).group_resource(), name));
        };
        self.confirm(policy, &Rule::list(&role.value()["rules"]))
    }

    fn confirm(&self, policy: &Policy, wanted: &[Rule]) -> Result<(), Status> {
        let missing = uncovered(&policy.rules_of(self.user, self.namespace), wanted);
        if missing.is_empty() {
            return Ok(());
        }
        let missing: Vec<String> = compacted(missing).iter().map(Rule::compact).collect();
        let message = format!(
            "user {} (groups={}) is attempting to grant RBAC permissions not currently held:\n{}",
            isopod_api::text::quote(&self.user.name),
            quoted(&self.user.groups),
            missing.join("\n")
        );
        Err(Status::forbidden(&gvr(self.resource).group_resource(), self.name, message))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::FakeObjects;

    fn cluster() -> FakeObjects {
        let role = |kind: &str, name: &str, namespace: Value, rules: Value| {
            json!({"apiVersion": format!("{GROUP}/v1"), "kind": kind,
                "metadata": {"name": name, "namespace": namespace}, "rules": rules})
        };
        let all = json!([{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}, {"verbs": ["*"], "nonResourceURLs": ["*"]}]);
        FakeObjects::new([
            role("ClusterRole", "cluster-admin", Value::Null, all),
            role(
                "Role",
                "mine",
                "ns".into(),
                json!([
                    {"verbs": ["get"], "apiGroups": [""], "resources": ["configmaps"]},
                    {"verbs": ["bind"], "apiGroups": [GROUP], "resources": ["clusterroles"], "resourceNames": ["free"]},
                ]),
            ),
            role(
                "ClusterRole",
                "free",
                Value::Null,
                json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["nodes"]}]),
            ),
            json!({"apiVersion": format!("{GROUP}/v1"), "kind": "RoleBinding",
                "metadata": {"name": "b", "namespace": "ns"},
                "roleRef": {"kind": "Role", "name": "mine"}, "subjects": [{"kind": "User", "name": "u"}]}),
        ])
    }

    fn check(resource: &str, new: Value) -> Result<(), String> {
        let user = UserInfo { name: "u".into(), groups: vec!["system:authenticated".into()], ..UserInfo::default() };
        let write = Write { resource, namespace: "ns", name: "x", user: &user, new: &new, old: &Value::Null };
        write.check(&cluster()).map_err(|status| status.message)
    }

    #[test]
    fn roles_may_hold_what_the_writer_holds() {
        let role = |resource: &str| json!({"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]});
        assert_eq!(check("roles", role("configmaps")), Ok(()));
        assert_eq!(
            check("roles", role("secrets")),
            Err("roles.rbac.authorization.k8s.io \"x\" is forbidden: user \"u\" (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"secrets\"], Verbs:[\"get\"]}".into())
        );
    }

    #[test]
    fn bindings_need_the_roles_rights_or_bind() {
        let to = |kind: &str, name: &str| json!({"roleRef": {"kind": kind, "name": name}, "subjects": []});
        assert_eq!(check("rolebindings", to("Role", "mine")), Ok(()));
        assert_eq!(check("rolebindings", to("ClusterRole", "free")), Ok(()));
        assert_eq!(
            check("rolebindings", to("Role", "missing")),
            Err("rolebindings.rbac.authorization.k8s.io \"missing\" not found".into())
        );
        let error = check("rolebindings", to("ClusterRole", "cluster-admin")).unwrap_err();
        assert!(
            error.ends_with(
                "\n{APIGroups:[\"*\"], Resources:[\"*\"], Verbs:[\"*\"]}\n{NonResourceURLs:[\"*\"], Verbs:[\"*\"]}"
            ),
            "{error}"
        );
    }
}
