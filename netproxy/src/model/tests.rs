//! Builders for tests, and tests of the model.

use super::objects::*;

/// A ClusterIP service; ports are name, port, node port.
pub(crate) fn service(namespace: &str, name: &str, ips: &[&str], ports: &[(&str, u16, u16)]) -> Service {
    Service {
        name: ServiceName::new(namespace, name),
        kind: Kind::Cluster,
        ours: true,
        cluster_ips: ips.iter().map(|a| a.parse().unwrap()).collect(),
        external_ips: [].into(),
        balancer_ips: [].into(),
        source_ranges: [].into(),
        ports: ports
            .iter()
            .map(|(name, port, node_port)| ServicePort {
                name: (*name).into(),
                protocol: Protocol::Tcp,
                port: *port,
                node_port: *node_port,
            })
            .collect(),
        affinity: None,
        external_policy: Policy::Cluster,
        internal_policy: Policy::Cluster,
        health_check_node_port: 0,
    }
}

/// A slice with one port; endpoints are address and node, all ready.
pub(crate) fn slice(service: &ServiceName, port_name: &str, port: u16, endpoints: &[(&str, &str)]) -> Slice {
    Slice {
        service: service.clone(),
        name: "slice".into(),
        changed: None,
        ports: [SlicePort { name: port_name.into(), protocol: Protocol::Tcp, port }].into(),
        endpoints: endpoints
            .iter()
            .map(|(address, node)| Endpoint {
                address: address.parse().unwrap(),
                ready: true,
                serving: true,
                terminating: false,
                here: *node == "me",
                rare: None,
            })
            .collect(),
    }
}
