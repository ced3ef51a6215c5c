//! What expressions can call: the cel crate's functions, kube-cel's, and those that differ or are missing there.

use std::{
    cell::Cell,
    cmp::Ordering,
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use kube_cel::{
    KubeCelExt,
    cel::{
        Context, ExecutionError, FunctionContext, ResolveResult, Value as Cel,
        extractors::This,
        objects::{Key, Map, OptionalValue},
    },
};

use super::{authorizer, convert::string, lazy};

/// What is said of an expression that costs more than one may.
pub(crate) const OVER: &str = "operation cancelled: actual cost limit exceeded";

/// Functions and constants, once.
pub(crate) static ROOT: LazyLock<Context<'static>> = LazyLock::new(|| {
    let mut root = Context::default().with_all();
    root.add_function("@tick", tick);
    root.add_function("@read", read);
    root.add_function("@pairs", pairs);
    root.add_function("@insert", insert);
    root.add_function("@sortBy", sort_by);
    root.add_function("@variable", lazy::variable);
    root.add_function("size", size);
    root.add_function("int", int);
    root.add_function("bool", boolean);
    root.add_function("dyn", |value: Cel| -> ResolveResult { Ok(value) });
    root.add_function("type", |value: Cel| -> ResolveResult { Ok(string(type_name(&value))) });
    for name in ["bool", "int", "uint", "double", "string", "bytes", "null_type", "list", "map"] {
        root.add_variable_from_value(name, string(name));
    }
    authorizer::register(&mut root);
    root
});

thread_local! {
    /// What the running expression may still cost.
    static BUDGET: Cell<u64> = const { Cell::new(0) };
}

/// Runs an evaluation with a budget; what is left of it, `None` when it was too little.
pub(super) fn with_budget<T>(budget: u64, run: impl FnOnce() -> T) -> (T, Option<u64>) {
    let before = BUDGET.replace(budget + 1);
    let result = run();
    let left = BUDGET.replace(before);
    (result, left.checked_sub(1))
}

/// Pays for a part of the running expression.
pub(super) fn spend(cost: u64) -> Result<(), ExecutionError> {
    let left = BUDGET.get().saturating_sub(cost);
    BUDGET.set(left);
    if left == 0 {
        return Err(ExecutionError::function_error("@tick", OVER));
    }
    Ok(())
}

/// Pays for one round of a loop.
fn tick(cost: i64) -> ResolveResult {
    spend(cost.unsigned_abs())?;
    Ok(Cel::Bool(true))
}

/// Pays for going through a text, a tenth of its length.
fn read(value: Cel) -> ResolveResult {
    if let Cel::String(text) = &value {
        spend(text.len() as u64 / 10)?;
    }
    Ok(value)
}

/// `[key, value]` of every element.
fn pairs(This(this): This<Cel>) -> ResolveResult {
    let pair = |key: Cel, value: &Cel| Cel::List(Arc::new(vec![key, value.clone()]));
    let all = match &this {
        Cel::List(items) => items.iter().zip(0i64..).map(|(v, i)| pair(Cel::Int(i), v)).collect::<Vec<_>>(),
        Cel::Map(map) => {
            let mut keys: Vec<_> = map.map.iter().collect();
            keys.sort_by(|a, b| a.0.cmp(b.0));
            keys.into_iter().map(|(k, v)| pair(k.into(), v)).collect()
        }
        _ => return Err(ExecutionError::NoSuchOverload),
    };
    Ok(Cel::List(Arc::new(all)))
}

fn insert(map: Cel, key: Cel, value: Cel) -> ResolveResult {
    let Cel::Map(map) = map else { return Err(ExecutionError::NoSuchOverload) };
    let key: Key = key.try_into().map_err(ExecutionError::UnsupportedKeyType)?;
    let mut map: HashMap<Key, Cel> = (*map.map).clone();
    map.insert(key, value);
    Ok(Cel::Map(Map { map: Arc::new(map) }))
}

