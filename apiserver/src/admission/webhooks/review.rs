//! AdmissionReview: the question, and what an answer must look like.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isopod_api::status::Status;
use serde_json::{Value, json};

use super::{Matched, Request, configured::Webhook};
use crate::admission::{attributes, list, text};

/// The review for a webhook, and the identity its answer must have.
pub(super) fn question(webhook: &Webhook, matched: &Matched, request: &Request<'_>) -> Result<(String, Value), Status> {
    let uid = uuid::Uuid::new_v4().to_string();
    let (object, old) = attributes::objects(request, matched)?;
    let mut body = json!({"uid": uid});
    if let (Some(body), Value::Object(attributes)) = (body.as_object_mut(), attributes::attributes(request, matched)) {
        body.extend(attributes);
    }
    body["object"] = object;
    body["oldObject"] = old;
    Ok((uid, json!({"kind": "AdmissionReview", "apiVersion": webhook.review, "request": body})))
}

/// What a webhook says.
pub(super) enum Verdict {
    /// Go on; with these changes.
    Allowed(Vec<Value>),
    /// No.
    Denied(Status),
}

/// An answer.
pub(super) struct Answer {
    pub(super) verdict: Verdict,
    pub(super) warnings: Vec<String>,
    pub(super) annotations: Vec<(String, String)>,
}

/// Reads an answer; upstream's words for what is wrong with it.
pub(super) fn answer(webhook: &Webhook, uid: &str, review: &Value) -> Result<Answer, String> {
    let response = &review["response"];
    if !response.is_object() {
        return Err("webhook response was absent".into());
    }
    let v1 = webhook.review == "admission.k8s.io/v1";
    if v1 {
        let found = text(response, "uid");
        if found != uid {
            return Err(format!("expected response.uid={uid:?}, got {found:?}"));
        }
        let (version, kind) = (text(review, "apiVersion"), text(review, "kind"));
        if version != webhook.review || kind != "AdmissionReview" {
            let version = if version.contains('/') { version.to_owned() } else { format!("/{version}") };
            let wanted = format!("{}, Kind=AdmissionReview", webhook.review);
            return Err(format!("expected webhook response of {wanted}, got {version}, Kind={kind}"));
        }
    }
    let patch = patch(webhook, response, v1)?;
    let annotations = response["auditAnnotations"].as_object().into_iter().flatten();
    let verdict = if response["allowed"] == true {
        Verdict::Allowed(patch)
    } else {
        Verdict::Denied(denied(&webhook.name, &response["status"]))
    };
    Ok(Answer {
        verdict,
        warnings: list(response, "warnings").iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        annotations: annotations.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect(),
    })
}

/// The operations of an answer's patch.
fn patch(webhook: &Webhook, response: &Value, v1: bool) -> Result<Vec<Value>, String> {
    let (patch, kind) = (text(response, "patch"), response.get("patchType").filter(|v| !v.is_null()));
    if !webhook.mutating {
        return match (v1, patch.is_empty(), kind) {
            (true, false, _) => Err("validating webhook may not return response.patch".into()),
            (true, true, Some(_)) => Err("validating webhook may not return response.patchType".into()),
            _ => Ok(Vec::new()),
        };
    }
    if v1 {
        match (patch.is_empty(), kind) {
            (false, None) => return Err("webhook returned response.patch but not response.patchType".into()),
            (true, Some(_)) => return Err("webhook returned response.patchType but not response.patch".into()),
            _ => {}
        }
    }
    if patch.is_empty() {
        return Ok(Vec::new());
    }
    let kind = kind.and_then(Value::as_str).unwrap_or("JSONPatch");
    if kind.is_empty() {
        return Err("webhook returned invalid response.patchType of \"\"".into());
    }
    if kind != "JSONPatch" {
        return Err(format!("unsupported patch type \"{kind}\""));
    }
    let decoded = STANDARD.decode(patch).map_err(|e| format!("illegal base64 data in response.patch: {e}"))?;
    match serde_json::from_slice(&decoded) {
        Ok(Value::Array(operations)) => Ok(operations),
        Ok(Value::Null) => Ok(Vec::new()),
        Ok(_) => Err("json: cannot unmarshal object into Go value of type jsonpatch.Patch".into()),
        Err(error) => Err(format!("response.patch: {error}")),
    }
}

/// A refusal: the webhook's own Status, made fit for one.
fn denied(webhook: &str, status: &Value) -> Status {
    let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or_default();
    let by = format!("admission webhook \"{webhook}\" denied the request");
    let (message, reason) = (text(status, "message"), text(status, "reason"));
    let message = match (message, reason) {
        ("", "") => format!("{by} without explanation"),
        ("", reason) => format!("{by}: {reason}"),
        (message, _) => format!("{by}: {message}"),
    };
    let code = if (400..600).contains(&code) { code } else { 400 };
    let mut out = Status::generic(code, reason, message);
    out.details = isopod_api::status::Details::from_value(&status["details"]).map(Box::new);
    out
}
