//! isopod netproxy.
