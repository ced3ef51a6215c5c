//! ResourceQuota: counts what a request adds and refuses what is too much.
//!
//! Usage is written into the quota's status before the object is stored, under optimistic concurrency, so that two requests
//! at the same time cannot both take the last place. What is counted too high (a request that failed later on, a deleted
//! object) the quota controller puts right.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::BoxFuture;
use isopod_api::{gvk::Gvr, meta, quantity::Quantity, status::Status};
use serde_json::Value;

use super::{Operation, Plugin, Request, list, text};
use crate::authn::UserInfo;

/// The plugin.
#[derive(Default)]
pub(super) struct ResourceQuota {}

/// Amounts by resource name.
type Amounts = BTreeMap<String, Quantity>;

/// Resources that, once limited, every container has to state.
const MUST_STATE: [&str; 6] = ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];
const PLAIN_COUNTS: [&str; 7] =
    ["pods", "services", "replicationcontrollers", "resourcequotas", "secrets", "configmaps", "persistentvolumeclaims"];

fn quotas_gvr() -> Gvr {
    Gvr::new("", "v1", "resourcequotas")
}

fn amounts(value: &Value) -> Amounts {
    let pairs = value.as_object().into_iter().flatten();
    pairs.filter_map(|(name, amount)| Some((name.clone(), Quantity::from_json(amount).ok()?))).collect()
}

fn add(to: &mut Amounts, name: impl Into<String>, amount: &Quantity) {
    let name = name.into();
    let sum = to.get(&name).map_or(*amount, |have| have.add(amount));
    to.insert(name, sum);
}

/// What an object counts as, under every name a quota may use.
fn usage(gvr: &Gvr, object: &Value) -> Amounts {
    let mut out = Amounts::new();
    if object.is_null() {
        return out;
    }
    let one = Quantity::from_value(1);
    add(&mut out, format!("count/{}", gvr.group_resource()), &one);
    if !gvr.group.is_empty() {
        return out;
    }
    if gvr.resource == "pods" {
        return pod_usage(object, out);
    }
    if PLAIN_COUNTS.contains(&gvr.resource.as_str()) {
        add(&mut out, gvr.resource.as_str(), &one);
    }
    match gvr.resource.as_str() {
        "services" => service_usage(&object["spec"], &mut out),
        "persistentvolumeclaims" => claim_usage(object, &mut out),
        _ => {}
    }
    out
}

fn service_usage(spec: &Value, out: &mut Amounts) {
    let ports = list(spec, "ports");
    let count = |ports: usize| Quantity::from_value(i64::try_from(ports).unwrap_or(i64::MAX));
    match spec["type"].as_str() {
        Some("NodePort") => add(out, "services.nodeports", &count(ports.len())),
        Some("LoadBalancer") => {
            let allocates = spec["allocateLoadBalancerNodePorts"] != false;
            let with_port = ports.iter().filter(|port| port["nodePort"].as_u64().is_some_and(|p| p > 0)).count();
            add(out, "services.nodeports", &count(if allocates { ports.len() } else { with_port }));
            add(out, "services.loadbalancers", &Quantity::from_value(1));
        }
        _ => {}
    }
}

fn claim_usage(claim: &Value, out: &mut Amounts) {
    let one = Quantity::from_value(1);
    let class = claim["spec"]["storageClassName"].as_str().unwrap_or_default();
    let suffix = "storageclass.storage.k8s.io";
    if !class.is_empty() {
        add(out, format!("{class}.{suffix}/persistentvolumeclaims"), &one);
    }
    if let Ok(storage) = Quantity::from_json(&claim["spec"]["resources"]["requests"]["storage"]) {
        add(out, "requests.storage", &storage);
        if !class.is_empty() {
            add(out, format!("{class}.{suffix}/requests.storage"), &storage);
        }
    }
}

/// Requests and limits of one container under the quota's names.
fn container_usage(container: &Value) -> Amounts {
    let mut out = Amounts::new();
    for (name, amount) in amounts(&container["resources"]["requests"]) {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-") {
            add(&mut out, name.clone(), &amount);
        }
        add(&mut out, format!("requests.{name}"), &amount);
    }
    for (name, amount) in amounts(&container["resources"]["limits"]) {
        add(&mut out, format!("limits.{name}"), &amount);
    }
    out
}

