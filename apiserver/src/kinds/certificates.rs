//! CertificateSigningRequests.

use base64::{Engine, engine::general_purpose::STANDARD};
use isopod_api::field::ErrorList;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, net, same},
};

/// `certificatesigningrequests`.
pub(crate) struct CertificateSigningRequest;

const USAGES: &[&str] = &[
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

impl Strategy for CertificateSigningRequest {
    fn prepare_for_create(&self, cx: &Context<'_>, obj: &mut Value) {
        let spec = &mut obj["spec"];
        for field in ["username", "uid", "groups", "extra"] {
            if let Some(map) = spec.as_object_mut() {
                map.remove(field);
            }
        }
        if !cx.user.name.is_empty() {
            spec["username"] = json!(cx.user.name);
        }
        if !cx.user.uid.is_empty() {
            spec["uid"] = json!(cx.user.uid);
        }
        if !cx.user.groups.is_empty() {
            spec["groups"] = json!(cx.user.groups);
        }
        if !cx.user.extra.is_empty() {
            spec["extra"] = json!(cx.user.extra);
        }
        obj["status"] = json!({});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        match cx.subresource {
            "" => {
                new["spec"] = old["spec"].clone();
                new["status"] = old["status"].clone();
            }
            "approval" => {
                let conditions = new["status"]["conditions"].clone();
                new["spec"] = old["spec"].clone();
                new["status"] = old["status"].clone();
                if conditions.is_null() {
                    super::clean(new, &["/status"]);
                    if let Some(status) = new["status"].as_object_mut() {
                        status.remove("conditions");
                    }
                } else {
                    new["status"]["conditions"] = conditions;
                }
                stamp(new, old);
            }
            _ => {
                new["spec"] = old["spec"].clone();
                stamp(new, old);
            }
        }
        super::clean(new, &["/status", ""]);
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        spec(&mut e, &At::field(obj, "spec"));
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if cx.subresource.is_empty() {
            return e.0;
        }
        let certificate = At::field(new, "status").get("certificate");
        if cx.subresource == "status" && certificate.is_set() && !certificate.s().is_empty() {
            if let Err(message) = pem(certificate.s(), "CERTIFICATE") {
                e.invalid_as(&certificate, "<certificate data>", &message);
            }
            let before = &old["status"]["certificate"];
            if before.as_str().is_some_and(|c| !c.is_empty()) && !same(certificate.v, before) {
                e.invalid_as(&certificate, "<certificate data>", "may not change once set");
            }
        }
        conditions(&mut e, &At::field(new, "status").get("conditions"));
        removed(&mut e, new, old, cx.subresource);
        e.0
    }

    fn fields(&self, obj: &Value) -> Vec<(&'static str, String)> {
        vec![("spec.signerName", obj["spec"]["signerName"].as_str().unwrap_or_default().to_owned())]
    }

    fn field_names(&self) -> &'static [&'static str] {
        &["spec.signerName"]
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let duration = obj["spec"]["expirationSeconds"].as_i64().map_or("<none>".to_owned(), table::human_duration);
        vec![
            table::name(obj),
            table::age(obj, now),
            table::or(&obj["spec"]["signerName"], "<none>"),
            table::or(&obj["spec"]["username"], ""),
            json!(duration),
            json!(condition(obj)),
        ]
    }
}

