//! The functions expressions may call, by their types.

use std::{collections::HashMap, sync::LazyLock};

use super::types::Type;

/// One overload.
#[derive(Debug)]
pub(super) struct Signature {
    /// Whether it is called on a value (the first argument).
    pub(super) method: bool,
    /// Arguments.
    pub(super) arguments: Vec<Type>,
    /// Result.
    pub(super) result: Type,
}

static TABLE: LazyLock<HashMap<&'static str, Vec<Signature>>> = LazyLock::new(|| {
    let mut table: HashMap<_, Vec<_>> = HashMap::new();
    let lines = include_str!("signatures.txt").lines().filter(|l| !l.starts_with('#'));
    // Comparisons are defined between all numbers, and within each of the other ordered types.
    for name in ["_<_", "_<=_", "_>_", "_>=_"] {
        let numbers = [Type::Int, Type::Uint, Type::Double];
        let mixed = numbers.iter().flat_map(|a| numbers.iter().map(move |b| (a.clone(), b.clone())));
        let others = [Type::Bool, Type::String, Type::Bytes, Type::Timestamp, Type::Duration];
        let pairs = mixed.chain(others.into_iter().map(|t| (t.clone(), t)));
        let signatures = pairs.map(|(a, b)| Signature { method: false, arguments: vec![a, b], result: Type::Bool });
        table.insert(name, signatures.collect());
    }
    for line in lines {
        let mut words = line.splitn(3, ' ');
        if let (Some(name), Some(form), Some(types)) = (words.next(), words.next(), words.next()) {
            table.entry(name).or_default().push(signature(form == "m", types));
        }
    }
    table
});

/// All overloads of a function.
pub(super) fn overloads(name: &str) -> Option<&'static [Signature]> {
    TABLE.get(name).map(Vec::as_slice)
}

fn signature(method: bool, types: &str) -> Signature {
    let (arguments, result) = types.split_once("->").unwrap_or((types, "dyn"));
    let arguments = split(arguments).into_iter().map(parse).collect();
    Signature { method, arguments, result: parse(result) }
}

/// Splits at commas outside brackets.
fn split(text: &str) -> Vec<&str> {
    let (mut out, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                out.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    if from < text.len() {
        out.push(&text[from..]);
    }
    out
}

fn parse(text: &str) -> Type {
    if let Some((outer, inner)) = text.strip_suffix(')').and_then(|t| t.split_once('(')) {
        let mut inner = split(inner).into_iter().map(parse);
        let first = Box::new(inner.next().unwrap_or(Type::Dyn));
        return match outer {
            "list" => Type::List(first),
            "optional" => Type::Optional(first),
            "map" => Type::Map(first, Box::new(inner.next().unwrap_or(Type::Dyn))),
            _ => Type::Meta(first),
        };
    }
    match text {
        "bool" => Type::Bool,
        "int" => Type::Int,
        "uint" => Type::Uint,
        "double" => Type::Double,
        "string" => Type::String,
        "bytes" => Type::Bytes,
        "timestamp" => Type::Timestamp,
        "duration" => Type::Duration,
        "dyn" => Type::Dyn,
        text if text.len() == 1 => Type::Param(text.chars().next().unwrap_or('A')),
        name => Type::named(name),
    }
}
