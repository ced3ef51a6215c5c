//! Values seen through their schema: validation, field sets, comparison, merging and removal, as structured-merge-diff
//! defines them.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::set::{Element, Set};
use crate::{
    schema::{Definition, ListKind, Type, Zero},
    text::go_value,
};

static ANY: Type = Type::Any;

/// A type, and what the field that leads here says about atomicity.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cursor<'a> {
    /// The root or any struct.
    Struct(&'a Definition, bool),
    /// Any other type.
    Type(&'a Type, Option<bool>),
}

/// A type resolved against a value.
enum Shape<'a> {
    Scalar,
    List { item: Cursor<'a>, kind: &'a ListKind },
    Map { atomic: bool },
}

static ATOMIC: ListKind = ListKind::Atomic;

impl<'a> Cursor<'a> {
    pub(super) fn root(def: &'a Definition) -> Self {
        Self::Struct(def, false)
    }

    fn of(ty: &'a Type, atomic: Option<bool>) -> Self {
        match ty {
            Type::Object(def) => {
                let def = def.get();
                Self::Struct(def, atomic.unwrap_or(def.atomic))
            }
            ty => Self::Type(ty, atomic),
        }
    }

    /// Whether it is a struct with this field.
    pub(super) fn declares(&self, name: &str) -> bool {
        matches!(self, Self::Struct(def, _) if def.field(name).is_some())
    }

    fn field(&self, name: &str) -> Self {
        match self {
            Self::Struct(def, _) => match def.field(name) {
                Some(field) => Self::of(&field.ty, field.atomic),
                None => Self::Type(&ANY, None),
            },
            Self::Type(Type::Map(map), _) => Self::of(&map.value, None),
            Self::Type(..) => Self::Type(&ANY, None),
        }
    }

    fn item(&self) -> Self {
        match self {
            Self::Type(Type::List(list), _) => Self::of(&list.item, None),
            _ => Self::Type(&ANY, None),
        }
    }

    /// The type one step down.
    pub(super) fn descend(&self, element: &Element) -> Self {
        match element {
            Element::Field(name) => self.field(name),
            _ => self.item(),
        }
    }

    fn shape(&self, sample: &Value) -> Shape<'a> {
        match self {
            Self::Struct(_, atomic) => Shape::Map { atomic: *atomic },
            Self::Type(Type::Map(map), atomic) => Shape::Map { atomic: atomic.unwrap_or(map.atomic) },
            Self::Type(Type::List(list), _) => Shape::List { item: Self::of(&list.item, None), kind: &list.kind },
            Self::Type(Type::Any, _) => match sample {
                Value::Object(_) => Shape::Map { atomic: false },
                Value::Array(_) => Shape::List { item: Self::Type(&ANY, None), kind: &ATOMIC },
                _ => Shape::Scalar,
            },
            Self::Type(..) => Shape::Scalar,
        }
    }

    /// Path element of a list item, or why it has none.
    fn element(&self, kind: &ListKind, index: usize, value: &Value) -> Result<Element, String> {
        match kind {
            ListKind::Atomic => Ok(Element::Index(index as i64)),
            ListKind::Set => Ok(Element::Value(value.to_string())),
            ListKind::Map(keys) => {
                let mut out: BTreeMap<&str, Value> = BTreeMap::new();
                for key in keys {
                    let found = value.get(key).filter(|v| !v.is_null()).cloned().or_else(|| self.key_default(key));
                    let Some(found) = found else {
                        return Err(format!(
                            "associative list with keys has an element that omits key field {} (and doesn't have default value)",
                            crate::text::quote(key)
                        ));
                    };
                    out.insert(key, found);
                }
                Ok(Element::Key(serde_json::to_string(&out).unwrap_or_default()))
            }
        }
    }

    /// Default of a key field of a list item of this type.
    fn key_default(&self, key: &str) -> Option<Value> {
        let Self::Struct(def, _) = self else { return None };
        let field = def.field(key)?;
        if let Some(default) = &field.default {
            return Some((**default).clone());
        }
        match (field.zero, &field.ty) {
            (Zero::Print, Type::String) => Some("".into()),
            (Zero::Print, Type::Int32 | Type::Int64) => Some(0.into()),
            _ => None,
        }
    }
}

/// One problem of a typed value.
fn problem(path: &[Element], message: &str) -> String {
    let path: String = path.iter().map(ToString::to_string).collect();
    format!("{path}: {message}")
}

