//! Namespaces, classes, flow control, and the service the API server is found by.

use std::net::IpAddr;

use isopod_api::{gvk::Gvr, meta, status::Status};
use serde_json::{Value, json};

use super::{ensure, modify};
use crate::{Config, objects::Objects};

fn with_kind(row: &Value, api_version: &str, kind: &str) -> Value {
    let mut object = json!({ "apiVersion": api_version, "kind": kind });
    for (field, value) in row.as_object().into_iter().flatten() {
        object[field] = value.clone();
    }
    object
}

/// The four namespaces.
pub(super) async fn namespaces(objects: &dyn Objects, data: &Value) -> Result<(), Status> {
    let gvr = Gvr::new("", "v1", "namespaces");
    for row in super::rows(data, "namespaces") {
        ensure(objects, &gvr, "", with_kind(row, "v1", "Namespace")).await?;
    }
    Ok(())
}

/// Priority classes and flow control.
pub(super) async fn classes(objects: &dyn Objects, data: &Value) -> Result<(), Status> {
    let flow = "flowcontrol.apiserver.k8s.io";
    for (field, group, resource, kind) in [
        ("priorityClasses", "scheduling.k8s.io", "priorityclasses", "PriorityClass"),
        ("priorityLevelConfigurations", flow, "prioritylevelconfigurations", "PriorityLevelConfiguration"),
        ("flowSchemas", flow, "flowschemas", "FlowSchema"),
    ] {
        let gvr = Gvr::new(group, "v1", resource);
        for row in super::rows(data, field) {
            let mut object = with_kind(row, &gvr.api_version(), kind);
            let status = object.as_object_mut().and_then(|object| object.remove("status"));
            let name = meta::name(&object).to_owned();
            let fresh = objects.get(&gvr, "", &name).is_none();
            ensure(objects, &gvr, "", object).await?;
            if let Some(status) = status.filter(|status| fresh && status["conditions"].is_array()) {
                write_status(objects, &gvr, &name, status).await?;
            }
        }
    }
    Ok(())
}

async fn write_status(objects: &dyn Objects, gvr: &Gvr, name: &str, mut status: Value) -> Result<(), Status> {
    for condition in status["conditions"].as_array_mut().into_iter().flatten() {
        condition["lastTransitionTime"] = meta::now().into();
    }
    let user = crate::authn::UserInfo::system();
    let change = Box::new(move |object: &mut Value| {
        object["status"] = status.clone();
        Ok(())
    });
    objects.modify(gvr, "", name, "status", &user, change).await.map(drop)
}

/// The service CIDR, the `kubernetes` service and its endpoints.
pub(super) async fn service(config: &Config, objects: &dyn Objects) -> Result<(), Status> {
    let cidrs = Gvr::new("networking.k8s.io", "v1", "servicecidrs");
    if objects.get(&cidrs, "", "kubernetes").is_none() {
        let cidr = json!({ "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"}, "spec": {"cidrs": [config.service_cidr.trunc().to_string()]} });
        ensure(objects, &cidrs, "", cidr).await?;
        let message = "Kubernetes default Service CIDR is ready";
        let ready = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "", "message": message}]});
        write_status(objects, &cidrs, "kubernetes", ready).await?;
    }
    let services = Gvr::new("", "v1", "services");
    ensure(objects, &services, "default", kubernetes_service(config)).await?;
    // Endpoints may not be loopback: a pod's own loopback is not this server. A host without a network has none.
    if config.advertise.is_loopback() || config.advertise.is_unspecified() {
        return Ok(());
    }
    let endpoints = Gvr::new("", "v1", "endpoints");
    publish(objects, &endpoints, kubernetes_endpoints(config), &["subsets"]).await?;
    let slices = Gvr::new("discovery.k8s.io", "v1", "endpointslices");
    publish(objects, &slices, kubernetes_slice(config), &["addressType", "endpoints", "ports"]).await
}

/// Creates an object or restores some of its fields.
async fn publish(objects: &dyn Objects, gvr: &Gvr, wanted: Value, fields: &[&str]) -> Result<(), Status> {
    let Some(stored) = objects.get(gvr, "default", "kubernetes") else {
        return ensure(objects, gvr, "default", wanted).await;
    };
    let stored = stored.value();
    if fields.iter().all(|field| stored[field] == wanted[field]) {
        return Ok(());
    }
    modify(objects, gvr, "default", "kubernetes", |object| {
        for field in fields {
            object[*field] = wanted[*field].clone();
        }
    })
    .await
}

/// The first address of the service range.
fn service_address(config: &Config) -> IpAddr {
    config.service_cidr.hosts().next().unwrap_or_else(|| config.service_cidr.addr())
}

fn kubernetes_service(config: &Config) -> Value {
    let address = service_address(config);
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "type": "ClusterIP", "clusterIP": address.to_string(), "clusterIPs": [address.to_string()],
            "ipFamilies": [family], "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster",
            "ports": [{"name": "https", "protocol": "TCP", "port": 443, "targetPort": config.bind.port()}],
        },
    })
}

fn kubernetes_endpoints(config: &Config) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": config.advertise.to_string()}],
            "ports": [{"name": "https", "port": config.bind.port(), "protocol": "TCP"}]}],
    })
}

fn kubernetes_slice(config: &Config) -> Value {
    let family = if config.advertise.is_ipv4() { "IPv4" } else { "IPv6" };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "endpoints": [{"addresses": [config.advertise.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": config.bind.port(), "protocol": "TCP"}],
    })
}

/// Configuration other components read from the cluster.
pub(super) async fn config_maps(config: &Config, objects: &dyn Objects) -> Result<(), Status> {
    let gvr = Gvr::new("", "v1", "configmaps");
    let since = meta::now();
    let tracking = json!({ "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "kube-apiserver-legacy-service-account-token-tracking", "namespace": "kube-system"},
        "data": {"since": since.get(..10)} });
    ensure(objects, &gvr, "kube-system", tracking).await?;
    let Ok(client_ca) = tokio::fs::read_to_string(&config.client_ca).await else { return Ok(()) };
    let mut data = json!({ "client-ca-file": client_ca });
    if let Some(path) = &config.requestheader_ca
        && let Ok(ca) = tokio::fs::read_to_string(path).await
    {
        data["requestheader-allowed-names"] = r#"["front-proxy-client"]"#.into();
        data["requestheader-client-ca-file"] = ca.into();
        data["requestheader-extra-headers-prefix"] = r#"["X-Remote-Extra-"]"#.into();
        data["requestheader-group-headers"] = r#"["X-Remote-Group"]"#.into();
        data["requestheader-uid-headers"] = r#"["X-Remote-Uid"]"#.into();
        data["requestheader-username-headers"] = r#"["X-Remote-User"]"#.into();
    }
    let name = "extension-apiserver-authentication";
    if let Some(stored) = objects.get(&gvr, "kube-system", name) {
        if stored.value()["data"] == data {
            return Ok(());
        }
        return modify(objects, &gvr, "kube-system", name, |object| object["data"] = data.clone()).await;
    }
    let object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": data,
        "metadata": {"name": name, "namespace": "kube-system"} });
    ensure(objects, &gvr, "kube-system", object).await
}
