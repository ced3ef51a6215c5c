//! The schemas of a CustomResourceDefinition: list and map types, defaults, CEL rules; [`crd_structural`] has the rest.
//!
//! [`crd_structural`]: super::crd_structural

use isopod_api::{field::Error, structural::Structural};
use serde_json::{Value, json};

use super::{
    crd_cost::{Costs, multiplied},
    crd_internal as internal, crd_structural,
};
use crate::{
    cel::{self, Type},
    custom,
    validation::{At, Errs},
};

/// Fields a root schema may have when status is a subresource, whose part of the schema is taken out and used alone.
const ROOT_FIELDS: [&str; 22] = [
    "Description",
    "Type",
    "Format",
    "Title",
    "Maximum",
    "ExclusiveMaximum",
    "Minimum",
    "ExclusiveMinimum",
    "MaxLength",
    "MinLength",
    "Pattern",
    "MaxItems",
    "MinItems",
    "UniqueItems",
    "MultipleOf",
    "Required",
    "Items",
    "Properties",
    "ExternalDocs",
    "Example",
    "XPreserveUnknownFields",
    "XValidations",
];

/// Checks one schema. An `unchanged` one may have rules that cost too much: it was accepted before.
pub(super) fn check(e: &mut Errs, at: &At<'_>, status: bool, unchanged: bool) {
    if !at.is_set() {
        return;
    }
    if status {
        root_fields(e, at);
    }
    if at.v["nullable"] == true {
        e.forbidden(&at.get("nullable"), "nullable cannot be true at the root");
    }
    // Expressions are compiled against schemas that are right.
    let mut compile = false;
    if let Some(mut structural) = crd_structural::check(at) {
        if structural.is_empty() {
            defaults(&mut structural, at);
            compile = structural.is_empty();
        }
        e.0.append(&mut structural.0);
    }
    let mut pass = Pass { errors: Errs::new(), compile };
    let mut rules = Rules { errors: Errs::new(), costs: Costs::new(unchanged) };
    pass.node(&mut rules, at, &Inherited { root: true, cardinality: Some(1), ..Inherited::default() });
    e.0.append(&mut pass.errors.0);
    e.0.append(&mut rules.errors.0);
    rules.costs.finish(e, at);
}

fn root_fields(e: &mut Errs, at: &At<'_>) {
    let shown = internal::schema(at.v);
    let zero = |v: &Value| v.is_null() || *v == false || *v == "";
    for (name, _) in shown.as_object().into_iter().flatten().filter(|(_, v)| !zero(v)) {
        let kind = at.get("type");
        if name == "Type" && kind.s() != "object" {
            let only =
                "only \"object\" is allowed as the type at the root of the schema if the status subresource is enabled";
            return e.invalid(&kind, only);
        }
        if !ROOT_FIELDS.contains(&name.as_str()) {
            let only = format!(
                "only [{}] fields are allowed at the root of the schema if the status subresource is enabled",
                ROOT_FIELDS.join(" ")
            );
            return e.invalid_as(at, shown.clone(), &only);
        }
    }
}

/// What is known of a node from those above it.
#[derive(Default, Clone)]
struct Inherited {
    root: bool,
    /// Inside apiVersion, kind or metadata of a resource.
    meta: bool,
    /// Why there may be no defaults.
    no_defaults: Option<String>,
    /// The topmost list whose items cannot be told apart in old and new objects.
    uncorrelated: Option<String>,
    /// Inside a junctor, where no expressions are compiled.
    junctor: bool,
    /// How often the node can be in one object; `None` without a limit.
    cardinality: Option<u64>,
}

/// What is found in rules.
struct Rules {
    errors: Errs,
    costs: Costs,
}

/// One walk over a schema.
struct Pass {
    errors: Errs,
    compile: bool,
}

