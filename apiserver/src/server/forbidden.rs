//! The text of a 403.

use isopod_api::{gvk::GroupResource, status::Status};

use crate::authz::Attributes;

/// What a user may not do, as upstream says it.
pub(crate) fn message(attributes: &Attributes, reason: &str) -> String {
    let (user, verb) = (&attributes.user.name, &attributes.verb);
    let text = if !attributes.resource_request {
        format!("User {user:?} cannot {verb} path {:?}", attributes.path)
    } else {
        let resource = match attributes.subresource.as_str() {
            "" => attributes.resource.clone(),
            subresource => format!("{}/{subresource}", attributes.resource),
        };
        let place = match attributes.namespace.as_str() {
            "" => "at the cluster scope".to_owned(),
            namespace => format!("in the namespace {namespace:?}"),
        };
        format!("User {user:?} cannot {verb} resource {resource:?} in API group {:?} {place}", attributes.group)
    };
    if reason.is_empty() { text } else { format!("{text}: {reason}") }
}

/// The 403.
pub(crate) fn status(attributes: &Attributes, reason: &str) -> Status {
    let gr = GroupResource::new(&attributes.group, &attributes.resource);
    Status::forbidden(&gr, &attributes.name, message(attributes, reason))
}
