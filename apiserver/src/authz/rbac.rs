//! RBAC: roles and bindings compiled into an index by subject, kept in step with the cache by its generations.
//!
//! A change of any of the four resources makes a new index, but only objects whose revision has changed are parsed again,
//! so that the cost of a change is one parse and the moving of pointers.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwap;
use isopod_api::{gvk::Gvr, selector::LabelSelector};
use serde_json::Value;

use super::{Attributes, Decision, rule::Rule};
use crate::{
    authn::UserInfo,
    objects::{Object, Objects},
};

/// API group of RBAC.
pub const GROUP: &str = "rbac.authorization.k8s.io";

/// A resource of the RBAC group.
pub(crate) fn gvr(resource: &str) -> Gvr {
    Gvr::new(GROUP, "v1", resource)
}

/// A role, parsed.
#[derive(Debug)]
struct Role {
    revision: u64,
    rules: Arc<[Rule]>,
    /// Selectors of an aggregated role.
    aggregation: Vec<LabelSelector>,
}

/// A subject of a binding as requests carry it.
#[derive(Debug)]
enum Subject {
    User(String),
    Group(String),
}

/// A binding, parsed.
#[derive(Debug)]
struct Binding {
    revision: u64,
    /// Subject with the text that names it in reasons.
    subjects: Vec<(Subject, String)>,
    role_kind: String,
    role_name: String,
}

impl Role {
    fn parse(object: &Object) -> Self {
        let value = object.value();
        let selectors = value["aggregationRule"]["clusterRoleSelectors"].as_array();
        let aggregation =
            selectors.into_iter().flatten().filter_map(|s| LabelSelector::from_value(Some(s)).ok()).collect();
        Self { revision: object.revision, rules: Rule::list(&value["rules"]).into(), aggregation }
    }
}

impl Binding {
    fn parse(object: &Object) -> Self {
        let value = object.value();
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let subjects = value["subjects"].as_array().into_iter().flatten().filter_map(|subject| {
            let (kind, name) = (text(subject, "kind"), text(subject, "name"));
            match kind.as_str() {
                "User" => Some((Subject::User(name.clone()), format!("User {name:?}"))),
                "Group" => Some((Subject::Group(name.clone()), format!("Group {name:?}"))),
                "ServiceAccount" => {
                    let named = text(subject, "namespace");
                    let namespace = if named.is_empty() { object.namespace.to_string() } else { named };
                    let label = format!("ServiceAccount \"{name}/{namespace}\"");
                    Some((Subject::User(format!("system:serviceaccount:{namespace}:{name}")), label))
                }
                _ => None,
            }
        });
        Self {
            revision: object.revision,
            subjects: subjects.collect(),
            role_kind: text(&value["roleRef"], "kind"),
            role_name: text(&value["roleRef"], "name"),
        }
    }
}

/// What one binding gives one subject.
#[derive(Debug, Clone)]
struct Grant {
    /// Position of the binding, so that reasons do not depend on the order of hashing.
    order: u32,
    reason: Arc<str>,
    rules: Arc<[Rule]>,
}

type Key = (String, String);

/// Grants by who has them.
#[derive(Debug, Default)]
struct Index {
    users: HashMap<String, Vec<Grant>>,
    groups: HashMap<String, Vec<Grant>>,
}

impl Index {
    fn add(&mut self, subject: &Subject, grant: Grant) {
        let (map, name) = match subject {
            Subject::User(name) => (&mut self.users, name),
            Subject::Group(name) => (&mut self.groups, name),
        };
        map.entry(name.clone()).or_default().push(grant);
    }

    fn of<'a>(&'a self, user: &'a UserInfo) -> impl Iterator<Item = &'a Grant> {
        let own = self.users.get(&user.name).into_iter();
        own.chain(user.groups.iter().filter_map(|group| self.groups.get(group))).flatten()
    }
}

/// All roles and bindings at one moment.
#[derive(Debug, Default)]
pub struct Policy {
    generations: [u64; 4],
    roles: HashMap<Key, Arc<Role>>,
    bindings: HashMap<Key, Arc<Binding>>,
    cluster: Index,
    namespaces: HashMap<String, Index>,
}

fn key(object: &Object) -> Key {
    (object.namespace.to_string(), object.name.to_string())
}

/// Asked on every request, so the names are made once.
fn generations(objects: &dyn Objects) -> [u64; 4] {
    static RESOURCES: OnceLock<[Gvr; 4]> = OnceLock::new();
    let resources = RESOURCES.get_or_init(|| ["clusterroles", "roles", "clusterrolebindings", "rolebindings"].map(gvr));
    resources.each_ref().map(|resource| objects.generation(resource))
}

