//! Requests that are not plain reads and writes of stored objects: token requests, access reviews, bindings, evictions,
//! logs, exec, proxies.

mod access;
pub(crate) mod backends;
mod binding;
mod connect;
mod eviction;
pub(crate) mod proxy;
mod query;
pub(crate) mod socket;
pub(crate) mod tls;
mod tokens;
pub(crate) mod transport;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, status::Status};
use serde_json::Value;

use crate::{authn::UserInfo, objects::Objects};

/// The body type of every response.
pub type Body = http_body_util::combinators::BoxBody<Bytes, std::io::Error>;

/// A create of something that is answered, not stored as such (TokenReview, SubjectAccessReview, serviceaccounts/token,
/// pods/binding, pods/eviction). Body decoding, defaulting and admission are done; the answer is the object returned.
pub trait Create: Send + Sync {
    /// Answers the request.
    fn create<'a>(&'a self, request: CreateRequest<'a>) -> BoxFuture<'a, Result<Value, Status>>;
}

/// Input of [`Create`].
pub struct CreateRequest<'a> {
    /// Resource.
    pub gvr: &'a Gvr,
    /// Namespace or empty.
    pub namespace: &'a str,
    /// Name of the parent object for subresources.
    pub name: &'a str,
    /// Who asks.
    pub user: &'a UserInfo,
    /// The decoded body.
    pub object: Value,
    /// dryRun=All.
    pub dry_run: bool,
    /// The cluster.
    pub objects: Arc<dyn Objects>,
}

/// A raw connection to something (log, exec, attach, portforward, proxy): gets the HTTP request, answers it itself.
pub trait Connect: Send + Sync {
    /// Answers the request; upgrades are taken from its extensions.
    fn connect<'a>(&'a self, request: ConnectRequest) -> BoxFuture<'a, Result<http::Response<Body>, Status>>;
}

/// Input of [`Connect`].
pub struct ConnectRequest {
    /// Resource.
    pub gvr: Gvr,
    /// Subresource.
    pub subresource: String,
    /// Namespace or empty.
    pub namespace: String,
    /// Name of the parent object.
    pub name: String,
    /// Path behind `proxy/`, with a leading slash.
    pub path: String,
    /// Who asks.
    pub user: UserInfo,
    /// The request.
    pub request: http::Request<hyper::body::Incoming>,
    /// The cluster.
    pub objects: Arc<dyn Objects>,
}

/// What endpoints are made from.
#[derive(Clone)]
pub struct Services {
    /// The server's configuration.
    pub config: Arc<crate::Config>,
    /// The cluster.
    pub objects: Arc<dyn Objects>,
    /// Who may do what.
    pub authorizer: Arc<dyn crate::authz::Authorizer>,
    /// The whole token chain (static tokens, service accounts).
    pub tokens: Arc<dyn crate::authn::TokenAuthenticator>,
}

/// All endpoints by group, version, resource and subresource (`""` for the resource itself).
#[derive(Default)]
pub struct Endpoints {
    /// Creates that are answered.
    pub creates: std::collections::HashMap<(Gvr, String), Arc<dyn Create>>,
    /// Raw connections.
    pub connects: std::collections::HashMap<(Gvr, String), Arc<dyn Connect>>,
}

/// Builds the endpoints.
pub fn endpoints(services: &Services) -> Endpoints {
    let mut endpoints = Endpoints::default();
    tokens_and_reviews(services, &mut endpoints);
    connections(services, &mut endpoints);
    endpoints
}

fn tokens_and_reviews(services: &Services, endpoints: &mut Endpoints) {
    let mut add = |group: &str, resource: &str, subresource: &str, create: Arc<dyn Create>| {
        endpoints.creates.insert((Gvr::new(group, "v1", resource), subresource.to_owned()), create);
    };
    let issuer = crate::authn::serviceaccount::Issuer::load(&services.config);
    let issuer = issuer.inspect_err(|error| tracing::error!(%error, "service account tokens cannot be issued")).ok();
    add("", "serviceaccounts", "token", Arc::new(tokens::TokenRequest { issuer }));
    let review = tokens::TokenReview { tokens: services.tokens.clone(), issuer: services.config.issuer.clone() };
    add("authentication.k8s.io", "tokenreviews", "", Arc::new(review));
    add("authentication.k8s.io", "selfsubjectreviews", "", Arc::new(tokens::SelfSubjectReview));
    for (resource, subject) in [
        ("subjectaccessreviews", access::Subject::Named),
        ("localsubjectaccessreviews", access::Subject::Local),
        ("selfsubjectaccessreviews", access::Subject::Own),
    ] {
        let review = access::AccessReview { authorizer: services.authorizer.clone(), subject };
        add("authorization.k8s.io", resource, "", Arc::new(review));
    }
    add("", "pods", "binding", Arc::new(binding::Binding));
    add("", "bindings", "", Arc::new(binding::Binding));
    add("", "pods", "eviction", Arc::new(eviction::Eviction));
    let rules = access::RulesReview { authorizer: services.authorizer.clone() };
    add("authorization.k8s.io", "selfsubjectrulesreviews", "", Arc::new(rules));
}

fn connections(services: &Services, endpoints: &mut Endpoints) {
    let transport = transport::Transport::load(&services.config).map(Arc::new);
    let transport = transport.inspect_err(|error| tracing::error!(%error, "nodes cannot be reached")).ok();
    let mut add = |resource: &str, subresource: &str, connect: Arc<dyn Connect>| {
        endpoints.connects.insert((Gvr::new("", "v1", resource), subresource.to_owned()), connect);
    };
    for (subresource, what) in [
        ("log", connect::What::Log),
        ("exec", connect::What::Exec),
        ("attach", connect::What::Attach),
        ("portforward", connect::What::PortForward),
    ] {
        add("pods", subresource, Arc::new(connect::PodConnect { what, transport: transport.clone() }));
    }
    for (resource, backend) in
        [("pods", proxy::Backend::Pod), ("services", proxy::Backend::Service), ("nodes", proxy::Backend::Node)]
    {
        add(resource, "proxy", Arc::new(proxy::Proxy { backend, transport: transport.clone() }));
    }
}
