//! Everything isopod's components and its API server agree on: names, errors, selectors, quantities, resource tables, the
//! schema engine, patches, server-side apply and the wire formats. Pure functions over [`serde_json::Value`]; no I/O.
//!
//! Where to look:
//! - [`gvk`], [`resources`]: what kinds exist and how they are addressed.
//! - [`status`], [`field`]: errors with upstream's exact texts.
//! - [`meta`]: object metadata of a `Value`.
//! - [`schema`], [`yaml`]: decoding, pruning, defaulting.
//! - [`patch`]: JSON, merge and strategic merge patches.
//! - [`apply`]: server-side apply and managedFields.
//! - [`protobuf`]: the other wire format.
//! - [`openapi`]: the published documents.
//! - [`structural`]: CustomResourceDefinitions in the schema engine.
//! - [`names`], [`selector`], [`quantity`], [`duration`], [`text`]: the small grammars.

pub mod announcement;
pub mod apply;
pub mod duration;
pub mod field;
pub mod gvk;
pub mod meta;
pub mod names;
pub mod openapi;
pub mod patch;
pub mod pod_log;
pub mod protobuf;
pub mod quantity;
pub mod resources;
pub mod schema;
pub mod selector;
pub mod status;
pub mod structural;
pub mod text;
pub mod yaml;
