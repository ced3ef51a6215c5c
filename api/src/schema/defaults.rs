//! Defaults: constants of the schema, conditional rows of [`super::rows`], and the few that need code.

use serde_json::{Map, Value, json};

use super::{
    Definition, Type, Zero,
    decode::is_zero,
    rows::{Row, When, rows},
};
use crate::{gvk::Gvk, meta, quantity::Quantity};

type Object = Map<String, Value>;

/// Applies all defaults of the object's kind, then [`fill`]. Idempotent. The object must have been decoded.
pub fn default(def: &Definition, obj: &mut Value) {
    let gvk = Gvk::of(obj);
    if let Value::Object(map) = obj {
        fill_object(def, map);
        default_object(def, map);
        fill_object(def, map);
    }
    if gvk.group.is_empty() && gvk.kind == "Pod" {
        default_pod(obj);
    }
}

/// Fills in what Go prints for absent fields: `status: {}`, `name: ""`, `rules: null`.
pub fn fill(def: &Definition, obj: &mut Value) {
    if let Value::Object(map) = obj {
        fill_object(def, map);
    }
}

fn zero(ty: &Type) -> Value {
    match ty {
        Type::String => "".into(),
        Type::Bool => false.into(),
        Type::Int32 | Type::Int64 | Type::Double | Type::IntOrString => 0.into(),
        Type::Quantity => "0".into(),
        Type::Object(_) => Value::Object(Map::new()),
        _ => Value::Null,
    }
}

fn fill_object(def: &Definition, map: &mut Object) {
    for field in &def.fields {
        match field.zero {
            Zero::Print if map.get(&*field.name).is_none_or(Value::is_null) => {
                map.insert(field.name.to_string(), zero(&field.ty));
            }
            Zero::Null if !map.contains_key(&*field.name) => {
                map.insert(field.name.to_string(), Value::Null);
            }
            _ => {}
        }
        if let Some(value) = map.get_mut(&*field.name) {
            each_object(&field.ty, value, &mut fill_object);
        }
    }
}

/// Turns empty lists into `null` where that is how Go prints what comes back from storage.
pub fn seal(def: &Definition, obj: &mut Value) {
    if let Value::Object(map) = obj {
        seal_object(def, map);
    }
}

fn seal_object(def: &Definition, map: &mut Object) {
    for field in &def.fields {
        let Some(value) = map.get_mut(&*field.name) else { continue };
        if field.zero == Zero::Null && matches!(value, Value::Array(items) if items.is_empty()) {
            *value = Value::Null;
        } else {
            each_object(&field.ty, value, &mut seal_object);
        }
    }
}

/// Calls `f` for every struct directly inside a value of type `ty`.
fn each_object(ty: &Type, value: &mut Value, f: &mut dyn FnMut(&Definition, &mut Object)) {
    match (ty, value) {
        (Type::Object(def), Value::Object(map)) => f(def.get(), map),
        (Type::List(list), Value::Array(items)) => {
            for item in items {
                each_object(&list.item, item, f);
            }
        }
        (Type::Map(map_type), Value::Object(map)) => {
            for value in map.values_mut() {
                each_object(&map_type.value, value, f);
            }
        }
        _ => {}
    }
}

fn default_object(def: &Definition, map: &mut Object) {
    before(def, map);
    for row in rows(&def.name) {
        apply_row(row, map);
    }
    for field in &def.fields {
        if let Some(default) = &field.default
            && map.get(&*field.name).is_none_or(|v| v.is_null() || (field.zero != Zero::Pointer && is_zero(v)))
        {
            map.insert(field.name.to_string(), (**default).clone());
        }
        if let Some(value) = map.get_mut(&*field.name) {
            each_object(&field.ty, value, &mut default_object);
        }
    }
}

fn apply_row(row: &Row, map: &mut Object) {
    let value: Value = serde_json::from_str(row.value).unwrap_or_else(|_| row.value.into());
    set_at(map, row.path, row.when, &value);
}