fn condition(obj: &Value) -> String {
    let has = |kind: &str| obj["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == kind);
    let mut text = match (has("Approved"), has("Denied")) {
        (_, true) => "Denied",
        (true, _) => "Approved",
        _ => "Pending",
    }
    .to_owned();
    if has("Failed") {
        text.push_str(",Failed");
    }
    if obj["status"]["certificate"].as_str().is_some_and(|c| !c.is_empty()) {
        text.push_str(",Issued");
    }
    text
}

/// New conditions get their times.
fn stamp(new: &mut Value, old: &Value) {
    let now = isopod_api::meta::now();
    let before = old["status"]["conditions"].as_array().cloned().unwrap_or_default();
    for condition in new["status"]["conditions"].as_array_mut().into_iter().flatten() {
        let earlier = before.iter().find(|c| c["type"] == condition["type"] && c["status"] == condition["status"]);
        if condition["lastUpdateTime"].is_null() {
            condition["lastUpdateTime"] = json!(now);
        }
        if condition["lastTransitionTime"].is_null() {
            condition["lastTransitionTime"] = match earlier {
                Some(earlier) if !earlier["lastTransitionTime"].is_null() => earlier["lastTransitionTime"].clone(),
                _ => json!(now),
            };
        }
    }
    super::clean(new, &["/status"]);
}

fn spec(e: &mut Errs, at: &At<'_>) {
    let (request, usages, signer) = (at.get("request"), at.get("usages"), at.get("signerName"));
    if let Err(message) = csr(request.s()) {
        e.invalid(&request, &message);
    }
    if usages.len() == 0 {
        e.required(&usages, "");
    }
    let mut seen = Vec::new();
    for usage in usages.items() {
        if !USAGES.contains(&usage.s()) {
            e.unsupported(&usage, USAGES);
        }
        if seen.contains(&usage.s()) {
            e.duplicate(&usage, usage.s());
        }
        seen.push(usage.s());
    }
    if signer.s() == "kubernetes.io/legacy-unknown" {
        e.invalid(&signer, "the legacy signerName is not allowed via this API version");
    } else {
        net::signer_name(e, &signer);
    }
    let seconds = at.get("expirationSeconds");
    if seconds.int().is_some_and(|n| n < 600) {
        e.invalid(&seconds, "may not specify a duration less than 600 seconds (10 minutes)");
    }
}

fn csr(text: &str) -> Result<(), String> {
    let bytes = STANDARD.decode(text).unwrap_or_default();
    let wrong = || "PEM block type must be CERTIFICATE REQUEST".to_owned();
    let (_, block) = x509_parser::pem::parse_x509_pem(&bytes).map_err(|_| wrong())?;
    if block.label != "CERTIFICATE REQUEST" {
        return Err(wrong());
    }
    Ok(())
}

fn pem(text: &str, label: &str) -> Result<(), String> {
    let bytes = STANDARD.decode(text).unwrap_or_default();
    let missing = || format!("must contain at least one {label} PEM block");
    let mut found = false;
    for block in x509_parser::pem::Pem::iter_from_buffer(&bytes) {
        let Ok(block) = block else { break };
        if block.label != label {
            return Err(format!("only CERTIFICATE PEM blocks are allowed, found {:?}", block.label));
        }
        found = true;
    }
    found.then_some(()).ok_or_else(missing)
}

fn conditions(e: &mut Errs, list: &At<'_>) {
    let mut seen: Vec<&str> = Vec::new();
    for at in list.items() {
        let (kind, status) = (at.get("type"), at.get("status"));
        if kind.s().is_empty() {
            e.required(&kind, "");
        }
        if matches!(kind.s(), "Approved" | "Denied" | "Failed") {
            if status.s().is_empty() {
                e.required(&status, "");
            } else if status.s() != "True" {
                e.unsupported(&status, &["True"]);
            }
        } else {
            e.required_one_of(&status, &["False", "True", "Unknown"]);
        }
        let other = match kind.s() {
            "Approved" => "Denied",
            "Denied" => "Approved",
            _ => "",
        };
        if !other.is_empty() && seen.contains(&other) {
            e.invalid_as(list, kind.s(), "Approved and Denied conditions are mutually exclusive");
        }
        if seen.contains(&kind.s()) {
            e.duplicate(&kind, kind.s());
        }
        seen.push(kind.s());
    }
}

/// Approval, denial and failure are for ever; only the approval subresource may add the first two.
fn removed(e: &mut Errs, new: &Value, old: &Value, subresource: &str) {
    let at = At::field(new, "status").get("conditions");
    let has =
        |v: &Value, kind: &str| v["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == kind);
    for kind in ["Approved", "Denied", "Failed"] {
        if has(old, kind) && !has(new, kind) {
            e.forbidden(&at, &format!("updates may not remove a condition of type {kind:?}"));
        }
        if subresource == "status" && kind != "Failed" && !has(old, kind) && has(new, kind) {
            e.forbidden(&at, &format!("updates may not add a condition of type {kind:?}"));
        }
    }
}
