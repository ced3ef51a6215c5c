//! Our nftables tables: their constant skeleton, the elements in them, and the netlink socket that changes them.

pub(crate) mod element;
pub(crate) mod kernel;
pub(crate) mod skeleton;
#[cfg(test)]
mod tests;
pub(crate) mod wire;