fn pod_usage(pod: &Value, mut out: Amounts) -> Amounts {
    if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
        return out;
    }
    add(&mut out, "pods", &Quantity::from_value(1));
    let spec = &pod["spec"];
    let mut sum = Amounts::new();
    for container in list(spec, "containers") {
        container_usage(container).iter().for_each(|(name, amount)| add(&mut sum, name.as_str(), amount));
    }
    let mut sidecars = Amounts::new();
    let mut peak = Amounts::new();
    for container in list(spec, "initContainers") {
        let used = container_usage(container);
        if container["restartPolicy"] == "Always" {
            used.iter().for_each(|(name, amount)| add(&mut sidecars, name.as_str(), amount));
            continue;
        }
        for (name, amount) in used {
            let amount = sidecars.get(&name).map_or(amount, |have| have.add(&amount));
            if peak.get(&name).is_none_or(|have| *have < amount) {
                peak.insert(name, amount);
            }
        }
    }
    sidecars.iter().for_each(|(name, amount)| add(&mut sum, name.as_str(), amount));
    for (name, amount) in peak {
        if sum.get(&name).is_none_or(|have| *have < amount) {
            sum.insert(name, amount);
        }
    }
    for (name, amount) in amounts(&spec["overhead"]) {
        for key in [name.clone(), format!("requests.{name}"), format!("limits.{name}")] {
            if sum.contains_key(&key) {
                add(&mut sum, key, &amount);
            }
        }
    }
    out.extend(sum);
    out
}

fn best_effort(pod: &Value) -> bool {
    let none = |container: &Value| {
        ["requests", "limits"].iter().all(|f| container["resources"][f].as_object().is_none_or(|m| m.is_empty()))
    };
    ["containers", "initContainers"].iter().flat_map(|f| list(&pod["spec"], f)).all(none)
}

fn cross_namespace(pod: &Value) -> bool {
    let term = |term: &Value| !list(term, "namespaces").is_empty() || term["namespaceSelector"].is_object();
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        let affinity = &pod["spec"]["affinity"][kind];
        list(affinity, "requiredDuringSchedulingIgnoredDuringExecution").iter().any(term)
            || list(affinity, "preferredDuringSchedulingIgnoredDuringExecution")
                .iter()
                .any(|weighted| term(&weighted["podAffinityTerm"]))
    })
}

/// Whether one scope selects the pod.
fn in_scope(pod: &Value, scope: &str, operator: &str, values: &[Value]) -> bool {
    let terminating = pod["spec"]["activeDeadlineSeconds"].as_i64().is_some_and(|seconds| seconds >= 0);
    match scope {
        "Terminating" => terminating,
        "NotTerminating" => !terminating,
        "BestEffort" => best_effort(pod),
        "NotBestEffort" => !best_effort(pod),
        "CrossNamespacePodAffinity" => cross_namespace(pod),
        "PriorityClass" => {
            let class = &pod["spec"]["priorityClassName"];
            let named = class.as_str().is_some_and(|name| !name.is_empty());
            match operator {
                "In" => values.contains(class),
                "NotIn" => !values.contains(class),
                "DoesNotExist" => !named,
                _ => named,
            }
        }
        _ => false,
    }
}

/// Whether a quota is about the object: quotas with scopes are about pods.
fn selects(quota: &Value, gvr: &Gvr, object: &Value) -> bool {
    let scopes = list(&quota["spec"], "scopes");
    let expressions = list(&quota["spec"]["scopeSelector"], "matchExpressions");
    if scopes.is_empty() && expressions.is_empty() {
        return true;
    }
    if !gvr.group.is_empty() || gvr.resource != "pods" {
        return false;
    }
    scopes.iter().filter_map(Value::as_str).all(|scope| in_scope(object, scope, "Exists", &[]))
        && expressions.iter().all(|expression| {
            let scope = text(expression, "scopeName");
            in_scope(object, scope, text(expression, "operator"), list(expression, "values"))
        })
}

/// `a=1,b=2`.
fn print(amounts: &Amounts, names: &BTreeSet<&String>) -> String {
    let zero = Quantity::ZERO;
    let parts = names.iter().map(|name| format!("{name}={}", amounts.get(*name).unwrap_or(&zero)));
    parts.collect::<Vec<_>>().join(",")
}

