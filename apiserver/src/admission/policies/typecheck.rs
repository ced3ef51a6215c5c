//! `status.typeChecking`: what is wrong with the expressions of a ValidatingAdmissionPolicy for the kinds it names.
//!
//! In: a policy and the CustomResourceDefinitions of the cluster. Out: warnings. A policy works whatever they say: when it
//! runs, objects have no declared types. The controllers write them; nothing here reads or writes objects.

use std::collections::BTreeSet;

use isopod_api::{
    gvk::{Gvk, Gvr},
    resources, schema,
};
use serde_json::{Value, json};

use crate::{
    admission::{list, text},
    cel::{Environment, Type, admission},
};

/// Kinds that are looked at for one policy at most.
const KINDS: usize = 10;

/// The `expressionWarnings` of a policy.
pub fn type_warnings(policy: &Value, definitions: &[Value]) -> Vec<Value> {
    let spec = &policy["spec"];
    let environments: Vec<(Gvk, Environment)> = kinds(spec, definitions)
        .into_iter()
        .filter_map(|gvk| Some((gvk.clone(), environment(spec, type_of(&gvk, definitions)?, definitions))))
        .collect();
    let mut warnings = Vec::new();
    for (index, validation) in list(spec, "validations").iter().enumerate() {
        for field in ["expression", "messageExpression"] {
            let expression = text(validation, field);
            let problems: Vec<String> =
                environments.iter().filter_map(|(gvk, known)| problem(gvk, known, expression)).collect();
            if !expression.is_empty() && !problems.is_empty() {
                let field = format!("spec.validations[{index}].{field}");
                warnings.push(json!({"fieldRef": field, "warning": problems.join("\n")}));
            }
        }
    }
    warnings
}

fn problem(gvk: &Gvk, environment: &Environment, expression: &str) -> Option<String> {
    let error = environment.compile(expression, &[]).err()?;
    let issues = error.strip_prefix("compilation failed: ").unwrap_or(&error);
    Some(format!("{gvk}: {issues}\n"))
}

/// What the expressions can name, with the types of one kind.
fn environment(spec: &Value, object: Type, definitions: &[Value]) -> Environment {
    let kind = &spec["paramKind"];
    let params = type_of(&Gvk::from_api_version(text(kind, "apiVersion"), text(kind, "kind")), definitions);
    let offers = admission::Offers { params: params.is_some(), authorizer: true };
    let mut known = admission::environment(offers).with("object", object.clone()).with("oldObject", object);
    if let Some(params) = params {
        known = known.with("params", params);
    }
    admission::with_variables(known, spec).0
}

/// The kinds that a policy names one by one, in their order.
fn kinds(spec: &Value, definitions: &[Value]) -> BTreeSet<Gvk> {
    let mut found = BTreeSet::new();
    for rule in list(&spec["matchConstraints"], "resourceRules") {
        let words = |field: &str| -> Vec<&str> {
            let mut words: Vec<&str> = list(rule, field).iter().filter_map(Value::as_str).collect();
            words.sort_unstable();
            words
        };
        let (groups, versions) = (words("apiGroups"), words("apiVersions"));
        if groups.iter().chain(&versions).any(|word| word.contains('*')) {
            continue;
        }
        let resources: Vec<&str> =
            words("resources").into_iter().filter(|resource| !resource.contains(['*', '/'])).collect();
        let each = groups.iter().flat_map(|group| versions.iter().map(move |version| (*group, *version)));
        let each = each.flat_map(|(group, version)| resources.iter().map(move |r| Gvr::new(group, version, r)));
        found.extend(each.filter_map(|gvr| kind_of(&gvr, definitions)).take(KINDS));
    }
    found
}

fn kind_of(gvr: &Gvr, definitions: &[Value]) -> Option<Gvk> {
    if let Some(known) = resources::by_gvr(gvr) {
        return Some(known.gvk());
    }
    let own = |crd: &&Value| crd["spec"]["group"] == *gvr.group && crd["spec"]["names"]["plural"] == *gvr.resource;
    let crd = definitions.iter().find(own)?;
    served(crd, &gvr.version)?;
    Some(Gvk::new(&gvr.group, &gvr.version, text(&crd["spec"]["names"], "kind")))
}

fn served<'c>(crd: &'c Value, version: &str) -> Option<&'c Value> {
    list(&crd["spec"], "versions").iter().find(|v| v["name"] == version && v["served"] == true)
}

