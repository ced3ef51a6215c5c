//! The three kinds of patch documents, applied to an object in the form clients see.
//!
//! - [`json_patch`]: RFC 6902.
//! - [`merge_patch`]: RFC 7396; read the body with [`parse_object`].
//! - [`strategic_merge`]: Kubernetes' own, driven by the kind's [`Definition`](crate::schema::Definition).
//!
//! All answer the [`Status`] upstream would; on error the object may be half changed and must be thrown away.

mod strategic;

use json_patch::{AddOperation, PatchOperation, ReplaceOperation, jsonptr::Pointer};
use serde_json::Value;
pub use strategic::strategic_merge;

use crate::{
    schema::json::{self, Parsed},
    status::{Details, Status, reason},
    text::quote,
};

/// Most operations in one JSON patch.
const MAX_OPERATIONS: usize = 10_000;
/// Bytes that the copies of one patch may add.
const MAX_COPIED: usize = 3 << 20;

/// Reads the body of a merge or strategic merge patch: an object or null. The duplicates go into strict field validation.
pub fn parse_object(body: &[u8]) -> Result<Parsed, String> {
    let parsed = json::parse(body).map_err(|e| e.to_string())?;
    match &parsed.value {
        Value::Object(_) | Value::Null => Ok(parsed),
        other => {
            Err(format!("json: cannot unmarshal {} into Go value of type map[string]interface {{}}", json::kind(other)))
        }
    }
}

/// A patch that is well-formed but does not fit the object.
fn rejected() -> Status {
    Status::generic(422, reason::INVALID, "the server rejected our request due to an error in our request")
        .with_details(Details::default())
}