/// Sets the field at `path` (`a.b[].c`, `a+.b` creates `a`) when `when` holds.
fn set_at(map: &mut Object, path: &str, when: When, value: &Value) {
    let Some((head, rest)) = path.split_once('.') else {
        let missing = match (map.get(path), when) {
            (None | Some(Value::Null), _) => true,
            (Some(v), When::Empty) => is_zero(v),
            (Some(_), When::Unset) => false,
        };
        if missing {
            map.insert(path.to_owned(), value.clone());
        }
        return;
    };
    if let Some(list) = head.strip_suffix("[]") {
        for item in map.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Value::Object(item) = item {
                set_at(item, rest, when, value);
            }
        }
        return;
    }
    let (name, create) = head.strip_suffix('+').map_or((head, false), |name| (name, true));
    if create && map.get(name).is_none_or(Value::is_null) {
        map.insert(name.to_owned(), Value::Object(Map::new()));
    }
    if let Some(Value::Object(child)) = map.get_mut(name) {
        set_at(child, rest, when, value);
    }
}

fn text<'a>(map: &'a Object, field: &str) -> &'a str {
    map.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn unset(map: &Object, field: &str) -> bool {
    map.get(field).is_none_or(Value::is_null)
}

fn put(map: &mut Object, field: &str, value: impl Into<Value>) {
    if unset(map, field) {
        map.insert(field.to_owned(), value.into());
    }
}

fn child<'a>(map: &'a mut Object, field: &str) -> Option<&'a mut Object> {
    map.get_mut(field)?.as_object_mut()
}

fn ensure<'a>(map: &'a mut Object, field: &str) -> &'a mut Object {
    let slot = map.entry(field).or_insert(Value::Null);
    if !slot.is_object() {
        *slot = Value::Object(Map::new());
    }
    match slot {
        Value::Object(map) => map,
        _ => unreachable!("just made an object"),
    }
}

fn items<'a>(map: &'a mut Object, field: &str) -> impl Iterator<Item = &'a mut Object> {
    map.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

/// `Always` for the tag `latest`, which is meant when there is neither tag nor digest.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').unwrap_or((image, ""));
    let latest = match name.rsplit('/').next().unwrap_or(name).split_once(':') {
        Some((_, tag)) => tag == "latest",
        None => digest.is_empty() && !image.is_empty(),
    };
    if latest { "Always" } else { "IfNotPresent" }
}

/// Labels of a pod template.
fn template_labels(map: &Object) -> Option<Value> {
    map.get("spec")?.get("template")?.get("metadata")?.get("labels").filter(|l| !is_zero(l)).cloned()
}

fn metadata_labels_from_template(map: &mut Object) {
    if let Some(labels) = template_labels(map) {
        let metadata = ensure(map, "metadata");
        if metadata.get("labels").is_none_or(is_zero) {
            metadata.insert("labels".into(), labels);
        }
    }
}