/// Go's text of a value that should have been something else.
fn shown(v: &Value) -> String {
    let inner = match v {
        Value::String(s) => crate::text::quote(s),
        other => go_value(other),
    };
    format!("&value.valueUnstructured{{Value:{inner}}}")
}

/// Checks a value against its type: unknown fields, wrong types, duplicate keys.
pub(super) fn validate(ty: Cursor<'_>, value: &Value, duplicates: bool) -> Result<(), String> {
    let mut errors = Vec::new();
    check(ty, value, duplicates, &mut Vec::new(), &mut errors);
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => Err(format!("errors:\n  {}", errors.join("\n  "))),
    }
}

fn check(ty: Cursor<'_>, value: &Value, duplicates: bool, path: &mut Vec<Element>, errors: &mut Vec<String>) {
    if value.is_null() {
        return;
    }
    match (ty, value) {
        (Cursor::Struct(def, _), Value::Object(map)) => {
            for (key, value) in map {
                path.push(Element::Field(key.clone()));
                if def.field(key).is_none() && !def.opaque {
                    errors.push(problem(path, "field not declared in schema"));
                } else {
                    check(ty.field(key), value, duplicates, path, errors);
                }
                path.pop();
            }
        }
        (Cursor::Type(Type::Map(_), _), Value::Object(map)) => {
            for (key, value) in map {
                path.push(Element::Field(key.clone()));
                check(ty.field(key), value, duplicates, path, errors);
                path.pop();
            }
        }
        (Cursor::Type(Type::List(list), _), Value::Array(items)) => {
            let item = ty.item();
            let mut seen = Vec::with_capacity(items.len());
            for (i, value) in items.iter().enumerate() {
                match item.element(&list.kind, i, value) {
                    Ok(element) => {
                        if !duplicates && seen.contains(&element) {
                            errors.push(problem(path, &format!("duplicate entries for key {element}")));
                        }
                        path.push(element.clone());
                        check(item, value, duplicates, path, errors);
                        path.pop();
                        seen.push(element);
                    }
                    Err(message) => errors.push(problem(path, &format!("element {i}: {message}"))),
                }
            }
        }
        (Cursor::Struct(..) | Cursor::Type(Type::Map(_), _), other) => {
            errors.push(problem(path, &format!("expected map, got &{{{}}}", go_value(other))));
        }
        (Cursor::Type(Type::List(_), _), other) => {
            errors.push(problem(path, &format!("expected list, got &{{{}}}", go_value(other))));
        }
        (Cursor::Type(Type::String | Type::Bytes, _), other) if !other.is_string() => {
            errors.push(problem(path, &format!("expected string, got {}", shown(other))));
        }
        (Cursor::Type(Type::Bool, _), other) if !other.is_boolean() => {
            errors.push(problem(path, &format!("expected boolean, got {}", shown(other))));
        }
        (Cursor::Type(Type::Int32 | Type::Int64 | Type::Double, _), other) if !other.is_number() => {
            errors.push(problem(path, &format!("expected numeric (int or float), got {}", shown(other))));
        }
        _ => {}
    }
}

/// Paths of the atomic lists, maps and structs a value has.
pub(super) fn atomics(ty: Cursor<'_>, value: &Value) -> Vec<String> {
    let mut out = Vec::new();
    find_atomics(ty, value, "", &mut out);
    out
}

fn find_atomics(ty: Cursor<'_>, value: &Value, path: &str, out: &mut Vec<String>) {
    match (ty.shape(value), value) {
        (Shape::Map { atomic }, Value::Object(map)) => {
            if atomic {
                out.push(path.to_owned());
            }
            for (key, value) in map {
                find_atomics(ty.field(key), value, &format!("{path}.{key}"), out);
            }
        }
        (Shape::List { item, kind }, Value::Array(items)) => {
            if matches!(kind, ListKind::Atomic) {
                out.push(path.to_owned());
            }
            for (i, value) in items.iter().enumerate() {
                find_atomics(item, value, &format!("{path}[{i}]"), out);
            }
        }
        _ => {}
    }
}

/// The fields a value sets.
pub(super) fn field_set(ty: Cursor<'_>, value: &Value) -> Set {
    let mut out = Set::default();
    collect(ty, value, &mut Vec::new(), &mut out);
    out
}

