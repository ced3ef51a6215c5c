//! The environment of a container, in upstream's order of precedence.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{
    expand::expand,
    field::{self, Addresses, Allocatable},
};
use crate::objects::{Object, ObjectKind, ObjectRef};

/// Objects already fetched; `None` is one that does not exist.
pub(crate) type Fetched = HashMap<ObjectRef, Option<std::sync::Arc<Object>>>;

/// The ConfigMaps and Secrets a container's environment refers to.
pub(crate) fn references(namespace: &str, c: &Container) -> Vec<ObjectRef> {
    let mut found = Vec::new();
    let mut add = |kind, name: &str| found.push(ObjectRef { kind, namespace: namespace.into(), name: name.into() });
    for from in c.env_from.iter().flatten() {
        if let Some(r) = &from.config_map_ref {
            add(ObjectKind::ConfigMap, &r.name);
        }
        if let Some(r) = &from.secret_ref {
            add(ObjectKind::Secret, &r.name);
        }
    }
    for from in c.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
        if let Some(r) = &from.config_map_key_ref {
            add(ObjectKind::ConfigMap, &r.name);
        }
        if let Some(r) = &from.secret_key_ref {
            add(ObjectKind::Secret, &r.name);
        }
    }
    found.sort();
    found.dedup();
    found
}

/// What the environment is made from.
pub(crate) struct Sources<'a> {
    pub(crate) pod: &'a Pod,
    pub(crate) container: &'a Container,
    pub(crate) objects: &'a Fetched,
    pub(crate) services: &'a [(String, String)],
    pub(crate) addresses: &'a Addresses,
    pub(crate) allocatable: Allocatable,
}

/// Upstream's text for an object that is not there.
pub(crate) fn not_found(r: &ObjectRef) -> String {
    let kind = match r.kind {
        ObjectKind::ConfigMap => "configmap",
        ObjectKind::Secret => "secret",
    };
    format!("{kind} {:?} not found", r.name)
}

/// Makes the environment; an error is the message of a CreateContainerConfigError.
pub(crate) fn make(s: &Sources<'_>) -> Result<Vec<(String, String)>, String> {
    let namespace = s.pod.metadata.namespace.as_deref().unwrap_or("default");
    let services: BTreeMap<&str, &str> = s.services.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let mut result: Vec<(String, String)> = Vec::new();
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let object = |kind, name: &str, optional: Option<bool>| -> Result<Option<&Object>, String> {
        let key = ObjectRef { kind, namespace: namespace.into(), name: name.into() };
        match s.objects.get(&key) {
            Some(Some(o)) => Ok(Some(o)),
            _ if optional == Some(true) => Ok(None),
            _ => Err(not_found(&key)),
        }
    };
    for from in s.container.env_from.iter().flatten() {
        let found = match (&from.config_map_ref, &from.secret_ref) {
            (Some(r), _) => object(ObjectKind::ConfigMap, &r.name, r.optional)?,
            (_, Some(r)) => object(ObjectKind::Secret, &r.name, r.optional)?,
            _ => None,
        };
        for (key, value) in found.into_iter().flat_map(|o| o.text_keys()) {
            let name = format!("{}{key}", from.prefix.as_deref().unwrap_or(""));
            if valid_name(&name) {
                known.insert(name, value);
            }
        }
    }
    result.extend(known.iter().map(|(k, v)| (k.clone(), v.clone())));
    for e in s.container.env.iter().flatten() {
        let value = match &e.value_from {
            None => {
                let lookup = |n: &str| known.get(n).cloned().or_else(|| services.get(n).map(ToString::to_string));
                Some(expand(e.value.as_deref().unwrap_or(""), lookup))
            }
            Some(from) => value_from(s, from, &object, namespace)?,
        };
        if let Some(value) = value {
            known.insert(e.name.clone(), value.clone());
            result.retain(|(k, _)| k != &e.name);
            result.push((e.name.clone(), value));
        }
    }
    for (k, v) in services {
        if !known.contains_key(k) {
            result.push((k.into(), v.into()));
        }
    }
    Ok(result)
}

fn value_from<'o>(
    s: &Sources<'_>,
    from: &k8s_openapi::api::core::v1::EnvVarSource,
    object: &impl Fn(ObjectKind, &str, Option<bool>) -> Result<Option<&'o Object>, String>,
    namespace: &str,
) -> Result<Option<String>, String> {
    if let Some(f) = &from.field_ref {
        return field::field(s.pod, s.addresses, &f.field_path).map(Some);
    }
    if let Some(r) = &from.resource_field_ref {
        return field::resource(s.pod, r, &s.container.name, s.allocatable).map(Some);
    }
    let (kind, name, key, optional) = if let Some(r) = &from.config_map_key_ref {
        (ObjectKind::ConfigMap, &r.name, &r.key, r.optional)
    } else if let Some(r) = &from.secret_key_ref {
        (ObjectKind::Secret, &r.name, &r.key, r.optional)
    } else {
        return Ok(None);
    };
    let Some(found) = object(kind, name, optional)? else { return Ok(None) };
    match found.text(key) {
        Some(v) => Ok(Some(v)),
        None if optional == Some(true) => Ok(None),
        None => {
            let kind = if kind == ObjectKind::ConfigMap { "ConfigMap" } else { "Secret" };
            Err(format!("couldn't find key {key} in {kind} {namespace}/{name}"))
        }
    }
}

