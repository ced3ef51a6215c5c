//! Expressions of webhooks and admission policies: presence, names, uniqueness.
//!
//! Only what needs no type checker is said here; an expression that does not compile is found by the admission plugin that
//! runs it.

use isopod_api::names;

use crate::validation::{At, Errs};

/// `matchConditions`.
pub(crate) fn match_conditions(e: &mut Errs, list: &At<'_>) {
    if list.len() > 64 {
        return e.too_many(list, list.len(), 64);
    }
    let mut seen: Vec<&str> = Vec::new();
    for at in list.items() {
        let (name, text) = (at.get("name"), at.get("expression"));
        if text.s().trim().is_empty() {
            e.required(&text, "");
        } else if let Some(kind) = literal_type(text.s()).filter(|kind| *kind != "bool") {
            e.invalid(&text, &format!("must evaluate to bool but got {kind}"));
        }
        if name.s().is_empty() {
            e.required(&name, "");
        } else {
            e.qualified_name(&name);
            if seen.contains(&name.s()) {
                e.duplicate(&name, name.s());
            }
        }
        seen.push(name.s());
    }
}

/// The type of an expression that is only a literal or a sum of integers.
pub(crate) fn literal_type(text: &str) -> Option<&'static str> {
    let text = text.trim();
    if text == "true" || text == "false" {
        return Some("bool");
    }
    let integers = !text.is_empty()
        && text.split('+').all(|part| {
            let part = part.trim();
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
        });
    if integers {
        return Some("int");
    }
    let quoted = text.len() >= 2 && (text.starts_with('\'') || text.starts_with('"')) && text.ends_with(&text[..1]);
    (quoted && text[1..text.len() - 1].find(&text[..1]).is_none()).then_some("string")
}

/// A name that can be used in an expression.
pub(crate) fn identifier(e: &mut Errs, at: &At<'_>) {
    if at.s().is_empty() {
        e.required(at, "name is not specified");
    } else if !names::c_identifier(at.s()).is_empty() {
        e.invalid(at, "must be a valid CEL identifier");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals() {
        for (text, want) in [
            ("true", Some("bool")),
            ("1", Some("int")),
            ("1+1", Some("int")),
            ("'a'", Some("string")),
            ("object.x", None),
            ("1 +", None),
        ] {
            assert_eq!(literal_type(text), want, "{text}");
        }
    }
}