fn sort_by(items: Cel, keys: Cel) -> ResolveResult {
    let (Cel::List(items), Cel::List(keys)) = (items, keys) else { return Err(ExecutionError::NoSuchOverload) };
    let mut all: Vec<(&Cel, &Cel)> = keys.iter().zip(items.iter()).collect();
    all.sort_by(|a, b| a.0.partial_cmp(b.0).unwrap_or(Ordering::Equal));
    Ok(Cel::List(Arc::new(all.into_iter().map(|(_, item)| item.clone()).collect())))
}

/// Texts are as long as they have code points.
fn size(This(this): This<Cel>) -> ResolveResult {
    let size = match &this {
        Cel::List(items) => items.len(),
        Cel::Map(map) => map.map.len(),
        Cel::String(text) => text.chars().count(),
        Cel::Bytes(bytes) => bytes.len(),
        _ => return Err(ExecutionError::NoSuchOverload),
    };
    Ok(Cel::Int(i64::try_from(size).unwrap_or(i64::MAX)))
}

fn conversion(from: &str, to: &str) -> ExecutionError {
    ExecutionError::function_error(to, format!("type conversion error from '{from}' to '{to}'"))
}

fn int(_: &FunctionContext, This(this): This<Cel>) -> ResolveResult {
    let range = || ExecutionError::function_error("int", "integer overflow");
    Ok(Cel::Int(match &this {
        Cel::Int(i) => *i,
        Cel::UInt(u) => i64::try_from(*u).map_err(|_| range())?,
        // Bounds of i64 as a double are exclusive above.
        Cel::Float(f) if *f > -9.3e18 && *f < 9_223_372_036_854_775_807.0 => *f as i64,
        Cel::Float(_) => return Err(range()),
        Cel::String(text) => {
            let digits = text.strip_prefix('+').map_or(text.as_str(), |d| if d.starts_with('-') { "" } else { d });
            digits.parse().map_err(|_| conversion("string", "int"))?
        }
        Cel::Timestamp(at) => at.timestamp(),
        Cel::Duration(span) => span.num_nanoseconds().ok_or_else(range)?,
        other => return Err(conversion(type_name(other), "int")),
    }))
}

fn boolean(This(this): This<Cel>) -> ResolveResult {
    match &this {
        Cel::Bool(b) => Ok(Cel::Bool(*b)),
        Cel::String(text) => match text.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Cel::Bool(true)),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Cel::Bool(false)),
            _ => Err(conversion("string", "bool")),
        },
        other => Err(conversion(type_name(other), "bool")),
    }
}

/// The name of a value's type.
pub(super) fn type_name(value: &Cel) -> &'static str {
    match value {
        Cel::List(_) => "list",
        Cel::Map(_) => "map",
        Cel::Int(_) => "int",
        Cel::UInt(_) => "uint",
        Cel::Float(_) => "double",
        Cel::String(_) => "string",
        Cel::Bytes(_) => "bytes",
        Cel::Bool(_) => "bool",
        Cel::Duration(_) => "google.protobuf.Duration",
        Cel::Timestamp(_) => "google.protobuf.Timestamp",
        Cel::Null => "null_type",
        Cel::Opaque(opaque) if opaque.downcast_ref::<OptionalValue>().is_some() => "optional_type",
        Cel::Opaque(_) | Cel::Function(..) => "object",
    }
}

/// An error of the evaluation in upstream's words.
pub(super) fn explain(error: &ExecutionError) -> String {
    match error {
        ExecutionError::NoSuchKey(key) => format!("no such key: {key}"),
        ExecutionError::UndeclaredReference(name) => format!("no such attribute(s): {name}"),
        ExecutionError::DivisionByZero(_) => "division by zero".into(),
        ExecutionError::RemainderByZero(_) => "modulus by zero".into(),
        ExecutionError::Overflow(..) => "integer overflow".into(),
        ExecutionError::IndexOutOfBounds(index) => match index {
            Cel::Int(i) => format!("index out of bounds: {i}"),
            _ => "index out of bounds".into(),
        },
        ExecutionError::FunctionError { message, .. } => message.clone(),
        _ => "no such overload".into(),
    }
}