fn type_of(gvk: &Gvk, definitions: &[Value]) -> Option<Type> {
    if let Some(definition) = schema::lookup(gvk) {
        return Some(Type::of_definition(definition, &gvk.kind));
    }
    let own = |crd: &&Value| crd["spec"]["group"] == *gvk.group && crd["spec"]["names"]["kind"] == *gvk.kind;
    let version = served(definitions.iter().find(own)?, &gvk.version)?;
    let meta = schema::definition("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")?;
    let declared = Type::of_schema(&version["schema"]["openAPIV3Schema"], true);
    Some(declared.with_field("metadata", Type::of_definition(meta, &format!("{}.metadata", gvk.kind))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(group: &str, resources: &[&str], validations: Value, extra: Value) -> Vec<(String, String)> {
        let mut spec = json!({"matchConstraints": {"resourceRules": [{"apiGroups": [group], "apiVersions": ["v1"],
            "operations": ["*"], "resources": resources}]}, "validations": validations});
        for (key, value) in extra.as_object().unwrap() {
            spec[key.as_str()] = value.clone();
        }
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "size": {"type": "integer"}, "when": {"type": "string", "format": "date-time"}}}}});
        let crd = json!({"spec": {"group": "x.io", "names": {"plural": "things", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "schema": {"openAPIV3Schema": schema}}]}});
        let found = type_warnings(&json!({ "spec": spec }), &[crd]);
        let word = |w: &Value, field: &str| w[field].as_str().unwrap().to_owned();
        found.iter().map(|w| (word(w, "fieldRef"), word(w, "warning"))).collect()
    }

    fn first(group: &str, resource: &str, expression: &str) -> String {
        let found = warnings(group, &[resource], json!([{ "expression": expression }]), json!({}));
        found.into_iter().next().map(|(_, warning)| warning).unwrap_or_default()
    }

    #[test]
    fn wrong_types_are_named() {
        assert_eq!(
            first("apps", "deployments", "object.spec.replicas > '1'"),
            "apps/v1, Kind=Deployment: ERROR: <input>:1:22: found no matching overload for '_>_' applied to '(int, string)'\n | object.spec.replicas > '1'\n | .....................^\n"
        );
        assert!(first("", "pods", "object.spec.nope == 1").contains("undefined field 'nope'"));
        assert!(first("x.io", "things", "object.spec.size == 'a'").starts_with("x.io/v1, Kind=Thing: ERROR"));
        for (group, resource, right) in [
            ("apps", "deployments", "object.spec.replicas > 1 && (oldObject == null || has(oldObject.spec))"),
            ("", "pods", "object.spec.containers.all(c, c.name != '' && c.?resources.limits.hasValue())"),
            ("", "pods", "object.metadata.creationTimestamp < timestamp('2020-01-01T00:00:00Z')"),
            ("x.io", "things", "object.spec.size > 1 && object.metadata.labels['a'] == 'b' && object.kind == 'Thing'"),
            (
                "apiextensions.k8s.io",
                "customresourcedefinitions",
                "object.spec.versions[0].schema.openAPIV3Schema.properties['a'].items.foo == 1",
            ),
            ("", "*", "object.spec.nope == 1"),
            ("none.io", "things", "object.spec.nope == 1"),
        ] {
            assert_eq!(first(group, resource, right), "", "{right}");
        }
    }

    #[test]
    fn variables_params_and_messages() {
        let validations =
            json!([{"expression": "variables.n > 1 && params.data['a'] == 'b'", "messageExpression": "object.nope"}]);
        let extra = json!({"variables": [{"name": "n", "expression": "object.spec.replicas"}],
            "paramKind": {"apiVersion": "v1", "kind": "ConfigMap"}});
        let found = warnings("apps", &["deployments", "statefulsets", "deployments/scale"], validations, extra);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, "spec.validations[0].messageExpression");
        let kinds: Vec<&str> = found[0]
            .1
            .lines()
            .filter_map(|line| line.split(": ERROR").next()?.strip_prefix("apps/v1, Kind="))
            .collect();
        assert_eq!(kinds, ["Deployment", "StatefulSet"]);
        let unknown = json!({"paramKind": {"apiVersion": "gone.io/v1", "kind": "Gone"}});
        let found = warnings("apps", &["deployments"], json!([{"expression": "params.x == 1"}]), unknown);
        assert!(found[0].1.contains("undeclared reference to 'params'"), "{found:?}");
    }
}