/// Conditional defaults that are not rows, by definition.
fn before(def: &Definition, map: &mut Object) {
    let Some(name) = def.name.strip_prefix("io.k8s.") else { return };
    match name {
        "api.core.v1.Container" | "api.core.v1.EphemeralContainer" => {
            let policy = pull_policy(text(map, "image"));
            if text(map, "imagePullPolicy").is_empty() {
                map.insert("imagePullPolicy".into(), policy.into());
            }
        }
        "api.core.v1.ResourceRequirements" | "api.core.v1.VolumeResourceRequirements" => round_resources(map),
        "api.core.v1.Volume" => {
            if map.iter().all(|(k, v)| k == "name" || v.is_null()) {
                map.insert("emptyDir".into(), json!({}));
            }
            if let Some(image) = child(map, "image") {
                let policy = pull_policy(text(image, "reference"));
                if text(image, "pullPolicy").is_empty() {
                    image.insert("pullPolicy".into(), policy.into());
                }
            }
        }
        "api.core.v1.ReplicationController" => {
            metadata_labels_from_template(map);
            if let Some(labels) = template_labels(map) {
                let spec = ensure(map, "spec");
                if spec.get("selector").is_none_or(is_zero) {
                    spec.insert("selector".into(), labels);
                }
            }
        }
        "api.core.v1.PodSpec" => mirror(map, "serviceAccountName", "serviceAccount"),
        "api.core.v1.Secret" => secret(map),
        "api.core.v1.NodeSpec" => {
            let cidr = text(map, "podCIDR").to_owned();
            if !cidr.is_empty() && map.get("podCIDRs").is_none_or(is_zero) {
                map.insert("podCIDRs".into(), vec![cidr].into());
            }
        }
        "api.batch.v1.Job" => {
            metadata_labels_from_template(map);
            if let Some(spec) = child(map, "spec") {
                job(spec);
            }
        }
        "api.core.v1.Service" => service(map),
        "api.core.v1.Namespace" => {
            let name = map.get("metadata").and_then(|m| m.get("name")).and_then(Value::as_str).map(str::to_owned);
            if let Some(name) = name.filter(|n| !n.is_empty()) {
                ensure(ensure(map, "metadata"), "labels").insert("kubernetes.io/metadata.name".into(), name.into());
            }
        }
        "api.core.v1.NodeStatus" => {
            if let Some(capacity) = map.get("capacity").cloned() {
                put(map, "allocatable", capacity);
            }
        }
        "api.core.v1.LimitRangeItem" if text(map, "type") == "Container" => limit_range(map),
        "api.apps.v1.DeploymentStrategy" => {
            rolling_update(map, &[("maxUnavailable", "25%".into()), ("maxSurge", "25%".into())])
        }
        "api.apps.v1.DaemonSetUpdateStrategy" => {
            rolling_update(map, &[("maxUnavailable", 1.into()), ("maxSurge", 0.into())])
        }
        "api.apps.v1.StatefulSetUpdateStrategy" => stateful_set_strategy(map),
        "api.apps.v1.StatefulSet" => stateful_set(map),
        "api.autoscaling.v2.HorizontalPodAutoscalerBehavior" => hpa_behavior(map),
        "api.networking.v1.NetworkPolicySpec" if map.get("policyTypes").is_none_or(is_zero) => {
            let mut types = vec!["Ingress"];
            if map.get("egress").is_some_and(|e| !is_zero(e)) {
                types.push("Egress");
            }
            map.insert("policyTypes".into(), types.into());
        }
        "api.rbac.v1.Subject" if text(map, "apiGroup").is_empty() && matches!(text(map, "kind"), "User" | "Group") => {
            map.insert("apiGroup".into(), "rbac.authorization.k8s.io".into());
        }
        "api.resource.v1.ExactDeviceRequest" | "api.resource.v1.DeviceSubRequest" => {
            if text(map, "allocationMode").is_empty() {
                map.insert("allocationMode".into(), "ExactCount".into());
            }
            if text(map, "allocationMode") == "ExactCount" && map.get("count").is_none_or(is_zero) {
                map.insert("count".into(), 1.into());
            }
        }
        "api.resource.v1.DeviceTaint" => put(map, "timeAdded", meta::now()),
        "apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition" => crd(map),
        _ => {}
    }
}

fn round_resources(map: &mut Object) {
    for list in ["limits", "requests"] {
        for quantity in child(map, list).into_iter().flat_map(Object::values_mut) {
            if let Ok(parsed) = Quantity::from_json(quantity) {
                *quantity = parsed.round_up_milli().to_string().into();
            }
        }
    }
}

fn rolling_update(map: &mut Object, defaults: &[(&str, Value)]) {
    if text(map, "type").is_empty() {
        map.insert("type".into(), "RollingUpdate".into());
    }
    if text(map, "type") == "RollingUpdate" {
        let rolling = ensure(map, "rollingUpdate");
        for (field, value) in defaults {
            put(rolling, field, value.clone());
        }
    }
}

fn stateful_set_strategy(map: &mut Object) {
    if text(map, "type").is_empty() {
        map.insert("type".into(), "RollingUpdate".into());
        put(map, "rollingUpdate", json!({}));
    }
    if text(map, "type") == "RollingUpdate"
        && let Some(rolling) = child(map, "rollingUpdate")
    {
        put(rolling, "partition", 0);
    }
}

fn stateful_set(map: &mut Object) {
    let Some(spec) = child(map, "spec") else { return };
    for field in ["whenDeleted", "whenScaled"] {
        let policy = ensure(spec, "persistentVolumeClaimRetentionPolicy");
        if text(policy, field).is_empty() {
            policy.insert(field.into(), "Retain".into());
        }
    }
    for claim in items(spec, "volumeClaimTemplates") {
        claim.insert("apiVersion".into(), "v1".into());
        claim.insert("kind".into(), "PersistentVolumeClaim".into());
    }
}

