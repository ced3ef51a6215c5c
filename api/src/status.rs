//! [`Status`]: the error every API call answers with, with upstream's reasons, codes and messages.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::{
    field::{self, ErrorList},
    gvk::{GroupKind, GroupResource},
    text::quote,
};

/// One cause in [`Details`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cause {
    /// Machine-readable reason.
    pub reason: String,
    /// Text.
    pub message: String,
    /// Field, may be empty.
    pub field: String,
}

/// What the status is about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    /// Object name.
    pub name: String,
    /// API group.
    pub group: String,
    /// Kind or resource.
    pub kind: String,
    /// Object UID.
    pub uid: String,
    /// Causes.
    pub causes: Vec<Cause>,
    /// When to try again.
    pub retry_after_seconds: u32,
}

/// `metav1.Status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// HTTP code.
    pub code: u16,
    /// Machine-readable reason, may be empty.
    pub reason: String,
    /// Text.
    pub message: String,
    /// What it is about.
    pub details: Option<Box<Details>>,
    /// `Success` instead of `Failure`.
    pub success: bool,
    /// List metadata (`{}` unless set).
    pub metadata: Box<Map<String, Value>>,
}

/// Reasons as upstream spells them.
pub mod reason {
    #![allow(missing_docs)]
    pub const UNAUTHORIZED: &str = "Unauthorized";
    pub const FORBIDDEN: &str = "Forbidden";
    pub const NOT_FOUND: &str = "NotFound";
    pub const ALREADY_EXISTS: &str = "AlreadyExists";
    pub const CONFLICT: &str = "Conflict";
    pub const GONE: &str = "Gone";
    pub const INVALID: &str = "Invalid";
    pub const SERVER_TIMEOUT: &str = "ServerTimeout";
    pub const TIMEOUT: &str = "Timeout";
    pub const TOO_MANY_REQUESTS: &str = "TooManyRequests";
    pub const BAD_REQUEST: &str = "BadRequest";
    pub const METHOD_NOT_ALLOWED: &str = "MethodNotAllowed";
    pub const NOT_ACCEPTABLE: &str = "NotAcceptable";
    pub const REQUEST_ENTITY_TOO_LARGE: &str = "RequestEntityTooLarge";
    pub const UNSUPPORTED_MEDIA_TYPE: &str = "UnsupportedMediaType";
    pub const INTERNAL_ERROR: &str = "InternalError";
    pub const EXPIRED: &str = "Expired";
    pub const SERVICE_UNAVAILABLE: &str = "ServiceUnavailable";
}

impl Details {
    fn resource(gr: &GroupResource, name: &str) -> Self {
        Self { name: name.into(), group: gr.group.clone(), kind: gr.resource.clone(), ..Self::default() }
    }

    /// Reads the JSON object; what does not fit is left out.
    pub fn from_value(value: &Value) -> Option<Self> {
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let cause =
            |c: &Value| Cause { reason: text(c, "reason"), message: text(c, "message"), field: text(c, "field") };
        value.is_object().then(|| Self {
            name: text(value, "name"),
            group: text(value, "group"),
            kind: text(value, "kind"),
            uid: text(value, "uid"),
            causes: value["causes"].as_array().into_iter().flatten().map(cause).collect(),
            retry_after_seconds: value["retryAfterSeconds"]
                .as_u64()
                .and_then(|s| s.try_into().ok())
                .unwrap_or_default(),
        })
    }

    fn to_value(&self) -> Value {
        let mut out = Map::new();
        for (key, text) in [("name", &self.name), ("group", &self.group), ("kind", &self.kind), ("uid", &self.uid)] {
            if !text.is_empty() {
                out.insert(key.into(), text.as_str().into());
            }
        }
        if !self.causes.is_empty() {
            out.insert("causes".into(), self.causes.iter().map(Cause::to_value).collect());
        }
        if self.retry_after_seconds > 0 {
            out.insert("retryAfterSeconds".into(), self.retry_after_seconds.into());
        }
        Value::Object(out)
    }
}

impl Cause {
    fn to_value(&self) -> Value {
        let mut out = Map::new();
        for (key, text) in [("reason", &self.reason), ("message", &self.message), ("field", &self.field)] {
            if !text.is_empty() {
                out.insert(key.into(), text.as_str().into());
            }
        }
        Value::Object(out)
    }
}

