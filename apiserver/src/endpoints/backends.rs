//! The endpoints of a service that are ready.

use isopod_api::gvk::Gvr;
use serde_json::Value;

use crate::{
    admission::{list, text},
    objects::Objects,
};

/// Address and port of every ready endpoint behind a service's port, by the port's name.
pub(crate) fn ready(objects: &dyn Objects, namespace: &str, service: &str, port_name: &str) -> Vec<(String, u16)> {
    let slices = objects.list(&Gvr::new("discovery.k8s.io", "v1", "endpointslices"), namespace);
    let slices = slices.iter().filter(|slice| slice.label("kubernetes.io/service-name") == Some(service));
    let mut out = Vec::new();
    for slice in slices.map(|slice| slice.value()) {
        let port = list(&slice, "ports").iter().find(|p| text(p, "name") == port_name);
        let Some(port) = port.and_then(|p| p["port"].as_u64()).and_then(|p| u16::try_from(p).ok()) else { continue };
        for endpoint in list(&slice, "endpoints").iter().filter(|e| e["conditions"]["ready"] != false) {
            if let Some(host) = list(endpoint, "addresses").first().and_then(Value::as_str) {
                out.push((host.to_owned(), port));
            }
        }
    }
    out
}
