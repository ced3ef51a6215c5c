//! ComponentStatuses: the health of the control plane, found out when somebody asks.

use isopod_api::{gvk::Gvr, meta};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    objects::Objects,
    registry::{strategy::Strategy, table},
};

/// `componentstatuses`.
pub(crate) struct ComponentStatus;

/// Components and the lease in kube-system their leader renews.
const LED: [(&str, &str); 2] = [("scheduler", "kube-scheduler"), ("controller-manager", "kube-controller-manager")];

impl Strategy for ComponentStatus {
    fn cells(&self, obj: &Value, _now: Timestamp) -> Vec<Value> {
        let conditions = obj["conditions"].as_array().into_iter().flatten();
        let healthy = conditions.into_iter().find(|c| c["type"] == "Healthy").cloned().unwrap_or_default();
        let status = match healthy["status"].as_str() {
            None => "Unknown",
            Some("True") => "Healthy",
            Some(_) => "Unhealthy",
        };
        let text = |field: &str| json!(healthy[field].as_str().unwrap_or_default());
        vec![table::name(obj), json!(status), text("message"), text("error")]
    }
}

/// All components as they are now. The store is well when this server can answer at all.
pub(crate) fn observed(objects: &dyn Objects, now: Timestamp) -> Vec<Value> {
    let status = |name: &str, trouble: Option<String>| {
        let mut condition = match &trouble {
            None => json!({"type": "Healthy", "status": "True", "message": "ok"}),
            Some(trouble) => json!({"type": "Healthy", "status": "False", "message": trouble}),
        };
        if trouble.is_some() {
            condition["error"] = "not healthy".into();
        }
        json!({"kind": "ComponentStatus", "apiVersion": "v1", "metadata": {"name": name}, "conditions": [condition]})
    };
    let mut all: Vec<Value> = LED.iter().map(|(name, lease)| status(name, trouble(objects, lease, now))).collect();
    all.push(status("etcd-0", None));
    all
}

/// Why nobody leads.
fn trouble(objects: &dyn Objects, lease: &str, now: Timestamp) -> Option<String> {
    let gvr = Gvr::new("coordination.k8s.io", "v1", "leases");
    let Some(found) = objects.get(&gvr, "kube-system", lease) else {
        return Some(format!("lease kube-system/{lease} does not exist: it never ran"));
    };
    let spec = found.value()["spec"].clone();
    if spec["holderIdentity"].as_str().unwrap_or_default().is_empty() {
        return Some(format!("lease kube-system/{lease} has no holder: it was stopped"));
    }
    let renewed: Option<Timestamp> = spec["renewTime"].as_str().and_then(|time| time.parse().ok());
    let seconds = spec["leaseDurationSeconds"].as_i64().unwrap_or(15);
    let fresh = renewed.is_some_and(|time| now.duration_since(time).as_secs() <= seconds);
    let shown = renewed.map_or_else(|| "ever".to_owned(), meta::time);
    (!fresh).then(|| format!("lease kube-system/{lease} has not been renewed since {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::FakeObjects;

    #[test]
    fn leases_tell() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let lease = |name: &str, renewed: &str| {
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": "kube-system"},
                "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": renewed}})
        };
        assert!(
            crate::cache::Draft::new(observed(&FakeObjects::new([]), now).remove(0), &ComponentStatus)
                .finish_unstored()
                .value()["conditions"]
                .is_array()
        );
        let objects = FakeObjects::new([
            lease("kube-scheduler", "2026-01-01T00:00:50.000000Z"),
            lease("kube-controller-manager", "2026-01-01T00:00:30.000000Z"),
        ]);
        let cells: Vec<Vec<Value>> =
            observed(&objects, now).iter().map(|component| ComponentStatus.cells(component, now)).collect();
        let late = "lease kube-system/kube-controller-manager has not been renewed since 2026-01-01T00:00:30Z";
        assert_eq!(cells[0], ["scheduler", "Healthy", "ok", ""]);
        assert_eq!(cells[1], ["controller-manager", "Unhealthy", late, "not healthy"]);
        assert_eq!(cells[2], ["etcd-0", "Healthy", "ok", ""]);
    }
}
