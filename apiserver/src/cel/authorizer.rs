//! `authorizer`: expressions that ask what the user of a request may do.

use std::{fmt, sync::Arc};

use isopod_api::selector;
use kube_cel::cel::{Context, ExecutionError, ResolveResult, Value as Cel, extractors::This, objects::Opaque};

use super::convert::string;
use crate::{
    authn::UserInfo,
    authz::{Attributes, Authorizer, Decision},
};

/// A question in the making.
#[derive(Clone)]
struct Question {
    authorizer: Arc<dyn Authorizer>,
    attributes: Attributes,
    /// A selector that does not parse: asked without it, with this error.
    error: String,
}

impl PartialEq for Question {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.authorizer, &other.authorizer) && format!("{self:?}") == format!("{other:?}")
    }
}

impl Eq for Question {}

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.attributes)
    }
}

impl Opaque for Question {
    fn runtime_type_name(&self) -> &str {
        "kubernetes.authorization.Authorizer"
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    allowed: bool,
    reason: String,
    error: String,
}

impl Opaque for Verdict {
    fn runtime_type_name(&self) -> &str {
        "kubernetes.authorization.Decision"
    }
}

/// The value of `authorizer`.
pub(crate) fn authorizer(authorizer: Arc<dyn Authorizer>, user: &UserInfo) -> Cel {
    let attributes = Attributes { user: user.clone(), ..Attributes::default() };
    Cel::Opaque(Arc::new(Question { authorizer, attributes, error: String::new() }))
}

/// The value of `authorizer.requestResource`.
pub(crate) fn request_resource(authorizer: Arc<dyn Authorizer>, attributes: Attributes) -> Cel {
    Cel::Opaque(Arc::new(Question { authorizer, attributes, error: String::new() }))
}

fn question(value: &Cel) -> Result<Question, ExecutionError> {
    match value {
        Cel::Opaque(opaque) => opaque.downcast_ref::<Question>().cloned().ok_or(ExecutionError::NoSuchOverload),
        _ => Err(ExecutionError::NoSuchOverload),
    }
}

fn verdict<T>(value: &Cel, read: impl Fn(&Verdict) -> T) -> Result<T, ExecutionError> {
    match value {
        Cel::Opaque(opaque) => opaque.downcast_ref::<Verdict>().map(read).ok_or(ExecutionError::NoSuchOverload),
        _ => Err(ExecutionError::NoSuchOverload),
    }
}

/// A step that puts one text into the question.
fn step(root: &mut Context<'static>, name: &str, put: fn(&mut Question, String)) {
    root.add_function(name, move |This(this): This<Cel>, text: Arc<String>| -> ResolveResult {
        let mut question = question(&this)?;
        put(&mut question, text.as_str().to_owned());
        Ok(Cel::Opaque(Arc::new(question)))
    });
}

/// Adds the functions.
pub(super) fn register(root: &mut Context<'static>) {
    step(root, "path", |q, text| q.attributes.path = text);
    step(root, "group", |q, text| {
        q.attributes.group = text;
        q.attributes.version = "*".into();
        q.attributes.resource_request = true;
    });
    step(root, "resource", |q, text| q.attributes.resource = text);
    step(root, "subresource", |q, text| q.attributes.subresource = text);
    step(root, "namespace", |q, text| q.attributes.namespace = text);
    step(root, "name", |q, text| q.attributes.name = text);
    step(root, "fieldSelector", |q, text| {
        if let Err(error) = selector::FieldSelector::parse(&text) {
            q.error = error.to_string();
        }
    });
    step(root, "labelSelector", |q, text| {
        if let Err(error) = selector::Requirements::parse(&text) {
            q.error = error.to_string();
        }
    });
    root.add_function("serviceAccount", |This(this): This<Cel>, ns: Arc<String>, name: Arc<String>| -> ResolveResult {
        let mut question = question(&this)?;
        question.attributes.user = UserInfo {
            name: format!("system:serviceaccount:{ns}:{name}"),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{ns}"),
                crate::authn::ALL_AUTHENTICATED.into(),
            ],
            ..UserInfo::default()
        };
        Ok(Cel::Opaque(Arc::new(question)))
    });
    root.add_function("check", |This(this): This<Cel>, verb: Arc<String>| -> ResolveResult {
        let mut question = question(&this)?;
        question.attributes.verb = verb.as_str().to_owned();
        let (allowed, reason) = match question.authorizer.authorize(&question.attributes) {
            Decision::Allow(reason) => (true, reason),
            Decision::NoOpinion(reason) | Decision::Deny(reason) => (false, reason),
        };
        Ok(Cel::Opaque(Arc::new(Verdict { allowed, reason, error: question.error })))
    });
    root.add_function("allowed", |This(this): This<Cel>| -> ResolveResult { verdict(&this, |v| Cel::Bool(v.allowed)) });
    root.add_function("errored", |This(this): This<Cel>| -> ResolveResult {
        verdict(&this, |v| Cel::Bool(!v.error.is_empty()))
    });
    root.add_function("error", |This(this): This<Cel>| -> ResolveResult { verdict(&this, |v| string(&v.error)) });
    root.add_function("reason", |This(this): This<Cel>| -> ResolveResult { verdict(&this, |v| string(&v.reason)) });
}