fn valid_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=')
}

/// One service as far as environments care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) ip: String,
    /// Port name, number, protocol.
    pub(crate) ports: Vec<(Option<String>, i32, String)>,
}

/// Docker-link style variables of services.
pub(crate) fn service_variables<'a>(services: impl Iterator<Item = &'a Service>) -> Vec<(String, String)> {
    let upper = |s: &str| s.to_ascii_uppercase().replace('-', "_");
    let mut out = Vec::new();
    for s in services {
        let (prefix, ip) = (upper(&s.name), &s.ip);
        let Some((_, first_port, first_protocol)) = s.ports.first() else { continue };
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
        let mut add = |k: String, v: String| out.push((k, v));
        add(format!("{prefix}_SERVICE_HOST"), ip.clone());
        add(format!("{prefix}_SERVICE_PORT"), first_port.to_string());
        for (name, port, _) in &s.ports {
            if let Some(name) = name.as_deref().filter(|n| !n.is_empty()) {
                add(format!("{prefix}_SERVICE_PORT_{}", upper(name)), port.to_string());
            }
        }
        let url = |port: &i32, protocol: &str| format!("{}://{host}:{port}", protocol.to_ascii_lowercase());
        add(format!("{prefix}_PORT"), url(first_port, first_protocol));
        for (_, port, protocol) in &s.ports {
            let base = format!("{prefix}_PORT_{port}_{}", protocol.to_ascii_uppercase());
            add(base.clone(), url(port, protocol));
            add(format!("{base}_PROTO"), protocol.to_ascii_lowercase());
            add(format!("{base}_PORT"), port.to_string());
            add(format!("{base}_ADDR"), ip.clone());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_become_variables() {
        let s = Service {
            namespace: "default".into(),
            name: "my-db".into(),
            ip: "10.0.0.1".into(),
            ports: vec![(Some("sql".into()), 5432, "TCP".into())],
        };
        let vars = service_variables([s].iter());
        let text: Vec<String> = vars.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            text,
            [
                "MY_DB_SERVICE_HOST=10.0.0.1",
                "MY_DB_SERVICE_PORT=5432",
                "MY_DB_SERVICE_PORT_SQL=5432",
                "MY_DB_PORT=tcp://10.0.0.1:5432",
                "MY_DB_PORT_5432_TCP=tcp://10.0.0.1:5432",
                "MY_DB_PORT_5432_TCP_PROTO=tcp",
                "MY_DB_PORT_5432_TCP_PORT=5432",
                "MY_DB_PORT_5432_TCP_ADDR=10.0.0.1",
            ]
        );
    }

    #[test]
    fn precedence_and_missing_objects() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata":{"namespace":"n","name":"p"},
            "spec":{"containers":[{"name":"c",
                "envFrom":[{"prefix":"P_","configMapRef":{"name":"cm"}},{"secretRef":{"name":"none","optional":true}}],
                "env":[{"name":"A","value":"$(P_k)-$(SVC)"},{"name":"B","value":"$(A)$(NOPE)"},{"name":"SVC","value":"mine"},
                       {"name":"K","valueFrom":{"configMapKeyRef":{"name":"cm","key":"k"}}}]}]}}))
        .unwrap();
        let mut objects = Fetched::new();
        let key = ObjectRef { kind: ObjectKind::ConfigMap, namespace: "n".into(), name: "cm".into() };
        objects.insert(key.clone(), Some(std::sync::Arc::new(Object::of_text([("k", "v")]))));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let services = [("SVC".to_string(), "svc".to_string()), ("SVC2".to_string(), "two".to_string())];
        let addresses = Addresses::default();
        let of = |objects: &Fetched| {
            make(&Sources {
                pod: &pod,
                container,
                objects,
                services: &services,
                addresses: &addresses,
                allocatable: Allocatable::default(),
            })
        };
        let got = of(&objects).unwrap();
        let text: Vec<String> = got.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(text, ["P_k=v", "A=v-svc", "B=v-svc$(NOPE)", "SVC=mine", "K=v", "SVC2=two"]);
        objects.insert(key, None);
        assert_eq!(of(&objects).unwrap_err(), "configmap \"cm\" not found");
        assert_eq!(references("n", container).len(), 2);
    }
}
