//! Strategic merge patch: lists are merged by key, and directives say what plain merging cannot.
//!
//! | directive | effect |
//! |---|---|
//! | `$patch: delete` in a list item | removes the item with the same merge key |
//! | `$patch: delete` in a map | empties the map |
//! | `$patch: replace` | the patch replaces the map or list |
//! | `$retainKeys: [..]` | removes all other fields of the map |
//! | `$setElementOrder/f: [..]` | order of list `f` |
//! | `$deleteFromPrimitiveList/f: [..]` | removes scalars from list `f` |

use serde_json::{Map, Value};

use crate::{
    schema::{Definition, Type},
    status::Status,
    text::go_value,
};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

type Object = Map<String, Value>;

/// Applies a strategic merge patch. Without a definition it behaves like a merge patch that knows directives.
pub fn strategic_merge(def: &Definition, doc: &mut Value, patch: &Value) -> Result<(), Status> {
    let (Value::Object(doc_map), Value::Object(patch)) = (&mut *doc, patch) else {
        *doc = patch.clone();
        return Ok(());
    };
    let original = std::mem::take(doc_map);
    *doc_map = merge_map(original, patch.clone(), Some(def)).map_err(Status::unknown)?;
    Ok(())
}

/// How a list field merges.
struct ListPatch<'a> {
    merge: bool,
    key: &'a str,
    item: Option<&'a Definition>,
}

fn list_patch<'a>(def: Option<&'a Definition>, field: &str) -> ListPatch<'a> {
    let Some(field) = def.and_then(|d| d.field(field)) else {
        return ListPatch { merge: false, key: "", item: None };
    };
    let item = match &field.ty {
        Type::List(list) => match &list.item {
            Type::Object(item) => Some(item.get()),
            _ => None,
        },
        _ => None,
    };
    ListPatch { merge: field.patch.merge, key: field.merge_key.as_deref().unwrap_or_default(), item }
}

fn struct_of<'a>(def: Option<&'a Definition>, field: &str) -> Option<&'a Definition> {
    match &def?.field(field)?.ty {
        Type::Object(def) => Some(def.get()),
        Type::Map(map) => match &map.value {
            // Every key of the map has this type; merging a map value looks it up again below.
            Type::Object(def) => Some(def.get()),
            _ => None,
        },
        _ => None,
    }
}

fn bad_patch_type(directive: &Value, map: &Object) -> String {
    format!("unknown patch type: {} in map: {}", go_value(directive), go_value(&Value::Object(map.clone())))
}

fn merge_map(mut original: Object, mut patch: Object, def: Option<&Definition>) -> Result<Object, String> {
    if let Some(directive) = patch.get(PATCH) {
        return match directive.as_str() {
            Some("replace") => {
                patch.shift_remove(PATCH);
                Ok(patch)
            }
            Some("delete") => Ok(Object::new()),
            _ => Err(bad_patch_type(directive, &patch)),
        };
    }
    retain_keys(&mut original, &mut patch)?;
    let orders: Vec<String> = patch.keys().filter(|k| k.starts_with(ORDER)).cloned().collect();
    for directive in orders {
        let order = patch.shift_remove(&directive).unwrap_or_default();
        set_order(&mut original, &mut patch, &directive[ORDER.len()..], order, def)?;
    }
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_FROM) {
            if let (Some(Value::Array(list)), Value::Array(remove)) = (original.get_mut(field), &value) {
                list.retain(|item| !remove.contains(item));
            }
            continue;
        }
        merge_field(&mut original, key, value, def)?;
    }
    Ok(original)
}

fn merge_field(original: &mut Object, key: String, value: Value, def: Option<&Definition>) -> Result<(), String> {
    if value.is_null() {
        original.shift_remove(&key);
        return Ok(());
    }
    let Some(old) = original.get_mut(&key) else {
        if let Some(value) = without_directives(value) {
            original.insert(key, value);
        }
        return Ok(());
    };
    match (&mut *old, value) {
        (Value::Object(map), Value::Object(patch)) => {
            let merged = merge_map(std::mem::take(map), patch, struct_of(def, &key))?;
            *old = Value::Object(merged);
        }
        (Value::Array(list), Value::Array(patch)) => {
            let how = list_patch(def, &key);
            let merged = if how.merge { merge_list(std::mem::take(list), patch, &how, &key)? } else { patch };
            *old = Value::Array(merged);
        }
        (_, value) => *old = value,
    }
    Ok(())
}

/// A new value: its directives have nothing to act on. `None` for a map that says how to merge itself: upstream drops it.
fn without_directives(value: Value) -> Option<Value> {
    match value {
        Value::Object(mut map) => {
            if map.contains_key(PATCH) {
                return None;
            }
            map.shift_remove(RETAIN_KEYS);
            let mut out = Object::new();
            for (key, value) in map {
                if key.starts_with(ORDER) || key.starts_with(DELETE_FROM) || value.is_null() {
                    continue;
                }
                if let Some(value) = without_directives(value) {
                    out.insert(key, value);
                }
            }
            Some(Value::Object(out))
        }
        Value::Array(items) => Some(items.into_iter().filter_map(without_directives).collect()),
        other => Some(other),
    }
}

fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), String> {
    let Some(keys) = patch.shift_remove(RETAIN_KEYS) else { return Ok(()) };
    let Value::Array(keys) = keys else { return Err("invalid patch format of retainKeys".into()) };
    let listed = |key: &str| keys.iter().any(|k| k.as_str() == Some(key));
    for (key, value) in patch.iter() {
        let field = key.strip_prefix(DELETE_FROM).or_else(|| key.strip_prefix(ORDER)).unwrap_or(key);
        if !value.is_null() && key != PATCH && !listed(field) {
            return Err("invalid patch format of retainKeys".into());
        }
    }
    original.retain(|key, _| listed(key));
    Ok(())
}

/// Equality of list items: by merge key for objects, by value for scalars.
fn same(a: &Value, b: &Value, key: &str) -> bool {
    if key.is_empty() {
        return a == b;
    }
    match (a.get(key), b.get(key)) {
        (Some(a), Some(b)) => a == b,
        _ => false,
    }
}

fn position(list: &[Value], item: &Value, key: &str) -> Option<usize> {
    list.iter().position(|other| same(other, item, key))
}

/// `$setElementOrder/field`.
fn set_order(
    original: &mut Object,
    patch: &mut Object,
    field: &str,
    order: Value,
    def: Option<&Definition>,
) -> Result<(), String> {
    let Value::Array(order) = order else {
        return Err("invalid patch format of setElementOrder list".into());
    };
    let how = list_patch(def, field);
    let given = match patch.get(field) {
        Some(Value::Array(items)) => Some(items.clone()),
        _ => None,
    };
    check_order(given.as_deref().unwrap_or_default(), &order, how.key)?;
    let live = match original.get(field) {
        Some(Value::Array(items)) => Some(items.clone()),
        _ => None,
    };
    let merged = match (&live, given) {
        (Some(live), None) => live.clone(),
        (None, Some(given)) => match without_directives(Value::Array(given)) {
            Some(Value::Array(items)) => items,
            _ => return Ok(()),
        },
        (Some(live), Some(given)) if how.merge => merge_list(live.clone(), given, &how, field)?,
        (Some(_), Some(given)) => given,
        (None, None) => return Ok(()),
    };
    let ordered = arrange(merged, &order, live.as_deref().unwrap_or_default(), how.key);
    original.insert(field.to_owned(), Value::Array(ordered));
    patch.shift_remove(field);
    Ok(())
}

fn check_order(given: &[Value], order: &[Value], key: &str) -> Result<(), String> {
    let kept: Vec<&Value> = given.iter().filter(|v| v.get(PATCH).is_none()).collect();
    let mut at = 0;
    for item in order {
        if at < kept.len() && same(kept[at], item, key) {
            at += 1;
        }
    }
    if at < kept.len() {
        return Err(format!(
            "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
            go_value(&given.to_vec().into()),
            go_value(&order.to_vec().into())
        ));
    }
    Ok(())
}

fn merge_list(mut live: Vec<Value>, patch: Vec<Value>, how: &ListPatch<'_>, field: &str) -> Result<Vec<Value>, String> {
    if live.is_empty() && patch.is_empty() {
        return Ok(live);
    }
    let before = live.clone();
    if !live.iter().chain(&patch).any(Value::is_object) {
        for item in &patch {
            if !live.contains(item) {
                live.push(item.clone());
            }
        }
        return Ok(arrange(live, &patch, &before, ""));
    }
    if how.key.is_empty() {
        return Err(format!("cannot merge lists without merge key for {field}"));
    }
    let mut plain = Vec::new();
    let mut replace = false;
    for item in patch {
        let Value::Object(map) = &item else {
            return Err(format!("expected a map in list {field}"));
        };
        match (map.get(PATCH), map.get(PATCH).and_then(Value::as_str)) {
            (None, _) => plain.push(item),
            (_, Some("delete")) if map.contains_key(how.key) => live.retain(|other| !same(other, &item, how.key)),
            (_, Some("delete")) => {
                return Err(format!("map: {} does not contain declared merge key: {}", go_value(&item), how.key));
            }
            (_, Some("replace")) => replace = true,
            (_, Some("merge")) => return Err("merging lists cannot yet be specified in the patch".into()),
            (Some(directive), _) => return Err(bad_patch_type(directive, map)),
        }
    }
    if replace {
        return Ok(plain);
    }
    for item in &plain {
        if item.get(how.key).is_none() {
            return Err(format!("map: {} does not contain declared merge key: {}", go_value(item), how.key));
        }
        match position(&live, item, how.key) {
            Some(at) => {
                if let (Value::Object(map), Value::Object(patch)) = (live[at].take(), item.clone()) {
                    live[at] = Value::Object(merge_map(map, patch, how.item)?);
                }
            }
            None => live.extend(without_directives(item.clone())),
        }
    }
    Ok(arrange(live, &plain, &before, how.key))
}

