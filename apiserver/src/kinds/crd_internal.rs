//! Versions and schemas of CustomResourceDefinitions as upstream's errors show them: its internal types, whose members have
//! Go's names and are all there.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::validation::template::sorted;

/// How a member is shown.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Flag,
    /// As it is, or null.
    Plain,
    Schema,
    List,
    Map,
    /// A schema or true.
    OrBool,
    /// A schema or several.
    OrList,
    Dependencies,
    Docs,
    Rules,
}

/// Names of members, in upstream's order.
const MEMBERS: [(&str, &str, Kind); 43] = [
    ("ID", "id", Kind::Text),
    ("Schema", "$schema", Kind::Text),
    ("Ref", "$ref", Kind::Plain),
    ("Description", "description", Kind::Text),
    ("Type", "type", Kind::Text),
    ("Nullable", "nullable", Kind::Flag),
    ("Format", "format", Kind::Text),
    ("Title", "title", Kind::Text),
    ("Default", "default", Kind::Plain),
    ("Maximum", "maximum", Kind::Plain),
    ("ExclusiveMaximum", "exclusiveMaximum", Kind::Flag),
    ("Minimum", "minimum", Kind::Plain),
    ("ExclusiveMinimum", "exclusiveMinimum", Kind::Flag),
    ("MaxLength", "maxLength", Kind::Plain),
    ("MinLength", "minLength", Kind::Plain),
    ("Pattern", "pattern", Kind::Text),
    ("MaxItems", "maxItems", Kind::Plain),
    ("MinItems", "minItems", Kind::Plain),
    ("UniqueItems", "uniqueItems", Kind::Flag),
    ("MultipleOf", "multipleOf", Kind::Plain),
    ("Enum", "enum", Kind::Plain),
    ("MaxProperties", "maxProperties", Kind::Plain),
    ("MinProperties", "minProperties", Kind::Plain),
    ("Required", "required", Kind::Plain),
    ("Items", "items", Kind::OrList),
    ("AllOf", "allOf", Kind::List),
    ("OneOf", "oneOf", Kind::List),
    ("AnyOf", "anyOf", Kind::List),
    ("Not", "not", Kind::Schema),
    ("Properties", "properties", Kind::Map),
    ("AdditionalProperties", "additionalProperties", Kind::OrBool),
    ("PatternProperties", "patternProperties", Kind::Map),
    ("Dependencies", "dependencies", Kind::Dependencies),
    ("AdditionalItems", "additionalItems", Kind::OrBool),
    ("Definitions", "definitions", Kind::Map),
    ("ExternalDocs", "externalDocs", Kind::Docs),
    ("Example", "example", Kind::Plain),
    ("XPreserveUnknownFields", "x-kubernetes-preserve-unknown-fields", Kind::Plain),
    ("XEmbeddedResource", "x-kubernetes-embedded-resource", Kind::Flag),
    ("XIntOrString", "x-kubernetes-int-or-string", Kind::Flag),
    ("XListMapKeys", "x-kubernetes-list-map-keys", Kind::Plain),
    ("XListType", "x-kubernetes-list-type", Kind::Plain),
    ("XMapType", "x-kubernetes-map-type", Kind::Plain),
];

fn text(v: &Value, field: &str) -> String {
    v[field].as_str().unwrap_or_default().to_owned()
}

fn each(v: &Value, shown: fn(&Value) -> Value) -> Value {
    v.as_array().map_or(Value::Null, |list| list.iter().map(shown).collect())
}

/// A schema.
pub(super) fn schema(v: &Value) -> Value {
    if !v.is_object() {
        return Value::Null;
    }
    let members = MEMBERS.iter().chain(&[("XValidations", "x-kubernetes-validations", Kind::Rules)]);
    members.map(|(name, field, kind)| ((*name).to_owned(), member(&v[field], *kind))).collect::<Map<_, _>>().into()
}

