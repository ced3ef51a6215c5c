//! How custom resources behave: validation by schema and rules, columns from the definition.

use std::sync::Arc;

use isopod_api::{
    field::{Error, ErrorList, ErrorType, Path},
    meta, names,
    text::{go_value, quote},
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Version, embedded};
use crate::{
    registry::{
        strategy::{Column, Context, Strategy},
        table,
    },
    validation::Errs,
};

/// The behaviour of one version of a CRD.
pub(crate) struct Behaviour {
    /// The version.
    pub(crate) version: Arc<Version>,
}

/// Finalizers of Kubernetes' own.
const FINALIZERS: [&str; 3] = ["foregroundDeletion", "kubernetes", "orphan"];

/// What finalizers should not look like.
fn unusual(finalizer: &str) -> Vec<String> {
    let mut out = names::qualified_name(finalizer);
    if !finalizer.contains('/') && !FINALIZERS.contains(&finalizer) {
        out.push("prefer a domain-qualified finalizer name including a path (/) to avoid accidental conflicts with other finalizer writers".into());
    }
    out.iter().map(|why| format!("metadata.finalizers: {}: {why}", quote(finalizer))).collect()
}

/// The behaviour of stored objects, whatever their definition.
pub(crate) struct Stored;
/// The one value of [`Stored`].
pub(crate) static STORED: Stored = Stored;

impl Strategy for Stored {
    fn whole_items(&self) -> bool {
        true
    }
}

impl Behaviour {
    /// The rules, unless the object is not what they are about; what they warn of.
    fn check_rules(&self, obj: &Value, old: Option<&Value>, errors: &mut ErrorList) -> Vec<String> {
        let Some(rules) = &self.version.rules else { return Vec::new() };
        let blocking = |e: &Error| {
            use ErrorType::{NotSupported, Required, TooLong, TooMany, TypeInvalid};
            matches!(e.kind, NotSupported | Required | TooLong | TooMany | TypeInvalid)
        };
        if errors.iter().any(blocking) {
            let detail = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";
            errors.push(Error::invalid(&Path::nil(), Value::Null, detail));
            return Vec::new();
        }
        let verdict = rules.check(self.version.schema.schema(), obj, old);
        errors.extend(verdict.errors);
        verdict.warnings
    }

    fn check_embedded(&self, obj: &Value, errors: &mut ErrorList) {
        if self.version.embeds {
            let mut e = Errs::new();
            embedded::inside(&mut e, self.version.schema.schema(), obj, &Path::nil());
            errors.append(&mut e.0);
        }
    }

    fn check_scale(&self, obj: &Value, subresource: &str, errors: &mut ErrorList) {
        let Some(scale) = &self.version.scale else { return };
        if subresource != "status" {
            errors.extend(replicas(obj, &scale.spec_text));
        }
        errors.extend(replicas(obj, &scale.status_text));
        if let Some(text) = &scale.selector_text
            && let Err(why) = nested(obj, text, "string", Value::is_string)
        {
            errors.push(Error::invalid(&Path::new(text), "", why));
        }
    }
}

/// A number of replicas that is none.
fn replicas(obj: &Value, path: &str) -> Option<Error> {
    let (n, why) = match nested(obj, path, "int64", Value::is_i64) {
        Err(why) => (0, why),
        Ok(found) => match found.and_then(Value::as_i64).unwrap_or_default() {
            n if n < 0 => (n, "should be a non-negative integer".to_owned()),
            n if n > i64::from(i32::MAX) => (n, format!("should be less than or equal to {}", i32::MAX)),
            _ => return None,
        },
    };
    Some(Error::invalid(&Path::new(path), n, why))
}

/// The value at a path of plain fields, when it is there. The errors are Go's.
fn nested<'v>(obj: &'v Value, path: &str, wanted: &str, is: fn(&Value) -> bool) -> Result<Option<&'v Value>, String> {
    let failed = |path: &str, found: &Value, wanted: &str| {
        Err(format!("{path} accessor error: {} is of the type {}, expected {wanted}", go_value(found), go_type(found)))
    };
    let (mut at, mut walked) = (obj, String::new());
    for field in path.trim_start_matches('.').split('.') {
        walked.push('.');
        walked.push_str(field);
        match at {
            Value::Null => return Ok(None),
            Value::Object(map) => match map.get(field) {
                Some(value) => at = value,
                None => return Ok(None),
            },
            other => return failed(&walked, other, "map[string]interface{}"),
        }
    }
    if is(at) { Ok(Some(at)) } else { failed(&walked, at, wanted) }
}