fn collect(ty: Cursor<'_>, value: &Value, path: &mut Vec<Element>, out: &mut Set) {
    match (ty.shape(value), value) {
        (Shape::Map { atomic: false }, Value::Object(map)) => {
            for (key, value) in map {
                path.push(Element::Field(key.clone()));
                collect(ty.field(key), value, path, out);
                let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                if empty || !ty.declares(key) {
                    out.insert(path);
                }
                path.pop();
            }
        }
        (Shape::Map { atomic: false }, _) => {}
        (Shape::List { item, kind: kind @ (ListKind::Set | ListKind::Map(_)) }, Value::Array(items)) => {
            for (i, value) in items.iter().enumerate() {
                let Ok(element) = item.element(kind, i, value) else { continue };
                path.push(element);
                collect(item, value, path, out);
                out.insert(path);
                path.pop();
            }
        }
        (Shape::List { kind: ListKind::Set | ListKind::Map(_), .. }, _) => {}
        _ => out.insert(path),
    }
}

/// How two values differ.
#[derive(Debug, Clone, Default)]
pub(super) struct Comparison {
    pub(super) added: Set,
    pub(super) modified: Set,
    pub(super) removed: Set,
}

/// Compares two values of one type.
pub(super) fn compare(ty: Cursor<'_>, old: &Value, new: &Value) -> Comparison {
    let mut out = Comparison::default();
    walk(ty, Some(old), Some(new), &mut Vec::new(), &mut out);
    out
}

fn leaf(old: Option<&Value>, new: Option<&Value>, path: &[Element], out: &mut Comparison) {
    match (old, new) {
        (None, Some(_)) => out.added.insert(path),
        (Some(_), None) => out.removed.insert(path),
        (Some(old), Some(new)) if old != new => out.modified.insert(path),
        _ => {}
    }
}

