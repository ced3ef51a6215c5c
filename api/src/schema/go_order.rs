//! The member order of objects as Go prints them: structs in the order of their declaration, maps by key.

use serde_json::{Map, Value};

use super::{Definition, Type};
use crate::protobuf;

/// Fields that are declared elsewhere than their protobuf number says: message, field, and the field before it.
const MOVED: &[(&str, &str, &str)] = &[
    ("PodSpec", "initContainers", "volumes"),
    ("PodSpec", "ephemeralContainers", "containers"),
    ("Container", "envFrom", "ports"),
    ("Container", "resizePolicy", "resources"),
    ("Container", "restartPolicy", "resizePolicy"),
    ("Container", "restartPolicyRules", "restartPolicy"),
    ("Container", "volumeDevices", "volumeMounts"),
    ("Container", "startupProbe", "readinessProbe"),
    ("Container", "terminationMessagePolicy", "terminationMessagePath"),
    ("SecurityContext", "windowsOptions", "seLinuxOptions"),
    ("SecurityContext", "runAsGroup", "runAsUser"),
    ("PodSecurityContext", "windowsOptions", "seLinuxOptions"),
    ("PodSecurityContext", "runAsGroup", "runAsUser"),
    ("PodSecurityContext", "supplementalGroupsPolicy", "supplementalGroups"),
    ("ServiceSpec", "clusterIPs", "clusterIP"),
    ("ServiceSpec", "ipFamilies", "sessionAffinityConfig"),
];

/// Puts the members of a value of a type into Go's order.
pub fn go_order(definition: &Definition, value: &mut Value) {
    let Value::Object(map) = value else { return };
    let names = declared(definition);
    let rank = |name: &str| names.iter().position(|n| *n == name).unwrap_or(usize::MAX);
    let mut members: Vec<(String, Value)> = std::mem::take(map).into_iter().collect();
    members.sort_by(|(a, _), (b, _)| rank(a).cmp(&rank(b)).then_with(|| a.cmp(b)));
    for (name, mut member) in members {
        if let Some(field) = definition.field(&name) {
            of_type(&field.ty, &mut member);
        }
        map.insert(name, member);
    }
}

fn of_type(ty: &Type, value: &mut Value) {
    match (ty, value) {
        (Type::Object(definition), value) if !definition.get().opaque => go_order(definition.get(), value),
        (Type::List(list), Value::Array(items)) => items.iter_mut().for_each(|item| of_type(&list.item, item)),
        (Type::Map(map), Value::Object(members)) => {
            members.sort_keys();
            members.values_mut().for_each(|member| of_type(&map.value, member));
        }
        _ => {}
    }
}

/// Field names as they are declared.
fn declared(definition: &Definition) -> Vec<&'static str> {
    let message = definition.name.strip_prefix("io.k8s.").map(|name| format!("k8s.io.{}", name.replace('-', "_")));
    let fields = message.and_then(|name| protobuf::message(&name)).map_or(&[][..], |message| message.fields());
    // TypeMeta comes first, but is no part of the message.
    let own = |name: &str| fields.iter().any(|field| field.name == name);
    let mut names: Vec<&str> = ["kind", "apiVersion"].into_iter().filter(|name| !own(name)).collect();
    names.extend(fields.iter().map(|field| field.name));
    let short = definition.short_name();
    let container = ["EphemeralContainer", "EphemeralContainerCommon"].contains(&short);
    for (_, field, before) in MOVED.iter().filter(|(of, ..)| *of == short || (container && *of == "Container")) {
        let (Some(from), true) = (names.iter().position(|n| n == field), names.contains(before)) else { continue };
        let name = names.remove(from);
        let to = names.iter().position(|n| n == before).map_or(names.len(), |i| i + 1);
        names.insert(to, name);
    }
    names
}

/// Sorts the members of everything, as Go prints maps.
pub fn sort_all(value: &mut Value) {
    match value {
        Value::Object(map) => {
            let mut sorted = std::mem::take(map);
            sorted.sort_keys();
            *map = sorted
                .into_iter()
                .map(|(name, mut member)| {
                    sort_all(&mut member);
                    (name, member)
                })
                .collect::<Map<_, _>>();
        }
        Value::Array(items) => items.iter_mut().for_each(sort_all),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{gvk::Gvk, schema};

    #[test]
    fn members_are_in_the_order_of_declaration() {
        let definition = schema::lookup(&Gvk::new("apps", "v1", "Deployment")).unwrap();
        let mut value = json!({
            "spec": {"template": {"spec": {"schedulerName": "s", "initContainers": [], "containers": [
                {"imagePullPolicy": "Always", "volumeMounts": [], "env": [], "envFrom": [], "name": "c"}]},
                "metadata": {"labels": {"b": "", "a": ""}, "name": "x"}}},
            "metadata": {"managedFields": [{"fieldsV1": {"f:z": {}, "f:a": {}}, "apiVersion": "v1", "manager": "m"}], "name": "d"},
            "kind": "Deployment",
        });
        go_order(definition, &mut value);
        let want = concat!(
            r#"{"kind":"Deployment","metadata":{"name":"d","managedFields":[{"manager":"m","apiVersion":"v1","fieldsV1":{"f:z":{},"f:a":{}}}]},"#,
            r#""spec":{"template":{"metadata":{"name":"x","labels":{"a":"","b":""}},"spec":{"initContainers":[],"containers":"#,
            r#"[{"name":"c","envFrom":[],"env":[],"volumeMounts":[],"imagePullPolicy":"Always"}],"schedulerName":"s"}}}}"#,
        );
        assert_eq!(value.to_string(), want);
    }
}