/// Two names of one field: the second is the old one.
fn mirror(map: &mut Object, field: &str, old: &str) {
    let value = Some(text(map, field)).filter(|v| !v.is_empty()).unwrap_or_else(|| text(map, old)).to_owned();
    if !value.is_empty() {
        map.insert(field.into(), value.as_str().into());
        map.insert(old.into(), value.into());
    }
}

/// `stringData` is write-only: it is merged into `data`.
fn secret(map: &mut Object) {
    use base64::Engine;
    if let Some(Value::Object(strings)) = map.shift_remove("stringData") {
        for (key, value) in strings {
            let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
            ensure(map, "data").insert(key, encoded.into());
        }
    }
}

fn job(map: &mut Object) {
    for (field, value) in
        [("completionMode", json!("NonIndexed")), ("suspend", json!(false)), ("manualSelector", json!(false))]
    {
        put(map, field, value);
    }
    set_at(map, "podFailurePolicy.rules[].onPodConditions[].status", When::Empty, &json!("True"));
    if unset(map, "completions") && unset(map, "parallelism") {
        map.insert("completions".into(), 1.into());
    }
    put(map, "parallelism", 1);
    let limit = if unset(map, "backoffLimitPerIndex") { 6 } else { i32::MAX };
    put(map, "backoffLimit", limit);
    let policy = if unset(map, "podFailurePolicy") { "TerminatingOrFailed" } else { "Failed" };
    put(map, "podReplacementPolicy", policy);
}

