//! IPAddress objects: what shows to others that a Service holds a cluster IP.
//!
//! The write of a Service is followed by those of its addresses before it is answered; what a crash leaves behind is found
//! by comparing all of them later. Objects without the allocator's label are somebody else's and left alone.

use std::collections::BTreeSet;

use isopod_api::{gvk::Gvr, meta, status::reason};
use serde_json::{Value, json};

use crate::{authn::UserInfo, objects::Objects};

/// The label of the objects that mirror Services.
pub(crate) const MANAGED: (&str, &str) = ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io");

/// `ipaddresses`.
pub(crate) fn gvr() -> Gvr {
    Gvr::new("networking.k8s.io", "v1", "ipaddresses")
}

/// The object of an address that a Service holds.
pub(crate) fn address(ip: &str, namespace: &str, name: &str) -> Value {
    let family = if ip.contains(':') { "IPv6" } else { "IPv4" };
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "IPAddress",
        "metadata": {"name": ip, "labels": {"ipaddress.kubernetes.io/ip-family": family, MANAGED.0: MANAGED.1}},
        "spec": {"parentRef": {"resource": "services", "namespace": namespace, "name": name}},
    })
}

/// The addresses that a Service holds.
pub(crate) fn held(service: &Value) -> BTreeSet<String> {
    let ips = service["spec"]["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str);
    ips.filter_map(|ip| ip.parse::<std::net::IpAddr>().ok()).map(|ip| ip.to_string()).collect()
}

/// Brings the objects in line with a Service that was and is; either may be null.
pub(crate) async fn follow(objects: &dyn Objects, old: &Value, new: &Value) {
    let (before, now) = (held(old), held(new));
    for ip in now.difference(&before) {
        let created = objects.create(&gvr(), "", address(ip, meta::namespace(new), meta::name(new))).await;
        if let Err(status) = created
            && status.reason != reason::ALREADY_EXISTS
        {
            tracing::warn!(ip, error = status.message, "the IPAddress of a Service is made later");
        }
    }
    for ip in before.difference(&now) {
        let ours = |object: &Value| {
            let parent = &object["spec"]["parentRef"];
            meta::label(object, MANAGED.0) == Some(MANAGED.1)
                && (parent["namespace"] == meta::namespace(old) && parent["name"] == meta::name(old))
        };
        if objects.get(&gvr(), "", ip).is_some_and(|object| ours(&object.value())) {
            let deleted = objects.delete(&gvr(), "", ip, json!({}), &UserInfo::system()).await;
            if let Err(status) = deleted
                && status.code != 404
            {
                tracing::warn!(ip, error = status.message, "the IPAddress of a Service goes later");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::FakeObjects;

    #[tokio::test]
    async fn addresses_follow_one_service() {
        let objects = FakeObjects::default();
        let service = |ips: Value| json!({"metadata": {"name": "s", "namespace": "d"}, "spec": {"clusterIPs": ips}});
        let names = || objects.list(&gvr(), "").iter().map(|o| o.name.to_string()).collect::<Vec<_>>();
        objects.put_as("ipaddresses", json!({"metadata": {"name": "10.0.0.9"}, "spec": {"parentRef": {"name": "x"}}}));
        objects.put_as("ipaddresses", address("10.0.0.8", "d", "another"));
        let both = service(json!(["10.0.0.1", "fd00::1"]));
        follow(&objects, &Value::Null, &both).await;
        assert_eq!(names(), ["10.0.0.1", "10.0.0.8", "10.0.0.9", "fd00::1"]);
        follow(&objects, &both, &service(json!(["10.0.0.1"]))).await;
        assert_eq!(names(), ["10.0.0.1", "10.0.0.8", "10.0.0.9"]);
        // What is not this Service's stays.
        follow(&objects, &service(json!(["10.0.0.1", "10.0.0.8", "10.0.0.9", "None"])), &Value::Null).await;
        assert_eq!(names(), ["10.0.0.8", "10.0.0.9"]);
    }
}
