//! Who stands for a Service's addresses on the network: what the controller that decides and the node agree about.

/// Condition of a Service that has addresses of a pool.
pub const CONDITION: &str = "isopod.dev/Announced";

/// The condition's message for a node that announces the addresses.
pub fn message(node: &str) -> String {
    format!("by node {node}")
}

/// The node that a message names.
pub fn node(message: &str) -> Option<&str> {
    message.strip_prefix("by node ")
}
