//! Expressions of webhooks and admission policies: presence, names, uniqueness, and whether they compile.

use isopod_api::names;

use crate::{
    cel::{Environment, Type},
    validation::{At, Errs},
};

/// Words of the language.
const RESERVED: [&str; 21] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// An expression that must have one of the types `wanted`.
pub(crate) fn expression(e: &mut Errs, at: &At<'_>, environment: &Environment, wanted: &[Type]) {
    if let Err(error) = environment.compile(at.s(), wanted) {
        e.invalid(at, &error);
    }
}

/// An expression that must be there.
pub(crate) fn required(e: &mut Errs, at: &At<'_>, missing: &str, environment: &Environment, wanted: &[Type]) {
    if at.s().trim().is_empty() {
        e.required(at, missing);
    } else {
        expression(e, at, environment, wanted);
    }
}

/// The same without the white space around it, which is not shown either.
pub(crate) fn trimmed(e: &mut Errs, at: &At<'_>, environment: &Environment, wanted: &[Type]) {
    let text = at.s().trim();
    if text.is_empty() {
        e.required(at, "");
    } else if let Err(error) = environment.compile(text, wanted) {
        e.invalid_as(at, text, &error);
    }
}

/// `matchConditions`.
pub(crate) fn match_conditions(e: &mut Errs, list: &At<'_>, environment: &Environment) {
    if list.len() > 64 {
        e.too_many(list, list.len(), 64);
    }
    let mut seen: Vec<&str> = Vec::new();
    for at in list.items() {
        let name = at.get("name");
        trimmed(e, &at.get("expression"), environment, &[Type::Bool]);
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

/// A name that can be used in an expression.
pub(crate) fn identifier(e: &mut Errs, at: &At<'_>) {
    if at.s().trim().is_empty() {
        e.required(at, "name is not specified");
    } else if !names::c_identifier(at.s()).is_empty() || RESERVED.contains(&at.s()) {
        e.invalid(at, "must be a valid CEL identifier");
    }
}
