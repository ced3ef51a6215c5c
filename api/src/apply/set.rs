//! Sets of field paths (`fieldsV1`): which fields a manager owns.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

use super::typed::Cursor;
use crate::text::quote;

/// One step of a path. Keys and values are kept as canonical JSON text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    /// `f:name`: field of a struct or key of a map.
    Field(String),
    /// `k:{"name":"a"}`: item of an associative list.
    Key(String),
    /// `v:"a"`: item of a set.
    Value(String),
    /// `i:0`: item of an atomic list.
    Index(i64),
}

impl Element {
    fn parse(text: &str) -> Option<Self> {
        let (tag, rest) = text.split_once(':')?;
        Some(match tag {
            "f" => Self::Field(rest.to_owned()),
            "k" => {
                let map: BTreeMap<String, Value> = serde_json::from_str(rest).ok()?;
                Self::Key(serde_json::to_string(&map).ok()?)
            }
            "v" => Self::Value(serde_json::from_str::<Value>(rest).ok()?.to_string()),
            "i" => Self::Index(rest.parse().ok()?),
            _ => return None,
        })
    }

    fn tagged(&self) -> String {
        match self {
            Self::Field(name) => format!("f:{name}"),
            Self::Key(json) => format!("k:{json}"),
            Self::Value(json) => format!("v:{json}"),
            Self::Index(index) => format!("i:{index}"),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => write!(f, ".{name}"),
            Self::Key(json) => {
                let map: BTreeMap<String, Value> = serde_json::from_str(json).unwrap_or_default();
                let show = |v: &Value| v.as_str().map_or_else(|| v.to_string(), quote);
                let parts: Vec<_> = map.iter().map(|(k, v)| format!("{k}={}", show(v))).collect();
                write!(f, "[{}]", parts.join(","))
            }
            Self::Value(json) => write!(f, "[={json}]"),
            Self::Index(index) => write!(f, "[{index}]"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Node {
    member: bool,
    children: Set,
}

/// A set of paths, as a trie.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Set(BTreeMap<Element, Node>);

impl Set {
    /// Reads a `fieldsV1` object.
    pub(super) fn from_value(value: &Value) -> Option<Self> {
        let mut out = Self::default();
        for (key, value) in value.as_object()? {
            if key == "." {
                continue;
            }
            let children = Self::from_value(value)?;
            let member = children.0.is_empty() || value.get(".").is_some();
            out.0.insert(Element::parse(key)?, Node { member, children });
        }
        Some(out)
    }

    /// Writes a `fieldsV1` object.
    pub(super) fn to_value(&self) -> Value {
        let mut out = Map::new();
        for (element, node) in &self.0 {
            let mut child = node.children.to_value();
            if let (true, Value::Object(map)) = (node.member && !node.children.0.is_empty(), &mut child) {
                map.shift_insert(0, ".".into(), Value::Object(Map::new()));
            }
            out.insert(element.tagged(), child);
        }
        Value::Object(out)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.values().all(|node| !node.member && node.children.is_empty())
    }

    pub(super) fn insert(&mut self, path: &[Element]) {
        let Some((first, rest)) = path.split_first() else { return };
        let node = self.0.entry(first.clone()).or_default();
        if rest.is_empty() { node.member = true } else { node.children.insert(rest) }
    }

    /// Whether the one-step path is a member.
    pub(super) fn has(&self, element: &Element) -> bool {
        self.0.get(element).is_some_and(|node| node.member)
    }

    /// What lies below an element.
    pub(super) fn below(&self, element: &Element) -> Option<&Self> {
        self.0.get(element).map(|node| &node.children).filter(|set| !set.is_empty())
    }

    pub(super) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        for (element, node) in &other.0 {
            let mine = out.0.entry(element.clone()).or_default();
            mine.member |= node.member;
            mine.children = mine.children.union(&node.children);
        }
        out
    }

    /// Members of this that are not members of `other`.
    pub(super) fn difference(&self, other: &Self) -> Self {
        self.combine(other, |mine, theirs| mine && !theirs, false)
    }

    /// Like [`Set::difference`], and everything below a member of `other` goes too.
    pub(super) fn recursive_difference(&self, other: &Self) -> Self {
        self.combine(other, |mine, theirs| mine && !theirs, true)
    }

    pub(super) fn intersection(&self, other: &Self) -> Self {
        let mut out = Self::default();
        for (element, node) in &self.0 {
            if let Some(theirs) = other.0.get(element) {
                let member = node.member && theirs.member;
                let children = node.children.intersection(&theirs.children);
                if member || !children.0.is_empty() {
                    out.0.insert(element.clone(), Node { member, children });
                }
            }
        }
        out
    }

    fn combine(&self, other: &Self, keep: fn(bool, bool) -> bool, recursive: bool) -> Self {
        let mut out = Self::default();
        for (element, node) in &self.0 {
            let theirs = other.0.get(element);
            let owned = theirs.is_some_and(|t| t.member);
            if recursive && owned {
                continue;
            }
            let children = match theirs {
                Some(theirs) => node.children.combine(&theirs.children, keep, recursive),
                None => node.children.clone(),
            };
            let member = keep(node.member, owned);
            if member || !children.0.is_empty() {
                out.0.insert(element.clone(), Node { member, children });
            }
        }
        out
    }

    /// Makes every struct field that has children a member too.
    pub(super) fn with_named_fields(&self, ty: Cursor<'_>) -> Self {
        let mut out = Self::default();
        for (element, node) in &self.0 {
            let named = matches!(element, Element::Field(name) if ty.declares(name));
            let member = node.member || (named && !node.children.0.is_empty());
            let children = node.children.with_named_fields(ty.descend(element));
            out.0.insert(element.clone(), Node { member, children });
        }
        out
    }

    /// All member paths as text, in order.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect("", &mut out);
        out
    }

    /// Upstream lists the members of a level before anything below it.
    fn collect(&self, prefix: &str, out: &mut Vec<String>) {
        out.extend(self.0.iter().filter(|(_, node)| node.member).map(|(element, _)| format!("{prefix}{element}")));
        for (element, node) in &self.0 {
            node.children.collect(&format!("{prefix}{element}"), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn round_trip_and_algebra() {
        let a = json!({"f:data": {".": {}, "f:a": {}}, "f:l": {"k:{\"b\":1,\"a\":\"x\"}": {".": {}, "f:z": {}}, "v:\"q\"": {}}});
        let set = Set::from_value(&a).unwrap();
        let mut want = a.clone();
        let list = want["f:l"].as_object_mut().unwrap();
        let item = list.shift_remove("k:{\"b\":1,\"a\":\"x\"}").unwrap();
        list.insert("k:{\"a\":\"x\",\"b\":1}".into(), item);
        assert_eq!(set.to_value(), want);
        assert_eq!(set.paths(), [".data", ".data.a", ".l[a=\"x\",b=1]", ".l[=\"q\"]", ".l[a=\"x\",b=1].z"]);
        let b = Set::from_value(&json!({"f:data": {"f:a": {}}})).unwrap();
        assert_eq!(set.intersection(&b), b);
        assert!(b.difference(&set).is_empty());
        assert_eq!(set.difference(&b).union(&b), set);
        let all = Set::from_value(&json!({"f:data": {}})).unwrap();
        assert!(b.recursive_difference(&all).is_empty());
    }
}