impl Policy {
    /// The policy as it is now, taking what has not changed from `old`.
    pub fn build(objects: &dyn Objects, old: &Policy) -> Self {
        // Read before the lists: a change in between makes the next request build again.
        let generations = generations(objects);
        let mut roles = HashMap::new();
        let mut labels = Vec::new();
        for resource in ["clusterroles", "roles"] {
            for object in objects.list(&gvr(resource), "") {
                let key = key(&object);
                let role = match old.roles.get(&key) {
                    Some(role) if role.revision == object.revision => role.clone(),
                    _ => Arc::new(Role::parse(&object)),
                };
                if object.namespace.is_empty() {
                    labels.push((key.clone(), object));
                }
                roles.insert(key, role);
            }
        }
        let mut policy = Policy { generations, roles, ..Policy::default() };
        for resource in ["clusterrolebindings", "rolebindings"] {
            for (order, object) in objects.list(&gvr(resource), "").into_iter().enumerate() {
                policy.bind(order as u32, &object, old, &labels);
            }
        }
        policy
    }

    fn bind(&mut self, order: u32, object: &Object, old: &Policy, clusterroles: &[(Key, Arc<Object>)]) {
        let key = key(object);
        let binding = match old.bindings.get(&key) {
            Some(binding) if binding.revision == object.revision => binding.clone(),
            _ => Arc::new(Binding::parse(object)),
        };
        let rules = self.role_rules(&object.namespace, &binding.role_kind, &binding.role_name, clusterroles);
        let (kind, label) = if object.namespace.is_empty() {
            ("ClusterRoleBinding", object.name.to_string())
        } else {
            ("RoleBinding", format!("{}/{}", object.name, object.namespace))
        };
        if let Some(rules) = rules {
            let index = if object.namespace.is_empty() {
                &mut self.cluster
            } else {
                self.namespaces.entry(object.namespace.to_string()).or_default()
            };
            for (subject, named) in &binding.subjects {
                let reason = format!(
                    "RBAC: allowed by {kind} {label:?} of {} {:?} to {named}",
                    binding.role_kind, binding.role_name
                );
                let grant = Grant { order, reason: reason.into(), rules: rules.clone() };
                index.add(subject, grant);
            }
        }
        self.bindings.insert(key, binding);
    }

    /// The rules of a role; of an aggregated one also those of the roles it selects, so that a new role counts at once.
    fn role_rules(
        &self,
        namespace: &str,
        kind: &str,
        name: &str,
        clusterroles: &[(Key, Arc<Object>)],
    ) -> Option<Arc<[Rule]>> {
        let namespace = if kind == "ClusterRole" { "" } else { namespace };
        let role = self.roles.get(&(namespace.to_owned(), name.to_owned()))?;
        if role.aggregation.is_empty() {
            return Some(role.rules.clone());
        }
        Some(self.aggregated(role, clusterroles, 0).into())
    }

    fn aggregated(&self, role: &Role, clusterroles: &[(Key, Arc<Object>)], depth: usize) -> Vec<Rule> {
        let mut rules = role.rules.to_vec();
        // Roles may select aggregated roles (admin selects edit, edit selects view), and somebody may tie a knot.
        if depth > 8 {
            return rules;
        }
        for (key, object) in clusterroles {
            let labels: std::collections::BTreeMap<String, String> =
                object.labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            if !role.aggregation.iter().any(|selector| selector.matches(&labels)) {
                continue;
            }
            let Some(selected) = self.roles.get(key) else { continue };
            if std::ptr::eq(&**selected, role) {
                continue;
            }
            for rule in self.aggregated(selected, clusterroles, depth + 1) {
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
        }
        rules
    }

    fn grants<'a>(&'a self, user: &'a UserInfo, namespace: &str) -> Vec<&'a Grant> {
        let mut out = Vec::new();
        for index in [Some(&self.cluster), self.namespaces.get(namespace)].into_iter().flatten() {
            let start = out.len();
            out.extend(index.of(user));
            out[start..].sort_by_key(|grant: &&Grant| grant.order);
        }
        out
    }

    /// The verdict; the reason names the first binding that allows.
    pub fn authorize(&self, attributes: &Attributes) -> Decision {
        let namespace = if attributes.resource_request { attributes.namespace.as_str() } else { "" };
        for grant in self.grants(&attributes.user, namespace) {
            if grant.rules.iter().any(|rule| rule.allows(attributes)) {
                return Decision::Allow(grant.reason.to_string());
            }
        }
        Decision::NoOpinion(String::new())
    }

    /// All rules a user holds in a namespace (`""`: only cluster-wide ones).
    pub fn rules_of(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        self.grants(user, namespace).into_iter().flat_map(|grant| grant.rules.iter().cloned()).collect()
    }
}

/// The policy of a running server.
pub struct Rbac {
    objects: Arc<dyn Objects>,
    policy: ArcSwap<Policy>,
    building: parking_lot::Mutex<()>,
}

impl Rbac {
    /// An authorizer over the cache.
    pub fn new(objects: Arc<dyn Objects>) -> Self {
        let policy = Policy::build(&*objects, &Policy::default());
        Self { objects, policy: ArcSwap::from_pointee(policy), building: parking_lot::Mutex::new(()) }
    }

