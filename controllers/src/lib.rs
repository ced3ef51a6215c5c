//! isopod controllers.