impl Pass {
    fn node(&mut self, rules: &mut Rules, at: &At<'_>, above: &Inherited) {
        let before = self.errors.0.len();
        self.fields(at, above);
        let schema = at.v;
        let below = Inherited { root: false, cardinality: multiplied(above.cardinality, schema), ..above.clone() };
        let additional = at.get("additionalProperties");
        if additional.is_set() {
            if schema["properties"].as_object().is_some_and(|p| !p.is_empty()) && *additional.v != true {
                let exclusive = "additionalProperties and properties are mutual exclusive";
                self.errors.forbidden(&additional, exclusive);
            }
            let mut below = below.clone();
            if above.meta {
                below.no_defaults = Some("inside additionalProperties applying to object metadata".into());
            }
            if additional.v.is_object() {
                self.node(rules, &additional, &below);
            }
        }
        for (name, property) in at.get("properties").entries() {
            let mut below = below.clone();
            let head = ["metadata", "kind", "apiVersion"].contains(&name);
            if head && (above.root || schema["x-kubernetes-embedded-resource"] == true) {
                below.meta = true;
                if above.root {
                    below.no_defaults = Some(format!("in top-level {name}"));
                }
            }
            self.node(rules, &property, &below);
        }
        let inside = Inherited { junctor: true, ..below.clone() };
        let lists = ["allOf", "oneOf", "anyOf"].into_iter().flat_map(|name| at.get(name).items());
        for junctor in Some(at.get("not")).into_iter().filter(|not| not.v.is_object()).chain(lists) {
            self.node(rules, &junctor, &inside);
        }
        if schema["items"].is_object() {
            let mut below = below;
            if schema["x-kubernetes-list-type"] != "map" {
                below.uncorrelated.get_or_insert(at.path.to_string());
            }
            self.node(rules, &at.get("items"), &below);
        }
        self.lists(at);
        for rule in at.get("x-kubernetes-validations").items() {
            self.rule(at, &rule);
        }
        if self.compile && !above.junctor && self.errors.0.len() == before {
            let list = at.get("x-kubernetes-validations").items();
            let own = if list.is_empty() { Type::Dyn } else { Type::of_schema(at.v, above.root) };
            for rule in list {
                compiled(rules, at, &rule, above, &own);
            }
        }
    }

    fn fields(&mut self, at: &At<'_>, above: &Inherited) {
        let e = &mut self.errors;
        let kind = at.get("type");
        if !kind.s().is_empty() {
            e.one_of(&kind, &["array", "boolean", "integer", "number", "object", "string"]);
        }
        if let Some(reason) = above.no_defaults.as_ref().filter(|_| at.get("default").is_set()) {
            e.forbidden(&at.get("default"), &format!("must not be set {reason}"));
        }
        for field in crd_structural::UNSUPPORTED {
            let found = at.get(field);
            if found.is_set() && *found.v != "" {
                e.forbidden(&found, &format!("{field} is not supported"));
            }
        }
        if kind.s() == "null" {
            e.forbidden(&kind, "type cannot be set to null, use nullable as an alternative");
        }
        if at.v["items"].is_array() {
            e.forbidden(&at.get("items"), "items must be a schema object and not an array");
        }
        if above.meta && at.v["x-kubernetes-embedded-resource"] == true {
            e.forbidden(&at.get("x-kubernetes-embedded-resource"), "must not be used inside of resource meta");
        }
        if at.v["uniqueItems"] == true {
            let quadratic = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic";
            e.forbidden(&at.get("uniqueItems"), quadratic);
        }
    }