fn member(v: &Value, kind: Kind) -> Value {
    let map = |shown: fn(&Value) -> Value| match v.as_object() {
        Some(map) => {
            let sorted: BTreeMap<_, _> = map.iter().map(|(k, v)| (k.clone(), shown(v))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        None => Value::Null,
    };
    match kind {
        Kind::Text => json!(v.as_str().unwrap_or_default()),
        Kind::Flag => json!(*v == true),
        _ if v.is_null() => Value::Null,
        Kind::Plain => sorted(v),
        Kind::Schema => schema(v),
        Kind::List => each(v, schema),
        Kind::Map => map(schema),
        Kind::OrBool => json!({"Allows": v.is_object() || *v == true, "Schema": schema(v)}),
        Kind::OrList => json!({"Schema": schema(v), "JSONSchemas": each(v, schema)}),
        Kind::Dependencies => map(|v| {
            let names = if v.is_array() { v.clone() } else { Value::Null };
            json!({"Schema": schema(v), "Property": names})
        }),
        Kind::Docs => json!({"Description": text(v, "description"), "URL": text(v, "url")}),
        Kind::Rules => each(v, rule),
    }
}

/// A rule.
pub(super) fn rule(v: &Value) -> Value {
    json!({
        "Rule": text(v, "rule"), "Message": text(v, "message"), "MessageExpression": text(v, "messageExpression"),
        "Reason": v["reason"], "FieldPath": text(v, "fieldPath"), "OptionalOldSelf": v["optionalOldSelf"],
    })
}

/// A version; of a field that all versions share upstream's has nothing.
pub(super) fn version(v: &Value, shared: impl Fn(&str) -> bool) -> Value {
    let own = |field: &str, shown: fn(&Value) -> Value| match v.get(field) {
        Some(value) if !value.is_null() && !shared(field) => shown(value),
        _ => Value::Null,
    };
    json!({
        "Name": text(v, "name"), "Served": v["served"] == true, "Storage": v["storage"] == true,
        "Deprecated": v["deprecated"] == true, "DeprecationWarning": v["deprecationWarning"],
        "Schema": own("schema", |v| json!({"OpenAPIV3Schema": schema(&v["openAPIV3Schema"])})),
        "Subresources": own("subresources", subresources),
        "AdditionalPrinterColumns": own("additionalPrinterColumns", |v| each(v, column)),
        "SelectableFields": own("selectableFields", |v| each(v, |v| json!({"JSONPath": text(v, "jsonPath")}))),
    })
}

fn subresources(v: &Value) -> Value {
    let scale = match &v["scale"] {
        Value::Null => Value::Null,
        scale => json!({
            "SpecReplicasPath": text(scale, "specReplicasPath"),
            "StatusReplicasPath": text(scale, "statusReplicasPath"),
            "LabelSelectorPath": scale["labelSelectorPath"],
        }),
    };
    json!({"Status": v["status"], "Scale": scale})
}

fn column(v: &Value) -> Value {
    json!({
        "Name": text(v, "name"), "Type": text(v, "type"), "Format": text(v, "format"),
        "Description": text(v, "description"), "Priority": v["priority"].as_i64().unwrap_or_default(),
        "JSONPath": text(v, "jsonPath"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas() {
        let shown = schema(&json!({"type": "array", "items": {"type": "string"}}));
        assert!(shown.to_string().starts_with(r#"{"ID":"","Schema":"","Ref":null,"Description":"","Type":"array","#));
        assert_eq!(shown["Items"]["Schema"]["Type"], "string");
        assert_eq!(shown.as_object().map(Map::len), Some(44));
        let one = version(&json!({"name": "v1", "subresources": {"status": {}}}), |_| false);
        assert_eq!(one["Subresources"], json!({"Status": {}, "Scale": null}));
        assert_eq!(
            version(&json!({"name": "v1", "subresources": {"status": {}}}), |_| true)["Subresources"],
            Value::Null
        );
    }
}
