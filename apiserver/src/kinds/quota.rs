//! ResourceQuotas and LimitRanges.

use std::cmp::Ordering;

use isopod_api::{field::ErrorList, quantity::Quantity};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, internal, resources},
};

/// `resourcequotas`.
pub(crate) struct ResourceQuota;
/// `limitranges`.
pub(crate) struct LimitRange;

const SCOPES: &[&str] = &[
    "Terminating",
    "NotTerminating",
    "BestEffort",
    "NotBestEffort",
    "PriorityClass",
    "CrossNamespacePodAffinity",
    "VolumeAttributesClass",
];

impl Strategy for ResourceQuota {
    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        obj["status"] = json!({});
    }

    fn prepare_for_update(&self, cx: &Context<'_>, new: &mut Value, old: &Value) {
        if cx.subresource.is_empty() {
            new["status"] = old["status"].clone();
        }
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        hard(&mut e, &spec.get("hard"));
        scopes(&mut e, &spec);
        scope_selector(&mut e, &spec);
        e.0
    }

    fn validate_update(&self, cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        if cx.subresource == "status" {
            let mut e = Errs::new();
            for list in ["hard", "used"] {
                hard(&mut e, &At::field(new, "status").get(list));
            }
            return e.0;
        }
        let mut e = Errs(self.validate(cx, new));
        let at = At::field(new, "spec").get("scopes");
        let sorted = |v: &Value| {
            let mut list: Vec<String> =
                v.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
            list.sort();
            list
        };
        if sorted(at.v) != sorted(&old["spec"]["scopes"]) {
            e.invalid(&at, "field is immutable");
        }
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        let list = |limits: bool| {
            let mut parts: Vec<String> = obj["status"]["hard"]
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(name, _)| name.starts_with("limits.") == limits)
                .map(|(name, hard)| {
                    let used = obj["status"]["used"][name.as_str()].as_str().unwrap_or("0");
                    format!("{name}: {used}/{}", hard.as_str().unwrap_or_default())
                })
                .collect();
            parts.sort();
            json!(parts.join(", "))
        };
        vec![table::name(obj), list(false), list(true), table::age(obj, now)]
    }
}

fn hard(e: &mut Errs, list: &At<'_>) {
    for (name, value) in list.entries() {
        resources::quota_resource_name(e, &value, name);
        resources::quantity_value(e, &value, name);
    }
}

/// What a quota can say of pods.
const OF_PODS: [&str; 7] = ["pods", "cpu", "memory", "limits.cpu", "limits.memory", "requests.cpu", "requests.memory"];

/// Which standard resources a scope can limit; of others nothing is known.
fn applies(scope: &str, resource: &str) -> bool {
    match scope {
        _ if !resources::is_quota_resource(resource) => true,
        "BestEffort" => resource == "pods",
        "VolumeAttributesClass" => ["persistentvolumeclaims", "requests.storage"].contains(&resource),
        _ => OF_PODS.contains(&resource),
    }
}

fn scopes(e: &mut Errs, spec: &At<'_>) {
    let at = spec.get("scopes");
    let scopes = at.strings();
    for scope in &scopes {
        if !SCOPES.contains(scope) {
            e.invalid(&at, "unsupported scope");
        }
        for (resource, _) in spec.get("hard").entries() {
            if SCOPES.contains(scope) && !applies(scope, resource) {
                e.invalid(&at, "unsupported scope applied to resource");
            }
        }
    }
    conflicts(e, &scopes, &at);
}

fn conflicts(e: &mut Errs, scopes: &[&str], at: &At<'_>) {
    for pair in [["BestEffort", "NotBestEffort"], ["Terminating", "NotTerminating"]] {
        if pair.iter().all(|s| scopes.contains(s)) {
            e.invalid(at, "conflicting scopes");
        }
    }
}

fn scope_selector(e: &mut Errs, spec: &At<'_>) {
    let expressions = spec.get("scopeSelector.matchExpressions");
    for item in expressions.items() {
        // Upstream leaves the index out.
        let at = At::new(expressions.path.clone(), item.v);
        let (scope, operator, values) = (at.get("scopeName"), at.get("operator"), at.get("values"));
        if !SCOPES.contains(&scope.s()) {
            e.invalid_str(&scope, "unsupported scope");
        }
        for (resource, _) in spec.get("hard").entries() {
            if SCOPES.contains(&scope.s()) && !applies(scope.s(), resource) {
                let shown = internal::named("ScopeSelector", spec.get("scopeSelector").v);
                e.invalid_as(&expressions, shown, "unsupported scope applied to resource");
            }
        }
        let existence = ["Terminating", "NotTerminating", "BestEffort", "NotBestEffort", "CrossNamespacePodAffinity"];
        if existence.contains(&scope.s()) && operator.s() != "Exists" {
            e.invalid_str(&operator, "must be 'Exists' when scope is any of ResourceQuotaScopeTerminating, ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity");
        }
        match operator.s() {
            "In" | "NotIn" => {
                if values.len() == 0 {
                    e.required(
                        &values,
                        "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector",
                    );
                }
            }
            "Exists" | "DoesNotExist" => {
                if values.len() > 0 {
                    e.invalid(
                        &values,
                        "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector",
                    );
                }
            }
            _ => e.invalid_str(&operator, "not a valid selector operator"),
        }
    }
    let named: Vec<&str> = expressions.items().iter().map(|at| at.get("scopeName").s()).collect();
    conflicts(e, &named, &At::new(expressions.path, spec.get("scopes").v));
}

