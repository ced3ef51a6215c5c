//! Our nftables tables: their constant skeleton, the elements in them, and the netlink socket that changes them.

pub(crate) mod element;
pub(crate) mod kernel;
pub(crate) mod skeleton;
pub(crate) mod wire;
#[cfg(test)]
mod tests;