fn service(map: &mut Object) {
    let Some(spec) = child(map, "spec") else { return };
    for (field, value) in [("sessionAffinity", "None"), ("type", "ClusterIP")] {
        if text(spec, field).is_empty() {
            spec.insert(field.into(), value.into());
        }
    }
    if text(spec, "sessionAffinity") == "None" {
        spec.shift_remove("sessionAffinityConfig");
    }
    if text(spec, "sessionAffinity") == "ClientIP" {
        put(ensure(ensure(spec, "sessionAffinityConfig"), "clientIP"), "timeoutSeconds", 10800);
    }
    for port in items(spec, "ports") {
        if text(port, "protocol").is_empty() {
            port.insert("protocol".into(), "TCP".into());
        }
        if port.get("targetPort").is_none_or(is_zero) {
            let number = port.get("port").cloned().unwrap_or_else(|| 0.into());
            port.insert("targetPort".into(), number);
        }
    }
    let kind = text(spec, "type").to_owned();
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer")
        || kind == "ClusterIP" && spec.get("externalIPs").is_some_and(|ips| !is_zero(ips));
    if external && text(spec, "externalTrafficPolicy").is_empty() {
        spec.insert("externalTrafficPolicy".into(), "Cluster".into());
    }
    if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
        put(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind != "LoadBalancer" {
        return;
    }
    put(spec, "allocateLoadBalancerNodePorts", true);
    let balancer = child(map, "status").and_then(|s| child(s, "loadBalancer"));
    for ingress in balancer.into_iter().flat_map(|b| items(b, "ingress")) {
        if !text(ingress, "ip").is_empty() {
            put(ingress, "ipMode", "VIP");
        }
    }
}

fn limit_range(map: &mut Object) {
    let copy = |map: &mut Object, from: &str, to: &str| {
        let source = map.get(from).and_then(Value::as_object).cloned().unwrap_or_default();
        for (key, value) in source {
            put(ensure(map, to), &key, value);
        }
    };
    copy(map, "max", "default");
    copy(map, "default", "defaultRequest");
    copy(map, "min", "defaultRequest");
}

fn hpa_behavior(map: &mut Object) {
    let pods = json!({"type": "Pods", "value": 4, "periodSeconds": 15});
    let percent = json!({"type": "Percent", "value": 100, "periodSeconds": 15});
    for (field, policies) in [("scaleUp", json!([pods, percent])), ("scaleDown", json!([percent]))] {
        let rules = ensure(map, field);
        if field == "scaleUp" {
            put(rules, "stabilizationWindowSeconds", 0);
        }
        put(rules, "selectPolicy", "Max");
        put(rules, "policies", policies);
    }
}

fn crd(map: &mut Object) {
    let Some(spec) = child(map, "spec") else { return };
    let storage = items(spec, "versions")
        .find(|v| v.get("storage") == Some(&Value::Bool(true)))
        .map(|v| v.get("name").cloned().unwrap_or_default());
    let names = ensure(spec, "names");
    let kind = text(names, "kind").to_owned();
    for (field, value) in [("singular", kind.to_lowercase()), ("listKind", format!("{kind}List"))] {
        if text(names, field).is_empty() && (field == "singular" || !kind.is_empty()) {
            names.insert(field.into(), value.into());
        }
    }
    put(spec, "conversion", json!({"strategy": "None"}));
    let status = ensure(map, "status");
    if status.get("storedVersions").is_none_or(is_zero)
        && let Some(version) = storage
    {
        status.insert("storedVersions".into(), vec![version].into());
    }
}

fn quantity_of(resources: &Object, list: &str, key: &str) -> Option<Quantity> {
    Quantity::from_json(resources.get(list)?.get(key)?).ok()
}

/// Pods themselves, not templates.
fn default_pod(obj: &mut Value) {
    let Some(spec) = obj.get_mut("spec").and_then(Value::as_object_mut) else { return };
    put(spec, "enableServiceLinks", true);
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for list in ["containers", "initContainers"] {
        for container in items(spec, list) {
            if let Some(resources) = child(container, "resources") {
                let limits = resources.get("limits").and_then(Value::as_object).cloned().unwrap_or_default();
                for (key, value) in limits {
                    put(ensure(resources, "requests"), &key, value);
                }
            }
            for port in items(container, "ports").filter(|_| host_network) {
                if port.get("hostPort").is_none_or(is_zero) {
                    let number = port.get("containerPort").cloned().unwrap_or_default();
                    port.insert("hostPort".into(), number);
                }
            }
        }
    }
    pod_level_resources(spec);
}

/// What all containers together ask for of one resource: sidecars add up with containers, init containers overlap.
fn aggregate(spec: &Object, list: &str, key: &str) -> Option<Quantity> {
    let resources = |c: &Value| c.get("resources").and_then(Value::as_object).and_then(|r| quantity_of(r, list, key));
    let all = |field: &str| spec.get(field).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut found = false;
    let mut sum = Quantity::ZERO;
    for quantity in all("containers").iter().filter_map(resources) {
        found = true;
        sum = sum.add(&quantity);
    }
    let (mut sidecars, mut peak) = (Quantity::ZERO, Quantity::ZERO);
    for container in all("initContainers") {
        let Some(quantity) = resources(container) else { continue };
        found = true;
        if container.get("restartPolicy").and_then(Value::as_str) == Some("Always") {
            sum = sum.add(&quantity);
            sidecars = sidecars.add(&quantity);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.add(&quantity));
        }
    }
    found.then(|| sum.max(peak))
}