/// Puts the items that `patch` names into its order and weaves the others in where the live list had them.
fn arrange(merged: Vec<Value>, patch: &[Value], live: &[Value], key: &str) -> Vec<Value> {
    let (mut named, mut others): (Vec<_>, Vec<_>) =
        merged.into_iter().partition(|item| position(patch, item, key).is_some());
    named.sort_by_key(|item| position(patch, item, key));
    others.sort_by_key(|item| position(live, item, key));
    let mut out = Vec::with_capacity(named.len() + others.len());
    let (mut named, mut others) = (named.into_iter().peekable(), others.into_iter().peekable());
    loop {
        match (others.peek(), named.peek()) {
            (None, None) => return out,
            (Some(_), None) => out.extend(others.next()),
            (None, Some(_)) => out.extend(named.next()),
            (Some(other), Some(name)) => {
                let first = match (position(live, other, key), position(live, name, key)) {
                    (Some(other), Some(name)) => other < name,
                    _ => false,
                };
                out.extend(if first { others.next() } else { named.next() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gvk::Gvk, schema::lookup};
    use serde_json::json;

    fn pod_patch(doc: Value, patch: Value) -> Result<Value, String> {
        let mut doc = json!({"spec": doc});
        let def = lookup(&Gvk::new("", "v1", "Pod")).unwrap();
        strategic_merge(def, &mut doc, &json!({"spec": patch})).map_err(|s| s.message)?;
        Ok(doc["spec"].take())
    }

    #[test]
    fn merges_lists_by_key_and_keeps_order() {
        let doc = json!({"containers": [{"name": "a", "image": "1", "args": ["x"], "ports": [{"containerPort": 80}, {"containerPort": 81}]}, {"name": "b"}]});
        for (patch, want) in [
            (json!({"containers": [{"name": "c"}]}), json!(["c", "a", "b"])),
            (json!({"containers": [{"name": "b", "image": "2"}]}), json!(["a", "b"])),
            (json!({"containers": [{"name": "b", "$patch": "delete"}]}), json!(["a"])),
            (json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}), json!(["z"])),
            (
                json!({"$setElementOrder/containers": [{"name": "z"}, {"name": "a"}], "containers": [{"name": "z"}]}),
                json!(["z", "a", "b"]),
            ),
        ] {
            let got = pod_patch(doc.clone(), patch).unwrap();
            let names: Vec<_> = got["containers"].as_array().unwrap().iter().map(|c| c["name"].clone()).collect();
            assert_eq!(Value::from(names), want);
        }
        let ports = json!([{"containerPort": 80, "name": "http"}, {"containerPort": 82}]);
        let got = pod_patch(doc, json!({"containers": [{"name": "a", "args": ["y"], "ports": ports}]})).unwrap();
        assert_eq!(
            got["containers"][0],
            json!({"name": "a", "image": "1", "args": ["y"],
                "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 82}, {"containerPort": 81}]})
        );
    }

    #[test]
    fn directives() {
        let doc = json!({"volumes": [{"name": "v", "emptyDir": {}}], "nodeSelector": {"a": "b"}, "tolerations": [{"key": "k"}]});
        let got = pod_patch(
            doc,
            json!({"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}],
                "nodeSelector": {"$patch": "replace", "c": "d"}, "tolerations": [{"key": "z"}], "nodeName": null}),
        );
        assert_eq!(
            got.unwrap(),
            json!({"volumes": [{"name": "v", "hostPath": {"path": "/x"}}], "nodeSelector": {"c": "d"}, "tolerations": [{"key": "z"}]})
        );
    }

    #[test]
    fn directives_of_a_missing_map_drop_it() {
        let got =
            pod_patch(json!({"restartPolicy": "Never"}), json!({"nodeSelector": {"$patch": "replace", "c": "d"}}));
        assert_eq!(got.unwrap(), json!({"restartPolicy": "Never"}));
    }

    #[test]
    fn primitive_lists() {
        let def = lookup(&Gvk::new("", "v1", "Pod")).unwrap();
        let mut doc = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
        strategic_merge(def, &mut doc, &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"]}})).unwrap();
        assert_eq!(doc["metadata"]["finalizers"], json!(["a", "c"]));
        strategic_merge(def, &mut doc, &json!({"metadata": {"finalizers": ["d"]}})).unwrap();
        assert_eq!(doc["metadata"]["finalizers"].as_array().unwrap().len(), 3);
        let wrong = json!({"metadata": {"$setElementOrder/finalizers": ["c", "a"], "finalizers": ["d"]}});
        assert_eq!(
            strategic_merge(def, &mut doc, &wrong).unwrap_err().message,
            "The order in patch list:\n[d]\n doesn't match $setElementOrder list:\n[c a]\n"
        );
    }

    #[test]
    fn errors() {
        let doc = json!({"containers": [{"name": "a"}]});
        for (patch, want) in [
            (json!({"containers": [{"image": "x"}]}), "map: map[image:x] does not contain declared merge key: name"),
            (
                json!({"containers": [{"name": "a", "$patch": "bogus"}]}),
                "unknown patch type: bogus in map: map[$patch:bogus name:a]",
            ),
        ] {
            assert_eq!(pod_patch(doc.clone(), patch).unwrap_err(), want);
        }
    }
}