fn is_empty(v: Option<&Value>) -> bool {
    match v {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

fn walk(ty: Cursor<'_>, old: Option<&Value>, new: Option<&Value>, path: &mut Vec<Element>, out: &mut Comparison) {
    // A null that was not there before counts as set: Go prints unset times in new list items.
    let Some(sample) = new.filter(|v| !v.is_null()).or(old).or(new) else { return };
    let both_empty = is_empty(old) && is_empty(new);
    match ty.shape(sample) {
        Shape::Map { atomic: false } if !both_empty => {
            let (x, y) = (old.and_then(Value::as_object), new.and_then(Value::as_object));
            for (key, value) in x.into_iter().flatten() {
                path.push(Element::Field(key.clone()));
                walk(ty.field(key), Some(value), y.and_then(|y| y.get(key)), path, out);
                path.pop();
            }
            for (key, value) in y.into_iter().flatten().filter(|(k, _)| x.is_none_or(|x| !x.contains_key(*k))) {
                path.push(Element::Field(key.clone()));
                walk(ty.field(key), None, Some(value), path, out);
                path.pop();
            }
        }
        Shape::List { item, kind: kind @ (ListKind::Set | ListKind::Map(_)) } if !both_empty => {
            let index = |v: Option<&Value>| -> Vec<(Element, Vec<Value>)> {
                let mut out: Vec<(Element, Vec<Value>)> = Vec::new();
                for (i, value) in v.and_then(Value::as_array).into_iter().flatten().enumerate() {
                    let Ok(element) = item.element(kind, i, value) else { continue };
                    match out.iter_mut().find(|(e, _)| *e == element) {
                        Some((_, values)) => values.push(value.clone()),
                        None => out.push((element, vec![value.clone()])),
                    }
                }
                out
            };
            let (x, y) = (index(old), index(new));
            for (element, values) in &x {
                let other = y.iter().find(|(e, _)| e == element).map(|(_, v)| v);
                path.push(element.clone());
                match other {
                    Some(other) if values.len() == 1 && other.len() == 1 => {
                        walk(item, Some(&values[0]), Some(&other[0]), path, out);
                    }
                    Some(other) if values != other => out.modified.insert(path),
                    Some(_) => {}
                    None => walk(item, values.first(), None, path, out),
                }
                path.pop();
            }
            for (element, values) in y.iter().filter(|(e, _)| x.iter().all(|(o, _)| o != e)) {
                path.push(element.clone());
                walk(item, None, values.first(), path, out);
                path.pop();
            }
        }
        _ => {
            leaf(old, new, path, out);
            return;
        }
    }
    if old.is_none() {
        out.added.insert(path);
    } else if new.is_none() {
        out.removed.insert(path);
    }
}

/// Merges `new` over `old`.
pub(super) fn merge(ty: Cursor<'_>, old: &Value, new: &Value) -> Value {
    match (ty.shape(if new.is_null() { old } else { new }), old, new) {
        (Shape::Map { atomic: false }, Value::Object(x), Value::Object(y)) => {
            let mut out = x.clone();
            for (key, value) in y {
                let merged = match x.get(key) {
                    Some(old) => merge(ty.field(key), old, value),
                    None => value.clone(),
                };
                out.insert(key.clone(), merged);
            }
            Value::Object(out)
        }
        (Shape::List { item, kind: kind @ (ListKind::Set | ListKind::Map(_)) }, Value::Array(x), Value::Array(y)) => {
            Value::Array(merge_list(item, kind, x, y))
        }
        (
            Shape::Map { atomic: false } | Shape::List { kind: ListKind::Set | ListKind::Map(_), .. },
            old,
            Value::Null,
        ) => old.clone(),
        (_, _, new) => new.clone(),
    }
}

/// Keeps the relative order of both lists; where they disagree, the new one wins.
fn merge_list(item: Cursor<'_>, kind: &ListKind, old: &[Value], new: &[Value]) -> Vec<Value> {
    let index = |list: &[Value]| -> Vec<Element> {
        let fallback = |i: usize| Element::Index(i as i64);
        list.iter().enumerate().map(|(i, v)| item.element(kind, i, v).unwrap_or_else(|_| fallback(i))).collect()
    };
    let (left, right) = (index(old), index(new));
    let find = |list: &[Element], e: &Element| list.iter().position(|x| x == e);
    let mut shared = right.iter().filter(|e| left.contains(e));
    let mut next_shared = shared.next();
    let mut done: Vec<&Element> = Vec::new();
    let mut out = Vec::with_capacity(old.len() + new.len());
    let both = |l: &Element, r: usize| match find(&left, l) {
        Some(at) => merge(item, &old[at], &new[r]),
        None => new[r].clone(),
    };
    let (mut l, mut r) = (0, 0);
    while l < left.len() || r < right.len() {
        if l < left.len() && r < right.len() {
            if left[l] == right[r] {
                out.push(both(&left[l], r));
                done.push(&right[r]);
                (l, r) = (l + 1, r + 1);
                next_shared = shared.next();
                continue;
            }
            if right.contains(&left[l]) && next_shared.is_some_and(|next| *next != left[l]) {
                l += 1;
                continue;
            }
        }
        if l < left.len() {
            if !right.contains(&left[l]) {
                out.push(old[l].clone());
                l += 1;
                continue;
            }
            if done.contains(&&left[l]) {
                l += 1;
            }
        }
        if r < right.len() {
            out.push(both(&right[r], r));
            done.push(&right[r]);
            if next_shared == Some(&right[r]) {
                next_shared = shared.next();
            }
            r += 1;
        }
    }
    out
}

/// Removes the members of `set` from a value; what becomes empty becomes null.
pub(super) fn remove(ty: Cursor<'_>, value: &Value, set: &Set) -> Value {
    match (ty.shape(value), value) {
        (Shape::Map { atomic: false }, Value::Object(map)) => {
            let mut out = Map::new();
            for (key, value) in map {
                let element = Element::Field(key.clone());
                if set.has(&element) {
                    continue;
                }
                let value = match set.below(&element) {
                    Some(below) => remove(ty.field(key), value, below),
                    None => value.clone(),
                };
                out.insert(key.clone(), value);
            }
            if out.is_empty() { Value::Null } else { Value::Object(out) }
        }
        (Shape::List { item, kind: kind @ (ListKind::Set | ListKind::Map(_)) }, Value::Array(items)) => {
            let mut out = Vec::with_capacity(items.len());
            for (i, value) in items.iter().enumerate() {
                let Ok(element) = item.element(kind, i, value) else {
                    out.push(value.clone());
                    continue;
                };
                if set.has(&element) {
                    continue;
                }
                out.push(match set.below(&element) {
                    Some(below) => remove(item, value, below),
                    None => value.clone(),
                });
            }
            if out.is_empty() { Value::Null } else { Value::Array(out) }
        }
        (Shape::Scalar, value) => value.clone(),
        _ => Value::Null,
    }
}