/// Requests of the pod are what its containers request, or its limits; limits of huge pages are the containers'.
fn pod_level_resources(spec: &mut Object) {
    let of = |list: &str| {
        let found = spec.get("resources").and_then(|resources| resources.get(list)?.as_object().cloned());
        found.unwrap_or_default()
    };
    let (mut limits, mut requests) = (of("limits"), of("requests"));
    if limits.is_empty() && requests.is_empty() {
        return;
    }
    let huge = |key: &str| key.starts_with("hugepages-");
    let containers = ["containers", "initContainers"].iter().filter_map(|list| spec.get(*list)?.as_array()).flatten();
    let limited = containers.filter_map(|container| container.pointer("/resources/limits")?.as_object());
    for key in limited.flat_map(Map::keys).filter(|key| huge(key)) {
        if !limits.contains_key(key)
            && !requests.contains_key(key)
            && let Some(sum) = aggregate(spec, "limits", key)
        {
            limits.insert(key.clone(), sum.to_string().into());
        }
    }
    if limits.is_empty() {
        return;
    }
    for key in ["cpu", "memory"] {
        if let Some(sum) = aggregate(spec, "requests", key) {
            put(&mut requests, key, sum.to_string());
        }
    }
    for (key, limit) in limits.iter().filter(|(key, _)| huge(key) || ["cpu", "memory"].contains(&key.as_str())) {
        put(&mut requests, key, limit.clone());
    }
    let resources = ensure(spec, "resources");
    resources.insert("limits".into(), limits.into());
    if !requests.is_empty() {
        resources.insert("requests".into(), requests.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{decode, lookup};

    fn defaulted(mut obj: Value) -> Value {
        let def = lookup(&Gvk::of(&obj)).unwrap();
        decode(def, &mut obj, &[]).unwrap();
        default(def, &mut obj);
        let once = obj.clone();
        decode(def, &mut obj, &[]).unwrap();
        default(def, &mut obj);
        assert_eq!(once, obj, "defaulting is idempotent");
        obj
    }

    #[test]
    fn pull_policies() {
        for (image, want) in [
            ("nginx", "Always"),
            ("nginx:1", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("localhost:5000/nginx:latest", "Always"),
            ("nginx@sha256:abc", "IfNotPresent"),
            ("nginx:2@sha256:abc", "IfNotPresent"),
            ("nginx:latest@sha256:abc", "Always"),
            ("", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), want, "{image}");
        }
    }

    #[test]
    fn string_data_wins() {
        let got = defaulted(json!({"apiVersion": "v1", "kind": "Secret", "data": {"a": "eA=="},
            "stringData": {"a": "y", "b": "z"}}));
        assert_eq!((&got["data"], got.get("stringData")), (&json!({"a": "eQ==", "b": "eg=="}), None));
    }

    fn pod(spec: Value) -> Value {
        defaulted(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}))["spec"].take()
    }

    #[test]
    fn pods_on_the_host_network_with_limits() {
        let spec = pod(json!({"hostNetwork": true, "containers": [{"name": "c", "image": "a:1",
            "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}}]}));
        let container = &spec["containers"][0];
        assert_eq!((&container["ports"][0]["hostPort"], &spec["enableServiceLinks"]), (&json!(80), &json!(true)));
        assert_eq!(container["resources"]["requests"], json!({"cpu": "1"}));
    }

    #[test]
    fn resources_of_pods() {
        let of = |requests: Value, limits: Value| json!({"requests": requests, "limits": limits});
        let one =
            pod(json!({"containers": [{"name": "c", "image": "a:1", "resources": {"requests": {"cpu": "500m"}}}],
            "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}}));
        assert_eq!(one["resources"]["requests"], json!({"cpu": "500m", "memory": "1Gi"}));
        let own = |cpu: &str, pages: &str| of(json!({"cpu": cpu}), json!({"hugepages-2Mi": pages}));
        let all = pod(json!({
            "initContainers": [
                {"name": "s", "image": "a:1", "restartPolicy": "Always", "resources": own("1", "2Mi")},
                {"name": "i", "image": "a:1", "resources": own("4", "4Mi")},
            ],
            "containers": [{"name": "c", "image": "a:1", "resources": own("2", "8Mi")}],
            "resources": {"limits": {"memory": "1Gi"}},
        }));
        let limits = json!({"hugepages-2Mi": "10Mi", "memory": "1Gi"});
        assert_eq!(all["resources"], of(json!({"cpu": "5", "hugepages-2Mi": "10Mi", "memory": "1Gi"}), limits));
    }

    #[test]
    fn deployment() {
        let got = defaulted(json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"},
            "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 80}],
                    "livenessProbe": {"httpGet": {"port": 80}}}]}}}}));
        assert_eq!(
            got["spec"],
            json!({"selector": {"matchLabels": {"a": "b"}}, "replicas": 1, "revisionHistoryLimit": 10,
                "progressDeadlineSeconds": 600,
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
                "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i",
                    "ports": [{"containerPort": 80, "protocol": "TCP"}], "resources": {},
                    "imagePullPolicy": "Always", "terminationMessagePath": "/dev/termination-log",
                    "terminationMessagePolicy": "File",
                    "livenessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                        "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}}],
                    "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "terminationGracePeriodSeconds": 30,
                    "securityContext": {}, "schedulerName": "default-scheduler"}}})
        );
        assert_eq!(got["status"], json!({}));
    }

    #[test]
    fn image_tags() {
        for (image, want) in [
            ("a", "Always"),
            ("a:latest", "Always"),
            ("a:1", "IfNotPresent"),
            ("r:5000/a", "Always"),
            ("a@sha256:00", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), want, "{image}");
        }
    }
}
