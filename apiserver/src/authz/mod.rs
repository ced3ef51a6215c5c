//! Whether a request is allowed.

pub mod escalation;
pub mod node;
pub mod rbac;
pub mod rule;

use std::sync::Arc;

use crate::{authn::UserInfo, objects::Objects};

pub use self::{node::NodeAuthorizer, rbac::Rbac, rule::Rule};

/// What is to be decided: upstream's authorizer attributes.
#[derive(Debug, Clone, Default)]
pub struct Attributes {
    /// Who.
    pub user: UserInfo,
    /// `get`, `list`, `watch`, `create`, ... or the lower-case HTTP method for non-resource requests.
    pub verb: String,
    /// Whether it is a resource request.
    pub resource_request: bool,
    /// API group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Resource.
    pub resource: String,
    /// Subresource or empty.
    pub subresource: String,
    /// Namespace or empty.
    pub namespace: String,
    /// Name or empty.
    pub name: String,
    /// URL path.
    pub path: String,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Allowed, with the rule that did (`RBAC: allowed by ...`).
    Allow(String),
    /// Nobody allowed it; the reason may be empty.
    NoOpinion(String),
    /// Denied for good.
    Deny(String),
}

/// Decides; synchronous, from caches.
pub trait Authorizer: Send + Sync {
    /// The verdict for one request.
    fn authorize(&self, attributes: &Attributes) -> Decision;

    /// All rules a user holds in a namespace, for SelfSubjectRulesReview.
    fn rules(&self, _user: &UserInfo, _namespace: &str) -> Vec<Rule> {
        Vec::new()
    }
}

/// The authorizer of the server: `system:masters` may do everything; then the node authorizer, then RBAC.
pub fn authorizer(objects: Arc<dyn Objects>) -> Arc<dyn Authorizer> {
    Arc::new(Union { node: NodeAuthorizer::new(objects.clone()), rbac: Rbac::new(objects) })
}

/// Paths everybody may read, also before there is any policy.
const ALWAYS_ALLOWED: [&str; 3] = ["/healthz", "/livez", "/readyz"];

struct Union {
    node: NodeAuthorizer,
    rbac: Rbac,
}

impl Authorizer for Union {
    fn authorize(&self, attributes: &Attributes) -> Decision {
        if attributes.user.in_group("system:masters") {
            return Decision::Allow(String::new());
        }
        if !attributes.resource_request && ALWAYS_ALLOWED.contains(&attributes.path.as_str()) {
            return Decision::Allow(String::new());
        }
        let node = self.node.authorize(attributes);
        if matches!(node, Decision::Allow(_)) {
            return node;
        }
        let rbac = self.rbac.policy().authorize(attributes);
        match (&rbac, node) {
            // Two silent authorizers: the one with something to say is heard.
            (Decision::NoOpinion(reason), Decision::NoOpinion(text)) if reason.is_empty() => Decision::NoOpinion(text),
            _ => rbac,
        }
    }

    fn rules(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        let mut rules = self.rbac.policy().rules_of(user, namespace);
        if user.in_group("system:masters") {
            let star = || vec!["*".to_owned()];
            rules.push(Rule { verbs: star(), api_groups: star(), resources: star(), ..Rule::default() });
            rules.push(Rule { verbs: star(), non_resource_urls: star(), ..Rule::default() });
        }
        rules
    }
}
