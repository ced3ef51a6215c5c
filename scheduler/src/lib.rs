//! isopod scheduler.