    fn lists(&mut self, at: &At<'_>) {
        let e = &mut self.errors;
        if at.v["x-kubernetes-preserve-unknown-fields"] == false {
            e.invalid(&at.get("x-kubernetes-preserve-unknown-fields"), "must be true or undefined");
        }
        let kind = at.get("type");
        let must_be = |e: &mut Errs, wanted: &str, field: &str| {
            let must = format!("must be {wanted} if {field} is specified");
            if kind.s().is_empty() { e.required(&kind, &must) } else { e.invalid(&kind, &must) }
        };
        let (list, map) = (at.get("x-kubernetes-list-type"), at.get("x-kubernetes-map-type"));
        if map.is_set() {
            if kind.s() != "object" {
                must_be(e, "object", "x-kubernetes-map-type");
            }
            e.one_of(&map, &["atomic", "granular"]);
        }
        let keys = at.get("x-kubernetes-list-map-keys");
        if list.is_set() {
            if kind.s() != "array" {
                must_be(e, "array", "x-kubernetes-list-type");
            } else if list.s() == "set" {
                set_items(e, &at.get("items"));
            }
            e.one_of(&list, &["atomic", "set", "map"]);
        }
        if keys.len() > 0 && list.s() != "map" {
            let must = "must be map if x-kubernetes-list-map-keys is non-empty";
            if list.is_set() { e.invalid(&list, must) } else { e.required(&list, must) }
        }
        if list.s() == "map" {
            map_items(e, at, &keys);
        }
        let items = at.get("items");
        if items.v["nullable"] == true && matches!(list.s(), "set" | "map") {
            let cannot = format!("cannot be nullable when x-kubernetes-list-type is {}", list.s());
            e.forbidden(&items.get("nullable"), &cannot);
        }
        if list.s() == "map" {
            map_keys(e, &items, &keys);
        }
    }

    fn rule(&mut self, at: &At<'_>, rule: &At<'_>) {
        let e = &mut self.errors;
        let broken = |text: &str| text.trim().contains(['\n', '\r']);
        let (text, message) = (rule.get("rule"), rule.get("message"));
        if text.s().trim().is_empty() {
            e.required(&text, "rule is not specified");
        } else if !message.s().is_empty() && message.s().trim().is_empty() {
            e.invalid(&message, "message must be non-empty if specified");
        } else if broken(message.s()) {
            e.invalid(&message, "message must not contain line breaks");
        } else if broken(text.s()) && message.s().trim().is_empty() {
            e.required(&message, "message must be specified if rule contains line breaks");
        }
        let computed = rule.get("messageExpression");
        if !computed.s().is_empty() && computed.s().trim().is_empty() {
            e.required(&computed, "messageExpression must be non-empty if specified");
        }
        let reason = rule.get("reason");
        if reason.is_set() {
            let known = ["FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired"];
            e.one_of(&reason, &known);
        }
        let path = rule.get("fieldPath");
        if path.s().is_empty() {
            return;
        }
        if path.s().trim().is_empty() {
            e.invalid(&path, "fieldPath must be non-empty if specified");
        }
        if broken(path.s()) {
            e.invalid(&path, "fieldPath must not contain line breaks");
        }
        if !leads_somewhere(at.v, path.s()) {
            e.invalid(&path, "fieldPath must be a valid path");
        }
    }
}

/// Whether a field path (`.a.b`, `['c']`) names a property of a schema.
fn leads_somewhere(schema: &Value, path: &str) -> bool {
    let mut at = schema;
    let mut rest = path.trim();
    while !rest.is_empty() {
        let (name, after) = if let Some(quoted) = rest.strip_prefix("['") {
            let Some((name, after)) = quoted.split_once("']") else { return false };
            (name, after)
        } else if let Some(plain) = rest.strip_prefix('.') {
            let end = plain.find(['.', '[']).unwrap_or(plain.len());
            plain.split_at(end)
        } else {
            return false;
        };
        let found = at["properties"].get(name).or_else(|| at.get("additionalProperties").filter(|a| a.is_object()));
        let Some(found) = found else { return false };
        (at, rest) = (found, after);
    }
    !path.trim().is_empty()
}

fn set_items(e: &mut Errs, items: &At<'_>) {
    let must = "must be atomic as item of a list with x-kubernetes-list-type=set";
    let list = items.get("x-kubernetes-list-type");
    match items.get("type").s() {
        "array" if list.is_set() && list.s() != "atomic" => e.invalid(&list, must),
        "object" if items.v["x-kubernetes-map-type"] != "atomic" => {
            // Upstream shows the list type of the item.
            e.invalid_as(&items.get("x-kubernetes-map-type"), list.v.clone(), must);
        }
        _ => {}
    }
}