/// Containers that do not state what the quota limits.
fn unstated(pod: &Value, hard: &Amounts) -> Option<String> {
    let mut missing: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let required: Vec<&str> = MUST_STATE.into_iter().filter(|name| hard.contains_key(*name)).collect();
    for container in ["initContainers", "containers"].iter().flat_map(|f| list(&pod["spec"], f)) {
        let stated = container_usage(container);
        for name in required.iter().filter(|name| !stated.contains_key(**name)) {
            missing.entry(name).or_default().push(text(container, "name").to_owned());
        }
    }
    if missing.is_empty() {
        return None;
    }
    let parts: Vec<String> = missing.iter().map(|(name, who)| format!("{name} for: {}", who.join(","))).collect();
    Some(format!("must specify {}", parts.join("; ")))
}

/// The new usage of a quota, or why there is none.
fn charge(quota: &Value, delta: &Amounts) -> Result<Option<Amounts>, String> {
    let hard = amounts(&quota["status"]["hard"]);
    let mut used = amounts(&quota["status"]["used"]);
    let concerned: BTreeSet<&String> =
        delta.iter().filter(|(name, amount)| hard.contains_key(*name) && !amount.is_zero()).map(|(n, _)| n).collect();
    if concerned.is_empty() {
        return Ok(None);
    }
    let before = used.clone();
    let mut exceeded = BTreeSet::new();
    for name in &concerned {
        let amount = &delta[*name];
        add(&mut used, name.as_str(), amount);
        if amount.sign() > 0 && used[*name] > hard[*name] {
            exceeded.insert(*name);
        }
    }
    if exceeded.is_empty() {
        return Ok(Some(used));
    }
    Err(format!(
        "exceeded quota: {}, requested: {}, used: {}, limited: {}",
        meta::name(quota),
        print(delta, &exceeded),
        print(&before, &exceeded),
        print(&hard, &exceeded)
    ))
}

/// What the request adds to the usage.
fn delta(request: &Request<'_>) -> Amounts {
    let mut delta = usage(request.gvr, request.object);
    for (name, amount) in usage(request.gvr, request.old) {
        let less = delta.get(&name).cloned().unwrap_or(Quantity::ZERO).sub(&amount);
        delta.insert(name, less);
    }
    delta
}

async fn check(request: &Request<'_>) -> Result<(), Status> {
    let quotas: Vec<Value> =
        request.objects.list(&quotas_gvr(), request.namespace).iter().map(|quota| quota.value()).collect();
    if quotas.is_empty() {
        return Ok(());
    }
    let delta = delta(request);
    let mut charged = Vec::new();
    for quota in quotas.iter().filter(|quota| selects(quota, request.gvr, request.object)) {
        let name = meta::name(quota);
        let limits = amounts(&quota["spec"]["hard"]);
        let known = amounts(&quota["status"]["hard"]);
        let unknown: Vec<&str> = delta
            .iter()
            .filter(|(name, amount)| amount.sign() > 0 && limits.contains_key(*name) && !known.contains_key(*name))
            .map(|(name, _)| name.as_str())
            .collect();
        if !unknown.is_empty() {
            let message = format!("status unknown for quota: {name}, resources: {}", unknown.join(","));
            return Err(request.forbidden(message));
        }
        if request.creates("", "pods")
            && let Some(reason) = unstated(request.object, &known)
        {
            return Err(request.forbidden(format!("failed quota: {name}: {reason}")));
        }
        match charge(quota, &delta) {
            Ok(Some(_)) => charged.push(name),
            Ok(None) => {}
            Err(reason) => return Err(request.forbidden(reason)),
        }
    }
    if request.dry_run {
        return Ok(());
    }
    for name in charged {
        write(request, name, &delta).await?;
    }
    Ok(())
}

