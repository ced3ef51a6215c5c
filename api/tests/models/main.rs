//! Random input against small independent models: who owns what after server-side apply, what a strategic merge leaves,
//! what a selector selects, what a quantity is worth.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod apply;
mod quantities;
mod selectors;
mod strategic;
