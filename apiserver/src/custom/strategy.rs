//! How custom resources behave: validation by schema and rules, columns from the definition.

use std::sync::Arc;

use isopod_api::{
    field::{Error, ErrorList, ErrorType, Path},
    meta, names,
    text::quote,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Version, embedded, path::JsonPath};
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
    fn check(&self, obj: &Value, old: Option<&Value>, errors: &mut ErrorList) {
        self.check_scale(obj, errors);
        let Some(rules) = &self.version.rules else { return };
        let blocking = |e: &Error| {
            use ErrorType::{NotSupported, Required, TooLong, TooMany, TypeInvalid};
            matches!(e.kind, NotSupported | Required | TooLong | TooMany | TypeInvalid)
        };
        if errors.iter().any(blocking) {
            let detail = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";
            errors.push(Error::invalid(&Path::nil(), "null", detail));
            return;
        }
        errors.extend(rules.check(self.version.schema.schema(), obj, old).errors);
    }

    fn check_embedded(&self, obj: &Value, errors: &mut ErrorList) {
        if self.version.embeds {
            let mut e = Errs::new();
            embedded::inside(&mut e, self.version.schema.schema(), obj, &Path::nil());
            errors.append(&mut e.0);
        }
    }

    fn check_scale(&self, obj: &Value, errors: &mut ErrorList) {
        let Some(scale) = &self.version.scale else { return };
        let mut check = |path: &JsonPath, text: &str| {
            let Some(n) = path.first(obj).and_then(Value::as_i64) else { return };
            if n < 0 {
                errors.push(Error::invalid(&Path::new(text), n, "should be a non-negative integer"));
            } else if n > i64::from(i32::MAX) {
                let detail = format!("should be less than or equal to {}", i32::MAX);
                errors.push(Error::invalid(&Path::new(text), n, detail));
            }
        };
        check(&scale.spec, &scale.spec_text);
        check(&scale.status, &scale.status_text);
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

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut errors = self.version.schema.validate(obj, None);
        self.check_embedded(obj, &mut errors);
        self.check(obj, None, &mut errors);
        errors
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut errors = match cx.subresource {
            "status" => self.version.schema.validate_status(new, Some(old)),
            _ => self.version.schema.validate(new, Some(old)),
        };
        if cx.subresource != "status" {
            self.check_embedded(new, &mut errors);
        }
        self.check(new, Some(old), &mut errors);
        errors
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, old: Option<&Value>) -> Vec<String> {
        let mut out = match (&self.version.rules, old) {
            (Some(rules), Some(_)) => rules.check(self.version.schema.schema(), obj, old).warnings,
            _ => Vec::new(),
        };
        let before = old.map(meta::finalizers).unwrap_or_default();
        let mut added: Vec<&str> = meta::finalizers(obj).into_iter().filter(|f| !before.contains(f)).collect();
        added.sort_unstable();
        added.dedup();
        out.extend(added.into_iter().flat_map(unusual));
        out
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
    fn finalizers_of_others_should_name_a_domain() {
        let text = |why: &str| vec![format!("metadata.finalizers: \"a.example.com\": {why}")];
        let want = "prefer a domain-qualified finalizer name including a path (/) to avoid accidental conflicts with other finalizer writers";
        assert_eq!(unusual("a.example.com"), text(want));
        assert_eq!(unusual("orphan"), Vec::<String>::new());
        assert_eq!(unusual("example.com/a"), Vec::<String>::new());
        assert_eq!(unusual("-a").len(), 2);
    }
}