/// Adds to a quota's usage; another request may have been faster, so everything is looked at again.
async fn write(request: &Request<'_>, name: &str, delta: &Amounts) -> Result<(), Status> {
    let refuse = |reason: String| request.forbidden(reason);
    let forbidden = (request.gvr.group_resource(), request.display_name().to_owned());
    let delta = delta.clone();
    let change = Box::new(move |quota: &mut Value| match charge(quota, &delta) {
        Ok(Some(used)) => {
            for (name, amount) in used {
                quota["status"]["used"][name] = amount.to_string().into();
            }
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(reason) => Err(Status::forbidden(&forbidden.0, &forbidden.1, reason)),
    });
    let user = UserInfo::system();
    let result = request.objects.modify(&quotas_gvr(), request.namespace, name, "status", &user, change).await;
    match result {
        // The quota has been deleted in the meantime.
        Err(status) if status.code == 404 => Ok(()),
        Err(status) if status.code == 409 => Err(refuse(format!("quota {name} is contended"))),
        result => result.map(drop),
    }
}

/// Whether quotas count the request. Updates count where an object can grow.
fn applies(request: &Request<'_>) -> bool {
    if request.namespace.is_empty() || !request.subresource.is_empty() || request.gvr.group == "authorization.k8s.io" {
        return false;
    }
    match request.operation {
        Operation::Create => true,
        Operation::Update => {
            request.gvr.group.is_empty()
                && matches!(request.gvr.resource.as_str(), "services" | "persistentvolumeclaims")
        }
        _ => false,
    }
}

impl Plugin for ResourceQuota {
    fn name(&self) -> &'static str {
        "ResourceQuota"
    }

    fn validate<'a>(&'a self, request: &'a mut Request<'_>) -> BoxFuture<'a, Result<(), Status>> {
        Box::pin(async move { if applies(request) { check(request).await } else { Ok(()) } })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        admission::testing::{FakeObjects, admit},
        objects::Objects,
    };

    fn quota(name: &str, hard: Value, used: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name, "namespace": "ns"},
            "spec": {"hard": hard}, "status": {"hard": hard, "used": used}})
    }

    fn pod(name: &str, cpu: Option<&str>) -> Value {
        let resources = cpu.map_or(json!({}), |cpu| json!({"requests": {"cpu": cpu}}));
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns"},
            "spec": {"containers": [{"name": "c", "resources": resources}]}})
    }

    fn used(objects: &FakeObjects) -> Value {
        objects.get(&quotas_gvr(), "ns", "q").unwrap().value()["status"]["used"].clone()
    }

    #[tokio::test]
    async fn pods_are_counted_until_they_are_too_many() {
        let hard = json!({"pods": "2", "requests.cpu": "1"});
        let objects = FakeObjects::new([quota("q", hard, json!({"pods": "0", "requests.cpu": "0"}))]);
        let plugin = ResourceQuota::default();
        admit(&plugin, &objects, pod("a", Some("500m"))).await.unwrap();
        assert_eq!(used(&objects), json!({"pods": "1", "requests.cpu": "500m"}));
        for (cpu, message) in [
            (None, "failed quota: q: must specify requests.cpu for: c"),
            (
                Some("2"),
                "exceeded quota: q, requested: requests.cpu=2, used: requests.cpu=500m, limited: requests.cpu=1",
            ),
        ] {
            let error = admit(&plugin, &objects, pod("b", cpu)).await.unwrap_err();
            assert_eq!(error.message, format!("pods \"b\" is forbidden: {message}"));
        }
        admit(&plugin, &objects, pod("b", Some("500m"))).await.unwrap();
        let error = admit(&plugin, &objects, pod("c", Some("1m"))).await.unwrap_err();
        assert_eq!(
            error.message,
            "pods \"c\" is forbidden: exceeded quota: q, requested: pods=1,requests.cpu=1m, used: pods=2,requests.cpu=1, limited: pods=2,requests.cpu=1"
        );
    }

    #[tokio::test]
    async fn anything_can_be_counted() {
        let hard = json!({"count/deployments.apps": "1", "services.nodeports": "0", "requests.storage": "1Gi"});
        let zero = json!({"count/deployments.apps": "0", "services.nodeports": "0", "requests.storage": "0"});
        let objects = FakeObjects::new([quota("q", hard, zero)]);
        let plugin = ResourceQuota::default();
        let deployment =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "ns"}});
        admit(&plugin, &objects, deployment.clone()).await.unwrap();
        assert!(admit(&plugin, &objects, deployment).await.unwrap_err().message.contains("count/deployments.apps=1"));
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "ns"},
            "spec": {"type": "NodePort", "ports": [{"port": 80}]}});
        assert!(admit(&plugin, &objects, service).await.unwrap_err().message.contains("services.nodeports=1"));
        let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": "ns"},
            "spec": {"resources": {"requests": {"storage": "5Gi"}}}});
        assert!(admit(&plugin, &objects, claim).await.unwrap_err().message.contains("requested: requests.storage=5Gi"));
    }

    #[test]
    fn scopes_choose_pods() {
        let mut quota = quota("q", json!({"pods": "1"}), json!({}));
        quota["spec"]["scopes"] = json!(["BestEffort"]);
        let gvr = Gvr::new("", "v1", "pods");
        assert!(selects(&quota, &gvr, &pod("a", None)));
        assert!(!selects(&quota, &gvr, &pod("a", Some("1"))));
        assert!(!selects(&quota, &Gvr::new("", "v1", "services"), &json!({})));
    }
}
