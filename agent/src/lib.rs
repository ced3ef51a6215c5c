//! isopod agent.
