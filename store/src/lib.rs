//! isopod store.
