//! CRD scenarios.

use serde_json::json;

use super::*;

fn spec(schema: Value) -> Structural {
    Structural::new(Some(&json!({"type": "object", "properties": {"spec": schema}})))
}

fn messages(s: &Structural, spec: Value, old: Option<Value>) -> Vec<String> {
    let old = old.map(|o| json!({"spec": o}));
    let new = json!({"spec": spec});
    let errors = [s.validate(&new, old.as_ref()), s.validate_lists(&new, old.as_ref())].concat();
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn prunes_and_reports() {
    let s = spec(json!({"type": "object", "properties": {"a": {"type": "string"},
        "p": {"type": "object", "x-kubernetes-preserve-unknown-fields": true,
            "properties": {"k": {"type": "object", "properties": {"z": {"type": "string"}}}}},
        "emb": {"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true}}}));
    let mut obj = json!({"metadata": {"name": "t", "x": 1}, "extra": 1, "spec": {"a": "1", "zz": 2,
        "p": {"any": {"deep": [1]}, "k": {"z": "1", "w": 1}},
        "emb": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "bogus": 1}, "spec": {"q": 1}}}});
    let strict = s.decode(&mut obj, &[]).unwrap();
    let unknown = |path: &str| format!("unknown field \"{path}\"");
    assert_eq!(strict, ["metadata.x", "extra", "spec.emb.metadata.bogus", "spec.p.k.w", "spec.zz"].map(unknown));
    assert_eq!(
        obj,
        json!({"metadata": {"name": "t"}, "spec": {"a": "1", "p": {"any": {"deep": [1]}, "k": {"z": "1"}},
            "emb": {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"q": 1}}}})
    );
}

#[test]
fn defaults_and_nulls() {
    let s = spec(json!({"type": "object", "properties": {"a": {"type": "string", "default": "x"},
        "o": {"type": "object", "default": {}, "properties": {"n": {"type": "integer", "default": 3}}},
        "l": {"type": "array", "items": {"type": "object", "properties": {"p": {"type": "string", "default": "TCP"}}}},
        "nul": {"type": "string", "nullable": true, "default": "d"}, "nn": {"type": "string", "default": "d"}}}));
    let mut obj = json!({"spec": {"l": [{}, {"p": "UDP"}], "nul": null, "nn": null}});
    s.default(&mut obj);
    assert_eq!(
        obj["spec"],
        json!({"l": [{"p": "TCP"}, {"p": "UDP"}], "nul": null, "a": "x", "o": {"n": 3}, "nn": "d"})
    );
    let mut empty = json!({});
    s.default(&mut empty);
    assert_eq!(empty, json!({}));
}

#[test]
fn validation_messages() {
    let s = spec(json!({"type": "object", "required": ["r"], "properties": {
        "r": {"type": "string", "maxLength": 3}, "i": {"type": "integer", "format": "int32", "maximum": 5},
        "e": {"type": "string", "enum": ["a", "b"]}, "d": {"type": "string", "format": "duration"},
        "s": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "m": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
            "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}},
        "x": {"x-kubernetes-int-or-string": true}, "p": {"type": "string", "pattern": "^a$"}}}));
    for (value, want) in [
        (json!({}), vec!["spec.r: Required value"]),
        (json!({"r": "long"}), vec!["spec.r: Too long: may not be more than 3 bytes"]),
        (
            json!({"r": 1}),
            vec!["spec.r: Invalid value: \"integer\": spec.r in body must be of type string: \"integer\""],
        ),
        (json!({"r": "a", "i": 6}), vec!["spec.i: Invalid value: 6: spec.i in body should be less than or equal to 5"]),
        (
            json!({"r": "a", "i": -3_000_000_000_i64}),
            vec!["<nil>: Invalid value: \"\": Checked value must be of type integer with format int32 in spec.i"],
        ),
        (json!({"r": "a", "e": "c"}), vec!["spec.e: Unsupported value: \"c\": supported values: \"a\", \"b\""]),
        (
            json!({"r": "a", "d": "x"}),
            vec!["spec.d: Invalid value: \"x\": spec.d in body must be of type duration: \"x\""],
        ),
        (json!({"r": "a", "p": "b"}), vec!["spec.p: Invalid value: \"b\": spec.p in body should match '^a$'"]),
        (
            json!({"r": "a", "m": [{"name": "x"}, {"name": "x"}, {}], "s": ["a", "a"]}),
            vec![
                "spec.m[2].name: Required value",
                "spec.m[1]: Duplicate value: {\"name\":\"x\"}",
                "spec.s[1]: Duplicate value: \"a\"",
            ],
        ),
        (json!({"r": "a", "x": "50%"}), vec![]),
    ] {
        assert_eq!(messages(&s, value.clone(), None), want, "{value}");
    }
}

#[test]
fn unchanged_values_are_not_judged_again() {
    let s = spec(
        json!({"type": "object", "properties": {"a": {"type": "string", "maxLength": 1}, "b": {"type": "string"}}}),
    );
    assert!(messages(&s, json!({"a": "long", "b": "new"}), Some(json!({"a": "long"}))).is_empty());
    assert_eq!(messages(&s, json!({"a": "longer"}), Some(json!({"a": "long"}))).len(), 1);
}

#[test]
fn items_that_were_there_twice_may_stay() {
    let set = |items: Value| json!({"type": "array", "x-kubernetes-list-type": "set", "items": items});
    let s = spec(json!({"type": "object", "properties": {"a": set(json!({"type": "integer"})),
        "o": set(json!({"type": "object", "x-kubernetes-map-type": "atomic", "x-kubernetes-preserve-unknown-fields": true}))}}));
    let twice = || json!({"a": [1, 2, 1]});
    assert_eq!(messages(&s, twice(), None), ["spec.a[2]: Duplicate value: 1"]);
    assert_eq!(messages(&s, twice(), Some(json!({"a": [1, 2]}))).len(), 1);
    assert!(messages(&s, json!({"a": [1, 2, 1, 2]}), Some(twice())).is_empty());
    let objects = json!({"o": [{"k": 1, "l": 2}, {"l": 2, "k": 1}, {"k": "1", "l": 2}]});
    assert_eq!(messages(&s, objects, None), [r#"spec.o[1]: Duplicate value: {"l":2,"k":1}"#]);
    // As many as a body holds, in no time.
    let many: Vec<i32> = (0..200_000).collect();
    assert!(messages(&s, json!({"a": many}), Some(json!({"a": many}))).is_empty());
}

#[test]
fn junctors() {
    let s = spec(
        json!({"type": "object", "properties": {"a": {"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 1}],
        "not": {"enum": [7]}}}}),
    );
    assert!(messages(&s, json!({"a": 6}), None).is_empty());
    assert_eq!(
        messages(&s, json!({"a": 3}), None),
        ["spec.a: Invalid value: \"\": \"spec.a\" must validate at least one schema (anyOf)"]
    );
    assert_eq!(messages(&s, json!({"a": 7}), None).len(), 1);
}

#[test]
fn apply_by_list_types() {
    use crate::{apply, gvk::Gvk};
    let s = spec(json!({"type": "object", "properties": {
        "m": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name", "port"],
            "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"},
                "port": {"type": "integer", "default": 80}, "v": {"type": "string"}}}},
        "am": {"type": "object", "x-kubernetes-map-type": "atomic", "additionalProperties": {"type": "string"}}}}));
    let gvk = Gvk::new("x.example.com", "v1", "Thing");
    let req = |manager| apply::Request {
        def: s.definition(),
        gvk: &gvk,
        manager,
        subresource: "",
        has_status: false,
        now: "2024-01-01T00:00:00Z",
    };
    let body = |spec: Value| json!({"apiVersion": "x.example.com/v1", "kind": "Thing", "metadata": {"name": "t"}, "spec": spec});
    let mut live =
        apply::apply(&req("one"), None, &body(json!({"m": [{"name": "x", "v": "1"}], "am": {"k": "v"}})), false)
            .unwrap();
    s.default(&mut live);
    let clash = |spec| apply::apply(&req("two"), Some(&live), &body(spec), false).unwrap_err().message;
    assert_eq!(clash(json!({"am": {"z": "z"}})), "Apply failed with 1 conflict: conflict with \"one\": .spec.am");
    assert_eq!(
        clash(json!({"m": [{"name": "x", "v": "9"}]})),
        "Apply failed with 1 conflict: conflict with \"one\": .spec.m[name=\"x\",port=80].v"
    );
    assert_eq!(
        clash(json!({"m": [{"name": "x"}, {"name": "x", "port": 80}]})),
        "failed to create typed patch object (/t; x.example.com/v1, Kind=Thing): .spec.m: duplicate entries for key [name=\"x\",port=80]"
    );
}