fn map_items(e: &mut Errs, at: &At<'_>, keys: &At<'_>) {
    if keys.len() == 0 {
        e.required(keys, "must not be empty if x-kubernetes-list-type is map");
    }
    let items = at.get("items");
    if !items.is_set() {
        return e.required(&items, "must have a schema if x-kubernetes-list-type is map");
    }
    if items.v["type"] != "object" {
        let must = "must be object if parent array's x-kubernetes-list-type is map";
        return e.invalid_str(&items.get("type"), must);
    }
    let mut seen = Vec::new();
    for key in keys.strings() {
        match items.v["properties"].get(key) {
            Some(property) if property["type"] == "array" || property["type"] == "object" => {
                let at = At::new(items.get("properties").path.key(key).child("type"), &items.v["type"]);
                e.invalid(&at, "must be a scalar type if parent array's x-kubernetes-list-type is map");
            }
            Some(_) => {}
            None => e.invalid(keys, "entries must all be names of item properties"),
        }
        if seen.contains(&key) {
            e.invalid(keys, "must not contain duplicate entries");
        }
        seen.push(key);
    }
}

fn map_keys(e: &mut Errs, items: &At<'_>, keys: &At<'_>) {
    let required = items.get("required").strings();
    for key in keys.strings() {
        let property = items.get("properties").key(key);
        if !property.is_set() {
            continue;
        }
        if !required.contains(&key) && !property.get("default").is_set() {
            let must =
                "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property";
            e.required(&property.get("default"), must);
        }
        if property.v["nullable"] == true {
            let cannot = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable";
            e.forbidden(&property.get("nullable"), cannot);
        }
    }
}

fn defaults(e: &mut Errs, at: &At<'_>) {
    if let Some(default) = at.v.get("default").filter(|d| !d.is_null()) {
        defaulted(e, at, default);
    }
    if at.v["items"].is_object() {
        defaults(e, &at.get("items"));
    }
    for (_, property) in at.get("properties").entries() {
        defaults(e, &property);
    }
}

/// A default must be what the schema would leave of it.
fn defaulted(e: &mut Errs, at: &At<'_>, default: &Value) {
    let here = at.get("default");
    let wrapped = Structural::new(Some(&json!({"type": "object", "properties": {"default": at.v}})));
    let mut pruned = json!({"default": default});
    let unknown = wrapped.decode(&mut pruned, &[]).is_ok_and(|strict| !strict.is_empty());
    if unknown {
        e.invalid_as(&here, default.clone(), "must not have unknown fields");
    }
    let parent = at.path.to_string();
    for mut error in wrapped.validate(&pruned, None) {
        error.field = format!("{parent}.{}", error.field);
        error.detail = error.detail.replace("default in body", &format!("{parent}.default in body"));
        e.0.push(error);
    }
}

/// Compiles one rule over values of a type.
fn compiled(rules: &mut Rules, at: &At<'_>, rule: &At<'_>, above: &Inherited, own: &Type) {
    let Rules { errors: e, costs } = rules;
    let (text, computed) = (rule.get("rule"), rule.get("messageExpression"));
    let environment = custom::rule_environment(own, rule.get("optionalOldSelf").is_true());
    let place = cel::Place::Value(at.v, above.root || at.v["x-kubernetes-embedded-resource"] == true);
    match environment.cost(text.s(), &[Type::Bool], place) {
        Ok(once) => {
            let times = above.cardinality.unwrap_or_else(|| cel::cardinality(at.v));
            costs.add(e, &text.path, "rule", once.saturating_mul(times));
        }
        Err(error) => {
            let shown = mistyped(error, "cel expression must evaluate to a bool");
            e.0.push(Error::invalid(&text.path, internal::rule(rule.v), shown));
        }
    }
    if !computed.s().is_empty() {
        match environment.cost(computed.s(), &[Type::String], place) {
            Ok(once) => costs.add(e, &computed.path, "messageExpression", once),
            Err(error) => {
                let shown = format!("messageExpression {}", mistyped(error, "must evaluate to a string"));
                e.0.push(Error::invalid(&computed.path, internal::rule(rule.v), shown));
            }
        }
    }
    if custom::mentions(text.s(), "oldSelf") {
        if let Some(path) = &above.uncorrelated {
            let cannot = format!("oldSelf cannot be used on the uncorrelatable portion of the schema within {path}");
            e.invalid(&text, &cannot);
        }
    } else if rule.get("optionalOldSelf").is_set() {
        e.invalid(&rule.get("optionalOldSelf"), "may not be set if oldSelf is not used in rule");
    }
}