impl Strategy for LimitRange {
    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let mut seen = Vec::new();
        for at in At::field(obj, "spec").get("limits").items() {
            let kind = at.get("type");
            limit_type(&mut e, &kind);
            if seen.contains(&kind.s()) {
                e.duplicate(&kind, kind.s());
            }
            seen.push(kind.s());
            limit(&mut e, &at);
        }
        e.0
    }
}

fn limit_type(e: &mut Errs, at: &At<'_>) {
    let messages = isopod_api::names::qualified_name(at.s());
    if messages.is_empty() && !at.s().contains('/') && !["Pod", "Container", "PersistentVolumeClaim"].contains(&at.s())
    {
        e.invalid(at, "must be a standard limit type or fully qualified");
    }
    e.messages(at, messages);
}

fn limit(e: &mut Errs, at: &At<'_>) {
    let kind = at.get("type").s();
    let list = |field: &str| at.get(field);
    let name_check = if ["Pod", "Container"].contains(&kind) {
        resources::container_resource_name
    } else {
        resources::resource_name
    };
    let mut names: Vec<&str> = Vec::new();
    let mut known = |e: &mut Errs, field: &str| {
        for (name, value) in list(field).entries() {
            name_check(e, &value, name);
            if !names.contains(&name) {
                names.push(name);
            }
        }
    };
    known(e, "max");
    known(e, "min");
    for field in ["default", "defaultRequest"] {
        if kind != "Pod" {
            known(e, field);
        } else if list(field).len() > 0 {
            e.forbidden(&list(field), "may not be specified when `type` is 'Pod'");
        }
    }
    if kind == "PersistentVolumeClaim"
        && list("min").v.get("storage").is_none()
        && list("max").v.get("storage").is_none()
    {
        e.required(&at.get("limits"), "either minimum or maximum storage value is required, but neither was provided");
    }
    known(e, "maxLimitRequestRatio");
    names.sort_unstable();
    for name in names {
        limits_of(e, at, name);
    }
}

fn limits_of(e: &mut Errs, at: &At<'_>, name: &str) {
    let value = |field: &str| resources::quantity(at.get(field).key(name).v);
    let (max, min, default, request, ratio) =
        (value("max"), value("min"), value("default"), value("defaultRequest"), value("maxLimitRequestRatio"));
    let greater = |a: &Option<Quantity>, b: &Option<Quantity>| match (a, b) {
        (Some(a), Some(b)) => a.cmp(b) == Ordering::Greater,
        _ => false,
    };
    let text = |q: &Option<Quantity>| q.as_ref().map(ToString::to_string).unwrap_or_default();
    let mut report = |field: &str, shown: &Option<Quantity>, detail: String| {
        e.invalid_as(&at.get(field).key(name), text(shown), &detail);
    };
    if greater(&min, &max) {
        report("min", &min, format!("min value {} is greater than max value {}", text(&min), text(&max)));
    }
    if greater(&min, &request) {
        report(
            "defaultRequest",
            &request,
            format!("min value {} is greater than default request value {}", text(&min), text(&request)),
        );
    }
    if greater(&request, &max) {
        report(
            "defaultRequest",
            &request,
            format!("default request value {} is greater than max value {}", text(&request), text(&max)),
        );
    }
    if greater(&request, &default) {
        report(
            "defaultRequest",
            &request,
            format!("default request value {} is greater than default limit value {}", text(&request), text(&default)),
        );
    }
    if greater(&min, &default) {
        report("default", &min, format!("min value {} is greater than default value {}", text(&min), text(&default)));
    }
    if greater(&default, &max) {
        report("default", &max, format!("default value {} is greater than max value {}", text(&default), text(&max)));
    }
    if let Some(ratio_value) = &ratio
        && ratio_value.milli_value() < 1000
    {
        report("maxLimitRequestRatio", &ratio, format!("ratio {ratio_value} is less than 1"));
    }
    if let (Some(own), Some(min), Some(max)) = (&ratio, &min, &max) {
        let bound = max.as_f64() / min.as_f64();
        if own.as_f64() > bound {
            report("maxLimitRequestRatio", &ratio, format!("ratio {own} is greater than max/min = {bound:.6}"));
        }
    }
    if !resources::overcommit_allowed(name) && default.is_some() && request.is_some() && default != request {
        report(
            "defaultRequest",
            &request,
            format!("default value {} must equal to defaultRequest value {} in {name}", text(&default), text(&request)),
        );
    }
}
