//! Small kinds: Leases, PriorityClasses, RuntimeClasses.

use isopod_api::{field::ErrorList, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    registry::{
        strategy::{Context, Strategy},
        table,
    },
    validation::{At, Errs, internal, pod_warnings, resources, same, scheduling},
};

/// `leases`.
pub(crate) struct Lease;
/// `priorityclasses`.
pub(crate) struct PriorityClass;
/// `runtimeclasses`.
pub(crate) struct RuntimeClass;

const SYSTEM: &[(&str, i64)] = &[("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

impl Strategy for Lease {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let spec = At::field(obj, "spec");
        let duration = spec.get("leaseDurationSeconds");
        if duration.int().is_some_and(|n| n <= 0) {
            e.invalid(&duration, "must be greater than 0");
        }
        e.non_negative(&spec.get("leaseTransitions"));
        e.0
    }

    fn prepare_for_create(&self, _cx: &Context<'_>, obj: &mut Value) {
        uncoordinated(obj);
    }

    fn prepare_for_update(&self, _cx: &Context<'_>, new: &mut Value, _old: &Value) {
        uncoordinated(new);
    }

    fn allow_create_on_update(&self) -> bool {
        true
    }

    fn allow_unconditional_update(&self) -> bool {
        false
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::or(&obj["spec"]["holderIdentity"], ""), table::age(obj, now)]
    }
}

/// Coordinated leader election is off, so its fields are not kept.
fn uncoordinated(lease: &mut Value) {
    if let Some(spec) = lease["spec"].as_object_mut() {
        spec.remove("strategy");
        spec.remove("preferredHolder");
    }
}

impl Strategy for PriorityClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let (name, value) = (meta::name(obj), At::field(obj, "value"));
        if name.starts_with("system-") {
            let known = SYSTEM.iter().find(|(n, _)| *n == name);
            let detail = match known {
                None => Some(format!("{name} is not a known system priority class")),
                Some((_, wanted)) if *wanted != value.int0() => {
                    Some(format!("value of {name} PriorityClass must be {wanted}"))
                }
                Some(_) if obj["globalDefault"] == true => {
                    Some(format!("globalDefault of {name} PriorityClass must be false"))
                }
                Some(_) => None,
            };
            if let Some(detail) = detail {
                let at = At::field(obj, "metadata").get("name");
                e.forbidden(
                    &at,
                    &format!(
                        "priority class names with 'system-' prefix are reserved for system use only. error: {detail}"
                    ),
                );
            }
        } else if value.int0() > 1_000_000_000 {
            e.forbidden(&value, "maximum allowed value of a user defined priority is 1000000000");
        }
        e.one_of_if_set(&At::field(obj, "preemptionPolicy"), &["PreemptLowerPriority", "Never"]);
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if new["value"].as_i64().unwrap_or_default() != old["value"].as_i64().unwrap_or_default() {
            e.forbidden(&At::field(new, "value"), "may not be changed in an update.");
        }
        e.immutable(&At::field(new, "preemptionPolicy"), &old["preemptionPolicy"]);
        e.0
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![
            table::name(obj),
            table::int(&obj["value"]),
            json!(obj["globalDefault"] == true),
            table::age(obj, now),
            table::or(&obj["preemptionPolicy"], ""),
        ]
    }
}

impl Strategy for RuntimeClass {
    fn validate(&self, _cx: &Context<'_>, obj: &Value) -> ErrorList {
        let mut e = Errs::new();
        let handler = At::field(obj, "handler");
        if handler.s().is_empty() {
            e.required(&handler, "");
        } else {
            e.dns_label(&handler);
        }
        resources::overhead(&mut e, &At::field(obj, "overhead"), &obj["overhead"]["podFixed"]);
        let scheduling_at = At::field(obj, "scheduling");
        if scheduling_at.is_set() {
            crate::validation::meta::labels(&mut e, &scheduling_at.get("nodeSelector"));
            let tolerations = scheduling_at.get("tolerations").items();
            scheduling::tolerations(&mut e, &scheduling_at.get("tolerations"));
            let key = |at: &At<'_>| ["key", "operator", "value", "effect"].map(|field| at.get(field).s().to_owned());
            for (i, at) in tolerations.iter().enumerate() {
                if tolerations[..i].iter().any(|before| key(before) == key(at)) {
                    e.duplicate(at, internal::named("Toleration", at.v));
                }
            }
        }
        e.0
    }

    fn validate_update(&self, _cx: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
        let mut e = Errs::new();
        if !same(&new["handler"], &old["handler"]) {
            e.immutable(&At::field(new, "handler"), &old["handler"]);
        }
        e.0
    }

    fn warnings(&self, _cx: &Context<'_>, obj: &Value, _old: Option<&Value>) -> Vec<String> {
        let selector = At::field(obj, "scheduling").get("nodeSelector");
        let known = selector.entries().into_iter().filter_map(|(key, _)| pod_warnings::deprecated_label(key));
        known.map(|text| format!("{}: {text}", selector.path)).collect()
    }

    fn cells(&self, obj: &Value, now: Timestamp) -> Vec<Value> {
        vec![table::name(obj), table::or(&obj["handler"], ""), table::age(obj, now)]
    }
}
