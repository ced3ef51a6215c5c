//! Our nftables tables: their constant skeleton, the elements in them, and the netlink socket that changes them.

pub(crate) mod element;
pub(crate) mod kernel;
#[cfg(test)]
mod packets;
mod raw;
pub(crate) mod skeleton;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod trace;
pub(crate) mod verify;
pub(crate) mod wire;