/// What is said of an expression of the wrong type.
fn mistyped(error: String, shown: &str) -> String {
    if error.starts_with("must evaluate") { shown.to_owned() } else { error }
}

#[cfg(test)]
mod tests {
    use isopod_api::field::Path;

    use super::*;

    fn messages(schema: Value, status: bool) -> Vec<String> {
        let mut e = Errs::new();
        check(&mut e, &At::new(Path::new("s"), &schema), status, false);
        e.0.iter().map(ToString::to_string).collect()
    }

    fn property(a: Value) -> Value {
        json!({"type": "object", "properties": {"a": a}})
    }

    #[test]
    fn refused() {
        let keys = json!({"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            "items": {"type": "object", "properties": {"k": {"type": "string"}}}});
        let item_rule = json!({"type": "array", "maxItems": 5, "items": {"type": "string", "maxLength": 10,
            "x-kubernetes-validations": [{"rule": "self == oldSelf"}]}});
        for (a, want) in [
            (
                keys,
                "s.properties[a].items.properties[k].default: Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property",
            ),
            (
                json!({"type": "array", "x-kubernetes-list-type": "foo", "items": {"type": "string"}}),
                "s.properties[a].x-kubernetes-list-type: Unsupported value: \"foo\": supported values: \"atomic\", \"set\", \"map\"",
            ),
            (
                json!({"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "object"}}),
                "s.properties[a].items.x-kubernetes-map-type: Invalid value: null: must be atomic as item of a list with x-kubernetes-list-type=set",
            ),
            (
                json!({"type": "string", "x-kubernetes-preserve-unknown-fields": false}),
                "s.properties[a].x-kubernetes-preserve-unknown-fields: Invalid value: false: must be true or undefined",
            ),
            (json!({"$ref": "x"}), "s.properties[a].$ref: Forbidden: $ref is not supported"),
            (
                json!({"type": "foo"}),
                "s.properties[a].type: Unsupported value: \"foo\": supported values: \"array\", \"boolean\", \"integer\", \"number\", \"object\", \"string\"",
            ),
            (
                json!({"type": "object", "x-kubernetes-validations": [{"rule": "true", "fieldPath": ".b"}]}),
                "s.properties[a].x-kubernetes-validations[0].fieldPath: Invalid value: \".b\": fieldPath must be a valid path",
            ),
            (
                item_rule,
                "s.properties[a].items.x-kubernetes-validations[0].rule: Invalid value: \"self == oldSelf\": oldSelf cannot be used on the uncorrelatable portion of the schema within s.properties[a]",
            ),
        ] {
            assert_eq!(messages(property(a.clone()), false), [want], "{a}");
        }
        assert_eq!(messages(property(json!({"type": "integer", "default": "x"})), false).len(), 1);
        let rule = json!({"type": "object", "x-kubernetes-validations": [{"rule": "self.("}]});
        assert!(messages(rule, false)[0].contains("compilation failed"));
        let meta = json!({"type": "object", "properties": {"kind": {"type": "string", "default": "x"}}});
        assert_eq!(messages(meta, false), ["s.properties[kind].default: Forbidden: must not be set in top-level kind"]);
        let any = json!({"type": "object", "anyOf": [{"required": ["a"]}]});
        assert!(messages(any.clone(), false).is_empty());
        assert!(messages(any, true)[0].contains("only [Description Type"));
    }

    #[test]
    fn accepted() {
        let both = json!([{"type": "integer"}, {"type": "string"}]);
        let schema = json!({"type": "object", "properties": {"a": {"type": "string", "default": "x"},
            "b": {"x-kubernetes-int-or-string": true, "anyOf": both}}});
        assert_eq!(messages(schema, true), [""; 0]);
    }
}
