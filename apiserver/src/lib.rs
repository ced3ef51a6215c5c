//! The API server: HTTP, authentication, authorization, admission, the resource registry and its watch cache.
//!
//! A request comes in through the server, is authenticated ([`authn`]), authorized ([`authz`]) and routed to the
//! [`registry`] (reads and writes of stored objects), to discovery or to one of the [`endpoints`]. Reads are answered
//! from the [`cache`]; writes go through admission and the kind's [`registry::strategy::Strategy`] to the store, whose
//! committed events feed the cache before the write is acknowledged.

pub mod admission;
mod aggregation;
pub mod alloc;
pub mod authn;
pub mod authz;
pub mod bootstrap;
pub mod cache;
mod cel;
pub mod config;
mod custom;
mod discovery;
pub mod endpoints;
pub mod kinds;
pub mod objects;
pub mod registry;
mod render;
mod run;
mod server;
pub mod validation;
mod webhook;

pub use admission::type_warnings;
pub use config::{Config, Error, Store};
pub use isopod_store::EtcdConfig;
pub use run::{run, run_on};
