//! Names of messages in mutations: `Object.spec{...}` is what belongs into the field `spec` of `Object{...}`. Upstream looks
//! at the names of what was made, here they are read off the expression: through fields, lists, maps and `map()`.

use kube_cel::cel::common::ast::{EntryExpr, Expr, IdedExpr};

const ROOT: &str = "Object";
const PATCH: &str = "JSONPatch";

/// What is wrong with the names in an expression.
pub(super) fn mismatches(root: &IdedExpr) -> Option<String> {
    let mut found = Vec::new();
    walk(root, None, &mut found);
    (!found.is_empty()).then(|| found.join("\n"))
}

fn walk(expr: &IdedExpr, expected: Option<&str>, found: &mut Vec<String>) {
    match &expr.expr {
        Expr::Struct(message) => {
            let name = message.type_name.as_str();
            // The value of a patch has the name it begins with.
            let expected = expected.unwrap_or(name);
            if name != PATCH && name != expected {
                found.push(format!(
                    "unexpected type name \"{name}\", expected \"{expected}\", which matches field name path from root {ROOT} type"
                ));
            }
            for entry in &message.entries {
                if let EntryExpr::StructField(field) = &entry.expr {
                    let inside = format!("{expected}.{}", field.field);
                    walk(&field.value, Some(inside.as_str()).filter(|_| name != PATCH), found);
                }
            }
        }
        Expr::List(list) => list.elements.iter().for_each(|item| walk(item, expected, found)),
        Expr::Map(map) => {
            for entry in &map.entries {
                if let EntryExpr::MapEntry(entry) = &entry.expr {
                    walk(&entry.value, expected, found);
                }
            }
        }
        Expr::Call(call) if call.func_name == "map" && call.target.is_some() => {
            call.args.iter().skip(1).for_each(|body| walk(body, expected, found));
        }
        _ => {}
    }
}
