//! Nodes: their health as taints, evictions from those that are gone, their part of the pod network, and the pods they
//! leave behind.

pub(crate) mod eviction;
pub(crate) mod ipam;
pub(crate) mod lifecycle;
pub(crate) mod pod_gc;
