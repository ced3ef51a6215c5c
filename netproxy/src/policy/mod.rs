//! NetworkPolicies: which packets pods of this node may send and receive.
//!
//! In: policies, pods and namespaces of the whole cluster. Out: elements of constant sets, in the same batches as the
//! services'. [`objects`] parses, [`grants`] works out what one pod's policies let through, [`model`] keeps what the kernel
//! has and yields deltas.
//!
//! Worked example: policy `db` isolates pod 10.244.0.5 and lets in TCP 5432 from pods 10.244.0.7 and 10.244.1.9. That is
//! `iso_in {10.244.0.5}` and `in_peer_port {10.244.0.5 . 10.244.0.7 . tcp . 5432, 10.244.0.5 . 10.244.1.9 . tcp . 5432}`,
//! whatever else there is in the cluster. A third client pod is one element more.
//!
//! Only forwarded packets are looked at: what the node itself sends to its pods, probes above all, and what pods send to
//! their node, DNS above all, is allowed as the API wants it. Answers pass by connection tracking. A pod may always talk
//! to itself.

pub(crate) mod grants;
pub(crate) mod model;
pub(crate) mod objects;
#[cfg(test)]
mod tests;

/// Which way a packet goes, seen from the pod a policy is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}
