//! Cluster DNS: the Kubernetes DNS specification answered from the model, other names forwarded.
//!
//! [`zone`] holds what is known of services and is pure; [`answer`] turns a query into a response or into a wish to ask
//! upstream; [`forward`] asks upstream and caches; [`server`] owns the sockets.

pub(crate) mod answer;
pub(crate) mod forward;
pub(crate) mod server;
pub(crate) mod zone;