/// Applies an RFC 6902 document. Returns what strict validation says of the document itself; nothing when `lenient`,
/// where another decoder words the errors.
pub fn json_patch(doc: &mut Value, body: &[u8], lenient: bool) -> Result<Vec<String>, Status> {
    let wrong = |what: &str, of: &str| format!("json: cannot unmarshal {what} into Go value of type {of}");
    let (list, item) = match lenient {
        true => ("jsonpatch.Patch", "jsonpatch.Operation"),
        false => ("[]handlers.jsonPatchOp", "handlers.jsonPatchOp"),
    };
    let undecodable = |error: String| match lenient {
        true => Status::bad_request(error),
        false => Status::bad_request(format!("error decoding patch: {error}")),
    };
    let parsed = json::parse(body).map_err(|e| undecodable(e.to_string()))?;
    let operations = match parsed.value {
        Value::Array(operations) => operations,
        Value::Null => Vec::new(),
        other => return Err(undecodable(wrong(json::kind(&other), list))),
    };
    if operations.len() > MAX_OPERATIONS {
        return Err(Status::too_large(format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let mut strict: Vec<String> =
        parsed.duplicates.iter().map(|path| format!("json patch duplicate field {}", quote(path))).collect();
    for (i, operation) in operations.iter().enumerate() {
        let Value::Object(members) = operation else {
            return Err(undecodable(wrong(json::kind(operation), item)));
        };
        for (name, member) in members {
            match (name.as_str(), member) {
                ("op" | "path" | "from", Value::String(_) | Value::Null) | ("value", _) => {}
                ("op" | "path" | "from", other) if !lenient => {
                    return Err(undecodable(format!(
                        "json: cannot unmarshal {} into Go struct field jsonPatchOp.{name} of type string",
                        json::kind(other)
                    )));
                }
                _ => strict.push(format!("json patch unknown field {}", quote(&format!("[{i}].{name}")))),
            }
        }
    }
    let mut operate = Operate::default();
    for operation in operations {
        operate.one(doc, serde_json::from_value(operation).map_err(|_| rejected())?).map_err(|_| rejected())?;
    }
    if lenient {
        strict.clear();
    }
    Ok(strict)
}

/// Why operations do not fit a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PatchFailure {
    /// A `test` found something else.
    Test,
    /// Any other operation cannot be done.
    Operation(String),
}

/// Applies the operations an admission plugin asks for. After a failure the document is in no useful state.
pub fn apply_operations(doc: &mut Value, operations: Vec<Value>) -> Result<(), PatchFailure> {
    let mut operate = Operate::default();
    for value in operations {
        let shown = value.clone();
        let operation: PatchOperation =
            serde_json::from_value(value).map_err(|e| PatchFailure::Operation(e.to_string()))?;
        let test = matches!(operation, PatchOperation::Test(_));
        operate.one(doc, operation).map_err(|refusal| match refusal {
            Refusal::Impossible if test => PatchFailure::Test,
            Refusal::Impossible => PatchFailure::Operation(impossible(&shown)),
            Refusal::Deep => PatchFailure::Operation(format!("exceeded max depth of {}", json::MAX_DEPTH)),
            Refusal::Large(size) => PatchFailure::Operation(format!(
                "Unable to complete the copy, the accumulated size increase of copy is {size}, exceeding the limit {MAX_COPIED}"
            )),
        })?;
    }
    Ok(())
}

/// Why an operation is not done.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    Impossible,
    /// What comes out would nest too deep.
    Deep,
    /// The copies are larger than this.
    Large(usize),
}

/// Applies operations one by one. A few that copy a document into itself would double it each time, or nest it beyond what
/// can be read again.
#[derive(Default)]
struct Operate {
    copied: usize,
}

impl Operate {
    fn one(&mut self, doc: &mut Value, operation: PatchOperation) -> Result<(), Refusal> {
        let operation = lenient_replace(doc, operation);
        let at = |pointer: &Pointer| pointer.resolve(doc).ok();
        let (path, value) = match &operation {
            PatchOperation::Add(add) => (&add.path, Some(&add.value)),
            PatchOperation::Replace(replace) => (&replace.path, Some(&replace.value)),
            PatchOperation::Move(moved) => (&moved.path, at(&moved.from)),
            PatchOperation::Copy(copy) => {
                let from = at(&copy.from);
                self.copied += from.map_or(0, |from| from.to_string().len());
                if self.copied > MAX_COPIED {
                    return Err(Refusal::Large(self.copied));
                }
                (&copy.path, from)
            }
            PatchOperation::Remove(remove) => (&remove.path, None),
            PatchOperation::Test(test) => (&test.path, None),
        };
        if value.is_some_and(|value| path.tokens().count() + json::depth(value) > json::MAX_DEPTH) {
            return Err(Refusal::Deep);
        }
        json_patch::patch(doc, &[operation]).map_err(|_| Refusal::Impossible)
    }
}

/// Upstream's words for an operation whose path leads nowhere.
fn impossible(operation: &Value) -> String {
    let text = |field: &str| operation[field].as_str().unwrap_or_default();
    let (op, path) = (text("op"), text("path"));
    match op {
        "add" => format!("add operation does not apply: doc is missing path: \"{path}\": missing value"),
        "remove" => format!("remove operation does not apply: doc is missing path: {path}: missing value"),
        "replace" => format!("replace operation does not apply: doc is missing path: {path}: missing value"),
        _ => format!("{op} operation does not apply: doc is missing from path: {}: missing value", text("from")),
    }
}

/// Upstream's `replace` of a missing object field adds it.
fn lenient_replace(doc: &Value, operation: PatchOperation) -> PatchOperation {
    let PatchOperation::Replace(ReplaceOperation { path, value }) = operation else { return operation };
    let parent = path.parent().and_then(|parent| parent.resolve(doc).ok());
    if parent.is_some_and(Value::is_object) {
        PatchOperation::Add(AddOperation { path, value })
    } else {
        PatchOperation::Replace(ReplaceOperation { path, value })
    }
}

/// Applies an RFC 7396 document.
pub fn merge_patch(doc: &mut Value, patch: &Value) {
    json_patch::merge(doc, patch);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn json_patch_errors() {
        let doc = json!({"data": {"z": "yes"}});
        for (body, code, message) in [
            (r#"[{"op":"test","path":"/data/z","value":"no"}]"#, 422, rejected().message),
            (r#"[{"op":"remove","path":"/data/none"}]"#, 422, rejected().message),
            (r#"[{"op":"bogus","path":"/data"}]"#, 422, rejected().message),
            (
                r#"{"op":"add"}"#,
                400,
                "error decoding patch: json: cannot unmarshal object into Go value of type []handlers.jsonPatchOp"
                    .into(),
            ),
            ("not", 400, "error decoding patch: invalid character 'o' in literal null (expecting 'u')".into()),
        ] {
            let error = json_patch(&mut doc.clone(), body.as_bytes(), false).unwrap_err();
            assert_eq!((error.code, error.message), (code, message), "{body}");
        }
    }

    #[test]
    fn strict_errors_of_the_patch_itself() {
        let body = br#"[{"op":"add","path":"/a","value":{"x":1,"x":2},"more":1}]"#;
        let strict = json_patch(&mut json!({}), body, false).unwrap();
        assert_eq!(strict, ["json patch duplicate field \"[0].value.x\"", "json patch unknown field \"[0].more\""]);
        assert!(json_patch(&mut json!({}), body, true).unwrap().is_empty());
        let error = json_patch(&mut json!({}), b"{}", true).unwrap_err();
        assert_eq!(error.message, "json: cannot unmarshal object into Go value of type jsonpatch.Patch");
    }

    #[test]
    fn a_document_does_not_outgrow_its_patch() {
        let grow = |count: usize, operation: &dyn Fn(usize) -> String| {
            let operations: Vec<String> = (0..count).map(operation).collect();
            let mut doc = json!({"data": {}, "text": "x".repeat(1000)});
            let done = json_patch(&mut doc, format!("[{}]", operations.join(",")).as_bytes(), false);
            done.map(|_| json::depth(&doc)).map_err(|status| status.code)
        };
        let twice = |n: usize| format!(r#"{{"op":"copy","from":"","path":"/data/x{n}"}}"#);
        assert_eq!(grow(5, &twice), Ok(12));
        assert_eq!(grow(40, &twice), Err(422), "2^40 KB");
        let deeper = |n: usize| format!(r#"{{"op":"add","path":"/data{}","value":{{}}}}"#, "/x".repeat(n + 1));
        assert_eq!(grow(json::MAX_DEPTH - 2, &deeper), Ok(json::MAX_DEPTH));
        assert_eq!(grow(json::MAX_DEPTH - 1, &deeper), Err(422));
        let doubled = json!([{"op": "copy", "from": "", "path": "/d/x"}]);
        let failure = apply_operations(&mut json!({"d": {"big": "x".repeat(MAX_COPIED)}}), vec![doubled[0].clone()]);
        assert!(matches!(failure, Err(PatchFailure::Operation(text)) if text.contains("accumulated size")));
    }

    #[test]
    fn replace_of_a_missing_field_adds_it() {
        let mut doc = json!({"data": {}, "l": []});
        json_patch(&mut doc, br#"[{"op":"replace","path":"/data/x","value":"1"}]"#, false).unwrap();
        assert_eq!(doc["data"]["x"], "1");
        assert!(json_patch(&mut doc, br#"[{"op":"replace","path":"/l/0","value":"1"}]"#, false).is_err());
        assert!(json_patch(&mut doc, br#"[{"op":"replace","path":"/no/x","value":"1"}]"#, false).is_err());
    }

    #[test]
    fn parse_object_refuses_lists() {
        assert_eq!(
            parse_object(b"[]").unwrap_err(),
            "json: cannot unmarshal array into Go value of type map[string]interface {}"
        );
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![any::<bool>().prop_map(Value::from), (0..5_i64).prop_map(Value::from)];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop::collection::btree_map("[a-c]", inner, 0..3).prop_map(|m| Value::Object(m.into_iter().collect()))
        })
    }

    /// The RFC 7396 patch that turns `a` into `b`.
    fn difference(a: &Value, b: &Value) -> Value {
        let (Value::Object(x), Value::Object(y)) = (a, b) else { return b.clone() };
        let mut out = serde_json::Map::new();
        for key in x.keys().filter(|k| !y.contains_key(*k)) {
            out.insert(key.clone(), Value::Null);
        }
        for (key, value) in y {
            match x.get(key) {
                Some(old) if old == value => {}
                Some(old) => {
                    out.insert(key.clone(), difference(old, value));
                }
                None => {
                    out.insert(key.clone(), value.clone());
                }
            }
        }
        Value::Object(out)
    }

    proptest! {
        #[test]
        fn merging_the_difference_gives_the_target(a in tree(), b in tree()) {
            let mut doc = json!({"x": a});
            let target = json!({"x": b});
            let patch = difference(&doc, &target);
            merge_patch(&mut doc, &patch);
            prop_assert_eq!(doc, target);
        }
    }
}