impl Status {
    /// Any failure.
    pub fn generic(code: u16, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
            message: message.into(),
            details: None,
            success: false,
            metadata: Box::default(),
        }
    }

    /// A failure with details.
    pub fn with_details(mut self, details: Details) -> Self {
        self.details = Some(Box::new(details));
        self
    }

    /// Success, as delete answers.
    pub fn success(details: Option<Details>) -> Self {
        Self { code: 0, success: true, details: details.map(Box::new), ..Self::generic(0, "", "") }
    }

    /// 404 for an object.
    pub fn not_found(gr: &GroupResource, name: &str) -> Self {
        Self::generic(404, reason::NOT_FOUND, format!("{gr} {} not found", quote(name)))
            .with_details(Details::resource(gr, name))
    }

    /// 404 for a path nothing serves.
    pub fn no_route() -> Self {
        Self::generic(404, reason::NOT_FOUND, "the server could not find the requested resource")
            .with_details(Details::default())
    }

    /// 409 on create.
    pub fn already_exists(gr: &GroupResource, name: &str) -> Self {
        Self::generic(409, reason::ALREADY_EXISTS, format!("{gr} {} already exists", quote(name)))
            .with_details(Details::resource(gr, name))
    }

    /// 409 on update or delete.
    pub fn conflict(gr: &GroupResource, name: &str, message: impl fmt::Display) -> Self {
        Self::generic(
            409,
            reason::CONFLICT,
            format!("Operation cannot be fulfilled on {gr} {}: {message}", quote(name)),
        )
        .with_details(Details::resource(gr, name))
    }

    /// [`Status::conflict`] with the usual text about a stale resourceVersion.
    pub fn modified(gr: &GroupResource, name: &str) -> Self {
        Self::conflict(
            gr,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 409 of server-side apply.
    pub fn apply_conflict(causes: Vec<Cause>, message: impl Into<String>) -> Self {
        Self::generic(409, reason::CONFLICT, message).with_details(Details { causes, ..Details::default() })
    }

    /// 422 with all field errors.
    pub fn invalid(gk: &GroupKind, name: &str, errors: ErrorList) -> Self {
        let mut message = format!("{gk} {} is invalid", quote(name));
        if !errors.is_empty() {
            message.push_str(": ");
            message.push_str(&field::aggregate(&errors));
        }
        let causes = errors
            .iter()
            .map(|e| Cause { reason: e.kind.reason().into(), message: e.body(), field: e.field.clone() })
            .collect();
        Self::generic(422, reason::INVALID, message).with_details(Details {
            name: name.into(),
            group: gk.group.clone(),
            kind: gk.kind.clone(),
            causes,
            ..Details::default()
        })
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::generic(400, reason::BAD_REQUEST, message)
    }

    /// 403 for a resource; for a non-resource path pass an empty resource and name.
    pub fn forbidden(gr: &GroupResource, name: &str, message: impl fmt::Display) -> Self {
        let text = if !name.is_empty() {
            format!("{gr} {} is forbidden: {message}", quote(name))
        } else if gr.resource.is_empty() && gr.group.is_empty() {
            format!("forbidden: {message}")
        } else {
            format!("{gr} is forbidden: {message}")
        };
        Self::generic(403, reason::FORBIDDEN, text).with_details(Details::resource(gr, name))
    }

    /// 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.is_empty() {
            message = "Unauthorized".into();
        }
        Self::generic(401, reason::UNAUTHORIZED, message)
    }

    /// 410 for a resourceVersion that is gone.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::generic(410, reason::EXPIRED, message)
    }

    /// 405 for a verb a resource does not have.
    pub fn method_not_supported(gr: &GroupResource, verb: &str) -> Self {
        Self::generic(
            405,
            reason::METHOD_NOT_ALLOWED,
            format!("{verb} is not supported on resources of kind {}", quote(&gr.to_string())),
        )
        .with_details(Details::resource(gr, ""))
    }

    /// 405 for an HTTP method a path does not have.
    pub fn method_not_allowed() -> Self {
        Self::generic(
            405,
            reason::METHOD_NOT_ALLOWED,
            "the server does not allow this method on the requested resource",
        )
        .with_details(Details::default())
    }

    /// 500 of our own.
    pub fn internal(message: impl fmt::Display) -> Self {
        let message = message.to_string();
        Self::generic(500, reason::INTERNAL_ERROR, format!("Internal error occurred: {message}"))
            .with_details(Details { causes: vec![Cause { message, ..Cause::default() }], ..Details::default() })
    }

    /// 500 without a reason: how upstream reports errors that are not a Status.
    pub fn unknown(message: impl fmt::Display) -> Self {
        Self::generic(500, "", message.to_string())
    }

    /// 413.
    pub fn too_large(message: impl fmt::Display) -> Self {
        Self::generic(413, reason::REQUEST_ENTITY_TOO_LARGE, format!("Request entity too large: {message}"))
    }

    /// 429; clients retry after `seconds`.
    pub fn too_many_requests(message: impl Into<String>, seconds: u32) -> Self {
        Self::generic(429, reason::TOO_MANY_REQUESTS, message)
            .with_details(Details { retry_after_seconds: seconds, ..Details::default() })
    }

    /// 504.
    pub fn timeout(message: impl fmt::Display, seconds: u32) -> Self {
        Self::generic(504, reason::TIMEOUT, format!("Timeout: {message}"))
            .with_details(Details { retry_after_seconds: seconds, ..Details::default() })
    }

    /// 500 `ServerTimeout`: try again.
    pub fn server_timeout(gr: &GroupResource, operation: &str, seconds: u32) -> Self {
        Self::generic(
            500,
            reason::SERVER_TIMEOUT,
            format!("The {operation} operation against {gr} could not be completed at this time, please try again."),
        )
        .with_details(Details { retry_after_seconds: seconds, ..Details::resource(gr, "") })
    }

    /// 415.
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::generic(415, reason::UNSUPPORTED_MEDIA_TYPE, message)
    }

    /// 406.
    pub fn not_acceptable(message: impl Into<String>) -> Self {
        Self::generic(406, reason::NOT_ACCEPTABLE, message)
    }

    /// 503.
    pub fn service_unavailable(message: impl Into<String>) -> Self {
        Self::generic(503, reason::SERVICE_UNAVAILABLE, message)
    }

    /// Adds a cause to the details.
    pub fn cause(mut self, reason: &str, message: impl Into<String>, field: &str) -> Self {
        let details = self.details.get_or_insert_with(Box::default);
        details.causes.push(Cause { reason: reason.into(), message: message.into(), field: field.into() });
        self
    }

    /// The JSON object.
    pub fn to_value(&self) -> Value {
        let mut out = json!({"kind": "Status", "apiVersion": "v1", "metadata": self.metadata});
        out["status"] = if self.success { "Success" } else { "Failure" }.into();
        if !self.message.is_empty() {
            out["message"] = self.message.as_str().into();
        }
        if !self.reason.is_empty() {
            out["reason"] = self.reason.as_str().into();
        }
        if let Some(details) = &self.details {
            out["details"] = details.to_value();
        }
        if self.code != 0 {
            out["code"] = self.code.into();
        }
        out
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::{Error, Path};

    #[test]
    fn upstream_messages() {
        let pods = GroupResource::new("", "pods");
        let status = Status::not_found(&pods, "a");
        assert_eq!(
            status.to_value(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "pods \"a\" not found", "reason": "NotFound", "details": {"name": "a", "kind": "pods"}, "code": 404})
        );
        assert_eq!(Status::forbidden(&GroupResource::default(), "", "no").message, "forbidden: no");
        assert_eq!(Status::forbidden(&pods, "", "no").message, "pods is forbidden: no");
    }

    #[test]
    fn invalid_lists_causes() {
        let errors = vec![
            Error::required(&Path::new("spec").child("a"), ""),
            Error::required(&Path::new("spec").child("b"), "why"),
        ];
        let status = Status::invalid(&GroupKind::new("apps", "Deployment"), "x", errors);
        assert_eq!(
            status.message,
            "Deployment.apps \"x\" is invalid: [spec.a: Required value, spec.b: Required value: why]"
        );
        let details = status.details.unwrap();
        assert_eq!(details.causes[1].message, "Required value: why");
        assert_eq!(details.causes[0].reason, "FieldValueRequired");
    }
}