    /// The policy as it is now.
    pub fn policy(&self) -> Arc<Policy> {
        let policy = self.policy.load();
        if policy.generations == generations(&*self.objects) {
            return policy.clone();
        }
        drop(policy);
        let _one_at_a_time = self.building.lock();
        let policy = self.policy.load_full();
        if policy.generations == generations(&*self.objects) {
            return policy;
        }
        let policy = Arc::new(Policy::build(&*self.objects, &policy));
        self.policy.store(policy.clone());
        policy
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::testing::FakeObjects;

    fn object(kind: &str, namespace: &str, name: &str, rest: Value) -> Value {
        let mut object = json!({"apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": {"name": name}});
        if !namespace.is_empty() {
            object["metadata"]["namespace"] = namespace.into();
        }
        for (field, value) in rest.as_object().unwrap() {
            object[field] = value.clone();
        }
        object
    }

    fn get(user: &str, groups: &[&str], namespace: &str, resource: &str) -> Attributes {
        Attributes {
            user: UserInfo {
                name: user.into(),
                groups: groups.iter().map(|group| group.to_string()).collect(),
                ..UserInfo::default()
            },
            verb: "get".into(),
            resource_request: true,
            resource: resource.into(),
            namespace: namespace.into(),
            ..Attributes::default()
        }
    }

    fn rule(resource: &str) -> Value {
        json!({"rules": [{"verbs": ["get"], "apiGroups": [""], "resources": [resource]}]})
    }

    fn binding(role: &str, name: &str, subject: Value) -> Value {
        json!({"roleRef": {"kind": role, "name": name, "apiGroup": GROUP}, "subjects": [subject]})
    }

    #[test]
    fn bindings_reach_as_far_as_they_should() {
        let objects = Arc::new(FakeObjects::new([
            object("ClusterRole", "", "cr", rule("nodes")),
            object("Role", "ns", "r", rule("pods")),
            object(
                "ClusterRoleBinding",
                "",
                "crb",
                binding("ClusterRole", "cr", json!({"kind": "Group", "name": "g"})),
            ),
            object("RoleBinding", "ns", "rb", binding("Role", "r", json!({"kind": "ServiceAccount", "name": "sa"}))),
            object("RoleBinding", "ns", "rc", binding("ClusterRole", "cr", json!({"kind": "User", "name": "u"}))),
        ]));
        let rbac = Rbac::new(objects.clone());
        let reason = |attributes: &Attributes| match rbac.policy().authorize(attributes) {
            Decision::Allow(reason) => reason,
            other => format!("{other:?}"),
        };
        let no = "NoOpinion(\"\")";
        assert_eq!(
            reason(&get("x", &["g"], "", "nodes")),
            "RBAC: allowed by ClusterRoleBinding \"crb\" of ClusterRole \"cr\" to Group \"g\""
        );
        assert_eq!(
            reason(&get("system:serviceaccount:ns:sa", &[], "ns", "pods")),
            "RBAC: allowed by RoleBinding \"rb/ns\" of Role \"r\" to ServiceAccount \"sa/ns\""
        );
        assert_eq!(reason(&get("system:serviceaccount:ns:sa", &[], "other", "pods")), no);
        assert_eq!(
            reason(&get("u", &[], "ns", "nodes")),
            "RBAC: allowed by RoleBinding \"rc/ns\" of ClusterRole \"cr\" to User \"u\""
        );
        assert_eq!(reason(&get("u", &[], "", "nodes")), no);
        // A change is seen at once.
        let late = binding("Role", "r", json!({"kind": "User", "name": "late"}));
        objects.put(&gvr("rolebindings"), object("RoleBinding", "ns", "late", late));
        assert_ne!(reason(&get("late", &[], "ns", "pods")), no);
    }

    #[test]
    fn aggregated_roles_follow_their_parts_and_survive_a_knot() {
        let selector = json!({"clusterRoleSelectors": [{"matchLabels": {"to": "agg"}}]});
        let mut part = object("ClusterRole", "", "part", rule("pods"));
        part["metadata"]["labels"] = json!({"to": "agg"});
        let mut knot = object("ClusterRole", "", "knot", json!({"rules": null, "aggregationRule": selector}));
        knot["metadata"]["labels"] = json!({"to": "agg"});
        let objects = Arc::new(FakeObjects::new([
            part,
            knot,
            object("ClusterRole", "", "agg", json!({"rules": null, "aggregationRule": selector})),
            object("ClusterRoleBinding", "", "b", binding("ClusterRole", "agg", json!({"kind": "User", "name": "u"}))),
        ]));
        let policy = Rbac::new(objects).policy();
        assert!(matches!(policy.authorize(&get("u", &[], "ns", "pods")), Decision::Allow(_)));
        assert!(matches!(policy.authorize(&get("u", &[], "ns", "secrets")), Decision::NoOpinion(_)));
    }
}
