//! The one in-memory model of services that both the packet rules and DNS are answered from.
//!
//! [`objects`] turns API objects into small parsed values, [`plan`] says which map elements a service needs, [`shadow`]
//! keeps what every service has in the kernel and yields minimal deltas. Pure and synchronous: nothing here does I/O.

pub(crate) mod backends;
pub(crate) mod objects;
pub(crate) mod plan;
pub(crate) mod shadow;
#[cfg(test)]
pub(crate) mod tests;