/// What Go calls the type of a decoded value.
fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_i64() => "int64",
        Value::Number(_) => "float64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

impl Strategy for Behaviour {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        if self.version.has_status
            && let Some(map) = obj.as_object_mut()
        {
            map.shift_remove("status");
        }
    }

    fn validate(&self, cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut errors = self.version.schema.validate(obj, None);
        self.check_scale(obj, cx.subresource, &mut errors);
        self.check_embedded(obj, &mut errors);
        errors.extend(self.version.schema.validate_lists(obj, None));
        self.check_rules(obj, None, &mut errors);
        errors
    }

    fn judge_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> (ErrorList, Vec<String>) {
        let status = cx.subresource == "status";
        let mut errors = match status {
            true => self.version.schema.validate_status(new, Some(old)),
            false => self.version.schema.validate(new, Some(old)),
        };
        self.check_scale(new, cx.subresource, &mut errors);
        if !status {
            self.check_embedded(new, &mut errors);
        }
        errors.extend(self.version.schema.validate_lists(new, Some(old)));
        let mut warnings = self.check_rules(new, Some(old), &mut errors);
        warnings.extend(self.warnings(cx, new, Some(old)));
        (errors, warnings)
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let before = old.map(meta::finalizers).unwrap_or_default();
        let mut added: Vec<&str> = meta::finalizers(obj).into_iter().filter(|f| !before.contains(f)).collect();
        added.sort_unstable();
        added.dedup();
        added.into_iter().flat_map(unusual).collect()
    }

    fn allow_unconditional_update(&self) -> bool {
        false
    }

    fn whole_items(&self) -> bool {
        true
    }

    fn columns(&self) -> Option<Vec<Column>> {
        let name = Column {
            name: "Name".into(),
            kind: "string".into(),
            format: "name".into(),
            priority: 0,
            description: "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically. Name is primarily intended for creation idempotence and configuration definition. Cannot be updated. More info: https://kubernetes.io/docs/concepts/overview/working-with-objects/names#names".into(),
        };
        Some([name].into_iter().chain(self.version.columns.iter().map(|c| c.column.clone())).collect())
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let mut cells = vec![json!(table::name(obj))];
        cells.extend(self.version.columns.iter().map(|c| c.cell(obj, now)));
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_wait_for_a_valid_object() {
        let schema = json!({"type": "object", "properties": {"e": {"type": "string", "enum": ["a"]}},
            "x-kubernetes-validations": [{"rule": "self.e == 'b'"}]});
        let version = json!({"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}});
        let crd = json!({"spec": {"group": "g.example.com", "versions": [version]}});
        let behaviour = Behaviour { version: Arc::clone(crate::custom::Definition::new(&crd, None).storage()) };
        let obj = json!({"e": "x"});
        let mut errors = behaviour.version.schema.validate(&obj, None);
        behaviour.check_rules(&obj, None, &mut errors);
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let want = [
            "e: Unsupported value: \"x\": supported values: \"a\"",
            "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing errors to complete validation",
        ];
        assert_eq!(texts, want);
    }

    #[test]
    fn replicas_are_small_whole_numbers() {
        let found = |obj: Value| replicas(&obj, ".spec.n").map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(found(json!({"spec": {"n": 3}})), "");
        assert_eq!(found(json!({"spec": {}})), "");
        assert_eq!(found(json!({"spec": {"n": -1}})), ".spec.n: Invalid value: -1: should be a non-negative integer");
        let want = ".spec.n: Invalid value: 0: .spec.n accessor error: x is of the type string, expected int64";
        assert_eq!(found(json!({"spec": {"n": "x"}})), want);
        let want = ".spec.n: Invalid value: 0: .spec.n accessor error: [1] is of the type []interface {}, expected map[string]interface{}";
        assert_eq!(found(json!({"spec": [1]})), want);
    }

    #[test]
    fn finalizers_of_others_should_name_a_domain() {
        let text = |why: &str| vec![format!("metadata.finalizers: \"a.example.com\": {why}")];
        let want = "prefer a domain-qualified finalizer name including a path (/) to avoid accidental conflicts with other finalizer writers";
        assert_eq!(unusual("a.example.com"), text(want));
        assert_eq!(unusual("orphan"), Vec::<String>::new());
        assert_eq!(unusual("example.com/a"), Vec::<String>::new());
        assert_eq!(unusual("-a").len(), 2);
    }
}
