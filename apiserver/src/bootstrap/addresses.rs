//! IPAddress objects of the cluster IPs that Services hold.
//!
//! The allocator counts what Services say; these objects show it to others and keep addresses that somebody else has
//! claimed by making one. What is ours carries the allocator's label and follows the Services: each with the write of its
//! Service, and all of them here, so that what a crash has left behind is found. The rest is left alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use isopod_api::{gvk::Gvr, status::Status};
use serde_json::{Value, json};

use crate::{
    alloc::objects::{MANAGED, address, gvr},
    authn::UserInfo,
    objects::Objects,
};

fn services() -> Gvr {
    Gvr::new("", "v1", "services")
}

type Key = (Box<str>, Box<str>);

/// The addresses of the Services that have been seen.
#[derive(Default)]
pub(super) struct Addresses {
    known: BTreeMap<Key, (u64, Vec<IpAddr>)>,
}

impl Addresses {
    /// What has to be watched for [`Self::follow`].
    pub(super) fn watched() -> [Gvr; 2] {
        [services(), gvr()]
    }

    /// One look.
    pub(super) async fn follow(&mut self, objects: &dyn Objects) -> Result<(), Status> {
        // Addresses come after their Services: whoever holds one of these is among the Services read now.
        let addresses = objects.list(&gvr(), "");
        self.read(objects);
        let wanted: BTreeMap<String, &Key> = self
            .known
            .iter()
            .flat_map(|(key, (_, addresses))| addresses.iter().map(move |ip| (ip.to_string(), key)))
            .collect();
        let mut there = BTreeSet::new();
        let user = UserInfo::system();
        for object in addresses {
            let ours = object.labels.iter().any(|(k, v)| (&**k, &**v) == MANAGED);
            if ours && !wanted.contains_key(&*object.name) {
                match objects.delete(&gvr(), "", &object.name, json!({}), &user).await {
                    Err(status) if status.code != 404 => return Err(status),
                    _ => {}
                }
            } else {
                there.insert(object.name.to_string());
            }
        }
        for (ip, (namespace, name)) in wanted.iter().filter(|(ip, _)| !there.contains(*ip)) {
            super::ensure(objects, &gvr(), "", address(ip, namespace, name)).await?;
        }
        Ok(())
    }

    /// Parses the Services that changed.
    fn read(&mut self, objects: &dyn Objects) {
        let list = objects.list(&services(), "");
        let mut gone: BTreeSet<Key> = self.known.keys().cloned().collect();
        for object in &list {
            let key = (object.namespace.clone(), object.name.clone());
            gone.remove(&key);
            if self.known.get(&key).is_none_or(|(revision, _)| *revision != object.revision) {
                let service = object.value();
                let ips = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
                let ips = ips.filter_map(Value::as_str).filter_map(|ip| ip.parse().ok()).collect();
                self.known.insert(key, (object.revision, ips));
            }
        }
        self.known.retain(|key, _| !gone.contains(key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::testing::FakeObjects;

    #[tokio::test]
    async fn addresses_follow_services() {
        let objects = FakeObjects::default();
        let service = |ips: Value| json!({"metadata": {"name": "s", "namespace": "d"}, "spec": {"clusterIPs": ips}});
        objects.put_as("ipaddresses", json!({"metadata": {"name": "10.0.0.9"}, "spec": {"parentRef": {"name": "x"}}}));
        let names = || objects.list(&gvr(), "").iter().map(|o| o.name.to_string()).collect::<Vec<_>>();
        let mut addresses = Addresses::default();
        for (ips, want) in [
            (json!(["10.0.0.1"]), vec!["10.0.0.1", "10.0.0.9"]),
            (json!(["10.0.0.2"]), vec!["10.0.0.2", "10.0.0.9"]),
            (json!(["None"]), vec!["10.0.0.9"]),
        ] {
            objects.put_as("services", service(ips));
            addresses.follow(&objects).await.unwrap();
            assert_eq!(names(), want);
        }
        objects.put_as("services", service(json!(["10.0.0.3"])));
        addresses.follow(&objects).await.unwrap();
        objects.remove("services", "d", "s");
        addresses.follow(&objects).await.unwrap();
        assert_eq!(names(), ["10.0.0.9"]);
    }
}
