//! One file per kind: its [`Strategy`].

use isopod_api::gvk::Gvr;

use crate::registry::strategy::{Generic, Strategy};

/// The strategy of a resource.
pub fn strategy_for(_gvr: &Gvr) -> &'static dyn Strategy {
    &Generic
}
