//! Conditions in the common form: type, status, reason, message and the time of the last change.

use std::sync::LazyLock;

use isopod_api::names;
use regex::Regex;

use super::{At, Errs, meta};

const STATUSES: &[&str] = &["False", "True", "Unknown"];
const REASON_MAX: usize = 1024;
const MESSAGE_MAX: usize = 32 * 1024;
const REASON: &str = "[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?";
static REASON_FORM: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(&format!("^{REASON}$")).ok());

/// A list of conditions, no type twice.
pub(crate) fn conditions(e: &mut Errs, list: &At<'_>) {
    let mut seen = Vec::new();
    for at in list.items() {
        let kind = at.get("type");
        if seen.contains(&kind.s()) {
            e.duplicate(&kind, kind.s());
        } else {
            seen.push(kind.s());
        }
        condition(e, &at);
    }
}

fn condition(e: &mut Errs, at: &At<'_>) {
    let kind = at.get("type");
    meta::label_key(e, &kind, kind.s());
    e.one_of(&at.get("status"), STATUSES);
    let generation = at.get("observedGeneration");
    if generation.int0() < 0 {
        e.invalid(&generation, "must be greater than or equal to zero");
    }
    let time = at.get("lastTransitionTime");
    if time.s().is_empty() {
        e.required(&time, "must be set");
    }
    let (reason, message) = (at.get("reason"), at.get("message"));
    if reason.s().is_empty() {
        e.required(&reason, "must be set");
    } else {
        if REASON_FORM.as_ref().is_some_and(|form| !form.is_match(reason.s())) {
            let detail = names::regex_error(
                "a condition reason must start with alphabetic character, optionally followed by a string of alphanumeric characters or '_,:', and must end with an alphanumeric character or '_'",
                REASON,
                &["my_name", "MY_NAME", "MyName", "ReasonA,ReasonB", "ReasonA:ReasonB"],
            );
            e.invalid(&reason, &detail);
        }
        if reason.s().len() > REASON_MAX {
            e.too_long(&reason, REASON_MAX);
        }
    }
    if message.s().len() > MESSAGE_MAX {
        e.too_long(&message, MESSAGE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_with_conditions() {
        let time = "2020-01-01T00:00:00Z";
        let good = json!({"type": "a.b/C", "status": "True", "reason": "R", "lastTransitionTime": time, "message": ""});
        let bad = json!({"type": "", "status": "x", "observedGeneration": -1, "lastTransitionTime": null});
        let odd = json!({"type": "a.b/C", "status": "False", "reason": "-", "lastTransitionTime": time, "message": "x".repeat(40_000)});
        let obj = json!({"c": [good, bad, odd]});
        let mut e = Errs::new();
        conditions(&mut e, &At::field(&obj, "c"));
        let found: Vec<String> = e.0.iter().map(|error| format!("{} {:?}", error.field, error.kind)).collect();
        let want = [
            "c[1].type Invalid",
            "c[1].type Invalid",
            "c[1].status NotSupported",
            "c[1].observedGeneration Invalid",
            "c[1].lastTransitionTime Required",
            "c[1].reason Required",
            "c[2].type Duplicate",
            "c[2].reason Invalid",
            "c[2].message TooLong",
        ];
        assert_eq!(found, want);
        assert!(e.0[7].to_string().ends_with(
            "(e.g. 'my_name',  or 'MY_NAME',  or 'MyName',  or 'ReasonA,ReasonB',  or 'ReasonA:ReasonB', regex used for validation is '[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?')"
        ));
    }
}
